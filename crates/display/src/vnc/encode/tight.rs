//! Tight: a rectangle of one colour, of a palette's, or of any, in one of several zlib streams.

use super::palette::Palette;
use super::{Pixels, Stream};
use crate::vnc::pixel::Converter;

/// What a rectangle's first byte says: it is of one colour; or its stream (bits 4 and 5), and that a filter is named.
const FILL: u8 = 0x80;
const FILTER: u8 = 0x40;
const PALETTE_FILTER: u8 = 1;
/// Streams: pictures; two colours; palettes.
const FULL: usize = 0;
const MONO: usize = 1;
const INDEXED: usize = 2;

/// Shorter data goes uncompressed and without its length.
const MIN_COMPRESSED: usize = 12;
const MAX_COLORS: usize = 256;

#[derive(Default)]
pub struct Tight {
    streams: [Option<Stream>; 3],
    plain: Vec<u8>,
    packed: Vec<u8>,
}

impl Tight {
    pub fn encode(&mut self, pixels: &Pixels, level: u32, form: &Converter, out: &mut Vec<u8>) {
        self.plain.clear();
        let palette = Palette::of(pixels.pixels.iter(), MAX_COLORS);
        let stream = match palette.as_ref().map(|palette| palette.colors.as_slice()) {
            Some(&[color]) => {
                out.push(FILL);
                return form.put_tight(color, out);
            }
            Some(&[zero, one]) => {
                put_palette(MONO, &[zero, one], form, out);
                for row in pixels.part(0, 0, pixels.width, pixels.height) {
                    self.plain.extend(row.chunks(8).map(|dots| {
                        let bits = dots.iter().fold(0, |bits, dot| bits << 1 | u8::from(*dot == one));
                        bits << (8 - dots.len())
                    }));
                }
                MONO
            }
            // A palette that takes more room than it saves is none.
            Some(colors) if colors.len() * 4 <= pixels.pixels.len() => {
                put_palette(INDEXED, colors, form, out);
                let palette = palette.as_ref();
                self.plain.extend(pixels.pixels.iter().map(|dot| palette.map_or(0, |palette| palette.index(*dot))));
                INDEXED
            }
            _ => {
                out.push((FULL << 4) as u8);
                pixels.pixels.iter().for_each(|pixel| form.put_tight(*pixel, &mut self.plain));
                FULL
            }
        };
        if self.plain.len() < MIN_COMPRESSED {
            return out.extend(&self.plain);
        }
        let Some(stream) = self.streams.get_mut(stream) else { return };
        self.packed.clear();
        stream.get_or_insert_with(|| Stream::new(level)).write(&self.plain, &mut self.packed);
        put_length(self.packed.len(), out);
        out.extend(&self.packed);
    }
}

fn put_palette(stream: usize, colors: &[u32], form: &Converter, out: &mut Vec<u8>) {
    out.extend([(stream << 4) as u8 | FILTER, PALETTE_FILTER, (colors.len() - 1) as u8]);
    colors.iter().for_each(|color| form.put_tight(*color, out));
}

/// One to three bytes, of 7, 7 and 8 bits, the lowest first. A piece of 65536 pixels never needs more.
fn put_length(length: usize, out: &mut Vec<u8>) {
    match length {
        0..0x80 => out.push(length as u8),
        0x80..0x4000 => out.extend([length as u8 | 0x80, (length >> 7) as u8]),
        _ => out.extend([length as u8 | 0x80, (length >> 7) as u8 | 0x80, (length >> 14) as u8]),
    }
}
