//! Disks made by `mke2fs`, and what becomes of them when their bytes are wrong.

use super::*;
use std::fs;
use std::path::Path;
use std::process::Command;

impl ReadAt for Vec<u8> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let data = start.checked_add(buffer.len()).and_then(|end| self.get(start..end));
        buffer.copy_from_slice(data.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn size(&self) -> u64 {
        self.len() as u64
    }
}

const UUID: &str = "0f0e0d0c-0b0a-4908-8706-050403020100";
const MIB: usize = 1 << 20;

/// A file system of 8 MiB with these files; a content that starts with "->" is a symbolic link's target.
fn file_system(kind: &str, uuid: &str, files: &[(&str, &str)]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    fs::create_dir(&tree).unwrap();
    for (path, content) in files {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match content.strip_prefix("->") {
            Some(target) => std::os::unix::fs::symlink(target, path).unwrap(),
            None => fs::write(path, content).unwrap(),
        }
    }
    let image = directory.path().join("image");
    fs::File::create(&image).unwrap().set_len(8 * MIB as u64).unwrap();
    let program = if Path::new("/usr/sbin/mke2fs").exists() { "/usr/sbin/mke2fs" } else { "mke2fs" };
    let made = Command::new(program)
        .args(["-q", "-F", "-t", kind, "-U", uuid, "-d"])
        .arg(&tree)
        .arg(&image)
        .status()
        .expect("mke2fs of e2fsprogs is installed");
    assert!(made.success());
    fs::read(image).unwrap()
}

fn boot(disk: Vec<u8>) -> Result<Found, Error> {
    find(&(Arc::new(disk) as Arc<dyn ReadAt>))
}

const DEBIAN: [(&str, &str); 6] = [
    ("vmlinuz", "->boot/vmlinuz-6.1.0-9"),
    ("boot/vmlinuz-6.1.0-9", "kernel 9"),
    ("boot/initrd.img-6.1.0-9", "initrd 9"),
    ("boot/vmlinuz-6.1.0-13", "kernel 13"),
    ("boot/initrd.img-6.1.0-13", "initrd 13"),
    ("etc/fstab", "fstab"),
];

#[test]
fn the_link_decides_which_kernel_is_booted() {
    for kind in ["ext2", "ext3", "ext4"] {
        let found = boot(file_system(kind, UUID, &DEBIAN)).unwrap();
        assert_eq!((&found.kernel[..], found.initrd.as_deref()), (&b"kernel 9"[..], Some(&b"initrd 9"[..])), "{kind}");
        assert_eq!((found.name.as_str(), found.root), ("/boot/vmlinuz-6.1.0-9", format!("root=UUID={UUID}")));
    }
}

#[test]
fn without_a_link_the_newest_kernel_is_booted() {
    let found = boot(file_system("ext4", UUID, &DEBIAN[1..])).unwrap();
    assert_eq!((&found.kernel[..], found.initrd.as_deref()), (&b"kernel 13"[..], Some(&b"initrd 13"[..])));
}

#[test]
fn a_boot_partition_boots_the_root_partition() {
    let boot_part =
        file_system("ext2", "0f0e0d0c-0b0a-4908-8706-050403020111", &[("vmlinuz-6", "k"), ("initrd-6", "i")]);
    let root = file_system("ext4", UUID, &[("etc/fstab", "x"), ("etc/os-release", "->../usr/lib/os-release")]);
    let mut disk = vec![0; MIB];
    for (index, first) in [2048u32, 2048 + 16384].into_iter().enumerate() {
        let at = 446 + 16 * index;
        disk[at + 4] = 0x83;
        disk[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&16384u32.to_le_bytes());
    }
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.extend(boot_part);
    disk.extend(root);
    let found = boot(disk).unwrap();
    assert_eq!((&found.kernel[..], found.initrd.as_deref()), (&b"k"[..], Some(&b"i"[..])));
    assert_eq!(found.root, format!("root=UUID={UUID}"));
}

#[test]
fn what_can_not_be_booted_is_said() {
    let message = boot(vec![0; MIB]).unwrap_err().to_string();
    assert!(message.contains("the whole disk: no ext2") && message.contains("--kernel"), "{message}");
    let message = boot(file_system("ext4", UUID, &[("etc/fstab", "x")])).unwrap_err().to_string();
    assert!(message.contains("without a kernel"), "{message}");
    let message = boot(file_system("ext4", UUID, &[("vmlinuz", "->vmlinuz"), ("boot/vmlinuz-1", "")])).unwrap_err();
    assert!(message.to_string().contains("0 bytes"), "{message}");
}

#[test]
fn damaged_disks_do_no_harm() {
    let good = file_system("ext4", UUID, &DEBIAN);
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for _ in 0..300 {
        let mut disk = good.clone();
        // What decides anything is at the start: superblock, descriptors, bitmaps, inodes, directories.
        for _ in 0..1 + next() % 64 {
            let at = next() as usize % (MIB / 2);
            disk[at] = next() as u8;
        }
        for _ in 0..1 + next() % 4 {
            disk[1024 + next() as usize % 0x160] = next() as u8;
        }
        if next() % 4 == 0 {
            disk.truncate(next() as usize % disk.len());
        }
        _ = boot(disk);
    }
}
