//! Memory of devices that a processor reaches directly: ROM, flash, frame buffers.
//!
//! It lies behind RAM in the same file, so that a page's index is its place in the file for all memory, and one
//! [`PageTracker`](crate::PageTracker) knows of all. It appears in the [memory map](crate::map) where a [`Window`] is mapped.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::bitmap::BS;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{FileOffset, VolatileMemory, VolatileSlice};

use crate::map::{Layer, MemoryMap, Place, Section};
use crate::{Error, PAGE_SIZE, PageTracker, Ram, RegionTracker};

/// All device memory of a machine may take this much, in bytes.
pub const MAX_DEVICE_MEMORY: u64 = 256 << 20;

/// What a processor may do in a window directly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Writes go to the bus.
    ReadOnly,
    ReadWrite,
}

/// What is mapped of device memory; kept as long as the machine's RAM, since an engine may still be using it after its
/// owner has gone.
#[derive(Default)]
pub(crate) struct DeviceMemories {
    regions: Mutex<Vec<Arc<MmapRegion<RegionTracker>>>>,
}

impl DeviceMemories {
    /// Whether a host address lies in one of them.
    pub fn contains(&self, host: usize) -> bool {
        let regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        regions.iter().any(|region| host.wrapping_sub(region.as_ptr() as usize) < region.size())
    }
}

/// Memory of a device: zeros at first. Cheap to clone.
#[derive(Clone)]
pub struct DeviceMemory {
    region: Arc<MmapRegion<RegionTracker>>,
    tracker: Arc<PageTracker>,
    map: Arc<MemoryMap>,
    first_page: usize,
}

impl Ram {
    /// Makes `size` bytes (whole pages) of device memory. It is given back only with the RAM itself.
    pub fn device_memory(&self, size: u64) -> Result<DeviceMemory, Error> {
        let mut regions = self.devices.regions.lock().unwrap_or_else(PoisonError::into_inner);
        let used: u64 = regions.iter().map(|region| region.size() as u64).sum();
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) || size > MAX_DEVICE_MEMORY - used {
            return Err(Error::DeviceMemory { size });
        }
        let offset = self.size + used;
        self.file.set_len(offset + size).map_err(|source| Error::Host { size, source })?;
        let region =
            MmapRegionBuilder::new_with_bitmap(size as usize, RegionTracker::new(self.tracker.clone(), offset))
                .with_file_offset(FileOffset::from_arc(self.file.clone(), offset))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                .build()
                .map_err(|e| Error::Map { size, why: e.to_string() })?;
        let region = Arc::new(region);
        regions.push(region.clone());
        let first_page = (offset / PAGE_SIZE) as usize;
        Ok(DeviceMemory { region, tracker: self.tracker.clone(), map: self.map.clone(), first_page })
    }
}

impl DeviceMemory {
    /// In bytes.
    pub fn size(&self) -> u64 {
        self.region.size() as u64
    }

    /// All of it, for its device to read and write; `vm-memory` checks the bounds, and notes what is written.
    pub fn slice(&self) -> VolatileSlice<'_, BS<'_, RegionTracker>> {
        self.region.as_volatile_slice()
    }

    /// A window through which `size` bytes from `offset` on can be seen; whole pages. It is nowhere yet.
    pub fn window(&self, offset: u64, size: u64, access: Access) -> Result<Window, Error> {
        let fits = offset.checked_add(size).is_some_and(|end| end <= self.size());
        if size == 0 || !fits || !offset.is_multiple_of(PAGE_SIZE) || !size.is_multiple_of(PAGE_SIZE) {
            return Err(Error::Window { offset, size });
        }
        Ok(Window { memory: self.clone(), id: self.map.new_id(), offset, size, access })
    }

    /// The ranges of bytes, in whole pages and ascending, that were written since the last call, by vCPUs or through
    /// [`DeviceMemory::slice`]. What vCPUs write while this is called may be told now, the next time, or both.
    pub fn take_dirty(&self) -> Vec<Range<u64>> {
        let pages = self.first_page..self.first_page + (self.size() / PAGE_SIZE) as usize;
        self.map.collect_dirty(pages.clone());
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for page in pages.filter(|page| self.tracker.take_dirty(*page)) {
            let start = (page - self.first_page) as u64 * PAGE_SIZE;
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end += PAGE_SIZE,
                _ => ranges.push(start..start + PAGE_SIZE),
            }
        }
        ranges
    }
}

/// A place in the memory map where device memory can be seen. It goes from there with its owner.
pub struct Window {
    memory: DeviceMemory,
    id: u64,
    offset: u64,
    size: u64,
    access: Access,
}

impl Window {
    /// Shows the memory from `address` on, and no longer where it was. An address that is no page's, or after which there
    /// is not enough room, is like [`Window::unmap`]. RAM lies over it, and so does what was mapped earlier.
    pub fn map(&self, address: u64) {
        if !address.is_multiple_of(PAGE_SIZE) || address.checked_add(self.size).is_none() {
            return self.unmap();
        }
        let read = Some(Place {
            host: self.memory.region.as_ptr() as usize + self.offset as usize,
            page: self.memory.first_page + (self.offset / PAGE_SIZE) as usize,
        });
        let write = read.filter(|_| self.access == Access::ReadWrite);
        self.memory.map.put(Layer { id: self.id, section: Section { start: address, size: self.size, read, write } });
    }

    /// From now on accesses to where it was go to the bus.
    pub fn unmap(&self) {
        self.memory.map.take_away(self.id);
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.unmap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn what_a_device_writes_is_dirty_once() {
        let ram = Ram::new(16 << 20).unwrap();
        let memory = ram.device_memory(0x10_0000).unwrap();
        let other = ram.device_memory(0x1000).unwrap();
        assert!(memory.take_dirty().is_empty());
        memory.slice().write_slice(&[1; 0x1001], 0x2000).unwrap();
        memory.slice().write_slice(&[1], 0xf_ffff).unwrap();
        assert!(memory.slice().write_slice(&[1], 0x10_0000).is_err());
        assert_eq!(memory.take_dirty(), [0x2000..0x4000, 0xf_f000..0x10_0000]);
        assert!(memory.take_dirty().is_empty() && other.take_dirty().is_empty());
    }

    #[test]
    fn impossible_device_memory_and_windows_are_refused() {
        let ram = Ram::new(16 << 20).unwrap();
        for size in [0, 5000, MAX_DEVICE_MEMORY + PAGE_SIZE] {
            assert!(ram.device_memory(size).is_err());
        }
        let memory = ram.device_memory(MAX_DEVICE_MEMORY - PAGE_SIZE).unwrap();
        assert!(ram.device_memory(2 * PAGE_SIZE).is_err());
        for (offset, size) in [(0, 0), (1, 4096), (0, 5000), (4096, MAX_DEVICE_MEMORY), (u64::MAX - 4095, 4096)] {
            assert!(memory.window(offset, size, Access::ReadOnly).is_err());
        }
    }
}
