//! The machine in which the nested ones run: QEMU's TCG with AMD-V, on it Debian's kernel with KVM.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use ringer::guest::{self, Guest, initramfs::Initramfs};

use crate::Error;
use crate::build;

/// RAM of the host machine, in MiB: its files are in there too.
const MEMORY: u32 = 3072;

/// More than anything that a script does may take without a line of output.
const SILENCE: Duration = Duration::from_secs(240);

/// A host machine under construction.
pub struct Host {
    guest: Guest,
    image: Initramfs,
    directory: tempfile::TempDir,
    /// Programs of this machine whose libraries go along.
    programs: Vec<PathBuf>,
}

impl Host {
    pub fn new() -> Result<Self, Error> {
        let guest = Guest::kvm_host(&guest::cache_directory()?)?;
        let directory = tempfile::tempdir().map_err(Error::io("can't make a temporary directory"))?;
        Ok(Host { image: guest.initramfs()?, guest, directory, programs: Vec::new() })
    }

    pub fn file(&mut self, path: &str, data: impl Into<Vec<u8>>) {
        self.image = std::mem::take(&mut self.image).file(path, 0o755, data);
    }

    /// A file of this machine at its own path, or at another.
    pub fn copy(&mut self, from: &Path, to: &str) -> Result<(), Error> {
        let data = fs::read(from).map_err(Error::io(format!("can't read {}", from.display())))?;
        self.file(to, data);
        Ok(())
    }

    /// A program of this machine, without debug information, with its libraries.
    pub fn program(&mut self, from: &Path, to: &str) -> Result<(), Error> {
        let data = build::stripped(from, self.directory.path())?;
        self.file(to, data);
        self.programs.push(from.into());
        Ok(())
    }

    /// The machine with all that it needs, which runs `script` when it starts.
    pub fn ready(mut self, script: &str) -> Result<Machine, Error> {
        for library in build::libraries(self.programs.iter().map(PathBuf::as_path))? {
            let path = library.to_string_lossy().into_owned();
            self.copy(&library, &path)?;
        }
        let image = std::mem::take(&mut self.image).file(guest::RUN_SCRIPT, 0o644, script).build();
        let initrd = self.directory.path().join("initrd.cpio");
        fs::write(&initrd, image).map_err(Error::io(format!("can't write {}", initrd.display())))?;
        Ok(Machine { kernel: self.guest.kernel.clone(), initrd, _directory: self.directory })
    }
}

/// A host machine that is complete. It can be started again.
pub struct Machine {
    kernel: PathBuf,
    initrd: PathBuf,
    /// Where the initrd is.
    _directory: tempfile::TempDir,
}

impl Machine {
    /// Boots, and shows each line of its output to `line` until it powers off, resets, or is stopped.
    pub fn run(&self, deadline: Instant, mut line: impl FnMut(&str)) -> Result<Ended, Error> {
        // The counters of TCG's processors are one, but Linux does not believe that of AMD's; and KVM keeps the counters of
        // its guests only roughly where it takes the host's for unreliable.
        let mut qemu = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"])
            .args(["-accel", "tcg,thread=multi", "-cpu", "max,+svm", "-smp", "2", "-m", &MEMORY.to_string()])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initrd)
            .args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(Error::io("can't start qemu-system-x86_64 (Debian: qemu-system-x86)"))?;
        let output = qemu.stdout.take().ok_or_else(|| Error::Failed("QEMU has no output".into()))?;
        let (sender, lines) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            let mut output = BufReader::new(output);
            let mut bytes = Vec::new();
            while let Ok(1..) = output.read_until(b'\n', &mut bytes) {
                let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
                bytes.clear();
                if sender.send(text).is_err() {
                    return;
                }
            }
        });
        let ended = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match lines.recv_timeout(left.min(SILENCE)) {
                Ok(text) => line(&text),
                Err(RecvTimeoutError::Disconnected) => break Ended::Off,
                Err(RecvTimeoutError::Timeout) if left > SILENCE => break Ended::Silent,
                Err(RecvTimeoutError::Timeout) => break Ended::Late,
            }
        };
        if ended != Ended::Off {
            // Whether it can be killed or not, it is waited for.
            _ = qemu.kill();
        }
        let status = qemu.wait().map_err(Error::io("can't wait for QEMU"))?;
        drop(lines);
        _ = reader.join();
        match ended {
            Ended::Off if !status.success() => Err(Error::Failed(format!("QEMU: {status} (10.0 is known to work)"))),
            ended => Ok(ended),
        }
    }
}

/// How a run of the machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It powered off or reset, as a kernel that panics does, too.
    Off,
    /// It fell silent for [`SILENCE`].
    Silent,
    /// The deadline came first.
    Late,
}
