//! ZRLE: tiles of 64 by 64 pixels, each in the shortest of several forms, all in one zlib stream.

use super::palette::Palette;
use super::{Pixels, Stream, with_length};
use crate::vnc::pixel::Converter;

const TILE: usize = 64;

/// Forms of a tile; from 2 to 16 it is a packed palette of that size, from 130 to 255 runs of a palette's colours.
const RAW: u8 = 0;
const SOLID: u8 = 1;
const RUNS: u8 = 128;
const MAX_PACKED: usize = 16;
const MAX_PALETTE: usize = 127;

pub struct Zrle {
    stream: Stream,
    plain: Vec<u8>,
}

impl Zrle {
    pub fn new(level: u32) -> Self {
        Zrle { stream: Stream::new(level), plain: Vec::new() }
    }

    pub fn encode(&mut self, pixels: &Pixels, form: &Converter, out: &mut Vec<u8>) {
        self.plain.clear();
        for y in (0..pixels.height).step_by(TILE) {
            for x in (0..pixels.width).step_by(TILE) {
                let rows: Vec<&[u32]> = pixels.part(x, y, TILE, TILE).collect();
                tile(&rows, form, &mut self.plain);
            }
        }
        with_length(out, |out| self.stream.write(&self.plain, out));
    }
}

fn tile(rows: &[&[u32]], form: &Converter, out: &mut Vec<u8>) {
    let all: Vec<u32> = rows.iter().copied().flatten().copied().collect();
    let runs: Vec<(u32, usize)> =
        all.chunk_by(|a, b| a == b).filter_map(|run| Some((*run.first()?, run.len()))).collect();
    let size = form.compact_size();
    let plain_runs = runs.iter().map(|(_, length)| size + length / 255 + 1).sum::<usize>();
    let raw = all.len() * size;
    let Some(palette) = Palette::of(all.iter(), MAX_PALETTE) else {
        if plain_runs < raw {
            out.push(RUNS);
            for (color, length) in runs {
                form.put_compact(color, out);
                put_length(length, out);
            }
        } else {
            put_raw(&all, form, out);
        }
        return;
    };
    if let &[color] = palette.colors.as_slice() {
        out.push(SOLID);
        return form.put_compact(color, out);
    }
    let count = palette.colors.len();
    let palette_runs =
        count * size + runs.iter().map(|(_, length)| if *length == 1 { 1 } else { 2 + length / 255 }).sum::<usize>();
    let bits = match count {
        0..=2 => 1,
        3..=4 => 2,
        _ => 4,
    };
    let packed = count * size + rows.iter().map(|row| (row.len() * bits).div_ceil(8)).sum::<usize>();
    if count <= MAX_PACKED && packed <= palette_runs {
        out.push(count as u8);
        palette.colors.iter().for_each(|color| form.put_compact(*color, out));
        for row in rows {
            for pixels in row.chunks(8 / bits) {
                let byte = pixels.iter().fold(0, |byte, pixel| byte << bits | palette.index(*pixel));
                out.push(byte << (bits * (8 / bits - pixels.len())));
            }
        }
    } else if palette_runs < raw {
        out.push(RUNS + count as u8);
        palette.colors.iter().for_each(|color| form.put_compact(*color, out));
        for (color, length) in runs {
            if length == 1 {
                out.push(palette.index(color));
            } else {
                out.push(palette.index(color) | 0x80);
                put_length(length, out);
            }
        }
    } else {
        put_raw(&all, form, out);
    }
}

fn put_raw(pixels: &[u32], form: &Converter, out: &mut Vec<u8>) {
    out.push(RAW);
    pixels.iter().for_each(|pixel| form.put_compact(*pixel, out));
}

/// A run's length less 1, in bytes that add up, the last of which is below 255.
fn put_length(length: usize, out: &mut Vec<u8>) {
    let rest = length - 1;
    out.extend(std::iter::repeat_n(255, rest / 255));
    out.push((rest % 255) as u8);
}
