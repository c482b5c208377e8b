//! The Bochs display interface (DISPI, "VBE" in the emulators): one index and one data register, which set linear modes.

use super::memory;

/// Registers.
pub const ID: u16 = 0;
pub const XRES: u16 = 1;
pub const YRES: u16 = 2;
pub const BPP: u16 = 3;
pub const ENABLE: u16 = 4;
pub const BANK: u16 = 5;
pub const VIRT_WIDTH: u16 = 6;
pub const VIRT_HEIGHT: u16 = 7;
pub const X_OFFSET: u16 = 8;
pub const Y_OFFSET: u16 = 9;
/// Video memory in units of 64 KiB.
pub const MEMORY: u16 = 10;

/// The interface's versions: 0xb0c0 and up. Software writes the one it wants and reads what it gets.
const FIRST_ID: u16 = 0xb0c0;
const LAST_ID: u16 = 0xb0c5;

/// The enable register.
pub const ENABLED: u16 = 1 << 0;
const GET_CAPABILITIES: u16 = 1 << 1;
pub const WIDE_DAC: u16 = 1 << 5;
/// Video memory as one piece. It always is, here.
pub const LINEAR: u16 = 1 << 6;
pub const KEEP_MEMORY: u16 = 1 << 7;

/// The largest mode, whose pixels of 32 bits just fit into video memory.
const MAX_XRES: u16 = 2560;
const MAX_YRES: u16 = 1600;
const MAX_BPP: u16 = 32;

const UNIT: u64 = 64 << 10;

#[derive(Clone)]
pub struct Dispi {
    id: u16,
    pub index: u16,
    xres: u16,
    yres: u16,
    bpp: u16,
    enable: u16,
    bank: u16,
    virt_width: u16,
    x_offset: u16,
    y_offset: u16,
}

/// Where in video memory the pixels of a linear mode are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub width: usize,
    pub height: usize,
    pub bpp: u16,
    /// Bytes from a row to the next; for 4 bits a pixel, which are planar, dwords.
    pub pitch: usize,
    pub x: usize,
    pub y: usize,
}

impl Dispi {
    pub fn new() -> Self {
        Dispi {
            id: LAST_ID,
            index: 0,
            xres: 0,
            yres: 0,
            bpp: 8,
            enable: 0,
            bank: 0,
            virt_width: 0,
            x_offset: 0,
            y_offset: 0,
        }
    }

    pub fn enabled(&self) -> bool {
        self.enable & ENABLED != 0
    }

    pub fn wide_dac(&self) -> bool {
        self.enable & WIDE_DAC != 0
    }

    pub fn bits_per_pixel(&self) -> u16 {
        self.bpp
    }

    /// Where the 64 KiB at 0xa0000 are in video memory, in units of what the CPU addresses.
    pub fn bank_offset(&self) -> usize {
        if self.enabled() { usize::from(self.bank) << 16 } else { 0 }
    }

    pub fn read(&self, register: u16) -> u16 {
        let asks = self.enable & GET_CAPABILITIES != 0;
        match register {
            ID => self.id,
            XRES if asks => MAX_XRES,
            YRES if asks => MAX_YRES,
            BPP if asks => MAX_BPP,
            XRES => self.xres,
            YRES => self.yres,
            BPP => self.bpp,
            ENABLE => self.enable,
            BANK => self.bank,
            VIRT_WIDTH => self.virtual_width() as u16,
            VIRT_HEIGHT => self.virtual_height().min(usize::from(u16::MAX)) as u16,
            X_OFFSET => self.x_offset,
            Y_OFFSET => self.y_offset,
            MEMORY => (memory::SIZE / UNIT) as u16,
            _ => 0,
        }
    }

    /// Says whether a mode begins and video memory is to be cleared for it.
    pub fn write(&mut self, register: u16, value: u16) -> bool {
        match register {
            ID if (FIRST_ID..=LAST_ID).contains(&value) => self.id = value,
            XRES => self.xres = value.min(MAX_XRES),
            YRES => self.yres = value.min(MAX_YRES),
            // 0 has always stood for 8.
            BPP => self.bpp = if matches!(value, 4 | 8 | 15 | 16 | 24 | 32) { value } else { 8 },
            BANK => self.bank = value & ((memory::SIZE / UNIT) as u16 - 1),
            VIRT_WIDTH => self.virt_width = value,
            X_OFFSET => self.x_offset = value,
            Y_OFFSET => self.y_offset = value,
            ENABLE => return self.set_enable(value),
            _ => {}
        }
        false
    }

    fn set_enable(&mut self, value: u16) -> bool {
        let begins = value & ENABLED != 0 && !self.enabled();
        self.enable = value;
        if begins {
            (self.virt_width, self.x_offset, self.y_offset, self.bank) = (self.xres, 0, 0, 0);
        }
        begins && value & KEEP_MEMORY == 0
    }

    /// Bytes (4 bits a pixel: dwords) that `pixels` take.
    fn bytes(&self, pixels: usize) -> usize {
        match self.bpp {
            4 => pixels.div_ceil(8),
            8 => pixels,
            15 | 16 => pixels * 2,
            24 => pixels * 3,
            _ => pixels * 4,
        }
    }

    /// Video memory in the units of [`bytes`](Self::bytes).
    fn room(&self) -> usize {
        memory::SIZE as usize / if self.bpp == 4 { 4 } else { 1 }
    }

    /// The width that a row has in memory: at least that of the screen, and no more than lets the screen's rows fit.
    fn virtual_width(&self) -> usize {
        let wanted = usize::from(self.virt_width.max(self.xres));
        let fits = self.bytes(wanted).saturating_mul(self.yres.into()) <= self.room();
        if fits { wanted } else { self.xres.into() }
    }

    fn virtual_height(&self) -> usize {
        self.room().checked_div(self.bytes(self.virtual_width())).unwrap_or(0)
    }

    /// What to show, while the interface is enabled and the mode has any pixels.
    pub fn geometry(&self) -> Option<Geometry> {
        if !self.enabled() || self.xres == 0 || self.yres == 0 {
            return None;
        }
        let (width, height) = (usize::from(self.xres), usize::from(self.yres));
        let pitch = self.bytes(self.virtual_width());
        let x = usize::from(self.x_offset).min(self.virtual_width() - width);
        let y = usize::from(self.y_offset).min(self.virtual_height().saturating_sub(height));
        // Of planar pixels, eight lie in one place.
        let x = if self.bpp == 4 { x / 8 } else { self.bytes(x) };
        Some(Geometry { width, height, bpp: self.bpp, pitch, x, y })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(xres: u16, yres: u16, bpp: u16) -> Dispi {
        let mut dispi = Dispi::new();
        for (register, value) in [(XRES, xres), (YRES, yres), (BPP, bpp), (ENABLE, ENABLED)] {
            dispi.write(register, value);
        }
        dispi
    }

    #[test]
    fn software_finds_the_version_that_it_asks_for() {
        let mut dispi = Dispi::new();
        assert_eq!(dispi.read(ID), 0xb0c5);
        dispi.write(ID, 0xb0c2);
        assert_eq!(dispi.read(ID), 0xb0c2);
        dispi.write(ID, 0x1234);
        assert_eq!((dispi.read(ID), dispi.read(MEMORY)), (0xb0c2, 256));
    }

    #[test]
    fn capabilities_are_told_instead_of_the_mode() {
        let mut dispi = mode(640, 480, 8);
        dispi.write(ENABLE, GET_CAPABILITIES);
        assert_eq!([XRES, YRES, BPP].map(|register| dispi.read(register)), [2560, 1600, 32]);
        dispi.write(ENABLE, 0);
        assert_eq!([XRES, YRES, BPP].map(|register| dispi.read(register)), [640, 480, 8]);
    }

    #[test]
    fn a_mode_begins_with_cleared_memory_unless_it_is_to_be_kept() {
        let mut dispi = mode(640, 480, 32);
        assert!(!dispi.write(ENABLE, ENABLED), "it is on already");
        dispi.write(ENABLE, 0);
        assert!(dispi.write(ENABLE, ENABLED));
        dispi.write(ENABLE, 0);
        assert!(!dispi.write(ENABLE, ENABLED | KEEP_MEMORY));
    }

    #[test]
    fn a_screen_can_be_a_window_into_a_larger_picture() {
        let mut dispi = mode(640, 480, 16);
        dispi.write(VIRT_WIDTH, 1024);
        dispi.write(X_OFFSET, 100);
        dispi.write(Y_OFFSET, 50);
        let expected = Geometry { width: 640, height: 480, bpp: 16, pitch: 2048, x: 200, y: 50 };
        assert_eq!(dispi.geometry(), Some(expected));
        assert_eq!(dispi.read(VIRT_HEIGHT), 8192);
        dispi.write(X_OFFSET, 0xffff);
        dispi.write(Y_OFFSET, 0xffff);
        assert_eq!(dispi.geometry().map(|g| (g.x, g.y)), Some((768, 8192 - 480)));
    }

    #[test]
    fn no_mode_reaches_beyond_video_memory() {
        let values = [0, 1, 7, 640, 2560, 0x7fff, 0xffff];
        for bpp in [4, 8, 15, 16, 24, 32, 99] {
            for (xres, yres) in values.iter().flat_map(|x| values.map(|y| (*x, y))) {
                let mut dispi = mode(xres, yres, bpp);
                for virt in values {
                    dispi.write(VIRT_WIDTH, virt);
                    dispi.write(X_OFFSET, virt);
                    dispi.write(Y_OFFSET, virt);
                    let Some(g) = dispi.geometry() else { continue };
                    let end = (g.y + g.height - 1) * g.pitch + g.x + dispi.bytes(g.width);
                    assert!(end <= dispi.room(), "{g:?}");
                }
            }
        }
    }
}
