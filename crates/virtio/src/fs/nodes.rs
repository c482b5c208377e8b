//! What the driver knows by number: files of the shared directory (nodes) and open files (handles).
//!
//! A node is a descriptor that was opened by walking from the shared directory one name at a time, never over a
//! symbolic link (`O_PATH | O_NOFOLLOW`), and never by a name with a slash or by "..". So no request can name what is not below
//! the directory, whatever is renamed or linked meanwhile.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, open, openat};
use rustix::io::Errno;

/// The shared directory's own number.
pub const ROOT: u64 = 1;

/// A file that the driver knows. Its type never changes.
pub struct Node {
    file: OwnedFd,
    pub kind: FileType,
    key: Key,
}

/// Device and inode number: names one file as long as it is open.
type Key = (u64, u64);

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

struct Known {
    node: Arc<Node>,
    /// How often the driver was told the number, less how often it forgot it.
    lookups: u64,
}

struct Tables {
    nodes: HashMap<u64, Known>,
    numbers: HashMap<Key, u64>,
    next_node: u64,
    handles: HashMap<u64, Arc<File>>,
    next_handle: u64,
}

/// All nodes and handles of one share.
pub struct Nodes {
    root: Arc<Node>,
    tables: Mutex<Tables>,
    /// `/proc/self/fd`, by which a node is opened for reading and writing.
    descriptors: OwnedFd,
    /// How many nodes and handles there may be together: each is a descriptor of the host.
    max_files: usize,
}

impl Nodes {
    /// Nodes of the directory at `path`; with handles there are at most `max_files`.
    pub fn new(path: &Path, max_files: usize) -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = open(path, flags, Mode::empty())?;
        let descriptors = open("/proc/self/fd", flags, Mode::empty())?;
        let stat = fstat(&root)?;
        let root = Node { file: root, kind: FileType::Directory, key: (stat.st_dev, stat.st_ino) };
        let nodes = Nodes { root: Arc::new(root), tables: Mutex::new(Tables::new()), descriptors, max_files };
        nodes.clear();
        Ok(nodes)
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all but the root: the driver starts over.
    pub fn clear(&self) {
        let mut tables = self.lock();
        // Numbers are not used again: what a driver remembers of before is stale, not somebody else's.
        let (next_node, next_handle) = (tables.next_node, tables.next_handle);
        *tables = Tables { next_node, next_handle, ..Tables::new() };
        tables.nodes.insert(ROOT, Known { node: self.root.clone(), lookups: 1 });
        tables.numbers.insert(self.root.key, ROOT);
    }

    pub fn get(&self, number: u64) -> Result<Arc<Node>, Errno> {
        self.lock().nodes.get(&number).map(|known| known.node.clone()).ok_or(Errno::STALE)
    }

    pub fn directory(&self, number: u64) -> Result<Arc<Node>, Errno> {
        let node = self.get(number)?;
        if node.kind == FileType::Directory { Ok(node) } else { Err(Errno::NOTDIR) }
    }

    /// Finds `name` in a directory and tells the driver its number once more.
    pub fn look_up(&self, parent: &Node, name: &[u8]) -> Result<(u64, Stat), Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(parent, checked(name)?, flags, Mode::empty())?;
        let stat = fstat(&file)?;
        let key = (stat.st_dev, stat.st_ino);
        let mut tables = self.lock();
        if let Some(number) = tables.numbers.get(&key).copied()
            && let Some(known) = tables.nodes.get_mut(&number)
        {
            known.lookups = known.lookups.saturating_add(1);
            return Ok((number, stat));
        }
        if tables.descriptors() >= self.max_files {
            return Err(Errno::NFILE);
        }
        let number = tables.next_node;
        tables.next_node += 1;
        let node = Arc::new(Node { file, kind: FileType::from_raw_mode(stat.st_mode), key });
        tables.nodes.insert(number, Known { node, lookups: 1 });
        tables.numbers.insert(key, number);
        Ok((number, stat))
    }

    /// The driver does not know the number any more, `lookups` times.
    pub fn forget(&self, number: u64, lookups: u64) {
        if number == ROOT {
            return;
        }
        let mut tables = self.lock();
        let Some(known) = tables.nodes.get_mut(&number) else { return };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups == 0
            && let Some(known) = tables.nodes.remove(&number)
        {
            tables.numbers.remove(&known.node.key);
        }
    }

    /// Opens a node for reading or writing. Only regular files and directories: to open a pipe may last forever, and
    /// a device is the guest's own affair.
    pub fn open(&self, node: &Node, flags: OFlags) -> Result<File, Errno> {
        if !matches!(node.kind, FileType::RegularFile | FileType::Directory) {
            return Err(Errno::NXIO);
        }
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        self.by_name(node, |directory, name| openat(directory, name, flags, Mode::empty())).map(File::from)
    }

    /// Calls with a path to the node that may be followed, for what can't be done with a path-only descriptor.
    pub fn by_name<T>(
        &self,
        node: &Node,
        call: impl FnOnce(BorrowedFd<'_>, &str) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        call(self.descriptors.as_fd(), &node.file.as_raw_fd().to_string())
    }

    /// A path to the node itself, also if it is a symbolic link, for calls that take nothing else.
    pub fn path(&self, node: &Node) -> String {
        format!("/proc/self/fd/{}", node.file.as_raw_fd())
    }

    /// Whether so many files are free that some may be opened ahead of need.
    pub fn plenty(&self) -> bool {
        self.lock().descriptors() < self.max_files / 2
    }

    pub fn insert_handle(&self, file: File) -> Result<u64, Errno> {
        let mut tables = self.lock();
        if tables.descriptors() >= self.max_files {
            return Err(Errno::NFILE);
        }
        let number = tables.next_handle;
        tables.next_handle += 1;
        tables.handles.insert(number, Arc::new(file));
        Ok(number)
    }

    pub fn handle(&self, number: u64) -> Result<Arc<File>, Errno> {
        self.lock().handles.get(&number).cloned().ok_or(Errno::BADF)
    }

    pub fn remove_handle(&self, number: u64) {
        self.lock().handles.remove(&number);
    }
}

impl Tables {
    fn new() -> Self {
        let (nodes, numbers, handles) = (HashMap::new(), HashMap::new(), HashMap::new());
        Tables { nodes, numbers, next_node: ROOT + 1, handles, next_handle: 1 }
    }

    fn descriptors(&self) -> usize {
        self.nodes.len() + self.handles.len()
    }
}

/// A name that can only lie in its directory.
pub fn checked(name: &[u8]) -> Result<&[u8], Errno> {
    match name {
        b"" | b"." | b".." => Err(Errno::INVAL),
        _ if name.contains(&b'/') || name.contains(&0) => Err(Errno::INVAL),
        _ => Ok(name),
    }
}
