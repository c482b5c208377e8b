//! The default guest: what `ringer run` boots when it is given no kernel.
//!
//! Debian's cloud kernel and Debian's static busybox are fetched once by the host's apt ([`apt`]), unpacked here
//! ([`deb`]), and kept in the user's cache directory. The initramfs around busybox is made by Ringer ([`initramfs`]).
//!
//! The cache has one directory for each [`RECIPE`] and architecture. It is built under a temporary name and renamed
//! when it is complete, under a lock, so that neither an interrupted nor a concurrent run can leave half a guest.

pub(crate) mod apt;
mod deb;
pub mod initramfs;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::cleanup;
use apt::Apt;
use initramfs::Initramfs;

/// Changes whenever what is fetched or how it is stored changes, so that older caches are not taken for this one.
const RECIPE: u32 = 2;
/// The package that always depends on Debian's newest kernel for virtual machines.
const KERNEL_META_PACKAGE: &str = "linux-image-cloud-amd64";
const INIT: &str = include_str!("init");
const DHCP_SCRIPT: &str = include_str!("udhcpc.script");

/// The modules that the guest loads at its start, in an order that has what others need before them. Where a kernel has
/// one of them built in, its package has no such file.
const MODULES: [&str; 18] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_blk",
    "virtio_console",
    "rng_core",
    "virtio_rng",
    "virtio_balloon",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
    "fuse",
    "virtiofs",
];

/// The package that always depends on Debian's newest kernel for any PC, and the drivers that it has besides: for drives
/// and network cards of real makes.
const PC_KERNEL_META_PACKAGE: &str = "linux-image-amd64";
const PC_MODULES: [&str; 28] = [
    "scsi_common",
    "scsi_mod",
    "crct10dif_common",
    "crct10dif_generic",
    "crc_t10dif",
    "crc64",
    "crc64_rocksoft_generic",
    "crc64_rocksoft",
    "t10_pi",
    "sd_mod",
    "libata",
    "libahci",
    "ahci",
    "ata_piix",
    "cdrom",
    "sr_mod",
    "isofs",
    "nls_cp437",
    "nls_ascii",
    "nls_utf8",
    "fat",
    "msdos",
    "vfat",
    "floppy",
    "e1000",
    "e1000e",
    "mii",
    "8139cp",
];

/// What a host of virtual machines needs, whose processor is AMD's.
const KVM_MODULES: [&str; 3] = ["irqbypass", "kvm", "kvm_amd"];

/// Where a script may be put into the default initramfs that runs instead of the shell.
pub const RUN_SCRIPT: &str = "/etc/ringer/run";

/// Why there is no default guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no cache directory for the default guest: set XDG_CACHE_HOME or HOME, or give a kernel by --kernel FILE")]
    NoCacheDirectory,
    #[error("can't prepare the default guest in {}: {source} (set XDG_CACHE_HOME to a writable directory, or give a kernel by --kernel FILE)", path.display())]
    Cache { path: PathBuf, source: io::Error },
    #[error("can't fetch the default guest: {why} (give a kernel by --kernel FILE and --initrd FILE instead)")]
    Apt { why: String },
    #[error("can't unpack {}: {source}", package.display())]
    Package { package: PathBuf, source: io::Error },
}

/// The files of a default guest.
#[derive(Clone, Debug)]
pub struct Guest {
    pub kernel: PathBuf,
    pub busybox: PathBuf,
    /// An archive of the drivers for paravirtual devices.
    modules: PathBuf,
}

impl Guest {
    /// Takes the guest from the cache, or fetches it first.
    pub fn get(cache: &Path) -> Result<Self, Error> {
        Self::with(cache, "debian-amd64", "amd64", KERNEL_META_PACKAGE, &MODULES)
    }

    /// The same with the kernel for any PC, and drivers for its drives and network cards.
    pub fn pc(cache: &Path) -> Result<Self, Error> {
        let modules: Vec<_> = MODULES.into_iter().chain(PC_MODULES).collect();
        Self::with(cache, "debian-pc-amd64", "amd64", PC_KERNEL_META_PACKAGE, &modules)
    }

    /// A 32-bit guest: kernels for processors without or with PAE, no drivers.
    pub fn i386(cache: &Path, pae: bool) -> Result<Self, Error> {
        let flavour = if pae { "686-pae" } else { "686" };
        Self::with(cache, &format!("debian-{flavour}"), "i386", &format!("linux-image-{flavour}"), &[])
    }

    /// The same guest as a host of virtual machines: with KVM.
    pub fn kvm_host(cache: &Path) -> Result<Self, Error> {
        let modules: Vec<_> = MODULES.into_iter().chain(KVM_MODULES).collect();
        Self::with(cache, "debian-amd64-kvm", "amd64", KERNEL_META_PACKAGE, &modules)
    }

    fn with(
        cache: &Path,
        name: &str,
        architecture: &str,
        kernel: &str,
        modules: &[&'static str],
    ) -> Result<Self, Error> {
        let directory = cached(cache, &format!("{name}-v{RECIPE}"), |work| {
            let steps = Steps::new();
            let progress = |percent| steps.percent(percent);
            steps.start("package lists");
            let apt = Apt::new(work, architecture, &progress)?;
            let kernel = apt.dependency(kernel, "linux-image-")?;
            steps.start(&kernel);
            let kernel = apt.download(&kernel)?;
            steps.start("busybox-static");
            let busybox = apt.download("busybox-static")?;
            steps.start("unpacking");
            Ok(vec![
                ("vmlinuz", deb::extract(&kernel, |path| path.starts_with("boot/vmlinuz-"))?),
                ("busybox", deb::extract(&busybox, |path| path.ends_with("bin/busybox"))?),
                ("modules.cpio", modules_archive(&kernel, modules)?),
            ])
        })?;
        let path = |name| directory.join(name);
        Ok(Guest { kernel: path("vmlinuz"), busybox: path("busybox"), modules: path("modules.cpio") })
    }

    /// The initramfs, to which more files may be added.
    pub fn initramfs(&self) -> Result<Initramfs, Error> {
        let read = |path: &PathBuf| fs::read(path).map_err(|source| Error::Cache { path: path.clone(), source });
        let (busybox, modules) = (read(&self.busybox)?, read(&self.modules)?);
        let mut image = Initramfs::new();
        for directory in ["dev", "etc", "proc", "root", "sbin", "sys", "tmp", "usr/bin", "usr/sbin"] {
            image = image.directory(directory);
        }
        Ok(image
            .character_device("dev/console", 0o600, 5, 1)
            .file("bin/busybox", 0o755, busybox)
            .symlink("bin/sh", "busybox")
            .file("etc/udhcpc.script", 0o755, DHCP_SCRIPT)
            .file("init", 0o755, INIT)
            .append(&modules))
    }

    /// The initramfs as a file beside the kernel, written when what it would hold has changed.
    pub fn initrd(&self) -> Result<PathBuf, Error> {
        let path = self.kernel.with_file_name("initrd.cpio");
        let archive = self.initramfs()?.build();
        if fs::read(&path).is_ok_and(|old| old == archive) {
            return Ok(path);
        }
        let write = || -> io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
            file.write_all(&archive)?;
            file.persist(&path)?;
            Ok(())
        };
        write().map_err(|source| Error::Cache { path: path.clone(), source })?;
        Ok(path)
    }
}

/// The modules of a kernel package, and the order in which to load them.
fn modules_archive(kernel: &Path, names: &[&'static str]) -> Result<Vec<u8>, Error> {
    let modules = deb::modules(kernel, names)?;
    let order: String = modules.iter().map(|(name, _)| format!("{name}\n")).collect();
    let image = Initramfs::new().file("lib/modules/order", 0o644, order);
    let add = |image: Initramfs, (name, data)| image.file(&format!("lib/modules/{name}.ko"), 0o644, data);
    Ok(modules.into_iter().fold(image, add).build())
}

/// Debian's static busybox for i386, to run 32-bit programs in the guest.
pub fn busybox_i386(cache: &Path) -> Result<PathBuf, Error> {
    let directory = cached(cache, &format!("debian-i386-v{RECIPE}"), |work| {
        let package = Apt::new(work, "i386", &|_| ())?.download("busybox-static")?;
        Ok(vec![("busybox", deb::extract(&package, |path| path.ends_with("bin/busybox"))?)])
    })?;
    Ok(directory.join("busybox"))
}

/// The user's cache directory for Ringer (XDG Base Directory Specification).
pub fn cache_directory() -> Result<PathBuf, Error> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .map(|path| path.join("ringer"))
        .ok_or(Error::NoCacheDirectory)
}

/// The directory `name` in the cache. If it is missing, `build` makes its files, in a work directory that is removed.
fn cached(
    cache: &Path,
    name: &str,
    build: impl Fn(&Path) -> Result<Vec<(&'static str, Vec<u8>)>, Error>,
) -> Result<PathBuf, Error> {
    let path = cache.join(name);
    if path.is_dir() {
        return Ok(path);
    }
    let at = |source| Error::Cache { path: path.clone(), source };
    fs::create_dir_all(cache).map_err(at)?;
    let lock =
        File::options().create(true).append(true).mode(0o600).open(cache.join(format!("{name}.lock"))).map_err(at)?;
    lock.lock().map_err(at)?;
    if path.is_dir() {
        return Ok(path);
    }
    let temporary = tempfile::Builder::new().prefix("building-").tempdir_in(cache).map_err(at)?;
    let _removal = cleanup::register({
        let path = temporary.path().to_owned();
        move || _ = fs::remove_dir_all(&path)
    });
    let (work, ready) = (temporary.path().join("work"), temporary.path().join("ready"));
    fs::create_dir(&work).map_err(at)?;
    fs::create_dir(&ready).map_err(at)?;
    for (file, data) in build(&work)? {
        fs::write(ready.join(file), data).map_err(at)?;
    }
    fs::rename(&ready, &path).map_err(at)?;
    Ok(path)
}

/// Shows the steps of fetching on stderr: a bar on a terminal, a line each elsewhere.
struct Steps {
    bar: ProgressBar,
}

impl Steps {
    fn new() -> Self {
        let bar = ProgressBar::new(100);
        if let Ok(style) = ProgressStyle::with_template("{spinner} fetching the default guest: {msg} {wide_bar} {pos}%")
        {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        Steps { bar }
    }

    fn start(&self, what: &str) {
        self.bar.set_position(0);
        self.bar.set_message(what.to_owned());
        if self.bar.is_hidden() {
            say!("ringer: fetching the default guest (once): {what}");
        }
    }

    fn percent(&self, percent: u64) {
        self.bar.set_position(percent);
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn two_runs_at_once_build_a_guest_once() {
        let cache = tempfile::tempdir().unwrap();
        let builds = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let path = cached(cache.path(), "guest", |_| {
                        builds.fetch_add(1, Ordering::SeqCst);
                        std::thread::sleep(Duration::from_millis(20));
                        Ok(vec![("file", b"data".to_vec())])
                    });
                    assert_eq!(fs::read(path.unwrap().join("file")).unwrap(), b"data");
                });
            }
        });
        assert_eq!(builds.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_failed_build_leaves_nothing_but_the_lock() {
        let cache = tempfile::tempdir().unwrap();
        let result = cached(cache.path(), "guest", |work| {
            fs::write(work.join("half"), "half").unwrap();
            Err(Error::Apt { why: "no network".into() })
        });
        assert!(result.unwrap_err().to_string().contains("--kernel"));
        let left: Vec<_> = fs::read_dir(cache.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["guest.lock"]);
    }
}
