//! Any accesses to the graphics adapter and the keyboard controller, while somebody types, points and looks.
#![no_main]

mod pc;

use std::sync::atomic::Ordering;

use display::Frame;
use display::vga::Vga;
use engine::Bus;

use pc::Board;

/// The adapter's memory is mapped at one of these at times.
const PLACES: [u64; 4] = [0xa_0000, 0xb_8000, 0xe000_0000, 0xf000_0000];
/// The ports of both devices, and of PCI configuration.
const PORTS: [u16; 6] = [0x60, 0x64, 0x1ce, 0x1cf, 0xcf8, 0xcfc];

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Board { chipset, ram, clock } = Board::new(None);
    let vga = Vga::plug_in(&chipset, &ram, clock.clone(), 2, &[0x55, 0xaa]).expect("the slot is free");
    let mut frame = Frame::default();
    let (mut draws, mut waits) = (0, 0);
    for step in data.chunks(8) {
        let mut bytes = [0; 8];
        bytes[..step.len()].copy_from_slice(step);
        let [what, place, a, b, c, d, e, _] = bytes;
        let value = [a, b, c, d];
        let length = [1, 2, 4, 1][usize::from(what >> 4 & 3)];
        let port = match place {
            0..0x30 => 0x3b0 + u16::from(place),
            _ => PORTS[usize::from(place) % PORTS.len()],
        };
        let address = PLACES[usize::from(place & 3)] + u64::from(u32::from_le_bytes([d, e, place >> 2, 0]) & 0x1f_ffff);
        match what & 0xf {
            0..6 => chipset.pio_write(port, &value[..length]),
            6 | 7 => chipset.pio_read(port, &mut [0; 4][..length]),
            8..11 => chipset.mmio_write(address, &value[..length]),
            11 => chipset.mmio_read(address, &mut [0; 4][..length]),
            // A key that nobody takes makes the next one wait.
            12 if waits < 4 => {
                waits += 1;
                chipset.keyboard().key(a, b & 1 != 0);
            }
            13 => chipset.keyboard().mouse(i32::from(a as i8), i32::from(b as i8), i32::from(c as i8), d),
            14 if draws < 4 => {
                draws += 1;
                vga.draw_changes(&mut frame);
            }
            _ => _ = clock.0.fetch_add(u64::from(u32::from_le_bytes(value)), Ordering::SeqCst),
        }
    }
    vga.draw(&mut frame);
});
