//! What firmware does to the adapter before a system starts, for machines that have none: it gets its address, and a mode
//! in which a kernel can show its first messages.

use chipset::constants::{PCI_CONFIG_PORT, PCI_MMIO_END};
use engine::Bus;

use super::{dispi, memory};

/// Where the linear framebuffer then is: at the end of PCI's window, out of the way of what the kernel places itself.
pub const FRAMEBUFFER: u64 = (PCI_MMIO_END - memory::SIZE) & !(memory::SIZE - 1);
/// The picture, in pixels of 32 bits: 0x00RRGGBB.
pub const WIDTH: u16 = 1024;
pub const HEIGHT: u16 = 768;

const COMMAND: u32 = 0x04;
const IO_AND_MEMORY: u32 = 3;
const FIRST_BAR: u32 = 0x10;
/// Attribute controller: its index, by which it also lets the picture through; reading status 1 makes it expect that.
const ATTRIBUTE: u16 = 0x3c0;
const PICTURE_ON: u8 = 0x20;
/// Miscellaneous output: registers at 3Dxh, access to video memory.
const MISCELLANEOUS: u16 = 0x3c2;
const COLOR: u8 = 0x03;
const STATUS_1: u16 = 0x3da;

/// Does so by the bus, on which the adapter is PCI device `slot`.
pub fn start(bus: &dyn Bus, slot: u8) {
    for (register, value) in [(FIRST_BAR, FRAMEBUFFER as u32), (COMMAND, IO_AND_MEMORY)] {
        bus.pio_write(PCI_CONFIG_PORT, &(1 << 31 | u32::from(slot) << 11 | register).to_le_bytes());
        bus.pio_write(PCI_CONFIG_PORT + 4, &value.to_le_bytes());
    }
    let mode = [
        (dispi::ENABLE, 0),
        (dispi::XRES, WIDTH),
        (dispi::YRES, HEIGHT),
        (dispi::BPP, 32),
        (dispi::ENABLE, dispi::ENABLED | dispi::LINEAR),
    ];
    for (register, value) in mode {
        bus.pio_write(super::DISPI_PORT, &register.to_le_bytes());
        bus.pio_write(super::DISPI_PORT + 1, &value.to_le_bytes());
    }
    bus.pio_write(MISCELLANEOUS, &[COLOR]);
    bus.pio_read(STATUS_1, &mut [0]);
    bus.pio_write(ATTRIBUTE, &[PICTURE_ON]);
}
