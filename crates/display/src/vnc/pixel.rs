//! The forms in which viewers want their pixels (RFC 6143, 7.4).

use super::protocol::Error;

/// PIXEL_FORMAT, for true colour. A viewer that asks for a colour map gets 3, 3 and 2 bits as the indices of a fixed one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PixelFormat {
    pub bits_per_pixel: u8,
    pub depth: u8,
    pub big_endian: bool,
    pub true_color: bool,
    pub max: [u16; 3],
    pub shift: [u8; 3],
}

/// What pixels are in a [`Frame`](crate::Frame): the form that viewers are offered.
pub const OFFERED: PixelFormat = PixelFormat {
    bits_per_pixel: 32,
    depth: 24,
    big_endian: false,
    true_color: true,
    max: [255; 3],
    shift: [16, 8, 0],
};

const MAP_MAX: [u16; 3] = [7, 7, 3];
const MAP_SHIFT: [u8; 3] = [0, 3, 6];

impl PixelFormat {
    pub fn parse(bytes: [u8; 16]) -> Result<Self, Error> {
        let [bits_per_pixel, depth, big_endian, true_color, r0, r1, g0, g1, b0, b1, rs, gs, bs, ..] = bytes;
        let mut format = PixelFormat {
            bits_per_pixel,
            depth,
            big_endian: big_endian != 0,
            true_color: true_color != 0,
            max: [[r0, r1], [g0, g1], [b0, b1]].map(u16::from_be_bytes),
            shift: [rs, gs, bs],
        };
        if !format.true_color {
            (format.max, format.shift) = (MAP_MAX, MAP_SHIFT);
        }
        let fits = |(max, shift): (&u16, &u8)| {
            u64::from(*max).checked_shl(u32::from(*shift)).is_some_and(|value| value >> bits_per_pixel.min(63) == 0)
        };
        let possible = matches!(bits_per_pixel, 8 | 16 | 32)
            && (format.true_color || bits_per_pixel == 8)
            && format.shift.iter().all(|shift| *shift < 32)
            && format.max.iter().zip(&format.shift).all(fits);
        if possible { Ok(format) } else { Err(Error::PixelFormat) }
    }

    pub fn bytes(&self) -> [u8; 16] {
        let [r, g, b] = self.max.map(u16::to_be_bytes);
        let [rs, gs, bs] = self.shift;
        let flags = [self.big_endian, self.true_color].map(u8::from);
        let [big, color] = flags;
        [self.bits_per_pixel, self.depth, big, color, r[0], r[1], g[0], g[1], b[0], b[1], rs, gs, bs, 0, 0, 0]
    }

    /// 24 bits of true colour in four bytes: the form that Tight sends as red, green and blue.
    fn is_888(&self) -> bool {
        self.bits_per_pixel == 32 && self.depth == 24 && self.max == [255; 3]
    }

    /// The bytes of a pixel that has one to spare, for ZRLE's compressed form.
    fn used_bytes(&self) -> std::ops::Range<usize> {
        let bits = self.max.iter().zip(&self.shift).fold(0, |bits, (max, shift)| bits | u32::from(*max) << shift);
        let low = match (self.bits_per_pixel == 32 && self.depth <= 24, bits) {
            (true, 0..0x0100_0000) => true,
            (true, bits) if bits & 0xff == 0 => false,
            _ => return 0..usize::from(self.bits_per_pixel) / 8,
        };
        if low != self.big_endian { 0..3 } else { 1..4 }
    }
}

/// The colours of the map that viewers without true colour get, as 16-bit red, green and blue.
pub fn color_map() -> impl Iterator<Item = [u16; 3]> {
    (0..=255u16).map(|index| {
        let level = |shift: u8, max: u16| (index >> shift & max) * (65535 / max);
        let [r, g, b] = [0, 1, 2].map(|c: usize| level(MAP_SHIFT[c], MAP_MAX[c]));
        [r, g, b]
    })
}

/// Turns pixels of a frame into those of a viewer, by tables.
#[derive(Clone)]
pub struct Converter {
    pub format: PixelFormat,
    tables: Box<[[u32; 256]; 3]>,
    compact: std::ops::Range<usize>,
    rgb: bool,
}

impl Converter {
    pub fn new(format: PixelFormat) -> Self {
        let mut tables = Box::new([[0; 256]; 3]);
        for (table, (max, shift)) in tables.iter_mut().zip(format.max.iter().zip(&format.shift)) {
            for (value, entry) in (0u32..).zip(table.iter_mut()) {
                *entry = ((value * u32::from(*max) + 127) / 255) << shift;
            }
        }
        Converter { format, tables, compact: format.used_bytes(), rgb: format.is_888() }
    }

    fn value(&self, pixel: u32) -> u32 {
        let [_, r, g, b] = pixel.to_be_bytes();
        let [red, green, blue] = &*self.tables;
        red[usize::from(r)] | green[usize::from(g)] | blue[usize::from(b)]
    }

    /// PIXEL.
    pub fn put(&self, pixel: u32, out: &mut Vec<u8>) {
        let value = self.value(pixel);
        match (self.format.bits_per_pixel, self.format.big_endian) {
            (8, _) => out.push(value as u8),
            (16, false) => out.extend((value as u16).to_le_bytes()),
            (16, true) => out.extend((value as u16).to_be_bytes()),
            (_, false) => out.extend(value.to_le_bytes()),
            (_, true) => out.extend(value.to_be_bytes()),
        }
    }

    /// CPIXEL (RFC 6143, 7.7.5): without the byte that is never used.
    pub fn put_compact(&self, pixel: u32, out: &mut Vec<u8>) {
        if self.format.bits_per_pixel != 32 {
            return self.put(pixel, out);
        }
        let value = self.value(pixel);
        let bytes = if self.format.big_endian { value.to_be_bytes() } else { value.to_le_bytes() };
        out.extend(bytes.get(self.compact.clone()).unwrap_or(&bytes));
    }

    pub fn compact_size(&self) -> usize {
        self.compact.len()
    }

    /// TPIXEL (RFB protocol, community edition, 7.7.6): red, green, blue where that is possible.
    pub fn put_tight(&self, pixel: u32, out: &mut Vec<u8>) {
        if self.rgb {
            let [_, r, g, b] = pixel.to_be_bytes();
            out.extend([r, g, b]);
        } else {
            self.put(pixel, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(format: PixelFormat, pixel: u32) -> Vec<u8> {
        let mut out = Vec::new();
        Converter::new(format).put(pixel, &mut out);
        out
    }

    #[test]
    fn pixels_take_the_form_that_is_asked_for() {
        assert_eq!(converted(OFFERED, 0x12_3456), [0x56, 0x34, 0x12, 0]);
        assert_eq!(converted(PixelFormat { big_endian: true, ..OFFERED }, 0x12_3456), [0, 0x12, 0x34, 0x56]);
        let rgb565 = PixelFormat { bits_per_pixel: 16, depth: 16, max: [31, 63, 31], shift: [11, 5, 0], ..OFFERED };
        assert_eq!(converted(rgb565, 0xff_0000), [0x00, 0xf8]);
        assert_eq!(converted(rgb565, 0xff_ffff), [0xff, 0xff]);
        let bgr233 = PixelFormat { bits_per_pixel: 8, depth: 8, max: MAP_MAX, shift: MAP_SHIFT, ..OFFERED };
        assert_eq!(converted(bgr233, 0x00_00ff), [0xc0]);
    }

    #[test]
    fn compact_pixels_leave_out_the_unused_byte() {
        for (format, expected) in [
            (OFFERED, [0x56, 0x34, 0x12]),
            (PixelFormat { big_endian: true, ..OFFERED }, [0x12, 0x34, 0x56]),
            (PixelFormat { shift: [24, 16, 8], ..OFFERED }, [0x56, 0x34, 0x12]),
            (PixelFormat { shift: [24, 16, 8], big_endian: true, ..OFFERED }, [0x12, 0x34, 0x56]),
        ] {
            let mut out = Vec::new();
            Converter::new(format).put_compact(0x12_3456, &mut out);
            assert_eq!(out, expected, "{format:?}");
        }
    }

    #[test]
    fn formats_survive_their_bytes_and_impossible_ones_are_refused() {
        assert_eq!(PixelFormat::parse(OFFERED.bytes()).ok(), Some(OFFERED));
        let refused = [
            PixelFormat { bits_per_pixel: 24, ..OFFERED },
            PixelFormat { bits_per_pixel: 0, ..OFFERED },
            PixelFormat { shift: [32, 0, 0], ..OFFERED },
            PixelFormat { shift: [255, 0, 0], ..OFFERED },
            PixelFormat { bits_per_pixel: 8, ..OFFERED },
            PixelFormat { true_color: false, ..OFFERED },
        ];
        for format in refused {
            assert!(PixelFormat::parse(format.bytes()).is_err(), "{format:?}");
        }
    }
}
