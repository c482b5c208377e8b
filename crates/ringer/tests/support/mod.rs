//! What the tests of whole machines share: guests that run a script, and processes that can't hang a test.

// Each test program uses its own part of this.
#![allow(dead_code)]

pub mod screen;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant};

use block::{Disk, Options};
use memory::vm_memory::VolatileSlice;
use ringer::guest::{self, Guest, initramfs::Initramfs};

/// What a machine may take, on a busy host, for whatever a test asks of it.
pub const LONG: Duration = Duration::from_secs(180);

/// Machines run one at a time: tests have as many threads as the host has processors, and so has a machine.
pub fn one_machine_at_a_time() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::new(());
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn cache() -> PathBuf {
    guest::cache_directory().expect("HOME is set")
}

/// The default guest, fetched on first use.
pub fn default_guest() -> &'static Guest {
    static GUEST: OnceLock<Guest> = OnceLock::new();
    GUEST.get_or_init(|| Guest::get(&cache()).expect("Debian's kernel and busybox can be fetched"))
}

/// The guest with drivers for the devices of a PC, fetched on first use.
pub fn pc_guest() -> &'static Guest {
    static GUEST: OnceLock<Guest> = OnceLock::new();
    GUEST.get_or_init(|| Guest::pc(&cache()).expect("Debian's kernel and busybox can be fetched"))
}

/// A disk with cloud-init, made once and kept in the cache for as long as it would be made the same way.
pub fn debian_disk() -> &'static Path {
    static DISK: OnceLock<PathBuf> = OnceLock::new();
    DISK.get_or_init(|| {
        let mut recipe = DefaultHasher::new();
        let sources = [
            include_str!("../../src/debian/customize"),
            include_str!("../../src/debian/mod.rs"),
            include_str!("../../src/debian/layout.rs"),
        ];
        sources.hash(&mut recipe);
        let path = cache().join(format!("test-debian-{:016x}.qcow2", recipe.finish()));
        if !path.exists() {
            std::fs::create_dir_all(cache()).unwrap();
            let old = std::fs::read_dir(cache()).unwrap().map(|entry| entry.unwrap().path());
            let is_disk = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("test-debian-");
            old.filter(is_disk).for_each(|path| _ = std::fs::remove_file(path));
            let made = ringer().args(["image", "debian", "--include", "cloud-init"]).arg(&path).output().unwrap();
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        }
        path
    })
}

pub fn ringer() -> Command {
    Command::new(env!("CARGO_BIN_EXE_ringer"))
}

pub const MIB: u64 = 1 << 20;

/// What is on the disk of an image.
pub fn read(path: &Path, offset: u64, length: usize) -> Vec<u8> {
    let mut options = Options::new(path);
    options.read_only = true;
    let mut data = vec![0; length];
    Disk::open(&options).unwrap().read(&[VolatileSlice::from(data.as_mut_slice())], offset).unwrap();
    data
}

/// How a process ended and what it wrote.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// A process that is killed when the test ends before it does.
pub struct Process {
    pub child: Child,
    stdout: mpsc::Receiver<Vec<u8>>,
    stderr: mpsc::Receiver<Vec<u8>>,
    /// All of stdout so far.
    seen: String,
}

impl Process {
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
        let stdout = drain(child.stdout.take().expect("stdout is a pipe"));
        let stderr = drain(child.stderr.take().expect("stderr is a pipe"));
        Process { child, stdout, stderr, seen: String::new() }
    }

    /// Waits until `text` has been written to stdout.
    pub fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + LONG;
        while !self.seen.contains(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.stdout.recv_timeout(left) {
                Ok(data) => self.seen += &String::from_utf8_lossy(&data),
                Err(error) => panic!("no {text:?} ({error}) in:\n{}", self.seen),
            }
        }
    }

    /// The same of text that is drawn on a terminal: the sequences between its pieces do not count.
    pub fn wait_for_drawn(&mut self, text: &str) {
        let deadline = Instant::now() + LONG;
        while !without_sequences(&self.seen).contains(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.stdout.recv_timeout(left) {
                Ok(data) => self.seen += &String::from_utf8_lossy(&data),
                Err(error) => panic!("no {text:?} ({error}) in:\n{}", without_sequences(&self.seen)),
            }
        }
    }

    /// Only what is written from now on counts for [`Process::wait_for`].
    pub fn forget_output(&mut self) {
        self.seen.clear();
    }

    /// Types into stdin, which must be a pipe.
    pub fn type_text(&mut self, text: &str) {
        self.child.stdin.as_mut().expect("stdin is a pipe").write_all(text.as_bytes()).expect("stdin is open");
    }

    pub fn end(mut self) -> Ended {
        let deadline = Instant::now() + LONG;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("the child can be waited for") {
                break status;
            }
            if Instant::now() > deadline {
                _ = self.child.kill();
                panic!("still running after {LONG:?}; stdout:\n{}{}", self.seen, collect(&self.stdout));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let stdout = std::mem::take(&mut self.seen) + &collect(&self.stdout);
        Ended { status, stdout, stderr: collect(&self.stderr) }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// Text without control characters and sequences (ECMA-48, 5.4): ESC [, parameters, and a final byte from @ on.
fn without_sequences(text: &str) -> String {
    let mut parts = text.split("\x1b[");
    let first = parts.next().unwrap_or_default().to_owned();
    let plain = parts
        .fold(first, |plain, part| plain + part.trim_start_matches(|c: char| c < '@').get(1..).unwrap_or_default());
    plain.replace(char::is_control, "")
}

fn drain(mut pipe: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            if sender.send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

fn collect(pipe: &mpsc::Receiver<Vec<u8>>) -> String {
    String::from_utf8_lossy(&pipe.iter().flatten().collect::<Vec<_>>()).into_owned()
}

/// Says a line at the control socket; what it answers.
pub fn tell(socket: &Path, line: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    writeln!(stream, "{line}").unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    answer
}

/// What one command in a guest printed, and its exit status.
#[derive(Debug, PartialEq, Eq)]
pub struct Step {
    pub output: String,
    pub status: i32,
}

/// Commands to be run in the default guest, each by a name.
pub struct Script {
    guest: &'static Guest,
    text: String,
    image: Initramfs,
}

impl Default for Script {
    fn default() -> Self {
        Self::on(default_guest())
    }
}

impl Script {
    pub fn new() -> Self {
        Self::default()
    }

    /// For another guest than the default one.
    pub fn on(guest: &'static Guest) -> Self {
        Script { guest, text: String::new(), image: guest.initramfs().expect("busybox is cached") }
    }

    pub fn step(mut self, name: &str, command: &str) -> Self {
        self.text += &format!("echo @@begin {name}\n({command}\n) </dev/null 2>&1\necho @@end {name} $?\n");
        self
    }

    /// Writes half a MiB of a known program to 2 MiB from the start of each of the `devices`, and reads it again past the
    /// guest's cache. [`assert_written`] looks whether it is in an image.
    pub fn copies_to(self, devices: &str) -> Self {
        let each = format!("for d in {devices}; do dd");
        self.step("write", &format!("{each} if=/bin/busybox of=$d bs=64k count=8 seek=32 conv=fsync || exit 1; done"))
            .step("drop", "echo 3 >/proc/sys/vm/drop_caches")
            .step(
                "same",
                &format!("{each} if=$d bs=64k skip=32 count=8 | cmp -n 524288 - /bin/busybox || exit 1; done"),
            )
    }

    /// Adds a file of the host to the guest's root file system, executable.
    pub fn program(mut self, path: &str, source: &Path) -> Self {
        self.image = self.image.file(path, 0o755, std::fs::read(source).expect("the program can be read"));
        self
    }

    /// Where the guest's kernel is, and its initramfs with this script in it.
    pub fn kernel_and_initrd(self) -> (&'static Path, Vec<u8>) {
        (&self.guest.kernel, self.image.file(guest::RUN_SCRIPT, 0o644, self.text).build())
    }

    /// A machine with this script in its initramfs, to which options may be added. The directory holds the initramfs.
    pub fn command(self, append: &str) -> (Command, tempfile::TempDir) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let initrd = directory.path().join("initrd.cpio");
        let (kernel, image) = self.kernel_and_initrd();
        std::fs::write(&initrd, image).expect("it can be written");
        let mut command = ringer();
        command.arg("run").arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
        command.arg("--append").arg(format!("console=ttyS0 quiet panic=-1 {append}"));
        (command, directory)
    }

    /// Boots, runs all steps, and powers off.
    pub fn run(self, options: &[&str]) -> BTreeMap<String, Step> {
        let (mut command, _directory) = self.command("");
        command.args(options).arg("--no-reboot").stdin(Stdio::null());
        let _turn = one_machine_at_a_time();
        let ended = Process::start(&mut command).end();
        assert!(ended.status.success(), "{ended:?}");
        steps(&ended.stdout)
    }
}

/// [`Script::copies_to`] was successful, and what it wrote is in these images.
pub fn assert_written(steps: &BTreeMap<String, Step>, images: &[&str]) {
    assert_eq!((steps["write"].status, steps["drop"].status, steps["same"].status), (0, 0, 0), "{steps:?}");
    let mut written = images.iter().map(|path| read(Path::new(path), 2 * MIB, MIB as usize / 2));
    let first = written.next().unwrap();
    assert!(first.starts_with(b"\x7fELF") && written.all(|other| other == first), "{images:?}");
}

/// Takes the steps out of a serial log.
pub fn steps(log: &str) -> BTreeMap<String, Step> {
    let log = log.replace('\r', "");
    let mut steps = BTreeMap::new();
    for part in log.split("@@begin ").skip(1) {
        let (name, rest) = part.split_once('\n').unwrap_or((part, ""));
        let Some((output, end)) = rest.split_once(&format!("@@end {name} ")) else {
            panic!("step {name} did not end:\n{log}");
        };
        let status = end.lines().next().and_then(|text| text.trim().parse().ok()).expect("an exit status");
        steps.insert(name.to_owned(), Step { output: output.to_owned(), status });
    }
    assert!(!steps.is_empty(), "no step ran:\n{log}");
    steps
}
