//! RFLAGS as a whole and its system bits: PUSHF, POPF, CLI, STI, CLD, STD, CLAC, STAC.
//!
//! IOPL and, in virtual-8086 mode or with CR4.PVI, the virtual interrupt flag decide what a program may change (Intel SDM
//! 2A CLI, 2B POPF, STI; 3A 21.3).

use arch::Exception;
use arch::cpuid::Feature;
use arch::registers::{cr4, gpr, rflags};
use iced_x86::{Code, Instruction, Mnemonic};

use super::{Exec, Sensitive};
use crate::cpu::{Stop, Vcpu};
use crate::mmu::Stack;

#[cfg(test)]
mod tests;

/// What POPF can change for whom, system bits apart.
const POPF_ALWAYS: u64 = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;

pub fn lookup(insn: &Instruction) -> Option<Sensitive> {
    let (exec, ends_block): (Exec, bool) = match insn.mnemonic() {
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => (pushf, false),
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => (popf, true),
        // Fewer events can be taken, not more.
        Mnemonic::Cli => (cli, false),
        Mnemonic::Sti => (sti, true),
        Mnemonic::Cld => (|cpu, _| set(cpu, rflags::DF, false), false),
        Mnemonic::Std => (|cpu, _| set(cpu, rflags::DF, true), false),
        Mnemonic::Clac => (|cpu, _| smap(cpu, false), true),
        Mnemonic::Stac => (|cpu, _| smap(cpu, true), true),
        _ => return None,
    };
    Some(Sensitive { exec, ends_block, fp: false })
}

fn set(cpu: &mut Vcpu, bit: u64, on: bool) -> Result<(), Stop> {
    cpu.set_flags(bit, if on { bit } else { 0 });
    Ok(())
}

fn smap(cpu: &mut Vcpu, on: bool) -> Result<(), Stop> {
    if cpu.cpl() != 0 || !cpu.machine.cpuid.has(Feature::Smap) {
        return Err(Exception::invalid_opcode().into());
    }
    set(cpu, rflags::AC, on)
}

/// Which flag CLI and STI of the current code act on.
enum InterruptFlag {
    Real,
    Virtual,
}

impl Vcpu {
    /// RFLAGS.IOPL
    pub fn iopl(&self) -> u8 {
        (self.rflags >> rflags::IOPL_SHIFT & 3) as u8
    }

    fn interrupt_flag(&self) -> Result<InterruptFlag, Exception> {
        if self.v8086() {
            match (self.iopl(), self.cr4 & cr4::VME) {
                (3, _) => Ok(InterruptFlag::Real),
                (_, 0) => Err(Exception::general_protection(0)),
                _ => Ok(InterruptFlag::Virtual),
            }
        } else if self.cpl() <= self.iopl() {
            Ok(InterruptFlag::Real)
        } else if self.cpl() == 3 && self.cr4 & cr4::PVI != 0 {
            Ok(InterruptFlag::Virtual)
        } else {
            Err(Exception::general_protection(0))
        }
    }
}

fn cli(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    match cpu.interrupt_flag()? {
        InterruptFlag::Real => set(cpu, rflags::IF, false),
        InterruptFlag::Virtual => set(cpu, rflags::VIF, false),
    }
}

pub fn sti(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    match cpu.interrupt_flag()? {
        InterruptFlag::Real => {
            // Only the STI that changes IF holds interrupts off for one more instruction.
            if cpu.rflags & rflags::IF == 0 {
                cpu.interrupt_shadow = true;
            }
            set(cpu, rflags::IF, true)
        }
        InterruptFlag::Virtual if cpu.rflags & rflags::VIP != 0 => Err(Exception::general_protection(0).into()),
        InterruptFlag::Virtual => set(cpu, rflags::VIF, true),
    }
}

/// Operand size in bytes.
fn width(insn: &Instruction) -> usize {
    match insn.code() {
        Code::Pushfw | Code::Popfw => 2,
        Code::Pushfd | Code::Popfd => 4,
        _ => 8,
    }
}

/// Virtual-8086 mode below IOPL 3: #GP(0), unless CR4.VME lets 16-bit forms see VIF in the place of IF.
fn virtual_8086_view(cpu: &Vcpu, size: usize) -> Result<bool, Exception> {
    if !cpu.v8086() || cpu.iopl() == 3 {
        Ok(false)
    } else if cpu.cr4 & cr4::VME != 0 && size == 2 {
        Ok(true)
    } else {
        Err(Exception::general_protection(0))
    }
}

fn pushf(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let size = width(insn);
    let mut image = cpu.rflags & !(rflags::RF | rflags::VM);
    if virtual_8086_view(cpu, size)? {
        let interrupts = if cpu.rflags & rflags::VIF != 0 { rflags::IF } else { 0 };
        image = image & !rflags::IF | interrupts | rflags::IOPL;
    }
    let mut stack = Stack::current(cpu);
    stack.push(cpu, size, image)?;
    cpu.gpr[gpr::RSP] = stack.pointer;
    Ok(())
}

fn popf(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let size = width(insn);
    let virtualized = virtual_8086_view(cpu, size)?;
    let mut stack = Stack::current(cpu);
    let image = stack.pop(cpu, size)?;
    if virtualized {
        // TF from the stack, or a pending virtual interrupt that is being enabled: the monitor takes over.
        let enables_pending = cpu.rflags & rflags::VIP != 0 && image & rflags::IF != 0;
        if image & rflags::TF != 0 || enables_pending {
            return Err(Exception::general_protection(0).into());
        }
        cpu.set_flags(POPF_ALWAYS & 0xffff, image);
        set(cpu, rflags::VIF, image & rflags::IF != 0)?;
    } else {
        let mut mask = POPF_ALWAYS;
        let mut cleared = 0;
        if cpu.cpl() <= cpu.iopl() {
            mask |= rflags::IF;
        }
        if cpu.cpl() == 0 {
            mask |= rflags::IOPL;
            // "VIP and VIF flags are cleared, RF and VM unaffected" for 32- and 64-bit operands at CPL 0.
            cleared = rflags::VIP | rflags::VIF;
        }
        if size == 2 {
            mask &= 0xffff;
            cleared = 0;
        }
        cpu.set_flags(mask | cleared, image & mask);
    }
    cpu.rflags &= !rflags::RF;
    cpu.gpr[gpr::RSP] = stack.pointer;
    Ok(())
}
