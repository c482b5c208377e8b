use super::*;
use crate::mode::Mode;
use crate::testing::{kernel_vcpu, user_vcpu};

#[test]
fn a_mode_that_is_not_used_any_more_gives_its_memory_back_and_can_be_used_again() {
    let memory = Arc::new(CodeMemory::new(1 << 20).unwrap());
    let mut jumps = Jumps::new(memory.clone());
    let (early, late) = (Mode::of(&kernel_vcpu()), Mode::of(&user_vcpu()));
    for key in [0x1000, u64::MAX - 3] {
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
        assert_eq!(jumps.find(early, u64::MAX), None, "an empty entry leads nowhere");
        jumps.clear(true);
        jumps.clear(true);
    }
}

/// Two addresses that share an entry of the table.
const NEIGHBOURS: [u64; 2] = [0x1000, 0x1000 + (crate::code_memory::JUMP_MASK + 4)];

fn jumps_with_room() -> (Jumps, Mode) {
    let mut jumps = Jumps::new(Arc::new(CodeMemory::new(1 << 20).unwrap()));
    let mode = Mode::of(&user_vcpu());
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
    let other = Mode::of(&kernel_vcpu());
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
fn a_vcpu_that_is_to_stop_finds_no_entry_even_where_no_bit_of_the_address_is_set() {
    let memory = Arc::new(CodeMemory::new(1 << 20).unwrap());
    let mut jumps = Jumps::new(memory.clone());
    let poll = crate::code_memory::PollWord::default();
    poll.attach(memory);
    poll.clear();
    let mode = Mode::of(&user_vcpu());
    let key = crate::code_memory::JUMP_MASK + 4;
    assert_eq!(jump_index(key, mode), 0);
    jumps.enter(mode, key, 1, 2, false);
    assert_eq!(jumps.find(mode, key), Some(1));
    poll.set();
    assert_eq!(jumps.find(mode, key), None);
    jumps.enter(mode, key, 1, 2, false);
    assert_eq!(jumps.find(mode, key), None, "entered while it is to stop");
    poll.clear();
    jumps.enter(mode, key, 1, 2, false);
    assert_eq!(jumps.find(mode, key), Some(1));
}
