//! Which pages were written, and which hold translated code.
//!
//! One [`PageTracker`] serves all of RAM, and device memory behind it; a [`RegionTracker`] is its face towards `vm-memory`, which reports every
//! write of a device through [`Bitmap::mark_dirty`], after the bytes are in place. That order is what makes
//! invalidation sound: code translated before the report is dropped, code translated after it has seen the new bytes.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use vm_memory::bitmap::{Bitmap, WithBitmapSlice};

use crate::PAGE_SIZE;

/// Told of writes by devices to pages that hold translated code. Called on the writing thread, after the write.
pub trait CodeWatcher: Send + Sync {
    /// `page` is an index as of `Ram::page_index`; `bytes` the range written within it.
    fn code_page_written(&self, page: usize, bytes: Range<usize>);
}

/// One bit a page for "dirty", one byte a page for "holds translated code".
pub struct PageTracker {
    /// From here on pages are device memory.
    ram_pages: usize,
    dirty: Box<[AtomicU64]>,
    code: Box<[AtomicU8]>,
    watcher: OnceLock<Weak<dyn CodeWatcher>>,
}

impl std::fmt::Debug for PageTracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageTracker({} pages)", self.code.len())
    }
}

impl PageTracker {
    /// For `ram` bytes of RAM and `devices` bytes of device memory behind it.
    pub(crate) fn new(ram: u64, devices: u64) -> Self {
        let pages = ((ram + devices) / PAGE_SIZE) as usize;
        PageTracker {
            ram_pages: (ram / PAGE_SIZE) as usize,
            dirty: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            code: (0..pages).map(|_| AtomicU8::new(0)).collect(),
            watcher: OnceLock::new(),
        }
    }

    /// Sets the one watcher; later calls have no effect.
    pub fn watch(&self, watcher: Weak<dyn CodeWatcher>) {
        let _ = self.watcher.set(watcher);
    }

    pub fn mark_dirty(&self, page: usize) {
        let (word, bit) = (&self.dirty[page / 64], 1 << (page % 64));
        // Whoever takes dirty pages while the machine runs must see what was written before: a locked operation waits for
        // stores, a mere look that finds the bit set doesn't.
        if self.is_device(page) || word.load(Ordering::Relaxed) & bit == 0 {
            word.fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// The page is one of device memory.
    pub fn is_device(&self, page: usize) -> bool {
        page >= self.ram_pages
    }

    pub fn is_dirty(&self, page: usize) -> bool {
        self.dirty[page / 64].load(Ordering::Relaxed) & 1 << (page % 64) != 0
    }

    /// Makes a page clean; whether it was dirty.
    pub fn take_dirty(&self, page: usize) -> bool {
        let (word, bit) = (&self.dirty[page / 64], 1 << (page % 64));
        word.load(Ordering::Relaxed) & bit != 0 && word.fetch_and(!bit, Ordering::AcqRel) & bit != 0
    }

    /// From now on writes to `page` are reported, on behalf of the `holders` (a bit each). Returns who held it before.
    pub fn mark_code(&self, page: usize, holders: u8) -> u8 {
        self.code[page].fetch_or(holders, Ordering::SeqCst)
    }

    pub fn clear_code(&self, page: usize, holders: u8) {
        self.code[page].fetch_and(!holders, Ordering::SeqCst);
    }

    /// Who has translated code of the page: the bits given to [`PageTracker::mark_code`].
    pub fn code_holders(&self, page: usize) -> u8 {
        self.code[page].load(Ordering::SeqCst)
    }

    pub fn is_code(&self, page: usize) -> bool {
        self.code_holders(page) != 0
    }

    /// Bookkeeping for a write of `length` bytes at byte `offset` of all RAM.
    fn written(&self, offset: u64, length: usize) {
        if length == 0 {
            return;
        }
        let end = offset + length as u64;
        for page in offset / PAGE_SIZE..=(end - 1) / PAGE_SIZE {
            self.mark_dirty(page as usize);
            if self.is_code(page as usize)
                && let Some(watcher) = self.watcher.get().and_then(Weak::upgrade)
            {
                let start = page * PAGE_SIZE;
                let within = offset.max(start) - start..end.min(start + PAGE_SIZE) - start;
                watcher.code_page_written(page as usize, within.start as usize..within.end as usize);
            }
        }
    }
}

/// A [`PageTracker`] seen from a place within RAM: what `vm-memory` carries in regions and slices.
#[derive(Clone, Debug)]
pub struct RegionTracker {
    pages: Arc<PageTracker>,
    /// Of this region's or slice's first byte, in bytes of all RAM.
    offset: u64,
}

impl RegionTracker {
    pub(crate) fn new(pages: Arc<PageTracker>, offset: u64) -> Self {
        RegionTracker { pages, offset }
    }
}

impl WithBitmapSlice<'_> for RegionTracker {
    type S = RegionTracker;
}

impl vm_memory::bitmap::BitmapSlice for RegionTracker {}

impl Bitmap for RegionTracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.pages.written(self.offset + offset as u64, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.pages.is_dirty(((self.offset + offset as u64) / PAGE_SIZE) as usize)
    }

    fn slice_at(&self, offset: usize) -> RegionTracker {
        RegionTracker { pages: self.pages.clone(), offset: self.offset + offset as u64 }
    }
}
