//! The two functions that every PC has and that do nothing but say so: host bridge and LPC (ISA) bridge, as in a Q35.
//!
//! Their registers are read-only: firmware would have set and locked them, and here nothing has to be set.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::bus::PciFunction;
use super::config::{BarWindow, ConfigSpace, Identity};
use crate::Device;
use crate::constants::{ECAM_BASE, PM_BASE};

const INTEL: u16 = 0x8086;
const BRIDGE_CLASS: u8 = 0x06;

/// A function that is nothing but its configuration space.
pub struct PlainFunction {
    config: Mutex<ConfigSpace>,
}

impl PlainFunction {
    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for PlainFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.lock().write(offset, data);
    }

    fn windows(&self) -> Vec<BarWindow> {
        self.lock().windows()
    }

    fn bar(&self, _index: usize) -> Option<Arc<dyn Device>> {
        None
    }

    fn reset(&self) {
        self.lock().reset();
    }
}

fn bridge(device: u16, revision: u8, subclass: u8) -> ConfigSpace {
    ConfigSpace::new(Identity {
        vendor: INTEL,
        device,
        revision,
        class: [BRIDGE_CLASS, subclass, 0],
        subsystem_vendor: 0,
        subsystem: 0,
    })
}

/// The memory controller hub, function 00.0 (Intel 3 Series Express Chipset datasheet, chapter 5).
pub fn host_bridge(ram_size: u64) -> Arc<PlainFunction> {
    const MIB: u64 = 1 << 20;
    let mut config = bridge(0x29c0, 2, 0x00);
    // PCIEXBAR: 256 buses, enabled.
    config.set(0x60, &(ECAM_BASE | 1).to_le_bytes());
    // PAM0 to PAM6: what lies between 640 KiB and 1 MiB is RAM, readable and writable.
    config.set(0x90, &[0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33]);
    let low = ram_size.min(ECAM_BASE);
    let top = if ram_size > low { (1 << 32) + ram_size - low } else { 1 << 32 };
    // TOM in units of 64 MiB, TOUUD in MiB, TOLUD in MiB from bit 4 on.
    config.set(0xa0, &((ram_size.div_ceil(64 * MIB)).min(0x3ff) as u16).to_le_bytes());
    config.set(0xa2, &((top / MIB).min(0xffff) as u16).to_le_bytes());
    config.set(0xb0, &(((low / MIB) << 4) as u16).to_le_bytes());
    Arc::new(PlainFunction { config: Mutex::new(config) })
}

/// The LPC interface, function 1f.0 (Intel ICH9 datasheet, chapter 13).
pub fn lpc_bridge() -> Arc<PlainFunction> {
    let mut config = bridge(0x2918, 2, 0x01);
    // Header type: the device may have further functions.
    config.set(0x0e, &[0x80]);
    // PMBASE: the power-management block, in I/O space. ACPI_CNTL: enabled, the interrupt is IRQ 9.
    config.set(0x40, &(u32::from(PM_BASE) | 1).to_le_bytes());
    config.set(0x44, &[0x80]);
    // GPIOBASE: in I/O space, off.
    config.set(0x48, &1u32.to_le_bytes());
    // PIRQ[A-H]_ROUT: no PCI interrupt goes to the 8259 pair, they all go to the I/O APIC.
    config.set(0x60, &[0x80; 4]);
    config.set(0x68, &[0x80; 4]);
    // LPC_EN: keyboard controller, COM A and COM B.
    config.set(0x82, &0x0403u16.to_le_bytes());
    Arc::new(PlainFunction { config: Mutex::new(config) })
}
