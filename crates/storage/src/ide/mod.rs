//! An IDE controller with two channels at the addresses that PCs have had since 1984, and bus-master DMA
//! (82371AB PIIX4 datasheet, 5.2 and 6; Programming Interface for Bus Master IDE Controller 1.0).
//!
//! [`channel::Channel`] is one cable with up to two drives: the task file as software sees it, and the thread that does
//! the commands. [`IdeController`] puts two of them on the ports, and is the function on the PCI bus.

mod channel;
mod function;
mod registers;
#[cfg(test)]
mod tests;

pub use function::{Drives, IdeController};

/// Its function number in the south bridge.
pub const FUNCTION: u8 = 1;

/// Ports of the two channels: command block (8 ports), control block (the device control register), ISA interrupt.
pub const CHANNELS: [(u16, u16, u8); 2] = [(0x1f0, 0x3f6, 14), (0x170, 0x376, 15)];
