//! Whether a qcow2 image is consistent: every cluster is used as often as its reference count says.
//!
//! The walk follows header, L1 tables (the active one and those of internal snapshots), L2 tables and what these
//! map, and bitmaps, and counts how often each cluster of the file is used. The counts are compared with the image's own. A count
//! that is too small is an error: the cluster would be given out a second time. One that is too large is a leak:
//! space is lost, no more. Repair writes new counts behind all that is used and then, with one write of the
//! header, makes them the image's.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::header::{
    Bitmaps, COMPRESSED, COPIED, CORRUPT, DIRTY, Header, INCOMPATIBLE, OFFSET, REFCOUNT_TABLE, be32, be64, read_padded,
};

/// L2 tables that are looked at: those of 2 PiB in clusters of 64 KiB. Damaged images can lead to the same ones for ever.
const MOST_VISITS: u64 = 1 << 22;
/// An entry of the directory of bitmaps without name and extra data, and the most bytes of a bitmap's table.
const BITMAP_ENTRY: usize = 24;
const MAX_BITMAP_TABLE: u64 = 8 << 20;
/// What can be told; an image may have any number of errors.
const MOST_TOLD: usize = 20;

/// The result of a check.
#[derive(Debug, Default)]
pub struct Report {
    /// Damage: data is or may get lost.
    pub errors: u64,
    /// Clusters that are counted and not used.
    pub leaks: u64,
    /// Clusters that hold the disk's data, and how many of them are compressed.
    pub data_clusters: u64,
    pub compressed_clusters: u64,
    /// The first errors, in words.
    pub details: Vec<String>,
    /// The image says that its reference counts may be wrong, or that somebody found it damaged.
    pub dirty: bool,
}

impl Report {
    fn error(&mut self, what: String) {
        self.errors += 1;
        if self.details.len() < MOST_TOLD {
            self.details.push(what);
        }
    }
}

/// A table entry with the wrong "copied" flag, and what it should be.
struct Flag {
    place: u64,
    value: u64,
}

struct Walk<'a> {
    file: &'a File,
    header: &'a Header,
    length: u64,
    /// How often each cluster is used, by its number.
    used: HashMap<u64, u64>,
    tables: HashSet<u64>,
    visits: u64,
    /// Entries of the active tables: place, value, cluster they point to.
    entries: Vec<(u64, u64, u64)>,
    report: Report,
}

/// Checks an image; `repair`: and writes its reference counts anew if they are wrong.
pub fn check(file: &File, repair: bool) -> io::Result<Report> {
    let header = Header::read(file)?;
    let length = file.metadata()?.len();
    let mut walk = Walk {
        file,
        header: &header,
        length,
        used: HashMap::new(),
        tables: HashSet::new(),
        visits: 0,
        entries: Vec::new(),
        report: Report { dirty: header.incompatible & (DIRTY | CORRUPT) != 0, ..Report::default() },
    };
    walk.all()?;
    let counts = walk.compare()?;
    let flags = walk.check_flags(&counts);
    let (used, mut report) = (walk.used, walk.report);
    if repair && (report.errors + report.leaks > 0 || report.dirty) {
        repair_counts(file, &header, length, used, &flags)?;
        // What repair can't mend is still there when it is looked at again.
        report = check(file, false)?;
    }
    Ok(report)
}

fn endless() -> io::Error {
    io::Error::other("the tables lead to one another without end")
}

impl Walk<'_> {
    fn cluster_size(&self) -> u64 {
        self.header.cluster_size()
    }

    /// Counts the clusters of a range of the file. False: it isn't in the file.
    fn use_range(&mut self, what: &str, offset: u64, bytes: u64) -> bool {
        let Some(end) = offset.checked_add(bytes).filter(|_| offset < self.length) else {
            self.report.error(format!("{what} at {offset:#x} lies beyond the end of the file"));
            return false;
        };
        for cluster in offset / self.cluster_size()..end.div_ceil(self.cluster_size()) {
            *self.used.entry(cluster).or_default() += 1;
        }
        true
    }

    fn all(&mut self) -> io::Result<()> {
        let header = self.header;
        self.use_range("the header", 0, self.cluster_size());
        let table = header.refcount_table_clusters << header.cluster_bits;
        self.use_range("the reference count table", header.refcount_table_offset, table);
        self.l1(header.l1_offset, header.l1_entries, true)?;
        let mut at = header.snapshots_offset;
        for _ in 0..header.snapshots {
            let entry = read_padded(self.file, at, 40)?;
            let (offset, entries) = (be64(&entry, 0), u64::from(be32(&entry, 8)));
            let names = u64::from(be32(&entry, 12) >> 16) + u64::from(be32(&entry, 12) & 0xffff);
            let size = (40 + u64::from(be32(&entry, 36)) + names).next_multiple_of(8);
            if entries * 8 > 32 << 20 || at.checked_add(size).is_none_or(|end| end > self.length) {
                self.report.error(format!("the snapshot table's entry at {at:#x} is not possible"));
                return Ok(());
            }
            self.l1(offset, entries, false)?;
            at += size;
        }
        if at > header.snapshots_offset {
            self.use_range("the snapshot table", header.snapshots_offset, at - header.snapshots_offset);
        }
        self.bitmaps()
    }

    /// The directory of bitmaps, their tables, and what these point to.
    fn bitmaps(&mut self) -> io::Result<()> {
        let Some(Bitmaps { count, offset, size }) = self.header.bitmaps else { return Ok(()) };
        if !self.use_range("the directory of bitmaps", offset, size) {
            return Ok(());
        }
        let directory = read_padded(self.file, offset, size as usize)?;
        let mut at = 0;
        for _ in 0..count {
            let (table, entries) = (be64(&directory, at), u64::from(be32(&directory, at + 8)));
            let (name, extra) = (be32(&directory, at + 16) & 0xffff, be32(&directory, at + 20));
            at += BITMAP_ENTRY.saturating_add(extra as usize).saturating_add(name as usize).next_multiple_of(8);
            if at > directory.len() || entries * 8 > MAX_BITMAP_TABLE {
                self.report.error(format!("the directory of bitmaps at {offset:#x} is not possible"));
                return Ok(());
            }
            if entries == 0 || !self.use_range("a bitmap's table", table, entries * 8) {
                continue;
            }
            self.visits += 1 + entries * 8 / self.cluster_size();
            if self.visits > MOST_VISITS {
                return Err(endless());
            }
            let table = read_padded(self.file, table, (entries * 8) as usize)?;
            for entry in (0..entries as usize).map(|index| be64(&table, index * 8) & OFFSET).filter(|entry| *entry != 0)
            {
                self.use_range("a bitmap", entry, self.cluster_size());
            }
        }
        Ok(())
    }

    fn l1(&mut self, offset: u64, entries: u64, active: bool) -> io::Result<()> {
        if entries == 0 || !self.use_range("an L1 table", offset, entries * 8) {
            return Ok(());
        }
        let table = read_padded(self.file, offset, (entries * 8) as usize)?;
        for index in 0..entries {
            let entry = be64(&table, (index * 8) as usize);
            let l2 = entry & OFFSET;
            if l2 == 0 {
                continue;
            }
            if !l2.is_multiple_of(self.cluster_size()) {
                self.report.error(format!("L1 entry {index}: the offset {l2:#x} is not that of a cluster"));
                continue;
            }
            if active {
                self.entries.push((offset + index * 8, entry, l2 >> self.header.cluster_bits));
            }
            if self.use_range("an L2 table", l2, self.cluster_size()) {
                self.l2(l2, active)?;
            }
        }
        Ok(())
    }

    fn l2(&mut self, offset: u64, active: bool) -> io::Result<()> {
        self.visits += 1;
        if self.visits > MOST_VISITS {
            return Err(endless());
        }
        let first_visit = self.tables.insert(offset);
        if !first_visit && active {
            // Two entries of one table lead here; that is told by the counts. The walk must end, though.
            return Ok(());
        }
        let table = read_padded(self.file, offset, self.cluster_size() as usize)?;
        let size = self.header.l2_entry_size();
        for index in 0..self.cluster_size() / size {
            let entry = be64(&table, (index * size) as usize);
            let place = offset + index * size;
            if entry & COMPRESSED != 0 {
                self.compressed(place, entry);
            } else if entry & OFFSET != 0 {
                let data = entry & OFFSET;
                if !data.is_multiple_of(self.cluster_size()) {
                    self.report.error(format!("L2 entry at {place:#x}: {data:#x} is not the offset of a cluster"));
                    continue;
                }
                if self.use_range("a data cluster", data, self.cluster_size()) {
                    self.report.data_clusters += u64::from(active);
                    if active {
                        self.entries.push((place, entry, data >> self.header.cluster_bits));
                    }
                }
            }
        }
        Ok(())
    }

    /// A compressed cluster: its offset, and its length in sectors beyond that of the first byte.
    fn compressed(&mut self, place: u64, entry: u64) {
        let bits = 62 - (self.header.cluster_bits - 8);
        let offset = entry & ((1 << bits) - 1) & 0x00ff_ffff_ffff_ffff;
        let sectors = (entry & (COMPRESSED - 1)) >> bits;
        let end = (offset & !511).saturating_add((sectors + 1) * 512);
        if entry & COPIED != 0 {
            self.report.error(format!("L2 entry at {place:#x}: a compressed cluster can't be marked as copied"));
        }
        if self.use_range("a compressed cluster", offset, end.saturating_sub(offset)) {
            self.report.data_clusters += 1;
            self.report.compressed_clusters += 1;
        }
    }

    /// Compares the counts with the image's, which are returned by cluster, as far as they are not 0.
    fn compare(&mut self) -> io::Result<HashMap<u64, u64>> {
        let header = self.header;
        let table_bytes = header.refcount_table_clusters << header.cluster_bits;
        let table = read_padded(self.file, header.refcount_table_offset, table_bytes as usize)?;
        let per_block = (self.cluster_size() * 8) >> header.refcount_order;
        let mut counts = HashMap::new();
        let mut blocks = HashSet::new();
        for index in 0..table_bytes / 8 {
            let block = be64(&table, (index * 8) as usize) & OFFSET;
            if block == 0 {
                continue;
            }
            if !block.is_multiple_of(self.cluster_size()) || !blocks.insert(block) {
                self.report.error(format!("reference count table entry {index}: {block:#x} is not possible"));
                continue;
            }
            if !self.use_range("a reference count block", block, self.cluster_size()) {
                continue;
            }
            let data = read_padded(self.file, block, self.cluster_size() as usize)?;
            for entry in 0..per_block {
                let count = count_at(&data, entry, header.refcount_order);
                if let (true, Some(cluster)) = (count != 0, index.checked_mul(per_block)) {
                    counts.insert(cluster + entry, count);
                }
            }
        }
        for (&cluster, &used) in &self.used {
            let count = counts.get(&cluster).copied().unwrap_or(0);
            if count < used {
                self.report.errors += 1;
                if self.report.details.len() < MOST_TOLD {
                    let at = cluster << header.cluster_bits;
                    self.report
                        .details
                        .push(format!("the cluster at {at:#x} is used {used} times and counted {count}"));
                }
            }
        }
        for (cluster, &count) in &counts {
            self.report.leaks += u64::from(count > self.used.get(cluster).copied().unwrap_or(0));
        }
        Ok(counts)
    }

    /// The "copied" flag allows writing in place, so it must be there exactly where a cluster is used once.
    fn check_flags(&mut self, counts: &HashMap<u64, u64>) -> Vec<Flag> {
        let mut wrong = Vec::new();
        for &(place, value, cluster) in &self.entries {
            let once = self.used.get(&cluster) == Some(&1);
            let expected = if once { value | COPIED } else { value & !COPIED };
            if expected != value {
                wrong.push(Flag { place, value: expected });
            }
            let claimed = counts.get(&cluster) == Some(&1);
            if claimed != (value & COPIED != 0) && self.report.details.len() < MOST_TOLD {
                self.report.details.push(format!("the entry at {place:#x} has the wrong \"copied\" flag"));
            }
            self.report.errors += u64::from(claimed != (value & COPIED != 0));
        }
        wrong
    }
}

/// Whether the image's reference counts can be trusted as far as is needed to write it: they keep header, tables and
/// themselves from being given out as free clusters. Cheap, as it reads no L2 table.
pub fn metadata_is_counted(file: &File, header: &Header) -> io::Result<bool> {
    let (size, length) = (header.cluster_size(), file.metadata()?.len());
    let table_bytes = header.refcount_table_clusters << header.cluster_bits;
    let table = read_padded(file, header.refcount_table_offset, table_bytes as usize)?;
    let per_block = (size * 8) >> header.refcount_order;
    // Clusters that must be counted, by the block that counts them.
    let mut needed: HashMap<u64, Vec<u64>> = HashMap::new();
    let mut need = |offset: u64, bytes: u64| {
        for cluster in offset / size..offset.saturating_add(bytes).div_ceil(size) {
            needed.entry(cluster / per_block).or_default().push(cluster % per_block);
        }
    };
    need(0, size);
    need(header.l1_offset, header.l1_entries * 8);
    need(header.refcount_table_offset, table_bytes);
    let block_at = |index: u64| be64(&table, usize::try_from(index * 8).unwrap_or(usize::MAX)) & OFFSET;
    for index in 0..table_bytes / 8 {
        match block_at(index) {
            0 => {}
            block if !block.is_multiple_of(size) || block >= length => return Ok(false),
            block => need(block, size),
        }
    }
    for (index, clusters) in needed {
        let block = if index < table_bytes / 8 { block_at(index) } else { 0 };
        if block == 0 {
            return Ok(false);
        }
        let data = read_padded(file, block, size as usize)?;
        if clusters.into_iter().any(|cluster| count_at(&data, cluster, header.refcount_order) == 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Entry `index` of a reference count block; counts of less than a byte begin at its low bits.
fn count_at(block: &[u8], index: u64, order: u32) -> u64 {
    let bits = 1u64 << order;
    let bit = index * bits;
    let byte = (bit / 8) as usize;
    match order {
        0..=2 => u64::from(block.get(byte).copied().unwrap_or(0)) >> (bit % 8) & ((1 << bits) - 1),
        3 => block.get(byte).copied().unwrap_or(0).into(),
        4 => u64::from(be32(block, byte) >> 16),
        5 => be32(block, byte).into(),
        _ => be64(block, byte),
    }
}

fn set_count(block: &mut [u8], index: u64, order: u32, count: u64) {
    let bits = 1u64 << order;
    let bit = index * bits;
    let byte = (bit / 8) as usize;
    if order < 3 {
        if let Some(to) = block.get_mut(byte) {
            *to |= (count << (bit % 8)) as u8;
        }
        return;
    }
    let bytes = count.to_be_bytes();
    let width = (bits / 8) as usize;
    let value = bytes.iter().skip(bytes.len() - width);
    block.iter_mut().skip(byte).take(width).zip(value).for_each(|(to, from)| *to = *from);
}

/// Writes new reference counts, for `used`, behind the end of the file, and makes them the image's.
fn repair_counts(
    file: &File,
    header: &Header,
    length: u64,
    mut used: HashMap<u64, u64>,
    flags: &[Flag],
) -> io::Result<()> {
    let size = header.cluster_size();
    let per_block = (size * 8) >> header.refcount_order;
    let most = if header.refcount_order == 6 { u64::MAX } else { (1 << (1u64 << header.refcount_order)) - 1 };
    if used.values().any(|count| *count > most) {
        return Err(io::Error::other("a cluster is used more often than the image can count"));
    }
    // The old table and blocks are free from now on.
    let old_table = header.refcount_table_offset >> header.cluster_bits;
    let mut release = |cluster| {
        if let Some(count) = used.get_mut(&cluster) {
            *count = count.saturating_sub(1);
        }
    };
    (old_table..old_table + header.refcount_table_clusters).for_each(&mut release);
    let table = read_padded(
        file,
        header.refcount_table_offset,
        (header.refcount_table_clusters << header.cluster_bits) as usize,
    )?;
    for index in 0..table.len() / 8 {
        let block = be64(&table, index * 8) & OFFSET;
        if block != 0 {
            release(block >> header.cluster_bits);
        }
    }
    used.insert(0, 1);

    let first = length.div_ceil(size);
    // The new blocks count themselves and the table: as many as it takes.
    let mut blocks = 0;
    let (table_clusters, end) = loop {
        let table_clusters = (blocks * 8u64).div_ceil(size).max(1);
        let end = first + table_clusters + blocks;
        if blocks * per_block >= end {
            break (table_clusters, end);
        }
        blocks = end.div_ceil(per_block);
    };
    (first..end).for_each(|cluster| _ = used.insert(cluster, 1));

    let mut new_table = vec![0; (table_clusters * size) as usize];
    for block in 0..blocks {
        let mut data = vec![0; size as usize];
        for entry in 0..per_block {
            if let Some(&count) = used.get(&(block * per_block + entry)) {
                set_count(&mut data, entry, header.refcount_order, count);
            }
        }
        let place = (first + table_clusters + block) * size;
        file.write_all_at(&data, place)?;
        let entry = new_table.iter_mut().skip((block * 8) as usize);
        entry.zip(place.to_be_bytes()).for_each(|(to, from)| *to = from);
    }
    file.write_all_at(&new_table, first * size)?;
    // Flags that allow too much go before the counts, those that allow more after them.
    for flag in flags.iter().filter(|flag| flag.value & COPIED == 0) {
        file.write_all_at(&flag.value.to_be_bytes(), flag.place)?;
    }
    file.sync_data()?;
    let mut place = (first * size).to_be_bytes().to_vec();
    place.extend((table_clusters as u32).to_be_bytes());
    file.write_all_at(&place, REFCOUNT_TABLE)?;
    file.sync_data()?;
    for flag in flags.iter().filter(|flag| flag.value & COPIED != 0) {
        file.write_all_at(&flag.value.to_be_bytes(), flag.place)?;
    }
    if header.incompatible & (DIRTY | CORRUPT) != 0 {
        file.sync_data()?;
        file.write_all_at(&(header.incompatible & !(DIRTY | CORRUPT)).to_be_bytes(), INCOMPATIBLE)?;
    }
    file.sync_data()
}
