//! The header of a qcow2 image (QEMU's docs/interop/qcow2.txt), read with distrust: what `ringer image` tells and checks.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::open::QCOW2_MAGIC;

/// Incompatible features: refcounts may be wrong, the image is known to be corrupt, data is in another file, clusters
/// are compressed other than by zlib, L2 entries have subclusters.
pub const DIRTY: u64 = 1 << 0;
pub const CORRUPT: u64 = 1 << 1;
pub const EXTERNAL_DATA: u64 = 1 << 2;
pub const COMPRESSION_TYPE: u64 = 1 << 3;
pub const EXTENDED_L2: u64 = 1 << 4;

/// In an L1 or L2 entry: where it points; that the reference count there is exactly 1; that the cluster is compressed.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
pub const COPIED: u64 = 1 << 63;
pub const COMPRESSED: u64 = 1 << 62;

/// Offsets in the header.
const ENCRYPTION: usize = 32;
pub const REFCOUNT_TABLE: u64 = 48;
pub const INCOMPATIBLE: u64 = 72;
const AUTOCLEAR: usize = 88;
const V2_SIZE: usize = 72;
const V3_SIZE: usize = 104;
const COMPRESSION: usize = 104;
/// Header extensions: the end, names of features (each takes 48 bytes), and the format of the backing file.
const END: u32 = 0;
const FEATURE_NAMES: u32 = 0x6803_f857;
const FEATURE_NAME: u32 = 48;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const BITMAPS: u32 = 0x2385_2875;
/// The autoclear feature without which what is said of bitmaps is of old: programs that know nothing of them clear it.
const BITMAPS_ARE_VALID: u64 = 1 << 0;

/// Limits, as QEMU has them: larger ones are no real image.
pub const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65536;
const MAX_BACKING_NAME: u32 = 1023;
const MAX_BITMAPS: u32 = 65535;
const MAX_BITMAP_DIRECTORY: u64 = 64 << 20;

/// How compressed clusters are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    Zlib,
    Zstd,
}

/// What a header says, within the format's limits.
#[derive(Clone, Debug)]
pub struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    /// Of the disk, in bytes.
    pub size: u64,
    pub l1_entries: u64,
    pub l1_offset: u64,
    pub refcount_table_offset: u64,
    pub refcount_table_clusters: u64,
    pub snapshots: u32,
    pub snapshots_offset: u64,
    pub incompatible: u64,
    pub refcount_order: u32,
    pub compression: Compression,
    pub backing_file: Option<String>,
    pub backing_format: Option<String>,
    pub bitmaps: Option<Bitmaps>,
}

/// Where the directory of an image's bitmaps is, in which backup programs note what was written.
#[derive(Clone, Copy, Debug)]
pub struct Bitmaps {
    pub count: u32,
    pub offset: u64,
    /// In bytes.
    pub size: u64,
}

fn invalid(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

/// A big-endian number in `bytes`; 0 beyond their end.
pub fn be32(bytes: &[u8], offset: usize) -> u32 {
    let mut value = [0; 4];
    value.iter_mut().zip(bytes.iter().skip(offset)).for_each(|(to, from)| *to = *from);
    u32::from_be_bytes(value)
}

pub fn be64(bytes: &[u8], offset: usize) -> u64 {
    u64::from(be32(bytes, offset)) << 32 | u64::from(be32(bytes, offset.saturating_add(4)))
}

/// Reads up to `length` bytes; what lies beyond the end of the file is zero.
pub fn read_padded(file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut data = vec![0; length];
    let mut done = 0;
    while let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset.saturating_add(done as u64)) {
            Ok(0) => break,
            Ok(more) => done += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(data)
}

impl Header {
    pub fn read(file: &File) -> io::Result<Self> {
        let bytes = read_padded(file, 0, V3_SIZE + 8)?;
        if !bytes.starts_with(&QCOW2_MAGIC) {
            return Err(invalid("it does not begin with the magic of qcow2"));
        }
        let version = be32(&bytes, 4);
        if !(2..=3).contains(&version) {
            return Err(invalid(format!("version {version} is not known")));
        }
        let v3 = version == 3;
        let header_length = if v3 { be32(&bytes, 100) as usize } else { V2_SIZE };
        let mut header = Header {
            version,
            cluster_bits: be32(&bytes, 20),
            size: be64(&bytes, 24),
            l1_entries: be32(&bytes, 36).into(),
            l1_offset: be64(&bytes, 40),
            refcount_table_offset: be64(&bytes, REFCOUNT_TABLE as usize),
            refcount_table_clusters: be32(&bytes, 56).into(),
            snapshots: be32(&bytes, 60),
            snapshots_offset: be64(&bytes, 64),
            incompatible: if v3 { be64(&bytes, INCOMPATIBLE as usize) } else { 0 },
            refcount_order: if v3 { be32(&bytes, 96) } else { 4 },
            compression: Compression::Zlib,
            backing_file: None,
            backing_format: None,
            bitmaps: None,
        };
        if be32(&bytes, ENCRYPTION) != 0 {
            return Err(invalid(
                "its contents are encrypted, which is not supported; qemu-img convert makes a plain image of it",
            ));
        }
        if header.incompatible & COMPRESSION_TYPE != 0 && header_length > COMPRESSION {
            header.compression = match bytes.get(COMPRESSION) {
                Some(0) => Compression::Zlib,
                Some(1) => Compression::Zstd,
                other => return Err(invalid(format!("compression type {other:?} is not known"))),
            };
        }
        header.validate(header_length)?;
        header.read_backing(file, &bytes)?;
        header.read_extensions(file, &bytes, header_length)?;
        Ok(header)
    }

    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 entry.
    pub fn l2_entry_size(&self) -> u64 {
        if self.incompatible & EXTENDED_L2 != 0 { 16 } else { 8 }
    }

    fn validate(&self, header_length: usize) -> io::Result<()> {
        if !(9..=21).contains(&self.cluster_bits) {
            return Err(invalid(format!("clusters of 2^{} bytes are not possible", self.cluster_bits)));
        }
        if self.refcount_order > 6 {
            return Err(invalid(format!("reference counts of 2^{} bits are not possible", self.refcount_order)));
        }
        if self.version == 3 && !(V3_SIZE..=self.cluster_size() as usize).contains(&header_length) {
            return Err(invalid(format!("a header of {header_length} bytes is not possible")));
        }
        let known = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2;
        if self.incompatible & !known != 0 {
            return Err(invalid(format!("it needs features that are not known: {:#x}", self.incompatible & !known)));
        }
        if self.l1_entries * 8 > MAX_L1_BYTES {
            return Err(invalid(format!("an L1 table of {} entries is too large", self.l1_entries)));
        }
        if self.refcount_table_clusters << self.cluster_bits > MAX_REFCOUNT_TABLE.max(self.cluster_size()) {
            let clusters = self.refcount_table_clusters;
            return Err(invalid(format!("a reference count table of {clusters} clusters is too large")));
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(invalid(format!("{} snapshots are too many", self.snapshots)));
        }
        let l2_reach = self.cluster_size() / self.l2_entry_size() * self.cluster_size();
        if self.size > i64::MAX as u64 || self.size.div_ceil(l2_reach) > self.l1_entries {
            return Err(invalid("the L1 table is too small for the disk"));
        }
        for (what, offset) in [("L1 table", self.l1_offset), ("reference count table", self.refcount_table_offset)] {
            if !offset.is_multiple_of(self.cluster_size()) || offset > i64::MAX as u64 {
                return Err(invalid(format!("the offset of the {what}, {offset:#x}, is not possible")));
            }
        }
        Ok(())
    }

    fn read_backing(&mut self, file: &File, bytes: &[u8]) -> io::Result<()> {
        let (offset, length) = (be64(bytes, 8), be32(bytes, 16));
        if offset == 0 {
            return Ok(());
        }
        if length > MAX_BACKING_NAME || offset.saturating_add(length.into()) > self.cluster_size() {
            return Err(invalid("the name of the backing file is not within the first cluster"));
        }
        self.backing_file = Some(text(read_padded(file, offset, length as usize)?)?);
        Ok(())
    }

    /// Header extensions follow the header, up to the name of the backing file or the end of the first cluster.
    fn read_extensions(&mut self, file: &File, bytes: &[u8], header_length: usize) -> io::Result<()> {
        let end = match be64(bytes, 8) {
            0 => self.cluster_size(),
            name => name.min(self.cluster_size()),
        };
        let mut at = header_length as u64;
        while at + 8 <= end {
            let extension = read_padded(file, at, 8)?;
            let (kind, length) = (be32(&extension, 0), be32(&extension, 4));
            if kind == END {
                break;
            }
            if at + 8 + u64::from(length) > end || kind == FEATURE_NAMES && !length.is_multiple_of(FEATURE_NAME) {
                return Err(invalid(format!("the header extension at {at:#x} is not possible")));
            }
            if kind == BACKING_FORMAT {
                self.backing_format = Some(text(read_padded(file, at + 8, length as usize)?)?);
            }
            if kind == BITMAPS && self.version == 3 && be64(bytes, AUTOCLEAR) & BITMAPS_ARE_VALID != 0 {
                let place = read_padded(file, at + 8, 24)?;
                let bitmaps = Bitmaps { count: be32(&place, 0), offset: be64(&place, 16), size: be64(&place, 8) };
                if length != 24 || bitmaps.count > MAX_BITMAPS || bitmaps.size > MAX_BITMAP_DIRECTORY {
                    return Err(invalid("the directory of bitmaps is not possible"));
                }
                self.bitmaps = Some(bitmaps);
            }
            at += 8 + u64::from(length).next_multiple_of(8);
        }
        Ok(())
    }
}

fn text(bytes: Vec<u8>) -> io::Result<String> {
    String::from_utf8(bytes).map_err(|_| invalid("the name or format of the backing file is not UTF-8"))
}
