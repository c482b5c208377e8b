//! Transfers of control that change more than RIP: software interrupts, system calls, far branches and returns.
//!
//! [`far`] has JMP, CALL and RET between segments, [`iret`] the returns from handlers, [`fast`] SYSCALL, SYSENTER and
//! their returns, [`v8086`] what is special in virtual-8086 mode. What they share is here: checking a code segment
//! that control enters or returns to, and the changes a new privilege level brings.

mod far;
mod fast;
mod iret;
mod v8086;

use arch::registers::{gpr, rflags};
use arch::{Exception, Segment, SegmentRegister, Vector};
use iced_x86::{Code, Instruction};

pub use fast::SYSRET_FLAGS;

use super::{Exec, Sensitive};
use crate::cpu::{Stop, Vcpu};
use crate::deliver::{Event, deliver};
use crate::descriptor::{Descriptor, is_null, protection_fault, selector_fault};
use crate::mmu::is_canonical;
use crate::mmu::segmentation::limit_allows;

/// The function for an instruction of this module.
pub fn lookup(insn: &Instruction) -> Option<Sensitive> {
    let exec: Exec = match insn.code() {
        Code::Int_imm8 => int_n,
        Code::Int3 => |cpu, _| deliver(cpu, Event::Int3),
        Code::Int1 => |cpu, _| deliver(cpu, Event::Icebp),
        Code::Into => into,
        Code::Iretw => |cpu, _| iret::iret(cpu, 2),
        Code::Iretd => |cpu, _| iret::iret(cpu, 4),
        Code::Iretq => |cpu, _| iret::iret(cpu, 8),
        Code::Syscall => fast::syscall,
        Code::Sysretd => |cpu, _| fast::sysret(cpu, false),
        Code::Sysretq => |cpu, _| fast::sysret(cpu, true),
        Code::Sysenter => fast::sysenter,
        Code::Sysexitd => |cpu, _| fast::sysexit(cpu, false),
        Code::Sysexitq => |cpu, _| fast::sysexit(cpu, true),
        Code::Jmp_ptr1616 | Code::Jmp_ptr1632 | Code::Jmp_m1616 | Code::Jmp_m1632 | Code::Jmp_m1664 => far::jump,
        Code::Call_ptr1616 | Code::Call_ptr1632 | Code::Call_m1616 | Code::Call_m1632 | Code::Call_m1664 => far::call,
        Code::Retfw | Code::Retfw_imm16 => |cpu, insn| far::ret(cpu, insn, 2),
        Code::Retfd | Code::Retfd_imm16 => |cpu, insn| far::ret(cpu, insn, 4),
        Code::Retfq | Code::Retfq_imm16 => |cpu, insn| far::ret(cpu, insn, 8),
        _ => return None,
    };
    Some(Sensitive { exec, ends_block: true, fp: false })
}

fn int_n(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    if cpu.v8086() {
        return v8086::int_n(cpu, insn.immediate8());
    }
    deliver(cpu, Event::SoftwareInterrupt(insn.immediate8()))
}

fn into(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    if cpu.rflags & rflags::OF == 0 {
        return Ok(());
    }
    deliver(cpu, Event::Into)
}

fn iopl(cpu: &Vcpu) -> u8 {
    (cpu.rflags >> rflags::IOPL_SHIFT & 3) as u8
}

fn not_present(selector: u16) -> Exception {
    selector_fault(Vector::SegmentNotPresent, selector, 0)
}

/// CS for a transfer in real or virtual-8086 mode; `offset` has to be within its limit.
fn real_code_segment(cpu: &Vcpu, selector: u16, offset: u64) -> Result<Segment, Exception> {
    let segment = match cpu.v8086() {
        true => crate::descriptor::v8086_segment(selector),
        false => cpu.real_mode_segment(SegmentRegister::Cs, selector),
    };
    if offset > u64::from(segment.limit) {
        return Err(Exception::general_protection(0));
    }
    Ok(segment)
}

/// A code descriptor with L and D both set is reserved in IA-32e mode.
fn reserved_code(cpu: &Vcpu, code: &Descriptor) -> bool {
    cpu.long_mode() && code.long() && code.default_big()
}

/// #GP(0) where `offset` is outside the code segment: not canonical for 64-bit code, beyond the limit for other.
fn check_target(cpu: &Vcpu, code: &Descriptor, offset: u64) -> Result<(), Exception> {
    let allowed =
        if cpu.long_mode() && code.long() { is_canonical(offset) } else { limit_allows(&code.segment(0), offset, 1) };
    if allowed { Ok(()) } else { Err(Exception::general_protection(0)) }
}

/// The descriptor of a code segment to return to, checked as RET and IRET do (Intel SDM 2B, RET; 2A, IRET).
fn return_code(cpu: &mut Vcpu, selector: u16) -> Result<Descriptor, Exception> {
    if is_null(selector) {
        return Err(Exception::general_protection(0));
    }
    let invalid = protection_fault(selector);
    let mut code = cpu.descriptor(selector)?.ok_or(invalid)?;
    let (rpl, cpl) = ((selector & 3) as u8, cpu.cpl());
    let privilege = if code.is_conforming() { code.dpl() <= rpl } else { code.dpl() == rpl };
    if !code.is_code() || reserved_code(cpu, &code) || rpl < cpl || !privilege {
        return Err(invalid);
    }
    if !code.present() {
        return Err(not_present(selector));
    }
    cpu.mark_accessed(&mut code)?;
    Ok(code)
}

/// The stack segment that goes with a return to `code` at privilege level `cpl`. Null is for 64-bit code below level 3.
fn return_stack(cpu: &mut Vcpu, selector: u16, code: &Descriptor, cpl: u8) -> Result<Segment, Exception> {
    if is_null(selector) {
        return if cpu.long_mode() && code.long() && cpl < 3 {
            Ok(Segment { selector, ..Vcpu::null_stack_segment(cpl) })
        } else {
            Err(Exception::general_protection(0))
        };
    }
    cpu.checked_stack_segment(selector, cpl, Vector::GeneralProtection, 0)
}

/// Loads SS and as much of RSP as the new code's stacks have.
fn load_stack(cpu: &mut Vcpu, segment: Segment, pointer: u64) {
    cpu.segments[SegmentRegister::Ss as usize] = segment;
    let old = cpu.gpr[gpr::RSP];
    cpu.gpr[gpr::RSP] = if cpu.code64() {
        pointer
    } else if segment.default_big() {
        pointer & 0xffff_ffff
    } else {
        // The rest keeps what it was, for the outer level to see: a known leak of real processors.
        old & 0xffff_0000 | pointer & 0xffff
    };
}

/// Data segments that the new privilege level may not use become null (Intel SDM 2B, RET).
fn drop_privileged_segments(cpu: &mut Vcpu) {
    use SegmentRegister::{Ds, Es, Fs, Gs};
    let cpl = cpu.cpl();
    for register in [Es, Ds, Fs, Gs] {
        let segment = &mut cpu.segments[register as usize];
        let conforming = segment.kind() & 0xc == 0xc;
        if segment.present() && segment.dpl() < cpl && !conforming {
            // Only the selector and the right to use it go: in 64-bit code FS and GS keep their bases.
            *segment = Segment { base: segment.base, ..Segment::default() };
        }
    }
}

#[cfg(test)]
mod tests;
