//! SYSCALL and SYSRET: what they take along, and what else has to be seen to on the way.

use arch::msr;
use arch::registers::{cr4, debug, pte, rflags};
use difftest::bare::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const USER: u64 = 0x40_0000;
const USER_STACK: u64 = 0x50_1000;
const HANDLER: u64 = CODE + 0x1000;
const STAR: u64 = (KERNEL_CODE as u64) << 32 | (USER_CODE32 as u64) << 48;
/// x2APIC's register for an interrupt to oneself.
const SELF_IPI: u32 = 0x83f;

type Code<'a> = &'a dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;

fn wrmsr(a: &mut CodeAssembler, register: u32, value: u64) -> Result<(), IcedError> {
    a.mov(ecx, register)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

/// Runs user code whose system calls `kernel` answers; `mask`: SFMASK. Their return address and RFLAGS are in R8 and R9.
fn run(mask: u64, user: Code, kernel: Code) -> Machine {
    let mut bare = Bare::new(8 << 20);
    let code = bare.page();
    bare.map(USER, code, pte::P | pte::U);
    bare.assemble(code, USER, 64, user);
    let stack = bare.page();
    bare.map(USER_STACK - 4096, stack, pte::P | pte::U | pte::W | pte::NX);
    bare.kernel_code(HANDLER, |a| {
        a.mov(r8, rcx)?;
        a.mov(r9, r11)?;
        kernel(a)?;
        a.mov(rcx, r8)?;
        a.mov(r11, r9)?;
        a.sysretq()
    });
    let mut state = bare.user_state(USER, USER_STACK, 64);
    state.msrs.extend([(msr::STAR, STAR), (msr::LSTAR, DIRECT + HANDLER), (msr::SFMASK, mask)]);
    let mut machine = Machine::with_state(bare, &state);
    assert_eq!(machine.run(), End::Exit);
    machine
}

const MASK: u64 = rflags::IF | rflags::AC | rflags::TF | rflags::DF;

/// `count` system calls, of which the first ones may find nothing prepared.
fn calls(a: &mut CodeAssembler, count: u32) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(ebp, count)?;
    a.set_label(&mut again)?;
    a.syscall()?;
    a.dec(ebp)?;
    a.jnz(again)
}

/// What the kernel does in a call only that r15d, not 0, announces.
fn at_last(a: &mut CodeAssembler, what: Code) -> Result<(), IcedError> {
    let mut without = a.create_label();
    a.test(r15d, r15d)?;
    a.jz(without)?;
    what(a)?;
    a.set_label(&mut without)?;
    a.nop()
}

#[test]
fn system_calls_in_a_row_keep_flags_and_mask_those_of_the_kernel() {
    let m = run(
        MASK | rflags::CF | rflags::ZF,
        &|a| {
            let (mut again, mut wrong) = (a.create_label(), a.create_label());
            a.mov(ebp, 50)?;
            a.xor(ebx, ebx)?;
            a.set_label(&mut again)?;
            // CF, ZF and PF, then OF, SF and CF.
            a.xor(eax, eax)?;
            a.stc()?;
            a.syscall()?;
            a.jnc(wrong)?;
            a.jnz(wrong)?;
            a.adc(rbx, 0)?;
            a.mov(eax, 0x4000_0000)?;
            a.std()?;
            a.add(eax, eax)?;
            a.syscall()?;
            a.jno(wrong)?;
            a.jns(wrong)?;
            a.pushfq()?;
            a.pop(r12)?;
            a.cld()?;
            a.dec(ebp)?;
            a.jnz(again)?;
            a.int3()?;
            a.set_label(&mut wrong)?;
            a.ud2()
        },
        &|a| {
            // CF and ZF are masked, SF and OF are not.
            a.adc(rsi, 0)?;
            a.mov(rdi, rsp)?;
            a.mov(rsp, DIRECT + STACK_TOP)?;
            a.pushfq()?;
            a.pop(r13)?;
            a.mov(rsp, rdi)?;
            // RF and VM are not what SYSRET sets.
            a.or(r9, 0x3_0000)
        },
    );
    let (state, frame) = (m.state(), m.frame());
    assert_eq!((frame.vector, frame.cs, frame.ss), (3, USER_CODE.into(), USER_DATA.into()));
    assert_eq!(frame.rflags & (rflags::RF | rflags::VM | rflags::IF), rflags::IF);
    assert_eq!((state.gpr[3], state.gpr[6]), (50, 0));
    assert_eq!(state.gpr[12] & (rflags::DF | rflags::OF | rflags::SF), rflags::DF | rflags::OF | rflags::SF);
    assert_eq!(state.gpr[13] & (rflags::DF | rflags::IF | rflags::CF), 0);
    assert_eq!(state.gpr[8], USER + 30, "the instruction behind SYSCALL");
}

#[test]
fn the_kernel_reaches_user_pages_if_the_mask_leaves_ac_set() {
    for (mask, vector) in [(MASK & !rflags::AC, 3), (MASK, 14)] {
        let m = run(
            mask,
            &|a| {
                a.syscall()?;
                a.push(0x4_0202)?; // AC
                a.popfq()?;
                a.mov(r15d, 1)?;
                calls(a, 3)?;
                a.int3()
            },
            &|a| {
                at_last(a, &|a| {
                    a.mov(rdi, rsp)?;
                    a.mov(rsp, DIRECT + STACK_TOP)?;
                    a.mov(rax, qword_ptr(USER_STACK - 64))?;
                    a.mov(rsp, rdi)
                })
            },
        );
        assert_eq!(m.frame().vector, vector);
    }
}

#[test]
fn sysret_that_sets_ac_has_alignment_checked() {
    let m = run(
        MASK,
        &|a| {
            calls(a, 3)?;
            a.mov(eax, dword_ptr(rsp - 31))?;
            a.mov(r15d, 1)?;
            a.syscall()?;
            a.mov(eax, dword_ptr(rsp - 31))?;
            a.int3()
        },
        &|a| at_last(a, &|a| a.or(r9, 0x4_0000)),
    );
    assert_eq!((m.frame().vector, m.frame().rip), (17, m.state().gpr[8]));
}

#[test]
fn sysret_that_sets_tf_traps_before_the_instruction_it_leads_to() {
    let m = run(
        MASK,
        &|a| {
            calls(a, 3)?;
            a.mov(r15d, 1)?;
            a.syscall()?;
            a.nop()?;
            a.int3()
        },
        &|a| {
            a.shl(r15d, 8)?;
            a.or(r9, r15)
        },
    );
    assert_eq!((m.frame().vector, m.frame().rip), (1, m.state().gpr[8]));
    assert_eq!(m.state().dr[4] & debug::DR6_BS, debug::DR6_BS);
}

#[test]
fn a_system_call_that_is_stepped_through_traps_when_it_is_over() {
    let m = run(
        MASK,
        &|a| {
            calls(a, 3)?;
            a.push(0x302)?;
            a.popfq()?;
            a.syscall()?;
            a.nop()?;
            a.int3()
        },
        &|a| a.inc(r15),
    );
    assert_eq!((m.frame().vector, m.frame().cs, m.frame().rip), (1, USER_CODE.into(), m.state().gpr[8]));
    assert_eq!(m.state().gpr[15], 4);
}

#[test]
fn a_breakpoint_where_sysret_leads_is_not_passed_by_rf() {
    let m = run(
        MASK,
        &|a| {
            calls(a, 3)?;
            a.mov(r15d, 1)?;
            a.syscall()?;
            a.nop()?;
            a.int3()
        },
        &|a| {
            at_last(a, &|a| {
                a.mov(dr0, r8)?;
                a.mov(eax, 2)?;
                a.mov(dr7, rax)?;
                a.or(r9, 0x1_0000)
            })
        },
    );
    assert_eq!((m.frame().vector, m.frame().rip), (1, m.state().gpr[8]));
    assert_eq!(m.state().dr[4] & 0xf, 1);
}

#[test]
fn sysret_is_undefined_once_sce_is_clear() {
    let m = run(
        MASK,
        &|a| {
            calls(a, 3)?;
            a.mov(r15d, 1)?;
            a.syscall()
        },
        &|a| {
            a.mov(rsp, DIRECT + STACK_TOP)?;
            at_last(a, &|a| wrmsr(a, msr::EFER, 0xd00))
        },
    );
    assert_eq!((m.frame().vector, m.frame().cs), (6, KERNEL_CODE.into()));
}

#[test]
fn programs_that_sysret_leads_to_read_the_tsc_only_without_tsd() {
    let m = run(
        MASK,
        &|a| {
            let mut again = a.create_label();
            a.mov(ebp, 3)?;
            a.set_label(&mut again)?;
            a.syscall()?;
            a.rdtsc()?;
            a.dec(ebp)?;
            a.jnz(again)?;
            a.mov(r15d, 1)?;
            a.jmp(again)
        },
        &|a| {
            at_last(a, &|a| {
                a.mov(rax, cr4)?;
                a.or(rax, cr4::TSD as i32)?;
                a.mov(cr4, rax)
            })
        },
    );
    assert_eq!((m.frame().vector, m.frame().rip), (13, m.state().gpr[8]));
}

#[test]
fn a_pending_interrupt_comes_before_the_instruction_that_sysret_leads_to() {
    let m = run(
        MASK,
        &|a| {
            calls(a, 3)?;
            a.mov(r15d, 1)?;
            a.syscall()?;
            a.mov(r14d, 1)?;
            a.int3()
        },
        &|a| {
            a.mov(rdi, rsp)?;
            a.mov(rsp, DIRECT + STACK_TOP)?;
            at_last(a, &|a| {
                wrmsr(a, msr::APIC_BASE, 0xfee0_0d00)?;
                wrmsr(a, 0x80f, 0x1ff)?;
                wrmsr(a, SELF_IPI, 0x55)
            })?;
            a.mov(rsp, rdi)
        },
    );
    assert_eq!((m.frame().vector, m.frame().rip), (0x55, m.state().gpr[8]));
    assert_eq!(m.state().gpr[14], 0);
}
