//! Operand values: the edges of every number format, mixed with random ones.

use crate::rng::Rng;

/// Integers at the edges of 8 to 64 bits.
const EDGES: [u64; 24] = [
    0,
    1,
    2,
    3,
    7,
    8,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0x8000,
    0xffff,
    0x10000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_ffff,
    0xffff_ffff_ffff_fffe,
    0x5555_5555_5555_5555,
    0xaaaa_aaaa_aaaa_aaaa,
];

const HALVES: [u16; 16] = [
    0, 0x8000, 0x3c00, 0xbc00, 0x7c00, 0xfc00, 0x7e00, 0xfe01, 0x7c01, 0x0001, 0x83ff, 0x0400, 0x7bff, 0xfbff, 0x3555,
    0x5640,
];

const SINGLES: [u32; 22] = [
    0,
    0x8000_0000,
    0x3f80_0000,
    0xbf80_0000,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0xffc0_1234,
    0x7f80_0001,
    0xff81_0000,
    0x0000_0001,
    0x807f_ffff,
    0x0080_0000,
    0x7f7f_ffff,
    0xff7f_ffff,
    0x4f00_0000,
    0xcf00_0000,
    0x5f00_0000,
    0x3f00_0000,
    0x4b00_0001,
    0x3f80_0001,
    0x4049_0fdb,
];

const DOUBLES: [u64; 22] = [
    0,
    0x8000_0000_0000_0000,
    0x3ff0_0000_0000_0000,
    0xbff0_0000_0000_0000,
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0xfff8_0000_0001_2345,
    0x7ff0_0000_0000_0001,
    0xfff4_0000_0000_0000,
    1,
    0x800f_ffff_ffff_ffff,
    0x0010_0000_0000_0000,
    0x7fef_ffff_ffff_ffff,
    0xffef_ffff_ffff_ffff,
    0x41e0_0000_0000_0000,
    0xc1e0_0000_0000_0000,
    0x43e0_0000_0000_0000,
    0x3fe0_0000_0000_0000,
    0x3810_0000_0000_0000,
    0x47ef_ffff_e000_0001,
    0x4009_21fb_5444_2d18,
];

/// Sign and exponent, significand.
const EXTENDED: [(u16, u64); 18] = [
    (0, 0),
    (0x8000, 0),
    (0x3fff, 0x8000_0000_0000_0000),
    (0xbfff, 0x8000_0000_0000_0000),
    (0x7fff, 0x8000_0000_0000_0000),
    (0xffff, 0x8000_0000_0000_0000),
    (0x7fff, 0xc000_0000_0000_0000),
    (0x7fff, 0x8000_0000_0000_0001),
    (0, 1),
    (0, 0x8000_0000_0000_0000),
    (1, 0x8000_0000_0000_0000),
    (0x7ffe, 0xffff_ffff_ffff_ffff),
    // Encodings that only the 8087 made: unnormal, pseudo-infinity.
    (0x3fff, 0x4000_0000_0000_0000),
    (0x7fff, 0),
    (0x403e, 0x8000_0000_0000_0000),
    (0xc03d, 0xffff_ffff_ffff_ffff),
    (0x4000, 0xc90f_daa2_2168_c235),
    (0x3ffe, 0x8000_0000_0000_0000),
];

/// A 64-bit integer.
pub fn integer(rng: &mut Rng) -> u64 {
    match rng.below(8) {
        0..4 => rng.pick(&EDGES),
        4 => 1 << rng.below(64),
        5 => rng.next_u64() >> rng.below(64),
        6 => (rng.next_u64() as i64 >> rng.below(64)) as u64,
        _ => rng.next_u64(),
    }
}

fn half(rng: &mut Rng) -> u16 {
    if rng.one_in(2) { rng.pick(&HALVES) } else { rng.next_u64() as u16 }
}

fn single(rng: &mut Rng) -> u32 {
    match rng.below(4) {
        0 | 1 => rng.pick(&SINGLES),
        2 => (rng.range(-2000, 2000) as f32 / 8.0).to_bits(),
        _ => rng.next_u64() as u32,
    }
}

fn double(rng: &mut Rng) -> u64 {
    match rng.below(4) {
        0 | 1 => rng.pick(&DOUBLES),
        2 => (rng.range(-200_000, 200_000) as f64 / 64.0).to_bits(),
        _ => rng.next_u64(),
    }
}

/// An x87 register's ten bytes.
pub fn extended(rng: &mut Rng) -> [u8; 10] {
    let (exponent, significand) = match rng.below(4) {
        0 | 1 => rng.pick(&EXTENDED),
        2 => ((0x3fff + rng.range(-70, 70)) as u16 | (rng.next_u64() as u16 & 0x8000), rng.next_u64() | 1 << 63),
        _ => (rng.next_u64() as u16, rng.next_u64()),
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&significand.to_le_bytes());
    bytes[8..].copy_from_slice(&exponent.to_le_bytes());
    bytes
}

/// Fills `bytes` with elements of one randomly chosen type.
pub fn fill_vector(rng: &mut Rng, bytes: &mut [u8]) {
    match rng.below(10) {
        0 => bytes.fill(rng.pick(&[0, 0xff, 0x80, 0x7f, 1])),
        1 => bytes.iter_mut().for_each(|b| *b = rng.next_u64() as u8),
        2 => each(bytes, || (integer(rng) as u8).to_le_bytes()),
        3 => each(bytes, || (integer(rng) as u16).to_le_bytes()),
        4 => each(bytes, || (integer(rng) as u32).to_le_bytes()),
        5 => each(bytes, || integer(rng).to_le_bytes()),
        6 => each(bytes, || half(rng).to_le_bytes()),
        7 => each(bytes, || single(rng).to_le_bytes()),
        8 => each(bytes, || double(rng).to_le_bytes()),
        _ => each(bytes, || extended(rng)),
    }
}

/// Fills `bytes` with small signed elements of `size` bytes: what indices of gathers and scatters are.
pub fn fill_indices(rng: &mut Rng, bytes: &mut [u8], size: usize, limit: i64) {
    for chunk in bytes.chunks_mut(size) {
        let value = if rng.one_in(64) { integer(rng) } else { rng.range(-limit, limit) as u64 };
        chunk.copy_from_slice(&value.to_le_bytes()[..chunk.len()]);
    }
}

fn each<const N: usize>(bytes: &mut [u8], mut next: impl FnMut() -> [u8; N]) {
    for chunk in bytes.chunks_mut(N) {
        chunk.copy_from_slice(&next()[..chunk.len()]);
    }
}
