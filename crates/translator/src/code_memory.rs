//! The host memory of one vCPU's translated code, and of the table by which emitted code finds it.
//!
//! Code is mapped twice: writable for the translator, executable for the processor, never both at one address. Its first
//! page holds words that emitted code reads: one that backward branches poll, and those by which it finds an entry of the
//! jump table, from guest addresses to host code. To stop a vCPU ([`PollWord::set`]) the first is set and the others lead to
//! entries that are empty.
//!
//! The jump table lies right below the [vCPU](crate::Vcpu), so that emitted code reaches both by one register.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::mode::{CodeSegment, Mode};

/// Offsets in code memory: the word that backward branches poll, ...
pub const POLL_OFFSET: usize = 0;
/// ... the bits of an address that index the jump table, and the same where code segments have bases, ...
pub const JUMP_MASK_OFFSET: usize = 64;
pub const SEGMENTED_JUMP_MASK_OFFSET: usize = 72;
/// ... what is added to the address of an entry that is found without them, ...
pub const JUMP_SHIFT_OFFSET: usize = 80;
/// ... and the first block.
pub const CODE_START: usize = 4096;
/// Host code of one vCPU, in bytes.
pub const DEFAULT_SIZE: usize = 128 << 20;

/// Entries in each slot of the jump table.
const JUMP_ENTRIES: usize = 1 << 17;
/// Modes that have a slot.
pub const JUMP_SLOTS: usize = 32;
/// The bits of an address that index the jump table: 4 bytes apart, since few branch targets are closer.
pub const JUMP_MASK: u64 = (JUMP_ENTRIES as u64 - 1) << JUMP_SHIFT;
const JUMP_SHIFT: u32 = 2;
/// The same where code segments have bases, which stand in the upper half of a [`jump_key`]: offsets are mostly small, and
/// bases differ in the paragraph.
pub const SEGMENTED_JUMP_MASK: u64 = 0x1fff << 1 | 0xf << 36;
const JUMP_WORDS: usize = 3;
/// Words of the whole table.
pub const JUMP_TABLE_WORDS: usize = JUMP_SLOTS * JUMP_ENTRIES * JUMP_WORDS;
const JUMP_BYTES: usize = JUMP_TABLE_WORDS * 8;

/// The host has BMI2, whose PEXT extracts an index without touching the flags.
pub fn has_bmi2() -> bool {
    std::arch::is_x86_feature_detected!("bmi2")
}

/// What the jump table knows a block by: its address, or its offset and the base of the code segment.
pub fn jump_key(rip: u64, segment: CodeSegment) -> u64 {
    rip | u64::from(segment.base) << 32
}

/// The index of a [`jump_key`] in a slot.
pub fn jump_index(key: u64, mode: Mode) -> usize {
    if !has_bmi2() {
        (key & 0xff) as usize
    } else if mode.segmented() {
        ((key >> 1 & 0x1fff) | (key >> 36 & 0xf) << 13) as usize
    } else {
        ((key & JUMP_MASK) >> JUMP_SHIFT) as usize
    }
}

/// The tag of an empty entry. Tags are complements of addresses, so it has to be one that no address which comes to this entry has:
/// zero stands for the address of all ones, except in the entry where that one belongs.
pub fn empty_tag(tag_index: usize) -> u64 {
    let last = if has_bmi2() { JUMP_ENTRIES - 1 } else { 0xff };
    if tag_index % (JUMP_WORDS * JUMP_ENTRIES) == last { u64::MAX } else { 0 }
}

/// Offsets of a slot's arrays from the jump table's first byte.
#[derive(Clone, Copy, Debug)]
pub struct JumpSlot {
    /// The complements of the addresses.
    pub tags: i32,
    /// Where to enter with the flags in EFLAGS.
    pub codes: i32,
    /// Where to enter with the flags parked.
    pub parked: i32,
}

/// The distance from the jump table's first byte to the vCPU's.
pub const JUMP_TABLE_BELOW: i32 = JUMP_BYTES as i32;

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
    /// With room for a vCPU behind it.
    jump_table: Mapping,
    /// Never written: the host backs it with one page of zeros. While it stands in for the jump table every branch misses.
    empty_table: Mapping,
    /// A bit for each slot whose first entry may be in use.
    first_used: AtomicU32,
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
        let table = |more: usize| {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            Mapping::new(JUMP_BYTES + more, libc::PROT_READ | libc::PROT_WRITE, flags, -1)
        };
        let memory = CodeMemory {
            writable: Mapping::new(size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd)?,
            executable: Mapping::new(size, libc::PROT_READ | libc::PROT_EXEC, libc::MAP_SHARED, fd)?,
            jump_table: table(size_of::<crate::Vcpu>())?,
            empty_table: table(0)?,
            first_used: AtomicU32::new(0),
        };
        memory.go_on();
        Ok(memory)
    }

    fn poll_word(&self) -> &AtomicU32 {
        // SAFETY: aligned, mapped as long as `self`, and accessed only atomically (by emitted code with plain loads).
        unsafe { AtomicU32::from_ptr(self.writable.start.as_ptr().add(POLL_OFFSET).cast()) }
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as `poll_word`; the offsets are those of words in the first page.
        unsafe { AtomicU64::from_ptr(self.writable.start.as_ptr().add(offset).cast()) }
    }

    /// Where a vCPU of this memory has to be: `size_of::<Vcpu>()` bytes at a page's beginning, zeros at first.
    pub fn vcpu_place(&self) -> NonNull<crate::Vcpu> {
        // SAFETY: the mapping is that much longer than the table.
        unsafe { self.jump_table.start.add(JUMP_BYTES) }.cast()
    }

    fn stop(&self) {
        self.poll_word().store(1, Ordering::SeqCst);
        let shift = self.empty_table.address().wrapping_sub(self.jump_table.address());
        for (offset, value) in [(JUMP_MASK_OFFSET, 0), (SEGMENTED_JUMP_MASK_OFFSET, 0), (JUMP_SHIFT_OFFSET, shift)] {
            self.word(offset).store(value, Ordering::SeqCst);
        }
        // Without bits of the address there is only the first entry.
        for slot in (0..JUMP_SLOTS).filter(|slot| self.first_used.load(Ordering::SeqCst) >> slot & 1 != 0) {
            let tag = jump_slot_offsets(slot).tags as usize / 8;
            self.jump_word(tag).store(empty_tag(tag), Ordering::SeqCst);
        }
    }

    /// Lets the entry whose tag is at an index be found by that tag; unless it is the first of its slot and the vCPU is to stop.
    pub fn set_jump_tag(&self, index: usize, tag: u64) {
        const { assert!(JUMP_SLOTS <= u32::BITS as usize) };
        let slot_words = JUMP_WORDS * JUMP_ENTRIES;
        if !index.is_multiple_of(slot_words) {
            return self.jump_word(index).store(tag, Ordering::Relaxed);
        }
        // In the opposite order of `stop`, which may run at the same time.
        self.first_used.fetch_or(1 << (index / slot_words), Ordering::SeqCst);
        self.jump_word(index).store(tag, Ordering::SeqCst);
        if self.poll_word().load(Ordering::SeqCst) != 0 {
            self.jump_word(index).store(empty_tag(index), Ordering::SeqCst);
        }
    }

    fn go_on(&self) {
        for (offset, value) in
            [(JUMP_MASK_OFFSET, JUMP_MASK), (SEGMENTED_JUMP_MASK_OFFSET, SEGMENTED_JUMP_MASK), (JUMP_SHIFT_OFFSET, 0)]
        {
            self.word(offset).store(value, Ordering::SeqCst);
        }
        self.poll_word().store(0, Ordering::SeqCst);
    }

    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.writable.length, "a write beyond code memory");
        // SAFETY: in bounds; only the owning vCPU's thread writes code, and it isn't executing these bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.writable.start.as_ptr().add(offset), bytes.len()) };
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
