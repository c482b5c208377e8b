//! Where AMD's processors differ from Intel's: what each instruction does for vCPUs of either, on any host.

use arch::registers::{cr0, gpr, pte, rflags, xcr0};
use arch::{Exception, Segment, SegmentRegister, Vector};

use super::testing::{BASE, Vendor, read, revoke, step, vcpu_of, write};
use crate::codegen::classify::{Kind, classify, operand_size};
use crate::cpu::{Stop, Vcpu};
use crate::mode::Mode;
use crate::testing::{KERNEL_CS, RIP, USER_CS32, USER_SS, fault_of, kernel_vcpu_of, peek, poke};
use crate::vcpu::VcpuBox;
use crate::xstate::{HEADER, layout, legacy};

/// A program's vCPU in 32-bit code.
fn vcpu32_of(vendor: Vendor) -> VcpuBox {
    let mut cpu = vcpu_of(vendor);
    cpu.segments[SegmentRegister::Cs as usize] = Segment::flat_code(USER_CS32, false, 3);
    for register in [SegmentRegister::Ds, SegmentRegister::Es, SegmentRegister::Ss] {
        cpu.segments[register as usize] = Segment::flat_data(USER_SS, 3);
    }
    cpu
}

fn page_fault(address: u64) -> (Vector, u64) {
    (Vector::PageFault, address)
}

/// Vector and address of the page fault that an instruction raises, or the vector of another fault.
fn vector_of(cpu: &mut Vcpu, bytes: &[u8]) -> (Vector, u64) {
    let fault = fault_of(cpu, bytes);
    (fault.vector, if fault.vector == Vector::PageFault { fault.fault_address } else { 0 })
}

#[test]
fn near_branches_of_64_bit_code_obey_the_operand_size_prefix_on_amd() {
    // JMP over A000H bytes, to what does not fit into 16 bits.
    for (vendor, bytes, target) in [
        (Vendor::Intel, &[0x66, 0xe9, 0x00, 0xa0, 0, 0][..], RIP + 6 + 0xa000),
        (Vendor::Amd, &[0x66, 0xe9, 0x00, 0xa0], (RIP + 4 + 0xa000) & 0xffff),
    ] {
        let mut cpu = vcpu_of(vendor);
        step(&mut cpu, bytes).unwrap();
        assert_eq!(cpu.rip, target, "{vendor:?}");
    }
    // RET, and CALL of R8.
    for (vendor, size, target) in [(Vendor::Intel, 8, 0x1234_5678), (Vendor::Amd, 2, 0x5678)] {
        let mut cpu = vcpu_of(vendor);
        let rsp = cpu.gpr[gpr::RSP];
        poke(&mut cpu, rsp, 0x1234_5678);
        step(&mut cpu, &[0x66, 0xc3]).unwrap();
        assert_eq!((cpu.rip, cpu.gpr[gpr::RSP]), (target, rsp + size), "{vendor:?}");
        cpu.gpr[gpr::RSP] = rsp;
        cpu.gpr[8] = 0x1234_5678;
        step(&mut cpu, &[0x66, 0x41, 0xff, 0xd0]).unwrap();
        assert_eq!((cpu.rip, cpu.gpr[gpr::RSP]), (target, rsp - size), "{vendor:?}");
    }
}

#[test]
fn emitted_code_leaves_16_bit_branches_of_64_bit_code_to_rust() {
    let kind = |vendor: Vendor, bytes: &[u8]| {
        let mode = Mode::of(&kernel_vcpu_of(vendor));
        let insn = crate::access::decode(bytes, mode, RIP);
        (classify(&insn, mode, true), insn.len())
    };
    // JNE with the prefix, of 16 bits to one and of 32 to the other, and what both have alike.
    let jne: &[u8] = &[0x66, 0x0f, 0x85, 0, 0, 0, 0];
    assert!(matches!(kind(Vendor::Intel, jne), (Kind::Branch, 7)));
    assert!(matches!(kind(Vendor::Amd, jne), (Kind::Sensitive(_, true), 5)));
    for vendor in Vendor::ALL {
        assert!(matches!(kind(vendor, &[0x0f, 0x85, 0, 0, 0, 0]), (Kind::Branch, 6)), "{vendor:?}");
        // REX.W is stronger, as where linkers pad calls of __tls_get_addr.
        assert!(matches!(kind(vendor, &[0x66, 0x48, 0xe8, 0, 0, 0, 0]), (Kind::Branch, 7)), "{vendor:?}");
    }
}

#[test]
fn a_prefetch_needs_memory_on_amd() {
    let kind = |vendor: Vendor, modrm: u8| {
        let mode = Mode::of(&kernel_vcpu_of(vendor));
        classify(&crate::access::decode(&[0x0f, 0x0d, modrm], mode, RIP), mode, true)
    };
    assert!(matches!(kind(Vendor::Intel, 0xc8), Kind::Skip));
    assert!(matches!(kind(Vendor::Amd, 0xc8), Kind::Sensitive(_, true)));
    for vendor in Vendor::ALL {
        assert!(matches!(kind(vendor, 0x08), Kind::Skip), "{vendor:?}");
    }
}

/// What the host reads, since it executes the instruction itself.
#[test]
fn movsxd_of_16_bits_has_as_much_checked_as_the_host_reads() {
    let mode = Mode::of(&kernel_vcpu_of(Vendor::of_host()));
    let insn = crate::access::decode(&[0x66, 0x63, 0x06], mode, RIP);
    assert_eq!(operand_size(&insn), if crate::host_is_amd() { 4 } else { 2 });
}

#[test]
fn sysret_and_sysexit_of_programs_are_protection_faults_on_amd() {
    let (sysretd, sysexit): (&[u8], &[u8]) = (&[0x0f, 0x07], &[0x0f, 0x35]);
    for (vendor, expected) in
        [(Vendor::Intel, Exception::invalid_opcode()), (Vendor::Amd, Exception::general_protection(0))]
    {
        let mut cpu = vcpu32_of(vendor);
        assert_eq!(fault_of(&mut cpu, sysretd), expected, "{vendor:?}");
        assert_eq!(fault_of(&mut cpu, sysexit), Exception::general_protection(0), "{vendor:?}");
    }
    let mut kernel = kernel_vcpu_of(Vendor::Amd);
    assert_eq!(fault_of(&mut kernel, sysexit), Exception::invalid_opcode());
}

#[test]
fn a_far_return_to_another_level_reads_the_other_stack_first_on_amd() {
    let next = BASE + 0x2000;
    for (vendor, expected) in [(Vendor::Intel, (Vector::GeneralProtection, 0)), (Vendor::Amd, page_fault(next + 8))] {
        let mut cpu = vcpu_of(vendor);
        revoke(&mut cpu, next, pte::P);
        // RETF with 64-bit operands: to level 0, which is refused.
        cpu.gpr[gpr::RSP] = next - 16;
        poke(&mut cpu, next - 8, KERNEL_CS.into());
        assert_eq!(vector_of(&mut cpu, &[0x48, 0xcb]), expected, "{vendor:?}");
    }
}

#[test]
fn iret_reads_all_of_its_frame_first_on_amd() {
    let next = BASE + 0x2000;
    for (vendor, expected) in [(Vendor::Intel, (Vector::GeneralProtection, 0)), (Vendor::Amd, page_fault(next + 8))] {
        let mut cpu = vcpu_of(vendor);
        revoke(&mut cpu, next, pte::P);
        cpu.gpr[gpr::RSP] = next - 24;
        poke(&mut cpu, next - 16, KERNEL_CS.into());
        assert_eq!(vector_of(&mut cpu, &[0x48, 0xcf]), expected, "{vendor:?}");
    }
}

#[test]
fn bound_reads_both_bounds_on_amd() {
    let next = BASE + 0x2000;
    for (vendor, expected) in [(Vendor::Intel, (Vector::BoundRange, 0)), (Vendor::Amd, page_fault(next))] {
        let mut cpu = vcpu32_of(vendor);
        revoke(&mut cpu, next, pte::P);
        // BOUND EAX, [EBX]: below the lower bound.
        write(&mut cpu, next - 4, &5u32.to_le_bytes());
        (cpu.gpr[gpr::RAX], cpu.gpr[gpr::RBX]) = (1, next - 4);
        assert_eq!(vector_of(&mut cpu, &[0x62, 0x03]), expected, "{vendor:?}");
    }
}

#[test]
fn a_step_between_comparisons_shows_their_flags_and_no_rf_on_amd() {
    for (vendor, expected) in [(Vendor::Intel, rflags::RF), (Vendor::Amd, rflags::CF)] {
        let mut cpu = vcpu_of(vendor);
        // REPNE SCASB for 1, where there is 2.
        write(&mut cpu, BASE, &[2; 8]);
        cpu.rflags = rflags::FIXED | rflags::TF;
        (cpu.gpr[gpr::RAX], cpu.gpr[gpr::RCX], cpu.gpr[gpr::RDI]) = (1, 8, BASE);
        step(&mut cpu, &[0xf2, 0xae]).unwrap();
        assert_eq!((cpu.rip, cpu.gpr[gpr::RCX]), (RIP, 7));
        assert_eq!(cpu.rflags & (rflags::RF | rflags::CF), expected, "{vendor:?}");
    }
}

#[test]
fn a_gather_that_faults_leaves_what_is_not_done_as_it_was_on_amd() {
    if layout().native & xcr0::AVX == 0 {
        return;
    }
    for vendor in Vendor::ALL {
        let mut cpu = vcpu_of(vendor);
        revoke(&mut cpu, BASE + 0x2000, pte::P);
        cpu.gpr[gpr::RBX] = BASE;
        write(&mut cpu, BASE, &7u64.to_le_bytes());
        // VPGATHERQQ XMM1, [RBX + XMM2], XMM3: the second of two elements can't be read.
        let mut values = [[0; 64]; 3];
        values[0].fill(0x11);
        values[1][8..16].copy_from_slice(&0x2000u64.to_le_bytes());
        values[2][..16].fill(0x99);
        values[2][16..32].fill(0x44);
        for (i, value) in values.iter().enumerate() {
            cpu.xsave.set_vector(i + 1, value);
        }
        let fault = fault_of(&mut cpu, &[0xc4, 0xe2, 0xe1, 0x91, 0x0c, 0x13]);
        assert_eq!((fault.vector, fault.fault_address), page_fault(BASE + 0x2000));
        let (data, mask) = (cpu.xsave.vector(1), cpu.xsave.vector(3));
        assert_eq!((&data[..8], &mask[..8]), (&7u64.to_le_bytes()[..], &[0; 8][..]), "{vendor:?}");
        let (rest, above, data_above) = match vendor {
            Vendor::Intel => ([0xff; 8], [0; 16], [0; 16]),
            Vendor::Amd => ([0x99; 8], [0x44; 16], [0x11; 16]),
        };
        assert_eq!(
            (&mask[8..16], &mask[16..32], &data[16..32]),
            (&rest[..], &above[..], &data_above[..]),
            "{vendor:?}"
        );
    }
}

#[test]
fn saved_areas_have_x87s_pointers_only_with_a_pending_exception_on_amd() {
    let pointers = |vendor: Vendor, words: (u16, u16)| {
        let mut cpu = vcpu_of(vendor);
        cpu.gpr[gpr::RBX] = BASE;
        // Bit 56 is the sign.
        let mut area = [0; 512];
        area[..2].copy_from_slice(&words.0.to_le_bytes());
        area[2..4].copy_from_slice(&words.1.to_le_bytes());
        area[legacy::FOP..legacy::FOP + 2].copy_from_slice(&0x123u16.to_le_bytes());
        area[legacy::FIP..legacy::FIP + 8].copy_from_slice(&0x4567u64.to_le_bytes());
        area[legacy::FDP..legacy::FDP + 8].copy_from_slice(&0x0100_0000_0000_89abu64.to_le_bytes());
        area[legacy::MXCSR..legacy::MXCSR + 4].copy_from_slice(&0x1f80u32.to_le_bytes());
        write(&mut cpu, BASE, &area);
        // FXRSTOR64, FXSAVE64
        step(&mut cpu, &[0x48, 0x0f, 0xae, 0x0b]).unwrap();
        step(&mut cpu, &[0x48, 0x0f, 0xae, 0x03]).unwrap();
        let saved = read(&cpu, BASE, 24);
        (saved[legacy::FOP], peek(&cpu, BASE + legacy::FIP as u64), peek(&cpu, BASE + legacy::FDP as u64))
    };
    let (masked, pending) = ((0x37f, 0), (0x37e, 0x8081));
    let all = (0x23, 0x4567, 0x0100_0000_0000_89ab);
    assert_eq!([pointers(Vendor::Intel, masked), pointers(Vendor::Intel, pending)], [all, all]);
    let extended = (0x23, 0x4567, 0xff00_0000_0000_89ab);
    assert_eq!([pointers(Vendor::Amd, masked), pointers(Vendor::Amd, pending)], [(0, 0, 0), extended]);
}

#[test]
fn registers_of_64_bit_code_are_in_use_to_others_too_on_amd() {
    if layout().native & xcr0::HI16_ZMM == 0 {
        return;
    }
    for (vendor, expected) in [(Vendor::Intel, 0), (Vendor::Amd, xcr0::HI16_ZMM)] {
        let mut cpu = vcpu32_of(vendor);
        cpu.xsave.set_vector(20, &[1; 64]);
        write(&mut cpu, BASE, &[0; 1024]);
        (cpu.gpr[gpr::RAX], cpu.gpr[gpr::RDX], cpu.gpr[gpr::RBX]) = (xcr0::HI16_ZMM, 0, BASE);
        step(&mut cpu, &[0x0f, 0xae, 0x23]).unwrap();
        assert_eq!(peek(&cpu, BASE + HEADER as u64), expected, "{vendor:?}");
    }
}

#[test]
fn an_area_that_is_not_aligned_is_a_protection_fault_first_on_amd() {
    for (vendor, expected) in
        [(Vendor::Intel, Exception::new(Vector::AlignmentCheck)), (Vendor::Amd, Exception::general_protection(0))]
    {
        let mut cpu = vcpu_of(vendor);
        cpu.cr0 |= cr0::AM;
        cpu.rflags |= rflags::AC;
        cpu.gpr[gpr::RBX] = BASE + 1;
        assert_eq!(step(&mut cpu, &[0x0f, 0xae, 0x23]), Err(Stop::Fault(expected)), "{vendor:?}");
    }
}
