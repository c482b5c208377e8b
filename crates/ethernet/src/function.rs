//! The card as a function on the PCI bus.

use std::sync::{Arc, Mutex, PoisonError};

use chipset::pci::msix::ENTRY_SIZE;
use chipset::pci::{BarKind, BarWindow, ConfigSpace, Endpoint, Identity, OptionRom, PciFunction, ROM_BAR};
use chipset::{Device, InterruptLine};
use memory::View;
use net::{Backend, Mac};
use wake::{Event, Worker};

use crate::card::Card;
use crate::causes::VECTORS;
use crate::registers::SIZE;
use crate::{Error, Model, worker};

/// Base address registers: the registers, the same by two ports, the MSI-X table.
const REGISTERS: usize = 0;
const PORTS_E1000: (usize, u64) = (1, 64);
const FLASH_E1000E: usize = 1;
const PORTS_E1000E: (usize, u64) = (2, 32);
const TABLE: usize = 3;
const TABLE_SIZE: u64 = 0x4000;
const PENDING: u64 = 0x2000;
const CAP_POWER: u8 = 0x01;
const CAP_MSIX: u8 = 0x11;
const MSIX_CONTROL: u16 = 2;

/// A network card.
pub struct NetworkCard {
    card: Arc<Card>,
    msix: Option<u16>,
    registers: Arc<Registers>,
    ports: (usize, Arc<Ports>),
    table: Arc<Table>,
    rom: Option<Arc<OptionRom>>,
    _worker: Worker,
}

impl NetworkCard {
    /// A card that is attached to `backend`. It interrupts by `line`, or by messages through `interrupts`. `rom`: by which
    /// firmware boots from it; empty: none.
    pub fn new(
        model: Model,
        mac: Mac,
        rom: &[u8],
        backend: Box<dyn Backend>,
        memory: &View,
        interrupts: Arc<dyn engine::Interrupts>,
        line: InterruptLine,
    ) -> Result<Arc<Self>, Error> {
        let (device, revision, subsystem) = match model {
            Model::E1000 => (0x100e, 3, 0x001e),
            Model::E1000e => (0x10d3, 0, 0x0000),
        };
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device,
            revision,
            class: [0x02, 0x00, 0x00],
            subsystem_vendor: 0x8086,
            subsystem,
        });
        config.add_bar(REGISTERS, BarKind::Memory32, SIZE)?;
        // Power management 1.1; D0 and D3.
        config.add_capability(CAP_POWER, &[0x22, 0xc8, 0x00, 0x20, 0x00, 0x00], &[0, 0, 0x03, 0x01, 0, 0])?;
        let mut msix = None;
        let (ports, ports_size) = match model {
            Model::E1000 => PORTS_E1000,
            Model::E1000e => {
                config.add_bar(FLASH_E1000E, BarKind::Memory32, SIZE)?;
                config.add_bar(TABLE, BarKind::Memory32, TABLE_SIZE)?;
                let mut body = (VECTORS as u16 - 1).to_le_bytes().to_vec();
                body.extend((TABLE as u32).to_le_bytes());
                body.extend((PENDING as u32 | TABLE as u32).to_le_bytes());
                msix = Some(config.add_capability(CAP_MSIX, &body, &[0x00, 0xc0])?.into());
                PORTS_E1000E
            }
        };
        config.add_bar(ports, BarKind::Io, ports_size)?;
        let rom = OptionRom::add(rom, &mut config)?;
        let host = |what| move |source| Error::Host { what, source };
        let kick = Event::new().map_err(host("event"))?;
        let endpoint = Endpoint::new(config, 0, model == Model::E1000e, line, interrupts.clone())?;
        let vectors = if model == Model::E1000e { VECTORS } else { 0 };
        let card = Arc::new(Card::new(model, mac, kick, endpoint, vectors, interrupts, memory.clone()));
        let theirs = card.clone();
        let worker = Worker::start("network-card", move |stop| worker::work(&theirs, backend, stop));
        let worker = worker.map_err(host("thread"))?;
        Ok(Arc::new(NetworkCard {
            msix,
            registers: Arc::new(Registers(card.clone())),
            ports: (ports, Arc::new(Ports { card: card.clone(), address: Mutex::new(0) })),
            table: Arc::new(Table(card.clone())),
            rom,
            card,
            _worker: worker,
        }))
    }
}

impl PciFunction for NetworkCard {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.card.endpoint.read_config(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.card.endpoint.write_config(offset, data);
        if let Some(place) = self.msix {
            let mut control = [0; 2];
            self.card.endpoint.read_config(place + MSIX_CONTROL, &mut control);
            let released = self.card.msix().set_control(u16::from_le_bytes(control));
            released.into_iter().for_each(|message| self.card.send(message));
        }
        // It may use memory from now on.
        self.card.kick.set();
    }

    fn windows(&self) -> Vec<BarWindow> {
        self.card.endpoint.windows()
    }

    fn bar(&self, index: usize) -> Option<Arc<dyn Device>> {
        match index {
            REGISTERS => Some(self.registers.clone()),
            index if index == self.ports.0 => Some(self.ports.1.clone()),
            TABLE => Some(self.table.clone()),
            ROM_BAR => self.rom.clone().map(|rom| rom as Arc<dyn Device>),
            FLASH_E1000E => Some(Arc::new(NoFlash)),
            _ => None,
        }
    }

    fn reset(&self) {
        self.card.reset();
        *self.ports.1.address.lock().unwrap_or_else(PoisonError::into_inner) = 0;
    }
}

/// The registers as memory.
struct Registers(Arc<Card>);

impl Device for Registers {
    fn width(&self) -> usize {
        4
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.0.read(offset & !3).to_le_bytes();
        data.iter_mut().zip(bytes.iter().skip(offset as usize & 3)).for_each(|(to, from)| *to = *from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // Registers are written whole (82574 datasheet, 10.1); less is no write.
        if let Ok(bytes) = data.try_into() {
            self.0.write(offset, u32::from_le_bytes(bytes));
        }
    }

    fn reset(&self) {
        // The PCI function does it.
    }
}

/// The registers by two ports: the offset, and what is there.
struct Ports {
    card: Arc<Card>,
    address: Mutex<u32>,
}

const ADDRESS: u64 = 0;
const DATA: u64 = 4;

impl Ports {
    fn address(&self) -> std::sync::MutexGuard<'_, u32> {
        self.address.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Ports {
    fn width(&self) -> usize {
        4
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let address = *self.address();
        let value = match offset & !3 {
            ADDRESS => address,
            DATA if u64::from(address) < SIZE => self.card.read(u64::from(address & !3)),
            _ => u32::MAX,
        };
        let bytes = value.to_le_bytes();
        data.iter_mut().zip(bytes.iter().skip(offset as usize & 3)).for_each(|(to, from)| *to = *from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = data.try_into() else { return };
        let value = u32::from_le_bytes(bytes);
        let address = *self.address();
        match offset {
            ADDRESS => *self.address() = value,
            DATA if u64::from(address) < SIZE => self.card.write(u64::from(address & !3), value),
            _ => {}
        }
    }

    fn reset(&self) {}
}

/// The MSI-X table and its pending bits.
struct Table(Arc<Card>);

impl Device for Table {
    fn width(&self) -> usize {
        4
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        match offset.checked_sub(PENDING) {
            Some(offset) => self.0.msix().read_pending(offset as usize, data),
            None => self.0.msix().read_table(offset as usize, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if (offset as usize) < VECTORS * ENTRY_SIZE {
            let released = self.0.msix().write_table(offset as usize, data);
            released.into_iter().for_each(|message| self.0.send(message));
        }
    }

    fn reset(&self) {}
}

/// There is no flash memory on the card.
struct NoFlash;

impl Device for NoFlash {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _: u64, _: &[u8]) {}

    fn reset(&self) {}
}
