//! Multiboot kernels (Multiboot 0.6.96 and 2.0): what many systems other than Linux are, with files as modules.
//!
//! A header in the first 8 or 32 KiB says how the kernel is to be loaded: as an ELF image, or as its own address fields
//! have it. It is entered in 32-bit protected mode and told of memory, command line and modules.

use std::path::{Path, PathBuf};

use arch::CpuState;
use memory::vm_memory::{Bytes, GuestAddress};
use memory::{PAGE_SIZE, Ram};

use crate::elf::{Elf, Segment};
use crate::file::Image;
use crate::{Error, MAX_COMMAND_LINE, entry, layout};

/// Where a header is looked for, and at which steps.
const SEARCH: usize = 32 << 10;
const SEARCH_1: usize = 8 << 10;
const MAGIC_1: u32 = 0x1bad_b002;
const MAGIC_2: u32 = 0xe852_50d6;
/// What the kernel finds in EAX.
const BOOT_MAGIC_1: u32 = 0x2bad_b002;
const BOOT_MAGIC_2: u32 = 0x36d7_6289;
const LOADER_NAME: &str = "Ringer";

/// Flags of the first kind's header: the address fields count; of the lower 16, those that are known.
const HAS_ADDRESSES: u32 = 1 << 16;
const MUST_KNOW: u32 = 0xffff;
const KNOWN: u32 = 0b111;
/// Flags of its information: memory, command line, modules, memory map, name of the loader. And the device that a BIOS booted.
const INFORMATION: u32 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
const HAS_BOOT_DEVICE: u32 = 1 << 1;
const INFORMATION_SIZE: usize = 120;
/// Drive 80H, no partition.
const BOOT_DEVICE: u32 = 0x80ff_ffff;
/// What the option ROM has room for: the memory map that it asks the BIOS for.
const MAP_SIZE: u64 = 0x500;

/// Types of the second kind's tags.
mod tag {
    pub const REQUEST: u16 = 1;
    pub const ADDRESS: u16 = 2;
    pub const ENTRY: u16 = 3;
    pub const CONSOLE: u16 = 4;
    pub const MODULE_ALIGNMENT: u16 = 6;
    pub const RELOCATABLE: u16 = 10;
}
const OPTIONAL: u16 = 1;
/// And of its information.
mod told {
    pub const END: u32 = 0;
    pub const COMMAND_LINE: u32 = 1;
    pub const LOADER_NAME: u32 = 2;
    pub const MODULE: u32 = 3;
    pub const MEMORY: u32 = 4;
    pub const MEMORY_MAP: u32 = 6;
    pub const NEW_RSDP: u32 = 15;
}
const RSDP_SIZE: usize = 36;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// How a kernel without ELF headers is loaded; all zero-based ends are exclusive, 0 means "as far as the file goes".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Addresses {
    header: u32,
    load: u32,
    load_end: u32,
    bss_end: u32,
}

/// What the header asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    version: Version,
    /// In the file.
    offset: u64,
    addresses: Option<Addresses>,
    entry: Option<u32>,
}

/// A module in memory.
struct Module {
    start: u64,
    end: u64,
    /// With its arguments.
    name: String,
}

/// The 32-bit number at an offset; 0 behind the end.
fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn half(bytes: &[u8], at: usize) -> u16 {
    word(bytes, at) as u16
}

impl Header {
    /// Looks for a header. One that asks for what there is not is an error.
    pub fn find(image: &Image) -> Result<Option<Self>, Error> {
        let mut bytes = vec![0; SEARCH.min(usize::try_from(image.size()).unwrap_or(SEARCH))];
        image.read_at(&mut bytes, 0)?;
        for offset in (0..bytes.len()).step_by(4) {
            let header = bytes.get(offset..).unwrap_or_default();
            let sum = |words: &[usize]| words.iter().fold(0u32, |sum, at| sum.wrapping_add(word(header, *at)));
            if offset < SEARCH_1 && word(header, 0) == MAGIC_1 && sum(&[0, 4, 8]) == 0 {
                return Self::first(image, offset, header).map(Some);
            }
            if offset % 8 == 0 && word(header, 0) == MAGIC_2 && sum(&[0, 4, 8, 12]) == 0 {
                return Self::second(image, offset, header).map(Some);
            }
        }
        Ok(None)
    }

    fn first(image: &Image, offset: usize, header: &[u8]) -> Result<Self, Error> {
        let flags = word(header, 4);
        if flags & MUST_KNOW & !KNOWN != 0 {
            return Err(image.bad_header(format!("its Multiboot header asks for something unknown (flags {flags:#x})")));
        }
        let addresses = Addresses {
            header: word(header, 12),
            load: word(header, 16),
            load_end: word(header, 20),
            bss_end: word(header, 24),
        };
        let given = flags & HAS_ADDRESSES != 0;
        Ok(Header {
            version: Version::One,
            offset: offset as u64,
            addresses: given.then_some(addresses),
            entry: given.then(|| word(header, 28)),
        })
    }

    fn second(image: &Image, offset: usize, header: &[u8]) -> Result<Self, Error> {
        if word(header, 4) != 0 {
            return Err(image.bad_header("its Multiboot 2 header is for another processor"));
        }
        let mut found = Header { version: Version::Two, offset: offset as u64, addresses: None, entry: None };
        let length = (word(header, 8) as usize).min(header.len());
        let mut at = 16;
        while at + 8 <= length {
            let tag = header.get(at..length).unwrap_or_default();
            let (kind, flags, size) = (half(tag, 0), half(tag, 2), word(tag, 4) as usize);
            match kind {
                0 => break,
                tag::ADDRESS => {
                    found.addresses = Some(Addresses {
                        header: word(tag, 8),
                        load: word(tag, 12),
                        load_end: word(tag, 16),
                        bss_end: word(tag, 20),
                    });
                }
                tag::ENTRY => found.entry = Some(word(tag, 8)),
                // What is not told, the kernel finds missing.
                tag::REQUEST | tag::CONSOLE | tag::MODULE_ALIGNMENT | tag::RELOCATABLE => {}
                _ if flags & OPTIONAL != 0 => {}
                _ => {
                    let why = format!(
                        "its Multiboot 2 header needs what only a boot loader on firmware has (tag {kind}): boot it by \
                         GRUB from a disk, with --firmware"
                    );
                    return Err(image.bad_header(why));
                }
            }
            at += size.max(8).next_multiple_of(8);
        }
        Ok(found)
    }

    /// The one segment that the address fields describe.
    fn segment(&self, image: &Image, addresses: Addresses) -> Result<Segment, Error> {
        let before = u64::from(addresses.header.wrapping_sub(addresses.load));
        let Some(offset) = self.offset.checked_sub(before).filter(|_| addresses.load <= addresses.header) else {
            return Err(image.bad_header("its Multiboot header loads it from before its beginning"));
        };
        let (load, rest) = (u64::from(addresses.load), image.size() - offset);
        let file_size = match addresses.load_end {
            0 => rest,
            end => u64::from(end).saturating_sub(load),
        };
        image.need(offset, file_size)?;
        let memory_size = u64::from(addresses.bss_end).saturating_sub(load).max(file_size);
        Ok(Segment { address: load, offset, file_size, memory_size })
    }
}

/// A module as it is given: `FILE`, or `FILE ARGUMENTS` as in a boot loader's menu. A file of the whole name comes first.
fn open_module(given: &Path) -> Result<Image, Error> {
    let whole = Image::open(given);
    let split = given.to_str().and_then(|given| given.split_once(' '));
    match (whole, split) {
        (Err(_), Some((file, _))) => Image::open(Path::new(file)),
        (whole, _) => whole,
    }
}

/// A kernel with its modules, in memory.
struct Loaded {
    start: u64,
    end: u64,
    entry: u32,
    modules: Vec<Module>,
    command_line: String,
}

/// What is to be loaded.
#[derive(Clone, Copy)]
pub struct Kernel<'a> {
    pub image: &'a Image,
    pub header: &'a Header,
    pub elf: Option<&'a Elf>,
    pub modules: &'a [PathBuf],
    pub command_line: &'a str,
}

/// Loads the kernel and its modules, and writes what it is told.
pub fn load(ram: &Ram, kernel: Kernel) -> Result<CpuState, Error> {
    let Loaded { entry, modules, command_line, .. } = load_images(ram, kernel)?;
    let (magic, information) = match kernel.header.version {
        Version::One => (BOOT_MAGIC_1, first_information(ram, &command_line, &modules)),
        Version::Two => (BOOT_MAGIC_2, second_information(ram, &command_line, &modules)),
    };
    if information.len() as u64 > layout::MULTIBOOT.end - layout::MULTIBOOT.start {
        return Err(kernel.image.bad_header("command line and names of modules are too long"));
    }
    crate::write(ram.view(), "the Multiboot information", layout::MULTIBOOT.start, &information)?;
    entry::multiboot(ram.view(), entry, magic, layout::MULTIBOOT.start)
}

/// What a BIOS's option ROM puts into memory, and where it goes on.
#[derive(Debug, PartialEq, Eq)]
pub struct ForRom {
    pub entry: u32,
    /// The kernel, its modules, their names.
    pub address: u32,
    pub content: Vec<u8>,
    /// The information, to which the ROM adds how much memory there is.
    pub information_address: u32,
    pub information: Vec<u8>,
}

/// Makes one piece of the kernel and its modules, for a BIOS's option ROM to load.
pub fn for_rom(ram: &Ram, kernel: Kernel) -> Result<ForRom, Error> {
    if kernel.header.version == Version::Two {
        let why = "the option ROM of a BIOS loads kernels by Multiboot 1 only: leave --firmware out";
        return Err(kernel.image.bad_header(why));
    }
    let scratch = Ram::new(layout::low_end(ram))?;
    let loaded = load_images(&scratch, kernel)?;
    let mut content = vec![0; loaded.end.saturating_sub(loaded.start) as usize];
    let from = GuestAddress(loaded.start);
    scratch.view().read_slice(&mut content, from).map_err(|_| kernel.image.bad_header("it is not in one piece"))?;
    content.resize(content.len().next_multiple_of(4), 0);
    let mut strings = Pool { base: loaded.start as u32 + content.len() as u32, bytes: Vec::new() };
    let mut fields = strings.told(&loaded.command_line, &loaded.modules).to_vec();
    content.extend(strings.bytes);
    let map = layout::MULTIBOOT.start;
    fields.extend([(0, INFORMATION | HAS_BOOT_DEVICE), (12, BOOT_DEVICE), (48, map as u32)]);
    Ok(ForRom {
        entry: loaded.entry,
        address: loaded.start as u32,
        content,
        information_address: (map + MAP_SIZE) as u32,
        information: information(&fields),
    })
}

/// Loads the kernel and its modules.
fn load_images(ram: &Ram, kernel: Kernel) -> Result<Loaded, Error> {
    let Kernel { image, header, elf, modules, command_line } = kernel;
    let view = ram.view();
    let available = layout::low_end(ram);
    let check = |segment: &Segment| {
        let (start, end) = (segment.address, segment.address.saturating_add(segment.memory_size));
        let low = layout::LOW_KERNEL.contains(&start) && end <= layout::LOW_KERNEL.end;
        if start < layout::HIGH_MEMORY && !low {
            let low = layout::LOW_KERNEL;
            let why =
                format!("{start:#x} to {end:#x}, is neither from 1 MiB on nor in {:#x} to {:#x}", low.start, low.end);
            return Err(image.bad_header(format!("where it wants to be loaded, {why}")));
        }
        match end <= available {
            true => Ok(end),
            false => Err(Error::KernelTooLarge { path: image.path().to_owned(), needed: end, available }),
        }
    };
    let (start, end, entry) = match (header.addresses, elf) {
        (Some(addresses), _) => {
            let segment = header.segment(image, addresses)?;
            let end = check(&segment)?;
            segment.load(image, view)?;
            (segment.address, end, header.entry.unwrap_or(addresses.load))
        }
        (None, Some(elf)) => {
            elf.segments.iter().try_for_each(|segment| check(segment).map(drop))?;
            elf.load(image, view)?;
            // A header with its own entry is about that one; ELF's may be the virtual address of the same place.
            let own = u32::try_from(elf.entry).map_err(|_| image.bad_header("its entry is beyond 4 GiB"))?;
            let start = elf.segments.iter().map(|segment| segment.address).min().unwrap_or(elf.end);
            (start, elf.end, header.entry.unwrap_or(own))
        }
        (None, None) => return Err(image.bad_header("its Multiboot header says neither ELF nor where to load it")),
    };
    if command_line.len() > MAX_COMMAND_LINE {
        let (path, length) = (image.path().to_owned(), command_line.len());
        return Err(Error::CommandLineTooLong { path, length, limit: MAX_COMMAND_LINE });
    }
    // By convention the first word is the kernel's name.
    let command_line = format!("{} {command_line}", image.path().display()).trim_end().to_owned();
    let modules = load_modules(ram, modules, end, available)?;
    let end = modules.last().map_or(end, |module| module.end);
    Ok(Loaded { start, end, entry, modules, command_line })
}

/// Puts the modules behind the kernel, in high memory, each at a page of its own.
fn load_modules(ram: &Ram, modules: &[PathBuf], mut next: u64, available: u64) -> Result<Vec<Module>, Error> {
    let mut loaded = Vec::new();
    next = next.max(layout::HIGH_MEMORY);
    for given in modules {
        let module = open_module(given)?;
        let (start, size) = (next.next_multiple_of(PAGE_SIZE), module.size());
        let Some(end) = start.checked_add(size).filter(|end| *end <= available) else {
            let room = available.saturating_sub(start);
            return Err(Error::InitrdTooLarge { path: module.path().to_owned(), size, room });
        };
        module.read_to(ram.view(), "a module", start, 0, size)?;
        loaded.push(Module { start, end, name: given.display().to_string() });
        next = end;
    }
    Ok(loaded)
}

/// KiB from 0 and from 1 MiB on.
fn memory_sizes(ram: &Ram) -> [u32; 2] {
    let upper = layout::low_end(ram).saturating_sub(layout::HIGH_MEMORY) >> 10;
    [(layout::EBDA >> 10) as u32, upper as u32]
}

/// What information points to.
struct Pool {
    /// Where it will be.
    base: u32,
    bytes: Vec<u8>,
}

/// A field of the information: its offset, and what is there.
type Told = (usize, u32);

impl Pool {
    fn put(&mut self, bytes: &[u8]) -> u32 {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        let at = self.base + self.bytes.len() as u32;
        self.bytes.extend_from_slice(bytes);
        at
    }

    fn string(&mut self, text: &str) -> u32 {
        self.put(&[text.as_bytes(), &[0]].concat())
    }

    /// The fields for the command line, the modules and the loader's name.
    fn told(&mut self, command_line: &str, modules: &[Module]) -> [Told; 4] {
        let (command_line, loader) = (self.string(command_line), self.string(LOADER_NAME));
        let names: Vec<u32> = modules.iter().map(|module| self.string(&module.name)).collect();
        let entries =
            modules.iter().zip(names).flat_map(|(module, name)| [module.start as u32, module.end as u32, name, 0]);
        let list = self.put(&words(entries));
        [(16, command_line), (20, modules.len() as u32), (24, list), (64, loader)]
    }
}

fn information(fields: &[Told]) -> Vec<u8> {
    let mut information = vec![0; INFORMATION_SIZE];
    for &(at, value) in fields {
        information[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    information
}

/// The first kind's information, and behind it what it points to.
fn first_information(ram: &Ram, command_line: &str, modules: &[Module]) -> Vec<u8> {
    let mut pool = Pool { base: layout::MULTIBOOT.start as u32 + INFORMATION_SIZE as u32, bytes: Vec::new() };
    let mut fields = pool.told(command_line, modules).to_vec();
    let map: Vec<u8> = layout::memory_map(ram).iter().flat_map(|range| map_entry(range, Some(20))).collect();
    let [lower, upper] = memory_sizes(ram);
    fields.extend([(0, INFORMATION), (4, lower), (8, upper), (44, map.len() as u32), (48, pool.put(&map))]);
    let mut information = information(&fields);
    information.extend(pool.bytes);
    information
}

/// An entry of the memory map: with the size of what follows (the first kind), or with a reserved word at its end.
fn map_entry(range: &layout::Range, size: Option<u32>) -> Vec<u8> {
    let mut entry = size.map_or(Vec::new(), |size| size.to_le_bytes().to_vec());
    entry.extend(range.start.to_le_bytes());
    entry.extend(range.size.to_le_bytes());
    entry.extend((range.kind as u32).to_le_bytes());
    if size.is_none() {
        entry.extend([0; 4]);
    }
    entry
}

fn words(values: impl IntoIterator<Item = u32>) -> Vec<u8> {
    values.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// The second kind's information: a list of tags.
fn second_information(ram: &Ram, command_line: &str, modules: &[Module]) -> Vec<u8> {
    let mut information = vec![0; 8];
    let mut tell = |kind: u32, parts: &[&[u8]]| {
        information.resize(information.len().next_multiple_of(8), 0);
        let size = 8 + parts.iter().map(|part| part.len()).sum::<usize>();
        information.extend(words([kind, size as u32]));
        parts.iter().for_each(|part| information.extend_from_slice(part));
    };
    tell(told::COMMAND_LINE, &[command_line.as_bytes(), &[0]]);
    tell(told::LOADER_NAME, &[LOADER_NAME.as_bytes(), &[0]]);
    for module in modules {
        tell(told::MODULE, &[&words([module.start as u32, module.end as u32]), module.name.as_bytes(), &[0]]);
    }
    tell(told::MEMORY, &[&words(memory_sizes(ram))]);
    let map: Vec<u8> = layout::memory_map(ram).iter().flat_map(|range| map_entry(range, None)).collect();
    // The size of an entry, and its version.
    tell(told::MEMORY_MAP, &[&words([24, 0]), &map]);
    let mut rsdp = [0; RSDP_SIZE];
    if ram.view().read_slice(&mut rsdp, GuestAddress(layout::ACPI)).is_ok() {
        tell(told::NEW_RSDP, &[&rsdp]);
    }
    tell(told::END, &[]);
    let size = (information.len() as u32).to_le_bytes();
    information[..4].copy_from_slice(&size);
    information
}

#[cfg(test)]
#[path = "multiboot_test.rs"]
mod tests;
