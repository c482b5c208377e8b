//! Translated code whose bytes are written: by this vCPU, by another one, or by a device.
//!
//! A page that holds translated code has a bit for each vCPU in the tracker, and no write tag in any TLB. A store to it
//! takes the slow path, which drops exactly the blocks that it hits ([`Vcpu::code_stored`]) and tells the other vCPUs that
//! have code of this page, through their [`Invalidations`].

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use memory::map::Place;
use memory::{CodeWatcher, MapObserver, PAGE_SIZE, Sections};

use crate::Vcpu;
use crate::phys::{frame_of, page_of};
use crate::shared::request;

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
        self.engine.native.code_written(frame);
        if self.engine.cache.invalidate(frame, bytes) != 0 {
            self.note_dropped_code(frame);
        }
        if let Some(page) = page_of(frame) {
            self.give_back_code_page(page);
        }
    }

    /// Whether this vCPU's bit in the tracker is its own: with more vCPUs than bits it may stand for another one as well.
    pub fn has_own_bit(&self) -> bool {
        self.machine.config.cpus.count() <= u8::BITS
    }

    /// Does what other threads asked for.
    pub fn take_invalidations(&mut self) {
        self.shared.requests.fetch_and(!request::INVALIDATE, Ordering::SeqCst);
        let shared = self.shared.clone();
        // Held while the requests are carried out: an empty queue means that they are.
        let mut queue = shared.invalidations.queue.lock().unwrap_or_else(|e| e.into_inner());
        for what in queue.drain(..) {
            match what {
                Invalidation::Protect(frame) => self.protect(frame..frame + PAGE_SIZE),
                Invalidation::Written(frame, bytes) => self.code_written(frame, bytes),
                Invalidation::CollectDirty(pages) => self.report_dirty(pages),
            }
        }
    }

    /// From here on stores to these frames are seen.
    fn protect(&mut self, frames: Range<u64>) {
        self.tlb.protect(frames.clone());
        self.engine.native.protect(frames);
    }

    /// Marks the pages dirty that could be written unnoticed until now, and sees to it that they no longer can.
    fn report_dirty(&mut self, pages: Range<usize>) {
        self.protect(frame_of(pages.start)..frame_of(pages.end));
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
        let own = holder_bit(self.id);
        let before = self.machine.tracker.mark_code(page, own);
        let frame = frame_of(page);
        // Another vCPU may have a write tag for code of its own that sleeps.
        if before & own != 0 {
            self.guard_code_page(frame);
            self.engine.native.protect(frame..frame + PAGE_SIZE);
            return;
        }
        self.protect(frame..frame + PAGE_SIZE);
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
