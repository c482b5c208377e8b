//! Mappings are what was asked for, in order.

use super::{CODE, DATA, Ram, registers};
use crate::operations::{CAPACITY, Operation, Pending};
use crate::{Error, PAGE_SIZE, Protection, RESERVED, Space, Stop, USER_END};

/// `mov rax, [rsi]; mov [rsi], rdi; int3`
const EXCHANGE: [u8; 7] = [0x48, 0x8b, 0x06, 0x48, 0x89, 0x3e, 0xcc];
/// `mov rax, [rsi]; int3`
const LOAD: [u8; 4] = [0x48, 0x8b, 0x06, 0xcc];

/// What a program at CODE loads from an address.
fn load(space: &mut Space, address: u64) -> Result<u64, Stop> {
    let mut start = registers();
    start.rsi = address;
    match space.run(&mut start).unwrap() {
        Stop::Breakpoint => Ok(start.rax),
        stop => Err(stop),
    }
}

#[test]
fn memory_is_the_guests_ram_both_ways() {
    let ram = Ram::new(3);
    let mut space = ram.program(&EXCHANGE);
    ram.write(2 * 4096 + 8, &1234u64.to_le_bytes());
    let mut start = registers();
    (start.rsi, start.rdi) = (DATA + 4096 + 8, 5678);
    assert_eq!(space.run(&mut start).unwrap(), Stop::Breakpoint);
    assert_eq!((start.rax, ram.word(2 * 4096 + 8)), (1234, 5678));
}

#[test]
fn unmapped_memory_faults_again_and_a_later_mapping_wins() {
    let ram = Ram::new(4);
    let mut space = ram.program(&LOAD);
    for page in 1..4u64 {
        ram.write(page * 4096, &page.to_le_bytes());
    }
    assert_eq!(load(&mut space, DATA), Ok(1));
    space.unmap(DATA, 4096);
    assert_eq!(load(&mut space, DATA), Err(Stop::Page { address: DATA }));
    assert_eq!(load(&mut space, DATA + 4096), Ok(2));
    space.map(DATA, 4096, 4096, Protection::Read);
    space.map(DATA, 4096, 3 * 4096, Protection::Read);
    space.unmap(DATA + 4096, 4096);
    assert_eq!(load(&mut space, DATA), Ok(3));
    assert_eq!(load(&mut space, DATA + 4096), Err(Stop::Page { address: DATA + 4096 }));
    space.unmap_all();
    assert_eq!(load(&mut space, DATA), Err(Stop::Page { address: CODE }));
}

#[test]
fn mappings_can_be_changed_without_a_run() {
    let ram = Ram::new(2);
    let mut space = ram.program(&LOAD);
    let lines = |space: &Space| {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", space.pid())).unwrap();
        maps.lines().filter(|line| line.contains("/memfd:ram ")).count()
    };
    assert_eq!(lines(&space), 0);
    space.apply().unwrap();
    assert_eq!(lines(&space), 2);
    space.unmap_all();
    space.apply().unwrap();
    assert_eq!(lines(&space), 0);
    // A kick in the meantime is for the next run.
    space.kicker().kick();
    space.map(CODE, 4096, 0, Protection::ReadExecute);
    space.apply().unwrap();
    assert_eq!(space.run(&mut registers()).unwrap(), Stop::Kicked);
}

#[test]
fn thousands_of_mappings_are_all_made() {
    let pages = 8 * CAPACITY as u64;
    let ram = Ram::new(pages + 1);
    for page in 0..=pages {
        ram.write(page * 4096, &(page * 3).to_le_bytes());
    }
    let mut space = ram.program(&LOAD);
    // Back to front, so that none continues the one before.
    for page in 0..pages {
        space.map(0x10_0000_0000 + page * 4096, 4096, (pages - page) * 4096, Protection::Read);
    }
    for page in [0, 1, CAPACITY as u64 - 1, CAPACITY as u64, pages / 2, pages - 1] {
        assert_eq!(load(&mut space, 0x10_0000_0000 + page * 4096), Ok((pages - page) * 3), "page {page}");
    }
    space.unmap(0, RESERVED.start);
    assert_eq!(load(&mut space, DATA), Err(Stop::Page { address: CODE }));
}

#[test]
fn a_space_whose_mappings_are_too_many_says_so_and_starts_over() {
    let most = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse::<u64>().unwrap();
    // Every mapping is of the same page, so that the kernel can't make one of two neighbours.
    let ram = Ram::new(2);
    let mut space = ram.program(&LOAD);
    let mut page = 0;
    let error = loop {
        for _ in 0..10_000 {
            space.map(0x10_0000_0000 + page * 4096, 4096, 4096, Protection::Read);
            page += 1;
        }
        match space.run(&mut registers()) {
            Ok(stop) => assert_eq!(stop, Stop::Page { address: 0 }),
            Err(error) => break error,
        }
        assert!(page < 2 * most);
    };
    assert!(matches!(error, Error::Full), "{error}");
    space.unmap_all();
    space.map(CODE, 4096, 0, Protection::ReadExecute);
    space.map(DATA, 4096, 4096, Protection::Read);
    assert_eq!(load(&mut space, DATA), Ok(0));
    assert_eq!(load(&mut space, 0x10_0000_0000), Err(Stop::Page { address: 0x10_0000_0000 }));
}

#[test]
fn what_continues_the_operation_before_is_part_of_it() {
    let map = |address, offset, protection| Operation::Map { address, length: 0x1000, offset, protection };
    let mut pending = Pending::default();
    pending.push(map(0x1000, 0x5000, Protection::Read));
    pending.push(map(0x2000, 0x6000, Protection::Read));
    pending.push(map(0x3000, 0x8000, Protection::Read));
    pending.push(map(0x4000, 0x9000, Protection::ReadWrite));
    pending.push(map(0x6000, 0xa000, Protection::ReadWrite));
    pending.push(Operation::Unmap { address: 0x7000, length: 0x1000 });
    pending.push(Operation::Unmap { address: 0x8000, length: 0x3000 });
    pending.push(map(0xb000, 0xb000, Protection::ReadWrite));
    let expected = [
        Operation::Map { address: 0x1000, length: 0x2000, offset: 0x5000, protection: Protection::Read },
        map(0x3000, 0x8000, Protection::Read),
        map(0x4000, 0x9000, Protection::ReadWrite),
        map(0x6000, 0xa000, Protection::ReadWrite),
        Operation::Unmap { address: 0x7000, length: 0x4000 },
        map(0xb000, 0xb000, Protection::ReadWrite),
    ];
    assert_eq!(pending.batches().collect::<Vec<_>>(), [&expected[..]]);
}

#[test]
fn ranges_that_no_space_can_have_are_refused() {
    let ram = Ram::new(2);
    let mut space = ram.program(&LOAD);
    let wrong = [
        (1, 4096, 0),
        (4096, 1, 0),
        (4096, 4096, 1),
        (USER_END, 4096, 0),
        (USER_END - 4096, 8192, 0),
        (u64::MAX - 4095, 4096, 0),
        (4096, u64::MAX - 4095, 0),
        (4096, 4096, u64::MAX - 4095),
        (RESERVED.start, 4096, 0),
        (RESERVED.end - 4096, 8192, 0),
        (0, USER_END, 0),
    ];
    for (address, length, offset) in wrong {
        space.map(address, length, offset, Protection::Read);
        let done = space.run(&mut registers());
        assert!(matches!(done, Err(Error::Range { .. })), "{address:#x} {length:#x} {offset:#x}");
    }
    // All that is the guest's can be unmapped at once nevertheless.
    space.unmap(0, USER_END);
    space.map(CODE, 4096, 0, Protection::ReadExecute);
    space.map(DATA, 0, 0, Protection::ReadWrite);
    assert_eq!(load(&mut space, DATA), Err(Stop::Page { address: DATA }));
    space.map(RESERVED.start - PAGE_SIZE, PAGE_SIZE, PAGE_SIZE, Protection::Read);
    space.map(RESERVED.end, PAGE_SIZE, PAGE_SIZE, Protection::Read);
    assert_eq!(load(&mut space, RESERVED.start - 8), Ok(0));
    assert_eq!(load(&mut space, RESERVED.end), Ok(0));
}

/// Beyond the end of RAM there is nothing.
#[test]
fn a_mapping_beyond_ram_faults_as_the_host_does() {
    let ram = Ram::new(2);
    let mut space = ram.program(&LOAD);
    space.map(0x1000_0000, 4096, 0x10_0000, Protection::ReadWrite);
    assert_eq!(load(&mut space, 0x1000_0000), Err(Stop::Exception { signal: libc::SIGBUS }));
}
