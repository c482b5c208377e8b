//! The FUSE protocol's numbers, as a virtio-fs driver sends and takes them (Linux `include/uapi/linux/fuse.h`, version 7.34).
//! All are little-endian here, since driver and device are of one architecture.

use rustix::fs::{Stat, StatVfs};

/// What we speak. The driver adapts itself to the lower of the two.
pub const MAJOR: u32 = 7;
pub const MINOR: u32 = 34;

/// Bytes of the headers.
pub const IN_HEADER: usize = 40;
pub const OUT_HEADER: usize = 16;
/// Bytes of what tells of a node (`struct fuse_entry_out`).
pub const ENTRY: usize = 128;

/// Requests.
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
}

/// Flags of INIT that we can serve.
pub mod init {
    pub const ASYNC_READ: u32 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub const ASYNC_DIO: u32 = 1 << 15;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const MAX_PAGES: u32 = 1 << 22;
    /// The server takes set-user-ID bits away from what is written, truncated or given away.
    pub const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
}

/// By which OPEN, CREATE and WRITE say that the file loses set-user-ID and set-group-ID bits.
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;

/// Which fields of SETATTR count.
pub mod set {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// Takes a request apart. A field that is not there any more is `None`.
pub struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Fields { rest: bytes }
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(*bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    pub fn skip(&mut self, count: usize) -> Option<()> {
        self.rest = self.rest.get(count..)?;
        Some(())
    }

    /// The next `count` bytes.
    pub fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.rest.split_at_checked(count)?;
        self.rest = rest;
        Some(bytes)
    }

    /// Bytes up to a zero.
    pub fn text(&mut self) -> Option<&'a [u8]> {
        let end = self.rest.iter().position(|&byte| byte == 0)?;
        let (text, rest) = self.rest.split_at_checked(end)?;
        self.rest = rest.get(1..)?;
        Some(text)
    }
}

/// Who asks, and for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub opcode: u32,
    pub unique: u64,
    pub node: u64,
    pub uid: u32,
    pub gid: u32,
}

impl Header {
    pub fn parse(fields: &mut Fields<'_>) -> Option<Self> {
        fields.u32()?;
        let (opcode, unique, node) = (fields.u32()?, fields.u64()?, fields.u64()?);
        let (uid, gid) = (fields.u32()?, fields.u32()?);
        fields.skip(8)?;
        Some(Header { opcode, unique, node, uid, gid })
    }
}

/// Puts a reply together.
#[derive(Debug, Default)]
pub struct Reply(pub Vec<u8>);

impl Reply {
    pub fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    /// `struct fuse_attr`
    pub fn attributes(self, stat: &Stat) -> Self {
        self.u64(stat.st_ino)
            .u64(stat.st_size as u64)
            .u64(stat.st_blocks as u64)
            .u64(stat.st_atime as u64)
            .u64(stat.st_mtime as u64)
            .u64(stat.st_ctime as u64)
            .u32(stat.st_atime_nsec as u32)
            .u32(stat.st_mtime_nsec as u32)
            .u32(stat.st_ctime_nsec as u32)
            .u32(stat.st_mode)
            .u32(stat.st_nlink as u32)
            .u32(stat.st_uid)
            .u32(stat.st_gid)
            .u32(stat.st_rdev as u32)
            .u32(stat.st_blksize as u32)
            .u32(0)
    }

    /// `struct fuse_entry_out`
    pub fn node(self, number: u64, valid: u64, stat: &Stat) -> Self {
        self.u64(number).u64(0).u64(valid).u64(valid).u32(0).u32(0).attributes(stat)
    }

    /// `struct fuse_statfs_out`
    pub fn statfs(self, stat: &StatVfs) -> Self {
        self.u64(stat.f_blocks)
            .u64(stat.f_bfree)
            .u64(stat.f_bavail)
            .u64(stat.f_files)
            .u64(stat.f_ffree)
            .u32(stat.f_bsize as u32)
            .u32(stat.f_namemax as u32)
            .u32(stat.f_frsize as u32)
            .zeros(28)
    }

    /// `struct fuse_dirent`
    pub fn entry(mut self, inode: u64, offset: u64, kind: u32, name: &[u8]) -> Self {
        self = self.u64(inode).u64(offset).u32(name.len() as u32).u32(kind);
        self.0.extend(name);
        let padded = self.0.len().next_multiple_of(8);
        self.0.resize(padded, 0);
        self
    }

    pub fn zeros(mut self, count: usize) -> Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_taken_apart_and_never_overrun() {
        let mut request = Reply::default().u32(60).u32(1).u64(7).u64(1).u32(1000).u32(100).zeros(8).0;
        request.extend(b"name\0rest");
        let mut fields = Fields::new(&request);
        let header = Header::parse(&mut fields).unwrap();
        assert_eq!(header, Header { opcode: 1, unique: 7, node: 1, uid: 1000, gid: 100 });
        assert_eq!((fields.text(), fields.text(), fields.u64()), (Some(&b"name"[..]), None, None));
        assert!(fields.skip(5).is_none() && fields.skip(4).is_some() && fields.u32().is_none());
        for length in 0..IN_HEADER {
            assert!(Header::parse(&mut Fields::new(&request[..length])).is_none());
        }
    }

    #[test]
    fn structures_have_the_sizes_of_the_protocol() {
        let stat = rustix::fs::stat("/").unwrap();
        assert_eq!(Reply::default().attributes(&stat).0.len(), 88);
        assert_eq!(Reply::default().node(1, 1, &stat).0.len(), ENTRY);
        let stat = rustix::fs::statvfs("/").unwrap();
        assert_eq!(Reply::default().statfs(&stat).0.len(), 80);
        assert_eq!(Reply::default().entry(1, 2, 4, b"name").0.len(), 32);
    }
}
