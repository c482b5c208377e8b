//! Where partitions are: GPT (UEFI specification 2.10, chapter 5) and MBR (the same, 5.2), or none at all.

use std::fmt;
use std::io;

use crate::ReadAt;

const SECTOR: u64 = 512;
/// How many partitions are looked at; a GPT has 128 as a rule.
const MAX_PARTITIONS: usize = 256;
/// MBR types (OSType) of what holds other partitions, and of what says that the disk has a GPT.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
const GPT_PROTECTIVE: u8 = 0xee;

/// A range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// As the guest's kernel numbers it, from 1; 0: the whole disk.
    pub number: u32,
    /// In bytes.
    pub start: u64,
    pub size: u64,
}

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number {
            0 => write!(f, "the whole disk"),
            number => write!(f, "partition {number}"),
        }
    }
}

/// The disk's partitions, or the whole disk where it has no partition table. What lies beyond its end is left out.
pub fn list(disk: &dyn ReadAt) -> io::Result<Vec<Partition>> {
    let whole = Partition { number: 0, start: 0, size: disk.size() };
    if disk.size() < 2 * SECTOR {
        return Ok(vec![whole]);
    }
    let boot_record = sector(disk, 0)?;
    let entries = mbr_entries(&boot_record);
    // A file system's boot code may end in the same signature, but its "partitions" then have no sense.
    let plausible = |e: &MbrEntry| matches!(e.status, 0 | 0x80) && e.first > 0 && e.sectors > 0;
    if !entries.iter().any(|e| e.kind != 0) || !entries.iter().all(|e| e.kind == 0 || plausible(e)) {
        return Ok(vec![whole]);
    }
    let found = if entries.iter().any(|e| e.kind == GPT_PROTECTIVE) { gpt(disk)? } else { mbr(disk, &entries)? };
    Ok(found.into_iter().filter(|p| p.start.checked_add(p.size).is_some_and(|end| end <= disk.size())).collect())
}

fn sector(disk: &dyn ReadAt, number: u64) -> io::Result<[u8; SECTOR as usize]> {
    let mut data = [0; SECTOR as usize];
    disk.read_at(&mut data, number.saturating_mul(SECTOR))?;
    Ok(data)
}

/// A little-endian number of `N` bytes, zero where there are none.
fn number<const N: usize>(data: &[u8], offset: usize) -> u64 {
    let bytes = data.get(offset..offset + N).unwrap_or_default();
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

struct MbrEntry {
    status: u8,
    kind: u8,
    first: u64,
    sectors: u64,
}

/// The four entries of a boot record; none without its signature.
fn mbr_entries(record: &[u8; SECTOR as usize]) -> Vec<MbrEntry> {
    if record[510..] != [0x55, 0xaa] {
        return Vec::new();
    }
    let entry = |data: &[u8]| MbrEntry {
        status: number::<1>(data, 0) as u8,
        kind: number::<1>(data, 4) as u8,
        first: number::<4>(data, 8),
        sectors: number::<4>(data, 12),
    };
    record[446..510].chunks_exact(16).map(entry).collect()
}

fn mbr(disk: &dyn ReadAt, entries: &[MbrEntry]) -> io::Result<Vec<Partition>> {
    let mut found = Vec::new();
    let partition = |number, first: u64, sectors: u64| Partition {
        number,
        start: first.saturating_mul(SECTOR),
        size: sectors.saturating_mul(SECTOR),
    };
    for (number, entry) in (1..).zip(entries) {
        if entry.kind != 0 && !EXTENDED.contains(&entry.kind) {
            found.push(partition(number, entry.first, entry.sectors));
        }
    }
    // Logical partitions are a chain of records, each with one partition, relative to the record, and the next record,
    // relative to the extended partition. They are numbered from 5.
    let Some(extended) = entries.iter().find(|e| EXTENDED.contains(&e.kind)) else { return Ok(found) };
    let mut record = extended.first;
    for number in (5..).take(MAX_PARTITIONS) {
        let Ok(data) = sector(disk, record) else { break };
        let entries = mbr_entries(&data);
        let [logical, next, ..] = &entries[..] else { break };
        if logical.kind != 0 && logical.sectors > 0 {
            found.push(partition(number, record.saturating_add(logical.first), logical.sectors));
        }
        if !EXTENDED.contains(&next.kind) || next.first == 0 {
            break;
        }
        record = extended.first.saturating_add(next.first);
    }
    Ok(found)
}

/// By the primary header, or by the backup at the disk's end where that is damaged.
fn gpt(disk: &dyn ReadAt) -> io::Result<Vec<Partition>> {
    let header = |number| sector(disk, number).ok().filter(|data| data.starts_with(b"EFI PART"));
    let Some(header) = header(1).or_else(|| header(disk.size() / SECTOR - 1)) else { return Ok(Vec::new()) };
    let (table, count, size) = (number::<8>(&header, 72), number::<4>(&header, 80), number::<4>(&header, 84));
    if !(128..=4096).contains(&size) {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for index in 0..count.min(MAX_PARTITIONS as u64) {
        let mut entry = [0; 128];
        let Some(offset) = table.checked_mul(SECTOR).and_then(|start| start.checked_add(index * size)) else { break };
        if disk.read_at(&mut entry, offset).is_err() {
            break;
        }
        let (first, last) = (number::<8>(&entry, 32), number::<8>(&entry, 40));
        let used = entry[..16].iter().any(|&byte| byte != 0);
        let Some(sectors) = last.checked_sub(first).and_then(|n| n.checked_add(1)) else { continue };
        if let (true, Some(start), Some(size)) = (used, first.checked_mul(SECTOR), sectors.checked_mul(SECTOR)) {
            found.push(Partition { number: index as u32 + 1, start, size });
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn mbr_disk(entries: &[(u8, u32, u32)]) -> Vec<u8> {
        let mut disk = vec![0; 16 * MIB as usize];
        write_record(&mut disk, 0, entries);
        disk
    }

    fn write_record(disk: &mut [u8], sector: usize, entries: &[(u8, u32, u32)]) {
        for (index, (kind, first, sectors)) in entries.iter().enumerate() {
            let at = sector * 512 + 446 + 16 * index;
            disk[at + 4] = *kind;
            disk[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
            disk[at + 12..at + 16].copy_from_slice(&sectors.to_le_bytes());
        }
        disk[sector * 512 + 510..sector * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
    }

    #[test]
    fn a_disk_without_a_table_is_one_whole() {
        let whole = [Partition { number: 0, start: 0, size: MIB }];
        assert_eq!(list(&vec![0u8; MIB as usize]).unwrap(), whole);
        assert_eq!(list(&vec![0u8; 7]).unwrap(), [Partition { number: 0, start: 0, size: 7 }]);
    }

    #[test]
    fn primary_and_logical_partitions_have_the_kernels_numbers() {
        let mut disk = mbr_disk(&[(0x83, 2048, 2048), (0x05, 8192, 8192)]);
        write_record(&mut disk, 8192, &[(0x83, 64, 100), (0x05, 1000, 500)]);
        write_record(&mut disk, 9192, &[(0x83, 32, 200)]);
        let found: Vec<_> = list(&disk).unwrap().iter().map(|p| (p.number, p.start / 512, p.size / 512)).collect();
        assert_eq!(found, [(1, 2048, 2048), (5, 8256, 100), (6, 9224, 200)]);
    }

    #[test]
    fn logical_partitions_that_loop_come_to_an_end() {
        let mut disk = mbr_disk(&[(0x05, 8192, 8192)]);
        write_record(&mut disk, 8192, &[(0x83, 64, 100), (0x05, 1000, 500)]);
        write_record(&mut disk, 9192, &[(0x83, 64, 100), (0x05, 1000, 500)]);
        assert_eq!(list(&disk).unwrap().len(), MAX_PARTITIONS);
    }

    #[test]
    fn partitions_beyond_the_end_are_left_out() {
        let disk = mbr_disk(&[(0x83, 2048, u32::MAX), (0x83, u32::MAX, 5)]);
        assert_eq!(list(&disk).unwrap(), []);
    }

    #[test]
    fn gpt_is_read_from_its_backup_when_damaged() {
        let mut disk = mbr_disk(&[(GPT_PROTECTIVE, 1, 32767)]);
        let mut header = [0; 512];
        header[..8].copy_from_slice(b"EFI PART");
        header[72..80].copy_from_slice(&2u64.to_le_bytes());
        header[80..84].copy_from_slice(&128u32.to_le_bytes());
        header[84..88].copy_from_slice(&128u32.to_le_bytes());
        let mut entry = [1; 128];
        entry[32..40].copy_from_slice(&2048u64.to_le_bytes());
        entry[40..48].copy_from_slice(&4095u64.to_le_bytes());
        disk[1024 + 128..1024 + 256].copy_from_slice(&entry);
        let end = disk.len() - 512;
        disk[end..].copy_from_slice(&header);
        let expected = [Partition { number: 2, start: MIB, size: MIB }];
        assert_eq!(list(&disk).unwrap(), expected);
        disk[512..1024].copy_from_slice(&header);
        disk[end..].fill(0);
        assert_eq!(list(&disk).unwrap(), expected);
    }
}
