//! ACPI tables: how a system learns what the machine has (ACPI specification 6.5).
//!
//! [`tables`] lays them out one behind the other, RSDP first; [`write()`] puts them at [`layout::ACPI`], and [`loader`] tells
//! firmware how to put them where it likes. The machine starts in ACPI mode: there is no SMI command port. Addresses and
//! interrupt lines are `chipset`'s.

mod dsdt;
pub mod loader;
mod madt;

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, facs::FACS};
use chipset::constants as pc;
use memory::Ram;

use crate::{Error, layout};

const OEM_ID: [u8; 6] = *b"RINGER";
const OEM_TABLE_ID: [u8; 8] = *b"RINGERPC";
const OEM_REVISION: u32 = 1;

/// FADT IAPC_BOOT_ARCH (ACPI 6.5, table 5.11).
const LEGACY_DEVICES: u16 = 1 << 0;
const KEYBOARD_CONTROLLER: u16 = 1 << 1;
const VGA_NOT_PRESENT: u16 = 1 << 2;
/// Latencies that say: no C2, no C3 (ACPI 6.5, table 5.9).
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

/// What the tables tell of a machine, besides what all machines have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    pub cpus: u32,
    /// A graphics adapter.
    pub vga: bool,
    /// Someone may type and point: without this, systems need not look for keyboard and mouse.
    pub keyboard: bool,
}

/// One table and where it goes.
pub struct Table {
    pub address: u64,
    pub bytes: Vec<u8>,
}

/// Writes the tables of a machine.
pub fn write(ram: &Ram, inventory: Inventory) -> Result<(), Error> {
    for table in tables(layout::ACPI, ram, inventory) {
        crate::write(ram.view(), "the ACPI tables", table.address, &table.bytes)?;
    }
    Ok(())
}

/// All tables, from `base` on: RSDP, FACS, DSDT, FADT, MADT, MCFG, HPET, XSDT.
pub fn tables(base: u64, ram: &Ram, inventory: Inventory) -> Vec<Table> {
    let mut area = Area { next: base, tables: Vec::new() };
    let rsdp = area.reserve(Rsdp::len() as u64);
    let facs = area.add(&FACS::new());
    let dsdt = area.add(&dsdt::dsdt(ram, inventory));
    let fadt = area.add(&fadt(facs, dsdt, inventory));
    let madt = area.add(&madt::madt(inventory.cpus));
    let mcfg = area.add(&mcfg());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let hpet = area.add(&hpet());
    for table in [fadt, madt, mcfg, hpet] {
        xsdt.add_entry(table);
    }
    let xsdt = area.add(&xsdt);
    area.tables.insert(0, Table { address: rsdp, bytes: bytes(&Rsdp::new(OEM_ID, xsdt)) });
    area.tables
}

/// Where the next table goes.
struct Area {
    next: u64,
    tables: Vec<Table>,
}

impl Area {
    /// The FACS must be aligned to 64 bytes; so is everything.
    const ALIGNMENT: u64 = 64;

    fn reserve(&mut self, size: u64) -> u64 {
        let address = self.next;
        self.next = (address + size).next_multiple_of(Self::ALIGNMENT);
        address
    }

    fn add(&mut self, table: &dyn Aml) -> u64 {
        let bytes = bytes(table);
        let address = self.reserve(bytes.len() as u64);
        self.tables.push(Table { address, bytes });
        address
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The fixed hardware: power management block, reset register, what legacy devices there are.
fn fadt(facs: u64, dsdt: u64, inventory: Inventory) -> impl Aml + use<> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .firmware_ctrl_32(facs as u32)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // These two mean: no such button in the fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    // Kernels that know only ACPI 1.0 read the 32-bit field.
    fadt.dsdt = (dsdt as u32).into();
    fadt.sci_int = u16::from(pc::SCI_IRQ).into();
    fadt.pm1a_evt_blk = u32::from(pc::PM1A_EVENT_PORT).into();
    fadt.pm1_evt_len = pc::PM1_EVENT_SIZE;
    fadt.x_pm1a_evt_blk = io(pc::PM1A_EVENT_PORT, pc::PM1_EVENT_SIZE, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(pc::PM1A_CONTROL_PORT).into();
    fadt.pm1_cnt_len = pc::PM1_CONTROL_SIZE;
    fadt.x_pm1a_cnt_blk = io(pc::PM1A_CONTROL_PORT, pc::PM1_CONTROL_SIZE, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(pc::PM_TIMER_PORT).into();
    fadt.pm_tmr_len = pc::PM_TIMER_SIZE;
    fadt.x_pm_tmr_blk = io(pc::PM_TIMER_PORT, pc::PM_TIMER_SIZE, AccessSize::DwordAccess);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = pc::RTC_CENTURY;
    let keyboard = if inventory.keyboard { KEYBOARD_CONTROLLER } else { 0 };
    let vga = if inventory.vga { 0 } else { VGA_NOT_PRESENT };
    fadt.iapc_boot_arch = (LEGACY_DEVICES | keyboard | vga).into();
    fadt.reset_reg = io(pc::RESET_PORT, 1, AccessSize::ByteAccess);
    fadt.reset_value = pc::RESET_VALUE;
    fadt.finalize()
}

fn io(port: u16, size: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, size * 8, 0, access, port.into())
}

/// Where PCI configuration space is mapped.
fn mcfg() -> impl Aml {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(pc::ECAM_BASE, 0, 0, pc::ECAM_LAST_BUS);
    mcfg
}

/// The event timers (IA-PC HPET specification 1.0a, 3.2.4).
fn hpet() -> Sdt {
    /// A periodic timer should not be set to less, in ticks of the counter.
    const LEAST_TICKS: u16 = 1000;
    let mut hpet = Sdt::new(*b"HPET", 56, 1, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    hpet.write_u32(36, pc::HPET_IDENTITY);
    // The address: in memory, 64 bits wide.
    hpet.write_u32(40, 64 << 8);
    hpet.write_u64(44, pc::HPET_BASE);
    hpet.write_u16(53, LEAST_TICKS);
    hpet
}

#[cfg(test)]
mod tests;
