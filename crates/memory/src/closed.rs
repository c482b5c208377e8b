//! RAM that devices don't reach: what is set apart for system-management mode.
//!
//! [`RamRegion`] is a region of [`crate::View`] that knows of it. An access that touches such RAM fails as if there was
//! none, whole: where it begins does not matter.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::Result;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionMmap,
    GuestUsize, MemoryRegionAddress, VolatileSlice,
};

use crate::RegionTracker;

/// So many ranges there can be.
pub const MAX_RANGES: usize = 4;

/// Ranges of guest-physical addresses, read at every access of a device.
#[derive(Debug, Default)]
pub struct Closed {
    /// Start and end (exclusive) of each; equal where there is none.
    ranges: [[AtomicU64; 2]; MAX_RANGES],
}

impl Closed {
    /// From now on these are closed, and no others. Called by one thread at a time; an access that runs meanwhile sees
    /// the one or the other.
    pub fn set(&self, mut ranges: impl Iterator<Item = Range<u64>>) {
        for [start, end] in &self.ranges {
            let range = ranges.next().unwrap_or(0..0);
            end.store(0, Ordering::SeqCst);
            start.store(range.start, Ordering::SeqCst);
            end.store(range.end, Ordering::SeqCst);
        }
    }

    fn touches(&self, first: u64, last: u64) -> bool {
        let load = |bound: &AtomicU64| bound.load(Ordering::Relaxed);
        self.ranges.iter().any(|[start, end]| first < load(end) && last >= load(start))
    }
}

/// A region of RAM, as devices reach it.
#[derive(Debug)]
pub struct RamRegion {
    region: GuestRegionMmap<RegionTracker>,
    closed: Arc<Closed>,
}

impl RamRegion {
    pub(crate) fn new(region: GuestRegionMmap<RegionTracker>, closed: Arc<Closed>) -> Self {
        RamRegion { region, closed }
    }

    fn check(&self, offset: u64, length: u64) -> Result<()> {
        let first = self.region.start_addr().0.saturating_add(offset);
        if length != 0 && self.closed.touches(first, first.saturating_add(length - 1)) {
            return Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(first)));
        }
        Ok(())
    }
}

// Reads and writes by way of `get_slice`.
impl GuestMemoryRegionBytes for RamRegion {}

impl GuestMemoryRegion for RamRegion {
    type B = RegionTracker;

    fn len(&self) -> GuestUsize {
        self.region.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.region.start_addr()
    }

    fn bitmap(&self) -> BS<'_, RegionTracker> {
        self.region.bitmap()
    }

    fn get_host_address(&self, address: MemoryRegionAddress) -> Result<*mut u8> {
        self.check(address.raw_value(), 1)?;
        self.region.get_host_address(address)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.region.file_offset()
    }

    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> Result<VolatileSlice<'_, BS<'_, RegionTracker>>> {
        self.check(offset.raw_value(), count as u64)?;
        self.region.get_slice(offset, count)
    }
}

#[cfg(test)]
mod tests {
    use crate::map::Smram;
    use crate::{Ram, View};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    fn reaches(view: &View, address: u64, length: usize) -> bool {
        let mut data = vec![0; length];
        let slice = view.get_slice(GuestAddress(address), length).is_ok();
        let read = view.read_slice(&mut data, GuestAddress(address)).is_ok();
        let write = view.write_slice(&data, GuestAddress(address)).is_ok();
        assert!(slice == read && read == write, "{address:#x}");
        read
    }

    #[test]
    fn devices_do_not_reach_smram_open_or_not() {
        let ram = Ram::new(16 << 20).unwrap();
        let end = 16 << 20;
        assert!(reaches(ram.view(), end - 1, 1));
        let tseg = Smram { start: end - (1 << 20), size: 1 << 20, ram: end - (1 << 20), open: false };
        let low = Smram { start: 0xfeda_0000, size: 0x2_0000, ram: 0xa_0000, open: true };
        ram.map().set_smram(&[tseg, low]);
        for address in [end - 1, tseg.start, tseg.start - 1, 0xa_0000, 0x9_ffff, 0xb_ffff] {
            assert!(!reaches(ram.view(), address, 2.min((end - address) as usize)), "{address:#x}");
        }
        assert!(reaches(ram.view(), tseg.start - 2, 2) && reaches(ram.view(), 0xc_0000, 2));
        assert!(ram.view().store(1u32, GuestAddress(tseg.start), std::sync::atomic::Ordering::SeqCst).is_err());
        ram.map().set_smram(&[]);
        assert!(reaches(ram.view(), tseg.start - 1, 2));
    }
}
