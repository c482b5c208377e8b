//! ELF images by their PVH entry (Xen `docs/misc/pvh.pandoc`, `xen/include/public/arch-x86/hvm/start_info.h`).
//!
//! The note XEN_ELFNOTE_PHYS32_ENTRY names the physical address at which the image is entered in 32-bit protected mode,
//! whatever the image's own class. The same code reads both classes.

use std::fs::File;

use arch::CpuState;
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use memory::vm_memory::ByteValued;
use memory::{Ram, View};
use object::Endianness;
use object::elf::{EM_386, EM_X86_64, ET_DYN, ET_EXEC, FileHeader32, FileHeader64, PN_XNUM, PT_LOAD, PT_NOTE};
use object::read::ReadCache;
use object::read::elf::{FileHeader, ProgramHeader};

use crate::file::Image;
use crate::initrd::{self, Placement};
use crate::{Error, MAX_COMMAND_LINE, entry, layout};

/// The note's owner and type (Xen `xen/include/public/elfnote.h`).
const NOTE_OWNER: &[u8] = b"Xen";
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// No note segment of a real kernel comes near this size; it bounds what is read at once.
const MAX_NOTES: u64 = 1 << 20;
/// Offset of the class in an ELF file, and its value for 64 bits.
const CLASS_OFFSET: u64 = 4;
const CLASS_64: u8 = 2;

/// A part of the file that goes to memory, and how much zero follows it.
struct Segment {
    address: u64,
    offset: u64,
    file_size: u64,
    memory_size: u64,
}

/// An ELF image, whatever its class.
struct Kernel {
    segments: Vec<Segment>,
    entry: u32,
    /// Of the highest segment in memory.
    end: u64,
}

/// Loads the segments, the RAM disk and the start info.
pub fn load(ram: &Ram, image: &Image, initrd: Option<&Image>, command_line: &str) -> Result<CpuState, Error> {
    let mut class = [0];
    image.read_at(&mut class, CLASS_OFFSET)?;
    let kernel = match class {
        [CLASS_64] => Kernel::parse::<FileHeader64<Endianness>>(image, 64)?,
        _ => Kernel::parse::<FileHeader32<Endianness>>(image, 32)?,
    };
    let available = layout::low_end(ram);
    if kernel.end > available {
        return Err(Error::KernelTooLarge { path: image.path().to_owned(), needed: kernel.end, available });
    }
    let initrd_place = initrd::place(initrd, kernel.end, available)?;
    let view = ram.view();
    crate::write_command_line(view, image, MAX_COMMAND_LINE, command_line)?;
    for segment in &kernel.segments {
        image.read_to(view, "the kernel", segment.address, segment.offset, segment.file_size)?;
        clear(view, segment.address + segment.file_size, segment.memory_size - segment.file_size)?;
    }
    if let Some(initrd) = initrd {
        initrd.read_to(view, "the RAM disk", initrd_place.start, 0, initrd_place.size)?;
    }
    write_start_info(ram, initrd_place)?;
    entry::protected_mode(view, kernel.entry, layout::PVH_START_INFO)
}

/// RAM is not zero when a machine that has been running is reset.
fn clear(view: &View, start: u64, size: u64) -> Result<(), Error> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut done = 0;
    while done < size {
        let part = ZEROS.get(..(size - done) as usize).unwrap_or(&ZEROS);
        crate::write(view, "the kernel", start + done, part)?;
        done += part.len() as u64;
    }
    Ok(())
}

impl Kernel {
    fn parse<H: FileHeader<Endian = Endianness>>(image: &Image, bits: u8) -> Result<Self, Error> {
        let cache: ReadCache<&File> = ReadCache::new(image.file());
        let broken = |e: object::Error| image.bad_header(e.to_string());
        let header = H::parse(&cache).map_err(broken)?;
        let endian = header.endian().map_err(broken)?;
        let machine = header.e_machine(endian);
        if !matches!(machine, EM_X86_64 | EM_386) || endian != Endianness::Little {
            return Err(image.bad_header(format!("its machine (ELF number {}) is not x86", machine.0)));
        }
        if !matches!(header.e_type(endian), ET_EXEC | ET_DYN) {
            return Err(image.bad_header("it is an object file, not a linked image"));
        }
        // More are counted in a section header; reading as many as that may say is not bounded by much.
        if header.e_phnum(endian) == PN_XNUM {
            return Err(image.bad_header("it has more than 65534 program headers"));
        }
        let programs = header.program_headers(endian, &cache).map_err(broken)?;
        let mut entry = None;
        for program in programs.iter().filter(|p| p.p_type(endian) == PT_NOTE) {
            entry = entry.or(pvh_entry(image, &cache, program, endian)?);
        }
        let entry = entry.ok_or_else(|| Error::NoPvhNote { path: image.path().to_owned(), bits })?;
        let mut kernel = Kernel { segments: Vec::new(), entry, end: 0 };
        for program in programs.iter().filter(|p| p.p_type(endian) == PT_LOAD) {
            kernel.add(image, program, endian)?;
        }
        let entry = u64::from(entry);
        if !kernel.segments.iter().any(|s| (s.address..s.address.saturating_add(s.memory_size)).contains(&entry)) {
            return Err(image.bad_header(format!("its PVH entry {entry:#x} is in none of its segments")));
        }
        Ok(kernel)
    }

    fn add<P: ProgramHeader<Endian = Endianness>>(
        &mut self,
        image: &Image,
        program: &P,
        endian: Endianness,
    ) -> Result<(), Error> {
        let segment = Segment {
            address: program.p_paddr(endian).into(),
            offset: program.p_offset(endian).into(),
            file_size: program.p_filesz(endian).into(),
            memory_size: program.p_memsz(endian).into(),
        };
        if segment.memory_size == 0 {
            return Ok(());
        }
        if segment.file_size > segment.memory_size {
            return Err(image.bad_header("one of its segments is larger in the file than in memory"));
        }
        if segment.address < layout::HIGH_MEMORY {
            return Err(image.bad_header(format!("it wants to be loaded at {:#x}, below 1 MiB", segment.address)));
        }
        image.need(segment.offset, segment.file_size)?;
        self.end = self.end.max(segment.address.saturating_add(segment.memory_size));
        self.segments.push(segment);
        Ok(())
    }
}

/// The entry that a note segment names, if it does. The note holds one word of the image's class.
fn pvh_entry<P: ProgramHeader<Endian = Endianness>>(
    image: &Image,
    cache: &ReadCache<&File>,
    program: &P,
    endian: Endianness,
) -> Result<Option<u32>, Error> {
    let broken = |e: object::Error| image.bad_header(e.to_string());
    if program.p_filesz(endian).into() > MAX_NOTES {
        return Err(image.bad_header("its notes are larger than 1 MiB"));
    }
    let Some(mut notes) = program.notes(endian, cache).map_err(broken)? else {
        return Ok(None);
    };
    while let Some(note) = notes.next().map_err(broken)? {
        if note.name() == NOTE_OWNER && note.n_type(endian).0 == XEN_ELFNOTE_PHYS32_ENTRY {
            let entry = match (note.desc().first_chunk(), note.desc().first_chunk()) {
                (Some(wide), _) => u32::try_from(u64::from_le_bytes(*wide)).ok(),
                (None, narrow) => narrow.map(|bytes| u32::from_le_bytes(*bytes)),
            };
            return entry.map(Some).ok_or_else(|| image.bad_header("its PVH note has no 32-bit address"));
        }
    }
    Ok(None)
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
