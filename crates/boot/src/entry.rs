//! The state in which the boot processor enters a kernel.

use arch::registers::{cr0, cr4, efer, gpr, pte, rflags};
use arch::{CpuState, DescriptorTable, Segment, msr};
use memory::View;

use crate::{Error, layout};

/// Linux's `__BOOT_CS` and `__BOOT_DS`.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;

/// Identity-mapped with 2 MiB pages, which every 64-bit processor has; the kernel maps what lies above by itself.
const MAPPED: u64 = 4 << 30;
const LARGE_PAGE: u64 = 2 << 20;
const ENTRIES: u64 = 512;
const TABLE_SIZE: u64 = 4096;

/// 64-bit mode, paging on with the first 4 GiB mapped one to one, interrupts off, RSI = `boot_params`
/// (Linux `Documentation/arch/x86/boot.rst`, 64-bit boot protocol).
pub fn long_mode(view: &View, rip: u64, boot_params: u64) -> Result<CpuState, Error> {
    let code = Segment::flat_code(CODE_SELECTOR, true, 0);
    let mut state = flat(view, code)?;
    write_page_tables(view)?;
    state.cr0 = cr0::PE | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
    state.cr3 = layout::PAGE_TABLES;
    state.cr4 = cr4::PAE;
    state.msrs.push((msr::EFER, efer::LME | efer::LMA));
    state.rip = rip;
    state.gpr[gpr::RSI] = boot_params;
    state.gpr[gpr::RSP] = layout::STACK_TOP;
    Ok(state)
}

/// 32-bit protected mode, flat, paging and interrupts off, EBX = the start info (Xen `docs/misc/pvh.pandoc`).
pub fn protected_mode(view: &View, eip: u32, start_info: u64) -> Result<CpuState, Error> {
    let mut state = flat(view, Segment::flat_code(CODE_SELECTOR, false, 0))?;
    state.cr0 = cr0::PE | cr0::ET;
    state.rip = eip.into();
    state.gpr[gpr::RBX] = start_info;
    state.gpr[gpr::RSP] = layout::STACK_TOP;
    // A 32-bit TSS at 0 with the least limit, as PVH demands.
    state.tr.limit = 0x67;
    Ok(state)
}

/// 32-bit protected mode, flat, paging and interrupts off, ESI = `boot_params` (Linux `Documentation/arch/x86/boot.rst`,
/// 32-bit boot protocol).
pub fn linux_32(view: &View, eip: u32, boot_params: u64) -> Result<CpuState, Error> {
    let mut state = flat(view, Segment::flat_code(CODE_SELECTOR, false, 0))?;
    state.cr0 = cr0::PE | cr0::ET;
    state.rip = eip.into();
    state.gpr[gpr::RSI] = boot_params;
    state.gpr[gpr::RSP] = layout::STACK_TOP;
    Ok(state)
}

/// 32-bit protected mode, flat, paging and interrupts off, EAX = the loader's magic number, EBX = the information
/// (Multiboot 0.6.96, 3.2; Multiboot 2.0, 3.3).
pub fn multiboot(view: &View, eip: u32, magic: u32, information: u64) -> Result<CpuState, Error> {
    let mut state = protected_mode(view, eip, information)?;
    state.gpr[gpr::RAX] = magic.into();
    Ok(state)
}

/// Flat segments from a descriptor table in memory, and nothing else on.
fn flat(view: &View, code: Segment) -> Result<CpuState, Error> {
    let data = Segment::flat_data(DATA_SELECTOR, 0);
    let table = [0, 0, descriptor(&code), descriptor(&data)];
    let bytes: Vec<u8> = table.iter().flat_map(|d: &u64| d.to_le_bytes()).collect();
    crate::write(view, "the descriptor table", layout::GDT, &bytes)?;
    let mut state = CpuState::reset();
    state.gpr = [0; 16];
    state.rflags = rflags::FIXED;
    state.segments = [data, code, data, data, data, data];
    state.gdtr = DescriptorTable { base: layout::GDT, limit: bytes.len() as u16 - 1 };
    state.idtr = DescriptorTable::default();
    state.msrs = firmware_msrs();
    Ok(state)
}

/// What firmware leaves in the MSRs of every processor: memory type range registers on, write-back by default. Kernels
/// take ones that are off for a sign that PAT can't be used, and ones that differ between processors for a fault.
pub fn firmware_msrs() -> Vec<(u32, u64)> {
    const ENABLE: u64 = 1 << 11;
    const WRITE_BACK: u64 = 6;
    vec![(msr::MTRR_DEF_TYPE, ENABLE | WRITE_BACK)]
}

/// The descriptor that loads as this flat segment (Intel SDM 3A 3.4.5).
fn descriptor(segment: &Segment) -> u64 {
    const LIMIT: u64 = 0x000f_0000_0000_ffff;
    LIMIT | u64::from(segment.attributes) << 40
}

fn write_page_tables(view: &View) -> Result<(), Error> {
    let flags = pte::P | pte::W;
    let directories = MAPPED / LARGE_PAGE / ENTRIES;
    let pointers = layout::PAGE_TABLES + TABLE_SIZE;
    let first_directory = pointers + TABLE_SIZE;
    let mut tables = vec![0u64; (2 * ENTRIES) as usize];
    let upper =
        [(0, pointers)].into_iter().chain((0..directories).map(|i| (ENTRIES + i, first_directory + i * TABLE_SIZE)));
    for (index, table) in upper {
        if let Some(entry) = tables.get_mut(index as usize) {
            *entry = table | flags;
        }
    }
    tables.extend((0..MAPPED / LARGE_PAGE).map(|page| (page * LARGE_PAGE) | flags | pte::PS));
    let bytes: Vec<u8> = tables.into_iter().flat_map(u64::to_le_bytes).collect();
    crate::write(view, "the page tables", layout::PAGE_TABLES, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::Ram;
    use memory::vm_memory::{Bytes, GuestAddress};

    fn read(view: &View, address: u64) -> u64 {
        view.read_obj(GuestAddress(address)).unwrap()
    }

    /// Walks the tables as the processor would.
    fn translate(view: &View, cr3: u64, address: u64) -> Option<u64> {
        let index = |shift: u32| (address >> shift & 511) * 8;
        let next = |table: u64, shift| Some(read(view, table + index(shift))).filter(|e| e & pte::P != 0);
        let table = |entry: u64| entry & 0x000f_ffff_ffff_f000;
        let directory = next(table(next(cr3, 39)?), 30)?;
        let page = next(table(directory), 21)?;
        assert_ne!(page & pte::PS, 0);
        Some((page & 0x000f_ffff_ffe0_0000) | address & (LARGE_PAGE - 1))
    }

    #[test]
    fn the_first_4_gib_are_mapped_one_to_one_and_no_more() {
        let ram = Ram::new(16 << 20).unwrap();
        let state = long_mode(ram.view(), 0x1000200, layout::BOOT_PARAMS).unwrap();
        for address in [0, 0x7000, 0x1000200, 0x3fff_ffff, 0x4000_0000, 0xffff_ffff] {
            assert_eq!(translate(ram.view(), state.cr3, address), Some(address));
        }
        assert_eq!(translate(ram.view(), state.cr3, 1 << 32), None);
        assert_eq!(translate(ram.view(), state.cr3, 1 << 39), None);
    }

    #[test]
    fn selectors_load_what_is_already_loaded() {
        let ram = Ram::new(16 << 20).unwrap();
        let state = long_mode(ram.view(), 0, 0).unwrap();
        assert_eq!(read(ram.view(), state.gdtr.base + 0x10), 0x00af_9b00_0000_ffff);
        assert_eq!(read(ram.view(), state.gdtr.base + 0x18), 0x00cf_9300_0000_ffff);
        let state = protected_mode(ram.view(), 0, 0).unwrap();
        assert_eq!(read(ram.view(), state.gdtr.base + 0x10), 0x00cf_9b00_0000_ffff);
        assert_eq!(state.cr0 & cr0::PG, 0);
    }
}
