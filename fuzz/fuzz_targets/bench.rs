//! Every device on a bus of its own, to be driven by a driver of ill will.
#![allow(dead_code, reason = "each target takes one device")]

#[path = "../../crates/virtio/tests/support/mod.rs"]
mod support;

use std::cell::OnceCell;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use block::{Disk, Options};
use net::{Backend, UserConfig, UserNet};
use rustix::process::{Resource, Rlimit, setrlimit};
use virtio::VirtioDevice;
use virtio::balloon::Balloon;
use virtio::block::Block;
use virtio::console::Console;
use virtio::entropy::Entropy;
use virtio::fs::FileSystem;
use virtio::net::Net;
use virtio::vsock::Vsock;

/// A device and what surrounds it.
pub struct Target {
    bench: support::Bench,
    queues: u16,
    /// What the host's side does now and then.
    host: Box<dyn Fn()>,
}

impl Target {
    fn new(device: Arc<dyn VirtioDevice>, queues: u16) -> Self {
        Self::with_host(device, queues, || ())
    }

    fn with_host(device: Arc<dyn VirtioDevice>, queues: u16, host: impl Fn() + 'static) -> Self {
        Target { bench: support::Bench::new(device), queues, host: Box::new(host) }
    }
}

thread_local! {
    static TARGET: OnceCell<Target> = const { OnceCell::new() };
}

/// Gives the process's one device the fuzzer's bytes: by the first of them as messages or as rings.
pub fn queues(make: fn() -> Target, data: &[u8]) {
    TARGET.with(|target| {
        let target = target.get_or_init(make);
        match data.split_first() {
            Some((kind, data)) if kind & 1 == 0 => {
                support::hostile::messages(&target.bench, target.queues, data, &target.host);
            }
            Some((kind, data)) => {
                (target.host)();
                let features = if kind & 2 == 0 { u64::MAX } else { !support::EVENT_IDX };
                support::hostile::queues(&target.bench, features, target.queues, data);
            }
            None => {}
        }
    });
}

/// The same as accesses to configuration space and registers.
pub fn registers(make: fn() -> Target, data: &[u8]) {
    TARGET.with(|target| support::hostile::registers(&target.get_or_init(make).bench, data));
}

/// A directory that the process leaves behind, empty or not: libFuzzer ends it without unwinding.
fn directory() -> PathBuf {
    tempfile::tempdir().expect("a temporary directory").keep()
}

pub fn block() -> Target {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.as_file().set_len(1 << 20).expect("a file of 1 MiB");
    let disk = Disk::open(&Options::new(file.path())).expect("a disk");
    Target::new(Arc::new(Block::new(disk, "fuzz", 2)), 2)
}

/// Two pairs of queues. Nothing leads out of the networks behind them.
pub fn network() -> Target {
    const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    let backend = || {
        let mut config = UserConfig::new(MAC);
        config.restrict = true;
        Box::new(UserNet::new(config).expect("sockets can be watched")) as Box<dyn Backend>
    };
    Target::new(Arc::new(Net::new(MAC, Some(1500), vec![backend(), backend()])), 5)
}

/// Somebody types all the time; so that nobody has to wait for the guest, only while it reads.
pub fn console() -> Target {
    struct Echo(Arc<AtomicBool>);

    impl Write for Echo {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.store(true, std::sync::atomic::Ordering::Relaxed);
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    let written = Arc::new(AtomicBool::new(false));
    let console = Arc::new(Console::new(Box::new(Echo(written.clone()))).expect("a console"));
    Target::with_host(console.clone(), 2, move || {
        console.resize(80, 25);
        if written.swap(false, std::sync::atomic::Ordering::Relaxed) {
            console.input(b"typed");
        }
    })
}

pub fn entropy() -> Target {
    Target::new(Arc::new(Entropy::new()), 1)
}

pub fn balloon() -> Target {
    let balloon = Arc::new(Balloon::new());
    Target::with_host(balloon.clone(), 3, move || balloon.set_target(1 << 20))
}

/// The host accepts what the guest connects to port 52, says something, and connects itself.
pub fn sockets() -> Target {
    let path = directory().join("v");
    let vsock = Arc::new(Vsock::new(&path, 3).expect("a socket"));
    let listener = UnixListener::bind(path.with_file_name("v_52")).expect("a socket");
    listener.set_nonblocking(true).expect("a socket");
    let streams: Mutex<Vec<UnixStream>> = Mutex::default();
    Target::with_host(vsock, 3, move || {
        let mut streams = streams.lock().unwrap_or_else(PoisonError::into_inner);
        let call = UnixStream::connect(&path).ok().inspect(|mut call| _ = call.write_all(b"CONNECT 1024\n"));
        let accepted = listener.accept().ok().map(|(stream, _)| stream);
        for mut stream in call.into_iter().chain(accepted) {
            let _ = stream.set_nonblocking(true);
            let _ = stream.write_all(b"from the host");
            streams.push(stream);
        }
        let _ = streams.last_mut().map(|stream| stream.read(&mut [0; 4096]));
        let many = streams.len().saturating_sub(8);
        streams.drain(..many);
    })
}

pub fn share() -> Target {
    // Files can't become large, whatever is asked for: it is an error then, and not a signal.
    let limit = Some(16 << 20);
    setrlimit(Resource::Fsize, Rlimit { current: limit, maximum: limit }).expect("a limit");
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default()).expect("a handler");
    // In memory if possible: the driver may ask to sync all of the file system as often as it likes.
    let memory = tempfile::tempdir_in("/dev/shm");
    let directory = memory.or_else(|_| tempfile::tempdir()).expect("a temporary directory").keep();
    std::fs::write(directory.join("file"), "text").expect("a file");
    std::fs::create_dir(directory.join("directory")).expect("a directory");
    std::os::unix::fs::symlink("/", directory.join("link")).expect("a link");
    Target::new(Arc::new(FileSystem::new(&directory, "share", false).expect("a share")), 2)
}
