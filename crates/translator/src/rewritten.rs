//! Code that is rewritten often: what compilers in the guest make at run time, and instructions that are patched.
//!
//! A page whose code was written and translated again several times is treated differently from then on:
//!
//! - Blocks made of it are not dropped when their bytes are written, but sleep ([`crate::cache`]). When they are looked for
//!   again the bytes are compared; if only immediates differ, these are put into the host code.
//! - A store beside what was translated touches no block ([`Vcpu::store_beside_code`]).
//! - When many such stores come, all blocks of the page are put to sleep, and the page gets a write tag in this vCPU's TLB,
//!   although the tracker still says that it holds code: nothing can run of it before it is looked for, which takes the
//!   tag away ([`Vcpu::guard_code_page`]). That works only while no other vCPU has code of the page.
//!
//! To wake a block takes a microsecond, a hundred times what it takes the guest to patch and call it. So while that happens again
//! and again in a short time, such a page is not watched any more: its blocks are made anew, and look at their bytes themselves
//! whenever they are entered ([`crate::codegen::checked`]). Since each then takes a little longer, and it would not be noticed if the
//! page were used for something else, all are dropped after a while, and the page is watched again.

use std::collections::VecDeque;
use std::ops::Range;

use memory::PAGE_SIZE;
use rustc_hash::FxHashMap;

use crate::Vcpu;
use crate::access::AccessKind;
use crate::cache::Woken;
use crate::codegen::checked::Checked;
use crate::cpu::Context;
use crate::host::rdtsc;
use crate::invalidation::holder_bit;
use crate::mmu::Mapping;
use crate::mode::Mode;
use crate::phys::{frame_of, page_of};

/// Frames that are remembered.
const MAX_FRAMES: usize = 4096;
/// Code was translated so often again after it was written.
const OFTEN: u8 = 3;
/// Stores beside code until the page's blocks are put to sleep, at first.
const PATIENCE: u32 = 8;
const MAX_PATIENCE: u32 = 1 << 20;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Write tags that a page can have in a TLB while its blocks sleep.
const MAX_TAGS: usize = 4;
/// While code comes back so often within so many ticks of the host's TSC, what is rewritten often is to look at its bytes itself
const CONSTANTLY: u32 = 16;
const WITHIN: u64 = 1 << 23;
/// for so many ticks.
const TERM: u64 = 1 << 30;

#[derive(Clone, Copy, Default)]
struct History {
    /// Code was dropped, and not translated since.
    dropped: bool,
    turns: u8,
    /// Stores beside code since a block was woken.
    stores: u32,
    patience: u32,
    /// Where the TLB has write tags for it.
    tags: [Option<(Context, u32)>; MAX_TAGS],
    /// Its blocks look at their bytes themselves.
    checked: bool,
}

/// What one vCPU knows of the pages whose code was written.
#[derive(Default)]
pub struct Rewritten {
    frames: FxHashMap<u64, History>,
    /// Those whose blocks look at their bytes themselves, and since when; the first since longest.
    checked: VecDeque<(u64, u64)>,
    /// How many there were so far.
    pub checked_pages: u64,
    /// Code that had been written was needed again so often since then.
    returns: u32,
    since: u64,
}

impl Rewritten {
    /// Code of a frame is translated.
    pub fn translated(&mut self, frame: u64) {
        if let Some(history) = self.frames.get_mut(&frame).filter(|h| h.dropped) {
            history.dropped = false;
            history.turns = history.turns.saturating_add(1).min(2 * OFTEN);
            self.count_return();
        }
    }

    pub fn often(&self, frame: u64) -> bool {
        self.frames.get(&frame).is_some_and(|h| h.turns >= OFTEN)
    }

    fn woken(&mut self, frame: u64, woken: Woken) {
        let Some(history) = self.frames.get_mut(&frame) else { return };
        history.stores = 0;
        match woken {
            // It would have been better not to disturb it.
            Woken::Unchanged(_) => history.patience = history.patience.saturating_mul(2).min(MAX_PATIENCE),
            Woken::Changed(_) => history.patience = PATIENCE,
            // The page is used for something else now.
            Woken::No => history.turns = history.turns.saturating_sub(1),
        }
        self.count_return();
    }

    fn count_return(&mut self) {
        let now = rdtsc();
        if now.wrapping_sub(self.since) > WITHIN {
            (self.returns, self.since) = (0, now);
        }
        self.returns = self.returns.saturating_add(1);
    }

    /// Whether the blocks of a frame look at their bytes themselves.
    pub fn is_checked(&self, frame: u64) -> bool {
        self.frames.get(&frame).is_some_and(|h| h.checked)
    }

    /// Whether they should, and don't yet.
    fn wants_checks(&self, frame: u64) -> bool {
        let often = self.frames.get(&frame).is_some_and(|h| h.turns >= OFTEN && !h.checked);
        often && self.returns >= CONSTANTLY && rdtsc().wrapping_sub(self.since) <= WITHIN
    }

    fn begin_checks(&mut self, frame: u64) {
        let Some(history) = self.frames.get_mut(&frame) else { return };
        history.checked = true;
        self.checked.push_back((frame, rdtsc()));
        self.checked_pages += 1;
    }

    /// A frame whose blocks have looked at their bytes for long, and from now on don't.
    fn end_checks(&mut self) -> Option<u64> {
        let (frame, since) = *self.checked.front()?;
        if rdtsc().wrapping_sub(since) < TERM {
            return None;
        }
        self.checked.pop_front();
        if let Some(history) = self.frames.get_mut(&frame) {
            history.checked = false;
        }
        Some(frame)
    }

    /// Counts a store beside code; whether it is time that the code sleeps.
    fn count_store(&mut self, frame: u64) -> bool {
        let Some(history) = self.frames.get_mut(&frame).filter(|h| h.turns >= OFTEN) else { return false };
        history.stores = history.stores.saturating_add(1);
        history.stores > history.patience
    }
}

impl Vcpu {
    /// Before code of a frame is translated or taken up again: has it look at its bytes itself if that is time. No emitted code
    /// may be running.
    pub fn choose_checks(&mut self, frame: u64) {
        // Another processor that puts two instructions there in turns could do so between the load of an immediate and the
        // comparison of what stands before it.
        let alone = self.machine.config.cpus.count() == 1;
        let Some(page) = page_of(frame).filter(|_| alone) else { return };
        if self.engine.rewritten.wants_checks(frame) && !self.machine.tracker.is_device(page) {
            self.engine.cache.drop_page(frame);
            self.engine.native.code_written(frame);
            self.engine.rewritten.begin_checks(frame);
            self.machine.tracker.clear_code(page, holder_bit(self.id));
        }
    }

    /// Has code that has looked at its bytes for long be watched again. No emitted code may be running.
    pub fn review_checks(&mut self) {
        while let Some(frame) = self.engine.rewritten.end_checks() {
            self.engine.cache.drop_page(frame);
        }
    }

    /// To be called before code is read from RAM in order to translate it: how it is to look at its bytes, or else writes
    /// to them are noticed from here on. `next`: where its second page is, if it takes bytes of that.
    pub fn watch_or_check(&mut self, gpa: u64, next: Option<u64>, mode: Mode) -> Option<Checked> {
        let checked = self.checks(gpa, next).filter(|_| !mode.is_single());
        if checked.is_none() {
            std::iter::once(gpa).chain(next).for_each(|gpa| self.watch_code_page(gpa));
        }
        checked
    }

    fn checks(&self, gpa: u64, next: Option<u64>) -> Option<Checked> {
        let host = |gpa: u64| {
            let place = self.at(gpa & !(PAGE_SIZE - 1)).0?;
            (!self.machine.tracker.is_device(place.page)).then_some((frame_of(place.page), place.host as u64))
        };
        let (frame, page) = host(gpa)?;
        let (next_frame, next) = match next {
            Some(next) => host(next)?,
            None => (frame, page),
        };
        (self.is_checked(frame) || self.is_checked(next_frame)).then_some(Checked { page, next })
    }

    /// Whether blocks of a page's code look at their own bytes.
    pub fn is_checked(&self, frame: u64) -> bool {
        self.machine.config.checked || self.engine.rewritten.is_checked(frame)
    }

    /// A block found its bytes changed: it is dropped with its copies, which have the same, and made anew when it is looked for.
    pub fn drop_stale_block(&mut self) {
        let Some((id, _)) = self.engine.cache.find_by_host(self.hot.return_address) else { return };
        let Some((block, body)) = self.engine.cache.block(id) else { return };
        let (rip, origin) = (block.address(self.near.code_page), body.origin);
        self.rip = rip;
        self.engine.cache.remove_origin(origin);
    }

    /// Code of a frame was written.
    pub fn note_dropped_code(&mut self, frame: u64) {
        let frames = &self.engine.rewritten.frames;
        if frames.len() >= MAX_FRAMES && !frames.contains_key(&frame) {
            // A guest goes on to other pages, and uses these for something else.
            let old: Vec<u64> =
                frames.iter().filter(|(_, history)| !history.checked).map(|(frame, _)| *frame).collect();
            for frame in old {
                self.guard_code_page(frame);
                self.engine.rewritten.frames.remove(&frame);
            }
        }
        let new = History { patience: PATIENCE, ..History::default() };
        self.engine.rewritten.frames.entry(frame).or_insert(new).dropped = true;
    }

    /// Tells the tracker if this vCPU has no code of a page any more: it was written, or all blocks have made room for others, and the
    /// page may be used for something else by now. Of what is rewritten often the bit stays.
    pub fn give_back_code_page(&mut self, page: usize) {
        let frame = frame_of(page);
        let needed = self.engine.cache.has_page(frame)
            || self.engine.native.executes(frame)
            || self.engine.rewritten.often(frame);
        if !needed && self.has_own_bit() {
            self.machine.tracker.clear_code(page, holder_bit(self.id));
        }
    }

    /// Whether a page is one that the tracker says holds code, this vCPU's or another one's, once it has been told what it has no more.
    pub fn still_holds_code(&mut self, page: usize) -> bool {
        if self.machine.tracker.is_code(page) {
            self.give_back_code_page(page);
        }
        self.machine.tracker.is_code(page)
    }

    /// Whether nobody else has code of a page that the tracker says holds some.
    fn code_is_own(&self, page: usize) -> bool {
        self.has_own_bit() && self.machine.tracker.code_holders(page) == holder_bit(self.id)
    }

    /// Whether stores to a page must be seen: it holds code that does not sleep, or that of others.
    pub fn code_is_awake(&self, page: usize) -> bool {
        self.machine.tracker.is_code(page) && !self.code_sleeps(page)
    }

    /// Whether all code of a page that the tracker says holds code sleeps: it may get a write tag, to be noted by
    /// [`Vcpu::note_code_tag`].
    pub fn code_sleeps(&self, page: usize) -> bool {
        let frame = frame_of(page);
        self.engine.rewritten.often(frame) && !self.engine.cache.has_page(frame) && self.code_is_own(page)
    }

    /// Notes that a page that the tracker says holds code, all of which sleeps, has a write tag in a context of the TLB.
    pub fn note_code_tag(&mut self, page: usize, context: Context, va: u64) {
        let frame = frame_of(page);
        let tag = Some((context, crate::tlb::Tlb::index(va) as u32));
        let Some(history) = self.engine.rewritten.frames.get(&frame) else { return };
        if history.tags.contains(&tag) {
            return;
        }
        // The page is often mapped elsewhere by now, and its old entries are of no use.
        if !history.tags.contains(&None) {
            self.guard_code_page(frame);
        }
        let history = self.engine.rewritten.frames.get_mut(&frame);
        if let Some(free) = history.and_then(|h| h.tags.iter_mut().find(|t| t.is_none())) {
            *free = tag;
        }
    }

    /// Before code of a page runs that the tracker knew for this vCPU's: from here on stores to it are seen.
    pub fn guard_code_page(&mut self, frame: u64) {
        let Some(history) = self.engine.rewritten.frames.get_mut(&frame) else { return };
        for (context, index) in std::mem::take(&mut history.tags).into_iter().flatten() {
            self.tlb.protect_entry(context, index as usize, frame);
        }
    }

    /// A store to a page that may not be written unnoticed, by the light path: its host address if all that is wrong is
    /// code elsewhere in the page.
    pub fn store_beside_code(&mut self, va: u64, kind: AccessKind, mapping: &Mapping) -> Option<u64> {
        let (page, host) = self.plain_code_store(va, kind, mapping)?;
        self.note_store_beside_code(va, kind, page)?;
        Some(host)
    }

    /// The same of a page that the TLB knows as such: firmware for 16-bit code has its data and its stack beside it.
    pub fn store_beside_known_code(&mut self, va: u64, kind: AccessKind) -> Option<u64> {
        if !kind.write() || kind.is_stack() {
            return None;
        }
        let (frame, host) = self.tlb.entry(kind.context(), va).beside_code(va, kind.size())?;
        let page = page_of(frame).filter(|&page| self.code_is_own(page))?;
        self.note_store_beside_code(va, kind, page)?;
        Some(host)
    }

    fn note_store_beside_code(&mut self, va: u64, kind: AccessKind, page: usize) -> Option<()> {
        let frame = frame_of(page);
        let bytes = bytes_of(va, kind);
        // Of code that runs directly only the page is known; one without code need not be looked at by the next store.
        if self.engine.native.executes(frame)
            || !self.engine.cache.has_page(frame)
            || self.engine.cache.overlaps(frame, &bytes)
            || self.engine.rewritten.count_store(frame)
        {
            return None;
        }
        self.machine.tracker.mark_dirty(page);
        Some(())
    }

    /// The same where the whole of the vector state is saved, for stores to code as well: it sleeps, or is dropped, before the
    /// store happens. `None` also if the block that makes the store is among it.
    pub fn store_to_code(
        &mut self,
        va: u64,
        kind: AccessKind,
        mapping: &Mapping,
        block: crate::cache::BlockId,
    ) -> Option<u64> {
        let (page, host) = self.plain_code_store(va, kind, mapping)?;
        let frame = frame_of(page);
        self.code_stored(page, bytes_of(va, kind));
        if self.engine.rewritten.count_store(frame) {
            self.engine.cache.rest_page(frame);
        }
        self.machine.tracker.mark_dirty(page);
        self.engine.cache.is_live(block).then_some(host)
    }

    /// The page and the host address of a store within one page of RAM, which would be a plain one if the page had no code, and
    /// this vCPU alone has any.
    fn plain_code_store(&self, va: u64, kind: AccessKind, mapping: &Mapping) -> Option<(usize, u64)> {
        let within = va % PAGE_SIZE + kind.size() as u64 <= PAGE_SIZE;
        if !kind.write() || kind.is_stack() || !mapping.writable || !within || self.dr7 & 0xff != 0 {
            return None;
        }
        let (read, write) = self.at(mapping.gpa);
        let place = write.filter(|_| read == write)?;
        let tracker = &self.machine.tracker;
        let plain = tracker.is_code(place.page) && !tracker.is_device(place.page) && self.code_is_own(place.page);
        plain.then_some((place.page, place.host as u64))
    }

    /// The block that sleeps for an origin at a guest address, if its code is still, or again, what it was.
    pub fn wake_block(&mut self, origin: crate::body::Origin, gpa: u64, rip: u64) -> Option<crate::cache::BlockId> {
        let part = self.engine.cache.sleeper(origin, rip)?;
        self.readable(gpa)?;
        self.watch_code_page(gpa);
        // In whole lines: of what another processor stores meanwhile, aligned and at once, none or all is read.
        let part = part.start & !(LINE - 1)..part.end.next_multiple_of(LINE);
        let mut page = std::mem::take(&mut self.engine.code_page);
        self.phys_read(gpa & !(PAGE_SIZE - 1) | part.start as u64, &mut page[part]);
        let woken = self.engine.cache.wake(origin, rip, &page);
        self.engine.code_page = page;
        self.engine.rewritten.woken(origin.frame(), woken);
        match woken {
            Woken::Unchanged(id) | Woken::Changed(id) => Some(id),
            Woken::No => None,
        }
    }
}

fn bytes_of(va: u64, kind: AccessKind) -> Range<usize> {
    let start = (va % PAGE_SIZE) as usize;
    start..start + kind.size()
}
