//! What the VGA's own modes look like: from the CRTC's counters through the planes and the attribute controller to dots.
//!
//! One path makes text, planar, CGA-like and 256-colour pictures, as in the adapter: the CRTC counts an address for each
//! character clock and a row of a character for each line; four bytes come from there, which are a character, its attribute
//! and a row of its font, or eight dots of four bits; the attribute controller turns these into indices of the DAC.

use super::memory::LEGACY_SIZE;
use super::registers::Registers;
use crate::Frame;

const DWORDS: usize = LEGACY_SIZE / 4;

/// How the frames that have gone by show: a cursor blinks every 16, a character every 32 frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blink {
    pub cursor_shown: bool,
    pub text_shown: bool,
}

impl Blink {
    pub fn at(frames: u64) -> Self {
        Blink { cursor_shown: frames & 8 != 0, text_shown: frames & 16 != 0 }
    }
}

/// The settings of a frame, taken apart.
struct Scanout<'a> {
    registers: &'a Registers,
    /// Planes as they lie in video memory.
    planes: &'a [u8],
    blink: Blink,
    /// The DAC's index of each of the 16 values of a dot.
    palette: [u8; 16],
    dots: usize,
    graphics: bool,
    /// Two dots of four bits make one of eight.
    eight_bits: bool,
}

/// The size of the picture: dots and lines.
pub fn size(registers: &Registers) -> (usize, usize) {
    let crtc = &registers.crtc;
    let halved = if registers.sequencer[1] & 8 != 0 { 2 } else { 1 };
    let width = (usize::from(crtc[1]) + 1) * dots(registers) * halved;
    let height = vertical(crtc[0x12], crtc[7] >> 1 & 1, crtc[7] >> 6 & 1) + 1;
    (width, height)
}

/// Dots of a character.
fn dots(registers: &Registers) -> usize {
    if registers.sequencer[1] & 1 == 0 { 9 } else { 8 }
}

/// A number whose bits 8 and 9 are in the overflow register.
fn vertical(low: u8, bit8: u8, bit9: u8) -> usize {
    usize::from(low) | usize::from(bit8) << 8 | usize::from(bit9) << 9
}

/// Draws a frame of `size`. `planes` is the first [`LEGACY_SIZE`] bytes of video memory.
pub fn draw(registers: &Registers, planes: &[u8], blink: Blink, frame: &mut Frame) {
    Scanout::new(registers, planes, blink).draw(frame);
}

impl<'a> Scanout<'a> {
    fn new(registers: &'a Registers, planes: &'a [u8], blink: Blink) -> Self {
        let attribute = &registers.attribute;
        let select = attribute[0x14];
        let palette = std::array::from_fn(|dot| {
            let color = attribute[dot & usize::from(attribute[0x12] & 0xf)];
            let color = if attribute[0x10] & 0x80 != 0 { color & 0xf | (select & 3) << 4 } else { color };
            color & 0x3f | (select >> 2 & 3) << 6
        });
        Scanout {
            registers,
            planes,
            blink,
            palette,
            dots: dots(registers),
            graphics: registers.graphics[6] & 1 != 0,
            eight_bits: attribute[0x10] & 0x40 != 0,
        }
    }

    fn draw(&self, frame: &mut Frame) {
        let crtc = &self.registers.crtc;
        let (_, height) = frame.size();
        let colors = self.registers.dac.pixels();
        let pitch = 2 * usize::from(crtc[0x13]);
        let last_row = crtc[9] & 0x1f;
        let doubled = crtc[9] & 0x80 != 0;
        let split = vertical(crtc[0x18], crtc[7] >> 4 & 1, crtc[9] >> 6 & 1);
        let mut address = (usize::from(crtc[0x0c]) << 8 | usize::from(crtc[0x0d])) + usize::from(crtc[8] >> 5 & 3);
        let mut row = crtc[8] & 0x1f;
        let mut panning = self.panning();
        let mut line = Vec::new();
        let mut drawn = None;
        for y in 0..height {
            match drawn {
                // Of a doubled line, or of a row of pixels that is several lines high.
                Some((at, what)) if what == (address, self.shown_row(row), panning) => frame.copy_row(at, y),
                _ => {
                    line.clear();
                    self.line(address, row, &mut line);
                    self.put(&line, panning, &colors, frame.row_mut(y));
                }
            }
            drawn = Some((y, (address, self.shown_row(row), panning)));
            if y == split {
                // The second of two screens begins at address 0, and is panned only if asked for.
                (address, row) = (0, 0);
                if self.registers.attribute[0x10] & 0x20 != 0 {
                    panning = 0;
                }
            } else if !doubled || y % 2 == 1 {
                if row == last_row {
                    address += pitch;
                }
                row = if row == last_row { 0 } else { (row + 1) & 0x1f };
            }
        }
    }

    /// What of a row's number its dots depend on.
    fn shown_row(&self, row: u8) -> u8 {
        let replaced = !self.registers.crtc[0x17] & 3;
        if self.graphics { row & replaced } else { row }
    }

    /// Dots by which the picture is moved to the left (IBM VGA technical reference, "Horizontal PEL Panning Register").
    fn panning(&self) -> usize {
        let value = usize::from(self.registers.attribute[0x13] & 0xf);
        match (self.dots, self.graphics) {
            (9, false) if value >= 8 => 0,
            (9, false) => value + 1,
            _ => value & 7,
        }
    }

    /// A line of picture out of the indices of its dots.
    fn put(&self, line: &[u8], panning: usize, colors: &[u32; 256], row: &mut [u32]) {
        let dots = line.get(panning..).unwrap_or_default().iter().map(|dot| colors[usize::from(*dot)]);
        if self.registers.sequencer[1] & 8 == 0 {
            row.iter_mut().zip(dots).for_each(|(pixel, color)| *pixel = color);
        } else {
            row.chunks_mut(2).zip(dots).for_each(|(pixels, color)| pixels.fill(color));
        }
    }

    /// The DAC's indices of a line's dots, and of one more character for panning.
    fn line(&self, start: usize, row: u8, line: &mut Vec<u8>) {
        let crtc = &self.registers.crtc;
        // The counter goes on with every, every second or every fourth character.
        let slower = usize::from(crtc[0x17] >> 3 & 1) + 2 * usize::from(crtc[0x14] >> 5 & 1);
        for column in 0..usize::from(crtc[1]) + 2 {
            let counter = start + (column >> slower);
            let bytes = self.fetch(self.address(counter, row));
            if self.graphics {
                self.graphics_dots(bytes, line);
            } else {
                self.text_dots(counter, bytes, row, line);
            }
        }
    }

    fn fetch(&self, address: usize) -> [u8; 4] {
        let offset = (address & (DWORDS - 1)) * 4;
        self.planes.get(offset..).and_then(|bytes| bytes.first_chunk()).copied().unwrap_or_default()
    }

    /// From the CRTC's counter to the planes' address: byte, word and doubleword mode, and the two bits that a row's
    /// number may take the place of (CRTC registers 0x14 and 0x17).
    fn address(&self, counter: usize, row: u8) -> usize {
        let crtc = &self.registers.crtc;
        let counter = counter & 0xffff;
        let mut address = if crtc[0x14] & 0x40 != 0 {
            counter << 2 | counter >> 14 & 3
        } else if crtc[0x17] & 0x40 == 0 {
            let wrap = if crtc[0x17] & 0x20 != 0 { 15 } else { 13 };
            counter << 1 | counter >> wrap & 1
        } else {
            counter
        };
        for bit in 0..2 {
            if crtc[0x17] >> bit & 1 == 0 {
                address = address & !(0x2000 << bit) | usize::from(row >> bit & 1) << (13 + bit);
            }
        }
        address
    }

    /// Eight or nine dots of a character's row.
    fn text_dots(&self, counter: usize, [character, attribute, ..]: [u8; 4], row: u8, line: &mut Vec<u8>) {
        let crtc = &self.registers.crtc;
        let mode = self.registers.attribute[0x10];
        let bits = self.font_row(character, attribute, row);
        let blinks = mode & 0x08 != 0;
        let (mut front, back) = (attribute & 0xf, if blinks { attribute >> 4 & 7 } else { attribute >> 4 });
        let underlined = attribute & 0x77 == 0x01 && row == crtc[0x14] & 0x1f;
        let cursor = self.cursor(counter, row);
        // The ninth dot goes on with the eighth for the line-drawing characters.
        let ninth = mode & 0x04 != 0 && (0xc0..0xe0).contains(&character);
        let mut bits = u16::from(bits) << 1 | if ninth { u16::from(bits & 1) } else { 0 };
        if underlined || cursor {
            bits = 0x1ff;
        }
        if blinks && attribute & 0x80 != 0 && !self.blink.text_shown && !cursor {
            front = back;
        }
        let (front, back) = (self.palette[usize::from(front)], self.palette[usize::from(back)]);
        line.extend((0..self.dots).map(|dot| if bits << dot & 0x100 != 0 { front } else { back }));
    }

    /// The dots of a row of a character, from plane 2. Which of eight fonts it is decides bit 3 of the attribute.
    fn font_row(&self, character: u8, attribute: u8, row: u8) -> u8 {
        let select = self.registers.sequencer[3];
        let font = if attribute & 0x08 != 0 { select >> 2 & 3 | select >> 3 & 4 } else { select & 3 | select >> 2 & 4 };
        let font = usize::from(font & 3) * 0x4000 + usize::from(font >> 2) * 0x2000;
        let [_, _, bits, _] = self.fetch(font + usize::from(character) * 32 + usize::from(row));
        bits
    }

    fn cursor(&self, counter: usize, row: u8) -> bool {
        let crtc = &self.registers.crtc;
        let (start, end) = (crtc[0x0a], crtc[0x0b]);
        let place = (usize::from(crtc[0x0e]) << 8 | usize::from(crtc[0x0f])) + usize::from(end >> 5 & 3);
        let on = start & 0x20 == 0 && (start & 0x1f..=end & 0x1f).contains(&row);
        on && self.blink.cursor_shown && counter & 0xffff == place & 0xffff
    }

    /// Eight dots of four bits, or four of eight.
    fn graphics_dots(&self, bytes: [u8; 4], line: &mut Vec<u8>) {
        let blinks = self.registers.attribute[0x10] & 0x08 != 0 && self.blink.text_shown;
        let mut dots = self.shifted(bytes);
        if blinks {
            dots.iter_mut().for_each(|dot| *dot ^= 0x08);
        }
        if self.eight_bits {
            for pair in dots.chunks_exact(2) {
                let &[high, low] = pair else { continue };
                let index = self.color(high) << 4 | self.color(low) & 0xf;
                line.extend([index; 2]);
            }
        } else {
            line.extend(dots.map(|dot| self.color(dot)));
        }
    }

    fn color(&self, dot: u8) -> u8 {
        self.palette[usize::from(dot & 0xf)]
    }

    /// What the graphics controller's shift registers make of the four bytes (its mode register, bits 5 and 6).
    fn shifted(&self, [a, b, c, d]: [u8; 4]) -> [u8; 8] {
        let mode = self.registers.graphics[5];
        if mode & 0x40 != 0 {
            return [a >> 4, a & 0xf, b >> 4, b & 0xf, c >> 4, c & 0xf, d >> 4, d & 0xf];
        }
        if mode & 0x20 != 0 {
            let two = |byte: u8, dot: usize| byte >> (6 - 2 * (dot & 3)) & 3;
            return std::array::from_fn(|dot| {
                let (low, high) = if dot < 4 { (a, c) } else { (b, d) };
                two(low, dot) | two(high, dot) << 2
            });
        }
        std::array::from_fn(|dot| {
            let bit = |byte: u8| byte >> (7 - dot) & 1;
            bit(a) | bit(b) << 1 | bit(c) << 2 | bit(d) << 3
        })
    }
}
