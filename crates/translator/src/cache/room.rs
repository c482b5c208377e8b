//! The regions of code memory, of which the oldest is emptied when there is no room.

use std::ops::Range;

use super::{BlockId, Cache, LinkState, SEVERAL};
use crate::codegen::block::MAX_BLOCK_BYTES;

/// The most and the least bytes of a region.
const MAX_REGION: usize = 1 << 20;
const MIN_REGION: usize = 64 << 10;
const _: () = assert!(MIN_REGION > MAX_BLOCK_BYTES);
/// Regions that code memory is divided into, if they aren't too large or too small then.
const REGIONS: usize = 32;

pub(super) struct Region {
    pub range: Range<usize>,
    /// Up to where it is filled.
    pub next: usize,
    /// In the order of their code.
    pub blocks: Vec<BlockId>,
    /// Where each begins.
    pub starts: Vec<u32>,
    /// The blocks' [records](crate::record::Record) and links, in the same order.
    pub records: Vec<u8>,
    pub links: Vec<LinkState>,
}

impl Region {
    fn new(range: Range<usize>) -> Self {
        let (blocks, starts, records, links) = Default::default();
        Region { next: range.start, range, blocks, starts, records, links }
    }

    /// One that will have about so many blocks, bytes of records, and links: lists that grow are copied.
    fn with_room(range: Range<usize>, (blocks, records, links): (usize, usize, usize)) -> Self {
        let about = |n: usize| n + n / 8;
        Region {
            blocks: Vec::with_capacity(about(blocks)),
            starts: Vec::with_capacity(about(blocks)),
            records: Vec::with_capacity(about(records)),
            links: Vec::with_capacity(about(links)),
            ..Region::new(range)
        }
    }
}

/// The regions of a range of code memory: of one size, but for the last.
pub(super) fn regions(range: Range<usize>) -> Vec<Region> {
    let size = (range.len() / REGIONS).clamp(MIN_REGION, MAX_REGION) & !0xfff;
    let start = |i: usize| range.start + i * size;
    let mut regions: Vec<Region> = (0..range.len() / size).map(|i| Region::new(start(i)..start(i + 1))).collect();
    if let Some(last) = regions.last_mut() {
        last.range.end = range.end;
    }
    regions
}

impl Cache {
    /// Bytes of host code that are kept, with what lies between.
    pub fn bytes_in_use(&self) -> usize {
        self.regions.iter().map(|r| r.next - r.range.start).sum()
    }

    /// Whether a block of so many bytes can be made without dropping others. The return address of a call at its very end
    /// must still be in the region.
    pub fn has_room(&self, length: usize) -> bool {
        self.regions.get(self.region).is_some_and(|r| r.next + length < r.range.end)
    }

    /// Drops the oldest blocks until there is room. No emitted code may be running. False if there never will be room.
    pub fn make_room(&mut self, length: usize) -> bool {
        if self.has_room(length) {
            return true;
        }
        let mut sizes = (0, 0, 0);
        if let Some(full) = self.regions.get_mut(self.region) {
            full.blocks.shrink_to_fit();
            full.starts.shrink_to_fit();
            full.records.shrink_to_fit();
            full.links.shrink_to_fit();
            sizes = (full.blocks.len(), full.records.len(), full.links.len());
        }
        self.region = (self.region + 1) % self.regions.len().max(1);
        let Some(region) = self.regions.get_mut(self.region) else { return false };
        let (range, blocks) = (region.range.clone(), std::mem::take(&mut region.blocks));
        if !blocks.is_empty() {
            self.stats.evicted_regions += 1;
        }
        for &id in &blocks {
            if self.is_live(id) {
                self.drop_block(id);
            } else {
                self.drop_asleep(id);
            }
        }
        self.reap();
        self.free.extend(blocks);
        self.regions[self.region] = Region::with_room(range.clone(), sizes);
        let evicted = self.memory.host_address(range.start)..self.memory.host_address(range.end);
        self.jumps.forget_programs_code(&evicted);
        self.snippets.forget(evicted);
        self.has_room(length)
    }

    /// Frees what dropped blocks held. No emitted code may be running.
    pub fn reap(&mut self) {
        while let Some(id) = self.dead.pop() {
            let block = self.at_mut(id);
            let mut chain = block.first_sensitive();
            block.sensitive = None;
            let (start, record, links) = (block.start(), block.record, block.links());
            let two_pages = block.two_pages;
            let known = block.rip == SEVERAL;
            self.templates.remove(&id);
            if two_pages {
                self.second_pages.remove(&id);
            }
            while let Some(index) = chain {
                let entry = &mut self.sensitive[index as usize];
                chain = entry.next.take();
                entry.next = self.free_sensitive.replace(index);
            }
            // The one made last gives its memory back, unless the jump table still leads there: code that is patched and run in turns
            // needs no more than once.
            let index = self.region_of(start);
            let region = &mut self.regions[index];
            if region.blocks.last() == Some(&id) && !known {
                region.blocks.pop();
                region.starts.pop();
                region.records.truncate(record as usize);
                region.links.truncate(links.start);
                region.next = start;
                self.free.push(id);
                let range = start..region.range.end;
                self.snippets.forget(self.memory.host_address(range.start)..self.memory.host_address(range.end));
            }
        }
    }
}
