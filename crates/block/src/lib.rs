//! Disk images: what is behind a guest's disk on the host.
//!
//! The data flow to follow: [`Disk::open`] checks what was named (a regular file or a block device, not in use by
//! another writer), settles its format, opens the images behind it, and gives a [`Disk`], whose reads and writes go
//! between guest memory and the files without a copy in between. Raw images are files of ours ([`raw`]); qcow2 is the
//! `imago` crate's work ([`qcow2`]).
//!
//! Threat model. The guest writes any bytes to its disk and asks for any range. The image file may come from
//! somebody who wants to read or destroy other files, so:
//! - Only the qcow2 magic makes a file of unnamed format something else than raw, and a guest can't write that magic to
//!   the start of a disk whose format was not named ([`Disk::write`] refuses): what was raw stays raw.
//! - A backing file that an image names is opened only if it lies in the image's own directory or below, unless
//!   the user allows all; only regular files and block devices; read-only; 16 deep at most, none twice.
//! - What an image says about itself is checked before memory is allocated for it.
#![forbid(unsafe_code)]

mod disk;
pub mod image;
mod lock;
mod open;
mod qcow2;
mod raw;

use std::io;
use std::path::PathBuf;

pub use disk::Disk;
pub use open::{Cache, Format, Options};

/// Bytes of a sector: requests are in multiples of it.
pub const SECTOR: u64 = 512;

/// Why an image could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: can't {what}: {source}", path.display())]
    Io { path: PathBuf, what: &'static str, source: io::Error },
    #[error("{}: a disk image is a regular file or a block device; this is {what}", path.display())]
    NotAnImage { path: PathBuf, what: &'static str },
    #[error(
        "{}: in use by another process{}",
        path.display(),
        if *writable { "; images can be shared read-only (ro) or with writes thrown away (snapshot)" } else { " that writes to it" }
    )]
    Locked { path: PathBuf, writable: bool },
    #[error(
        "{}: given twice, and to be written at least once; images can be shared read-only (ro) or with writes thrown away \
         (snapshot)", path.display()
    )]
    Twice { path: PathBuf },
    #[error("{}: not a usable qcow2 image: {source}", path.display())]
    Qcow2 { path: PathBuf, source: io::Error },
    #[error("{}: the image says that its backing file is {}, which lies outside the image's directory; if you trust the image, allow it with backing=any (ringer image convert: --any-backing)", path.display(), backing.display())]
    BackingOutside { path: PathBuf, backing: PathBuf },
    #[error("{}: the image doesn't say of which format its backing file {} is; if you trust both, allow that to be found out with backing=any (ringer image convert: --any-backing)", path.display(), backing.display())]
    BackingFormat { path: PathBuf, backing: PathBuf },
    #[error("{}: the format {format:?} of the backing file is not known: there are raw and qcow2", path.display())]
    UnknownFormat { path: PathBuf, format: String },
    #[error("{}: the chain of backing files is a loop or longer than {max}", path.display())]
    BackingChain { path: PathBuf, max: usize },
    #[error("{}: images with an external data file are not supported", path.display())]
    ExternalData { path: PathBuf },
    #[error(
        "{}: its clusters are compressed by zstd and can only be read: use it with ro or snapshot, or make another of it \
         by ringer image convert", path.display()
    )]
    Zstd { path: PathBuf },
    #[error(
        "{}: the image was not closed properly or is damaged: mend it by ringer image check --repair",
        path.display()
    )]
    Damaged { path: PathBuf },
    #[error("{}: exists already; remove it first", path.display())]
    Exists { path: PathBuf },
    #[error("{}: a disk of {size} bytes is not possible: it has 512 bytes to 8 EiB, in steps of 512", path.display())]
    Size { path: PathBuf, size: u64 },
    #[error("{}: to make the disk smaller cuts off its end; say --shrink if that is what you want", path.display())]
    Shrink { path: PathBuf },
    #[error("{}: a raw image has nothing that could be checked", path.display())]
    NothingToCheck { path: PathBuf },
    #[error("{}: empty: a disk has at least one sector of 512 bytes", path.display())]
    Empty { path: PathBuf },
}
