//! What the linear modes of DISPI look like.

use super::dispi::Geometry;
use super::memory::VideoMemory;
use super::registers::Registers;
use crate::Frame;

/// Draws a frame of the geometry's size.
pub fn draw(registers: &Registers, memory: &VideoMemory, geometry: Geometry, frame: &mut Frame) {
    let colors = registers.dac.pixels();
    let unit = if geometry.bpp == 4 { 4 } else { 1 };
    let length = match geometry.bpp {
        4 => geometry.width.div_ceil(8) * 4,
        8 => geometry.width,
        15 | 16 => geometry.width * 2,
        24 => geometry.width * 3,
        _ => geometry.width * 4,
    };
    let mut bytes = vec![0; length];
    for y in 0..geometry.height {
        memory.read(((geometry.y + y) * geometry.pitch + geometry.x) * unit, &mut bytes);
        let row = frame.row_mut(y).iter_mut();
        match geometry.bpp {
            4 => planar(registers, &bytes, &colors, row),
            8 => row.zip(&bytes).for_each(|(pixel, byte)| *pixel = colors[usize::from(*byte)]),
            15 => row.zip(bytes.as_chunks().0).for_each(|(pixel, bytes)| *pixel = from_555(u16::from_le_bytes(*bytes))),
            16 => row.zip(bytes.as_chunks().0).for_each(|(pixel, bytes)| *pixel = from_565(u16::from_le_bytes(*bytes))),
            24 => {
                row.zip(bytes.as_chunks().0).for_each(|(pixel, [b, g, r])| *pixel = u32::from_le_bytes([*b, *g, *r, 0]))
            }
            _ => {
                row.zip(bytes.as_chunks().0).for_each(|(pixel, bytes)| *pixel = u32::from_le_bytes(*bytes) & 0xff_ffff)
            }
        }
    }
}

/// Eight pixels in four bytes, a bit of each in each, through the attribute controller's palette.
fn planar<'a>(registers: &Registers, bytes: &[u8], colors: &[u32; 256], row: impl Iterator<Item = &'a mut u32>) {
    let (planes, _) = bytes.as_chunks();
    let dots = planes.iter().flat_map(|[a, b, c, d]| {
        (0..8).rev().map(move |bit| a >> bit & 1 | (b >> bit & 1) << 1 | (c >> bit & 1) << 2 | (d >> bit & 1) << 3)
    });
    row.zip(dots).for_each(|(pixel, dot)| {
        let index = registers.attribute.get(usize::from(dot)).copied().unwrap_or(0);
        *pixel = colors[usize::from(index)];
    });
}

/// The highest level of `bits` bits is the highest of eight.
fn level(value: u16, bits: u32) -> u8 {
    let value = u32::from(value) & ((1 << bits) - 1);
    (value << (8 - bits) | value >> (2 * bits - 8)) as u8
}

fn from_555(pixel: u16) -> u32 {
    u32::from_be_bytes([0, level(pixel >> 10, 5), level(pixel >> 5, 5), level(pixel, 5)])
}

fn from_565(pixel: u16) -> u32 {
    u32::from_be_bytes([0, level(pixel >> 11, 5), level(pixel >> 5, 6), level(pixel, 5)])
}
