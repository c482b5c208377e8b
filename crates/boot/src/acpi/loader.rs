//! ACPI tables for firmware: two files, and a third that says how to link them (QEMU `bios-linker-loader.c`, EDK II's
//! `QemuFwCfgAcpi`). Firmware puts the files where it likes, adds their addresses to the pointers, and sums up.

use acpi_tables::sdt::Sdt;
use memory::Ram;

use super::{Inventory, OEM_ID, OEM_REVISION, OEM_TABLE_ID, Table};

/// Names of the files.
pub const LOADER_FILE: &str = "etc/table-loader";
pub const TABLES_FILE: &str = "etc/acpi/tables";
pub const RSDP_FILE: &str = "etc/acpi/rsdp";

/// One command; the rest of its 128 bytes is zero.
const COMMAND_SIZE: usize = 128;
const NAME_SIZE: usize = 56;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
/// Anywhere, or where the RSDP is looked for.
const ZONE_HIGH: u8 = 1;
const ZONE_BIOS: u8 = 2;

/// Where the tables have pointers and checksums (ACPI 6.5: 5.2.5.3, 5.2.6, 5.2.9).
const CHECKSUM: u32 = 9;
const HEADER: u32 = 36;
const FADT_FACS: u32 = 36;
const FADT_DSDT: u32 = 40;
const FADT_X_DSDT: u32 = 140;
const RSDP_CHECKSUM: u32 = 8;
const RSDP_RSDT: u32 = 16;
const RSDP_XSDT: u32 = 24;
const RSDP_OLD_SIZE: u32 = 20;
const RSDP_SIZE: u32 = 36;
const RSDP_EXTENDED_CHECKSUM: u32 = 32;

/// The three files.
pub struct Files {
    pub loader: Vec<u8>,
    pub tables: Vec<u8>,
    pub rsdp: Vec<u8>,
}

#[derive(Default)]
struct Script(Vec<u8>);

impl Script {
    fn command(&mut self, number: u32, parts: &[&[u8]]) {
        let start = self.0.len();
        self.0.extend(number.to_le_bytes());
        parts.iter().for_each(|part| self.0.extend_from_slice(part));
        self.0.resize(start + COMMAND_SIZE, 0);
    }

    fn allocate(&mut self, file: &str, alignment: u32, zone: u8) {
        self.command(ALLOCATE, &[&name(file), &alignment.to_le_bytes(), &[zone]]);
    }

    /// The `size` bytes at `offset` of `file` hold an offset in the tables: it becomes an address.
    fn add_pointer(&mut self, file: &str, offset: u32, size: u8) {
        self.command(ADD_POINTER, &[&name(file), &name(TABLES_FILE), &offset.to_le_bytes(), &[size]]);
    }

    /// The byte at `offset` makes the sum of `length` bytes from `start` zero.
    fn add_checksum(&mut self, file: &str, offset: u32, start: u32, length: u32) {
        let parts = [offset, start, length].map(u32::to_le_bytes);
        self.command(ADD_CHECKSUM, &[&name(file), &parts[0], &parts[1], &parts[2]]);
    }
}

fn name(file: &str) -> [u8; NAME_SIZE] {
    let mut field = [0; NAME_SIZE];
    field.iter_mut().zip(file.bytes().take(NAME_SIZE - 1)).for_each(|(to, from)| *to = from);
    field
}

/// The files of a machine.
pub fn files(ram: &Ram, inventory: Inventory) -> Files {
    let mut script = Script::default();
    script.allocate(RSDP_FILE, 16, ZONE_BIOS);
    script.allocate(TABLES_FILE, 64, ZONE_HIGH);
    let mut blob = Vec::new();
    let (mut listed, mut xsdt) = (Vec::new(), 0);
    let all = super::tables(0, ram, inventory);
    for Table { address, bytes } in all.iter().skip(1) {
        let offset = *address as u32;
        blob.resize(offset as usize, 0);
        blob.extend_from_slice(bytes);
        match bytes.get(..4).unwrap_or_default() {
            b"FACP" => {
                for (at, size) in [(FADT_FACS, 4), (FADT_DSDT, 4), (FADT_X_DSDT, 8)] {
                    script.add_pointer(TABLES_FILE, offset + at, size);
                }
                listed.push(offset);
            }
            b"XSDT" => {
                xsdt = offset;
                (HEADER..bytes.len() as u32).step_by(8).for_each(|at| script.add_pointer(TABLES_FILE, offset + at, 8));
            }
            b"FACS" | b"DSDT" => continue,
            _ => {
                listed.push(offset);
                continue;
            }
        }
        sum_up(&mut blob, &mut script, offset, bytes.len());
    }
    let rsdt = append_rsdt(&mut blob, &mut script, &listed);
    let rsdp = rsdp(&mut script, rsdt, xsdt);
    Files { loader: script.0, tables: blob, rsdp }
}

/// What systems for ACPI 1.0 read in place of the XSDT. Returns its offset.
fn append_rsdt(blob: &mut Vec<u8>, script: &mut Script, listed: &[u32]) -> u32 {
    let mut rsdt = Sdt::new(*b"RSDT", HEADER, 1, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    listed.iter().for_each(|table| rsdt.append_slice(&table.to_le_bytes()));
    let bytes = super::bytes(&rsdt);
    blob.resize(blob.len().next_multiple_of(64), 0);
    let offset = blob.len() as u32;
    (HEADER..bytes.len() as u32).step_by(4).for_each(|at| script.add_pointer(TABLES_FILE, offset + at, 4));
    blob.extend_from_slice(&bytes);
    sum_up(blob, script, offset, bytes.len());
    offset
}

/// Has the checksum of the table at `offset` made. Some firmware takes what it was before for a part of the sum.
fn sum_up(blob: &mut [u8], script: &mut Script, offset: u32, length: usize) {
    if let Some(checksum) = blob.get_mut((offset + CHECKSUM) as usize) {
        *checksum = 0;
    }
    script.add_checksum(TABLES_FILE, offset + CHECKSUM, offset, length as u32);
}

fn rsdp(script: &mut Script, rsdt: u32, xsdt: u32) -> Vec<u8> {
    let mut rsdp = b"RSD PTR \0".to_vec();
    rsdp.extend(OEM_ID);
    rsdp.push(2);
    rsdp.extend(rsdt.to_le_bytes());
    rsdp.extend(RSDP_SIZE.to_le_bytes());
    rsdp.extend(u64::from(xsdt).to_le_bytes());
    rsdp.extend([0; 4]);
    script.add_pointer(RSDP_FILE, RSDP_RSDT, 4);
    script.add_pointer(RSDP_FILE, RSDP_XSDT, 8);
    script.add_checksum(RSDP_FILE, RSDP_CHECKSUM, 0, RSDP_OLD_SIZE);
    script.add_checksum(RSDP_FILE, RSDP_EXTENDED_CHECKSUM, 0, RSDP_SIZE);
    rsdp
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Does what firmware does: the tables with their addresses in them, and the RSDP.
    fn link(files: &Files, base: u64) -> (Vec<u8>, Vec<u8>) {
        let (mut tables, mut rsdp) = (files.tables.clone(), files.rsdp.clone());
        for command in files.loader.chunks(COMMAND_SIZE) {
            let file = if command[4..].starts_with(RSDP_FILE.as_bytes()) { &mut rsdp } else { &mut tables };
            match u32_at(command, 0) {
                ADD_POINTER => {
                    let (offset, size) = (u32_at(command, 116) as usize, command[120] as usize);
                    let mut value = [0; 8];
                    value[..size].copy_from_slice(&file[offset..offset + size]);
                    let value = u64::from_le_bytes(value) + base;
                    file[offset..offset + size].copy_from_slice(&value.to_le_bytes()[..size]);
                }
                ADD_CHECKSUM => {
                    let [at, start, length] = [60, 64, 68].map(|offset| u32_at(command, offset) as usize);
                    // As OVMF does it; SeaBIOS would subtract this from what was there.
                    file[at] = sum(&file[start..start + length]).wrapping_neg();
                }
                _ => {}
            }
        }
        (tables, rsdp)
    }

    #[test]
    fn linked_tables_are_found_from_the_rsdp_and_sum_to_zero() {
        let base = 0x7ffe_0000;
        let ram = Ram::new(64 << 20).unwrap();
        let (tables, rsdp) = link(&files(&ram, Inventory { cpus: 2, ..Inventory::default() }), base);
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let at = |address: u64| &tables[(address - base) as usize..];
        let checked = |address: u64| {
            let table = at(address);
            let table = &table[..u32_at(table, 4) as usize];
            assert_eq!(sum(table), 0, "{}", table[..4].escape_ascii());
            table
        };
        let (rsdt, xsdt) = (checked(u32_at(&rsdp, 16).into()), checked(u64_at(&rsdp, 24)));
        let short: Vec<u64> = rsdt[36..].chunks(4).map(|entry| u32_at(entry, 0).into()).collect();
        let long: Vec<u64> = xsdt[36..].chunks(8).map(|entry| u64_at(entry, 0)).collect();
        assert_eq!(short, long);
        let signatures: Vec<_> = long.iter().map(|address| &checked(*address)[..4]).collect();
        assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG", b"HPET"]);
        let fadt = checked(long[0]);
        assert!(at(u32_at(fadt, 36).into()).starts_with(b"FACS"));
        assert_eq!(checked(u32_at(fadt, 40).into())[..4], *b"DSDT");
        assert_eq!(u64_at(fadt, 140), u64::from(u32_at(fadt, 40)));
    }
}
