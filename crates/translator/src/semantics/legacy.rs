//! What 64-bit mode lost and older code still has: decimal adjustment, PUSHA and POPA, BOUND, ARPL, SALC; and ENTER,
//! which may touch many stack slots, in every mode.

use arch::registers::{gpr, rflags};
use arch::{Exception, SegmentRegister, Vector};
use iced_x86::{Code, Instruction, Mnemonic};

use super::Sensitive;
use crate::cpu::{Stop, Vcpu};
use crate::mmu::Stack;

/// The entry for one of these instructions.
pub fn lookup(insn: &Instruction) -> Option<Sensitive> {
    use Mnemonic::*;
    let exec: super::Exec = match insn.mnemonic() {
        Aaa | Aas => ascii_adjust,
        Daa | Das => decimal_adjust,
        Aam => aam,
        Aad => aad,
        Salc => salc,
        Arpl => arpl,
        Bound => bound,
        Enter => enter,
        _ => return None,
    };
    Some(Sensitive { exec, ends_block: false, fp: false })
}

fn al(cpu: &Vcpu) -> u8 {
    cpu.gpr[gpr::RAX] as u8
}

fn ax(cpu: &Vcpu) -> u16 {
    cpu.gpr[gpr::RAX] as u16
}

fn set_al(cpu: &mut Vcpu, value: u8) {
    cpu.gpr[gpr::RAX] = cpu.gpr[gpr::RAX] & !0xff | u64::from(value);
}

fn set_ax(cpu: &mut Vcpu, value: u16) {
    cpu.gpr[gpr::RAX] = cpu.gpr[gpr::RAX] & !0xffff | u64::from(value);
}

fn flag(on: bool, bit: u64) -> u64 {
    if on { bit } else { 0 }
}

/// SF, ZF and PF of a byte.
fn byte_flags(value: u8) -> u64 {
    flag(value & 0x80 != 0, rflags::SF)
        | flag(value == 0, rflags::ZF)
        | flag(value.count_ones().is_multiple_of(2), rflags::PF)
}

/// AAA and AAS (Intel SDM 2A).
fn ascii_adjust(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let adjust = al(cpu) & 15 > 9 || cpu.rflags & rflags::AF != 0;
    if adjust {
        let value = ax(cpu);
        let add = insn.mnemonic() == Mnemonic::Aaa;
        set_ax(cpu, if add { value.wrapping_add(0x106) } else { value.wrapping_sub(0x106) });
    }
    set_al(cpu, al(cpu) & 15);
    cpu.set_flags(rflags::AF | rflags::CF, flag(adjust, rflags::AF | rflags::CF));
    Ok(())
}

/// DAA and DAS (Intel SDM 2A).
fn decimal_adjust(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let add = insn.mnemonic() == Mnemonic::Daa;
    let step = |value: u8, by: u8| if add { value.wrapping_add(by) } else { value.wrapping_sub(by) };
    let (old, old_carry) = (al(cpu), cpu.rflags & rflags::CF != 0);
    let (mut value, mut carry) = (old, false);
    let low = old & 15 > 9 || cpu.rflags & rflags::AF != 0;
    if low {
        value = step(value, 6);
        carry = old_carry || if add { old > 0xf9 } else { old < 6 };
    }
    if old > 0x99 || old_carry {
        value = step(value, 0x60);
        carry = true;
    } else if add {
        carry = false;
    }
    set_al(cpu, value);
    let flags = byte_flags(value) | flag(low, rflags::AF) | flag(carry, rflags::CF);
    cpu.set_flags(rflags::SF | rflags::ZF | rflags::PF | rflags::AF | rflags::CF, flags);
    Ok(())
}

fn aam(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let (value, base) = (al(cpu), insn.immediate8());
    let (Some(high), Some(low)) = (value.checked_div(base), value.checked_rem(base)) else {
        return Err(Exception::new(Vector::DivideError).into());
    };
    set_ax(cpu, u16::from(high) << 8 | u16::from(low));
    cpu.set_flags(rflags::SF | rflags::ZF | rflags::PF, byte_flags(low));
    Ok(())
}

fn aad(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let value = ax(cpu);
    let low = (value as u8).wrapping_add(((value >> 8) as u8).wrapping_mul(insn.immediate8()));
    set_ax(cpu, low.into());
    cpu.set_flags(rflags::SF | rflags::ZF | rflags::PF, byte_flags(low));
    Ok(())
}

/// SALC: AL is all ones if CF is set, else zero.
fn salc(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    set_al(cpu, if cpu.rflags & rflags::CF != 0 { 0xff } else { 0 });
    Ok(())
}

/// ARPL: raises the RPL of a selector to that of another.
fn arpl(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    if !cpu.protected_mode() || cpu.v8086() {
        return Err(Exception::invalid_opcode().into());
    }
    let (selector, least) = (cpu.read_operand(insn, 0)?, cpu.read_operand(insn, 1)? & 3);
    let raised = selector & 3 < least;
    if raised {
        cpu.write_operand(insn, 0, selector & !3 | least)?;
    }
    cpu.set_flags(rflags::ZF, flag(raised, rflags::ZF));
    Ok(())
}

/// BOUND: #BR if a signed index is not between the two bounds in memory.
fn bound(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let size = insn.op0_register().size();
    let (segment, offset) = cpu.effective_address(insn, 1);
    let signed = |value: u64| if size == 2 { i64::from(value as i16) } else { i64::from(value as i32) };
    let index = signed(cpu.read_register(insn.op0_register()));
    let amd = cpu.machine.cpuid.is_amd();
    let mut bound = |i: usize| {
        let va = cpu.linear(segment, offset.wrapping_add((i * size) as u64), size, false)?;
        cpu.read_sized(va, size, cpu.context())
    };
    let lower = signed(bound(0)?);
    // Intel's processors read the upper bound only if it matters.
    let upper = if lower > index && !amd { None } else { Some(signed(bound(1)?)) };
    let outside = lower > index || upper.is_some_and(|upper| upper < index);
    if outside { Err(Exception::new(Vector::BoundRange).into()) } else { Ok(()) }
}

pub fn pusha(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let size = if insn.code() == Code::Pushaw { 2 } else { 4 };
    let mut stack = Stack::current(cpu);
    // AX, CX, DX, BX, the old SP, BP, SI, DI: the order of encodings.
    let values: [u64; 8] = std::array::from_fn(|i| cpu.gpr[i]);
    stack.push_all(cpu, size, &values)?;
    cpu.gpr[gpr::RSP] = stack.pointer;
    Ok(())
}

pub fn popa(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let size = if insn.code() == Code::Popaw { 2 } else { 4 };
    let mut stack = Stack::current(cpu);
    // What was popped before a fault stays popped; the stack pointer moves only at the end.
    for i in (0..8).rev() {
        let value = stack.pop(cpu, size)?;
        if i != gpr::RSP {
            cpu.gpr[i] = if size == 2 { cpu.gpr[i] & !0xffff | value } else { value };
        }
    }
    cpu.gpr[gpr::RSP] = stack.pointer;
    Ok(())
}

/// ENTER: makes a stack frame with the frame pointers of `level` enclosing procedures (Intel SDM 1 6.6.1, 2A ENTER).
fn enter(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let size = match insn.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let (locals, level) = (insn.immediate16(), insn.immediate8_2nd() % 32);
    let mut stack = Stack::current(cpu);
    let rbp = cpu.gpr[gpr::RBP];
    stack.push(cpu, size, rbp)?;
    let frame = stack.pointer;
    if level != 0 {
        let mut enclosing = stack;
        enclosing.pointer = rbp;
        for _ in 1..level {
            enclosing.release((size as u64).wrapping_neg());
            let mut slot = enclosing;
            let pointer = slot.pop(cpu, size)?;
            stack.push(cpu, size, pointer)?;
        }
        stack.push(cpu, size, frame)?;
    }
    stack.release(u64::from(locals).wrapping_neg());
    // It faults where a push to the new stack pointer's place would.
    let width = cpu.stack_width();
    let offset = if width == 2 { stack.pointer & 0xffff } else { stack.pointer };
    let va = cpu.linear(SegmentRegister::Ss, offset, size, true)?;
    cpu.probe_write(va, size, cpu.context())?;
    cpu.gpr[gpr::RBP] = match size {
        2 => rbp & !0xffff | frame & 0xffff,
        4 => frame & 0xffff_ffff,
        _ => frame,
    };
    cpu.gpr[gpr::RSP] = stack.pointer;
    Ok(())
}

#[cfg(test)]
mod tests;
