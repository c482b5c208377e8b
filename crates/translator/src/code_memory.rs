//! The host memory of one vCPU's translated code, and of the table by which emitted code finds it.
//!
//! Code is mapped twice: writable for the translator, executable for the processor, never both at one address. Its first
//! page holds words that emitted code reads: one that backward branches poll, and those by which it finds an entry of the
//! jump table, from guest addresses to host code. To stop a vCPU ([`PollWord::set`]) the first is set and the others lead to
//! entries that are empty.
//!
//! The jump table lies right below the [vCPU](crate::Vcpu), so that emitted code reaches both by one register.
//!
//! Programs' entries lie a bit further on in each [numbered](NUMBERS) address space. That is all it takes to tell address
//! spaces apart: an address leads to different entries in different ones, and what an entry's tag says is true in one only.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::large_pages::{LARGE_PAGE, enlarge, is_dense};
use crate::mode::{CodeSegment, Mode};

/// Offsets in code memory: the word that backward branches poll, ...
pub const POLL_OFFSET: usize = 0;
/// ... the bits of an address that index the jump table, and the same where code segments have bases, ...
pub const JUMP_MASK_OFFSET: usize = 64;
pub const SEGMENTED_JUMP_MASK_OFFSET: usize = 72;
/// ... how far on the entries of kernels are, in words, and those of programs, ...
const KERNEL_SHIFT_OFFSET: usize = 80;
pub const PROGRAM_SHIFT_OFFSET: usize = 88;
/// ... and the first block.
pub const CODE_START: usize = 4096;
/// Host code of one vCPU, in bytes.
pub const DEFAULT_SIZE: usize = 128 << 20;

/// Entries in each slot of the jump table.
const JUMP_ENTRIES: usize = 1 << 17;
/// Modes that have a slot: those of programs, which are level 3, and all.
const PROGRAM_SLOTS: usize = 12;
pub const JUMP_SLOTS: usize = 32;
/// Address spaces that have programs' entries at a time, and how many entries it is from one to the next.
pub const NUMBERS: usize = 256;
const NUMBER_STEP: usize = 16;
/// The bits of an address that index the jump table: 4 bytes apart, since few branch targets are closer.
pub const JUMP_MASK: u64 = (JUMP_ENTRIES as u64 - 1) << JUMP_SHIFT;
const JUMP_SHIFT: u32 = 2;
/// The same where code segments have bases, which stand in the upper half of a [`jump_key`]: offsets are mostly small, and
/// bases differ in the paragraph.
pub const SEGMENTED_JUMP_MASK: u64 = 0x1fff << 1 | 0xf << 36;
/// Words of an entry: a tag, two addresses, and one that is free.
pub const JUMP_WORDS: usize = 4;
/// Words of a slot that are entries, of a slot, and of the whole table. A slot begins where a large page may.
pub const JUMP_SLOT_ENTRY_WORDS: usize = (JUMP_ENTRIES + NUMBERS * NUMBER_STEP) * JUMP_WORDS;
pub const JUMP_SLOT_WORDS: usize = JUMP_SLOT_ENTRY_WORDS.next_multiple_of(LARGE_PAGE / 8);
pub const JUMP_TABLE_WORDS: usize = JUMP_SLOTS * JUMP_SLOT_WORDS;
pub const JUMP_BYTES: usize = JUMP_TABLE_WORDS * 8;

/// The host has BMI2, whose PEXT extracts an index without touching the flags.
pub fn has_bmi2() -> bool {
    std::arch::is_x86_feature_detected!("bmi2")
}

/// What the jump table knows a block by: its address, or its offset and the base of the code segment.
pub fn jump_key(rip: u64, segment: CodeSegment) -> u64 {
    rip | u64::from(segment.base) << 32
}

/// Where a [`jump_key`]'s entry is in a slot, in words.
pub fn jump_index(key: u64, mode: Mode) -> usize {
    const { assert!(JUMP_WORDS == 1 << JUMP_SHIFT && JUMP_MASK <= i32::MAX as u64) };
    let entry = if !has_bmi2() {
        (key & 0xff) as usize
    } else if mode.segmented() {
        ((key >> 1 & 0x1fff) | (key >> 36 & 0xf) << 13) as usize
    } else {
        ((key & JUMP_MASK) >> JUMP_SHIFT) as usize
    };
    entry * JUMP_WORDS
}

/// How far the entries of a [numbered](NUMBERS) address space's programs are from those of number zero, in words.
pub fn number_distance(number: usize) -> usize {
    number * NUMBER_STEP * JUMP_WORDS
}

/// The tag of an empty entry: an address that doesn't come to it. Zero is that, except in the entries where it belongs; there
/// none of those that the address of all ones comes to is.
pub fn empty_tag(tag_index: usize) -> u64 {
    const { assert!(!(JUMP_ENTRIES - 1).is_multiple_of(NUMBER_STEP) && !0xff_usize.is_multiple_of(NUMBER_STEP)) };
    let (slot, entry) = (tag_index / JUMP_SLOT_WORDS, tag_index % JUMP_SLOT_WORDS / JUMP_WORDS);
    if entry < numbers(slot) * NUMBER_STEP && entry.is_multiple_of(NUMBER_STEP) { u64::MAX } else { 0 }
}

/// How many address spaces have entries of their own in a slot.
fn numbers(slot: usize) -> usize {
    if is_programs(slot) { NUMBERS } else { 1 }
}

/// The entries of a slot whose empty tags are not zero, by the indices of their tags.
fn guards(slot: usize) -> impl Iterator<Item = usize> {
    (0..numbers(slot)).map(move |number| slot * JUMP_SLOT_WORDS + number_distance(number))
}

/// Which slots programs have, or others.
pub fn slots_for(programs: bool) -> std::ops::Range<usize> {
    if programs { JUMP_SLOTS - PROGRAM_SLOTS..JUMP_SLOTS } else { 0..JUMP_SLOTS - PROGRAM_SLOTS }
}

/// Whether it is a slot of programs.
pub fn is_programs(slot: usize) -> bool {
    slots_for(true).contains(&slot)
}

/// Where a slot's first entry is. An entry's words stand together: they are read together, and seldom are others read soon.
#[derive(Clone, Copy, Debug)]
pub struct JumpSlot {
    /// The offset in code memory of how much further on the entries are.
    pub shift: usize,
    /// Offsets from the jump table's first byte, of the address, ...
    pub tags: i32,
    /// ... of where to enter with the flags in EFLAGS, ...
    pub codes: i32,
    /// ... and of where to enter with the flags parked.
    pub parked: i32,
}

/// The distance from the jump table's first byte to the vCPU's.
pub const JUMP_TABLE_BELOW: i32 = JUMP_BYTES as i32;

pub fn jump_slot_offsets(slot: usize) -> JumpSlot {
    let tags = (slot * JUMP_SLOT_WORDS * 8) as i32;
    let shift = if is_programs(slot) { PROGRAM_SHIFT_OFFSET } else { KERNEL_SHIFT_OFFSET };
    JumpSlot { shift, tags, codes: tags + 8, parked: tags + 16 }
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

    /// Anonymous memory that begins at a large page.
    fn aligned(length: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let mut all = Mapping::new(length + LARGE_PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1)?;
        let before = all.start.as_ptr().align_offset(LARGE_PAGE);
        all.cut(0..before);
        // SAFETY: within the mapping, which was longer than this by a large page.
        all.start = unsafe { all.start.add(before) };
        all.length -= before;
        all.cut(length..all.length);
        all.length = length;
        Ok(all)
    }

    /// Unmaps a part at an end.
    fn cut(&self, range: std::ops::Range<usize>) {
        if !range.is_empty() {
            // SAFETY: a part of what `new` mapped, which nobody has had a pointer into.
            unsafe { libc::munmap(self.start.as_ptr().add(range.start).cast(), range.len()) };
        }
    }

    fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what is mapped, and nobody holds a pointer into it longer than the owner.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// The memory that one vCPU's host code lives in, with the words that stop it.
pub struct CodeMemory {
    writable: Mapping,
    executable: Mapping,
    /// With room for a vCPU behind it, and no more than a large page takes.
    jump_table: Mapping,
    /// Never written but for an entry in each slot: the host backs the rest with one page of zeros. While it stands in for the
    /// jump table every branch misses.
    empty_table: Mapping,
    /// How far on programs' entries are, as long as the vCPU is not to stop.
    program_shift: AtomicU64,
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
        let memory = CodeMemory {
            writable: Mapping::new(size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd)?,
            executable: Mapping::new(size, libc::PROT_READ | libc::PROT_EXEC, libc::MAP_SHARED, fd)?,
            jump_table: Mapping::aligned(JUMP_BYTES + LARGE_PAGE)?,
            empty_table: Mapping::aligned(JUMP_BYTES)?,
            program_shift: AtomicU64::new(0),
        };
        memory.word(JUMP_MASK_OFFSET).store(JUMP_MASK, Ordering::SeqCst);
        memory.word(SEGMENTED_JUMP_MASK_OFFSET).store(SEGMENTED_JUMP_MASK, Ordering::SeqCst);
        memory.go_on();
        Ok(memory)
    }

    fn poll_word(&self) -> &AtomicU32 {
        // SAFETY: aligned, mapped as long as `self`, and accessed only atomically (by emitted code with plain loads).
        unsafe { AtomicU32::from_ptr(self.writable.start.as_ptr().add(POLL_OFFSET).cast()) }
    }

    pub fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as `poll_word`; the offsets are those of words in the first page.
        unsafe { AtomicU64::from_ptr(self.writable.start.as_ptr().add(offset).cast()) }
    }

    /// Where a vCPU of this memory has to be: `size_of::<Vcpu>()` bytes at a page's beginning, zeros at first.
    pub fn vcpu_place(&self) -> NonNull<crate::Vcpu> {
        const { assert!(size_of::<crate::Vcpu>() <= LARGE_PAGE) };
        // SAFETY: the mapping is that much longer than the table.
        unsafe { self.jump_table.start.add(JUMP_BYTES) }.cast()
    }

    fn stop(&self) {
        self.poll_word().store(1, Ordering::SeqCst);
        self.miss_all();
    }

    /// No address is found in the jump table.
    fn miss_all(&self) {
        for offset in [KERNEL_SHIFT_OFFSET, PROGRAM_SHIFT_OFFSET] {
            self.word(offset).store(self.shift_to_empty(), Ordering::SeqCst);
        }
    }

    /// From the jump table to the empty one, in words.
    fn shift_to_empty(&self) -> u64 {
        ((self.empty_table.address() as i64).wrapping_sub(self.jump_table.address() as i64) / 8) as u64
    }

    fn go_on(&self) {
        self.word(KERNEL_SHIFT_OFFSET).store(0, Ordering::SeqCst);
        self.word(PROGRAM_SHIFT_OFFSET).store(self.program_shift.load(Ordering::SeqCst), Ordering::SeqCst);
        self.poll_word().store(0, Ordering::SeqCst);
    }

    /// From now on programs' addresses lead to the entries of this address space.
    pub fn select(&self, number: usize) {
        assert!(number < NUMBERS, "not the number of an address space");
        let shift = number_distance(number) as u64;
        self.program_shift.store(shift, Ordering::SeqCst);
        self.word(PROGRAM_SHIFT_OFFSET).store(shift, Ordering::SeqCst);
        // Whoever stops the vCPU at the same time has set the poll word before the shifts.
        if self.poll_word().load(Ordering::SeqCst) != 0 {
            self.word(PROGRAM_SHIFT_OFFSET).store(self.shift_to_empty(), Ordering::SeqCst);
        }
    }

    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.writable.length, "a write beyond code memory");
        // SAFETY: in bounds; only the owning vCPU's thread writes code, and it isn't executing these bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.writable.start.as_ptr().add(offset), bytes.len()) };
    }

    /// One byte of code.
    pub fn byte(&self, offset: usize) -> u8 {
        assert!(offset < self.writable.length, "a read beyond code memory");
        // SAFETY: in bounds; only the owning vCPU's thread writes code.
        unsafe { self.writable.start.as_ptr().add(offset).read() }
    }

    /// Copies code out.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        assert!(offset + bytes.len() <= self.writable.length, "a read beyond code memory");
        // SAFETY: in bounds; only the owning vCPU's thread writes code.
        unsafe {
            std::ptr::copy_nonoverlapping(self.writable.start.as_ptr().add(offset), bytes.as_mut_ptr(), bytes.len())
        };
    }

    /// Bytes in all.
    pub fn size(&self) -> usize {
        self.writable.length
    }

    /// The host address of an offset, for execution.
    pub fn host_address(&self, offset: usize) -> u64 {
        self.executable.address() + offset as u64
    }

    /// Gives a slot's memory back to the host: it is all zeros then.
    pub fn release_jump_slot(&self, slot: usize) {
        let length = JUMP_BYTES / JUMP_SLOTS;
        assert!(slot < JUMP_SLOTS, "a slot that is not in the jump table");
        // SAFETY: in bounds, whole pages, plain anonymous memory that only the owning thread writes.
        unsafe { libc::madvise(self.jump_table.start.as_ptr().add(slot * length).cast(), length, libc::MADV_DONTNEED) };
    }

    /// A part of the jump table, by its number, takes one large page from now on; and so does the vCPU if all of it is in use.
    pub fn enlarge(&self, part: usize) {
        assert!(part < JUMP_BYTES / LARGE_PAGE, "a part that is not in the jump table");
        let vcpu = self.vcpu_place().cast::<u8>().as_ptr();
        // SAFETY: a large page of the table, and the vCPU's own.
        unsafe {
            enlarge(self.jump_table.start.as_ptr().add(part * LARGE_PAGE));
            if is_dense(vcpu, size_of::<crate::Vcpu>()) {
                enlarge(vcpu);
            }
        }
    }

    /// Sees to it that the address zero is not found in a slot that nothing was entered into.
    pub fn guard(&self, slot: usize) {
        for index in guards(slot) {
            self.jump_word(index).store(empty_tag(index), Ordering::Relaxed);
        }
        // There is no further on in the empty table.
        if let Some(index) = guards(slot).next() {
            // SAFETY: in bounds and aligned as a word of the jump table, which is as long.
            let word = unsafe { AtomicU64::from_ptr(self.empty_table.start.as_ptr().cast::<u64>().add(index)) };
            word.store(empty_tag(index), Ordering::Relaxed);
        }
    }

    pub fn jump_word(&self, index: usize) -> &AtomicU64 {
        assert!(index * 8 < JUMP_BYTES, "a jump table index out of range");
        // SAFETY: in bounds and aligned; written only by the owning thread.
        unsafe { AtomicU64::from_ptr(self.jump_table.start.as_ptr().cast::<u64>().add(index)) }
    }
}

/// What makes emitted code return to the dispatcher: a word that loops look at, and empty entries for all other branches.
#[derive(Default)]
pub struct PollWord {
    memory: OnceLock<Arc<CodeMemory>>,
    set: AtomicBool,
    /// What stops the process that runs a program directly.
    program: direct::KickSlot,
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
        self.program.kick();
    }

    /// A program is about to run in a process: to set the word stops it.
    pub fn watch(&self, program: direct::Kicker) {
        self.program.put(program);
    }

    pub fn unwatch(&self) {
        self.program.take();
    }

    /// Makes emitted code return with its next lookup, for nobody's request; loops go on.
    pub fn miss_all(&self) {
        if let Some(memory) = self.memory.get() {
            memory.miss_all();
        }
    }

    /// The opposite.
    pub fn miss_none(&self) {
        if let Some(memory) = self.memory.get() {
            memory.go_on();
        }
        // Someone may have set it in between, and seen the table put back: then it is set again.
        if self.is_set() {
            self.set();
        }
    }

    pub fn clear(&self) {
        self.set.store(false, Ordering::SeqCst);
        self.miss_none();
    }

    pub fn is_set(&self) -> bool {
        self.set.load(Ordering::SeqCst)
    }
}
