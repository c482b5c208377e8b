//! Vector instructions whose memory accesses are not one flat operand: gathers and scatters, byte-masked stores,
//! 64-byte direct stores; and, for all the others, which bytes of a masked operand count ([`masked_bytes`]).

mod gather;
mod masked;

use arch::registers::{cr0, cr4, gpr, xcr0};
use arch::{Exception, Vector};
use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::Sensitive;
use crate::cpu::{Stop, Vcpu};
use crate::mmu::operand::segment_register;

pub use masked::masked_bytes;

/// The entry for a vector instruction that can't run on one flat operand.
pub fn lookup(insn: &Instruction) -> Option<Sensitive> {
    use Mnemonic::*;
    let (exec, fp): (super::Exec, bool) = match insn.mnemonic() {
        m if gather::shape(m).is_some() => (gather::exec, true),
        Maskmovdqu | Vmaskmovdqu | Maskmovq => (maskmov, true),
        Movdir64b => (movdir64b, false),
        Vzeroupper | Vzeroall if insn.code_size() != iced_x86::CodeSize::Code64 => (vzero, true),
        Enqcmd | Enqcmds => (undefined, false),
        _ => return None,
    };
    Some(Sensitive { exec, ends_block: false, fp })
}

/// #UD or #NM where the operating system has not enabled the state that an instruction uses (Intel SDM 2A 2.4, 2.8).
fn require_vector(cpu: &Vcpu, insn: &Instruction) -> Result<(), Exception> {
    let enabled = match insn.encoding() {
        EncodingKind::EVEX => cpu.avx_enabled() && cpu.xcr0 & xcr0::AVX512 == xcr0::AVX512,
        EncodingKind::VEX => cpu.avx_enabled(),
        _ => cpu.cr0 & cr0::EM == 0 && cpu.cr4 & cr4::OSFXSR != 0,
    };
    let vex = matches!(insn.encoding(), EncodingKind::VEX | EncodingKind::EVEX);
    if !enabled || vex && (!cpu.protected_mode() || cpu.v8086()) {
        Err(Exception::invalid_opcode())
    } else if cpu.cr0 & cr0::TS != 0 {
        Err(Exception::device_not_available())
    } else {
        Ok(())
    }
}

/// VZEROUPPER and VZEROALL outside 64-bit mode leave the registers that only 64-bit code can name alone.
fn vzero(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    require_vector(cpu, insn)?;
    let keep = if insn.mnemonic() == Mnemonic::Vzeroupper { 16 } else { 0 };
    for register in 0..8 {
        let mut value = cpu.xsave.vector(register);
        value[keep..].fill(0);
        cpu.xsave.set_vector(register, &value);
    }
    Ok(())
}

/// The same for instructions on MMX registers, which also report what x87 instructions left pending.
fn require_mmx(cpu: &Vcpu) -> Result<(), Exception> {
    if cpu.cr0 & cr0::EM != 0 {
        Err(Exception::invalid_opcode())
    } else if cpu.cr0 & cr0::TS != 0 {
        Err(Exception::device_not_available())
    } else if cpu.xsave.x87_pending() {
        Err(Exception::new(Vector::X87FloatingPoint))
    } else {
        Ok(())
    }
}

/// MASKMOVDQU and MASKMOVQ: stores the bytes of a register whose bytes in another have the sign bit set.
fn maskmov(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let (data, selector, size) = if insn.mnemonic() == Mnemonic::Maskmovq {
        require_mmx(cpu)?;
        cpu.xsave.enter_mmx();
        let mmx = |register: Register| {
            let mut value = [0; 64];
            let index = register as usize - Register::MM0 as usize;
            value[..8].copy_from_slice(&cpu.xsave.x87_physical(index)[..8]);
            value
        };
        (mmx(insn.op1_register()), mmx(insn.op2_register()), 8)
    } else {
        require_vector(cpu, insn)?;
        let vector = |register| cpu.xsave.vector(masked::vector_index(register));
        (vector(insn.op1_register()), vector(insn.op2_register()), 16)
    };
    let offset_mask = match insn.op0_kind() {
        OpKind::MemorySegDI => 0xffff,
        OpKind::MemorySegEDI => 0xffff_ffff,
        _ => u64::MAX,
    };
    let (segment, offset) = (segment_register(insn.memory_segment()), cpu.gpr[gpr::RDI] & offset_mask);
    let context = cpu.context();

    // Runs of selected bytes as (first byte, linear address, length).
    let mut runs = Vec::with_capacity(8);
    let mut start = 0;
    while start < size {
        let length = selector[start..size].iter().take_while(|&&b| b & 0x80 != 0).count();
        if length != 0 {
            let va = cpu.linear(segment, offset.wrapping_add(start as u64) & offset_mask, length, true)?;
            cpu.probe_write(va, length, context)?;
            runs.push((start, va, length));
        }
        start += length + 1;
    }
    for (start, va, length) in runs {
        cpu.write_linear(va, &data[start..start + length], context)?;
    }
    Ok(())
}

/// MOVDIR64B: 64 bytes from memory to the address in a register, which is an offset in ES and must be aligned.
fn movdir64b(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let mut data = [0; 64];
    let context = cpu.context();
    let source = cpu.operand_address(insn, 1, 64, false)?;
    let offset = cpu.read_register(insn.op0_register());
    cpu.read_linear(source, &mut data, context)?;
    let destination = cpu.linear(arch::SegmentRegister::Es, offset, 64, true)?;
    if destination % 64 != 0 {
        return Err(Exception::general_protection(0).into());
    }
    cpu.write_linear(destination, &data, context)?;
    Ok(())
}

/// ENQCMD needs a process address space identifier that no guest has.
fn undefined(_: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    Err(Exception::invalid_opcode().into())
}

#[cfg(test)]
mod tests;
