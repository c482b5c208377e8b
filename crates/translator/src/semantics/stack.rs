//! Near branches and stack instructions as plain functions: what emitted code falls back to when a stack access is not
//! simple, and what 16-bit and segmented code uses altogether.

use arch::registers::{gpr, rflags};
use arch::{Exception, SegmentRegister};
use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind};

use crate::cpu::{Stop, Vcpu};
use crate::mmu::Stack;

/// Executes a near JMP, Jcc, CALL, RET, LOOP, JCXZ, or a PUSH, POP, PUSHA, POPA or LEAVE.
pub fn exec(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    use Mnemonic::*;
    match insn.mnemonic() {
        Jmp => {
            let target = target(cpu, insn)?;
            branch(cpu, insn, target)?;
        }
        Call => {
            let target = target(cpu, insn)?;
            let size = operand_size(insn);
            let mut stack = Stack::current(cpu);
            stack.push(cpu, size, cpu.rip)?;
            check_target(cpu, target)?;
            cpu.gpr[gpr::RSP] = stack.pointer;
            cpu.rip = target;
        }
        Ret => {
            let size = operand_size(insn);
            let mut stack = Stack::current(cpu);
            let target = stack.pop(cpu, size)?;
            check_target(cpu, target)?;
            if insn.op_count() == 1 {
                stack.release(insn.immediate16().into());
            }
            cpu.gpr[gpr::RSP] = stack.pointer;
            cpu.rip = target;
        }
        Loop | Loope | Loopne => {
            let width = counter_width(insn);
            let count = cpu.gpr[gpr::RCX].wrapping_sub(1) & mask(width);
            let zero = cpu.rflags & rflags::ZF != 0;
            let taken = count != 0
                && match insn.mnemonic() {
                    Loope => zero,
                    Loopne => !zero,
                    _ => true,
                };
            if taken {
                branch(cpu, insn, insn.near_branch_target())?;
            }
            set_counter(cpu, width, count);
        }
        Jcxz | Jecxz | Jrcxz => {
            if cpu.gpr[gpr::RCX] & mask(counter_width(insn)) == 0 {
                branch(cpu, insn, insn.near_branch_target())?;
            }
        }
        Push => {
            let size = insn.stack_pointer_increment().unsigned_abs() as usize;
            let value = cpu.read_operand(insn, 0)?;
            let mut stack = Stack::current(cpu);
            stack.push(cpu, size, value)?;
            cpu.gpr[gpr::RSP] = stack.pointer;
        }
        Pop => {
            let size = insn.stack_pointer_increment().unsigned_abs() as usize;
            let old = cpu.gpr[gpr::RSP];
            let mut stack = Stack::current(cpu);
            let value = stack.pop(cpu, size)?;
            // A memory operand based on rsp is addressed with the incremented one (Intel SDM 2, POP).
            cpu.gpr[gpr::RSP] = stack.pointer;
            if let Err(e) = cpu.write_operand(insn, 0, value) {
                cpu.gpr[gpr::RSP] = old;
                return Err(e.into());
            }
        }
        Pusha | Pushad => super::legacy::pusha(cpu, insn)?,
        Popa | Popad => super::legacy::popa(cpu, insn)?,
        Leave => {
            let size = operand_size(insn);
            let mut stack = Stack::current(cpu);
            stack.pointer = match cpu.stack_width() {
                2 => stack.pointer & !0xffff | cpu.gpr[gpr::RBP] & 0xffff,
                4 => cpu.gpr[gpr::RBP] & 0xffff_ffff,
                _ => cpu.gpr[gpr::RBP],
            };
            let value = stack.pop(cpu, size)?;
            cpu.gpr[gpr::RSP] = stack.pointer;
            let rbp = &mut cpu.gpr[gpr::RBP];
            *rbp = if size == 2 { *rbp & !0xffff | value } else { value };
        }
        _ => {
            if condition(insn.condition_code(), cpu.rflags) {
                branch(cpu, insn, insn.near_branch_target())?;
            }
        }
    }
    Ok(())
}

/// Bytes of the return address that CALL pushes, RET pops, or of LEAVE's rbp.
pub fn operand_size(insn: &Instruction) -> usize {
    use iced_x86::Code::*;
    match insn.code() {
        Leavew | Retnw | Retnw_imm16 | Call_rel16 | Call_rm16 => 2,
        Leaved | Retnd | Retnd_imm16 | Call_rel32_32 | Call_rm32 => 4,
        _ => 8,
    }
}

fn target(cpu: &mut Vcpu, insn: &Instruction) -> Result<u64, Exception> {
    match insn.op0_kind() {
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => Ok(insn.near_branch_target()),
        _ => cpu.read_operand(insn, 0),
    }
}

/// Outside 64-bit mode a target lies within CS (Intel SDM 2, JMP); in it, it is canonical.
fn check_target(cpu: &Vcpu, target: u64) -> Result<(), Exception> {
    let fits = if cpu.code64() {
        crate::access::canonical(target)
    } else {
        target <= cpu.seg(SegmentRegister::Cs).limit.into()
    };
    if fits { Ok(()) } else { Err(Exception::general_protection(0)) }
}

fn branch(cpu: &mut Vcpu, _: &Instruction, target: u64) -> Result<(), Exception> {
    check_target(cpu, target)?;
    cpu.rip = target;
    Ok(())
}

pub fn counter_width(insn: &Instruction) -> u32 {
    use iced_x86::Code::*;
    match insn.code() {
        Jcxz_rel8_16 | Jcxz_rel8_32 => 16,
        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loopne_rel8_16_CX
        | Loopne_rel8_32_CX => 16,
        Jrcxz_rel8_16 | Jrcxz_rel8_64 => 64,
        Loop_rel8_16_RCX | Loop_rel8_64_RCX | Loope_rel8_16_RCX | Loope_rel8_64_RCX | Loopne_rel8_16_RCX
        | Loopne_rel8_64_RCX => 64,
        _ => 32,
    }
}

fn mask(width: u32) -> u64 {
    u64::MAX >> (64 - width)
}

fn set_counter(cpu: &mut Vcpu, width: u32, count: u64) {
    let rcx = &mut cpu.gpr[gpr::RCX];
    // A 32-bit result clears the upper half; a 16-bit one keeps it.
    *rcx = if width == 16 { *rcx & !0xffff | count } else { count };
}

fn condition(code: ConditionCode, flags: u64) -> bool {
    let set = |f: u64| flags & f != 0;
    let less = set(rflags::SF) != set(rflags::OF);
    match code {
        ConditionCode::None => false,
        ConditionCode::o => set(rflags::OF),
        ConditionCode::no => !set(rflags::OF),
        ConditionCode::b => set(rflags::CF),
        ConditionCode::ae => !set(rflags::CF),
        ConditionCode::e => set(rflags::ZF),
        ConditionCode::ne => !set(rflags::ZF),
        ConditionCode::be => set(rflags::CF | rflags::ZF),
        ConditionCode::a => !set(rflags::CF | rflags::ZF),
        ConditionCode::s => set(rflags::SF),
        ConditionCode::ns => !set(rflags::SF),
        ConditionCode::p => set(rflags::PF),
        ConditionCode::np => !set(rflags::PF),
        ConditionCode::l => less,
        ConditionCode::ge => !less,
        ConditionCode::le => set(rflags::ZF) || less,
        ConditionCode::g => !(set(rflags::ZF) || less),
    }
}
