//! IRET, IRETD and IRETQ (Intel SDM 2A): back from a handler to any mode and level, or to the previous task.

use arch::registers::{gpr, rflags};
use arch::{Exception, SegmentRegister, Vector};

use super::{
    check_target, drop_privileged_segments, iopl, load_stack, real_code_segment, return_code, return_stack, v8086,
};
use crate::cpu::{Stop, Vcpu};
use crate::descriptor::v8086_segment;
use crate::mmu::Stack;
use crate::task;

/// `size`: of the operands, 2, 4 or 8 bytes.
pub fn iret(cpu: &mut Vcpu, size: usize) -> Result<(), Stop> {
    if !cpu.protected_mode() || cpu.v8086() {
        return Ok(iret_real(cpu, size)?);
    }
    cpu.unblock_nmis();
    if cpu.rflags & rflags::NT != 0 {
        return Ok(return_to_task(cpu)?);
    }
    Ok(iret_protected(cpu, size)?)
}

fn iret_real(cpu: &mut Vcpu, size: usize) -> Result<(), Exception> {
    if cpu.v8086() && iopl(cpu) < 3 {
        return v8086::iret(cpu, size);
    }
    cpu.unblock_nmis();
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    let image = stack.pop(cpu, size)?;
    let code = real_code_segment(cpu, selector, rip)?;
    let mut mask = rflags::ARITHMETIC | rflags::TF | rflags::IF | rflags::DF | rflags::NT;
    if !cpu.v8086() {
        mask |= rflags::IOPL;
    }
    if size > 2 {
        mask |= rflags::RF | rflags::AC | rflags::ID;
    }
    cpu.set_flags(mask, image);
    cpu.segments[SegmentRegister::Cs as usize] = code;
    cpu.gpr[gpr::RSP] = stack.pointer;
    cpu.rip = rip;
    Ok(())
}

fn return_to_task(cpu: &mut Vcpu) -> Result<(), Exception> {
    if cpu.long_mode() {
        return Err(Exception::general_protection(0));
    }
    let (selector, tss) = task::previous_tss(cpu)?;
    task::switch(cpu, selector, &tss, task::Reason::Return)
}

fn iret_protected(cpu: &mut Vcpu, size: usize) -> Result<(), Exception> {
    let mut stack = Stack::current(cpu);
    let cpl = cpu.cpl();
    let from_64 = cpu.code64();
    let mut frame = [0; 5];
    let count = if from_64 { 5 } else { 3 };
    let start = stack;
    if let Err(e) = stack.pop_frame(cpu, size, &mut frame[..count]) {
        let aligned = e.vector != Vector::AlignmentCheck;
        return Err(if aligned { frame_fault(cpu, &start, size, count).err().unwrap_or(e) } else { e });
    }
    let [rip, selector, image, ..] = frame;
    let selector = selector as u16;
    if image & rflags::VM != 0 && size == 4 && cpl == 0 && !cpu.long_mode() {
        return return_to_v8086(cpu, &mut stack, rip, selector, image);
    }

    let new_cpl = (selector & 3) as u8;
    if cpu.machine.cpuid.is_amd() && new_cpl != cpl && !from_64 {
        // The other stack's pointer is read before CS is looked at.
        start.peek(cpu, size, 4)?;
        start.peek(cpu, size, 3)?;
    }
    let code = return_code(cpu, selector)?;
    let outer = new_cpl > cpl;
    if outer && !from_64 {
        stack.pop_frame(cpu, size, &mut frame[3..])?;
    }
    let changes_stack = outer || from_64;
    let [.., pointer, stack_selector] = frame;
    let new_stack = if changes_stack { Some(return_stack(cpu, stack_selector as u16, &code, new_cpl)?) } else { None };
    check_target(cpu, &code, rip)?;

    restore_flags(cpu, image, size, cpl);
    cpu.segments[SegmentRegister::Cs as usize] = code.segment(selector);
    cpu.rip = rip;
    match new_stack {
        Some(segment) => load_stack(cpu, segment, pointer),
        None => cpu.gpr[gpr::RSP] = stack.pointer,
    }
    if outer {
        drop_privileged_segments(cpu);
    }
    Ok(())
}

/// Which fault of a frame that can't all be read comes first: RFLAGS is read first, SS:RSP only after CS is known to be good,
/// but for AMD's processors, which read SS then (AMD APM 3, IRET).
fn frame_fault(cpu: &mut Vcpu, stack: &Stack, size: usize, count: usize) -> Result<(), Exception> {
    stack.peek(cpu, size, 2)?;
    let selector = stack.peek(cpu, size, 1)? as u16;
    stack.peek(cpu, size, 0)?;
    if !cpu.machine.cpuid.is_amd() {
        return_code(cpu, selector)?;
    } else if count == 5 {
        stack.peek(cpu, size, 4)?;
    }
    Ok(())
}

/// What of RFLAGS a return at `cpl` may change.
fn restore_flags(cpu: &mut Vcpu, image: u64, size: usize, cpl: u8) {
    let mut mask = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        mask |= rflags::RF | rflags::AC | rflags::ID;
    }
    if cpl <= iopl(cpu) {
        mask |= rflags::IF;
    }
    if cpl == 0 {
        mask |= rflags::IOPL;
        if size > 2 {
            mask |= rflags::VIF | rflags::VIP;
        }
    }
    cpu.set_flags(mask, image);
}

fn return_to_v8086(
    cpu: &mut Vcpu,
    stack: &mut Stack,
    rip: u64,
    code_selector: u16,
    image: u64,
) -> Result<(), Exception> {
    use SegmentRegister::{Cs, Ds, Es, Fs, Gs, Ss};
    let mut frame = [0; 6];
    stack.pop_frame(cpu, 4, &mut frame)?;
    let [pointer, selectors @ ..] = frame;
    if rip > 0xffff {
        return Err(Exception::general_protection(0));
    }
    for (register, selector) in [Ss, Es, Ds, Fs, Gs].into_iter().zip(selectors) {
        cpu.segments[register as usize] = v8086_segment(selector as u16);
    }
    cpu.segments[Cs as usize] = v8086_segment(code_selector);
    cpu.gpr[gpr::RSP] = pointer;
    cpu.rip = rip;
    restore_flags(cpu, image, 4, 0);
    cpu.rflags |= rflags::VM;
    Ok(())
}
