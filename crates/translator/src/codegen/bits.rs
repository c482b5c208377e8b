//! BT, BTS, BTR and BTC on memory with the bit's number in a register, by flat addresses of the mode's own size: kernels keep
//! sets of processors, pages and flags so. What is not a plain word of RAM, [`crate::semantics::bits`] has.

use iced_x86::{Instruction, Mnemonic, Register};

use super::asm::{Alu, Mem, S0, S1, S2};
use super::block::Builder;
use super::operand::FlagState;
use crate::access::AccessKind;
use crate::mode::Mode;
use crate::semantics::bits;

/// Whether the inline emission covers the instruction in this mode.
pub fn emits(insn: &Instruction, mode: Mode) -> bool {
    if !bits::by_register(insn) || !mode.flat() || mode.is_single() || mode.checks_alignment() {
        return false;
    }
    let own_size = if mode.long() { u64::MAX } else { u32::MAX.into() };
    // Outside 64-bit mode these segments have limits, or can't be written.
    let flat = mode.long() || !matches!(insn.memory_segment(), Register::FS | Register::GS | Register::CS);
    flat && bits::address_mask(insn) == own_size
}

/// The second byte of the opcode with a number in a register.
fn opcode(insn: &Instruction) -> u8 {
    match insn.mnemonic() {
        Mnemonic::Bts => 0xab,
        Mnemonic::Btr => 0xb3,
        Mnemonic::Btc => 0xbb,
        _ => 0xa3,
    }
}

impl Builder<'_> {
    pub fn bit_instruction(&mut self, insn: &Instruction) {
        let (register, opcode) = (insn.op1_register(), opcode(insn));
        let (size, number) = (register.size(), register.full_register().number() as u8);
        let write = insn.mnemonic() != Mnemonic::Bt;
        self.free_flags();
        self.held = None;
        let back = self.asm.label();
        let slow = self.sensitive_stub(Some(back));
        self.address(insn);
        // The word that has the bit: the number is signed.
        let from = self.register_in(number, S1);
        self.asm.mov_signed(size, S1, from);
        self.asm.sar(S1, 3 + size.trailing_zeros() as u8);
        self.lea_address(S0, Mem::Index(S0, S1, size as u8, 0));
        self.look_up(AccessKind::new(size, write, self.mode.context()), slow);
        if insn.has_lock_prefix() {
            self.read_register(S2, number);
            self.asm.alu_imm32(Alu::And, S2, 8 * size as i32 - 1);
        } else {
            self.asm.load_low(size, S2, Mem::Base(S0, 0));
        }
        self.settle_flags();
        self.note_flags();
        if insn.has_lock_prefix() {
            self.asm.locked_bit(size, opcode, S2);
        } else {
            // With a register for the word, the processor takes the number modulo its width.
            let number = self.register_in(number, S1);
            self.asm.bit(size, opcode, S2, number);
            if write {
                self.asm.store_low(size, Mem::Base(S0, 0), S2);
            }
        }
        self.asm.bind(back);
        self.flags = FlagState::Host;
    }
}
