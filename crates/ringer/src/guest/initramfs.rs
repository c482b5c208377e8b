//! Writes an initramfs: a cpio archive in the "newc" format (Linux `Documentation/driver-api/early-userspace/
//! buffer-format.rst`), which the kernel unpacks into its first root file system.
//!
//! Members are added in any order; the directories above a member are made where they are missing. All belong to root,
//! and all times are zero, so that the same contents always give the same bytes.

use std::collections::BTreeMap;

const DIRECTORY: u32 = 0o040000;
const FILE: u32 = 0o100000;
const SYMLINK: u32 = 0o120000;
const CHARACTER_DEVICE: u32 = 0o020000;

/// The name that ends an archive.
const TRAILER: &str = "TRAILER!!!";

#[derive(Clone, Debug, PartialEq, Eq)]
struct Member {
    mode: u32,
    device: (u32, u32),
    data: Vec<u8>,
}

/// An initramfs in the making.
#[derive(Clone, Debug, Default)]
pub struct Initramfs {
    /// By path without a leading slash; the order of the map puts directories before what they hold.
    members: BTreeMap<String, Member>,
    /// Another archive, which the kernel unpacks after this one.
    appended: Vec<u8>,
}

impl Initramfs {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory and those above it.
    pub fn directory(mut self, path: &str) -> Self {
        self.make_directory(path.trim_matches('/'));
        self
    }

    /// Adds a file with the permission bits `mode`. A file that was added before at the same path is replaced.
    pub fn file(self, path: &str, mode: u32, data: impl Into<Vec<u8>>) -> Self {
        self.member(path, FILE | mode & 0o7777, (0, 0), data.into())
    }

    /// Adds a symbolic link at `path` that points to `target`.
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.member(path, SYMLINK | 0o777, (0, 0), target.into())
    }

    /// Adds a character device node.
    pub fn character_device(self, path: &str, mode: u32, major: u32, minor: u32) -> Self {
        self.member(path, CHARACTER_DEVICE | mode & 0o7777, (major, minor), Vec::new())
    }

    /// Adds what is in another archive.
    pub fn append(mut self, archive: &[u8]) -> Self {
        self.appended.extend_from_slice(archive);
        self
    }

    /// The archive.
    pub fn build(&self) -> Vec<u8> {
        let mut archive = Vec::new();
        for (inode, (path, member)) in (1u32..).zip(&self.members) {
            write_member(&mut archive, inode, path, member);
        }
        write_member(&mut archive, 0, TRAILER, &Member { mode: 0, device: (0, 0), data: Vec::new() });
        archive.extend_from_slice(&self.appended);
        archive
    }

    fn member(mut self, path: &str, mode: u32, device: (u32, u32), data: Vec<u8>) -> Self {
        let path = path.trim_matches('/');
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.make_directory(parent);
        }
        self.members.insert(path.into(), Member { mode, device, data });
        self
    }

    fn make_directory(&mut self, path: &str) {
        if path.is_empty() || self.members.contains_key(path) {
            return;
        }
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.make_directory(parent);
        }
        self.members.insert(path.into(), Member { mode: DIRECTORY | 0o755, device: (0, 0), data: Vec::new() });
    }
}

/// One header, its name and its data, each padded to four bytes.
fn write_member(archive: &mut Vec<u8>, inode: u32, path: &str, member: &Member) {
    let links = if member.mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
    let (major, minor) = member.device;
    let fields = [
        inode,
        member.mode,
        0, // uid
        0, // gid
        links,
        0, // mtime
        member.data.len() as u32,
        0, // the device that holds the file: major, minor
        0,
        major,
        minor,
        path.len() as u32 + 1,
        0, // checksum: none in this format
    ];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(path.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(&member.data);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Path, mode and data of each member, read back by the format's own rules.
    fn parse(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut members = Vec::new();
        loop {
            assert_eq!(&archive[..6], b"070701");
            let field = |i: usize| {
                let text = std::str::from_utf8(&archive[6 + 8 * i..14 + 8 * i]).unwrap();
                u32::from_str_radix(text, 16).unwrap() as usize
            };
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = String::from_utf8(archive[110..110 + name_size - 1].to_vec()).unwrap();
            let data = (110 + name_size).next_multiple_of(4);
            if name == TRAILER {
                return members;
            }
            members.push((name, mode as u32, archive[data..data + size].to_vec()));
            archive = &archive[(data + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn directories_come_before_what_they_hold() {
        let archive = Initramfs::new().file("/a/b/c", 0o644, "text").symlink("a/l", "b/c").build();
        let names: Vec<_> = parse(&archive).into_iter().map(|(name, mode, _)| (name, mode)).collect();
        assert_eq!(
            names,
            [
                ("a".into(), 0o040755),
                ("a/b".into(), 0o040755),
                ("a/b/c".into(), 0o100644),
                ("a/l".to_string(), 0o120777)
            ]
        );
    }

    #[test]
    fn data_of_any_length_is_read_back() {
        let contents: Vec<Vec<u8>> = (0..9).map(|n| vec![b'x'; n]).collect();
        let mut image = Initramfs::new();
        for (n, data) in contents.iter().enumerate() {
            image = image.file(&"n".repeat(n + 1), 0o755, data.clone());
        }
        let read: Vec<_> = parse(&image.build()).into_iter().map(|(_, _, data)| data).collect();
        assert_eq!(read, contents);
    }

    #[test]
    fn a_file_replaces_an_earlier_one_of_its_path() {
        let archive = Initramfs::new().file("init", 0o755, "one").file("/init", 0o755, "two").build();
        assert_eq!(parse(&archive), [("init".into(), 0o100755, b"two".to_vec())]);
    }
}
