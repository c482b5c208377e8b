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
        jumps.enter(late, key, 3, 4, true);
        jumps.clear(true);
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
