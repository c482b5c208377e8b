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
    for n in 0..=crate::tlb::PROTECTED as u64 {
        cpu.tlb.protect(frame + (n + 1) * 4096..frame + (n + 2) * 4096);
    }
    cpu.mmu_load_cr3(KEEP | root | 1);
    assert_eq!(cached(&cpu), (true, false), "more than is remembered");
}

#[test]
fn the_stack_page_comes_back_unless_something_was_protected() {
    let (mut cpu, root) = vcpu();
    let frame = crate::phys::frame_of(VA as usize / 4096);
    cpu.tlb.enter_stack(CONTEXT, VA).unwrap();
    let known = cpu.tlb.stack(CONTEXT);
    cpu.mmu_load_cr3(KEEP | root | 2);
    assert_ne!(cpu.tlb.stack(CONTEXT).page, VA);
    cpu.mmu_load_cr3(KEEP | root | 1);
    assert_eq!((cpu.tlb.stack(CONTEXT).page, cpu.tlb.stack(CONTEXT).addend), (VA, known.addend));
    cpu.mmu_load_cr3(KEEP | root | 2);
    cpu.tlb.protect(frame..frame + 4096);
    cpu.mmu_load_cr3(KEEP | root | 1);
    assert_ne!(cpu.tlb.stack(CONTEXT).page, VA);
}

#[test]
fn nothing_of_an_address_space_stays_however_much_it_was() {
    let (mut cpu, root) = vcpu();
    let host = cpu.tlb.entry(CONTEXT, VA).host as usize;
    let page = |n: u64| 0x10_0000 + n * 4096;
    for pages in [tlb::MAX_KEPT as u64 / 2, tlb::MAX_KEPT as u64 * 2] {
        for va in (0..pages).map(page) {
            let fill = tlb::Fill {
                va,
                frame: va,
                host,
                readable: true,
                writable: true,
                large: false,
                global: false,
                beside_code: false,
            };
            cpu.tlb.fill(CONTEXT, fill);
            // A second time, after it was dropped alone.
            cpu.tlb.flush_page(va);
            cpu.tlb.fill(CONTEXT, fill);
        }
        let left = |cpu: &Vcpu| {
            (0..pages).filter(|&n| cpu.tlb.entry(CONTEXT, page(n)).host_address(page(n), 8, false).is_some()).count()
        };
        assert_eq!(left(&cpu), pages as usize);
        cpu.mmu_load_cr3(KEEP | root | 2);
        assert_eq!(left(&cpu), 0);
        cpu.mmu_load_cr3(KEEP | root | 1);
        assert_eq!(left(&cpu), (pages as usize).min(tlb::MAX_KEPT), "as many as are kept");
        cpu.mmu_load_cr3(root | 1);
        assert_eq!(left(&cpu), 0);
    }
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
    let mut missed = Missed::<_, 64>::default();
    let start = missed.count();
    (0..3).for_each(|n| missed.add(n));
    assert_eq!(missed.since(start).unwrap().copied().collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(missed.since(start + 2).unwrap().copied().collect::<Vec<_>>(), [2]);
    (0..64).for_each(|n| missed.add(n));
    assert!(missed.since(start + 2).is_none());
    let now = missed.count();
    missed.add_many();
    assert!(missed.since(now).is_none());
    assert_eq!(missed.since(missed.count()).unwrap().count(), 0);
}
