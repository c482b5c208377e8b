//! Guest-physical memory as a vCPU reaches it from Rust: RAM directly, all else through the bus.
//!
//! Every store to RAM outside emitted code goes through [`Vcpu::phys_write`] (or [`Vcpu::ram_stored`] after an atomic
//! update), so that dirty tracking and translated code stay right.

use std::sync::atomic::{AtomicU64, Ordering};

use memory::PAGE_SIZE;

use crate::cpu::Vcpu;

impl Vcpu {
    /// The host address of `gpa`, if it is RAM. Valid to the end of its page.
    #[inline]
    pub fn ram(&self, gpa: u64) -> Option<*mut u8> {
        self.machine.ram_pointer(gpa)
    }

    /// Reads within one page.
    pub fn phys_read(&self, gpa: u64, data: &mut [u8]) {
        debug_assert!(gpa % PAGE_SIZE + data.len() as u64 <= PAGE_SIZE);
        match self.ram(gpa) {
            // SAFETY: the range lies in one mapped page of RAM; guest memory has no Rust references into it, and a
            // concurrent guest write gives torn data, as on hardware.
            Some(p) => unsafe { std::ptr::copy_nonoverlapping(p, data.as_mut_ptr(), data.len()) },
            None => self.mmio_read(gpa, data),
        }
    }

    /// Writes within one page.
    pub fn phys_write(&mut self, gpa: u64, data: &[u8]) {
        debug_assert!(gpa % PAGE_SIZE + data.len() as u64 <= PAGE_SIZE);
        match self.ram(gpa) {
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
        match self.phys_atomic(gpa) {
            Some(word) => word.load(Ordering::Acquire),
            None => {
                let mut data = [0; 8];
                self.mmio_read(gpa, &mut data);
                u64::from_le_bytes(data)
            }
        }
    }

    /// Bookkeeping after `length` bytes at `gpa` (RAM, one page) were stored.
    pub fn ram_stored(&mut self, gpa: u64, length: usize) {
        if let Some(page) = self.machine.page_index(gpa) {
            let tracker = self.machine.tracker.clone();
            tracker.mark_dirty(page);
            if tracker.is_code(page) {
                let start = (gpa % PAGE_SIZE) as usize;
                self.code_stored(page, start..start + length);
            }
        }
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        if !self.apic_mmio_read(gpa, data) {
            self.machine.bus().mmio_read(gpa, data);
        }
    }

    fn mmio_write(&mut self, gpa: u64, data: &[u8]) {
        if !self.apic_mmio_write(gpa, data) {
            self.machine.bus().mmio_write(gpa, data);
        }
    }
}
