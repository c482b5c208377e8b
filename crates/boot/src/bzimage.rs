//! bzImage by the 64-bit or, where the kernel has no such entry, the 32-bit boot protocol (Linux
//! `Documentation/arch/x86/boot.rst`).
//!
//! The file is a real-mode part, of which only the setup header is used, and the protected-mode kernel, which goes to
//! where the header prefers it, or as low as it may if RAM ends too early. It needs `init_size` bytes there to unpack
//! itself. The header, filled in, becomes part of the zero page.

use arch::CpuState;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, screen_info, setup_header};
use memory::Ram;
use memory::vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::file::Image;
use crate::initrd::{self, Placement};
use crate::{Error, Framebuffer, entry, layout};

/// Where the setup header begins in the file, and the byte that says how far it reaches beyond offset 0x202.
const HEADER_START: u64 = 0x1f1;
const HEADER_LENGTH: u64 = 0x201;
const HEADER_LENGTH_BASE: u64 = 0x202;
/// `init_size` and `pref_address` came with this version (2.6.31), `xloadflags` and the 64-bit entry with that one.
const OLDEST_VERSION: u16 = 0x20a;
const VERSION_64_BIT: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1 << 0;
const LOADFLAGS_LOADED_HIGH: u8 = 1 << 0;
/// "Undefined" boot loader.
const LOADER_UNDEFINED: u8 = 0xff;
/// Of the 64-bit entry, from the start of the protected-mode kernel, which is where the 32-bit one is.
const ENTRY_OFFSET: u64 = 0x200;
const SECTOR: u64 = 512;
/// Linux `include/uapi/linux/screen_info.h`: a linear framebuffer, as a VESA BIOS sets it up; its size is in these units.
const VIDEO_TYPE_VLFB: u8 = 0x23;
const LFB_UNIT: u32 = 0x1_0000;

/// A checked setup header and what follows from it.
struct Kernel {
    header: setup_header,
    /// Of the protected-mode kernel in the file.
    offset: u64,
    size: u64,
}

/// Loads the kernel, the RAM disk and the zero page.
pub fn load(
    ram: &Ram,
    image: &Image,
    initrd: Option<&Image>,
    command_line: &str,
    screen: Option<Framebuffer>,
) -> Result<CpuState, Error> {
    let kernel = Kernel::parse(image)?;
    let (address, initrd_place) = kernel.place(ram, image, initrd)?;
    let view = ram.view();
    crate::write_command_line(view, image, kernel.header.cmdline_size as usize, command_line)?;
    image.read_to(view, "the kernel", address, kernel.offset, kernel.size)?;
    if let Some(initrd) = initrd {
        initrd.read_to(view, "the RAM disk", initrd_place.start, 0, initrd_place.size)?;
    }
    let mut params = zero_page(ram, kernel.header, address, initrd_place);
    if let Some(screen) = screen {
        params.screen_info = screen_info_of(screen);
    }
    view.write_obj(params, GuestAddress(layout::BOOT_PARAMS))
        .map_err(|source| Error::Memory { what: "the boot parameters", source })?;
    if kernel.has_64_bit_entry() {
        entry::long_mode(view, address + ENTRY_OFFSET, layout::BOOT_PARAMS)
    } else {
        entry::linux_32(view, address as u32, layout::BOOT_PARAMS)
    }
}

impl Kernel {
    fn parse(image: &Image) -> Result<Self, Error> {
        let mut length = [0];
        image.read_at(&mut length, HEADER_LENGTH)?;
        let end = HEADER_LENGTH_BASE + u64::from(length[0]);
        let mut header = setup_header::default();
        let bytes = header.as_mut_slice();
        // Of an older header, the missing fields are zero; of a newer one, the unknown fields are left out.
        let known = bytes.len().min(end.saturating_sub(HEADER_START) as usize);
        image.read_at(bytes.get_mut(..known).unwrap_or_default(), HEADER_START)?;

        let (version, loadflags) = (header.version, header.loadflags);
        if version < OLDEST_VERSION || loadflags & LOADFLAGS_LOADED_HIGH == 0 {
            return Err(Error::OldKernel { path: image.path().to_owned() });
        }
        // 0 means 4, for the oldest of kernels.
        let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
        let offset = (setup_sectors + 1) * SECTOR;
        let size = u64::from(header.syssize) * 16;
        // `syssize` counts begun paragraphs; not every build fills the last one.
        image.need(offset, size.saturating_sub(15))?;
        if size <= ENTRY_OFFSET {
            return Err(image.bad_header("it has no protected-mode code"));
        }
        // A signature may follow; it is not loaded, but what the division of `syssize` by 16 has lost is.
        let size = (size + 15).min(image.size() - offset);
        let alignment = header.kernel_alignment;
        if !alignment.is_power_of_two() {
            return Err(image.bad_header(format!("its alignment of {alignment:#x} is not a power of two")));
        }
        Ok(Kernel { header, offset, size })
    }

    fn has_64_bit_entry(&self) -> bool {
        let (version, flags) = (self.header.version, self.header.xloadflags);
        version >= VERSION_64_BIT && flags & XLF_KERNEL_64 != 0
    }

    /// Finds room for the kernel and the RAM disk.
    fn place(&self, ram: &Ram, image: &Image, initrd: Option<&Image>) -> Result<(u64, Placement), Error> {
        let available = layout::low_end(ram);
        let needed = u64::from(self.header.init_size).max(self.size);
        let preferred = self.header.pref_address;
        if preferred < layout::HIGH_MEMORY {
            return Err(image.bad_header(format!("it wants to be loaded at {preferred:#x}, below 1 MiB")));
        }
        let lowest = match self.header.relocatable_kernel {
            0 => preferred,
            _ => layout::HIGH_MEMORY.next_multiple_of(self.header.kernel_alignment.into()).min(preferred),
        };
        let ceiling = available.min(u64::from(self.header.initrd_addr_max) + 1);
        let fits = |address: u64| match address.checked_add(needed) {
            Some(end) if end <= available => initrd::place(initrd, end, ceiling).map(|place| (address, place)),
            end => {
                Err(Error::KernelTooLarge { path: image.path().to_owned(), needed: end.unwrap_or(u64::MAX), available })
            }
        };
        fits(preferred).or_else(|_| fits(lowest))
    }
}

/// The kernel's parameters (Linux `Documentation/arch/x86/zero-page.rst`).
fn zero_page(ram: &Ram, header: setup_header, address: u64, initrd: Placement) -> boot_params {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: layout::ACPI, ..boot_params::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.code32_start = address as u32;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    params.hdr.ramdisk_image = initrd.start as u32;
    params.hdr.ramdisk_size = initrd.size as u32;
    params.hdr.setup_data = 0;
    let map = layout::memory_map(ram);
    params.e820_entries = map.len() as u8;
    for (slot, range) in params.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr: range.start, size: range.size, r#type: range.kind as u32 };
    }
    params
}

/// What the kernel draws on until it has a driver for the adapter.
fn screen_info_of(screen: Framebuffer) -> screen_info {
    let Framebuffer { address, width, height } = screen;
    let line = u32::from(width) * 4;
    screen_info {
        orig_video_isVGA: VIDEO_TYPE_VLFB,
        lfb_width: width,
        lfb_height: height,
        lfb_depth: 32,
        lfb_base: address,
        lfb_size: (line * u32::from(height)).div_ceil(LFB_UNIT),
        lfb_linelength: u16::try_from(line).unwrap_or(u16::MAX),
        blue_size: 8,
        green_size: 8,
        green_pos: 8,
        red_size: 8,
        red_pos: 16,
        rsvd_size: 8,
        rsvd_pos: 24,
        ..screen_info::default()
    }
}

#[cfg(test)]
#[path = "bzimage_test.rs"]
mod tests;
