//! A Multiboot kernel for a BIOS to boot: an option ROM (`multiboot_dma.bin`) takes kernel and modules in one piece, and the
//! information about them, from fw_cfg, and adds what the BIOS says of memory. The kernel is entered with the BIOS in place.

use chipset::fw_cfg::{Item, key};
use memory::Ram;

use super::Kernel;
use crate::Error;
use crate::elf::Elf;
use crate::file::{Image, Magic};
use crate::multiboot::{self, Header};

/// The items by which the option ROM finds the kernel; none for another kind of kernel.
pub fn items(ram: &Ram, kernel: &Kernel) -> Result<Option<Vec<Item>>, Error> {
    let image = Image::open(&kernel.image)?;
    let magic = image.magic()?;
    if magic == Magic::BzImage {
        return Ok(None);
    }
    let Some(header) = Header::find(&image)? else { return Ok(None) };
    let elf = if magic == Magic::Elf { Some(Elf::open(&image)?) } else { None };
    let what = multiboot::Kernel {
        image: &image,
        header: &header,
        elf: elf.as_ref(),
        modules: &kernel.initrd,
        command_line: &kernel.command_line,
    };
    let made = multiboot::for_rom(ram, what)?;
    let number = |number, value: u32| Item::number(number, value.to_le_bytes());
    Ok(Some(vec![
        number(key::KERNEL_ENTRY, made.entry),
        number(key::KERNEL_ADDRESS, made.address),
        number(key::KERNEL_SIZE, made.content.len() as u32),
        Item::number(key::KERNEL_DATA, made.content),
        number(key::INITRD_ADDRESS, made.information_address),
        number(key::INITRD_SIZE, made.information.len() as u32),
        Item::number(key::INITRD_DATA, made.information),
    ]))
}
