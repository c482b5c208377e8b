//! Delivery in IA-32e mode (Intel SDM 3A 6.14): 16-byte gates, stacks from the 64-bit TSS, an aligned frame of five
//! quadwords and an error code.

use arch::registers::{gpr, rflags};
use arch::{Exception, SegmentRegister, Vector};

use super::Delivery;
use crate::cpu::Vcpu;
use crate::descriptor::{is_null, selector_fault, system};
use crate::mmu::{Stack, is_canonical};

pub(super) fn enter(cpu: &mut Vcpu, delivery: &Delivery) -> Result<(), Exception> {
    let offset = u64::from(delivery.vector) * 16;
    if offset + 15 > u64::from(cpu.idtr.limit) {
        return Err(delivery.gate_fault(Vector::GeneralProtection));
    }
    let mut bytes = [0; 16];
    cpu.read_linear(cpu.idtr.base.wrapping_add(offset), &mut bytes, cpu.system_context())?;
    let gate = u128::from_le_bytes(bytes);
    let kind = (gate >> 40) as u8 & 0x1f;
    if kind != system::INTERRUPT_GATE && kind != system::TRAP_GATE {
        return Err(delivery.gate_fault(Vector::GeneralProtection));
    }
    let old_cpl = cpu.cpl();
    if delivery.checks_dpl && ((gate >> 45) as u8 & 3) < old_cpl {
        return Err(delivery.gate_fault(Vector::GeneralProtection));
    }
    if gate >> 47 & 1 == 0 {
        return Err(delivery.gate_fault(Vector::SegmentNotPresent));
    }

    let selector = (gate >> 16) as u16;
    if is_null(selector) {
        return Err(delivery.general_protection());
    }
    let invalid = selector_fault(Vector::GeneralProtection, selector, delivery.external);
    let mut code = cpu.descriptor(selector)?.ok_or(invalid)?;
    if !code.is_code() || code.dpl() > old_cpl || !code.long() || code.default_big() {
        return Err(invalid);
    }
    if !code.present() {
        return Err(selector_fault(Vector::SegmentNotPresent, selector, delivery.external));
    }
    let new_cpl = if code.is_conforming() { old_cpl } else { code.dpl() };
    let target = gate as u64 & 0xffff | (gate >> 32) as u64 & 0xffff_0000 | ((gate >> 64) as u64) << 32;
    if !is_canonical(target) {
        return Err(delivery.general_protection());
    }

    let table = (gate >> 32) as u8 & 7;
    let pointer = match (table, new_cpl < old_cpl) {
        (0, false) => cpu.gpr[gpr::RSP],
        (0, true) => stack_from_tss(cpu, 4 + 8 * u64::from(new_cpl), delivery.external)?,
        (table, _) => stack_from_tss(cpu, 28 + 8 * u64::from(table), delivery.external)?,
    };
    let mut stack = Stack::flat(cpu, pointer & !15, new_cpl, delivery.external);
    let frame = [
        u64::from(cpu.seg(SegmentRegister::Ss).selector),
        // Compatibility mode has only ESP.
        if cpu.code64() { cpu.gpr[gpr::RSP] } else { cpu.gpr[gpr::RSP] & 0xffff_ffff },
        delivery.flags,
        u64::from(cpu.seg(SegmentRegister::Cs).selector),
        cpu.rip,
        u64::from(delivery.error_code.unwrap_or(0)),
    ];
    let length = if delivery.error_code.is_some() { 6 } else { 5 };
    stack.push_frame(cpu, &frame[..length])?;
    cpu.mark_accessed(&mut code)?;

    cpu.gpr[gpr::RSP] = stack.pointer;
    if new_cpl < old_cpl {
        cpu.segments[SegmentRegister::Ss as usize] = Vcpu::null_stack_segment(new_cpl);
    }
    cpu.segments[SegmentRegister::Cs as usize] = code.segment(selector & !3 | u16::from(new_cpl));
    cpu.rip = target;
    cpu.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
    if kind == system::INTERRUPT_GATE {
        cpu.rflags &= !rflags::IF;
    }
    Ok(())
}

/// A stack pointer at `offset` of the 64-bit TSS.
pub(crate) fn stack_from_tss(cpu: &mut Vcpu, offset: u64, external: u32) -> Result<u64, Exception> {
    if offset + 7 > u64::from(cpu.tr.limit) {
        return Err(selector_fault(Vector::InvalidTss, cpu.tr.selector, external));
    }
    let pointer = cpu.read_sized(cpu.tr.base.wrapping_add(offset), 8, cpu.system_context())?;
    if !is_canonical(pointer) {
        return Err(Exception::with_code(Vector::StackFault, external));
    }
    Ok(pointer)
}
