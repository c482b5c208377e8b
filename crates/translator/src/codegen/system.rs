//! Privileged instructions that kernels execute all day, emitted inline where nothing can go wrong: at level 0 in 64-bit
//! code. Elsewhere `semantics` has them.

use iced_x86::{Instruction, Mnemonic};

use super::asm::{Alu, Mem, RAX, RDX, RSP, S0, S1};
use super::block::Builder;
use crate::entry::context_offset;
use crate::mode::Mode;
use arch::registers::rflags;

const GS_BASE: Mem = Mem::Base(RSP, context_offset!(segments) + 5 * size_of::<arch::Segment>() as i32);
const KERNEL_GS_BASE: Mem =
    Mem::Base(RSP, context_offset!(msrs) + std::mem::offset_of!(crate::cpu::Msrs, kernel_gs_base) as i32);

/// Whether the inline emission covers the instruction in this mode.
pub fn emits(insn: &Instruction, mode: Mode, inline_tsc: bool) -> bool {
    mode.long()
        && mode.cpl() == 0
        && !mode.is_single()
        && match insn.mnemonic() {
            Mnemonic::Swapgs | Mnemonic::Cli => true,
            Mnemonic::Rdtsc => inline_tsc,
            _ => false,
        }
}

impl Builder<'_> {
    pub fn system_instruction(&mut self, insn: &Instruction) {
        match insn.mnemonic() {
            Mnemonic::Swapgs => {
                self.asm.load(S0, GS_BASE);
                self.asm.load(S1, KERNEL_GS_BASE);
                self.asm.store(GS_BASE, S1);
                self.asm.store(KERNEL_GS_BASE, S0);
            }
            Mnemonic::Cli => {
                self.free_flags();
                self.asm.and_mem32_imm(Mem::Base(RSP, context_offset!(rflags)), !rflags::IF as i32);
            }
            _ => {
                self.free_flags();
                self.asm.rdtsc();
                self.asm.shift_high(RDX);
                self.asm.alu(Alu::Add, RAX, RDX);
                self.asm.alu_mem(Alu::Add, RAX, Mem::Base(RSP, context_offset!(hot.tsc_offset)));
                let adjust = context_offset!(msrs) + std::mem::offset_of!(crate::cpu::Msrs, tsc_adjust) as i32;
                self.asm.alu_mem(Alu::Add, RAX, Mem::Base(RSP, adjust));
                self.asm.mov(RDX, RAX);
                self.asm.shift_low(RDX);
                self.asm.mov32(RAX, RAX);
            }
        }
    }
}
