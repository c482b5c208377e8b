//! What a PC has besides chipset and paravirtual devices: drives on the controllers of their time.

use std::sync::Arc;

use chipset::Chipset;
use chipset::pci::PciFunction;
use engine::Engine;
use memory::View;
use storage::Drive;
use storage::ahci::{self, AhciController};
use storage::ide::{self, IdeController};

use crate::Error;

/// The device of the bridge that storage controllers are functions of, as in an ICH.
const SOUTH_BRIDGE: u8 = 0x1f;

/// Drives. A controller is there if it has one.
#[derive(Default)]
pub struct Peripherals {
    pub ide: ide::Drives,
    pub ahci: [Option<Drive>; ahci::PORTS],
}

impl Peripherals {
    /// Puts everything on its bus. Returns the functions on the PCI bus.
    pub(crate) fn plug_in(
        self,
        chipset: &Chipset,
        memory: &View,
        engine: &dyn Engine,
    ) -> Result<Vec<Arc<dyn PciFunction>>, Error> {
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
        Ok(functions)
    }
}
