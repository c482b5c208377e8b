//! Images whose clusters are compressed by zstd, which `imago` doesn't read: they are unpacked when they are opened, into
//! a sparse file without a name, which then stands for them. So they can be read, converted, and stand behind other
//! images; to be written they have to be converted first.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use imago::{FormatAccess, file::File as Storage};
use ruzstd::decoding::StreamingDecoder;

use super::header::{COMPRESSED, EXTENDED_L2, Header, OFFSET, be64, read_padded};

/// The cluster reads as zeros, whatever else the entry says.
const ZERO: u64 = 1;

/// Unpacks an image over `backing` into a new raw image.
pub fn unpack(file: &File, header: &Header, backing: Option<&FormatAccess<Storage>>) -> io::Result<File> {
    if header.incompatible & EXTENDED_L2 != 0 {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "extended L2 entries are not supported"));
    }
    let size = header.cluster_size();
    let target = tempfile::tempfile()?;
    target.set_len(header.size)?;
    let length = file.metadata()?.len();
    let per_table = size / 8;
    let l1 = read_padded(file, header.l1_offset, (header.l1_entries * 8) as usize)?;
    let mut data = vec![0; size as usize];
    let mut tables = HashSet::new();
    for table in 0..header.size.div_ceil(size * per_table) {
        let l2_offset = be64(&l1, (table * 8) as usize) & OFFSET;
        let behind = backing.is_some_and(|backing| table * per_table * size < backing.size());
        if l2_offset >= length || l2_offset == 0 && !behind {
            continue;
        }
        if l2_offset != 0 && !tables.insert(l2_offset) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an L2 table is used twice"));
        }
        let l2 = if l2_offset == 0 { Vec::new() } else { read_padded(file, l2_offset, size as usize)? };
        for index in 0..per_table {
            let at = (table * per_table + index) * size;
            if at >= header.size {
                break;
            }
            let entry = be64(&l2, (index * 8) as usize);
            let Some(part) = data.get_mut(..size.min(header.size - at) as usize) else { break };
            if entry & COMPRESSED != 0 {
                compressed(file, header, entry, &mut data)?;
            } else if entry & ZERO != 0 {
                continue;
            } else if entry & OFFSET != 0 {
                data.copy_from_slice(&read_padded(file, entry & OFFSET, size as usize)?);
            } else if let Some(backing) = backing.filter(|backing| at < backing.size()) {
                backing.read(part, at)?;
            } else {
                continue;
            }
            let part = data.get(..size.min(header.size - at) as usize).unwrap_or_default();
            if part.iter().any(|byte| *byte != 0) {
                target.write_all_at(part, at)?;
            }
        }
    }
    Ok(target)
}

fn compressed(file: &File, header: &Header, entry: u64, data: &mut [u8]) -> io::Result<()> {
    let bits = 62 - (header.cluster_bits - 8);
    let offset = entry & ((1 << bits) - 1) & 0x00ff_ffff_ffff_ffff;
    let sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1;
    let packed = read_padded(file, offset, (sectors * 512 - (offset & 511)) as usize)?;
    let mut decoder = StreamingDecoder::new(packed.as_slice()).map_err(io::Error::other)?;
    decoder.read_exact(data)
}
