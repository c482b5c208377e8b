//! The disk around the file system: a partition table, and GRUB for the firmware of PCs and for EFI.
//!
//! The disk has a GPT (UEFI 2.10, 5.3) with three partitions. The first holds GRUB's core image, which the 446 bytes of
//! code in the first sector load on a PC with a BIOS; the second is EFI's, with GRUB as the program that firmware starts
//! when nothing else is said; the third is the file system of the root, with the rest of GRUB and its menu.

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};

const SECTOR: u64 = 512;
const MIB: u64 = 1 << 20;
/// The partitions, in bytes. The backup of the partition table takes the disk's end.
const BIOS_BOOT: std::ops::Range<u64> = MIB..2 * MIB;
const EFI_SYSTEM: std::ops::Range<u64> = 2 * MIB..34 * MIB;
pub const ROOT_START: u64 = 34 * MIB;
const TAIL: u64 = MIB;

/// Partition types, as their bytes are on the disk.
const TYPE_BIOS_BOOT: [u8; 16] = *b"Hah!IdontNeedEFI";
const TYPE_EFI_SYSTEM: [u8; 16] =
    [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];
const TYPE_ROOT_X86_64: [u8; 16] =
    [0xe3, 0xbc, 0x68, 0x4f, 0xcd, 0xe8, 0xb1, 0x4d, 0x96, 0xe7, 0xfb, 0xca, 0xf9, 0x84, 0xb7, 0x09];
/// Entries of the table, and the size of each.
const ENTRIES: usize = 128;
const ENTRY_SIZE: usize = 128;
const ENTRY_SECTORS: u64 = (ENTRIES * ENTRY_SIZE) as u64 / SECTOR;
const HEADER_SIZE: usize = 92;

/// In GRUB's first sector: where its code may not go (the partition table of old), the sector of the core image, and the
/// jump that checks the drive's number, which is left out on hard disks.
const CODE_SIZE: usize = 440;
const CORE_SECTOR: usize = 0x5c;
const DRIVE_CHECK: usize = 0x66;
/// In the first sector of the core image: the list of the rest, as sector, count and segment.
const BLOCK_LIST: usize = 0x1f4;
const CORE_SEGMENT: u16 = 0x820;

/// GRUB, as its own tools have made it.
pub struct Grub {
    /// The first sector, for a BIOS.
    pub boot: Vec<u8>,
    pub core: Vec<u8>,
    /// The program for EFI.
    pub efi: Vec<u8>,
}

/// How large the root file system is on a disk of `size` bytes.
pub fn root_size(size: u64) -> u64 {
    size.saturating_sub(ROOT_START + TAIL) / MIB * MIB
}

/// Writes everything but the root file system.
pub fn write(disk: &File, size: u64, grub: &Grub) -> io::Result<()> {
    let partitions = [
        (TYPE_BIOS_BOOT, BIOS_BOOT, "BIOS boot"),
        (TYPE_EFI_SYSTEM, EFI_SYSTEM, "EFI system"),
        (TYPE_ROOT_X86_64, ROOT_START..ROOT_START + root_size(size), "root"),
    ];
    let mut entries = vec![0; ENTRIES * ENTRY_SIZE];
    for (entry, (kind, range, name)) in entries.chunks_mut(ENTRY_SIZE).zip(partitions) {
        entry[..16].copy_from_slice(&kind);
        entry[16..32].copy_from_slice(&identifier()?);
        entry[32..40].copy_from_slice(&(range.start / SECTOR).to_le_bytes());
        entry[40..48].copy_from_slice(&(range.end / SECTOR - 1).to_le_bytes());
        for (place, unit) in entry[56..].chunks_mut(2).zip(name.encode_utf16()) {
            place.copy_from_slice(&unit.to_le_bytes());
        }
    }
    let (last, own) = (size / SECTOR - 1, identifier()?);
    let backup = last - ENTRY_SECTORS;
    for (at, other, table) in [(1, last, 2), (last, 1, backup)] {
        disk.write_all_at(&header(at, other, table, last, &own, &entries), at * SECTOR)?;
        disk.write_all_at(&entries, table * SECTOR)?;
    }
    disk.write_all_at(&first_sector(&grub.boot, last)?, 0)?;
    disk.write_all_at(&core(&grub.core)?, BIOS_BOOT.start)?;
    disk.write_all_at(&efi_file_system(&grub.efi)?, EFI_SYSTEM.start)
}

/// A random identifier, as the kernel makes them.
fn identifier() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    // Version 4, variant 1, in the byte order of the disk.
    bytes[7] = bytes[7] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Ok(bytes)
}

fn header(at: u64, other: u64, table: u64, last: u64, own: &[u8; 16], entries: &[u8]) -> Vec<u8> {
    let mut header = b"EFI PART".to_vec();
    header.extend(0x1_0000u32.to_le_bytes());
    header.extend((HEADER_SIZE as u32).to_le_bytes());
    header.extend([0; 8]);
    let usable = [2 + ENTRY_SECTORS, last - ENTRY_SECTORS - 1];
    [at, other, usable[0], usable[1]].iter().for_each(|sector| header.extend(sector.to_le_bytes()));
    header.extend(own);
    header.extend(table.to_le_bytes());
    [ENTRIES as u32, ENTRY_SIZE as u32, checksum(entries)].iter().for_each(|n| header.extend(n.to_le_bytes()));
    let sum = checksum(&header);
    header[16..20].copy_from_slice(&sum.to_le_bytes());
    header.resize(SECTOR as usize, 0);
    header
}

fn checksum(bytes: &[u8]) -> u32 {
    let mut sum = flate2::Crc::new();
    sum.update(bytes);
    sum.sum()
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// GRUB's code with the protective partition table (UEFI 2.10, 5.2.3).
fn first_sector(boot: &[u8], last: u64) -> io::Result<Vec<u8>> {
    let mut sector = boot.get(..CODE_SIZE).ok_or_else(|| invalid("GRUB's boot.img is too short"))?.to_vec();
    sector.resize(SECTOR as usize, 0);
    sector[CORE_SECTOR..CORE_SECTOR + 8].copy_from_slice(&(BIOS_BOOT.start / SECTOR).to_le_bytes());
    sector[DRIVE_CHECK..DRIVE_CHECK + 2].copy_from_slice(&[0x90, 0x90]);
    let protective = &mut sector[446..462];
    protective[..8].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff]);
    protective[8..12].copy_from_slice(&1u32.to_le_bytes());
    protective[12..16].copy_from_slice(&u32::try_from(last).unwrap_or(u32::MAX).to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    Ok(sector)
}

/// The core image, told where the rest of it is.
fn core(core: &[u8]) -> io::Result<Vec<u8>> {
    let mut core = core.to_vec();
    core.resize(core.len().next_multiple_of(SECTOR as usize), 0);
    if core.len() < 2 * SECTOR as usize || core.len() as u64 > BIOS_BOOT.end - BIOS_BOOT.start {
        return Err(invalid("GRUB's core image does not fit its partition"));
    }
    let rest = (core.len() as u64 / SECTOR - 1) as u16;
    core[BLOCK_LIST..BLOCK_LIST + 8].copy_from_slice(&(BIOS_BOOT.start / SECTOR + 1).to_le_bytes());
    core[BLOCK_LIST + 8..BLOCK_LIST + 10].copy_from_slice(&rest.to_le_bytes());
    core[BLOCK_LIST + 10..BLOCK_LIST + 12].copy_from_slice(&CORE_SEGMENT.to_le_bytes());
    Ok(core)
}

fn efi_file_system(program: &[u8]) -> io::Result<Vec<u8>> {
    let mut volume = Cursor::new(vec![0; (EFI_SYSTEM.end - EFI_SYSTEM.start) as usize]);
    fatfs::format_volume(&mut volume, FormatVolumeOptions::new().volume_label(*b"EFI        "))?;
    volume.seek(SeekFrom::Start(0))?;
    {
        let files = FileSystem::new(&mut volume, FsOptions::new())?;
        files.root_dir().create_dir("EFI")?;
        files.root_dir().create_dir("EFI/BOOT")?;
        files.root_dir().create_file("EFI/BOOT/BOOTX64.EFI")?.write_all(program)?;
        files.unmount()?;
    }
    Ok(volume.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_has_a_partition_table_and_grub_in_its_places() {
        let size = 1 << 30;
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(size).unwrap();
        let grub = Grub { boot: vec![7; 512], core: vec![8; 3000], efi: b"MZ program".to_vec() };
        write(&disk, size, &grub).unwrap();
        let read = |at: u64, length: usize| {
            let mut bytes = vec![0; length];
            disk.read_exact_at(&mut bytes, at).unwrap();
            bytes
        };
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        for at in [512, size - 512] {
            let mut header = read(at, HEADER_SIZE);
            assert_eq!(number(&header[24..32]), at / 512);
            let table = read(number(&header[72..80]) * 512, ENTRIES * ENTRY_SIZE);
            assert_eq!(number(&header[88..92]) as u32, checksum(&table));
            let sum = number(&header[16..20]) as u32;
            header[16..20].fill(0);
            assert_eq!(sum, checksum(&header));
            let root = &table[2 * ENTRY_SIZE..];
            assert_eq!(number(&root[32..40]) * 512, ROOT_START);
            assert_eq!((number(&root[40..48]) + 1) * 512, ROOT_START + root_size(size));
            assert!(number(&root[40..48]) <= number(&header[48..56]));
        }
        let first = read(0, 512);
        assert_eq!((first[0], number(&first[CORE_SECTOR..CORE_SECTOR + 8])), (7, 2048));
        assert_eq!((first[450], &first[510..]), (0xee, &[0x55, 0xaa][..]));
        let core = read(MIB, 512);
        assert_eq!((number(&core[BLOCK_LIST..BLOCK_LIST + 8]), core[BLOCK_LIST + 8]), (2049, 5));
        let volume = FileSystem::new(Cursor::new(read(2 * MIB, 32 << 20)), FsOptions::new()).unwrap();
        let mut program = Vec::new();
        volume.root_dir().open_file("EFI/BOOT/BOOTX64.EFI").unwrap().read_to_end(&mut program).unwrap();
        assert_eq!(program, grub.efi);
        assert!(write(&disk, size, &Grub { core: vec![0; 2 << 20], ..grub }).is_err());
    }
}
