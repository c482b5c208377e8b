//! Where things are in guest memory, and the memory map that says so.
//!
//! Below 1 MiB as on a PC: the BIOS data area, room for what the kernel reads once at its start, the extended BIOS data
//! area, the video window, and the BIOS area, in which kernels look for RSDP and SMBIOS. The kernel itself lies at 1 MiB
//! or above; only a Multiboot kernel may ask for low memory.

use memory::{Ram, View};

use crate::Error;

/// The BIOS data area's fields that kernels read: EBDA segment, and KiB of low memory.
const BDA_EBDA_SEGMENT: u64 = 0x40e;
const BDA_LOW_MEMORY_KIB: u64 = 0x413;
/// The boot descriptor table.
pub const GDT: u64 = 0x500;
/// PVH: the start info, the module list, the memory map.
pub const PVH_START_INFO: u64 = 0x6000;
pub const PVH_MODULES: u64 = 0x6040;
pub const PVH_MEMORY_MAP: u64 = 0x6100;
/// Linux: the zero page.
pub const BOOT_PARAMS: u64 = 0x7000;
/// The stack pointer at entry; nothing needs the stack, but it should be RAM.
pub const STACK_TOP: u64 = 0x8ff0;
/// Page tables for the first 4 GiB: one PML4, one PDPT, four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Where a Multiboot kernel may lie, if not in high memory.
pub const LOW_KERNEL: std::ops::Range<u64> = 0x1000..0x8_0000;
/// What it is told, up to the end of the area.
pub const MULTIBOOT: std::ops::Range<u64> = 0x8_0000..0x9_0000;
/// The extended BIOS data area.
pub const EBDA: u64 = 0x9_fc00;
const VIDEO: u64 = 0xa_0000;
/// ACPI tables, RSDP first: kernels search this area for it at 16-byte steps (ACPI 6.5, 5.2.5.1).
pub const ACPI: u64 = 0xe_0000;
/// SMBIOS entry point and tables: searched from here on (SMBIOS 3.7, 5.2).
pub const SMBIOS: u64 = 0xf_0000;
/// Where kernels lie.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// What a range of the memory map is; the discriminants are those of E820 (and of PVH, which has taken them over).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    Ram = 1,
    Reserved = 2,
}

/// One range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    pub size: u64,
    pub kind: Kind,
}

/// The memory map, ascending.
pub fn memory_map(ram: &Ram) -> Vec<Range> {
    let range = |start, end: u64, kind| Range { start, size: end.saturating_sub(start), kind };
    let mut map = vec![
        range(0, EBDA, Kind::Ram),
        range(EBDA, VIDEO, Kind::Reserved),
        range(ACPI, HIGH_MEMORY, Kind::Reserved),
        range(HIGH_MEMORY, low_end(ram), Kind::Ram),
        Range { start: chipset::constants::ECAM_BASE, size: chipset::constants::ECAM_SIZE, kind: Kind::Reserved },
    ];
    let high = ram.regions().iter().filter(|r| r.start >= memory::HIGH_START);
    map.extend(high.map(|r| Range { start: r.start, size: r.size, kind: Kind::Ram }));
    map
}

/// The end of RAM below 4 GiB.
pub fn low_end(ram: &Ram) -> u64 {
    ram.regions().first().map_or(0, |r| r.start + r.size)
}

/// The end of all RAM, at least 4 GiB.
pub fn high_end(ram: &Ram) -> u64 {
    ram.regions().last().map_or(0, |r| r.start + r.size).max(memory::HIGH_START)
}

/// What kernels look up in the BIOS data area to learn where low RAM ends.
pub fn write_bios_data(view: &View) -> Result<(), Error> {
    crate::write(view, "the BIOS data area", BDA_EBDA_SEGMENT, &((EBDA >> 4) as u16).to_le_bytes())?;
    crate::write(view, "the BIOS data area", BDA_LOW_MEMORY_KIB, &((EBDA >> 10) as u16).to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_ascend_and_don_t_overlap() {
        for size in [4 << 20, 64 << 20, memory::HOLE_START, 8 << 30] {
            let map = memory_map(&Ram::new(size).unwrap());
            assert!(map.windows(2).all(|w| w[0].start + w[0].size <= w[1].start), "{map:x?}");
        }
    }

    #[test]
    fn the_map_has_all_ram_but_the_legacy_area() {
        for size in [4 << 20, 4 << 30, 6 << 30] {
            let map = memory_map(&Ram::new(size).unwrap());
            let total: u64 = map.iter().filter(|r| r.kind == Kind::Ram).map(|r| r.size).sum();
            assert_eq!(total, size - (HIGH_MEMORY - EBDA));
        }
    }
}
