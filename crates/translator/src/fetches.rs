//! Where code at virtual pages is, as the page walk said.

use memory::PAGE_SIZE;
use rustc_hash::FxHashSet;

use crate::cpu::Context;

/// Pages that are known at a time; a power of two.
const ENTRIES: usize = 1024;

#[derive(Clone, Copy, Default)]
struct Fetch {
    /// The page's number, with the context below and the top bit set; 0: empty.
    tag: u64,
    gpa: u64,
}

/// The code pages of one address space, or the global ones.
pub struct Fetches {
    entries: Box<[Fetch; ENTRIES]>,
    /// The [`area`]s in which code was fetched since all was last forgotten.
    areas: FxHashSet<u64>,
}

impl Default for Fetches {
    fn default() -> Self {
        Fetches { entries: Box::new([Fetch::default(); ENTRIES]), areas: FxHashSet::default() }
    }
}

impl Fetches {
    /// The physical address of code at a linear one, if its page is known.
    pub fn find(&self, linear: u64, context: Context) -> Option<u64> {
        let entry = &self.entries[index(linear)];
        (entry.tag == tag(linear, context)).then_some(entry.gpa | (linear % PAGE_SIZE))
    }

    /// Remembers the page of `linear`, and whether it is part of a larger one.
    pub fn enter(&mut self, linear: u64, context: Context, gpa: u64, large: bool) {
        self.entries[index(linear)] = Fetch { tag: tag(linear, context), gpa: gpa & !(PAGE_SIZE - 1) };
        self.areas.insert(area(linear, large));
    }

    /// Whether INVLPG of an address may concern code that was fetched: that of its page, or of a large page around it.
    pub fn near(&self, va: u64) -> bool {
        [area(va, false), area(va, true)].iter().any(|a| self.areas.contains(a))
    }

    pub fn clear(&mut self) {
        // No code was fetched without an area.
        if !self.areas.is_empty() {
            self.entries.fill(Fetch::default());
            self.areas.clear();
        }
    }
}

fn tag(linear: u64, context: Context) -> u64 {
    linear >> 12 << 2 | context as u64 | 1 << 63
}

fn index(linear: u64) -> usize {
    (linear >> 12) as usize % ENTRIES
}

/// What INVLPG of an address concerns: its page, or all of the largest page that there is.
fn area(linear: u64, large: bool) -> u64 {
    if large { linear >> 30 << 1 | 1 } else { linear >> 12 << 1 }
}
