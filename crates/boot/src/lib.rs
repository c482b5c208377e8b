//! Direct kernel boot: what a boot loader and firmware would have left in memory when the kernel starts.
//!
//! [`load`] is all of it. It opens the kernel, tells by its header what it is, and lays into RAM
//! - the kernel: a Multiboot kernel with its modules (`multiboot`), a bzImage by the 64-bit or the 32-bit boot protocol (`bzimage`) or an ELF image by its PVH entry (`pvh`),
//! - the initial RAM disk, as high as kernel and RAM allow (`initrd`),
//! - what the firmware tells: the memory map ([`layout`]), ACPI tables ([`acpi`]), SMBIOS tables ([`smbios`]),
//!
//! and returns the state in which the boot processor enters the kernel (`entry`). Files are checked before
//! anything is written, read piecewise straight into guest memory, and never trusted: every number in a header is
//! held against the size of the file and of RAM.
//!
//! Nothing of it runs in the guest. A machine that resets calls [`load`] again. A machine that starts with real firmware
//! has the same tables from [`firmware`], and nothing is laid into its RAM.
//!
//! From `linux-loader` come the structures of the boot protocols. Its loaders are not used: they take a file that is cut
//! off for a whole one, look neither at the 64-bit flag nor at `init_size`, know no 32-bit ELF, and their errors name
//! neither the file nor what would be right.
#![forbid(unsafe_code)]

pub mod acpi;
mod bzimage;
mod elf;
mod entry;
mod file;
pub mod firmware;
mod initrd;
mod interrupts;
pub mod layout;
mod multiboot;
mod pvh;
pub mod smbios;
#[cfg(test)]
mod testing;

use std::path::PathBuf;

use arch::CpuState;
use arch::cpuid::Topology;
use memory::vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use memory::{Ram, View};

pub use entry::firmware_msrs;
use file::Image;

/// What to boot.
#[derive(Clone, Debug)]
pub struct BootConfig {
    /// A bzImage, an ELF image with a PVH note, or a Multiboot kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk; of a Multiboot kernel, its modules, perhaps with arguments behind a space.
    pub initrd: Vec<PathBuf>,
    pub command_line: String,
    /// Processors to announce.
    pub cpus: Topology,
    /// There are a graphics adapter, in a mode with this picture, a keyboard and a mouse.
    pub screen: Option<Framebuffer>,
}

/// Video memory that a kernel can draw on: rows of pixels of 32 bits (0x00RRGGBB), one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Framebuffer {
    /// A multiple of 64 KiB below 4 GiB.
    pub address: u32,
    pub width: u16,
    pub height: u16,
}

/// The most processors that the tables have room for.
pub const MAX_CPUS: u32 = 1024;
/// The longest command line in bytes: what kernels reserve (2048), less the final zero.
pub const MAX_COMMAND_LINE: usize = 2047;

/// Why a machine can't be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("can't {action} {}: {source}", path.display())]
    File { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{} is not a regular file: give a kernel or RAM disk image", path.display())]
    NotAFile { path: PathBuf },
    #[error("{} is empty", path.display())]
    Empty { path: PathBuf },
    #[error("{} is cut off: it has {size} bytes, its header speaks of {needed}", path.display())]
    Truncated { path: PathBuf, size: u64, needed: u64 },
    #[error("{} is not a kernel: give a bzImage (vmlinuz), an ELF image with a PVH note (vmlinux), or a Multiboot kernel", path.display())]
    NotAKernel { path: PathBuf },
    #[error("{} is not a kernel that can be loaded: {why}", path.display())]
    BadHeader { path: PathBuf, why: String },
    #[error("{} is too old a kernel: a bzImage must have boot protocol 2.10 (Linux 2.6.31)", path.display())]
    OldKernel { path: PathBuf },
    #[error(
        "{} is a {bits}-bit ELF image without the PVH note XEN_ELFNOTE_PHYS32_ENTRY: build the kernel with CONFIG_PVH, \
         or give its bzImage",
        path.display()
    )]
    NoPvhNote { path: PathBuf, bits: u8 },
    #[error(
        "{} does not fit into memory: it needs RAM up to {}, there is RAM up to {}: give the machine more",
        path.display(), mib(*needed), mib(*available)
    )]
    KernelTooLarge { path: PathBuf, needed: u64, available: u64 },
    #[error(
        "the RAM disk {} does not fit into memory: it has {size} bytes, beside the kernel there is room for {room}",
        path.display()
    )]
    InitrdTooLarge { path: PathBuf, size: u64, room: u64 },
    #[error("the kernel command line has {length} bytes: {} takes at most {limit}", path.display())]
    CommandLineTooLong { path: PathBuf, length: usize, limit: usize },
    #[error("the kernel command line contains a zero byte")]
    CommandLineZero,
    #[error("{cpus} processors are not possible: from 1 to {MAX_CPUS} are")]
    Cpus { cpus: u32 },
    #[error("the firmware {} can't be used: {why}", path.display())]
    Firmware { path: PathBuf, why: String },
    #[error("{} takes one RAM disk: only Multiboot kernels have several modules", path.display())]
    OneInitrd { path: PathBuf },
    #[error("no room to put a kernel together: {0}")]
    Scratch(#[from] memory::Error),
    #[error("can't write {what} into guest memory: {source}")]
    Memory { what: &'static str, source: GuestMemoryError },
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

/// Lays kernel, RAM disk and tables into `ram` and returns the state in which the boot processor starts.
pub fn load(ram: &Ram, config: &BootConfig) -> Result<CpuState, Error> {
    if !(1..=MAX_CPUS).contains(&config.cpus.count()) {
        return Err(Error::Cpus { cpus: config.cpus.count() });
    }
    if config.command_line.contains('\0') {
        return Err(Error::CommandLineZero);
    }
    let kernel = Image::open(&config.kernel)?;
    let magic = kernel.magic()?;
    let elf = if magic == file::Magic::Elf { Some(elf::Elf::open(&kernel)?) } else { None };
    let pvh = elf.as_ref().is_some_and(|elf| elf.pvh_entry.is_some());
    let header = if magic == file::Magic::BzImage || pvh { None } else { multiboot::Header::find(&kernel)? };
    // First, because a Multiboot kernel is given a copy of the RSDP.
    let inventory =
        acpi::Inventory { cpus: config.cpus.count(), vga: config.screen.is_some(), keyboard: config.screen.is_some() };
    acpi::write(ram, inventory)?;
    let initrd = match config.initrd.first() {
        Some(path) if header.is_none() => Some(Image::open(path)?),
        _ => None,
    };
    let state = match (header, elf) {
        (Some(header), elf) => {
            let (modules, command_line) = (&config.initrd, &config.command_line);
            let (image, header, elf) = (&kernel, &header, elf.as_ref());
            multiboot::load(ram, multiboot::Kernel { image, header, elf, modules, command_line })?
        }
        (None, _) if config.initrd.len() > 1 => return Err(Error::OneInitrd { path: config.kernel.clone() }),
        (None, Some(elf)) => pvh::load(ram, &kernel, &elf, initrd.as_ref(), &config.command_line)?,
        (None, None) if magic == file::Magic::BzImage => {
            bzimage::load(ram, &kernel, initrd.as_ref(), &config.command_line, config.screen)?
        }
        (None, None) => return Err(Error::NotAKernel { path: config.kernel.clone() }),
    };
    layout::write_bios_data(ram.view())?;
    interrupts::write(ram.view())?;
    smbios::write(ram, config.cpus)?;
    Ok(state)
}

/// Writes bytes; `what` names them in the error.
fn write(view: &View, what: &'static str, address: u64, bytes: &[u8]) -> Result<(), Error> {
    view.write_slice(bytes, GuestAddress(address)).map_err(|source| Error::Memory { what, source })
}

/// Writes the command line and its final zero. `limit`: what this kernel takes.
fn write_command_line(view: &View, kernel: &Image, limit: usize, text: &str) -> Result<(), Error> {
    let limit = limit.min(MAX_COMMAND_LINE);
    if text.len() > limit {
        return Err(Error::CommandLineTooLong { path: kernel.path().to_owned(), length: text.len(), limit });
    }
    write(view, "the command line", layout::COMMAND_LINE, text.as_bytes())?;
    write(view, "the command line", layout::COMMAND_LINE + text.len() as u64, &[0])
}

#[cfg(test)]
mod tests;
