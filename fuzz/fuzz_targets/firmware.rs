//! Any accesses to the devices that firmware comes with: its flash chips, and fw_cfg.
#![no_main]

mod pc;

use chipset::Firmware;
use chipset::flash::{Backing, Chip, Image};
use chipset::fw_cfg::Item;
use pc::{Board, PCI_PORTS, Places, Target};

const CHIP: usize = 64 << 10;
const TOP: u64 = 1 << 32;

fn firmware() -> Firmware {
    let chip = |backing| Chip { content: (0..CHIP).map(|n| n as u8).collect(), backing };
    let file = tempfile::tempfile().expect("a temporary file");
    file.set_len(CHIP as u64).expect("it can be made larger");
    let image = Image::Flash(vec![chip(Backing::ReadOnly), chip(Backing::File(file)), chip(Backing::Volatile)]);
    let items =
        vec![Item::number(0x19, vec![1; 100]), Item::number(0x11, vec![2; 5000]), Item::file("etc/e820", vec![3; 40])];
    Firmware { image, items }
}

fn target(places: Places) -> Target {
    Target { board: Board::new(Some(firmware())), places, reset: Box::new(|_| ()), host: Box::new(|_, _| ()) }
}

const CHIPS: u64 = 3 * CHIP as u64;

libfuzzer_sys::fuzz_target!(|data: &[u8]| pc::run(
    &[
        || target(Places { ports: vec![(0x510, 12)], windows: vec![] }),
        || target(Places {
            ports: vec![PCI_PORTS],
            windows: vec![(TOP - CHIPS, CHIPS), (0xe_0000, 0x2_0000), (0xc_0000, 0x2_0000)],
        }),
    ],
    data
));
