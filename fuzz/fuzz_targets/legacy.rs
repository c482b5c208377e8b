//! Any accesses to what every PC has: interrupt controllers, timers, clock, DMA, keyboard controller, power management,
//! serial port, PCI configuration.
#![no_main]

mod pc;

use pc::{Board, Places, Target};

/// Ports and addresses that belong together.
fn target(ports: &[(u16, u16)], windows: &[(u64, u64)]) -> Target {
    Target {
        board: Board::new(None),
        places: Places { ports: ports.into(), windows: windows.into() },
        reset: Box::new(|_| ()),
        host: Box::new(|board, value| match value[0] & 3 {
            0 => board.chipset.serial_input(0, &value[1..]),
            1 => board.chipset.keyboard().mouse(i32::from(value[1]), i32::from(value[2]), 0, value[3]),
            2 => board.chipset.press_power_button(),
            _ => {
                let line = board.chipset.connect(value[1] % 24);
                line.raise();
                line.lower();
            }
        }),
    }
}

const IO_APIC: (u64, u64) = (0xfec0_0000, 0x100);
const HPET: (u64, u64) = (0xfed0_0000, 0x400);

libfuzzer_sys::fuzz_target!(|data: &[u8]| pc::run(
    &[
        || target(&[(0x20, 2), (0xa0, 2), (0x4d0, 2)], &[IO_APIC]),
        || target(&[(0x40, 4), (0x61, 1)], &[]),
        || target(&[], &[HPET]),
        || target(&[(0x00, 16), (0x80, 16), (0xc0, 32)], &[]),
        || target(&[(0x60, 1), (0x64, 1), (0x92, 1)], &[]),
        || target(&[(0x70, 2), (0x3f8, 8)], &[]),
        || target(&[(0xcf8, 8), (0x600, 0x80), (0xb2, 2)], &[(0xb000_0000, 0x1000), (0xb00f_8000, 0x1000)]),
        || target(&[(0x00, 128), (0x80, 128), (0x3f8, 8), (0x4d0, 2), (0x600, 0x80), (0xcf8, 8)], &[IO_APIC, HPET]),
    ],
    data
));
