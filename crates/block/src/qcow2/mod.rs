//! Qcow2 images by `imago`, with the images behind them, and all else that is more than a file: snapshots of any image,
//! and raw images without the host's cache.

mod check;
mod header;
mod pack;
mod unpack;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use imago::file::File as Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, StorageOpenOptions};
use memory::vm_memory::VolatileSlice;
use memory::vm_memory::bitmap::BitmapSlice;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::disk::write_zero_bytes;
use crate::open::{detect, open_file};
use crate::{Cache, Error, Format, Options, SECTOR};

pub use check::{Report, check};
use header::EXTERNAL_DATA;
pub use header::{CORRUPT, Compression, DIRTY, Header};
pub use pack::{CLUSTER, Packer};

type Access = FormatAccess<Storage>;
type ImagoQcow2 = imago::qcow2::Qcow2<Storage, Arc<Access>>;

/// The most images that stand behind one another.
const DEEPEST: usize = 16;

/// An open image.
pub struct Qcow2 {
    /// Taken for writing only where mappings go away (discard): imago asks for that.
    access: RwLock<Access>,
    /// The same open file, for what imago would do with all reads and writes locked out.
    file: File,
    /// The most that the file was seen to have, in bytes: it never shrinks while it is ours.
    length: AtomicU64,
    /// The library has panicked: what it holds in memory may be anything, so nothing of it may reach the file.
    broken: AtomicBool,
    /// What an image of another image grows to is thrown away: nothing of it needs to be on disk.
    ephemeral: bool,
}

impl Qcow2 {
    pub fn open(file: File, options: &Options) -> Result<Self, Error> {
        let write = options.writes_image();
        let mut chain = Chain { seen: Vec::new(), any: options.any_backing, direct: options.cache == Cache::None };
        let twin = twin(&file, &options.path)?;
        let access = chain.qcow2(file, &options.path, write)?;
        if options.snapshot { Self::snapshot(access, &options.path) } else { Ok(Self::new(access, twin, false)) }
    }

    /// A raw image without host cache, or with a snapshot over it.
    pub fn over_raw(file: File, options: &Options) -> Result<Self, Error> {
        let twin = twin(&file, &options.path)?;
        let access = raw(file, &options.path, options.writes_image(), options.cache == Cache::None)?;
        if options.snapshot { Self::snapshot(access, &options.path) } else { Ok(Self::new(access, twin, false)) }
    }

    /// Puts an image over `below` that takes all writes and has no name.
    fn snapshot(below: Access, path: &Path) -> Result<Self, Error> {
        let failed =
            |source| Error::Io { path: path.into(), what: "make a temporary file for a snapshot of it", source };
        let file = tempfile::tempfile().map_err(failed)?;
        let twin = file.try_clone().map_err(failed)?;
        let storage = Storage::try_from(file).map_err(failed)?;
        let size = below.size().next_multiple_of(SECTOR);
        let create = ImagoQcow2::create_builder(storage).size(size);
        let below = Arc::new(below);
        let image = create.create_open(DenyImplicitOpenGate::default(), |storage| {
            Ok(imago::qcow2::Qcow2::builder(storage).backing(Some(below)).write(true))
        });
        Ok(Self::new(FormatAccess::new(image.map_err(failed)?), twin, true))
    }

    /// Where the next byte at or after `offset` is that may not be zero.
    pub fn next_data(&self, mut offset: u64) -> io::Result<Option<u64>> {
        let access = self.access();
        while offset < access.size() {
            match self.contain(|| access.get_mapping(offset, access.size() - offset))? {
                (imago::Mapping::Zero { .. }, length) if length > 0 => offset += length,
                (imago::Mapping::Eof { .. }, _) => return Ok(None),
                _ => return Ok(Some(offset)),
            }
        }
        Ok(None)
    }

    /// Changes the size of the disk.
    pub fn resize(&self, size: u64) -> io::Result<()> {
        let mut access = self.access.write().unwrap_or_else(PoisonError::into_inner);
        access.resize(size, imago::format::PreallocateMode::None)?;
        access.flush()?;
        self.file.sync_data()
    }

    fn new(access: Access, file: File, ephemeral: bool) -> Self {
        Qcow2 {
            access: RwLock::new(access),
            file,
            length: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            ephemeral,
        }
    }

    fn access(&self) -> RwLockReadGuard<'_, Access> {
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn size(&self) -> u64 {
        self.access().size()
    }

    /// Does something with the image. A panic in there, over an image that is not what the library expects, ends the
    /// use of the image and not the machine.
    fn contain<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let broken = || io::Error::other("the image can't be used any more after an internal error");
        if self.broken.load(Ordering::Relaxed) {
            return Err(broken());
        }
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
            self.broken.store(true, Ordering::Relaxed);
            Err(broken())
        })
    }

    pub fn read<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>], offset: u64) -> io::Result<()> {
        self.not_cut_off()?;
        let (vector, _guard) = IoVectorMut::from_volatile_slice(slices);
        self.contain(|| self.access().readv(vector, offset))
    }

    pub fn write<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>], offset: u64) -> io::Result<()> {
        self.not_cut_off()?;
        let (vector, _guard) = IoVector::from_volatile_slice(slices);
        self.contain(|| self.access().writev(vector, offset))?;
        // The file may have grown: from here on, it has what was written.
        self.not_cut_off()
    }

    /// What somebody has cut off would read as zeros.
    fn not_cut_off(&self) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        if length < self.length.fetch_max(length, Ordering::Relaxed) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the image file has become shorter"));
        }
        Ok(())
    }

    pub fn flush(&self) -> io::Result<()> {
        if self.ephemeral {
            return Ok(());
        }
        self.contain(|| self.access().flush())?;
        self.file.sync_data()
    }

    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut access = self.access.write().unwrap_or_else(PoisonError::into_inner);
        match self.contain(|| access.discard_to_any(offset, length)) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            other => other,
        }
    }

    pub fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let unsupported =
            |result: &io::Result<()>| result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::Unsupported);
        let mut result = Err(io::ErrorKind::Unsupported.into());
        if unmap {
            let mut access = self.access.write().unwrap_or_else(PoisonError::into_inner);
            result = self.contain(|| access.discard_to_zero(offset, length));
        }
        if unsupported(&result) {
            result = self.contain(|| self.access().write_zeroes(offset, length));
        }
        // Version 2 has no clusters that just read as zeros.
        if unsupported(&result) {
            result = write_zero_bytes(offset, length, |zeros, at| self.write(zeros, at));
        }
        result
    }
}

/// Makes an empty image of `size` bytes in `file`, over `backing`: its name as the image is to have it, and its format.
pub fn create(file: File, size: u64, backing: Option<(String, Format)>) -> io::Result<()> {
    let storage = Storage::try_from(file)?;
    let mut image = ImagoQcow2::create_builder(storage).size(size);
    if let Some((name, format)) = backing {
        let format = match format {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        };
        image = image.backing(name, format.into());
    }
    image.create()
}

fn twin(file: &File, path: &Path) -> Result<File, Error> {
    file.try_clone().map_err(|source| Error::Io { path: path.into(), what: "use it", source })
}

fn storage(file: File, path: &Path, write: bool, direct: bool) -> Result<Storage, Error> {
    let options = StorageOpenOptions::new().filename(path).write(write).direct(direct);
    let failed = |what| move |source| Error::Io { path: path.into(), what, source };
    if direct {
        let flags = fcntl_getfl(&file).and_then(|flags| fcntl_setfl(&file, flags | OFlags::DIRECT));
        flags.map_err(io::Error::from).map_err(failed("go without the host's cache (cache=none)"))?;
    }
    Storage::from_open_file(file, options).map_err(failed("use it"))
}

fn raw(file: File, path: &Path, write: bool, direct: bool) -> Result<Access, Error> {
    let image = imago::raw::Raw::open_image(storage(file, path, write, direct)?, write);
    let image = image.map_err(|source| Error::Io { path: path.into(), what: "use it", source })?;
    Ok(FormatAccess::new(image))
}

/// Opens an image and those behind it.
struct Chain {
    /// Device and inode of what is open already.
    seen: Vec<(u64, u64)>,
    any: bool,
    direct: bool,
}

impl Chain {
    fn qcow2(&mut self, file: File, path: &Path, write: bool) -> Result<Access, Error> {
        self.enter(&file, path)?;
        let bad = |source| Error::Qcow2 { path: path.into(), source };
        let header = Header::read(&file).map_err(bad)?;
        if header.incompatible & EXTERNAL_DATA != 0 {
            return Err(Error::ExternalData { path: path.into() });
        }
        let sound = || check::metadata_is_counted(&file, &header).map_err(bad);
        if header.incompatible & (DIRTY | CORRUPT) != 0 || write && !sound()? {
            return Err(Error::Damaged { path: path.into() });
        }
        if header.compression == Compression::Zstd {
            return self.zstd(file, path, write, &header);
        }
        let storage = storage(file, path, write, self.direct)?;
        let image = catch_unwind(AssertUnwindSafe(|| ImagoQcow2::open_image(storage, write)));
        let panicked = |_| Err(io::Error::other("an internal error of the image library"));
        let mut image = image.unwrap_or_else(panicked).map_err(bad)?;
        image.set_data_file(None);
        image.set_backing(self.backing_of(path, &header)?.map(Arc::new));
        Ok(FormatAccess::new(image))
    }

    fn zstd(&mut self, file: File, path: &Path, write: bool, header: &Header) -> Result<Access, Error> {
        if write {
            return Err(Error::Zstd { path: path.into() });
        }
        let backing = self.backing_of(path, header)?;
        let unpacked = unpack::unpack(&file, header, backing.as_ref());
        let unpacked = unpacked.map_err(|source| Error::Io { path: path.into(), what: "unpack it", source })?;
        raw(unpacked, path, false, false)
    }

    /// The image that stands behind the one at `path`.
    fn backing_of(&mut self, path: &Path, header: &Header) -> Result<Option<Access>, Error> {
        let name = header.backing_file.as_deref().filter(|name| !name.is_empty());
        name.map(|name| self.backing(path, Path::new(name), header.backing_format.as_deref())).transpose()
    }

    /// Opens what the image at `path` names as its backing file.
    fn backing(&mut self, path: &Path, name: &Path, format: Option<&str>) -> Result<Access, Error> {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let wanted = directory.join(name);
        let real = |path: &Path| {
            fs::canonicalize(path).map_err(|source| Error::Io { path: path.into(), what: "find it", source })
        };
        let found = real(&wanted)?;
        // The image's directory is where it really is: links there lead as far as links anywhere.
        let home = real(path)?.parent().map(Path::to_path_buf).unwrap_or_default();
        if !self.any && !found.starts_with(&home) {
            return Err(Error::BackingOutside { path: path.into(), backing: wanted });
        }
        // Before it is locked: our own lock on an image that is written would look like that of another process.
        self.refuse_again(fs::metadata(&found), &found)?;
        let file = open_file(&found, false)?;
        let format = match format {
            Some("raw" | "file") => Format::Raw,
            Some("qcow2") => Format::Qcow2,
            Some(other) => return Err(Error::UnknownFormat { path: path.into(), format: other.into() }),
            None if self.any => detect(&file, &found)?,
            None => return Err(Error::BackingFormat { path: path.into(), backing: wanted }),
        };
        match format {
            Format::Qcow2 => self.qcow2(file, &found, false),
            Format::Raw => {
                self.enter(&file, &found)?;
                raw(file, &found, false, self.direct)
            }
        }
    }

    /// Adds an image to the chain, which must not be too long.
    fn enter(&mut self, file: &File, path: &Path) -> Result<(), Error> {
        let identity = self.refuse_again(file.metadata(), path)?;
        self.seen.push(identity);
        Ok(())
    }

    /// Refuses what is open already, and one more than there may be. Returns device and inode.
    fn refuse_again(&self, metadata: io::Result<fs::Metadata>, path: &Path) -> Result<(u64, u64), Error> {
        let metadata = metadata.map_err(|source| Error::Io { path: path.into(), what: "examine it", source })?;
        let identity = (metadata.dev(), metadata.ino());
        if self.seen.contains(&identity) || self.seen.len() >= DEEPEST {
            return Err(Error::BackingChain { path: path.into(), max: DEEPEST });
        }
        Ok(identity)
    }
}
