//! Entropy, balloon, console, sockets and shared directories: what a driver may expect of them, and what it can't do to them.

mod support;

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use support::*;
use virtio::VirtioDevice;
use virtio::balloon::Balloon;
use virtio::console::Console;
use virtio::entropy::Entropy;
use virtio::fs::FileSystem;
use virtio::vsock::Vsock;

const BUFFERS: u64 = 0x2_0000;

/// A driver's way to DRIVER_OK with several queues.
fn start(bench: &Bench, queues: u16) -> Vec<Ring> {
    let features = bench.offered();
    assert!(bench.negotiate(features));
    bench.enable_msix(1 + u32::from(queues));
    let ring = |index: u16| bench.enable_queue(index, 16, 0x1000 * (u64::from(index) + 1), 1 + index);
    let rings = (0..queues).map(ring).collect();
    bench.set_status(15);
    rings
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_micros(50));
    }
}

#[test]
fn entropy_fills_buffers_and_no_more() {
    let bench = Bench::new(Arc::new(Entropy::new()));
    let rings = &mut start(&bench, 1);
    let used = bench.request(&mut rings[0], &[(BUFFERS, 40, true), (BUFFERS + 0x100, 24, true)]);
    assert_eq!(used, Some(64));
    for (address, length, filled) in [(BUFFERS, 40, true), (BUFFERS + 0x100, 24, true), (BUFFERS + 40, 200, false)] {
        let zeros = bench.load(address, length).iter().filter(|byte| **byte == 0).count();
        assert!(if filled { zeros < length / 2 } else { zeros >= 190 }, "{address:#x}");
    }
    assert_eq!(bench.request(&mut rings[0], &[(BUFFERS, 16, false)]), Some(0));
    assert_eq!(bench.request(&mut rings[0], &[(BUFFERS, 1 << 20, true)]), Some(4096));
}

#[test]
fn pages_in_the_balloon_and_reported_ones_become_empty() {
    let balloon = Arc::new(Balloon::new());
    let bench = Bench::new(balloon.clone());
    let rings = &mut start(&bench, 3);
    let pages = [0x100_u64, 0x101, 0x105, 0x200, 0x201, 0x300];
    for page in pages {
        bench.store(page << 12, &[1; 4096]);
    }
    // Pages that are no RAM are nobody's.
    let numbers = [0x100_u32, 0x101, 0x105, 0xffff_ffff, 0x3ff + 1].map(u32::to_le_bytes).concat();
    bench.store(BUFFERS, &numbers);
    assert_eq!(bench.request(&mut rings[0], &[(BUFFERS, numbers.len() as u32, false)]), Some(0));
    assert_eq!(bench.request(&mut rings[2], &[(0x200 << 12, 0x2000, true)]), Some(0));
    let empty = |page: u64| bench.load(page << 12, 4096).iter().all(|byte| *byte == 0);
    assert_eq!(pages.map(empty), [true, true, true, true, true, false]);
    assert_eq!(bench.request(&mut rings[1], &[(BUFFERS, 4, false)]), Some(0));
    bench.interrupts.take();
    balloon.set_target(8 << 12);
    assert_eq!(bench.read32(DEVICE), 8);
    bench.write32(DEVICE + 4, 3);
    assert_eq!(balloon.actual(), 3 << 12);
}

/// A sink that can be looked into.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_console_passes_bytes_both_ways_in_order() {
    let log = Log::default();
    let console = Arc::new(Console::new(Box::new(log.clone())).unwrap());
    let bench = Bench::new(console.clone());
    // Before there is a driver.
    console.input(b"early ");
    let mut rings = start(&bench, 2);
    let (mut transmit, mut receive) = (rings.remove(1), rings.remove(0));
    let text: Vec<u8> = (0..50_000u32).map(|n| b'a' + (n % 26) as u8).collect();
    bench.store(0x10_0000, &text);
    assert_eq!(
        bench.request(&mut transmit, &[(0x10_0000, 20_000, false), (0x10_0000 + 20_000, 30_000, false)]),
        Some(0)
    );
    until("the sink has all", || *log.0.lock().unwrap() == text);
    assert_eq!(bench.request(&mut receive, &[(BUFFERS, 3, true)]), Some(3));
    assert_eq!(bench.request(&mut receive, &[(BUFFERS + 3, 100, true)]), Some(3));
    receive.add(&bench, &[(BUFFERS + 6, 100, true)]);
    bench.kick(&receive);
    console.input(b"late");
    assert_eq!(receive.wait(&bench).unwrap().1, 4);
    assert_eq!(bench.load(BUFFERS, 10), b"early late");
    console.resize(132, 43);
    assert_eq!((bench.read16(DEVICE), bench.read16(DEVICE + 2)), (132, 43));
}

/// A FUSE request: its header and body.
fn fuse(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut request = (40 + body.len() as u32).to_le_bytes().to_vec();
    request.extend(opcode.to_le_bytes());
    request.extend(7u64.to_le_bytes());
    request.extend(node.to_le_bytes());
    request.extend([0; 16]);
    request.extend(body);
    request
}

#[test]
fn a_shared_file_is_read_and_written_by_the_driver() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("file"), "hello from the host").unwrap();
    let bench = Bench::new(Arc::new(FileSystem::new(directory.path(), "tag", false).unwrap()));
    assert_eq!(bench.read::<4>(DEVICE), *b"tag\0");
    assert_eq!(bench.read32(DEVICE + 36), 1);
    let rings = &mut start(&bench, 2);
    let mut ask = |request: Vec<u8>, room: u32| {
        bench.store(BUFFERS, &request);
        let buffers = [(BUFFERS, request.len() as u32, false), (0x4_0000, 16, true), (0x5_0000, room, true)];
        let used = bench.request(&mut rings[1], &buffers).unwrap();
        let header = bench.load(0x4_0000, 16);
        assert_eq!((header[0..4].to_vec(), header[8]), (used.to_le_bytes().to_vec(), 7));
        let error = i32::from_le_bytes(header[4..8].try_into().unwrap());
        (error, bench.load(0x5_0000, used as usize - 16))
    };
    let (error, found) = ask(fuse(1, 1, b"file\0"), 200);
    assert_eq!(error, 0);
    let node = u64::from_le_bytes(found[..8].try_into().unwrap());
    let (_, opened) = ask(fuse(14, node, &[2, 0, 0, 0, 0, 0, 0, 0]), 16);
    let transfer = |offset: u64, length: u32| {
        [&opened[..8], &offset.to_le_bytes()[..], &length.to_le_bytes()[..], &[0; 20][..]].concat()
    };
    assert_eq!(ask(fuse(15, node, &transfer(6, 100)), 100), (0, b"from the host".to_vec()));
    assert_eq!(ask(fuse(15, node, &transfer(6, 100)), 4), (0, b"from".to_vec()));
    assert_eq!(ask(fuse(15, node, &transfer(u64::MAX, 100)), 100).0, -22);
    let (error, written) = ask(fuse(16, node, &[&transfer(6, 9)[..], b"the guest"].concat()), 8);
    assert_eq!((error, &written[..4]), (0, &[9, 0, 0, 0][..]));
    assert_eq!(std::fs::read(directory.path().join("file")).unwrap(), b"hello the guesthost");
    // No room for the answer, an unknown request, and what is no request.
    assert_eq!(ask(fuse(1, 1, b"file\0"), 20).0, -75);
    assert_eq!(ask(fuse(999, 1, b""), 20).0, -38);
    bench.store(BUFFERS, &[0; 39]);
    assert_eq!(bench.request(&mut rings[1], &[(BUFFERS, 39, false), (0x4_0000, 16, true)]), None);
}

#[test]
fn a_socket_of_the_guest_reaches_the_host_by_rings() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v");
    let listener = UnixListener::bind(directory.path().join("v_80")).unwrap();
    let bench = Bench::new(Arc::new(Vsock::new(&path, 9).unwrap()));
    assert_eq!(bench.read32(DEVICE), 9);
    let mut rings = start(&bench, 3);
    let (mut transmit, mut receive) = (rings.remove(1), rings.remove(0));
    for n in 0..8 {
        receive.add(&bench, &[(0x4_0000 + 0x1000 * n, 0x1000, true)]);
    }
    bench.kick(&receive);
    let packet = |operation: u16, data: &[u8]| {
        let mut bytes = [9u64.to_le_bytes(), 2u64.to_le_bytes()].concat();
        bytes.extend([5000u32, 80, data.len() as u32].map(u32::to_le_bytes).concat());
        bytes.extend([1, operation].map(u16::to_le_bytes).concat());
        bytes.extend([0, 1 << 16, 0u32].map(u32::to_le_bytes).concat());
        bytes.extend(data);
        bytes
    };
    let mut send = |bytes: Vec<u8>| {
        bench.store(BUFFERS, &bytes);
        assert_eq!(bench.request(&mut transmit, &[(BUFFERS, bytes.len() as u32, false)]), Some(0));
    };
    send(packet(1, b""));
    assert_eq!(receive.wait(&bench), Some((0, 44)));
    assert_eq!(bench.load(0x4_0000 + 30, 2), [2, 0]);
    let mut host: UnixStream = listener.accept().unwrap().0;
    send(packet(5, b"request"));
    let mut data = [0; 7];
    host.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"request");
    host.write_all(b"an answer").unwrap();
    assert_eq!(receive.wait(&bench), Some((1, 44 + 9)));
    assert_eq!(bench.load(0x4_1000 + 44, 9), b"an answer");
    // The machine starts over: the host hears of it.
    bench.set_status(0);
    assert_eq!(host.read(&mut data).unwrap(), 0);
}

#[test]
fn hostile_queues_do_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let shared = directory.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    let devices: [(Arc<dyn VirtioDevice>, u16); 5] = [
        (Arc::new(Entropy::new()), 1),
        (Arc::new(Balloon::new()), 3),
        (Arc::new(Console::new(Box::new(io::sink())).unwrap()), 2),
        (Arc::new(Vsock::new(&directory.path().join("v"), 3).unwrap()), 3),
        (Arc::new(FileSystem::new(&shared, "share", false).unwrap()), 2),
    ];
    for (device, queues) in devices {
        let bench = Bench::new(device);
        let mut random = Random(0xfeed);
        for round in 0..60 {
            let data = random.bytes(1 + (round * 37) % 1500);
            support::hostile::queues(&bench, random.next(), queues, &data);
            support::hostile::registers(&bench, &random.bytes(300));
        }
        start(&bench, queues);
        assert_eq!(bench.status(), 15);
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}
