//! The registers of a VGA behind ports 0x3b0 to 0x3df (IBM VGA technical reference; FreeVGA project, "VGA I/O ports").

use super::dac::Dac;
use super::dispi::Dispi;
use super::timing::Timing;

/// Ports, as offsets from 0x3b0.
pub const FIRST_PORT: u16 = 0x3b0;
pub const PORTS: u16 = 0x30;
const MONO_CRTC: u64 = 0x04;
const MONO_STATUS: u64 = 0x0a;
const ATTRIBUTE: u64 = 0x10;
const ATTRIBUTE_READ: u64 = 0x11;
const MISCELLANEOUS: u64 = 0x12;
const SEQUENCER: u64 = 0x14;
const SEQUENCER_DATA: u64 = 0x15;
const DAC_MASK: u64 = 0x16;
const DAC_READ_INDEX: u64 = 0x17;
const DAC_WRITE_INDEX: u64 = 0x18;
const DAC_DATA: u64 = 0x19;
const FEATURE_READ: u64 = 0x1a;
const MISCELLANEOUS_READ: u64 = 0x1c;
const GRAPHICS: u64 = 0x1e;
const GRAPHICS_DATA: u64 = 0x1f;
const COLOR_CRTC: u64 = 0x24;
const COLOR_STATUS: u64 = 0x2a;

/// Miscellaneous output register: where the CRTC's ports are, and whether video memory answers.
const COLOR_PORTS: u8 = 1 << 0;
const MEMORY_ENABLE: u8 = 1 << 1;

/// In the attribute controller's index: the screen is on, and the palette registers can't be written.
const PALETTE_SOURCE: u8 = 1 << 5;
const ATTRIBUTE_REGISTERS: usize = 21;
/// CRTC register 0x11: registers 0 to 7 can't be written, but for bit 8 of the line comparison in register 7.
const PROTECT: u8 = 1 << 7;
const LINE_COMPARE_BIT: u8 = 1 << 4;

/// Which bits of the sequencer's and graphics controller's registers there are.
const SEQUENCER_BITS: [u8; 8] = [0x03, 0x3d, 0x0f, 0x3f, 0x0e, 0, 0, 0];
const GRAPHICS_BITS: [u8; 16] = [0x0f, 0x0f, 0x0f, 0x1f, 0x03, 0x7b, 0x0f, 0x0f, 0xff, 0, 0, 0, 0, 0, 0, 0];

/// Everything but video memory.
#[derive(Clone)]
pub struct Registers {
    miscellaneous: u8,
    feature: u8,
    sequencer_index: u8,
    pub sequencer: [u8; 8],
    graphics_index: u8,
    pub graphics: [u8; 16],
    attribute_index: u8,
    /// The next write to the attribute controller's port is data.
    attribute_data: bool,
    pub attribute: [u8; ATTRIBUTE_REGISTERS],
    crtc_index: u8,
    pub crtc: [u8; 32],
    pub dac: Dac,
    pub dispi: Dispi,
    /// What the last read of video memory has brought.
    pub latches: u32,
}

impl Registers {
    /// As after power-on: no picture, the CRTC at its monochrome ports.
    pub fn new() -> Self {
        Registers {
            miscellaneous: 0,
            feature: 0,
            sequencer_index: 0,
            sequencer: [0; 8],
            graphics_index: 0,
            graphics: [0; 16],
            attribute_index: 0,
            attribute_data: false,
            attribute: [0; ATTRIBUTE_REGISTERS],
            crtc_index: 0,
            crtc: [0; 32],
            dac: Dac::new(),
            dispi: Dispi::new(),
            latches: 0,
        }
    }

    pub fn memory_enabled(&self) -> bool {
        self.miscellaneous & MEMORY_ENABLE != 0
    }

    /// Bits 2 and 3 of the miscellaneous output register.
    pub fn clock_select(&self) -> u8 {
        self.miscellaneous >> 2 & 3
    }

    /// Whether there is anything but black.
    pub fn screen_on(&self) -> bool {
        const SCREEN_OFF: u8 = 1 << 5;
        self.attribute_index & PALETTE_SOURCE != 0 && (self.dispi.enabled() || self.sequencer[1] & SCREEN_OFF == 0)
    }

    /// Where the CRTC and the second status register are now.
    fn place(&self, port: u64) -> Port {
        let (crtc, status) = match self.miscellaneous & COLOR_PORTS {
            0 => (MONO_CRTC, MONO_STATUS),
            _ => (COLOR_CRTC, COLOR_STATUS),
        };
        match port {
            _ if port == crtc => Port::CrtcIndex,
            _ if port == crtc + 1 => Port::CrtcData,
            _ if port == status => Port::Status,
            _ => Port::Other,
        }
    }

    /// Reads a port, given as its distance from 0x3b0. `now` is in nanoseconds.
    pub fn read(&mut self, port: u64, now: u64) -> u8 {
        match (self.place(port), port) {
            (Port::CrtcIndex, _) => self.crtc_index,
            (Port::CrtcData, _) => self.crtc.get(usize::from(self.crtc_index)).copied().unwrap_or(0),
            (Port::Status, _) => {
                self.attribute_data = false;
                Timing::of(self).status(now)
            }
            (_, ATTRIBUTE) if self.attribute_data => self.attribute_value(),
            (_, ATTRIBUTE) => self.attribute_index,
            (_, ATTRIBUTE_READ) => self.attribute_value(),
            // Input status 0: no interrupt of the CRTC, no sense of the switches.
            (_, MISCELLANEOUS) => 0,
            (_, SEQUENCER) => self.sequencer_index,
            (_, SEQUENCER_DATA) => self.sequencer.get(usize::from(self.sequencer_index)).copied().unwrap_or(0),
            (_, DAC_MASK) => self.dac.mask,
            (_, DAC_READ_INDEX) => self.dac.state(),
            (_, DAC_WRITE_INDEX) => self.dac.write_index(),
            (_, DAC_DATA) => self.dac.read(),
            (_, FEATURE_READ) => self.feature,
            (_, MISCELLANEOUS_READ) => self.miscellaneous,
            (_, GRAPHICS) => self.graphics_index,
            (_, GRAPHICS_DATA) => self.graphics.get(usize::from(self.graphics_index)).copied().unwrap_or(0),
            _ => 0xff,
        }
    }

    /// Says whether the screen may look different now.
    pub fn write(&mut self, port: u64, value: u8) -> bool {
        match (self.place(port), port) {
            (Port::CrtcIndex, _) => {
                self.crtc_index = value & 0x3f;
                return false;
            }
            (Port::CrtcData, _) => self.write_crtc(value),
            (Port::Status, _) => self.feature = value & 0x0b,
            (_, ATTRIBUTE) => return self.write_attribute(value),
            (_, MISCELLANEOUS) => self.miscellaneous = value & !0x10,
            (_, SEQUENCER) => {
                self.sequencer_index = value;
                return false;
            }
            (_, SEQUENCER_DATA) => set(&mut self.sequencer, &SEQUENCER_BITS, self.sequencer_index, value),
            (_, DAC_MASK) => self.dac.mask = value,
            (_, DAC_READ_INDEX) => {
                self.dac.start_reading(value);
                return false;
            }
            (_, DAC_WRITE_INDEX) => {
                self.dac.start_writing(value);
                return false;
            }
            (_, DAC_DATA) => return self.dac.write(value),
            (_, GRAPHICS) => {
                self.graphics_index = value;
                return false;
            }
            (_, GRAPHICS_DATA) => set(&mut self.graphics, &GRAPHICS_BITS, self.graphics_index, value),
            _ => return false,
        }
        true
    }

    fn write_crtc(&mut self, value: u8) {
        let index = usize::from(self.crtc_index);
        let protected = self.crtc[0x11] & PROTECT != 0 && index < 8;
        let Some(register) = self.crtc.get_mut(index) else { return };
        match (protected, index) {
            (true, 7) => *register = *register & !LINE_COMPARE_BIT | value & LINE_COMPARE_BIT,
            (true, _) => {}
            (false, 0x19..) => {}
            (false, _) => *register = value,
        }
    }

    fn attribute_value(&self) -> u8 {
        self.attribute.get(usize::from(self.attribute_index & 0x1f)).copied().unwrap_or(0)
    }

    /// One port for index and data, in turns (the flip-flop); reading the status register begins with the index.
    fn write_attribute(&mut self, value: u8) -> bool {
        if !self.attribute_data {
            self.attribute_data = true;
            let before = std::mem::replace(&mut self.attribute_index, value & 0x3f);
            return (before ^ value) & PALETTE_SOURCE != 0;
        }
        self.attribute_data = false;
        let index = usize::from(self.attribute_index & 0x1f);
        let bits = match index {
            0x00..0x10 if self.attribute_index & PALETTE_SOURCE != 0 => return false,
            0x00..0x10 | 0x12 => 0x3f,
            0x10 => 0xef,
            0x13 | 0x14 => 0x0f,
            _ => 0xff,
        };
        if let Some(register) = self.attribute.get_mut(index) {
            *register = value & bits;
        }
        true
    }

    pub fn write_dispi(&mut self, register: u16, value: u16) -> bool {
        let begins = self.dispi.enabled();
        let clear = self.dispi.write(register, value);
        self.dac.wide = self.dispi.wide_dac();
        if !begins && self.dispi.enabled() {
            self.follow_dispi();
        }
        clear
    }

    /// A linear mode leaves its traces in the VGA's registers: so that the 64 KiB at 0xa0000 lead to the pixels.
    fn follow_dispi(&mut self) {
        const GRAPHICS_AT_A0000: u8 = 0x05;
        self.graphics[6] = self.graphics[6] & 0x02 | GRAPHICS_AT_A0000;
        self.crtc[0x17] |= 0x03;
        self.crtc[0x09] &= !0x9f;
        self.graphics[5] &= !0x60;
        self.sequencer[2] |= 0x0f;
        if self.dispi.bits_per_pixel() == 4 {
            self.sequencer[4] &= !0x08;
        } else {
            self.graphics[5] |= 0x40;
            self.sequencer[4] |= 0x0e;
        }
    }
}

enum Port {
    CrtcIndex,
    CrtcData,
    Status,
    Other,
}

fn set<const N: usize>(registers: &mut [u8; N], bits: &[u8; N], index: u8, value: u8) {
    if let (Some(register), Some(bits)) = (registers.get_mut(usize::from(index)), bits.get(usize::from(index))) {
        *register = value & bits;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(port: u16) -> u64 {
        u64::from(port - FIRST_PORT)
    }

    #[test]
    fn the_crtc_moves_with_the_miscellaneous_output_register() {
        let mut vga = Registers::new();
        vga.write(at(0x3b4), 0x0e);
        vga.write(at(0x3b5), 0x12);
        assert_eq!((vga.read(at(0x3b5), 0), vga.read(at(0x3d5), 0)), (0x12, 0xff));
        vga.write(at(0x3c2), 0x67);
        assert_eq!((vga.read(at(0x3b5), 0), vga.read(at(0x3d5), 0)), (0xff, 0x12));
        assert_eq!(vga.read(at(0x3cc), 0), 0x67);
    }

    #[test]
    fn protected_crtc_registers_keep_what_they_hold() {
        let mut vga = Registers::new();
        vga.write(at(0x3c2), 1);
        let mut crtc = |index, value| {
            vga.write(at(0x3d4), index);
            vga.write(at(0x3d5), value);
            vga.read(at(0x3d5), 0)
        };
        assert_eq!(crtc(0x00, 0x5f), 0x5f);
        assert_eq!(crtc(0x11, 0x8e), 0x8e);
        assert_eq!(crtc(0x00, 0x11), 0x5f);
        assert_eq!(crtc(0x07, 0xff), 0x10, "but for the bit of the line comparison");
        assert_eq!(crtc(0x0c, 0xff), 0xff);
    }

    #[test]
    fn the_attribute_port_takes_index_and_data_in_turns() {
        let mut vga = Registers::new();
        vga.write(at(0x3c2), 1);
        vga.read(at(0x3da), 0);
        for value in [0x10, 0x41, 0x13, 0x08] {
            vga.write(at(0x3c0), value);
        }
        assert_eq!((vga.attribute[0x10], vga.attribute[0x13]), (0x41, 0x08));
        vga.write(at(0x3c0), 0x12);
        vga.read(at(0x3da), 0);
        vga.write(at(0x3c0), 0x11);
        assert_eq!(vga.read(at(0x3c1), 0), 0, "what was written after the status was read is an index");
    }

    #[test]
    fn the_palette_is_locked_while_the_screen_shows_it() {
        let mut vga = Registers::new();
        for value in [0x01, 0x3f, 0x21, 0x00] {
            vga.write(at(0x3c0), value);
        }
        assert_eq!(vga.attribute[1], 0x3f);
        assert!(vga.screen_on());
    }

    #[test]
    fn dac_colors_go_three_by_three() {
        let mut vga = Registers::new();
        vga.write(at(0x3c8), 0xff);
        for value in [1, 2, 3, 0xff, 5, 6] {
            vga.write(at(0x3c9), value);
        }
        vga.write(at(0x3c7), 0xff);
        let read: Vec<_> = (0..6).map(|_| vga.read(at(0x3c9), 0)).collect();
        assert_eq!(read, [1, 2, 3, 0x3f, 5, 6]);
        assert_eq!((vga.read(at(0x3c7), 0), vga.read(at(0x3c8), 0)), (3, 1));
        assert_eq!(vga.dac.pixels()[0], 0x00ff_1418);
    }
}
