//! Finds kernel and initial RAM disk on a guest's own disk, as a boot loader would.
//!
//! The data flow to follow: [`find`] takes a disk, whatever its format ([`ReadAt`]), splits it into partitions
//! ([`partitions`]), opens each as an ext2, ext3 or ext4 file system ([`volume`]), takes the kernel that the system itself would
//! boot next from `/boot` or from a partition of its own ([`kernels`]), and says by `root=` where the root file system is.
//!
//! The disk is the guest's: nothing on it is trusted. Every size is held against that of the disk and against limits.
//! It is read only; a journal that was not replayed is taken into account, so that a disk can be booted after a crash.
#![forbid(unsafe_code)]

mod kernels;
mod partitions;
mod volume;

use std::io;
use std::sync::Arc;

pub use partitions::Partition;
use volume::Volume;

/// The largest kernel and RAM disk that are taken, in bytes.
pub const MAX_FILE: u64 = 1 << 30;

/// What can be read at any byte: a disk.
pub trait ReadAt: Send + Sync {
    /// Fills the buffer, or fails.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// In bytes.
    fn size(&self) -> u64;
}

/// Why a disk can't be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("can't read the disk: {0}")]
    Read(io::Error),
    #[error(
        "there is no kernel on the disk: Ringer looks for /vmlinuz, /boot/vmlinuz and /boot/vmlinuz-VERSION in ext2, ext3 and \
         ext4 file systems (found: {found}); give one by --kernel FILE and --initrd FILE"
    )]
    NoKernel { found: String },
    #[error("{file} on the disk can't be used: {why}; give a kernel by --kernel FILE and --initrd FILE")]
    File { file: String, why: String },
}

/// What a disk boots.
#[derive(Clone, PartialEq, Eq)]
pub struct Found {
    /// The kernel's path in its file system.
    pub name: String,
    pub kernel: Vec<u8>,
    pub initrd: Option<Vec<u8>>,
    /// What the kernel is to be told to find its root file system: `root=UUID=...`.
    pub root: String,
}

impl std::fmt::Debug for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Found({}, {})", self.name, self.root)
    }
}

/// Finds what `disk` boots.
pub fn find(disk: &Arc<dyn ReadAt>) -> Result<Found, Error> {
    let partitions = partitions::list(&**disk).map_err(Error::Read)?;
    let mut volumes = Vec::new();
    let mut seen = Vec::new();
    for partition in &partitions {
        match Volume::open(disk.clone(), partition) {
            Ok(volume) => volumes.push(volume),
            Err(why) => seen.push(format!("{partition}: {why}")),
        }
    }
    for volume in &volumes {
        let Some(kernel) = kernels::choose(volume) else {
            seen.push(format!("{}: a file system without a kernel", volume.partition));
            continue;
        };
        // A partition that is mounted on /boot has no system of its own.
        let root = volumes.iter().find(|v| v.is_root()).unwrap_or(volume);
        let initrd = kernel.initrd.as_ref().map(|path| volume.read(path)).transpose()?;
        return Ok(Found { kernel: volume.read(&kernel.path)?, name: kernel.path, initrd, root: root.parameter() });
    }
    if seen.is_empty() {
        seen.push("nothing".into());
    }
    Err(Error::NoKernel { found: seen.join("; ") })
}

#[cfg(test)]
mod tests;
