//! Blocks that wait for their code to come back: see [`crate::rewritten`].

use std::ops::Range;

use memory::PAGE_SIZE;

use super::{BlockId, Cache, print};
use crate::body::Origin;

/// Taking up a block again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// Its bytes are what they were.
    Unchanged(BlockId),
    /// Some of its immediates are others.
    Changed(BlockId),
    /// It is other code now.
    No,
}

impl Cache {
    /// The bytes of a block's code are being written: drops it, unless it can be taken up again.
    pub(super) fn put_to_sleep(&mut self, id: BlockId) {
        if !self.templates.contains_key(&id) {
            return self.drop_block(id);
        }
        let key = self.key(id);
        self.detach(id);
        if let Some(older) = self.asleep.insert(key, id) {
            self.dead.push(older);
        }
    }

    fn key(&self, id: BlockId) -> (Origin, u64) {
        let block = self.at(id);
        (block.origin, block.nominal_rip())
    }

    /// Puts all blocks of a page to sleep, or drops them.
    pub fn rest_page(&mut self, page: u64) {
        let Some(code) = self.by_page.get(&page) else { return };
        let ids: Vec<BlockId> = code.blocks.iter().map(|block| block.id).collect();
        for id in ids {
            self.put_to_sleep(id);
        }
    }

    /// Drops all blocks of a page, those that sleep and those that look at their bytes themselves as well.
    pub fn drop_page(&mut self, page: u64) {
        let watched = self.by_page.get(&page).into_iter().flat_map(|code| &code.blocks).map(|block| block.id);
        let awake: Vec<BlockId> = watched.chain(self.checked.get(&page).into_iter().flatten().copied()).collect();
        for id in awake {
            self.remove(id);
        }
        let dead = &mut self.dead;
        self.asleep.retain(|(origin, _), id| {
            let stays = origin.frame() != page;
            if !stays {
                dead.push(*id);
            }
            stays
        });
    }

    pub(super) fn forget_checked(&mut self, id: BlockId, page: u64) {
        if let Some(blocks) = self.checked.get_mut(&page) {
            blocks.retain(|other| *other != id);
            if blocks.is_empty() {
                self.checked.remove(&page);
            }
        }
    }

    /// Drops a block that sleeps, if it does.
    pub(super) fn drop_asleep(&mut self, id: BlockId) {
        let key = self.key(id);
        if self.asleep.get(&key) == Some(&id) {
            self.asleep.remove(&key);
            self.dead.push(id);
        }
    }

    /// The part of its page that must be read to wake the block of an origin at a guest address, if one sleeps.
    pub fn sleeper(&self, origin: Origin, rip: u64) -> Option<Range<usize>> {
        let id = self.asleep.get(&self.sleeping(origin, rip)?)?;
        Some(self.body(*id).extent())
    }

    /// What a block sleeps by that runs at a guest address.
    fn sleeping(&self, origin: Origin, rip: u64) -> Option<(Origin, u64)> {
        let mut keys = [rip, origin.address % PAGE_SIZE].into_iter().map(|rip| (origin, rip));
        keys.find(|key| self.asleep.contains_key(key))
    }

    /// Takes up a block again if its page, of which the part that [`Cache::sleeper`] said has been read, has its code.
    pub fn wake(&mut self, origin: Origin, rip: u64, page: &[u8]) -> Woken {
        let asleep = self.sleeping(origin, rip).and_then(|key| self.asleep.remove(&key));
        let Some(id) = asleep else { return Woken::No };
        let Some(changed) = self.refresh(id, page) else {
            self.dead.push(id);
            return Woken::No;
        };
        self.stats.woken += 1;
        self.clock = self.clock.wrapping_add(1);
        self.at_mut(id).used = self.clock;
        self.open(id);
        self.attach(id);
        if changed { Woken::Changed(id) } else { Woken::Unchanged(id) }
    }

    /// Makes a block's host code that of the bytes in its page, if only immediates differ; whether any do.
    fn refresh(&mut self, id: BlockId, page: &[u8]) -> Option<bool> {
        let (block, body) = self.block(id)?;
        let (start, length) = (block.start(), body.length as usize);
        let at = (body.origin.address % PAGE_SIZE) as usize;
        let template = self.templates.get(&id)?;
        let old = body.record.bytes;
        let new = page.get(at..at + old.len())?;
        if page.get(body.record.lookahead())? != &*template.ahead {
            return None;
        }
        if new == old {
            return Some(false);
        }
        let mut expected = old.to_vec();
        let mut code = vec![0; length];
        self.memory.read(start, &mut code);
        for i in &template.immediates {
            let (from, to, length) = (i.guest_offset as usize, i.host_offset as usize, i.length as usize);
            let bytes = new.get(from..from + length)?;
            expected.get_mut(from..from + length)?.copy_from_slice(bytes);
            code.get_mut(to..to + length)?.copy_from_slice(bytes);
        }
        if new != expected {
            return None;
        }
        // In the record as well.
        let bytes = block.record as usize + (old.as_ptr() as usize - body.record.packed.as_ptr() as usize);
        let region = self.region_of(start);
        self.regions[region].records.get_mut(bytes..bytes + new.len())?.copy_from_slice(new);
        self.at_mut(id).print = print(self.body(id).record.packed);
        self.memory.write(start, &code);
        Some(true)
    }
}
