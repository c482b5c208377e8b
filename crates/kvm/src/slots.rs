//! Memory slots: the machine's memory map as the kernel has it.
//!
//! The map ([`memory::map`]) is a list of sections. One that reads and writes find at the same place is a slot; one that
//! only reads find is a read-only slot, of which writes come out of the guest. All else comes out of the guest anyway
//! and is answered by [`Slots::write`], [`Slots::read`] or the bus. So while slots change, which the kernel can't do at
//! once, a vCPU that meets the gap still finds what is there.

use std::ops::Range;
use std::sync::Arc;

use kvm_bindings::*;
use kvm_ioctls::VmFd;
use memory::map::{AREAS, Place};
use memory::{PAGE_SIZE, PageTracker, Section, Sections};

use crate::Error;

/// Slots end here, so that what a chipset does in the first MiB, or with the A20 line in the second, leaves the large ones
/// alone: the kernel forgets all translations of a slot that changes.
const CUTS: [u64; 3] = [AREAS.start, AREAS.end, 2 * AREAS.end];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    start: u64,
    size: u64,
    place: Place,
    read_only: bool,
}

impl Slot {
    fn pages(&self) -> Range<usize> {
        self.place.page..self.place.page + (self.size / PAGE_SIZE) as usize
    }
}

struct Used {
    slot: Slot,
    number: u32,
    /// The kernel notes which pages vCPUs write.
    logged: bool,
}

/// The slots of one machine.
pub struct Slots {
    used: Vec<Used>,
    sections: Arc<Sections>,
    most: usize,
    read_only_possible: bool,
}

/// What the sections want to be slots, in parts that end at [`CUTS`].
fn wanted(sections: &Sections, read_only_possible: bool) -> Vec<Slot> {
    sections.list().iter().flat_map(parts).filter_map(|part| slot(&part, read_only_possible)).collect()
}

fn parts(section: &Section) -> Vec<Section> {
    let end = section.start + section.size;
    let mut at = section.start;
    let ends = CUTS.into_iter().filter(|cut| (section.start + 1..end).contains(cut)).chain([end]);
    ends.map(|end| {
        let (read, write) = section.at(at);
        let part = Section { start: at, size: end - at, read, write };
        at = end;
        part
    })
    .collect()
}

fn slot(section: &Section, read_only_possible: bool) -> Option<Slot> {
    let place = section.read?;
    let read_only = section.write != Some(place);
    (!read_only || read_only_possible).then_some(Slot { start: section.start, size: section.size, place, read_only })
}

impl Slots {
    pub fn new(sections: Arc<Sections>, most: usize, read_only_possible: bool) -> Self {
        Slots { used: Vec::new(), sections, most, read_only_possible }
    }

    /// Makes the kernel's slots those of `sections`. A slot that goes takes along what the kernel has noted of its writes:
    /// all its pages count as written.
    pub fn update(&mut self, vm: &VmFd, tracker: &PageTracker, sections: &Arc<Sections>) -> Result<(), Error> {
        self.update_by(|number, slot| set(vm, number, slot, false), tracker, sections)
    }

    /// [`Slots::update`], where `set` is what changes a slot in the kernel.
    fn update_by(
        &mut self,
        mut set: impl FnMut(u32, &Slot) -> Result<(), Error>,
        tracker: &PageTracker,
        sections: &Arc<Sections>,
    ) -> Result<(), Error> {
        self.sections = sections.clone();
        let wanted = wanted(sections, self.read_only_possible);
        if wanted.len() > self.most {
            return Err(Error::Slots { needed: wanted.len(), most: self.most });
        }
        while let Some(index) = self.used.iter().position(|used| !wanted.contains(&used.slot)) {
            let Used { slot, number, .. } = self.used[index];
            set(number, &Slot { size: 0, ..slot })?;
            self.used.swap_remove(index);
            if !slot.read_only {
                slot.pages().for_each(|page| tracker.mark_dirty(page));
            }
        }
        for slot in wanted {
            if self.used.iter().any(|used| used.slot == slot) {
                continue;
            }
            // The least that is free: there are no more numbers than slots.
            let number = (0..).find(|number| self.used.iter().all(|used| used.number != *number)).unwrap_or_default();
            set(number, &slot)?;
            self.used.push(Used { slot, number, logged: false });
        }
        Ok(())
    }

    /// Marks the pages of `range` that vCPUs have written since the last call. Of pages whose writes were not noted so
    /// far that may be all; from now on they are.
    pub fn collect_dirty(&mut self, vm: &VmFd, tracker: &PageTracker, range: Range<usize>) -> Result<(), Error> {
        for used in self.used.iter_mut().filter(|used| !used.slot.read_only) {
            let pages = used.slot.pages();
            let common = pages.start.max(range.start)..pages.end.min(range.end);
            if common.is_empty() {
                continue;
            }
            if !used.logged {
                set(vm, used.number, &used.slot, true)?;
                used.logged = true;
                common.for_each(|page| tracker.mark_dirty(page));
                continue;
            }
            // The kernel tells of all of a slot at once, and forgets.
            let bitmap = vm
                .get_dirty_log(used.number, used.slot.size as usize)
                .map_err(Error::call("say which pages were written"))?;
            for (index, word) in bitmap.iter().enumerate() {
                let mut left = *word;
                while left != 0 {
                    tracker.mark_dirty(pages.start + 64 * index + left.trailing_zeros() as usize);
                    left &= left - 1;
                }
            }
        }
        Ok(())
    }

    /// What memory answers a read of `data.len()` bytes within a page; false: none.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some(place) = self.sections.find(address).and_then(|section| section.at(address).0) else { return false };
        let host = place.host as *const u8;
        for (offset, byte) in data.iter_mut().enumerate() {
            // SAFETY: a section's host memory stays mapped, and the access lies in one of its pages; guest memory is
            // volatile to us.
            *byte = unsafe { host.add(offset).read_volatile() };
        }
        true
    }

    /// Where memory takes a write within a page, does that; false: none does.
    pub fn write(&self, tracker: &PageTracker, address: u64, data: &[u8]) -> bool {
        let Some(place) = self.sections.find(address).and_then(|section| section.at(address).1) else { return false };
        let host = place.host as *mut u8;
        for (offset, byte) in data.iter().enumerate() {
            // SAFETY: as in `read`.
            unsafe { host.add(offset).write_volatile(*byte) };
        }
        tracker.mark_dirty(place.page);
        true
    }
}

fn set(vm: &VmFd, number: u32, slot: &Slot, logged: bool) -> Result<(), Error> {
    let flags = if slot.read_only { KVM_MEM_READONLY } else { 0 } | if logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
    let region = kvm_userspace_memory_region {
        slot: number,
        flags,
        guest_phys_addr: slot.start,
        memory_size: slot.size,
        userspace_addr: slot.place.host as u64,
    };
    // SAFETY: the host memory of sections stays mapped as long as the RAM, which the VM keeps; nothing takes guest memory
    // for ordinary Rust data.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(Error::call(format!("map {} bytes of memory at {:#x}", slot.size, slot.start)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::{Access, Ram};

    fn ranges(ram: &Ram) -> Vec<(u64, u64, bool)> {
        wanted(&ram.map().sections(), true).iter().map(|slot| (slot.start, slot.size, slot.read_only)).collect()
    }

    #[test]
    fn ram_is_cut_where_a_chipset_works() {
        let ram = Ram::new(16 << 20).unwrap();
        let whole = [(0, 0xa_0000, false), (0xa_0000, 0x6_0000, false), (0x10_0000, 0x10_0000, false)];
        assert_eq!(ranges(&ram), [&whole[..], &[(0x20_0000, 0xe0_0000, false)]].concat());
        ram.map().set_area(0xf_0000, 0x1_0000, true, false);
        assert_eq!(ranges(&ram)[1..3], [(0xa_0000, 0x5_0000, false), (0xf_0000, 0x1_0000, true)]);
        ram.map().set_area(0xf_0000, 0x1_0000, false, true);
        assert!(ranges(&ram).iter().all(|(start, _, _)| *start != 0xf_0000), "reads come out");
        assert_eq!(ranges(&ram).last(), Some(&(0x20_0000, 0xe0_0000, false)));
    }

    #[test]
    fn rom_is_a_read_only_slot_and_none_where_there_are_no_such() {
        let ram = Ram::new(16 << 20).unwrap();
        let rom = ram.device_memory(0x1_0000).unwrap();
        let window = rom.window(0, 0x1_0000, Access::ReadOnly).unwrap();
        window.map(0xffff_0000);
        assert_eq!(ranges(&ram).last(), Some(&(0xffff_0000, 0x1_0000, true)));
        assert!(wanted(&ram.map().sections(), false).iter().all(|slot| slot.start != 0xffff_0000));
    }

    #[test]
    fn a_slot_that_goes_leaves_its_pages_written_and_one_that_the_kernel_keeps_stays_known() {
        let ram = Ram::new(16 << 20).unwrap();
        let video = ram.device_memory(0x2000).unwrap();
        let window = video.window(0, 0x2000, Access::ReadWrite).unwrap();
        window.map(0xe000_0000);
        let mut slots = Slots::new(ram.map().sections(), 32, true);
        let mut numbers = Vec::new();
        let mut taken = |number, slot: &Slot| {
            numbers.push((number, slot.start, slot.size));
            Ok(())
        };
        slots.update_by(&mut taken, ram.tracker(), &ram.map().sections()).unwrap();
        assert_eq!(numbers.last(), Some(&(4, 0xe000_0000, 0x2000)));
        video.take_dirty();
        window.map(0xf000_0000);
        let refused = |_, _: &Slot| Err(Error::State("refused".into()));
        assert!(slots.update_by(refused, ram.tracker(), &ram.map().sections()).is_err());
        assert_eq!((slots.used.len(), video.take_dirty().len()), (5, 0));
        let mut numbers = Vec::new();
        let taken = |number, slot: &Slot| {
            numbers.push((number, slot.start, slot.size));
            Ok(())
        };
        slots.update_by(taken, ram.tracker(), &ram.map().sections()).unwrap();
        assert_eq!(numbers, [(4, 0xe000_0000, 0), (4, 0xf000_0000, 0x2000)]);
        assert_eq!(video.take_dirty().first(), Some(&(0..0x2000)));
    }

    #[test]
    fn what_comes_out_of_the_guest_finds_memory_that_is_no_slot() {
        let ram = Ram::new(16 << 20).unwrap();
        ram.map().set_area(0xf_0000, 0x1_0000, false, true);
        let slots = Slots::new(ram.map().sections(), 32, true);
        assert!(slots.write(ram.tracker(), 0xf_0008, &[1, 2]));
        assert!(!slots.read(0xf_0008, &mut [0; 2]));
        assert!(ram.tracker().is_dirty(0xf0));
        ram.map().set_area(0xf_0000, 0x1_0000, true, false);
        let slots = Slots::new(ram.map().sections(), 32, true);
        let mut data = [0; 2];
        assert!(slots.read(0xf_0008, &mut data) && data == [1, 2]);
        assert!(!slots.write(ram.tracker(), 0xf_0008, &[3]));
    }
}
