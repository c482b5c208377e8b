//! What is mapped of one of the guest's address spaces, in the process that its programs run in.

use std::collections::{BTreeMap, BTreeSet};

use direct::{Protection, Sensitive, Space};
use memory::PAGE_SIZE;
use rustc_hash::{FxHashMap, FxHashSet};

/// Pages mapped at most: each may be a mapping of its own to the host, which has 65,530 for a process.
const MOST_PAGES: usize = 60_000;

/// So many pages may lose their guards to others, until those that need some stay barred: each time costs two stops.
const MOST_CHANGES: u32 = 256;

/// For so many milliseconds guards stay where they are; then the code has to come there again. A processor with breakpoints fetches
/// all code more slowly (vector code of OpenSSL's took 1.6 times as long), so code that ran once is not to keep them.
const GUARDED_MS: u64 = 20;
/// So often may programs come to a page's guarded instructions, until all of it is barred: that is one stop for all of them.
const MOST_HITS: u32 = 8;

/// A page that is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Where it is in the file that holds the machine's memory: the frame by which the rest of the engine knows it.
    pub frame: u64,
    pub host: usize,
    pub rights: Protection,
    /// Part of a large page: INVLPG anywhere in it concerns this one as well.
    pub large: bool,
}

/// An address space and its process.
pub struct Shadow {
    pub cr3: u64,
    pub space: Space,
    /// By address.
    pub pages: BTreeMap<u64, Page>,
    /// Frames, each with the addresses where it is.
    places: BTreeSet<(u64, u64)>,
    /// Addresses of pages that have code which may not run directly.
    barred: FxHashSet<u64>,
    /// Instructions that the process stops before, with the addresses of their pages: the oldest first.
    guards: Vec<(u64, u64)>,
    /// Since when, in ticks of the host's time-stamp counter.
    guarded: u64,
    /// How often a page has lost its guards to another.
    changes: u32,
    /// How often programs came to guarded instructions, by page.
    hits: FxHashMap<u64, u32>,
    /// What is mapped must be compared with the guest's tables first.
    pub stale: bool,
    /// Some page is part of a large one.
    large: bool,
    /// When it was last used.
    pub used: u64,
    /// Ticks that the process had worked when it was asked last, and those that it ran for since then at short times.
    pub worked: u64,
    pub short: u64,
    /// The vector state that the process has.
    pub vector: Vec<u8>,
}

/// Instructions of a page that a process is to stop before, in bytes from its beginning.
pub struct Guards {
    places: Vec<u64>,
    /// They are the first ones that functions come to, of more: once one is hit, all of the page is translated.
    first: bool,
}

impl Guards {
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }
}

impl Shadow {
    pub fn new(space: Space, cr3: u64, used: u64) -> Self {
        Shadow {
            cr3,
            space,
            pages: BTreeMap::new(),
            places: BTreeSet::new(),
            barred: FxHashSet::default(),
            guards: Vec::new(),
            guarded: 0,
            changes: 0,
            hits: FxHashMap::default(),
            stale: false,
            large: false,
            used,
            worked: 0,
            short: 0,
            vector: Vec::new(),
        }
    }

    /// Becomes that of another address space.
    pub fn reuse(&mut self, cr3: u64, used: u64) {
        self.clear();
        (self.cr3, self.used) = (cr3, used);
    }

    /// Forgets all pages.
    pub fn clear(&mut self) {
        self.space.unmap_all();
        self.pages.clear();
        self.places.clear();
        self.barred.clear();
        self.unguard(|_| true);
        self.hits.clear();
        (self.stale, self.large, self.changes) = (false, false, 0);
    }

    /// Whether there are so many that to forget them helps a process that can't have more.
    pub fn has_many(&self) -> bool {
        self.pages.len() > MOST_PAGES / 64
    }

    pub fn is_full(&self) -> bool {
        self.pages.len() > MOST_PAGES
    }

    /// Maps a page, in place of what was there.
    pub fn map(&mut self, address: u64, page: Page) {
        self.space.map(address, PAGE_SIZE, page.frame, page.rights);
        if let Some(before) = self.pages.insert(address, page) {
            self.places.remove(&(before.frame, address));
        }
        self.places.insert((page.frame, address));
        self.large |= page.large;
    }

    pub fn unmap(&mut self, address: u64) {
        if let Some(page) = self.pages.remove(&address) {
            self.places.remove(&(page.frame, address));
            self.space.unmap(address, PAGE_SIZE);
            self.unguard(|page| page == address);
        }
    }

    /// What is to be guarded of a page's code; `None` if that can't be.
    pub fn guards_for(&mut self, code: &Sensitive) -> Option<Guards> {
        let mut places = code.others.clone()?;
        let guarded = code.has_cpuid() && !self.space.fault_cpuid();
        if guarded {
            places.extend(code.cpuids.as_ref()?);
        }
        let first = places.len() > Space::MOST_GUARDS && (guarded || !code.has_cpuid());
        if first {
            places.retain(|place| !code.led.contains(place));
        }
        (places.len() <= Space::MOST_GUARDS).then_some(Guards { places, first })
    }

    /// Sees to it that the process stops there; `false` if it can't.
    pub fn guard(&mut self, page: u64, Guards { places, first }: Guards) -> bool {
        if places.is_empty() {
            return true;
        }
        if first {
            // The next hit is one too many.
            self.hits.insert(page, MOST_HITS - 1);
        }
        if self.guards.is_empty() {
            self.guarded = crate::host::rdtsc();
        }
        self.guards.retain(|&(guarded, _)| guarded != page);
        while self.guards.len() + places.len() > Space::MOST_GUARDS {
            self.changes += 1;
            let Some(&(oldest, _)) = self.guards.first().filter(|_| self.changes <= MOST_CHANGES) else { return false };
            self.guards.retain(|&(guarded, _)| guarded != oldest);
            self.disarm(oldest);
        }
        self.guards.extend(places.iter().map(|&offset| (page, page + offset)));
        self.set_guards()
    }

    /// A program has come to a guarded instruction.
    pub fn hit(&mut self, rip: u64) {
        let page = rip & !(PAGE_SIZE - 1);
        let hits = self.hits.entry(page).or_default();
        *hits += 1;
        if *hits == MOST_HITS {
            self.hits.remove(&page);
            self.disarm(page);
            self.unguard(|guarded| guarded == page);
            self.bar(page);
        }
    }

    /// Takes guards back that have been there for long, with `hz` ticks a second.
    pub fn relieve(&mut self, hz: u64) {
        if !self.guards.is_empty() && crate::host::rdtsc().wrapping_sub(self.guarded) > hz / 1000 * GUARDED_MS {
            std::mem::take(&mut self.guards).into_iter().for_each(|(page, _)| self.disarm(page));
            self.set_guards();
        }
    }

    fn set_guards(&mut self) -> bool {
        let addresses: Vec<u64> = self.guards.iter().map(|&(_, instruction)| instruction).collect();
        let done = self.space.guard(&addresses);
        if !done {
            std::mem::take(&mut self.guards).into_iter().for_each(|(page, _)| self.disarm(page));
        }
        done
    }

    /// A page's code may not run any more until it is looked at again.
    fn disarm(&mut self, address: u64) {
        if let Some(page) = self.pages.get_mut(&address).filter(|page| page.rights == Protection::ReadExecute) {
            page.rights = Protection::Read;
            self.space.map(address, PAGE_SIZE, page.frame, Protection::Read);
        }
    }

    /// Takes the guards of pages away that have no such code any more.
    fn unguard(&mut self, pages: impl Fn(u64) -> bool) {
        let before = self.guards.len();
        self.guards.retain(|&(page, _)| !pages(page));
        if self.guards.len() != before {
            self.set_guards();
        }
    }

    pub fn bar(&mut self, address: u64) {
        self.barred.insert(address);
    }

    pub fn bars(&self, address: u64) -> bool {
        self.barred.contains(&(address & !(PAGE_SIZE - 1)))
    }

    /// Forgets what was found out about pages' code.
    pub fn unbar(&mut self) {
        self.barred.clear();
    }

    pub fn flush_page(&mut self, va: u64) {
        if self.large {
            self.stale = true;
        }
        let address = va & !(PAGE_SIZE - 1);
        self.unmap(address);
        self.barred.remove(&address);
    }

    /// Takes the right to write away from all mappings of a frame.
    pub fn protect(&mut self, frame: u64) {
        self.leave_to_be_read(frame, Protection::ReadWrite);
    }

    /// Forgets the code of a frame, whose bytes are others.
    pub fn drop_code(&mut self, frame: u64) {
        self.leave_to_be_read(frame, Protection::ReadExecute);
        self.unbar();
    }

    /// What mappings of a frame with these rights are for from now on.
    fn leave_to_be_read(&mut self, frame: u64, rights: Protection) {
        let mut left = Vec::new();
        for &(_, address) in self.places.range((frame, 0)..=(frame, u64::MAX)) {
            if let Some(page) = self.pages.get_mut(&address).filter(|page| page.rights == rights) {
                page.rights = Protection::Read;
                self.space.map(address, PAGE_SIZE, frame, Protection::Read);
                left.push(address);
            }
        }
        self.unguard(|page| left.contains(&page));
    }
}

#[cfg(test)]
mod tests {
    use memory::Ram;

    use super::*;

    const AT: u64 = 0x40_0000;

    fn shadow() -> Shadow {
        let ram = Ram::new(memory::MIN_SIZE).unwrap();
        Shadow::new(Space::new(ram.file()).expect("this host lets programs run directly"), 0x1000, 0)
    }

    fn page(frame: u64, rights: Protection) -> Page {
        Page { frame, host: 0, rights, large: false }
    }

    /// What the process has at the pages from [`AT`] on, by its own list: rights and the offset in RAM.
    fn mapped(shadow: &mut Shadow, pages: u64) -> Vec<Option<(String, u64)>> {
        shadow.space.apply().unwrap();
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", shadow.space.pid())).unwrap();
        let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let at = |address: u64| {
            maps.lines().find_map(|line| {
                let mut words = line.split_whitespace();
                let (start, end) = words.next()?.split_once('-')?;
                let (rights, offset) = (words.next()?, number(words.next()?));
                let (start, end) = (number(start), number(end));
                let found = (start..end).contains(&address);
                found.then(|| (rights[..3].to_owned(), offset + address - start))
            })
        };
        (0..pages).map(|page| at(AT + page * PAGE_SIZE)).collect()
    }

    fn is(rights: &str, frame: u64) -> Option<(String, u64)> {
        Some((rights.to_owned(), frame))
    }

    #[test]
    fn what_is_mapped_is_what_the_process_has() {
        let mut shadow = shadow();
        shadow.map(AT, page(0x3000, Protection::Read));
        shadow.map(AT + 0x1000, page(0x8000, Protection::ReadWrite));
        shadow.map(AT + 0x2000, page(0x5000, Protection::ReadExecute));
        assert_eq!(mapped(&mut shadow, 4), [is("r--", 0x3000), is("rw-", 0x8000), is("r-x", 0x5000), None]);
        shadow.map(AT, page(0x9000, Protection::ReadWrite));
        shadow.flush_page(AT + 0x1fff);
        assert_eq!(mapped(&mut shadow, 3), [is("rw-", 0x9000), None, is("r-x", 0x5000)]);
        shadow.reuse(0x2000, 7);
        assert_eq!(mapped(&mut shadow, 3), [None, None, None]);
        assert!(shadow.pages.is_empty() && shadow.cr3 == 0x2000);
    }

    #[test]
    fn a_frame_is_protected_wherever_it_is_mapped() {
        let mut shadow = shadow();
        for at in [0, 2] {
            shadow.map(AT + at * PAGE_SIZE, page(0x3000, Protection::ReadWrite));
        }
        shadow.map(AT + 0x1000, page(0x8000, Protection::ReadWrite));
        shadow.protect(0x3000);
        assert_eq!(mapped(&mut shadow, 3), [is("r--", 0x3000), is("rw-", 0x8000), is("r--", 0x3000)]);
    }

    #[test]
    fn code_that_is_written_may_be_read_but_not_executed() {
        let mut shadow = shadow();
        shadow.map(AT, page(0x3000, Protection::ReadExecute));
        shadow.map(AT + 0x1000, page(0x8000, Protection::ReadExecute));
        shadow.bar(AT + 0x2000);
        assert!(shadow.bars(AT + 0x2fff));
        shadow.drop_code(0x8000);
        assert_eq!(mapped(&mut shadow, 2), [is("r-x", 0x3000), is("r--", 0x8000)]);
        assert!(!shadow.bars(AT + 0x2000), "what was barred may be other code now");
    }

    #[test]
    fn a_flush_within_a_large_page_makes_all_of_it_stale() {
        let mut shadow = shadow();
        shadow.map(AT, page(0x3000, Protection::Read));
        shadow.flush_page(AT);
        assert!(!shadow.stale);
        shadow.map(AT, Page { large: true, ..page(0x20_0000, Protection::Read) });
        shadow.flush_page(AT + 0x10_0000);
        assert!(shadow.stale);
    }

    fn code(others: Option<&[u64]>) -> Sensitive {
        Sensitive { cpuids: Some(Vec::new()), others: others.map(<[u64]>::to_vec), led: Vec::new() }
    }

    fn guard(shadow: &mut Shadow, page: u64, code: &Sensitive) -> bool {
        shadow.guards_for(code).is_some_and(|guards| shadow.guard(page, guards))
    }

    #[test]
    fn guards_go_to_the_code_that_runs() {
        let mut shadow = shadow();
        let executable = |n: u64| page(0x3000 + n * PAGE_SIZE, Protection::ReadExecute);
        for n in 0..2 {
            assert!(guard(&mut shadow, AT + n * PAGE_SIZE, &code(Some(&[8, 20]))));
            shadow.map(AT + n * PAGE_SIZE, executable(n));
        }
        assert!(guard(&mut shadow, AT, &code(Some(&[8, 20]))), "what it has is not counted twice");
        assert_eq!(mapped(&mut shadow, 2), [is("r-x", 0x3000), is("r-x", 0x4000)]);
        // The third takes them from the oldest, whose code does not run any more.
        assert!(guard(&mut shadow, AT + 2 * PAGE_SIZE, &code(Some(&[0]))));
        shadow.map(AT + 2 * PAGE_SIZE, executable(2));
        assert_eq!(mapped(&mut shadow, 3), [is("r-x", 0x3000), is("r--", 0x4000), is("r-x", 0x5000)]);
        shadow.unmap(AT);
        assert_eq!(shadow.guards, [(AT + 2 * PAGE_SIZE, AT + 2 * PAGE_SIZE)]);
        shadow.drop_code(0x5000);
        assert!(shadow.guards.is_empty());
    }

    #[test]
    fn code_that_cannot_be_guarded_is_refused() {
        let mut shadow = shadow();
        assert!(!guard(&mut shadow, AT, &code(None)));
        assert!(!guard(&mut shadow, AT, &code(Some(&[0, 10, 20, 30, 40]))));
        assert!(guard(&mut shadow, AT, &code(Some(&[]))));
        // Pages that take guards from each other all the time: one keeps them at last.
        let mut take = |page: u64| guard(&mut shadow, AT + page * PAGE_SIZE, &code(Some(&[0, 10, 20])));
        assert!((0..MOST_CHANGES).all(|n| take(u64::from(n % 2))));
        (0..4).for_each(|n| {
            take(n % 2);
        });
        assert!(take(0) != take(1));
    }

    /// Five instructions, of which two are first in their functions: these are guarded, and no more than once.
    #[test]
    fn of_many_instructions_the_first_of_each_function_are_guarded() {
        let mut shadow = shadow();
        let many = Sensitive { led: vec![10, 20, 40], ..code(Some(&[0, 10, 20, 30, 40])) };
        assert!(guard(&mut shadow, AT, &many));
        assert_eq!(shadow.guards, [(AT, AT), (AT, AT + 30)]);
        shadow.map(AT, page(0x3000, Protection::ReadExecute));
        shadow.hit(AT + 30);
        assert!(shadow.bars(AT) && shadow.guards.is_empty());
        // All of few are.
        assert!(guard(&mut shadow, AT + PAGE_SIZE, &Sensitive { led: vec![10], ..code(Some(&[0, 10])) }));
        assert_eq!(shadow.guards.len(), 2);
    }

    #[test]
    fn guards_are_taken_back_after_a_while() {
        let mut shadow = shadow();
        assert!(guard(&mut shadow, AT, &code(Some(&[8]))));
        shadow.map(AT, page(0x3000, Protection::ReadExecute));
        shadow.relieve(u64::MAX);
        assert_eq!(mapped(&mut shadow, 1), [is("r-x", 0x3000)]);
        // A clock so slow that it has been long.
        shadow.relieve(1000);
        assert_eq!(mapped(&mut shadow, 1), [is("r--", 0x3000)]);
        assert!(shadow.guards.is_empty());
    }

    #[test]
    fn a_page_whose_guards_are_hit_all_the_time_is_barred() {
        let mut shadow = shadow();
        for n in 0..2 {
            assert!(guard(&mut shadow, AT + n * PAGE_SIZE, &code(Some(&[8]))));
            shadow.map(AT + n * PAGE_SIZE, page(0x3000 + n * PAGE_SIZE, Protection::ReadExecute));
        }
        (1..MOST_HITS).for_each(|_| shadow.hit(AT + 8));
        assert!(!shadow.bars(AT));
        shadow.hit(AT + 8);
        assert!(shadow.bars(AT) && !shadow.bars(AT + PAGE_SIZE));
        assert_eq!(mapped(&mut shadow, 2), [is("r--", 0x3000), is("r-x", 0x4000)]);
        assert_eq!(shadow.guards, [(AT + PAGE_SIZE, AT + PAGE_SIZE + 8)]);
    }
}
