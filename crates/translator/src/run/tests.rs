use arch::registers::{cr4, rflags};

use super::*;
use crate::code_memory::JUMP_MASK;
use crate::testing::kernel_vcpu;

#[test]
fn a_branch_found_again_says_which_mode_runs_from_there_on() {
    let mut cpu = kernel_vcpu();
    cpu.cr4 |= cr4::SMAP;
    cpu.engine.mode = Some(Mode::of(&cpu));
    // STAC, inline, and then a branch to what had to give way in the jump table.
    cpu.rflags |= rflags::AC;
    let mode = Mode::of(&cpu);
    assert_ne!(cpu.engine.mode, Some(mode));
    for (key, entry) in [(0x6000, 11), (0x6000 + JUMP_MASK + 4, 22)] {
        cpu.engine.cache.jumps.enter(mode, key, entry, entry, false);
    }
    cpu.rip = 0x6000;
    cpu.shared.poll.clear();
    assert_eq!(find_code_light(&mut cpu), 11);
    assert_eq!(cpu.engine.mode, Some(mode));
}
