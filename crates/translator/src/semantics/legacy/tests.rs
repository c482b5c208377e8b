use super::super::testing::{BASE, read, revoke, step, vcpu, write};
use super::*;
use crate::vcpu::VcpuBox;
use arch::registers::pte;
use arch::state::Segment;

/// A 32-bit program.
fn vcpu32() -> VcpuBox {
    let mut cpu = vcpu();
    cpu.segments = [Segment::flat_data(0x23, 3); 6];
    cpu.segments[1] = Segment::flat_code(0x1b, false, 3);
    cpu.gpr = [0; 16];
    cpu.gpr[gpr::RSP] = BASE + 0x8000;
    cpu
}

fn adjusted(cpu: &mut Vcpu, opcode: &[u8], ax: u64, flags: u64) -> (u64, u64) {
    cpu.gpr[gpr::RAX] = ax;
    cpu.rflags = 2 | flags;
    step(cpu, opcode).expect("no memory is accessed");
    (cpu.gpr[gpr::RAX], cpu.rflags & rflags::ARITHMETIC)
}

#[test]
fn decimal_adjustments_follow_the_manual_s_examples() {
    let mut cpu = vcpu32();
    // ADD AL, BL with 79H + 35H, then DAA; SUB with 35H - 47H, then DAS (Intel SDM 2A).
    assert_eq!(
        adjusted(&mut cpu, &[0x27], 0xae, rflags::SF | rflags::PF),
        (0x14, rflags::CF | rflags::AF | rflags::PF)
    );
    let (value, flags) = adjusted(&mut cpu, &[0x2f], 0xee, rflags::CF | rflags::AF | rflags::SF);
    assert_eq!((value, flags & (rflags::CF | rflags::AF)), (0x88, rflags::CF | rflags::AF));
    assert_eq!(adjusted(&mut cpu, &[0x37], 0x050b, 0), (0x0601, rflags::AF | rflags::CF));
    assert_eq!(adjusted(&mut cpu, &[0x3f], 0x0203, rflags::AF), (0x000d, rflags::AF | rflags::CF));
    assert_eq!(adjusted(&mut cpu, &[0xd4, 10], 63, 0).0, 0x0603);
    assert_eq!(adjusted(&mut cpu, &[0xd5, 10], 0x0603, 0).0, 63);
    assert_eq!(adjusted(&mut cpu, &[0xd6], 0x1200, rflags::CF).0, 0x12ff);
    assert_eq!(step(&mut cpu, &[0xd4, 0]), Err(Stop::Fault(Exception::new(Vector::DivideError))));
}

#[test]
fn every_daa_and_das_makes_decimal_sums_and_differences() {
    let mut cpu = vcpu32();
    for (a, b) in (0..100u64).flat_map(|a| (0..100u64).map(move |b| (a, b))) {
        let bcd = |v: u64| ((v / 10) << 4) | (v % 10);
        let (x, y) = (bcd(a), bcd(b));
        let half = |carry: bool| if carry { rflags::AF } else { 0 };
        let carry = |carry: bool| if carry { rflags::CF } else { 0 };
        let sum = adjusted(&mut cpu, &[0x27], (x + y) & 0xff, half((x & 15) + (y & 15) > 15) | carry(x + y > 255));
        assert_eq!((sum.0, sum.1 & rflags::CF != 0), (bcd((a + b) % 100), a + b > 99), "{a} + {b}");
        let difference = adjusted(&mut cpu, &[0x2f], x.wrapping_sub(y) & 0xff, half(x & 15 < y & 15) | carry(x < y));
        assert_eq!((difference.0, difference.1 & rflags::CF != 0), (bcd((100 + a - b) % 100), a < b), "{a} - {b}");
    }
}

#[test]
fn popa_takes_back_what_pusha_stored_except_the_stack_pointer() {
    let mut cpu = vcpu32();
    for i in (0..8).filter(|&i| i != gpr::RSP) {
        cpu.gpr[i] = 0x1111_0000 + i as u64;
    }
    let before = cpu.gpr;
    step(&mut cpu, &[0x60]).expect("mapped memory");
    assert_eq!(cpu.gpr[gpr::RSP], BASE + 0x7fe0);
    assert_eq!(read(&cpu, BASE + 0x7fec, 4), ((BASE + 0x8000) as u32).to_le_bytes());
    assert_eq!(read(&cpu, BASE + 0x7ffc, 4), 0x1111_0000u32.to_le_bytes());
    cpu.gpr[..4].fill(0);
    cpu.gpr[5..8].fill(0);
    step(&mut cpu, &[0x61]).expect("mapped memory");
    assert_eq!(cpu.gpr, before);
    // popaw keeps upper halves.
    cpu.gpr[gpr::RAX] = 0xaaaa_bbbb;
    cpu.gpr[gpr::RSP] = BASE + 0x4000;
    step(&mut cpu, &[0x66, 0x61]).expect("mapped memory");
    assert_eq!((cpu.gpr[gpr::RAX], cpu.gpr[gpr::RSP]), (0xaaaa_0000, BASE + 0x4010));
}

#[test]
fn bound_compares_signed() {
    let mut cpu = vcpu32();
    let mut bounds = (-5i32).to_le_bytes().to_vec();
    bounds.extend(7i32.to_le_bytes());
    write(&mut cpu, BASE, &bounds);
    cpu.gpr[gpr::RBX] = BASE;
    for (index, inside) in [(-6i32, false), (-5, true), (0, true), (7, true), (8, false)] {
        cpu.gpr[gpr::RAX] = u64::from(index as u32);
        let result = step(&mut cpu, &[0x62, 0x03]);
        let outside = Err(Stop::Fault(Exception::new(Vector::BoundRange)));
        assert_eq!(result, if inside { Ok(()) } else { outside }, "{index}");
    }
}

#[test]
fn arpl_raises_the_rpl_only() {
    let mut cpu = vcpu32();
    cpu.gpr[gpr::RAX] = 0x99_0010;
    cpu.gpr[gpr::RCX] = 3;
    step(&mut cpu, &[0x63, 0xc8]).expect("protected mode");
    assert_eq!((cpu.gpr[gpr::RAX], cpu.rflags & rflags::ZF), (0x99_0013, rflags::ZF));
    step(&mut cpu, &[0x63, 0xc8]).expect("protected mode");
    assert_eq!((cpu.gpr[gpr::RAX], cpu.rflags & rflags::ZF), (0x99_0013, 0));
}

#[test]
fn enter_makes_a_frame_with_the_display_of_its_level() {
    let mut cpu = vcpu();
    let (old_frame, top) = (BASE + 0x7f00, BASE + 0x6000);
    write(&mut cpu, old_frame - 16, &[0x22; 8]);
    write(&mut cpu, old_frame - 8, &[0x11; 8]);
    cpu.gpr[gpr::RBP] = old_frame;
    cpu.gpr[gpr::RSP] = top;
    // enter 0x20, 3
    step(&mut cpu, &[0xc8, 0x20, 0, 3]).expect("mapped memory");
    assert_eq!(cpu.gpr[gpr::RBP], top - 8);
    assert_eq!(cpu.gpr[gpr::RSP], top - 8 - 24 - 0x20);
    assert_eq!(read(&cpu, top - 8, 8), old_frame.to_le_bytes());
    assert_eq!(read(&cpu, top - 16, 8), [0x11; 8]);
    assert_eq!(read(&cpu, top - 24, 8), [0x22; 8]);
    assert_eq!(read(&cpu, top - 32, 8), (top - 8).to_le_bytes());
}

#[test]
fn enter_faults_where_its_new_stack_pointer_can_not_be_written() {
    let mut cpu = vcpu();
    revoke(&mut cpu, BASE + 0x4000, pte::W);
    cpu.gpr[gpr::RSP] = BASE + 0x5100;
    let before = cpu.gpr;
    // enter 0x200, 0
    let Err(Stop::Fault(e)) = step(&mut cpu, &[0xc8, 0, 2, 0]) else { panic!("no fault") };
    assert_eq!((e.vector, e.error_code), (Vector::PageFault, 7));
    assert_eq!(cpu.gpr, before);
}
