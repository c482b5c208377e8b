//! The guest-physical memory map: what a processor finds at which address without asking a device.
//!
//! RAM is its first layer. In the areas from 640 KiB to 1 MiB a chipset can turn RAM off for reads, writes or both
//! ([`MemoryMap::set_area`]: PAM registers, the video window). Below it are the windows of device memory
//! ([`crate::DeviceMemory`]): ROM and frame buffers. Where no layer answers, an access goes to the bus.
//!
//! A part of RAM can be set apart for system-management mode ([`MemoryMap::set_smram`]). So there are two maps at any
//! time: what processors see in that mode, and what they see, and devices reach, otherwise.
//!
//! Whoever needs the outcome takes a [`Sections`], a list that never changes, and is told through [`MapObserver`] when
//! there is another one. All host memory in such a list stays mapped as long as the [`crate::Ram`], so that an engine
//! which is still working by an old list reads or writes the wrong thing for a moment, as a bus may deliver accesses late,
//! but never something of the host.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use crate::closed::Closed;
use crate::{PAGE_SIZE, Region};

pub use crate::closed::MAX_RANGES as MAX_SMRAM;

/// Where RAM can be turned off: the video window, and the areas of the PAM registers.
pub const AREAS: Range<u64> = 0xa_0000..0x10_0000;
/// What [`MemoryMap::set_area`] can tell apart.
pub const AREA_SIZE: u64 = 0x4000;
const AREA_COUNT: usize = ((AREAS.end - AREAS.start) / AREA_SIZE) as usize;
/// The address line that a PC can force to zero.
const A20: u64 = 1 << 20;

/// Host memory behind guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The host address of the first byte.
    pub host: usize,
    /// The index of the first page, by which [`crate::PageTracker`] knows it.
    pub page: usize,
}

impl Place {
    fn advance(self, by: u64) -> Place {
        Place { host: self.host + by as usize, page: self.page + (by / PAGE_SIZE) as usize }
    }
}

/// A range of addresses, in whole pages, with one kind of answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    pub start: u64,
    /// In bytes.
    pub size: u64,
    /// What reads and instruction fetches find; `None`: they go to the bus.
    pub read: Option<Place>,
    /// What writes change; `None`: they go to the bus. Another place than `read` where writes go to RAM behind a ROM.
    pub write: Option<Place>,
}

impl Section {
    fn end(&self) -> u64 {
        self.start + self.size
    }

    fn part(&self, start: u64, end: u64) -> Section {
        let by = start - self.start;
        Section {
            start,
            size: end - start,
            read: self.read.map(|place| place.advance(by)),
            write: self.write.map(|place| place.advance(by)),
        }
    }

    /// Whether `next` continues this section.
    fn continued_by(&self, next: &Section) -> bool {
        let goes_on = |a: Option<Place>, b: Option<Place>| a.map(|place| place.advance(self.size)) == b;
        self.end() == next.start && goes_on(self.read, next.read) && goes_on(self.write, next.write)
    }

    /// What is at `address`, which lies in this section, for reads and for writes.
    pub fn at(&self, address: u64) -> (Option<Place>, Option<Place>) {
        let by = address - self.start;
        (self.read.map(|place| place.advance(by)), self.write.map(|place| place.advance(by)))
    }
}

/// The map at one moment.
#[derive(Debug)]
pub struct Sections {
    sections: Vec<Section>,
    /// The largest of them, which is looked at first.
    largest: Section,
    address_mask: u64,
    generation: u64,
}

impl Sections {
    /// All sections, ascending and disjoint. With the A20 line forced low, the second MiB shows the first.
    pub fn list(&self) -> &[Section] {
        &self.sections
    }

    /// The section that `address` lies in.
    #[inline]
    pub fn find(&self, address: u64) -> Option<&Section> {
        if address.wrapping_sub(self.largest.start) < self.largest.size {
            return Some(&self.largest);
        }
        let index = self.sections.partition_point(|section| section.end() <= address);
        self.sections.get(index).filter(|section| section.start <= address)
    }

    /// The bits of addresses that count: all but bit 20 while the A20 line is forced low.
    #[inline]
    pub fn address_mask(&self) -> u64 {
        self.address_mask
    }

    /// Rises with every change.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

/// RAM for system-management mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Smram {
    /// Where it is seen; bytes, in whole pages.
    pub start: u64,
    pub size: u64,
    /// Which RAM that is: its address, were it not set apart.
    pub ram: u64,
    /// Processors see it outside of the mode, too.
    pub open: bool,
}

/// An engine, as the map sees it.
pub trait MapObserver: Send + Sync {
    /// The map is now this one. Called on the thread that changed it, perhaps in the middle of a vCPU's access, one change
    /// after the other: it takes note, and makes the vCPUs follow before they execute many more instructions.
    fn map_changed(&self, sections: &Arc<Sections>);
    /// [`crate::PageTracker::mark_dirty`] must be, or soon be, called for each of these pages (indices) that a vCPU has
    /// written since the last such call, and writes from now on be noticed anew.
    fn collect_dirty(&self, pages: Range<usize>);
}

/// A part of device memory, and where it is to appear.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub id: u64,
    pub section: Section,
}

struct Layout {
    /// Whether RAM answers reads, and writes.
    areas: [(bool, bool); AREA_COUNT],
    /// What was mapped first lies on top.
    layers: Vec<Layer>,
    smram: Vec<Smram>,
    a20: bool,
}

/// Who looks at memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Viewer {
    /// A processor in system-management mode.
    Smm,
    Others,
}

/// A machine's memory map, which changes while it runs.
pub struct MemoryMap {
    ram: Vec<Section>,
    layout: Mutex<Layout>,
    sections: RwLock<Arc<Sections>>,
    /// What is seen in system-management mode; of the same generation.
    smm_sections: RwLock<Arc<Sections>>,
    closed: Arc<Closed>,
    /// That of the newest `sections`.
    generation: AtomicU64,
    observers: Mutex<Vec<Weak<dyn MapObserver>>>,
    next_id: AtomicU64,
}

impl MemoryMap {
    pub(crate) fn new(regions: &[Region], closed: Arc<Closed>) -> Self {
        let mut page = 0;
        let mut ram = Vec::new();
        for region in regions {
            let place = Some(Place { host: region.host, page });
            ram.push(Section { start: region.start, size: region.size, read: place, write: place });
            page += (region.size / PAGE_SIZE) as usize;
        }
        let layout = Layout { areas: [(true, true); AREA_COUNT], layers: Vec::new(), smram: Vec::new(), a20: true };
        let sections = Arc::new(flatten(&ram, &layout, Viewer::Others, 0));
        MemoryMap {
            ram,
            layout: Mutex::new(layout),
            smm_sections: RwLock::new(sections.clone()),
            sections: RwLock::new(sections),
            closed,
            generation: AtomicU64::new(0),
            observers: Mutex::default(),
            next_id: AtomicU64::new(0),
        }
    }

    /// The map as it is now.
    pub fn sections(&self) -> Arc<Sections> {
        self.sections.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The map that a processor in system-management mode goes by. The A20 gate has no effect there.
    pub fn smm_sections(&self) -> Arc<Sections> {
        self.smm_sections.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The generation of [`MemoryMap::sections`], for a quick look whether they have changed.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// From now on `observer` is told of changes.
    pub fn observe(&self, observer: Weak<dyn MapObserver>) {
        self.observers.lock().unwrap_or_else(PoisonError::into_inner).push(observer);
    }

    /// Whether RAM answers reads and writes from `start` on for `size` bytes: multiples of [`AREA_SIZE`], within
    /// [`AREAS`]; what is not is left as it is.
    pub fn set_area(&self, start: u64, size: u64, read: bool, write: bool) {
        let mut layout = self.layout();
        let before = layout.areas;
        for (index, area) in layout.areas.iter_mut().enumerate() {
            let address = AREAS.start + index as u64 * AREA_SIZE;
            if address >= start && address - start < size {
                *area = (read, write);
            }
        }
        if layout.areas != before {
            self.changed(&layout);
        }
    }

    /// Sets RAM apart for system-management mode, in place of what was before. It lies on top of all else in that mode;
    /// outside of it, where it is not open, RAM is off. Devices don't reach it. What is not in whole pages, or no RAM, is
    /// left out, and so is what exceeds [`MAX_SMRAM`] ranges.
    pub fn set_smram(&self, smram: &[Smram]) {
        let whole = |at: u64| at.is_multiple_of(PAGE_SIZE);
        let is_ram = |from: u64, size: u64| {
            let fits = |ram: &&Section| ram.start <= from && from.checked_add(size).is_some_and(|end| end <= ram.end());
            self.ram.iter().any(|ram| fits(&ram))
        };
        let possible = |range: &&Smram| {
            let Smram { start, size, ram, .. } = **range;
            size != 0
                && [start, size, ram].into_iter().all(whole)
                && start.checked_add(size).is_some()
                && is_ram(ram, size)
        };
        let smram: Vec<Smram> = smram.iter().filter(possible).take(MAX_SMRAM).copied().collect();
        let mut layout = self.layout();
        if layout.smram != smram {
            self.closed.set(smram.iter().map(|range| range.ram..range.ram + range.size));
            layout.smram = smram;
            self.changed(&layout);
        }
    }

    /// Lets bit 20 of addresses count, or forces it to zero, as the A20 gate of a PC does.
    pub fn set_a20(&self, enabled: bool) {
        let mut layout = self.layout();
        if layout.a20 != enabled {
            layout.a20 = enabled;
            self.changed(&layout);
        }
    }

    pub fn a20(&self) -> bool {
        self.layout().a20
    }

    pub(crate) fn new_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Puts a layer where it is to be, or moves it there.
    pub(crate) fn put(&self, layer: Layer) {
        let mut layout = self.layout();
        match layout.layers.iter_mut().find(|other| other.id == layer.id) {
            Some(old) if old.section == layer.section => return,
            Some(old) => *old = layer,
            None => layout.layers.push(layer),
        }
        self.changed(&layout);
    }

    pub(crate) fn take_away(&self, id: u64) {
        let mut layout = self.layout();
        let before = layout.layers.len();
        layout.layers.retain(|layer| layer.id != id);
        if layout.layers.len() != before {
            self.changed(&layout);
        }
    }

    pub(crate) fn collect_dirty(&self, pages: Range<usize>) {
        self.each_observer(|observer| observer.collect_dirty(pages.clone()));
    }

    fn layout(&self) -> MutexGuard<'_, Layout> {
        self.layout.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the new list. The layout is locked meanwhile, so that observers see all changes in their order.
    fn changed(&self, layout: &Layout) {
        let generation = self.generation() + 1;
        let make = |viewer| Arc::new(flatten(&self.ram, layout, viewer, generation));
        let sections = make(Viewer::Others);
        let same = layout.smram.is_empty() && layout.a20;
        let smm_sections = if same { sections.clone() } else { make(Viewer::Smm) };
        *self.smm_sections.write().unwrap_or_else(PoisonError::into_inner) = smm_sections;
        *self.sections.write().unwrap_or_else(PoisonError::into_inner) = sections.clone();
        self.generation.store(generation, Ordering::Release);
        self.each_observer(|observer| observer.map_changed(&sections));
    }

    fn each_observer(&self, tell: impl Fn(&dyn MapObserver)) {
        let observers = self.observers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        observers.iter().filter_map(Weak::upgrade).for_each(|observer| tell(&*observer));
    }
}

fn flatten(ram: &[Section], layout: &Layout, viewer: Viewer, generation: u64) -> Sections {
    let areas = (0..).map(|index| AREAS.start + index * AREA_SIZE).take(AREA_COUNT + 1);
    let layers = layout.layers.iter().map(|layer| &layer.section);
    let ends = ram.iter().chain(layers).flat_map(|section| [section.start, section.end()]);
    let smram = layout.smram.iter().flat_map(|range| [range.start, range.start + range.size]);
    let mut borders: Vec<u64> = areas.chain(ends).chain(smram).collect();
    borders.sort_unstable();
    borders.dedup();
    let mut sections: Vec<Section> = Vec::new();
    for pair in borders.windows(2) {
        let &[start, end] = pair else { continue };
        if let Some(section) = at_top(ram, layout, viewer, start, end) {
            push(&mut sections, section);
        }
    }
    let a20 = layout.a20 || viewer == Viewer::Smm;
    if !a20 {
        sections = without_a20(sections);
    }
    let empty = Section { start: 0, size: 0, read: None, write: None };
    let largest = sections.iter().copied().max_by_key(|section| section.size).unwrap_or(empty);
    let address_mask = if a20 { u64::MAX } else { !A20 };
    Sections { sections, largest, address_mask, generation }
}

/// What lies from `start` to `end`, between which no layer begins or ends.
fn at_top(ram: &[Section], layout: &Layout, viewer: Viewer, start: u64, end: u64) -> Option<Section> {
    let covers = |section: &&Section| section.start <= start && end <= section.end();
    let smram = layout.smram.iter().find(|range| range.start <= start && end - range.start <= range.size);
    if let Some(range) = smram.filter(|range| range.open || viewer == Viewer::Smm) {
        let from = range.ram + (start - range.start);
        let of = ram.iter().find(|section| section.start <= from && from < section.end());
        return of.map(|section| Section { start, ..section.part(from, from + (end - start)) });
    }
    let area = AREAS.contains(&start).then(|| layout.areas.get(((start - AREAS.start) / AREA_SIZE) as usize));
    let (reads, writes) = area.flatten().copied().unwrap_or((true, true));
    let ram = ram.iter().filter(|_| smram.is_none()).find(covers).map(|section| section.part(start, end));
    let below = layout.layers.iter().map(|layer| &layer.section).find(covers).map(|section| section.part(start, end));
    let read = ram.filter(|_| reads).or(below).and_then(|section| section.read);
    let write = ram.filter(|_| writes).or(below).and_then(|section| section.write);
    (read.is_some() || write.is_some()).then_some(Section { start, size: end - start, read, write })
}

fn push(sections: &mut Vec<Section>, next: Section) {
    match sections.last_mut() {
        Some(last) if last.continued_by(&next) => last.size += next.size,
        _ => sections.push(next),
    }
}

/// The second MiB shows the first. That other odd MiB show even ones, too, is left to [`Sections::address_mask`].
fn without_a20(sections: Vec<Section>) -> Vec<Section> {
    let parts = |from: u64, to: u64| {
        let parts = sections.iter().filter(move |section| section.start < to && section.end() > from);
        parts.map(move |section| section.part(section.start.max(from), section.end().min(to)))
    };
    let shifted = parts(0, A20).map(|section| Section { start: section.start + A20, ..section });
    let mut shown = Vec::new();
    parts(0, A20).chain(shifted).chain(parts(2 * A20, u64::MAX)).for_each(|section| push(&mut shown, section));
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Access, Ram};

    fn ranges(ram: &Ram) -> Vec<(u64, u64, bool, bool)> {
        let sections = ram.map().sections();
        sections.list().iter().map(|s| (s.start, s.end(), s.read.is_some(), s.write.is_some())).collect()
    }

    #[test]
    fn ram_is_everywhere_at_first() {
        let ram = Ram::new(4 << 30).unwrap();
        let low = crate::HOLE_START;
        let high = crate::HIGH_START;
        assert_eq!(ranges(&ram), [(0, low, true, true), (high, high + (4 << 30) - low, true, true)]);
        let sections = ram.map().sections();
        assert_eq!(sections.find(high).unwrap().at(high).0.unwrap().page, (low / PAGE_SIZE) as usize);
        assert!(sections.find(low).is_none() && sections.find(u64::MAX).is_none());
    }

    #[test]
    fn areas_let_rom_through_for_reads_and_ram_for_writes() {
        let ram = Ram::new(16 << 20).unwrap();
        let rom = ram.device_memory(0x4_0000).unwrap();
        let low = rom.window(0x2_0000, 0x2_0000, Access::ReadOnly).unwrap();
        low.map(0xe_0000);
        // RAM lies on top.
        assert_eq!(ranges(&ram), [(0, 16 << 20, true, true)]);
        ram.map().set_area(0xf_0000, 0x1_0000, false, true);
        ram.map().set_area(0xe_0000, 0x4000, true, false);
        ram.map().set_area(0xa_0000, 0x2_0000, false, false);
        let sections = ram.map().sections();
        let at = |address: u64| sections.find(address).map(|section| section.at(address)).unwrap_or((None, None));
        assert_eq!(at(0xa_0000), (None, None));
        assert_eq!(at(0xb_f000), (None, None));
        assert_eq!(at(0xc_0000).0.unwrap().page, 0xc0);
        let (read, write) = at(0xf_1000);
        assert_eq!(read.unwrap().page, (16 << 20 >> 12) + 0x31);
        assert_eq!(write.unwrap().page, 0xf1);
        let (read, write) = at(0xe_0000);
        assert_eq!((read.unwrap().page, write), (0xe0, None));
        drop(low);
        assert_eq!(ram.map().sections().find(0xf_1000).unwrap().read, None);
    }

    #[test]
    fn windows_move_and_go() {
        let ram = Ram::new(16 << 20).unwrap();
        let memory = ram.device_memory(0x10_0000).unwrap();
        let window = memory.window(0, 0x10_0000, Access::ReadWrite).unwrap();
        let generation = ram.map().generation();
        window.map(0xe000_0000);
        window.map(0xe000_0000);
        assert_eq!(ram.map().generation(), generation + 1);
        assert_eq!(ranges(&ram)[1], (0xe000_0000, 0xe010_0000, true, true));
        window.map(0xd000_0000);
        assert_eq!(ranges(&ram)[1..], [(0xd000_0000, 0xd010_0000, true, true)]);
        // Half of it under RAM, and one beyond the last address.
        window.map(0xf8_0000);
        assert_eq!(ranges(&ram)[..], [(0, 16 << 20, true, true), (16 << 20, 0x108_0000, true, true)]);
        window.map(u64::MAX - 0xfff);
        assert_eq!(ranges(&ram).len(), 1);
        window.map(0x8000_0000);
        window.unmap();
        assert_eq!(ranges(&ram).len(), 1);
    }

    #[test]
    fn a20_forced_low_makes_the_second_mib_the_first() {
        let ram = Ram::new(16 << 20).unwrap();
        ram.map().set_a20(false);
        let sections = ram.map().sections();
        let page = |address: u64| sections.find(address).unwrap().at(address).0.unwrap().page;
        assert_eq!([page(0x10_5000), page(0x5000), page(0x20_5000)], [5, 5, 0x205]);
        assert_eq!(0x10_0000 & sections.address_mask(), 0);
        ram.map().set_a20(true);
        assert_eq!(ranges(&ram), [(0, 16 << 20, true, true)]);
    }

    #[test]
    fn smram_is_seen_in_its_mode_only_and_may_be_ram_of_elsewhere() {
        let ram = Ram::new(16 << 20).unwrap();
        let (map, mib) = (ram.map(), 1 << 20);
        let range = |start, size, ram, open| Smram { start, size, ram, open };
        map.set_area(0xa_0000, 0x2_0000, false, false);
        map.set_smram(&[
            range(15 * mib, mib, 15 * mib, false),
            range(0xfeda_0000, 0x2_0000, 0xa_0000, false),
            range(0x3_0000, 0x2_0000, 0x3_0000, true),
            // Neither RAM nor whole pages.
            range(0x7000, 0x1000, 16 * mib, false),
            range(0x8000, 0x800, 0x8000, false),
        ]);
        let page = |sections: &Sections, at: u64| sections.find(at).and_then(|s| s.at(at).0).map(|place| place.page);
        let (seen, smm) = (map.sections(), map.smm_sections());
        assert_eq!(seen.generation(), smm.generation());
        for (at, others, inside) in [
            (15 * mib, None, Some(0xf00)),
            (16 * mib - 1, None, Some(0xfff)),
            (15 * mib - 1, Some(0xeff), Some(0xeff)),
            (0xa_0000, None, None),
            (0xfeda_1000, None, Some(0xa1)),
            (0x3_0000, Some(0x30), Some(0x30)),
            (0x7000, Some(7), Some(7)),
            (0x8000, Some(8), Some(8)),
        ] {
            assert_eq!((page(&seen, at), page(&smm, at)), (others, inside), "{at:#x}");
        }
        map.set_a20(false);
        assert_eq!(page(&map.sections(), 0x10_0000), Some(0));
        assert_eq!((page(&map.smm_sections(), 0x10_0000), map.smm_sections().address_mask()), (Some(0x100), u64::MAX));
        map.set_a20(true);
        map.set_smram(&[]);
        assert_eq!(page(&map.sections(), 15 * mib), Some(0xf00));
        assert_eq!(page(&map.smm_sections(), 0xfeda_1000), None);
    }

    #[test]
    fn observers_are_told_of_changes_only() {
        struct Seen(AtomicU64);
        impl MapObserver for Seen {
            fn map_changed(&self, sections: &Arc<Sections>) {
                self.0.store(sections.generation(), Ordering::SeqCst);
            }
            fn collect_dirty(&self, _: Range<usize>) {}
        }
        let ram = Ram::new(16 << 20).unwrap();
        let seen = Arc::new(Seen(AtomicU64::new(0)));
        ram.map().observe(Arc::downgrade(&(seen.clone() as Arc<dyn MapObserver>)));
        ram.map().set_area(0xc_0000, 0x4000, true, true);
        ram.map().set_area(0x10_0000, 0x4000, false, false);
        assert_eq!(seen.0.load(Ordering::SeqCst), 0);
        ram.map().set_area(0xc_0000, 0x4000, true, false);
        assert_eq!(seen.0.load(Ordering::SeqCst), 1);
    }
}
