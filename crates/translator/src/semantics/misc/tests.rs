//! Clocks, ids, keys, and what does not exist.

use super::*;
use crate::testing::{execute, fault_of, kernel_vcpu, user_vcpu};
use arch::Vector;
use arch::registers::gpr::{RAX, RCX, RDX};

const RDTSC: &[u8] = &[0x0f, 0x31];
const RDTSCP: &[u8] = &[0x0f, 0x01, 0xf9];
const RDPID_RAX: &[u8] = &[0xf3, 0x0f, 0xc7, 0xf8];
const WRPKRU: &[u8] = &[0x0f, 0x01, 0xef];
const RDPKRU: &[u8] = &[0x0f, 0x01, 0xee];

#[test]
fn the_time_stamp_moves_on_and_can_be_withheld_from_programs() {
    let mut cpu = user_vcpu();
    execute(&mut cpu, RDTSC).unwrap();
    let first = cpu.gpr[RDX] << 32 | cpu.gpr[RAX];
    execute(&mut cpu, RDTSC).unwrap();
    assert!(cpu.gpr[RDX] << 32 | cpu.gpr[RAX] >= first);
    cpu.cr4 |= cr4::TSD;
    assert_eq!(fault_of(&mut cpu, RDTSC), Exception::general_protection(0));
    let mut kernel = kernel_vcpu();
    kernel.cr4 |= cr4::TSD;
    execute(&mut kernel, RDTSC).unwrap();
}

#[test]
fn tsc_aux_names_the_processor() {
    let mut cpu = user_vcpu();
    cpu.msrs.tsc_aux = 0x1007;
    execute(&mut cpu, RDTSCP).unwrap();
    assert_eq!(cpu.gpr[RCX], 0x1007);
    execute(&mut cpu, RDPID_RAX).unwrap();
    assert_eq!(cpu.gpr[RAX], 0x1007);
}

/// Linux executes it wherever CPUID names it, when it has patched its own code.
#[test]
fn serialize_needs_no_host_that_has_it() {
    execute(&mut user_vcpu(), &[0x0f, 0x01, 0xe8]).unwrap();
}

#[test]
fn hlt_stops_the_kernel_and_faults_in_programs() {
    let mut cpu = kernel_vcpu();
    execute(&mut cpu, &[0xf4]).unwrap();
    assert_eq!(cpu.activity, Activity::Halted);
    assert_eq!(fault_of(&mut user_vcpu(), &[0xf4]), Exception::general_protection(0));
}

#[test]
fn protection_keys_need_cr4_and_clear_operands() {
    let mut cpu = user_vcpu();
    assert_eq!(fault_of(&mut cpu, RDPKRU).vector, Vector::InvalidOpcode);
    cpu.cr4 |= cr4::PKE;
    (cpu.gpr[RAX], cpu.gpr[RCX], cpu.gpr[RDX]) = (0x5555_5554, 0, 0);
    execute(&mut cpu, WRPKRU).unwrap();
    assert_eq!(cpu.pkru, 0x5555_5554);
    cpu.gpr[RDX] = 1;
    assert_eq!(fault_of(&mut cpu, WRPKRU), Exception::general_protection(0));
    execute(&mut cpu, RDPKRU).unwrap();
    assert_eq!((cpu.gpr[RAX], cpu.gpr[RDX]), (0x5555_5554, 0));
    cpu.gpr[RCX] = 1;
    assert_eq!(fault_of(&mut cpu, RDPKRU), Exception::general_protection(0));
}

#[test]
fn what_the_model_lacks_is_undefined() {
    let mut cpu = kernel_vcpu();
    let absent: &[&[u8]] = &[
        &[0x0f, 0x0b],             // ud2
        &[0x0f, 0xb9, 0xc0],       // ud1
        &[0x0f, 0xff, 0xc0],       // ud0
        &[0x0f, 0x01, 0xc8],       // monitor
        &[0x0f, 0x01, 0xc9],       // mwait
        &[0x0f, 0x01, 0xc2],       // vmlaunch
        &[0xf3, 0x0f, 0xc7, 0x30], // vmxon
        &[0x0f, 0x78, 0xc0],       // vmread
        &[0x0f, 0x01, 0xd8],       // vmrun
        &[0x0f, 0x37],             // getsec
        &[0x0f, 0x01, 0xd5],       // xend
        &[0x66, 0x0f, 0xae, 0xf0], // tpause
    ];
    for code in absent {
        assert_eq!(fault_of(&mut cpu, code).vector, Vector::InvalidOpcode, "{code:x?}");
    }
}

#[test]
fn hypercalls_are_unknown() {
    let mut cpu = kernel_vcpu();
    execute(&mut cpu, &[0x0f, 0x01, 0xc1]).unwrap();
    assert_eq!(cpu.gpr[RAX] as i64, -1000);
    let mut cpu = user_vcpu();
    execute(&mut cpu, &[0x0f, 0x01, 0xd9]).unwrap();
    assert_eq!(cpu.gpr[RAX] as i64, -1);
}

#[test]
fn cpuid_answers_from_the_model_with_the_vcpus_state() {
    const CPUID: &[u8] = &[0x0f, 0xa2];
    let mut cpu = user_vcpu();
    cpu.gpr[RAX] = 0x4000_0000;
    execute(&mut cpu, CPUID).unwrap();
    assert_eq!(cpu.gpr[arch::registers::gpr::RBX], u64::from(u32::from_le_bytes(*b"KVMK")));
    for (osxsave, bit) in [(0, 0), (cr4::OSXSAVE, 1 << 27)] {
        cpu.cr4 = cpu.cr4 & !cr4::OSXSAVE | osxsave;
        (cpu.gpr[RAX], cpu.gpr[RCX]) = (1, 0);
        execute(&mut cpu, CPUID).unwrap();
        assert_eq!(cpu.gpr[RCX] & 1 << 27, bit);
    }
}
