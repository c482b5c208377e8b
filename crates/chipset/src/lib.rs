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

pub mod a20;
pub mod bus;
pub mod clock;
pub mod constants;
pub mod debug;
pub mod dma;
pub mod flash;
pub mod fw_cfg;
pub mod hpet;
pub mod i8042;
pub mod ioapic;
pub mod irq;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod power;
mod ps2;
pub mod reset;
pub mod rtc;
pub mod serial;
pub mod smi;
pub mod test_device;
pub mod timer;

#[cfg(any(test, feature = "testing"))]
pub mod testing;

mod chipset;
mod coprocessor;

use std::io::Write;
use std::sync::Arc;

use memory::Ram;

pub use bus::{Device, DeviceBus};
pub use chipset::Chipset;
pub use clock::{Clock, HostClock};
pub use irq::InterruptLine;

/// Why a chipset could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the {bus} addresses {first:#x} to {last:#x} belong to another device")]
    Occupied { bus: &'static str, first: u64, last: u64 },
    #[error("{length:#x} addresses from {first:#x} don't fit on the {bus} bus")]
    BadRange { bus: &'static str, first: u64, length: u64 },
    #[error("PCI slot {device:02x}.{function} is taken or doesn't exist")]
    PciSlot { device: u8, function: u8 },
    #[error("base address register {index} can't decode {size:#x} addresses")]
    BadBar { index: usize, size: u64 },
    #[error("there is no room for PCI capability {id:#04x}")]
    CapabilitiesFull { id: u8 },
    #[error("can't start the thread for {what}: {source}")]
    Thread { what: &'static str, source: std::io::Error },
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error("the firmware can't be put into memory: {why}")]
    Firmware { why: String },
}

/// What the guest asks of the whole machine. Called on a vCPU's thread, in the middle of an instruction: the machine
/// takes note, stops its vCPUs, and acts after that.
pub trait PowerEvents: Send + Sync {
    /// Soft-off: ACPI S5.
    fn power_off(&self);
    /// The reset of the whole machine.
    fn reset(&self);
    /// The boot processor goes to its reset vector; all else stays as it is.
    fn init(&self);
    /// The guest ends the machine, with an exit status of its choice.
    fn exit(&self, value: u8);
}

/// What a machine can choose about its chipset.
pub struct ChipsetConfig {
    pub ram: Ram,
    pub cpus: u32,
    pub clock: Arc<dyn Clock>,
    /// Where serial ports COM1 to COM4 send what the guest writes; no port where there is none. Blocking is no harm: each
    /// has a thread of its own.
    pub serial: [Option<Box<dyn Write + Send>>; 4],
    /// What the processors start from; without it the chipset is in the state in which firmware leaves it.
    pub firmware: Option<Firmware>,
    /// Where the debug console sends what the guest writes; `None`: no such ports.
    pub debug_console: Option<Box<dyn Write + Send>>,
    /// The first port by which the guest can end the machine.
    pub debug_exit: Option<u16>,
    /// Whether processors have system-management mode. Firmware uses it; without firmware nobody gets to know of it.
    pub smm: bool,
    /// Whether there is the device of test programs ([`test_device`]).
    pub test_device: bool,
}

/// Firmware, and what it is told.
pub struct Firmware {
    pub image: flash::Image,
    pub items: Vec<fw_cfg::Item>,
}
