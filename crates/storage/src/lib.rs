//! Disks, CD-ROM drives and floppy drives as a PC has them, and the controllers that they hang on.
//!
//! Two layers. Below are drives, which know commands and nothing of buses: an ATA disk ([`ata`]), an ATAPI CD-ROM
//! drive ([`atapi`]). A drive is given a command ([`TaskFile`]) and one end of a cable ([`Link`]), by which it moves
//! the command's data, and answers with what its registers then hold ([`Outcome`]). Above are controllers, which
//! know buses and no commands: the IDE controller with its ports ([`ide`]) and the AHCI controller ([`ahci`]).
//! The floppy controller ([`floppy`]) knows its drives itself, as the real one does.
//!
//! The data flow to follow: a vCPU writes the command register (IDE) or sets a bit of PxCI (AHCI); that only wakes
//! the thread of that channel or port. The thread runs the drive's command, whose data go between the image and guest
//! memory without a copy (DMA) or through the channel's buffer (PIO), and raises the interrupt. No vCPU ever waits for
//! an image.
//!
//! Threat model: the driver is hostile. Registers, command headers, scatter lists and packets are checked where they
//! are read. What a real drive or controller would refuse is refused the same way.
#![forbid(unsafe_code)]

pub mod ahci;
pub mod ata;
pub mod atapi;
mod dma;
mod drive;
pub mod floppy;
pub mod ide;
mod link;
mod media;
#[cfg(test)]
mod testing;
mod worker;

pub use drive::Drive;
pub use link::{How, Link, Outcome, Source, Stop, Target, TaskFile};
pub use media::{Media, MediaError};

/// Why a controller could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("can't start the thread of {what}: {source}")]
    Thread { what: &'static str, source: std::io::Error },
    #[error(transparent)]
    Chipset(#[from] chipset::Error),
}
