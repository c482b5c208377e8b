//! Where the electron beam is: what the second input status register tells software that waits for a retrace.

use super::registers::Registers;

/// Dots a second (IBM VGA technical reference: the clocks of 640 and of 720 dots).
const CLOCK_640: u64 = 25_175_000;
const CLOCK_720: u64 = 28_322_000;
const SECOND: u64 = 1_000_000_000;

/// Input status 1: the beam is not in the picture; it returns to the top.
const NOT_DISPLAYING: u8 = 1 << 0;
const VERTICAL_RETRACE: u8 = 1 << 3;

/// What a frame looks like in time: nanoseconds for a line, and lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timing {
    line: u64,
    /// Of a line, with picture.
    shown: u64,
    lines: u64,
    shown_lines: u64,
    retrace: std::ops::Range<u64>,
}

impl Timing {
    pub fn of(registers: &Registers) -> Self {
        let (crtc, sequencer) = (&registers.crtc, &registers.sequencer);
        let overflow = |bits: [u8; 2]| u64::from(crtc[7] >> bits[0] & 1) << 8 | u64::from(crtc[7] >> bits[1] & 1) << 9;
        let dots = if sequencer[1] & 1 == 0 { 9 } else { 8 };
        let halved = if sequencer[1] & 8 == 0 { 1 } else { 2 };
        let clock = if registers.clock_select() == 1 { CLOCK_720 } else { CLOCK_640 };
        let character = dots * halved * SECOND / clock;
        let lines = (u64::from(crtc[6]) | overflow([0, 5])) + 2;
        let start = u64::from(crtc[0x10]) | overflow([2, 7]);
        // Only the low four bits of the end are compared.
        let length = match u64::from(crtc[0x11]).wrapping_sub(start) & 0xf {
            0 => 16,
            length => length,
        };
        let timing = Timing {
            line: (u64::from(crtc[0]) + 5) * character,
            shown: (u64::from(crtc[1]) + 1) * character,
            lines,
            shown_lines: (u64::from(crtc[0x12]) | overflow([1, 6])) + 1,
            retrace: start..start + length,
        };
        // A frame that no screen can show, as before any mode is set, is taken for one of 70 Hz: software that waits
        // for a retrace gets one.
        if (SECOND / 200..SECOND / 20).contains(&timing.frame()) && timing.retrace.start < lines {
            timing
        } else {
            Timing { line: 31_778, shown: 25_422, lines: 449, shown_lines: 400, retrace: 412..414 }
        }
    }

    fn frame(&self) -> u64 {
        self.line * self.lines
    }

    pub fn status(&self, now: u64) -> u8 {
        let (line, dot) = (now / self.line % self.lines, now % self.line);
        let hidden = if line >= self.shown_lines || dot >= self.shown { NOT_DISPLAYING } else { 0 };
        let retrace = if self.retrace.contains(&line) { VERTICAL_RETRACE } else { 0 };
        hidden | retrace
    }

    /// How many frames have gone by.
    pub fn frames(&self, now: u64) -> u64 {
        now / self.frame()
    }
}
