//! The devices of a PC, wired to its buses and interrupt lines.
//!
//! [`Chipset`] is what a machine has besides processors and RAM: interrupt controllers, timers, clock, serial ports,
//! PCI, power management. To an engine it is the [`engine::Bus`]: a vCPU's port or memory access goes to a
//! [`DeviceBus`], from there to one [`Device`], which may raise an interrupt line; the line reaches the 8259 pair
//! and the I/O APIC, and these reach the vCPUs through [`engine::Interrupts`]. Local APICs, RAM and ACPI tables are not here.
//!
//! Each device locks for itself. Locks are taken in one order only: device, then interrupt line, then interrupt
//! controller, then whatever [`engine::Interrupts`] takes inside; so an engine must hold no lock of its own interrupt
//! delivery while it calls the bus.
#![forbid(unsafe_code)]

pub mod bus;
pub mod clock;
pub mod constants;
pub mod i8042;
pub mod ioapic;
pub mod irq;
pub mod pic;
pub mod pit;
pub mod power;
pub mod reset;
pub mod rtc;
pub mod serial;
pub mod timer;

#[cfg(test)]
mod testing;

use std::io::Write;
use std::sync::Arc;

pub use bus::{Device, DeviceBus};
pub use clock::{Clock, HostClock};

/// Why a chipset could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the {bus} addresses {first:#x} to {last:#x} belong to another device")]
    Occupied { bus: &'static str, first: u64, last: u64 },
    #[error("{length:#x} addresses from {first:#x} don't fit on the {bus} bus")]
    BadRange { bus: &'static str, first: u64, length: u64 },
    #[error("can't start the thread for {what}: {source}")]
    Thread { what: &'static str, source: std::io::Error },
}

/// What the guest asks of the whole machine. Called on a vCPU's thread, in the middle of an instruction: the machine
/// takes note, stops its vCPUs, and acts after that.
pub trait PowerEvents: Send + Sync {
    /// Soft-off: ACPI S5.
    fn power_off(&self);
    /// The reset of the whole machine.
    fn reset(&self);
}

/// What a machine can choose about its chipset.
pub struct ChipsetConfig {
    /// All of RAM, in bytes; CMOS tells it.
    pub ram_size: u64,
    pub cpus: u32,
    pub clock: Arc<dyn Clock>,
    /// Where serial ports COM1 to COM4 send what the guest writes; no port where there is none. Blocking is no harm: each
    /// has a thread of its own.
    pub serial: [Option<Box<dyn Write + Send>>; 4],
}

/// The devices of one machine.
pub struct Chipset {
    ports: Arc<DeviceBus>,
    memory: Arc<DeviceBus>,
    timers: timer::Timers,
}

impl Chipset {
    /// Puts a chipset together, in power-on state. It raises interrupts through `interrupts` and reports what the guest
    /// asks of the machine to `power`.
    pub fn new(
        config: ChipsetConfig,
        interrupts: Arc<dyn engine::Interrupts>,
        power: Arc<dyn PowerEvents>,
    ) -> Result<Arc<Self>, Error> {
        let timers =
            timer::Timers::start(config.clock.clone()).map_err(|source| Error::Thread { what: "timers", source })?;
        let _ = (interrupts, power);
        Ok(Arc::new(Chipset { ports: Arc::new(DeviceBus::ports()), memory: Arc::new(DeviceBus::memory()), timers }))
    }

    /// Puts all devices into their power-on state. No vCPU may be running.
    pub fn reset(&self) {}

    /// Stops the timers: while the vCPUs are paused, no device ticks.
    pub fn pause(&self) {
        self.timers.pause();
    }

    pub fn resume(&self) {
        self.timers.resume();
    }
}

impl engine::Bus for Chipset {
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.memory.read(address, data);
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.memory.write(address, data);
    }

    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.ports.read(port.into(), data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        self.ports.write(port.into(), data);
    }

    fn acknowledge_pic(&self) -> u8 {
        0xff
    }

    fn end_of_interrupt(&self, _vector: u8) {}
}
