//! The jump table's contents: which guest addresses lead to which host code, per mode, and how they are forgotten.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::code_memory::{CodeMemory, JUMP_SLOTS, JumpSlot, empty_tag, jump_index, jump_slot_offsets};
use crate::mode::Mode;

/// Entries that are listed for clearing at most.
const MAX_LISTED: usize = 1 << 16;

/// What one vCPU's jump table holds.
pub struct Jumps {
    memory: Arc<CodeMemory>,
    slots: Vec<Mode>,
    /// Entries that are in use, for code in global pages and in others.
    global: Vec<u32>,
    local: Vec<u32>,
}

impl Jumps {
    pub fn new(memory: Arc<CodeMemory>) -> Self {
        Jumps { memory, slots: Vec::new(), global: Vec::new(), local: Vec::new() }
    }

    /// The part of the table for a mode; none once there are more modes than slots. Careful blocks lead to plain ones.
    pub fn slot(&mut self, mode: Mode) -> Option<usize> {
        if mode.is_single() {
            return None;
        }
        let mode = mode.plain();
        if let Some(slot) = self.slots.iter().position(|&m| m == mode) {
            return Some(slot);
        }
        if self.slots.len() == JUMP_SLOTS {
            return None;
        }
        let slot = self.slots.len();
        self.slots.push(mode);
        self.empty(jump_slot_offsets(slot).tags as usize / 8 + jump_index(u64::MAX, mode));
        Some(slot)
    }

    /// Whether one more entry can be listed without a list that grows.
    pub fn has_room(&self, global: bool) -> bool {
        let list = if global { &self.global } else { &self.local };
        list.len() < list.capacity().min(MAX_LISTED)
    }

    /// Lets the table lead from a [key](crate::code_memory::jump_key) to the host addresses `entry` and, with the flags parked, `parked_entry`.
    pub fn enter(&mut self, mode: Mode, key: u64, entry: u64, parked_entry: u64, global: bool) {
        let Some(slot) = self.slot(mode) else { return };
        let JumpSlot { tags, codes, parked } = jump_slot_offsets(slot);
        let index = jump_index(key, mode);
        let tag_index = tags as usize / 8 + index;
        // An entry may be listed for what it held before as well: clearing it too often does no harm.
        if self.memory.jump_word(tag_index).load(Ordering::Relaxed) != !key {
            let list = if global { &mut self.global } else { &mut self.local };
            list.push(tag_index as u32);
            if list.len() > MAX_LISTED {
                self.clear(true);
            }
        }
        self.empty(tag_index);
        self.memory.jump_word(codes as usize / 8 + index).store(entry, Ordering::Relaxed);
        self.memory.jump_word(parked as usize / 8 + index).store(parked_entry, Ordering::Relaxed);
        self.memory.jump_word(tag_index).store(!key, Ordering::Relaxed);
    }

    /// Forgets which addresses lead where, those in global pages perhaps excepted.
    pub fn clear(&mut self, global: bool) {
        let cleared = if global { std::mem::take(&mut self.global) } else { Vec::new() };
        let local = std::mem::take(&mut self.local);
        cleared.iter().chain(&local).for_each(|&tag_index| self.empty(tag_index as usize));
        // The allocations are used again.
        self.local = local;
        self.local.clear();
        if global {
            self.global = cleared;
            self.global.clear();
        }
    }

    /// The host code that the table has for a key.
    pub fn find(&self, mode: Mode, key: u64) -> Option<u64> {
        let slot = jump_slot_offsets(self.slots.iter().position(|&m| m == mode)?);
        let index = jump_index(key, mode);
        let tag = self.memory.jump_word(slot.tags as usize / 8 + index).load(Ordering::Relaxed);
        (tag == !key && key != u64::MAX)
            .then(|| self.memory.jump_word(slot.codes as usize / 8 + index).load(Ordering::Relaxed))
    }

    /// Forgets one key.
    pub fn forget(&self, mode: Mode, key: u64) {
        if let Some(slot) = self.slots.iter().position(|&m| m == mode) {
            let tag_index = jump_slot_offsets(slot).tags as usize / 8 + jump_index(key, mode);
            if self.memory.jump_word(tag_index).load(Ordering::Relaxed) == !key {
                self.empty(tag_index);
            }
        }
    }

    fn empty(&self, tag_index: usize) {
        self.memory.jump_word(tag_index).store(empty_tag(tag_index), Ordering::Relaxed);
    }
}
