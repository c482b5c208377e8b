use super::*;
use crate::Drive;
use crate::testing::{Image, execute, truncated};

const SECTORS: u32 = 4096;

fn disk(image: &Image) -> Drive {
    Drive::Disk(AtaDisk::new(image.disk.clone(), "SERIAL", Cable::Serial))
}

fn lba(command: u8, lba: u64, count: u16) -> TaskFile {
    let device = DEVICE_LBA | (lba >> 24) as u8 & 15;
    TaskFile { command, count, lba: lba & 0xff_ffff, device, ..TaskFile::default() }
}

fn extended(command: u8, lba: u64, count: u16) -> TaskFile {
    TaskFile { command, count, lba, device: DEVICE_LBA, ..TaskFile::default() }
}

fn word(data: &[u8], index: usize) -> u16 {
    u16::from_le_bytes([data[2 * index], data[2 * index + 1]])
}

fn identify(drive: &Drive) -> Vec<u8> {
    execute(drive, lba(commands::IDENTIFY_DEVICE, 0, 0), &[]).1
}

#[test]
fn identify_tells_size_and_name_and_sums_up_to_zero() {
    let image = Image::numbered(SECTORS);
    let data = identify(&disk(&image));
    assert_eq!(data.len(), 512);
    assert_eq!(data.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    assert_eq!((word(&data, 60), word(&data, 100)), (SECTORS as u16, SECTORS as u16));
    assert_eq!((word(&data, 1), word(&data, 3), word(&data, 6)), (4, 16, 63));
    assert_eq!((word(&data, 4), word(&data, 5)), (63 * 512, 512));
    assert_eq!(&data[20..26], b"ESIRLA");
}

#[test]
fn all_kinds_of_reads_give_the_same_sectors() {
    let image = Image::numbered(SECTORS);
    let drive = disk(&image);
    let expected = image.read(100 * 512, 3 * 512);
    for command in [0x20, 0x21, 0xc4, 0xc8, 0xc9] {
        assert_eq!(execute(&drive, lba(command, 100, 3), &[]).1, expected, "{command:#x}");
    }
    for command in [0x24, 0x25, 0x29] {
        assert_eq!(execute(&drive, extended(command, 100, 3), &[]).1, expected, "{command:#x}");
    }
    // Cylinder 0, head 1, sector 38 is 63 + 37.
    let chs = TaskFile { command: 0x20, count: 3, lba: 38, device: 1, ..TaskFile::default() };
    assert_eq!(execute(&drive, chs, &[]).1, expected);
    let queued = TaskFile { features: 3, count: 5 << 3, ..extended(commands::READ_FPDMA_QUEUED, 100, 0) };
    assert_eq!(execute(&drive, queued, &[]).1, expected);
}

#[test]
fn a_count_of_zero_is_the_most() {
    let image = Image::numbered(SECTORS);
    assert_eq!(execute(&disk(&image), lba(0xc8, 0, 0), &[]).1.len(), 256 * 512);
    let (outcome, _) = execute(&disk(&image), extended(0x25, 0, 0), &[]);
    assert_eq!((outcome.error, outcome.lba), (error::ID_NOT_FOUND, SECTORS.into()));
}

#[test]
fn writes_reach_the_image() {
    let image = Image::numbered(SECTORS);
    let drive = disk(&image);
    for (index, command) in [(0u64, 0x30), (1, 0xc5), (2, 0xca)] {
        let data = [command; 512];
        assert!(!execute(&drive, lba(command, 200 + index, 1), &data).0.is_error());
        assert_eq!(image.read((200 + index) * 512, 512), data);
    }
    for (index, command) in [(0u64, 0x34), (1, 0x35), (2, 0x39), (3, 0x3d), (4, 0xce)] {
        let data = [command; 512];
        assert!(!execute(&drive, extended(command, 300 + index, 1), &data).0.is_error());
        assert_eq!(image.read((300 + index) * 512, 512), data);
    }
}

#[test]
fn what_lies_beyond_the_end_is_not_found() {
    let image = Image::numbered(SECTORS);
    let drive = disk(&image);
    for command in [lba(0xc8, 4095, 2), lba(0xca, 4096, 1), lba(0x40, 4000, 100), extended(0x25, u64::MAX >> 16, 1)] {
        let (outcome, data) = execute(&drive, command, &[0; 1024]);
        assert_eq!((outcome.error & error::ID_NOT_FOUND, data.len()), (error::ID_NOT_FOUND, 0), "{command:?}");
    }
    let chs = |cylinder: u64, head: u8, sector: u64| {
        let command =
            TaskFile { command: 0x20, count: 1, lba: cylinder << 8 | sector, device: head, ..TaskFile::default() };
        execute(&drive, command, &[]).0.is_error()
    };
    assert!(!chs(3, 15, 63) && chs(0, 0, 0) && chs(0, 0, 64) && chs(4, 0, 1));
}

#[test]
fn another_geometry_can_be_chosen() {
    let image = Image::numbered(SECTORS);
    let drive = disk(&image);
    let set = |count, device| TaskFile { command: 0x91, count, device, ..TaskFile::default() };
    assert!(!execute(&drive, set(32, 3), &[]).0.is_error());
    assert!(execute(&drive, set(0, 3), &[]).0.is_error());
    let data = identify(&drive);
    assert_eq!((word(&data, 54), word(&data, 55), word(&data, 56), word(&data, 57)), (32, 4, 32, 4096));
    let chs = TaskFile { command: 0x20, count: 1, lba: 1 << 8 | 2, device: 1, ..TaskFile::default() };
    assert_eq!(execute(&drive, chs, &[]).1, image.read((128 + 32 + 1) * 512, 512));
}

#[test]
fn multiple_needs_a_block_size_that_is_possible() {
    let image = Image::numbered(SECTORS);
    let drive = disk(&image);
    let set = |count| execute(&drive, lba(commands::SET_MULTIPLE_MODE, 0, count), &[]).0.is_error();
    assert!(set(3) && set(32) && !set(8));
    assert_eq!(word(&identify(&drive), 59), 0x0108);
    assert!(!set(0));
    assert!(execute(&drive, lba(0xc4, 0, 1), &[]).0.is_error());
}

#[test]
fn a_protected_area_hides_the_end_of_the_disk() {
    let image = Image::numbered(SECTORS);
    let drive = disk(&image);
    assert!(execute(&drive, lba(commands::SET_MAX, 99, 0), &[]).0.is_error(), "only after READ NATIVE MAX");
    let native = execute(&drive, lba(commands::READ_NATIVE_MAX, 0, 0), &[]).0;
    assert_eq!(native.lba | u64::from(native.device & 15) << 24, 4095);
    assert!(!execute(&drive, lba(commands::SET_MAX, 99, 0), &[]).0.is_error());
    assert_eq!(word(&identify(&drive), 60), 100);
    assert!(execute(&drive, lba(0xc8, 100, 1), &[]).0.is_error());
    drive.power_on();
    assert!(!execute(&drive, lba(0xc8, 100, 1), &[]).0.is_error());
}

#[test]
fn trimmed_sectors_read_as_zeros() {
    let image = Image::numbered(SECTORS);
    let drive = disk(&image);
    let mut ranges = [0; 512];
    ranges[..8].copy_from_slice(&(10u64 | 4 << 48).to_le_bytes());
    let trim = TaskFile { features: 1, ..extended(commands::DATA_SET_MANAGEMENT, 0, 1) };
    assert!(!execute(&drive, trim, &ranges).0.is_error());
    assert_eq!(image.read(10 * 512, 4 * 512), [0; 4 * 512]);
    assert_ne!(image.read(14 * 512, 512), [0; 512]);
    ranges[8..16].copy_from_slice(&(u64::MAX).to_le_bytes());
    assert!(execute(&drive, trim, &ranges).0.is_error());
    assert!(execute(&drive, TaskFile { features: 2, ..trim }, &ranges).0.is_error());
}

#[test]
fn smart_says_that_all_is_well() {
    let image = Image::numbered(SECTORS);
    let drive = disk(&image);
    let smart = |feature| TaskFile { features: feature, lba: 0xc2_4f00, count: 1, ..lba(commands::SMART, 0, 0) };
    for feature in [0xd0, 0xd1, 0xd5] {
        let (outcome, data) = execute(&drive, smart(feature), &[]);
        assert_eq!((outcome.is_error(), data.len()), (false, 512), "{feature:#x}");
    }
    assert_eq!(execute(&drive, smart(0xda), &[]).0.lba, 0xc2_4f00);
    assert!(!execute(&drive, smart(0xd9), &[]).0.is_error());
    assert!(execute(&drive, smart(0xda), &[]).0.is_error(), "it was turned off");
    assert!(execute(&drive, TaskFile { lba: 0, ..smart(0xd8) }, &[]).0.is_error());
}

#[test]
fn a_failing_image_is_an_uncorrectable_error_and_named_in_the_log() {
    let image = truncated(SECTORS);
    let drive = disk(&image);
    let (outcome, _) = execute(&drive, lba(0xc8, 100, 1), &[]);
    assert_eq!((outcome.error, outcome.lba), (error::UNCORRECTABLE, 100));
    let queued = TaskFile { features: 1, count: 7 << 3, ..extended(commands::READ_FPDMA_QUEUED, 200, 0) };
    assert!(execute(&drive, queued, &[]).0.is_error());
    let log = extended(commands::READ_LOG_EXT, 0x10, 1);
    let data = execute(&drive, log, &[]).1;
    assert_eq!((data[0], data[3], data[4]), (7, error::UNCORRECTABLE, 200));
    assert_eq!(execute(&drive, log, &[]).1[0], 0x80, "it is told once");
}

#[test]
fn a_read_only_image_takes_no_writes() {
    let image = Image::of(&[1; 8192], |options| options.read_only = true);
    let drive = disk(&image);
    assert!(execute(&drive, lba(0xca, 0, 1), &[0; 512]).0.is_error());
    assert_eq!(image.read(0, 512), [1; 512]);
}

#[test]
fn every_command_ends_whatever_its_registers_say() {
    let image = Image::of(&crate::testing::numbered(64, 512), |options| options.snapshot = true);
    let drive = disk(&image);
    let mut random = chipset::testing::Random(5);
    for _ in 0..20_000 {
        let bits = random.draw();
        let command = TaskFile {
            features: (bits >> 40) as u16 & 0xff,
            count: bits as u16 & 7,
            lba: (bits >> 3) & if bits & 1 == 0 { 63 } else { 0xffff_ffff_ffff },
            device: (bits >> 16) as u8,
            command: (bits >> 24) as u8,
        };
        execute(&drive, command, &[0; 4096]);
    }
    assert_eq!(identify(&drive).len(), 512);
}
