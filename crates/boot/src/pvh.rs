//! ELF images by their PVH entry (Xen `docs/misc/pvh.pandoc`, `xen/include/public/arch-x86/hvm/start_info.h`).

use arch::CpuState;
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use memory::Ram;
use memory::vm_memory::ByteValued;

use crate::elf::Elf;
use crate::file::Image;
use crate::initrd::{self, Placement};
use crate::{Error, MAX_COMMAND_LINE, entry, layout};

/// Loads the segments, the RAM disk and the start info.
pub fn load(
    ram: &Ram,
    image: &Image,
    kernel: &Elf,
    initrd: Option<&Image>,
    command_line: &str,
) -> Result<CpuState, Error> {
    let no_note = Error::NoPvhNote { path: image.path().to_owned(), bits: kernel.bits };
    let entry = kernel.pvh_entry.ok_or(no_note)?;
    if !kernel.contains(entry.into()) {
        return Err(image.bad_header(format!("its PVH entry {entry:#x} is in none of its segments")));
    }
    if let Some(low) = kernel.segments.iter().find(|segment| segment.address < layout::HIGH_MEMORY) {
        return Err(image.bad_header(format!("it wants to be loaded at {:#x}, below 1 MiB", low.address)));
    }
    let available = layout::low_end(ram);
    if kernel.end > available {
        return Err(Error::KernelTooLarge { path: image.path().to_owned(), needed: kernel.end, available });
    }
    let initrd_place = initrd::place(initrd, kernel.end, available)?;
    let view = ram.view();
    crate::write_command_line(view, image, MAX_COMMAND_LINE, command_line)?;
    kernel.load(image, view)?;
    if let Some(initrd) = initrd {
        initrd.read_to(view, "the RAM disk", initrd_place.start, 0, initrd_place.size)?;
    }
    write_start_info(ram, initrd_place)?;
    entry::protected_mode(view, entry, layout::PVH_START_INFO)
}

fn write_start_info(ram: &Ram, initrd: Placement) -> Result<(), Error> {
    let map: Vec<_> = layout::memory_map(ram)
        .iter()
        .map(|r| hvm_memmap_table_entry { addr: r.start, size: r.size, type_: r.kind as u32, reserved: 0 })
        .collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::from(initrd.size > 0),
        modlist_paddr: layout::PVH_MODULES,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: layout::ACPI,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    let module = hvm_modlist_entry { paddr: initrd.start, size: initrd.size, ..hvm_modlist_entry::default() };
    let view = ram.view();
    let what = "the PVH start info";
    crate::write(view, what, layout::PVH_START_INFO, info.as_slice())?;
    crate::write(view, what, layout::PVH_MODULES, module.as_slice())?;
    let map: Vec<u8> = map.iter().flat_map(|entry| entry.as_slice().to_vec()).collect();
    crate::write(view, what, layout::PVH_MEMORY_MAP, &map)
}

#[cfg(test)]
#[path = "pvh_test.rs"]
mod tests;
