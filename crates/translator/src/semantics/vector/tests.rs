use super::super::testing::{BASE, read, revoke, step, vcpu, write};
use arch::Vector;
use arch::registers::{gpr, pte};

use crate::cpu::{Stop, Vcpu};
use crate::xstate::layout;

fn lanes32(values: &[u32]) -> [u8; 64] {
    let mut bytes = [0; 64];
    for (place, value) in bytes.chunks_exact_mut(4).zip(values) {
        place.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// vpgatherdd ymm1, [rax + ymm2 * 4], ymm3
const GATHER: &[u8] = &[0xc4, 0xe2, 0x65, 0x90, 0x0c, 0x90];
/// vpgatherdd zmm1 {k1}, [rax + zmm2 * 4]
const GATHER_512: &[u8] = &[0x62, 0xf2, 0x7d, 0x49, 0x90, 0x0c, 0x90];
/// vpscatterdd [rax + zmm2 * 4] {k1}, zmm1
const SCATTER_512: &[u8] = &[0x62, 0xf2, 0x7d, 0x49, 0xa0, 0x0c, 0x90];

fn gather_setup(cpu: &mut Vcpu, indices: &[u32]) {
    for i in 0..0x800u32 {
        write(cpu, BASE + 4 * u64::from(i), &(i + 0x1000).to_le_bytes());
    }
    cpu.gpr[gpr::RAX] = BASE + 0x100;
    cpu.xsave.set_vector(1, &[0xee; 64]);
    cpu.xsave.set_vector(2, &lanes32(indices));
}

#[test]
fn a_vex_gather_loads_the_selected_elements_and_clears_its_mask() {
    let mut cpu = vcpu();
    gather_setup(&mut cpu, &[1, 0xffff_fffe, 7, 9, 300, 400, 2, 3]);
    let on = 0x8000_0001;
    cpu.xsave.set_vector(3, &lanes32(&[on, on, 0, on, on, 1, on, on]));
    step(&mut cpu, GATHER).expect("mapped memory");
    let old = 0xeeee_eeee;
    let base = 0x1040;
    let expected = lanes32(&[base + 1, base - 2, old, base + 9, base + 300, old, base + 2, base + 3]);
    assert_eq!(cpu.xsave.vector(1), expected);
    assert_eq!(cpu.xsave.vector(3), [0; 64]);
}

#[test]
fn a_gather_that_faults_keeps_what_it_has_done() {
    let mut cpu = vcpu();
    gather_setup(&mut cpu, &[1, 2, 0x400, 3, 4, 5, 6, 7]);
    revoke(&mut cpu, BASE + 0x1000, pte::P);
    cpu.xsave.set_vector(3, &lanes32(&[u32::MAX; 8]));
    let Err(Stop::Fault(e)) = step(&mut cpu, GATHER) else { panic!("no fault") };
    assert_eq!((e.vector, e.fault_address), (Vector::PageFault, BASE + 0x1100));
    let value = cpu.xsave.vector(1);
    assert_eq!(value[..12], lanes32(&[0x1041, 0x1042, 0xeeee_eeee])[..12]);
    let on = u32::MAX;
    assert_eq!(cpu.xsave.vector(3), lanes32(&[0, 0, on, on, on, on, on, on]));
}

#[test]
fn evex_gathers_and_scatters_work_through_an_opmask() {
    if layout().native & arch::registers::xcr0::AVX512 == 0 {
        return;
    }
    let mut cpu = vcpu();
    let indices: Vec<u32> = (0..16).map(|i| i * 3).collect();
    gather_setup(&mut cpu, &indices);
    cpu.xsave.set_opmask(1, 0xf0f3);
    step(&mut cpu, GATHER_512).expect("mapped memory");
    let expected: Vec<u32> = (0..16).map(|i| if 0xf0f3 >> i & 1 != 0 { 0x1040 + i * 3 } else { 0xeeee_eeee }).collect();
    assert_eq!(cpu.xsave.vector(1), lanes32(&expected));
    assert_eq!(cpu.xsave.opmask(1), 0);

    // Overlapping elements: the highest one wins.
    cpu.xsave.set_vector(2, &lanes32(&[5; 16]));
    cpu.xsave.set_opmask(1, 0x00f0);
    step(&mut cpu, SCATTER_512).expect("mapped memory");
    assert_eq!(read(&cpu, BASE + 0x114, 4), expected[7].to_le_bytes());
    assert_eq!(cpu.xsave.opmask(1), 0);
}

#[test]
fn vector_instructions_need_their_state_enabled() {
    let mut cpu = vcpu();
    cpu.cr0 |= arch::registers::cr0::TS;
    assert_eq!(step(&mut cpu, GATHER), Err(Stop::Fault(arch::Exception::device_not_available())));
    cpu.xcr0 = 3;
    assert_eq!(step(&mut cpu, GATHER), Err(Stop::Fault(arch::Exception::invalid_opcode())));
}

#[test]
fn maskmovdqu_stores_only_selected_bytes_and_faults_only_for_them() {
    let mut cpu = vcpu();
    revoke(&mut cpu, BASE + 0x1000, pte::P);
    write(&mut cpu, BASE + 0xff0, &[0x11; 16]);
    cpu.gpr[gpr::RDI] = BASE + 0xff8;
    let data: [u8; 64] = std::array::from_fn(|i| i as u8 + 0x40);
    cpu.xsave.set_vector(1, &data);
    let mut selector = [0; 64];
    selector[..8].copy_from_slice(&[0x80, 0, 0xff, 0xff, 0, 0x7f, 0, 0x80]);
    cpu.xsave.set_vector(2, &selector);
    // maskmovdqu xmm1, xmm2
    let maskmovdqu: &[u8] = &[0x66, 0x0f, 0xf7, 0xca];
    step(&mut cpu, maskmovdqu).expect("the selected bytes are mapped");
    assert_eq!(read(&cpu, BASE + 0xff8, 8), [0x40, 0x11, 0x42, 0x43, 0x11, 0x11, 0x11, 0x47]);
    selector[8] = 0x80;
    cpu.xsave.set_vector(2, &selector);
    write(&mut cpu, BASE + 0xff0, &[0x11; 16]);
    let Err(Stop::Fault(e)) = step(&mut cpu, maskmovdqu) else { panic!("no fault") };
    assert_eq!((e.fault_address, e.error_code), (BASE + 0x1000, 6));
    assert_eq!(read(&cpu, BASE + 0xff0, 16), [0x11; 16]);
}

#[test]
fn maskmovq_enters_mmx_state() {
    let mut cpu = vcpu();
    cpu.xsave.set_x87_words(0x37f, 3 << 11);
    let registers: [[u8; 10]; 8] = std::array::from_fn(|i| [i as u8 + 1; 10]);
    for (i, r) in registers.iter().enumerate() {
        cpu.xsave.set_x87_physical(i, r);
    }
    cpu.xsave.set_x87_physical(2, &[0x80; 10]);
    cpu.gpr[gpr::RDI] = BASE;
    // maskmovq mm1, mm2
    step(&mut cpu, &[0x0f, 0xf7, 0xca]).expect("mapped memory");
    assert_eq!(read(&cpu, BASE, 9), [2, 2, 2, 2, 2, 2, 2, 2, 0]);
    assert_eq!((cpu.xsave.fsw() >> 11 & 7, cpu.xsave.ftw()), (0, 0xff));
    assert_eq!(cpu.xsave.x87_physical(5), registers[5]);
}

#[test]
fn movdir64b_copies_64_bytes_to_an_aligned_address() {
    let mut cpu = vcpu();
    let data: Vec<u8> = (0..64).collect();
    write(&mut cpu, BASE + 0x1fe1, &data);
    cpu.gpr[gpr::RAX] = BASE + 0x1fe1;
    cpu.gpr[gpr::RBX] = BASE + 0x40;
    // movdir64b rbx, [rax]
    let movdir64b: &[u8] = &[0x66, 0x0f, 0x38, 0xf8, 0x18];
    step(&mut cpu, movdir64b).expect("mapped memory");
    assert_eq!(read(&cpu, BASE + 0x40, 64), data);
    cpu.gpr[gpr::RBX] = BASE + 0x41;
    assert_eq!(step(&mut cpu, movdir64b), Err(Stop::Fault(arch::Exception::general_protection(0))));
}
