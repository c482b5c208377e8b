//! IN, OUT, INS and OUTS: who may use which port (Intel SDM 1 19.5), and the string forms' repetition.

use arch::registers::{cr4, gpr, rflags};
use arch::{Exception, SegmentRegister};
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{Exec, Sensitive};
use crate::cpu::{Stop, Vcpu};

#[cfg(test)]
mod tests;

/// Repetitions of INS and OUTS before interrupts get a chance.
const BATCH: u32 = 64;

pub fn lookup(insn: &Instruction) -> Option<Sensitive> {
    let exec: Exec = match insn.mnemonic() {
        Mnemonic::In => input,
        Mnemonic::Out => output,
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => string::<true>,
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => string::<false>,
        _ => return None,
    };
    // What a port write causes (an interrupt, a reset) is to be seen right after it.
    Some(Sensitive { exec, ends_block: insn.mnemonic() != Mnemonic::In, fp: false })
}

impl Vcpu {
    /// #GP(0) unless IOPL or the I/O permission bitmap of the TSS allows `size` ports from `port`.
    fn check_ports(&mut self, port: u16, size: usize) -> Result<(), Exception> {
        if !self.protected_mode() || self.cpl() <= self.iopl() && !self.v8086() {
            return Ok(());
        }
        const BITMAP_BASE: u64 = 102;
        let denied = Exception::general_protection(0);
        let tss32 = matches!(self.tr.kind(), 9 | 0xb) && self.tr.present();
        let limit = u64::from(self.tr.limit);
        if !tss32 || limit < BITMAP_BASE + 1 {
            return Err(denied);
        }
        let context = self.system_context();
        let start = self.read_sized(self.tr.base.wrapping_add(BITMAP_BASE), 2, context)? + u64::from(port / 8);
        // Two bytes are always read, as ports may straddle them.
        if start + 1 > limit {
            return Err(denied);
        }
        let bits = self.read_sized(self.tr.base.wrapping_add(start), 2, context)?;
        let mask = ((1u64 << size) - 1) << (port & 7);
        if bits & mask == 0 { Ok(()) } else { Err(denied) }
    }

    /// I/O breakpoints (Intel SDM 3B 18.2.4): a #DB trap follows the instruction.
    fn watch_ports(&mut self, port: u16, size: usize) {
        if self.cr4 & cr4::DE == 0 || self.dr7 & 0xff == 0 {
            return;
        }
        const IO: u64 = 2;
        for (i, &address) in self.dr.iter().enumerate() {
            let (enabled, kind) = (self.dr7 >> (2 * i) & 3 != 0, self.dr7 >> (16 + 4 * i) & 3);
            let length = (self.dr7 >> (18 + 4 * i) & 3) + 1;
            let start = address & !(length - 1);
            if enabled && kind == IO && start < u64::from(port) + size as u64 && u64::from(port) < start + length {
                self.pending_debug |= 1 << i;
            }
        }
    }

    fn read_port(&mut self, port: u16, size: usize) -> u64 {
        let mut data = [0; 8];
        self.machine.bus().pio_read(port, &mut data[..size]);
        self.watch_ports(port, size);
        u64::from_le_bytes(data)
    }

    fn write_port(&mut self, port: u16, size: usize, value: u64) {
        self.machine.bus().pio_write(port, &value.to_le_bytes()[..size]);
        self.follow_map();
        self.watch_ports(port, size);
    }
}

fn input(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let port = cpu.read_operand(insn, 1)? as u16;
    let size = insn.op0_register().size();
    cpu.check_ports(port, size)?;
    let value = cpu.read_port(port, size);
    cpu.write_register(insn.op0_register(), value);
    Ok(())
}

fn output(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let port = cpu.read_operand(insn, 0)? as u16;
    let size = insn.op1_register().size();
    cpu.check_ports(port, size)?;
    let value = cpu.read_register(insn.op1_register());
    cpu.write_port(port, size, value);
    Ok(())
}

/// The address size of a string operand: which part of rCX, rSI and rDI counts.
fn address_mask(kind: OpKind) -> u64 {
    match kind {
        OpKind::MemoryESDI | OpKind::MemorySegSI => 0xffff,
        OpKind::MemoryESEDI | OpKind::MemorySegESI => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// A pointer or counter register moves within its address size: 32-bit ones clear the upper half, 16-bit ones keep it.
fn advance(value: u64, by: u64, mask: u64) -> u64 {
    let moved = value.wrapping_add(by) & mask;
    if mask == 0xffff { value & !mask | moved } else { moved }
}

fn string<const INPUT: bool>(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let operand = if INPUT { 0 } else { 1 };
    let (size, mask) = (insn.memory_size().size(), address_mask(insn.op_kind(operand)));
    let repeated = insn.has_rep_prefix() || insn.has_repne_prefix();
    let port = cpu.gpr[gpr::RDX] as u16;
    // Even if there is nothing to repeat.
    cpu.check_ports(port, size)?;
    if repeated && cpu.gpr[gpr::RCX] & mask == 0 {
        return Ok(());
    }
    let step = if cpu.rflags & rflags::DF != 0 { (size as u64).wrapping_neg() } else { size as u64 };
    let pointer = if INPUT { gpr::RDI } else { gpr::RSI };
    // A trap is due after each repetition.
    let batch = if cpu.rflags & rflags::TF != 0 { 1 } else { BATCH };
    for _ in 0..batch {
        let (segment, offset) = cpu.effective_address(insn, operand);
        debug_assert!(!INPUT || segment == SegmentRegister::Es);
        let address = cpu.linear(segment, offset, size, INPUT)?;
        if INPUT {
            // The port is read only if what it gives can be stored.
            cpu.probe_write(address, size, cpu.context())?;
            let value = cpu.read_port(port, size);
            cpu.write_sized(address, size, value, cpu.context())?;
        } else {
            let value = cpu.read_sized(address, size, cpu.context())?;
            cpu.write_port(port, size, value);
        }
        cpu.gpr[pointer] = advance(cpu.gpr[pointer], step, mask);
        if !repeated {
            return Ok(());
        }
        cpu.gpr[gpr::RCX] = advance(cpu.gpr[gpr::RCX], u64::MAX, mask);
        if cpu.gpr[gpr::RCX] & mask == 0 {
            return Ok(());
        }
        if cpu.pending_debug != 0 {
            break;
        }
    }
    // More to do: the instruction comes again, after whatever waits.
    cpu.rip = cpu.insn_rip;
    Ok(())
}
