use arch::registers::cr4;

use super::*;
use crate::cpu::{Context, Vcpu};
use crate::mmu::Access;
use crate::testing::kernel_vcpu;
use crate::vcpu::VcpuBox;

const CONTEXT: Context = Context::SupervisorUser;
const VA: u64 = 0x9000;
const KEEP: u64 = 1 << 63;

/// A vCPU in PCID 1, which has written a page that is not global.
fn vcpu() -> (VcpuBox, u64) {
    let mut cpu = kernel_vcpu();
    cpu.cr4 |= cr4::PCIDE;
    let root = cpu.cr3;
    cpu.mmu_load_cr3(root | 1);
    cpu.write_sized(VA, 8, 1, CONTEXT).unwrap();
    (cpu, root)
}

fn cached(cpu: &Vcpu) -> (bool, bool) {
    let entry = cpu.tlb.entry(CONTEXT, VA);
    (entry.host_address(VA, 8, false).is_some(), entry.host_address(VA, 8, true).is_some())
}

#[test]
fn a_switch_without_a_flush_comes_back_to_what_was_known() {
    let (mut cpu, root) = vcpu();
    cpu.mmu_load_cr3(KEEP | root | 2);
    assert_eq!(cached(&cpu), (false, false), "PCID 2 knows nothing of it");
    cpu.mmu_load_cr3(KEEP | root | 1);
    assert_eq!(cached(&cpu), (true, true));
    cpu.mmu_load_cr3(KEEP | root | 2);
    cpu.mmu_load_cr3(root | 1);
    assert_eq!(cached(&cpu), (false, false), "without bit 63");
}

#[test]
fn other_tables_under_the_same_pcid_start_with_nothing() {
    let (mut cpu, root) = vcpu();
    cpu.mmu_load_cr3(KEEP | root | 2);
    cpu.mmu_load_cr3(KEEP | (root + 0x1000) | 1);
    assert_eq!(cached(&cpu), (false, false));
    let (mut cpu, root) = vcpu();
    cpu.mmu_load_cr3(KEEP | (root + 0x1000) | 1);
    assert_eq!(cached(&cpu), (false, false), "of the current PCID");
}

#[test]
fn a_page_that_was_protected_meanwhile_has_no_write_tag() {
    let (mut cpu, root) = vcpu();
    let frame = crate::phys::frame_of(VA as usize / 4096);
    cpu.mmu_load_cr3(KEEP | root | 2);
    cpu.tlb.protect(frame + 4096..frame + 8192);
    cpu.mmu_load_cr3(KEEP | root | 1);
    assert_eq!(cached(&cpu), (true, true), "another page was");
    cpu.mmu_load_cr3(KEEP | root | 2);
    cpu.tlb.protect(frame..frame + 4096);
    cpu.mmu_load_cr3(KEEP | root | 1);
    assert_eq!(cached(&cpu), (true, false));
    cpu.fill_tlb(VA, Access::Write, CONTEXT).unwrap();
    cpu.mmu_load_cr3(KEEP | root | 2);
    for n in 0..=REMEMBERED as u64 {
        cpu.tlb.protect(frame + (n + 1) * 4096..frame + (n + 2) * 4096);
    }
    cpu.mmu_load_cr3(KEEP | root | 1);
    assert_eq!(cached(&cpu), (true, false), "more than is remembered");
}

#[test]
fn what_a_space_does_not_use_is_not_carried_along_for_ever() {
    let (mut cpu, root) = vcpu();
    let mut known = 0;
    while cached(&cpu).0 {
        cpu.mmu_load_cr3(KEEP | root | 2);
        cpu.mmu_load_cr3(KEEP | root | 1);
        known += 1;
    }
    assert_eq!(known, u32::from(TURNS) + 1);
}

#[test]
fn more_spaces_than_there_is_room_for_push_out_the_oldest() {
    let (mut cpu, root) = vcpu();
    for pcid in 2..SPACES as u64 + 2 {
        cpu.mmu_load_cr3(KEEP | root | pcid);
    }
    cpu.mmu_load_cr3(KEEP | root | 1);
    assert_eq!(cached(&cpu), (true, true), "{SPACES} others");
    for pcid in 2..SPACES as u64 + 4 {
        cpu.mmu_load_cr3(KEEP | root | pcid);
    }
    cpu.mmu_load_cr3(KEEP | root | 1);
    assert_eq!(cached(&cpu), (false, false), "too many others");
}

#[test]
fn who_missed_events_learns_of_them_or_that_they_were_too_many() {
    let mut missed = Missed::default();
    let start = missed.count();
    (0..3).for_each(|n| missed.add(n));
    assert_eq!(missed.since(start).unwrap().copied().collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(missed.since(start + 2).unwrap().copied().collect::<Vec<_>>(), [2]);
    (0..REMEMBERED).for_each(|n| missed.add(n));
    assert!(missed.since(start + 2).is_none());
    let now = missed.count();
    missed.add_many();
    assert!(missed.since(now).is_none());
    assert_eq!(missed.since(missed.count()).unwrap().count(), 0);
}
