//! Kernel and RAM disk files: opened with care, read piecewise.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memory::View;
use memory::vm_memory::{Bytes, GuestAddress};

use crate::Error;

/// What a file's first bytes say that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Magic {
    BzImage,
    Elf,
    Unknown,
}

/// Offset of "HdrS" in a bzImage.
const HDRS_OFFSET: u64 = 0x202;

/// An open file of a known size that is not zero.
pub struct Image {
    path: PathBuf,
    file: File,
    size: u64,
}

impl Image {
    /// Opens a regular file. Anything else is refused before it is opened: opening a FIFO would wait for a writer.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let error = |action| move |source| Error::File { action, path: path.to_owned(), source };
        if !std::fs::metadata(path).map_err(error("open"))?.is_file() {
            return Err(Error::NotAFile { path: path.to_owned() });
        }
        let file = File::open(path).map_err(error("open"))?;
        let size = file.metadata().map_err(error("read"))?.len();
        if size == 0 {
            return Err(Error::Empty { path: path.to_owned() });
        }
        Ok(Image { path: path.to_owned(), file, size })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// A kernel that starts like this but breaks off is cut off, not something else.
    pub fn magic(&self) -> Result<Magic, Error> {
        let mut head = [0; 4];
        if self.size >= 4 {
            self.read_at(&mut head, 0)?;
        }
        if head == *b"\x7fELF" {
            return Ok(Magic::Elf);
        }
        if self.size < HDRS_OFFSET + 4 {
            return Ok(Magic::Unknown);
        }
        self.read_at(&mut head, HDRS_OFFSET)?;
        Ok(if head == *b"HdrS" { Magic::BzImage } else { Magic::Unknown })
    }

    /// Fills `bytes` from `offset`; the file must reach that far.
    pub fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<(), Error> {
        self.need(offset, bytes.len() as u64)?;
        self.file.read_exact_at(bytes, offset).map_err(|source| self.read_error(source))
    }

    /// Reads `size` bytes from `offset` straight into guest memory. Nothing is read of size 0, wherever it is.
    pub fn read_to(&self, view: &View, what: &'static str, address: u64, offset: u64, size: u64) -> Result<(), Error> {
        if size == 0 {
            return Ok(());
        }
        self.need(offset, size)?;
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset)).map_err(|source| self.read_error(source))?;
        view.read_exact_volatile_from(GuestAddress(address), &mut file, size as usize)
            .map_err(|source| Error::Memory { what, source })
    }

    /// Fails unless the file has `size` bytes from `offset`.
    pub fn need(&self, offset: u64, size: u64) -> Result<(), Error> {
        let needed = offset.saturating_add(size);
        match needed <= self.size {
            true => Ok(()),
            false => Err(Error::Truncated { path: self.path.clone(), size: self.size, needed }),
        }
    }

    pub fn bad_header(&self, why: impl Into<String>) -> Error {
        Error::BadHeader { path: self.path.clone(), why: why.into() }
    }

    fn read_error(&self, source: std::io::Error) -> Error {
        Error::File { action: "read", path: self.path.clone(), source }
    }
}
