//! The software TLB: from guest-virtual pages to host addresses, checked inline by emitted code.
//!
//! One direct-mapped table for each [`Context`]. An access at `va` takes the entry at `(va >> 12) & mask` and hits if
//! `va ^ tag` is at most `4096 - size`: one comparison for "same page" and "does not cross its end". Pages that are MMIO,
//! hold translated code, or are watched have no write (or no read) tag, so that they take the slow path. Entries that
//! were filled are listed, so that a flush touches only those.

use crate::cpu::{CONTEXTS, Context};

/// Entries in each table; a power of two.
pub const ENTRIES: usize = 4096;

/// A tag that no canonical address matches. Where a non-canonical one does, `addend` makes the host address
/// non-canonical too, and the processor raises the #GP that the guest is due.
pub const INVALID: u64 = 1 << 63;

/// One mapping.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Entry {
    pub read: u64,
    pub write: u64,
    /// Host address minus guest-virtual address.
    pub addend: u64,
    /// The guest-physical page.
    pub gpa: u64,
}

const EMPTY: Entry = Entry { read: INVALID, write: INVALID, addend: 0, gpa: 0 };

/// A page-walk result to cache.
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    pub va: u64,
    pub gpa: u64,
    pub host: usize,
    pub readable: bool,
    pub writable: bool,
    /// The mapping is part of a page larger than 4 KiB.
    pub large: bool,
}

#[repr(C)]
struct Table {
    entries: [Entry; ENTRIES],
    filled: Vec<u16>,
    /// Which 1 GiB areas (hashed) have entries from large pages: INVLPG there must drop more than one entry.
    large: u64,
}

impl Table {
    fn new() -> Self {
        Table { entries: [EMPTY; ENTRIES], filled: Vec::with_capacity(ENTRIES), large: 0 }
    }

    fn flush(&mut self) {
        for &i in &self.filled {
            self.entries[i as usize] = EMPTY;
        }
        self.filled.clear();
        self.large = 0;
    }
}

fn area_bit(va: u64) -> u64 {
    1 << (va >> 30 & 63)
}

/// The page that a context's stack was last seen in: found without an index.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct StackPage {
    /// Its guest-virtual address, if it can be read and written, else [`INVALID`].
    pub page: u64,
    pub addend: u64,
    gpa: u64,
}

const NO_STACK: StackPage = StackPage { page: INVALID, addend: 0, gpa: u64::MAX };

/// All of a vCPU's cached mappings.
#[repr(C)]
pub struct Tlb {
    stack: [StackPage; CONTEXTS],
    tables: [Table; CONTEXTS],
    pub flushes: u64,
    pub fills: u64,
}

/// Where a context's stack page is within a [`Tlb`], for emitted code.
pub fn stack_offset(context: Context) -> usize {
    std::mem::offset_of!(Tlb, stack) + context as usize * size_of::<StackPage>()
}

/// Where a context's entries are within a [`Tlb`], for emitted code.
pub fn table_offset(context: Context) -> usize {
    std::mem::offset_of!(Tlb, tables) + context as usize * size_of::<Table>() + std::mem::offset_of!(Table, entries)
}

impl Default for Tlb {
    fn default() -> Self {
        Tlb { stack: [NO_STACK; CONTEXTS], tables: [Table::new(), Table::new(), Table::new()], flushes: 0, fills: 0 }
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
        let entry = &mut table.entries[index];
        if entry.read == INVALID && entry.write == INVALID && table.filled.last() != Some(&(index as u16)) {
            if table.filled.len() == ENTRIES {
                // Entries dropped one by one stay listed; all that is listed twice is found by going over it once.
                table.filled.sort_unstable();
                table.filled.dedup();
            }
            table.filled.push(index as u16);
        }
        *entry = Entry {
            read: if fill.readable { page } else { INVALID },
            write: if fill.writable { page } else { INVALID },
            addend: (fill.host as u64 & !0xfff).wrapping_sub(page),
            gpa: fill.gpa & !0xfff,
        };
        if !fill.readable && !fill.writable {
            // Nothing may hit it; the list keeps its index, which a flush tolerates twice.
            *entry = EMPTY;
        }
        if fill.large {
            table.large |= area_bit(fill.va);
        }
        self.fills += 1;
    }

    /// Remembers the page of `va`, which has just been entered, as the context's stack page; its addend if it can be read
    /// and written.
    pub fn enter_stack(&mut self, context: Context, va: u64) -> Option<u64> {
        let entry = *self.entry(context, va);
        let page = va & !0xfff;
        if entry.read != page || entry.write != page {
            return None;
        }
        self.stack[context as usize] = StackPage { page, addend: entry.addend, gpa: entry.gpa };
        Some(entry.addend)
    }

    /// Drops everything.
    pub fn flush_all(&mut self) {
        self.flushes += 1;
        self.stack = [NO_STACK; CONTEXTS];
        self.tables.iter_mut().for_each(Table::flush);
    }

    /// Drops the mapping of one page in every context.
    pub fn flush_page(&mut self, va: u64) {
        self.stack = [NO_STACK; CONTEXTS];
        for table in &mut self.tables {
            if table.large & area_bit(va) != 0 {
                table.flush();
            } else {
                let entry = &mut table.entries[Self::index(va)];
                if (entry.read & !0xfff == va & !0xfff) || (entry.write & !0xfff == va & !0xfff) {
                    // Not taken off the list: a second flush of it does no harm.
                    *entry = EMPTY;
                }
            }
        }
    }

    /// Takes the write tag off every mapping of a guest-physical page: it now holds translated code.
    pub fn protect(&mut self, gpa: u64) {
        for stack in self.stack.iter_mut().filter(|s| s.gpa == gpa & !0xfff) {
            *stack = NO_STACK;
        }
        for table in &mut self.tables {
            for &i in &table.filled {
                let entry = &mut table.entries[i as usize];
                if entry.gpa == gpa & !0xfff {
                    entry.write = INVALID;
                }
            }
        }
    }

    /// A guest-virtual address that is mapped to a host one. Looks at every entry.
    pub fn guest_address(&self, host: u64) -> Option<u64> {
        let entries = self.tables.iter().flat_map(|t| t.filled.iter().map(|&i| &t.entries[i as usize]));
        let tags = entries.flat_map(|e| [(e.read, e.addend), (e.write, e.addend)]).filter(|t| t.0 != INVALID);
        tags.map(|(tag, addend)| (tag, host.wrapping_sub(addend))).find(|(tag, va)| va & !0xfff == *tag).map(|t| t.1)
    }
}
