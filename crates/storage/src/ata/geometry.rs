//! Cylinders, heads and sectors: how drives were addressed before LBA, and how BIOSes still ask.

use crate::link::TaskFile;

/// The most that the registers and IDENTIFY DEVICE have room for.
const MOST_CYLINDERS: u64 = 16383;
const HEADS: u8 = 16;
const SECTORS: u8 = 63;

/// A translation of cylinder, head and sector (from 1) to sector numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub cylinders: u16,
    pub heads: u8,
    pub sectors: u8,
}

impl Geometry {
    /// What a drive of so many sectors starts with.
    pub fn default_for(sectors: u64) -> Self {
        Self::with(sectors, HEADS, SECTORS)
    }

    fn with(total: u64, heads: u8, sectors: u8) -> Self {
        let cylinder = (u64::from(heads) * u64::from(sectors)).max(1);
        let cylinders = (total / cylinder).clamp(1, MOST_CYLINDERS) as u16;
        Geometry { cylinders, heads, sectors }
    }

    /// What INITIALIZE DEVICE PARAMETERS asks for, if it is possible.
    pub fn chosen(total: u64, heads: u8, sectors: u8) -> Option<Self> {
        (heads > 0 && sectors > 0 && sectors <= SECTORS).then(|| Self::with(total, heads, sectors))
    }

    /// Sectors that can be reached so.
    pub fn capacity(&self) -> u32 {
        u32::from(self.cylinders) * u32::from(self.heads) * u32::from(self.sectors)
    }

    /// The number of the sector that a command names; `None`: there is no such.
    pub fn sector(&self, command: &TaskFile) -> Option<u64> {
        let sector = command.lba as u8;
        let cylinder = (command.lba >> 8) as u16;
        let head = command.device & 15;
        if sector == 0 || sector > self.sectors || head >= self.heads || cylinder >= self.cylinders {
            return None;
        }
        let track = u64::from(cylinder) * u64::from(self.heads) + u64::from(head);
        Some(track * u64::from(self.sectors) + u64::from(sector) - 1)
    }
}
