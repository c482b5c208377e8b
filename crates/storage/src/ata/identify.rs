//! IDENTIFY DEVICE (ATA8-ACS, 7.16): 256 words about the drive.

use super::{AtaDisk, Cable, MOST_MULTIPLE, QUEUE_DEPTH, SECTORS_28};

/// Words of either IDENTIFY command, in the making.
pub struct Words([u16; 256]);

impl Words {
    pub fn new() -> Self {
        Words([0; 256])
    }

    pub fn set(&mut self, index: usize, value: u16) {
        if let Some(word) = self.0.get_mut(index) {
            *word = value;
        }
    }

    pub fn set32(&mut self, index: usize, value: u32) {
        self.set(index, value as u16);
        self.set(index + 1, (value >> 16) as u16);
    }

    /// Text has its first character in the high byte, and spaces up to its end.
    pub fn text(&mut self, index: usize, words: usize, text: &str) {
        let mut bytes = text.bytes().map(|byte| if byte.is_ascii_graphic() { byte } else { b' ' });
        for index in index..index + words {
            let (high, low) = (bytes.next().unwrap_or(b' '), bytes.next().unwrap_or(b' '));
            self.set(index, u16::from_be_bytes([high, low]));
        }
    }

    /// As they are transferred: with the integrity word, which makes the sum of all bytes 0.
    pub fn into_bytes(mut self) -> Vec<u8> {
        self.set(255, 0x00a5);
        let mut bytes: Vec<u8> = self.0.iter().flat_map(|word| word.to_le_bytes()).collect();
        let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        if let Some(last) = bytes.last_mut() {
            *last = sum.wrapping_neg();
        }
        bytes
    }
}

/// The modes that are there (word 63 or 88), and the one that is chosen: `mode` is as SET FEATURES has it.
pub fn modes(available: u16, class: u8, mode: u8) -> u16 {
    let chosen = if mode & 0xf8 == class { 1u16 << (8 + (mode & 7)) } else { 0 };
    available | chosen
}

pub fn identify(disk: &AtaDisk) -> Vec<u8> {
    let sectors = disk.sectors();
    let settings = disk.settings();
    let visible = settings.visible;
    let default = super::Geometry::default_for(sectors);
    let flag = |on: bool, bit: u32| u16::from(on) << bit;
    let mut words = Words::new();
    // A fixed drive.
    words.set(0, 0x0040);
    words.set(1, default.cylinders);
    words.set(3, default.heads.into());
    // Bytes in a track and in a sector, as the first ATA had them: old BIOSes read as much (ATA-1, 9.9).
    words.set(4, 512 * u16::from(default.sectors));
    words.set(5, 512);
    words.set(6, default.sectors.into());
    words.text(10, 10, &disk.serial);
    words.text(23, 4, env!("CARGO_PKG_VERSION"));
    words.text(27, 20, "Ringer disk");
    words.set(47, 0x8000 | u16::from(MOST_MULTIPLE));
    // Doubleword I/O: for what was before word 48 had another meaning.
    words.set(48, 0x0001);
    // IORDY, LBA, DMA; standby timers as the standard has them.
    words.set(49, 0x2f00);
    words.set(50, 0x4000);
    words.set(51, 0x0200);
    words.set(52, 0x0200);
    // Words 54 to 58, 64 to 70 and 88 are valid.
    words.set(53, 0x0007);
    words.set(54, settings.geometry.cylinders);
    words.set(55, settings.geometry.heads.into());
    words.set(56, settings.geometry.sectors.into());
    words.set32(57, settings.geometry.capacity());
    words.set(59, if settings.multiple > 0 { 0x0100 | u16::from(settings.multiple) } else { 0 });
    words.set32(60, visible.min(SECTORS_28) as u32);
    words.set(63, modes(0x07, 0x20, settings.mode));
    words.set(64, 0x0003);
    [65, 66, 67, 68].iter().for_each(|index| words.set(*index, 120));
    // TRIM leaves zeros, and always the same.
    let trim = !disk.disk.read_only();
    words.set(69, flag(trim, 14) | flag(trim, 5));
    words.set(75, u16::from(QUEUE_DEPTH) - 1);
    if disk.cable == Cable::Serial {
        // Generations 1 to 3, NCQ.
        words.set(76, 0x010e);
        words.set(222, 0x107f);
    } else {
        // The cable has 80 wires; device 0 answered the tests.
        words.set(93, 0x600b);
    }
    words.set(80, 0x01f0);
    words.set(81, 0x0028);
    // SMART, HPA, write cache, look-ahead, power management; NOP and READ BUFFER are not there.
    let supported = [0x0469, 0x7400, 0x4060];
    words.set(82, supported[0]);
    words.set(83, supported[1]);
    words.set(84, supported[2]);
    let enabled = 0x0408 | flag(settings.smart, 0) | flag(settings.write_cache, 5) | flag(settings.look_ahead, 6);
    words.set(85, enabled);
    words.set(86, 0xb400);
    words.set(87, 0x4060);
    words.set(88, modes(0x3f, 0x40, settings.mode));
    for (index, shift) in [(100, 0), (101, 16), (102, 32), (103, 48)] {
        words.set(index, (visible >> shift) as u16);
    }
    words.set(105, 8);
    // A physical sector has 2^3 logical ones: a page of the host.
    words.set(106, 0x6003);
    words.set(119, 0x4000);
    words.set(120, 0x4000);
    words.set(169, u16::from(trim));
    // No medium that turns.
    words.set(217, 0x0001);
    words.into_bytes()
}
