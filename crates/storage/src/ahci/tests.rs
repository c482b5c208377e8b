use std::sync::Arc;

use chipset::pci::PciFunction;
use engine::Bus;

use super::{AhciController, PIN};
use crate::ata::{AtaDisk, Cable};
use crate::atapi::CdRom;
use crate::testing::{Image, numbered, truncated};
use crate::{Drive, Media};
use chipset::testing::{Board, Random, wait_for};

const BASE: u64 = 0xc000_0000;
const LIST: u64 = 0x1_0000;
const RECEIVED: u64 = 0x1_1000;
const TABLES: u64 = 0x2_0000;
const DATA: u64 = 0x10_0000;

/// Offsets of a port's registers.
const IS: u64 = 0x10;
const CMD: u64 = 0x18;
const TFD: u64 = 0x20;
const SIG: u64 = 0x24;
const SSTS: u64 = 0x28;
const SACT: u64 = 0x34;
const CI: u64 = 0x38;

struct Bench {
    board: Board,
    controller: Arc<AhciController>,
}

impl Bench {
    fn new(drives: [Option<Drive>; 6]) -> Self {
        let board = Board::default();
        let line = board.chipset.connect_pci(0x1f, PIN);
        let controller = AhciController::new(drives, board.ram.view(), board.recorder.clone(), line).unwrap();
        board.chipset.insert_pci(0x1f, 2, controller.clone()).unwrap();
        let bench = Bench { board, controller };
        bench.controller.write_config(4, &[0, 0]);
        bench.config(0x24, BASE as u32);
        bench.config(0x04, 6);
        bench
    }

    fn with_disk(image: &Image) -> Self {
        let disk = Drive::Disk(AtaDisk::new(image.disk.clone(), "", Cable::Serial));
        let bench = Self::new([Some(disk), None, None, None, None, None]);
        bench.start();
        bench
    }

    fn config(&self, register: u32, value: u32) {
        self.board.chipset.pio_write(0xcf8, &(0x8000_0000 | 0x1f << 11 | 2 << 8 | register).to_le_bytes());
        self.board.chipset.pio_write(0xcfc, &value.to_le_bytes());
    }

    /// MSI on, lists in place, interrupts enabled, port 0 running.
    fn start(&self) {
        let mut capability = [0];
        self.controller.read_config(0x34, &mut capability);
        let mut place = capability[0];
        loop {
            let mut header = [0; 2];
            self.controller.read_config(place.into(), &mut header);
            if header[0] == 5 {
                break;
            }
            place = header[1];
        }
        self.config(u32::from(place) + 4, 0xfee0_0000);
        self.config(u32::from(place) + 12, 0x31);
        self.controller.write_config(u16::from(place) + 2, &[1, 0]);
        self.set(0x100, LIST as u32);
        self.set(0x108, RECEIVED as u32);
        self.set(0x100 + CMD, 0x10);
        self.set(0x130, u32::MAX);
        self.set(0x100 + IS, u32::MAX);
        self.set(8, u32::MAX);
        self.set(0x114, u32::MAX);
        self.set(4, 2);
        self.set(0x100 + CMD, 0x11);
        self.board.recorder.take();
    }

    fn set(&self, offset: u64, value: u32) {
        self.board.chipset.mmio_write(BASE + offset, &value.to_le_bytes());
    }

    fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.board.chipset.mmio_read(BASE + offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn port(&self, offset: u64) -> u32 {
        self.get(0x100 + offset)
    }

    /// Puts a command into the list: its frame, and where its data are.
    fn put(&self, slot: u64, frame: [u8; 16], pieces: &[(u64, u32)]) {
        let table = TABLES + slot * 0x1000;
        let header = [5 | (pieces.len() as u32) << 16, 0, table as u32, 0];
        for (index, value) in header.iter().enumerate() {
            self.board.write(LIST + slot * 32 + 4 * index as u64, &value.to_le_bytes());
        }
        self.board.write(table, &frame);
        for (index, (address, length)) in pieces.iter().enumerate() {
            let place = table + 0x80 + 16 * index as u64;
            self.board.write(place, &address.to_le_bytes());
            self.board.write(place + 12, &(length - 1).to_le_bytes());
        }
    }

    fn issue(&self, slots: u32) {
        self.set(0x100 + CI, slots);
    }

    fn wait(&self, register: u64, mask: u32, value: u32) {
        wait_for("the end of a command", || (self.port(register) & mask == value).then_some(()));
    }
}

/// A register frame: command, sector, count; queued commands have the count among the features.
fn frame(command: u8, lba: u32, count: u16) -> [u8; 16] {
    let ([l0, l1, l2, l3], [c0, c1]) = (lba.to_le_bytes(), count.to_le_bytes());
    [0x27, 0x80, command, 0, l0, l1, l2, 0x40, l3, 0, 0, 0, c0, c1, 0, 0]
}

fn queued(command: u8, lba: u32, count: u16, tag: u8) -> [u8; 16] {
    let [c0, c1] = count.to_le_bytes();
    let mut frame = frame(command, lba, u16::from(tag) << 3);
    (frame[3], frame[11]) = (c0, c1);
    frame
}

#[test]
fn a_drive_shows_itself_by_its_signature() {
    let image = Image::numbered(64);
    let disk = Drive::Disk(AtaDisk::new(image.disk.clone(), "", Cable::Serial));
    let cd = Drive::CdRom(CdRom::new(Media::new(None), ""));
    let bench = Bench::new([Some(disk), Some(cd), None, None, None, None]);
    assert_eq!([bench.port(SIG), bench.get(0x180 + SIG)], [0x0000_0101, 0xeb14_0101]);
    assert_eq!([bench.port(SSTS), bench.get(0x180 + SSTS), bench.get(0x200 + SSTS)], [0x133, 0x133, 0]);
    assert_eq!(bench.port(TFD), 0x150);
    // COMRESET, and up again.
    bench.set(0x12c, 1);
    assert_eq!((bench.port(SSTS) & 15, bench.port(SIG)), (1, u32::MAX));
    bench.set(0x12c, 0);
    assert_eq!((bench.port(SSTS), bench.port(SIG), bench.port(TFD)), (0x133, 0x101, 0x150));
    assert_eq!(bench.port(IS) & 0x40_0040, 0x40_0040);
}

#[test]
fn dma_goes_where_the_list_says_and_the_end_is_told() {
    let image = Image::numbered(1000);
    let bench = Bench::with_disk(&image);
    bench.put(3, frame(0x25, 100, 3), &[(DATA, 512), (DATA + 0x1000, 1024)]);
    bench.issue(8);
    bench.wait(CI, 8, 0);
    let expected = image.read(100 * 512, 1536);
    assert_eq!(bench.board.read(DATA, 512), expected[..512]);
    assert_eq!(bench.board.read(DATA + 0x1000, 1024), expected[512..]);
    assert_eq!(bench.board.read(LIST + 3 * 32 + 4, 4), 1536u32.to_le_bytes());
    wait_for("the message", || (*bench.board.recorder.messages.lock().unwrap() == [(0xfee0_0000, 0x31)]).then_some(()));
    assert_eq!((bench.port(IS), bench.get(8)), (1, 1));
    assert_eq!(bench.board.read(RECEIVED + 0x40, 4), [0x34, 0x40, 0x50, 0]);
    bench.set(8, 1);
    assert_eq!(bench.get(8), 1, "the port still has something to tell");
    bench.set(0x100 + IS, 1);
    bench.set(8, 1);
    assert_eq!(bench.get(8), 0);
    bench.put(4, frame(0x35, 500, 1), &[(DATA, 512)]);
    bench.issue(16);
    bench.wait(CI, 16, 0);
    assert_eq!(image.read(500 * 512, 512), expected[..512]);
}

#[test]
fn queued_commands_end_by_their_bits() {
    let image = Image::numbered(1000);
    let bench = Bench::with_disk(&image);
    for tag in 0..32u8 {
        let place = DATA + u64::from(tag) * 0x1000;
        bench.put(tag.into(), queued(0x60, u32::from(tag) * 10, 2, tag), &[(place, 1024)]);
    }
    bench.set(0x100 + SACT, u32::MAX);
    bench.issue(u32::MAX);
    bench.wait(SACT, u32::MAX, 0);
    assert_eq!(bench.port(CI), 0);
    for tag in 0..32 {
        assert_eq!(bench.board.read(DATA + tag * 0x1000, 1024), image.read(tag * 10 * 512, 1024));
    }
    assert_eq!(bench.board.read(RECEIVED + 0x58, 2), [0xa1, 0x40]);
}

#[test]
fn a_failed_command_halts_the_port_until_it_is_restarted() {
    let image = truncated(1000);
    let bench = Bench::with_disk(&image);
    bench.put(0, frame(0x25, 1, 1), &[(DATA, 512)]);
    bench.put(1, frame(0xec, 0, 0), &[(DATA, 512)]);
    bench.issue(3);
    bench.wait(IS, 1 << 30, 1 << 30);
    assert_eq!((bench.port(TFD) & 1, bench.port(CI)), (1, 3));
    bench.set(0x100 + CMD, 0x10);
    bench.wait(CMD, 0x8000, 0);
    assert_eq!(bench.port(CI), 0);
    bench.set(0x100 + IS, u32::MAX);
    bench.set(0x100 + CMD, 0x11);
    bench.issue(2);
    bench.wait(CI, 2, 0);
    assert_eq!(bench.board.read(DATA, 2), [0x40, 0]);
}

#[test]
fn pio_data_come_with_their_own_frame() {
    let image = Image::numbered(1000);
    let bench = Bench::with_disk(&image);
    bench.put(0, frame(0x20, 7, 2), &[(DATA, 1024)]);
    bench.issue(1);
    bench.wait(CI, 1, 0);
    assert_eq!(bench.board.read(DATA, 1024), image.read(7 * 512, 1024));
    let setup = bench.board.read(RECEIVED + 0x20, 18);
    assert_eq!((setup[0], setup[1], setup[15]), (0x5f, 0x60, 0x50));
    bench.wait(IS, 2, 2);
}

#[test]
fn a_soft_reset_ends_with_the_signature() {
    let image = Image::numbered(1000);
    let bench = Bench::with_disk(&image);
    let control = |value: u8| {
        let mut frame = [0; 16];
        (frame[0], frame[15]) = (0x27, value);
        frame
    };
    bench.put(0, control(4), &[]);
    bench.put(1, control(0), &[]);
    bench.issue(1);
    bench.wait(CI, 1, 0);
    bench.issue(2);
    bench.wait(CI, 2, 0);
    assert_eq!((bench.port(TFD), bench.port(SIG)), (0x150, 0x101));
}

#[test]
fn lists_and_data_outside_memory_are_bus_errors() {
    let image = Image::numbered(1000);
    let bench = Bench::with_disk(&image);
    bench.put(0, frame(0x25, 0, 1), &[(0xff00_0000, 512)]);
    bench.issue(1);
    bench.wait(IS, 1 << 28, 1 << 28);
    bench.set(0x100 + CMD, 0x10);
    bench.set(0x100, 0xff00_0000);
    bench.set(0x100 + IS, u32::MAX);
    bench.set(0x100 + CMD, 0x11);
    bench.issue(1);
    bench.wait(IS, 1 << 29, 1 << 29);
    // Less room than there are data.
    bench.set(0x100 + CMD, 0x10);
    bench.set(0x100, LIST as u32);
    bench.set(0x100 + IS, u32::MAX);
    bench.set(0x100 + CMD, 0x11);
    bench.put(0, frame(0x25, 0, 2), &[(DATA, 512)]);
    bench.issue(1);
    bench.wait(IS, 1 << 24, 1 << 24);
}

#[test]
fn nothing_is_read_before_the_function_is_a_bus_master() {
    let image = Image::numbered(1000);
    let bench = Bench::with_disk(&image);
    bench.config(4, 2);
    bench.put(0, frame(0x25, 5, 1), &[(DATA, 512)]);
    bench.issue(1);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(bench.port(CI), 1);
    bench.config(4, 6);
    bench.wait(CI, 1, 0);
}

#[test]
fn packets_are_answered_with_what_there_is_room_for() {
    let disc = Image::of(&numbered(100, 2048), |options| options.read_only = true);
    let cd = Drive::CdRom(CdRom::new(Media::new(Some(disc.disk.clone())), ""));
    let bench = Bench::new([Some(cd), None, None, None, None, None]);
    bench.start();
    let packet = |bytes: [u8; 12], length: u32| {
        let mut frame = frame(0xa0, 0, 0);
        frame[3] = 1;
        bench.put(0, frame, &[(DATA, length)]);
        bench.board.write(TABLES + 0x40, &bytes);
        bench.issue(1);
    };
    packet([0x03, 0, 0, 0, 18, 0, 0, 0, 0, 0, 0, 0], 18);
    bench.wait(CI, 1, 0);
    assert_eq!(bench.board.read(DATA, 3), [0x70, 0, 6]);
    packet([0x28, 0, 0, 0, 0, 9, 0, 0, 1, 0, 0, 0], 2048);
    bench.wait(CI, 1, 0);
    assert_eq!(bench.board.read(DATA, 2048), disc.read(9 * 2048, 2048));
    packet([0x12, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 0], 8);
    bench.wait(CI, 1, 0);
    assert_eq!(bench.board.read(LIST + 4, 4), 8u32.to_le_bytes());
}

#[test]
fn random_accesses_leave_a_controller_that_works_after_a_reset() {
    let image = Image::of(&numbered(256, 512), |options| options.snapshot = true);
    let bench = Bench::with_disk(&image);
    let mut random = Random(3);
    for round in 0..30_000u32 {
        let bits = random.draw();
        let offset = if bits & 1 == 0 { bits >> 8 & 0x7fc } else { 0x100 + (bits >> 8 & 0x3c) };
        let value = (bits >> 24) as u32;
        match bits >> 1 & 3 {
            0 => drop(bench.get(offset)),
            1 => bench.board.write(LIST + (bits >> 4 & 0x3ff), &value.to_le_bytes()),
            2 => bench.board.write(TABLES + (bits >> 4 & 0xff), &value.to_le_bytes()),
            _ => bench.set(offset, value),
        }
        if round % 64 == 0 {
            bench.set(0x100, LIST as u32);
            bench.set(0x104, 0);
            bench.put(bits >> 8 & 3, frame((bits >> 16) as u8, value, 1), &[(DATA, 512)]);
            bench.set(0x100 + CMD, 0x11);
        }
    }
    bench.controller.reset();
    bench.config(0x24, BASE as u32);
    bench.config(4, 6);
    bench.start();
    bench.put(0, frame(0x25, 5, 1), &[(DATA, 512)]);
    bench.issue(1);
    bench.wait(CI, 1, 0);
}
