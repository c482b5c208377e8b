//! Relative blocks: one translation for code that runs at many addresses.
//!
//! Programs share libraries, and each process has them elsewhere: address space layout randomization sees to that. So once a page
//! of a program's 64-bit code is found at a second address, its code is translated as if it were at address zero, and finds the
//! page that it really is in at `near.code_page`: a guest address is that plus a constant. That is a little slower than a constant
//! alone, so pages begin without. Whoever comes by the jump table or from the dispatcher has RIP
//! in [`S0`], of which the *way in*, a block's first instructions, makes the page; linked blocks are in the same page, and go
//! past it.
//!
//! No one knows which addresses of which address spaces lead to a relative block. So when one is dropped its ways in become
//! ways out, to the dispatcher, which finds what is to run instead; their memory serves for nothing else until the jump
//! table has been searched for them ([`crate::jumps`]).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::asm::{Asm, Mem, RSP, Reg, S0, S1};
use super::block::Builder;
use super::facts::{FpClass, facts};
use crate::entry::context_offset;

const CODE_PAGE: Mem = Mem::Base(RSP, context_offset!(near.code_page));
const X87_PAGE: Mem = Mem::Base(RSP, context_offset!(hot.x87_page));

/// Bytes of a way in.
pub const WAY_IN: usize = 12;

/// Notes the page of a block that begins at an offset of it.
pub fn way_in(offset: u64) -> [u8; WAY_IN] {
    let mut asm = Asm::default();
    asm.way_in(offset);
    let mut way = [0; WAY_IN];
    way.copy_from_slice(&asm.code);
    way
}

/// Stands at the beginning of a way in once the block is gone: `jmp [rsp + constant]` to the thunk for who comes with the flags
/// in EFLAGS, and parked.
pub const WAY_OUT: [u8; 7] = way_out(context_offset!(near.exit_lookup));
pub const PARKED_WAY_OUT: [u8; 7] = way_out(context_offset!(hot.exit_lookup_parked));

const fn way_out(thunk: i32) -> [u8; 7] {
    let [a, b, c, d] = thunk.to_le_bytes();
    [0xff, 0xa4, 0x24, a, b, c, d]
}

/// An instruction of a relative block, as it is in a page.
pub fn in_page(mut insn: Instruction, page: u64) -> Instruction {
    let address = insn.memory_displacement64().wrapping_add(page);
    let target = insn.near_branch_target().wrapping_add(page);
    match insn.memory_base() {
        Register::RIP => insn.set_memory_displacement64(address),
        Register::EIP => insn.set_memory_displacement64(address & 0xffff_ffff),
        _ => {}
    }
    match insn.op0_kind() {
        OpKind::NearBranch64 => insn.set_near_branch64(target),
        OpKind::NearBranch16 => insn.set_near_branch16(target as u16),
        _ => {}
    }
    insn.set_ip(insn.ip().wrapping_add(page));
    insn
}

/// Whether the processor notes the address of an x87 instruction (Intel SDM 1 8.1.8).
pub fn is_noted(insn: &Instruction) -> bool {
    use Mnemonic::*;
    let control = matches!(
        insn.mnemonic(),
        Wait | Fninit | Finit | Fnclex | Fclex | Fldcw | Fnstcw | Fstcw | Fnstsw | Fstsw | Fnstenv | Fstenv
    );
    facts(insn.code()).fp == FpClass::X87 && !control
}

impl Asm {
    /// [`way_in`].
    fn way_in(&mut self, offset: u64) {
        self.lea_far(S1, S0, -(offset as i32));
        self.store(CODE_PAGE, S1);
    }

    /// Moves the guest address that is so far from the page's beginning to a register. Leaves the flags alone.
    pub fn mov_relative_address(&mut self, to: Reg, distance: i64) {
        self.load(to, CODE_PAGE);
        // RIP-relative operands are up to 2 GiB away from where the instruction is in its page.
        let first = distance.clamp(i32::MIN.into(), i32::MAX.into());
        for part in [first, distance - first].into_iter().filter(|part| *part != 0) {
            self.lea(to, Mem::Base(to, part as i32));
        }
    }
}

impl Builder<'_> {
    /// Begins a relative block.
    pub fn way_in(&mut self) {
        self.asm.relative = self.setting.relative;
        if self.setting.relative {
            self.asm.way_in(self.start);
        }
    }

    /// The way in for those who come by the jump table with the flags parked, if the block is relative: where it is, or else zero.
    pub fn parked_way_in(&mut self) -> usize {
        if !self.setting.relative {
            return 0;
        }
        let at = self.asm.position();
        self.asm.way_in(self.start);
        at
    }

    /// Where linked blocks enter.
    pub fn linked_entry(&self) -> usize {
        if self.setting.relative { WAY_IN } else { 0 }
    }

    /// After an x87 instruction: where a relative block's last one was can be told from its host code later, but for the page.
    pub fn note_x87(&mut self, insn: &Instruction) {
        if self.setting.relative && is_noted(insn) {
            self.asm.load(S1, CODE_PAGE);
            self.asm.store(X87_PAGE, S1);
        }
    }
}
