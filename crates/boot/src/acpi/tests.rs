//! The tables, read back and given to `iasl`, the reference compiler (package acpica-tools), which must be installed.

use super::*;
use std::path::Path;
use std::process::Command;

fn ram() -> Ram {
    Ram::new(4 << 30).unwrap()
}

fn find<'a>(tables: &'a [Table], signature: &[u8]) -> &'a Table {
    tables.iter().find(|t| t.bytes.starts_with(signature)).unwrap()
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

fn iasl(dir: &Path, arguments: &[&str]) -> String {
    let output = Command::new("iasl")
        .current_dir(dir)
        .args(arguments)
        .output()
        .expect("this test needs iasl: install the package acpica-tools");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "iasl {arguments:?}: {text}");
    text
}

/// Takes a table apart and puts it together again; returns its source.
fn round_trip(table: &Table) -> String {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("table.dat"), &table.bytes).unwrap();
    iasl(dir.path(), &["-d", "table.dat"]);
    let log = iasl(dir.path(), &["-vs", "table.dsl"]);
    assert!(log.contains(" 0 Errors, 0 Warnings, 0 Remarks"), "{log}");
    let compiled = std::fs::read(dir.path().join("table.aml")).unwrap();
    assert_eq!(compiled.len(), table.bytes.len(), "what iasl understood is what was written");
    std::fs::read_to_string(dir.path().join("table.dsl")).unwrap()
}

/// One without screen and keyboard.
fn machine(cpus: u32) -> Inventory {
    Inventory { cpus, ..Inventory::default() }
}

#[test]
fn iasl_understands_every_table() {
    let tables = tables(layout::ACPI, &ram(), machine(4));
    for table in tables.iter().filter(|t| !t.bytes.starts_with(b"RSD PTR ")) {
        let source = round_trip(table);
        assert!(!source.contains("Invalid") && !source.contains("Error"), "{source}");
    }
}

#[test]
fn the_dsdt_names_the_devices_of_a_pc() {
    let source = round_trip(find(&tables(layout::ACPI, &ram(), machine(300)), b"DSDT"));
    for id in ["PNP0A08", "PNP0501", "PNP0B00", "PNP0C02", "ACPI0007", "_S5", "_PRT", "_CRS"] {
        assert!(source.contains(id), "{id} is missing");
    }
    assert!(source.contains("Device (C12B)"), "processor 299");
    // iasl counts remarks of its own; what it warns of would reach the kernel's log.
    assert!(!source.contains("External"));
}

#[test]
fn every_checksum_is_right() {
    for table in tables(layout::ACPI, &ram(), machine(2)) {
        match &table.bytes[..4] {
            b"FACS" => {}
            b"RSD " => assert_eq!((sum(&table.bytes[..20]), sum(&table.bytes)), (0, 0)),
            _ => assert_eq!(sum(&table.bytes), 0, "{}", table.bytes[..4].escape_ascii()),
        }
    }
}

#[test]
fn tables_are_found_from_the_rsdp() {
    let tables = tables(layout::ACPI, &ram(), machine(2));
    let at = |address: u64| tables.iter().find(|t| t.address == address).expect("a table at that address");
    let rsdp = at(layout::ACPI);
    let xsdt = at(u64_at(&rsdp.bytes, 24));
    assert!(xsdt.bytes.starts_with(b"XSDT"));
    let signatures: Vec<_> = xsdt.bytes[36..].chunks(8).map(|a| at(u64_at(a, 0)).bytes[..4].to_vec()).collect();
    assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG", b"HPET"]);
    let fadt = find(&tables, b"FACP");
    assert!(at(u32_at(&fadt.bytes, 36).into()).bytes.starts_with(b"FACS"));
    assert!(at(u32_at(&fadt.bytes, 40).into()).bytes.starts_with(b"DSDT"));
    assert!(at(u64_at(&fadt.bytes, 140)).bytes.starts_with(b"DSDT"));
}

#[test]
fn tables_stay_in_their_area_with_the_most_processors() {
    let tables = tables(layout::ACPI, &ram(), machine(crate::MAX_CPUS));
    for pair in tables.windows(2) {
        assert!(pair[0].address + pair[0].bytes.len() as u64 <= pair[1].address);
        assert_eq!(pair[1].address % 64, 0);
    }
    let last = tables.last().unwrap();
    assert!(last.address + last.bytes.len() as u64 <= layout::SMBIOS);
}

#[test]
fn the_fadt_says_where_the_fixed_hardware_is() {
    let tables = tables(layout::ACPI, &ram(), machine(1));
    let fadt = &find(&tables, b"FACP").bytes;
    assert_eq!(fadt.len(), 276);
    assert_eq!((fadt[8], fadt[131]), (6, 5), "version 6.5");
    assert_eq!(u32_at(fadt, 56), u32::from(pc::PM1A_EVENT_PORT));
    assert_eq!(u32_at(fadt, 64), u32::from(pc::PM1A_CONTROL_PORT));
    assert_eq!(u32_at(fadt, 76), u32::from(pc::PM_TIMER_PORT));
    assert_eq!(u32_at(fadt, 48), 0, "no SMI command port: always in ACPI mode");
    assert_eq!((u64_at(fadt, 120), fadt[128]), (0xcf9, 6), "reset register");
}

#[test]
fn screen_and_keyboard_are_told_of_where_they_are() {
    let flags = |inventory| {
        let tables = tables(layout::ACPI, &ram(), inventory);
        let dsdt = &find(&tables, b"DSDT").bytes;
        // PNP0303 as an EISA identifier, by which firmware looks for it.
        let keyboard = dsdt.windows(4).any(|bytes| bytes == [0x41, 0xd0, 0x03, 0x03]);
        (find(&tables, b"FACP").bytes[109], keyboard)
    };
    assert_eq!(flags(machine(1)), (0b101, false));
    assert_eq!(flags(Inventory { keyboard: true, ..machine(1) }), (0b111, true));
    assert_eq!(flags(Inventory { keyboard: true, vga: true, ..machine(1) }), (0b011, true));
}

#[test]
fn the_madt_lists_processors_and_interrupt_controllers() {
    let entries = |cpus| {
        let tables = tables(layout::ACPI, &ram(), machine(cpus));
        let mut rest = &find(&tables, b"APIC").bytes[44..];
        let mut entries = Vec::new();
        while let [_, length, ..] = rest {
            let (entry, tail) = rest.split_at(*length as usize);
            entries.push(entry.to_vec());
            rest = tail;
        }
        entries
    };
    let count = |entries: &[Vec<u8>], kind| entries.iter().filter(|e| e[0] == kind).count();
    let two = entries(2);
    assert_eq!([0, 1, 2, 4, 9, 10].map(|kind| count(&two, kind)), [2, 1, 2, 1, 0, 0]);
    assert!(two.contains(&vec![2, 10, 0, 0, 2, 0, 0, 0, 0, 0]), "IRQ 0 is input 2");
    assert!(two.contains(&vec![2, 10, 0, 9, 9, 0, 0, 0, 0xd, 0]), "the SCI is level-triggered");
    let many = entries(300);
    assert_eq!([0, 9, 10].map(|kind| count(&many, kind)), [255, 45, 1]);
}
