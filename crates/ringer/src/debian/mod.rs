//! `ringer image debian`: makes a disk with a bootable Debian server.
//!
//! The data flow to follow: the host's apt says where its Debian comes from ([`Apt::debian_sources`]); mmdebstrap
//! installs the packages from there into a tree of its own, as an ordinary user where the host lets it (`uidmap`); as
//! its last step it runs our script `customize` inside, which makes a server of the tree, a file system (`mke2fs -d`) of
//! that, on a file that we have laid out, and the parts of GRUB, which [`layout`] puts around it.

mod layout;

use std::fs::{self, File, Permissions};
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use block::{Format, Options};
use indicatif::{ProgressBar, ProgressStyle};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};

use crate::cleanup;
use crate::guest::{self, apt::Apt};
use crate::units::{parse_size, show_size};

const CUSTOMIZE: &str = include_str!("customize");
/// What makes a server of Debian's smallest set of packages: a kernel, systemd, network, what one expects to find, and what
/// a PC's firmware can start.
const PACKAGES: &str = "linux-image-cloud-amd64,systemd-sysv,systemd-resolved,libpam-systemd,dbus,udev,kmod,e2fsprogs,\
                        iproute2,iputils-ping,netbase,ca-certificates,procps,login,less,grub-pc-bin,grub-efi-amd64-bin";
/// The least is what these packages need.
const SIZES: std::ops::RangeInclusive<u64> = 1 << 30..=16 << 40;

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Guest(#[from] guest::Error),
    #[error("{} exists already: remove it, or name another file", path.display())]
    Exists { path: PathBuf },
    #[error("can't write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("can't read {}: {source}", path.display())]
    Key { path: PathBuf, source: io::Error },
    #[error("can't run {program}: {source} (as root: apt-get install mmdebstrap e2fsprogs uidmap)")]
    Program { program: &'static str, source: io::Error },
    #[error(transparent)]
    Image(#[from] block::Error),
    #[error("mmdebstrap failed: {why}")]
    Build { why: String },
    #[error("{} is full: a Debian takes about 2G there until its image is made; TMPDIR names another directory", path.display())]
    Full { path: PathBuf },
}

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The disk to make
    #[arg(value_name = "FILE")]
    pub output: PathBuf,
    /// raw or qcow2
    #[arg(long, short, value_name = "FORMAT", default_value = "qcow2", value_parser = crate::image::format)]
    pub format: Format,
    /// How large the disk is for the guest; the file takes what is used of it
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = size)]
    pub size: u64,
    /// Debian's release by its code name; default: the host's
    #[arg(long, value_name = "NAME", value_parser = suite)]
    pub suite: Option<String>,
    /// More packages: openssh-server,cloud-init
    #[arg(long, value_name = "PACKAGES", value_parser = packages)]
    pub include: Vec<String>,
    #[arg(long, value_name = "NAME", default_value = "debian", value_parser = hostname)]
    pub hostname: String,
    /// Public keys that may log in as root by ssh; takes openssh-server along
    #[arg(long, value_name = "FILE")]
    pub ssh_key: Option<PathBuf>,
}

fn size(text: &str) -> Result<u64, String> {
    let size = parse_size(text)?;
    if SIZES.contains(&size) && size.is_multiple_of(4096) {
        return Ok(size);
    }
    Err(format!("allowed are {} to {}, in steps of 4K", show_size(*SIZES.start()), show_size(*SIZES.end())))
}

/// Whether `text` can be handed to a shell and to apt as a name.
fn is_name(text: &str, more: &[u8]) -> bool {
    let first = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    first && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || more.contains(&byte))
}

fn suite(text: &str) -> Result<String, String> {
    if is_name(text, b"-") { Ok(text.into()) } else { Err("not a release: write a code name like trixie".into()) }
}

fn packages(text: &str) -> Result<String, String> {
    match text.split(',').find(|name| !is_name(name, b"+-.:/=~")) {
        Some(name) => Err(format!("\"{name}\" is not a package")),
        None => Ok(text.into()),
    }
}

fn hostname(text: &str) -> Result<String, String> {
    match is_name(text, b"-.") && text.len() <= 64 {
        true => Ok(text.into()),
        false => Err("not a host name: letters, digits and hyphens, at most 64".into()),
    }
}

/// Makes the disk.
pub fn build(args: &Args) -> Result<(), Error> {
    let output = &args.output;
    if output.exists() {
        return Err(Error::Exists { path: output.clone() });
    }
    let keys = match &args.ssh_key {
        Some(path) => fs::read(path).map_err(|source| Error::Key { path: path.clone(), source })?,
        None => Vec::new(),
    };
    let parent = output.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let at = |source| Error::Write { path: output.clone(), source };
    // The work is done where the root of a user namespace can come in, the result laid beside its final name.
    let work = Directory::new_in(&std::env::temp_dir()).map_err(at)?;
    let result = Directory::new_in(parent).map_err(at)?;
    let steps = Steps::new();
    steps.start("asking apt where Debian comes from");
    let apt = work.path.join("apt");
    fs::create_dir(&apt).map_err(at)?;
    let (suite, sources) = Apt::new(&apt, "amd64", &|_| ())?.debian_sources(args.suite.as_deref())?;
    prepare(&work.path, args.size, &keys).map_err(at)?;
    install(args, &work.path, &suite, &sources, &steps)?;
    lay_out(&work.path, args.size).map_err(at)?;
    steps.start("making the image");
    let image = result.path.join("image");
    let disk = Options { format: Some(Format::Raw), ..Options::new(work.path.join("disk")) };
    // The user knows nothing of the place where it is made.
    block::image::convert(&disk, &image, args.format, &mut |_, _| ()).map_err(|error| match error {
        block::Error::Io { path, source, .. } if path == image => at(source),
        other => other.into(),
    })?;
    File::open(&image).and_then(|file| file.sync_all()).map_err(at)?;
    fs::hard_link(&image, output).map_err(at)
}

/// A directory of a secret name that is removed with all it holds when the work or the process ends.
struct Directory {
    path: PathBuf,
    _removal: cleanup::Guard,
}

impl Directory {
    fn new_in(parent: &Path) -> io::Result<Self> {
        let path = tempfile::Builder::new().prefix(".ringer-").rand_bytes(20).tempdir_in(parent)?.keep();
        let path = path.canonicalize()?;
        let doomed = path.clone();
        Ok(Directory { path, _removal: cleanup::register(move || _ = fs::remove_dir_all(doomed)) })
    }
}

/// Lays out what the script works with. It runs as the root of a user namespace in which our own user does not exist, so
/// others must be able to come in; the directory's name is secret.
fn prepare(directory: &Path, size: u64, keys: &[u8]) -> io::Result<()> {
    let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode));
    let (script, disk) = (directory.join("customize"), directory.join("disk"));
    fs::write(&script, CUSTOMIZE)?;
    fs::write(directory.join("authorized_keys"), keys)?;
    File::create_new(&disk)?.set_len(size)?;
    mode(&script, 0o755)?;
    mode(&directory.join("authorized_keys"), 0o644)?;
    mode(&disk, 0o666)?;
    for part in GRUB_PARTS.map(|name| directory.join(name)) {
        File::create_new(&part)?;
        mode(&part, 0o666)?;
    }
    mode(directory, 0o711)
}

/// The parts of GRUB that the script makes, and what they are called.
const GRUB_PARTS: [&str; 3] = ["grub-boot", "grub-core", "grub-efi"];

/// Puts the partition table and GRUB around the file system.
fn lay_out(directory: &Path, size: u64) -> io::Result<()> {
    let part = |name: &str| fs::read(directory.join(name));
    let [boot, core, efi] = GRUB_PARTS;
    let grub = layout::Grub { boot: part(boot)?, core: part(core)?, efi: part(efi)? };
    layout::write(&File::options().write(true).open(directory.join("disk"))?, size, &grub)
}

fn install(args: &Args, directory: &Path, suite: &str, sources: &[String], steps: &Steps) -> Result<(), Error> {
    let mut include = PACKAGES.to_owned();
    for more in args.include.iter().map(String::as_str).chain(args.ssh_key.as_ref().map(|_| "openssh-server")) {
        include += &format!(",{more}");
    }
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid")
        .map_err(|source| Error::Program { program: "/proc/sys/kernel/random/uuid", source })?;
    let quoted = shell_quote(&directory.to_string_lossy());
    let (start, blocks) = (layout::ROOT_START, layout::root_size(args.size) / 4096);
    let hook = format!("{quoted}/customize {quoted} {} {} {start} {blocks} \"$1\"", args.hostname, uuid.trim());
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--variant=minbase", "--format=null", "--architectures=amd64"])
        .arg(format!("--include={include}"))
        .arg(format!("--customize-hook={hook}"))
        .args([suite, "-"])
        .args(sources)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let program = |source| Error::Program { program: "mmdebstrap", source };
    let mut child = command.spawn().map_err(program)?;
    let pid = Pid::from_child(&child);
    let ending = cleanup::register(move || {
        // It has mounts and a tree of its own to remove.
        _ = kill_process(pid, Signal::TERM);
        _ = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
    });
    let mut complaints = Vec::new();
    for line in child.stderr.take().into_iter().flat_map(|pipe| BufReader::new(pipe).lines()) {
        let Ok(line) = line else { break };
        tracing::debug!("mmdebstrap: {line}");
        match line.strip_prefix("I: ") {
            Some(step) if !step.starts_with("running --") => steps.start(step.trim_end_matches('.')),
            Some(_) => steps.start("making the file system"),
            None => complaints.push(line),
        }
    }
    let status = child.wait();
    ending.cancel();
    if status.map_err(program)?.success() {
        return Ok(());
    }
    if complaints.iter().any(|line| line.ends_with("No space left on device")) {
        return Err(Error::Full { path: std::env::temp_dir() });
    }
    let errors: Vec<_> = complaints.iter().filter(|line| line.starts_with("E: ") || line.contains(": ")).collect();
    let why: Vec<_> = errors.iter().take(4).map(|line| line.trim_start_matches("E: ")).collect();
    Err(Error::Build { why: why.join("; ") })
}

fn shell_quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Shows on stderr what is being done: a spinner on a terminal, a line each elsewhere.
struct Steps {
    bar: ProgressBar,
}

impl Steps {
    fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {wide_msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(std::time::Duration::from_millis(100));
        Steps { bar }
    }

    fn start(&self, what: &str) {
        self.bar.set_message(what.to_owned());
        if self.bar.is_hidden() {
            say!("ringer: {what}");
        }
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

    #[test]
    fn names_that_a_shell_or_apt_would_take_apart_are_refused() {
        assert!(packages("openssh-server,cloud-init,libc6:amd64,vim=2:9").is_ok());
        assert!(hostname("web-1.example").is_ok() && suite("trixie").is_ok());
        for text in ["", "-o", "a;b", "a b", "$(x)", "a,,b", "a\nb"] {
            assert!(packages(text).is_err() && hostname(text).is_err() && suite(text).is_err(), "{text}");
        }
    }

    #[test]
    fn disks_have_sizes_that_hold_a_debian() {
        assert_eq!(size("4G"), Ok(4 << 30));
        assert!(size("512M").is_err_and(|why| why.contains("1G")) && size("99T").is_err());
    }

    #[test]
    fn an_existing_file_is_not_overwritten() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let args = Args {
            output: file.path().into(),
            format: Format::Raw,
            size: 1 << 30,
            suite: None,
            include: Vec::new(),
            hostname: "x".into(),
            ssh_key: None,
        };
        assert!(matches!(build(&args), Err(Error::Exists { .. })));
    }
}
