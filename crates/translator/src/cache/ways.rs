//! How the jump table leads to blocks, and what becomes of that when they are dropped: see [`crate::codegen::relative`].

use super::{BlockId, Cache, NOWHERE, SEVERAL};
use crate::codegen::relative::{PARKED_WAY_OUT, WAY_OUT, way_in};
use crate::mode::Mode;

impl Cache {
    /// Lets the jump table lead from a guest address to the block that runs there.
    pub fn enter_jump(&mut self, id: BlockId, rip: u64, global: bool) {
        let block = self.at_mut(id);
        if block.origin.mode.is_careful() {
            return;
        }
        if block.is_relative() && block.rip != rip {
            block.rip = if block.rip == NOWHERE { rip } else { SEVERAL };
        }
        let (origin, start) = (block.origin, block.start());
        let parked = if block.is_relative() { block.parked_way_in } else { block.parked_entry };
        let (entry, parked_entry) = (self.host_address(start, 0), self.host_address(start, parked));
        self.jumps.enter(origin.mode, origin.jump_key(rip), entry, parked_entry, global);
    }

    /// The host code that the jump table has for a key, of a block that is there.
    pub fn jump(&self, mode: Mode, key: u64) -> Option<u64> {
        self.jumps.find(mode, key).filter(|entry| !self.leads_out(*entry))
    }

    /// Whether a host address that the jump table leads to is the way in of a block that is gone.
    pub fn leads_out(&self, entry: u64) -> bool {
        // For the light path, too: no comparison by libc.
        let differs = |(at, byte): (usize, u8)| self.memory.byte(at) != byte;
        self.offset_of(entry).is_some_and(|start| !(start..).zip(WAY_OUT).any(differs))
    }

    /// Makes a relative block's ways in ways out, to the dispatcher.
    pub(super) fn close(&self, id: BlockId) {
        let block = self.at(id);
        if block.is_relative() {
            self.memory.write(block.start(), &WAY_OUT);
            self.memory.write(block.start() + usize::from(block.parked_way_in), &PARKED_WAY_OUT);
        }
    }

    /// Makes a relative block's ways out ways in again. Where the jump table still leads to them, its code is.
    pub(super) fn open(&mut self, id: BlockId) {
        let block = self.at(id);
        if block.is_relative() {
            let way_in = way_in(block.nominal_rip());
            for at in [0, block.parked_way_in.into()] {
                self.memory.write(block.start() + at, &way_in);
            }
        }
    }
}
