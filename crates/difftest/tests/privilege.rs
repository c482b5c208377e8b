//! Ways between privilege levels and code sizes: SYSCALL, SYSENTER, IRET, SWAPGS, gates, compatibility mode.

use arch::msr;
use arch::registers::{pte, rflags};
use difftest::bare::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use translator::host_is_amd;

const USER: u64 = 0x40_0000;
const USER_STACK: u64 = 0x50_1000;
const HANDLER: u64 = CODE + 0x1000;

/// A guest with 64-bit or 32-bit user code and kernel code at [`HANDLER`].
fn guest(
    bits: u32,
    user: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    kernel: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Bare {
    let mut bare = Bare::new(8 << 20);
    let code = bare.page();
    bare.map(USER, code, pte::P | pte::U);
    bare.assemble(code, USER, bits, user);
    let stack = bare.page();
    bare.map(USER_STACK - 4096, stack, pte::P | pte::U | pte::W | pte::NX);
    bare.kernel_code(HANDLER, kernel);
    bare
}

/// Runs from user code with MSRs set.
fn run(bare: Bare, bits: u32, msrs: &[(u32, u64)]) -> Machine {
    let mut state = bare.user_state(USER, USER_STACK, bits);
    state.msrs.extend(msrs);
    let mut machine = Machine::with_state(bare, &state);
    assert_eq!(machine.run(), End::Exit);
    machine
}

const STAR: u64 = (KERNEL_CODE as u64) << 32 | (USER_CODE32 as u64) << 48;

#[test]
fn syscall_saves_rip_and_rflags_and_masks() {
    let bare = guest(
        64,
        |a| {
            a.stc()?;
            a.syscall()
        },
        |a| {
            a.mov(rbx, rsp)?;
            a.mov(rsp, DIRECT + STACK_TOP)?;
            a.ud2()
        },
    );
    let m = run(bare, 64, &[(msr::STAR, STAR), (msr::LSTAR, DIRECT + HANDLER), (msr::SFMASK, rflags::IF | rflags::CF)]);
    let (state, frame) = (m.state(), m.frame());
    assert_eq!((frame.vector, frame.rip, frame.cs), (6, DIRECT + HANDLER + 13, KERNEL_CODE.into()));
    assert_eq!(frame.rflags & (rflags::IF | rflags::CF), 0);
    assert_eq!(state.gpr[1], USER + 3);
    assert_eq!(state.gpr[11] & (rflags::IF | rflags::CF), rflags::IF | rflags::CF);
    assert_eq!(state.gpr[3], USER_STACK, "the stack pointer stays");
}

#[test]
fn sysret_returns_to_64_bit_and_32_bit_code() {
    let bare = guest(
        64,
        |a| {
            a.syscall()?;
            a.mov(ebx, 5)?;
            a.int3()
        },
        |a| {
            a.mov(r11d, 0x202)?;
            a.sysretq()
        },
    );
    let m = run(bare, 64, &[(msr::STAR, STAR), (msr::LSTAR, DIRECT + HANDLER)]);
    let frame = m.frame();
    assert_eq!((frame.vector, frame.rip, frame.cs, frame.ss), (3, USER + 8, USER_CODE.into(), USER_DATA.into()));
    // 32-bit: `mov ebx, 5; int3` is the same bytes.
    let bare = guest(
        64,
        |a| {
            a.syscall()?;
            a.mov(ebx, 5)?;
            a.int3()
        },
        |a| {
            a.mov(r11d, 0x202)?;
            a.sysret()
        },
    );
    let m = run(bare, 64, &[(msr::STAR, STAR), (msr::LSTAR, DIRECT + HANDLER)]);
    assert_eq!((m.frame().vector, m.frame().cs, m.state().gpr[3]), (3, USER_CODE32.into(), 5));
}

#[test]
fn sysret_to_an_address_that_is_not_canonical_faults_in_the_kernel_or_on_amd_after_it() {
    let bare = guest(
        64,
        |a| a.syscall(),
        |a| {
            a.mov(rsp, DIRECT + STACK_TOP)?;
            a.mov(rcx, 1u64 << 47)?;
            a.sysretq()
        },
    );
    let m = run(bare, 64, &[(msr::STAR, STAR), (msr::LSTAR, DIRECT + HANDLER)]);
    let frame = m.frame();
    assert_eq!((frame.vector, frame.error), (13, 0));
    assert_eq!(frame.cs, if host_is_amd() { ((STAR >> 48) + 16) | 3 } else { KERNEL_CODE.into() });
    assert_eq!(frame.rip == 1 << 47, host_is_amd(), "{:#x}", frame.rip);
}

#[test]
fn syscall_is_undefined_without_sce() {
    let bare = guest(64, |a| a.syscall(), |a| a.ud2());
    let m = run(bare, 64, &[(msr::EFER, 0xd00), (msr::STAR, STAR), (msr::LSTAR, DIRECT + HANDLER)]);
    assert_eq!((m.frame().vector, m.frame().rip), (6, USER));
}

#[test]
fn syscall_in_compatibility_mode_is_undefined_on_intel_and_has_an_entry_of_its_own_on_amd() {
    let bare = guest(
        32,
        |a| a.syscall(),
        |a| {
            a.mov(rsp, DIRECT + STACK_TOP)?;
            a.int3()
        },
    );
    let m = run(bare, 32, &[(msr::STAR, STAR), (msr::LSTAR, DIRECT), (msr::CSTAR, DIRECT + HANDLER)]);
    let (frame, back) = (m.frame(), m.state().gpr[1]);
    match host_is_amd() {
        true => assert_eq!((frame.vector, frame.cs, back), (3, KERNEL_CODE.into(), USER + 2)),
        false => assert_eq!((frame.vector, frame.rip), (6, USER)),
    }
}

#[test]
fn sysenter_and_sysexit_exchange_32_bit_code_and_the_kernel_except_on_amd() {
    let bare = guest(
        32,
        |a| {
            a.sysenter()?;
            a.int3()
        },
        |a| {
            a.mov(ebx, 7)?;
            a.mov(rdx, USER + 2)?;
            a.mov(rcx, USER_STACK - 16)?;
            a.sysexit()
        },
    );
    let msrs = [
        (msr::SYSENTER_CS, KERNEL_CODE.into()),
        (msr::SYSENTER_EIP, DIRECT + HANDLER),
        (msr::SYSENTER_ESP, DIRECT + STACK_TOP),
    ];
    let m = run(bare, 32, &msrs);
    let frame = m.frame();
    if host_is_amd() {
        // There is no SYSENTER in long mode (AMD APM 3, SYSENTER).
        assert_eq!((frame.vector, frame.rip), (6, USER));
        return;
    }
    // SYSEXIT takes its selectors from SYSENTER_CS: +16 and +24 for 32-bit code.
    assert_eq!((frame.vector, frame.rip, frame.rsp), (3, USER + 3, USER_STACK - 16));
    assert_eq!((frame.cs, frame.ss), ((u64::from(KERNEL_CODE) + 16) | 3, (u64::from(KERNEL_CODE) + 24) | 3));
    assert_eq!(m.state().gpr[3], 7);
}

#[test]
fn swapgs_exchanges_the_bases() {
    let bare = guest(
        64,
        |a| a.syscall(),
        |a| {
            a.swapgs()?;
            a.rdgsbase(rax)?;
            a.swapgs()?;
            a.rdgsbase(rbx)?;
            a.mov(rsp, DIRECT + STACK_TOP)?;
            a.ud2()
        },
    );
    let msrs = [(msr::STAR, STAR), (msr::LSTAR, DIRECT + HANDLER), (msr::KERNEL_GS_BASE, 0xffff_8888_0000_0000)];
    let mut state = bare.user_state(USER, USER_STACK, 64);
    state.msrs.extend(msrs);
    state.segments[5].base = 0x1234_5000;
    let mut m = Machine::with_state(bare, &state);
    assert_eq!(m.run(), End::Exit);
    assert_eq!((m.state().gpr[0], m.state().gpr[3]), (0xffff_8888_0000_0000, 0x1234_5000));
}

/// A kernel that goes to user code by IRETQ with the given CS, SS and RFLAGS.
fn iretq(cs_selector: u16, ss_selector: u16, flags: u64) -> Machine {
    let bits = if cs_selector == USER_CODE32 { 32 } else { 64 };
    let bare = guest(
        bits,
        |a| a.int3(),
        |a| {
            a.push(u32::from(ss_selector) as i32)?;
            a.mov(rax, USER_STACK - 24)?;
            a.push(rax)?;
            a.push(flags as i32)?;
            a.push(u32::from(cs_selector) as i32)?;
            a.mov(rax, USER)?;
            a.push(rax)?;
            a.iretq()
        },
    );
    let state = bare.kernel_state(DIRECT + HANDLER);
    let mut m = Machine::with_state(bare, &state);
    assert_eq!(m.run(), End::Exit);
    m
}

#[test]
fn iretq_enters_64_bit_and_compatibility_mode_code() {
    for selector in [USER_CODE, USER_CODE32] {
        let m = iretq(selector, USER_DATA, 0x202);
        let frame = m.frame();
        assert_eq!((frame.vector, frame.rip, frame.cs, frame.ss), (3, USER + 1, selector.into(), USER_DATA.into()));
        assert_eq!(frame.rsp, USER_STACK - 24);
    }
}

#[test]
fn iretq_refuses_selectors_that_do_not_fit() {
    let m = iretq(USER_CODE, KERNEL_DATA, 0x202);
    assert_eq!((m.frame().vector, m.frame().error), (13, KERNEL_DATA.into()));
    let m = iretq(USER_DATA, USER_DATA, 0x202);
    assert_eq!((m.frame().vector, m.frame().error), (13, 0x28));
}

#[test]
fn user_code_can_not_change_if_or_iopl() {
    let bare = guest(
        64,
        |a| {
            a.push(0x3002)?;
            a.popfq()?;
            a.int3()
        },
        |a| a.ud2(),
    );
    let m = run(bare, 64, &[]);
    assert_eq!(m.frame().vector, 3);
    assert_eq!(m.frame().rflags & (rflags::IF | rflags::IOPL), rflags::IF);
}

#[test]
fn umip_hides_descriptor_tables_from_user_code() {
    let bare = guest(64, |a| a.sgdt(ptr(rsp - 16)), |a| a.ud2());
    let m = run(bare, 64, &[]);
    assert_eq!((m.frame().vector, m.frame().error), (13, 0));
}

#[test]
fn a_far_call_goes_between_64_bit_and_compatibility_mode() {
    // User code calls a 32-bit function by a far pointer in memory, which returns by RETF.
    let bare = guest(
        64,
        |a| {
            a.mov(rax, u64::from(USER_CODE32) << 32 | (USER + 0x100))?;
            a.mov(qword_ptr(rsp - 16), rax)?;
            a.call(fword_ptr(rsp - 16))?;
            a.int3()
        },
        |a| a.ud2(),
    );
    let mut bare = bare;
    let at = bare.entry(USER, 0);
    let page = bare.read_u64(at) & 0x000f_ffff_ffff_f000;
    bare.assemble(page + 0x100, USER + 0x100, 32, |a| {
        a.mov(ebx, 0x77)?;
        a.dec(ebx)?; // one byte in 32-bit code, a REX prefix in 64-bit code
        a.retf()
    });
    let m = run(bare, 64, &[]);
    assert_eq!((m.frame().vector, m.frame().cs, m.state().gpr[3]), (3, USER_CODE.into(), 0x76));
    assert_eq!(m.frame().rsp, USER_STACK);
}

#[test]
fn the_kernels_stack_holds_what_was_pushed_flags_and_memory_operands_among_it() {
    let bare = guest(
        64,
        |a| a.syscall(),
        |a| {
            a.mov(rsp, DIRECT + STACK_TOP)?;
            a.mov(r14, 0x1111_2222_3333_4444u64)?;
            a.mov(ebx, 0x5555)?;
            a.push(0x33)?;
            a.stc()?;
            a.pushfq()?;
            a.push(r14)?;
            a.push(qword_ptr(rsp + 16))?;
            a.push(rbx)?;
            a.mov(rax, qword_ptr(rsp + 8))?;
            a.pop(rdx)?;
            a.pop(rsi)?;
            a.pop(r11)?;
            a.clc()?;
            a.popfq()?;
            a.push(rbx)?;
            a.pop(r8)?;
            a.setc(dil)?;
            a.pop(r9)?;
            a.ud2()
        },
    );
    let m = run(bare, 64, &[(msr::STAR, STAR), (msr::LSTAR, DIRECT + HANDLER)]);
    let (frame, gpr) = (m.frame(), m.state().gpr);
    assert_eq!((frame.vector, frame.rsp), (6, DIRECT + STACK_TOP));
    assert_eq!((gpr[0], gpr[2], gpr[6], gpr[11]), (0x33, 0x5555, 0x33, 0x1111_2222_3333_4444));
    assert_eq!((gpr[8], gpr[9], gpr[7] & 0xff), (0x5555, 0x33, 1));
}
