//! The floppy disk controller (Intel 82077AA datasheet) with up to two drives, at its place in every PC since 1981.
//!
//! [`controller`] is what software sees: registers, the phases of a command, resets and seeks. [`transfer`] is the thread
//! that moves sectors between an image and DMA channel 2, or the data register. [`geometry`] knows by the size of an
//! image how a disk is laid out.

mod controller;
mod geometry;
#[cfg(test)]
mod tests;
mod transfer;

pub use controller::{FloppyController, FloppyDrive};
pub use geometry::{DriveType, Geometry};

/// Ports: the first six, and the one behind the IDE controller's. The device offsets are the same as from 0x3f0 on.
pub const PORTS: [(u16, u16, u64); 2] = [(0x3f0, 6, 0), (0x3f7, 1, 7)];
/// ISA interrupt, and DMA channel.
pub const IRQ: u8 = 6;
pub const DMA_CHANNEL: usize = 2;
/// Drives that a controller has room for.
pub const DRIVES: usize = 2;
