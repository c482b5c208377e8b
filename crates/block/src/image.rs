//! What users do with images that no machine uses: create, describe, convert, resize, check.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use memory::vm_memory::VolatileSlice;

use crate::disk::CHUNK;
use crate::open::{detect, open_file, size_of};
use crate::qcow2::{self, CLUSTER, Packer};
use crate::{Disk, Error, Format, Options, SECTOR};

pub use crate::qcow2::{Compression, Report};

const MAX_SIZE: u64 = (i64::MAX as u64 / SECTOR) * SECTOR;

/// What an image says about itself.
#[derive(Clone, Debug)]
pub struct Info {
    pub format: Format,
    /// Of the disk, in bytes.
    pub size: u64,
    /// What the file takes of the host's disk, in bytes.
    pub allocated: u64,
    pub qcow2: Option<Qcow2Info>,
}

/// The same, of qcow2 only.
#[derive(Clone, Debug)]
pub struct Qcow2Info {
    pub version: u32,
    pub cluster_size: u64,
    pub compression: &'static str,
    pub backing_file: Option<String>,
    pub backing_format: Option<String>,
    pub snapshots: u32,
    /// Its last user did not close it properly; reference counts may be wrong.
    pub dirty: bool,
    /// A user has found it to be damaged.
    pub corrupt: bool,
}

/// Makes an empty image. `size` may be left out over a backing file, whose size it then gets.
pub fn create(
    path: &Path,
    format: Format,
    size: Option<u64>,
    backing: Option<(PathBuf, Option<Format>)>,
) -> Result<u64, Error> {
    let backing = match backing {
        Some((name, format)) => {
            // As the image will find it: relative names begin where the image is.
            let directory = path.parent().unwrap_or(Path::new(""));
            let mut options = Options::new(directory.join(&name));
            (options.read_only, options.format, options.any_backing) = (true, format, true);
            let file = open_file(&options.path, false)?;
            let format = format.map_or_else(|| detect(&file, &options.path), Ok)?;
            drop(file);
            Some((name.to_string_lossy().into_owned(), format, Disk::open(&options)?.size()))
        }
        None => None,
    };
    let size = size.or(backing.as_ref().map(|(_, _, size)| *size)).unwrap_or_default();
    if !(SECTOR..=MAX_SIZE).contains(&size) || !size.is_multiple_of(SECTOR) {
        return Err(Error::Size { path: path.into(), size });
    }
    let file = create_file(path)?;
    let result = match format {
        Format::Raw => file.set_len(size),
        Format::Qcow2 => qcow2::create(file, size, backing.map(|(name, format, _)| (name, format))),
    };
    finish(path, result, "write it")?;
    Ok(size)
}

fn create_file(path: &Path) -> Result<File, Error> {
    OpenOptions::new().read(true).write(true).create_new(true).open(path).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => Error::Exists { path: path.into() },
        _ => Error::Io { path: path.into(), what: "create it", source },
    })
}

/// Half a new image is removed.
fn finish<T>(path: &Path, result: io::Result<T>, what: &'static str) -> Result<T, Error> {
    result.map_err(|source| {
        let _ = std::fs::remove_file(path);
        Error::Io { path: path.into(), what, source }
    })
}

/// Describes an image, also one that is in use.
pub fn info(path: &Path, format: Option<Format>) -> Result<Info, Error> {
    let failed = |what| move |source| Error::Io { path: path.into(), what, source };
    let file = match open_file(path, false) {
        Err(Error::Locked { .. } | Error::Twice { .. }) => File::open(path).map_err(failed("open it"))?,
        other => other?,
    };
    let allocated = file.metadata().map_err(failed("examine it"))?.blocks() * 512;
    let format = format.map_or_else(|| detect(&file, path), Ok)?;
    if format == Format::Raw {
        return Ok(Info { format, size: size_of(&file, path)?, allocated, qcow2: None });
    }
    let header = qcow2::Header::read(&file).map_err(|source| Error::Qcow2 { path: path.into(), source })?;
    let qcow2 = Qcow2Info {
        version: header.version,
        cluster_size: header.cluster_size(),
        compression: match header.compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        },
        backing_file: header.backing_file.clone(),
        backing_format: header.backing_format.clone(),
        snapshots: header.snapshots,
        dirty: header.incompatible & qcow2::DIRTY != 0,
        corrupt: header.incompatible & qcow2::CORRUPT != 0,
    };
    Ok(Info { format, size: header.size, allocated, qcow2: Some(qcow2) })
}

/// Copies what is on the disk of one image to a new image. `progress` hears of bytes done and of all, for the first time
/// when the new image has been made and nothing is in it.
pub fn convert(from: &Options, to: &Path, format: Format, progress: &mut dyn FnMut(u64, u64)) -> Result<(), Error> {
    let mut source = from.clone();
    (source.read_only, source.snapshot) = (true, false);
    let source = Disk::open(&source)?;
    create(to, format, Some(source.size()), None)?;
    let mut options = Options::new(to);
    options.format = Some(format);
    let target = Disk::open(&options)?;
    let result = copy(&source, &target, progress).and_then(|()| target.flush());
    finish(to, result, "copy to it")
}

fn copy(source: &Disk, target: &Disk, progress: &mut dyn FnMut(u64, u64)) -> io::Result<()> {
    in_clusters(source, progress, |clusters| {
        for (number, data) in clusters {
            let offset = *number * CLUSTER as u64;
            let length = (source.size() - offset).min(CLUSTER as u64) as usize;
            target.write(&[VolatileSlice::from(data.get_mut(..length).unwrap_or_default())], offset)?;
        }
        Ok(())
    })
}

/// The same into a qcow2 image of compressed clusters.
pub fn compress(
    from: &Options,
    to: &Path,
    compression: Compression,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), Error> {
    let mut source = from.clone();
    (source.read_only, source.snapshot) = (true, false);
    let source = Disk::open(&source)?;
    let file = create_file(to)?;
    let mut pack = || {
        let mut target = Packer::new(&file, source.size(), compression)?;
        in_clusters(&source, progress, |clusters| target.add(clusters))?;
        target.finish()
    };
    finish(to, pack(), "copy to it")
}

/// Goes over the clusters of a disk that are not all zeros, several at a time: their numbers, and what is in them. If the
/// disk ends within the last one, zeros follow.
fn in_clusters(
    source: &Disk,
    progress: &mut dyn FnMut(u64, u64),
    mut each: impl FnMut(&mut [(u64, &mut [u8; CLUSTER])]) -> io::Result<()>,
) -> io::Result<()> {
    let size = source.size();
    let mut buffer = vec![0; CHUNK];
    let mut offset = 0;
    progress(offset, size);
    while let Some(next) = source.next_data(offset)?.filter(|next| *next < size) {
        let first = next / CLUSTER as u64;
        offset = first * CLUSTER as u64;
        let length = (size - offset).min(CHUNK as u64) as usize;
        buffer.get_mut(length..).unwrap_or_default().fill(0);
        source.read(&[VolatileSlice::from(buffer.get_mut(..length).unwrap_or_default())], offset)?;
        let (clusters, _) = buffer.as_chunks_mut::<CLUSTER>();
        let numbered = (first..).zip(clusters).filter(|(_, data)| data.iter().any(|byte| *byte != 0));
        each(&mut numbered.collect::<Vec<_>>())?;
        offset += length as u64;
        progress(offset, size);
    }
    progress(size, size);
    Ok(())
}

/// Changes the size of an image's disk; `shrink` allows to cut its end off. Returns the size it had.
pub fn resize(options: &Options, size: u64, shrink: bool) -> Result<u64, Error> {
    let path = &options.path;
    if !(SECTOR..=MAX_SIZE).contains(&size) || !size.is_multiple_of(SECTOR) {
        return Err(Error::Size { path: path.clone(), size });
    }
    let disk = Disk::open(options)?;
    if size < disk.size() && !shrink {
        return Err(Error::Shrink { path: path.clone() });
    }
    disk.resize(size).map_err(|source| Error::Io { path: path.clone(), what: "resize it", source })?;
    Ok(disk.size())
}

/// Checks a qcow2 image, and mends its reference counts if `repair`.
pub fn check(path: &Path, repair: bool) -> Result<Report, Error> {
    let file = open_file(path, repair)?;
    if detect(&file, path)? == Format::Raw {
        return Err(Error::NothingToCheck { path: path.into() });
    }
    qcow2::check(&file, repair).map_err(|source| Error::Qcow2 { path: path.into(), source })
}
