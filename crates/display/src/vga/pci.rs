//! The adapter on the PCI bus: linear framebuffer, registers in memory, option ROM.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ::memory::Window;
use chipset::Device;
use chipset::pci::{BarKind, BarWindow, ConfigSpace, Identity, OptionRom, PciFunction, ROM_BAR};

use super::edid::edid;
use super::registers::FIRST_PORT;
use super::{Vga, memory};
use crate::Error;

/// What drivers know the adapter by (QEMU `docs/specs/standard-vga.rst`). Revision 2: there are the registers at 0x600.
const IDENTITY: Identity = Identity {
    vendor: 0x1234,
    device: 0x1111,
    revision: 2,
    class: [0x03, 0x00, 0x00],
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// The linear framebuffer, and the registers.
const FRAMEBUFFER_BAR: usize = 0;
const REGISTERS_BAR: usize = 2;
const REGISTERS_SIZE: u64 = 0x1000;

pub struct VgaFunction {
    config: Mutex<ConfigSpace>,
    vga: Arc<Vga>,
    rom: Option<Arc<OptionRom>>,
    /// Where processors reach video memory without asking.
    framebuffer: Window,
}

impl VgaFunction {
    pub fn new(vga: Arc<Vga>, rom: &[u8]) -> Result<Arc<Self>, Error> {
        let mut config = ConfigSpace::new(IDENTITY);
        config.add_bar(FRAMEBUFFER_BAR, BarKind::Memory32Prefetchable, memory::SIZE)?;
        config.add_bar(REGISTERS_BAR, BarKind::Memory32, REGISTERS_SIZE)?;
        let rom = OptionRom::add(rom, &mut config)?;
        let framebuffer = vga.memory.window()?;
        Ok(Arc::new(VgaFunction { config: Mutex::new(config), vga, rom, framebuffer }))
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts video memory where its base address register says. `config` is still locked, so that two vCPUs' moves come
    /// one after the other.
    fn map_framebuffer(&self, config: &ConfigSpace) {
        match config.windows().iter().find(|window| window.bar == FRAMEBUFFER_BAR) {
            Some(window) => self.framebuffer.map(window.address),
            None => self.framebuffer.unmap(),
        }
    }
}

impl PciFunction for VgaFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let mut config = self.config();
        config.write(offset, data);
        self.map_framebuffer(&config);
    }

    fn windows(&self) -> Vec<BarWindow> {
        self.config().windows()
    }

    fn bar(&self, index: usize) -> Option<Arc<dyn Device>> {
        match index {
            FRAMEBUFFER_BAR => Some(Arc::new(Framebuffer(self.vga.clone()))),
            REGISTERS_BAR => Some(Arc::new(RegisterWindow(self.vga.clone()))),
            ROM_BAR => self.rom.clone().map(|rom| rom as Arc<dyn Device>),
            _ => None,
        }
    }

    fn reset(&self) {
        let mut config = self.config();
        config.reset();
        self.map_framebuffer(&config);
        self.vga.reset();
    }
}

/// Video memory, byte by byte.
struct Framebuffer(Arc<Vga>);

impl Device for Framebuffer {
    fn width(&self) -> usize {
        64
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.memory.read(offset as usize, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.memory.write(offset as usize, data);
    }

    fn reset(&self) {}
}

/// EDID, the VGA's ports from 0x3c0 on, DISPI, and the byte order of pixels.
struct RegisterWindow(Arc<Vga>);

const EDID: u64 = 0x000;
const VGA_PORTS: u64 = 0x400;
const VGA_PORTS_END: u64 = 0x420;
const DISPI: u64 = 0x500;
const DISPI_END: u64 = 0x516;
const EXTENDED: u64 = 0x600;
const BYTE_ORDER: u64 = 0x604;
/// Of the registers from 0x600 on, and the only value that the byte order register can have.
const EXTENDED_SIZE: u32 = 8;
const LITTLE_ENDIAN: u32 = 0x1e1e_1e1e;

impl RegisterWindow {
    /// The first of the ports behind the window, as the adapter numbers them.
    fn port(offset: u64) -> u64 {
        u64::from(0x3c0 - FIRST_PORT) + offset - VGA_PORTS
    }
}

impl Device for RegisterWindow {
    fn width(&self) -> usize {
        4
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            EDID..VGA_PORTS => {
                let edid = edid();
                data.iter_mut().zip(edid.iter().skip(offset as usize)).for_each(|(to, from)| *to = *from);
            }
            VGA_PORTS..VGA_PORTS_END => {
                for (byte, port) in data.iter_mut().zip(Self::port(offset)..) {
                    *byte = self.0.read_port(port);
                }
            }
            DISPI..DISPI_END => {
                let value = self.0.read_dispi(((offset - DISPI) / 2) as u16) >> (8 * (offset & 1));
                data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
            }
            EXTENDED => data.iter_mut().zip(EXTENDED_SIZE.to_le_bytes()).for_each(|(to, from)| *to = from),
            BYTE_ORDER => data.iter_mut().zip(LITTLE_ENDIAN.to_le_bytes()).for_each(|(to, from)| *to = from),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match offset {
            VGA_PORTS..VGA_PORTS_END => {
                data.iter().zip(Self::port(offset)..).for_each(|(byte, port)| self.0.write_port(port, *byte));
            }
            DISPI..DISPI_END if offset.is_multiple_of(2) => {
                if let &[low, high, ..] = data {
                    self.0.write_dispi(((offset - DISPI) / 2) as u16, u16::from_le_bytes([low, high]));
                }
            }
            _ => {}
        }
    }

    fn reset(&self) {}
}
