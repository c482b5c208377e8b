//! PUSH, POP and LEAVE inline, and the stack moves of calls and returns.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::asm::{GUEST_RSP, Mem, RBP, RSP, Reg, S0, S1};
use super::block::Builder;
use super::operand::memory_operand;
use super::reencode::{Home, home};
use crate::access::AccessKind;
use crate::entry::context_offset;
use crate::mode::Mode;

/// Whether the inline emission covers the instruction in this mode: word-sized pushes and pops of registers, pushes of
/// constants and memory, LEAVE.
pub fn emits(insn: &Instruction, mode: Mode) -> bool {
    let word = mode.bits() as usize / 8;
    if insn.stack_pointer_increment().unsigned_abs() as usize != word && insn.mnemonic() != Mnemonic::Leave {
        return false;
    }
    match insn.mnemonic() {
        Mnemonic::Leave => {
            if mode.long() {
                insn.code() == iced_x86::Code::Leaveq
            } else {
                insn.code() == iced_x86::Code::Leaved
            }
        }
        Mnemonic::Pop => insn.op0_kind() == OpKind::Register,
        _ => true,
    }
}

impl Builder<'_> {
    /// The bytes of a stack word.
    pub fn word(&self) -> usize {
        self.mode.bits() as usize / 8
    }

    pub fn load_word(&mut self, to: Reg, from: Mem) {
        if self.mode.long() { self.asm.load(to, from) } else { self.asm.load32(to, from) }
    }

    pub fn store_word(&mut self, to: Mem, from: Reg) {
        if self.mode.long() { self.asm.store(to, from) } else { self.asm.store32(to, from) }
    }

    /// Adds to the guest's stack pointer, leaving the flags alone.
    pub fn move_stack(&mut self, distance: i32) {
        let mem = Mem::Base(GUEST_RSP, distance);
        if self.mode.long() { self.asm.lea(GUEST_RSP, mem) } else { self.asm.lea32(GUEST_RSP, mem) }
    }

    pub fn stack_instruction(&mut self, insn: &Instruction) {
        let word = self.word();
        let read = AccessKind::new(word, false, self.mode.context());
        match insn.mnemonic() {
            Mnemonic::Leave => {
                self.free_flags();
                if self.mode.long() {
                    self.asm.mov(S0, RBP)
                } else {
                    self.asm.mov32(S0, RBP)
                }
                self.check(read);
                self.load_word(S1, Mem::Base(S0, 0));
                let above = Mem::Base(RBP, word as i32);
                if self.mode.long() {
                    self.asm.lea(GUEST_RSP, above)
                } else {
                    self.asm.lea32(GUEST_RSP, above)
                }
                self.asm.mov(RBP, S1);
            }
            Mnemonic::Pop => {
                let n = insn.op0_register().full_register().number() as u8;
                let slot = self.stack_slot(0, false);
                self.load_word(S1, slot);
                self.move_stack(word as i32);
                self.write_register(n, S1);
            }
            _ if memory_operand(insn).is_some() => {
                self.operand(insn, read);
                self.load_word(S0, Mem::Base(S0, 0));
                let lent = Mem::Base(RSP, context_offset!(hot.lent));
                self.asm.store(lent, S0);
                let slot = self.stack_slot(-(word as i32), true);
                self.asm.load(S1, lent);
                self.store_word(slot, S1);
                self.move_stack(-(word as i32));
            }
            _ => {
                let slot = self.stack_slot(-(word as i32), true);
                if insn.op0_kind() == OpKind::Register {
                    let n = insn.op0_register().full_register().number() as u8;
                    match home(n) {
                        Home::Host(reg) => self.store_word(slot, reg),
                        Home::Memory => {
                            self.read_register(S1, n);
                            self.store_word(slot, S1);
                        }
                    }
                } else if self.mode.long() {
                    self.asm.store_imm(slot, insn.immediate(0) as i32);
                } else {
                    self.asm.mov_imm(S1, insn.immediate(0) & 0xffff_ffff);
                    self.store_word(slot, S1);
                }
                self.move_stack(-(word as i32));
            }
        }
    }
}
