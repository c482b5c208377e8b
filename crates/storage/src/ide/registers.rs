//! The registers of a channel, as software writes and reads them (ATA-5, 7).

use crate::drive::Drive;
use crate::link::{Outcome, TaskFile, status};

/// Offsets in the command block.
pub const DATA: u64 = 0;
const ERROR_FEATURES: u64 = 1;
const COUNT: u64 = 2;
const LBA_LOW: u64 = 3;
const LBA_MID: u64 = 4;
const LBA_HIGH: u64 = 5;
pub const DEVICE: u64 = 6;
pub const STATUS_COMMAND: u64 = 7;

/// Device register: the second drive is meant. Bits 7 and 5 read as ones in old drives, and are obsolete.
const SELECT: u8 = 1 << 4;
/// Device control register: no interrupts; reset; the previous contents are read.
pub const NO_INTERRUPT: u8 = 1 << 1;
pub const RESET: u8 = 1 << 2;
pub const PREVIOUS: u8 = 1 << 7;

/// A register with its previous content.
#[derive(Clone, Copy, Debug, Default)]
struct Pair {
    current: u8,
    previous: u8,
}

impl Pair {
    fn write(&mut self, value: u8) {
        self.previous = std::mem::replace(&mut self.current, value);
    }

    fn set(&mut self, current: u8, previous: u8) {
        *self = Pair { current, previous };
    }

    fn read(&self, previous: bool) -> u8 {
        if previous { self.previous } else { self.current }
    }

    fn word(&self) -> u16 {
        u16::from_be_bytes([self.previous, self.current])
    }
}

/// The task file of one drive.
#[derive(Clone, Debug, Default)]
pub struct Registers {
    features: Pair,
    count: Pair,
    lba: [Pair; 3],
    device: u8,
    pub status: u8,
    pub error: u8,
}

impl Registers {
    /// What the drive shows when a command has ended.
    pub fn show(&mut self, outcome: &Outcome) {
        let [low, high] = outcome.count.to_le_bytes();
        self.count.set(low, high);
        let [l0, l1, l2, l3, l4, l5, ..] = outcome.lba.to_le_bytes();
        for (pair, (current, previous)) in self.lba.iter_mut().zip([(l0, l3), (l1, l4), (l2, l5)]) {
            pair.set(current, previous);
        }
        self.device = self.device & 0xf0 | outcome.device & 0x0f;
        (self.status, self.error) = (outcome.status, outcome.error);
    }

    /// What it shows after a reset.
    pub fn sign(&mut self, drive: &Drive) {
        self.show(&drive.signature());
        self.device &= SELECT;
    }

    /// Interrupt reason of a packet command.
    pub fn show_reason(&mut self, reason: u8) {
        self.count.current = reason;
    }

    /// Interrupt reason and length of the next block of a packet command's data.
    pub fn show_packet_phase(&mut self, reason: u8, length: u16) {
        let [low, high] = length.to_le_bytes();
        let [_, mid, top] = &mut self.lba;
        (mid.current, top.current) = (low, high);
        self.show_reason(reason);
    }

    pub fn read(&self, offset: u64, previous: bool) -> u8 {
        let [low, mid, high] = &self.lba;
        match offset {
            ERROR_FEATURES => self.error,
            COUNT => self.count.read(previous),
            LBA_LOW => low.read(previous),
            LBA_MID => mid.read(previous),
            LBA_HIGH => high.read(previous),
            DEVICE => self.device | 0xa0,
            STATUS_COMMAND => self.status,
            _ => 0xff,
        }
    }

    /// Takes a parameter. Both drives of a cable do.
    pub fn write(&mut self, offset: u64, value: u8) {
        let [low, mid, high] = &mut self.lba;
        match offset {
            ERROR_FEATURES => self.features.write(value),
            COUNT => self.count.write(value),
            LBA_LOW => low.write(value),
            LBA_MID => mid.write(value),
            LBA_HIGH => high.write(value),
            DEVICE => self.device = value,
            _ => {}
        }
    }

    pub fn device(&self) -> u8 {
        self.device & SELECT
    }

    /// Which drive the device register selects.
    pub fn selected(&self) -> usize {
        usize::from(self.device & SELECT != 0)
    }

    pub fn task_file(&self, command: u8) -> TaskFile {
        let [low, mid, high] = &self.lba;
        let bytes = [low.current, mid.current, high.current, low.previous, mid.previous, high.previous, 0, 0];
        TaskFile {
            features: self.features.word(),
            count: self.count.word(),
            lba: u64::from_le_bytes(bytes),
            device: self.device,
            command,
        }
    }

    pub fn is_busy(&self) -> bool {
        self.status & (status::BUSY | status::DATA_REQUEST) != 0
    }
}
