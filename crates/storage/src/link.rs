//! What passes between a drive and its controller: commands, answers, and the data of a command.

use std::cell::RefCell;
use std::io;

use block::Disk;
use memory::vm_memory::bitmap::BitmapSlice;
use memory::vm_memory::{Bytes, VolatileSlice};

/// Status register (ATA8-ACS, 6.2).
pub mod status {
    pub const ERROR: u8 = 1 << 0;
    pub const DATA_REQUEST: u8 = 1 << 3;
    /// Seek complete, as old drivers expect it of a drive that is ready.
    pub const SEEK_COMPLETE: u8 = 1 << 4;
    pub const DEVICE_FAULT: u8 = 1 << 5;
    pub const READY: u8 = 1 << 6;
    pub const BUSY: u8 = 1 << 7;
}

/// Error register (ATA8-ACS, 6.3).
pub mod error {
    pub const ABORTED: u8 = 1 << 2;
    pub const ID_NOT_FOUND: u8 = 1 << 4;
    pub const UNCORRECTABLE: u8 = 1 << 6;
}

/// Device register: LBA instead of cylinder, head, sector.
pub const DEVICE_LBA: u8 = 1 << 6;

/// A command as the host has written it: the registers, each with its previous content above it for the commands that
/// take 48-bit addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaskFile {
    pub features: u16,
    pub count: u16,
    /// 48 bits: LBA low, mid, high, and their previous contents.
    pub lba: u64,
    pub device: u8,
    pub command: u8,
}

/// What the registers hold when a command has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub status: u8,
    pub error: u8,
    pub count: u16,
    pub lba: u64,
    pub device: u8,
}

impl Outcome {
    /// The usual end: nothing went wrong, and the registers stay as the host wrote them.
    pub fn done(command: &TaskFile) -> Self {
        let TaskFile { count, lba, device, .. } = *command;
        Outcome { status: status::READY | status::SEEK_COMPLETE, error: 0, count, lba, device }
    }

    /// The command failed with these bits of the error register.
    pub fn failed(command: &TaskFile, error: u8) -> Self {
        let status = status::READY | status::SEEK_COMPLETE | status::ERROR;
        Outcome { status, error, ..Self::done(command) }
    }

    pub fn is_error(&self) -> bool {
        self.status & (status::ERROR | status::DEVICE_FAULT) != 0
    }
}

/// How a command's data go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Through the data register, with an interrupt for each block of so many bytes.
    Pio {
        block: usize,
    },
    /// The same for a packet command: the blocks are as long as the drive says, and at most so long.
    PacketPio {
        limit: usize,
    },
    Dma,
}

/// Why a data phase ended early.
#[derive(Debug)]
pub enum Stop {
    /// The drive was reset, or its controller is going away: nobody waits for an answer.
    Abandoned,
    /// The image failed.
    Image(io::Error),
    /// The controller could not reach the memory that the host named.
    Memory,
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Stop::Image(error)
    }
}

/// The drive's end of its cable.
pub trait Link {
    /// Moves `length` bytes of `source` to the host.
    fn data_in(&mut self, how: How, length: usize, source: &impl Source) -> Result<(), Stop>;
    /// Moves `length` bytes from the host to `target`.
    fn data_out(&mut self, how: How, length: usize, target: &impl Target) -> Result<(), Stop>;
    /// Takes the 12 bytes of a packet command.
    fn packet(&mut self) -> Result<[u8; 12], Stop>;
}

/// Where data for the host come from.
pub trait Source {
    /// Fills `slices` with what lies from byte `at` on.
    fn read<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>], at: usize) -> io::Result<()>;
}

/// Where data from the host go.
pub trait Target {
    /// Takes `slices` as what lies from byte `at` on.
    fn write<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>], at: usize) -> io::Result<()>;
}

/// A piece of an image, from byte `offset` on.
pub struct Range<'a> {
    pub disk: &'a Disk,
    pub offset: u64,
}

impl Source for Range<'_> {
    fn read<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>], at: usize) -> io::Result<()> {
        self.disk.read(slices, self.offset.saturating_add(at as u64))
    }
}

impl Target for Range<'_> {
    fn write<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>], at: usize) -> io::Result<()> {
        self.disk.write(slices, self.offset.saturating_add(at as u64))
    }
}

/// A few bytes that the drive made up itself.
pub struct Small<'a>(pub &'a [u8]);

impl Source for Small<'_> {
    fn read<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>], mut at: usize) -> io::Result<()> {
        for slice in slices {
            let rest = self.0.get(at..).unwrap_or_default();
            let part = rest.get(..slice.len()).unwrap_or(rest);
            slice.write_slice(part, 0).map_err(io::Error::other)?;
            at = at.saturating_add(slice.len());
        }
        Ok(())
    }
}

/// Parameters that come from the host.
#[derive(Default)]
pub struct Collected(RefCell<Vec<u8>>);

impl Collected {
    pub fn into_bytes(self) -> Vec<u8> {
        self.0.into_inner()
    }
}

impl Target for Collected {
    fn write<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>], at: usize) -> io::Result<()> {
        let mut bytes = self.0.borrow_mut();
        bytes.truncate(at);
        for slice in slices {
            let start = bytes.len();
            bytes.resize(start + slice.len(), 0);
            if let Some(part) = bytes.get_mut(start..) {
                slice.read_slice(part, 0).map_err(io::Error::other)?;
            }
        }
        Ok(())
    }
}
