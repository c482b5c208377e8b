//! Single step, breakpoints, and the shadows in which they wait.

use arch::registers::{debug, rflags};
use difftest::bare::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Where the #DB handler counts, and keeps RIP and DR6 of each exception, 16 bytes apart.
const COUNT: u64 = DIRECT + SCRATCH;
const LOG: u64 = DIRECT + SCRATCH + 16;
const HANDLER: u64 = CODE + 0x1000;
const VARIABLE: u64 = DIRECT + SCRATCH + 0x800;

/// Runs kernel code with a #DB handler that logs and goes on (setting RF, so that instruction breakpoints let their instruction run).
fn logged(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> (Vec<(u64, u64)>, Machine) {
    let mut bare = Bare::new(4 << 20);
    let handler = bare.kernel_code(HANDLER, |a| {
        a.push(rax)?;
        a.push(rcx)?;
        a.push(rdx)?;
        a.mov(rdx, COUNT)?;
        a.mov(rcx, qword_ptr(rdx))?;
        a.inc(qword_ptr(rdx))?;
        a.shl(rcx, 4)?;
        a.mov(rax, qword_ptr(rsp + 24))?;
        a.mov(qword_ptr(rdx + rcx + 16), rax)?;
        a.mov(rax, dr6)?;
        a.mov(qword_ptr(rdx + rcx + 24), rax)?;
        a.mov(eax, 0xffff_0ff0u32)?;
        a.mov(dr6, rax)?;
        a.or(dword_ptr(rsp + 40), 0x10000)?;
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()
    });
    bare.gate(1, handler, Gate::default());
    let rip = bare.kernel_code(CODE, write);
    let state = bare.kernel_state(rip);
    let mut machine = Machine::with_state(bare, &state);
    assert_eq!(machine.run(), End::Exit);
    let count = machine.bare.read_u64(COUNT - DIRECT);
    let log = (0..count.min(60))
        .map(|i| (machine.bare.read_u64(LOG - DIRECT + 16 * i), machine.bare.read_u64(LOG - DIRECT + 16 * i + 8)))
        .collect();
    (log, machine)
}

const K: u64 = DIRECT + CODE;

/// Sets TF by POPFQ: 4 bytes of stack and code; the length of the code.
fn set_tf(a: &mut CodeAssembler) -> Result<u64, IcedError> {
    a.push(0x102)?;
    a.popfq()?;
    Ok(6)
}

fn clear_tf(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.push(2)?;
    a.popfq()
}

#[test]
fn single_step_traps_after_each_instruction_from_the_next_one_on() {
    let (log, _) = logged(|a| {
        set_tf(a)?;
        a.nop()?; // 6
        a.nop()?; // 7
        clear_tf(a)?; // 8: push; 10: popfq
        a.nop()?; // 11
        a.int3()
    });
    let bs = debug::DR6_INIT | debug::DR6_BS;
    assert_eq!(log, [(K + 7, bs), (K + 8, bs), (K + 10, bs), (K + 11, bs)]);
}

#[test]
fn a_single_step_trap_follows_a_load_of_ss_only_after_the_next_instruction() {
    let (log, _) = logged(|a| {
        a.mov(ecx, ss)?; // 2 bytes
        set_tf(a)?; // 2..8
        a.mov(ss, ecx)?; // 8
        a.nop()?; // 10
        clear_tf(a)?; // 11, 13
        a.int3()
    });
    let rips: Vec<u64> = log.iter().map(|(rip, _)| rip - K).collect();
    assert_eq!(rips, [11, 13, 14]);
}

#[test]
fn single_step_goes_through_rep_strings_one_iteration_at_a_time() {
    let (log, machine) = logged(|a| {
        a.mov(rdi, VARIABLE)?; // 10
        a.mov(ecx, 3)?; // 5
        set_tf(a)?; // 15..21
        a.rep().stosb()?; // 21
        clear_tf(a)?; // 23, 25
        a.int3()
    });
    let rips: Vec<u64> = log.iter().map(|(rip, _)| rip - K).collect();
    assert_eq!(rips, [21, 21, 23, 25, 26]);
    assert_eq!(machine.state().gpr[1], 0);
}

#[test]
fn an_instruction_breakpoint_is_a_fault_and_rf_lets_it_pass() {
    let (log, machine) = logged(|a| {
        a.mov(rax, K + 31)?; // 10
        a.mov(dr0, rax)?; // 3
        a.mov(eax, 0x402)?; // 5: G0, execution
        a.mov(dr7, rax)?; // 3
        a.xor(ebx, ebx)?; // 2: at 21
        a.nop_1(dword_ptr(rax))?; // 3: at 23
        a.mov(ecx, 5)?; // 5: at 26
        a.inc(ebx)?; // at 31: the breakpoint
        a.int3()
    });
    assert_eq!(log, [(K + 31, debug::DR6_INIT | 1)]);
    assert_eq!(machine.state().gpr[3], 1);
}

#[test]
fn an_instruction_breakpoint_behind_a_load_of_ss_does_not_hit() {
    let (log, m) = logged(|a| {
        a.mov(rax, K + 21)?; // 10 bytes
        a.mov(dr0, rax)?; // 3
        a.mov(eax, 1)?; // 5
        a.mov(dr7, rax)?; // 3
        a.inc(ebx)?; // at 21: hits
        a.mov(rax, K + 46)?; // at 23, 10 bytes
        a.mov(dr0, rax)?; // 3
        a.mov(eax, i32::from(KERNEL_DATA))?; // 5
        a.mov(ss, eax)?; // at 41
        a.nop()?;
        a.nop()?;
        a.nop()?;
        a.nop()?;
        a.int3()
    });
    assert_eq!(m.state().gpr[arch::registers::gpr::RBX], 1);
    assert_eq!(log.iter().map(|l| l.0).collect::<Vec<_>>(), [K + 21, K + 46], "{log:x?}");
}

#[test]
fn data_breakpoints_trap_after_the_access() {
    for (kind, expected) in [(1u32, vec![1u64]), (3, vec![0, 1])] {
        let (log, _) = logged(|a| {
            a.mov(rsi, VARIABLE)?;
            a.mov(dr1, rsi)?;
            a.mov(eax, 0x408 | kind << 20 | 3 << 22)?; // G1, 4 bytes
            a.mov(dr7, rax)?;
            a.mov(eax, dword_ptr(rsi + 2))?; // reads its upper half
            a.nop()?;
            a.mov(byte_ptr(rsi + 3), 1)?;
            a.nop()?;
            a.mov(byte_ptr(rsi + 4), 1)?;
            a.mov(rcx, DIRECT + SCRATCH + 0x900)?;
            a.mov(dword_ptr(rcx), eax)?;
            a.int3()
        });
        // 10 + 3 + 5 + 3 = 21: the read, 3 bytes; NOP; the write, 4 bytes.
        let traps = [K + 24, K + 29];
        let expected: Vec<_> = expected.iter().map(|i| (traps[*i as usize], debug::DR6_INIT | 2)).collect();
        assert_eq!(log, expected, "kind {kind}");
    }
}

#[test]
fn general_detect_protects_the_debug_registers_once() {
    let (log, _) = logged(|a| {
        a.mov(eax, 0x2400)?; // GD
        a.mov(dr7, rax)?; // 5..8
        a.mov(rbx, dr0)?; // 8: faults; the handler finds GD clear, and so does this when it runs again
        a.int3()
    });
    assert_eq!(log, [(K + 8, debug::DR6_INIT | debug::DR6_BD)]);
}

#[test]
fn int1_is_a_trap_that_leaves_dr6_alone() {
    let (log, _) = logged(|a| {
        a.int1()?;
        a.int3()
    });
    assert_eq!(log, [(K + 1, debug::DR6_INIT)]);
}

#[test]
fn no_trap_follows_int_n_and_the_handler_does_not_step() {
    let (log, machine) = logged(|a| {
        set_tf(a)?;
        a.int3()
    });
    assert!(log.is_empty(), "{log:x?}");
    let frame = machine.frame();
    assert_eq!(frame.vector, 3);
    assert_ne!(frame.rflags & rflags::TF, 0);
}

#[test]
fn iret_that_sets_tf_steps_from_its_target_on() {
    let (log, _) = logged(|a| {
        let mut target = a.create_label();
        a.mov(rbx, rsp)?;
        a.push(i32::from(KERNEL_DATA))?;
        a.push(rbx)?;
        a.push(0x102)?;
        a.push(i32::from(KERNEL_CODE))?;
        a.lea(rax, ptr(target))?;
        a.push(rax)?;
        a.iretq()?;
        a.set_label(&mut target)?;
        a.nop()?;
        a.int3()
    });
    assert_eq!(log.len(), 1, "after the NOP, not after the IRET");
}
