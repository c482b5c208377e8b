//! What a PC has besides chipset and paravirtual devices: drives on the controllers of their time, and network cards.

use std::sync::Arc;

use chipset::Chipset;
use chipset::pci::PciFunction;
use engine::Engine;
use ethernet::NetworkCard;
use memory::View;
use storage::Drive;
use storage::ahci::{self, AhciController};
use storage::floppy::{self, FloppyController, FloppyDrive};
use storage::ide::{self, IdeController};

use crate::{Error, MAX_DEVICES};

/// The device of the bridge that storage controllers are functions of, as in an ICH.
const SOUTH_BRIDGE: u8 = 0x1f;

/// A network card of a real make.
pub struct Card {
    pub model: ethernet::Model,
    pub mac: net::Mac,
    /// The option ROM by which firmware boots from it; empty: none.
    pub rom: Vec<u8>,
    pub backend: Box<dyn net::Backend>,
}

/// Drives (a controller is there if it has one) and cards.
#[derive(Default)]
pub struct Peripherals {
    pub ide: ide::Drives,
    pub ahci: [Option<Drive>; ahci::PORTS],
    pub floppies: [Option<FloppyDrive>; floppy::DRIVES],
    /// In the order of their PCI device numbers, behind those of the paravirtual devices.
    pub cards: Vec<Card>,
}

/// What was plugged in, for a reset of what has no other.
#[derive(Default)]
pub(crate) struct Plugged {
    functions: Vec<Arc<dyn PciFunction>>,
    floppy: Option<Arc<FloppyController>>,
}

impl Plugged {
    /// What PCI's reset does not reach.
    pub fn reset_legacy(&self) {
        self.floppy.iter().for_each(|controller| controller.reset());
    }

    /// Puts everything into its power-on state; what drives hold back is in their images then.
    pub fn reset(&self) {
        self.functions.iter().for_each(|function| function.reset());
        self.reset_legacy();
    }
}

impl Peripherals {
    /// Puts everything on its bus, with PCI device numbers from `first_free` on where there is a choice.
    pub(crate) fn plug_in(
        self,
        first_free: u8,
        chipset: &Chipset,
        memory: &View,
        engine: &dyn Engine,
    ) -> Result<Plugged, Error> {
        let mut functions: Vec<Arc<dyn PciFunction>> = Vec::new();
        if self.ide.iter().flatten().any(Option::is_some) {
            let controller = IdeController::new(self.ide, chipset, memory)?;
            chipset.insert_pci(SOUTH_BRIDGE, ide::FUNCTION, controller.clone())?;
            functions.push(controller);
        }
        if self.ahci.iter().any(Option::is_some) {
            let line = chipset.connect_pci(SOUTH_BRIDGE, ahci::PIN);
            let controller = AhciController::new(self.ahci, memory, engine.interrupts(), line)?;
            chipset.insert_pci(SOUTH_BRIDGE, ahci::FUNCTION, controller.clone())?;
            functions.push(controller);
        }
        let devices = usize::from(first_free) - 1 + self.cards.len();
        if devices > MAX_DEVICES {
            return Err(Error::TooManyDevices { devices });
        }
        for (number, card) in (first_free..).zip(self.cards) {
            let line = chipset.connect_pci(number, 0);
            let Card { model, mac, rom, backend } = card;
            let card = NetworkCard::new(model, mac, &rom, backend, memory, engine.interrupts(), line)?;
            chipset.insert_pci(number, 0, card.clone())?;
            functions.push(card);
        }
        let mut floppy = None;
        if self.floppies.iter().any(Option::is_some) {
            let kind = |drive: &Option<FloppyDrive>| drive.as_ref().map_or(0, |(kind, _)| *kind as u8);
            chipset.set_floppy_drives(self.floppies.each_ref().map(kind));
            floppy = Some(FloppyController::new(self.floppies, chipset)?);
        }
        Ok(Plugged { functions, floppy })
    }
}
