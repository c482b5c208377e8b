//! RFLAGS as kernels and programs change it.

use super::*;
use crate::testing::{execute, fault_of, kernel_vcpu, user_vcpu};
use arch::Vector;
use arch::registers::gpr::RSP;
use arch::registers::rflags::*;

const PUSHFQ: &[u8] = &[0x9c];
const PUSHFW: &[u8] = &[0x66, 0x9c];
const POPFQ: &[u8] = &[0x9d];
const POPFW: &[u8] = &[0x66, 0x9d];
const CLI: &[u8] = &[0xfa];
const STI: &[u8] = &[0xfb];
const STAC: &[u8] = &[0x0f, 0x01, 0xcb];
const CLAC: &[u8] = &[0x0f, 0x01, 0xca];

fn pop(cpu: &mut Vcpu, code: &[u8], image: u64) {
    cpu.gpr[RSP] -= 8;
    let rsp = cpu.gpr[RSP];
    cpu.write_sized(rsp, 8, image, cpu.context()).unwrap();
    execute(cpu, code).unwrap();
    cpu.gpr[RSP] = rsp + 8;
}

#[test]
fn pushf_hides_rf_and_vm() {
    let mut cpu = kernel_vcpu();
    cpu.rflags = FIXED | RF | IF | CF | AC;
    let rsp = cpu.gpr[RSP];
    execute(&mut cpu, PUSHFQ).unwrap();
    assert_eq!(cpu.gpr[RSP], rsp - 8);
    let context = cpu.context();
    assert_eq!(cpu.read_sized(rsp - 8, 8, context), Ok(FIXED | IF | CF | AC));
    execute(&mut cpu, PUSHFW).unwrap();
    assert_eq!(cpu.gpr[RSP], rsp - 10);
}

#[test]
fn the_kernel_pops_everything_but_vm_and_virtual_interrupts() {
    let mut cpu = kernel_vcpu();
    cpu.rflags = FIXED | VIF | RF;
    pop(&mut cpu, POPFQ, !TF);
    assert_eq!(cpu.rflags, FIXED | ARITHMETIC | IF | DF | IOPL | NT | AC | ID);
    pop(&mut cpu, POPFQ, 0);
    assert_eq!(cpu.rflags, FIXED);
}

#[test]
fn programs_can_pop_neither_iopl_nor_the_interrupt_flag() {
    let mut cpu = user_vcpu();
    cpu.rflags = FIXED | IF;
    pop(&mut cpu, POPFQ, IOPL | CF | AC);
    assert_eq!(cpu.rflags, FIXED | IF | CF | AC);
    cpu.rflags = FIXED | IF | IOPL;
    pop(&mut cpu, POPFQ, 0);
    assert_eq!(cpu.rflags, FIXED | IOPL);
}

#[test]
fn a_16_bit_pop_leaves_the_upper_flags() {
    let mut cpu = kernel_vcpu();
    cpu.rflags = FIXED | AC | ID | VIF;
    pop(&mut cpu, POPFW, IF);
    assert_eq!(cpu.rflags, FIXED | AC | ID | VIF | IF);
}

#[test]
fn sti_shadows_one_instruction_only_when_it_enables() {
    let mut cpu = kernel_vcpu();
    execute(&mut cpu, STI).unwrap();
    assert!(cpu.interrupt_shadow && cpu.rflags & IF != 0);
    cpu.interrupt_shadow = false;
    execute(&mut cpu, STI).unwrap();
    assert!(!cpu.interrupt_shadow);
    execute(&mut cpu, CLI).unwrap();
    assert_eq!(cpu.rflags & IF, 0);
}

#[test]
fn programs_need_iopl_or_pvi_to_touch_interrupts() {
    let mut cpu = user_vcpu();
    cpu.rflags = FIXED | IF;
    assert_eq!(fault_of(&mut cpu, CLI), Exception::general_protection(0));
    cpu.cr4 |= cr4::PVI;
    execute(&mut cpu, STI).unwrap();
    assert_eq!(cpu.rflags, FIXED | IF | VIF);
    cpu.rflags |= VIP;
    assert_eq!(fault_of(&mut cpu, STI), Exception::general_protection(0));
    execute(&mut cpu, CLI).unwrap();
    assert_eq!(cpu.rflags, FIXED | IF | VIP);
    cpu.rflags |= IOPL;
    execute(&mut cpu, CLI).unwrap();
    assert_eq!(cpu.rflags, FIXED | VIP | IOPL);
}

#[test]
fn virtual_8086_flags_are_the_monitors() {
    let mut cpu = kernel_vcpu();
    cpu.msrs.efer = 0;
    cpu.cr0 &= !arch::registers::cr0::PG;
    cpu.rflags = FIXED | VM;
    cpu.segments = [arch::Segment::real_mode(0x200, false); 6];
    cpu.gpr[RSP] = 0x100;
    const POPF: &[u8] = &[0x9d];
    const PUSHF: &[u8] = &[0x9c];
    for code in [PUSHF, POPF, CLI, STI] {
        assert_eq!(fault_of(&mut cpu, code), Exception::general_protection(0));
    }
    cpu.cr4 |= cr4::VME;
    execute(&mut cpu, STI).unwrap();
    assert_eq!(cpu.rflags, FIXED | VM | VIF);
    execute(&mut cpu, PUSHF).unwrap();
    assert_eq!(cpu.gpr[RSP], 0xfe);
    let mut image = [0; 2];
    cpu.phys_read(0x20fe, &mut image);
    assert_eq!(u64::from(u16::from_le_bytes(image)), FIXED | IF | IOPL);
    execute(&mut cpu, CLI).unwrap();
    execute(&mut cpu, POPF).unwrap();
    assert_eq!(cpu.rflags, FIXED | VM | VIF);
    // The 32-bit form is not virtualized.
    assert_eq!(fault_of(&mut cpu, &[0x66, 0x9c]), Exception::general_protection(0));
}

#[test]
fn stac_and_clac_are_the_kernels() {
    let mut cpu = kernel_vcpu();
    execute(&mut cpu, STAC).unwrap();
    assert_eq!(cpu.rflags & AC, AC);
    execute(&mut cpu, CLAC).unwrap();
    assert_eq!(cpu.rflags & AC, 0);
    assert_eq!(fault_of(&mut user_vcpu(), STAC).vector, Vector::InvalidOpcode);
}
