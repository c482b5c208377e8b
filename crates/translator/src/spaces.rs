//! Address spaces that are not the current one: with CR4.PCIDE, what is known of each waits here under its PCID until MOV CR3
//! with bit 63 set comes back to it (Intel SDM 3A 4.10.1, 4.10.4.1).
//!
//! The software TLB, the code pages and the kernel's part of the jump table serve one address space at a time, so that
//! emitted code needs no PCID to use them. A switch takes out what is not global and puts in what the other space had; of
//! [programs](crate::jumps) it only selects the entries. What happens meanwhile to
//! entries that are out (a page that is not to be written unnoticed, a block that is dropped) they [miss](Missed), and
//! catch up with it when they are put back.

use std::collections::VecDeque;

use crate::fetches::Fetches;
use crate::{jumps, tlb};

/// Address spaces that wait at a time. Linux uses six PCIDs, twice as many with page-table isolation.
const SPACES: usize = 8;
/// So many times in a row what was taken out is put back; then a space starts with nothing of it, so that what it does not
/// use any more is not carried along for ever.
const TURNS: u8 = 64;

/// What is known of an address space that waits.
#[derive(Default)]
pub struct Space {
    /// CR3 without bit 63; `None`: nothing is known.
    cr3: Option<u64>,
    pub mappings: tlb::Kept,
    pub jumps: jumps::Kept,
    pub fetches: Fetches,
    /// How often it has been put back.
    turns: u8,
    /// When it was left.
    left: u64,
}

/// Those of one vCPU.
#[derive(Default)]
pub struct Spaces {
    spaces: Vec<Space>,
    clock: u64,
    /// How often the current one has been put back.
    turns: u8,
}

fn pcid(cr3: u64) -> u64 {
    cr3 & 0xfff
}

impl Spaces {
    /// Forgets what waits under a PCID.
    pub fn forget(&mut self, id: u64) {
        for space in self.spaces.iter_mut().filter(|s| s.cr3.is_some_and(|cr3| pcid(cr3) == id)) {
            space.cr3 = None;
        }
    }

    /// Forgets all that waits.
    pub fn clear(&mut self) {
        self.spaces.iter_mut().for_each(|s| s.cr3 = None);
        self.turns = 0;
    }

    /// What waits for a value of CR3 is current from now on: its place, to be emptied. A PCID of which other tables were
    /// known starts anew.
    pub fn enter(&mut self, cr3: u64) -> Option<&mut Space> {
        self.turns = 0;
        let space = self.spaces.iter_mut().find(|s| s.cr3.is_some_and(|known| pcid(known) == pcid(cr3)))?;
        let known = space.cr3.take();
        if known != Some(cr3) {
            return None;
        }
        if space.turns == TURNS {
            space.mappings.clear();
            space.jumps.clear();
            return Some(space);
        }
        self.turns = space.turns + 1;
        Some(space)
    }

    /// Where what is known of the current address space is to wait while `next` is: in place of the one that was left longest
    /// ago, if there is no room.
    pub fn leave(&mut self, cr3: u64, next: u64) -> &mut Space {
        self.clock += 1;
        let free = self.spaces.iter().position(|s| s.cr3.is_none());
        let worth = |s: &Space| (s.cr3 == Some(next), s.left);
        let oldest = || (0..self.spaces.len()).min_by_key(|&i| worth(&self.spaces[i])).unwrap_or_default();
        let index = match free {
            Some(index) => index,
            None if self.spaces.len() < SPACES => {
                self.spaces.push(Space::default());
                self.spaces.len() - 1
            }
            None => oldest(),
        };
        let space = &mut self.spaces[index];
        (space.cr3, space.left, space.turns) = (Some(cr3), self.clock, self.turns);
        space
    }
}

/// The last of a row of events, `MOST` of them, remembered for those who miss them.
pub struct Missed<T, const MOST: usize> {
    last: VecDeque<T>,
    /// All that there were.
    count: u64,
}

impl<T, const MOST: usize> Default for Missed<T, MOST> {
    fn default() -> Self {
        Missed { last: VecDeque::with_capacity(MOST), count: 0 }
    }
}

impl<T, const MOST: usize> Missed<T, MOST> {
    pub fn add(&mut self, event: T) {
        if self.last.len() == MOST {
            self.last.pop_front();
        }
        self.last.push_back(event);
        self.count += 1;
    }

    /// Something happened that concerns everyone: it counts as more events than can be remembered.
    pub fn add_many(&mut self) {
        self.last.clear();
        self.count += MOST as u64 + 1;
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Those since there were `count`; `None`: not all of them are remembered.
    pub fn since(&self, count: u64) -> Option<impl Iterator<Item = &T> + Clone> {
        let missed = usize::try_from(self.count.saturating_sub(count)).ok()?;
        Some(self.last.range(self.last.len().checked_sub(missed)?..))
    }
}

#[cfg(test)]
mod tests;
