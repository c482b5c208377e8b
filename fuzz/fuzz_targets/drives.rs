//! Any accesses to the controllers of drives, while somebody changes what is in these.
#![no_main]

mod pc;

use std::sync::Arc;

use chipset::pci::PciFunction;
use pc::{Board, PCI_PORTS, Places, Target};
use storage::ahci::{self, AhciController};
use storage::ata::{AtaDisk, Cable};
use storage::atapi::CdRom;
use storage::floppy::{DriveType, FloppyController};
use storage::ide::{self, IdeController};
use storage::{Drive, Media};

const SOUTH_BRIDGE: u8 = 0x1f;
const REGISTERS: u64 = 0xc000_0000;
const MASTER_PORTS: u16 = 0xc000;

/// A disk, whose content stays from one input to the next.
fn disk(cable: Cable) -> Option<Drive> {
    Some(Drive::Disk(AtaDisk::new(pc::image(1 << 20), "fuzz", cable)))
}

fn cd_rom(media: &Arc<Media>) -> Option<Drive> {
    Some(Drive::CdRom(CdRom::new(media.clone(), "fuzz")))
}

/// Takes a medium out and puts it in again.
fn changes(media: Arc<Media>, size: u64) -> Box<dyn Fn(&Board, [u8; 4])> {
    let medium = pc::image(size);
    Box::new(move |_, value| {
        let force = value[1] & 1 != 0;
        _ = if value[0] & 1 == 0 { media.eject(force) } else { media.insert(medium.clone(), force) };
    })
}

const DISC: u64 = 64 << 10;
const FLOPPY: u64 = 1_474_560;

fn ide() -> Target {
    let board = Board::new(None);
    let media = Media::new(Some(pc::image(DISC)));
    let drives = [[disk(Cable::Parallel), cd_rom(&media)], [disk(Cable::Parallel), None]];
    let controller = IdeController::new(drives, &board.chipset, board.ram.view()).expect("there are threads");
    board.chipset.insert_pci(SOUTH_BRIDGE, ide::FUNCTION, controller.clone()).expect("the slot is free");
    // Commands are at the first channel more often than elsewhere.
    let (first, second, masters) = ((0x1f0, 8), (0x170, 8), (MASTER_PORTS, 16));
    let ports = vec![first, second, first, masters, (0x3f6, 1), first, (0x376, 1), PCI_PORTS];
    let reset = move |board: &Board| {
        controller.reset();
        board.enable(SOUTH_BRIDGE, ide::FUNCTION, &[(4, MASTER_PORTS.into())]);
    };
    let places = Places { ports, windows: vec![] };
    Target { board, places, reset: Box::new(reset), host: changes(media, DISC) }
}

fn ahci() -> Target {
    let board = Board::new(None);
    let media = Media::new(Some(pc::image(DISC)));
    let mut drives = [const { None }; ahci::PORTS];
    (drives[0], drives[2]) = (disk(Cable::Serial), cd_rom(&media));
    let line = board.chipset.connect_pci(SOUTH_BRIDGE, ahci::PIN);
    let controller =
        AhciController::new(drives, board.ram.view(), Arc::new(pc::Nobody), line).expect("there are threads");
    board.chipset.insert_pci(SOUTH_BRIDGE, ahci::FUNCTION, controller.clone()).expect("the slot is free");
    let reset = move |board: &Board| {
        controller.reset();
        board.enable(SOUTH_BRIDGE, ahci::FUNCTION, &[(5, REGISTERS)]);
    };
    let places = Places { ports: vec![], windows: vec![(REGISTERS, 0x800)] };
    Target { board, places, reset: Box::new(reset), host: changes(media, DISC) }
}

fn floppy() -> Target {
    let board = Board::new(None);
    let media = Media::new(Some(pc::image(FLOPPY)));
    let drives = [Some((DriveType::High3, media.clone())), Some((DriveType::Extra3, Media::new(None)))];
    let controller = FloppyController::new(drives, &board.chipset).expect("there are threads");
    let places = Places { ports: vec![(0x3f0, 8), (0x00, 16), (0x80, 16)], windows: vec![] };
    Target { board, places, reset: Box::new(move |_| controller.reset()), host: changes(media, FLOPPY) }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| pc::run(&[ide, ahci, floppy], data));
