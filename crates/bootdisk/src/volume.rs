//! One file system on the disk, read by `ext4-view`.

use std::sync::Arc;

use ext4_view::{Ext4, Ext4Read};

use crate::{Error, MAX_FILE, Partition, ReadAt};

/// Where an ext superblock is, and its magic number within it (Linux `Documentation/filesystems/ext4/super.rst`).
const SUPERBLOCK: u64 = 1024;
const MAGIC: [u8; 2] = [0x53, 0xef];

/// A file system.
pub struct Volume {
    pub partition: Partition,
    files: Ext4,
}

impl Volume {
    /// Opens the file system on a partition; the error says what is there instead.
    pub fn open(disk: Arc<dyn ReadAt>, partition: &Partition) -> Result<Self, String> {
        check_superblock(&*disk, partition)?;
        let reader = Reader { disk, partition: *partition };
        let files = Ext4::load(Box::new(reader)).map_err(|e| format!("an ext file system, but {e}"))?;
        Ok(Volume { partition: *partition, files })
    }

    /// Whether this looks like the root of a system, by os-release(5) and fstab(5).
    pub fn is_root(&self) -> bool {
        ["/etc/fstab", "/etc/os-release", "/sbin/init"].iter().any(|path| self.files.symlink_metadata(*path).is_ok())
    }

    /// The file system's name for the kernel's `root` parameter.
    pub fn parameter(&self) -> String {
        format!("root=UUID={}", self.files.uuid())
    }

    /// The path of the file that `path` leads to, over symbolic links.
    pub fn resolve(&self, path: &str) -> Option<String> {
        let path = self.files.canonicalize(path).ok()?;
        let path = path.to_str().ok()?;
        self.files.metadata(path).ok()?.file_type().is_regular_file().then(|| path.to_owned())
    }

    /// The names in a directory, as far as they are UTF-8; none if there is no such directory.
    pub fn names(&self, directory: &str) -> Vec<String> {
        let entries = self.files.read_dir(directory).into_iter().flatten();
        entries.map_while(Result::ok).filter_map(|e| e.file_name().as_str().ok().map(String::from)).collect()
    }

    pub fn read(&self, path: &str) -> Result<Vec<u8>, Error> {
        let failed = |why: String| Error::File { file: path.into(), why };
        let size = self.files.metadata(path).map_err(|e| failed(e.to_string()))?.len();
        if size == 0 || size > MAX_FILE.min(self.partition.size) {
            return Err(failed(format!("it has {size} bytes")));
        }
        self.files.read(path).map_err(|e| failed(e.to_string()))
    }
}

/// `ext4-view` reserves memory for what the superblock promises: the promise must fit into the partition.
fn check_superblock(disk: &dyn ReadAt, partition: &Partition) -> Result<(), String> {
    let mut data = [0; 1024];
    let nothing = "no ext2, ext3 or ext4 file system";
    if partition.size < SUPERBLOCK + data.len() as u64 {
        return Err(nothing.into());
    }
    disk.read_at(&mut data, partition.start + SUPERBLOCK).map_err(|e| e.to_string())?;
    if data[0x38..0x3a] != MAGIC {
        return Err(nothing.into());
    }
    let word = |at: usize| data.get(at..at + 4).map_or(0, |b| b.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b)));
    let blocks = word(0x150) << 32 | word(4);
    let size = 1024u64.checked_shl(word(0x18) as u32).and_then(|block| block.checked_mul(blocks));
    // Groups smaller than this are no file system's, and their descriptors would be many.
    let per_group = word(0x20);
    if size.is_none_or(|size| size > partition.size) || per_group < 256 {
        return Err("an ext file system that is larger than its place".into());
    }
    Ok(())
}

struct Reader {
    disk: Arc<dyn ReadAt>,
    partition: Partition,
}

impl Ext4Read for Reader {
    fn read(
        &mut self,
        start: u64,
        buffer: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        let inside = start.checked_add(buffer.len() as u64).is_some_and(|end| end <= self.partition.size);
        if !inside {
            return Err("a block beyond the end of the file system".into());
        }
        Ok(self.disk.read_at(buffer, self.partition.start + start)?)
    }
}
