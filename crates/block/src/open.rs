//! From a path to an open disk: what is checked before anything in a file is believed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::{Disk, Error, lock};

/// The first bytes of a qcow2 image.
pub const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// How the bytes of a disk lie in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Raw,
    Qcow2,
}

/// What stands between the guest's writes and the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// The host's page cache; a flush of the guest makes it write.
    #[default]
    WriteBack,
    /// The host's page cache, and every write is on disk before the guest hears of its end.
    WriteThrough,
    /// Nothing of the host's: O_DIRECT. A flush still makes the disk write its own cache.
    None,
}

/// Which image, and how.
#[derive(Clone, Debug)]
pub struct Options {
    pub path: PathBuf,
    /// `None`: qcow2 if the file begins so, else raw.
    pub format: Option<Format>,
    pub read_only: bool,
    /// Writes go to a file that vanishes with the process; the image is only read.
    pub snapshot: bool,
    pub cache: Cache,
    /// Backing files may lie anywhere and be of a format that has to be found out.
    pub any_backing: bool,
}

impl Options {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let (read_only, snapshot, any_backing) = (false, false, false);
        Options { path: path.into(), format: None, read_only, snapshot, cache: Cache::default(), any_backing }
    }

    /// Whether the image itself is written.
    pub(crate) fn writes_image(&self) -> bool {
        !self.read_only && !self.snapshot
    }
}

impl Disk {
    /// Opens an image and locks it: against other writers, and against readers if it is to be written.
    pub fn open(options: &Options) -> Result<Self, Error> {
        let file = open_file(&options.path, options.writes_image())?;
        let format = match options.format {
            Some(format) => format,
            None => detect(&file, &options.path)?,
        };
        match format {
            Format::Raw => Disk::open_raw(file, options),
            Format::Qcow2 => Disk::open_qcow2(file, options),
        }
    }
}

/// Opens what may be an image, and locks it.
pub(crate) fn open_file(path: &Path, write: bool) -> Result<File, Error> {
    let failed = |what| move |source| Error::Io { path: path.into(), what, source };
    // Not to wait for the other end of a pipe, nor to make a terminal ours.
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = OpenOptions::new().read(true).write(write).custom_flags(flags.bits() as i32).open(path);
    let file = match opened {
        Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
            return Err(Error::NotAnImage { path: path.into(), what: "a directory" });
        }
        other => other.map_err(failed(if write { "open it for writing" } else { "open it" }))?,
    };
    let kind = file.metadata().map_err(failed("examine it"))?.file_type();
    let what = match kind {
        _ if kind.is_file() || kind.is_block_device() => None,
        _ if kind.is_dir() => Some("a directory"),
        _ if kind.is_char_device() => Some("a character device"),
        _ => Some("a pipe or socket"),
    };
    if let Some(what) = what {
        return Err(Error::NotAnImage { path: path.into(), what });
    }
    match lock::lock(&file, write) {
        Ok(true) => Ok(file),
        Ok(false) if lock::used_here(&file) => Err(Error::Twice { path: path.into() }),
        Ok(false) => Err(Error::Locked { path: path.into(), writable: write }),
        Err(source) => Err(failed("lock it")(source)),
    }
}

/// Qcow2 if it begins so, else raw.
pub(crate) fn detect(file: &File, path: &Path) -> Result<Format, Error> {
    let mut magic = [0; 4];
    let read = file.read_at(&mut magic, 0);
    let read = read.map_err(|source| Error::Io { path: path.into(), what: "read it", source })?;
    Ok(if read == magic.len() && magic == QCOW2_MAGIC { Format::Qcow2 } else { Format::Raw })
}

/// The size of a file or block device.
pub(crate) fn size_of(mut file: &File, path: &Path) -> Result<u64, Error> {
    io::Seek::seek(&mut file, io::SeekFrom::End(0)).map_err(|source| Error::Io {
        path: path.into(),
        what: "find out its size",
        source,
    })
}
