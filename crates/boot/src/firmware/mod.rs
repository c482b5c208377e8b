//! Firmware: the image that the processors start from, and what it is told about the machine.
//!
//! [`prepare`] is all of it. It reads the image (`image`: a ROM, or flash with a file for variables), and makes the items
//! of fw_cfg: sizes, memory map, ACPI and SMBIOS tables, order of boot devices, and the kernel (`linux`, `multiboot`) if one is
//! to be booted. Nothing is laid into RAM: that is what the firmware does.

mod image;
mod linux;
mod multiboot;

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
    /// A kernel that the firmware boots in place of what is on disks.
    pub kernel: Option<Kernel>,
    /// Boot devices, the first to be tried first, as Open Firmware paths. What is not in it comes later.
    pub boot_order: Vec<String>,
    /// The I/O port of a serial port that a BIOS uses as its console.
    pub serial_console: Option<u16>,
}

/// A kernel for firmware.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// A bzImage, or a Multiboot kernel.
    pub image: PathBuf,
    /// The RAM disk; or modules.
    pub initrd: Vec<PathBuf>,
    pub command_line: String,
    /// What a BIOS loads it by; EFI firmware needs none.
    pub option_roms: OptionRoms,
}

/// The option ROMs by which a BIOS loads a kernel from fw_cfg.
#[derive(Clone, Debug, Default)]
pub struct OptionRoms {
    pub linux: Option<PathBuf>,
    pub multiboot: Option<PathBuf>,
}

const LINUX_ROM: &str = "linuxboot_dma.bin";
const MULTIBOOT_ROM: &str = "multiboot_dma.bin";

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
        if kernel.command_line.contains('\0') {
            return Err(Error::CommandLineZero);
        }
        // Only a BIOS can load a kernel by Multiboot.
        let multiboot = if kernel.option_roms.multiboot.is_some() { multiboot::items(ram, kernel)? } else { None };
        let (rom, name) = match multiboot {
            Some(found) => {
                items.extend(found);
                (&kernel.option_roms.multiboot, MULTIBOOT_ROM)
            }
            None => {
                items.extend(linux::items(ram, kernel)?);
                (&kernel.option_roms.linux, LINUX_ROM)
            }
        };
        if let Some(rom) = rom {
            items.push(Item::file(&format!("genroms/{name}"), image::read_small(rom)?));
            order.insert(0, format!("/rom@genroms/{name}"));
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
