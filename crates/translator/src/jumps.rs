//! The jump table's contents: which guest addresses lead to which host code, per mode, and how they are forgotten.
//!
//! Emitted code searches the table itself. Where two addresses share an entry, the one that had to give way is remembered
//! here ([`Displaced`]): a large program's branches drive each other out all the time, and finding a block by its origin
//! takes longer.
//!
//! Programs' entries belong to an address space, each to one that has a number ([`NUMBERS`]): to switch to another, or to
//! forget all of one, is to use another number. When all have been used, programs start anew. Of others' entries those
//! for pages that are not global are taken out and put back.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::code_memory::{
    CodeMemory, JUMP_BYTES, JUMP_SLOT_ENTRY_WORDS, JUMP_SLOT_WORDS, JUMP_SLOTS, JUMP_TABLE_WORDS, JUMP_WORDS, NUMBERS,
    empty_tag, is_programs, jump_index, jump_slot_offsets, number_distance, slots_for,
};
use crate::large_pages::{LARGE_PAGE, Touched};
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
    /// Entries that are in use, for code in global pages and in others; programs' apart.
    global: Listed,
    local: Listed,
    /// Tags of programs that are in use: a bit each.
    programs: Vec<u64>,
    /// The current address space.
    number: usize,
    /// The highest that an address space has had in this round.
    last_number: usize,
    /// How often programs started anew.
    rounds: u64,
    displaced: Box<[Displaced]>,
    touched: Touched,
    /// Slots and keys of blocks that are gone.
    forgotten: Missed<(usize, u64), FORGOTTEN>,
}

/// An entry that another one took the place of.
#[derive(Clone, Copy, Default)]
struct Displaced {
    key: u64,
    entry: u64,
    /// See [`Jumps::stamp`]; zero: nothing is here. In the lowest 16 bits, how far behind the entry the one with the flags parked is:
    /// both are of one block.
    stamp_and_parked: u64,
}

impl Displaced {
    fn stamp(self) -> u64 {
        self.stamp_and_parked >> 16
    }

    fn parked_entry(self) -> u64 {
        self.entry + (self.stamp_and_parked & 0xffff)
    }
}

/// Blocks that are gone and remembered for address spaces that still lead to them.
const FORGOTTEN: usize = 1024;

/// An address space that is not the current one.
#[derive(Default)]
pub struct Kept {
    entries: Vec<KeptJump>,
    /// How many entries had been forgotten when it was left.
    forgotten: u64,
    /// Its number, and the round that it holds in.
    number: usize,
    round: u64,
}

impl Kept {
    /// Forgets the entries that were taken out.
    pub fn clear(&mut self) {
        self.entries.clear();
    }
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
    /// Its place in the table.
    at: usize,
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
        Jumps {
            memory,
            slots: Vec::new(),
            global: Listed::new(),
            local: Listed::new(),
            programs: vec![0; JUMP_TABLE_WORDS / 64],
            number: 0,
            last_number: 0,
            rounds: 1,
            displaced,
            touched: Touched::new(JUMP_BYTES),
            forgotten: Missed::default(),
        }
    }

    /// The part of the table for a mode; none once there are more modes than slots. Careful blocks lead to plain ones.
    pub fn slot(&mut self, mode: Mode) -> Option<usize> {
        if mode.is_single() {
            return None;
        }
        let mode = mode.plain();
        if let Some(at) = self.slot_of(mode) {
            return Some(at);
        }
        let at = slots_for(mode.cpl() == 3).find(|at| self.slots.iter().all(|s| s.at != *at))?;
        self.slots.push(Slot { mode, at, used: false, resident: true, idle: 0 });
        self.memory.guard(at);
        Some(at)
    }

    /// The part of the table that a mode has.
    fn slot_of(&self, mode: Mode) -> Option<usize> {
        self.slots.iter().find(|s| s.mode == mode).map(|s| s.at)
    }

    /// Where a key's tag is in the current address space.
    fn tag_index(&self, slot: usize, mode: Mode, key: u64) -> usize {
        let distance = if is_programs(slot) { number_distance(self.number) } else { 0 };
        jump_slot_offsets(slot).tags as usize / 8 + jump_index(key, mode) + distance
    }

    /// Whether one more entry can be listed without a list that grows.
    pub fn has_room(&self, mode: Mode, global: bool) -> bool {
        let list = if global { &self.global } else { &self.local };
        mode.cpl() == 3 || list.entries.len() < list.entries.capacity()
    }

    /// Lets the table lead from a [key](crate::code_memory::jump_key) to the host addresses `entry` and, with the flags parked, `parked_entry`.
    pub fn enter(&mut self, mode: Mode, key: u64, entry: u64, parked_entry: u64, global: bool) {
        let Some(at) = self.slot(mode) else { return };
        if let Some(slot) = self.slots.iter_mut().find(|s| s.at == at) {
            (slot.used, slot.resident) = (true, true);
        }
        let tag_index = self.tag_index(at, mode.plain(), key);
        self.displace(at, mode.plain(), tag_index, key);
        self.touched.note(tag_index * 8);
        if is_programs(at) {
            self.programs[tag_index / 64] |= 1 << (tag_index % 64);
        } else {
            // An entry may be listed for what it held before as well: clearing it too often does no harm.
            if global { &mut self.global } else { &mut self.local }.add(tag_index);
        }
        self.empty(tag_index);
        for (index, address) in targets(tag_index).into_iter().zip([entry, parked_entry]) {
            self.memory.jump_word(index).store(address, Ordering::Relaxed);
        }
        self.memory.jump_word(tag_index).store(key, Ordering::Relaxed);
    }

    /// Remembers what an entry holds that is about to be `key`'s.
    fn displace(&mut self, slot: usize, mode: Mode, tag_index: usize, key: u64) {
        let tag = self.memory.jump_word(tag_index).load(Ordering::Relaxed);
        if tag == empty_tag(tag_index) || tag == key {
            return;
        }
        let [entry, parked_entry] =
            targets(tag_index).map(|index| self.memory.jump_word(index).load(Ordering::Relaxed));
        let stamp = if is_programs(slot) {
            let first = jump_slot_offsets(slot).tags as usize / 8 + jump_index(tag, mode);
            self.programs_stamp(slot, tag_index.saturating_sub(first) / number_distance(1))
        } else {
            // Listed as both, it may be either: then it is forgotten with the first.
            self.stamp(slot, !self.local.contains(tag_index))
        };
        let parked = parked_entry.wrapping_sub(entry) & 0xffff;
        self.displaced[displaced_index(slot, tag)] =
            Displaced { key: tag, entry, stamp_and_parked: stamp << 16 | parked };
    }

    /// What tells which slot a displaced entry is of, and whether it still holds: no two generations have the same.
    fn stamp(&self, slot: usize, global: bool) -> u64 {
        const { assert!(JUMP_SLOTS <= 32) };
        let generation = if global { self.global.generation } else { self.local.generation };
        generation << 6 | u64::from(global) << 5 | slot as u64
    }

    /// The same for an entry of programs.
    fn programs_stamp(&self, slot: usize, number: usize) -> u64 {
        (self.rounds * NUMBERS as u64 + number as u64) << 6 | slot as u64
    }

    /// Puts a displaced entry for a key back into the table: its host code. Nothing is allocated.
    pub fn recall(&mut self, mode: Mode, key: u64) -> Option<u64> {
        let slot = self.slot_of(mode)?;
        let place = displaced_index(slot, key);
        let found = self.displaced[place];
        let global = if is_programs(slot) {
            (found.stamp() == self.programs_stamp(slot, self.number)).then_some(false)
        } else {
            [false, true].into_iter().find(|&global| found.stamp() == self.stamp(slot, global))
        }?;
        if found.key != key || !self.has_room(mode, global) {
            return None;
        }
        self.displaced[place] = Displaced::default();
        self.enter(mode, key, found.entry, found.parked_entry(), global);
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
            self.start_anew();
            self.release();
        } else {
            self.start_space();
        }
    }

    /// The current address space is one of which nothing is known.
    pub fn start_space(&mut self) {
        // The next ones after the current one may belong to others.
        if self.last_number + 1 < NUMBERS {
            self.last_number += 1;
            self.number = self.last_number;
            self.memory.select(self.number);
        } else {
            self.start_anew();
        }
    }

    /// Forgets all of programs, whatever their address space.
    fn start_anew(&mut self) {
        self.empty_programs(|_| true);
        self.rounds += 1;
        (self.number, self.last_number) = (0, 0);
        self.memory.select(0);
    }

    /// Forgets what leads programs, in whatever address space, to host code in a range: blocks that are not known by one address.
    pub fn forget_programs_code(&mut self, range: &Range<u64>) {
        self.empty_programs(|entry| range.contains(&entry));
        for displaced in self.displaced.iter_mut().filter(|displaced| range.contains(&displaced.entry)) {
            *displaced = Displaced::default();
        }
    }

    /// Takes out what leads programs to host addresses that are `gone`.
    fn empty_programs(&mut self, gone: impl Fn(u64) -> bool) {
        let memory = &self.memory;
        for s in self.slots.iter().filter(|s| s.used && is_programs(s.at)) {
            let first = s.at * JUMP_SLOT_WORDS;
            for (i, word) in self.programs[first / 64..(first + JUMP_SLOT_ENTRY_WORDS) / 64].iter_mut().enumerate() {
                let mut bits = *word;
                while bits != 0 {
                    let bit = bits.trailing_zeros();
                    let tag_index = first + i * 64 + bit as usize;
                    if gone(memory.jump_word(targets(tag_index)[0]).load(Ordering::Relaxed)) {
                        memory.jump_word(tag_index).store(empty_tag(tag_index), Ordering::Relaxed);
                        *word &= !(1 << bit);
                    }
                    bits &= bits - 1;
                }
            }
        }
    }

    /// Leaves an address space: takes out what is neither a program's nor in global pages. Another one is to be entered next.
    pub fn leave(&mut self, kept: &mut Kept) {
        let memory = &self.memory;
        kept.entries.clear();
        (kept.number, kept.round) = (self.number, self.rounds);
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

    /// Comes back to an address space: puts back what was taken out. Nothing leads to blocks that are gone.
    pub fn come_back(&mut self, kept: &Kept) {
        let forgotten = self.forgotten.since(kept.forgotten).filter(|_| kept.round == self.rounds);
        let Some(forgotten) = forgotten.map(|missed| missed.copied().collect::<Vec<_>>()) else {
            return self.start_space();
        };
        self.number = kept.number;
        self.memory.select(self.number);
        for jump in &kept.entries {
            self.local.add(jump.tag_index);
            for (index, code) in targets(jump.tag_index).into_iter().zip([jump.code, jump.parked]) {
                self.memory.jump_word(index).store(code, Ordering::Relaxed);
            }
            self.memory.jump_word(jump.tag_index).store(jump.tag, Ordering::Relaxed);
        }
        for (slot, key) in forgotten {
            if let Some(mode) = self.slots.iter().find(|s| s.at == slot).map(|s| s.mode) {
                self.forget_here(slot, mode, key);
            }
        }
    }

    /// Gives the memory of slots back to the host that nothing was entered into for [`MAX_IDLE`] times: a guest's start goes
    /// through modes that never come again, but to and fro between some of them as well. Nothing may be in the table.
    fn release(&mut self) {
        for s in &mut self.slots {
            s.idle = if std::mem::take(&mut s.used) { 0 } else { s.idle.saturating_add(1) };
            if s.idle >= MAX_IDLE && std::mem::take(&mut s.resident) {
                self.memory.release_jump_slot(s.at);
                let parts = JUMP_SLOT_WORDS * 8 / LARGE_PAGE;
                self.touched.forget(s.at * parts..(s.at + 1) * parts);
                self.memory.guard(s.at);
            }
        }
    }

    /// Lets a part of the table that has come to be in use all over take a large page. Not for the light path: it uses vector
    /// registers.
    pub fn enlarge(&mut self) {
        if let Some(part) = self.touched.take_dense() {
            self.memory.enlarge(part);
        }
    }

    /// The host code that the table has for a key.
    pub fn find(&self, mode: Mode, key: u64) -> Option<u64> {
        let tag_index = self.tag_index(self.slot_of(mode)?, mode, key);
        let [code, _] = targets(tag_index);
        let tag = self.memory.jump_word(tag_index).load(Ordering::Relaxed);
        (tag == key).then(|| self.memory.jump_word(code).load(Ordering::Relaxed))
    }

    /// Forgets one key in every address space.
    pub fn forget(&mut self, mode: Mode, key: u64) {
        if let Some(slot) = self.slot_of(mode) {
            self.forgotten.add((slot, key));
            self.forget_here(slot, mode, key);
        }
    }

    /// The same in the current one, and among those that gave way: an entry of a space that waits, not forgotten yet, may have
    /// given way to another space's.
    fn forget_here(&mut self, slot: usize, mode: Mode, key: u64) {
        let tag_index = self.tag_index(slot, mode, key);
        if self.memory.jump_word(tag_index).load(Ordering::Relaxed) == key {
            self.empty(tag_index);
        }
        let displaced = &mut self.displaced[displaced_index(slot, key)];
        if displaced.key == key {
            *displaced = Displaced::default();
        }
    }

    fn empty(&self, tag_index: usize) {
        self.memory.jump_word(tag_index).store(empty_tag(tag_index), Ordering::Relaxed);
    }
}

/// Where the two host addresses of the entry stand whose tag is at an index.
fn targets(tag_index: usize) -> [usize; 2] {
    const { assert!(JUMP_WORDS > 2) };
    [tag_index + 1, tag_index + 2]
}

/// Where a displaced entry is remembered: by other bits of its address than those that it shares with what displaced it.
fn displaced_index(slot: usize, key: u64) -> usize {
    let mixed = (key ^ (slot as u64) << 56).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 48) as usize % DISPLACED
}

#[cfg(test)]
mod tests;
