use std::sync::Arc;

use chipset::pci::PciFunction;
use engine::Bus;

use super::{CHANNELS, IdeController};
use crate::ata::{AtaDisk, Cable};
use crate::atapi::CdRom;
use crate::testing::{Image, numbered};
use crate::{Drive, Media};
use chipset::testing::{Board, Random, wait_for};

const BUSY: u8 = 0x80;
const DATA_REQUEST: u8 = 0x08;
const ERROR: u8 = 0x01;
const READY: u8 = 0x50;
const MASTER: u16 = 0xc000;

struct Bench {
    board: Board,
    controller: Arc<IdeController>,
}

impl Bench {
    fn new(drives: super::Drives) -> Self {
        let board = Board::default();
        let controller = IdeController::new(drives, &board.chipset, board.ram.view()).unwrap();
        board.chipset.insert_pci(0x1f, 1, controller.clone()).unwrap();
        let bench = Bench { board, controller };
        // The bus master's ports, and the right to use memory, by the configuration registers that software uses.
        bench.config(0x20, u32::from(MASTER));
        bench.config(0x04, 5);
        bench
    }

    fn with_disk(image: &Image) -> Self {
        let disk = Drive::Disk(AtaDisk::new(image.disk.clone(), "", Cable::Parallel));
        Self::new([[Some(disk), None], [None, None]])
    }

    fn config(&self, register: u32, value: u32) {
        self.board.chipset.pio_write(0xcf8, &(0x8000_0000 | 0x1f << 11 | 1 << 8 | register).to_le_bytes());
        self.board.chipset.pio_write(0xcfc, &value.to_le_bytes());
    }

    fn out(&self, port: u16, value: u8) {
        self.board.chipset.pio_write(port, &[value]);
    }

    fn inb(&self, port: u16) -> u8 {
        let mut data = [0];
        self.board.chipset.pio_read(port, &mut data);
        data[0]
    }

    /// Waits until the drive is not busy; its status.
    fn status(&self) -> u8 {
        wait_for("a drive that is not busy", || Some(self.inb(0x3f6)).filter(|status| status & BUSY == 0))
    }

    fn command(&self, command: u8, device: u8, lba: u32, count: u8) {
        let [low, mid, high, _] = lba.to_le_bytes();
        for (port, value) in [(0x1f6, device), (0x1f2, count), (0x1f3, low), (0x1f4, mid), (0x1f5, high)] {
            self.out(port, value);
        }
        self.out(0x1f7, command);
    }

    fn read_block(&self, words: usize) -> Vec<u8> {
        let mut block = Vec::new();
        for _ in 0..words {
            let mut word = [0; 2];
            self.board.chipset.pio_read(0x1f0, &mut word);
            block.extend(word);
        }
        block
    }

    /// Whether IRQ 14 is requested, as the 8259 pair sees it: IRR of the second one, bit 6.
    fn interrupted(&self) -> bool {
        self.out(0xa0, 0x0a);
        self.inb(0xa0) & 0x40 != 0
    }
}

#[test]
fn sectors_are_read_word_by_word_with_an_interrupt_each() {
    let image = Image::numbered(1000);
    let bench = Bench::with_disk(&image);
    bench.command(0x20, 0xe0, 5, 3);
    for sector in 0..3 {
        assert_eq!(bench.status() & (DATA_REQUEST | ERROR), DATA_REQUEST);
        assert!(bench.interrupted());
        bench.inb(0x1f7);
        assert!(!bench.interrupted(), "reading the status acknowledges");
        assert_eq!(bench.read_block(256), image.read((5 + sector) * 512, 512));
    }
    assert_eq!(bench.status(), READY);
    assert!(!bench.interrupted(), "there is none after the last sector");
}

#[test]
fn doublewords_move_twice_as_much() {
    let image = Image::numbered(1000);
    let bench = Bench::with_disk(&image);
    bench.command(0xc4, 0xe0, 5, 4);
    assert_eq!(bench.status() & DATA_REQUEST, DATA_REQUEST);
    let mut data = Vec::new();
    for _ in 0..512 {
        let mut double = [0; 4];
        bench.board.chipset.pio_read(0x1f0, &mut double);
        data.extend(double);
    }
    assert_eq!(data, image.read(5 * 512, 2048));
    assert_eq!(bench.status(), READY);
}

#[test]
fn a_long_read_goes_through_a_short_buffer() {
    let image = Image::numbered(1000);
    let bench = Bench::with_disk(&image);
    // 48 bits: 600 sectors, which is more than is read ahead.
    for (port, value) in [(0x1f6, 0xe0), (0x1f2, 2), (0x1f2, 0x58), (0x1f3, 0), (0x1f3, 9), (0x1f4, 0), (0x1f4, 0)] {
        bench.out(port, value);
    }
    bench.out(0x1f5, 0);
    bench.out(0x1f5, 0);
    bench.out(0x1f7, 0x24);
    let mut data = Vec::new();
    for _ in 0..600 {
        assert_eq!(bench.status() & (DATA_REQUEST | ERROR), DATA_REQUEST);
        data.extend(bench.read_block(256));
    }
    assert!(data == image.read(9 * 512, 600 * 512));
}

#[test]
fn written_words_reach_the_image() {
    let image = Image::numbered(1000);
    let bench = Bench::with_disk(&image);
    bench.command(0x30, 0xe0, 7, 2);
    for sector in 0..2u8 {
        assert_eq!(bench.status() & DATA_REQUEST, DATA_REQUEST);
        assert_eq!(bench.interrupted(), sector > 0, "the first block is asked for without one");
        bench.inb(0x1f7);
        (0..256).for_each(|_| bench.board.chipset.pio_write(0x1f0, &[0xa0 + sector, 0x55]));
    }
    assert_eq!(bench.status(), READY);
    assert!(bench.interrupted());
    assert_eq!(image.read(7 * 512, 512), [0xa0, 0x55].repeat(256));
    assert_eq!(image.read(8 * 512, 512), [0xa1, 0x55].repeat(256));
}

#[test]
fn words_that_follow_a_command_without_a_look_at_the_status_are_not_lost() {
    let image = Image::numbered(1000);
    let bench = Bench::with_disk(&image);
    for sector in 0..20u8 {
        bench.command(0x30, 0xe0, u32::from(sector), 1);
        (0..128).for_each(|_| bench.board.chipset.pio_write(0x1f0, &[sector, 1, 2, 3]));
        assert_eq!(bench.status(), READY);
    }
    for sector in 0..20u8 {
        assert_eq!(image.read(u64::from(sector) * 512, 512), [sector, 1, 2, 3].repeat(128));
    }
}

/// Two pieces of memory for 2048 bytes.
fn descriptors(board: &Board, second: u32) {
    for (index, value) in [0x2_0000u32, 0x600, 0x3_0000, 0x8000_0000 | second].iter().enumerate() {
        board.write(0x1000 + 4 * index as u64, &value.to_le_bytes());
    }
}

#[test]
fn dma_goes_where_the_descriptors_say() {
    let image = Image::numbered(1000);
    let bench = Bench::with_disk(&image);
    descriptors(&bench.board, 0x200);
    bench.board.chipset.pio_write(MASTER + 4, &0x1000u32.to_le_bytes());
    bench.out(MASTER, 8);
    bench.command(0xc8, 0xe0, 40, 4);
    bench.out(MASTER, 9);
    assert_eq!(bench.status(), READY);
    wait_for("the bus master's interrupt", || (bench.inb(MASTER + 2) & 4 != 0).then_some(()));
    assert_eq!(bench.inb(MASTER + 2) & 7, 4, "not active any more");
    let expected = image.read(40 * 512, 2048);
    assert_eq!(bench.board.read(0x2_0000, 0x600), expected[..0x600]);
    assert_eq!(bench.board.read(0x3_0000, 0x200), expected[0x600..]);
    // And back to another place.
    bench.out(MASTER + 2, 6);
    bench.out(MASTER, 0);
    bench.command(0xca, 0xe0, 80, 4);
    bench.out(MASTER, 1);
    assert_eq!(bench.status(), READY);
    assert_eq!(image.read(80 * 512, 2048), expected);
}

#[test]
fn a_table_that_is_too_short_hangs_the_drive_until_it_is_reset() {
    let image = Image::numbered(1000);
    let bench = Bench::with_disk(&image);
    descriptors(&bench.board, 0x100);
    bench.board.chipset.pio_write(MASTER + 4, &0x1000u32.to_le_bytes());
    bench.command(0xc8, 0xe0, 40, 4);
    bench.out(MASTER, 9);
    wait_for("the end of the table", || (bench.inb(MASTER + 2) & 1 == 0).then_some(()));
    assert_eq!(bench.inb(0x3f6) & BUSY, BUSY);
    bench.out(0x3f6, 4);
    bench.out(0x3f6, 0);
    assert_eq!(bench.status(), READY);
    assert_eq!([bench.inb(0x1f2), bench.inb(0x1f3), bench.inb(0x1f4), bench.inb(0x1f5)], [1, 1, 0, 0]);
}

#[test]
fn descriptors_outside_memory_are_a_dma_error() {
    let image = Image::numbered(1000);
    let bench = Bench::with_disk(&image);
    bench.board.chipset.pio_write(MASTER + 4, &0xf000_0000u32.to_le_bytes());
    bench.command(0xc8, 0xe0, 40, 4);
    bench.out(MASTER, 9);
    wait_for("the error", || (bench.inb(MASTER + 2) & 3 == 2).then_some(()));
    bench.controller.reset();
    assert_eq!(bench.status(), READY);
}

#[test]
fn drives_that_are_not_there_answer_with_nothing() {
    let image = Image::numbered(1000);
    let bench = Bench::with_disk(&image);
    bench.out(0x1f6, 0xb0);
    assert_eq!(bench.inb(0x1f7), 0);
    bench.out(0x1f7, 0xec);
    assert_eq!(bench.inb(0x3f6), 0);
    assert_eq!((0..8).map(|port| bench.inb(0x170 + port)).collect::<Vec<_>>(), [0; 8]);
}

#[test]
fn a_packet_drive_is_not_seen_as_a_second_one_too() {
    let disc = Image::of(&numbered(100, 2048), |options| options.read_only = true);
    let drive = Drive::CdRom(CdRom::new(Media::new(Some(disc.disk.clone())), ""));
    let bench = Bench::new([[Some(drive), None], [None, None]]);
    let signature = |device: u8| {
        bench.out(0x1f6, device);
        [0x1f2, 0x1f3, 0x1f4, 0x1f5].map(|port| bench.inb(port))
    };
    assert_eq!(signature(0xb0), [0; 4]);
    bench.out(0x3f6, 6);
    bench.out(0x3f6, 2);
    assert_eq!(signature(0xb0), [0; 4]);
    bench.out(0x1f7, 0xa1);
    assert_eq!(bench.inb(0x3f6), 0);
    assert_eq!(signature(0xa0), [1, 1, 0x14, 0xeb]);
}

#[test]
fn a_packet_gets_its_data_in_blocks_of_the_length_that_was_asked_for() {
    let disc = Image::of(&numbered(100, 2048), |options| options.read_only = true);
    let drive = Drive::CdRom(CdRom::new(Media::new(Some(disc.disk.clone())), ""));
    let bench = Bench::new([[Some(drive), None], [None, None]]);
    let packet = |bytes: [u8; 12], limit: u32| {
        bench.out(0x1f1, 0);
        bench.command(0xa0, 0xa0, limit << 8, 0);
        assert_eq!((bench.status() & DATA_REQUEST, bench.inb(0x1f2) & 7), (DATA_REQUEST, 1));
        bytes.chunks(2).for_each(|word| bench.board.chipset.pio_write(0x1f0, word));
    };
    assert_eq!([bench.inb(0x1f4), bench.inb(0x1f5)], [0x14, 0xeb]);
    packet([0; 12], 0);
    assert_eq!(bench.status() & ERROR, ERROR, "the reset is told first");
    packet([0x28, 0, 0, 0, 0, 3, 0, 0, 2, 0, 0, 0], 3000);
    let mut data = Vec::new();
    loop {
        let status = bench.status();
        if status & DATA_REQUEST == 0 {
            assert_eq!((status & ERROR, bench.inb(0x1f2) & 7), (0, 3));
            break;
        }
        assert_eq!(bench.inb(0x1f2) & 7, 2);
        let length = u16::from_le_bytes([bench.inb(0x1f4), bench.inb(0x1f5)]);
        assert!(length <= 3000);
        data.extend(bench.read_block(usize::from(length) / 2));
    }
    assert_eq!(data, disc.read(3 * 2048, 4096));
}

#[test]
fn random_accesses_leave_a_drive_that_works_after_a_reset() {
    let image = Image::of(&numbered(256, 512), |options| options.snapshot = true);
    let disc = Image::of(&numbered(64, 2048), |options| options.read_only = true);
    let cd = Drive::CdRom(CdRom::new(Media::new(Some(disc.disk.clone())), ""));
    let disk = Drive::Disk(AtaDisk::new(image.disk.clone(), "", Cable::Parallel));
    let bench = Bench::new([[Some(disk), Some(cd)], [None, None]]);
    let mut random = Random(77);
    for _ in 0..30_000 {
        let bits = random.draw();
        let ports = [0x1f0, 0x1f1, 0x1f2, 0x1f3, 0x1f4, 0x1f5, 0x1f6, 0x1f7, 0x3f6, MASTER, MASTER + 2, MASTER + 4];
        let port = ports[(bits % 12) as usize];
        let length = 1 << (bits >> 8 & 1);
        let mut data = [(bits >> 16) as u8, (bits >> 24) as u8];
        match bits >> 12 & 1 {
            0 => bench.board.chipset.pio_write(port, &data[..length]),
            _ => bench.board.chipset.pio_read(port, &mut data[..length]),
        }
    }
    bench.out(0x3f6, 4);
    bench.out(0x3f6, 0);
    assert_eq!(bench.status() & !0x50, 0);
    bench.out(0x1f6, 0xe0);
    bench.command(0x20, 0xe0, 9, 1);
    assert_eq!(bench.status() & (DATA_REQUEST | ERROR), DATA_REQUEST);
    assert_eq!(CHANNELS[0].2, 14);
}
