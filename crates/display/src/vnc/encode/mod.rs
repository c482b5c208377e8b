//! From pixels to the bytes of an update: one module for each encoding (RFC 6143, 7.7, and the community's protocol
//! document for Tight).

mod hextile;
mod palette;
mod tight;
mod zrle;

use flate2::{Compress, Compression, FlushCompress};

use super::pixel::Converter;
use super::protocol::Rect;
use crate::Frame;

/// How a rectangle's pixels travel; the number is the protocol's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Encoding {
    Raw = 0,
    Hextile = 5,
    Zlib = 6,
    Tight = 7,
    Zrle = 16,
}

impl Encoding {
    pub const ALL: [Encoding; 5] = [Encoding::Raw, Encoding::Hextile, Encoding::Zlib, Encoding::Tight, Encoding::Zrle];

    /// Tight has a limit of 2048 pixels of width; the rest bounds what is encoded in one piece.
    const MAX_WIDTH: usize = 2048;
    const MAX_AREA: usize = 1 << 16;
}

/// Cuts rectangles into pieces that every encoding can take.
pub fn split(rects: &[Rect]) -> Vec<Rect> {
    let mut pieces = Vec::new();
    for rect in rects {
        for x in (0..rect.width).step_by(Encoding::MAX_WIDTH) {
            let width = (rect.width - x).min(Encoding::MAX_WIDTH);
            let rows = Encoding::MAX_AREA / width;
            for y in (0..rect.height).step_by(rows) {
                pieces.push(Rect { x: rect.x + x, y: rect.y + y, width, height: (rect.height - y).min(rows) });
            }
        }
    }
    pieces
}

/// The pixels of a piece.
struct Pixels<'a> {
    pixels: &'a [u32],
    width: usize,
    height: usize,
}

impl<'a> Pixels<'a> {
    /// Those of a part, row by row.
    fn part(&self, x: usize, y: usize, width: usize, height: usize) -> impl Iterator<Item = &'a [u32]> {
        let rows = self.pixels.chunks(self.width.max(1)).skip(y).take(height);
        rows.map(move |row| row.get(x..(x + width).min(row.len())).unwrap_or_default())
    }
}

/// A zlib stream that lasts as long as a connection.
struct Stream(Compress);

impl Stream {
    fn new(level: u32) -> Self {
        Stream(Compress::new(Compression::new(level.min(9)), true))
    }

    /// Appends `data` compressed, so that the viewer can unpack all of it at once.
    fn write(&mut self, data: &[u8], out: &mut Vec<u8>) {
        let mut rest = data;
        loop {
            out.reserve(rest.len() / 2 + 1024);
            let before = self.0.total_in();
            // Fails only for streams that were finished, which none is.
            _ = self.0.compress_vec(rest, out, FlushCompress::Sync);
            rest = rest.get((self.0.total_in() - before) as usize..).unwrap_or_default();
            if rest.is_empty() && out.len() < out.capacity() {
                return;
            }
        }
    }
}

/// A connection's encoder: its streams, and memory to work in.
pub struct Encoder {
    pixels: Vec<u32>,
    level: u32,
    tight: tight::Tight,
    zrle: Option<zrle::Zrle>,
    zlib: Option<Stream>,
}

impl Encoder {
    pub fn new() -> Self {
        Encoder { pixels: Vec::new(), level: 3, tight: tight::Tight::default(), zrle: None, zlib: None }
    }

    /// The level of compression for streams that have not begun.
    pub fn set_level(&mut self, level: u32) {
        self.level = level;
    }

    /// Appends a rectangle of the frame with its header. What lies outside of the frame is black.
    pub fn encode(&mut self, encoding: Encoding, frame: &Frame, rect: &Rect, form: &Converter, out: &mut Vec<u8>) {
        header(rect, encoding as i32, out);
        self.pixels.clear();
        for y in rect.y..rect.y + rect.height {
            let start = self.pixels.len();
            self.pixels.extend(frame.row(y).iter().skip(rect.x).take(rect.width));
            self.pixels.resize(start + rect.width, 0);
        }
        let pixels = Pixels { pixels: &self.pixels, width: rect.width, height: rect.height };
        match encoding {
            Encoding::Raw => self.pixels.iter().for_each(|pixel| form.put(*pixel, out)),
            Encoding::Hextile => hextile::encode(&pixels, form, out),
            // Raw, packed; four bytes of length before it.
            Encoding::Zlib => {
                let mut plain = Vec::with_capacity(self.pixels.len() * 4);
                self.pixels.iter().for_each(|pixel| form.put(*pixel, &mut plain));
                with_length(out, |out| self.zlib.get_or_insert_with(|| Stream::new(self.level)).write(&plain, out));
            }
            Encoding::Tight => self.tight.encode(&pixels, self.level, form, out),
            Encoding::Zrle => self.zrle.get_or_insert_with(|| zrle::Zrle::new(self.level)).encode(&pixels, form, out),
        }
    }
}

/// Appends what `write` writes, with four bytes of length before it.
fn with_length(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend([0; 4]);
    write(out);
    let length = (out.len() - start - 4) as u32;
    if let Some(place) = out.get_mut(start..start + 4) {
        place.copy_from_slice(&length.to_be_bytes());
    }
}

/// The header of a rectangle, or of what a pseudo-encoding says.
pub fn header(rect: &Rect, encoding: i32, out: &mut Vec<u8>) {
    for number in [rect.x, rect.y, rect.width, rect.height] {
        out.extend((number as u16).to_be_bytes());
    }
    out.extend(encoding.to_be_bytes());
}

#[cfg(test)]
mod tests;
