//! Near branches: direct ones are linked within a page, all others look the target up in the jump table inline.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::asm::{Alu, Asm, Label, Mem, RCX, RSP, S0, S1, S2, cc};
use super::block::Builder;
use super::operand::{FlagState, memory_operand, unpark_flags};
use super::reencode::context;
use crate::access::AccessKind;
use crate::cache::{self, JUMP_BASE_OFFSET, JumpSlot, POLL_OFFSET};
use crate::entry::context_offset;
use crate::mode::Mode;

/// Whether the inline emission covers a near branch in this mode: the operand size is the mode's own.
pub fn emits(insn: &Instruction, mode: Mode) -> bool {
    let native_target = |i: u32| match insn.op_kind(i) {
        OpKind::NearBranch64 | OpKind::NearBranch32 => (insn.op_kind(i) == OpKind::NearBranch64) == mode.long(),
        OpKind::Register => insn.op_register(i).size() * 8 == mode.bits() as usize,
        OpKind::Memory => insn.memory_size().size() * 8 == mode.bits() as usize,
        _ => false,
    };
    match insn.mnemonic() {
        Mnemonic::Ret => {
            use iced_x86::Code::*;
            if mode.long() {
                matches!(insn.code(), Retnq | Retnq_imm16)
            } else {
                matches!(insn.code(), Retnd | Retnd_imm16)
            }
        }
        Mnemonic::Jcxz => false,
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => native_target(0) && counter_bits(insn) != 16,
        _ => native_target(0),
    }
}

/// Which of CX, ECX and RCX a LOOP counts.
fn counter_bits(insn: &Instruction) -> u32 {
    let name = format!("{:?}", insn.code());
    if name.ends_with("RCX") {
        64
    } else if name.ends_with("ECX") {
        32
    } else {
        16
    }
}

impl Builder<'_> {
    /// Emits a branch; false if the block goes on behind it.
    pub fn branch(&mut self, insn: &Instruction) -> bool {
        use Mnemonic::*;
        match insn.mnemonic() {
            Jmp if insn.is_jmp_short_or_near() => {
                self.goto(insn.near_branch_target());
            }
            Call if insn.is_call_near() => {
                self.push_return_address(insn);
                self.goto(insn.near_branch_target());
            }
            Jmp => {
                self.load_target(insn);
                self.lookup();
            }
            Call => {
                self.load_target(insn);
                self.asm.store(Mem::Base(RSP, context_offset!(hot.lent)), S0);
                self.push_return_address(insn);
                self.asm.load(S0, Mem::Base(RSP, context_offset!(hot.lent)));
                self.lookup();
            }
            Ret => {
                let width = self.word();
                let slot = self.stack_slot(0, false);
                self.load_word(S0, slot);
                let release = if insn.op_count() == 1 { insn.immediate16() as i32 } else { 0 };
                self.move_stack(width as i32 + release);
                self.lookup();
            }
            Loop | Loope | Loopne | Jecxz | Jrcxz => {
                self.need_flags();
                self.count_branch(insn);
            }
            _ => {
                self.need_flags();
                let taken = self.asm.label();
                let target = insn.near_branch_target();
                self.conditional(insn.condition_code() as u8, taken, target);
                return false;
            }
        }
        true
    }

    /// A Jcc to `taken`, which stands behind the body; where the target can be linked without a poll, the Jcc itself is
    /// patched.
    fn conditional(&mut self, condition: u8, taken: Label, target: u64) {
        // iced numbers conditions from 1 in encoding order, with `None` as 0.
        self.asm.jcc(condition - 1, taken);
        if self.linkable(target) && !self.polls(target) {
            let patch = self.asm.position() - 4;
            self.link(taken, target, patch);
        } else {
            self.goto_stub(taken, target);
        }
    }

    fn linkable(&self, target: u64) -> bool {
        !self.mode.is_single() && !self.mode.is_careful() && target >> 12 == self.start >> 12
    }

    /// A backward branch may close a loop: it looks at the poll word.
    fn polls(&self, target: u64) -> bool {
        target <= self.current_ip()
    }

    /// Goes to a constant address.
    pub fn goto(&mut self, target: u64) {
        if self.mode.is_single() {
            return self.leave_for(target);
        }
        if !self.linkable(target) {
            return self.goto_unlinked(target);
        }
        if self.polls(target) {
            self.poll(target);
        }
        let label = self.asm.label();
        self.asm.jmp(label);
        let patch = self.asm.position() - 4;
        self.link(label, target, patch);
    }

    /// Goes to a constant address by the jump table.
    pub fn goto_unlinked(&mut self, target: u64) {
        self.asm.mov_imm(S0, target);
        self.lookup_known(Some(target));
    }

    /// Leaves for the dispatcher, which goes on at `target`.
    fn leave_for(&mut self, target: u64) {
        self.need_flags();
        self.asm.mov_imm(S0, target);
        self.asm.jmp_mem(Mem::Base(RSP, context_offset!(hot.exit_event)));
    }

    fn poll(&mut self, target: u64) {
        let word = Mem::Code(POLL_OFFSET);
        let parked = self.flags == FlagState::Parked;
        if parked || self.flags_dead_at(target) {
            let go_on = self.asm.label();
            self.asm.cmp_mem32_imm8(word, 0);
            self.asm.jcc(cc::NE ^ 1, go_on);
            self.leave_for(target);
            if parked {
                self.flags = FlagState::Parked;
            }
            self.asm.bind(go_on);
        } else {
            let event = Mem::Base(RSP, context_offset!(hot.exit_event));
            self.asm.store(context(1), RCX);
            self.asm.load32(RCX, word);
            self.asm.unless_rcx_zero(|asm| {
                asm.load(RCX, context(1));
                asm.mov_imm(S0, target);
                asm.jmp_mem(event);
            });
            self.asm.load(RCX, context(1));
        }
    }

    /// Goes to the guest address in S0 by the jump table.
    pub fn lookup(&mut self) {
        self.lookup_known(None);
    }

    fn lookup_known(&mut self, target: Option<u64>) {
        let ip = self.current_ip();
        // Only a branch to a computed address can lead to one that isn't canonical.
        let note = |asm: &mut Asm| {
            if target.is_none() {
                asm.mov_imm(S1, ip);
                asm.store(Mem::Base(RSP, context_offset!(hot.branch)), S1);
            }
        };
        let (Some(slot), false) = (self.place.jump_slot, self.mode.is_single()) else {
            self.need_flags();
            note(&mut self.asm);
            let exit =
                if self.mode.is_single() { context_offset!(hot.exit_event) } else { context_offset!(hot.exit_lookup) };
            self.asm.jmp_mem(Mem::Base(RSP, exit));
            return;
        };
        let parked = self.flags == FlagState::Parked;
        let asm = &mut self.asm;
        let JumpSlot { tags, codes, parked: parked_codes } = cache::jump_slot_offsets(slot);
        let at = |offset: i32| match target {
            Some(t) => Mem::Base(S2, offset + cache::jump_index(t) as i32 * 8),
            None => Mem::Index(S2, S1, 8, offset),
        };
        if target.is_none() {
            if cache::index_by_pext() {
                asm.pext(S1, S0, Mem::Base(RSP, context_offset!(hot.jump_mask)));
            } else {
                asm.movzx8(S1, S0);
            }
        }
        asm.load(S2, Mem::Code(JUMP_BASE_OFFSET));
        if parked {
            // EFLAGS is free: the tag is simply compared.
            let hit = asm.label();
            asm.not(S0);
            asm.alu_mem(Alu::Cmp, S0, at(tags));
            asm.jcc(cc::NE ^ 1, hit);
            asm.not(S0);
            unpark_flags(asm);
            note(asm);
            asm.jmp_mem(Mem::Base(RSP, context_offset!(hot.exit_lookup)));
            asm.bind(hit);
            asm.jmp_mem(at(parked_codes));
            return;
        }
        asm.store(context(1), RCX);
        asm.load(RCX, at(tags));
        // A tag is the complement of its address: tag + address + 1 = 0, without touching the flags.
        asm.lea(RCX, Mem::Index(RCX, S0, 1, 1));
        asm.unless_rcx_zero(|asm| {
            asm.load(RCX, context(1));
            note(asm);
            asm.jmp_mem(Mem::Base(RSP, context_offset!(hot.exit_lookup)));
        });
        asm.load(RCX, context(1));
        asm.jmp_mem(at(codes));
    }

    /// The target of an indirect branch, in S0.
    fn load_target(&mut self, insn: &Instruction) {
        if memory_operand(insn).is_some() {
            self.operand(insn, AccessKind::new(self.word(), false, self.mode.context()));
            self.load_word(S0, Mem::Base(S0, 0));
        } else {
            self.read_register(S0, insn.op0_register().full_register().number() as u8);
            if !self.mode.long() {
                self.asm.mov32(S0, S0);
            }
        }
    }

    fn push_return_address(&mut self, insn: &Instruction) {
        let width = self.word() as i32;
        let slot = self.stack_slot(-width, true);
        let next = self.wrap_ip(insn.next_ip());
        self.asm.mov_imm(S1, next);
        self.store_word(slot, S1);
        self.move_stack(-width);
    }

    /// LOOP, LOOPE, LOOPNE, JECXZ, JRCXZ: none touches the flags.
    fn count_branch(&mut self, insn: &Instruction) {
        use Mnemonic::*;
        let target = insn.near_branch_target();
        let (taken, not_taken) = (self.asm.label(), self.asm.label());
        let wide = matches!(insn.mnemonic(), Jrcxz) || insn.mnemonic() != Jecxz && counter_bits(insn) == 64;
        let next = self.wrap_ip(insn.next_ip());
        if !wide {
            // JECXZ by JRCXZ on a zero-extended copy.
            self.asm.store(context(1), RCX);
        }
        match insn.mnemonic() {
            Jecxz | Jrcxz => {
                if !wide {
                    self.asm.mov32(RCX, RCX);
                }
                self.asm.unless_rcx_zero(|asm| asm.jmp(not_taken));
                if !wide {
                    self.asm.load(RCX, context(1));
                }
                self.goto(target);
                self.asm.bind(not_taken);
                if !wide {
                    self.asm.load(RCX, context(1));
                }
                self.goto(next);
            }
            mnemonic => {
                if wide {
                    self.asm.lea(RCX, Mem::Base(RCX, -1));
                } else {
                    self.asm.lea32(RCX, Mem::Base(RCX, -1));
                }
                self.asm.unless_rcx_zero(|asm| match mnemonic {
                    Loope => asm.jcc(4, taken),
                    Loopne => asm.jcc(5, taken),
                    _ => asm.jmp(taken),
                });
                self.goto(next);
                self.asm.bind(taken);
                self.goto(target);
            }
        }
    }
}
