use super::super::testing::{BASE, read, revoke, step, vcpu, write};
use super::*;
use arch::Vector;
use arch::registers::{gpr, pte};

/// lock bts [rax], rcx
const LOCK_BTS: &[u8] = &[0xf0, 0x48, 0x0f, 0xab, 0x08];
/// btr [rax], ecx
const BTR: &[u8] = &[0x0f, 0xb3, 0x08];
/// btc [rax], cx
const BTC: &[u8] = &[0x66, 0x0f, 0xbb, 0x08];
/// bt [rax], rcx
const BT: &[u8] = &[0x48, 0x0f, 0xa3, 0x08];

fn carry(cpu: &Vcpu) -> bool {
    cpu.rflags & rflags::CF != 0
}

#[test]
fn bit_numbers_are_signed_and_reach_beyond_the_operand() {
    let mut cpu = vcpu();
    cpu.gpr[gpr::RAX] = BASE + 0x1000;
    cpu.gpr[gpr::RCX] = 8 * 0x123 + 5;
    step(&mut cpu, LOCK_BTS).expect("mapped memory");
    assert!(!carry(&cpu));
    assert_eq!(read(&cpu, BASE + 0x1123, 1), [0x20]);
    step(&mut cpu, BT).expect("mapped memory");
    assert!(carry(&cpu));

    cpu.gpr[gpr::RCX] = -3i64 as u64;
    step(&mut cpu, LOCK_BTS).expect("mapped memory");
    assert_eq!(read(&cpu, BASE + 0xfff, 1), [0x20]);
    // As a 32-bit number, whatever is above it.
    cpu.gpr[gpr::RCX] = 0x1234_5678_ffff_fffd;
    step(&mut cpu, BTR).expect("mapped memory");
    assert!(carry(&cpu));
    assert_eq!(read(&cpu, BASE + 0xfff, 1), [0]);
    cpu.gpr[gpr::RCX] = 0x8000;
    step(&mut cpu, BTC).expect("mapped memory");
    assert!(!carry(&cpu));
    assert_eq!(read(&cpu, BASE, 1), [1]);
}

#[test]
fn the_word_that_holds_the_bit_is_checked_as_a_write() {
    let mut cpu = vcpu();
    revoke(&mut cpu, BASE + 0x1000, pte::W);
    write(&mut cpu, BASE + 0x1000, &[0xff; 8]);
    cpu.gpr[gpr::RAX] = BASE + 0xffc;
    cpu.gpr[gpr::RCX] = 0;
    step(&mut cpu, BT).expect("a read");
    // The bit is in the first page, the 64-bit word reaches into the second.
    let Err(Stop::Fault(e)) = step(&mut cpu, LOCK_BTS) else { panic!("no fault") };
    assert_eq!((e.vector, e.error_code, e.fault_address), (Vector::PageFault, 7, BASE + 0x1000));
    assert_eq!(read(&cpu, BASE + 0xffc, 1), [0]);
    // btr's 32-bit word does not.
    step(&mut cpu, BTR).expect("the first page can be written");
}

#[test]
fn addresses_wrap_at_the_address_size() {
    let mut cpu = vcpu();
    // bts [eax + 0xffffffff], rcx: with 67H the sum has 32 bits.
    cpu.gpr[gpr::RAX] = BASE + 0x2001;
    cpu.gpr[gpr::RCX] = 0;
    step(&mut cpu, &[0x67, 0x48, 0x0f, 0xab, 0x48, 0xff]).expect("mapped memory");
    assert_eq!(read(&cpu, BASE + 0x2000, 1), [1]);
}
