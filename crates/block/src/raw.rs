//! A raw image: the disk's bytes are the file's.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use memory::vm_memory::VolatileSlice;
use memory::vm_memory::bitmap::BitmapSlice;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use crate::disk::write_zero_bytes;

/// An open raw image of fixed size. Offsets and lengths are within it, as the caller has checked.
pub struct Raw {
    file: File,
    size: u64,
    /// The file system has said that it can't.
    no_punch: AtomicBool,
    no_zero: AtomicBool,
}

impl Raw {
    pub fn new(file: File, size: u64) -> Self {
        Raw { file, size, no_punch: AtomicBool::new(false), no_zero: AtomicBool::new(false) }
    }

    pub fn read<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>], offset: u64) -> io::Result<()> {
        let wanted: usize = slices.iter().map(|slice| slice.len()).sum();
        let done = memory::file::read_at(&self.file, slices, offset)?;
        // The last sector of a file may be a part of one; anything else that is missing was there when it was opened,
        // and must not read as zeros.
        let at_end = offset.saturating_add(wanted as u64) >= self.size && wanted - done < crate::SECTOR as usize;
        if done == wanted {
            return Ok(());
        }
        if !at_end {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the image file has become shorter"));
        }
        zero_from(slices, done);
        Ok(())
    }

    /// Reads what needs no waiting. False: that was not all.
    pub fn read_cached<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>], offset: u64) -> bool {
        let wanted: usize = slices.iter().map(|slice| slice.len()).sum();
        memory::file::read_cached_at(&self.file, slices, offset).is_ok_and(|done| done == wanted)
    }

    pub fn write<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>], offset: u64) -> io::Result<()> {
        memory::file::write_at(&self.file, slices, offset).map(|_| ())
    }

    /// Where the next byte at or after `offset` is that may not be zero.
    pub fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(next) => Ok(Some(next)),
            Err(Errno::NXIO) => Ok(None),
            // No such knowledge.
            Err(_) => Ok((offset < self.size).then_some(offset)),
        }
    }

    pub fn resize(&self, size: u64) -> io::Result<()> {
        self.file.set_len(size)?;
        self.file.sync_all()
    }

    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the space back where the file system can; the range then reads as zeros or as before.
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.allocate(&self.no_punch, flags, offset, length).map(|_| ())
    }

    /// Makes the range zero, and gives its space back if `unmap`.
    pub fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if unmap && self.allocate(&self.no_punch, punch, offset, length)? {
            return Ok(());
        }
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        if self.allocate(&self.no_zero, zero, offset, length)? {
            return Ok(());
        }
        write_zero_bytes(offset, length, |zeros, at| self.write(zeros, at))
    }

    /// False: the file system can't do that.
    fn allocate(&self, cannot: &AtomicBool, flags: FallocateFlags, offset: u64, length: u64) -> io::Result<bool> {
        if cannot.load(Ordering::Relaxed) || length == 0 {
            return Ok(length == 0);
        }
        loop {
            match fallocate(&self.file, flags, offset, length) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL) => {
                    cannot.store(true, Ordering::Relaxed);
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Zeros in `slices` from byte `skip` on.
fn zero_from<B: BitmapSlice>(slices: &[VolatileSlice<'_, B>], mut skip: usize) {
    for slice in slices {
        let skipped = skip.min(slice.len());
        skip -= skipped;
        if let Ok(rest) = slice.offset(skipped) {
            rest.copy_from(&vec![0u8; rest.len()]);
        }
    }
}
