//! The registers that all ports share (AHCI 3.1), and the function on the PCI bus.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chipset::pci::{BarKind, BarWindow, ConfigSpace, Endpoint, Identity, PciFunction};
use chipset::{Device, InterruptLine};
use memory::View;

use super::port::Port;
use crate::worker::Worker;
use crate::{Drive, Error};

/// Drives that a controller has room for.
pub const PORTS: usize = 6;

/// INTB, as in the ICH9.
pub const PIN: u8 = 1;

/// The window: the shared registers, then those of each port.
const BAR: usize = 5;
const BAR_SIZE: u64 = 0x800;
const FIRST_PORT: u64 = 0x100;
const PORT_SIZE: u64 = 0x80;

/// Offsets of the shared registers.
const CAP: u64 = 0x00;
const GHC: u64 = 0x04;
const IS: u64 = 0x08;
const PI: u64 = 0x0c;
const VS: u64 = 0x10;

/// 64-bit addresses, NCQ, command list override, activity LED, generation 3, nothing but AHCI, 32 slots.
const CAPABILITIES: u32 =
    1 << 31 | 1 << 30 | 1 << 25 | 1 << 24 | 3 << 20 | 1 << 18 | 1 << 14 | 1 << 13 | 31 << 8 | (PORTS as u32 - 1);
const VERSION: u32 = 0x0001_0300;
/// GHC: reset, interrupts enabled, AHCI enabled (which it is always).
const RESET: u32 = 1 << 0;
const ENABLE_INTERRUPTS: u32 = 1 << 1;
const ENABLE_AHCI: u32 = 1 << 31;

/// Serial ATA capability (AHCI 2.6): revision 1.0, no index/data pair.
const CAP_SATA: u8 = 0x12;

/// What the ports share.
pub struct Shared {
    endpoint: Endpoint,
    registers: Mutex<Registers>,
}

#[derive(Default)]
struct Registers {
    /// Software wants interrupts.
    enabled: bool,
    /// A bit for each port that has something to tell, and for each of which it has been told.
    ports: u32,
    pending: u32,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn may_master(&self) -> bool {
        self.endpoint.bus_master()
    }

    /// A port says whether it has something to tell, and whether that is something new.
    pub fn port_interrupt(&self, port: u8, wanted: bool, again: bool) {
        let mut registers = self.lock();
        let bit = 1 << port;
        if wanted {
            registers.ports |= bit;
            registers.pending |= bit;
        } else {
            registers.ports &= !bit;
        }
        self.drive(&registers, wanted && again);
    }

    /// Software clears bits of IS: those of ports that still have something to tell come back at once.
    fn clear(&self, bits: u32) {
        let mut registers = self.lock();
        registers.pending &= !bits;
        registers.pending |= registers.ports;
        self.drive(&registers, registers.pending != 0);
    }

    fn drive(&self, registers: &Registers, again: bool) {
        self.endpoint.set_interrupt(registers.enabled && registers.pending != 0, again);
    }
}

/// The controller.
pub struct AhciController {
    shared: Arc<Shared>,
    window: Arc<Window>,
    _workers: Vec<Worker>,
}

impl AhciController {
    /// Makes a controller with a drive at each port that has one. It interrupts by MSI through `interrupts`, or by `line`.
    pub fn new(
        drives: [Option<Drive>; PORTS],
        memory: &View,
        interrupts: Arc<dyn engine::Interrupts>,
        line: InterruptLine,
    ) -> Result<Arc<Self>, Error> {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x2922,
            revision: 2,
            // AHCI.
            class: [0x01, 0x06, 0x01],
            subsystem_vendor: 0x8086,
            subsystem: 0x2922,
        });
        config.add_bar(BAR, BarKind::Memory32, BAR_SIZE)?;
        config.add_capability(CAP_SATA, &[0x10, 0x00, 0x00, 0x00, 0x00, 0x00], &[])?;
        // MAP: nothing but AHCI. PCS: which ports are enabled, and which have a drive.
        config.set(0x90, &[0x60]);
        let there = (0u8..).zip(&drives).fold(0u8, |bits, (port, drive)| bits | u8::from(drive.is_some()) << port);
        config.set(0x92, &[0x3f, there]);
        let endpoint = Endpoint::new(config, PIN, true, line, interrupts)?;
        let shared = Arc::new(Shared { endpoint, registers: Mutex::default() });
        let ports: Vec<_> = (0u8..)
            .zip(drives)
            .map(|(number, drive)| Port::new(number, drive, memory.clone(), Arc::downgrade(&shared)))
            .collect();
        let workers = ports.iter().map(|port| port.start()).collect::<Result<Vec<_>, _>>()?;
        let window = Arc::new(Window { shared: shared.clone(), ports });
        Ok(Arc::new(AhciController { shared, window, _workers: workers.into_iter().flatten().collect() }))
    }
}

impl PciFunction for AhciController {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.shared.endpoint.read_config(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.shared.endpoint.write_config(offset, data);
        // They may use memory from now on, or must not any more.
        self.window.ports.iter().for_each(|port| port.wake());
    }

    fn windows(&self) -> Vec<BarWindow> {
        self.shared.endpoint.windows()
    }

    fn bar(&self, index: usize) -> Option<Arc<dyn Device>> {
        (index == BAR).then(|| self.window.clone() as Arc<dyn Device>)
    }

    fn reset(&self) {
        self.window.reset_all(true);
        self.shared.endpoint.reset();
    }
}

/// What answers behind the base address register.
struct Window {
    shared: Arc<Shared>,
    ports: Vec<Arc<Port>>,
}

impl Window {
    fn reset_all(&self, power_on: bool) {
        *self.shared.lock() = Registers::default();
        self.shared.endpoint.set_interrupt(false, false);
        self.ports.iter().for_each(|port| port.reset(power_on));
    }

    fn port(&self, offset: u64) -> Option<(&Port, u64)> {
        let offset = offset.checked_sub(FIRST_PORT)?;
        Some((self.ports.get((offset / PORT_SIZE) as usize)?, offset % PORT_SIZE))
    }

    fn read_register(&self, offset: u64) -> u32 {
        if let Some((port, offset)) = self.port(offset) {
            return port.read(offset);
        }
        match offset {
            CAP => CAPABILITIES,
            GHC => ENABLE_AHCI | if self.shared.lock().enabled { ENABLE_INTERRUPTS } else { 0 },
            IS => self.shared.lock().pending,
            PI => (1 << PORTS) - 1,
            VS => VERSION,
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        if let Some((port, offset)) = self.port(offset) {
            return port.write(offset, value);
        }
        match offset {
            GHC if value & RESET != 0 => self.reset_all(false),
            GHC => {
                let mut registers = self.shared.lock();
                registers.enabled = value & ENABLE_INTERRUPTS != 0;
                self.shared.drive(&registers, false);
            }
            IS => self.shared.clear(value),
            _ => {}
        }
    }
}

impl Device for Window {
    fn width(&self) -> usize {
        4
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.read_register(offset & !3).to_le_bytes();
        data.iter_mut().zip(bytes.iter().skip(offset as usize & 3)).for_each(|(to, from)| *to = *from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        if data.len() < 4 {
            // What is not written keeps its value, where writing it back does so: not where ones clear or set bits.
            let offset = offset & !3;
            let acts = matches!(self.port(offset), Some((_, 0x10 | 0x30 | 0x34 | 0x38))) || offset == IS;
            if !acts {
                bytes = self.read_register(offset).to_le_bytes();
            }
        }
        bytes.iter_mut().skip(offset as usize & 3).zip(data).for_each(|(to, from)| *to = *from);
        self.write_register(offset & !3, u32::from_le_bytes(bytes));
    }

    fn reset(&self) {
        // The PCI function does it.
    }
}
