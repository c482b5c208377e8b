//! PCI bus 0: its functions, the two ways to their configuration spaces, and their windows on the other buses.
//!
//! Data flow: a configuration access comes from port 0xcfc ([`ConfigPorts`]) or from the memory-mapped space ([`Ecam`]),
//! and reaches the function in that slot. If it has changed where the function decodes, by its base address registers or by registers of
//! its own, the windows on the memory and port buses are brought up to date.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::config::BarWindow;
use crate::reset::ResetControl;
use crate::{Device, DeviceBus, Error};

/// A function on the PCI bus. Called concurrently; it locks for itself.
pub trait PciFunction: Send + Sync {
    /// `offset` is below 4096 and the 1, 2 or 4 bytes don't cross a multiple of 4.
    fn read_config(&self, offset: u16, data: &mut [u8]);
    fn write_config(&self, offset: u16, data: &[u8]);
    /// What its base address registers decode now; see [`ConfigSpace::windows`](super::ConfigSpace::windows).
    fn windows(&self) -> Vec<BarWindow>;
    /// What answers behind a base address register; offset 0 is the window's first address.
    fn bar(&self, index: usize) -> Option<Arc<dyn Device>>;
    /// Puts the function into its power-on state and lowers its interrupt line.
    fn reset(&self);
}

struct Slot {
    function: Arc<dyn PciFunction>,
    /// The windows that are on the buses now.
    mapped: Vec<BarWindow>,
}

/// Bus 0.
pub struct PciBus {
    /// By device number * 8 + function number.
    slots: Mutex<BTreeMap<u8, Slot>>,
    // The buses own this bus's ports; owning them back would keep all of it alive for ever.
    memory: Weak<DeviceBus>,
    ports: Weak<DeviceBus>,
}

impl PciBus {
    pub fn new(memory: &Arc<DeviceBus>, ports: &Arc<DeviceBus>) -> Self {
        PciBus { slots: Mutex::default(), memory: Arc::downgrade(memory), ports: Arc::downgrade(ports) }
    }

    /// Plugs a function in.
    pub fn insert(&self, device: u8, function: u8, what: Arc<dyn PciFunction>) -> Result<(), Error> {
        let mut slots = self.lock();
        if device >= 32 || function >= 8 || slots.contains_key(&(device * 8 + function)) {
            return Err(Error::PciSlot { device, function });
        }
        slots.insert(device * 8 + function, Slot { function: what, mapped: Vec::new() });
        self.remap(&mut slots);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u8, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn function(&self, bus: u8, slot: u8) -> Option<Arc<dyn PciFunction>> {
        if bus != 0 {
            return None;
        }
        self.lock().get(&slot).map(|slot| slot.function.clone())
    }

    fn read_config(&self, address: ConfigAddress, data: &mut [u8]) {
        match self.function(address.bus, address.slot) {
            Some(function) => function.read_config(address.register, data),
            None => data.fill(0xff),
        }
    }

    fn write_config(&self, address: ConfigAddress, data: &[u8]) {
        let Some(function) = self.function(address.bus, address.slot) else { return };
        let before = function.windows();
        function.write_config(address.register, data);
        if function.windows() != before {
            self.remap(&mut self.lock());
        }
    }

    /// Puts every function's windows where they are wanted. A window that lies over another device stays off the bus
    /// until that one has moved: this is what a guest gets for a conflict.
    fn remap(&self, slots: &mut BTreeMap<u8, Slot>) {
        let (Some(memory), Some(ports)) = (self.memory.upgrade(), self.ports.upgrade()) else { return };
        let bus = |window: &BarWindow| if window.io { &ports } else { &memory };
        for slot in slots.values_mut() {
            let (function, wanted) = (&slot.function, slot.function.windows());
            slot.mapped.retain(|window| {
                let stays = wanted.contains(window);
                if !stays {
                    if let Some(device) = function.bar(window.bar).filter(|_| !window.io) {
                        device.mapped(None);
                    }
                    bus(window).remove(window.address);
                }
                stays
            });
        }
        for slot in slots.values_mut() {
            for window in slot.function.windows() {
                if slot.mapped.contains(&window) {
                    continue;
                }
                let Some(device) = slot.function.bar(window.bar) else { continue };
                match bus(&window).insert(window.address, window.size, 0, device.clone()) {
                    Ok(()) => {
                        if !window.io {
                            device.mapped(Some(window.address));
                        }
                        slot.mapped.push(window);
                    }
                    Err(error) => tracing::debug!("BAR {} is not mapped: {error}", window.bar),
                }
            }
        }
    }

    /// Resets all functions and takes their windows off the buses.
    pub fn reset(&self) {
        let mut slots = self.lock();
        slots.values().for_each(|slot| slot.function.reset());
        self.remap(&mut slots);
    }
}

/// Where a configuration access goes.
#[derive(Clone, Copy)]
struct ConfigAddress {
    bus: u8,
    /// Device number * 8 + function number.
    slot: u8,
    register: u16,
}

/// Configuration mechanism #1 (PCI local bus 3.0, 3.2.2.3.2): eight ports, the address register and the data register.
/// The address register answers only to 32-bit accesses; port 0xcf9, which lies in it, is the reset control register for
/// all others.
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    address: Mutex<u32>,
    reset: ResetControl,
}

const ADDRESS: u64 = 0;
const RESET: u64 = 1;
const DATA: u64 = 4;
/// Bit 31 of the address register lets the data register through; bits 30 to 24 and 1 to 0 are always 0.
const ENABLE: u32 = 1 << 31;
const ADDRESS_BITS: u32 = 0x80ff_fffc;

impl ConfigPorts {
    pub fn new(bus: Arc<PciBus>, reset: ResetControl) -> Self {
        ConfigPorts { bus, address: Mutex::new(0), reset }
    }

    fn address(&self) -> u32 {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_address(&self, value: u32) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = value & ADDRESS_BITS;
    }

    /// What the data register leads to, at its byte `byte`.
    fn selected(&self, byte: u64) -> Option<ConfigAddress> {
        let address = self.address();
        let [register, slot, bus, _] = address.to_le_bytes();
        let register = u16::from(register) | (byte & 3) as u16;
        (address & ENABLE != 0).then_some(ConfigAddress { bus, slot, register })
    }
}

impl Device for ConfigPorts {
    fn width(&self) -> usize {
        4
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if offset >= DATA {
            if let Some(address) = self.selected(offset) {
                self.bus.read_config(address, data);
            }
        } else if let (ADDRESS, [a, b, c, d]) = (offset, &mut *data) {
            [*a, *b, *c, *d] = self.address().to_le_bytes();
        } else if let Some(byte) = byte_at(offset, RESET).and_then(|index| data.get_mut(index)) {
            self.reset.read(0, std::slice::from_mut(byte));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset >= DATA {
            if let Some(address) = self.selected(offset) {
                self.bus.write_config(address, data);
            }
        } else if let (ADDRESS, &[a, b, c, d]) = (offset, data) {
            self.set_address(u32::from_le_bytes([a, b, c, d]));
        } else if let Some(byte) = byte_at(offset, RESET).and_then(|index| data.get(index)) {
            self.reset.write(0, &[*byte]);
        }
    }

    fn reset(&self) {
        self.set_address(0);
        self.reset.reset();
        self.bus.reset();
    }
}

/// The index of the byte at `wanted` in an access that begins at `offset`.
fn byte_at(offset: u64, wanted: u64) -> Option<usize> {
    usize::try_from(wanted.checked_sub(offset)?).ok()
}

/// The memory-mapped configuration space (PCI Express base 5.0, 7.2.2): 4 KiB for each function.
pub struct Ecam {
    // The host bridge, which is on the bus, owns this.
    bus: Weak<PciBus>,
}

impl Ecam {
    pub fn new(bus: Weak<PciBus>) -> Self {
        Ecam { bus }
    }
}

fn ecam_address(offset: u64) -> ConfigAddress {
    ConfigAddress { bus: (offset >> 20) as u8, slot: (offset >> 12) as u8, register: (offset & 0xfff) as u16 }
}

impl Device for Ecam {
    fn width(&self) -> usize {
        4
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.bus.upgrade() {
            Some(bus) => bus.read_config(ecam_address(offset), data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(bus) = self.bus.upgrade() {
            bus.write_config(ecam_address(offset), data);
        }
    }

    fn reset(&self) {}
}
