//! What is taken between instructions, and what ends a halt.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use arch::registers::{cr0, debug};
use engine::Interrupts;

use super::*;
use crate::apic::registers::reg;
use crate::apic::testing::enable_apic;
use crate::interrupts::InterruptLines;
use crate::testing::{kernel_vcpu, set_gate};
use crate::vcpu::VcpuBox;

const INTERRUPT_GATE: u64 = 0xe;

fn handler(vector: u8) -> u64 {
    0x7000 + u64::from(vector) * 16
}

/// A vCPU with interrupts on and a handler for each of `vectors`.
fn ready(vectors: &[u8]) -> VcpuBox {
    let mut cpu = kernel_vcpu();
    enable_apic(&cpu.shared);
    for &v in vectors {
        set_gate(&mut cpu, v, handler(v), INTERRUPT_GATE, 0, 0);
    }
    cpu.rflags |= rflags::IF;
    cpu.rip = 0x6000;
    cpu
}

#[test]
fn an_interrupt_waits_for_the_interrupt_flag() {
    let mut cpu = ready(&[0x55]);
    cpu.rflags &= !rflags::IF;
    cpu.shared.post_interrupt(0x55, false);
    assert!(!cpu.event_deliverable());
    cpu.take_events().unwrap();
    assert_eq!(cpu.rip, 0x6000);
    cpu.rflags |= rflags::IF;
    assert!(cpu.event_deliverable());
    cpu.take_events().unwrap();
    assert_eq!(cpu.rip, handler(0x55));
    assert_eq!(cpu.rflags & rflags::IF, 0);
}

#[test]
fn an_interrupt_waits_for_the_shadow_of_sti() {
    let mut cpu = ready(&[0x55]);
    cpu.interrupt_shadow = true;
    cpu.shared.post_interrupt(0x55, false);
    cpu.take_events().unwrap();
    assert_eq!(cpu.rip, 0x6000);
    cpu.interrupt_shadow = false;
    assert!(cpu.event_deliverable());
    cpu.take_events().unwrap();
    assert_eq!(cpu.rip, handler(0x55));
}

#[test]
fn the_second_of_two_interrupts_comes_after_the_first() {
    let mut cpu = ready(&[0x55, 0x66]);
    cpu.shared.post_interrupt(0x55, false);
    cpu.shared.post_interrupt(0x66, false);
    cpu.take_events().unwrap();
    assert_eq!(cpu.rip, handler(0x66));
    cpu.rflags |= rflags::IF;
    // 0x66 is in service: the lower class waits for its end.
    cpu.take_events().unwrap();
    assert_eq!(cpu.rip, handler(0x66));
    cpu.apic_mmio_write(0xfee0_00b0, &[0; 4]);
    assert!(cpu.event_deliverable());
    cpu.take_events().unwrap();
    assert_eq!(cpu.rip, handler(0x55));
}

#[test]
fn a_debug_trap_comes_before_an_nmi_and_that_before_an_interrupt() {
    let mut cpu = ready(&[1, 2, 0x55]);
    cpu.pending_debug = debug::DR6_BS;
    cpu.shared.request(request::NMI);
    cpu.shared.post_interrupt(0x55, false);
    cpu.take_events().unwrap();
    // The debug handler was entered first, and interrupted by the NMI before it did anything.
    assert_eq!(cpu.rip, handler(2));
    assert!(cpu.nmi_blocked);
    let (rsp, context) = (cpu.gpr[gpr::RSP], cpu.context());
    let frame = cpu.read_sized(rsp, 8, context).unwrap();
    assert_eq!(frame, handler(1));
    assert_eq!(cpu.dr6 & debug::DR6_BS, debug::DR6_BS);
}

#[test]
fn an_nmi_waits_while_nmis_are_blocked() {
    let mut cpu = ready(&[2]);
    cpu.nmi_blocked = true;
    cpu.shared.request(request::NMI);
    assert!(!cpu.event_deliverable());
    cpu.take_events().unwrap();
    assert_eq!(cpu.rip, 0x6000);
    cpu.nmi_blocked = false;
    assert!(cpu.event_deliverable());
    cpu.take_events().unwrap();
    assert_eq!(cpu.rip, handler(2));
}

#[test]
fn of_many_nmis_one_is_taken_and_one_remembered() {
    let mut cpu = ready(&[2]);
    for _ in 0..3 {
        cpu.shared.request_nmi();
    }
    cpu.take_events().unwrap();
    assert!(cpu.nmi_blocked && cpu.rip == handler(2));
    for _ in 0..3 {
        cpu.shared.request_nmi();
    }
    cpu.unblock_nmis();
    cpu.take_events().unwrap();
    assert!(cpu.nmi_blocked, "the one that came while the first was handled");
    cpu.unblock_nmis();
    assert!(!cpu.event_deliverable());
}

/// A bus whose 8259 always gives one vector.
struct Pic(AtomicU32);

impl engine::Bus for Pic {
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u16, _: &[u8]) {}
    fn acknowledge_pic(&self) -> u8 {
        self.0.fetch_add(1, Ordering::SeqCst);
        0x30
    }
    fn end_of_interrupt(&self, _: u8) {}
}

/// Devices that assert IGNNE# from a write to any port on until FERR# goes.
#[derive(Default)]
struct Coprocessor(AtomicU32);

impl engine::Bus for Coprocessor {
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u16, _: &[u8]) {
        self.0.store(1, Ordering::SeqCst);
    }
    fn acknowledge_pic(&self) -> u8 {
        0x75
    }
    fn end_of_interrupt(&self, _: u8) {}
    fn set_ferr(&self, asserted: bool) -> bool {
        if !asserted {
            self.0.store(0, Ordering::SeqCst);
        }
        self.0.load(Ordering::SeqCst) != 0
    }
}

#[test]
fn without_ne_an_x87_error_holds_the_processor_until_an_interrupt_and_ignne_lets_it_go_on() {
    let mut cpu = ready(&[0x75]);
    let devices = Arc::new(Coprocessor::default());
    cpu.machine.set_bus(devices.clone());
    assert!(!cpu.told_by_ferr(Vector::X87FloatingPoint), "with NE it is an exception");
    cpu.cr0 &= !cr0::NE;
    assert!(cpu.told_by_ferr(Vector::X87FloatingPoint) && !cpu.told_by_ferr(Vector::GeneralProtection));
    cpu.xsave.set_x87_words(0x37b, 4);
    cpu.assert_ferr();
    assert_eq!((cpu.activity, cpu.rip), (Activity::Halted, 0x6000));
    cpu.shared.post_interrupt(0x75, false);
    cpu.take_events().unwrap();
    assert_eq!((cpu.activity, cpu.rip), (Activity::Running, handler(0x75)));
    assert!(cpu.xsave.x87_pending());
    cpu.machine.bus().pio_write(0xf0, &[0]);
    cpu.assert_ferr();
    assert_eq!((cpu.activity, cpu.xsave.x87_pending()), (Activity::Running, false));
    cpu.settle_ferr();
    assert_eq!(devices.0.load(Ordering::SeqCst), 0);
}

#[test]
fn the_pic_gets_through_lint0_only_as_extint() {
    let mut cpu = ready(&[0x30]);
    let pic = Arc::new(Pic(AtomicU32::new(0)));
    cpu.machine.set_bus(pic.clone());
    let lines = InterruptLines(cpu.machine.clone());
    assert!(cpu.shared.apic.accepts_pic(), "as it starts");
    cpu.apic_mmio_write(0xfee0_0000 + reg::LVT_LINT0 as u64 * 16, &0x1_0700u32.to_le_bytes());
    lines.set_pic_output(true);
    cpu.take_events().unwrap();
    assert_eq!((cpu.rip, pic.0.load(Ordering::SeqCst)), (0x6000, 0));
    // Unmasking the pin lets the waiting level in.
    cpu.apic_mmio_write(0xfee0_0000 + reg::LVT_LINT0 as u64 * 16, &0x700u32.to_le_bytes());
    cpu.take_events().unwrap();
    assert_eq!((cpu.rip, pic.0.load(Ordering::SeqCst)), (handler(0x30), 1));
    lines.set_pic_output(false);
    cpu.rflags |= rflags::IF;
    cpu.take_events().unwrap();
    assert_eq!(pic.0.load(Ordering::SeqCst), 1);
}

#[test]
fn the_pic_reaches_a_processor_whose_apic_is_off() {
    let mut cpu = ready(&[0x30]);
    cpu.machine.set_bus(Arc::new(Pic(AtomicU32::new(0))));
    cpu.set_apic_base(0xfee0_0100).unwrap();
    InterruptLines(cpu.machine.clone()).set_pic_output(true);
    cpu.take_events().unwrap();
    assert_eq!(cpu.rip, handler(0x30));
}

#[test]
fn init_resets_the_bootstrap_processor_to_its_reset_vector() {
    let mut cpu = ready(&[]);
    cpu.shared.apic.post(0x55, false);
    cpu.shared.request(request::INIT);
    cpu.take_events().unwrap();
    assert_eq!((cpu.rip, cpu.seg(SegmentRegister::Cs).base), (0xfff0, 0xffff_0000));
    assert_eq!(cpu.activity, Activity::Running);
    assert_eq!(cpu.gpr[gpr::RDX], u64::from(cpu.cpuid(1, 0).eax));
    assert_eq!(cpu.shared.apic.deliverable(), None);
}

#[test]
fn a_startup_without_init_is_ignored() {
    let mut cpu = ready(&[]);
    cpu.shared.request(request::SIPI);
    cpu.take_events().unwrap();
    assert_eq!(cpu.rip, 0x6000);
    assert_eq!(cpu.requests() & request::SIPI, 0);
}

#[test]
fn a_halted_processor_wakes_for_an_interrupt_from_another_thread() {
    let mut cpu = ready(&[0x55]);
    cpu.activity = Activity::Halted;
    let shared = cpu.shared.clone();
    let sender = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(5));
        shared.post_interrupt(0x55, false);
    });
    cpu.halt();
    cpu.take_events().unwrap();
    assert_eq!((cpu.activity, cpu.rip), (Activity::Running, handler(0x55)));
    sender.join().unwrap();
}

#[test]
fn a_halted_processor_with_interrupts_off_wakes_for_an_nmi_only() {
    let mut cpu = ready(&[2]);
    cpu.rflags &= !rflags::IF;
    cpu.activity = Activity::Halted;
    cpu.shared.post_interrupt(0x55, false);
    let shared = cpu.shared.clone();
    let start = Instant::now();
    let sender = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(5));
        shared.request(request::NMI);
    });
    cpu.halt();
    assert!(start.elapsed() >= Duration::from_millis(4));
    cpu.take_events().unwrap();
    assert_eq!((cpu.activity, cpu.rip), (Activity::Running, handler(2)));
    sender.join().unwrap();
}

#[test]
fn a_halted_processor_wakes_when_its_timer_expires() {
    let mut cpu = ready(&[0xec]);
    cpu.apic_mmio_write(0xfee0_0000 + reg::LVT_TIMER as u64 * 16, &0x4_00ecu32.to_le_bytes());
    let deadline = cpu.guest_tsc() + cpu.machine.time.ns_to_ticks(5_000_000);
    cpu.set_tsc_deadline(deadline);
    cpu.activity = Activity::Halted;
    let start = Instant::now();
    cpu.halt();
    let slept = start.elapsed();
    assert!(slept >= Duration::from_micros(4_500) && slept < Duration::from_secs(60), "{slept:?}");
    cpu.take_events().unwrap();
    assert_eq!(cpu.rip, handler(0xec));
}
