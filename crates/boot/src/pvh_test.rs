//! Loading ELF images made here.

use super::*;
use crate::elf::CLASS_64;
use crate::testing::{boot, read};
use arch::registers::{cr0, gpr};

/// What the images below are made of.
#[derive(Clone)]
struct Made {
    class: u8,
    machine: u16,
    entry: u64,
    note: bool,
    segment: (u64, Vec<u8>, u64),
}

impl Made {
    fn new(class: u8) -> Self {
        let machine = if class == CLASS_64 { 62 } else { 3 };
        Made { class, machine, entry: 0x10_0040, note: true, segment: (0x10_0000, vec![0xf4; 300], 5000) }
    }

    /// Header, two program headers, the note, the segment.
    fn bytes(&self) -> Vec<u8> {
        let wide = self.class == CLASS_64;
        let word = |value: u64| value.to_le_bytes()[..if wide { 8 } else { 4 }].to_vec();
        let (header_size, program_size): (u16, u16) = if wide { (64, 56) } else { (52, 32) };
        let notes_at = u64::from(header_size + 2 * program_size);
        let owner = if self.note { b"Xen\0" } else { b"GNU\0" };
        let descriptor = word(self.entry);
        let mut notes = [4u32.to_le_bytes(), (descriptor.len() as u32).to_le_bytes(), 18u32.to_le_bytes()].concat();
        notes.extend(owner);
        notes.extend(descriptor);
        let data_at = notes_at + notes.len() as u64;
        let (address, data, memory_size) = &self.segment;

        let mut out = b"\x7fELF".to_vec();
        out.extend([self.class, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        out.extend([2, 0]);
        out.extend(self.machine.to_le_bytes());
        out.extend(1u32.to_le_bytes());
        for value in [0, header_size.into(), 0] {
            out.extend(word(value));
        }
        out.extend([0; 4]);
        for value in [header_size, program_size, 2, 0, 0, 0] {
            out.extend(value.to_le_bytes());
        }
        let programs =
            [(4u32, notes_at, 0, notes.len() as u64, 0), (1, data_at, *address, data.len() as u64, *memory_size)];
        for (kind, offset, address, file_size, memory_size) in programs {
            out.extend(kind.to_le_bytes());
            out.extend(if wide { &[7, 0, 0, 0][..] } else { &[] });
            for value in [offset, address, address, file_size, memory_size] {
                out.extend(word(value));
            }
            out.extend(if wide { &[][..] } else { &[7, 0, 0, 0] });
            out.extend(word(4));
        }
        out.extend(notes);
        out.extend(data);
        out
    }
}

#[test]
fn both_classes_are_entered_in_32_bit_mode_with_the_start_info_in_ebx() {
    for class in [1, CLASS_64] {
        let (ram, state) = boot(64 << 20, &Made::new(class).bytes(), None, "quiet").unwrap();
        assert_eq!(state.rip, 0x10_0040);
        assert_eq!((state.cr0 & (cr0::PE | cr0::PG), state.cr4), (cr0::PE, 0));
        assert!(state.segments[1].default_big() && !state.segments[1].long());
        assert_eq!(state.gpr[gpr::RBX], layout::PVH_START_INFO);
        assert_eq!(read::<4>(&ram, 0x10_0000 + 296), [0xf4; 4]);
        assert_eq!(read::<6>(&ram, layout::COMMAND_LINE), *b"quiet\0");
    }
}

#[test]
fn the_start_info_tells_of_memory_modules_and_tables() {
    let (ram, _) = boot(5 << 30, &Made::new(CLASS_64).bytes(), Some(&[9; 100]), "").unwrap();
    let info: hvm_start_info =
        memory::vm_memory::Bytes::read_obj(ram.view(), memory::vm_memory::GuestAddress(layout::PVH_START_INFO))
            .unwrap();
    assert_eq!((info.magic, info.version, info.nr_modules), (0x336e_c578, 1, 1));
    assert_eq!((info.rsdp_paddr, info.cmdline_paddr), (layout::ACPI, layout::COMMAND_LINE));
    assert_eq!(info.memmap_entries as usize, layout::memory_map(&ram).len());
    let first = read::<24>(&ram, info.memmap_paddr);
    assert_eq!(first[8..20], [0, 0xfc, 9, 0, 0, 0, 0, 0, 1, 0, 0, 0], "RAM up to the EBDA");
    let module = read::<16>(&ram, info.modlist_paddr);
    let start = u64::from_le_bytes(module[..8].try_into().unwrap());
    assert_eq!((start, module[8]), (memory::HOLE_START - 4096, 100));
    assert_eq!(read::<100>(&ram, start), [9; 100]);
}

#[test]
fn what_lies_behind_a_segment_s_bytes_is_cleared() {
    let ram = Ram::new(16 << 20).unwrap();
    crate::write(ram.view(), "test", 0x10_0000, &[0xff; 8192]).unwrap();
    let files = crate::testing::Files::new();
    let image = Image::open(&files.add("kernel", &Made::new(CLASS_64).bytes())).unwrap();
    load(&ram, &image, &crate::elf::Elf::open(&image).unwrap(), None, "").unwrap();
    assert_eq!(read::<4700>(&ram, 0x10_0000 + 300), [0; 4700]);
    assert_eq!(read::<1>(&ram, 0x10_0000 + 5000), [0xff]);
}

#[test]
fn images_without_the_note_are_refused_by_their_class() {
    for (class, bits) in [(1, "32-bit"), (CLASS_64, "64-bit")] {
        let image = Made { note: false, ..Made::new(class) };
        let error = boot(64 << 20, &image.bytes(), None, "").err().unwrap().to_string();
        assert!(error.contains(bits) && error.contains("PVH"), "{error}");
    }
}

#[test]
fn images_that_make_no_sense_are_refused() {
    let elf = Made::new(CLASS_64);
    let bad = [
        Made { machine: 183, ..elf.clone() },
        Made { entry: 0x20_0000, ..elf.clone() },
        Made { entry: 1 << 32, ..elf.clone() },
        Made { segment: (0x1000, vec![0; 8], 8), ..elf.clone() },
        Made { segment: (0x10_0000, vec![0; 300], 299), ..elf.clone() },
        Made { class: 3, ..elf.clone() },
    ];
    for (i, image) in bad.iter().enumerate() {
        let error = boot(64 << 20, &image.bytes(), None, "").err().unwrap();
        assert!(matches!(error, Error::BadHeader { .. }), "{i}: {error}");
    }
}

#[test]
fn a_segment_beyond_ram_is_refused_before_anything_is_written() {
    for (address, size) in [(63 << 20, 2 << 20), (u64::MAX - 10, 5000), (1 << 20, u64::MAX)] {
        let image = Made { entry: 0x10_0000, segment: (address, vec![1; 300], size), ..Made::new(CLASS_64) };
        let error = boot(64 << 20, &image.bytes(), None, "").err().unwrap();
        assert!(matches!(error, Error::KernelTooLarge { .. } | Error::BadHeader { .. }), "{error}");
    }
}

#[test]
fn an_image_that_breaks_off_is_refused() {
    let whole = Made::new(CLASS_64).bytes();
    for length in [4, 5, 20, 63, 64, 100, 180, whole.len() - 1] {
        let error = boot(64 << 20, &whole[..length], None, "").err().unwrap();
        assert!(matches!(error, Error::Truncated { .. } | Error::BadHeader { .. }), "{length}: {error}");
    }
}

#[test]
fn mutated_images_never_panic() {
    for class in [1, CLASS_64] {
        crate::testing::mutate(&Made::new(class).bytes(), 0x5eed + u64::from(class));
    }
}
