//! Hextile: tiles of 16 by 16 pixels, each raw, or of a background with runs of a few other colours in it.

use super::Pixels;
use super::palette::Palette;
use crate::vnc::pixel::Converter;

const TILE: usize = 16;

/// What a tile's first byte says.
const RAW: u8 = 1 << 0;
const BACKGROUND: u8 = 1 << 1;
const FOREGROUND: u8 = 1 << 2;
const SUBRECTS: u8 = 1 << 3;
const COLORED: u8 = 1 << 4;

pub fn encode(pixels: &Pixels, form: &Converter, out: &mut Vec<u8>) {
    for y in (0..pixels.height).step_by(TILE) {
        for x in (0..pixels.width).step_by(TILE) {
            let rows: Vec<&[u32]> = pixels.part(x, y, TILE, TILE).collect();
            tile(&rows, form, out);
        }
    }
}

fn tile(rows: &[&[u32]], form: &Converter, out: &mut Vec<u8>) {
    let all = || rows.iter().copied().flatten();
    let size = usize::from(form.format.bits_per_pixel) / 8;
    let raw_size = all().count() * size;
    let palette = Palette::of(all(), 8);
    let start = out.len();
    match palette.as_ref().map(|palette| palette.colors.as_slice()) {
        Some(&[background]) => {
            out.push(BACKGROUND);
            form.put(background, out);
        }
        Some(&[background, foreground]) => {
            out.push(BACKGROUND | FOREGROUND | SUBRECTS);
            form.put(background, out);
            form.put(foreground, out);
            runs(rows, background, out, |_, _| {});
        }
        Some(&[background, ..]) => {
            out.push(BACKGROUND | SUBRECTS | COLORED);
            form.put(background, out);
            runs(rows, background, out, |color, out| form.put(color, out));
        }
        _ => {}
    }
    if out.len() == start || out.len() - start > raw_size {
        out.truncate(start);
        out.push(RAW);
        all().for_each(|pixel| form.put(*pixel, out));
    }
}

/// The runs of all colours but the background's. At most half of 256 pixels begin one in a tile of two colours, and all
/// but one in others, for which there is the raw form.
fn runs(rows: &[&[u32]], background: u32, out: &mut Vec<u8>, color: impl Fn(u32, &mut Vec<u8>)) {
    let count_at = out.len();
    out.push(0);
    let mut count = 0u8;
    for (y, row) in rows.iter().enumerate() {
        let mut x = 0;
        for run in row.chunk_by(|a, b| a == b) {
            if let Some(&pixel) = run.first().filter(|pixel| **pixel != background) {
                color(pixel, out);
                out.extend([(x << 4 | y) as u8, ((run.len() - 1) << 4) as u8]);
                count = count.saturating_add(1);
            }
            x += run.len();
        }
    }
    if let Some(place) = out.get_mut(count_at) {
        *place = count;
    }
}
