//! Paging and segmentation as programs meet them.

use arch::exception::pf;
use arch::registers::{cr0, cr4, efer, pte, rflags};
use arch::{Exception, Segment, SegmentRegister, Vector};

use super::walk::{Peeks, peek as peek_page};
use super::{Access, is_canonical, walk};
use crate::cpu::{Context, Vcpu};
use crate::testing::{PD, PDPT, PML4, PT, USER, USER_PT, kernel_vcpu, peek, poke, test_vcpu, user_vcpu};

fn code(cpu: &mut Vcpu, va: u64, access: Access, context: Context) -> u32 {
    let e = walk(cpu, va, access, context).unwrap_err();
    assert_eq!((e.vector, e.fault_address), (Vector::PageFault, va));
    e.error_code
}

#[test]
fn a_read_sets_accessed_bits_and_a_write_the_dirty_bit() {
    let mut cpu = kernel_vcpu();
    let mapping = walk(&mut cpu, 0x7123, Access::Read, Context::SupervisorUser).unwrap();
    assert_eq!((mapping.gpa, mapping.writable, mapping.user, mapping.large), (0x7123, false, false, false));
    for entry in [PML4, PDPT, PD, PT + 7 * 8] {
        assert_eq!(peek(&cpu, entry) & (pte::A | pte::D), pte::A);
    }
    assert!(walk(&mut cpu, 0x7123, Access::Write, Context::SupervisorUser).unwrap().writable);
    assert_eq!(peek(&cpu, PT + 7 * 8) & (pte::A | pte::D), pte::A | pte::D);
    assert_eq!(peek(&cpu, PD) & pte::D, 0);
    assert!(walk(&mut cpu, 0x7123, Access::Read, Context::SupervisorUser).unwrap().writable);
}

#[test]
fn a_walk_that_faults_sets_no_bits() {
    let mut cpu = kernel_vcpu();
    assert_eq!(code(&mut cpu, 0x7123, Access::Write, Context::User), pf::PRESENT | pf::WRITE | pf::USER);
    assert_eq!(peek(&cpu, PT + 7 * 8) & (pte::A | pte::D), 0);
    assert_eq!(peek(&cpu, PML4) & pte::A, 0);
}

#[test]
fn large_pages_map_2_mib() {
    let mut cpu = kernel_vcpu();
    let mapping = walk(&mut cpu, 0x41_2345, Access::Write, Context::SupervisorUser).unwrap();
    assert_eq!((mapping.gpa, mapping.large), (0x41_2345, true));
    assert_eq!(peek(&cpu, PD + 16) & pte::D, pte::D);
    poke(&mut cpu, PDPT + 8, pte::P | pte::W | pte::PS);
    let mapping = walk(&mut cpu, 0x4012_3456, Access::Read, Context::SupervisorUser).unwrap();
    assert_eq!((mapping.gpa, mapping.large), (0x12_3456, true));
}

#[test]
fn pages_in_a_row_are_peeked_at_as_each_alone_is() {
    let mut cpu = user_vcpu();
    let entries = [
        0x20_4000 | pte::P | pte::U | pte::A,
        0x20_8000 | pte::P | pte::U | pte::A,
        0x20_9000 | pte::P | pte::U | pte::A | pte::W | pte::D,
        0x20_a000 | pte::P | pte::U | pte::A | pte::W,
        0x20_b000 | pte::P | pte::U | pte::W,
        0x20_c000 | pte::P | pte::A,
        0,
        0x20_d000 | pte::P | pte::U | pte::A,
        0x20_e000 | pte::P | pte::U | pte::A | 1 << 51,
        0x20_f000 | pte::P | pte::U | pte::A | pte::NX,
    ];
    for (n, entry) in (1..).zip(entries) {
        poke(&mut cpu, USER_PT + n * 8, entry);
    }
    // The tables above are accessed.
    cpu.read_sized(USER, 8, Context::User).unwrap();
    let mut peeks = Peeks::new(Context::User);
    let found: Vec<bool> = (1..=entries.len() as u64)
        .map(|n| {
            let va = USER + n * 0x1000 + 0x123;
            let mapping = peeks.peek(&cpu, va);
            assert_eq!(mapping, peek_page(&cpu, va, Context::User), "entry {n}");
            mapping.is_some()
        })
        .collect();
    assert_eq!(found, [true, true, true, true, false, false, false, true, false, true]);
    assert_eq!(peeks.peek(&cpu, USER + 0x20_0000), peek_page(&cpu, USER + 0x20_0000, Context::User));
}

#[test]
fn reserved_bits_fault_with_their_own_code() {
    let mut cpu = kernel_vcpu();
    let reserved = pf::PRESENT | pf::RESERVED;
    poke(&mut cpu, PD + 16, 0x40_2000 | pte::P | pte::PS);
    assert_eq!(code(&mut cpu, 0x40_0000, Access::Read, Context::SupervisorUser), reserved);
    poke(&mut cpu, PT, 1 << 47 | pte::P);
    assert_eq!(code(&mut cpu, 0, Access::Write, Context::SupervisorUser), reserved | pf::WRITE);
    poke(&mut cpu, PT, pte::NX | pte::P);
    assert!(walk(&mut cpu, 0, Access::Read, Context::SupervisorUser).is_ok());
    cpu.msrs.efer &= !efer::NXE;
    assert_eq!(code(&mut cpu, 0, Access::Read, Context::SupervisorUser), reserved);
}

#[test]
fn no_execute_and_smep_forbid_fetches() {
    let mut cpu = kernel_vcpu();
    let entry = peek(&cpu, USER_PT);
    assert!(walk(&mut cpu, USER, Access::Execute, Context::SupervisorUser).unwrap().executable);
    cpu.cr4 |= cr4::SMEP;
    assert_eq!(code(&mut cpu, USER, Access::Execute, Context::SupervisorUser), pf::PRESENT | pf::FETCH);
    assert!(walk(&mut cpu, USER, Access::Execute, Context::User).is_ok());
    poke(&mut cpu, USER_PT, entry | pte::NX);
    assert_eq!(code(&mut cpu, USER, Access::Execute, Context::User), pf::PRESENT | pf::FETCH | pf::USER);
    cpu.msrs.efer &= !efer::NXE;
    cpu.cr4 &= !cr4::SMEP;
    poke(&mut cpu, USER_PT, 0);
    assert_eq!(code(&mut cpu, USER, Access::Execute, Context::User), pf::USER, "I/D needs NXE or SMEP");
}

#[test]
fn smap_forbids_user_pages_to_the_supervisor() {
    let mut cpu = kernel_vcpu();
    cpu.cr4 |= cr4::SMAP;
    assert_eq!(cpu.context(), Context::Supervisor);
    assert_eq!(code(&mut cpu, USER, Access::Read, Context::Supervisor), pf::PRESENT);
    cpu.rflags |= rflags::AC;
    assert_eq!(cpu.context(), Context::SupervisorUser);
    assert_eq!(cpu.system_context(), Context::Supervisor);
    assert!(walk(&mut cpu, USER, Access::Read, Context::SupervisorUser).is_ok());
}

#[test]
fn write_protect_binds_the_supervisor_only_with_cr0_wp() {
    let mut cpu = kernel_vcpu();
    poke(&mut cpu, PT, pte::P);
    assert_eq!(code(&mut cpu, 0, Access::Write, Context::SupervisorUser), pf::PRESENT | pf::WRITE);
    cpu.cr0 &= !cr0::WP;
    assert!(walk(&mut cpu, 0, Access::Write, Context::SupervisorUser).unwrap().writable);
}

#[test]
fn protection_keys_forbid_data_accesses_to_user_pages() {
    let mut cpu = kernel_vcpu();
    cpu.cr4 |= cr4::PKE;
    cpu.pkru = 0b10_00 | 0b01 << 4;
    let entry = peek(&cpu, USER_PT);
    poke(&mut cpu, USER_PT, entry | 1 << pte::PKEY_SHIFT);
    assert!(walk(&mut cpu, USER, Access::Read, Context::User).is_ok());
    let denied = pf::PRESENT | pf::PROTECTION_KEY;
    assert_eq!(code(&mut cpu, USER, Access::Write, Context::User), denied | pf::WRITE | pf::USER);
    assert_eq!(code(&mut cpu, USER, Access::Write, Context::SupervisorUser), denied | pf::WRITE);
    poke(&mut cpu, USER_PT, entry | 2 << pte::PKEY_SHIFT);
    assert_eq!(code(&mut cpu, USER, Access::Read, Context::User), denied | pf::USER);
    assert!(walk(&mut cpu, USER, Access::Execute, Context::User).is_ok());
    assert_eq!(code(&mut cpu, USER, Access::Read, Context::SupervisorUser), denied);
}

#[test]
fn two_level_paging_maps_4_mib_pages_beyond_4_gib() {
    let mut cpu = test_vcpu(8 << 20);
    cpu.cr0 |= cr0::PE | cr0::PG;
    cpu.cr3 = 0x1000;
    cpu.cr4 = cr4::PSE;
    // Entry 1: 4 MiB at 1_0040_0000H; entry 2: a table whose odd entry maps page 5.
    poke(&mut cpu, 0x1000, (0x40_0000 | 1 << 13 | pte::P | pte::W | pte::PS) << 32);
    poke(&mut cpu, 0x1008, 0x2000 | pte::P | pte::W);
    poke(&mut cpu, 0x2000, (0x5000 | pte::P | pte::W) << 32);
    let mapping = walk(&mut cpu, 0x40_1234, Access::Write, Context::SupervisorUser).unwrap();
    assert_eq!((mapping.gpa, mapping.large), (0x1_0040_1234, true));
    assert_eq!(peek(&cpu, 0x1000) >> 32 & (pte::A | pte::D), pte::A | pte::D);
    let mapping = walk(&mut cpu, 0x80_1abc, Access::Read, Context::SupervisorUser).unwrap();
    assert_eq!(mapping.gpa, 0x5abc);
    assert_eq!(peek(&cpu, 0x2000), (0x5000 | pte::P | pte::W | pte::A) << 32);
}

#[test]
fn pae_paging_has_four_pointers_without_rights() {
    let mut cpu = test_vcpu(8 << 20);
    cpu.cr0 |= cr0::PE | cr0::PG;
    cpu.cr3 = 0x1020;
    cpu.cr4 = cr4::PAE;
    poke(&mut cpu, 0x1020 + 3 * 8, 0x2000 | pte::P);
    poke(&mut cpu, 0x2000, 0x60_0000 | pte::P | pte::W | pte::PS);
    let mapping = walk(&mut cpu, 0xc000_0123, Access::Write, Context::SupervisorUser).unwrap();
    assert_eq!(mapping.gpa, 0x60_0123);
    assert_eq!(peek(&cpu, 0x1020 + 3 * 8), 0x2000 | pte::P);
}

#[test]
fn a_write_across_pages_writes_nothing_if_the_second_page_forbids_it() {
    let mut cpu = user_vcpu();
    let entry = peek(&cpu, USER_PT + 8);
    poke(&mut cpu, USER_PT + 8, entry & !pte::W);
    let e = cpu.write_linear(USER + 0xffc, &[0xee; 8], Context::User).unwrap_err();
    assert_eq!(e, Exception::page_fault(pf::PRESENT | pf::WRITE | pf::USER, USER + 0x1000));
    assert_eq!(peek(&cpu, USER + 0xff8), 0);
    poke(&mut cpu, USER_PT + 8, 0x20_5000 | pte::P | pte::W | pte::U);
    cpu.write_linear(USER + 0xffc, &0x1122_3344_5566_7788u64.to_le_bytes(), Context::User).unwrap();
    assert_eq!(peek(&cpu, USER + 0xff8) >> 32, 0x5566_7788);
    assert_eq!(peek(&cpu, 0x20_5000), 0x1122_3344);
    assert_eq!(cpu.read_sized(USER + 0xffc, 8, Context::User).unwrap(), 0x1122_3344_5566_7788);
}

#[test]
fn stores_through_the_tlb_have_marked_their_page_dirty() {
    let mut cpu = kernel_vcpu();
    cpu.write_sized(0x9000, 8, 1, Context::SupervisorUser).unwrap();
    assert!(cpu.machine.tracker.is_dirty(9));
    assert_eq!(cpu.tlb.entry(Context::SupervisorUser, 0x9000).write, 0x9000);
}

#[test]
fn pages_with_code_or_breakpoints_have_no_write_tag() {
    let mut cpu = kernel_vcpu();
    // That of another processor.
    cpu.machine.tracker.mark_code(9, 2);
    cpu.write_sized(0x9000, 8, 1, Context::SupervisorUser).unwrap();
    assert_eq!(cpu.tlb.entry(Context::SupervisorUser, 0x9000).host_address(0x9000, 1, true), None);
    cpu.dr[1] = 0xa004;
    cpu.dr7 = 1 << 2 | 0b1101 << 20;
    cpu.tlb.flush_all();
    cpu.read_sized(0xa000, 8, Context::SupervisorUser).unwrap();
    assert_eq!(cpu.pending_debug, 0, "a breakpoint on writes");
    cpu.write_sized(0xa000, 4, 1, Context::SupervisorUser).unwrap();
    assert_eq!(cpu.pending_debug, 0, "beside the breakpoint");
    cpu.write_sized(0xa000, 5, 1, Context::SupervisorUser).unwrap();
    assert_eq!(cpu.pending_debug, 2);
    assert_eq!(cpu.tlb.entry(Context::SupervisorUser, 0xa000).host_address(0xa000, 1, true), None);
}

#[test]
fn a_page_whose_code_made_room_for_other_code_is_written_like_any_other() {
    let mut cpu = kernel_vcpu();
    cpu.machine.tracker.mark_code(9, 1);
    cpu.fill_tlb(0x9000, Access::Write, Context::SupervisorUser).unwrap();
    assert_eq!(cpu.tlb.entry(Context::SupervisorUser, 0x9000).write, 0x9000);
    assert!(!cpu.machine.tracker.is_code(9));
}

#[test]
fn a_page_whose_code_made_room_is_watched_for_another_processor_only() {
    let mut cpu = kernel_vcpu();
    let other = 2;
    cpu.machine.tracker.mark_code(9, 1 | other);
    cpu.fill_tlb(0x9000, Access::Write, Context::SupervisorUser).unwrap();
    assert_eq!(cpu.machine.tracker.code_holders(9), other);
    assert_eq!(cpu.tlb.entry(Context::SupervisorUser, 0x9000).host_address(0x9000, 8, true), None);
}

/// Code of a frame is written and translated in turns.
fn rewrite_often(cpu: &mut Vcpu, frame: u64) {
    for _ in 0..3 {
        cpu.note_dropped_code(frame);
        cpu.engine.rewritten.translated(frame);
    }
}

#[test]
fn a_page_whose_code_sleeps_is_written_wherever_it_is_mapped_until_the_code_is_needed() {
    const FRAME: u64 = 0x20_4000;
    let mut cpu = user_vcpu();
    rewrite_often(&mut cpu, FRAME);
    cpu.machine.tracker.mark_code((FRAME / 0x1000) as usize, 1);
    let places = (1..=6).map(|n| USER + n * 0x1000);
    for (n, va) in (1..).zip(places.clone()) {
        poke(&mut cpu, USER_PT + n * 8, FRAME | pte::P | pte::W | pte::U);
        cpu.fill_tlb(va, Access::Write, Context::User).unwrap();
        assert!(cpu.tlb.entry(Context::User, va).host_address(va, 8, true).is_some(), "mapping {n}");
    }
    cpu.guard_code_page(FRAME);
    for va in places {
        assert_eq!(cpu.tlb.entry(Context::User, va).host_address(va, 8, true), None, "{va:#x}");
    }
}

#[test]
fn pages_beyond_those_remembered_take_the_place_of_older_ones() {
    let mut cpu = kernel_vcpu();
    // All of them with a write tag.
    for frame in (0..5000).map(|n| 0x1000 * (n % 4500 + 256)) {
        rewrite_often(&mut cpu, frame);
        cpu.note_code_tag((frame / 0x1000) as usize, Context::SupervisorUser, frame);
        assert!(cpu.engine.rewritten.often(frame), "{frame:#x}");
    }
}

#[test]
fn addresses_in_64_bit_mode_must_be_canonical() {
    assert!(is_canonical(0x7fff_ffff_ffff) && is_canonical(!0x7fff_ffff_ffff));
    assert!(!is_canonical(0x8000_0000_0000) && !is_canonical(!0x8000_0000_0000));
    let mut cpu = user_vcpu();
    let stack = Exception::new(Vector::StackFault);
    let other = Exception::general_protection(0);
    assert_eq!(cpu.linear(SegmentRegister::Ss, 0x7fff_ffff_fffc, 8, false), Err(stack));
    assert_eq!(cpu.linear(SegmentRegister::Ds, 0x7fff_ffff_fffc, 8, false), Err(other));
    assert_eq!(cpu.linear(SegmentRegister::Ds, 0x7fff_ffff_fffc, 4, false), Ok(0x7fff_ffff_fffc));
    cpu.segments[SegmentRegister::Gs as usize].base = 0xffff_8000_0000_0000;
    assert_eq!(cpu.linear(SegmentRegister::Gs, 0x10, 8, true), Ok(0xffff_8000_0000_0010));
}

#[test]
fn segment_limits_and_types_bind_outside_64_bit_mode() {
    let mut cpu = user_vcpu();
    cpu.segments[SegmentRegister::Cs as usize] = Segment::flat_code(0x1b, false, 3);
    let data = Segment { limit: 0xfff, ..Segment::flat_data(0x23, 3) };
    cpu.segments[SegmentRegister::Ds as usize] = Segment { base: 0xffff_f000, ..data };
    let fault = Err(Exception::general_protection(0));
    assert_eq!(cpu.linear(SegmentRegister::Ds, 0xffc, 4, true), Ok(0xffff_fffc));
    assert_eq!(cpu.linear(SegmentRegister::Ds, 0xffd, 4, true), fault);
    assert_eq!(cpu.linear(SegmentRegister::Ds, 0xffff_ffff, 4, true), fault);
    assert_eq!(cpu.linear(SegmentRegister::Cs, 0, 4, true), fault);
    assert_eq!(cpu.linear(SegmentRegister::Es, 0, 4, false), fault, "null segment");
    cpu.segments[SegmentRegister::Ds as usize] = Segment { attributes: data.attributes | 4, ..data };
    assert_eq!(cpu.linear(SegmentRegister::Ds, 0xfff, 1, true), fault, "expand-down");
    assert_eq!(cpu.linear(SegmentRegister::Ds, 0x1000, 4, true), Ok(0x1000));
}

#[test]
fn alignment_is_checked_for_programs_that_ask_for_it() {
    let mut cpu = user_vcpu();
    cpu.cr0 |= cr0::AM;
    cpu.rflags |= rflags::AC;
    let fault = Err(Exception::new(Vector::AlignmentCheck));
    assert_eq!(cpu.linear(SegmentRegister::Ds, USER + 2, 4, false), fault);
    assert_eq!(cpu.linear(SegmentRegister::Ds, USER + 4, 4, false), Ok(USER + 4));
    cpu.segments[SegmentRegister::Ss as usize] = Segment::flat_data(0x10, 0);
    assert_eq!(cpu.linear(SegmentRegister::Ds, USER + 2, 4, false), Ok(USER + 2));
}
