//! Which of the guest's pages a program that runs directly has: those that the guest's own tables give it, found as a TLB finds
//! them.
//!
//! A page is mapped when the program first uses it, with what it may do there without anybody's notice: a page whose dirty bit
//! is clear is mapped for reading until it is written, one that holds translated code for good. What the guest does not allow
//! is not mapped, and its page fault is raised by translated code.

use direct::{Protection, Sensitive, Space, USER_END};
use memory::PAGE_SIZE;

use super::account::Reason;
use super::shadow::Page;
use crate::cpu::{Context, Vcpu};
use crate::mmu::walk::{Peeks, is_readable, peek};
use crate::mmu::{Access, Mapping, walk};
use crate::phys::frame_of;

/// Pages around one that is used that are mapped with it, if the guest has used them before.
const AROUND: u64 = 8;
/// The same in a large page.
const AROUND_LARGE: u64 = 512;
/// The longest instruction, less a byte.
const REST: u64 = 14;

impl Vcpu {
    /// Whether the program itself has something where its process needs addresses.
    pub(super) fn reserved_is_mapped(&self) -> bool {
        Space::RESERVED.step_by(PAGE_SIZE as usize).any(|address| is_readable(self, address, Context::User))
    }

    /// The program could not reach an address: what it stopped for, [`Reason::Fault`] if translated code has to try.
    pub(super) fn program_faulted(&mut self, index: usize, address: u64, rip: u64) -> Reason {
        let page = address & !(PAGE_SIZE - 1);
        if !may_be_mapped(page) {
            return Reason::Fault;
        }
        let shadow = &self.engine.native.shadows[index];
        let fetched = page == rip & !(PAGE_SIZE - 1);
        // The instruction may go on in this page, or use it as data.
        let crossed = page != rip & !(PAGE_SIZE - 1) && page == (rip + REST) & !(PAGE_SIZE - 1);
        let before = shadow.pages.get(&page).map(|p| p.rights);
        let access = match before {
            Some(Protection::ReadWrite | Protection::Read) | None if fetched => Access::Execute,
            Some(Protection::Read) | None if crossed && self.may_fetch(page) => Access::Execute,
            None => Access::Read,
            Some(Protection::Read | Protection::ReadExecute) => Access::Write,
            Some(Protection::ReadWrite) => return Reason::Fault,
        };
        if access == Access::Execute && shadow.bars(page) {
            return Reason::Barred;
        }
        let Ok(mapping) = walk(self, page, access, Context::User) else { return Reason::Fault };
        let Some(known) = self.shadow_page(index, page, access, &mapping, true) else { return Reason::Fault };
        self.enter_page(index, page, known);
        self.map_around(index, page, access, mapping.large);
        if self.engine.native.shadows[index].is_full() {
            self.engine.native.shadows[index].clear();
        }
        // Pages that are rewritten all the time are code now and data then.
        if before.is_none() { Reason::Page } else { Reason::Change }
    }

    /// Maps the page of a fault that the guest has handled, if it has mapped it.
    pub(super) fn map_awaited(&mut self, index: usize, page: u64) {
        let shadow = &self.engine.native.shadows[index];
        let known = shadow.pages.get(&page).map(|p| p.rights);
        if !may_be_mapped(page) || shadow.bars(page) {
            return;
        }
        let Some(mapping) = peek(self, page, Context::User) else { return };
        let access = match known {
            None if mapping.executable && !mapping.writable => Access::Execute,
            None => Access::Read,
            Some(Protection::Read) if mapping.writable => Access::Write,
            Some(_) => return,
        };
        if let Some(known) = self.shadow_page(index, page, access, &mapping, true) {
            self.enter_page(index, page, known);
        }
    }

    fn may_fetch(&self, page: u64) -> bool {
        peek(self, page, Context::User).is_some_and(|m| m.executable && !m.writable)
    }

    /// How a page is to be mapped for an access that the guest's tables allow, if it can be at all. One that is not `needed` now
    /// takes no guards from others.
    fn shadow_page(
        &mut self,
        index: usize,
        address: u64,
        access: Access,
        mapping: &Mapping,
        needed: bool,
    ) -> Option<Page> {
        let gpa = mapping.gpa & !(PAGE_SIZE - 1);
        let (read, write) = self.at(gpa);
        let place = read?;
        // Global translations outlive changes of CR3; device memory is not RAM for long.
        if mapping.global || !mapping.readable || self.machine.tracker.is_device(place.page) {
            return None;
        }
        let mut page =
            Page { frame: frame_of(place.page), host: place.host, rights: Protection::Read, large: mapping.large };
        if access == Access::Execute {
            if !mapping.executable || self.engine.rewritten.often(page.frame) {
                return None;
            }
            // From here on no write to the page goes unnoticed.
            self.watch_code_page(gpa);
            let code = self.sensitive_code(address, &page);
            let shadow = &mut self.engine.native.shadows[index];
            let guards = shadow.guards_for(&code);
            if !needed && guards.as_ref().is_none_or(|guards| !guards.is_empty()) {
                return None;
            }
            if !guards.is_some_and(|guards| shadow.guard(address, guards)) {
                self.engine.native.shadows[index].bar(address);
                return None;
            }
            page.rights = Protection::ReadExecute;
        } else if mapping.writable && write == Some(place) && !self.code_is_awake(place.page) {
            page.rights = Protection::ReadWrite;
        } else if access == Access::Write {
            return None;
        }
        Some(page)
    }

    fn enter_page(&mut self, index: usize, address: u64, page: Page) {
        let native = &mut self.engine.native;
        match page.rights {
            Protection::ReadWrite => {
                // Stores there are not seen one by one.
                self.machine.tracker.mark_dirty((page.frame / PAGE_SIZE) as usize);
                native.writable.insert(page.frame);
            }
            Protection::ReadExecute => {
                native.executable.insert(page.frame);
            }
            Protection::Read => {}
        }
        native.counts.pages_mapped += 1;
        native.shadows[index].map(address, page);
    }

    /// Maps what the guest has used before around a page that is used, for the same kind of access.
    fn map_around(&mut self, index: usize, page: u64, access: Access, large: bool) {
        let length = if large { AROUND_LARGE } else { AROUND } * PAGE_SIZE;
        let start = page & !(length - 1);
        for address in (start..start + length).step_by(PAGE_SIZE as usize) {
            if self.engine.native.shadows[index].pages.contains_key(&address) || !may_be_mapped(address) {
                continue;
            }
            let Some(mapping) = peek(self, address, Context::User) else { continue };
            let code = mapping.executable && !mapping.writable;
            if code != (access == Access::Execute) {
                continue;
            }
            let access = if code { Access::Execute } else { Access::Read };
            if let Some(known) = self.shadow_page(index, address, access, &mapping, false) {
                self.enter_page(index, address, known);
            }
        }
    }

    /// What a page's bytes, with those of the code beside it, have that may not run directly unguarded.
    fn sensitive_code(&self, address: u64, page: &Page) -> Sensitive {
        const WHOLE: usize = PAGE_SIZE as usize;
        let mut bytes = Vec::with_capacity(direct::BEFORE + WHOLE + direct::BEHIND);
        let mut take = |host: usize, from: usize, length: usize| {
            let end = bytes.len();
            bytes.resize(end + length, 0);
            // SAFETY: within one mapped page of RAM; guest memory has no Rust references into it, and who writes to it at the same
            // time makes torn data, after which the page is looked at again.
            unsafe { std::ptr::copy_nonoverlapping((host as *const u8).add(from), bytes[end..].as_mut_ptr(), length) };
        };
        let before = address.checked_sub(PAGE_SIZE).and_then(|address| self.code_at(address));
        if let Some(before) = before {
            take(before, WHOLE - direct::BEFORE, direct::BEFORE);
        }
        take(page.host, 0, WHOLE);
        if let Some(behind) = self.code_at(address + PAGE_SIZE) {
            take(behind, 0, direct::BEHIND);
        }
        let mut found = direct::sensitive(&bytes, if before.is_some() { direct::BEFORE } else { 0 });
        // What begins behind the page is the next one's.
        for places in [&mut found.cpuids, &mut found.others].into_iter().flatten() {
            places.retain(|&offset| offset < PAGE_SIZE);
        }
        found
    }

    /// Where the code of a page is, if the program could execute it.
    fn code_at(&self, address: u64) -> Option<usize> {
        let mapping = peek(self, address, Context::User).filter(|m| m.executable)?;
        self.readable(mapping.gpa).map(|host| host as usize)
    }

    /// Compares what is mapped with the guest's tables: what these no longer say is not mapped any more.
    pub(super) fn compare_pages(&mut self, index: usize) {
        let mut peeks = Peeks::new(Context::User);
        let changes: Vec<(u64, Option<Protection>)> = self.engine.native.shadows[index]
            .pages
            .iter()
            .filter_map(|(&address, &page)| {
                let rights = peeks.peek(self, address).and_then(|mapping| self.rights_left(&mapping, &page));
                (rights != Some(page.rights)).then_some((address, rights))
            })
            .collect();
        let shadow = &mut self.engine.native.shadows[index];
        for (address, rights) in changes {
            match (rights, shadow.pages.get(&address).copied()) {
                (Some(rights), Some(page)) => shadow.map(address, Page { rights, ..page }),
                _ => shadow.unmap(address),
            }
        }
        shadow.unbar();
        shadow.stale = false;
        self.engine.native.counts.comparisons += 1;
    }

    /// What is left of a mapped page's rights by what the guest's tables say now.
    fn rights_left(&self, mapping: &Mapping, page: &Page) -> Option<Protection> {
        if !mapping.readable || mapping.global {
            return None;
        }
        let (read, write) = self.at(mapping.gpa & !(PAGE_SIZE - 1));
        let place = read.filter(|place| frame_of(place.page) == page.frame)?;
        let allowed = match page.rights {
            Protection::Read => true,
            Protection::ReadWrite => mapping.writable && write == Some(place),
            Protection::ReadExecute => mapping.executable,
        };
        Some(if allowed { page.rights } else { Protection::Read })
    }
}

/// Whether a process can have a guest's page at an address.
fn may_be_mapped(address: u64) -> bool {
    address < USER_END && !Space::RESERVED.contains(&address)
}
