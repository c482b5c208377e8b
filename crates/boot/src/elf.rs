//! ELF images: where their segments go, and where they are entered.
//!
//! The same code reads both classes. The note XEN_ELFNOTE_PHYS32_ENTRY names the physical address at which an image is
//! entered in 32-bit protected mode, whatever its own class (`pvh`).

use std::fs::File;

use memory::View;
use object::Endianness;
use object::elf::{EM_386, EM_X86_64, ET_DYN, ET_EXEC, FileHeader32, FileHeader64, PN_XNUM, PT_LOAD, PT_NOTE};
use object::read::ReadCache;
use object::read::elf::{FileHeader, ProgramHeader};

use crate::Error;
use crate::file::Image;

/// The note's owner and type (Xen `xen/include/public/elfnote.h`).
const NOTE_OWNER: &[u8] = b"Xen";
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// No note segment of a real kernel comes near this size; it bounds what is read at once.
const MAX_NOTES: u64 = 1 << 20;
/// Offset of the class in an ELF file, and its value for 64 bits.
const CLASS_OFFSET: u64 = 4;
pub const CLASS_64: u8 = 2;

/// A part of the file that goes to memory, and how much zero follows it.
pub struct Segment {
    pub address: u64,
    pub offset: u64,
    pub file_size: u64,
    pub memory_size: u64,
}

/// An ELF image, whatever its class.
pub struct Elf {
    pub segments: Vec<Segment>,
    pub bits: u8,
    /// What the note says.
    pub pvh_entry: Option<u32>,
    /// What the header says: a virtual address.
    pub entry: u64,
    /// Of the highest segment in memory.
    pub end: u64,
}

impl Elf {
    /// Reads and checks the headers.
    pub fn open(image: &Image) -> Result<Self, Error> {
        let mut class = [0];
        image.read_at(&mut class, CLASS_OFFSET)?;
        match class {
            [CLASS_64] => Self::parse::<FileHeader64<Endianness>>(image, 64),
            _ => Self::parse::<FileHeader32<Endianness>>(image, 32),
        }
    }

    /// Whether a physical address is in one of the segments.
    pub fn contains(&self, address: u64) -> bool {
        self.segments.iter().any(|s| (s.address..s.address.saturating_add(s.memory_size)).contains(&address))
    }

    /// Puts the segments where they are to be.
    pub fn load(&self, image: &Image, view: &View) -> Result<(), Error> {
        self.segments.iter().try_for_each(|segment| segment.load(image, view))
    }

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
        let own = header.e_entry(endian).into();
        let mut elf = Elf { segments: Vec::new(), bits, pvh_entry: entry, entry: own, end: 0 };
        for program in programs.iter().filter(|p| p.p_type(endian) == PT_LOAD) {
            elf.add(image, program, endian)?;
        }
        Ok(elf)
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

impl Segment {
    /// Reads the segment to where it is to be, and clears what follows.
    pub fn load(&self, image: &Image, view: &View) -> Result<(), Error> {
        image.read_to(view, "the kernel", self.address, self.offset, self.file_size)?;
        clear(view, self.address + self.file_size, self.memory_size - self.file_size)
    }
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
