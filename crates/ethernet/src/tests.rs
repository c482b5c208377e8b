use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use chipset::pci::PciFunction;
use chipset::testing::{Board, wait_for};
use engine::Bus;
use net::{Backend, Header, Offloads, Sink};
use wake::Event;

use crate::registers::*;
use crate::{Model, NetworkCard};

const BASE: u64 = 0xc000_0000;
const TABLE: u64 = 0xc010_0000;
const TX: u64 = 0x1_0000;
const RX: u64 = 0x2_0000;
const BUFFERS: u64 = 0x10_0000;
const SLOT: u8 = 3;
const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// The other end of the wire.
struct Wire {
    sent: Mutex<Vec<(Header, Vec<u8>)>>,
    waiting: Mutex<Vec<Vec<u8>>>,
    event: Event,
}

struct End(Arc<Wire>);

impl Backend for End {
    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tso4: true, tso6: true }
    }
    fn set_guest_offloads(&mut self, offloads: Offloads) {
        assert_eq!(offloads, Offloads::default());
    }
    fn set_enabled(&mut self, _: bool) {}
    fn send(&mut self, header: &Header, frame: &[u8]) {
        self.0.sent.lock().unwrap().push((*header, frame.to_vec()));
    }
    fn receive(&mut self, sink: &mut dyn Sink) {
        self.0.event.clear();
        let mut waiting = self.0.waiting.lock().unwrap();
        while let Some(frame) = waiting.first() {
            if !sink.deliver(&Header::default(), &[frame]) {
                self.0.event.set();
                return;
            }
            waiting.remove(0);
        }
    }
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
    fn deadline(&self) -> Option<Instant> {
        None
    }
    fn reset(&mut self) {}
}

struct Bench {
    board: Board,
    wire: Arc<Wire>,
    card: Arc<NetworkCard>,
}

impl Bench {
    fn new(model: Model) -> Self {
        let board = Board::default();
        let wire = Arc::new(Wire { sent: Mutex::default(), waiting: Mutex::default(), event: Event::new().unwrap() });
        let line = board.chipset.connect_pci(SLOT, 0);
        let end = Box::new(End(wire.clone()));
        let (ram, recorder) = (board.ram.view(), board.recorder.clone());
        let card = NetworkCard::new(model, MAC, &[], end, ram, recorder, line).unwrap();
        board.chipset.insert_pci(SLOT, 0, card.clone()).unwrap();
        let bench = Bench { board, wire, card };
        bench.config(0x10, BASE as u32);
        bench.config(0x1c, TABLE as u32);
        bench.config(0x04, 6);
        bench
    }

    fn config(&self, register: u32, value: u32) {
        self.board.chipset.pio_write(0xcf8, &(0x8000_0000 | u32::from(SLOT) << 11 | register).to_le_bytes());
        self.board.chipset.pio_write(0xcfc, &value.to_le_bytes());
    }

    fn set(&self, offset: u64, value: u32) {
        self.board.chipset.mmio_write(BASE + offset, &value.to_le_bytes());
    }

    fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.board.chipset.mmio_read(BASE + offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, address: u64, data: &[u8]) {
        self.board.write(address, data);
    }

    fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        self.board.read(address, N).try_into().unwrap()
    }

    /// Rings of 16 descriptors, all interrupts wanted, both directions on.
    fn start(&self) {
        for (ring, base) in [(TX_RINGS[0], TX), (RX_RING, RX)] {
            self.set(ring, base as u32);
            self.set(ring + RING_LENGTH, 256);
        }
        for index in 0..16 {
            self.write(RX + 16 * index, &(BUFFERS + 0x1000 * index).to_le_bytes());
        }
        self.set(RX_RING + RING_TAIL, 15);
        self.set(IMS, 0x01ff_ffff);
        self.set(RCTL, RCTL_ENABLE | RCTL_BROADCAST | RCTL_STRIP_CRC);
        self.set(TCTL, TCTL_ENABLE);
    }

    /// A descriptor: address, then length, type, command, options, special.
    fn describe(&self, index: u64, low: u64, length: u32, command: u8, options: u8) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&low.to_le_bytes());
        bytes[8..12].copy_from_slice(&(length | u32::from(command) << 24).to_le_bytes());
        bytes[13] = options;
        self.write(TX + 16 * index, &bytes);
    }

    fn sent(&self) -> (Header, Vec<u8>) {
        wait_for("a frame", || self.wire.sent.lock().unwrap().pop())
    }

    fn receive(&self, frame: &[u8]) {
        self.wire.waiting.lock().unwrap().push(frame.to_vec());
        self.wire.event.set();
    }

    fn line(&self) -> bool {
        let mut status = [0; 2];
        self.card.read_config(6, &mut status);
        status[0] & 8 != 0
    }
}

fn frame(destination: [u8; 6], length: usize) -> Vec<u8> {
    let mut frame = destination.to_vec();
    frame.extend((6..length).map(|n| n as u8));
    frame
}

#[test]
fn the_address_is_in_eeprom_and_filter_after_every_reset() {
    for model in [Model::E1000, Model::E1000e] {
        let bench = Bench::new(model);
        bench.set(ADDRESSES, 0);
        bench.set(CTRL, CTRL_RESET);
        assert_eq!((bench.get(ADDRESSES), bench.get(ADDRESSES + 4)), (0x1200_5452, 0x8000_5634));
        assert_eq!(bench.get(CTRL) & CTRL_RESET, 0);
        assert_eq!(bench.get(STATUS) & 3, 3);
    }
}

#[test]
fn a_frame_of_two_descriptors_is_sent_and_reported() {
    for model in [Model::E1000, Model::E1000e] {
        let bench = Bench::new(model);
        bench.start();
        let data = frame([0xff; 6], 100);
        bench.write(0x30_0000, &data[..60]);
        bench.write(0x31_0000, &data[60..]);
        bench.describe(0, 0x30_0000, 60, 0, 0);
        bench.describe(1, 0x31_0000, 40, 0b1011, 0);
        bench.set(TX_RINGS[0] + RING_TAIL, 2);
        assert_eq!(bench.sent(), (Header::default(), data));
        wait_for("the report", || (bench.read::<1>(TX + 16 + 12) == [1]).then_some(()));
        wait_for("the interrupt", || bench.line().then_some(()));
        assert_eq!(bench.get(TX_RINGS[0] + RING_HEAD), 2);
        assert_eq!(bench.get(ICR) & 3, 3);
        assert!(!bench.line(), "reading ICR acknowledges");
        assert_eq!((bench.get(GOOD_TX), bench.get(GOOD_TX)), (1, 0), "counters are cleared by reading");
    }
}

#[test]
fn a_frame_is_received_into_the_next_buffer() {
    for model in [Model::E1000, Model::E1000e] {
        let bench = Bench::new(model);
        bench.start();
        let data = frame(MAC, 80);
        bench.receive(&frame([2; 6], 80));
        bench.receive(&data);
        wait_for("the frame", || (bench.read::<1>(RX + 12)[0] & 3 == 3).then_some(()));
        assert_eq!(bench.read::<80>(BUFFERS).to_vec(), data);
        assert_eq!(bench.read::<2>(RX + 8), 80u16.to_le_bytes());
        wait_for("the interrupt", || bench.line().then_some(()));
        assert_eq!(bench.get(RX_RING + RING_HEAD), 1, "the frame for somebody else is not there");
    }
}

#[test]
fn frames_wait_for_buffers() {
    let bench = Bench::new(Model::E1000);
    bench.start();
    for n in 0..20 {
        bench.receive(&frame(MAC, 60 + n));
    }
    wait_for("all buffers", || (bench.get(RX_RING + RING_HEAD) == 15).then_some(()));
    bench.set(RX_RING + RING_TAIL, 14);
    wait_for("the others", || (bench.get(RX_RING + RING_HEAD) == 4).then_some(()));
    assert_eq!(bench.read::<2>(RX + 16 * 3 + 8), 79u16.to_le_bytes());
}

#[test]
fn a_short_frame_is_padded_and_a_checksum_follows() {
    let bench = Bench::new(Model::E1000);
    bench.start();
    bench.set(RCTL, RCTL_ENABLE | RCTL_BROADCAST);
    bench.receive(&frame([0xff; 6], 20));
    wait_for("the frame", || (bench.read::<1>(RX + 12)[0] & 1 == 1).then_some(()));
    assert_eq!(bench.read::<2>(RX + 8), 64u16.to_le_bytes());
    let data = bench.read::<64>(BUFFERS);
    assert_eq!(data[60..], crc32fast::hash(&data[..60]).to_le_bytes());
}

#[test]
fn segmentation_is_left_to_the_back_end_with_its_lengths_filled_in() {
    let bench = Bench::new(Model::E1000e);
    bench.start();
    // Ethernet, IPv4, TCP, and 3000 bytes.
    let mut data = frame([0xff; 6], 14 + 20 + 20 + 3000);
    (data[12], data[13], data[14]) = (8, 0, 0x45);
    data[16..18].fill(0);
    data[24..26].fill(0);
    data[50..52].copy_from_slice(&[0x12, 0x34]);
    bench.write(0x30_0000, &data);
    let mut context = [14, 24, 33, 0, 34, 50, 0, 0, 0, 0, 0, 0x27, 0, 54, 0, 0];
    context[14..].copy_from_slice(&1460u16.to_le_bytes());
    bench.write(TX, &context);
    bench.describe(1, 0x30_0000, data.len() as u32 | 1 << 20, 0x2d, 3);
    bench.set(TX_RINGS[0] + RING_TAIL, 2);
    let (header, sent) = bench.sent();
    assert_eq!((header.gso_type, header.gso_size, header.header_length), (net::GSO_TCP4, 1460, 54));
    assert_eq!((header.flags, header.checksum_start, header.checksum_offset), (1, 34, 16));
    assert_eq!(sent[16..18], 3040u16.to_be_bytes());
    assert_eq!(sent[50..52], (0x1234 + 3020u16).to_be_bytes());
    assert_eq!(crate::receive::checksum(&sent[14..34]), 0xffff);
}

#[test]
fn each_queue_interrupts_by_its_vector_and_is_masked_until_enabled() {
    let bench = Bench::new(Model::E1000e);
    bench.start();
    for vector in 0..5u64 {
        for (at, value) in [(0, 0xfee0_0000), (4, 0), (8, 0x40 + vector as u32), (12, 0)] {
            bench.board.chipset.mmio_write(TABLE + 16 * vector + at, &u32::to_le_bytes(value));
        }
    }
    let place = find_capability(&bench, 0x11);
    bench.card.write_config(place + 2, &[0, 0x80]);
    // Receive to vector 0, transmit to 1, all else to 2; cleared and masked by themselves.
    bench.set(IVAR, 0x000a_0908);
    bench.set(EIAC, RX_QUEUE_0 | TX_QUEUE_0);
    bench.set(IAM, u32::MAX);
    bench.set(CTRL_EXT, CTRL_EXT_EIAME);
    bench.receive(&frame(MAC, 80));
    let messages = || bench.board.recorder.messages.lock().unwrap().clone();
    wait_for("the message", || (messages() == [(0xfee0_0000, 0x40)]).then_some(()));
    assert_eq!(bench.get(IMS) & (RX_QUEUE_0 | TX_QUEUE_0), TX_QUEUE_0, "each vector masks its own cause only");
    bench.receive(&frame(MAC, 80));
    wait_for("the frame", || (bench.get(RX_RING + RING_HEAD) == 2).then_some(()));
    assert_eq!(messages().len(), 1);
    bench.set(IMS, RX_QUEUE_0);
    assert_eq!(messages().len(), 2);
    bench.set(ICS, LINK_CHANGED);
    assert_eq!(messages()[2], (0xfee0_0000, 0x42));
    assert!(!bench.line());
}

fn find_capability(bench: &Bench, id: u8) -> u16 {
    let mut place = [0];
    bench.card.read_config(0x34, &mut place);
    loop {
        let mut header = [0; 2];
        bench.card.read_config(place[0].into(), &mut header);
        if header[0] == id {
            return place[0].into();
        }
        assert_ne!(header[1], 0);
        place[0] = header[1];
    }
}

#[test]
fn interrupts_come_no_closer_than_the_driver_wants() {
    let bench = Bench::new(Model::E1000);
    bench.start();
    // 16 ms.
    bench.set(ITR, 0xf424);
    bench.set(ICS, RX_TIMER);
    assert!(bench.line());
    let begin = Instant::now();
    bench.get(ICR);
    bench.set(ICS, RX_TIMER);
    assert!(!bench.line());
    wait_for("the second", || bench.line().then_some(()));
    assert!(begin.elapsed() >= Duration::from_millis(10));
}

#[test]
fn random_accesses_leave_a_card_that_works_after_a_reset() {
    for model in [Model::E1000, Model::E1000e] {
        let bench = Bench::new(model);
        bench.start();
        let mut state = 0x1234_5678_9abc_def1u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let rings = [TX_RINGS[0], TX_RINGS[1], RX_RING];
        for round in 0..20_000 {
            let bits = next();
            let offset = match bits & 3 {
                0 => bits >> 8 & 0x1_fffc,
                1 => rings[(bits >> 4) as usize % 3] + (bits >> 8 & 0x1c),
                _ => bits >> 8 & 0x1fc,
            };
            match bits >> 2 & 3 {
                0 => drop(bench.get(offset)),
                1 => bench.write(TX + (bits >> 12 & 0xff), &bits.to_le_bytes()),
                _ => bench.set(offset, (bits >> 32) as u32),
            }
            if round % 100 == 0 {
                bench.receive(&frame([0xff; 6], 60 + (bits >> 40) as usize % 1500));
                bench.wire.sent.lock().unwrap().clear();
            }
        }
        bench.wire.waiting.lock().unwrap().clear();
        bench.card.reset();
        bench.config(0x10, BASE as u32);
        bench.config(0x04, 6);
        bench.start();
        bench.wire.sent.lock().unwrap().clear();
        bench.write(0x30_0000, &frame([0xff; 6], 77));
        bench.describe(0, 0x30_0000, 77, 0b1011, 0);
        bench.set(TX_RINGS[0] + RING_TAIL, 1);
        wait_for("the frame", || bench.wire.sent.lock().unwrap().pop().filter(|(_, frame)| frame.len() == 77));
    }
}
