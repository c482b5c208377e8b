//! The way from the CPU to the four planes: the graphics controller and the sequencer's part in it.
//!
//! One byte of the CPU meets 32 bits of video memory, one byte from each plane at the same address. What is read stays
//! in the latches; what is written is made of the CPU's byte, the latches and the settings (IBM VGA technical
//! reference, "Graphics Controller").

use super::memory::{LEGACY_SIZE, VideoMemory};
use super::registers::Registers;

/// Graphics controller registers.
const SET_RESET: usize = 0;
const ENABLE_SET_RESET: usize = 1;
const COLOR_COMPARE: usize = 2;
const ROTATE: usize = 3;
const READ_MAP: usize = 4;
const MODE: usize = 5;
const MISCELLANEOUS: usize = 6;
const COLOR_CARE: usize = 7;
const BIT_MASK: usize = 8;
const READ_COMPARE: u8 = 1 << 3;
const READ_ODD_EVEN: u8 = 1 << 4;

/// Sequencer registers.
const MAP_MASK: usize = 2;
const MEMORY_MODE: usize = 4;
const NOT_ODD_EVEN: u8 = 1 << 2;
const CHAIN_4: u8 = 1 << 3;

/// What the window from 0xa0000 to 0xbffff has of the adapter.
struct Place {
    /// The planes' address.
    dword: usize,
    /// The planes that the address reaches, a bit each.
    planes: u8,
}

/// Four bytes that are all `value`.
fn everywhere(value: u8) -> u32 {
    u32::from(value) * 0x0101_0101
}

/// All ones in the bytes of the planes whose bits are set.
fn planes(bits: u8) -> u32 {
    (0..4).filter(|plane| bits >> plane & 1 != 0).map(|plane| 0xff << (8 * plane)).sum()
}

/// The offset from where the window begins now, if the address (an offset from 0xa0000) is in it.
fn in_window(registers: &Registers, address: usize) -> Option<usize> {
    let (first, length) = match registers.graphics[MISCELLANEOUS] >> 2 & 3 {
        0 => (0, 0x2_0000),
        1 => (0, 0x1_0000),
        2 => (0x1_0000, 0x8000),
        _ => (0x1_8000, 0x8000),
    };
    let offset = address.checked_sub(first).filter(|offset| *offset < length)?;
    registers.memory_enabled().then_some(offset)
}

/// Where an offset in the window leads. `odd_even`: the lowest bit chooses between even and odd planes.
fn place(registers: &Registers, offset: usize, odd_even: bool) -> Place {
    let dispi = registers.dispi.enabled();
    let offset = offset.wrapping_add(registers.dispi.bank_offset());
    if registers.sequencer[MEMORY_MODE] & CHAIN_4 != 0 {
        // A linear mode has its pixels one after the other; the VGA leaves the lowest address bits at 0.
        let dword = if dispi { offset >> 2 } else { offset & !3 };
        return wrapped(registers, dword, 1 << (offset & 3));
    }
    if odd_even {
        // With 128 KiB, the highest bit takes the place of the lowest.
        let dword = offset & !1 | if offset > 0xffff && !dispi { 1 } else { 0 };
        return wrapped(registers, dword, 0b0101 << (offset & 1));
    }
    wrapped(registers, offset, 0xf)
}

/// Without a linear mode there are 64 KiB in each plane.
fn wrapped(registers: &Registers, dword: usize, planes: u8) -> Place {
    let dword = if registers.dispi.enabled() { dword } else { dword & (LEGACY_SIZE / 4 - 1) };
    Place { dword, planes }
}

pub fn read(registers: &mut Registers, memory: &VideoMemory, address: usize) -> u8 {
    let Some(offset) = in_window(registers, address) else { return 0xff };
    let odd_even = registers.graphics[MODE] & READ_ODD_EVEN != 0;
    let chained = registers.sequencer[MEMORY_MODE] & CHAIN_4 != 0;
    let place = place(registers, offset, odd_even);
    let latches = memory.load(place.dword);
    registers.latches = latches;
    let graphics = &registers.graphics;
    if graphics[MODE] & READ_COMPARE != 0 {
        let differs = (latches ^ planes(graphics[COLOR_COMPARE])) & planes(graphics[COLOR_CARE]);
        let [a, b, c, d] = differs.to_le_bytes();
        return !(a | b | c | d);
    }
    let plane = match (chained, odd_even) {
        (true, _) => offset & 3,
        (false, true) => usize::from(graphics[READ_MAP] & 2) | offset & 1,
        (false, false) => usize::from(graphics[READ_MAP] & 3),
    };
    latches.to_le_bytes().get(plane).copied().unwrap_or(0xff)
}

pub fn write(registers: &Registers, memory: &VideoMemory, address: usize, value: u8) {
    let Some(offset) = in_window(registers, address) else { return };
    let place = place(registers, offset, registers.sequencer[MEMORY_MODE] & NOT_ODD_EVEN == 0);
    // In a linear mode, pixels are bytes and not planes: settings left over from other modes don't count.
    let linear = registers.dispi.enabled() && registers.sequencer[MEMORY_MODE] & CHAIN_4 != 0;
    let mask = if linear { 0xf } else { registers.sequencer[MAP_MASK] };
    let written = planes(place.planes & mask);
    if written == 0 {
        return;
    }
    let data = if linear { everywhere(value) } else { combine(registers, value) };
    let before = if written == u32::MAX { 0 } else { memory.load(place.dword) };
    memory.store(place.dword, before & !written | data & written);
}

/// What the four write modes make of the CPU's byte.
fn combine(registers: &Registers, value: u8) -> u32 {
    let graphics = &registers.graphics;
    let rotated = value.rotate_right(u32::from(graphics[ROTATE] & 7));
    let set_reset = planes(graphics[SET_RESET]);
    let latches = registers.latches;
    let (data, mask) = match graphics[MODE] & 3 {
        0 => {
            let fixed = planes(graphics[ENABLE_SET_RESET]);
            (everywhere(rotated) & !fixed | set_reset & fixed, graphics[BIT_MASK])
        }
        1 => return latches,
        2 => (planes(value), graphics[BIT_MASK]),
        _ => (set_reset, graphics[BIT_MASK] & rotated),
    };
    let data = match graphics[ROTATE] >> 3 & 3 {
        0 => data,
        1 => data & latches,
        2 => data | latches,
        _ => data ^ latches,
    };
    let mask = everywhere(mask);
    data & mask | latches & !mask
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::Ram;

    struct Bench {
        registers: Registers,
        memory: VideoMemory,
    }

    impl Bench {
        /// Graphics at 0xa0000, all planes written, nothing combined.
        fn new() -> Self {
            let mut registers = Registers::new();
            registers.write(0x12, 0x63);
            registers.sequencer[MAP_MASK] = 0xf;
            registers.sequencer[MEMORY_MODE] = 0x06;
            registers.graphics[MISCELLANEOUS] = 0x05;
            registers.graphics[COLOR_CARE] = 0xf;
            registers.graphics[BIT_MASK] = 0xff;
            Bench { registers, memory: VideoMemory::new(&Ram::new(4 << 20).unwrap()).unwrap() }
        }

        fn write(&self, address: usize, value: u8) {
            write(&self.registers, &self.memory, address, value);
        }

        fn read(&mut self, address: usize) -> u8 {
            read(&mut self.registers, &self.memory, address)
        }
    }

    #[test]
    fn the_map_mask_chooses_what_is_written_and_the_read_map_what_is_read() {
        let mut bench = Bench::new();
        for plane in 0..4 {
            bench.registers.sequencer[MAP_MASK] = 1 << plane;
            bench.write(0x1234, 0x10 + plane);
        }
        assert_eq!(bench.memory.load(0x1234), 0x1312_1110);
        for plane in 0..4 {
            bench.registers.graphics[READ_MAP] = plane;
            assert_eq!(bench.read(0x1234), 0x10 + plane);
        }
    }

    #[test]
    fn write_mode_0_rotates_sets_and_combines_under_the_bit_mask() {
        let mut bench = Bench::new();
        bench.memory.store(0, 0xf0f0_f0f0);
        bench.read(0);
        bench.registers.graphics[ENABLE_SET_RESET] = 0b0011;
        bench.registers.graphics[SET_RESET] = 0b0001;
        bench.registers.graphics[ROTATE] = 4;
        bench.registers.graphics[BIT_MASK] = 0x3c;
        bench.write(0, 0xa5);
        // Planes 0 and 1 get set and reset, 2 and 3 the byte 0x5a; outside the mask, the latches.
        assert_eq!(bench.memory.load(0), 0xd8d8_c0fc);
        for (function, expected) in [(1u8, 0x10), (2, 0xfa), (3, 0xea)] {
            let mut bench = Bench::new();
            bench.memory.store(0, everywhere(0xf0));
            bench.read(0);
            bench.registers.graphics[ROTATE] = function << 3;
            bench.write(0, 0x1a);
            assert_eq!(bench.memory.load(0), everywhere(expected), "{function}");
        }
    }

    #[test]
    fn write_mode_1_copies_the_latches() {
        let mut bench = Bench::new();
        bench.memory.store(7, 0x0403_0201);
        bench.read(7);
        bench.registers.graphics[MODE] = 1;
        bench.write(9, 0xff);
        assert_eq!(bench.memory.load(9), 0x0403_0201);
    }

    #[test]
    fn write_mode_2_spreads_a_color_over_the_planes() {
        let mut bench = Bench::new();
        bench.registers.graphics[MODE] = 2;
        bench.registers.graphics[BIT_MASK] = 0x0f;
        bench.write(0, 0b1010);
        assert_eq!(bench.memory.load(0), 0x0f00_0f00);
    }

    #[test]
    fn write_mode_3_masks_set_and_reset_with_the_byte() {
        let mut bench = Bench::new();
        bench.memory.store(0, everywhere(0x55));
        bench.read(0);
        bench.registers.graphics[MODE] = 3;
        bench.registers.graphics[SET_RESET] = 0b0101;
        bench.registers.graphics[ROTATE] = 1;
        bench.registers.graphics[BIT_MASK] = 0xf0;
        bench.write(0, 0x81);
        // 0x81 rotated is 0xc0: two bits of each plane change.
        assert_eq!(bench.memory.load(0), 0x15d5_15d5);
    }

    #[test]
    fn read_mode_1_finds_the_pixels_of_a_color() {
        let mut bench = Bench::new();
        bench.memory.store(0, 0x0000_f0cc);
        bench.registers.graphics[MODE] = READ_COMPARE;
        bench.registers.graphics[COLOR_COMPARE] = 0b0011;
        assert_eq!(bench.read(0), 0xc0);
        bench.registers.graphics[COLOR_CARE] = 0b0001;
        assert_eq!(bench.read(0), 0xcc);
        bench.registers.graphics[COLOR_CARE] = 0;
        assert_eq!(bench.read(0), 0xff);
    }

    #[test]
    fn odd_and_even_addresses_are_characters_and_attributes() {
        let mut bench = Bench::new();
        bench.registers.sequencer[MEMORY_MODE] = 0x02;
        bench.registers.sequencer[MAP_MASK] = 0x3;
        bench.registers.graphics[MODE] = READ_ODD_EVEN;
        bench.registers.graphics[MISCELLANEOUS] = 0x0e;
        for (address, value) in [(0x1_8000, b'H'), (0x1_8001, 0x1f), (0x1_8002, b'i'), (0x1_8003, 0x2e)] {
            bench.write(address, value);
            assert_eq!(bench.read(address), value);
        }
        assert_eq!((bench.memory.load(0), bench.memory.load(2)), (0x1f48, 0x2e69));
        assert_eq!(bench.read(0x1_7fff), 0xff, "outside of the window");
        bench.write(0, 1);
        assert_eq!(bench.memory.load(0), 0x1f48);
    }

    #[test]
    fn chain_4_spreads_bytes_over_the_planes() {
        let mut bench = Bench::new();
        bench.registers.sequencer[MEMORY_MODE] = 0x0e;
        for (offset, value) in [10, 11, 12, 13, 14].into_iter().enumerate() {
            bench.write(offset, value);
            assert_eq!(bench.read(offset), value);
        }
        assert_eq!((bench.memory.load(0), bench.memory.load(4)), (0x0d0c_0b0a, 14));
    }

    #[test]
    fn memory_that_is_off_does_not_answer() {
        let mut bench = Bench::new();
        bench.registers.write(0x12, 0x61);
        bench.write(0, 1);
        assert_eq!((bench.read(0), bench.memory.load(0)), (0xff, 0));
    }
}
