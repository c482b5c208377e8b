//! Blocks of host code: where they stand, how they are found, linked, copied and dropped.
//!
//! Each vCPU has its own cache, so that emitted code needs no locks and a patch is seen by the one thread that runs it.
//! Blocks are found by guest address, origin and mode in the dispatcher ([`Cache::find`]), and by guest address
//! alone in the [jump table](crate::jumps) that emitted code searches. Guest code that is mapped at another address as
//! well gets a copy ([`Cache::copy`]) instead of another translation.
//!
//! Code memory is a ring of regions: when the last one is full, the first one's blocks are dropped to make room, so that
//! nothing is ever stopped for long. A block that was dropped may still be running, until the dispatcher has control again:
//! only then its memory is free ([`Cache::reap`]). A region keeps what is known of its blocks, too: no block has memory of
//! its own.

use std::hash::BuildHasher;
use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;

use hashbrown::HashTable;
use iced_x86::Instruction;
use memory::PAGE_SIZE;
use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::body::{self, Body, Link, Origin, Position, Template};
use crate::code_memory::{CODE_START, CodeMemory};
use crate::codegen::block::{SensitiveInsn, Translated};
use crate::codegen::relative::WAY_IN;
use crate::jumps::Jumps;
use crate::mode::CodeSegment;
use crate::perf_map::PerfMap;
use crate::record::{Record, Writer};
use crate::snippets::{SNIPPET_BYTES, Snippets};

use room::Region;

/// A block's number in its cache, counted from one: so that an optional one takes no more room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(NonZeroU32);

impl BlockId {
    fn nth(index: usize) -> Option<Self> {
        u32::try_from(index + 1).ok().and_then(NonZeroU32::new).map(BlockId)
    }

    fn index(self) -> usize {
        self.0.get() as usize - 1
    }
}

/// One of a block's links.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkId {
    block: BlockId,
    index: u16,
}

#[derive(Clone, Copy)]
struct LinkState {
    /// Where the branch's rel32 is, and where it leads while there is no link: the record has it, but is far away.
    patch_offset: u16,
    stub_offset: u16,
    to: Option<BlockId>,
    /// The next link that leads to the same block.
    next: Option<LinkId>,
}

impl LinkState {
    fn of(link: Link) -> Self {
        LinkState { patch_offset: link.patch_offset, stub_offset: link.stub_offset, to: None, next: None }
    }
}

/// No addresses of 64-bit code.
const NOWHERE: u64 = 1 << 63;
const SEVERAL: u64 = NOWHERE + 1;

/// Host code for a run of guest instructions, at one guest address or at any.
pub struct Block {
    /// Its guest address; of a relative block, the one that the jump table has it at, or [`NOWHERE`] or [`SEVERAL`].
    rip: u64,
    origin: Origin,
    /// In code memory.
    start: u32,
    /// Where its record and its links begin among those of its region.
    record: u32,
    links: u32,
    /// Of its record: what copies have in common.
    print: u32,
    /// The first link of other blocks (or its own) that leads here.
    incoming: Option<LinkId>,
    /// The next block of the same origin, the last one's being the first: so all are found from any of them.
    alias: BlockId,
    /// The first of its sensitive instructions, counted from one.
    sensitive: Option<NonZeroU32>,
    /// When the dispatcher last looked for it.
    used: u32,
    /// Of the host code.
    length: u16,
    parked_entry: u16,
    /// Not zero: the block is [relative](crate::codegen::relative).
    parked_way_in: u16,
    link_count: u16,
    movable: bool,
    checked: bool,
    two_pages: bool,
    live: bool,
}

impl Block {
    /// In code memory.
    pub fn start(&self) -> usize {
        self.start as usize
    }

    fn position(&self) -> Position {
        Position { rip: self.rip, host: self.start as usize }
    }

    fn is_relative(&self) -> bool {
        self.parked_way_in != 0
    }

    /// What it was translated at: of a relative block the offset in its page.
    fn nominal_rip(&self) -> u64 {
        if self.is_relative() { self.origin.address % PAGE_SIZE } else { self.rip }
    }

    /// Its guest address, given the page that a relative block runs in.
    pub fn address(&self, page: u64) -> u64 {
        if self.is_relative() { page.wrapping_add(self.nominal_rip()) } else { self.rip }
    }

    /// Whether it can run at a guest address where its origin is mapped.
    fn runs_at(&self, rip: u64) -> bool {
        self.is_relative() || self.rip == rip
    }

    /// Where linked blocks enter.
    fn linked_entry(&self, parked: bool) -> u16 {
        match (parked, self.is_relative()) {
            (true, _) => self.parked_entry,
            (false, true) => WAY_IN as u16,
            (false, false) => 0,
        }
    }

    fn first_sensitive(&self) -> Option<u32> {
        self.sensitive.map(|number| number.get() - 1)
    }

    /// The guest address that one of its links leads to.
    fn target(&self, link: Link) -> u64 {
        body::target(self.origin.mode, self.nominal_rip(), link)
    }

    fn is_far(&self, link: Link) -> bool {
        link.is_far((self.origin.address % PAGE_SIZE) as usize)
    }

    fn links(&self) -> Range<usize> {
        self.links as usize..self.links as usize + usize::from(self.link_count)
    }
}

/// There are hundreds of thousands.
const _: () = assert!(size_of::<Block>() <= 80);

/// A block to be added: what of it does not depend on where it stands.
#[derive(Clone, Copy)]
struct New<'a> {
    body: Body<'a>,
    links: u16,
}

/// A sensitive instruction of a block.
#[derive(Clone, Copy)]
struct SensitiveEntry {
    insn: SensitiveInsn,
    /// The block's next one; or the next free entry.
    next: Option<u32>,
}

/// A block that depends on a page.
#[derive(Clone, Copy)]
struct PageBlock {
    id: BlockId,
    /// The first byte of the page that translation looked at, and the one after the last: of most blocks a store has to know no
    /// more than these, since to ask their records takes longer.
    start: u16,
    end: u16,
}

impl PageBlock {
    fn extent(&self) -> Range<usize> {
        self.start.into()..self.end.into()
    }

    fn touches(&self, bytes: &Range<usize>) -> bool {
        usize::from(self.start) < bytes.end && bytes.start < usize::from(self.end)
    }
}

/// The blocks that depend on a page.
#[derive(Default)]
struct PageCode {
    blocks: Vec<PageBlock>,
    /// A bit for each 64 bytes: translation may have looked at some of them.
    lines: u64,
    /// Some that begin here are relative.
    relative: bool,
}

/// One vCPU's blocks.
pub struct Cache {
    memory: Arc<CodeMemory>,
    regions: Vec<Region>,
    /// The region that is being filled.
    region: usize,
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    /// Dropped since the dispatcher last had control.
    dead: Vec<BlockId>,
    /// A block of each origin; others follow by [`Block::alias`].
    by_origin: HashTable<BlockId>,
    /// The frames of the bytes beyond the first page of those blocks that have such bytes.
    second_pages: FxHashMap<BlockId, u64>,
    /// By frame; those that look at their bytes themselves are not among them, but
    by_page: FxHashMap<u64, PageCode>,
    /// here, by the frame in which they begin.
    checked: FxHashMap<u64, Vec<BlockId>>,
    /// Of blocks that can be taken up again when their bytes were written.
    templates: FxHashMap<BlockId, Template>,
    /// Blocks that may be, when they are looked for: see [`crate::rewritten`].
    asleep: FxHashMap<(Origin, u64), BlockId>,
    /// Links that hold as long as global pages stay where they are, and perhaps some that lead nowhere or elsewhere by now: see
    /// [`far`].
    far_links: Vec<LinkId>,
    sensitive: Vec<SensitiveEntry>,
    free_sensitive: Option<u32>,
    pub jumps: Jumps,
    pub snippets: Snippets,
    clock: u32,
    scratch: (Vec<u8>, Vec<u8>),
    writer: Writer,
    pub stats: Stats,
    /// Where `perf` looks for the names of emitted code, if asked for.
    perf_map: Option<PerfMap>,
}

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    pub blocks: u64,
    pub guest_instructions: u64,
    pub copied: u64,
    pub moved: u64,
    pub invalidated: u64,
    pub evicted_regions: u64,
    pub links: u64,
    pub lookups: u64,
    pub woken: u64,
    pub global_flushes: u64,
}

impl Cache {
    pub fn new(memory: Arc<CodeMemory>, perf_map: Option<PerfMap>) -> Self {
        let regions = room::regions(CODE_START + SNIPPET_BYTES..memory.size());
        Cache {
            jumps: Jumps::new(memory.clone()),
            snippets: Snippets::new(memory.clone(), CODE_START),
            memory,
            regions,
            region: 0,
            blocks: Vec::new(),
            free: Vec::new(),
            dead: Vec::new(),
            by_origin: HashTable::new(),
            second_pages: FxHashMap::default(),
            by_page: FxHashMap::default(),
            checked: FxHashMap::default(),
            templates: FxHashMap::default(),
            asleep: FxHashMap::default(),
            far_links: Vec::new(),
            sensitive: Vec::new(),
            free_sensitive: None,
            clock: 0,
            scratch: Default::default(),
            writer: Writer::default(),
            stats: Stats::default(),
            perf_map,
        }
    }

    /// The host address of a byte of the code that stands at `start` in code memory.
    pub fn host_address(&self, start: usize, offset: u16) -> u64 {
        self.memory.host_address(start + offset as usize)
    }

    /// The code memory offset of a host address. Async-signal-safe.
    pub fn offset_of(&self, address: u64) -> Option<usize> {
        let offset = address.wrapping_sub(self.memory.host_address(0)) as usize;
        (CODE_START..self.memory.size()).contains(&offset).then_some(offset)
    }

    pub fn block(&self, id: BlockId) -> Option<(&Block, Body<'_>)> {
        self.blocks.get(id.index()).map(|b| (b, self.body(id)))
    }

    fn at(&self, id: BlockId) -> &Block {
        &self.blocks[id.index()]
    }

    fn at_mut(&mut self, id: BlockId) -> &mut Block {
        &mut self.blocks[id.index()]
    }

    fn body(&self, id: BlockId) -> Body<'_> {
        let block = self.at(id);
        let records = &self.regions[self.region_of(block.start())].records;
        Body {
            origin: block.origin,
            second_page: self.second_page(id),
            length: block.length,
            parked_entry: block.parked_entry,
            parked_way_in: block.parked_way_in,
            movable: block.movable,
            checked: block.checked,
            // Of a block that is gone nothing may be left.
            record: Record::read(records.get(block.record as usize..).unwrap_or_default()),
        }
    }

    /// The frame that a block's bytes beyond its first page are in.
    pub fn second_page(&self, id: BlockId) -> Option<u64> {
        if self.at(id).two_pages { self.second_pages.get(&id).copied() } else { None }
    }

    /// The number of the region that holds an offset.
    fn region_of(&self, offset: usize) -> usize {
        let first = &self.regions[0].range;
        (offset.saturating_sub(first.start) / first.len()).min(self.regions.len() - 1)
    }

    fn link_state(&mut self, link: LinkId) -> &mut LinkState {
        let block = self.at(link.block);
        let (start, index) = (block.start(), block.links().start + usize::from(link.index));
        let region = self.region_of(start);
        &mut self.regions[region].links[index]
    }

    /// One of a block's links, as translation made it.
    fn link_of(&self, link: LinkId) -> Option<Link> {
        self.body(link.block).record.links().nth(link.index.into())
    }

    pub fn is_live(&self, id: BlockId) -> bool {
        self.blocks.get(id.index()).is_some_and(|b| b.live)
    }

    /// Bytes of a block's host code.
    pub fn length(&self, id: BlockId) -> usize {
        self.at(id).length.into()
    }

    /// The host address to enter a block at.
    pub fn entry(&self, id: BlockId) -> u64 {
        self.host_address(self.at(id).start(), 0)
    }

    /// Blocks of a origin, at whatever address.
    fn at_origin(&self, origin: Origin) -> impl Iterator<Item = BlockId> + '_ {
        let any = self.by_origin.find(hash(origin), |id| self.at(*id).origin == origin);
        any.into_iter().flat_map(|id| self.siblings(*id))
    }

    /// The same from one of them on, which a hash table that is much larger than the processor's caches need not be asked for.
    fn siblings(&self, first: BlockId) -> impl Iterator<Item = BlockId> + '_ {
        std::iter::successors(Some(first), move |id| Some(self.at(*id).alias).filter(|next| *next != first))
    }

    /// The block of a origin at a guest address; that it depends on a second page is for the caller to check.
    pub fn find(&mut self, origin: Origin, rip: u64) -> Option<BlockId> {
        let id = self.at_origin(origin).find(|id| self.at(*id).runs_at(rip))?;
        self.clock = self.clock.wrapping_add(1);
        self.at_mut(id).used = self.clock;
        Some(id)
    }

    /// Whether there is a block of the origin at any address.
    pub fn has_origin(&self, origin: Origin) -> bool {
        self.at_origin(origin).next().is_some()
    }

    /// A block of the origin whose code can be copied to another address.
    pub fn find_original(&self, origin: Origin) -> Option<BlockId> {
        self.at_origin(origin).find(|id| self.at(*id).movable)
    }

    /// The block that holds a host address, and the address's offset in its code.
    pub fn find_by_host(&self, address: u64) -> Option<(BlockId, u16)> {
        let offset = self.offset_of(address)?;
        if offset < self.regions.first()?.range.start {
            return None;
        }
        let region = &self.regions[self.region_of(offset)];
        let after = region.starts.partition_point(|&start| start as usize <= offset);
        let id = *region.blocks.get(after.checked_sub(1)?)?;
        let block = self.at(id);
        let offset = offset - block.start();
        // A call's return address may be the first byte after the block.
        (offset <= block.length as usize).then_some((id, offset as u16))
    }

    /// Adds a block for which there is room. The caller has seen to it that writes to its pages are noticed. `ahead`: the
    /// bytes that were looked at ahead, in code that is rewritten often.
    pub fn insert(
        &mut self,
        origin: Origin,
        rip: u64,
        second_page: Option<u64>,
        bytes: &[u8],
        ahead: Option<&[u8]>,
        t: &mut Translated,
    ) -> Option<BlockId> {
        let mut writer = std::mem::take(&mut self.writer);
        let body = Body {
            origin,
            second_page,
            length: t.code.len() as u16,
            parked_entry: t.parked_entry as u16,
            parked_way_in: t.parked_way_in as u16,
            movable: t.movable && t.parked_way_in == 0 && second_page.is_none() && origin.segment == CodeSegment::FLAT,
            checked: t.checked,
            record: Record::read(writer.pack(bytes, t)),
        };
        self.limit_addresses(origin);
        self.stats.blocks += 1;
        self.stats.guest_instructions += t.points.len() as u64;
        let new = New { body, links: t.links.len() as u16 };
        let id = self.put(new, &mut t.code, Position { rip, host: 0 }, rip, &t.sensitive);
        if let (Some(id), Some(ahead), None) = (id, ahead, second_page) {
            let immediates = t.immediates.as_slice().into();
            self.templates.insert(id, Template { ahead: ahead.into(), immediates });
        }
        self.writer = writer;
        id
    }

    /// Puts `code`, as it has to be at `from`, behind what there is, as a block at `rip`.
    fn put(
        &mut self,
        New { body, links }: New,
        code: &mut [u8],
        from: Position,
        rip: u64,
        sensitive: &[SensitiveInsn],
    ) -> Option<BlockId> {
        if !self.has_room(code.len()) {
            return None;
        }
        let start = self.regions[self.region].next;
        let indices: Vec<u32> = sensitive.iter().map(|insn| self.add_sensitive(*insn)).collect();
        for pair in indices.windows(2) {
            self.sensitive[pair[0] as usize].next = Some(pair[1]);
        }
        let mut numbers = indices.iter().copied();
        if !body.relocate(code, from, Position { rip, host: start }, || numbers.next()) {
            for &index in &indices {
                self.sensitive[index as usize].next = self.free_sensitive.replace(index);
            }
            return None;
        }
        self.memory.write(start, code);
        // At least a byte lies between blocks, so that a return address at a block's very end is still its own.
        self.regions[self.region].next = (start + code.len() + 1).next_multiple_of(16);
        self.name(start, code.len(), rip);
        self.clock = self.clock.wrapping_add(1);
        let id = self.free.pop().or_else(|| BlockId::nth(self.blocks.len()))?;
        let region = &mut self.regions[self.region];
        let block = Block {
            rip: if body.parked_way_in == 0 { rip } else { NOWHERE },
            origin: body.origin,
            start: start as u32,
            record: region.records.len() as u32,
            links: region.links.len() as u32,
            print: print(body.record.packed),
            incoming: None,
            alias: id,
            sensitive: indices.first().and_then(|index| NonZeroU32::new(index + 1)),
            used: self.clock,
            length: body.length,
            parked_entry: body.parked_entry,
            parked_way_in: body.parked_way_in,
            link_count: links,
            movable: body.movable,
            checked: body.checked,
            two_pages: body.second_page.is_some(),
            live: false,
        };
        region.records.extend_from_slice(body.record.packed);
        region.links.extend(body.record.links().map(LinkState::of));
        match self.blocks.get_mut(id.index()) {
            Some(free) => *free = block,
            None => self.blocks.push(block),
        }
        let region = &mut self.regions[self.region];
        region.blocks.push(id);
        region.starts.push(start as u32);
        if let Some(page) = body.second_page {
            self.second_pages.insert(id, page);
        }
        self.attach(id);
        Some(id)
    }

    /// Lets a block be found.
    fn attach(&mut self, id: BlockId) {
        let body = self.body(id);
        let (origin, second_page, extent, beyond) = (body.origin, body.second_page, body.extent(), body.beyond());
        let other = self.at_origin(origin).next();
        match other {
            Some(other) => self.at_mut(id).alias = std::mem::replace(&mut self.at_mut(other).alias, id),
            None => self.lead_origin(origin, Some(id)),
        }
        let block = self.at_mut(id);
        let relative = block.is_relative();
        block.live = true;
        if block.checked {
            self.checked.entry(origin.frame()).or_default().push(id);
            return;
        }
        for (page, extent) in std::iter::once((origin.frame(), extent)).chain(second_page.map(|p| (p, beyond))) {
            let code = self.by_page.entry(page).or_default();
            code.blocks.push(PageBlock { id, start: extent.start as u16, end: extent.end as u16 });
            code.lines |= lines(&extent);
            code.relative |= relative && page == origin.frame();
        }
    }

    /// Sets or forgets the block that an origin is known by.
    fn lead_origin(&mut self, origin: Origin, any: Option<BlockId>) {
        let blocks = &self.blocks;
        let of = |id: &BlockId| blocks[id.index()].origin;
        match (self.by_origin.find_entry(hash(origin), |id| of(id) == origin), any) {
            (Ok(mut entry), Some(id)) => *entry.get_mut() = id,
            (Ok(entry), None) => {
                entry.remove();
            }
            (Err(absent), Some(id)) => {
                absent.into_table().insert_unique(hash(origin), id, |id| hash(of(id)));
            }
            (Err(_), None) => {}
        }
    }

    fn name(&mut self, start: usize, length: usize, rip: u64) {
        if let Some(map) = &mut self.perf_map {
            map.add(self.memory.host_address(start), length, rip);
        }
    }

    fn add_sensitive(&mut self, insn: SensitiveInsn) -> u32 {
        match self.free_sensitive {
            Some(index) => {
                let entry = &mut self.sensitive[index as usize];
                self.free_sensitive = entry.next.take();
                entry.insn = insn;
                index
            }
            None => {
                self.sensitive.push(SensitiveEntry { insn, next: None });
                self.sensitive.len() as u32 - 1
            }
        }
    }

    /// A sensitive instruction, by the number that emitted code gives.
    pub fn sensitive(&self, index: u64) -> Option<SensitiveInsn> {
        self.sensitive.get(index as usize).map(|entry| entry.insn)
    }

    /// Whether a page has relative blocks.
    pub fn is_relative_page(&self, page: u64) -> bool {
        self.by_page.get(&page).is_some_and(|code| code.relative)
    }

    /// Whether translated code of the page exists.
    pub fn has_page(&self, page: u64) -> bool {
        self.by_page.contains_key(&page)
    }

    /// The link whose stub's call returns to a host address, with its target and whether it leaves with the flags parked. `page`:
    /// where a relative block runs.
    pub fn find_link(&self, return_address: u64, page: u64) -> Option<(LinkId, u64, bool)> {
        let (id, offset) = self.find_by_host(return_address)?;
        let (block, body) = self.block(id)?;
        let (index, link) = body.record.links().enumerate().find(|(_, l)| l.return_offset == offset)?;
        Some((LinkId { block: id, index: index as u16 }, body.target(block.address(page), link), link.parked))
    }

    /// Lets a link lead to `to`, if that is still where it goes. `global`: all of the block's bytes are in global pages.
    pub fn link(&mut self, link: LinkId, to: BlockId, global: bool) {
        if let Some(at) = self.link_of(link) {
            self.link_at(link, at, to, global);
        }
    }

    /// The same, with what translation knows of the link.
    fn link_at(&mut self, link: LinkId, at: Link, to: BlockId, global: bool) {
        let (source, target) = (self.at(link.block), self.at(to));
        let (from, origin) = (source.origin, target.origin);
        let mode = if at.detour { from.mode.careful() } else { from.mode };
        // What comes after a detour's place may also be the handler of an interrupt.
        if !source.live
            || !target.live
            || source.is_relative() != target.is_relative()
            || source.target(at) != target.nominal_rip()
            || (mode, from.segment) != (origin.mode, origin.segment)
        {
            return;
        }
        // A block in other pages than the branch's depends on a mapping that a link would not check.
        let far = source.is_far(at);
        let stays = !far && from.frame() == origin.frame() && !target.two_pages;
        if !(stays || global && mode.long() && mode.cpl() == 0) {
            return;
        }
        let entry = target.linked_entry(at.parked);
        let (patch, entry) = (source.start() + at.patch_offset as usize, target.start() + entry as usize);
        let next = target.incoming;
        let state = self.link_state(link);
        if state.to.is_some() {
            return;
        }
        (state.to, state.next) = (Some(to), next);
        self.patch(patch, entry);
        self.at_mut(to).incoming = Some(link);
        if !stays {
            self.note_far_link(link);
        }
        self.stats.links += 1;
    }

    fn patch(&self, patch_offset: usize, target: usize) {
        let rel = target as i32 - (patch_offset as i32 + 4);
        self.memory.write(patch_offset, &rel.to_le_bytes());
    }

    /// Whether translation looked at any of these bytes of a page.
    pub fn overlaps(&self, page: u64, bytes: &Range<usize>) -> bool {
        let Some(code) = self.by_page.get(&page) else { return false };
        code.lines & lines(bytes) != 0 && code.blocks.iter().any(|block| self.looked_at(block, page, bytes))
    }

    fn looked_at(&self, block: &PageBlock, page: u64, bytes: &Range<usize>) -> bool {
        block.touches(bytes) && self.body(block.id).overlaps(page, bytes)
    }

    /// Drops the blocks made from `bytes` of a physical page, but for those that can sleep; how many.
    pub fn invalidate(&mut self, page: u64, bytes: Range<usize>) -> usize {
        let Some(code) = self.by_page.get(&page) else { return 0 };
        if code.lines & lines(&bytes) == 0 {
            return 0;
        }
        let hit = code.blocks.iter().filter(|block| self.looked_at(block, page, &bytes));
        let hit: Vec<BlockId> = hit.map(|block| block.id).collect();
        for &id in &hit {
            self.stats.invalidated += 1;
            self.put_to_sleep(id);
        }
        self.find_lines(page);
        hit.len()
    }

    fn find_lines(&mut self, page: u64) {
        if let Some(code) = self.by_page.get_mut(&page) {
            code.lines = code.blocks.iter().fold(0, |all, block| all | lines(&block.extent()));
        }
    }

    /// Drops a block because its translation doesn't hold any more.
    pub fn remove(&mut self, id: BlockId) {
        self.stats.invalidated += 1;
        self.drop_block(id);
    }

    /// Drops all blocks of a origin.
    pub fn remove_origin(&mut self, origin: Origin) {
        loop {
            let Some(id) = self.at_origin(origin).next() else { break };
            self.remove(id);
        }
    }

    fn drop_block(&mut self, id: BlockId) {
        self.detach(id);
        self.dead.push(id);
    }

    /// Sees to it that nothing leads to a block.
    fn detach(&mut self, id: BlockId) {
        self.unlink_all(id);
        let second_page = self.second_page(id);
        let block = self.at_mut(id);
        block.live = false;
        let (origin, rip, alias) = (block.origin, block.rip, block.alias);
        self.close(id);
        if rip != NOWHERE && rip != SEVERAL {
            self.jumps.forget(origin.mode, origin.jump_key(rip));
        }
        let before = self.siblings(id).find(|other| self.at(*other).alias == id);
        if let Some(before) = before {
            self.at_mut(before).alias = alias;
        }
        self.lead_origin(origin, Some(alias).filter(|other| *other != id));
        self.at_mut(id).alias = id;
        if self.at(id).checked {
            self.forget_checked(id, origin.frame());
            return;
        }
        for page in std::iter::once(origin.frame()).chain(second_page) {
            if let Some(code) = self.by_page.get_mut(&page) {
                code.blocks.retain(|other| other.id != id);
                if code.blocks.is_empty() {
                    self.by_page.remove(&page);
                }
            }
        }
    }

    /// Makes all links to and from a block lead to their stubs.
    fn unlink_all(&mut self, id: BlockId) {
        while let Some(link) = self.at(id).incoming {
            self.unlink(link);
        }
        for index in 0..self.at(id).link_count {
            self.unlink(LinkId { block: id, index });
        }
    }

    /// Makes a link lead to its stub again.
    fn unlink(&mut self, link: LinkId) {
        let place = self.link_state(link);
        let state = *place;
        (place.to, place.next) = (None, None);
        let Some(to) = state.to else { return };
        let start = self.at(link.block).start();
        self.patch(start + usize::from(state.patch_offset), start + usize::from(state.stub_offset));
        let mut before = None;
        let mut incoming = self.at(to).incoming;
        while let Some(other) = incoming {
            if other == link {
                break;
            }
            before = incoming;
            incoming = self.link_state(other).next;
        }
        match before {
            Some(before) => self.link_state(before).next = state.next,
            None => self.at_mut(to).incoming = state.next,
        }
    }
}

/// The instruction of a slow path or a fault, with its bytes, and whether the flags were parked.
pub type Found = (Instruction, [u8; 15], bool);

impl Cache {
    /// The guest instruction whose operation is at a host address within a block; `page`: where a relative one runs.
    pub fn instruction_at(&self, address: u64, page: u64) -> Option<Found> {
        let (id, offset) = self.find_by_host(address)?;
        let (block, body) = self.block(id)?;
        let point = body.record.point_at(offset)?;
        let (insn, bytes) = body.decode(block.address(page), point.guest_offset)?;
        (offset < body.length).then_some((insn, bytes, point.parked))
    }

    /// The guest address of the last instruction of the block that holds a host address; `page`: where a relative one runs.
    pub fn last_instruction(&self, address: u64, page: u64) -> Option<u64> {
        let (id, _) = self.find_by_host(address)?;
        let (block, body) = self.block(id)?;
        Some(block.address(page).wrapping_add(body.record.point_at(body.length)?.guest_offset.into()))
    }
}

/// A bit for each 64 bytes of a page that a range touches.
fn lines(bytes: &Range<usize>) -> u64 {
    let (first, last) = (bytes.start / 64, bytes.end.saturating_sub(1).min(4095) / 64);
    if first > last || first > 63 { 0 } else { u64::MAX << first & u64::MAX >> (63 - last) }
}

fn print(record: &[u8]) -> u32 {
    FxBuildHasher.hash_one(record) as u32
}

fn hash(origin: Origin) -> u64 {
    FxBuildHasher.hash_one(origin)
}

mod copies;
mod far;
mod room;
mod sleep;
mod ways;
pub use sleep::Woken;
#[cfg(test)]
mod tests;
