//! Delivery in protected mode outside IA-32e (Intel SDM 3A 6.12): 16- and 32-bit interrupt and trap gates, task
//! gates, and the way out of virtual-8086 mode.

use arch::registers::{gpr, rflags};
use arch::{Exception, Segment, SegmentRegister, Vector};

use super::Delivery;
use crate::cpu::Vcpu;
use crate::descriptor::{Descriptor, is_null, selector_fault, system};
use crate::mmu::Stack;
use crate::mmu::segmentation::limit_allows;
use crate::task;

pub(super) fn enter(cpu: &mut Vcpu, delivery: &Delivery) -> Result<(), Exception> {
    let offset = u64::from(delivery.vector) * 8;
    if offset + 7 > u64::from(cpu.idtr.limit) {
        return Err(delivery.gate_fault(Vector::GeneralProtection));
    }
    let address = cpu.idtr.base.wrapping_add(offset) & 0xffff_ffff;
    let gate = Descriptor { raw: cpu.read_sized(address, 8, cpu.system_context())?, address };
    let wide = match gate.kind() {
        _ if !gate.is_system() => return Err(delivery.gate_fault(Vector::GeneralProtection)),
        system::INTERRUPT_GATE | system::TRAP_GATE => true,
        system::INTERRUPT_GATE16 | system::TRAP_GATE16 | system::TASK_GATE => false,
        _ => return Err(delivery.gate_fault(Vector::GeneralProtection)),
    };
    if delivery.checks_dpl && gate.dpl() < cpu.cpl() {
        return Err(delivery.gate_fault(Vector::GeneralProtection));
    }
    if !gate.present() {
        return Err(delivery.gate_fault(Vector::SegmentNotPresent));
    }
    if gate.kind() == system::TASK_GATE {
        return enter_task(cpu, delivery, &gate);
    }
    enter_procedure(cpu, delivery, &gate, wide)
}

fn enter_task(cpu: &mut Vcpu, delivery: &Delivery, gate: &Descriptor) -> Result<(), Exception> {
    let tss = task::available_tss(cpu, gate.gate_selector(), delivery.external)?;
    cpu.rflags = cpu.rflags & !rflags::RF | delivery.flags & rflags::RF;
    task::switch(cpu, gate.gate_selector(), &tss, task::Reason::Call)?;
    if let Some(code) = delivery.error_code {
        let size = if task::is_wide(&tss) { 4 } else { 2 };
        let mut stack = Stack::current_for_event(cpu, delivery.external);
        stack.push(cpu, size, u64::from(code))?;
        cpu.gpr[gpr::RSP] = stack.pointer;
    }
    Ok(())
}

fn enter_procedure(cpu: &mut Vcpu, delivery: &Delivery, gate: &Descriptor, wide: bool) -> Result<(), Exception> {
    let selector = gate.gate_selector();
    if is_null(selector) {
        return Err(delivery.general_protection());
    }
    let invalid = selector_fault(Vector::GeneralProtection, selector, delivery.external);
    let mut code = cpu.descriptor(selector)?.ok_or(invalid)?;
    let old_cpl = cpu.cpl();
    if !code.is_code() || code.dpl() > old_cpl {
        return Err(invalid);
    }
    if !code.present() {
        return Err(selector_fault(Vector::SegmentNotPresent, selector, delivery.external));
    }
    let new_cpl = if code.is_conforming() { old_cpl } else { code.dpl() };
    if cpu.v8086() && new_cpl != 0 {
        return Err(invalid);
    }

    let inner = new_cpl < old_cpl;
    let mut stack = if inner {
        let (selector, pointer) = task::inner_stack(cpu, new_cpl, delivery.external)?;
        if is_null(selector) {
            return Err(Exception::with_code(Vector::InvalidTss, delivery.external));
        }
        let segment = cpu.checked_stack_segment(selector, new_cpl, Vector::InvalidTss, delivery.external)?;
        Stack::inner(cpu, segment, pointer, delivery.external)
    } else {
        Stack::current_for_event(cpu, delivery.external)
    };
    let target = if wide { gate.gate_offset() } else { gate.gate_offset() & 0xffff };
    let loaded = code.segment(selector & !3 | u16::from(new_cpl));
    if !limit_allows(&loaded, target, 1) {
        return Err(delivery.general_protection());
    }
    let size = if wide { 4 } else { 2 };
    push_frame(cpu, delivery, &mut stack, size, inner)?;
    cpu.mark_accessed(&mut code)?;

    if inner {
        if cpu.v8086() {
            use SegmentRegister::{Ds, Es, Fs, Gs};
            for register in [Es, Ds, Fs, Gs] {
                cpu.segments[register as usize] = Segment::default();
            }
        }
        cpu.segments[SegmentRegister::Ss as usize] = stack.segment;
    }
    cpu.gpr[gpr::RSP] = stack.pointer;
    cpu.segments[SegmentRegister::Cs as usize] = code.segment(loaded.selector);
    cpu.rip = target;
    cpu.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
    if matches!(gate.kind(), system::INTERRUPT_GATE | system::INTERRUPT_GATE16) {
        cpu.rflags &= !rflags::IF;
    }
    Ok(())
}

fn push_frame(
    cpu: &mut Vcpu,
    delivery: &Delivery,
    stack: &mut Stack,
    size: usize,
    inner: bool,
) -> Result<(), Exception> {
    use SegmentRegister::{Cs, Ds, Es, Fs, Gs, Ss};
    let selector = |cpu: &Vcpu, register| u64::from(cpu.seg(register).selector);
    if cpu.v8086() {
        for register in [Gs, Fs, Ds, Es] {
            stack.push(cpu, size, selector(cpu, register))?;
        }
    }
    if inner {
        let outer = [selector(cpu, Ss), cpu.gpr[gpr::RSP]];
        stack.push_all(cpu, size, &outer)?;
    }
    let frame = [delivery.flags, selector(cpu, Cs), cpu.rip];
    stack.push_all(cpu, size, &frame)?;
    match delivery.error_code {
        Some(code) => stack.push(cpu, size, u64::from(code)),
        None => Ok(()),
    }
}
