//! Any accesses to the network cards of real makes, while frames arrive.
#![no_main]

mod pc;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use chipset::pci::PciFunction;
use ethernet::{Model, NetworkCard};
use net::{Backend, Header, Offloads, Sink};
use pc::{Board, PCI_PORTS, Places, Target};
use wake::Event;

const SLOT: u8 = 3;
const REGISTERS: u64 = 0xc000_0000;
const TABLE: u64 = 0xc010_0000;
const PORTS: u16 = 0xc000;
const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
/// What may wait on the wire.
const MOST_FRAMES: usize = 16;

/// The other end of the wire: frames that have not been taken yet.
struct Wire {
    waiting: Mutex<Vec<Vec<u8>>>,
    event: Event,
}

struct End(Arc<Wire>);

impl Backend for End {
    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tso4: true, tso6: true }
    }

    fn set_guest_offloads(&mut self, _offloads: Offloads) {}

    fn set_enabled(&mut self, _enabled: bool) {}

    fn send(&mut self, _header: &Header, frame: &[u8]) {
        assert!(frame.len() <= net::LONGEST_FRAME, "a frame of {} bytes", frame.len());
    }

    fn receive(&mut self, sink: &mut dyn Sink) {
        self.0.event.clear();
        let mut waiting = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(frame) = waiting.first() {
            if !sink.deliver(&Header::default(), &[frame]) {
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

fn target(model: Model) -> Target {
    let board = Board::new(None);
    let wire = Arc::new(Wire { waiting: Mutex::default(), event: Event::new().expect("there are descriptors") });
    let line = board.chipset.connect_pci(SLOT, 0);
    let end = Box::new(End(wire.clone()));
    let card = NetworkCard::new(model, MAC, &[], end, board.ram.view(), Arc::new(pc::Nobody), line)
        .expect("there are threads");
    board.chipset.insert_pci(SLOT, 0, card.clone()).expect("the slot is free");
    let ports_bar = if model == Model::E1000 { 1 } else { 2 };
    let reset = move |board: &Board| {
        card.reset();
        board.enable(SLOT, 0, &[(0, REGISTERS), (3, TABLE), (ports_bar, PORTS.into())]);
    };
    let host = move |_: &Board, value: [u8; 4]| {
        let mut waiting = wire.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < MOST_FRAMES {
            let length = usize::from(u16::from_le_bytes([value[0], value[1]])) % 20_000;
            let mut frame: Vec<u8> = MAC.into();
            frame.resize(14 + length, value[2]);
            frame[12..14].copy_from_slice(if value[3] & 1 == 0 { &[8, 0] } else { &[0x86, 0xdd] });
            waiting.push(frame);
        }
        drop(waiting);
        wire.event.set();
    };
    let registers = (REGISTERS, 0x2_0000);
    let places =
        Places { ports: vec![(PORTS, 8), PCI_PORTS], windows: vec![registers, registers, registers, (TABLE, 0x100)] };
    Target { board, places, reset: Box::new(reset), host: Box::new(host) }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| pc::run(&[|| target(Model::E1000), || target(Model::E1000e)], data));
