//! Guest-physical memory as a vCPU reaches it from Rust: directly where the [memory map](memory::map) has host memory,
//! all else through the bus.
//!
//! Each vCPU holds the map it works by. A change makes it take the new one and forget all translations
//! ([`Vcpu::follow_map`]): at once where its own access to a device made the change, with the next request it takes
//! where another thread did.
//!
//! Every store to RAM outside emitted code goes through [`Vcpu::phys_write`] (or [`Vcpu::ram_stored`] after an atomic
//! update), so that dirty tracking and translated code stay right.

use std::sync::atomic::{AtomicU64, Ordering};

use memory::PAGE_SIZE;
use memory::map::Place;

use crate::cpu::Vcpu;

/// The [`Vcpu::frame`] of a page of the machine's memory.
pub fn frame_of(page: usize) -> u64 {
    page as u64 * PAGE_SIZE
}

/// The inverse, if it is one.
pub fn page_of(frame: u64) -> Option<usize> {
    (frame >> 63 == 0).then_some((frame / PAGE_SIZE) as usize)
}

impl Vcpu {
    /// What lies at `gpa`, for reads and for writes.
    #[inline]
    pub fn at(&self, gpa: u64) -> (Option<Place>, Option<Place>) {
        let gpa = gpa & self.map.address_mask();
        self.map.find(gpa).map_or((None, None), |section| section.at(gpa))
    }

    /// The host address of `gpa`, if it can be read and written there. Valid to the end of its page.
    #[inline]
    pub fn ram(&self, gpa: u64) -> Option<*mut u8> {
        let (read, write) = self.at(gpa);
        read.filter(|_| read == write).map(|place| place.host as *mut u8)
    }

    /// The host address that reads of `gpa` go to, if not to the bus. Valid to the end of its page.
    #[inline]
    pub fn readable(&self, gpa: u64) -> Option<*mut u8> {
        self.at(gpa).0.map(|place| place.host as *mut u8)
    }

    /// The same for writes.
    #[inline]
    pub fn writable(&self, gpa: u64) -> Option<*mut u8> {
        self.at(gpa).1.map(|place| place.host as *mut u8)
    }

    /// What a page is known by that code is read from, however it is mapped: its place in the machine's memory, or, if it
    /// is a device's, its address.
    pub fn frame(&self, gpa: u64) -> u64 {
        match self.at(gpa).0 {
            Some(place) => frame_of(place.page),
            None => gpa & !(PAGE_SIZE - 1) | 1 << 63,
        }
    }

    /// Works by the newest map from now on.
    pub fn follow_map(&mut self) {
        if self.machine.ram.map().generation() != self.map.generation() {
            self.take_map();
        }
    }

    /// Works by the newest map for its mode: there is another one in system-management mode.
    pub fn take_map(&mut self) {
        self.find_map();
        self.mmu_flush_all();
    }

    /// The same when only that mode was entered or left; `plain`: the map [alone](Vcpu::map_is_all) decided before what an address is.
    pub fn change_map(&mut self, plain: bool) {
        let known = self.map.generation();
        self.find_map();
        if plain && self.map_is_all() && self.map.generation() == known {
            self.mmu_change_unpaged_map(self.smm.active);
        } else {
            self.mmu_flush_all();
        }
    }

    /// Neither paging nor a breakpoint has a say in what an access at an address is.
    pub fn map_is_all(&self) -> bool {
        !self.paging() && self.dr7 & 0xff == 0
    }

    fn find_map(&mut self) {
        let map = self.machine.ram.map();
        self.map = if self.smm.active { map.smm_sections() } else { map.sections() };
    }

    /// Reads within one page.
    pub fn phys_read(&self, gpa: u64, data: &mut [u8]) {
        debug_assert!(gpa % PAGE_SIZE + data.len() as u64 <= PAGE_SIZE);
        match self.readable(gpa) {
            // SAFETY: the range lies in one mapped page of RAM; guest memory has no Rust references into it, and a
            // concurrent guest write gives torn data, as on hardware.
            Some(p) => unsafe { std::ptr::copy_nonoverlapping(p, data.as_mut_ptr(), data.len()) },
            None => self.mmio_read(gpa, data),
        }
    }

    /// Writes within one page.
    pub fn phys_write(&mut self, gpa: u64, data: &[u8]) {
        debug_assert!(gpa % PAGE_SIZE + data.len() as u64 <= PAGE_SIZE);
        match self.writable(gpa) {
            Some(p) => {
                // SAFETY: as in `phys_read`.
                unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), p, data.len()) };
                self.ram_stored(gpa, data.len());
            }
            None => self.mmio_write(gpa, data),
        }
    }

    /// An aligned 64-bit word of RAM, for page tables and other structures that are updated atomically.
    pub fn phys_atomic(&self, gpa: u64) -> Option<&AtomicU64> {
        let p = self.ram(gpa)?;
        debug_assert!(gpa.is_multiple_of(8));
        // SAFETY: aligned, within one mapped page, and `Ram` outlives the vCPU.
        Some(unsafe { AtomicU64::from_ptr(p.cast()) })
    }

    /// Reads an aligned 64-bit word atomically; where there is no RAM, from the bus.
    pub fn phys_read_u64(&self, gpa: u64) -> u64 {
        match self.readable(gpa) {
            // SAFETY: as in `phys_atomic`; it is only read.
            Some(p) if gpa.is_multiple_of(8) => unsafe { AtomicU64::from_ptr(p.cast()) }.load(Ordering::Acquire),
            _ => {
                let mut data = [0; 8];
                self.mmio_read(gpa, &mut data);
                u64::from_le_bytes(data)
            }
        }
    }

    /// Bookkeeping after `length` bytes at `gpa` (RAM, one page) were stored.
    pub fn ram_stored(&mut self, gpa: u64, length: usize) {
        if let Some(Place { page, .. }) = self.at(gpa).1 {
            let tracker = self.machine.tracker.clone();
            tracker.mark_dirty(page);
            if tracker.is_code(page) {
                let start = (gpa % PAGE_SIZE) as usize;
                self.code_stored(page, start..start + length);
            }
        }
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        let gpa = gpa & self.map.address_mask();
        if self.apic_mmio_read(gpa, data) {
            return;
        }
        let bus = self.machine.bus();
        if self.smm.active { bus.mmio_read_from_smm(gpa, data) } else { bus.mmio_read(gpa, data) }
    }

    fn mmio_write(&mut self, gpa: u64, data: &[u8]) {
        let gpa = gpa & self.map.address_mask();
        if self.apic_mmio_write(gpa, data) {
            return;
        }
        let bus = self.machine.bus();
        if self.smm.active {
            bus.mmio_write_from_smm(gpa, data)
        } else {
            bus.mmio_write(gpa, data)
        }
        self.follow_map();
    }
}
