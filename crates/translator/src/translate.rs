//! The block that runs at an address: found, copied from another address, taken up again after its bytes were written, or
//! translated.

use arch::Exception;
use arch::cpuid::Feature;
use arch::registers::efer;
use engine::Exit;
use memory::PAGE_SIZE;

use crate::body::Origin;
use crate::cache::BlockId;
use crate::codegen::block::{self, Setting, Translated};
use crate::codegen::decode::GuestCode;
use crate::codegen::groups::Sharing;
use crate::cpu::{Context, Stop, Vcpu};
use crate::mmu::{Access, walk};
use crate::mode::{CodeSegment, Mode};

/// A page and what the last instruction in it may have in the next one.
pub const CODE_PAGE: usize = PAGE_SIZE as usize + 15;

/// The block that runs next.
pub struct Reached {
    pub id: BlockId,
    /// All of it is in global pages, and its first byte is.
    pub global: bool,
    pub first_global: bool,
}

impl Vcpu {
    /// What blocks for the code at a guest-physical address are known by.
    pub fn origin(&self, gpa: u64, mode: Mode) -> Origin {
        Origin { address: self.frame(gpa) | (gpa % PAGE_SIZE), mode, segment: CodeSegment::of(self) }
    }

    /// The block at RIP, translated if need be.
    pub fn find_block(&mut self, mode: Mode) -> Result<Reached, Stop> {
        let rip = self.rip;
        if !self.fetchable(rip) {
            return Err(Exception::general_protection(0).into());
        }
        let linear = self.linear_rip();
        let (gpa, global) = self.fetch_address(linear)?;
        let origin = self.origin(gpa, mode);
        if let Some(id) = self.engine.cache.find(origin, rip) {
            let second_page = self.engine.cache.second_page(id);
            let (same, all_global) = match second_page {
                None => (true, global),
                Some(page) => {
                    let (next, next_global) = self.fetch_address(next_page(linear))?;
                    (self.frame(next) == page, global && next_global)
                }
            };
            if same {
                return Ok(Reached { id, global: all_global, first_global: global });
            }
            self.engine.cache.remove(id);
        }
        // From here on code may be dropped, moved or overwritten: what the FPU notes of it must be the guest's before.
        self.settle_x87_pointers();
        self.engine.cache.reap();
        self.engine.cache.jumps.enlarge();
        self.engine.forgive(origin);
        self.choose_checks(origin.frame());
        let relative = self.goes_relative(origin);
        let copy = if relative { None } else { self.copy_block(origin, rip) };
        let id = match copy.or_else(|| self.wake_block(origin, gpa, rip)) {
            Some(id) => id,
            None => self.translate(origin, gpa, rip, linear, (global, relative))?,
        };
        let all_global = global && self.engine.cache.second_page(id).is_none();
        Ok(Reached { id, global: all_global, first_global: global })
    }

    /// Whether code that has no block for its address is to have a relative one: that of programs, once its page has been found at a
    /// second address. What the page has of other blocks is dropped then, since they can't be linked to relative ones.
    fn goes_relative(&mut self, origin: Origin) -> bool {
        // Blocks that look at their own bytes are copied: a page is like that for long, and can't have both.
        if !origin.mode.long() || origin.mode.cpl() != 3 || self.is_checked(origin.frame()) {
            return false;
        }
        let cache = &mut self.engine.cache;
        let already = cache.is_relative_page(origin.frame());
        let second = !already && cache.has_origin(origin);
        if second {
            cache.drop_page(origin.frame());
        }
        already || second
    }

    /// A copy of a block of the same origin that was translated for another address.
    fn copy_block(&mut self, origin: Origin, rip: u64) -> Option<BlockId> {
        let cache = &mut self.engine.cache;
        let mut original = cache.find_original(origin)?;
        let length = cache.length(original);
        if !cache.has_room(length) {
            cache.make_room(length);
            // That may have dropped it.
            original = cache.find_original(origin)?;
        }
        cache.copy(original, rip)
    }

    /// The physical address of code at a linear address, and whether its page is global.
    pub fn fetch_address(&mut self, linear: u64) -> Result<(u64, bool), Exception> {
        if let Some(known) = self.fetched(linear) {
            return Ok(known);
        }
        let context = self.fetch_context();
        let mapping = walk(self, linear, Access::Execute, context)?;
        let engine = &mut self.engine;
        let fetches = if mapping.global { &mut engine.global_fetches } else { &mut engine.fetches };
        fetches.enter(linear, context, mapping.gpa, mapping.large);
        Ok((mapping.gpa, mapping.global))
    }

    /// [`Vcpu::fetch_address`] of code that was fetched before.
    pub fn fetched(&self, linear: u64) -> Option<(u64, bool)> {
        let context = self.fetch_context();
        let global = self.engine.global_fetches.find(linear, context).map(|gpa| (gpa, true));
        global.or_else(|| self.engine.fetches.find(linear, context).map(|gpa| (gpa, false)))
    }

    fn fetch_context(&self) -> Context {
        if self.cpl() == 3 { Context::User } else { Context::Supervisor }
    }

    fn translate(
        &mut self,
        origin: Origin,
        gpa: u64,
        rip: u64,
        linear: u64,
        (global, relative): (bool, bool),
    ) -> Result<BlockId, Stop> {
        self.engine.rewritten.translated(origin.frame());
        let offset = (gpa % PAGE_SIZE) as usize;
        let in_memory = self.readable(gpa).is_some();
        let mode = if in_memory { origin.mode } else { origin.mode.single() };
        let checked = self.watch_or_check(gpa, None, mode);
        let relative = relative && checked.is_none() && in_memory;
        let setting = Setting { checked, relative, ..self.setting(origin, mode, global) };
        // Taken for as long as it is in use.
        let mut bytes = std::mem::take(&mut self.engine.code_page);
        let translated = self.translate_bytes(&mut bytes, origin.segment, gpa, rip, linear, &setting);
        let inserted = translated.map(|(mut translated, second_page)| {
            translated.movable &= in_memory;
            let length = translated.guest_length.min(bytes.len() - offset);
            let second_page = second_page.filter(|_| offset + length > PAGE_SIZE as usize);
            let cache = &mut self.engine.cache;
            cache.make_room(translated.code.len());
            let code = &bytes[offset..offset + length];
            let ahead = bytes.get(translated.lookahead.clone()).filter(|_| setting.template && in_memory);
            let rip = if translated.parked_way_in == 0 { rip } else { offset as u64 };
            let inserted = cache.insert(origin, rip, second_page, code, ahead, &mut translated);
            self.engine.workspace = translated.into();
            inserted
        });
        self.engine.code_page = bytes;
        let full = || Stop::Exit(Exit::Failed("the translation cache can't hold one more block".into()));
        inserted?.ok_or_else(full)
    }

    /// Translates what is at `gpa`, by way of `bytes`; with it the second frame that it takes bytes from.
    fn translate_bytes(
        &mut self,
        bytes: &mut [u8],
        segment: CodeSegment,
        gpa: u64,
        rip: u64,
        linear: u64,
        setting: &Setting,
    ) -> Result<(Translated, Option<u64>), Stop> {
        let offset = (gpa % PAGE_SIZE) as usize;
        let (page, tail) = bytes.split_at_mut(PAGE_SIZE as usize);
        self.read_code(gpa, page);
        if let Some(translated) = self.translate_code(GuestCode { page, offset, segment }, rip, setting) {
            return Ok((translated, None));
        }
        if !segment.holds(rip, PAGE_SIZE as usize - offset + 1) {
            return Err(Exception::general_protection(0).into());
        }
        let (next, _) = self.fetch_address(next_page(linear))?;
        let checked = self.watch_or_check(gpa, Some(next), setting.mode);
        let setting = Setting { checked, relative: setting.relative && checked.is_none(), ..*setting };
        // Perhaps only now the first page is watched.
        self.read_code(gpa, page);
        self.read_code(next, tail);
        let translated = self.translate_code(GuestCode { page: bytes, offset, segment }, rip, &setting);
        Ok((translated.ok_or(Exception::invalid_opcode())?, Some(self.frame(next))))
    }

    /// Translates code for `rip`, or for any address if that is asked for and can be.
    fn translate_code(&mut self, code: GuestCode, rip: u64, setting: &Setting) -> Option<Translated> {
        let workspace = &mut self.engine.workspace;
        if setting.relative {
            let translated = block::translate(code, code.offset as u64, setting, workspace)?;
            if translated.movable {
                return Some(translated);
            }
            // What 32-bit addressing makes of an address says nothing of it elsewhere.
            *workspace = translated.into();
        }
        block::translate(code, rip, &Setting { relative: false, ..*setting }, workspace)
    }

    /// `global`: the code is in a global page, and so is perhaps what it branches to.
    fn setting(&mut self, origin: Origin, mode: Mode, global: bool) -> Setting {
        // Not while a system begins, in modes that it never has programs in.
        let other_level = match mode.cpl() {
            _ if !mode.long() || self.msrs.efer & efer::SCE == 0 => None,
            0 => Some(mode.after_sysret()),
            3 => Some(mode.after_syscall()),
            _ => None,
        };
        let other_access = mode.with_user_pages(mode.context() == Context::Supervisor);
        Setting {
            mode,
            inline_tsc: self.machine.time.tsc_offset().is_some() && self.machine.cpuid.has(Feature::Rdtscp),
            sharing: self.engine.failures.get(&origin).map_or(Sharing::All, |f| f.sharing).max(least_sharing(mode)),
            jump_slot: self.engine.cache.jumps.slot(mode),
            level_slot: other_level.and_then(|mode| self.engine.cache.jumps.slot(mode)),
            access_slot: other_access.and_then(|mode| self.engine.cache.jumps.slot(mode)),
            template: !mode.is_single() && self.engine.rewritten.often(origin.frame()),
            checked: None,
            far_links: global && mode.long() && mode.cpl() == 0,
            relative: false,
        }
    }

    /// Reads the page of `gpa`, or as much of it as `bytes` takes; from a device only the one instruction at `gpa`.
    fn read_code(&self, gpa: u64, bytes: &mut [u8]) {
        if self.readable(gpa).is_some() {
            self.phys_read(gpa & !(PAGE_SIZE - 1), bytes);
        } else {
            for (i, byte) in bytes.iter_mut().skip((gpa % PAGE_SIZE) as usize).take(15).enumerate() {
                self.phys_read(gpa + i as u64, std::slice::from_mut(byte));
            }
        }
    }
}

/// How far a mode itself keeps accesses from sharing checks.
pub fn least_sharing(mode: Mode) -> Sharing {
    if mode.is_most_careful() || mode.is_single() {
        Sharing::Off
    } else if mode.is_careful() {
        Sharing::Near
    } else {
        Sharing::All
    }
}

fn next_page(linear: u64) -> u64 {
    (linear & !(PAGE_SIZE - 1)).wrapping_add(PAGE_SIZE)
}
