//! Firmware: the image that the processors start from, and what it is told about the machine.
//!
//! [`prepare`] is all of it. It reads the image (`image`: a ROM, or flash with a file for variables), and makes the items
//! of fw_cfg: sizes, memory map, ACPI and SMBIOS tables, order of boot devices, and the kernel (`linux`) if one is to be
//! booted. Nothing is laid into RAM: that is what the firmware does.

mod image;
mod linux;

use std::path::PathBuf;

use arch::cpuid::Topology;
use chipset::Firmware;
use chipset::fw_cfg::{self, Item, key};
use memory::Ram;

use crate::acpi::{Inventory, loader};
use crate::{Error, smbios};

/// What is to be started, and how.
#[derive(Clone, Debug, Default)]
pub struct FirmwareConfig {
    /// A BIOS image, or EFI firmware with or without its variables.
    pub image: PathBuf,
    /// Where EFI firmware finds what its variables are at first.
    pub variables_template: Option<PathBuf>,
    /// Where it keeps them; made from the template if it is not there. None: they are gone with the machine.
    pub variables: Option<PathBuf>,
    pub cpus: Topology,
    /// There is a graphics adapter.
    pub vga: bool,
    /// A Linux kernel that the firmware boots in place of what is on disks.
    pub kernel: Option<Kernel>,
    /// Boot devices, the first to be tried first, as Open Firmware paths. What is not in it comes later.
    pub boot_order: Vec<String>,
    /// The I/O port of a serial port that a BIOS uses as its console.
    pub serial_console: Option<u16>,
}

/// A kernel for firmware.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// A bzImage.
    pub image: PathBuf,
    pub initrd: Option<PathBuf>,
    pub command_line: String,
    /// The option ROM by which a BIOS loads it (`linuxboot_dma.bin`); EFI firmware needs none.
    pub option_rom: Option<PathBuf>,
}

const OPTION_ROM: &str = "linuxboot_dma.bin";

/// Reads everything, and says what the machine is to be made with.
pub fn prepare(ram: &Ram, config: &FirmwareConfig) -> Result<Firmware, Error> {
    let image = image::load(config)?;
    let acpi = loader::files(ram, Inventory { cpus: config.cpus.count(), vga: config.vga, keyboard: true });
    let (anchor, structures) = smbios::for_firmware(ram, config.cpus);
    let mut items = fw_cfg::facts(ram.size(), config.cpus.count());
    items.extend([
        Item::number(key::BOOT_MENU, 0u16.to_le_bytes()),
        // The 8254 is at input 2 of the I/O APIC.
        Item::number(key::IRQ0_OVERRIDE, 1u32.to_le_bytes()),
        Item::file("etc/e820", memory_map(ram)),
        Item::file(loader::LOADER_FILE, acpi.loader),
        Item::file(loader::TABLES_FILE, acpi.tables),
        Item::file(loader::RSDP_FILE, acpi.rsdp),
        Item::file("etc/smbios/smbios-anchor", anchor),
        Item::file("etc/smbios/smbios-tables", structures),
        // Neither S3 nor S4.
        Item::file("etc/system-states", [0x80, 0, 0, 0x00, 0x00, 0x80 | chipset::constants::S5_SLEEP_TYPE]),
    ]);
    if let Some(port) = config.serial_console {
        items.push(Item::file("etc/sercon-port", port.to_le_bytes()));
    }
    let mut order = config.boot_order.clone();
    if let Some(kernel) = &config.kernel {
        items.extend(linux::items(ram, kernel)?);
        if let Some(rom) = &kernel.option_rom {
            items.push(Item::file(&format!("genroms/{OPTION_ROM}"), image::read_small(rom)?));
            order.insert(0, format!("/rom@genroms/{OPTION_ROM}"));
        }
    }
    if !order.is_empty() {
        let mut text = order.join("\n").into_bytes();
        text.push(0);
        items.push(Item::file("bootorder", text));
    }
    Ok(Firmware { image, items })
}

/// E820 entries of all RAM: address, length, type. What else is reserved, firmware knows itself.
fn memory_map(ram: &Ram) -> Vec<u8> {
    const RAM: u32 = 1;
    let entry = |region: &memory::Region| {
        let mut entry = region.start.to_le_bytes().to_vec();
        entry.extend(region.size.to_le_bytes());
        entry.extend(RAM.to_le_bytes());
        entry
    };
    ram.regions().iter().flat_map(entry).collect()
}

#[cfg(test)]
mod tests;
