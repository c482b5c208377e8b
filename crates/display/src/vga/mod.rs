//! The VGA: an adapter as QEMU and Bochs have it ("stdvga", PCI 1234:1111), with all of a VGA's own modes and the linear
//! ones of DISPI.
//!
//! Data flow: the guest writes registers ([`registers`]) and video memory ([`memory`]; through the planes' logic in
//! [`planes`] at 0xa0000, directly in the linear framebuffer). Nobody draws then. Whoever wants to see the screen calls
//! [`Vga::draw`], on a thread of its own, which takes a copy of the registers and reads video memory while the guest may
//! go on writing it, as a monitor does.

pub mod boot;
mod dac;
mod dispi;
mod edid;
mod linear;
mod memory;
mod pci;
mod planes;
mod registers;
mod scanout;
#[cfg(test)]
mod tests;
mod timing;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ::memory::Ram;
use chipset::{Chipset, Clock, Device};

use self::memory::{LEGACY_SIZE, VideoMemory};
use crate::{Error, Frame};
use pci::VgaFunction;
use registers::{FIRST_PORT, PORTS, Registers};
use scanout::Blink;
use timing::Timing;

/// What video memory below 1 MiB answers at.
const WINDOW: u64 = 0xa_0000;
const WINDOW_SIZE: u64 = 0x2_0000;
/// The ports of DISPI: index, and data at the next port or the one after it.
const DISPI_PORT: u16 = 0x1ce;
const DISPI_PORTS: u16 = 3;

/// The least size of a screen that is off.
const NO_MODE: (usize, usize) = (640, 400);

/// The adapter.
pub struct Vga {
    clock: Arc<dyn Clock>,
    memory: VideoMemory,
    registers: Mutex<Registers>,
    /// Counts what may change the picture, but for video memory.
    changes: AtomicU64,
    /// Of what was drawn last.
    drawn: Mutex<Option<Moment>>,
}

/// Equal moments show equal pictures, but for what is in video memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Moment {
    changes: u64,
    blink: Option<Blink>,
}

impl Vga {
    /// Plugs an adapter into a machine with that RAM, as PCI device `slot`, with `rom` as its option ROM.
    pub fn plug_in(
        chipset: &Chipset,
        ram: &Ram,
        clock: Arc<dyn Clock>,
        slot: u8,
        rom: &[u8],
    ) -> Result<Arc<Self>, Error> {
        let vga = Self::new(ram, clock)?;
        ram.map().set_area(WINDOW, WINDOW_SIZE, false, false);
        chipset.insert_ports(FIRST_PORT, PORTS, 0, Arc::new(Ports(vga.clone())))?;
        chipset.insert_ports(DISPI_PORT, DISPI_PORTS, 0, Arc::new(DispiPorts(vga.clone())))?;
        chipset.insert_memory(WINDOW, WINDOW_SIZE, 0, Arc::new(Window(vga.clone())))?;
        chipset.insert_pci(slot, 0, VgaFunction::new(vga.clone(), rom)?)?;
        Ok(vga)
    }

    fn new(ram: &Ram, clock: Arc<dyn Clock>) -> Result<Arc<Self>, Error> {
        Ok(Arc::new(Vga {
            clock,
            memory: VideoMemory::new(ram)?,
            registers: Mutex::new(Registers::new()),
            changes: AtomicU64::new(0),
            drawn: Mutex::new(None),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.fetch_add(1, Ordering::Release);
    }

    fn moment(&self) -> Moment {
        let registers = self.lock();
        let blink = (!registers.dispi.enabled()).then(|| self.blink(&registers));
        Moment { changes: self.changes.load(Ordering::Acquire), blink }
    }

    /// Draws what the screen shows if that may be something new since the last call. Says whether it has drawn.
    pub fn draw_changes(&self, frame: &mut Frame) -> bool {
        let mut drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        let moment = self.moment();
        let dirty = self.memory.take_dirty();
        if !dirty && *drawn == Some(moment) {
            return false;
        }
        *drawn = Some(moment);
        self.draw(frame);
        true
    }

    fn blink(&self, registers: &Registers) -> Blink {
        Blink::at(Timing::of(registers).frames(self.clock.now()))
    }

    /// Draws what the screen shows, and makes the frame as large as that is.
    pub fn draw(&self, frame: &mut Frame) {
        let registers = self.lock().clone();
        let geometry = registers.dispi.geometry();
        let (width, height) = match geometry {
            Some(geometry) => (geometry.width, geometry.height),
            None => scanout::size(&registers),
        };
        let on = registers.screen_on();
        // Before any mode is set there is a screen all the same.
        let (width, height) = if on { (width, height) } else { (width.max(NO_MODE.0), height.max(NO_MODE.1)) };
        frame.resize(width, height);
        if !on {
            frame.fill(0);
        } else if let Some(geometry) = geometry {
            linear::draw(&registers, &self.memory, geometry, frame);
        } else {
            let mut planes = vec![0; LEGACY_SIZE];
            self.memory.read(0, &mut planes);
            scanout::draw(&registers, &planes, self.blink(&registers), frame);
        }
    }

    fn read_port(&self, port: u64) -> u8 {
        let now = self.clock.now();
        self.lock().read(port, now)
    }

    fn write_port(&self, port: u64, value: u8) {
        if self.lock().write(port, value) {
            self.changed();
        }
    }

    fn read_dispi(&self, register: u16) -> u16 {
        self.lock().dispi.read(register)
    }

    fn write_dispi(&self, register: u16, value: u16) {
        let mut registers = self.lock();
        if registers.write_dispi(register, value) {
            let visible = registers.dispi.geometry().map_or(0, |g| g.height.saturating_mul(g.pitch));
            let unit = if registers.dispi.bits_per_pixel() == 4 { 4 } else { 1 };
            self.memory.clear(visible.saturating_mul(unit));
        }
        drop(registers);
        self.changed();
    }

    /// Power-on state; memory keeps what it holds.
    fn reset(&self) {
        *self.lock() = Registers::new();
        self.changed();
    }
}

/// Ports 0x3b0 to 0x3df.
struct Ports(Arc<Vga>);

impl Device for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(self.0.read_port(offset));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(&value) = data.first() {
            self.0.write_port(offset, value);
        }
    }

    fn reset(&self) {}
}

/// Ports 0x1ce to 0x1d0: words only.
struct DispiPorts(Arc<Vga>);

impl Device for DispiPorts {
    fn width(&self) -> usize {
        4
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let index = self.0.lock().dispi.index;
        let value = if offset == 0 { index } else { self.0.read_dispi(index) };
        data.fill(0);
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[low, high, ..] = data else { return };
        let value = u16::from_le_bytes([low, high]);
        if offset == 0 {
            self.0.lock().dispi.index = value;
        } else {
            let index = self.0.lock().dispi.index;
            self.0.write_dispi(index, value);
        }
    }

    fn reset(&self) {}
}

/// 0xa0000 to 0xbffff.
struct Window(Arc<Vga>);

impl Device for Window {
    fn width(&self) -> usize {
        64
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut registers = self.0.lock();
        for (address, byte) in (offset as usize..).zip(data) {
            *byte = planes::read(&mut registers, &self.0.memory, address);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let registers = self.0.lock();
        for (address, byte) in (offset as usize..).zip(data) {
            planes::write(&registers, &self.0.memory, address, *byte);
        }
    }

    fn reset(&self) {}
}
