//! What a driver may expect of the block device.

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use ::block::{Cache, Disk, Format, Options};
use support::*;
use virtio::block::Block;

const SECTORS: u64 = 256;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

struct Machine {
    bench: Bench,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

fn machine(change: impl FnOnce(&mut Options)) -> Machine {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let data: Vec<u8> = (0..SECTORS).flat_map(|sector| [sector as u8; 512]).collect();
    fs::write(&path, data).unwrap();
    let mut options = Options::new(&path);
    options.format = Some(Format::Raw);
    change(&mut options);
    let device = Block::new(Disk::open(&options).unwrap(), "serial-0123456789abcdef", 2);
    Machine { bench: Bench::new(Arc::new(device)), path, _directory: directory }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

const HEADER: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const STATUS: u64 = 0x1_1000;

impl Machine {
    /// Does a request with its parts where drivers have them. Returns its status.
    fn request(&self, ring: &mut Ring, kind: u32, sector: u64, length: u32) -> u8 {
        self.bench.store(HEADER, &header(kind, sector));
        self.bench.store(STATUS, &[0xaa]);
        let data = (DATA, length, kind == IN || kind == ID);
        let parts = [(HEADER, 16, false), data, (STATUS, 1, true)];
        let parts: Vec<_> = parts.into_iter().filter(|part| part.1 > 0).collect();
        self.bench.request(ring, &parts).unwrap();
        self.bench.load(STATUS, 1)[0]
    }

    fn file(&self, sector: u64) -> [u8; 512] {
        let mut data = [0; 512];
        fs::File::open(&self.path).unwrap().read_exact_at(&mut data, sector * 512).unwrap();
        data
    }
}

#[test]
fn sectors_are_read_and_written() {
    let machine = machine(|_| ());
    let bench = &machine.bench;
    let ring = &mut bench.start(VERSION_1 | EVENT_IDX | INDIRECT | 1 << 9);
    assert_eq!(machine.request(ring, IN, 7, 1024), 0);
    assert_eq!(bench.load(DATA, 1024), [[7; 512], [8; 512]].concat());
    assert_eq!(bench.interrupts.wait(), (0xfee0_0000, 0x41));
    bench.store(DATA, &[0x55; 512]);
    assert_eq!(machine.request(ring, OUT, 9, 512), 0);
    assert_eq!(machine.file(9), [0x55; 512]);
    assert_eq!(machine.request(ring, FLUSH, 0, 0), 0);
    assert_eq!(machine.request(ring, ID, 0, 20), 0);
    assert_eq!(bench.load(DATA, 20), b"serial-0123456789abc");
    // More often than the ring has entries.
    for n in 0..100 {
        assert_eq!(machine.request(ring, IN, n, 512), 0);
        assert_eq!(bench.load(DATA, 512), [if n == 9 { 0x55 } else { n as u8 }; 512]);
    }
}

#[test]
fn the_configuration_describes_the_disk() {
    let machine = machine(|_| ());
    let bench = &machine.bench;
    assert_eq!(u64::from_le_bytes(bench.read(DEVICE)), SECTORS);
    assert_eq!(bench.read32(DEVICE + 20), 512);
    assert_eq!(bench.read16(DEVICE + 34), 2);
    assert_eq!(bench.read32(DEVICE + 60), 0, "beyond its end");
    let offered = bench.offered();
    assert_eq!(offered >> 9 & 1, 1, "there is a cache to flush");
    assert_eq!(offered >> 5 & 1, 0);
    assert_eq!(offered >> 13 & 3, 3);
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let machine = machine(|_| ());
    let ring = &mut machine.bench.start(VERSION_1);
    let range = |sector: u64, sectors: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    machine.bench.store(DATA, &[range(10, 2, 0), range(20, 1, 1)].concat());
    assert_eq!(machine.request(ring, ZEROES, 0, 32), 0);
    assert_eq!((machine.file(10), machine.file(11), machine.file(20)), ([0; 512], [0; 512], [0; 512]));
    assert_eq!((machine.file(12), machine.file(21)), ([12; 512], [21; 512]));
    machine.bench.store(DATA, &range(32, 32, 0));
    assert_eq!(machine.request(ring, DISCARD, 0, 16), 0);
    machine.bench.store(DATA, &range(32, 32, 1));
    assert_eq!(machine.request(ring, DISCARD, 0, 16), 2, "unmap is for write-zeroes");
    machine.bench.store(DATA, &range(0, 1, 2));
    assert_eq!(machine.request(ring, ZEROES, 0, 16), 2, "no such flag");
    machine.bench.store(DATA, &range(SECTORS, 1, 0));
    assert_eq!(machine.request(ring, ZEROES, 0, 16), 1, "beyond the end");
    machine.bench.store(DATA, &range(u64::MAX, 1, 0));
    assert_eq!(machine.request(ring, DISCARD, 0, 16), 1);
    assert_eq!(machine.request(ring, ZEROES, 0, 8), 2, "half a range");
}

#[test]
fn impossible_requests_fail_and_the_next_one_works() {
    let machine = machine(|_| ());
    let ring = &mut machine.bench.start(VERSION_1);
    for (kind, sector, length, status) in [
        (IN, SECTORS, 512, 1),
        (IN, SECTORS - 1, 1024, 1),
        (IN, u64::MAX, 512, 1),
        (OUT, u64::MAX / 512, 512, 1),
        (IN, 0, 511, 1),
        (OUT, 0, 513, 1),
        (77, 0, 512, 2),
        (IN, 5, 512, 0),
    ] {
        assert_eq!(machine.request(ring, kind, sector, length), status, "{kind} {sector} {length}");
    }
    assert_eq!(machine.file(SECTORS - 1), [(SECTORS - 1) as u8; 512]);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let machine = machine(|options| options.read_only = true);
    assert_eq!(machine.bench.offered() >> 5 & 1, 1);
    let ring = &mut machine.bench.start(VERSION_1 | 1 << 5);
    assert_eq!(machine.request(ring, OUT, 3, 512), 1);
    assert_eq!(machine.request(ring, IN, 3, 512), 0);
    assert_eq!(machine.file(3), [3; 512]);
}

#[test]
fn a_disk_that_writes_through_has_nothing_to_flush() {
    let machine = machine(|options| options.cache = Cache::WriteThrough);
    assert_eq!(machine.bench.offered() >> 9 & 1, 0);
}

#[test]
fn a_disk_that_has_become_shorter_fails_and_the_machine_goes_on() {
    let machine = machine(|_| ());
    let ring = &mut machine.bench.start(VERSION_1);
    fs::File::options().write(true).open(&machine.path).unwrap().set_len(10 * 512).unwrap();
    assert_eq!(machine.request(ring, IN, 100, 512), 1);
    assert_eq!(machine.request(ring, IN, 1, 512), 0);
    fs::remove_file(&machine.path).unwrap();
    assert_eq!(machine.request(ring, IN, 1, 512), 0, "an open file outlives its name");
}

/// An indirect table with a header and as many buffers to be read into, all at the same place.
fn table(bench: &Bench, entries: u64) -> u64 {
    let table = 0x4_0000;
    write_descriptor(bench, table, HEADER, 16, NEXT, 1);
    for n in 1..entries {
        let flags = if n + 1 < entries { NEXT | WRITE } else { WRITE };
        write_descriptor(bench, table + 16 * n, DATA, 512, flags, n as u16 + 1);
    }
    table
}

#[test]
fn buffers_of_no_length_count_for_nothing() {
    let machine = machine(|_| ());
    let bench = &machine.bench;
    let ring = &mut bench.start(VERSION_1);
    bench.store(HEADER, &header(IN, 4));
    let empty = |writable| (DATA, 0, writable);
    let parts = [
        empty(false),
        (HEADER, 16, false),
        empty(false),
        empty(true),
        (DATA, 512, true),
        empty(true),
        (STATUS, 1, true),
    ];
    assert_eq!(bench.request(ring, &parts), Some(513));
    assert_eq!(bench.load(DATA, 512), [4; 512]);
    // Only a status: there is no header.
    let ring = &mut bench.start(VERSION_1);
    assert_eq!(bench.request(ring, &[(HEADER, 0, false), (STATUS, 1, true)]), None);
}

#[test]
fn malformed_chains_stop_the_queue_and_reset_starts_it_again() {
    let machine = machine(|_| ());
    let bench = &machine.bench;
    type Make = fn(&Bench, &mut Ring) -> u16;
    let cases: [(&str, Make); 15] = [
        ("a loop", |bench, ring| {
            ring.descriptor(bench, 0, HEADER, 16, NEXT, 1);
            ring.descriptor(bench, 1, DATA, 16, NEXT, 0);
            0
        }),
        ("no status", |bench, ring| ring.chain(bench, &[(HEADER, 16, false), (DATA, 512, false)])),
        ("no header", |bench, ring| ring.chain(bench, &[(DATA, 512, true)])),
        ("short header", |bench, ring| ring.chain(bench, &[(HEADER, 15, false), (STATUS, 1, true)])),
        ("outside RAM", |bench, ring| {
            ring.chain(bench, &[(HEADER, 16, false), (RAM - 256, 512, true), (STATUS, 1, true)])
        }),
        ("wrong order", |bench, ring| ring.chain(bench, &[(STATUS, 1, true), (HEADER, 16, false), (DATA, 512, true)])),
        ("next beyond the table", |bench, ring| {
            ring.descriptor(bench, 0, HEADER, 16, NEXT, 16);
            0
        }),
        ("head beyond the table", |_, _| 0x7fff),
        ("indirect table in an indirect table", |bench, ring| {
            write_descriptor(bench, DATA, DATA, 16, TABLE_FLAG, 0);
            ring.descriptor(bench, 0, DATA, 16, TABLE_FLAG, 0);
            0
        }),
        ("a loop in an indirect table", |bench, ring| {
            write_descriptor(bench, DATA, HEADER, 16, NEXT, 1);
            write_descriptor(bench, DATA + 16, STATUS, 1, NEXT | WRITE, 1);
            ring.descriptor(bench, 0, DATA, 32, TABLE_FLAG, 0);
            0
        }),
        ("next beyond the indirect table", |bench, ring| {
            write_descriptor(bench, DATA, HEADER, 16, NEXT, 1);
            write_descriptor(bench, DATA + 16, STATUS, 1, WRITE, 0);
            ring.descriptor(bench, 0, DATA, 16, TABLE_FLAG, 0);
            0
        }),
        ("an indirect table with a part of a descriptor", |bench, ring| {
            ring.descriptor(bench, 0, table(bench, 3), 3 * 16 - 1, TABLE_FLAG, 0);
            0
        }),
        ("an indirect table with nothing in it", |bench, ring| {
            ring.descriptor(bench, 0, table(bench, 3), 0, TABLE_FLAG, 0);
            0
        }),
        ("an indirect table at the end of RAM", |bench, ring| {
            write_descriptor(bench, RAM - 32, HEADER, 16, NEXT, 1);
            write_descriptor(bench, RAM - 16, STATUS, 1, NEXT | WRITE, 2);
            ring.descriptor(bench, 0, RAM - 32, 48, TABLE_FLAG, 0);
            0
        }),
        ("more descriptors than anybody needs", |bench, ring| {
            ring.descriptor(bench, 0, table(bench, 1025), 1025 * 16, TABLE_FLAG, 0);
            0
        }),
    ];
    bench.store(HEADER, &header(IN, 0));
    for (what, make) in cases {
        let mut ring = bench.start(VERSION_1 | INDIRECT);
        let head = make(bench, &mut ring);
        ring.offer(bench, head);
        bench.kick(&ring);
        assert_eq!(ring.wait(bench), None, "{what}");
        assert_eq!(bench.status() & 0x40, 0x40, "{what}");
        let mut ring = bench.start(VERSION_1);
        assert_eq!(machine.request(&mut ring, IN, 1, 512), 0, "after {what}");
    }
}

#[test]
fn an_indirect_table_is_a_request_like_any_other() {
    let machine = machine(|_| ());
    let bench = &machine.bench;
    let mut ring = bench.start(VERSION_1 | INDIRECT);
    bench.store(HEADER, &header(IN, 4));
    let table = 0x3_0000;
    write_descriptor(bench, table, HEADER, 16, NEXT, 1);
    write_descriptor(bench, table + 16, DATA, 512, NEXT | WRITE, 2);
    write_descriptor(bench, table + 32, STATUS, 1, WRITE, 0);
    ring.descriptor(bench, 3, table, 48, TABLE_FLAG, 0);
    ring.offer(bench, 3);
    bench.kick(&ring);
    assert_eq!(ring.wait(bench), Some((3, 513)));
    assert_eq!(bench.load(DATA, 512), [4; 512]);
}

#[test]
fn requests_that_wait_for_the_hosts_disk_and_flushes_are_all_answered() {
    let machine = machine(|_| ());
    let bench = &machine.bench;
    let file = fs::File::open(&machine.path).unwrap();
    file.sync_all().unwrap();
    for round in 0..20 {
        // Out of the host's cache, so that reads wait.
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let ring = &mut bench.start(VERSION_1 | 1 << 9);
        for n in 0..5u64 {
            let (place, status) = (HEADER + 0x100 * n, STATUS + n);
            let kind = if n == 4 { FLUSH } else { IN };
            bench.store(place, &header(kind, 50 * n + round));
            bench.store(status, &[0xaa]);
            let data = (DATA + 0x1000 * n, if kind == IN { 512 } else { 0 }, true);
            ring.add(bench, &[(place, 16, false), data, (status, 1, true)]);
        }
        bench.kick(ring);
        if round % 4 == 3 {
            // A reset waits for what has begun, and all else is forgotten.
            continue;
        }
        (0..5).for_each(|_| _ = ring.wait(bench).unwrap());
        assert_eq!(bench.load(STATUS, 5), [0; 5]);
        for n in 0..4 {
            assert_eq!(bench.load(DATA + 0x1000 * n, 512), [(50 * n + round) as u8; 512]);
        }
    }
}

#[test]
fn an_available_index_that_jumps_stops_the_queue() {
    let machine = machine(|_| ());
    let bench = &machine.bench;
    let mut ring = bench.start(VERSION_1);
    bench.store(ring.available() + 2, &1000u16.to_le_bytes());
    bench.kick(&ring);
    assert_eq!(ring.wait(bench), None);
}

#[test]
fn hostile_queues_do_no_harm() {
    let machine = machine(|_| ());
    let mut random = Random(0x5eed);
    for round in 0..150 {
        let data = random.bytes(1 + (round * 37) % 1500);
        support::hostile::queues(&machine.bench, random.next(), 2, &data);
    }
    let ring = &mut machine.bench.start(VERSION_1);
    assert_eq!(machine.request(ring, IN, SECTORS, 512), 1);
}
