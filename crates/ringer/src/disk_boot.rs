//! Booting what is on a disk: kernel and RAM disk are taken out of the image, as it is when the machine starts or starts
//! again, and held in memory until then.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{Disk, SECTOR};
use bootdisk::ReadAt;
use memory::vm_memory::VolatileSlice;
use rustix::fs::{MemfdFlags, memfd_create};

/// Files for the boot loader, which last as long as this.
pub struct Taken {
    kernel: OwnedFd,
    initrd: Option<OwnedFd>,
    /// `root=...`
    pub root: String,
}

/// Why a disk can't be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: {source}", path.display())]
    Find { path: PathBuf, source: bootdisk::Error },
    #[error("can't hold a kernel in memory: {0}")]
    Memory(io::Error),
}

impl Taken {
    /// Looks on the disk, whose image is at `path`, for what it boots. The disk is only read.
    pub fn from(disk: &Arc<Disk>, path: &Path) -> Result<Self, Error> {
        let disk: Arc<dyn ReadAt> = Arc::new(Sectors(disk.clone()));
        let found = bootdisk::find(&disk).map_err(|source| Error::Find { path: path.into(), source })?;
        tracing::info!("booting {} of {} with {}", found.name, path.display(), found.root);
        let hold = |data: &[u8]| hold(data).map_err(Error::Memory);
        let initrd = found.initrd.as_deref().map(hold).transpose()?;
        Ok(Taken { kernel: hold(&found.kernel)?, initrd, root: found.root })
    }

    pub fn kernel(&self) -> PathBuf {
        path_of(&self.kernel)
    }

    pub fn initrd(&self) -> Option<PathBuf> {
        self.initrd.as_ref().map(path_of)
    }
}

/// A file without a name.
fn hold(data: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("from the disk", MemfdFlags::CLOEXEC)?);
    file.write_all(data)?;
    Ok(file.into())
}

/// The name by which this process can open it all the same (proc_pid_fd(5)).
fn path_of(file: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// A disk is read in whole sectors.
struct Sectors(Arc<Disk>);

impl ReadAt for Sectors {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let before = (offset % SECTOR) as usize;
        let aligned = offset - before as u64;
        let length = (before + buffer.len()).next_multiple_of(SECTOR as usize);
        if before == 0 && length == buffer.len() {
            return self.0.read(&[VolatileSlice::from(buffer)], offset);
        }
        let mut sectors = vec![0; length];
        self.0.read(&[VolatileSlice::from(sectors.as_mut_slice())], aligned)?;
        let wanted = sectors.get(before..before + buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(wanted);
        Ok(())
    }

    fn size(&self) -> u64 {
        self.0.size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::Options;

    fn open(path: &Path) -> Arc<Disk> {
        Arc::new(Disk::open(&Options { read_only: true, ..Options::new(path) }).unwrap())
    }

    #[test]
    fn any_range_of_a_disk_can_be_read() {
        let data: Vec<u8> = (0..4096u32).map(|n| (n * 7 % 251) as u8).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &data).unwrap();
        let disk = Sectors(open(file.path()));
        for (offset, length) in [(0, 512), (1, 1), (511, 2), (1000, 2000), (4095, 1), (0, 4096), (512, 1024)] {
            let mut buffer = vec![0; length];
            disk.read_at(&mut buffer, offset as u64).unwrap();
            assert_eq!(buffer, data[offset..offset + length]);
        }
        assert!(disk.read_at(&mut [0; 2], 4095).is_err());
    }

    #[test]
    fn what_is_held_is_read_back_by_its_path() {
        let file = hold(b"kernel").unwrap();
        assert_eq!(std::fs::read(path_of(&file)).unwrap(), b"kernel");
    }

    #[test]
    fn an_empty_disk_is_refused_with_its_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0; 8192]).unwrap();
        let error = Taken::from(&open(file.path()), file.path()).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(&*file.path().to_string_lossy()) && error.contains("--kernel"), "{error}");
    }
}
