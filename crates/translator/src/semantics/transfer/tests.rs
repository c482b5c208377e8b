//! Transfers of control as the instruction that comes next sees them.

use arch::registers::{cr0, cr4, debug, efer, gpr, pte, rflags};
use arch::state::DescriptorTable;
use arch::{Exception, Segment, SegmentRegister, Vector};

use crate::cpu::{Stop, Vcpu};
use crate::deliver::{Event, deliver};
use crate::descriptor::v8086_segment;
use crate::mode::Mode;
use crate::testing::{
    CODE32, CODE64, DATA, DPL3, GDT, IDT, KERNEL_CS, KERNEL_CS32, KERNEL_SS, KERNEL_STACK, RIP, TSS, TSS_SELECTOR,
    USER, USER_CS, USER_CS32, USER_PT, USER_SS, Vendor, execute, fault_of, kernel_vcpu, kernel_vcpu_of, peek, poke,
    test_vcpu, user_vcpu, user_vcpu_of,
};
use crate::vcpu::VcpuBox;

const IRETQ: &[u8] = &[0x48, 0xcf];
const IRETD: &[u8] = &[0xcf];
const RETFQ: &[u8] = &[0x48, 0xcb];
const SYSCALL: &[u8] = &[0x0f, 0x05];
const SYSRETQ: &[u8] = &[0x48, 0x0f, 0x07];
const SYSRETD: &[u8] = &[0x0f, 0x07];
const SYSENTER: &[u8] = &[0x0f, 0x34];
const SYSEXITQ: &[u8] = &[0x48, 0x0f, 0x35];
const SYSEXITD: &[u8] = &[0x0f, 0x35];
/// JMP FAR qword [rbx], CALL FAR qword [rbx]: Intel's alone
const JMP_FAR: &[u8] = &[0x48, 0xff, 0x2b];
const CALL_FAR: &[u8] = &[0x48, 0xff, 0x1b];

fn selectors(cpu: &Vcpu) -> (u16, u16) {
    (cpu.seg(SegmentRegister::Cs).selector, cpu.seg(SegmentRegister::Ss).selector)
}

/// Puts quadwords on the stack, the first on top.
fn put(cpu: &mut Vcpu, values: &[u64]) {
    let rsp = cpu.gpr[gpr::RSP];
    for (i, &value) in values.iter().enumerate() {
        poke(cpu, rsp + 8 * i as u64, value);
    }
}

/// A far pointer at [rbx].
fn point(cpu: &mut Vcpu, selector: u16, offset: u64) {
    cpu.gpr[gpr::RBX] = 0x7000;
    poke(cpu, 0x7000, offset);
    poke(cpu, 0x7008, u64::from(selector));
}

#[test]
fn iret_to_user_restores_rsp() {
    let mut cpu = kernel_vcpu();
    cpu.nmi_blocked = true;
    cpu.segments[SegmentRegister::Ds as usize] = Segment::flat_data(KERNEL_SS, 0);
    cpu.segments[SegmentRegister::Es as usize] = Segment::flat_data(USER_SS, 3);
    cpu.segments[SegmentRegister::Gs as usize] = Segment { base: 0x1234_5678_9000, ..Segment::flat_data(KERNEL_SS, 0) };
    let flags = rflags::IF | rflags::CF | rflags::AC | rflags::ID | rflags::RF | rflags::IOPL;
    put(&mut cpu, &[USER + 5, USER_CS.into(), flags, USER + 0x123, USER_SS.into()]);
    execute(&mut cpu, IRETQ).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP], cpu.cpl()), (USER + 5, USER + 0x123, 3));
    assert_eq!(selectors(&cpu), (USER_CS, USER_SS));
    assert_eq!(cpu.rflags, flags | rflags::FIXED);
    assert!(!cpu.nmi_blocked && cpu.code64());
    assert_eq!(*cpu.seg(SegmentRegister::Ds), Segment::default());
    assert_eq!(cpu.seg(SegmentRegister::Es).selector, USER_SS);
    // 64-bit code can go on using the base.
    let gs = cpu.seg(SegmentRegister::Gs);
    assert_eq!((gs.selector, gs.present(), gs.base), (0, false, 0x1234_5678_9000));
}

#[test]
fn iret_in_the_kernel_restores_the_stack_and_a_null_ss() {
    let mut cpu = kernel_vcpu();
    put(&mut cpu, &[0x1111, KERNEL_CS.into(), 2, 0x1_e001, 0]);
    execute(&mut cpu, IRETQ).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP], selectors(&cpu), cpu.cpl()), (0x1111, 0x1_e001, (KERNEL_CS, 0), 0));
}

#[test]
fn iret_of_a_program_cannot_touch_if_and_iopl() {
    let mut cpu = user_vcpu();
    cpu.rflags |= rflags::IF;
    put(&mut cpu, &[USER, USER_CS.into(), rflags::IOPL | rflags::ZF, USER + 0x100, USER_SS.into()]);
    execute(&mut cpu, IRETQ).unwrap();
    assert_eq!(cpu.rflags, rflags::FIXED | rflags::IF | rflags::ZF);
}

#[test]
fn iret_to_compatibility_mode_and_16_bit_stacks() {
    let mut cpu = kernel_vcpu();
    put(&mut cpu, &[0x40_0000, USER_CS32.into(), 2, 0x8_1234_5678, USER_SS.into()]);
    execute(&mut cpu, IRETQ).unwrap();
    assert_eq!((cpu.code_bits(), cpu.gpr[gpr::RSP]), (32, 0x1234_5678));
    let mut cpu = kernel_vcpu();
    poke(&mut cpu, GDT + 0x20, 0x0000_f300_0000_ffff);
    put(&mut cpu, &[0x40_0000, USER_CS32.into(), 2, 0x1234_5678, USER_SS.into()]);
    execute(&mut cpu, IRETQ).unwrap();
    assert_eq!(cpu.gpr[gpr::RSP], 0x1_5678, "the upper half of ESP stays");
}

#[test]
fn iret_faults_leave_everything_as_it_was() {
    let cases: [(&[u64], Exception); 8] = [
        (&[0, 0, 2, 0, 0], Exception::general_protection(0)),
        (&[0, 0x98, 2, 0, 0], Exception::general_protection(0x98)),
        (&[0, u64::from(USER_SS), 2, 0, 0], Exception::general_protection(0x20)),
        (&[0, u64::from(USER_CS), 2, 0, 0], Exception::general_protection(0)),
        (&[0, u64::from(USER_CS), 2, 0, u64::from(KERNEL_SS)], Exception::general_protection(u32::from(KERNEL_SS))),
        (&[1 << 47, u64::from(USER_CS), 2, 0, u64::from(USER_SS)], Exception::general_protection(0)),
        (&[1 << 32, u64::from(USER_CS32), 2, 0, u64::from(USER_SS)], Exception::general_protection(0)),
        (&[0, 0x3b, 2, 0, u64::from(USER_SS)], Exception::with_code(Vector::SegmentNotPresent, 0x38)),
    ];
    for (frame, expected) in cases {
        let mut cpu = kernel_vcpu();
        poke(&mut cpu, GDT + 0x38, (CODE64 | DPL3) & !(1 << 47));
        put(&mut cpu, frame);
        let before = (cpu.gpr, cpu.segments, cpu.rflags);
        assert_eq!(fault_of(&mut cpu, IRETQ), expected, "{frame:x?}");
        assert_eq!((cpu.gpr, cpu.segments, cpu.rflags), before);
    }
    let mut cpu = kernel_vcpu();
    cpu.rflags |= rflags::NT;
    assert_eq!(fault_of(&mut cpu, IRETQ), Exception::general_protection(0), "no tasks in long mode");
}

#[test]
fn iret_in_compatibility_mode_pops_three_values_at_the_same_level() {
    let mut cpu = kernel_vcpu();
    cpu.segments[SegmentRegister::Cs as usize] = Segment::flat_code(KERNEL_CS32, false, 0);
    cpu.gpr[gpr::RSP] = 0x1_e000;
    put(&mut cpu, &[0x7777 | u64::from(KERNEL_CS) << 32, 2]);
    execute(&mut cpu, IRETD).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP], cpu.code_bits()), (0x7777, 0x1_e00c, 64));
}

#[test]
fn syscall_and_sysret_exchange_program_and_kernel() {
    let mut cpu = user_vcpu();
    cpu.msrs.star = 0x1b << 48 | u64::from(KERNEL_CS) << 32;
    cpu.msrs.lstar = 0xffff_8000_0000_0100;
    cpu.msrs.sfmask = rflags::IF | rflags::AC;
    cpu.rflags |= rflags::IF | rflags::CF;
    let flags = cpu.rflags;
    execute(&mut cpu, SYSCALL).unwrap();
    assert_eq!((cpu.rip, cpu.cpl(), selectors(&cpu)), (cpu.msrs.lstar, 0, (KERNEL_CS, KERNEL_SS)));
    assert_eq!((cpu.gpr[gpr::RCX], cpu.gpr[gpr::R11]), (RIP + 2, flags));
    assert_eq!(cpu.rflags, rflags::FIXED | rflags::CF);
    execute(&mut cpu, SYSRETQ).unwrap();
    assert_eq!((cpu.rip, cpu.cpl(), selectors(&cpu), cpu.rflags), (RIP + 2, 3, (0x2b, 0x23), flags));
    execute(&mut cpu, SYSCALL).unwrap();
    cpu.gpr[gpr::RCX] = 0x5_0000_1234;
    execute(&mut cpu, SYSRETD).unwrap();
    assert_eq!((cpu.rip, cpu.code_bits(), selectors(&cpu)), (0x1234, 32, (0x1b, 0x23)));
    cpu.msrs.cstar = 0xffff_8000_0000_0200;
    if cpu.machine.cpuid.is_amd() {
        execute(&mut cpu, SYSCALL).unwrap();
        assert_eq!((cpu.rip, cpu.code_bits()), (cpu.msrs.cstar, 64));
    } else {
        assert_eq!(fault_of(&mut cpu, SYSCALL), Exception::invalid_opcode(), "64-bit mode only");
    }
}

#[test]
fn sysret_is_privileged_and_wants_a_canonical_address_on_intel() {
    let mut cpu = user_vcpu();
    assert_eq!(fault_of(&mut cpu, SYSRETQ), Exception::general_protection(0));
    let mut cpu = kernel_vcpu();
    cpu.gpr[gpr::RCX] = 1 << 47;
    if cpu.machine.cpuid.is_amd() {
        execute(&mut cpu, SYSRETQ).unwrap();
        assert_eq!((cpu.rip, cpu.cpl()), (1 << 47, 3));
        return;
    }
    assert_eq!(fault_of(&mut cpu, SYSRETQ), Exception::general_protection(0));
    cpu.msrs.efer &= !efer::SCE;
    assert_eq!(fault_of(&mut cpu, SYSRETQ), Exception::invalid_opcode());
}

#[test]
fn sysenter_works_from_compatibility_mode_except_on_amd() {
    let mut cpu = user_vcpu();
    cpu.segments[SegmentRegister::Cs as usize] = Segment::flat_code(USER_CS32, false, 3);
    if cpu.machine.cpuid.is_amd() {
        assert_eq!(fault_of(&mut cpu, SYSENTER), Exception::invalid_opcode());
        return;
    }
    assert_eq!(fault_of(&mut cpu, SYSENTER), Exception::general_protection(0));
    cpu.msrs.sysenter_cs = KERNEL_CS.into();
    cpu.msrs.sysenter_esp = 0xffff_8000_0000_2000;
    cpu.msrs.sysenter_eip = 0xffff_8000_0000_1000;
    cpu.rflags |= rflags::IF;
    execute(&mut cpu, SYSENTER).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP]), (cpu.msrs.sysenter_eip, cpu.msrs.sysenter_esp));
    assert_eq!((cpu.code_bits(), cpu.cpl(), cpu.rflags & rflags::IF), (64, 0, 0));
    (cpu.gpr[gpr::RCX], cpu.gpr[gpr::RDX]) = (USER, USER + 9);
    execute(&mut cpu, SYSEXITQ).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP], selectors(&cpu)), (USER + 9, USER, (0x2b, 0x33)));
    execute(&mut cpu, SYSENTER).unwrap();
    execute(&mut cpu, SYSEXITD).unwrap();
    assert_eq!((cpu.code_bits(), selectors(&cpu)), (32, (0x1b, 0x23)));
}

#[test]
fn a_far_jump_changes_between_64_and_32_bit_code() {
    let mut cpu = kernel_vcpu_of(Vendor::Intel);
    point(&mut cpu, KERNEL_CS32, 0x1234);
    execute(&mut cpu, JMP_FAR).unwrap();
    assert_eq!((cpu.rip, cpu.code_bits()), (0x1234, 32));
    // JMP FAR 8:5678
    cpu.rip = 0;
    execute(&mut cpu, &[0xea, 0x78, 0x56, 0, 0, 8, 0]).unwrap();
    assert_eq!((cpu.rip, cpu.code_bits()), (0x5678, 64));
}

#[test]
fn far_jumps_check_the_code_segment() {
    let cases = [
        (0, 0, Exception::general_protection(0)),
        (0x88, 0, Exception::general_protection(0x88)),
        (KERNEL_SS, 0, Exception::general_protection(KERNEL_SS.into())),
        (USER_CS, 0, Exception::general_protection(0x28)),
        (KERNEL_CS, 1 << 47, Exception::general_protection(0)),
        (0x38, 0, Exception::general_protection(0x38)),
    ];
    for (selector, offset, expected) in cases {
        let mut cpu = kernel_vcpu_of(Vendor::Intel);
        poke(&mut cpu, GDT + 0x38, CODE64 | CODE32);
        point(&mut cpu, selector, offset);
        assert_eq!(fault_of(&mut cpu, JMP_FAR), expected, "{selector:x}:{offset:x}");
    }
}

#[test]
fn a_far_call_and_return_keep_the_stack() {
    let mut cpu = kernel_vcpu_of(Vendor::Intel);
    let rsp = cpu.gpr[gpr::RSP];
    point(&mut cpu, KERNEL_CS, 0x4321);
    execute(&mut cpu, CALL_FAR).unwrap();
    assert_eq!(cpu.gpr[gpr::RSP], rsp - 16);
    assert_eq!((peek(&cpu, rsp - 16), peek(&cpu, rsp - 8)), (RIP + 3, KERNEL_CS.into()));
    execute(&mut cpu, RETFQ).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP]), (RIP + 3, rsp));
}

#[test]
fn a_call_gate_enters_the_kernel_and_a_far_return_leaves_it() {
    let mut cpu = user_vcpu_of(Vendor::Intel);
    cpu.gpr[gpr::RBX] = USER;
    poke(&mut cpu, USER + 8, 0x50);
    let rsp = cpu.gpr[gpr::RSP];
    poke(&mut cpu, GDT + 0x50, 0x0000_ec00_0000_1230 | u64::from(KERNEL_CS) << 16);
    poke(&mut cpu, GDT + 0x58, 0xffff_8000);
    execute(&mut cpu, CALL_FAR).unwrap();
    assert_eq!((cpu.rip, selectors(&cpu), cpu.cpl()), (0xffff_8000_0000_1230, (KERNEL_CS, 0), 0));
    assert_eq!(cpu.gpr[gpr::RSP], KERNEL_STACK - 32);
    let frame: Vec<u64> = (0..4).map(|i| peek(&cpu, KERNEL_STACK - 32 + 8 * i)).collect();
    assert_eq!(frame, [RIP + 3, USER_CS.into(), rsp, USER_SS.into()]);
    // RETFQ 16
    execute(&mut cpu, &[0x48, 0xca, 16, 0]).unwrap_err();
    execute(&mut cpu, RETFQ).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP], selectors(&cpu)), (RIP + 3, rsp, (USER_CS, USER_SS)));
}

#[test]
fn a_call_gates_own_checks_name_the_gate() {
    let mut cpu = user_vcpu_of(Vendor::Intel);
    cpu.gpr[gpr::RBX] = USER;
    poke(&mut cpu, USER + 8, 0x50);
    let gate = 0x0000_ec00_0000_1230 | u64::from(KERNEL_CS) << 16;
    poke(&mut cpu, GDT + 0x50, gate & !DPL3);
    assert_eq!(fault_of(&mut cpu, CALL_FAR), Exception::general_protection(0x50));
    poke(&mut cpu, GDT + 0x50, gate & !(1 << 47));
    assert_eq!(fault_of(&mut cpu, CALL_FAR), Exception::with_code(Vector::SegmentNotPresent, 0x50));
    poke(&mut cpu, GDT + 0x50, gate);
    assert_eq!(fault_of(&mut cpu, JMP_FAR), Exception::general_protection(KERNEL_CS.into()));
    poke(&mut cpu, GDT + 0x58, 0x1f << 40);
    assert_eq!(fault_of(&mut cpu, CALL_FAR), Exception::general_protection(0x50), "no second half");
}

#[test]
fn a_far_call_whose_push_faults_changes_nothing() {
    let mut cpu = user_vcpu_of(Vendor::Intel);
    cpu.gpr[gpr::RBX] = USER;
    poke(&mut cpu, USER + 8, USER_CS.into());
    poke(&mut cpu, USER_PT + 8 * 7, 0x20_7000 | pte::P | pte::U);
    cpu.gpr[gpr::RSP] = USER + 0x8000;
    let before = (cpu.gpr, cpu.segments);
    let e = fault_of(&mut cpu, CALL_FAR);
    assert_eq!((e.vector, e.error_code, e.fault_address), (Vector::PageFault, 7, USER + 0x7ff8));
    assert_eq!((cpu.gpr, cpu.segments), before);
}

#[test]
fn real_mode_far_transfers_keep_the_limit_of_the_code_segment() {
    let mut cpu = test_vcpu(4 << 20);
    let unreal = Segment { limit: 0xf_ffff, ..Segment::real_mode(0x700, true) };
    cpu.segments[SegmentRegister::Cs as usize] = unreal;
    cpu.gpr[gpr::RSP] = 0x8000;
    // JMP FAR 1234:00056789.
    execute(&mut cpu, &[0x66, 0xea, 0x89, 0x67, 5, 0, 0x34, 0x12]).unwrap();
    assert_eq!(cpu.rip, 0x5_6789);
    assert_eq!(*cpu.seg(SegmentRegister::Cs), Segment { base: 0x1_2340, selector: 0x1234, ..unreal });
    cpu.segments[SegmentRegister::Cs as usize].limit = 0xffff;
    let e = fault_of(&mut cpu, &[0x66, 0xea, 0x89, 0x67, 5, 0, 0x34, 0x12]);
    assert_eq!(e.vector, Vector::GeneralProtection);
}

#[test]
fn real_mode_far_transfers_set_the_base() {
    let mut cpu = test_vcpu(4 << 20);
    cpu.segments[SegmentRegister::Cs as usize] = Segment::real_mode(0x700, true);
    cpu.gpr[gpr::RSP] = 0x8000;
    // CALL FAR 1234:5678; the decoder numbers from RIP on.
    execute(&mut cpu, &[0x9a, 0x78, 0x56, 0x34, 0x12]).unwrap();
    assert_eq!((cpu.rip, cpu.seg(SegmentRegister::Cs).base, cpu.gpr[gpr::RSP]), (0x5678, 0x1_2340, 0x7ffc));
    assert_eq!(peek(&cpu, 0x7ff8) >> 32, 0x0700_0000 | (RIP + 5));
    execute(&mut cpu, &[0xca, 4, 0]).unwrap();
    assert_eq!((cpu.rip, selectors(&cpu).0, cpu.gpr[gpr::RSP]), (RIP + 5, 0x700, 0x8004));
}

/// Virtual-8086 mode without paging; the TSS lies at 9000H, its I/O bitmap at its offset 88H.
fn v8086_vcpu(iopl: u64) -> VcpuBox {
    let mut cpu = test_vcpu(4 << 20);
    cpu.cr0 |= cr0::PE;
    cpu.rflags |= rflags::VM | iopl << rflags::IOPL_SHIFT;
    cpu.segments = [v8086_segment(0x100); 6];
    cpu.gpr[gpr::RSP] = 0x800;
    cpu.tr = Segment { base: 0x9000, limit: 0x1ff, attributes: 0x8b, selector: 8 };
    poke(&mut cpu, 0x9060, 0x88 << 48);
    poke(&mut cpu, 0x80, 0x1234_5678 << 32);
    cpu
}

const INT_21: &[u8] = &[0xcd, 0x21];

#[test]
fn int_n_and_iret_in_virtual_8086_mode_need_iopl_3() {
    let mut cpu = v8086_vcpu(0);
    assert_eq!(fault_of(&mut cpu, INT_21), Exception::general_protection(0));
    assert_eq!(fault_of(&mut cpu, IRETD), Exception::general_protection(0));
    let mut cpu = v8086_vcpu(3);
    poke(&mut cpu, 0x1800, 0x3202_0200_0042);
    execute(&mut cpu, IRETD).unwrap();
    assert_eq!((cpu.rip, selectors(&cpu).0, cpu.gpr[gpr::RSP]), (0x42, 0x200, 0x806));
    assert_eq!(cpu.rflags, rflags::FIXED | rflags::VM | rflags::IOPL | rflags::IF);
}

#[test]
fn vme_redirects_software_interrupts_into_the_8086_program() {
    let mut cpu = v8086_vcpu(0);
    cpu.cr4 |= cr4::VME;
    cpu.rflags |= rflags::VIF | rflags::CF;
    execute(&mut cpu, INT_21).unwrap();
    assert_eq!((cpu.rip, selectors(&cpu).0, cpu.gpr[gpr::RSP]), (0x5678, 0x1234, 0x7fa));
    assert_eq!(peek(&cpu, 0x17f8) >> 16, (0x3203 << 32) | (0x100 << 16) | (RIP + 2));
    assert_eq!(cpu.rflags & (rflags::VIF | rflags::VM), rflags::VM);
    execute(&mut cpu, IRETD).unwrap();
    assert_eq!((cpu.rip, selectors(&cpu).0, cpu.gpr[gpr::RSP]), (RIP + 2, 0x100, 0x800));
    assert_eq!(cpu.rflags, rflags::FIXED | rflags::VM | rflags::VIF | rflags::CF);
    poke(&mut cpu, 0x9000 + 0x88 - 32, 1 << 0x21);
    poke(&mut cpu, 0x9000 + 0x88 - 32 + 4, 1 << 1);
    assert_eq!(fault_of(&mut cpu, INT_21), Exception::general_protection(0), "the monitor's");
}

/// Flat 32-bit protected mode at level 0, without paging.
fn protected_vcpu() -> VcpuBox {
    let mut cpu = test_vcpu(4 << 20);
    cpu.cr0 |= cr0::PE;
    cpu.gdtr = DescriptorTable { base: GDT, limit: 0x7f };
    for (i, descriptor) in [CODE32, DATA, CODE32 | DPL3, DATA | DPL3].into_iter().enumerate() {
        poke(&mut cpu, GDT + 8 + 8 * i as u64, descriptor);
    }
    cpu.tr = Segment { base: TSS, limit: 0x67, attributes: 0x8b, selector: TSS_SELECTOR };
    poke(&mut cpu, TSS + 4, KERNEL_STACK | u64::from(KERNEL_SS) << 32);
    cpu.segments = [Segment::flat_data(KERNEL_SS, 0); 6];
    cpu.segments[SegmentRegister::Cs as usize] = Segment::flat_code(KERNEL_CS, false, 0);
    cpu.gpr[gpr::RSP] = 0x1_f000;
    cpu
}

fn put32(cpu: &mut Vcpu, values: &[u32]) {
    let rsp = cpu.gpr[gpr::RSP];
    for (i, value) in values.iter().enumerate() {
        cpu.phys_write(rsp + 4 * i as u64, &value.to_le_bytes());
    }
}

#[test]
fn iret_enters_virtual_8086_mode_from_level_0() {
    let mut cpu = protected_vcpu();
    put32(&mut cpu, &[0x42, 0x1000, (rflags::VM | rflags::IF) as u32, 0xfffe, 1, 2, 3, 4, 5]);
    execute(&mut cpu, IRETD).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP], cpu.cpl(), cpu.code_bits()), (0x42, 0xfffe, 3, 16));
    let selectors: Vec<u16> = cpu.segments.iter().map(|s| s.selector).collect();
    assert_eq!(selectors, [2, 0x1000, 1, 3, 4, 5]);
    assert_eq!(cpu.seg(SegmentRegister::Cs).base, 0x1_0000);
}

#[test]
fn a_32_bit_call_gate_copies_parameters_and_ret_releases_both_stacks() {
    let mut cpu = protected_vcpu();
    put32(&mut cpu, &[0x3000, 0x1b, 0x2_8000, 0x23]);
    execute(&mut cpu, &[0xcb]).unwrap();
    assert_eq!((cpu.rip, cpu.cpl(), selectors(&cpu), cpu.gpr[gpr::RSP]), (0x3000, 3, (0x1b, 0x23), 0x2_8000));
    assert!(!cpu.seg(SegmentRegister::Ds).present(), "level 0's data segments");
    put32(&mut cpu, &[0xaaaa, 0xbbbb]);
    // A gate with two parameters, offset 8000_4444H.
    poke(&mut cpu, GDT + 0x28, 0x8000_ec02_0000_4444 | u64::from(KERNEL_CS) << 16);
    // CALL FAR 2b:0
    execute(&mut cpu, &[0x9a, 0, 0, 0, 0, 0x2b, 0]).unwrap();
    assert_eq!((cpu.rip, cpu.cpl(), cpu.gpr[gpr::RSP]), (0x8000_4444, 0, KERNEL_STACK - 24));
    assert_eq!(selectors(&cpu), (KERNEL_CS, KERNEL_SS));
    let frame: Vec<u64> = (0..3).map(|i| peek(&cpu, KERNEL_STACK - 24 + 8 * i)).collect();
    assert_eq!(frame, [0x1b << 32 | (RIP + 7), 0xbbbb << 32 | 0xaaaa, 0x23 << 32 | 0x2_8000]);
    execute(&mut cpu, &[0xca, 8, 0]).unwrap();
    assert_eq!((cpu.rip, cpu.cpl(), cpu.gpr[gpr::RSP]), (RIP + 7, 3, 0x2_8008));
}

#[test]
fn a_jump_to_a_tss_switches_tasks_without_nesting() {
    let mut cpu = protected_vcpu();
    let tss = 0x1_3000;
    poke(&mut cpu, GDT + u64::from(TSS_SELECTOR), 0x0000_8b00_0000_0067 | TSS << 16);
    poke(&mut cpu, GDT + 0x28, 0x0000_8900_0000_0067 | tss << 16);
    poke(&mut cpu, tss + 0x20, 0x4000 | (rflags::FIXED | rflags::CF) << 32);
    poke(&mut cpu, tss + 0x38, 0x3_8000);
    poke(&mut cpu, tss + 0x48, 0x10 | 8 << 32);
    poke(&mut cpu, tss + 0x50, 0x10);
    poke(&mut cpu, tss + 0x60, 1 << 32);
    cpu.dr7 |= 1;
    // JMP FAR 28:0
    execute(&mut cpu, &[0xea, 0, 0, 0, 0, 0x28, 0]).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP], cpu.tr.selector), (0x4000, 0x3_8000, 0x28));
    assert_eq!(cpu.rflags, rflags::FIXED | rflags::CF);
    assert_eq!(peek(&cpu, GDT + u64::from(TSS_SELECTOR)) >> 40 & 15, 9, "the old task is available");
    assert_eq!((cpu.pending_debug, cpu.dr7 & 1), (debug::DR6_BT, 0), "the T flag; local breakpoints go");
    assert_eq!(fault_of(&mut cpu, &[0xea, 0, 0, 0, 0, 0x28, 0]), Exception::general_protection(0x28), "busy");
}

/// Xorshift: the same numbers in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// An address or offset of a kind that guests have, or anything.
    fn address(&mut self) -> u64 {
        let n = self.next();
        match n % 5 {
            0 => n >> 40,
            1 => n | 0xffff_ffff_ffff_f000,
            2 => n >> 32,
            3 => 0x7fff_ffff_ff00 | n & 0xff,
            _ => n,
        }
    }
}

/// A processor in any mode whose tables and registers hold anything.
fn arbitrary_vcpu(numbers: &mut Numbers) -> VcpuBox {
    let vendor = Vendor::ALL[numbers.next() as usize % 2];
    let mut cpu = match numbers.next() % 4 {
        0 => user_vcpu_of(vendor),
        1 => kernel_vcpu_of(vendor),
        2 => protected_vcpu(),
        _ => v8086_vcpu(numbers.next() & 3),
    };
    for table in [GDT, IDT, TSS] {
        for i in 1..64 {
            let likely_kind = numbers.next() & 0xf << 40 | 0x80 << 40 | numbers.next() & 0x70 << 40;
            let value = numbers.next() & !(0xff << 40) | likely_kind;
            poke(&mut cpu, table + 8 * i, value & !0xffff_0000 | numbers.next() & 0xff << 16);
        }
    }
    for register in &mut cpu.gpr {
        *register = if numbers.next().is_multiple_of(2) { 0x7000 | numbers.next() & 0xff8 } else { numbers.address() };
    }
    for i in 0..512 {
        let value = if i % 2 == 0 { numbers.address() } else { numbers.next() & 0x7b };
        poke(&mut cpu, 0x7000 + 8 * i, value);
    }
    for segment in &mut cpu.segments {
        if numbers.next().is_multiple_of(4) {
            segment.base = numbers.address();
            segment.limit = numbers.next() as u32 & 0xffff;
        }
    }
    cpu.idtr = DescriptorTable { base: IDT, limit: numbers.next() as u16 };
    cpu.rflags ^= numbers.next() & (rflags::NT | rflags::IOPL | rflags::AC | rflags::IF);
    cpu.cr0 |= numbers.next() & (cr0::AM | cr0::WP);
    cpu.cr4 ^= numbers.next() & (cr4::SMAP | cr4::SMEP | cr4::VME | cr4::UMIP);
    cpu.dr7 = if numbers.next().is_multiple_of(8) { numbers.next() } else { 0x400 };
    cpu.msrs.sysenter_cs = numbers.next();
    cpu.mmu_flush_all();
    cpu
}

/// The worst that may come of it is a shutdown.
#[test]
fn nothing_a_guest_holds_in_its_tables_harms_the_monitor() {
    const INSTRUCTIONS: &[&[u8]] = &[
        &[0xcf],
        &[0x48, 0xcf],
        &[0x66, 0xcf],
        &[0xcb],
        &[0x48, 0xca, 0xff, 0x7f],
        &[0xcd, 0x21],
        &[0xcc],
        &[0xf1],
        &[0xff, 0x2b],
        &[0x48, 0xff, 0x1b],
        &[0xff, 0x1b],
        &[0x66, 0xff, 0x1b],
        &[0x8e, 0xd8],
        &[0x8e, 0xd0],
        &[0x0f, 0xa1],
        &[0x0f, 0xb2, 0x23],
        &[0x0f, 0x00, 0xd8],
        &[0x0f, 0x00, 0xd0],
        &[0x0f, 0x02, 0xc8],
        &[0x0f, 0x03, 0xc8],
        &[0x0f, 0x34],
        &[0x0f, 0x35],
        &[0x0f, 0x05],
    ];
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for round in 0..400 {
        let mut cpu = arbitrary_vcpu(&mut numbers);
        for _ in 0..16 {
            let bytes = INSTRUCTIONS[numbers.next() as usize % INSTRUCTIONS.len()];
            let insn = crate::access::decode(bytes, Mode::of(&cpu), RIP);
            let Some(sensitive) = crate::semantics::lookup(&insn) else { continue };
            (cpu.insn_rip, cpu.rip) = (insn.ip(), insn.next_ip());
            if let Err(Stop::Fault(e)) = (sensitive.exec)(&mut cpu, &insn)
                && deliver(&mut cpu, Event::Exception(e)).is_err()
            {
                break;
            }
            assert!(cpu.cpl() <= 3 && cpu.rflags & rflags::FIXED != 0, "round {round}, {insn}");
        }
    }
}
