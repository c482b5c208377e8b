//! The local APIC as a guest meets it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use arch::{Exception, msr};

use super::registers::{lvt, reg};
use super::testing::{enable_apic, enable_x2apic, machine_of};
use super::*;
use crate::Vcpu;
use crate::shared::request;
use crate::vcpu::VcpuBox;

const PAGE: u64 = base::RESET_ADDRESS;

fn vcpu() -> VcpuBox {
    let cpu = machine_of(1).1.remove(0);
    enable_apic(&cpu.shared);
    cpu
}

fn read(cpu: &Vcpu, register: usize) -> u32 {
    let mut data = [0; 4];
    assert!(cpu.apic_mmio_read(PAGE + register as u64 * 16, &mut data));
    u32::from_le_bytes(data)
}

fn write(cpu: &mut Vcpu, register: usize, value: u32) {
    assert!(cpu.apic_mmio_write(PAGE + register as u64 * 16, &value.to_le_bytes()));
}

fn x2apic() -> VcpuBox {
    let cpu = machine_of(1).1.remove(0);
    enable_x2apic(&cpu.shared);
    cpu
}

fn gp<T>() -> Result<T, Exception> {
    Err(Exception::general_protection(0))
}

fn x2(register: usize) -> u32 {
    msr::X2APIC_FIRST + register as u32
}

#[test]
fn the_page_moves_with_apic_base_and_goes_away_when_disabled() {
    let mut cpu = vcpu();
    let mut data = [0; 4];
    assert!(!cpu.apic_mmio_read(PAGE - 16, &mut data));
    cpu.set_apic_base(0x1_0000_0000 | base::ENABLE | base::BSP).unwrap();
    assert!(!cpu.apic_mmio_read(PAGE, &mut data));
    assert!(cpu.apic_mmio_read(0x1_0000_0030, &mut data));
    assert_eq!(u32::from_le_bytes(data), 0x5_0014);
    cpu.set_apic_base(0x1_0000_0000).unwrap();
    assert!(!cpu.apic_mmio_read(0x1_0000_0030, &mut data));
}

#[test]
fn apic_base_allows_only_the_transitions_of_the_manual() {
    let (off, xapic, x2apic) = (PAGE, PAGE | base::ENABLE, PAGE | base::ENABLE | base::X2APIC);
    for (from, to, good) in [
        (off, xapic, true),
        (off, x2apic, false),
        (xapic, x2apic, true),
        (xapic, off, true),
        (x2apic, xapic, false),
        (x2apic, off, true),
        (xapic, PAGE | base::X2APIC, false),
        (xapic, xapic | 1, false),
        (xapic, xapic | 1 << 60, false),
    ] {
        let mut cpu = vcpu();
        cpu.shared.apic.set_base(from);
        assert_eq!(cpu.set_apic_base(to).is_ok(), good, "{from:#x} {to:#x}");
    }
}

#[test]
fn only_a_class_above_the_processor_priority_is_deliverable() {
    let mut cpu = vcpu();
    cpu.shared.post_interrupt(0x41, false);
    write(&mut cpu, reg::TPR, 0x40);
    assert_eq!(cpu.shared.apic.deliverable(), None);
    write(&mut cpu, reg::TPR, 0x3f);
    assert_eq!(cpu.shared.apic.deliverable(), Some(0x41));
    cpu.shared.apic.acknowledge(0x41);
    cpu.shared.post_interrupt(0x4f, false);
    assert_eq!(cpu.shared.apic.deliverable(), None);
    assert_eq!(read(&cpu, reg::PPR), 0x40);
    cpu.shared.post_interrupt(0x50, false);
    assert_eq!(cpu.shared.apic.deliverable(), Some(0x50));
}

#[test]
fn eoi_ends_the_highest_in_service_and_lets_the_next_in() {
    let mut cpu = vcpu();
    cpu.shared.apic.acknowledge(0x31);
    cpu.shared.apic.acknowledge(0x81);
    cpu.shared.apic.post(0x42, false);
    write(&mut cpu, reg::EOI, 0);
    assert_eq!(read(&cpu, reg::ISR + 4), 0);
    assert_eq!(read(&cpu, reg::ISR + 1), 1 << 17);
    assert!(cpu.shared.requests.load(Ordering::SeqCst) & request::INTERRUPT != 0);
}

#[test]
fn the_trigger_mode_register_remembers_level_interrupts() {
    let cpu = vcpu();
    cpu.shared.post_interrupt(0x42, true);
    assert_eq!(read(&cpu, reg::TMR + 2), 4);
    cpu.shared.apic.acknowledge(0x42);
    assert_eq!(cpu.shared.apic.end_of_interrupt(), Some((0x42, true)));
    cpu.shared.post_interrupt(0x42, false);
    assert_eq!(read(&cpu, reg::TMR + 2), 0);
}

#[test]
fn software_disable_masks_the_local_vector_table() {
    let mut cpu = vcpu();
    write(&mut cpu, reg::LVT_ERROR, 0x33);
    write(&mut cpu, reg::SVR, 0xff);
    assert_eq!(read(&cpu, reg::LVT_ERROR), 0x33 | lvt::MASKED);
    write(&mut cpu, reg::LVT_ERROR, 0x34);
    assert_eq!(read(&cpu, reg::LVT_ERROR), 0x34 | lvt::MASKED);
}

#[test]
fn an_illegal_vector_is_recorded_and_interrupts() {
    let mut cpu = vcpu();
    write(&mut cpu, reg::LVT_ERROR, 0xfe);
    write(&mut cpu, reg::ICR, 1 << 18 | 5);
    assert_eq!(read(&cpu, reg::ESR), 0);
    write(&mut cpu, reg::ESR, 0);
    assert_eq!(read(&cpu, reg::ESR), error::SEND_ILLEGAL_VECTOR);
    assert_eq!(cpu.shared.apic.deliverable(), Some(0xfe));
}

#[test]
fn odd_accesses_to_the_page_neither_fail_nor_write() {
    let mut cpu = vcpu();
    let mut data = [0xee; 64];
    assert!(cpu.apic_mmio_read(PAGE + 0x3f, &mut data));
    assert!(cpu.apic_mmio_read(PAGE + 0xfff, &mut data[..1]));
    assert!(cpu.apic_mmio_write(PAGE + 0x82, &[0xff; 2]));
    assert!(cpu.apic_mmio_write(PAGE + 0xff0, &[0xff; 4]));
    assert_eq!(read(&cpu, reg::TPR), 0);
}

#[test]
fn startup_ipis_reach_another_processor() {
    let (_, mut cpus) = machine_of(2);
    enable_apic(&cpus[0].shared);
    write(&mut cpus[0], reg::ICR_HIGH, 1 << 24);
    write(&mut cpus[0], reg::ICR, 0x4500);
    write(&mut cpus[0], reg::ICR, 0x4699);
    assert_eq!(cpus[1].shared.requests.load(Ordering::SeqCst), request::INIT | request::SIPI);
    cpus[1].take_events().unwrap();
    assert_eq!(cpus[1].activity, arch::state::Activity::Running);
    assert_eq!(cpus[1].seg(arch::SegmentRegister::Cs).base, 0x9_9000);
    assert_eq!(cpus[1].rip, 0);
}

#[test]
fn shorthands_name_self_all_and_the_others() {
    for (shorthand, expected) in [(1, [true, false, false]), (2, [true; 3]), (3, [false, true, true])] {
        let (_, mut cpus) = machine_of(3);
        cpus.iter().for_each(|c| enable_apic(&c.shared));
        write(&mut cpus[0], reg::ICR, shorthand << 18 | 0x55);
        let got: Vec<_> = cpus.iter().map(|c| c.shared.apic.deliverable().is_some()).collect();
        assert_eq!(got, expected);
    }
}

#[test]
fn x2apic_registers_reject_what_the_manual_reserves() {
    let mut cpu = x2apic();
    assert_eq!(cpu.x2apic_read(x2(reg::ID)), Ok(0));
    assert_eq!(cpu.x2apic_read(x2(reg::LDR)), Ok(1));
    for register in [reg::EOI, reg::SELF_IPI, reg::DFR, reg::ICR_HIGH, 0, 0x2f, 0xff] {
        assert_eq!(cpu.x2apic_read(x2(register)), gp());
    }
    for (register, value) in [
        (reg::ID, 0),
        (reg::PPR, 0),
        (reg::LDR, 0),
        (reg::CURRENT_COUNT, 0),
        (reg::EOI, 1),
        (reg::ESR, 1),
        (reg::TPR, 0x100),
        (reg::SVR, 0x1000),
        (reg::ICR, 1 << 20),
        (reg::LVT_TIMER, 1 << 19),
        (reg::DIVIDE, 4),
        (reg::SELF_IPI, 0x100),
        (reg::TPR, 1 << 32),
    ] {
        assert_eq!(cpu.x2apic_write(x2(register), value), gp(), "{register:#x}");
    }
    cpu.shared.apic.set_base(PAGE | base::ENABLE);
    assert_eq!(cpu.x2apic_read(x2(reg::ID)), gp());
}

#[test]
fn a_self_ipi_is_pending_at_once() {
    let mut cpu = x2apic();
    cpu.x2apic_write(x2(reg::SELF_IPI), 0x77).unwrap();
    assert_eq!(cpu.shared.apic.deliverable(), Some(0x77));
    assert!(cpu.event_deliverable() || cpu.rflags & arch::registers::rflags::IF == 0);
}

#[test]
fn a_tsc_deadline_in_the_past_fires_at_once_and_reads_zero_then() {
    let mut cpu = vcpu();
    write(&mut cpu, reg::LVT_TIMER, 2 << 17 | 0xec);
    let far = cpu.guest_tsc() + (1 << 40);
    cpu.set_tsc_deadline(far);
    assert_eq!(cpu.tsc_deadline(), far);
    assert_eq!(cpu.shared.apic.deliverable(), None);
    cpu.set_tsc_deadline(1);
    assert_eq!(cpu.tsc_deadline(), 0);
    assert_eq!(cpu.shared.apic.deliverable(), Some(0xec));
}

#[test]
fn a_deadline_is_ignored_in_other_modes_and_disarmed_on_leaving() {
    let mut cpu = vcpu();
    write(&mut cpu, reg::LVT_TIMER, 0xec);
    cpu.set_tsc_deadline(1);
    assert_eq!((cpu.tsc_deadline(), cpu.shared.apic.deliverable()), (0, None));
    write(&mut cpu, reg::LVT_TIMER, 2 << 17 | 0xec);
    let far = cpu.guest_tsc() + (1 << 40);
    cpu.set_tsc_deadline(far);
    write(&mut cpu, reg::LVT_TIMER, 0xec);
    assert_eq!((cpu.tsc_deadline(), cpu.apic_timer_remaining()), (0, None));
}

#[test]
fn the_one_shot_timer_counts_down_at_the_divided_crystal() {
    let mut cpu = vcpu();
    write(&mut cpu, reg::LVT_TIMER, 0xec);
    write(&mut cpu, reg::DIVIDE, 0xb);
    write(&mut cpu, reg::INITIAL_COUNT, 10_000_000);
    std::thread::sleep(Duration::from_millis(2));
    assert!(read(&cpu, reg::CURRENT_COUNT) <= 8_000_000);
    assert_eq!(cpu.shared.apic.deliverable(), None);
    std::thread::sleep(Duration::from_millis(9));
    cpu.poll_apic_timer();
    assert_eq!(cpu.shared.apic.deliverable(), Some(0xec));
    assert_eq!(read(&cpu, reg::CURRENT_COUNT), 0);
    write(&mut cpu, reg::DIVIDE, 0xa);
    write(&mut cpu, reg::INITIAL_COUNT, 1_000_000_000);
    let ns = cpu.apic_timer_remaining().unwrap();
    assert!((64_000_000_000..=128_000_000_001).contains(&ns), "{ns}"); // the test may have been paused for a while
}

#[test]
fn missed_periods_are_one_interrupt() {
    let mut cpu = vcpu();
    write(&mut cpu, reg::LVT_TIMER, 1 << 17 | 0xec);
    write(&mut cpu, reg::DIVIDE, 0xb);
    write(&mut cpu, reg::INITIAL_COUNT, 1_000_000);
    std::thread::sleep(Duration::from_millis(6));
    cpu.poll_apic_timer();
    assert_eq!(cpu.shared.apic.deliverable(), Some(0xec));
    cpu.shared.apic.acknowledge(0xec);
    cpu.shared.apic.end_of_interrupt();
    let left = cpu.apic_timer_remaining().unwrap();
    assert!(left <= 1_000_001, "{left}");
    assert_eq!(cpu.shared.apic.deliverable(), None);
}

#[test]
fn a_running_vcpu_is_told_when_its_deadline_passes() {
    let mut cpu = vcpu();
    cpu.enter_thread().unwrap();
    cpu.take_events().unwrap();
    write(&mut cpu, reg::LVT_TIMER, 2 << 17 | 0xec);
    let soon = |cpu: &Vcpu, ns| cpu.guest_tsc() + cpu.machine.time.ns_to_ticks(ns);
    // Pushed out and pulled in: what counts is the last one.
    for ns in [5_000_000, 50_000_000, 3_000_000] {
        let deadline = soon(&cpu, ns);
        cpu.set_tsc_deadline(deadline);
    }
    let start = std::time::Instant::now();
    while cpu.shared.apic.deliverable().is_none() {
        assert!(start.elapsed() < Duration::from_secs(60), "the deadline passed unnoticed");
        if cpu.event_deliverable() {
            cpu.take_events().unwrap();
        }
        std::hint::spin_loop();
    }
    assert!(start.elapsed() >= Duration::from_micros(2_900));
    cpu.leave_thread();
}

#[test]
fn registers_survive_a_save_and_a_load() {
    let mut cpu = vcpu();
    write(&mut cpu, reg::TPR, 0x20);
    write(&mut cpu, reg::LVT_TIMER, 2 << 17 | 0xec);
    cpu.shared.post_interrupt(0x55, true);
    let saved = cpu.shared.apic.save();
    let other = vcpu();
    assert!(other.shared.apic.load(&saved));
    assert_eq!(other.shared.apic.save(), saved);
    assert_eq!(other.shared.apic.deliverable(), Some(0x55));
    assert!(!other.shared.apic.load(&[1, 2, 3]));
}

#[test]
fn a_guest_learns_that_it_was_paused_when_its_timer_is_seconds_late() {
    let mut cpu = vcpu();
    cpu.write_msr(msr::KVM_SYSTEM_TIME_NEW, 0x9001).unwrap();
    let flags = |cpu: &Vcpu| crate::testing::peek(cpu, 0x9018) >> 40 & 0xff;
    write(&mut cpu, reg::LVT_TIMER, 2 << 17 | 0xec);
    // A deadline that was past when it was written is no sign of a pause.
    cpu.set_tsc_deadline(1);
    assert_eq!(flags(&cpu), 1);
    let second = cpu.machine.time.ns_to_ticks(1_000_000_000);
    let deadline = cpu.guest_tsc() + second;
    cpu.set_tsc_deadline(deadline);
    cpu.machine.time.set_tsc(cpu.machine.time.tsc() + 3 * second);
    cpu.poll_apic_timer();
    assert_eq!(flags(&cpu), 3);
    assert_eq!(cpu.shared.apic.deliverable(), Some(0xec));
}
