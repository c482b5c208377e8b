//! The jump table's contents: which guest addresses lead to which host code, per mode, and how they are forgotten.
//!
//! Emitted code searches the table itself. Where two addresses share an entry, the one that had to give way is remembered
//! here ([`Displaced`]): a large program's branches drive each other out all the time, and finding a block by its origin
//! takes longer.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::code_memory::{
    CodeMemory, JUMP_SLOTS, JUMP_TABLE_WORDS, JumpSlot, empty_tag, jump_index, jump_slot_offsets,
};
use crate::mode::Mode;
use crate::spaces::Missed;

/// Entries of an address space that are kept while it is not the current one.
const MAX_KEPT: usize = 1024;
/// After all was forgotten so often, the part of a mode that nothing was entered into meanwhile is given back.
const MAX_IDLE: u8 = 32;

/// Displaced entries that are remembered; a power of two.
const DISPLACED: usize = 1 << 15;

/// What one vCPU's jump table holds.
pub struct Jumps {
    memory: Arc<CodeMemory>,
    slots: Vec<Slot>,
    /// Entries that are in use, for code in global pages and in others.
    global: Listed,
    local: Listed,
    displaced: Box<[Displaced]>,
    /// Entries whose blocks are gone.
    forgotten: Missed<usize>,
}

/// An entry that another one took the place of.
#[derive(Clone, Copy, Default)]
struct Displaced {
    key: u64,
    entry: u64,
    parked_entry: u64,
    /// See [`Jumps::stamp`]; zero: nothing is here.
    stamp: u64,
}

/// Entries of an address space that is not the current one.
#[derive(Default)]
pub struct Kept {
    entries: Vec<KeptJump>,
    /// How many entries had been forgotten when it was left.
    forgotten: u64,
}

struct KeptJump {
    tag_index: usize,
    tag: u64,
    code: u64,
    parked: u64,
}

/// The part of the table for one mode.
struct Slot {
    mode: Mode,
    /// Something was entered since all was last forgotten.
    used: bool,
    /// Its memory has been touched.
    resident: bool,
    /// How often all was forgotten since something was entered.
    idle: u8,
}

/// A set of entries.
struct Listed {
    entries: Vec<u32>,
    /// A bit each.
    known: Vec<u64>,
    /// How often all were forgotten, counted from one.
    generation: u64,
}

impl Listed {
    fn new() -> Self {
        Listed { entries: Vec::new(), known: vec![0; JUMP_TABLE_WORDS / 64], generation: 1 }
    }

    fn contains(&self, entry: usize) -> bool {
        self.known[entry / 64] & 1 << (entry % 64) != 0
    }

    fn add(&mut self, entry: usize) {
        let (word, bit) = (&mut self.known[entry / 64], 1 << (entry % 64));
        if *word & bit == 0 {
            *word |= bit;
            self.entries.push(entry as u32);
        }
    }

    fn clear(&mut self, mut each: impl FnMut(usize)) {
        self.generation += 1;
        for entry in self.entries.drain(..) {
            let entry = entry as usize;
            self.known[entry / 64] &= !(1 << (entry % 64));
            each(entry);
        }
    }
}

impl Jumps {
    pub fn new(memory: Arc<CodeMemory>) -> Self {
        // SAFETY: all of an entry's fields are integers, of which zero is one. Memory that is never used is never touched.
        let displaced = unsafe { Box::new_zeroed_slice(DISPLACED).assume_init() };
        let (global, local) = (Listed::new(), Listed::new());
        Jumps { memory, slots: Vec::new(), global, local, displaced, forgotten: Missed::default() }
    }

    /// The part of the table for a mode; none once there are more modes than slots. Careful blocks lead to plain ones.
    pub fn slot(&mut self, mode: Mode) -> Option<usize> {
        if mode.is_single() {
            return None;
        }
        let mode = mode.plain();
        if let Some(slot) = self.slots.iter().position(|s| s.mode == mode) {
            return Some(slot);
        }
        if self.slots.len() == JUMP_SLOTS {
            return None;
        }
        let slot = self.slots.len();
        self.slots.push(Slot { mode, used: false, resident: true, idle: 0 });
        self.initialize(slot);
        Some(slot)
    }

    /// Gives the one entry whose empty tag is not zero that tag.
    fn initialize(&self, slot: usize) {
        self.empty(jump_slot_offsets(slot).tags as usize / 8 + jump_index(u64::MAX, self.slots[slot].mode));
    }

    /// Whether one more entry can be listed without a list that grows.
    pub fn has_room(&self, global: bool) -> bool {
        let list = if global { &self.global } else { &self.local };
        list.entries.len() < list.entries.capacity()
    }

    /// Lets the table lead from a [key](crate::code_memory::jump_key) to the host addresses `entry` and, with the flags parked, `parked_entry`.
    pub fn enter(&mut self, mode: Mode, key: u64, entry: u64, parked_entry: u64, global: bool) {
        let Some(slot) = self.slot(mode) else { return };
        let JumpSlot { tags, codes, parked } = jump_slot_offsets(slot);
        (self.slots[slot].used, self.slots[slot].resident) = (true, true);
        let index = jump_index(key, mode);
        let tag_index = tags as usize / 8 + index;
        self.displace(slot, tag_index, key);
        // An entry may be listed for what it held before as well: clearing it too often does no harm.
        if global { &mut self.global } else { &mut self.local }.add(tag_index);
        self.empty(tag_index);
        self.memory.jump_word(codes as usize / 8 + index).store(entry, Ordering::Relaxed);
        self.memory.jump_word(parked as usize / 8 + index).store(parked_entry, Ordering::Relaxed);
        self.memory.set_jump_tag(tag_index, !key);
    }

    /// Remembers what an entry holds that is about to be `key`'s.
    fn displace(&mut self, slot: usize, tag_index: usize, key: u64) {
        let tag = self.memory.jump_word(tag_index).load(Ordering::Relaxed);
        if tag == empty_tag(tag_index) || tag == !key {
            return;
        }
        let JumpSlot { tags, codes, parked } = jump_slot_offsets(slot);
        let word = |array: i32| {
            let index = tag_index - tags as usize / 8 + array as usize / 8;
            self.memory.jump_word(index).load(Ordering::Relaxed)
        };
        // Listed as both, it may be either: then it is forgotten with the first.
        let stamp = self.stamp(slot, !self.local.contains(tag_index));
        let displaced = Displaced { key: !tag, entry: word(codes), parked_entry: word(parked), stamp };
        self.displaced[displaced_index(slot, !tag)] = displaced;
    }

    /// What tells which mode a displaced entry is of, and whether it still holds: no two generations have the same.
    fn stamp(&self, slot: usize, global: bool) -> u64 {
        const { assert!(JUMP_SLOTS <= 32) };
        let generation = if global { self.global.generation } else { self.local.generation };
        generation << 6 | u64::from(global) << 5 | slot as u64
    }

    /// Puts a displaced entry for a key back into the table: its host code. Nothing is allocated.
    pub fn recall(&mut self, mode: Mode, key: u64) -> Option<u64> {
        let slot = self.slots.iter().position(|s| s.mode == mode)?;
        let place = displaced_index(slot, key);
        let found = self.displaced[place];
        let global = [false, true].into_iter().find(|&global| found.stamp == self.stamp(slot, global))?;
        if found.key != key || !self.has_room(global) {
            return None;
        }
        self.displaced[place] = Displaced::default();
        self.enter(mode, key, found.entry, found.parked_entry, global);
        Some(found.entry)
    }

    /// Forgets which addresses lead where, those in global pages perhaps excepted.
    pub fn clear(&mut self, global: bool) {
        let memory = &self.memory;
        let empty = |tag_index: usize| memory.jump_word(tag_index).store(empty_tag(tag_index), Ordering::Relaxed);
        self.local.clear(empty);
        if global {
            self.global.clear(empty);
            self.forgotten.add_many();
            self.release();
        }
    }

    /// Takes out what is not in global pages.
    pub fn take_local(&mut self, kept: &mut Kept) {
        let memory = &self.memory;
        kept.entries.clear();
        kept.forgotten = self.forgotten.count();
        self.local.clear(|tag_index| {
            let [code, parked] = targets(tag_index).map(|index| memory.jump_word(index).load(Ordering::Relaxed));
            let word = memory.jump_word(tag_index);
            let tag = word.load(Ordering::Relaxed);
            if tag != empty_tag(tag_index) && kept.entries.len() < MAX_KEPT {
                kept.entries.push(KeptJump { tag_index, tag, code, parked });
            }
            word.store(empty_tag(tag_index), Ordering::Relaxed);
        });
    }

    /// Puts back what was taken out, but for what leads to blocks that are gone.
    pub fn put_back(&mut self, kept: &Kept) {
        let Some(forgotten) = self.forgotten.since(kept.forgotten) else { return };
        for jump in &kept.entries {
            if forgotten.clone().any(|&gone| gone == jump.tag_index) {
                continue;
            }
            self.local.add(jump.tag_index);
            for (index, code) in targets(jump.tag_index).into_iter().zip([jump.code, jump.parked]) {
                self.memory.jump_word(index).store(code, Ordering::Relaxed);
            }
            self.memory.set_jump_tag(jump.tag_index, jump.tag);
        }
    }

    /// Gives the memory of slots back to the host that nothing was entered into for [`MAX_IDLE`] times: a guest's start goes
    /// through modes that never come again, but to and fro between some of them as well. Nothing may be in the table.
    fn release(&mut self) {
        for slot in 0..self.slots.len() {
            let s = &mut self.slots[slot];
            s.idle = if std::mem::take(&mut s.used) { 0 } else { s.idle.saturating_add(1) };
            if s.idle >= MAX_IDLE && std::mem::take(&mut s.resident) {
                self.memory.release_jump_slot(slot);
                self.initialize(slot);
            }
        }
    }

    /// The host code that the table has for a key.
    pub fn find(&self, mode: Mode, key: u64) -> Option<u64> {
        let slot = jump_slot_offsets(self.slots.iter().position(|s| s.mode == mode)?);
        let index = jump_index(key, mode);
        let tag = self.memory.jump_word(slot.tags as usize / 8 + index).load(Ordering::Relaxed);
        (tag == !key && key != u64::MAX)
            .then(|| self.memory.jump_word(slot.codes as usize / 8 + index).load(Ordering::Relaxed))
    }

    /// Forgets one key.
    pub fn forget(&mut self, mode: Mode, key: u64) {
        if let Some(slot) = self.slots.iter().position(|s| s.mode == mode) {
            let tag_index = jump_slot_offsets(slot).tags as usize / 8 + jump_index(key, mode);
            self.forgotten.add(tag_index);
            if self.memory.jump_word(tag_index).load(Ordering::Relaxed) == !key {
                self.empty(tag_index);
            }
            let displaced = &mut self.displaced[displaced_index(slot, key)];
            if displaced.key == key {
                *displaced = Displaced::default();
            }
        }
    }

    fn empty(&self, tag_index: usize) {
        self.memory.jump_word(tag_index).store(empty_tag(tag_index), Ordering::Relaxed);
    }
}

/// Where the two host addresses of the entry stand whose tag is at an index.
fn targets(tag_index: usize) -> [usize; 2] {
    let JumpSlot { tags, codes, parked } = jump_slot_offsets(0);
    [codes, parked].map(|array| tag_index + (array - tags) as usize / 8)
}

/// Where a displaced entry is remembered: by other bits of its address than those that it shares with what displaced it.
fn displaced_index(slot: usize, key: u64) -> usize {
    let mixed = (key ^ (slot as u64) << 56).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 48) as usize % DISPLACED
}

#[cfg(test)]
mod tests;
