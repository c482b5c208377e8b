//! What a driver may expect of the network card, and what it can't do to it. The card is attached to the test itself:
//! no frame leaves it.

mod support;

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use net::{Backend, GSO_TCP4, HEADER_LENGTH, Header, NEEDS_CHECKSUM, Offloads, Sink};
use support::*;
use virtio::net::Net;

const MERGEABLE: u64 = 1 << 15;
const CTRL_QUEUE: u64 = 1 << 17;
const GUEST_OFFLOADS: u64 = 1 << 1 | 1 << 7 | 1 << 8;
const MULTI_QUEUE: u64 = 1 << 22;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

const RECEIVE: u64 = 0x1000;
const TRANSMIT: u64 = 0x2000;
const CONTROL: u64 = 0x3000;
const BUFFERS: u64 = 0x1_0000;
const FRAME: u64 = 0x8_0000;

/// What a back-end has been told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Told {
    offloads: Offloads,
    enabled: Option<bool>,
    resets: u32,
}

/// Passes frames on to the test, header first.
struct Wire {
    socket: UnixDatagram,
    told: Arc<Mutex<Told>>,
    held: Option<Vec<u8>>,
}

impl Backend for Wire {
    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tso4: true, tso6: true }
    }

    fn set_guest_offloads(&mut self, offloads: Offloads) {
        self.told.lock().unwrap().offloads = offloads;
    }

    fn set_enabled(&mut self, enabled: bool) {
        self.told.lock().unwrap().enabled = Some(enabled);
    }

    fn send(&mut self, header: &Header, frame: &[u8]) {
        let _ = self.socket.send(&[&header.to_bytes(), frame].concat());
    }

    fn receive(&mut self, sink: &mut dyn Sink) {
        loop {
            let mut buffer = vec![0; 70_000];
            let frame = self.held.take().or_else(|| {
                let length = self.socket.recv(&mut buffer).ok()?;
                buffer.truncate(length);
                Some(buffer)
            });
            let Some(frame) = frame else { return };
            let (header, rest) = frame.split_first_chunk::<HEADER_LENGTH>().unwrap();
            let (first, second) = rest.split_at(rest.len() / 3);
            if !sink.deliver(&Header::from_bytes(header), &[first, second]) {
                self.held = Some(frame);
                return;
            }
        }
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn reset(&mut self) {
        self.held = None;
        self.told.lock().unwrap().resets += 1;
    }
}

struct Card {
    bench: Bench,
    far_end: UnixDatagram,
    told: Vec<Arc<Mutex<Told>>>,
}

fn card(pairs: usize) -> Card {
    let mut far_ends = Vec::new();
    let mut told = Vec::new();
    let mut backends: Vec<Box<dyn Backend>> = Vec::new();
    for _ in 0..pairs {
        let (socket, far_end) = UnixDatagram::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        far_end.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        far_ends.push(far_end);
        told.push(Arc::<Mutex<Told>>::default());
        backends.push(Box::new(Wire { socket, told: told.last().unwrap().clone(), held: None }));
    }
    Card { bench: Bench::new(Arc::new(Net::new(MAC, Some(1500), backends))), far_end: far_ends.remove(0), told }
}

struct Rings {
    receive: Ring,
    transmit: Ring,
    control: Ring,
}

impl Card {
    fn start(&self, features: u64) -> Rings {
        assert!(self.bench.negotiate(features | VERSION_1));
        let control = if features & MULTI_QUEUE != 0 { 2 * self.told.len() as u16 } else { 2 };
        let rings = Rings {
            receive: self.bench.enable_queue(0, 16, RECEIVE, 1),
            transmit: self.bench.enable_queue(1, 16, TRANSMIT, 2),
            control: self.bench.enable_queue(control, 16, CONTROL, 3),
        };
        self.bench.set_status(15);
        rings
    }

    fn give(&self, header: Header, data: &[u8]) {
        self.far_end.send(&[&header.to_bytes(), data].concat()).unwrap();
    }

    fn command(&self, rings: &mut Rings, command: &[u8]) -> u8 {
        self.bench.store(FRAME, command);
        self.bench.store(FRAME + 0x1000, &[0xaa]);
        let parts = [(FRAME, command.len() as u32, false), (FRAME + 0x1000, 1, true)];
        assert_eq!(self.bench.request(&mut rings.control, &parts), Some(1));
        self.bench.load(FRAME + 0x1000, 1)[0]
    }

    fn eventually(&self, holds: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !holds() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn the_card_says_what_it_is() {
    let one = card(1);
    assert_eq!(one.bench.read::<6>(DEVICE), MAC);
    assert_eq!(
        (one.bench.read16(DEVICE + 6), one.bench.read16(DEVICE + 8), one.bench.read16(DEVICE + 10)),
        (1, 1, 1500)
    );
    assert_eq!(one.bench.offered() & MULTI_QUEUE, 0);
    let two = card(2);
    assert_eq!((two.bench.read16(DEVICE + 8), two.bench.offered() & MULTI_QUEUE), (2, MULTI_QUEUE));
}

#[test]
fn frames_of_the_guest_leave_with_their_header() {
    let card = card(1);
    let mut rings = card.start(0);
    let header = Header {
        flags: NEEDS_CHECKSUM,
        gso_type: GSO_TCP4,
        gso_size: 1460,
        header_length: 54,
        checksum_start: 34,
        checksum_offset: 16,
        buffers: 0,
    };
    let data: Vec<u8> = (0..60_000u32).map(|i| i as u8).collect();
    card.bench.store(FRAME, &[&header.to_bytes(), &data[..]].concat());
    let parts = [(FRAME, 20, false), (FRAME + 20, 30_000, false), (FRAME + 30_020, 29_992, false)];
    assert_eq!(card.bench.request(&mut rings.transmit, &parts), Some(0));
    let mut buffer = vec![0; 70_000];
    let length = card.far_end.recv(&mut buffer).unwrap();
    assert!(buffer[..length] == [&header.to_bytes(), &data[..]].concat());
}

#[test]
fn received_frames_extend_over_the_buffers_they_need() {
    let card = card(1);
    let mut rings = card.start(MERGEABLE);
    for n in 0..8 {
        rings
            .receive
            .add(&card.bench, &[(BUFFERS + 0x1000 * n, 0x300, true), (BUFFERS + 0x1000 * n + 0x300, 0x300, true)]);
    }
    card.bench.kick(&rings.receive);
    let data: Vec<u8> = (0..4000u32).map(|i| (i * 7) as u8).collect();
    card.give(Header { flags: NEEDS_CHECKSUM, ..Header::default() }, &data);
    card.give(Header::default(), &data[..60]);
    let mut frame = Vec::new();
    for (n, expected) in [(0, 0x600), (1, 0x600), (2, 4012 - 0xc00)] {
        assert_eq!(rings.receive.wait(&card.bench), Some((2 * n, expected)));
        frame.extend(card.bench.load(BUFFERS + 0x1000 * u64::from(n), expected as usize));
    }
    let header = Header { flags: NEEDS_CHECKSUM, buffers: 3, ..Header::default() };
    assert_eq!(frame, [&header.to_bytes(), &data[..]].concat());
    assert_eq!(rings.receive.wait(&card.bench), Some((6, 72)));
}

#[test]
fn frames_wait_for_buffers_and_none_is_lost() {
    let card = card(1);
    let mut rings = card.start(MERGEABLE);
    for n in 0..5u8 {
        card.give(Header::default(), &[n; 2000]);
    }
    // One buffer too few for the first.
    rings.receive.add(&card.bench, &[(BUFFERS, 1500, true)]);
    card.bench.kick(&rings.receive);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(card.bench.load16(rings.receive.used() + 2), 0);
    for n in 0..5 {
        rings.receive.add(&card.bench, &[(BUFFERS + 0x1000 * (2 * n + 1), 1500, true)]);
        card.bench.kick(&rings.receive);
        for length in [1500, 512] {
            assert_eq!(rings.receive.wait(&card.bench).unwrap().1, length);
        }
        rings.receive.add(&card.bench, &[(BUFFERS + 0x1000 * (2 * n + 2), 1500, true)]);
        card.bench.kick(&rings.receive);
    }
}

#[test]
fn without_mergeable_buffers_a_frame_is_in_one() {
    let card = card(1);
    let mut rings = card.start(0);
    rings.receive.add(&card.bench, &[(BUFFERS, 12, true), (BUFFERS + 12, 1514, true)]);
    rings.receive.add(&card.bench, &[(BUFFERS + 0x1000, 100, true)]);
    card.bench.kick(&rings.receive);
    card.give(Header::default(), &[5; 1000]);
    // This one is too long for what the driver has given, and cut.
    card.give(Header::default(), &[6; 1000]);
    assert_eq!(rings.receive.wait(&card.bench), Some((0, 1012)));
    assert_eq!(rings.receive.wait(&card.bench), Some((2, 100)));
    assert_eq!(card.bench.load(BUFFERS + 10, 3), [1, 0, 5][..].to_vec());
}

#[test]
fn the_control_queue_changes_what_can_be_changed() {
    let card = card(2);
    let mut rings = card.start(CTRL_QUEUE | MULTI_QUEUE | GUEST_OFFLOADS | 1 << 2);
    let told = |pair: usize| *card.told[pair].lock().unwrap();
    let all = Offloads { checksum: true, tso4: true, tso6: true };
    card.eventually(|| told(0).offloads == all && told(0).enabled == Some(true));
    assert_eq!(card.command(&mut rings, &[&[1, 1], &[2, 9, 9, 9, 9, 9][..]].concat()), 0);
    assert_eq!(card.bench.read::<6>(DEVICE), [2, 9, 9, 9, 9, 9]);
    assert_eq!(card.command(&mut rings, &[&[5, 0], &(1u64 << 1).to_le_bytes()[..]].concat()), 0);
    card.eventually(|| told(0).offloads == Offloads { checksum: true, tso4: false, tso6: false });
    for right in [&[0, 0, 1][..], &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[4, 0, 2, 0]] {
        assert_eq!(card.command(&mut rings, right), 0, "{right:?}");
    }
    let unknown = 1u64 << 40;
    let unknown_offload = [&[5, 0], &unknown.to_le_bytes()[..]].concat();
    for wrong in [&[4][..], &[4, 0, 0, 0], &[4, 0, 3, 0], &[4, 0, 1], &[1, 1, 2], &[9, 9], &unknown_offload] {
        assert_eq!(card.command(&mut rings, wrong), 1, "{wrong:?}");
    }
}

#[test]
fn a_reset_reaches_the_back_end() {
    let card = card(1);
    card.start(0);
    let before = card.told[0].lock().unwrap().resets;
    card.bench.set_status(0);
    assert_eq!(card.told[0].lock().unwrap().resets, before + 1);
}

#[test]
fn a_buffer_that_can_not_be_written_ends_the_device() {
    let card = card(1);
    let mut rings = card.start(MERGEABLE);
    rings.receive.add(&card.bench, &[(BUFFERS, 2000, false)]);
    card.bench.kick(&rings.receive);
    card.give(Header::default(), &[1; 100]);
    assert_eq!(rings.receive.wait(&card.bench), None);
}

#[test]
fn hostile_queues_do_no_harm() {
    let card = card(2);
    let mut random = Random(0x7265_6365_6976_6564);
    for _ in 0..1500 {
        let data = random.bytes(1024);
        let length = 1 + (random.next() % 3000) as usize;
        let frame = random.bytes(length);
        card.far_end.set_nonblocking(true).unwrap();
        let mut sink = [0; 70_000];
        while card.far_end.recv(&mut sink).is_ok() {}
        for _ in 0..3 {
            let _ = card.far_end.send(&[&[0; HEADER_LENGTH], &frame[..]].concat());
        }
        support::hostile::queues(&card.bench, random.next(), 5, &data);
    }
}
