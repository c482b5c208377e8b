//! Control registers as a kernel writes them.

use super::*;
use crate::testing::{execute, fault_of, kernel_vcpu, poke, test_vcpu, user_vcpu};
use arch::registers::gpr::{RAX, RCX, RDX};
use arch::{Segment, Vector};

const MOV_CR0_RAX: &[u8] = &[0x0f, 0x22, 0xc0];
const MOV_CR3_RAX: &[u8] = &[0x0f, 0x22, 0xd8];
const MOV_CR4_RAX: &[u8] = &[0x0f, 0x22, 0xe0];
const MOV_CR8_RAX: &[u8] = &[0x44, 0x0f, 0x22, 0xc0];
const MOV_RAX_CR8: &[u8] = &[0x44, 0x0f, 0x20, 0xc0];
const MOV_RAX_CR0: &[u8] = &[0x0f, 0x20, 0xc0];
const XSETBV: &[u8] = &[0x0f, 0x01, 0xd1];
const XGETBV: &[u8] = &[0x0f, 0x01, 0xd0];
const SMSW_EAX: &[u8] = &[0x0f, 0x01, 0xe0];
const LMSW_AX: &[u8] = &[0x0f, 0x01, 0xf0];

/// Whether `mov crN, rax` with `value` raises #GP.
fn faults(cpu: &mut Vcpu, code: &[u8], value: u64) -> bool {
    cpu.gpr[RAX] = value;
    match execute(cpu, code) {
        Ok(()) => false,
        Err(Stop::Fault(e)) => {
            assert_eq!(e, fault());
            true
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn cr0_rejects_impossible_combinations() {
    let mut cpu = kernel_vcpu();
    let cr0 = cpu.cr0;
    assert!(faults(&mut cpu, MOV_CR0_RAX, cr0 | 1 << 32));
    assert!(faults(&mut cpu, MOV_CR0_RAX, cr0 & !cr0::PE));
    assert!(faults(&mut cpu, MOV_CR0_RAX, cr0 | cr0::NW));
    assert!(faults(&mut cpu, MOV_CR0_RAX, cr0 & !cr0::PG)); // from 64-bit code
    assert!(!faults(&mut cpu, MOV_CR0_RAX, cr0 | 1 << 10));
    assert_eq!(cpu.cr0, cr0);
    assert!(!faults(&mut cpu, MOV_CR0_RAX, (cr0 | cr0::TS) & !cr0::ET));
    execute(&mut cpu, MOV_RAX_CR0).unwrap();
    assert_eq!(cpu.gpr[RAX], cr0 | cr0::TS);
}

#[test]
fn long_mode_becomes_active_with_paging() {
    let mut cpu = test_vcpu(8 << 20);
    cpu.segments[1] = Segment::flat_code(8, false, 0);
    cpu.tr.attributes = 0x8b;
    cpu.write_cr0(cr0::PE | cr0::ET).unwrap();
    cpu.write_msr(arch::msr::EFER, efer::LME).unwrap();
    assert_eq!(cpu.write_cr0(cr0::PG | cr0::PE), Err(fault())); // no PAE
    cpu.write_cr4(cr4::PAE).unwrap();
    cpu.segments[1] = Segment::flat_code(8, true, 0);
    assert_eq!(cpu.write_cr0(cr0::PG | cr0::PE), Err(fault())); // CS.L
    cpu.segments[1] = Segment::flat_code(8, false, 0);
    cpu.write_cr0(cr0::PG | cr0::PE).unwrap();
    assert_eq!(cpu.msrs.efer, efer::LME | efer::LMA);
    assert_eq!(cpu.write_cr4(0), Err(fault()));
    cpu.write_cr0(cr0::PE).unwrap();
    assert_eq!(cpu.msrs.efer, efer::LME);
    cpu.write_cr4(0).unwrap();
}

#[test]
fn pae_paging_checks_its_four_entries() {
    let mut cpu = test_vcpu(8 << 20);
    cpu.write_cr0(cr0::PE).unwrap();
    cpu.write_cr4(cr4::PAE).unwrap();
    cpu.write_cr3(0x1000).unwrap();
    poke(&mut cpu, 0x1008, 0x3000 | 3); // bit 1 is reserved
    assert_eq!(cpu.write_cr0(cr0::PG | cr0::PE), Err(fault()));
    poke(&mut cpu, 0x1008, 0x3000 | 1);
    cpu.write_cr0(cr0::PG | cr0::PE).unwrap();
    poke(&mut cpu, 0x2018, 1 << 50 | 1);
    assert_eq!(cpu.write_cr3(0x2000), Err(fault()));
    assert_eq!(cpu.cr3, 0x1000);
}

#[test]
fn pcids_need_long_mode_and_a_clear_cr3() {
    let mut cpu = kernel_vcpu();
    let (cr3, cr4) = (cpu.cr3, cpu.cr4);
    assert!(faults(&mut cpu, MOV_CR3_RAX, cr3 | 1 << 63));
    assert!(!faults(&mut cpu, MOV_CR3_RAX, cr3 | 5));
    assert!(faults(&mut cpu, MOV_CR4_RAX, cr4 | cr4::PCIDE));
    assert!(!faults(&mut cpu, MOV_CR3_RAX, cr3));
    assert!(!faults(&mut cpu, MOV_CR4_RAX, cr4 | cr4::PCIDE));
    assert!(!faults(&mut cpu, MOV_CR3_RAX, cr3 | 5 | 1 << 63));
    assert_eq!(cpu.cr3, cr3 | 5);
    assert!(faults(&mut cpu, MOV_CR3_RAX, cr3 | 1 << 60));
    assert!(faults(&mut cpu, MOV_CR3_RAX, cr3 | 1 << 46));
}

#[test]
fn cr4_takes_only_the_bits_that_cpuid_offers() {
    let mut cpu = kernel_vcpu();
    let cr4 = cpu.cr4;
    for bit in [cr4::LA57, 1 << 13, 1 << 14, 1 << 15, 1 << 19, 1 << 23, 1 << 40] {
        assert!(faults(&mut cpu, MOV_CR4_RAX, cr4 | bit), "{bit:#x}");
    }
    assert!(!faults(&mut cpu, MOV_CR4_RAX, cr4 | cr4::SMEP | cr4::SMAP | cr4::UMIP | cr4::FSGSBASE));
    assert!(faults(&mut cpu, MOV_CR4_RAX, cr4 & !cr4::PAE));
}

#[test]
fn cr8_is_the_task_priority_class() {
    let mut cpu = kernel_vcpu();
    assert!(!faults(&mut cpu, MOV_CR8_RAX, 9));
    assert_eq!(cpu.shared.apic.tpr(), 0x90);
    cpu.gpr[RAX] = 0;
    execute(&mut cpu, MOV_RAX_CR8).unwrap();
    assert_eq!(cpu.gpr[RAX], 9);
    assert!(faults(&mut cpu, MOV_CR8_RAX, 0x10));
}

#[test]
fn programs_reach_no_control_register() {
    let mut cpu = user_vcpu();
    for code in [MOV_CR0_RAX, MOV_RAX_CR0, MOV_CR8_RAX, LMSW_AX, &[0x0f, 0x06]] {
        assert_eq!(fault_of(&mut cpu, code), fault());
    }
    cpu.cr4 |= cr4::UMIP;
    assert_eq!(fault_of(&mut cpu, SMSW_EAX), fault());
}

#[test]
fn lmsw_sets_pe_but_does_not_clear_it() {
    let mut cpu = kernel_vcpu();
    let cr0 = cpu.cr0;
    cpu.gpr[RAX] = 0xfff8;
    execute(&mut cpu, LMSW_AX).unwrap();
    assert_eq!(cpu.cr0, cr0 | cr0::TS);
    cpu.gpr[RAX] = u64::MAX;
    execute(&mut cpu, SMSW_EAX).unwrap();
    assert_eq!(cpu.gpr[RAX], cpu.cr0);
}

#[test]
fn xcr0_must_make_sense() {
    let mut cpu = kernel_vcpu();
    cpu.gpr[RCX] = 0;
    assert_eq!(fault_of(&mut cpu, XSETBV).vector, Vector::InvalidOpcode);
    cpu.cr4 |= cr4::OSXSAVE;
    let mask = cpu.machine.cpuid.xcr0_mask();
    for (value, good) in [
        (1, true),
        (3, true),
        (0, false),
        (2, false),
        (5, false),
        (7, mask & 4 != 0),
        (0x27, false),
        (0xe3, false),
        (0xe7, mask & 0xe0 == 0xe0),
        (1 << 18 | 3, false),
    ] {
        (cpu.gpr[RAX], cpu.gpr[RDX], cpu.gpr[RCX]) = (value, 0, 0);
        assert_eq!(execute(&mut cpu, XSETBV).is_ok(), good, "{value:#x}");
    }
    cpu.xcr0 = 3;
    execute(&mut cpu, XGETBV).unwrap();
    assert_eq!((cpu.gpr[RAX], cpu.gpr[RDX]), (3, 0));
    cpu.gpr[RCX] = 2;
    assert_eq!(fault_of(&mut cpu, XGETBV), fault());
    assert_eq!(fault_of(&mut cpu, XSETBV), fault());
}
