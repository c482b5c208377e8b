//! The A20 gate: address line 20 can be forced low, as software for the 8086 expects it.
//!
//! There is one gate with two handles, system control port A and the keyboard controller's output port. Both show its
//! state, and who writes last decides.

use std::sync::Arc;

use memory::MemoryMap;

/// One handle of the gate.
#[derive(Clone)]
pub struct A20Gate {
    map: Arc<MemoryMap>,
}

impl A20Gate {
    pub fn new(map: Arc<MemoryMap>) -> Self {
        A20Gate { map }
    }

    /// Whether bit 20 of addresses counts.
    pub fn enabled(&self) -> bool {
        self.map.a20()
    }

    pub fn set(&self, enabled: bool) {
        self.map.set_a20(enabled);
    }
}
