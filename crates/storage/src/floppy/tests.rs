use std::sync::Arc;

use engine::Bus;

use super::{DriveType, FloppyController};
use crate::Media;
use crate::testing::{Image, numbered};
use chipset::testing::{Board, Random, wait_for};

const BUFFER: u32 = 0x1_0000;
const BUSY: u8 = 0x10;
const TO_HOST: u8 = 0x40;
const READY: u8 = 0x80;

struct Bench {
    board: Board,
    media: Arc<Media>,
    controller: Arc<FloppyController>,
}

impl Bench {
    fn new(image: Option<&Image>) -> Self {
        let board = Board::default();
        let media = Media::new(image.map(|image| image.disk.clone()));
        let drives = [Some((DriveType::High3, media.clone())), None];
        let controller = FloppyController::new(drives, &board.chipset).unwrap();
        let bench = Bench { board, media, controller };
        // The second 8259's mask is of no interest; IRQ 6 is looked at in the IRR of the first.
        bench.out(0x3f7, 0);
        bench.out(0x3f2, 0);
        bench.out(0x3f2, 0x1c);
        for drive in 0..4 {
            assert_eq!(bench.command(&[8], 2)[0], 0xc0 | drive);
        }
        bench.command(&[3, 0xaf, 0x02], 0);
        bench.command(&[7, 0], 0);
        bench.sense();
        bench
    }

    fn out(&self, port: u16, value: u8) {
        self.board.chipset.pio_write(port, &[value]);
    }

    fn inb(&self, port: u16) -> u8 {
        let mut data = [0];
        self.board.chipset.pio_read(port, &mut data);
        data[0]
    }

    fn interrupted(&self) -> bool {
        self.out(0x20, 0x0a);
        self.inb(0x20) & 0x40 != 0
    }

    fn send(&self, bytes: &[u8]) {
        for byte in bytes {
            wait_for("the controller", || (self.inb(0x3f4) & (READY | TO_HOST) == READY).then_some(()));
            self.out(0x3f5, *byte);
        }
    }

    fn result(&self, length: usize) -> Vec<u8> {
        (0..length)
            .map(|_| {
                let all = READY | TO_HOST | BUSY;
                wait_for("a result", || (self.inb(0x3f4) & all == all).then_some(()));
                self.inb(0x3f5)
            })
            .collect()
    }

    fn command(&self, bytes: &[u8], results: usize) -> Vec<u8> {
        self.send(bytes);
        self.result(results)
    }

    fn sense(&self) -> Vec<u8> {
        wait_for("the interrupt", || self.interrupted().then_some(()));
        self.command(&[8], 2)
    }

    /// Programs DMA channel 2; mode 0x46 writes memory, 0x4a reads it.
    fn dma(&self, mode: u8, length: u16) {
        let [a0, a1, page, _] = BUFFER.to_le_bytes();
        let [c0, c1] = (length - 1).to_le_bytes();
        for (port, value) in
            [(0x0a, 6), (0x0c, 0), (0x0b, mode), (4, a0), (4, a1), (5, c0), (5, c1), (0x81, page), (0x0a, 2)]
        {
            self.out(port, value);
        }
    }
}

fn disk() -> Image {
    Image::of(&numbered(2880, 512), |_| {})
}

#[test]
fn sectors_go_to_memory_until_the_count_ends() {
    let image = disk();
    let bench = Bench::new(Some(&image));
    assert_eq!(bench.command(&[0x0f, 0, 5], 0), []);
    assert_eq!(bench.sense(), [0x20, 5]);
    bench.dma(0x46, 1024);
    let result = bench.command(&[0xe6, 0x04, 5, 1, 3, 2, 18, 27, 255], 7);
    assert_eq!(result, [0x04, 0, 0, 5, 1, 5, 2]);
    let place = ((5 * 2 + 1) * 18 + 2) * 512;
    assert_eq!(bench.board.read(BUFFER.into(), 1024), image.read(place, 1024));
    assert!(!bench.interrupted(), "the result has been read");
}

#[test]
fn both_sides_of_a_cylinder_are_one_transfer() {
    let image = disk();
    let bench = Bench::new(Some(&image));
    bench.dma(0x46, 36 * 512);
    let result = bench.command(&[0xe6, 0, 0, 0, 1, 2, 18, 27, 255], 7);
    assert_eq!(result, [0x00, 0, 0, 1, 0, 1, 2]);
    assert_eq!(bench.board.read(BUFFER.into(), 36 * 512), image.read(0, 36 * 512));
}

#[test]
fn a_transfer_that_wants_more_than_a_cylinder_ends_abnormally() {
    let image = disk();
    let bench = Bench::new(Some(&image));
    bench.dma(0x46, 4096);
    assert_eq!(bench.command(&[0x46, 0, 0, 0, 17, 2, 18, 27, 255], 7)[..3], [0x40, 0x80, 0]);
    bench.dma(0x46, 512);
    assert_eq!(bench.command(&[0x46, 0, 0, 0, 19, 2, 19, 27, 255], 7)[..3], [0x40, 0x04, 0]);
    bench.dma(0x46, 512);
    assert_eq!(bench.command(&[0x46, 0, 7, 0, 1, 2, 18, 27, 255], 7)[..3], [0x40, 0x04, 0x10], "the heads are at 0");
}

#[test]
fn what_is_written_and_formatted_reaches_the_image() {
    let image = disk();
    let bench = Bench::new(Some(&image));
    bench.board.write(BUFFER.into(), &[0xab; 512]);
    bench.dma(0x4a, 512);
    assert_eq!(bench.command(&[0xc5, 0, 0, 0, 4, 2, 18, 27, 255], 7)[..3], [0, 0, 0]);
    assert_eq!(image.read(3 * 512, 512), [0xab; 512]);
    let ids: Vec<u8> = (1..=18).flat_map(|sector| [0, 1, sector, 2]).collect();
    bench.board.write(BUFFER.into(), &ids);
    bench.dma(0x4a, ids.len() as u16);
    assert_eq!(bench.command(&[0x4d, 0x04, 2, 18, 0x54, 0xf6], 7)[..3], [0x04, 0, 0]);
    assert_eq!(image.read(18 * 512, 18 * 512), [0xf6; 18 * 512]);
    assert_ne!(image.read(36 * 512, 4), [0xf6; 4]);
}

#[test]
fn a_protected_disk_is_not_written() {
    let image = Image::of(&numbered(2880, 512), |options| options.read_only = true);
    let bench = Bench::new(Some(&image));
    bench.dma(0x4a, 512);
    assert_eq!(bench.command(&[0xc5, 0, 0, 0, 4, 2, 18, 27, 255], 7)[..3], [0x40, 0x02, 0]);
    assert_eq!(bench.command(&[4, 0], 1)[0] & 0x40, 0x40);
}

#[test]
fn another_data_rate_finds_no_marks() {
    let image = disk();
    let bench = Bench::new(Some(&image));
    assert_eq!(bench.command(&[0x4a, 0], 7), [0, 0, 0, 0, 0, 1, 2]);
    bench.out(0x3f7, 2);
    assert_eq!(bench.command(&[0x4a, 0], 7)[..3], [0x40, 1, 0]);
}

#[test]
fn a_changed_disk_shows_until_the_heads_move() {
    let (first, second) = (disk(), disk());
    let bench = Bench::new(Some(&first));
    assert_eq!(bench.inb(0x3f7) & 0x80, 0);
    bench.media.eject(false).unwrap();
    assert_eq!(bench.inb(0x3f7) & 0x80, 0x80);
    assert_eq!(bench.command(&[0x4a, 0], 7)[..2], [0x40, 1]);
    bench.media.insert(second.disk.clone(), false).unwrap();
    assert_eq!(bench.inb(0x3f7) & 0x80, 0x80);
    bench.send(&[0x0f, 0, 1]);
    bench.sense();
    assert_eq!(bench.inb(0x3f7) & 0x80, 0);
}

#[test]
fn without_dma_software_moves_each_byte() {
    let image = disk();
    let bench = Bench::new(Some(&image));
    bench.command(&[3, 0xaf, 0x03], 0);
    bench.send(&[0x46, 0, 0, 0, 17, 2, 18, 27, 255]);
    let data: Vec<u8> = (0..1024)
        .map(|_| {
            wait_for("a byte", || (bench.inb(0x3f4) & 0xf0 == 0xf0).then_some(()));
            bench.inb(0x3f5)
        })
        .collect();
    assert_eq!(data, image.read(16 * 512, 1024));
    assert_eq!(bench.result(7)[..2], [0x40, 0x80], "there is no terminal count");
}

#[test]
fn what_is_no_command_is_told_so() {
    let bench = Bench::new(None);
    assert_eq!(bench.command(&[0x01], 1), [0x80]);
    assert_eq!(bench.command(&[0x10], 1), [0x90]);
    assert_eq!(bench.command(&[8], 1), [0x80], "no interrupt is pending");
    bench.send(&[7, 1]);
    assert_eq!(bench.sense()[0], 0x71, "a drive that is not there");
}

#[test]
fn random_accesses_leave_a_controller_that_works_after_a_reset() {
    let image = disk();
    let bench = Bench::new(Some(&image));
    let mut random = Random(11);
    for round in 0..50_000u32 {
        let bits = random.draw();
        let port = [0x3f2, 0x3f4, 0x3f5, 0x3f5, 0x3f5, 0x3f7, 0x0a, 0x0b][bits as usize % 8];
        match bits >> 8 & 1 {
            0 => drop(bench.inb(port)),
            _ => bench.out(port, (bits >> 16) as u8),
        }
        if round % 1000 == 0 {
            bench.controller.reset();
        }
    }
    bench.controller.reset();
    bench.out(0x3f7, 0);
    bench.out(0x3f2, 0);
    bench.out(0x3f2, 0x1c);
    (0..4).for_each(|_| drop(bench.command(&[8], 2)));
    assert_eq!(bench.command(&[0x4a, 0], 7)[..2], [0, 0]);
}
