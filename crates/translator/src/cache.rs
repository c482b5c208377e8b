//! Blocks of host code: where they live, how they are found, linked and dropped.
//!
//! Each vCPU has its own cache, so that emitted code needs no locks and a patch is seen by the one thread that runs it.
//! Host code lives in a [`CodeMemory`], mapped twice: writable for the translator, executable for the processor. Blocks
//! are found by guest address, frame (a page of the machine's memory, see `phys`) and mode ([`Key`]) in the dispatcher, and by guest address alone in the
//! [jump table](CodeMemory::jump_base) that emitted code searches. Guest writes to translated bytes drop exactly the
//! blocks they hit ([`Vcpu::code_stored`]); other vCPUs are told through [`Invalidations`].

use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use iced_x86::Instruction;
use memory::map::Place;
use memory::{CodeWatcher, MapObserver, PAGE_SIZE, Sections};
use rustc_hash::FxHashMap;

use crate::Vcpu;
use crate::codegen::block::{SensitiveInsn, Translated};
use crate::mode::{CodeSegment, Mode};
use crate::perf_map::PerfMap;
use crate::phys::{frame_of, page_of};
use crate::shared::request;

/// Offsets in code memory: the word that backward branches poll, the base of the jump table, and the first block.
pub const POLL_OFFSET: usize = 0;
pub const JUMP_BASE_OFFSET: usize = 64;
const CODE_START: usize = 4096;
/// Host code of one vCPU, in bytes.
pub const DEFAULT_SIZE: usize = 32 << 20;
/// When less than this is left, everything is dropped; more than a block and its snippets need.
const RESERVE: usize = 256 << 10;

/// Entries in each slot of the jump table.
const JUMP_ENTRIES: usize = 65536;
/// Jump table entries that are listed for clearing at most.
const MAX_LISTED: usize = 1 << 20;
/// Modes that have a slot.
pub const JUMP_SLOTS: usize = 32;
/// The bits of an address that index the jump table: 4 bytes apart, since few branch targets are closer.
pub const JUMP_MASK: u64 = (JUMP_ENTRIES as u64 - 1) << 2;
/// The same where code segments have bases, which stand in the upper half of a [`jump_key`]: offsets are mostly small, and
/// bases differ in the paragraph.
pub const SEGMENTED_JUMP_MASK: u64 = 0xfff << 1 | 0xf << 36;
const JUMP_WORDS: usize = 3;
const JUMP_BYTES: usize = JUMP_SLOTS * JUMP_ENTRIES * JUMP_WORDS * 8;

/// The host has PEXT, which extracts an index without touching the flags.
pub fn index_by_pext() -> bool {
    std::arch::is_x86_feature_detected!("bmi2")
}

/// What the jump table knows a block by: its address, or its offset and the base of the code segment.
pub fn jump_key(rip: u64, segment: CodeSegment) -> u64 {
    rip | u64::from(segment.base) << 32
}

/// The index of a [`jump_key`] in a slot.
pub fn jump_index(key: u64, mode: Mode) -> usize {
    if !index_by_pext() {
        (key & 0xff) as usize
    } else if mode.segmented() {
        ((key >> 1 & 0xfff) | (key >> 36 & 0xf) << 12) as usize
    } else {
        ((key & JUMP_MASK) >> 2) as usize
    }
}

/// The tag of an empty entry. Tags are complements of addresses, so it has to be one that no address which comes to this entry has:
/// zero stands for the address of all ones, except in the entry where that one belongs.
fn empty_tag(tag_index: usize) -> u64 {
    let last = if index_by_pext() { JUMP_ENTRIES - 1 } else { 0xff };
    if tag_index % (JUMP_WORDS * JUMP_ENTRIES) == last { u64::MAX } else { 0 }
}

/// Offsets of a slot's arrays from the jump table's base.
#[derive(Clone, Copy, Debug)]
pub struct JumpSlot {
    /// The complements of the addresses.
    pub tags: i32,
    /// Where to enter with the flags in EFLAGS.
    pub codes: i32,
    /// Where to enter with the flags parked.
    pub parked: i32,
}

pub fn jump_slot_offsets(slot: usize) -> JumpSlot {
    let array = (JUMP_ENTRIES * 8) as i32;
    let tags = (slot * JUMP_WORDS) as i32 * array;
    JumpSlot { tags, codes: tags + array, parked: tags + 2 * array }
}

/// An anonymous or file mapping of the process.
struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: a mapping is plain memory; what is shared between threads in it is only accessed atomically.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(length: usize, protection: i32, flags: i32, fd: i32) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, fd, 0) };
        match NonNull::new(p.cast()) {
            Some(start) if p != libc::MAP_FAILED => Ok(Mapping { start, length }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped, and nobody holds a pointer into it longer than the owner.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// The memory that one vCPU's host code lives in, with the words that stop it.
pub struct CodeMemory {
    writable: Mapping,
    executable: Mapping,
    jump_table: Mapping,
    /// Never written: the host backs it with one page of zeros. While it stands in for the jump table every indirect branch
    /// misses.
    empty_table: Mapping,
}

impl CodeMemory {
    pub fn new(size: usize) -> io::Result<Self> {
        // SAFETY: the name is a valid C string; the descriptor is ours.
        let fd = unsafe { libc::memfd_create(c"translated-code".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let file = unsafe { <std::fs::File as std::os::fd::FromRawFd>::from_raw_fd(fd) };
        file.set_len(size as u64)?;
        let table = || {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            Mapping::new(JUMP_BYTES, libc::PROT_READ | libc::PROT_WRITE, flags, -1)
        };
        let memory = CodeMemory {
            writable: Mapping::new(size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd)?,
            executable: Mapping::new(size, libc::PROT_READ | libc::PROT_EXEC, libc::MAP_SHARED, fd)?,
            jump_table: table()?,
            empty_table: table()?,
        };
        memory.go_on();
        Ok(memory)
    }

    fn poll_word(&self) -> &AtomicU32 {
        // SAFETY: aligned, mapped as long as `self`, and accessed only atomically (by emitted code with plain loads).
        unsafe { AtomicU32::from_ptr(self.writable.start.as_ptr().add(POLL_OFFSET).cast()) }
    }

    fn jump_base(&self) -> &AtomicU64 {
        // SAFETY: as `poll_word`.
        unsafe { AtomicU64::from_ptr(self.writable.start.as_ptr().add(JUMP_BASE_OFFSET).cast()) }
    }

    fn stop(&self) {
        self.poll_word().store(1, Ordering::SeqCst);
        self.jump_base().store(self.empty_table.address(), Ordering::SeqCst);
    }

    fn go_on(&self) {
        self.jump_base().store(self.jump_table.address(), Ordering::SeqCst);
        self.poll_word().store(0, Ordering::SeqCst);
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.writable.length, "a write beyond code memory");
        // SAFETY: in bounds; only the owning vCPU's thread writes code, and it isn't executing these bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.writable.start.as_ptr().add(offset), bytes.len()) };
    }

    fn jump_word(&self, index: usize) -> &AtomicU64 {
        assert!(index * 8 < JUMP_BYTES, "a jump table index out of range");
        // SAFETY: in bounds and aligned; written only by the owning thread.
        unsafe { AtomicU64::from_ptr(self.jump_table.start.as_ptr().cast::<u64>().add(index)) }
    }
}

/// What makes emitted code return to the dispatcher: a word that loops look at, and an empty jump table.
#[derive(Default)]
pub struct PollWord {
    memory: OnceLock<Arc<CodeMemory>>,
    set: AtomicBool,
}

impl PollWord {
    /// From now on the word is the one that the code in `memory` polls.
    pub fn attach(&self, memory: Arc<CodeMemory>) {
        let _ = self.memory.set(memory);
        self.set();
    }

    /// Async-signal-safe.
    pub fn set(&self) {
        self.set.store(true, Ordering::SeqCst);
        if let Some(memory) = self.memory.get() {
            memory.stop();
        }
    }

    pub fn clear(&self) {
        self.set.store(false, Ordering::SeqCst);
        if let Some(memory) = self.memory.get() {
            memory.go_on();
        }
        // Someone may have set it in between, and seen the table put back: then it is set again.
        if self.set.load(Ordering::SeqCst) {
            self.set();
        }
    }

    pub fn is_set(&self) -> bool {
        self.set.load(Ordering::SeqCst)
    }
}

/// A block's number in its cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct BlockId(u32);

/// Where a guest instruction's host code begins.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// In code memory.
    pub host_offset: u32,
    /// From the block's start.
    pub guest_offset: u16,
    /// The true arithmetic flags are in `hot.saved_ax` when the operation itself runs.
    pub parked: bool,
}

/// A slow-path call of a memory access.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// Where the call returns to, in code memory.
    pub return_offset: u32,
    /// Index of the instruction's [`Point`].
    pub point: u16,
    pub parked: bool,
    /// Where the instruction's host code ends, in code memory.
    pub end: u32,
}

/// A direct branch to a guest address.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// The stub that leaves to the dispatcher, and where its call returns to.
    pub stub_offset: u32,
    pub return_offset: u32,
    /// The branch's rel32.
    pub patch_offset: u32,
    /// Guest address.
    pub target: u64,
    /// The branch leaves with the flags parked.
    pub parked: bool,
    /// The branch is that of a group's failed check to careful code (see [`crate::codegen::groups`]), the stub its slow path.
    pub detour: bool,
    pub to: Option<BlockId>,
}

/// What identifies a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub rip: u64,
    /// The frame (see `phys`) of `rip`.
    pub page: u64,
    pub mode: Mode,
    pub segment: CodeSegment,
}

impl Key {
    fn jump_key(&self) -> u64 {
        jump_key(self.rip, self.segment)
    }
}

/// Host code for a run of guest instructions.
pub struct Block {
    pub key: Key,
    /// The frame of the bytes beyond the first page, if there are any.
    pub second_page: Option<u64>,
    pub bytes: Box<[u8]>,
    /// In code memory.
    pub code: Range<u32>,
    /// Where to enter with the flags parked, in code memory.
    pub parked_entry: u32,
    /// Bytes of the page that were only looked at, to see which flags are needed where a branch leads.
    lookahead: Range<usize>,
    pub points: Box<[Point]>,
    pub sites: Box<[Site]>,
    pub links: Box<[Link]>,
    /// Links of other blocks (or its own) that lead here.
    incoming: Vec<(BlockId, u16)>,
    live: bool,
}

impl Block {
    /// The instruction at an offset from the block's start, with its bytes.
    pub fn decode(&self, guest_offset: u16) -> Option<(Instruction, [u8; 15])> {
        let offset = guest_offset as usize;
        let rest = self.bytes.get(offset..)?;
        let insn = crate::access::decode(rest, self.key.mode.bits(), self.key.rip.wrapping_add(offset as u64));
        let mut bytes = [0; 15];
        let length = insn.len().min(rest.len());
        bytes[..length].copy_from_slice(&rest[..length]);
        Some((insn, bytes))
    }

    /// The bytes of a frame that the block was made from.
    fn span_in(&self, page: u64) -> Range<usize> {
        let start = (self.key.rip.wrapping_add(self.key.segment.base.into()) % PAGE_SIZE) as usize;
        let end = start + self.bytes.len();
        let size = PAGE_SIZE as usize;
        if page == self.key.page { start..end.min(size) } else { 0..end.saturating_sub(size) }
    }
}

/// One vCPU's blocks.
pub struct Cache {
    memory: Arc<CodeMemory>,
    next: usize,
    blocks: Vec<Block>,
    by_key: FxHashMap<Key, BlockId>,
    /// By frame.
    by_page: FxHashMap<u64, Vec<BlockId>>,
    pub sensitive: Vec<SensitiveInsn>,
    slots: Vec<Mode>,
    /// Entries of the jump table that are in use, for code in global pages and in others.
    global_jumps: Vec<u32>,
    local_jumps: Vec<u32>,
    pub stats: Stats,
    /// Where `perf` looks for the names of emitted code, if asked for.
    perf_map: Option<PerfMap>,
}

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    pub blocks: u64,
    pub guest_instructions: u64,
    pub invalidated: u64,
    pub full_flushes: u64,
    pub links: u64,
    pub lookups: u64,
}

impl Cache {
    pub fn new(memory: Arc<CodeMemory>, perf_map: Option<PerfMap>) -> Self {
        Cache {
            memory,
            next: CODE_START,
            blocks: Vec::new(),
            by_key: FxHashMap::default(),
            by_page: FxHashMap::default(),
            sensitive: Vec::new(),
            slots: Vec::new(),
            global_jumps: Vec::new(),
            local_jumps: Vec::new(),
            stats: Stats::default(),
            perf_map,
        }
    }

    pub fn next_offset(&self) -> usize {
        self.next
    }

    pub fn host_address(&self, offset: usize) -> u64 {
        self.memory.executable.address() + offset as u64
    }

    /// The code memory offset of a host address.
    pub fn offset_of(&self, address: u64) -> Option<usize> {
        let offset = address.wrapping_sub(self.memory.executable.address()) as usize;
        (CODE_START..self.next).contains(&offset).then_some(offset)
    }

    /// Whether there is room for another block.
    pub fn has_room(&self) -> bool {
        self.next + RESERVE <= self.memory.writable.length && self.blocks.len() < u32::MAX as usize
    }

    /// Puts host code behind what is there; `None` if it doesn't fit.
    pub fn append(&mut self, code: &[u8]) -> Option<usize> {
        let offset = self.next;
        if offset + code.len() > self.memory.writable.length {
            return None;
        }
        self.memory.write(offset, code);
        // At least a byte lies between blocks, so that a return address at a block's very end is still its own.
        self.next = (offset + code.len() + 1).next_multiple_of(16);
        Some(offset)
    }

    /// The part of the jump table for a mode; none once there are more modes than slots. Careful blocks lead to plain ones.
    pub fn jump_slot(&mut self, mode: Mode) -> Option<usize> {
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
        self.empty_jump(jump_slot_offsets(slot).tags as usize / 8 + jump_index(u64::MAX, mode));
        Some(slot)
    }

    /// Adds a block. The caller has seen to it that writes to its pages are noticed.
    pub fn insert(&mut self, key: Key, second_page: Option<u64>, bytes: &[u8], t: Translated) -> Option<BlockId> {
        let id = BlockId(self.blocks.len() as u32);
        let offset = self.append(&t.code)?;
        self.stats.blocks += 1;
        if let Some(map) = &mut self.perf_map {
            map.add(self.memory.executable.address() + offset as u64, t.code.len(), key.rip);
        }
        self.stats.guest_instructions += t.points.len() as u64;
        self.sensitive.extend(t.sensitive);
        self.blocks.push(Block {
            key,
            second_page,
            bytes: bytes.into(),
            code: offset as u32..(offset + t.code.len()) as u32,
            parked_entry: t.parked_entry,
            lookahead: t.lookahead,
            points: t.points.into(),
            sites: t.sites.into(),
            links: t.links.into(),
            incoming: Vec::new(),
            live: true,
        });
        self.by_key.insert(key, id);
        for page in std::iter::once(key.page).chain(second_page) {
            self.by_page.entry(page).or_default().push(id);
        }
        Some(id)
    }

    pub fn get(&self, key: &Key) -> Option<BlockId> {
        self.by_key.get(key).copied()
    }

    pub fn block(&self, id: BlockId) -> &Block {
        &self.blocks[id.0 as usize]
    }

    pub fn is_live(&self, id: BlockId) -> bool {
        self.blocks.get(id.0 as usize).is_some_and(|b| b.live)
    }

    pub fn entry(&self, id: BlockId) -> u64 {
        self.host_address(self.block(id).code.start as usize)
    }

    /// The block that holds a host address.
    pub fn find_by_host(&self, address: u64) -> Option<(BlockId, &Block)> {
        let offset = self.offset_of(address)? as u32;
        let after = self.blocks.partition_point(|b| b.code.start <= offset);
        let index = after.checked_sub(1)?;
        let block = &self.blocks[index];
        // A call's return address may be the first byte after the block.
        (offset <= block.code.end).then_some((BlockId(index as u32), block))
    }

    /// Whether translated code of the page exists.
    pub fn has_page(&self, page: u64) -> bool {
        self.by_page.get(&page).is_some_and(|blocks| !blocks.is_empty())
    }

    /// Patches the link whose stub's call returns to `return_address` to lead to `to`.
    pub fn link(&mut self, return_address: u64, to: BlockId) {
        let Some(offset) = self.offset_of(return_address) else { return };
        let Some((from, _)) = self.find_by_host(return_address) else { return };
        let source = &self.blocks[from.0 as usize];
        let target = self.block(to);
        let (entry, parked_entry) = (target.code.start, target.parked_entry);
        let Some(i) = source.links.iter().position(|l| l.return_offset == offset as u32) else { return };
        let link = &source.links[i];
        let mode = if link.detour { source.key.mode.careful() } else { source.key.mode };
        // A block across two pages depends on a mapping that a link would not check. What comes after a detour's place may
        // also be the handler of an interrupt.
        let key = Key { rip: link.target, mode, ..source.key };
        let fits = target.key == key && target.second_page.is_none();
        if !source.live || !fits {
            return;
        }
        let link = &mut self.blocks[from.0 as usize].links[i];
        if link.to.is_some() {
            return;
        }
        link.to = Some(to);
        let (patch, target) = (link.patch_offset, if link.parked { parked_entry } else { entry });
        self.patch(patch, target);
        self.blocks[to.0 as usize].incoming.push((from, i as u16));
        self.stats.links += 1;
    }

    fn patch(&self, patch_offset: u32, target: u32) {
        let rel = target as i32 - (patch_offset as i32 + 4);
        self.memory.write(patch_offset as usize, &rel.to_le_bytes());
    }

    /// Lets the jump table lead from a block's address to it.
    pub fn enter_jump(&mut self, id: BlockId, global: bool) {
        let key = self.block(id).key;
        if key.mode.is_careful() {
            return;
        }
        let Some(slot) = self.jump_slot(key.mode) else { return };
        let entry = self.entry(id);
        let JumpSlot { tags, codes, parked } = jump_slot_offsets(slot);
        let parked_entry = self.host_address(self.block(id).parked_entry as usize);
        let tag = !key.jump_key();
        let index = jump_index(!tag, key.mode);
        let tag_index = tags as usize / 8 + index;
        // An entry may be listed for what it held before as well: clearing it too often does no harm.
        let word = self.memory.jump_word(tag_index).load(Ordering::Relaxed);
        if word != tag {
            let list = if global { &mut self.global_jumps } else { &mut self.local_jumps };
            list.push(tag_index as u32);
            if list.len() > MAX_LISTED {
                self.clear_jumps(true);
            }
        }
        self.empty_jump(tag_index);
        self.memory.jump_word(codes as usize / 8 + index).store(entry, Ordering::Relaxed);
        self.memory.jump_word(parked as usize / 8 + index).store(parked_entry, Ordering::Relaxed);
        self.memory.jump_word(tag_index).store(tag, Ordering::Relaxed);
    }

    /// Forgets which addresses lead to which blocks, those in global pages perhaps excepted.
    pub fn clear_jumps(&mut self, global: bool) {
        let cleared = if global { std::mem::take(&mut self.global_jumps) } else { Vec::new() };
        let local = std::mem::take(&mut self.local_jumps);
        cleared.iter().chain(&local).for_each(|&tag_index| self.empty_jump(tag_index as usize));
        // The allocations are used again.
        self.local_jumps = local;
        self.local_jumps.clear();
        if global {
            self.global_jumps = cleared;
            self.global_jumps.clear();
        }
    }

    /// The host code that the jump table has for a guest address.
    pub fn find_jump(&self, mode: Mode, rip: u64, segment: CodeSegment) -> Option<u64> {
        let slot = jump_slot_offsets(self.slots.iter().position(|&m| m == mode)?);
        let key = jump_key(rip, segment);
        let index = jump_index(key, mode);
        let tag = self.memory.jump_word(slot.tags as usize / 8 + index).load(Ordering::Relaxed);
        (tag == !key && key != u64::MAX)
            .then(|| self.memory.jump_word(slot.codes as usize / 8 + index).load(Ordering::Relaxed))
    }

    fn empty_jump(&self, tag_index: usize) {
        self.memory.jump_word(tag_index).store(empty_tag(tag_index), Ordering::Relaxed);
    }

    fn forget_jump(&mut self, id: BlockId) {
        let key = self.block(id).key;
        if let Some(slot) = self.slots.iter().position(|&m| m == key.mode) {
            let tag_index = jump_slot_offsets(slot).tags as usize / 8 + jump_index(key.jump_key(), key.mode);
            if self.memory.jump_word(tag_index).load(Ordering::Relaxed) == !key.jump_key() {
                self.empty_jump(tag_index);
            }
        }
    }

    /// Drops the blocks made from `bytes` of a physical page. True if the page has no translated code left.
    pub fn invalidate(&mut self, page: u64, bytes: Range<usize>) -> bool {
        let Some(ids) = self.by_page.get(&page) else { return true };
        let hit: Vec<BlockId> = ids
            .iter()
            .copied()
            .filter(|&id| {
                let block = self.block(id);
                let overlaps = |span: Range<usize>| span.start < bytes.end && bytes.start < span.end;
                overlaps(block.span_in(page)) || page == block.key.page && overlaps(block.lookahead.clone())
            })
            .collect();
        for id in hit {
            self.remove(id);
        }
        !self.has_page(page)
    }

    pub fn remove(&mut self, id: BlockId) {
        self.forget_jump(id);
        self.stats.invalidated += 1;
        let block = &mut self.blocks[id.0 as usize];
        block.live = false;
        let (key, second_page) = (block.key, block.second_page);
        let incoming = std::mem::take(&mut block.incoming);
        let outgoing: Vec<(u16, BlockId)> =
            block.links.iter().enumerate().filter_map(|(i, l)| Some((i as u16, l.to?))).collect();
        if self.by_key.get(&key) == Some(&id) {
            self.by_key.remove(&key);
        }
        for page in std::iter::once(key.page).chain(second_page) {
            if let Some(ids) = self.by_page.get_mut(&page) {
                ids.retain(|&other| other != id);
            }
        }
        for (from, i) in incoming {
            self.unlink(from, i);
        }
        for (i, to) in outgoing {
            self.unlink(id, i);
            self.blocks[to.0 as usize].incoming.retain(|&(from, j)| (from, j) != (id, i));
        }
    }

    /// Makes a link lead to its stub again.
    fn unlink(&mut self, from: BlockId, i: u16) {
        let link = &mut self.blocks[from.0 as usize].links[i as usize];
        if link.to.take().is_some() {
            let (patch, stub) = (link.patch_offset, link.stub_offset);
            self.patch(patch, stub);
        }
    }

    /// Drops everything. No emitted code may be running or be returned to.
    pub fn reset(&mut self) -> impl Iterator<Item = u64> + use<> {
        self.clear_jumps(true);
        self.next = CODE_START;
        self.blocks.clear();
        self.by_key.clear();
        self.sensitive.clear();
        self.slots.clear();
        self.stats.full_flushes += 1;
        std::mem::take(&mut self.by_page).into_keys()
    }
}

/// What another thread asks a vCPU to forget.
#[derive(Clone, Debug)]
enum Invalidation {
    /// The frame now holds translated code of some vCPU: no write to it may go unnoticed.
    Protect(u64),
    /// These bytes of a frame were written.
    Written(u64, Range<usize>),
    /// Someone wants to know which of these pages (indices) are written, since the last time and from now on.
    CollectDirty(Range<usize>),
}

/// Requests to one vCPU, and whether it could be running on what they are to change.
#[derive(Default)]
pub struct Invalidations {
    queue: Mutex<Vec<Invalidation>>,
    /// The vCPU may be using its TLB or its blocks; false: it takes the queue first.
    running: AtomicBool,
}

impl Invalidations {
    fn push(&self, what: Invalidation) {
        self.queue.lock().unwrap_or_else(|e| e.into_inner()).push(what);
    }

    fn is_empty(&self) -> bool {
        self.queue.lock().unwrap_or_else(|e| e.into_inner()).is_empty()
    }

    pub fn set_running(&self, running: bool) {
        self.running.store(running, Ordering::SeqCst);
    }
}

impl Vcpu {
    /// Bytes of a page that holds translated code were stored by this vCPU: drops what they were translated to, here and on the
    /// other vCPUs. They see it at their next indirect or backward branch, before they can see later stores.
    pub fn code_stored(&mut self, page: usize, bytes: Range<usize>) {
        let frame = frame_of(page);
        self.tell_others(page, &Invalidation::Written(frame, bytes.clone()));
        self.code_written(frame, bytes);
    }

    fn tell_others(&self, page: usize, what: &Invalidation) {
        let holders = self.machine.tracker.code_holders(page);
        for other in self.machine.vcpus().iter() {
            if other.id != self.id && holders & holder_bit(other.id) != 0 {
                other.invalidations.push(what.clone());
                other.request(request::INVALIDATE);
            }
        }
    }

    fn code_written(&mut self, frame: u64, bytes: Range<usize>) {
        // With more vCPUs than bits a bit may stand for another one as well.
        if self.engine.cache.invalidate(frame, bytes)
            && self.machine.vcpus().len() <= 8
            && let Some(page) = page_of(frame)
        {
            self.machine.tracker.clear_code(page, holder_bit(self.id));
        }
    }

    /// Does what other threads asked for.
    pub fn take_invalidations(&mut self) {
        self.shared.requests.fetch_and(!request::INVALIDATE, Ordering::SeqCst);
        let shared = self.shared.clone();
        // Held while the requests are carried out: an empty queue means that they are.
        let mut queue = shared.invalidations.queue.lock().unwrap_or_else(|e| e.into_inner());
        for what in queue.drain(..) {
            match what {
                Invalidation::Protect(frame) => self.tlb.protect(frame..frame + PAGE_SIZE),
                Invalidation::Written(frame, bytes) => self.code_written(frame, bytes),
                Invalidation::CollectDirty(pages) => self.report_dirty(pages),
            }
        }
    }

    /// Marks the pages dirty that could be written unnoticed until now, and sees to it that they no longer can.
    fn report_dirty(&mut self, pages: Range<usize>) {
        self.tlb.protect(frame_of(pages.start)..frame_of(pages.end));
        let tracker = self.machine.tracker.clone();
        self.engine.device_pages.retain(|page| {
            let asked = pages.contains(page);
            if asked {
                tracker.mark_dirty(*page);
            }
            !asked
        });
    }

    /// To be called before code is read from a page of RAM in order to translate it: from here on no write to the page
    /// goes unnoticed, by whomever.
    pub fn watch_code_page(&mut self, gpa: u64) {
        let Some(Place { page, .. }) = self.at(gpa).0 else { return };
        let before = self.machine.tracker.mark_code(page, holder_bit(self.id));
        if before != 0 {
            return; // nobody has a write tag for it
        }
        let frame = frame_of(page);
        self.tlb.protect(frame..frame + PAGE_SIZE);
        let machine = self.machine.clone();
        let vcpus = machine.vcpus();
        for other in vcpus.iter().filter(|o| o.id != self.id) {
            other.invalidations.push(Invalidation::Protect(frame));
            other.request(request::INVALIDATE);
        }
        // While waiting, this vCPU uses neither TLB nor blocks, so that two that wait for each other both go on.
        self.shared.invalidations.set_running(false);
        for other in vcpus.iter().filter(|o| o.id != self.id) {
            let mut spins = 0;
            while other.invalidations.running.load(Ordering::SeqCst) && !other.invalidations.is_empty() {
                spins += 1;
                if spins < 200 { std::hint::spin_loop() } else { std::thread::yield_now() }
            }
        }
        self.shared.invalidations.set_running(true);
        self.take_invalidations();
    }
}

/// The bit that stands for a vCPU in the tracker's code byte.
pub fn holder_bit(id: u32) -> u8 {
    1 << (id % 8)
}

/// Passes on to the vCPUs what devices change: translated code, the memory map.
pub struct DeviceChanges(pub Arc<crate::shared::Machine>);

impl CodeWatcher for DeviceChanges {
    fn code_page_written(&self, page: usize, bytes: Range<usize>) {
        let holders = self.0.tracker.code_holders(page);
        for vcpu in self.0.vcpus().iter().filter(|v| holders & holder_bit(v.id) != 0) {
            vcpu.invalidations.push(Invalidation::Written(frame_of(page), bytes.clone()));
            vcpu.request(request::INVALIDATE);
        }
    }
}

impl MapObserver for DeviceChanges {
    fn map_changed(&self, _: &Arc<Sections>) {
        self.0.vcpus().iter().for_each(|vcpu| vcpu.request(request::MAP));
    }

    fn collect_dirty(&self, pages: Range<usize>) {
        for vcpu in self.0.vcpus().iter() {
            vcpu.invalidations.push(Invalidation::CollectDirty(pages.clone()));
            vcpu.request(request::INVALIDATE);
        }
    }
}
