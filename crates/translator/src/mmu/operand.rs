//! The operands of a decoded instruction as values: registers of every width, memory, immediates.

use arch::{Exception, SegmentRegister};
use iced_x86::{Instruction, OpKind, Register};

use crate::cpu::Vcpu;

/// The segment register that a decoder register names; DS for what is none.
pub fn segment_register(register: Register) -> SegmentRegister {
    match register {
        Register::ES => SegmentRegister::Es,
        Register::CS => SegmentRegister::Cs,
        Register::SS => SegmentRegister::Ss,
        Register::FS => SegmentRegister::Fs,
        Register::GS => SegmentRegister::Gs,
        _ => SegmentRegister::Ds,
    }
}

/// A general register's index in [`Vcpu::gpr`] and whether it is AH, CH, DH or BH.
fn place(register: Register) -> (usize, bool) {
    let high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
    if high {
        return (register as usize - Register::AH as usize, true);
    }
    (register.full_register() as usize - Register::RAX as usize, false)
}

impl Vcpu {
    /// The value of a general register, zero-extended; of a segment register, its selector.
    pub fn read_register(&self, register: Register) -> u64 {
        if register.is_segment_register() {
            return u64::from(self.seg(segment_register(register)).selector);
        }
        if !register.is_gpr() {
            return 0;
        }
        let (index, high) = place(register);
        let value = self.gpr[index & 15];
        match register.size() {
            1 if high => value >> 8 & 0xff,
            1 => value & 0xff,
            2 => value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        }
    }

    /// Writes a general register as instructions do: 32-bit writes clear the upper half, narrower ones keep the rest.
    pub fn write_register(&mut self, register: Register, value: u64) {
        if !register.is_gpr() {
            return;
        }
        let (index, high) = place(register);
        let slot = &mut self.gpr[index & 15];
        *slot = match register.size() {
            1 if high => *slot & !0xff00 | (value & 0xff) << 8,
            1 => *slot & !0xff | value & 0xff,
            2 => *slot & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }

    /// The segment of the memory operand. In 64-bit mode only FS and GS prefixes count, and whether a fault is #SS or #GP is the base
    /// register's affair.
    pub fn operand_segment(&self, insn: &Instruction) -> SegmentRegister {
        use Register::*;
        match (insn.memory_segment(), insn.memory_base()) {
            (segment @ (FS | GS), _) => segment_register(segment),
            (_, RSP | RBP | ESP | EBP) if self.code64() => SegmentRegister::Ss,
            _ if self.code64() => SegmentRegister::Ds,
            (segment, _) => segment_register(segment),
        }
    }

    /// Segment and offset (truncated to the address size) of a memory operand.
    pub fn effective_address(&self, insn: &Instruction, operand: u32) -> (SegmentRegister, u64) {
        let segment = match insn.op_kind(operand) {
            OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI => SegmentRegister::Es,
            _ => self.operand_segment(insn),
        };
        // Segments count as zero here: the offset is wanted.
        let offset = insn.virtual_address(operand, 0, |register, _, _| {
            if register.is_segment_register() { Some(0) } else { Some(self.read_register(register)) }
        });
        (segment, offset.unwrap_or(0))
    }

    /// The linear address of a memory operand, checked for an access of `size` bytes.
    pub fn operand_address(
        &self,
        insn: &Instruction,
        operand: u32,
        size: usize,
        write: bool,
    ) -> Result<u64, Exception> {
        let (segment, offset) = self.effective_address(insn, operand);
        self.linear(segment, offset, size, write)
    }

    /// Reads a register, immediate or memory operand of up to 8 bytes, zero-extended (immediates as encoded for their
    /// operand size).
    pub fn read_operand(&mut self, insn: &Instruction, operand: u32) -> Result<u64, Exception> {
        match insn.op_kind(operand) {
            OpKind::Register => Ok(self.read_register(insn.op_register(operand))),
            kind if is_memory(kind) => {
                let size = insn.memory_size().size().clamp(1, 8);
                let address = self.operand_address(insn, operand, size, false)?;
                self.read_sized(address, size, self.context())
            }
            _ => Ok(insn.try_immediate(operand).unwrap_or(0)),
        }
    }

    /// Reads a far pointer in memory: its offset of `size` bytes, then its selector.
    pub fn read_far_pointer(&mut self, insn: &Instruction, operand: u32, size: usize) -> Result<(u64, u16), Exception> {
        let (segment, offset) = self.effective_address(insn, operand);
        // The offset is read first, and its alignment counts.
        let address = self.linear(segment, offset, size, false)?;
        let mut data = [0; 10];
        self.read_linear(address, &mut data[..size], self.context())?;
        let address = self.linear_unaligned(segment, offset.wrapping_add(size as u64), 2, false)?;
        self.read_linear(address, &mut data[size..size + 2], self.context())?;
        let value = data.iter().take(size + 2).rev().fold(0u128, |value, &byte| value << 8 | u128::from(byte));
        Ok(((value & ((1 << (8 * size)) - 1)) as u64, (value >> (8 * size)) as u16))
    }

    /// Writes a register or memory operand of up to 8 bytes.
    pub fn write_operand(&mut self, insn: &Instruction, operand: u32, value: u64) -> Result<(), Exception> {
        match insn.op_kind(operand) {
            OpKind::Register => self.write_register(insn.op_register(operand), value),
            kind if is_memory(kind) => {
                let size = insn.memory_size().size().clamp(1, 8);
                let address = self.operand_address(insn, operand, size, true)?;
                self.write_sized(address, size, value, self.context())?;
            }
            _ => {}
        }
        Ok(())
    }
}

fn is_memory(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Memory
            | OpKind::MemorySegSI
            | OpKind::MemorySegESI
            | OpKind::MemorySegRSI
            | OpKind::MemorySegDI
            | OpKind::MemorySegEDI
            | OpKind::MemorySegRDI
            | OpKind::MemoryESDI
            | OpKind::MemoryESEDI
            | OpKind::MemoryESRDI
    )
}
