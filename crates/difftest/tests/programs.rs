//! Programs that run directly: their exceptions, system calls, registers and flags are those of the guest's processor, and what
//! instructions tell is about the guest's machine.

use arch::msr;
use arch::registers::{cr4, debug, pte, rflags};
use difftest::bare::*;
use difftest::program::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const PAGE: u64 = 0x70_0000;
const FIXED: u64 = rflags::FIXED | rflags::IF;
const NON_CANONICAL: u64 = 0x8000_0000_0000_0000;
/// GPRs before an exception, but for those that its code needs: RAX, RCX, RDX, RSP, R14 and R15.
const KEPT: [(AsmRegister64, usize); 10] =
    [(rbx, 3), (rbp, 5), (rsi, 6), (rdi, 7), (r8, 8), (r9, 9), (r10, 10), (r11, 11), (r12, 12), (r13, 13)];
const UNKEPT_R14: u64 = 0x1111_2222_3333_4444;

/// An exception: its name, how PAGE is mapped, the code, and vector and error code.
struct Case(&'static str, u64, fn(&mut CodeAssembler) -> Result<(), IcedError>, u64, u64);

fn value(register: usize) -> u64 {
    UNKEPT_R14.rotate_left(register as u32 * 5)
}

/// Runs `case` after all registers got values; R15 and R14 say where its instruction begins and ends.
fn exception(case: &Case, prepare: Code) -> (Machine, Frame) {
    let mut program = Program::new(&|a| {
        let (mut begin, mut end) = (a.create_label(), a.create_label());
        prepare(a)?;
        for (register, number) in KEPT {
            a.mov(register, value(number))?;
        }
        a.lea(r15, qword_ptr(begin))?;
        a.lea(r14, qword_ptr(end))?;
        a.mov(rdx, PAGE)?;
        a.xor(ecx, ecx)?;
        a.stc()?;
        a.set_label(&mut begin)?;
        case.2(a)?;
        a.set_label(&mut end)?;
        a.nop()?;
        a.ud2()
    });
    let page = program.bare.page();
    program.bare.write(page, &[0xc3]);
    program.bare.map(PAGE, page, case.1);
    program.bare.gate(0x60, DIRECT + STUBS + 0x600, Gate { dpl: 3, ..Gate::default() });
    let machine = program.run(1);
    let (frame, state) = (machine.frame(), machine.state());
    let name = case.0;
    assert_eq!((frame.vector, frame.error), (case.3, case.4), "{name}: {frame:x?}");
    assert_eq!((frame.cs, frame.ss, frame.rsp), (USER_CODE.into(), USER_DATA.into(), USER_STACK), "{name}");
    assert_eq!(frame.rflags & rflags::CF, rflags::CF, "{name}");
    for (_, number) in KEPT {
        assert_eq!(state.gpr[number], value(number), "{name}: register {number}");
    }
    (machine, frame)
}

const U: u64 = pte::P | pte::U;
const W: u64 = pte::W;

#[test]
fn faults_of_programs_say_what_and_where_they_were() {
    let read = |a: &mut CodeAssembler| a.mov(eax, dword_ptr(rdx));
    let write = |a: &mut CodeAssembler| a.mov(dword_ptr(rdx), eax);
    let cases = [
        Case("a read of nothing", 0, read, 14, 4),
        Case("a write to nothing", 0, write, 14, 6),
        Case("a read of the kernel's", pte::P | W, read, 14, 5),
        Case("a write to the kernel's", pte::P | W, write, 14, 7),
        Case("a write to what can be read", U, write, 14, 7),
        Case("a reserved bit", U | 1 << 51, read, 14, 0xd),
        Case("a write where a reserved bit is", U | W | 1 << 51, write, 14, 0xf),
        Case("an atomic update of what can be read", U, |a| a.lock().inc(dword_ptr(rdx)), 14, 7),
        Case("a store behind the end of a page", U, |a| a.mov(qword_ptr(rdx - 4), rcx), 14, 6),
        Case("UD2", U, |a| a.ud2(), 6, 0),
        Case("a division by zero", U, |a| a.div(ecx), 0, 0),
        Case("HLT", U, |a| a.hlt(), 13, 0),
        Case("CLI", U, |a| a.cli(), 13, 0),
        Case("IN", U, |a| a.in_(al, dx), 13, 0),
        Case("MOV from CR3", U, |a| a.mov(rax, cr3), 13, 0),
        Case("RDMSR", U, |a| a.rdmsr(), 13, 0),
        Case("WBINVD", U, |a| a.wbinvd(), 13, 0),
        Case("LGDT", U, |a| a.lgdt(ptr(rdx)), 13, 0),
        Case("RDPMC", U, |a| a.rdpmc(), 13, 0),
        Case("SGDT under UMIP", U | W, |a| a.sgdt(ptr(rdx)), 13, 0),
        Case("SMSW under UMIP", U | W, |a| a.smsw(eax), 13, 0),
        Case("a gate of the kernel's", U, |a| a.int(0x55), 13, 0x55 * 8 + 2),
        Case("the host's gate of system calls", U, |a| a.int(0x80), 13, 0x80 * 8 + 2),
    ];
    for case in &cases {
        let (machine, frame) = exception(case, &|_| Ok(()));
        let state = machine.state();
        assert_eq!(frame.rip, state.gpr[15], "{}", case.0);
        if case.3 == 14 {
            assert_eq!(state.cr2 & !0xfff, if case.0.contains("behind") { PAGE - 4096 } else { PAGE }, "{}", case.0);
        }
    }
}

#[test]
fn jumps_to_where_no_code_is_fault_there() {
    for (bits, error) in [(0, 0x14), (pte::P, 0x15), (U | pte::NX, 0x15), (U | 1 << 51, 0x1d)] {
        let (machine, frame) = exception(&Case("a jump", bits, |a| a.jmp(rdx), 14, error), &|_| Ok(()));
        assert_eq!((frame.rip, machine.state().cr2), (PAGE, PAGE), "{bits:x}");
    }
}

#[test]
fn addresses_that_are_not_canonical_are_general_protection_or_stack_faults() {
    let prepare: Code = &|a| a.mov(rax, NON_CANONICAL);
    for case in [
        Case("a load", U, |a| a.mov(eax, dword_ptr(rax)), 13, 0),
        Case("a store by RBP", U, |a| a.mov(dword_ptr(rbp + rax), ecx), 12, 0),
    ] {
        let (machine, frame) = exception(&case, prepare);
        assert_eq!(frame.rip, machine.state().gpr[15], "{}", case.0);
    }
}

#[test]
fn traps_of_programs_say_what_is_behind_their_instruction() {
    let cases = [
        Case("INT3", U, |a| a.int3(), 3, 0),
        Case("INT 3", U, |a| a.db(&[0xcd, 3]), 3, 0),
        Case("INT1", U, |a| a.db(&[0xf1]), 1, 0),
        Case("INT 4", U, |a| a.int(4), 4, 0),
        Case("a gate for programs", U, |a| a.int(0x60), 0x60, 0),
    ];
    for case in &cases {
        let (machine, frame) = exception(case, &|_| Ok(()));
        assert_eq!(frame.rip, machine.state().gpr[14], "{}", case.0);
        assert_eq!(frame.rflags & rflags::RF, 0, "{}", case.0);
        assert_eq!(machine.state().dr[4] & debug::DR6_BS, 0, "{}", case.0);
    }
}

#[test]
fn a_program_that_sets_tf_is_stepped() {
    let machine = Program::new(&|a| {
        a.xor(ebx, ebx)?;
        a.push(0x302)?;
        a.popfq()?;
        a.inc(ebx)?;
        a.inc(ebx)?;
        a.int3()
    })
    .run(1);
    let frame = machine.frame();
    assert_eq!((frame.vector, machine.state().gpr[3]), (1, 1));
    assert_eq!(machine.state().dr[4] & debug::DR6_BS, debug::DR6_BS);
    assert_eq!(frame.rflags & rflags::TF, rflags::TF);
}

#[test]
fn the_kernel_steps_a_program_through_ten_instructions() {
    const STEPS: u64 = DIRECT + SCRATCH;
    let mut program = Program::new(&|a| {
        a.xor(ebx, ebx)?;
        call(a, 0)?;
        for _ in 0..40 {
            a.inc(ebx)?;
        }
        a.int3()
    })
    .kernel(&[&|a| a.or(r9, 0x100)]);
    let handler = program.bare.kernel_code(CODE + 0x3000, |a| {
        let mut out = a.create_label();
        a.push(rax)?;
        a.mov(rax, STEPS)?;
        a.inc(qword_ptr(rax))?;
        a.cmp(qword_ptr(rax), 10)?;
        a.jb(out)?;
        a.and(dword_ptr(rsp + 24), !0x100)?;
        a.set_label(&mut out)?;
        a.pop(rax)?;
        a.iretq()
    });
    program.bare.gate(1, handler, Gate::default());
    let machine = program.run_to_end(2);
    assert_eq!((machine.bare.read_u64(SCRATCH), machine.state().gpr[3]), (10, 40));
    assert_eq!(machine.frame().rflags & rflags::TF, 0);
}

#[test]
fn alignment_is_checked_where_a_program_asks_for_it() {
    let (machine, frame) = exception(&Case("a misaligned load", U, |a| a.mov(eax, dword_ptr(rsp - 31)), 17, 0), &|a| {
        a.push(0x4_0202)?;
        a.popfq()
    });
    assert_eq!((frame.rip, frame.rflags & rflags::AC), (machine.state().gpr[15], rflags::AC));
}

#[test]
fn a_misaligned_access_is_none_where_the_kernel_does_not_mask_alignment_in() {
    let mut program = Program::new(&|a| {
        a.push(0x4_0202)?;
        a.popfq()?;
        a.mov(eax, dword_ptr(rsp - 31))?;
        a.int3()
    });
    program.state.cr0 &= !arch::registers::cr0::AM;
    program.run_to_end(1);
}

#[test]
fn floating_point_exceptions_are_raised_where_they_are_seen() {
    let x87 = Case("FWAIT", U, |a| a.wait(), 16, 0);
    let (machine, frame) = exception(&x87, &|a| {
        a.push(0x37b)?; // division by zero is unmasked
        a.fldcw(word_ptr(rsp))?;
        a.add(rsp, 8)?;
        a.fld1()?;
        a.fldz()?;
        a.fdivp(st1, st0)
    });
    assert_eq!(frame.rip, machine.state().gpr[15]);
    let sse = Case("DIVSS", U, |a| a.divss(xmm0, xmm1), 19, 0);
    let (machine, frame) = exception(&sse, &|a| {
        a.push(0x1d80)?;
        a.ldmxcsr(dword_ptr(rsp))?;
        a.add(rsp, 8)?;
        a.pcmpeqd(xmm0, xmm0)?;
        a.psrld(xmm0, 25)?;
        a.pslld(xmm0, 23)?; // 1.0
        a.pxor(xmm1, xmm1)
    });
    assert_eq!(frame.rip, machine.state().gpr[15]);
}

#[test]
fn system_calls_save_where_they_are_and_keep_all_else() {
    const FLAGS: i32 = (FIXED | rflags::CF | rflags::ZF | rflags::DF) as i32;
    let machine = Program::new(&|a| {
        let (mut again, mut behind, mut wrong) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(r14d, 200)?;
        a.set_label(&mut again)?;
        a.mov(rbx, UNKEPT_R14)?;
        a.lea(r12, qword_ptr(behind))?;
        a.push(FLAGS)?;
        a.popfq()?;
        a.mov(edi, 0)?;
        a.syscall()?;
        a.set_label(&mut behind)?;
        a.pushfq()?;
        a.pop(r13)?;
        a.cld()?;
        a.cmp(r13, FLAGS)?;
        a.jne(wrong)?;
        a.cmp(rcx, r12)?;
        a.jne(wrong)?;
        a.cmp(r11, r13)?;
        a.jne(wrong)?;
        a.mov(rax, UNKEPT_R14)?;
        a.cmp(rax, rbx)?;
        a.jne(wrong)?;
        a.dec(r14d)?;
        a.jnz(again)?;
        a.int3()?;
        a.set_label(&mut wrong)?;
        a.ud2()
    })
    .kernel(&[&|a| a.nop()])
    .run_to_end(200);
    assert_eq!(machine.state().gpr[14], 0);
}

#[test]
fn int_80h_keeps_all_of_rax() {
    let mut program = Program::new(&|a| {
        a.mov(rax, UNKEPT_R14)?;
        a.int(0x80)?;
        a.ud2()
    });
    program.bare.gate(0x80, DIRECT + STUBS + 0x800, Gate { dpl: 3, ..Gate::default() });
    let machine = program.run(1);
    assert_eq!((machine.frame().vector, machine.state().gpr[0]), (0x80, UNKEPT_R14));
}

/// All that POPF can set in user mode, across a system call and a page that is new.
#[test]
fn flags_that_popf_sets_stay_and_are_cleared_again() {
    let flags = [rflags::ID, rflags::AC, rflags::DF, rflags::NT, rflags::ID | rflags::NT, rflags::ARITHMETIC, 0];
    for (n, first) in flags.iter().enumerate() {
        let second = flags[(n + 1) % flags.len()];
        let program = Program::new(&|a| {
            a.mov(r12, DATA)?;
            for flags in [*first, second] {
                a.push((FIXED | flags) as i32)?;
                a.popfq()?;
                a.mov(r13, qword_ptr(r12))?;
                a.pushfq()?;
                a.pop(qword_ptr(r12 + 0x1000))?;
                a.mov(edi, 0)?;
                a.syscall()?;
                a.pushfq()?;
                a.pop(qword_ptr(r12 + 0x1008))?;
                a.lea(r12, qword_ptr(r12 + 0x2000))?;
            }
            a.push(FIXED as i32)?;
            a.popfq()?;
            call(a, 0)?;
            a.pushfq()?;
            a.pop(rbx)?;
            a.int3()
        })
        .kernel(&[&|a| a.nop()]);
        let data = program.data;
        let machine = program.run_to_end(3);
        for (flags, at) in [(*first, data + 0x1000), (second, data + 0x3000)] {
            assert_eq!(machine.bare.read_u64(at), FIXED | flags, "{flags:x} at once");
            assert_eq!(machine.bare.read_u64(at + 8), FIXED | flags, "{flags:x} behind a system call");
        }
        assert_eq!(machine.state().gpr[3], FIXED);
    }
}

#[test]
fn what_instructions_tell_is_about_the_guest() {
    const TSC: u64 = 1 << 50;
    const AUX: u32 = 0x1234;
    const NODE: u32 = 0x765;
    let leaves = [(0u32, 0u32), (1, 0), (7, 0), (0xb, 0), (0xd, 0), (0xd, 1), (0x4000_0000, 0), (0x8000_0000, 0)];
    let ask = |a: &mut CodeAssembler, at: u64| {
        a.mov(r10, at)?;
        for (leaf, part) in leaves {
            a.mov(eax, leaf)?;
            a.mov(ecx, part)?;
            a.cpuid()?;
            for register in [eax, ebx, ecx, edx] {
                a.mov(dword_ptr(r10), register)?;
                a.add(r10, 4)?;
            }
        }
        Ok(())
    };
    let mut program = Program::new(&|a| {
        call(a, 0)?;
        // On pages that may not run directly, after others that do.
        a.mov(rax, PAGE)?;
        a.jmp(rax)
    });
    let kernel_answers = program.bare.page();
    program.bare.write_u64(GDT + 0x78, 0x0040_f500_0000_0000 | u64::from(NODE));
    let page = program.bare.page();
    program.bare.map(PAGE, page, U);
    program.bare.assemble(page, PAGE, 64, |a| {
        ask(a, DATA)?;
        a.mov(r12, DATA + 0x800)?;
        a.rdtsc()?;
        a.mov(dword_ptr(r12), eax)?;
        a.mov(dword_ptr(r12 + 4), edx)?;
        a.rdtscp()?;
        a.mov(dword_ptr(r12 + 8), eax)?;
        a.mov(dword_ptr(r12 + 12), edx)?;
        a.mov(dword_ptr(r12 + 16), ecx)?;
        a.xor(ecx, ecx)?;
        a.xgetbv()?;
        a.mov(dword_ptr(r12 + 24), eax)?;
        a.mov(dword_ptr(r12 + 28), edx)?;
        a.mov(eax, 0x7b)?;
        a.lsl(eax, eax)?;
        a.mov(dword_ptr(r12 + 32), eax)?;
        a.sgdt(ptr(r12 + 40))?;
        a.sidt(ptr(r12 + 56))?;
        a.smsw(rax)?;
        a.mov(qword_ptr(r12 + 72), rax)?;
        a.str(eax)?;
        a.mov(dword_ptr(r12 + 80), eax)?;
        a.sldt(eax)?;
        a.mov(dword_ptr(r12 + 84), eax)?;
        a.int3()
    });
    program.state.cr4 &= !cr4::UMIP;
    program.state.msrs.push((msr::TSC_AUX, AUX.into()));
    let (control, xcr0) = (program.state.cr0, program.state.xcr0);
    let data = program.data;
    let machine = program
        .kernel(&[&|a| {
            a.mov(ecx, msr::TSC)?;
            a.xor(eax, eax)?;
            a.mov(edx, (TSC >> 32) as u32)?;
            a.wrmsr()?;
            ask(a, DIRECT + kernel_answers)
        }])
        .run_to_end(2);
    let word = |at: u64| machine.bare.read_u64(data + 0x800 + at);
    for (n, (leaf, part)) in leaves.iter().enumerate() {
        for half in 0..2 {
            let at = 16 * n as u64 + 8 * half;
            let (user, kernel) = (machine.bare.read_u64(data + at), machine.bare.read_u64(kernel_answers + at));
            assert_eq!(user, kernel, "CPUID {leaf:x}.{part}, half {half}");
        }
    }
    let (first, second) = (word(0), word(8));
    assert!(TSC <= first && first < second && second < TSC + (1 << 42), "{first:x} {second:x}");
    assert_eq!(word(16) as u32, AUX);
    assert_eq!(word(24), xcr0);
    assert_eq!(word(32) as u32, NODE);
    assert_eq!((word(40) as u16, word(42)), (0x7f, DIRECT + GDT));
    assert_eq!((word(56) as u16, word(58)), (0xfff, DIRECT + IDT));
    assert_eq!(word(72), control);
    assert_eq!(word(80), u64::from(TSS_SELECTOR));
}

/// More of them than a processor has breakpoints.
#[test]
fn what_instructions_of_many_pages_tell_is_about_the_guest() {
    const NODE: u32 = 0x765;
    const PAGES: u64 = 5;
    const ROUNDS: i32 = 40;
    let mut program = Program::new(&|a| {
        let mut again = a.create_label();
        call(a, 0)?;
        a.mov(r13d, ROUNDS)?;
        a.set_label(&mut again)?;
        for page in 0..PAGES {
            for _ in 0..3 {
                a.mov(r12, PAGE + 4096 * page)?;
                a.call(r12)?;
            }
        }
        a.dec(r13d)?;
        a.jnz(again)?;
        a.int3()
    });
    program.bare.write_u64(GDT + 0x78, 0x0040_f500_0000_0000 | u64::from(NODE));
    let xcr0 = program.state.xcr0;
    for page in 0..PAGES {
        let frame = program.bare.page();
        program.bare.map(PAGE + 4096 * page, frame, U);
        program.bare.assemble(frame, PAGE + 4096 * page, 64, |a| {
            let mut wrong = a.create_label();
            a.sub(rsp, 16)?;
            for _ in 0..64 {
                a.nop()?;
            }
            a.mov(eax, 0x7b)?;
            a.lsl(eax, eax)?;
            a.cmp(eax, NODE)?;
            a.jne(wrong)?;
            a.mov(eax, 0x4000_0000)?;
            a.cpuid()?;
            a.cmp(ebx, r15d)?;
            a.jne(wrong)?;
            a.xor(ecx, ecx)?;
            a.xgetbv()?;
            a.shl(rdx, 32)?;
            a.or(rax, rdx)?;
            a.mov(rcx, xcr0)?;
            a.cmp(rax, rcx)?;
            a.jne(wrong)?;
            a.sgdt(ptr(rsp))?;
            a.mov(rax, qword_ptr(rsp + 2))?;
            a.mov(rcx, DIRECT + GDT)?;
            a.cmp(rax, rcx)?;
            a.jne(wrong)?;
            a.add(rsp, 16)?;
            a.ret()?;
            a.set_label(&mut wrong)?;
            a.ud2()
        });
    }
    program.state.cr4 &= !cr4::UMIP;
    program
        .kernel(&[&|a| {
            a.mov(eax, 0x4000_0000)?;
            a.cpuid()?;
            a.mov(r15d, ebx)
        }])
        .run_to_end(100);
}

/// A page with more of such instructions than can be guarded, whose other code is called all the time.
#[test]
fn what_many_instructions_of_a_function_tell_is_about_the_guest() {
    const AUX: u32 = 0x1234;
    const OTHER: u64 = PAGE + 0x800;
    let mut program = Program::new(&|a| {
        let mut again = a.create_label();
        call(a, 0)?;
        a.xor(r14d, r14d)?;
        a.mov(r13d, 40)?;
        a.set_label(&mut again)?;
        for _ in 0..10 {
            a.mov(rax, OTHER)?;
            a.call(rax)?;
            call(a, 1)?;
        }
        a.mov(rax, PAGE)?;
        a.call(rax)?;
        a.dec(r13d)?;
        a.jnz(again)?;
        a.mov(r12, DATA)?;
        a.mov(qword_ptr(r12), r14)?;
        a.int3()
    });
    let frame = program.bare.page();
    program.bare.map(PAGE, frame, U);
    program.bare.assemble(frame, PAGE, 64, |a| {
        let mut wrong = a.create_label();
        for _ in 0..64 {
            a.nop()?;
        }
        for _ in 0..9 {
            a.mov(eax, 0x4000_0000)?;
            a.cpuid()?;
            a.cmp(ebx, r15d)?;
            a.jne(wrong)?;
            a.rdtscp()?;
            a.cmp(ecx, AUX)?;
            a.jne(wrong)?;
        }
        a.ret()?;
        a.set_label(&mut wrong)?;
        a.ud2()
    });
    program.bare.assemble(frame + (OTHER - PAGE), OTHER, 64, |a| {
        a.inc(r14)?;
        a.ret()
    });
    program.state.msrs.push((msr::TSC_AUX, AUX.into()));
    let data = program.data;
    let machine = program
        .kernel(&[
            &|a| {
                a.mov(eax, 0x4000_0000)?;
                a.cpuid()?;
                a.mov(r15d, ebx)
            },
            &|a| a.nop(),
        ])
        .run_to_end(400);
    assert_eq!(machine.bare.read_u64(data), 400);
}

#[test]
fn segment_bases_are_the_same_to_program_and_kernel() {
    let program = Program::new(&|a| {
        a.mov(r12, DATA)?;
        a.mov(rax, DATA + 0x1000)?;
        a.wrfsbase(rax)?;
        a.mov(rax, DATA + 0x2000)?;
        a.wrgsbase(rax)?;
        a.mov(qword_ptr(8).fs(), 0x11)?;
        a.mov(qword_ptr(8).gs(), 0x22)?;
        call(a, 0)?;
        a.mov(qword_ptr(r12), rax)?; // the kernel's RDMSR of FS.base
        a.mov(qword_ptr(r12 + 8), rsi)?;
        call(a, 1)?;
        a.rdfsbase(rax)?;
        a.mov(qword_ptr(r12 + 16), rax)?;
        a.rdgsbase(rax)?;
        a.mov(qword_ptr(r12 + 24), rax)?;
        a.mov(rax, qword_ptr(8).fs())?;
        a.mov(qword_ptr(r12 + 32), rax)?;
        a.int3()
    })
    .kernel(&[
        &|a| {
            a.mov(ecx, msr::GS_BASE)?;
            a.rdmsr()?;
            a.shl(rdx, 32)?;
            a.lea(rsi, qword_ptr(rax + rdx))?;
            a.mov(ecx, msr::FS_BASE)?;
            a.rdmsr()?;
            a.shl(rdx, 32)?;
            a.add(rax, rdx)
        },
        &|a| {
            a.xor(edx, edx)?;
            a.mov(eax, (DATA + 0x2000) as u32)?;
            a.mov(ecx, msr::FS_BASE)?;
            a.wrmsr()?;
            a.mov(eax, (DATA + 0x3000) as u32)?;
            a.mov(ecx, msr::GS_BASE)?;
            a.wrmsr()
        },
    ]);
    let data = program.data;
    let machine = program.run_to_end(3);
    let words: Vec<_> = (0..5).map(|n| machine.bare.read_u64(data + 8 * n)).collect();
    assert_eq!(words, [DATA + 0x1000, DATA + 0x2000, DATA + 0x2000, DATA + 0x3000, 0x22]);
    assert_eq!(machine.bare.read_u64(data + 0x1008), 0x11);
}

/// What the host would not let a process begin with, a program can give itself.
#[test]
fn a_program_may_have_bases_and_selectors_that_no_process_begins_with() {
    let codes: [Code; 4] = [
        &|a| {
            a.mov(rax, DIRECT)?;
            a.wrgsbase(rax)
        },
        &|a| {
            a.mov(rax, DIRECT)?;
            a.wrfsbase(rax)
        },
        &|a| {
            a.mov(eax, 1)?;
            a.mov(ds, eax)
        },
        &|a| {
            a.mov(eax, u32::from(USER_DATA) - 3)?;
            a.mov(es, eax)
        },
    ];
    for (n, code) in codes.iter().enumerate() {
        let machine = Program::new(&|a| {
            a.mov(r12, DATA)?;
            code(a)?;
            // Pages that are new, after which the program goes on.
            for page in 0..DATA_PAGES as i32 {
                a.mov(dword_ptr(r12 + page * 4096), 7)?;
            }
            a.rdgsbase(rbx)?;
            a.rdfsbase(rcx)?;
            a.xor(eax, eax)?;
            a.xor(edx, edx)?;
            a.mov(eax, ds)?;
            a.mov(edx, es)?;
            a.int3()
        })
        .run_to_end(1);
        let (gpr, i) = (machine.state().gpr, |on: bool, value: u64| if on { value } else { 0 });
        let found = [gpr[3], gpr[1], gpr[0], gpr[2]];
        let data = u64::from(USER_DATA) - 3;
        assert_eq!(found, [i(n == 0, DIRECT), i(n == 1, DIRECT), i(n == 2, 1), i(n == 3, data)], "{n}");
    }
}

#[test]
fn vector_registers_are_the_same_to_program_and_kernel() {
    let avx512 = difftest::case::host_xcr0() & arch::registers::xcr0::AVX512 != 0;
    let program = Program::new(&|a| {
        a.mov(r12, DATA)?;
        a.fld1()?;
        a.fldpi()?;
        a.vpcmpeqd(ymm0, ymm0, ymm0)?;
        a.vpsrld(ymm3, ymm0, 9)?;
        a.movd(xmm15, r12d)?;
        if avx512 {
            a.mov(eax, 0x1234)?;
            a.kmovw(k3, eax)?;
            a.vpbroadcastd(zmm31, r12d)?;
            a.vpbroadcastd(zmm2, eax)?;
        }
        call(a, 0)?;
        // The kernel has initialized it all, but for XMM15, whose half it has swapped for another one.
        a.vmovdqu(ymmword_ptr(r12), ymm3)?;
        a.vmovdqu(ymmword_ptr(r12 + 32), ymm15)?;
        a.fnstenv(ptr(r12 + 64))?;
        if avx512 {
            a.kmovw(eax, k3)?;
            a.mov(dword_ptr(r12 + 96), eax)?;
            a.vmovdqu32(zmmword_ptr(r12 + 128), zmm31)?;
        }
        a.int3()
    });
    let (area, data) = (SCRATCH + 0x300, program.data);
    assert!(area.is_multiple_of(64));
    let blank = 0x6000; // zeros: all components in their initial state, but for SSE
    program.bare.write_u64(blank + 512, 2);
    program.bare.write(blank + 24, &0x1f80u32.to_le_bytes());
    program.bare.write_u64(blank + 160 + 15 * 16, 0x5555_6666);
    let machine = program
        .kernel(&[&|a| {
            a.mov(eax, 0xe7)?;
            a.xor(edx, edx)?;
            a.mov(rsi, DIRECT + area)?;
            a.xsave64(ptr(rsi))?;
            a.mov(rsi, DIRECT + blank)?;
            a.xrstor64(ptr(rsi))
        }])
        .run_to_end(2);
    let word = |at: u64| machine.bare.read_u64(area + at);
    let used = word(512);
    assert_eq!(used & 7, 7);
    assert_eq!((word(32), word(40) & 0xffff), (0xc90f_daa2_2168_c235, 0x4000), "ST0 is pi");
    assert_eq!((word(48), word(56) & 0xffff), (1 << 63, 0x3fff), "ST1 is 1");
    assert_eq!((word(160), word(576)), (u64::MAX, u64::MAX), "YMM0");
    assert_eq!(word(160 + 48), 0x007f_ffff_007f_ffff);
    assert_eq!(word(160 + 15 * 16), DATA);
    let offset = |component: u32| {
        let answer = std::arch::x86_64::__cpuid_count(0xd, component);
        u64::from(answer.ebx)
    };
    if avx512 {
        assert_eq!(used & 0xe7, 0xe7);
        assert_eq!(word(offset(5) + 24) as u16, 0x1234);
        assert_eq!(word(offset(6) + 2 * 32), 0x1234_0000_1234);
        assert_eq!(word(offset(7) + 15 * 64 + 56), DATA << 32 | DATA);
    }
    let seen = |at: u64| machine.bare.read_u64(data + at);
    assert_eq!((seen(0), seen(16)), (0, 0), "YMM3");
    assert_eq!((seen(32), seen(40), seen(48)), (0x5555_6666, 0, 0), "YMM15");
    assert_eq!((seen(64) as u16, seen(72) as u16), (0x37f, 0xffff), "FCW, FTW");
    if avx512 {
        assert_eq!((seen(96) as u32, seen(128), seen(184)), (0, 0, 0), "K3, ZMM31");
    }
}

/// MXCSR is no part of what is in its initial state, although it belongs to SSE state.
#[test]
fn mxcsr_is_the_programs_where_all_registers_are_in_their_initial_state() {
    let program = Program::new(&|a| {
        a.mov(r12, DATA)?;
        call(a, 0)?;
        a.stmxcsr(dword_ptr(r12))?;
        a.int3()
    });
    let blank = 0x6000;
    program.bare.write(blank + 24, &0x1fa1u32.to_le_bytes());
    let data = program.data;
    let machine = program
        .kernel(&[&|a| {
            a.mov(eax, 7)?;
            a.xor(edx, edx)?;
            a.mov(rsi, DIRECT + blank)?;
            a.xrstor64(ptr(rsi))
        }])
        .run_to_end(2);
    assert_eq!(machine.bare.read_u64(data) as u32, 0x1fa1);
}

/// A program that stops at a fault and goes on has the vector registers that it had.
#[test]
fn vector_registers_survive_faults_that_the_kernel_handles() {
    let mut program = Program::new(&|a| {
        a.mov(r12, PAGE)?;
        a.mov(rax, UNKEPT_R14)?;
        a.vmovq(xmm7, rax)?;
        a.vpbroadcastq(ymm7, xmm7)?;
        for n in 0..8i32 {
            a.vmovdqu(ymmword_ptr(r12 + n * 4096 + 64), ymm7)?;
            a.vpaddq(ymm7, ymm7, ymm7)?;
        }
        a.int3()
    });
    let frames = program.bare.pages(8);
    for page in 0..8 {
        program.bare.map(PAGE + page * 4096, frames + page * 4096, 0);
    }
    let entries = program.entry(PAGE);
    let handler = program.bare.kernel_code(CODE + 0x3000, |a| {
        a.push(rax)?;
        a.push(rdx)?;
        a.mov(rax, cr2)?;
        a.shr(rax, 12)?;
        a.and(eax, 7)?;
        a.mov(rdx, entries)?;
        a.or(qword_ptr(rdx + rax * 8), 7)?;
        a.vpxor(ymm8, ymm8, ymm8)?;
        a.pop(rdx)?;
        a.pop(rax)?;
        a.add(rsp, 8)?;
        a.iretq()
    });
    program.bare.gate(14, handler, Gate::default());
    let machine = program.run_to_end(9);
    for page in 0..8 {
        let expected = UNKEPT_R14 << page;
        let at = frames + page * 4096 + 64;
        assert_eq!((machine.bare.read_u64(at), machine.bare.read_u64(at + 24)), (expected, expected), "{page}");
    }
}
