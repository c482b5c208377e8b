//! Guest-physical memory: RAM on a memfd, mapped once, with the pages tracked that devices and vCPUs must know of.
//!
//! Devices use [`Ram::view`], a `vm-memory` address space: every write through it marks pages dirty and, where a page
//! holds code that an engine has translated, tells the engine ([`CodeWatcher`]). Engines use [`Ram::host_address`] and
//! do the same bookkeeping themselves through [`Ram::tracker`].
//!
//! What is set apart for system-management mode, devices don't reach.
//!
//! The memory map is a PC's: RAM from 0 up to the PCI hole at [`HOLE_START`], the rest from 4 GiB up. What a processor
//! finds at an address can change while the machine runs: [`map`] has ROM, frame buffers and RAM that is turned off.

mod closed;
mod device;
mod discard;
pub mod file;
pub mod map;
mod tracker;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd};
use std::sync::Arc;

use vm_memory::mmap::{GuestRegionMmap, MmapRegionBuilder};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use closed::Closed;
pub use closed::RamRegion;
use device::DeviceMemories;
pub use device::{Access, DeviceMemory, MAX_DEVICE_MEMORY, Window};
pub use discard::discard;
pub use map::{MapObserver, MemoryMap, Section, Sections};
pub use tracker::{CodeWatcher, PageTracker, RegionTracker};
pub use vm_memory;

/// Guest pages are tracked in this size.
pub const PAGE_SIZE: u64 = 4096;
/// Where RAM below 4 GiB ends at the latest: the PCI hole (ECAM, device windows, I/O APIC, local APICs) begins.
pub const HOLE_START: u64 = 0xb000_0000;
/// Where the rest of RAM begins.
pub const HIGH_START: u64 = 1 << 32;
/// The least and the most RAM a machine may have, in bytes.
pub const MIN_SIZE: u64 = 4 << 20;
pub const MAX_SIZE: u64 = 512 << 30;

/// The address space that devices read and write.
pub type View = vm_memory::GuestRegionCollection<RamRegion>;

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("guest memory of {size} bytes is not possible: it must be a multiple of 4096 from 4 MiB to 512 GiB")]
    Size { size: u64 },
    #[error("can't get {size} bytes of guest memory from the host: {source}")]
    Host { size: u64, source: std::io::Error },
    #[error("can't map {size} bytes of guest memory: {why}")]
    Map { size: u64, why: String },
    #[error("device memory of {size} bytes is not possible: whole pages are, all in all {MAX_DEVICE_MEMORY} bytes")]
    DeviceMemory { size: u64 },
    #[error("a window of {size} bytes from {offset:#x} does not fit its device memory")]
    Window { offset: u64, size: u64 },
}

/// One contiguous piece of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub start: u64,
    pub size: u64,
    /// Host address of the first byte; mapped readable and writable for the life of the [`Ram`].
    pub host: usize,
}

/// All of a machine's RAM. Cheap to clone; the mapping lives as long as any clone.
#[derive(Clone)]
pub struct Ram {
    view: View,
    regions: Arc<Vec<Region>>,
    tracker: Arc<PageTracker>,
    map: Arc<MemoryMap>,
    /// What is neither in `view` nor counted by `size`.
    devices: Arc<DeviceMemories>,
    file: Arc<File>,
    size: u64,
}

impl Ram {
    /// RAM of `size` bytes, all zero, of which the host gives a page when it is first touched.
    pub fn new(size: u64) -> Result<Self, Error> {
        if !(MIN_SIZE..=MAX_SIZE).contains(&size) || !size.is_multiple_of(PAGE_SIZE) {
            return Err(Error::Size { size });
        }
        let file = memfd(size).map_err(|source| Error::Host { size, source })?;
        let file = Arc::new(file);
        let low = size.min(HOLE_START);
        let mut spans = vec![(0, low, 0)];
        if size > low {
            spans.push((HIGH_START, size - low, low));
        }
        let tracker = Arc::new(PageTracker::new(size, MAX_DEVICE_MEMORY));
        let map_error = |why: String| Error::Map { size, why };
        let mut regions = Vec::new();
        let mut mapped = Vec::new();
        let closed = Arc::new(Closed::default());
        for (start, length, offset) in spans {
            let bitmap = RegionTracker::new(tracker.clone(), offset);
            let region = MmapRegionBuilder::new_with_bitmap(length as usize, bitmap)
                .with_file_offset(FileOffset::from_arc(file.clone(), offset))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                .build()
                .map_err(|e| map_error(e.to_string()))?;
            regions.push(Region { start, size: length, host: region.as_ptr() as usize });
            let region = GuestRegionMmap::new(region, GuestAddress(start))
                .ok_or_else(|| map_error("the region leaves the address space".into()))?;
            mapped.push(RamRegion::new(region, closed.clone()));
        }
        let view = View::from_regions(mapped).map_err(|e| map_error(e.to_string()))?;
        let map = Arc::new(MemoryMap::new(&regions, closed));
        let devices = Arc::new(DeviceMemories::default());
        Ok(Ram { view, regions: Arc::new(regions), tracker, map, devices, file, size })
    }

    /// What devices use.
    pub fn view(&self) -> &View {
        &self.view
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    /// The pieces of RAM, ascending.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    pub fn tracker(&self) -> &Arc<PageTracker> {
        &self.tracker
    }

    /// What holds all memory, RAM and devices' behind it: a page's place is its index times the page size.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// What processors find at which address.
    pub fn map(&self) -> &Arc<MemoryMap> {
        &self.map
    }

    /// Whether a host address lies in RAM or device memory.
    pub fn contains_host(&self, host: usize) -> bool {
        self.regions.iter().any(|r| host.wrapping_sub(r.host) < r.size as usize) || self.devices.contains(host)
    }

    /// The host address of a guest-physical address, if it is RAM.
    pub fn host_address(&self, address: u64) -> Option<usize> {
        self.regions
            .iter()
            .find(|r| address.wrapping_sub(r.start) < r.size)
            .map(|r| r.host + (address - r.start) as usize)
    }

    /// The index by which [`PageTracker`] knows the page at `address`, if it is RAM.
    pub fn page_index(&self, address: u64) -> Option<usize> {
        let region = self.view.find_region(GuestAddress(address))?;
        let before = if region.start_addr().0 == 0 { 0 } else { self.regions[0].size };
        Some(((before + address - region.start_addr().0) / PAGE_SIZE) as usize)
    }
}

fn memfd(size: u64) -> std::io::Result<File> {
    // SAFETY: the name is a valid C string; the descriptor that comes back is ours alone.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest-ram".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    file.set_len(size)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use vm_memory::Bytes;

    #[test]
    fn ram_beyond_the_hole_continues_at_4_gib() {
        let ram = Ram::new(4 << 30).unwrap();
        assert!(ram.host_address(HOLE_START - 1).is_some());
        assert!(ram.host_address(HOLE_START).is_none());
        assert!(ram.host_address(HIGH_START).is_some());
        assert_eq!(ram.page_index(HIGH_START), Some((HOLE_START / PAGE_SIZE) as usize));
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for size in [0, 1 << 20, 1 << 40, (64 << 20) + 1] {
            assert!(matches!(Ram::new(size), Err(Error::Size { .. })));
        }
    }

    #[test]
    fn device_writes_to_code_pages_reach_the_watcher() {
        struct Seen(AtomicU64);
        impl CodeWatcher for Seen {
            fn code_page_written(&self, page: usize, _: std::ops::Range<usize>) {
                self.0.store(page as u64, Ordering::SeqCst);
            }
        }
        let ram = Ram::new(16 << 20).unwrap();
        let seen = Arc::new(Seen(AtomicU64::new(0)));
        ram.tracker().watch(Arc::downgrade(&(seen.clone() as Arc<dyn CodeWatcher>)));
        ram.view().write_slice(&[1; 8], GuestAddress(0x5000)).unwrap();
        assert_eq!(seen.0.load(Ordering::SeqCst), 0);
        ram.tracker().mark_code(5, 1);
        ram.view().write_slice(&[1; 8], GuestAddress(0x5ff8)).unwrap();
        assert_eq!(seen.0.load(Ordering::SeqCst), 5);
        assert!(ram.tracker().is_dirty(5));
    }
}
