use super::*;
use crate::mode::Mode;
use crate::testing::{kernel_vcpu, user_vcpu};

#[test]
fn a_mode_that_is_not_used_any_more_gives_its_memory_back_and_can_be_used_again() {
    let memory = Arc::new(CodeMemory::new(1 << 20).unwrap());
    let mut jumps = Jumps::new(memory.clone());
    let (early, late) = (Mode::of(&kernel_vcpu()), Mode::of(&user_vcpu()));
    for key in [0x1000, crate::code_memory::JUMP_MASK + 4] {
        jumps.enter(early, key, 1, 2, true);
        jumps.clear(true);
        assert_eq!(jumps.find(early, key), None);
        for _ in 0..MAX_IDLE {
            jumps.enter(late, key, 3, 4, true);
            jumps.clear(true);
        }
        let code = jump_slot_offsets(0).codes as usize / 8 + jump_index(key, early);
        assert_eq!(memory.jump_word(code).load(Ordering::Relaxed), 0, "the slot of the early mode is empty memory");
        jumps.enter(late, key, 5, 6, true);
        jumps.enter(early, key, 7, 8, true);
        assert_eq!((jumps.find(early, key), jumps.find(late, key)), (Some(7), Some(5)));
        assert_eq!(jumps.find(early, 0), None, "an empty entry leads nowhere");
        jumps.clear(true);
        jumps.clear(true);
    }
}

/// Two addresses that share an entry of the table.
const NEIGHBOURS: [u64; 2] = [0x1000, 0x1000 + (crate::code_memory::JUMP_MASK + 4)];

fn jumps_with_room() -> (Jumps, Mode) {
    let mut jumps = Jumps::new(Arc::new(CodeMemory::new(1 << 20).unwrap()));
    let mode = Mode::of(&kernel_vcpu());
    // Lists that have grown once need not do so again.
    for global in [false, true] {
        jumps.enter(mode, 0x1000, 9, 9, global);
        jumps.enter(mode, 0x2000, 9, 9, global);
    }
    jumps.clear(true);
    (jumps, mode)
}

#[test]
fn what_gave_way_in_the_table_comes_back() {
    let (mut jumps, mode) = jumps_with_room();
    let [first, second] = NEIGHBOURS;
    assert_eq!(jump_index(first, mode), jump_index(second, mode));
    jumps.enter(mode, first, 1, 2, false);
    jumps.enter(mode, second, 3, 4, true);
    assert_eq!((jumps.find(mode, first), jumps.find(mode, second)), (None, Some(3)));
    for _ in 0..2 {
        assert_eq!((jumps.recall(mode, first), jumps.find(mode, first)), (Some(1), Some(1)));
        assert_eq!(jumps.recall(mode, first), None, "it is in the table");
        assert_eq!((jumps.recall(mode, second), jumps.find(mode, second)), (Some(3), Some(3)));
    }
    let other = Mode::of(&user_vcpu());
    jumps.enter(other, 0x5000, 5, 6, false);
    assert_eq!(jumps.recall(other, first), None, "modes have entries of their own");
}

#[test]
fn what_gave_way_is_forgotten_like_what_is_in_the_table() {
    let [first, second] = NEIGHBOURS;
    let (mut jumps, mode) = jumps_with_room();
    let displace = |jumps: &mut Jumps, global| {
        jumps.enter(mode, first, 1, 2, global);
        jumps.enter(mode, second, 3, 4, global);
    };
    for (of_global, clear_global, kept) in
        [(false, false, false), (false, true, false), (true, false, true), (true, true, false)]
    {
        displace(&mut jumps, of_global);
        jumps.clear(clear_global);
        assert_eq!(jumps.recall(mode, first).is_some(), kept, "global {of_global}, cleared with global {clear_global}");
        jumps.clear(true);
    }
    displace(&mut jumps, false);
    jumps.forget(mode, first);
    assert_eq!((jumps.recall(mode, first), jumps.find(mode, second)), (None, Some(3)));
    // Where a place was used for both kinds, what gives way there counts as the kind that is forgotten sooner.
    jumps.clear(true);
    jumps.enter(mode, first, 1, 2, false);
    jumps.enter(mode, second, 3, 4, true);
    jumps.enter(mode, first, 5, 6, true);
    jumps.clear(false);
    assert_eq!(jumps.recall(mode, second), None);
}

#[test]
fn programs_of_two_address_spaces_have_the_same_addresses_and_entries_of_their_own() {
    let (mut jumps, _) = jumps_with_room();
    let mode = Mode::of(&user_vcpu());
    let (mut first, mut second) = (Kept::default(), Kept::default());
    jumps.enter(mode, 0x1000, 1, 2, false);
    jumps.enter(mode, 0x2000, 3, 4, false);
    jumps.leave(&mut first);
    jumps.start_space();
    assert_eq!(jumps.find(mode, 0x1000), None);
    jumps.enter(mode, 0x1000, 5, 6, false);
    jumps.leave(&mut second);
    jumps.come_back(&first);
    assert_eq!((jumps.find(mode, 0x1000), jumps.find(mode, 0x2000)), (Some(1), Some(3)));
    // What is forgotten is so in every one of them.
    jumps.forget(mode, 0x1000);
    jumps.leave(&mut first);
    jumps.come_back(&second);
    assert_eq!(jumps.find(mode, 0x1000), None);
    jumps.clear(false);
    jumps.leave(&mut second);
    jumps.come_back(&first);
    assert_eq!(jumps.find(mode, 0x2000), Some(3), "only the current one is cleared");
    jumps.leave(&mut first);
    (0..=FORGOTTEN as u64).for_each(|n| jumps.forget(mode, 0x10_0000 + n));
    jumps.come_back(&first);
    assert_eq!(jumps.find(mode, 0x2000), None, "more were forgotten than is remembered");
}

#[test]
fn what_gave_way_comes_back_only_in_its_own_address_space() {
    let (mut jumps, _) = jumps_with_room();
    let mode = Mode::of(&user_vcpu());
    let [first, second] = NEIGHBOURS;
    let mut kept = Kept::default();
    jumps.enter(mode, first, 1, 2, false);
    jumps.enter(mode, second, 3, 4, false);
    jumps.leave(&mut kept);
    jumps.start_space();
    assert_eq!(jumps.recall(mode, first), None);
    jumps.leave(&mut Kept::default());
    jumps.come_back(&kept);
    assert_eq!(jumps.recall(mode, first), Some(1));
    assert_eq!(jumps.find(mode, second), None);
    assert_eq!(jumps.recall(mode, second), Some(3));
}

#[test]
fn a_new_address_space_gets_a_number_that_none_of_those_that_wait_has() {
    let (mut jumps, _) = jumps_with_room();
    let mode = Mode::of(&user_vcpu());
    let mut spaces: [Kept; 3] = Default::default();
    for (n, space) in spaces.iter_mut().enumerate() {
        jumps.start_space();
        jumps.enter(mode, 0x1000 * (n as u64 + 1), 1, 1, false);
        jumps.leave(space);
    }
    jumps.come_back(&spaces[0]);
    assert_eq!(jumps.find(mode, 0x1000), Some(1));
    // By another process, and by a flush of the current one's.
    for flush in [false, true] {
        if flush {
            jumps.clear(false)
        } else {
            jumps.start_space()
        }
        assert!((1..=3).all(|n| jumps.find(mode, 0x1000 * n).is_none()));
        jumps.come_back(&spaces[1]);
        assert_eq!(jumps.find(mode, 0x2000), Some(1));
    }
}

#[test]
fn what_gave_way_to_another_address_spaces_entry_is_forgotten_though_it_did_so_later() {
    let (mut jumps, _) = jumps_with_room();
    let mode = Mode::of(&user_vcpu());
    // In address spaces next to each other these have the same entry.
    let first = 0x10_1000;
    let second = first - (number_distance(1) / JUMP_WORDS * 4) as u64;
    let (mut waits, mut other) = (Kept::default(), Kept::default());
    jumps.enter(mode, first, 1, 2, false);
    jumps.leave(&mut waits);
    jumps.start_space();
    jumps.forget(mode, first);
    jumps.enter(mode, second, 3, 4, false);
    jumps.leave(&mut other);
    jumps.come_back(&waits);
    assert_eq!((jumps.find(mode, first), jumps.recall(mode, first)), (None, None));
    jumps.leave(&mut waits);
    jumps.come_back(&other);
    assert_eq!(jumps.find(mode, second), Some(3));
}

#[test]
fn when_there_is_no_number_left_all_programs_start_anew() {
    let (mut jumps, kernel) = jumps_with_room();
    let mode = Mode::of(&user_vcpu());
    let mut kept = Kept::default();
    jumps.enter(kernel, 0x3000, 1, 2, true);
    jumps.enter(mode, 0x1000, 3, 4, false);
    jumps.leave(&mut kept);
    for n in 0..=NUMBERS as u64 {
        jumps.start_space();
        // Nothing is left of the one that had the number before, at any number.
        assert_eq!(jumps.find(mode, 0x1000), None);
        jumps.enter(mode, 0x1000, n, n, false);
        assert_eq!(jumps.find(mode, 0x1000), Some(n));
    }
    jumps.come_back(&kept);
    assert_eq!(jumps.find(mode, 0x1000), None, "the number is another's");
    assert_eq!(jumps.find(kernel, 0x3000), Some(1));
}

#[test]
fn from_no_base_does_an_empty_entry_have_the_tag_of_an_address() {
    let memory = Arc::new(CodeMemory::new(1 << 20).unwrap());
    let mut jumps = Jumps::new(memory.clone());
    for mode in [Mode::of(&user_vcpu()), Mode::of(&kernel_vcpu())] {
        let slot = jumps.slot(mode).unwrap();
        for _ in 0..=NUMBERS {
            for key in [0, u64::MAX] {
                let tag = memory.jump_word(jumps.tag_index(slot, mode, key)).load(Ordering::Relaxed);
                assert_ne!(tag, key, "{key:#x} from number {}", jumps.number);
            }
            jumps.start_space();
        }
    }
    // What was never in use counts as empty, too.
    for index in (0..JUMP_TABLE_WORDS)
        .step_by(JUMP_WORDS * 4)
        .filter(|index| jumps.slots.iter().any(|s| s.at == index / JUMP_SLOT_WORDS))
    {
        assert_eq!(memory.jump_word(index).load(Ordering::Relaxed), empty_tag(index));
    }
}

#[test]
fn a_vcpu_that_is_to_stop_goes_on_with_the_address_space_that_was_selected_meanwhile() {
    let memory = Arc::new(CodeMemory::new(1 << 20).unwrap());
    let poll = crate::code_memory::PollWord::default();
    poll.attach(memory.clone());
    let shift = || memory.word(crate::code_memory::PROGRAM_SHIFT_OFFSET).load(Ordering::Relaxed);
    poll.clear();
    memory.select(3);
    assert_eq!(shift(), number_distance(3) as u64);
    poll.set();
    let stopped = shift();
    assert_ne!(stopped, number_distance(3) as u64);
    memory.select(5);
    assert_eq!(shift(), stopped, "it is still to stop");
    poll.clear();
    assert_eq!(shift(), number_distance(5) as u64);
}
