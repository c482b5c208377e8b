//! MADT: the interrupt controllers (ACPI 6.5, 5.2.12).

use acpi_tables::Aml;
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::sdt::Sdt;
use chipset::constants as pc;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};

const REVISION: u8 = 5;
/// Header, local APIC address, flags.
const FIXED_SIZE: u32 = 44;
/// There is a pair of 8259 besides.
const PCAT_COMPAT: u32 = 1;
/// APIC ids from here on don't fit into the entries of the xAPIC.
const FIRST_X2APIC_ID: u32 = 255;
/// MPS INTI flags: active high, level-triggered.
const ACTIVE_HIGH_LEVEL: u16 = 0b1101;
const ALL_XAPICS: u8 = 0xff;
const NMI_LINT: u8 = 1;

/// Interrupt controller structures that `acpi_tables` lacks: type, length, fields.
fn interrupt_source_override(irq: u8, gsi: u8, flags: u16) -> Vec<u8> {
    let mut entry = vec![2, 10, 0, irq];
    entry.extend(u32::from(gsi).to_le_bytes());
    entry.extend(flags.to_le_bytes());
    entry
}

fn local_apic_nmi() -> Vec<u8> {
    vec![4, 6, ALL_XAPICS, 0, 0, NMI_LINT]
}

fn local_x2apic(id: u32) -> Vec<u8> {
    let mut entry = vec![9, 16, 0, 0];
    entry.extend(id.to_le_bytes());
    entry.extend(1u32.to_le_bytes());
    entry.extend(id.to_le_bytes());
    entry
}

fn local_x2apic_nmi() -> Vec<u8> {
    let mut entry = vec![10, 12, 0, 0];
    entry.extend(u32::MAX.to_le_bytes());
    entry.extend([NMI_LINT, 0, 0, 0]);
    entry
}

/// The table of a machine with `cpus` processors, whose APIC ids and ACPI ids are their numbers.
pub fn madt(cpus: u32) -> Sdt {
    let mut entries = Vec::new();
    for id in 0..cpus {
        match u8::try_from(id) {
            Ok(small) if id < FIRST_X2APIC_ID => {
                ProcessorLocalApic::new(small, small, EnabledStatus::Enabled).to_aml_bytes(&mut entries);
            }
            _ => entries.extend(local_x2apic(id)),
        }
    }
    IoApic::new(pc::IOAPIC_ID, pc::IOAPIC_BASE as u32, 0).to_aml_bytes(&mut entries);
    entries.extend(interrupt_source_override(pc::PIT_IRQ, pc::PIT_GSI, 0));
    entries.extend(interrupt_source_override(pc::SCI_IRQ, pc::SCI_IRQ, ACTIVE_HIGH_LEVEL));
    entries.extend(local_apic_nmi());
    if cpus > FIRST_X2APIC_ID {
        entries.extend(local_x2apic_nmi());
    }
    let mut madt = Sdt::new(*b"APIC", FIXED_SIZE, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.write_u32(36, pc::LOCAL_APIC_BASE as u32);
    madt.write_u32(40, PCAT_COMPAT);
    madt.append_slice(&entries);
    madt
}
