//! A drive of either kind, as a controller sees it.

use crate::ata::AtaDisk;
use crate::ata::commands::EXECUTE_DEVICE_DIAGNOSTIC;
use crate::atapi::CdRom;
use crate::link::{Link, Outcome, Stop, TaskFile, status};

/// What hangs on a cable.
pub enum Drive {
    Disk(AtaDisk),
    CdRom(CdRom),
}

/// What the count and LBA registers hold after a reset, by which the host tells drives apart (ATA8-ACS, 6.6).
const DISK_SIGNATURE: (u16, u64) = (1, 0x00_0001);
pub(crate) const PACKET_SIGNATURE: (u16, u64) = (1, 0xeb_1401);

impl Drive {
    /// Does a command. All that takes time is waited for, so this is for a thread of its own.
    pub fn execute(&self, command: &TaskFile, link: &mut impl Link) -> Result<Outcome, Stop> {
        if command.command == EXECUTE_DEVICE_DIAGNOSTIC {
            self.reset();
            return Ok(self.signature());
        }
        match self {
            Drive::Disk(disk) => disk.execute(command, link),
            Drive::CdRom(drive) => drive.execute(command, link),
        }
    }

    /// What the registers hold after power-on, a reset, or EXECUTE DEVICE DIAGNOSTIC.
    pub fn signature(&self) -> Outcome {
        let ((count, lba), status) = match self {
            Drive::Disk(_) => (DISK_SIGNATURE, status::READY | status::SEEK_COMPLETE),
            // A packet drive says that it is ready only after its first command (ATA8-APT, 9.2).
            Drive::CdRom(_) => (PACKET_SIGNATURE, 0),
        };
        // Error register: no error detected.
        Outcome { status, error: 1, count, lba, device: 0 }
    }

    pub fn is_packet(&self) -> bool {
        matches!(self, Drive::CdRom(_))
    }

    /// A reset by the host: by a register bit or over the cable.
    pub fn reset(&self) {
        match self {
            Drive::Disk(disk) => disk.reset(),
            Drive::CdRom(drive) => drive.reset(),
        }
    }

    /// Power-on: nothing is left of what the host has set.
    pub fn power_on(&self) {
        match self {
            Drive::Disk(disk) => disk.power_on(),
            Drive::CdRom(drive) => drive.power_on(),
        }
    }
}
