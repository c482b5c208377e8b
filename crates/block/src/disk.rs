//! An open disk: what a block device does with it.

use std::fs::File;
use std::io;

use memory::vm_memory::bitmap::BitmapSlice;
use memory::vm_memory::{Bytes, VolatileSlice};

use crate::open::{QCOW2_MAGIC, size_of};
use crate::qcow2::Qcow2;
use crate::raw::Raw;
use crate::{Cache, Error, Options, SECTOR};

/// What is written or copied at once where a range has no bytes of its own.
pub(crate) const CHUNK: usize = 1 << 20;

enum Image {
    Raw(Raw),
    Qcow2(Box<Qcow2>),
}

/// A disk, for any number of threads. All ranges are in whole sectors.
pub struct Disk {
    image: Image,
    size: u64,
    read_only: bool,
    write_through: bool,
    /// The format was not named and found to be raw: the guest must not make it look like anything else.
    guarded: bool,
}

impl Disk {
    pub(crate) fn open_raw(file: File, options: &Options) -> Result<Self, Error> {
        let size = size_of(&file, &options.path)?;
        if size == 0 {
            return Err(Error::Empty { path: options.path.clone() });
        }
        let image = if options.snapshot || options.cache == Cache::None {
            Image::Qcow2(Box::new(Qcow2::over_raw(file, options)?))
        } else {
            Image::Raw(Raw::new(file, size))
        };
        Ok(Self::new(image, size, options, options.format.is_none() && !options.snapshot))
    }

    pub(crate) fn open_qcow2(file: File, options: &Options) -> Result<Self, Error> {
        let image = Qcow2::open(file, options)?;
        let size = image.size();
        if size == 0 {
            return Err(Error::Empty { path: options.path.clone() });
        }
        Ok(Self::new(Image::Qcow2(Box::new(image)), size, options, false))
    }

    fn new(image: Image, size: u64, options: &Options, guarded: bool) -> Self {
        let write_through = options.cache == Cache::WriteThrough && !options.snapshot;
        // A file that is no multiple of the sector has its last bytes in a sector that ends in zeros.
        let size = size.next_multiple_of(SECTOR);
        Disk { image, size, read_only: options.read_only, write_through, guarded }
    }

    /// In bytes, a multiple of the sector.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether a write is on disk when it has returned.
    pub fn write_through(&self) -> bool {
        self.write_through
    }

    /// Whether the range lies on the disk.
    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the disk")),
        }
    }

    fn check_write(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        self.check(offset, length)
    }

    /// Reads the disk from byte `offset` into `slices`.
    pub fn read<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>], offset: u64) -> io::Result<()> {
        self.check(offset, length_of(slices))?;
        match &self.image {
            Image::Raw(raw) => raw.read(slices, offset),
            Image::Qcow2(qcow2) => qcow2.read(slices, offset),
        }
    }

    /// Reads as [`Disk::read`] does if it needs no waiting for the host's disk. False: it does, or nobody knows, and `slices`
    /// hold anything.
    pub fn read_cached<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>], offset: u64) -> bool {
        match &self.image {
            Image::Raw(raw) => self.check(offset, length_of(slices)).is_ok() && raw.read_cached(slices, offset),
            Image::Qcow2(_) => false,
        }
    }

    /// Writes `slices` to the disk from byte `offset` on.
    pub fn write<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>], offset: u64) -> io::Result<()> {
        self.check_write(offset, length_of(slices))?;
        if self.guarded && offset < QCOW2_MAGIC.len() as u64 {
            self.write_guarded(slices, offset)?;
        } else {
            self.write_image(slices, offset)?;
        }
        if self.write_through { self.flush() } else { Ok(()) }
    }

    fn write_image<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>], offset: u64) -> io::Result<()> {
        match &self.image {
            Image::Raw(raw) => raw.write(slices, offset),
            Image::Qcow2(qcow2) => qcow2.write(slices, offset),
        }
    }

    /// A write to the start of a disk that must stay raw. The guest may change its memory at any time, so what is
    /// checked is a copy, and the copy is what is written.
    fn write_guarded<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>], offset: u64) -> io::Result<()> {
        let mut copy = Vec::new();
        let mut rest = Vec::new();
        for slice in slices {
            let start = copy.len();
            let taken = slice.len().min(SECTOR as usize - start);
            copy.resize(start + taken, 0);
            slice.read_slice(copy.get_mut(start..).unwrap_or_default(), 0).map_err(io::Error::other)?;
            rest.push(slice.offset(taken).map_err(io::Error::other)?);
        }
        if offset == 0 && copy.starts_with(&QCOW2_MAGIC) {
            let why = "a raw disk may not be made to look like qcow2; name the format (format=raw) to allow it";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        let length = copy.len() as u64;
        self.write_image(&[VolatileSlice::from(copy.as_mut_slice())], offset)?;
        self.write_image(&rest, offset + length)
    }

    /// Where the next byte at or after `offset` is that may not be zero; `None`: there is none.
    pub fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        match &self.image {
            Image::Raw(raw) => raw.next_data(offset),
            Image::Qcow2(qcow2) => qcow2.next_data(offset),
        }
    }

    /// Changes the size of the disk; nobody else may be using it.
    pub(crate) fn resize(&self, size: u64) -> io::Result<()> {
        match &self.image {
            Image::Raw(raw) => raw.resize(size),
            Image::Qcow2(qcow2) => qcow2.resize(size),
        }
    }

    /// What was written before is on disk when this returns.
    pub fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        match &self.image {
            Image::Raw(raw) => raw.flush(),
            Image::Qcow2(qcow2) => qcow2.flush(),
        }
    }

    /// The guest doesn't need what is in the range any more.
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_write(offset, length)?;
        match &self.image {
            Image::Raw(raw) => raw.discard(offset, length),
            Image::Qcow2(qcow2) => qcow2.discard(offset, length),
        }
    }

    /// Makes the range zero; `unmap`: it may give its space back.
    pub fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.check_write(offset, length)?;
        match &self.image {
            Image::Raw(raw) => raw.write_zeroes(offset, length, unmap)?,
            Image::Qcow2(qcow2) => qcow2.write_zeroes(offset, length, unmap)?,
        }
        if self.write_through { self.flush() } else { Ok(()) }
    }
}

/// Bytes in all of `slices`.
pub(crate) fn length_of<B: BitmapSlice>(slices: &[VolatileSlice<'_, B>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

/// Makes a range zero by zeros that `write` writes, [`CHUNK`] bytes at most at once.
pub(crate) fn write_zero_bytes(
    offset: u64,
    length: u64,
    mut write: impl FnMut(&[VolatileSlice<'_>], u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut zeros = vec![0; CHUNK];
    let mut done = 0;
    while done < length {
        let piece = (length - done).min(CHUNK as u64);
        write(&[VolatileSlice::from(zeros.get_mut(..piece as usize).unwrap_or_default())], offset + done)?;
        done += piece;
    }
    Ok(())
}
