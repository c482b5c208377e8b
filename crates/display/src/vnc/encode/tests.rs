//! Each encoding against a decoder written from the protocol's text.

use flate2::{Decompress, FlushDecompress};

use super::*;
use crate::vnc::pixel::{OFFERED, PixelFormat};

/// Unpacks what the encoders make for pixels of 32 bits.
struct Decoder {
    streams: [Decompress; 4],
    zrle: Decompress,
    zlib: Decompress,
}

fn inflate(stream: &mut Decompress, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 << 20);
    stream.decompress_vec(data, &mut out, FlushDecompress::Sync).unwrap();
    out
}

/// Takes bytes off the front.
fn take<'a>(data: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (front, rest) = data.split_at(count);
    *data = rest;
    front
}

fn rgb(data: &mut &[u8]) -> u32 {
    let bytes = take(data, 3);
    u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]])
}

fn bgr(data: &mut &[u8]) -> u32 {
    rgb(data).swap_bytes() >> 8
}

fn bgrx(data: &mut &[u8]) -> u32 {
    let pixel = bgr(data);
    take(data, 1);
    pixel
}

impl Decoder {
    fn new() -> Self {
        Decoder {
            streams: [(); 4].map(|()| Decompress::new(true)),
            zrle: Decompress::new(true),
            zlib: Decompress::new(true),
        }
    }

    fn decode(&mut self, encoding: Encoding, width: usize, height: usize, data: &mut &[u8]) -> Vec<u32> {
        match encoding {
            Encoding::Raw => (0..width * height).map(|_| bgrx(data)).collect(),
            Encoding::Hextile => hextile(width, height, data),
            Encoding::Zlib => {
                let length = u32::from_be_bytes(take(data, 4).try_into().unwrap()) as usize;
                let plain = inflate(&mut self.zlib, take(data, length));
                (0..width * height).map(|n| bgrx(&mut &plain[4 * n..])).collect()
            }
            Encoding::Tight => self.tight(width, height, data),
            Encoding::Zrle => {
                let length = u32::from_be_bytes(take(data, 4).try_into().unwrap()) as usize;
                let plain = inflate(&mut self.zrle, take(data, length));
                zrle(width, height, &mut &plain[..])
            }
        }
    }

    fn tight(&mut self, width: usize, height: usize, data: &mut &[u8]) -> Vec<u32> {
        let control = take(data, 1)[0];
        if control == 0x80 {
            return vec![rgb(data); width * height];
        }
        let mut palette = Vec::new();
        if control & 0x40 != 0 {
            assert_eq!(take(data, 1)[0], 1);
            let count = usize::from(take(data, 1)[0]) + 1;
            palette.extend((0..count).map(|_| rgb(data)));
        }
        let size = match palette.len() {
            0 => width * height * 3,
            2 => width.div_ceil(8) * height,
            _ => width * height,
        };
        let plain = if size < 12 {
            take(data, size).to_vec()
        } else {
            let mut length = 0;
            for shift in [0, 7, 14] {
                let byte = usize::from(take(data, 1)[0]);
                length |= (if shift == 14 { byte } else { byte & 0x7f }) << shift;
                if byte & 0x80 == 0 {
                    break;
                }
            }
            inflate(&mut self.streams[usize::from(control >> 4 & 3)], take(data, length))
        };
        assert_eq!(plain.len(), size);
        match palette.len() {
            0 => plain.chunks(3).map(|c| u32::from_be_bytes([0, c[0], c[1], c[2]])).collect(),
            2 => plain
                .chunks(width.div_ceil(8))
                .flat_map(|row| (0..width).map(|x| palette[usize::from(row[x / 8] >> (7 - x % 8) & 1)]))
                .collect(),
            _ => plain.iter().map(|index| palette[usize::from(*index)]).collect(),
        }
    }
}

/// Tiles of a rectangle: place and size.
fn tiles(width: usize, height: usize, size: usize) -> Vec<[usize; 4]> {
    let columns = move |y| (0..width).step_by(size).map(move |x| [x, y, size.min(width - x), size.min(height - y)]);
    (0..height).step_by(size).flat_map(columns).collect()
}

fn hextile(width: usize, height: usize, data: &mut &[u8]) -> Vec<u32> {
    let mut out = vec![0; width * height];
    let (mut background, mut foreground) = (0, 0);
    for [x, y, w, h] in tiles(width, height, 16) {
        let kind = take(data, 1)[0];
        let mut fill = |x: usize, y: usize, w: usize, h: usize, color| {
            (y..y + h).for_each(|y| out[y * width + x..][..w].fill(color));
        };
        if kind & 1 != 0 {
            (0..h).for_each(|dy| (0..w).for_each(|dx| fill(x + dx, y + dy, 1, 1, bgrx(data))));
            continue;
        }
        if kind & 2 != 0 {
            background = bgrx(data);
        }
        if kind & 4 != 0 {
            foreground = bgrx(data);
        }
        fill(x, y, w, h, background);
        let count = if kind & 8 != 0 { take(data, 1)[0] } else { 0 };
        for _ in 0..count {
            let color = if kind & 16 != 0 { bgrx(data) } else { foreground };
            let place = take(data, 2);
            let (dx, dy) = (usize::from(place[0] >> 4), usize::from(place[0] & 15));
            let (dw, dh) = (usize::from(place[1] >> 4) + 1, usize::from(place[1] & 15) + 1);
            assert!(dx + dw <= w && dy + dh <= h);
            fill(x + dx, y + dy, dw, dh, color);
        }
    }
    out
}

fn zrle(width: usize, height: usize, data: &mut &[u8]) -> Vec<u32> {
    let run = |data: &mut &[u8]| {
        let mut length = 1;
        loop {
            let byte = usize::from(take(data, 1)[0]);
            length += byte;
            if byte < 255 {
                return length;
            }
        }
    };
    let mut out = vec![0; width * height];
    for [x, y, w, h] in tiles(width, height, 64) {
        let kind = usize::from(take(data, 1)[0]);
        let palette: Vec<u32> = (0..kind & 0x7f).map(|_| bgr(data)).collect();
        let mut tile = Vec::new();
        match kind {
            0 => tile.extend((0..w * h).map(|_| bgr(data))),
            1 => tile.resize(w * h, palette[0]),
            2..=16 => {
                let bits = [1, 1, 2, 2, 4][kind.min(5) - 1];
                for _ in 0..h {
                    let row = take(data, (w * bits).div_ceil(8));
                    let index = |x: usize| row[x * bits / 8] >> (8 - bits - x * bits % 8) & ((1 << bits) - 1);
                    tile.extend((0..w).map(|x| palette[usize::from(index(x))]));
                }
            }
            128 => {
                while tile.len() < w * h {
                    let color = bgr(data);
                    tile.resize(tile.len() + run(data), color);
                }
            }
            _ => {
                while tile.len() < w * h {
                    let index = take(data, 1)[0];
                    let length = if index & 0x80 != 0 { run(data) } else { 1 };
                    tile.resize(tile.len() + length, palette[usize::from(index & 0x7f)]);
                }
            }
        }
        assert_eq!(tile.len(), w * h);
        (0..h).for_each(|dy| out[(y + dy) * width + x..][..w].copy_from_slice(&tile[dy * w..][..w]));
    }
    assert!(data.is_empty());
    out
}

/// Pictures of one, two, few, many and very many colours, in runs and without.
fn pictures() -> Vec<Frame> {
    let mut noise = 0x1234_5678u32;
    let mut random = move || {
        noise ^= noise << 13;
        noise ^= noise >> 17;
        noise ^= noise << 5;
        noise
    };
    let mut pictures = Vec::new();
    for colors in [1, 2, 3, 4, 5, 16, 17, 60, 127, 128, 256, 257, 1 << 24] {
        for run in [1, 3, 700] {
            let mut frame = Frame::default();
            frame.resize(150, 70);
            let (mut left, mut pixel) = (0, 0);
            for y in 0..70 {
                for place in frame.row_mut(y) {
                    if left == 0 {
                        left = 1 + random() % run;
                        pixel = (random() % colors).wrapping_mul(0x9e_3779) & 0xff_ffff;
                    }
                    left -= 1;
                    *place = pixel;
                }
            }
            pictures.push(frame);
        }
    }
    pictures
}

#[test]
fn what_is_decoded_is_what_was_encoded() {
    let form = Converter::new(OFFERED);
    for encoding in Encoding::ALL {
        let (mut encoder, mut decoder) = (Encoder::new(), Decoder::new());
        for frame in pictures() {
            let sizes =
                [(0, 0, 150, 70), (3, 5, 1, 1), (10, 0, 17, 33), (64, 16, 64, 16), (149, 0, 1, 70), (0, 69, 150, 1)];
            for (x, y, width, height) in sizes {
                let rect = Rect { x, y, width, height };
                let mut out = Vec::new();
                encoder.encode(encoding, &frame, &rect, &form, &mut out);
                let mut data = &out[12..];
                let expected: Vec<u32> = (y..y + height).flat_map(|y| frame.row(y)[x..x + width].to_vec()).collect();
                assert!(decoder.decode(encoding, width, height, &mut data) == expected, "{encoding:?} {rect:?}");
                assert!(data.is_empty());
            }
        }
    }
}

#[test]
fn outside_of_the_frame_it_is_black() {
    let mut frame = Frame::default();
    frame.resize(2, 1);
    frame.fill(0x01_0203);
    let mut out = Vec::new();
    let rect = Rect { x: 1, y: 0, width: 2, height: 2 };
    Encoder::new().encode(Encoding::Raw, &frame, &rect, &Converter::new(OFFERED), &mut out);
    assert_eq!(out[12..], [3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn every_encoding_takes_every_form_of_pixel() {
    let formats = [
        PixelFormat { bits_per_pixel: 8, depth: 8, max: [7, 7, 3], shift: [0, 3, 6], ..OFFERED },
        PixelFormat { bits_per_pixel: 16, depth: 15, max: [31; 3], shift: [10, 5, 0], big_endian: true, ..OFFERED },
        PixelFormat { max: [0; 3], shift: [31; 3], ..OFFERED },
    ];
    for format in formats {
        for encoding in Encoding::ALL {
            let mut out = Vec::new();
            for frame in pictures() {
                let rect = Rect { x: 0, y: 0, width: 150, height: 70 };
                Encoder::new().encode(encoding, &frame, &rect, &Converter::new(format), &mut out);
            }
        }
    }
}

#[test]
fn large_rectangles_are_cut() {
    let rect = Rect { x: 5, y: 7, width: 4608, height: 1024 };
    let pieces = split(&[rect]);
    assert!(pieces.iter().all(|p| p.width <= 2048 && p.width * p.height <= 1 << 16));
    assert_eq!(pieces.iter().map(|p| p.width * p.height).sum::<usize>(), 4608 * 1024);
    assert_eq!(split(&[]), []);
}
