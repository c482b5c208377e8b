//! A Linux kernel for firmware to boot: a BIOS lets an option ROM load it by the 16-bit boot protocol, EFI firmware starts
//! it as a program (Linux `Documentation/arch/x86/boot.rst`). Both find kernel and RAM disk in fw_cfg.

use chipset::fw_cfg::{Content, Item, Name, key};
use memory::{PAGE_SIZE, Ram};

use super::Kernel;
use crate::file::{Image, Magic};
use crate::{Error, MAX_COMMAND_LINE, layout};

/// Where the option ROM puts the real-mode part, the command line and the kernel.
const SETUP_ADDRESS: u32 = 0x1_0000;
const COMMAND_LINE_ADDRESS: u32 = 0x2_0000;
const KERNEL_ADDRESS: u32 = 0x10_0000;
/// Firmware keeps tables at the end of low RAM.
const RESERVED: u64 = 256 << 10;

/// Offsets in the setup header.
const SETUP_SECTORS: usize = 0x1f1;
const VERSION: usize = 0x206;
const LOADER: usize = 0x210;
const LOAD_FLAGS: usize = 0x211;
const RAMDISK_ADDRESS: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const HEAP_END: usize = 0x224;
const COMMAND_LINE: usize = 0x228;
const RAMDISK_LIMIT: usize = 0x22c;
const HEADER_END: usize = 0x268;
/// High loading, a command line by pointer.
const LEAST_VERSION: u16 = 0x0202;
const VERSION_WITH_LIMIT: u16 = 0x0203;
const OLD_LIMIT: u32 = 0x37ff_ffff;
const LOADED_HIGH: u8 = 1 << 0;
const CAN_USE_HEAP: u8 = 1 << 7;
/// The loader that fw_cfg is made for.
const LOADER_ID: u8 = 0xb0;
const SECTOR: usize = 512;

/// The items by which firmware finds the kernel.
pub fn items(ram: &Ram, kernel: &Kernel) -> Result<Vec<Item>, Error> {
    let image = Image::open(&kernel.image)?;
    if image.magic()? != Magic::BzImage {
        return Err(Error::NotAKernel { path: kernel.image.clone() });
    }
    let length = kernel.command_line.len();
    if length > MAX_COMMAND_LINE {
        return Err(Error::CommandLineTooLong { path: kernel.image.clone(), length, limit: MAX_COMMAND_LINE });
    }
    let mut sectors = [0];
    image.read_at(&mut sectors, SETUP_SECTORS as u64)?;
    let setup_size = (usize::from(if sectors[0] == 0 { 4 } else { sectors[0] }) + 1) * SECTOR;
    let mut setup = vec![0; setup_size];
    image.read_at(&mut setup, 0)?;
    if kernel.initrd.len() > 1 {
        return Err(Error::OneInitrd { path: kernel.image.clone() });
    }
    let initrd = kernel.initrd.first().map(|path| Image::open(path)).transpose()?;
    let initrd_address = fill_in(&mut setup, &image, initrd.as_ref(), ram)?;

    let mut command_line = kernel.command_line.clone().into_bytes();
    command_line.push(0);
    let number = |number, value: u32| Item::number(number, value.to_le_bytes());
    let rest = image.size() - setup_size as u64;
    let mut items = vec![
        number(key::SETUP_ADDRESS, SETUP_ADDRESS),
        number(key::SETUP_SIZE, setup_size as u32),
        Item::number(key::SETUP_DATA, setup),
        number(key::COMMAND_LINE_ADDRESS, COMMAND_LINE_ADDRESS),
        number(key::COMMAND_LINE_SIZE, command_line.len() as u32),
        Item::number(key::COMMAND_LINE_DATA, command_line),
        number(key::KERNEL_ADDRESS, KERNEL_ADDRESS),
        number(key::KERNEL_SIZE, u32::try_from(rest).unwrap_or(u32::MAX)),
        file(key::KERNEL_DATA, &image, setup_size as u64, rest)?,
    ];
    if let Some(initrd) = &initrd {
        items.push(number(key::INITRD_ADDRESS, initrd_address));
        items.push(number(key::INITRD_SIZE, u32::try_from(initrd.size()).unwrap_or(u32::MAX)));
        items.push(file(key::INITRD_DATA, initrd, 0, initrd.size())?);
    }
    Ok(items)
}

fn file(number: u16, image: &Image, offset: u64, size: u64) -> Result<Item, Error> {
    let error = |source| Error::File { action: "open", path: image.path().to_owned(), source };
    let file = image.file().try_clone().map_err(error)?;
    Ok(Item { name: Name::Number(number), content: Content::File { file, offset, size } })
}

/// Does in the setup header what a boot loader does. Returns where the RAM disk is to be.
fn fill_in(setup: &mut [u8], image: &Image, initrd: Option<&Image>, ram: &Ram) -> Result<u32, Error> {
    let Some(header) = setup.get_mut(..HEADER_END) else { return Err(image.bad_header("its setup is too short")) };
    let word = |header: &[u8], at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let version = word(header, VERSION);
    if version < LEAST_VERSION || header[LOAD_FLAGS] & LOADED_HIGH == 0 {
        return Err(image.bad_header("it is too old for this firmware: it must have boot protocol 2.02"));
    }
    let put = |header: &mut [u8], at: usize, value: u32| header[at..at + 4].copy_from_slice(&value.to_le_bytes());
    let limit = if version >= VERSION_WITH_LIMIT {
        u32::from(word(header, RAMDISK_LIMIT)) | u32::from(word(header, RAMDISK_LIMIT + 2)) << 16
    } else {
        OLD_LIMIT
    };
    header[LOADER] = LOADER_ID;
    header[LOAD_FLAGS] |= CAN_USE_HEAP;
    let heap_end = (COMMAND_LINE_ADDRESS - SETUP_ADDRESS - 0x200) as u16;
    header[HEAP_END..HEAP_END + 2].copy_from_slice(&heap_end.to_le_bytes());
    put(header, COMMAND_LINE, COMMAND_LINE_ADDRESS);
    let Some(initrd) = initrd else { return Ok(0) };
    let ceiling = (u64::from(limit) + 1).min(layout::low_end(ram).saturating_sub(RESERVED));
    let floor = u64::from(KERNEL_ADDRESS) + image.size();
    let room = ceiling.saturating_sub(floor);
    let too_large = Error::InitrdTooLarge { path: initrd.path().to_owned(), size: initrd.size(), room };
    let Some(start) = ceiling.checked_sub(initrd.size()).filter(|start| *start >= floor) else {
        return Err(too_large);
    };
    let address = (start / PAGE_SIZE * PAGE_SIZE) as u32;
    put(header, RAMDISK_ADDRESS, address);
    put(header, RAMDISK_SIZE, initrd.size() as u32);
    Ok(address)
}
