//! The pair of 8237 DMA controllers of a PC: channels 0 to 3 move bytes, 5 to 7 move words, each within a page of memory
//! that a register of its own selects (Intel 8237A datasheet; ICH9 datasheet, 13.2).
//!
//! A device asks for nothing here that moves by itself: it calls [`Dma::write_memory`] or [`Dma::read_memory`] when it
//! would have raised DREQ, and is told how far its channel lets it go.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memory::View;
use memory::vm_memory::{Bytes, GuestAddress};

use crate::Device;

/// Device offsets: the first controller, the second (whose registers are two ports apart), the page registers.
pub const FIRST: u64 = 0x00;
pub const SECOND: u64 = 0x10;
pub const PAGES: u64 = 0x30;

/// Mode register: what a channel does with memory.
const MODE_SHIFT: u8 = 2;
const VERIFY: u8 = 0;
const WRITE: u8 = 1;
const READ: u8 = 2;
const AUTO_INITIALIZE: u8 = 1 << 4;
const DOWN: u8 = 1 << 5;
const CASCADE: u8 = 3 << 6;
/// Command register: the controller is off.
const DISABLED: u8 = 1 << 2;
/// The page register of each channel; the others are storage.
const PAGE_OF_CHANNEL: [usize; 8] = [7, 3, 1, 2, 15, 11, 9, 10];

#[derive(Clone, Copy, Default)]
struct Channel {
    base_address: u16,
    base_count: u16,
    address: u16,
    count: u16,
    mode: u8,
}

#[derive(Clone, Copy)]
struct Controller {
    channels: [Channel; 4],
    command: u8,
    /// A bit for each channel that has come to its end, until the register is read.
    ended: u8,
    requests: u8,
    mask: u8,
    /// The next byte of an address or count is the high one.
    high: bool,
}

impl Controller {
    /// After power-on and master clear, all channels are masked.
    const fn new() -> Self {
        let channel = Channel { base_address: 0, base_count: 0, address: 0, count: 0, mode: 0 };
        Controller { channels: [channel; 4], command: 0, ended: 0, requests: 0, mask: 15, high: false }
    }

    fn read(&mut self, register: u64) -> u8 {
        match register {
            0..8 => {
                let Some(channel) = self.channels.get(register as usize / 2) else { return 0xff };
                let value = if register & 1 == 0 { channel.address } else { channel.count };
                let [low, high] = value.to_le_bytes();
                let second = self.high;
                self.high = !second;
                if second { high } else { low }
            }
            8 => std::mem::take(&mut self.ended) | self.requests << 4,
            15 => self.mask | 0xf0,
            _ => 0,
        }
    }

    fn write(&mut self, register: u64, value: u8) {
        let selected = usize::from(value & 3);
        match register {
            0..8 => {
                let second = self.high;
                self.high = !second;
                let Some(channel) = self.channels.get_mut(register as usize / 2) else { return };
                let place = if register & 1 == 0 { &mut channel.base_address } else { &mut channel.base_count };
                let [low, high] = place.to_le_bytes();
                *place = u16::from_le_bytes(if second { [low, value] } else { [value, high] });
                // Base and current are written together.
                if register & 1 == 0 {
                    channel.address = channel.base_address;
                } else {
                    channel.count = channel.base_count;
                }
            }
            8 => self.command = value,
            9 => self.requests = self.requests & !(1 << selected) | (value >> 2 & 1) << selected,
            10 => self.mask = self.mask & !(1 << selected) | (value >> 2 & 1) << selected,
            11 => {
                if let Some(channel) = self.channels.get_mut(selected) {
                    channel.mode = value;
                }
            }
            12 => self.high = false,
            13 => *self = Controller { channels: self.channels, ..Controller::new() },
            14 => self.mask = 0,
            _ => self.mask = value & 15,
        }
    }
}

struct State {
    controllers: [Controller; 2],
    pages: [u8; 16],
}

/// How far a channel let its device go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Bytes.
    pub length: usize,
    /// The count has come to its end (TC).
    pub ended: bool,
}

/// Both controllers and the page registers.
pub struct Dma {
    state: Mutex<State>,
    memory: View,
}

impl Dma {
    pub fn new(memory: View) -> Arc<Self> {
        let state = State { controllers: [Controller::new(); 2], pages: [0; 16] };
        Arc::new(Dma { state: Mutex::new(state), memory })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves bytes of a device to memory. `None`: the channel is not ready for that now, the device has to wait.
    pub fn write_memory(&self, channel: usize, data: &[u8]) -> Option<Moved> {
        self.transfer(channel, WRITE, data.len(), |address, at, length| {
            if let Some(part) = data.get(at..at + length) {
                // What is not memory swallows what is written to it.
                let _ = self.memory.write_slice(part, GuestAddress(address));
            }
        })
    }

    /// Moves bytes of memory to a device. `None`: the channel is not ready for that now, the device has to wait.
    pub fn read_memory(&self, channel: usize, data: &mut [u8]) -> Option<Moved> {
        let total = data.len();
        self.transfer(channel, READ, total, |address, at, length| {
            if let Some(part) = data.get_mut(at..at + length)
                && self.memory.read_slice(part, GuestAddress(address)).is_err()
            {
                part.fill(0xff);
            }
        })
    }

    fn transfer(
        &self,
        channel: usize,
        direction: u8,
        length: usize,
        mut move_bytes: impl FnMut(u64, usize, usize),
    ) -> Option<Moved> {
        let mut state = self.lock();
        let page = PAGE_OF_CHANNEL.get(channel).and_then(|page| state.pages.get(*page)).copied()?;
        let words = channel >= 4;
        let controller = state.controllers.get_mut(channel / 4)?;
        let bit = 1u8 << (channel % 4);
        let mode = controller.channels.get(channel % 4)?.mode;
        let does = mode >> MODE_SHIFT & 3;
        let ready = controller.command & DISABLED == 0 && controller.mask & bit == 0 && mode & CASCADE != CASCADE;
        if !ready || does != direction && does != VERIFY {
            return None;
        }
        let unit = if words { 2 } else { 1 };
        let current = controller.channels.get_mut(channel % 4)?;
        let mut moved = Moved::default();
        while moved.length + unit <= length && !moved.ended {
            // All that lies before the end of the count, of the data and of the page, in one go.
            let left = usize::from(current.count) + 1;
            let wanted = (length - moved.length) / unit;
            let down = mode & DOWN != 0;
            let room = if down { 1 } else { 0x1_0000 - usize::from(current.address) };
            let count = left.min(wanted).min(room);
            let address = if words {
                u64::from(page & 0xfe) << 16 | u64::from(current.address) << 1
            } else {
                u64::from(page) << 16 | u64::from(current.address)
            };
            if does != VERIFY {
                move_bytes(address, moved.length, count * unit);
            }
            moved.length += count * unit;
            let step = count as u16;
            current.address =
                if down { current.address.wrapping_sub(step) } else { current.address.wrapping_add(step) };
            moved.ended = count == left;
            current.count = current.count.wrapping_sub(step);
        }
        if moved.ended {
            controller.ended |= bit;
            if mode & AUTO_INITIALIZE != 0 {
                (current.address, current.count) = (current.base_address, current.base_count);
            } else {
                controller.mask |= bit;
            }
        }
        Some(moved)
    }
}

impl Device for Dma {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        let [first, second] = &mut state.controllers;
        let value = match offset {
            FIRST..SECOND => first.read(offset),
            SECOND..PAGES => second.read((offset - SECOND) / 2),
            _ => state.pages.get((offset - PAGES) as usize).copied().unwrap_or(0xff),
        };
        data.fill(value);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let mut state = self.lock();
        let [first, second] = &mut state.controllers;
        match offset {
            FIRST..SECOND => first.write(offset, value),
            SECOND..PAGES => second.write((offset - SECOND) / 2, value),
            _ => {
                if let Some(page) = state.pages.get_mut((offset - PAGES) as usize) {
                    *page = value;
                }
            }
        }
    }

    fn reset(&self) {
        *self.lock() = State { controllers: [Controller::new(); 2], pages: [0; 16] };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{poke, read8, write8};
    use memory::Ram;

    fn bench() -> (Ram, Arc<Dma>) {
        let ram = Ram::new(16 << 20).unwrap();
        let dma = Dma::new(ram.view().clone());
        (ram, dma)
    }

    /// Channel 2 for `count` bytes from `address` on.
    fn program(dma: &Dma, mode: u8, address: u32, count: u16) {
        let [a0, a1, page, _] = address.to_le_bytes();
        let [c0, c1] = (count - 1).to_le_bytes();
        let writes = [(12, 0), (11, mode | 2), (4, a0), (4, a1), (5, c0), (5, c1), (PAGES + 1, page), (10, 2)];
        writes.into_iter().for_each(|(offset, value)| write8(dma, offset, value));
    }

    fn memory(ram: &Ram, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        ram.view().read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    #[test]
    fn a_transfer_ends_with_the_count_and_masks_its_channel() {
        let (ram, dma) = bench();
        program(&dma, 0x44, 0x12_3456, 600);
        assert_eq!(dma.write_memory(2, &[1; 512]), Some(Moved { length: 512, ended: false }));
        assert_eq!(dma.write_memory(2, &[2; 512]), Some(Moved { length: 88, ended: true }));
        assert_eq!(dma.write_memory(2, &[3; 512]), None);
        assert_eq!(memory(&ram, 0x12_3456, 601), [vec![1; 512], vec![2; 88], vec![0]].concat());
        assert_eq!((read8(&*dma, 8), read8(&*dma, 8)), (4, 0));
    }

    #[test]
    fn addresses_wrap_within_their_page() {
        let (ram, dma) = bench();
        program(&dma, 0x44, 0x3_fffe, 4);
        dma.write_memory(2, &[1, 2, 3, 4]);
        assert_eq!((memory(&ram, 0x3_fffe, 2), memory(&ram, 0x3_0000, 2)), (vec![1, 2], vec![3, 4]));
    }

    #[test]
    fn a_channel_that_starts_over_goes_on() {
        let (_ram, dma) = bench();
        program(&dma, 0x58, 0x1_0000, 8);
        let mut data = [0; 20];
        assert_eq!(dma.read_memory(2, &mut data), Some(Moved { length: 8, ended: true }));
        assert_eq!(dma.read_memory(2, &mut data), Some(Moved { length: 8, ended: true }));
        assert_eq!(dma.write_memory(2, &data), None, "the other direction");
    }

    #[test]
    fn the_second_controller_moves_words() {
        let (ram, dma) = bench();
        // Channel 5: words from 0x20100 * 2... its address register counts words.
        for (register, value) in [(12, 0), (11, 0x45), (2, 0x80), (2, 0x00), (3, 1), (3, 0), (10, 1)] {
            write8(&*dma, SECOND + 2 * register, value);
        }
        write8(&*dma, PAGES + 11, 0x03);
        assert_eq!(dma.write_memory(5, &[1, 2, 3, 4, 5, 6]), Some(Moved { length: 4, ended: true }));
        assert_eq!(memory(&ram, 0x2_0100, 5), [1, 2, 3, 4, 0]);
    }

    #[test]
    fn random_accesses_do_no_harm() {
        let (_ram, dma) = bench();
        poke(&*dma, 0x40, 100_000, |random| {
            let mut data = [0; 300];
            let channel = random.below(9) as usize;
            let length = random.below(300) as usize;
            dma.write_memory(channel, &data[..length]);
            dma.read_memory(channel, &mut data[..length]);
        });
    }
}
