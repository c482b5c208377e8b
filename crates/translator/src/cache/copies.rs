//! Copies of blocks, for guest code that is mapped at another address as well.

use super::{BlockId, Cache, LinkId, New};
use crate::body::{Body, Link, Origin, Position};
use crate::codegen::block::SensitiveInsn;
use crate::record::Record;

/// Copies of one block at different guest addresses. Beyond that the one longest not looked for moves.
pub(super) const MAX_COPIES: usize = 4;
/// Blocks copied along with the one wanted, because the original leads to them.
const MAX_CHAIN: usize = 64;

impl Cache {
    /// A copy of a block for the guest address `rip`, if it can stand there; with it copies of blocks that it leads to. There
    /// must be room for the first.
    pub fn copy(&mut self, original: BlockId, rip: u64) -> Option<BlockId> {
        // It may be the one that moves, and then leads nowhere.
        let targets = self.link_targets(original);
        let first = self.copy_one(original, rip)?;
        let mut chain = vec![(first, targets)];
        let mut copied = 1;
        while let Some((copy, targets)) = chain.pop() {
            for (index, at, target) in targets {
                let rip = self.at(copy).target(at);
                let same = self.siblings(target).find(|id| self.at(*id).runs_at(rip));
                let to = same.or_else(|| {
                    let block = self.at(target);
                    if copied == MAX_CHAIN || !block.movable || !self.has_room(block.length as usize) {
                        return None;
                    }
                    let further = self.link_targets(target);
                    let made = self.copy_one(target, rip)?;
                    copied += 1;
                    chain.push((made, further));
                    Some(made)
                });
                if let Some(to) = to {
                    self.link_at(LinkId { block: copy, index }, at, to, false);
                }
            }
        }
        Some(first)
    }

    /// Drops the one longest not looked for of the blocks that an origin has at different addresses, if one more would be too many: each
    /// process may add one of those that neither are relative nor can be copied.
    pub(super) fn limit_addresses(&mut self, origin: Origin) {
        let age = |id: &BlockId| self.clock.wrapping_sub(self.at(*id).used);
        let mut count = 0;
        let oldest = self.at_origin(origin).inspect(|_| count += 1).max_by_key(age);
        if let Some(oldest) = oldest.filter(|_| count >= MAX_COPIES) {
            self.remove(oldest);
        }
    }

    /// The links of a block that lead somewhere, by their index, and where.
    fn link_targets(&self, id: BlockId) -> Vec<(u16, Link, BlockId)> {
        let block = self.at(id);
        let states = self.regions[self.region_of(block.start())].links[block.links()].iter();
        if states.clone().all(|state| state.to.is_none()) {
            return Vec::new();
        }
        let links = (0..).zip(self.body(id).record.links()).zip(states);
        // Where another page is, the copy has to see for itself.
        links
            .filter_map(|((index, link), state)| Some((index, link, state.to.filter(|_| !block.is_far(link))?)))
            .collect()
    }

    fn copy_one(&mut self, original: BlockId, rip: u64) -> Option<BlockId> {
        let (mut code, mut packed) = std::mem::take(&mut self.scratch);
        let made = self.copy_by_way_of(&mut code, &mut packed, original, rip);
        self.scratch = (code, packed);
        made
    }

    /// The same, with memory for the code and the record.
    fn copy_by_way_of(
        &mut self,
        code: &mut Vec<u8>,
        packed: &mut Vec<u8>,
        original: BlockId,
        rip: u64,
    ) -> Option<BlockId> {
        let (block, body) = self.block(original)?;
        packed.clear();
        packed.extend_from_slice(body.record.packed);
        let (from, links) = (block.position(), block.link_count);
        let mut sensitive = Vec::new();
        let mut chain = block.first_sensitive();
        while let Some(index) = chain {
            let entry = &self.sensitive[index as usize];
            let offset = entry.insn.insn.ip().wrapping_sub(from.rip) as u16;
            let (insn, _) = body.decode(rip, offset)?;
            sensitive.push(SensitiveInsn { insn, ..entry.insn });
            chain = entry.next;
        }
        code.resize(body.length as usize, 0);
        self.memory.read(from.host, code);
        // Links lead to their stubs at first.
        for link in body.record.links() {
            let rel = i32::from(link.stub_offset) - (i32::from(link.patch_offset) + 4);
            if let Some(field) = code.get_mut(link.patch_offset as usize..).and_then(|c| c.first_chunk_mut()) {
                *field = rel.to_le_bytes();
            }
        }
        let alike = |id: BlockId| self.at(id).length == body.length && self.at(id).print == block.print;
        let copies = self.siblings(original).filter(|id| alike(*id));
        let (count, oldest) = copies.fold((0, None), |(n, oldest): (usize, Option<BlockId>), id| {
            let age = |id: BlockId| self.clock.wrapping_sub(self.at(id).used);
            (n + 1, if oldest.is_some_and(|o| age(o) >= age(id)) { oldest } else { Some(id) })
        });
        let made = match oldest {
            Some(id) if count >= MAX_COPIES && self.body(id).record.packed == packed => {
                self.move_block(id, code, from, rip, &sensitive)
            }
            _ => {
                let body = Body { record: Record::read(packed), ..body };
                self.put(New { body, links }, code, from, rip, &sensitive)
            }
        };
        if let Some(made) = made {
            self.stats.copied += 1;
            if let Some(template) = self.templates.get(&original).cloned() {
                self.templates.insert(made, template);
            }
        }
        made
    }

    /// Gives a block another guest address. `code` is what a block at `from` has, with links to stubs.
    fn move_block(
        &mut self,
        id: BlockId,
        code: &mut [u8],
        from: Position,
        rip: u64,
        sensitive: &[SensitiveInsn],
    ) -> Option<BlockId> {
        let (block, body) = self.block(id)?;
        let (origin, old) = (body.origin, block.position());
        let mut indices = Vec::new();
        let mut chain = block.first_sensitive();
        while let Some(index) = chain {
            indices.push(index);
            chain = self.sensitive[index as usize].next;
        }
        let mut numbers = indices.iter().copied();
        if !body.relocate(code, from, Position { rip, host: old.host }, || numbers.next()) {
            return None;
        }
        self.jumps.forget(origin.mode, origin.jump_key(old.rip));
        self.unlink_all(id);
        for (&index, insn) in indices.iter().zip(sensitive) {
            self.sensitive[index as usize].insn = *insn;
        }
        self.memory.write(old.host, code);
        self.name(old.host, code.len(), rip);
        self.clock = self.clock.wrapping_add(1);
        let used = self.clock;
        let block = self.at_mut(id);
        (block.rip, block.used) = (rip, used);
        self.stats.moved += 1;
        Some(id)
    }
}
