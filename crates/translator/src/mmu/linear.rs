//! Reads and writes at linear addresses: through the software TLB where it hits, through the page walk where it
//! doesn't.

use arch::Exception;
use arch::registers::cr4;
use memory::PAGE_SIZE;

use super::walk::{Access, Mapping, walk};
use crate::cpu::{Context, Vcpu};
use crate::phys::frame_of;
use crate::tlb::Fill;

/// Where one page's part of an access is.
enum Place {
    /// RAM that needs no bookkeeping.
    Host(*mut u8),
    Physical(u64),
}

impl Vcpu {
    /// The context of accesses to descriptor tables, task-state segments and the stacks of interrupts: implicit
    /// supervisor accesses, for which RFLAGS.AC does not lift SMAP (Intel SDM 3A 4.6.1).
    pub fn system_context(&self) -> Context {
        if self.cr4 & cr4::SMAP != 0 { Context::Supervisor } else { Context::SupervisorUser }
    }

    /// Walks the page tables and caches what they say. Pages that hold translated code, have a data breakpoint or are
    /// on the bus get no tag for the accesses that the slow path has to see.
    pub fn fill_tlb(&mut self, va: u64, access: Access, context: Context) -> Result<Mapping, Exception> {
        let mapping = walk(self, va, access, context)?;
        let (read, write) = self.at(mapping.gpa & !(PAGE_SIZE - 1));
        // An entry leads to one place: where reads and writes go to different ones, it is that of reads.
        let Some(place) = read.or(write) else {
            return Ok(mapping);
        };
        let watched = self.breakpoint_on_page(va);
        let code = self.still_holds_code(place.page);
        let tracker = &self.machine.tracker;
        let may = mapping.writable && !watched && write == Some(place);
        let writable = may && (!code || self.code_sleeps(place.page));
        if writable {
            // Stores through the TLB are not seen one by one.
            tracker.mark_dirty(place.page);
            if tracker.is_device(place.page) {
                self.engine.device_pages.insert(place.page);
            }
        }
        self.tlb.fill(
            context,
            Fill {
                va,
                frame: frame_of(place.page),
                host: place.host,
                readable: mapping.readable && !watched && read.is_some(),
                writable,
                beside_code: may && !writable && !tracker.is_device(place.page),
                large: mapping.large,
                global: mapping.global,
            },
        );
        if code && writable {
            self.note_code_tag(place.page, context, va);
        }
        Ok(mapping)
    }

    /// Reads any length; on a fault nothing is read that has side effects.
    pub fn read_linear(&mut self, va: u64, data: &mut [u8], context: Context) -> Result<(), Exception> {
        let first = (PAGE_SIZE - va % PAGE_SIZE) as usize;
        if data.len() <= first {
            let place = self.place(va, data.len(), Access::Read, context)?;
            self.watch_access(va, data.len(), false);
            self.load(&place, data);
            return Ok(());
        }
        let places = self.places(va, data.len(), Access::Read, context)?;
        self.watch_access(va, data.len(), false);
        let (head, tail) = data.split_at_mut(first);
        for (place, part) in places.iter().zip(std::iter::once(head).chain(tail.chunks_mut(PAGE_SIZE as usize))) {
            self.load(place, part);
        }
        Ok(())
    }

    /// Writes any length; on a fault nothing is written.
    pub fn write_linear(&mut self, va: u64, data: &[u8], context: Context) -> Result<(), Exception> {
        let first = (PAGE_SIZE - va % PAGE_SIZE) as usize;
        if data.len() <= first {
            let place = self.place(va, data.len(), Access::Write, context)?;
            self.watch_access(va, data.len(), true);
            self.store(&place, data);
            return Ok(());
        }
        let places = self.places(va, data.len(), Access::Write, context)?;
        self.watch_access(va, data.len(), true);
        let (head, tail) = data.split_at(first);
        for (place, part) in places.iter().zip(std::iter::once(head).chain(tail.chunks(PAGE_SIZE as usize))) {
            self.store(place, part);
        }
        Ok(())
    }

    /// Checks that a write of `length` bytes would be allowed, and sets the dirty bits it would set.
    pub fn probe_write(&mut self, va: u64, length: usize, context: Context) -> Result<(), Exception> {
        if length as u64 <= PAGE_SIZE - va % PAGE_SIZE {
            return self.place(va, length, Access::Write, context).map(drop);
        }
        self.places(va, length, Access::Write, context).map(drop)
    }

    /// Reads a little-endian number of 1 to 8 bytes.
    pub fn read_sized(&mut self, va: u64, size: usize, context: Context) -> Result<u64, Exception> {
        let mut data = [0; 8];
        self.read_linear(va, &mut data[..size.min(8)], context)?;
        Ok(u64::from_le_bytes(data))
    }

    /// Writes the low `size` (1 to 8) bytes of `value`.
    pub fn write_sized(&mut self, va: u64, size: usize, value: u64, context: Context) -> Result<(), Exception> {
        self.write_linear(va, &value.to_le_bytes()[..size.min(8)], context)
    }

    /// Sets bits in one byte atomically: the accessed and busy bits of descriptors.
    pub fn set_bits_linear(&mut self, va: u64, bits: u8, context: Context) -> Result<(), Exception> {
        let mapping = self.fill_tlb(va, Access::Write, context)?;
        self.update_byte(mapping.gpa, |byte| byte | bits);
        Ok(())
    }

    /// Clears bits in one byte atomically.
    pub fn clear_bits_linear(&mut self, va: u64, bits: u8, context: Context) -> Result<(), Exception> {
        let mapping = self.fill_tlb(va, Access::Write, context)?;
        self.update_byte(mapping.gpa, |byte| byte & !bits);
        Ok(())
    }

    fn update_byte(&mut self, gpa: u64, update: impl Fn(u8) -> u8) {
        let shift = gpa % 8 * 8;
        let Some(word) = self.phys_atomic(gpa & !7) else {
            let mut byte = [0];
            self.phys_read(gpa, &mut byte);
            self.phys_write(gpa, &[update(byte[0])]);
            return;
        };
        let replace = |old: u64| old & !(0xff << shift) | u64::from(update((old >> shift) as u8)) << shift;
        let (success, failure) = (std::sync::atomic::Ordering::AcqRel, std::sync::atomic::Ordering::Acquire);
        // The closure never declines, so the update always succeeds.
        let _ = word.fetch_update(success, failure, |old| Some(replace(old)));
        self.ram_stored(gpa, 1);
    }

    /// The place of `length` bytes that lie in one page.
    fn place(&mut self, va: u64, length: usize, access: Access, context: Context) -> Result<Place, Exception> {
        if let Some(host) = self.tlb.entry(context, va).host_address(va, length, access == Access::Write) {
            return Ok(Place::Host(host as *mut u8));
        }
        Ok(Place::Physical(self.fill_tlb(va, access, context)?.gpa))
    }

    fn places(&mut self, va: u64, length: usize, access: Access, context: Context) -> Result<Vec<Place>, Exception> {
        // Addresses wrap at 4 GiB outside 64-bit mode; but descriptor tables may lie above in compatibility mode.
        let mask = if self.code64() || va >> 32 != 0 { u64::MAX } else { 0xffff_ffff };
        let mut places = Vec::with_capacity(length / PAGE_SIZE as usize + 2);
        let mut done = 0;
        while done < length {
            let at = va.wrapping_add(done as u64) & mask;
            let part = (length - done).min((PAGE_SIZE - at % PAGE_SIZE) as usize);
            places.push(self.place(at, part, access, context)?);
            done += part;
        }
        Ok(places)
    }

    fn load(&self, place: &Place, data: &mut [u8]) {
        match *place {
            // SAFETY: a TLB hit: the bytes lie in one page of RAM, which is mapped as long as the machine lives;
            // there are no Rust references into it.
            Place::Host(p) => unsafe { copy(p, data.as_mut_ptr(), data.len()) },
            Place::Physical(gpa) => self.phys_read(gpa, data),
        }
    }

    fn store(&mut self, place: &Place, data: &[u8]) {
        match *place {
            // SAFETY: as in `load`; pages with a write tag are marked dirty and hold no translated code.
            Place::Host(p) => unsafe { copy(data.as_ptr(), p, data.len()) },
            Place::Physical(gpa) => self.phys_write(gpa, data),
        }
    }
}

/// Copies bytes; numbers in one access, as other vCPUs and devices expect of aligned ones.
///
/// # Safety
/// As for [`std::ptr::copy_nonoverlapping`].
#[inline(always)]
unsafe fn copy(from: *const u8, to: *mut u8, length: usize) {
    // SAFETY: the caller's; a constant length makes it a move.
    unsafe {
        match length {
            8 => std::ptr::copy_nonoverlapping(from, to, 8),
            4 => std::ptr::copy_nonoverlapping(from, to, 4),
            2 => std::ptr::copy_nonoverlapping(from, to, 2),
            1 => std::ptr::copy_nonoverlapping(from, to, 1),
            16 => std::ptr::copy_nonoverlapping(from, to, 16),
            _ => std::ptr::copy_nonoverlapping(from, to, length),
        }
    }
}

/// Data breakpoints (Intel SDM 3B 17.2.4).
impl Vcpu {
    /// (DR number, first byte, last byte, reads too) of the data breakpoints that DR7 enables.
    fn data_breakpoints(&self) -> impl Iterator<Item = (usize, u64, u64, bool)> + '_ {
        (0..4).filter_map(|i| {
            let (enabled, kind) = (self.dr7 >> (2 * i) & 3 != 0, self.dr7 >> (16 + 4 * i) & 3);
            if !enabled || kind & 1 == 0 {
                return None; // not on, or on execution or I/O
            }
            let length = match self.dr7 >> (18 + 4 * i) & 3 {
                0 => 1,
                1 => 2,
                2 => 8,
                _ => 4,
            };
            let start = self.dr[i] & !(length - 1);
            Some((i, start, start + (length - 1), kind == 3))
        })
    }

    fn breakpoint_on_page(&self, va: u64) -> bool {
        self.dr7 & 0xff != 0 && self.data_breakpoints().any(|(_, start, _, _)| start / PAGE_SIZE == va / PAGE_SIZE)
    }

    /// Notes the data breakpoints that an access hits: a #DB trap follows the instruction.
    pub fn watch_access(&mut self, va: u64, length: usize, write: bool) {
        if self.dr7 & 0xff == 0 || length == 0 {
            return;
        }
        let end = va.saturating_add(length as u64 - 1);
        let hit = self
            .data_breakpoints()
            .filter(|&(_, start, last, reads)| (write || reads) && start <= end && last >= va)
            .fold(0, |bits, (i, ..)| bits | 1 << i);
        self.pending_debug |= hit;
    }
}
