//! What a hostile driver may do, from bytes: fuzz targets give these functions the fuzzer's, tests a generator's.

use std::time::{Duration, Instant};

use super::{Bench, NOTIFY, RAM, Ring, VERSION_1};
use chipset::pci::PciFunction;

/// Takes numbers off a slice; zeros when it has ended.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn number(&mut self, bytes: usize) -> u64 {
        (0..bytes).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }
}

/// Reads and writes everywhere in the function's configuration space and window.
pub fn registers(bench: &Bench, data: &[u8]) {
    let mut input = Input(data);
    while !input.0.is_empty() {
        let action = input.byte();
        let length = [1, 2, 4, 4][usize::from(action >> 2 & 3)];
        let value = input.number(4).to_le_bytes();
        let place = input.number(2);
        let mut answer = [0; 4];
        match action & 3 {
            0 => bench.function.read_config(place as u16 & 0xffc, &mut answer[..length]),
            1 => bench.function.write_config(place as u16 & 0xffc, &value[..length]),
            2 => bench.window.read(place & 0x7fff & !(length as u64 - 1), &mut answer[..length]),
            _ => bench.window.write(place & 0x7fff & !(length as u64 - 1), &value[..length]),
        }
    }
    bench.function.reset();
    bench.interrupts.take();
}

/// Fills rings and buffers with anything, and lets the device work on it: queue by queue, all features negotiated that
/// `features` leaves. Ends when the device has given up or taken all that it can.
pub fn queues(bench: &Bench, features: u64, queue_count: u16, data: &[u8]) {
    let mut input = Input(data);
    let offered = bench.offered();
    bench.negotiate(offered & features | VERSION_1);
    let mut rings = Vec::new();
    for index in 0..queue_count {
        let base = 0x1000 * (u64::from(index) + 1);
        rings.push(bench.enable_queue(index, 16, base, index + 1));
    }
    // Requests begin where descriptors most often point to: page 32 up.
    let buffers = input.0.len().min(0x2000);
    bench.store(0x2_0000, &input.0[..buffers]);
    bench.set_status(15);
    for ring in &mut rings {
        for index in 0..ring.size {
            let kind = input.byte();
            let mut address = 0x2_0000 + (input.number(2) & 0x1fff);
            let mut length = u32::from(input.byte()) * [1, 16, 512, 4096][usize::from(kind >> 6)];
            if kind & 0x30 == 0x30 {
                // Anywhere, of any length.
                address = input.number(8) >> (kind & 0xf);
                length = input.number(4) as u32;
            }
            ring.descriptor(bench, index, address, length, u16::from(kind & 7), input.byte().into());
        }
        let heads = 1 + input.byte() % 20;
        for _ in 0..heads {
            let head = input.byte();
            ring.offer(bench, u16::from(head & if head < 0xf0 { 0xf } else { 0xff }));
        }
        bench.window.write(NOTIFY + 4 * u64::from(ring.index), &ring.index.to_le_bytes());
    }
    // The memory is still the driver's while the device works on it.
    while !input.0.is_empty() {
        let place = [0x1000, 0x2_0000][usize::from(input.byte() & 1)] + (input.number(2) & 0x1fff);
        bench.store(place, &input.number(4).to_be_bytes()[4..]);
    }
    settle(bench, &rings);
    end(bench);
}

/// Gives the device messages with anything in them, in chains that are right: a buffer with the message and one to be
/// written. `before` is called before each.
pub fn messages(bench: &Bench, queue_count: u16, data: &[u8], before: impl Fn()) {
    let mut input = Input(data);
    let offered = bench.offered();
    bench.negotiate(offered);
    let mut rings = Vec::new();
    for index in 0..queue_count {
        rings.push(bench.enable_queue(index, 16, 0x1000 * (u64::from(index) + 1), index + 1));
    }
    bench.set_status(15);
    while !input.0.is_empty() && bench.status() & 0x40 == 0 {
        before();
        let (queue, length) = (usize::from(input.byte()), input.number(2) as usize & 0x1fff);
        let writable = [0, 1, 16, 104, 144, 1024, 0x2000, 0x10_0000][queue >> 5];
        let Some(ring) = rings.get_mut(queue & 31) else { continue };
        let (message, rest) = input.0.split_at(length.min(input.0.len()));
        input.0 = rest;
        // Each descriptor has buffers of its own, since some of them stay with the device.
        let place = 0x2_0000 + 0x2000 * u64::from(ring.next);
        bench.store(place, message);
        let parts = [(place, message.len() as u32, false), (place + 0x10_0000, writable, true)];
        let parts: Vec<_> = parts.into_iter().filter(|part| part.1 > 0).collect();
        if !parts.is_empty() {
            ring.add(bench, &parts);
            bench.kick(ring);
        }
        settle(bench, &rings);
    }
    end(bench);
}

/// What a reset must bring back, whatever was before.
fn end(bench: &Bench) {
    bench.set_status(0);
    bench.interrupts.take();
    assert_eq!(bench.status(), 0);
    // Nothing outside RAM was there to be touched; what is in it may be anything.
    assert_eq!(bench.ram.size(), RAM);
}

/// Waits until the device has given everything back, has given up, or makes no more progress.
fn settle(bench: &Bench, rings: &[Ring]) {
    let used = || rings.iter().map(|ring| bench.load16(ring.used() + 2)).collect::<Vec<_>>();
    let added: Vec<_> = rings.iter().map(|ring| ring.added).collect();
    let (mut last, mut since) = (used(), Instant::now());
    while last != added && bench.status() & 0x40 == 0 && since.elapsed() < Duration::from_millis(2) {
        std::thread::sleep(Duration::from_micros(50));
        let now = used();
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
}
