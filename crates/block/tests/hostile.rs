//! Images that were damaged, or made to do damage: an error or wrong data, never a panic, a hang or too much memory.

mod support;

use std::fs;

use block::{Disk, Error, Format, Options, image};
use memory::vm_memory::VolatileSlice;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }
}

/// A small image with data, in clusters of 64 KiB.
fn sample(directory: &std::path::Path) -> Vec<u8> {
    let path = directory.join("sample");
    image::create(&path, Format::Qcow2, Some(4 << 20), None).unwrap();
    let disk = Disk::open(&Options::new(&path)).unwrap();
    let mut data = vec![0x5a; 4096];
    (0..4).for_each(|n| disk.write(&[VolatileSlice::from(data.as_mut_slice())], n << 20).unwrap());
    drop(disk);
    fs::read(&path).unwrap()
}

#[test]
fn damaged_images_do_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let good = sample(directory.path());
    let mut random = Random(0x1337);
    for round in 0..400 {
        let mut data = good.clone();
        for _ in 0..1 + random.next() % 8 {
            // Most of what matters is in the header and at the starts of the tables.
            let cluster = random.next() % (data.len() as u64 / 65_536);
            let within = random.next() % if random.next().is_multiple_of(4) { 65_536 } else { 128 };
            let at = (cluster * 65_536 * (random.next() % 3).min(1) + within) as usize;
            let value = [0, 1, 0x7f, 0x80, 0xff, random.next() as u8][random.next() as usize % 6];
            data[at % good.len()] = value;
        }
        if round % 10 == 0 {
            data.truncate(random.next() as usize % data.len());
        }
        support::image_file(directory.path(), &data);
    }
}

#[test]
fn impossible_headers_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let good = sample(directory.path());
    let path = directory.path().join("image");
    let cases: [(&str, usize, &[u8]); 10] = [
        ("version", 4, &[0, 0, 0, 9]),
        ("cluster bits", 20, &[0, 0, 0, 63]),
        ("cluster bits", 20, &[0, 0, 0, 3]),
        ("size", 24, &[0xff; 8]),
        ("size beyond the L1 table", 24, &[0, 0, 0xff, 0, 0, 0, 0, 0]),
        ("L1 entries", 36, &[0xff; 4]),
        ("L1 offset", 40, &[0, 0, 0, 0, 0, 0, 0, 1]),
        ("refcount table", 56, &[0xff; 4]),
        ("incompatible features", 72, &[0x80, 0, 0, 0, 0, 0, 0, 0]),
        ("refcount order", 96, &[0, 0, 0, 7]),
    ];
    for (what, at, bytes) in cases {
        let mut data = good.clone();
        data[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(&path, data).unwrap();
        assert!(matches!(Disk::open(&Options::new(&path)), Err(Error::Qcow2 { .. })), "{what}");
        assert!(image::check(&path, true).is_err(), "{what}");
    }
}

#[test]
fn an_l2_table_that_maps_itself_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let mut data = sample(directory.path());
    let number = |data: &[u8], at: usize| u64::from_be_bytes(data[at..at + 8].try_into().unwrap());
    let l1 = number(&data, 40) as usize;
    let l2 = (number(&data, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    data.copy_within(l1..l1 + 8, l2);
    let path = directory.path().join("image");
    fs::write(&path, data).unwrap();
    assert!(image::check(&path, false).unwrap().errors > 0);
}

#[test]
fn reference_counts_that_can_not_grow_are_survived_and_mended() {
    let directory = tempfile::tempdir().unwrap();
    let mut data = sample(directory.path());
    let number = |data: &[u8], at: usize| u64::from_be_bytes(data[at..at + 8].try_into().unwrap());
    let table = number(&data, 48) as usize;
    let counts = number(&data, table) as usize;
    data[counts..counts + 64].fill(0xff);
    support::image_file(directory.path(), &data);
    let path = directory.path().join("image");
    fs::write(&path, data).unwrap();
    assert!(image::check(&path, false).unwrap().leaks > 0);
    assert_eq!(image::check(&path, true).unwrap().leaks, 0);
    let mut buffer = vec![0; 4096];
    Disk::open(&Options::new(&path)).unwrap().read(&[VolatileSlice::from(buffer.as_mut_slice())], 1 << 20).unwrap();
    assert_eq!(buffer, [0x5a; 4096]);
}
