//! cloud-init's NoCloud seed: a small disk from which a guest with cloud-init takes its configuration
//! (<https://cloudinit.readthedocs.io/en/latest/reference/datasources/nocloud.html>).
//!
//! It is a FAT file system with the label that cloud-init looks for, made in memory by the `fatfs` crate; the guest can't write it.

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{Disk, Format, Options};
use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio::VirtioDevice;
use virtio::block::Block;

use crate::disk::split_path;

/// What cloud-init finds the disk by.
const LABEL: [u8; 11] = *b"CIDATA     ";
/// The most that each file may have: user-data of clouds is limited to much less.
const MAX_FILE: u64 = 16 << 20;
/// What is left for the file system itself.
const OVERHEAD: usize = 1 << 20;

/// How user-data begins: cloud-init leaves alone what begins otherwise (its reference, "User-data formats").
const BEGINNINGS: [&[u8]; 7] =
    [b"#!", b"#cloud-", b"#include", b"#part-handler", b"## template:", b"Content-Type:", b"MIME-Version:"];
const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];

/// Which files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeedArg {
    user_data: PathBuf,
    meta_data: Option<PathBuf>,
    network_config: Option<PathBuf>,
}

/// Why there is no seed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--cloud-init: can't read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("--cloud-init: {} has more than {} MiB", path.display(), MAX_FILE >> 20)]
    TooLarge { path: PathBuf },
    #[error("--cloud-init: can't make the disk: {0}")]
    Make(io::Error),
    #[error(transparent)]
    Disk(#[from] block::Error),
}

/// Parses `USER-DATA[,meta-data=FILE][,network-config=FILE]`.
pub fn parse(text: &str) -> Result<SeedArg, String> {
    let (user_data, settings) = split_path(text);
    if user_data.is_empty() {
        return Err("the file with user-data is missing".into());
    }
    let mut seed = SeedArg { user_data: user_data.into(), meta_data: None, network_config: None };
    for setting in settings.split(',').filter(|setting| !setting.is_empty()) {
        match setting.split_once('=').unwrap_or((setting, "")) {
            ("meta-data", path) if !path.is_empty() => seed.meta_data = Some(path.into()),
            ("network-config", path) if !path.is_empty() => seed.network_config = Some(path.into()),
            _ => return Err(format!("\"{setting}\" is not known: allowed are meta-data=FILE and network-config=FILE")),
        }
    }
    Ok(seed)
}

/// Makes the disk and a device of it.
pub fn device(seed: &SeedArg) -> Result<Arc<dyn VirtioDevice>, Error> {
    let user_data = read(&seed.user_data)?;
    if !is_user_data(&user_data) {
        let path = seed.user_data.display();
        tracing::warn!(
            "--cloud-init: {path} begins like no user-data, and cloud-init may ignore it (#cloud-config is the usual first line)"
        );
    }
    let meta_data = match &seed.meta_data {
        Some(path) => read(path)?,
        None => default_meta_data(&user_data),
    };
    let mut files = vec![("user-data", user_data), ("meta-data", meta_data)];
    if let Some(path) = &seed.network_config {
        files.push(("network-config", read(path)?));
    }
    let image = file_system(&files).map_err(Error::Make)?;
    let mut file = File::from(memfd_create("cloud-init seed", MemfdFlags::CLOEXEC).map_err(|e| Error::Make(e.into()))?);
    file.write_all(&image).map_err(Error::Make)?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let disk = Disk::open(&Options { read_only: true, format: Some(Format::Raw), ..Options::new(path) })?;
    Ok(Arc::new(Block::new(disk, "cidata", 1)))
}

/// The instance's name decides whether cloud-init starts over: it does when its user-data has changed.
fn default_meta_data(user_data: &[u8]) -> Vec<u8> {
    let mut sum = flate2::Crc::new();
    sum.update(user_data);
    format!("instance-id: ringer-{:08x}\n", sum.sum()).into_bytes()
}

fn is_user_data(data: &[u8]) -> bool {
    data.is_empty() || BEGINNINGS.iter().any(|beginning| data.starts_with(beginning)) || data.starts_with(GZIP_MAGIC)
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let mut data = Vec::new();
    // Not all files say how long they are.
    let file = File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut data));
    file.map_err(|source| Error::Read { path: path.into(), source })?;
    if data.len() as u64 > MAX_FILE {
        return Err(Error::TooLarge { path: path.into() });
    }
    Ok(data)
}

fn file_system(files: &[(&str, Vec<u8>)]) -> io::Result<Vec<u8>> {
    let data: usize = files.iter().map(|(_, data)| data.len().next_multiple_of(4096)).sum();
    let mut disk = Cursor::new(vec![0; (data + OVERHEAD).next_multiple_of(4096)]);
    fatfs::format_volume(&mut disk, FormatVolumeOptions::new().volume_label(LABEL))?;
    disk.seek(SeekFrom::Start(0))?;
    {
        let volume = FileSystem::new(&mut disk, FsOptions::new())?;
        for (name, data) in files {
            volume.root_dir().create_file(name)?.write_all(data)?;
        }
        volume.unmount()?;
    }
    Ok(disk.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_has_the_label_and_the_files() {
        let data = vec![b'x'; 3 << 20];
        let image = file_system(&[("user-data", data.clone()), ("meta-data", b"instance-id: 1\n".to_vec())]).unwrap();
        let volume = FileSystem::new(Cursor::new(image), FsOptions::new()).unwrap();
        assert_eq!(volume.read_volume_label_from_root_dir().unwrap().as_deref(), Some("CIDATA"));
        let mut read = Vec::new();
        volume.root_dir().open_file("user-data").unwrap().read_to_end(&mut read).unwrap();
        assert!(read == data);
        let mut text = String::new();
        volume.root_dir().open_file("meta-data").unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "instance-id: 1\n");
    }

    #[test]
    fn other_user_data_is_another_instance() {
        assert_eq!(default_meta_data(b"a"), default_meta_data(b"a"));
        assert_ne!(default_meta_data(b"a"), default_meta_data(b"b"));
    }

    #[test]
    fn what_cloud_init_would_ignore_is_noticed() {
        for known in
            ["", "#cloud-config\n", "#!/bin/sh\n", "#cloud-boothook\n", "MIME-Version: 1.0\n", "## template: jinja\n"]
        {
            assert!(is_user_data(known.as_bytes()), "{known}");
        }
        assert!(is_user_data(&[0x1f, 0x8b, 8]));
        assert!(!is_user_data(b"users:\n") && !is_user_data(b" #cloud-config\n"));
    }

    #[test]
    fn a_file_without_an_end_is_too_large() {
        assert!(matches!(read(Path::new("/dev/zero")), Err(Error::TooLarge { .. })));
    }

    #[test]
    fn a_seed_is_user_data_with_more() {
        let seed = parse("a,meta-data=b,network-config=c").unwrap();
        assert_eq!(seed.user_data, Path::new("a"));
        assert_eq!((seed.meta_data, seed.network_config), (Some("b".into()), Some("c".into())));
        for text in ["", ",meta-data=b", "a,meta-data=", "a,ro"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
