//! Exceptions: their vectors, error codes, saved state, stacks, and what comes of exceptions while exceptions are delivered.

use arch::msr;
use arch::registers::{cr0, cr4, pte, rflags};
use difftest::bare::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const USER: u64 = 0x40_0000;
const USER_STACK: u64 = 0x50_1000;

type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// A guest with one page of user code and one of user stack.
fn bare_with_user() -> Bare {
    let mut bare = Bare::new(4 << 20);
    for (va, bits) in [(USER, pte::P | pte::U | pte::W), (USER_STACK - 4096, pte::P | pte::U | pte::W | pte::NX)] {
        let page = bare.page();
        bare.map(va, page, bits);
    }
    bare
}

/// Runs kernel code until an exception stops it.
fn kernel_exception(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> (Frame, Machine) {
    let bare = Bare::new(4 << 20);
    let rip = bare.kernel_code(CODE, write);
    let state = bare.kernel_state(rip);
    let mut machine = Machine::with_state(bare, &state);
    assert_eq!(machine.run(), End::Exit);
    (machine.frame(), machine)
}

/// Runs user code until an exception stops it.
fn user_exception(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> (Frame, Machine) {
    let mut bare = bare_with_user();
    let code = bare.entry(USER, 0);
    let page = bare.read_u64(code) & 0x000f_ffff_ffff_f000;
    bare.assemble(page, USER, 64, write);
    let state = bare.user_state(USER, USER_STACK, 64);
    let mut machine = Machine::with_state(bare, &state);
    assert_eq!(machine.run(), End::Exit);
    (machine.frame(), machine)
}

const K: u64 = DIRECT + CODE;

#[test]
fn faults_save_the_rip_of_their_instruction_and_traps_that_of_the_next() {
    let (frame, _) = kernel_exception(|a| {
        a.xor(ecx, ecx)?;
        a.div(ecx)
    });
    assert_eq!((frame.vector, frame.rip), (0, K + 2));
    let (frame, _) = kernel_exception(|a| a.int3());
    assert_eq!((frame.vector, frame.rip), (3, K + 1));
    let (frame, _) = kernel_exception(|a| a.ud2());
    assert_eq!((frame.vector, frame.rip), (6, K));
    assert_ne!(frame.rflags & rflags::RF, 0, "a fault's saved RFLAGS has RF");
    let (frame, _) = kernel_exception(|a| a.int(0x55));
    assert_eq!((frame.vector, frame.rip, frame.rflags & rflags::RF), (0x55, K + 2, 0));
}

#[test]
fn an_exception_at_the_same_level_aligns_the_stack_and_keeps_it() {
    let (_, machine) = kernel_exception(|a| {
        a.sub(rsp, 3)?;
        a.ud2()
    });
    let frame = machine.frame();
    assert_eq!((frame.vector, frame.rsp, frame.ss), (6, DIRECT + STACK_TOP - 3, KERNEL_DATA.into()));
    assert_eq!(frame.at, DIRECT + STACK_TOP - 16);
    assert_eq!(frame.cs, u64::from(KERNEL_CODE));
}

#[test]
fn an_exception_from_user_code_switches_to_rsp0_with_a_null_stack_segment() {
    let (frame, machine) = user_exception(|a| a.ud2());
    assert_eq!((frame.vector, frame.rip, frame.rsp, frame.at), (6, USER, USER_STACK, DIRECT + STACK_TOP));
    assert_eq!((frame.cs, frame.ss), (USER_CODE.into(), USER_DATA.into()));
    let state = machine.state();
    assert_eq!((state.segments[1].selector, state.segments[2].selector), (KERNEL_CODE, 0));
    assert_eq!(state.rflags & (rflags::IF | rflags::TF), 0, "an interrupt gate clears IF");
}

#[test]
fn general_protection_names_the_selector() {
    for (selector, error) in [(0x50u32, 0x50u64), (0x103, 0x100), (0x0c, 0x0c)] {
        let (frame, _) = kernel_exception(|a| {
            a.mov(eax, selector)?;
            a.mov(ds, eax)
        });
        // Within the table but not a data segment, beyond it, or in the absent local table.
        assert_eq!((frame.vector, frame.error), (13, error), "selector {selector:#x}");
    }
}

#[test]
fn a_segment_that_is_not_present_is_not_loaded() {
    let bare = Bare::new(4 << 20);
    bare.write_u64(GDT + 0x60, 0x00cf_1300_0000_ffff); // data, not present
    let rip = bare.kernel_code(CODE, |a| {
        a.mov(eax, 0x60)?;
        a.mov(es, eax)
    });
    let state = bare.kernel_state(rip);
    let mut machine = Machine::with_state(bare, &state);
    assert_eq!(machine.run(), End::Exit);
    assert_eq!((machine.frame().vector, machine.frame().error), (11, 0x60));
    assert_eq!(machine.state().segments[0].selector, 0);
}

#[test]
fn control_registers_refuse_what_is_reserved() {
    let refused: &[(&str, Code)] = &[
        ("paging without protection", |a| {
            a.mov(rax, cr0)?;
            a.and(eax, !1)?;
            a.mov(cr0, rax)
        }),
        ("NW without CD", |a| {
            a.mov(rax, cr0)?;
            a.or(eax, 1 << 29)?;
            a.mov(cr0, rax)
        }),
        ("a reserved bit of CR0's upper half", |a| {
            a.mov(rax, cr0)?;
            a.bts(rax, 40)?;
            a.mov(cr0, rax)
        }),
        ("a reserved bit of CR4", |a| {
            a.mov(rax, cr4)?;
            a.bts(rax, 31)?;
            a.mov(cr4, rax)
        }),
        ("PAE off in long mode", |a| {
            a.mov(rax, cr4)?;
            a.btr(rax, 5)?;
            a.mov(cr4, rax)
        }),
        ("CR8 beyond 15", |a| {
            a.mov(eax, 16)?;
            a.mov(cr8, rax)
        }),
        ("an MSR that isn't there", |a| {
            a.mov(ecx, 0x1234_5678)?;
            a.rdmsr()
        }),
        ("a base that isn't canonical", |a| {
            a.mov(ecx, msr::GS_BASE)?;
            a.mov(edx, 0x8000_0000u32)?;
            a.xor(eax, eax)?;
            a.wrmsr()
        }),
        ("a reserved bit of EFER", |a| {
            a.mov(ecx, msr::EFER)?;
            a.rdmsr()?;
            a.bts(eax, 1)?;
            a.wrmsr()
        }),
        ("XCR0 without x87", |a| {
            a.xor(ecx, ecx)?;
            a.xor(edx, edx)?;
            a.mov(eax, 2)?;
            a.xsetbv()
        }),
        ("XCR0 with AVX but not SSE", |a| {
            a.xor(ecx, ecx)?;
            a.xor(edx, edx)?;
            a.mov(eax, 5)?;
            a.xsetbv()
        }),
    ];
    for (name, code) in refused {
        let (frame, _) = kernel_exception(|a| {
            code(a)?;
            a.ud2()
        });
        assert_eq!((frame.vector, frame.error), (13, 0), "{name}");
    }
}

#[test]
fn int_n_from_user_code_needs_a_gate_of_its_level() {
    let (frame, _) = user_exception(|a| a.int(0x55));
    assert_eq!((frame.vector, frame.error, frame.rip), (13, 0x55 * 8 + 2, USER));
    let mut bare = bare_with_user();
    let at = bare.entry(USER, 0);
    let page = bare.read_u64(at) & 0x000f_ffff_ffff_f000;
    bare.assemble(page, USER, 64, |a| a.int(0x55));
    bare.gate(0x55, DIRECT + STUBS + 0x55 * 16, Gate { dpl: 3, ..Gate::default() });
    let state = bare.user_state(USER, USER_STACK, 64);
    let mut machine = Machine::with_state(bare, &state);
    assert_eq!(machine.run(), End::Exit);
    assert_eq!((machine.frame().vector, machine.frame().rip), (0x55, USER + 2));
}

#[test]
fn x87_and_sse_raise_nm_while_ts_is_set() {
    for sse in [false, true] {
        let (frame, machine) = kernel_exception(|a| {
            a.mov(rax, cr0)?;
            a.or(eax, 8)?;
            a.mov(cr0, rax)?;
            if sse {
                a.xorps(xmm0, xmm0)?
            } else {
                a.fldz()?
            }
            a.ud2()
        });
        assert_eq!(frame.vector, 7);
        assert_ne!(machine.state().cr0 & cr0::TS, 0);
    }
}

#[test]
fn clts_lets_them_run_again() {
    let (frame, _) = kernel_exception(|a| {
        a.mov(rax, cr0)?;
        a.or(eax, 8)?;
        a.mov(cr0, rax)?;
        a.clts()?;
        a.fldz()?;
        a.xorps(xmm0, xmm0)?;
        a.int3()
    });
    assert_eq!(frame.vector, 3);
}

#[test]
fn avx_is_undefined_without_osxsave_or_its_bit_in_xcr0() {
    let (frame, machine) = kernel_exception(|a| {
        a.mov(rax, cr4)?;
        a.btr(rax, 18)?;
        a.mov(cr4, rax)?;
        a.vxorps(ymm0, ymm0, ymm0)
    });
    assert_eq!(frame.vector, 6);
    assert_eq!(machine.state().cr4 & cr4::OSXSAVE, 0);
    let (frame, _) = kernel_exception(|a| {
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.mov(eax, 3)?;
        a.xsetbv()?;
        a.vxorps(ymm0, ymm0, ymm0)
    });
    assert_eq!(frame.vector, 6);
}

#[test]
fn a_gate_with_an_ist_entry_switches_stacks_even_at_the_same_level() {
    let mut bare = Bare::new(4 << 20);
    bare.gate(6, DIRECT + STUBS + 6 * 16, Gate { ist: 1, ..Gate::default() });
    let rip = bare.kernel_code(CODE, |a| a.ud2());
    let state = bare.kernel_state(rip);
    let mut machine = Machine::with_state(bare, &state);
    assert_eq!(machine.run(), End::Exit);
    let frame = machine.frame();
    assert_eq!((frame.vector, frame.rsp, frame.ss), (6, DIRECT + STACK_TOP, KERNEL_DATA.into()));
    assert_eq!(frame.at, DIRECT + IST1_TOP);
}

#[test]
fn a_push_to_an_address_that_is_not_canonical_is_a_stack_fault() {
    let mut bare = Bare::new(4 << 20);
    bare.gate(12, DIRECT + STUBS + 12 * 16, Gate { ist: 1, ..Gate::default() });
    let rip = bare.kernel_code(CODE, |a| {
        a.mov(rsp, 0x8000_0000_0000_0000u64)?;
        a.push(rax)
    });
    let state = bare.kernel_state(rip);
    let mut machine = Machine::with_state(bare, &state);
    assert_eq!(machine.run(), End::Exit);
    let frame = machine.frame();
    assert_eq!((frame.vector, frame.error, frame.rip, frame.rsp), (12, 0, K + 10, 1 << 63));
}

/// Runs `code` with the gates of `absent` vectors not present.
fn with_absent_gates(absent: &[u8], write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> (End, Machine) {
    let mut bare = Bare::new(4 << 20);
    for &vector in absent {
        bare.gate(vector, 0, Gate { present: false, ..Gate::default() });
    }
    let rip = bare.kernel_code(CODE, write);
    let state = bare.kernel_state(rip);
    let mut machine = Machine::with_state(bare, &state);
    (machine.run(), machine)
}

#[test]
fn a_benign_exception_that_can_not_be_delivered_becomes_the_second_one() {
    let (end, machine) = with_absent_gates(&[6], |a| a.ud2());
    assert_eq!(end, End::Exit);
    // The gate's vector, IDT bit, EXT bit: an exception, not INT n, was on its way.
    assert_eq!((machine.frame().vector, machine.frame().error), (11, 6 * 8 + 3));
    let (end, machine) = with_absent_gates(&[0x55], |a| a.int(0x55));
    assert_eq!(end, End::Exit);
    assert_eq!((machine.frame().vector, machine.frame().error, machine.frame().rip), (11, 0x55 * 8 + 2, K));
}

#[test]
fn two_contributory_exceptions_make_a_double_fault() {
    for write in [
        (|a: &mut CodeAssembler| {
            a.xor(ecx, ecx)?;
            a.div(ecx)
        }) as fn(&mut CodeAssembler) -> Result<(), IcedError>,
        |a| {
            a.mov(rax, 1u64 << 63)?;
            a.mov(rax, qword_ptr(rax))
        },
        |a| {
            a.xor(eax, eax)?;
            a.mov(rax, qword_ptr(rax))
        },
    ] {
        let (end, machine) = with_absent_gates(&[0, 13, 14], write);
        assert_eq!(end, End::Exit);
        assert_eq!((machine.frame().vector, machine.frame().error), (8, 0));
    }
}

#[test]
fn a_double_fault_that_can_not_be_delivered_resets_the_machine() {
    let (end, _) = with_absent_gates(&[0, 8, 11], |a| {
        a.xor(ecx, ecx)?;
        a.div(ecx)
    });
    assert_eq!(end, End::TripleFault);
    let (end, _) = with_absent_gates(&[], |a| {
        a.sub(rsp, 16)?;
        a.mov(word_ptr(rsp), 0)?;
        a.lidt(ptr(rsp))?;
        a.int3()
    });
    assert_eq!(end, End::TripleFault);
}

#[test]
fn a_page_fault_during_delivery_of_a_page_fault_keeps_the_second_address() {
    let mut bare = Bare::new(4 << 20);
    // The handler's stack is not mapped: the push faults, at an address of its own.
    bare.write_u64(TSS + 36, 0x7000_0000_1000);
    bare.write_u64(TSS + 44, DIRECT + IST1_TOP); // IST 2, for the double fault
    bare.gate(14, DIRECT + STUBS + 14 * 16, Gate { ist: 1, ..Gate::default() });
    bare.gate(8, DIRECT + STUBS + 8 * 16, Gate { ist: 2, ..Gate::default() });
    let rip = bare.kernel_code(CODE, |a| {
        a.mov(eax, 0x1234)?;
        a.mov(al, byte_ptr(rax))
    });
    let state = bare.kernel_state(rip);
    let mut machine = Machine::with_state(bare, &state);
    assert_eq!(machine.run(), End::Exit);
    assert_eq!(machine.frame().vector, 8);
    let address = machine.state().cr2;
    assert!((0x7000_0000_0fd0..0x7000_0000_1000).contains(&address), "CR2 is {address:#x}");
}

#[test]
fn protection_keys_are_read_where_cr4_has_them_and_ecx_is_0() {
    let (frame, _) = kernel_exception(|a| {
        a.xor(ecx, ecx)?;
        a.rdpkru()
    });
    assert_eq!(frame.vector, 6);
    let (frame, machine) = kernel_exception(|a| {
        a.mov(eax, 7)?;
        a.xor(ecx, ecx)?;
        a.cpuid()?;
        a.mov(r8d, ecx)?;
        a.xor(ebx, ebx)?;
        a.mov(rax, cr4)?;
        a.bts(rax, 22)?;
        a.mov(cr4, rax)?;
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.mov(eax, 0x5554)?;
        a.wrpkru()?;
        a.mov(rax, -1i64)?;
        a.mov(rdx, -1i64)?;
        a.stc()?;
        a.rdpkru()?;
        a.adc(rbx, 6)?;
        a.mov(rsi, rax)?;
        a.mov(rdi, rdx)?;
        a.mov(ecx, 1)?;
        a.rdpkru()
    });
    let gpr = machine.state().gpr;
    // PKU (Intel SDM 2A, CPUID): where there are no such keys, CR4 can't have them.
    let expected = if gpr[8] & 1 << 3 != 0 { (7, 0x5554, 0) } else { (0, 0, 0) };
    assert_eq!((frame.vector, frame.error), (13, 0));
    assert_eq!((gpr[3], gpr[6], gpr[7]), expected);
}
