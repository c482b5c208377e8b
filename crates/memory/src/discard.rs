//! Giving pages back to the host.

use std::io;
use std::os::fd::AsRawFd;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::{PAGE_SIZE, View};

/// Frees the host's pages behind a range of RAM, which from then on reads as zeros. Pages that are only partly in the range
/// stay; addresses that are no RAM have none. Counts as a write to the range.
pub fn discard(view: &View, address: u64, length: u64) -> io::Result<()> {
    let end = address.saturating_add(length);
    for region in view.iter() {
        let (start, size) = (region.start_addr(), region.len());
        let Some(first) = address.max(start.0).checked_next_multiple_of(PAGE_SIZE) else { continue };
        let last = end.min(start.0.saturating_add(size)) / PAGE_SIZE * PAGE_SIZE;
        let Some(file) = region.file_offset().filter(|_| first < last) else { continue };
        let (within, length) = (first - start.0, last - first);
        // SAFETY: the range lies in the region's part of the file, which holds nothing but guest memory: volatile to
        // us, and no ordinary Rust data. The mapping stays.
        let result = unsafe {
            libc::fallocate(
                file.file().as_raw_fd(),
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                (file.start() + within) as libc::off_t,
                length as libc::off_t,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        region.bitmap().mark_dirty(within as usize, length as usize);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{HIGH_START, HOLE_START, Ram};
    use std::os::unix::fs::MetadataExt;
    use vm_memory::{Bytes, GuestAddress};

    fn host_bytes(ram: &Ram) -> u64 {
        let region = ram.view().find_region(GuestAddress(0)).unwrap();
        region.file_offset().unwrap().file().metadata().unwrap().blocks() * 512
    }

    #[test]
    fn discarded_pages_are_free_on_the_host_and_zero_in_the_guest() {
        let ram = Ram::new(4 << 30).unwrap();
        let pages = [0x10_0000, 0x10_1000, 0x10_2000, HOLE_START - 0x1000, HIGH_START, HIGH_START + 0x1000];
        for page in pages {
            ram.view().write_slice(&[1; 4096], GuestAddress(page)).unwrap();
        }
        assert_eq!(host_bytes(&ram), 6 * 4096);
        // Half pages at both ends stay.
        discard(ram.view(), 0x10_0800, 0x2000).unwrap();
        assert_eq!(host_bytes(&ram), 5 * 4096);
        assert_eq!(ram.view().read_obj::<u8>(GuestAddress(0x10_0000)).unwrap(), 1);
        // A page that is read is there again.
        assert_eq!(ram.view().read_obj::<u64>(GuestAddress(0x10_1000)).unwrap(), 0);
        assert_eq!(host_bytes(&ram), 6 * 4096);
        // Over the hole, and beyond all RAM.
        discard(ram.view(), HOLE_START - 0x1000, HIGH_START + 0x1000 - (HOLE_START - 0x1000)).unwrap();
        assert_eq!(host_bytes(&ram), 4 * 4096);
        assert_eq!(ram.view().read_obj::<u8>(GuestAddress(HIGH_START + 0x1000)).unwrap(), 1);
        discard(ram.view(), u64::MAX - 10, u64::MAX).unwrap();
        discard(ram.view(), 0, u64::MAX).unwrap();
        assert_eq!(host_bytes(&ram), 0);
    }

    #[test]
    fn a_discard_counts_as_a_write() {
        let ram = Ram::new(16 << 20).unwrap();
        discard(ram.view(), 0x5000, 0x1000).unwrap();
        assert!(ram.tracker().is_dirty(5) && !ram.tracker().is_dirty(6));
    }
}
