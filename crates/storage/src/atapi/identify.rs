//! IDENTIFY PACKET DEVICE (ATA8-ACS, 7.17).

use crate::ata::identify::{Words, modes};

pub fn identify(serial: &str, mode: u8) -> Vec<u8> {
    let mut words = Words::new();
    // A packet drive for CD-ROMs, removable, that asks for the packet within 50 us and takes 12 bytes.
    words.set(0, 0x85c0);
    words.text(10, 10, serial);
    words.text(23, 4, env!("CARGO_PKG_VERSION"));
    words.text(27, 20, "Ringer CD-ROM");
    // LBA, DMA, IORDY.
    words.set(49, 0x0b00);
    words.set(50, 0x4000);
    words.set(53, 0x0006);
    words.set(63, modes(0x07, 0x20, mode));
    words.set(64, 0x0003);
    [65, 66, 67, 68].iter().for_each(|index| words.set(*index, 120));
    words.set(71, 30);
    words.set(72, 30);
    words.set(80, 0x00f0);
    // PACKET, DEVICE RESET, power management.
    words.set(82, 0x0218);
    words.set(83, 0x4000);
    words.set(84, 0x4000);
    words.set(85, 0x0218);
    words.set(87, 0x4000);
    words.set(88, modes(0x3f, 0x40, mode));
    words.into_bytes()
}
