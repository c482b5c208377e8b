//! SMBIOS tables: what `dmidecode` shows and kernels match quirks against (DMTF DSP0134, 3.7).

use arch::cpuid::Topology;
use memory::Ram;

use crate::{Error, layout};

/// The 64-bit entry point's size (5.2.2), and where the structures begin.
const ENTRY_SIZE: u64 = 24;
const STRUCTURES: u64 = layout::SMBIOS + 32;
const VERSION: [u8; 3] = [3, 7, 0];

const MANUFACTURER: &str = "Ringer";
const PRODUCT: &str = "Virtual Machine";

/// Writes entry point and structures for that RAM and these processors.
pub fn write(ram: &Ram, cpus: Topology) -> Result<(), Error> {
    let structures = structures(ram, cpus);
    crate::write(ram.view(), "the SMBIOS tables", STRUCTURES, &structures)?;
    crate::write(ram.view(), "the SMBIOS entry point", layout::SMBIOS, &entry_point(structures.len() as u32))
}

/// Entry point and structures for firmware, which puts them where it likes, and the address into the entry point.
pub fn for_firmware(ram: &Ram, cpus: Topology) -> (Vec<u8>, Vec<u8>) {
    let structures = structures(ram, cpus);
    (entry_point(structures.len() as u32), structures)
}

/// 5.2.2: anchor, checksum, length, version, revision of the entry point, size and address of the structures.
fn entry_point(size: u32) -> Vec<u8> {
    let mut entry = b"_SM3_\0".to_vec();
    entry.push(ENTRY_SIZE as u8);
    entry.extend(VERSION);
    entry.extend([1, 0]);
    entry.extend(size.to_le_bytes());
    entry.extend(STRUCTURES.to_le_bytes());
    let sum = entry.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
    if let Some(checksum) = entry.get_mut(5) {
        *checksum = sum.wrapping_neg();
    }
    entry
}

/// One structure: its formatted part from offset 4 on, then its strings, which are numbered from 1.
struct Structure {
    kind: u8,
    handle: u16,
    fields: Vec<u8>,
    strings: Vec<String>,
}

impl Structure {
    fn new(kind: u8, handle: u16) -> Self {
        Structure { kind, handle, fields: Vec::new(), strings: Vec::new() }
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.fields.extend_from_slice(bytes);
        self
    }

    fn word(self, value: u16) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn dword(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn qword(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn string(mut self, text: &str) -> Self {
        self.strings.push(text.to_owned());
        let number = self.strings.len() as u8;
        self.bytes(&[number])
    }

    fn append_to(self, out: &mut Vec<u8>) {
        out.extend([self.kind, self.fields.len() as u8 + 4]);
        out.extend(self.handle.to_le_bytes());
        out.extend(self.fields);
        for text in &self.strings {
            out.extend(text.bytes().chain([0]));
        }
        // The set of strings ends with an empty one; without any, there are two zeros (6.1.3).
        out.extend(if self.strings.is_empty() { &[0, 0][..] } else { &[0] });
    }
}

/// Handles, by which structures refer to each other.
const CHASSIS: u16 = 0x300;
const MEMORY_ARRAY: u16 = 0x1000;
const FIRST_MEMORY_DEVICE: u16 = 0x1100;
const FIRST_ARRAY_ADDRESS: u16 = 0x1300;
const NONE: u16 = 0xfffe;
const UNKNOWN_WORD: u16 = 0;

fn structures(ram: &Ram, cpus: Topology) -> Vec<u8> {
    let mut all = vec![firmware(), system(), chassis()];
    all.extend((0..cpus.sockets()).map(|socket| processor(socket, cpus)));
    all.extend(memory(ram));
    // 7.33: no boot error. 7.127: the end.
    all.push(Structure::new(32, 0x2000).bytes(&[0; 7]));
    all.push(Structure::new(127, 0x7f00));
    let mut out = Vec::new();
    for structure in all {
        structure.append_to(&mut out);
    }
    out
}

/// 7.1, type 0.
fn firmware() -> Structure {
    // Characteristics: none of the old ones are supported (bit 3); extension byte 2: a virtual machine (bit 4).
    let segment = (layout::SMBIOS >> 4) as u16;
    Structure::new(0, 0)
        .string(MANUFACTURER)
        .string(env!("CARGO_PKG_VERSION"))
        .word(segment)
        .string("01/01/2026")
        .bytes(&[0])
        .qword(1 << 3)
        .bytes(&[0, 1 << 4, 0, 1, 0xff, 0xff])
        .word(0)
}

/// 7.2, type 1.
fn system() -> Structure {
    const WAKE_UP_POWER_SWITCH: u8 = 6;
    Structure::new(1, 0x100).string(MANUFACTURER).string(PRODUCT).bytes(&[0, 0]).bytes(&[0; 16]).bytes(&[
        WAKE_UP_POWER_SWITCH,
        0,
        0,
    ])
}

/// 7.4, type 3.
fn chassis() -> Structure {
    const OTHER: u8 = 1;
    const SAFE: u8 = 3;
    const UNKNOWN: u8 = 2;
    Structure::new(3, CHASSIS)
        .string(MANUFACTURER)
        .bytes(&[OTHER, 0, 0, 0, SAFE, SAFE, SAFE, UNKNOWN])
        .dword(0)
        .bytes(&[0, 0, 0, 0, 0])
}

/// 7.5, type 4: a package.
fn processor(socket: u32, cpus: Topology) -> Structure {
    const CENTRAL: u8 = 3;
    const FAMILY_OTHER: u8 = 1;
    const POPULATED_ENABLED: u8 = 0x41;
    const UPGRADE_OTHER: u8 = 1;
    const NO_CACHE: u16 = 0xffff;
    const CAPABLE_64_BIT_MULTI_CORE: u16 = 1 << 2 | 1 << 3;
    const CAPABLE_THREADS: u16 = 1 << 4;
    let short = |count: u32| u8::try_from(count).unwrap_or(0xff);
    let long = |count: u32| u16::try_from(count).unwrap_or(0xffff);
    let capable = CAPABLE_64_BIT_MULTI_CORE | if cpus.threads() > 1 { CAPABLE_THREADS } else { 0 };
    Structure::new(4, 0x400 + long(socket))
        .string(&format!("CPU {socket}"))
        .bytes(&[CENTRAL, FAMILY_OTHER])
        .string(MANUFACTURER)
        .qword(0)
        .bytes(&[0, 0])
        .word(UNKNOWN_WORD)
        .word(UNKNOWN_WORD)
        .word(UNKNOWN_WORD)
        .bytes(&[POPULATED_ENABLED, UPGRADE_OTHER])
        .word(NO_CACHE)
        .word(NO_CACHE)
        .word(NO_CACHE)
        .bytes(&[0, 0, 0, short(cpus.cores()), short(cpus.cores()), short(cpus.package())])
        .word(capable)
        .word(FAMILY_OTHER.into())
        .word(long(cpus.cores()))
        .word(long(cpus.cores()))
        .word(long(cpus.package()))
}

/// 7.17 to 7.20: an array of one device for each piece of RAM.
fn memory(ram: &Ram) -> Vec<Structure> {
    const SYSTEM_BOARD: u8 = 3;
    const SYSTEM_MEMORY: u8 = 3;
    const MULTI_BIT_ECC: u8 = 6;
    const EXTENDED: u32 = 0x8000_0000;
    let count = ram.regions().len() as u16;
    let array = Structure::new(16, MEMORY_ARRAY)
        .bytes(&[SYSTEM_BOARD, SYSTEM_MEMORY, MULTI_BIT_ECC])
        .dword(EXTENDED)
        .word(NONE)
        .word(count)
        .qword(ram.size());
    let mut all = vec![array];
    for (i, region) in (0..).zip(ram.regions()) {
        all.push(memory_device(i, region.size));
    }
    for (i, region) in (0..).zip(ram.regions()) {
        // Type 19: addresses beyond 4 TiB of KiB would need the extended fields; these are always used instead.
        let mapped = Structure::new(19, FIRST_ARRAY_ADDRESS + i)
            .dword(u32::MAX)
            .dword(u32::MAX)
            .word(MEMORY_ARRAY)
            .bytes(&[1])
            .qword(region.start)
            .qword(region.start + region.size - 1);
        all.push(mapped);
    }
    all
}

/// 7.18, type 17.
fn memory_device(index: u16, size: u64) -> Structure {
    const UNKNOWN_WIDTH: u16 = 0xffff;
    const DIMM: u8 = 9;
    const TYPE_RAM: u8 = 7;
    const DETAIL_OTHER: u16 = 1 << 1;
    const IN_EXTENDED_FIELD: u16 = 0x7fff;
    let mib = (size >> 20) as u32;
    let short = u16::try_from(mib).ok().filter(|m| *m < IN_EXTENDED_FIELD).unwrap_or(IN_EXTENDED_FIELD);
    Structure::new(17, FIRST_MEMORY_DEVICE + index)
        .word(MEMORY_ARRAY)
        .word(NONE)
        .word(UNKNOWN_WIDTH)
        .word(UNKNOWN_WIDTH)
        .word(short)
        .bytes(&[DIMM, 0])
        .string(&format!("DIMM {index}"))
        .bytes(&[0, TYPE_RAM])
        .word(DETAIL_OTHER)
        .word(UNKNOWN_WORD)
        .string(MANUFACTURER)
        .bytes(&[0, 0, 0, 0])
        .dword(mib)
        .word(UNKNOWN_WORD)
        .word(UNKNOWN_WORD)
        .word(UNKNOWN_WORD)
        .word(UNKNOWN_WORD)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Splits the structures as a reader does: (type, formatted part, strings).
    fn parse(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let length = bytes[1] as usize;
            let (formatted, rest) = bytes.split_at(length);
            let end = rest.windows(2).position(|w| w == [0, 0]).expect("the strings end") + 2;
            let strings = rest[..end].split(|b| *b == 0).filter(|s| !s.is_empty());
            let strings = strings.map(|s| String::from_utf8(s.to_vec()).unwrap()).collect();
            all.push((bytes[0], formatted.to_vec(), strings));
            bytes = &rest[end..];
        }
        all
    }

    #[test]
    fn structures_have_the_lengths_of_their_types() {
        let ram = Ram::new(4 << 30).unwrap();
        let all = parse(&structures(&ram, Topology::of_cores(2)));
        let lengths: Vec<(u8, usize)> = all.iter().map(|(kind, bytes, _)| (*kind, bytes.len())).collect();
        // SMBIOS 3.7: 7.1, 7.2, 7.4, 7.5, 7.17, 7.18, 7.20, 7.33, 7.46
        let expected = [
            (0, 0x1a),
            (1, 0x1b),
            (3, 0x16),
            (4, 0x30),
            (16, 0x17),
            (17, 0x28),
            (17, 0x28),
            (19, 0x1f),
            (19, 0x1f),
            (32, 0xb),
            (127, 4),
        ];
        assert_eq!(lengths, expected);
        assert_eq!(all[1].2, [MANUFACTURER, PRODUCT]);
    }

    #[test]
    fn every_socket_is_a_processor_with_its_cores_and_threads() {
        let ram = Ram::new(1 << 30).unwrap();
        let all = parse(&structures(&ram, Topology::new(2, 4, 2).unwrap()));
        let processors: Vec<_> = all.iter().filter(|(kind, ..)| *kind == 4).collect();
        assert_eq!(processors.len(), 2);
        for (socket, (_, bytes, strings)) in processors.iter().enumerate() {
            assert_eq!(u16::from_le_bytes([bytes[2], bytes[3]]), 0x400 + socket as u16);
            assert_eq!(bytes[0x23..0x26], [4, 4, 8], "cores, cores enabled, threads");
            assert_eq!(strings[0], format!("CPU {socket}"));
        }
    }

    #[test]
    fn the_entry_point_sums_to_zero_and_tells_the_size() {
        let entry = entry_point(0x1234);
        assert_eq!(entry.len() as u64, ENTRY_SIZE);
        assert_eq!(entry.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        assert_eq!(entry[12..16], 0x1234u32.to_le_bytes());
    }
}
