//! The page walk (Intel SDM 3A chapter 4): what a linear address maps to, and whether an access may use it.
//!
//! One loop serves the three formats: 4-level (long mode), PAE and 32-bit. Entries are read as aligned 64-bit words
//! and their accessed and dirty bits set by compare-and-swap on the same word, as a processor does: an entry that
//! changed meanwhile makes the walk start again. Those bits are set only once the access is known to be allowed.

use std::sync::atomic::Ordering;

use arch::Exception;
use arch::exception::pf;
use arch::registers::{cr0, cr4, efer, pte};

use crate::cpu::{Context, Vcpu};

/// What an access wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
    Execute,
}

/// What a linear address maps to, seen through one [`Context`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The guest-physical address (not only its page).
    pub gpa: u64,
    /// Data reads are allowed.
    pub readable: bool,
    /// Data writes are allowed, and the dirty bit is set already.
    pub writable: bool,
    pub executable: bool,
    /// A user-mode address: U/S is set at every level.
    pub user: bool,
    /// Survives a change of CR3 (G set and CR4.PGE).
    pub global: bool,
    /// Part of a page larger than 4 KiB.
    pub large: bool,
}

/// Bits 51:12.
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    /// Two levels of 4-byte entries.
    Legacy,
    /// PDPT of four entries, then two levels of 8-byte ones.
    Pae,
    FourLevel,
}

/// An entry that the walk used.
#[derive(Clone, Copy, Default)]
struct Step {
    /// The aligned 64-bit word that holds the entry.
    word_gpa: u64,
    word: u64,
    /// Where the entry starts in the word: 0 or 32.
    shift: u32,
    /// Accessed and dirty bits to set.
    missing: u64,
}

/// Translates `va` for `access` and sets accessed and dirty bits. `va` is taken to be canonical, or below 4 GiB
/// outside long mode.
pub fn walk(cpu: &mut Vcpu, va: u64, access: Access, context: Context) -> Result<Mapping, Exception> {
    if !cpu.paging() {
        return Ok(Mapping {
            gpa: va & 0xffff_ffff,
            readable: true,
            writable: true,
            executable: true,
            user: true,
            global: false,
            large: false,
        });
    }
    loop {
        let mut steps = [Step::default(); 4];
        // One copy of the loop for each format: this is what a TLB miss costs.
        let (mapping, used) = if cpu.long_mode() {
            walk_once(cpu, va, access, context, Format::FourLevel, &mut steps)?
        } else if cpu.cr4 & cr4::PAE != 0 {
            walk_once(cpu, va, access, context, Format::Pae, &mut steps)?
        } else {
            walk_once(cpu, va, access, context, Format::Legacy, &mut steps)?
        };
        if steps.iter().take(used).all(|step| step.missing == 0 || set_bits(cpu, step)) {
            return Ok(mapping);
        }
    }
}

/// Whether a read of `va` through a context would not fault. For 64-bit mode.
pub fn is_readable(cpu: &Vcpu, va: u64, context: Context) -> bool {
    walk_once(cpu, va, Access::Read, context, Format::FourLevel, &mut Default::default()).is_ok()
}

/// What `va` maps to, seen through a context, if a read of it would change no accessed bit and fault not: as a processor
/// looks that looks ahead. For 64-bit mode.
pub fn peek(cpu: &Vcpu, va: u64, context: Context) -> Option<Mapping> {
    Peeks::new(context).peek(cpu, va)
}

/// [`peek`] for one page after another: of a table of 512 entries it walks to the first, and to those of other rights than the
/// one before.
pub struct Peeks {
    context: Context,
    /// The address of the last page, its entry and where that is, and what it says.
    last: Option<(u64, Step, Mapping)>,
}

impl Peeks {
    pub fn new(context: Context) -> Self {
        Peeks { context, last: None }
    }

    pub fn peek(&mut self, cpu: &Vcpu, va: u64) -> Option<Mapping> {
        if let Some((last, step, mapping)) = &self.last
            && (last ^ va) >> 21 == 0
        {
            let word_gpa = step.word_gpa & !0xfff | va >> 12 << 3 & 0xff8;
            let entry = cpu.phys_read_u64(word_gpa);
            if (entry ^ step.word) & !ADDRESS == 0 && entry & beyond_physical(cpu) == 0 {
                return Some(Mapping { gpa: entry & ADDRESS | va & 0xfff, ..*mapping });
            }
        }
        let mut steps = [Step::default(); 4];
        let (mapping, used) = walk_once(cpu, va, Access::Read, self.context, Format::FourLevel, &mut steps).ok()?;
        let plain = steps.iter().take(used).all(|step| step.missing == 0);
        self.last = steps.last().filter(|_| plain && used == steps.len()).map(|step| (va, *step, mapping));
        plain.then_some(mapping)
    }
}

/// Sets a step's missing bits; false if its entry is no longer what the walk saw.
fn set_bits(cpu: &mut Vcpu, step: &Step) -> bool {
    let Some(word) = cpu.phys_atomic(step.word_gpa) else {
        return true; // tables outside RAM: there is nothing that could keep the bits
    };
    let new = step.word | step.missing << step.shift;
    if word.compare_exchange(step.word, new, Ordering::AcqRel, Ordering::Relaxed).is_err() {
        return false;
    }
    cpu.ram_stored(step.word_gpa, 8);
    true
}

#[inline(always)]
fn walk_once(
    cpu: &Vcpu,
    va: u64,
    access: Access,
    context: Context,
    format: Format,
    steps: &mut [Step; 4],
) -> Result<(Mapping, usize), Exception> {
    let (top, index_bits, root) = match format {
        Format::FourLevel => (4, 9, cpu.cr3 & ADDRESS),
        Format::Pae => (3, 9, cpu.cr3 & 0xffff_ffe0),
        Format::Legacy => (2, 10, cpu.cr3 & 0xffff_f000),
    };
    let mut table = root;
    let (mut all, mut any) = (u64::MAX, 0);
    let mut used = 0;
    for level in (1..=top).rev() {
        let shift = 12 + (level - 1) * index_bits;
        let index = va >> shift & ((1 << index_bits) - 1);
        let index = if format == Format::Pae && level == 3 { index & 3 } else { index };
        let (step, entry) = read_entry(cpu, table, index, format);
        if entry & pte::P == 0 {
            return Err(page_fault(cpu, va, access, context, 0));
        }
        let leaf = level == 1 || entry & pte::PS != 0 && may_be_large(cpu, format, level);
        if entry & reserved_bits(cpu, format, level, leaf) != 0 {
            return Err(page_fault(cpu, va, access, context, pf::PRESENT | pf::RESERVED));
        }
        if format == Format::Pae && level == 3 {
            // A PDPTE has no rights and no accessed bit.
            table = entry & ADDRESS;
            continue;
        }
        all &= entry;
        any |= entry;
        let mut wanted = pte::A;
        if leaf && access == Access::Write {
            wanted |= pte::D;
        }
        steps[used] = Step { missing: wanted & !entry, ..step };
        used += 1;
        if leaf {
            let mask = (1 << shift) - 1;
            let gpa = frame(format, level, entry) & !mask | va & mask;
            let user = all & pte::U != 0;
            let rights = Rights::of(cpu, context, user, all & pte::W != 0, any & pte::NX != 0, entry);
            rights.check(cpu, va, access, context)?;
            let mapping = Mapping {
                gpa,
                readable: rights.read,
                writable: rights.write && (entry & pte::D != 0 || access == Access::Write),
                executable: rights.execute,
                user,
                global: entry & pte::G != 0 && cpu.cr4 & cr4::PGE != 0,
                large: level > 1,
            };
            return Ok((mapping, used));
        }
        table = entry & ADDRESS;
    }
    unreachable!("level 1 is always a leaf")
}

#[inline(always)]
fn read_entry(cpu: &Vcpu, table: u64, index: u64, format: Format) -> (Step, u64) {
    let (gpa, shift) = match format {
        Format::Legacy => (table + index * 4, (index as u32 & 1) * 32),
        Format::Pae | Format::FourLevel => (table + index * 8, 0),
    };
    let word_gpa = gpa & !7;
    let word = cpu.phys_read_u64(word_gpa);
    let entry = if format == Format::Legacy { word >> shift & 0xffff_ffff } else { word };
    (Step { word_gpa, word, shift, missing: 0 }, entry)
}

/// Whether PS at this level means a large page.
#[inline(always)]
fn may_be_large(cpu: &Vcpu, format: Format, level: u32) -> bool {
    match format {
        Format::FourLevel => level == 2 || level == 3,
        Format::Pae => level == 2,
        Format::Legacy => level == 2 && cpu.cr4 & cr4::PSE != 0,
    }
}

/// Bits that must be zero (Intel SDM 3A tables 4-4 to 4-19).
#[inline(always)]
fn reserved_bits(cpu: &Vcpu, format: Format, level: u32, leaf: bool) -> u64 {
    let no_execute = if cpu.msrs.efer & efer::NXE == 0 { pte::NX } else { 0 };
    let beyond_physical = beyond_physical(cpu);
    let large_offset = match (leaf, level) {
        (true, 2) => 0x1f_e000,
        (true, 3) => 0x3fff_e000,
        _ => 0,
    };
    match format {
        // PSE-36: bits 20:13 are address bits 39:32.
        Format::Legacy if leaf && level == 2 => 1 << 21,
        Format::Legacy => 0,
        Format::Pae if level == 3 => beyond_physical | 0xfff0_0000_0000_01e6,
        Format::Pae => beyond_physical | no_execute | 0x7ff0_0000_0000_0000 | large_offset,
        Format::FourLevel => {
            let page_size = if level == 4 { pte::PS } else { 0 };
            beyond_physical | no_execute | page_size | large_offset
        }
    }
}

/// Address bits above MAXPHYADDR, which CPUID leaf 8000_0008H reports.
#[inline(always)]
fn beyond_physical(cpu: &Vcpu) -> u64 {
    ADDRESS & !((1 << cpu.machine.cpuid.physical_bits()) - 1)
}

/// The physical address that a leaf gives, low bits undefined for large pages.
fn frame(format: Format, level: u32, entry: u64) -> u64 {
    match (format, level) {
        (Format::Legacy, 2) => entry & 0xffc0_0000 | (entry & 0x1f_e000) << 19,
        (Format::Legacy, _) => entry & 0xffff_f000,
        _ => entry & ADDRESS,
    }
}

/// What the paging structures and the processor's modes allow together (Intel SDM 3A 4.6).
struct Rights {
    read: bool,
    write: bool,
    execute: bool,
    /// A data access of this kind is forbidden by the protection key.
    key_denies_read: bool,
    key_denies_write: bool,
}

impl Rights {
    #[inline(always)]
    fn of(cpu: &Vcpu, context: Context, user_page: bool, w: bool, nx: bool, leaf: u64) -> Self {
        let user_mode = context == Context::User;
        let write_protect = user_mode || cpu.cr0 & cr0::WP != 0;
        let (mut key_denies_read, mut key_denies_write) = (false, false);
        if user_page && cpu.cr4 & cr4::PKE != 0 && cpu.long_mode() {
            let key = leaf >> pte::PKEY_SHIFT & 15;
            let bits = cpu.pkru >> (2 * key);
            key_denies_read = bits & 1 != 0;
            key_denies_write = key_denies_read || bits & 2 != 0 && write_protect;
        }
        let data = match context {
            Context::User => user_page,
            Context::Supervisor => !user_page,
            Context::SupervisorUser => true,
        };
        let fetch = if user_mode { user_page } else { !(user_page && cpu.cr4 & cr4::SMEP != 0) };
        Rights {
            read: data && !key_denies_read,
            write: data && (w || !write_protect) && !key_denies_write,
            execute: fetch && !nx,
            key_denies_read,
            key_denies_write,
        }
    }

    fn check(&self, cpu: &Vcpu, va: u64, access: Access, context: Context) -> Result<(), Exception> {
        let (allowed, key_denies) = match access {
            Access::Read => (self.read, self.key_denies_read),
            Access::Write => (self.write, self.key_denies_write),
            Access::Execute => (self.execute, false),
        };
        if allowed {
            return Ok(());
        }
        let key = if key_denies { pf::PROTECTION_KEY } else { 0 };
        Err(page_fault(cpu, va, access, context, pf::PRESENT | key))
    }
}

/// #PF with `cause` and the bits that describe the access (Intel SDM 3A 4.7).
#[cold]
fn page_fault(cpu: &Vcpu, va: u64, access: Access, context: Context, cause: u32) -> Exception {
    let mut code = cause;
    if context == Context::User {
        code |= pf::USER;
    }
    let no_execute = cpu.cr4 & cr4::PAE != 0 && cpu.msrs.efer & efer::NXE != 0;
    match access {
        Access::Read => {}
        Access::Write => code |= pf::WRITE,
        Access::Execute if no_execute || cpu.cr4 & cr4::SMEP != 0 => code |= pf::FETCH,
        Access::Execute => {}
    }
    Exception::page_fault(code, va)
}
