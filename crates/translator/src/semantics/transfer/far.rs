//! JMP, CALL and RET between segments (Intel SDM 2A, 2B): directly, through call gates, and to other tasks.

use arch::registers::gpr;
use arch::{Exception, SegmentRegister, Vector};
use iced_x86::{Code, Instruction};

use super::{
    check_target, drop_privileged_segments, load_stack, not_present, real_code_segment, reserved_code, return_code,
    return_stack,
};
use crate::cpu::{Stop, Vcpu};
use crate::deliver::stack_from_tss;
use crate::descriptor::{Descriptor, is_null, protection_fault, system};
use crate::mmu::Stack;
use crate::task;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Jump,
    Call,
}

/// A far pointer operand.
struct Pointer {
    selector: u16,
    offset: u64,
    /// Operand size in bytes.
    size: usize,
}

impl Pointer {
    fn of(cpu: &mut Vcpu, insn: &Instruction) -> Result<Self, Exception> {
        let size = match insn.code() {
            Code::Jmp_ptr1616 | Code::Call_ptr1616 | Code::Jmp_m1616 | Code::Call_m1616 => 2,
            Code::Jmp_m1664 | Code::Call_m1664 => 8,
            _ => 4,
        };
        match insn.code() {
            Code::Jmp_ptr1616 | Code::Call_ptr1616 => {
                Ok(Pointer { selector: insn.far_branch_selector(), offset: u64::from(insn.far_branch16()), size })
            }
            Code::Jmp_ptr1632 | Code::Call_ptr1632 => {
                Ok(Pointer { selector: insn.far_branch_selector(), offset: u64::from(insn.far_branch32()), size })
            }
            _ => {
                let (offset, selector) = cpu.read_far_pointer(insn, 0, size)?;
                Ok(Pointer { selector, offset, size })
            }
        }
    }
}

pub fn jump(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let pointer = Pointer::of(cpu, insn)?;
    Ok(transfer(cpu, &pointer, Kind::Jump)?)
}

pub fn call(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let pointer = Pointer::of(cpu, insn)?;
    Ok(transfer(cpu, &pointer, Kind::Call)?)
}

fn transfer(cpu: &mut Vcpu, pointer: &Pointer, kind: Kind) -> Result<(), Exception> {
    if !cpu.protected_mode() || cpu.v8086() {
        return transfer_real(cpu, pointer, kind);
    }
    let selector = pointer.selector;
    if is_null(selector) {
        return Err(Exception::general_protection(0));
    }
    let target = cpu.descriptor(selector)?.ok_or(protection_fault(selector))?;
    if target.is_code() {
        return direct(cpu, pointer, target, kind);
    }
    if !target.is_system() {
        return Err(protection_fault(selector));
    }
    let long = cpu.long_mode();
    match target.kind() {
        system::CALL_GATE => through_gate(cpu, selector, &target, kind),
        system::CALL_GATE16 if !long => through_gate(cpu, selector, &target, kind),
        system::TASK_GATE | system::TSS | system::TSS16 if !long => to_task(cpu, selector, &target, kind),
        _ => Err(protection_fault(selector)),
    }
}

fn transfer_real(cpu: &mut Vcpu, pointer: &Pointer, kind: Kind) -> Result<(), Exception> {
    let code = real_code_segment(cpu, pointer.selector, pointer.offset)?;
    if kind == Kind::Call {
        push_return(cpu, Stack::current(cpu), pointer.size)?;
    }
    cpu.segments[SegmentRegister::Cs as usize] = code;
    cpu.rip = pointer.offset;
    Ok(())
}

/// Pushes CS and RIP and makes the stack the current one, whose segment does not change.
fn push_return(cpu: &mut Vcpu, mut stack: Stack, size: usize) -> Result<(), Exception> {
    let frame = [u64::from(cpu.seg(SegmentRegister::Cs).selector), cpu.rip];
    stack.push_all(cpu, size, &frame)?;
    cpu.gpr[gpr::RSP] = stack.pointer;
    Ok(())
}

/// To a code segment that the pointer names.
fn direct(cpu: &mut Vcpu, pointer: &Pointer, mut code: Descriptor, kind: Kind) -> Result<(), Exception> {
    let (selector, cpl) = (pointer.selector, cpu.cpl());
    let rpl = (selector & 3) as u8;
    let allowed = if code.is_conforming() { code.dpl() <= cpl } else { rpl <= cpl && code.dpl() == cpl };
    if !allowed || reserved_code(cpu, &code) {
        return Err(protection_fault(selector));
    }
    if !code.present() {
        return Err(not_present(selector));
    }
    let long = cpu.long_mode() && code.long();
    let offset = if long { pointer.offset } else { pointer.offset & 0xffff_ffff };
    if kind == Kind::Jump {
        check_target(cpu, &code, offset)?;
    }
    cpu.mark_accessed(&mut code)?;
    if kind == Kind::Call {
        // What is wrong with the target shows when the return address is written already.
        let old = cpu.gpr[gpr::RSP];
        push_return(cpu, Stack::of_target(cpu, &code), pointer.size)?;
        if let Err(e) = check_target(cpu, &code, offset) {
            cpu.gpr[gpr::RSP] = old;
            return Err(e);
        }
    }
    cpu.segments[SegmentRegister::Cs as usize] = code.segment(selector & !3 | u16::from(cpl));
    cpu.rip = offset;
    Ok(())
}

/// Through a call gate, perhaps to a more privileged level (Intel SDM 3A 5.8.3-5.8.5).
fn through_gate(cpu: &mut Vcpu, gate_selector: u16, gate: &Descriptor, kind: Kind) -> Result<(), Exception> {
    check_gate(cpu, gate_selector, gate)?;
    let long = cpu.long_mode();
    let mut offset = gate.gate_offset();
    if long {
        let upper = cpu.descriptor_upper(gate_selector)?.ok_or(protection_fault(gate_selector))?;
        offset |= upper << 32;
    } else if gate.kind() == system::CALL_GATE16 {
        offset &= 0xffff;
    }
    let selector = gate.gate_selector();
    if is_null(selector) {
        return Err(Exception::general_protection(0));
    }
    let mut code = cpu.descriptor(selector)?.ok_or(protection_fault(selector))?;
    let cpl = cpu.cpl();
    let stays = code.is_conforming() || code.dpl() == cpl;
    let allowed = code.is_code() && code.dpl() <= cpl && (kind == Kind::Call || stays);
    if !allowed || long && (!code.long() || code.default_big()) {
        return Err(protection_fault(selector));
    }
    if !code.present() {
        return Err(not_present(selector));
    }
    check_target(cpu, &code, offset)?;
    cpu.mark_accessed(&mut code)?;

    let mut new_cpl = cpl;
    if kind == Kind::Call {
        if stays {
            let size = gate_size(gate, long);
            // A 64-bit gate pushes as 64-bit code does, also for compatibility mode.
            let stack = if long { Stack::flat(cpu, cpu.gpr[gpr::RSP], cpl, 0) } else { Stack::current(cpu) };
            push_return(cpu, stack, size)?;
        } else {
            new_cpl = code.dpl();
            push_inner(cpu, gate, new_cpl)?;
        }
    }
    cpu.segments[SegmentRegister::Cs as usize] = code.segment(selector & !3 | u16::from(new_cpl));
    cpu.rip = offset;
    Ok(())
}

fn gate_size(gate: &Descriptor, long: bool) -> usize {
    match gate.kind() {
        _ if long => 8,
        system::CALL_GATE16 => 2,
        _ => 4,
    }
}

fn check_gate(cpu: &Vcpu, selector: u16, gate: &Descriptor) -> Result<(), Exception> {
    if gate.dpl() < cpu.cpl() || gate.dpl() < (selector & 3) as u8 {
        return Err(protection_fault(selector));
    }
    if gate.present() { Ok(()) } else { Err(not_present(selector)) }
}

/// Switches to the stack of a more privileged level, with the old stack pointer, the gate's parameters and the return
/// address on it.
fn push_inner(cpu: &mut Vcpu, gate: &Descriptor, new_cpl: u8) -> Result<(), Exception> {
    let old_stack = [u64::from(cpu.seg(SegmentRegister::Ss).selector), cpu.gpr[gpr::RSP]];
    let return_address = [u64::from(cpu.seg(SegmentRegister::Cs).selector), cpu.rip];
    if cpu.long_mode() {
        let pointer = stack_from_tss(cpu, 4 + 8 * u64::from(new_cpl), 0)?;
        let mut stack = Stack::flat(cpu, pointer, new_cpl, 0);
        stack.push_frame(cpu, &[old_stack[0], old_stack[1], return_address[0], return_address[1]])?;
        cpu.segments[SegmentRegister::Ss as usize] = Vcpu::null_stack_segment(new_cpl);
        cpu.gpr[gpr::RSP] = stack.pointer;
        return Ok(());
    }
    let size = gate_size(gate, false);
    let (selector, pointer) = task::inner_stack(cpu, new_cpl, 0)?;
    if is_null(selector) {
        return Err(Exception::new(Vector::InvalidTss));
    }
    let segment = cpu.checked_stack_segment(selector, new_cpl, Vector::InvalidTss, 0)?;
    let mut stack = Stack::inner(cpu, segment, pointer, 0);
    stack.push_all(cpu, size, &old_stack)?;
    let count = (gate.raw >> 32 & 31) as usize;
    let mut parameters = [0; 31];
    let mut outer = Stack::current(cpu);
    for parameter in parameters.iter_mut().take(count) {
        *parameter = outer.pop(cpu, size)?;
    }
    for &parameter in parameters.iter().take(count).rev() {
        stack.push(cpu, size, parameter)?;
    }
    stack.push_all(cpu, size, &return_address)?;
    cpu.segments[SegmentRegister::Ss as usize] = stack.segment;
    cpu.gpr[gpr::RSP] = stack.pointer;
    Ok(())
}

/// To another task, by its TSS or a task gate (Intel SDM 3A 7.3).
fn to_task(cpu: &mut Vcpu, selector: u16, target: &Descriptor, kind: Kind) -> Result<(), Exception> {
    check_gate(cpu, selector, target)?;
    let tss_selector = if target.kind() == system::TASK_GATE { target.gate_selector() } else { selector };
    let tss = task::available_tss(cpu, tss_selector, 0)?;
    let reason = if kind == Kind::Jump { task::Reason::Jump } else { task::Reason::Call };
    task::switch(cpu, tss_selector, &tss, reason)
}

/// RET between segments; `size`: of the operands.
pub fn ret(cpu: &mut Vcpu, insn: &Instruction, size: usize) -> Result<(), Stop> {
    let release = if insn.op_count() > 0 { u64::from(insn.immediate16()) } else { 0 };
    let mut stack = Stack::current(cpu);
    // CS first, as a page fault shows.
    let selector = stack.peek_selector(cpu, size, 1)?;
    let amd = cpu.machine.cpuid.is_amd();
    if amd {
        // All of its place is read.
        stack.peek(cpu, size, 1)?;
    }
    let rip = stack.pop(cpu, size)?;
    stack.release(size as u64);
    if !cpu.protected_mode() || cpu.v8086() {
        let code = real_code_segment(cpu, selector, rip)?;
        stack.release(release);
        cpu.gpr[gpr::RSP] = stack.pointer;
        cpu.segments[SegmentRegister::Cs as usize] = code;
        cpu.rip = rip;
        return Ok(());
    }
    let cpl = cpu.cpl();
    let new_cpl = (selector & 3) as u8;
    let mut beyond = stack;
    beyond.release(release);
    if amd && new_cpl != cpl {
        // The other stack's pointer is read before CS is looked at (AMD APM 3, RET (Far)).
        let mut outer = beyond;
        outer.release(size as u64);
        outer.pop(cpu, size)?;
        outer = beyond;
        outer.pop(cpu, size)?;
    }
    let code = return_code(cpu, selector)?;
    stack = beyond;
    if new_cpl == cpl {
        check_target(cpu, &code, rip)?;
        cpu.segments[SegmentRegister::Cs as usize] = code.segment(selector);
        cpu.gpr[gpr::RSP] = stack.pointer;
        cpu.rip = rip;
        return Ok(());
    }
    let pointer = stack.pop(cpu, size)?;
    let stack_selector = stack.pop(cpu, size)? as u16;
    let segment = return_stack(cpu, stack_selector, &code, new_cpl)?;
    check_target(cpu, &code, rip)?;
    cpu.segments[SegmentRegister::Cs as usize] = code.segment(selector);
    cpu.rip = rip;
    load_stack(cpu, segment, pointer.wrapping_add(release));
    drop_privileged_segments(cpu);
    Ok(())
}
