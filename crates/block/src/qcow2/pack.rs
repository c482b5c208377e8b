//! Writes an image whose clusters are compressed, in one go from the disk's start to its end: `imago` doesn't write such ones.
//!
//! In the file: the header's cluster, the L1 table, then data and L2 tables as they come, at last what counts references.
//! Compressed clusters lie packed one behind the other; what does not become smaller is stored as it is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::thread;

use flate2::{Compress, FlushCompress, Status};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

use super::header::{COMPRESSED, COMPRESSION_TYPE, COPIED, Compression, MAX_L1_BYTES};
use crate::open::QCOW2_MAGIC;

const CLUSTER_BITS: u32 = 16;
pub const CLUSTER: usize = 1 << CLUSTER_BITS;
/// Clusters that an L2 table maps.
const PER_TABLE: u64 = CLUSTER as u64 / 8;
/// Reference counts of 16 bits.
const REFCOUNT_ORDER: u32 = 4;
const PER_BLOCK: u64 = CLUSTER as u64 / 2;
/// Up to the type of compression, in steps of 8 bytes.
const HEADER: usize = 112;
/// Readers of compressed clusters have a window of 4 KiB for what was before (QEMU, `block/qcow2-threads.c`).
const WINDOW_BITS: u8 = 12;
/// Where a compressed cluster's entry has the number of sectors behind its first.
const SECTORS_SHIFT: u32 = 62 - (CLUSTER_BITS - 8);

/// An image that is being written.
pub struct Packer<'a> {
    file: &'a File,
    size: u64,
    compression: Compression,
    l1: Vec<u64>,
    /// The table of the clusters that come now, and its number.
    l2: Vec<u64>,
    table: u64,
    /// Clusters of the file that have been given out, with how often they are used.
    used: Vec<u16>,
    /// Where the next compressed cluster goes, if it fits there.
    packed: u64,
}

impl<'a> Packer<'a> {
    /// An image of a disk of `size` bytes in the empty `file`.
    pub fn new(file: &'a File, size: u64, compression: Compression) -> io::Result<Self> {
        let tables = size.div_ceil(CLUSTER as u64 * PER_TABLE);
        if tables * 8 > MAX_L1_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a disk of this size needs too large an L1 table"));
        }
        let (l1, l2) = (vec![0; tables as usize], vec![0; PER_TABLE as usize]);
        let mut packer = Packer { file, size, compression, l1, l2, table: 0, used: Vec::new(), packed: 0 };
        packer.allocate(1 + packer.l1_clusters());
        Ok(packer)
    }

    fn l1_clusters(&self) -> u64 {
        (self.l1.len() as u64 * 8).div_ceil(CLUSTER as u64)
    }

    /// New clusters at the end of the file. Returns their offset.
    fn allocate(&mut self, clusters: u64) -> u64 {
        let offset = self.used.len() as u64 * CLUSTER as u64;
        self.used.resize(self.used.len() + clusters as usize, 1);
        offset
    }

    /// Adds clusters of the disk in ascending order: their numbers, and what is in them.
    pub fn add(&mut self, clusters: &[(u64, &mut [u8; CLUSTER])]) -> io::Result<()> {
        let workers = thread::available_parallelism().map_or(1, |processors| processors.get());
        let share = clusters.len().div_ceil(workers).max(1);
        let compression = self.compression;
        let compressed: Vec<_> = thread::scope(|scope| {
            let work = |share: &[(u64, &mut [u8; CLUSTER])]| -> Vec<Option<Vec<u8>>> {
                share.iter().map(|(_, data)| compress(compression, &**data)).collect()
            };
            let threads: Vec<_> = clusters.chunks(share).map(|share| scope.spawn(move || work(share))).collect();
            threads.into_iter().map(|thread| thread.join()).collect::<Result<Vec<_>, _>>()
        })
        .map_err(|_| io::Error::other("the compressor has failed"))?;
        for ((number, data), compressed) in clusters.iter().zip(compressed.into_iter().flatten()) {
            let entry = match compressed {
                Some(bytes) => self.pack(&bytes)?,
                None => {
                    let offset = self.allocate(1);
                    self.file.write_all_at(&**data, offset)?;
                    offset | COPIED
                }
            };
            self.map(*number, entry)?;
        }
        Ok(())
    }

    /// Stores a compressed cluster. Returns its entry.
    fn pack(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let length = bytes.len() as u64;
        let end = self.used.len() as u64 * CLUSTER as u64;
        let left = self.packed.next_multiple_of(CLUSTER as u64) - self.packed;
        let offset = if length <= left {
            self.packed
        } else {
            // It may go on in the next cluster only if that is the next in the file.
            let begun = self.packed + left == end && left > 0;
            let offset = if begun { self.packed } else { end };
            let new = (offset + length).div_ceil(CLUSTER as u64) - self.used.len() as u64;
            self.allocate(new);
            // They have no user but this one, who is counted below.
            let fresh = self.used.len() - new as usize;
            self.used.iter_mut().skip(fresh).for_each(|count| *count = 0);
            offset
        };
        self.file.write_all_at(bytes, offset)?;
        self.packed = offset + length;
        let (first, last) = (offset / CLUSTER as u64, (self.packed - 1) / CLUSTER as u64);
        for count in self.used.iter_mut().skip(first as usize).take((last - first + 1) as usize) {
            *count = count.checked_add(1).ok_or_else(|| io::Error::other("a cluster has too many users"))?;
        }
        let sectors = (self.packed - 1) / 512 - offset / 512;
        Ok(COMPRESSED | sectors << SECTORS_SHIFT | offset)
    }

    fn map(&mut self, number: u64, entry: u64) -> io::Result<()> {
        let table = number / PER_TABLE;
        if table != self.table {
            self.finish_table()?;
            self.table = table;
        }
        if let Some(place) = self.l2.get_mut((number % PER_TABLE) as usize) {
            *place = entry;
        }
        Ok(())
    }

    fn finish_table(&mut self) -> io::Result<()> {
        if self.l2.iter().all(|entry| *entry == 0) {
            return Ok(());
        }
        let offset = self.allocate(1);
        self.file.write_all_at(&big_endian(&self.l2), offset)?;
        self.l2.fill(0);
        if let Some(place) = self.l1.get_mut(self.table as usize) {
            *place = offset | COPIED;
        }
        Ok(())
    }

    /// Writes what leads to the data. The header is the last: without it, the file is no image.
    pub fn finish(mut self) -> io::Result<()> {
        self.finish_table()?;
        self.file.write_all_at(&big_endian(&self.l1), CLUSTER as u64)?;
        // They count themselves, too.
        let (mut blocks, mut tables) = (0, 0);
        loop {
            let needed = (self.used.len() as u64 + blocks + tables).div_ceil(PER_BLOCK);
            let needed_tables = (needed * 8).div_ceil(CLUSTER as u64);
            if (needed, needed_tables) == (blocks, tables) {
                break;
            }
            (blocks, tables) = (needed, needed_tables);
        }
        let table = self.allocate(tables);
        let first_block = self.allocate(blocks);
        let offsets: Vec<u64> = (0..blocks).map(|block| first_block + block * CLUSTER as u64).collect();
        self.file.write_all_at(&big_endian(&offsets), table)?;
        let counts: Vec<u8> = self.used.iter().flat_map(|count| count.to_be_bytes()).collect();
        self.file.write_all_at(&counts, first_block)?;
        self.file.set_len(self.used.len() as u64 * CLUSTER as u64)?;
        self.file.sync_all()?;
        self.file.write_all_at(&self.header(table, tables), 0)?;
        self.file.sync_all()
    }

    /// Version 3 (QEMU, docs/interop/qcow2.txt, "Header").
    fn header(&self, refcount_table: u64, refcount_clusters: u64) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        let mut put = |offset: usize, bytes: &[u8]| {
            header.iter_mut().skip(offset).zip(bytes).for_each(|(to, from)| *to = *from);
        };
        put(0, &QCOW2_MAGIC);
        put(4, &3u32.to_be_bytes());
        put(20, &CLUSTER_BITS.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(36, &(self.l1.len() as u32).to_be_bytes());
        put(40, &(CLUSTER as u64).to_be_bytes());
        put(48, &refcount_table.to_be_bytes());
        put(56, &(refcount_clusters as u32).to_be_bytes());
        put(96, &REFCOUNT_ORDER.to_be_bytes());
        put(100, &(HEADER as u32).to_be_bytes());
        if self.compression == Compression::Zstd {
            put(72, &COMPRESSION_TYPE.to_be_bytes());
            put(104, &[1]);
        }
        header
    }
}

fn big_endian(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_be_bytes()).collect()
}

/// `None`: it does not become smaller.
fn compress(compression: Compression, data: &[u8]) -> Option<Vec<u8>> {
    match compression {
        Compression::Zlib => {
            let mut compressed = Vec::with_capacity(CLUSTER - 1);
            let mut compress = Compress::new_with_window_bits(flate2::Compression::default(), false, WINDOW_BITS);
            let status = compress.compress_vec(data, &mut compressed, FlushCompress::Finish);
            (status.ok()? == Status::StreamEnd).then_some(compressed)
        }
        Compression::Zstd => Some(compress_to_vec(data, CompressionLevel::Fastest)).filter(|all| all.len() < CLUSTER),
    }
}
