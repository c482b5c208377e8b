//! The software TLB: from guest-virtual pages to host addresses, checked inline by emitted code.
//!
//! One direct-mapped table for each [`Context`]. An access at `va` takes the entry at `(va >> 12) & mask` and hits if
//! `va ^ tag` is at most `4096 - size`: one comparison for "same page" and "does not cross its end". Pages that are MMIO,
//! hold translated code, or are watched have no write (or no read) tag, so that they take the slow path. Bit maps
//! tell which entries were filled, so that a flush touches only those; what a change of the address space drops is listed
//! besides, being little mostly. Entries of other address spaces than the current one wait elsewhere ([`Kept`]).

use std::ops::Range;

use memory::PAGE_SIZE;

use crate::access::AccessKind;
use crate::cpu::{CONTEXTS, Context};
use crate::spaces::Missed;

/// Entries in each table; a power of two.
pub const ENTRIES: usize = 16384;

/// A stack page's tag that no canonical address matches. Where a non-canonical one does, `addend` makes the host address
/// non-canonical too, and the processor raises the #GP that the guest is due.
const NO_PAGE: u64 = 1 << 63;

/// The tag of an entry that maps nothing: a page that belongs to another entry, so that no address matches. That is page
/// zero but for the entry where page zero belongs: memory that is all zeros is an empty table, and takes none of the host's.
pub const fn invalid(index: usize) -> u64 {
    if index == 0 { NO_PAGE | 1 << 12 } else { 0 }
}

/// One mapping.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Entry {
    pub read: u64,
    pub write: u64,
    /// The host address of the page. An address that hits, XOR its tag, is what to add.
    pub host: u64,
    /// The page's frame (see `phys`); bit 0: [`GLOBAL`]; bit 1: [`BESIDE_CODE`].
    frame: u64,
}

impl Entry {
    const fn empty(index: usize) -> Self {
        Entry { read: invalid(index), write: invalid(index), host: 0, frame: 0 }
    }

    /// The host address of an access of `length` bytes, if the entry allows it as a plain one.
    pub fn host_address(&self, va: u64, length: usize, write: bool) -> Option<u64> {
        let offset = va ^ if write { self.write } else { self.read };
        (offset <= PAGE_SIZE.checked_sub(length as u64)?).then(|| self.host + offset)
    }

    /// The frame and the host address of a store of `length` bytes, if only code in the page is why the entry does not allow it.
    pub fn beside_code(&self, va: u64, length: usize) -> Option<(u64, u64)> {
        let host = self.host_address(va, length, false).filter(|_| self.frame & BESIDE_CODE != 0)?;
        Some((self.frame & !0xfff, host))
    }
}

/// Entries of an address space that are listed, and kept while it is not the current one.
pub const MAX_KEPT: usize = 1024;

/// In [`Entry::frame`]: the mapping survives a change of CR3.
const GLOBAL: u64 = 1;
/// The same: the page is RAM that may be written, and would have a write tag if it held no code.
const BESIDE_CODE: u64 = 2;

/// A page-walk result to cache.
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    pub va: u64,
    /// What the page is known by: see `phys`.
    pub frame: u64,
    pub host: usize,
    pub readable: bool,
    pub writable: bool,
    /// Only code in the page is why it is not writable.
    pub beside_code: bool,
    /// The mapping is part of a page larger than 4 KiB.
    pub large: bool,
    /// The mapping survives a change of CR3 (Intel SDM 3A 4.10.2.4).
    pub global: bool,
}

#[repr(C)]
struct Table {
    entries: [Entry; ENTRIES],
    /// Which entries may hold something that a change of CR3 drops, and which may hold a global page.
    local: [u64; ENTRIES / 64],
    global: [u64; ENTRIES / 64],
    /// Which 1 GiB areas (hashed) have entries from large pages: INVLPG there must drop more than one entry.
    large: u128,
}

impl Table {
    fn flush(&mut self) {
        for word in 0..ENTRIES / 64 {
            let used = std::mem::take(&mut self.local[word]) | std::mem::take(&mut self.global[word]);
            for index in bits(used).map(|bit| word * 64 + bit) {
                self.entries[index] = Entry::empty(index);
            }
        }
        self.large = 0;
    }

    /// Empties an entry, unless it is a global page's: what it held, if anything.
    fn take_local(&mut self, index: usize) -> Option<Entry> {
        let entry = &mut self.entries[index];
        if entry.frame & GLOBAL != 0 {
            return None;
        }
        let taken = std::mem::replace(entry, Entry::empty(index));
        (taken.read != invalid(index) || taken.write != invalid(index)).then_some(taken)
    }

    /// Notes that an entry holds something that a change of CR3 drops; whether that is new.
    fn note_local(&mut self, index: usize) -> bool {
        let (word, bit) = (&mut self.local[index / 64], 1 << (index % 64));
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    fn used(&self) -> impl Iterator<Item = usize> + '_ {
        (0..ENTRIES / 64).flat_map(|word| bits(self.local[word] | self.global[word]).map(move |bit| word * 64 + bit))
    }
}

/// The numbers of the bits that are set.
fn bits(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = (word != 0).then(|| word.trailing_zeros() as usize)?;
        word &= word - 1;
        Some(bit)
    })
}

/// Programs' areas apart from the kernel's, which has the large pages.
fn area_bit(va: u64) -> u128 {
    1 << (va >> 30 & 63 | va >> 63 << 6)
}

/// The page that a context's stack was last seen in: found without an index.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct StackPage {
    /// Its guest-virtual address, if it can be read and written, else [`NO_PAGE`].
    pub page: u64,
    pub addend: u64,
}

const NO_STACK: StackPage = StackPage { page: NO_PAGE, addend: 0 };
const NO_FRAME: u64 = u64::MAX;

/// Which entry: the context, and the index in its table.
#[derive(Clone, Copy)]
struct Place {
    context: u8,
    index: u16,
}

/// Mappings of an address space that is not the current one.
#[derive(Default)]
pub struct Kept {
    entries: Vec<(Place, Entry)>,
    /// The stack pages, with their frames.
    stacks: [Option<(StackPage, u64)>; CONTEXTS],
    /// As in [`Table`].
    large: [u128; CONTEXTS],
    /// How often frames had been protected when it was left.
    protected: u64,
}

const _: () = assert!(ENTRIES <= 1 << 16);

/// Frames that lost their write tags and are remembered for address spaces that still have them.
pub const PROTECTED: usize = 64;

impl Kept {
    /// Forgets the mappings.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.stacks = Default::default();
    }
}

/// Lists an entry that a change of CR3 drops; or else not all are.
fn list(listed: &mut Vec<Place>, all: &mut bool, place: Place) {
    if listed.len() < listed.capacity() {
        listed.push(place);
    } else {
        *all = false;
    }
}

/// All of a vCPU's cached mappings.
#[repr(C)]
pub struct Tlb {
    tables: [Table; CONTEXTS],
    /// The entries that a change of CR3 drops, as the tables' bit maps have them, unless they are too many. Its memory never
    /// grows: filling the TLB must not copy any.
    local: Vec<Place>,
    all_listed: bool,
    /// Frames whose mappings lost their write tags.
    protected: Missed<Range<u64>, PROTECTED>,
    pub flushes: u64,
    pub fills: u64,
    /// The frames of the stack pages, as in entries; or [`NO_FRAME`].
    stack_frames: [u64; CONTEXTS],
    /// Last, where emitted code has them near (see [`Vcpu`](crate::Vcpu)), the user's nearest: by [`stack_index`].
    stack: [StackPage; CONTEXTS],
}

const fn stack_index(context: Context) -> usize {
    CONTEXTS - 1 - context as usize
}

/// Where a context's stack page is within a [`Tlb`], for emitted code.
pub const fn stack_offset(context: Context) -> usize {
    std::mem::offset_of!(Tlb, stack) + stack_index(context) * size_of::<StackPage>()
}

/// What [`Tlb::enter_stack`] is in assembly: where things are within a [`Tlb`], the user's, and how far it is to the next context's.
pub mod layout {
    use super::*;

    pub const TABLES: usize = std::mem::offset_of!(Tlb, tables) + std::mem::offset_of!(Table, entries);
    pub const TABLE_SIZE: usize = size_of::<Table>();
    pub const READ: usize = std::mem::offset_of!(Entry, read);
    pub const WRITE: usize = std::mem::offset_of!(Entry, write);
    pub const HOST: usize = std::mem::offset_of!(Entry, host);
    pub const FRAME: usize = std::mem::offset_of!(Entry, frame);
    pub const STACK: usize = stack_offset(Context::User);
    pub const ADDEND: usize = std::mem::offset_of!(StackPage, addend);
    pub const STACK_FRAME: usize = std::mem::offset_of!(Tlb, stack_frames) + stack_index(Context::User) * 8;

    const _: () = {
        assert!(size_of::<Entry>() == 32 && size_of::<StackPage>() == 16);
        assert!(STACK - 16 == stack_offset(Context::Supervisor));
        assert!(STACK - 32 == stack_offset(Context::SupervisorUser));
    };
}

/// Where a context's entries are within a [`Tlb`], for emitted code.
pub fn table_offset(context: Context) -> usize {
    std::mem::offset_of!(Tlb, tables) + context as usize * size_of::<Table>() + std::mem::offset_of!(Table, entries)
}

impl Tlb {
    /// Makes an empty TLB where it will stay.
    ///
    /// # Safety
    /// `place` must be valid for writing a [`Tlb`], and all zeros.
    pub unsafe fn initialize(place: *mut Tlb) {
        // SAFETY: zeros are entries of a table, bit maps without a bit, and counts of nothing; all else is written. Entries are left
        // alone since memory that is never touched is never taken from the host.
        unsafe {
            (&raw mut (*place).stack_frames).write([NO_FRAME; CONTEXTS]);
            (&raw mut (*place).stack).write([NO_STACK; CONTEXTS]);
            for context in 0..CONTEXTS {
                (&raw mut (*place).tables[context].entries[0]).write(Entry::empty(0));
            }
            (&raw mut (*place).local).write(Vec::with_capacity(MAX_KEPT));
            (&raw mut (*place).all_listed).write(true);
            (&raw mut (*place).protected).write(Missed::default());
        }
    }
}

impl Tlb {
    pub fn index(va: u64) -> usize {
        (va >> 12) as usize & (ENTRIES - 1)
    }

    pub fn entry(&self, context: Context, va: u64) -> &Entry {
        &self.tables[context as usize].entries[Self::index(va)]
    }

    pub fn fill(&mut self, context: Context, fill: Fill) {
        let table = &mut self.tables[context as usize];
        let (page, index) = (fill.va & !0xfff, Self::index(fill.va));
        if !fill.readable && !fill.writable {
            table.entries[index] = Entry::empty(index);
            return;
        }
        let new = !fill.global && table.note_local(index);
        if fill.global {
            table.global[index / 64] |= 1 << (index % 64);
        }
        table.entries[index] = Entry {
            read: if fill.readable { page } else { invalid(index) },
            write: if fill.writable { page } else { invalid(index) },
            host: fill.host as u64 & !0xfff,
            frame: fill.frame & !0xfff
                | if fill.global { GLOBAL } else { 0 }
                | if fill.beside_code { BESIDE_CODE } else { 0 },
        };
        if fill.large {
            table.large |= area_bit(fill.va);
        }
        if new {
            list(&mut self.local, &mut self.all_listed, Place { context: context as u8, index: index as u16 });
        }
        self.fills += 1;
    }

    /// Empties what is not global, after showing it.
    fn empty_local(&mut self, mut each: impl FnMut(Place, Entry)) {
        if std::mem::replace(&mut self.all_listed, true) {
            for place in self.local.drain(..) {
                let (table, index) = (&mut self.tables[place.context as usize], place.index as usize);
                table.local[index / 64] = 0;
                if let Some(entry) = table.take_local(index) {
                    each(place, entry);
                }
            }
            return;
        }
        self.local.clear();
        for (context, table) in self.tables.iter_mut().enumerate() {
            for word in 0..ENTRIES / 64 {
                for index in bits(std::mem::take(&mut table.local[word])).map(|bit| word * 64 + bit) {
                    if let Some(entry) = table.take_local(index) {
                        each(Place { context: context as u8, index: index as u16 }, entry);
                    }
                }
            }
        }
    }

    /// Remembers the page of `va`, which has just been entered, as the context's stack page; its addend if it can be read
    /// and written.
    pub fn enter_stack(&mut self, context: Context, va: u64) -> Option<u64> {
        let entry = *self.entry(context, va);
        let page = va & !0xfff;
        if entry.read != page || entry.write != page {
            return None;
        }
        let addend = entry.host.wrapping_sub(page);
        self.stack[stack_index(context)] = StackPage { page, addend };
        self.stack_frames[stack_index(context)] = entry.frame;
        Some(addend)
    }

    /// The address whose check has failed: what is left of it after the comparison is its XOR with the tag, of the stack page or
    /// of the entry at this distance from the table's beginning.
    pub fn address(&self, kind: AccessKind, compared: u64, entry: u32) -> u64 {
        let context = kind.context();
        if kind.is_stack() {
            return compared ^ self.stack[stack_index(context)].page;
        }
        let entry = &self.tables[context as usize].entries[entry as usize / size_of::<Entry>() % ENTRIES];
        compared ^ if kind.write() { entry.write } else { entry.read }
    }

    /// What checks that later accesses share stand on: it is the same as long as they hold.
    pub fn shared_checks(&self) -> impl PartialEq + use<> {
        (self.flushes, self.stack.map(|s| s.page))
    }

    #[cfg(test)]
    pub fn stack(&self, context: Context) -> StackPage {
        self.stack[stack_index(context)]
    }

    /// Forgets the stack pages of some frames.
    fn leave_stacks(&mut self, left: impl Fn(u64) -> bool) {
        for (stack, frame) in self.stack.iter_mut().zip(&mut self.stack_frames) {
            if left(*frame) {
                (*stack, *frame) = (NO_STACK, NO_FRAME);
            }
        }
    }

    /// Drops everything.
    pub fn flush_all(&mut self) {
        self.flushes += 1;
        self.leave_stacks(|_| true);
        self.tables.iter_mut().for_each(Table::flush);
        self.local.clear();
        self.all_listed = true;
    }

    /// Drops everything but global pages.
    pub fn flush_local(&mut self) {
        self.leave_local_stacks();
        self.empty_local(|_, _| ());
    }

    fn leave_local_stacks(&mut self) {
        self.flushes += 1;
        self.leave_stacks(|frame| frame & GLOBAL == 0);
    }

    /// Takes everything out but global pages.
    pub fn take_local(&mut self, kept: &mut Kept) {
        for (context, place) in kept.stacks.iter_mut().enumerate() {
            let (stack, frame) = (self.stack[context], self.stack_frames[context]);
            *place = (frame & GLOBAL == 0).then_some((stack, frame));
        }
        self.leave_local_stacks();
        kept.entries.clear();
        kept.protected = self.protected.count();
        kept.large = std::array::from_fn(|context| self.tables[context].large);
        self.empty_local(|place, entry| {
            if kept.entries.len() < MAX_KEPT {
                kept.entries.push((place, entry));
            }
        });
    }

    /// Puts back what was taken out. Where it can't be known which frames were protected meanwhile, nothing has a write tag.
    pub fn put_back(&mut self, kept: &Kept) {
        let protected = self.protected.since(kept.protected);
        let untouched = protected.as_ref().is_some_and(|ranges| ranges.clone().next().is_none());
        for &(place, mut entry) in &kept.entries {
            let (table, index) = (&mut self.tables[place.context as usize], place.index as usize);
            let frame = entry.frame & !0xfff;
            if !untouched && protected.clone().is_none_or(|mut ranges| ranges.any(|r| r.contains(&frame))) {
                entry.write = invalid(index);
            }
            table.entries[index] = entry;
            if table.note_local(index) {
                list(&mut self.local, &mut self.all_listed, place);
            }
        }
        for (context, stack) in kept.stacks.iter().enumerate().filter(|_| untouched) {
            if let Some((page, frame)) = *stack
                && self.stack_frames[context] == NO_FRAME
            {
                (self.stack[context], self.stack_frames[context]) = (page, frame);
            }
        }
        for (table, large) in self.tables.iter_mut().zip(kept.large) {
            table.large |= large;
        }
    }

    /// Drops the mapping of one page in every context.
    pub fn flush_page(&mut self, va: u64) {
        self.leave_stacks(|_| true);
        for table in &mut self.tables {
            if table.large & area_bit(va) != 0 {
                table.flush();
            } else {
                let index = Self::index(va);
                let entry = &mut table.entries[index];
                if entry.read == va & !0xfff || entry.write == va & !0xfff {
                    *entry = Entry::empty(index);
                }
            }
        }
    }

    /// Takes the write tag off one entry, if it maps this frame, and off the stack pages that do.
    pub fn protect_entry(&mut self, context: Context, index: usize, frame: u64) {
        self.protected.add(frame..frame + PAGE_SIZE);
        self.leave_stacks(|known| known & !0xfff == frame);
        if let Some(entry) = self.tables[context as usize].entries.get_mut(index)
            && entry.frame & !0xfff == frame
        {
            entry.write = invalid(index);
        }
    }

    /// Takes the write tags off all mappings of these frames: what is written there is to be seen.
    pub fn protect(&mut self, frames: Range<u64>) {
        self.protected.add(frames.clone());
        self.leave_stacks(|known| frames.contains(&(known & !0xfff)));
        for table in &mut self.tables {
            for word in 0..ENTRIES / 64 {
                for index in bits(table.local[word] | table.global[word]).map(|bit| word * 64 + bit) {
                    let entry = &mut table.entries[index];
                    if frames.contains(&(entry.frame & !0xfff)) {
                        entry.write = invalid(index);
                    }
                }
            }
        }
    }

    /// A guest-virtual address that is mapped to a host one. Looks at every entry.
    pub fn guest_address(&self, host: u64) -> Option<u64> {
        let entries = self.tables.iter().flat_map(|t| t.used().map(move |i| (i, &t.entries[i])));
        let mut found = entries.filter(|(_, e)| e.host == host & !0xfff);
        found
            .find_map(|(i, e)| [e.read, e.write].into_iter().find(|&tag| tag != invalid(i)))
            .map(|tag| tag | host & 0xfff)
    }
}
