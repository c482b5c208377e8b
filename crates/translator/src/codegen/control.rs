//! Near branches: direct ones are linked within a page, all others look the target up in the jump table inline.

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::asm::{Alu, Label, Mem, RCX, RSP, S0, S1, S2, cc};
use super::block::Builder;
use super::operand::{FlagState, memory_operand, unpark_flags};
use super::reencode::context;
use crate::access::AccessKind;
use crate::code_memory::{self, JUMP_MASK_OFFSET, JumpSlot, POLL_OFFSET, SEGMENTED_JUMP_MASK_OFFSET};
use crate::cpu::Vcpu;
use crate::entry::context_offset;
use crate::mode::Mode;
use crate::semantics::stack::{counter_width, operand_size};

/// Whether the inline emission covers a near branch in this mode: in 64-bit code, where the operand size is the mode's own.
pub fn emits(insn: &Instruction, mode: Mode) -> bool {
    !mode.long()
        || match insn.mnemonic() {
            Mnemonic::Ret => operand_size(insn) == 8,
            _ => match insn.op_kind(0) {
                OpKind::NearBranch64 => true,
                OpKind::Register => insn.op_register(0).size() == 8,
                OpKind::Memory => insn.memory_size().size() == 8,
                _ => false,
            },
        }
}

/// A branch to a constant address, taken or not.
fn is_direct(insn: &Instruction) -> bool {
    matches!(insn.op_kind(0), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
}

/// What is known of the guest address that S0 has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Known(u64),
    /// A branch computes it: where it can't be, the branch itself faults.
    Computed,
    /// If it can't be, the fault comes there.
    Entry,
}

/// A lookup whose entry has another tag, to be emitted behind the body.
#[derive(Clone, Copy)]
pub struct Missed {
    pub entry: Label,
    parked: bool,
    /// S0 has the base of a code segment in its upper half.
    based: bool,
    /// The branch computed the target: only such a one can lead to an address that isn't canonical or is outside the code
    /// segment.
    computed: bool,
}

impl Builder<'_> {
    /// Emits a branch; false if the block goes on behind it.
    pub fn branch(&mut self, insn: &Instruction) -> bool {
        use Mnemonic::*;
        // AMD's processors cut such a one's target in 64-bit code.
        self.narrow_addresses |= self.mode.long() && insn.op0_kind() == OpKind::NearBranch16;
        if is_direct(insn) && !self.code.segment.holds(insn.near_branch_target(), 1) && !self.mode.long() {
            self.need_flags();
            self.sensitive(insn, crate::semantics::stack::exec, true);
            return true;
        }
        match insn.mnemonic() {
            // The block goes on where it leads.
            Jmp if self.goes_on_at_target() => return false,
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
            // What the push leaves alone can wait for it.
            Call if memory_operand(insn).is_none() && insn.op0_register().full_register() != Register::RSP => {
                self.push_return_address(insn);
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
                let size = operand_size(insn);
                let slot = self.stack_slot(0, size, false);
                self.load_sized(size, S0, slot);
                let release = if insn.op_count() == 1 { insn.immediate16() as i32 } else { 0 };
                self.move_stack(size as i32 + release);
                self.lookup();
            }
            Loop | Loope | Loopne | Jcxz | Jecxz | Jrcxz => {
                self.need_flags();
                self.count_branch(insn);
            }
            _ => {
                let taken = self.asm.label();
                // iced numbers conditions from 1 in encoding order, with `None` as 0.
                let condition = self.condition(insn.condition_code() as u8 - 1);
                if self.goes_on_with_next_turn() {
                    self.conditional(condition ^ 1, taken, self.wrap_ip(insn.next_ip()));
                } else {
                    self.conditional(condition, taken, insn.near_branch_target());
                }
                return false;
            }
        }
        true
    }

    /// Sees to it that EFLAGS tells of a condition: which one to look for there. One or two of the flags are looked at where they
    /// are parked, and stay so.
    fn condition(&mut self, condition: u8) -> u8 {
        let parked = self.flags == FlagState::Parked;
        match (cc::flags_in_ax(condition), condition & 1) {
            (Some((byte, mask)), inverse) if parked => {
                self.asm.test_mem8_imm8(Mem::Base(RSP, context_offset!(near.saved_ax) + byte), mask);
                cc::NE ^ inverse
            }
            _ => {
                self.need_flags();
                condition
            }
        }
    }

    /// A Jcc to `taken`, which stands behind the body; where the target can be linked without a poll, the Jcc itself is
    /// patched.
    fn conditional(&mut self, condition: u8, taken: Label, target: u64) {
        self.asm.jcc(condition, taken);
        if self.can_link(target) && !self.polls(target) {
            let patch = self.asm.position() - 4;
            self.link(taken, target, patch);
        } else {
            self.goto_stub(taken, target);
        }
    }

    /// Whether a direct branch to an address may be linked to the block there: within the page, and beyond it, too, where all
    /// address spaces have the same code.
    fn can_link(&self, target: u64) -> bool {
        let near = || self.code.offset_of(target, self.start).is_some();
        let reaches = || i32::try_from(target.wrapping_sub(self.start) as i64).is_ok();
        !self.mode.is_single() && !self.mode.is_careful() && (near() || self.setting.far_links && reaches())
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
        if !self.can_link(target) {
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
        self.asm.mov_address(S0, target);
        self.lookup_in(self.setting.jump_slot, Target::Known(target));
    }

    /// Leaves for the dispatcher, which goes on at `target`.
    fn leave_for(&mut self, target: u64) {
        self.need_flags();
        self.asm.mov_address(S0, target);
        self.asm.jmp_mem(Mem::Base(RSP, context_offset!(near.exit_event)));
    }

    pub fn poll(&mut self, target: u64) {
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
            let event = Mem::Base(RSP, context_offset!(near.exit_event));
            self.asm.mov(S1, RCX);
            self.asm.load32(RCX, word);
            self.asm.unless_rcx_zero(|asm| {
                asm.mov(RCX, S1);
                asm.mov_address(S0, target);
                asm.jmp_mem(event);
            });
            self.asm.mov(RCX, S1);
        }
    }

    /// Goes to the guest address in S0 by the jump table.
    pub fn lookup(&mut self) {
        self.lookup_in(self.setting.jump_slot, Target::Computed);
    }

    /// The same by the part of the jump table for another mode: that of the vCPU from here on.
    pub fn lookup_in(&mut self, slot: Option<usize>, target: Target) {
        let computed = target == Target::Computed;
        let (Some(slot), false) = (slot, self.mode.is_single()) else {
            self.need_flags();
            match (computed, self.mode.is_single()) {
                (false, false) => self.asm.jmp_mem(Mem::Base(RSP, context_offset!(near.exit_lookup))),
                (false, true) => self.asm.jmp_mem(Mem::Base(RSP, context_offset!(near.exit_event))),
                (true, false) => self.asm.call_mem(Mem::Base(RSP, context_offset!(hot.exit_branch))),
                (true, true) => self.asm.call_mem(Mem::Base(RSP, context_offset!(hot.exit_branch_event))),
            }
            return;
        };
        let (mode, segment) = (self.mode, self.code.segment);
        let known = match target {
            Target::Known(address) if !self.setting.relative => Some(address),
            _ => None,
        };
        let asm = &mut self.asm;
        // What is looked up: with the base of a code segment in the upper half.
        let based = segment.base != 0;
        if based {
            asm.mov_imm(S1, u64::from(segment.base) << 32);
            asm.lea(S0, Mem::Index(S0, S1, 1, 0));
        }
        let JumpSlot { shift, tags, codes, parked: parked_codes } = code_memory::jump_slot_offsets(slot);
        // In S1: where the entry is, in words; or how far from where it should be, if that is a constant.
        self.entry_index(shift, known.is_some(), self.flags == FlagState::Parked);
        let at = |array: i32| {
            let offset = array - code_memory::JUMP_TABLE_BELOW - offset_of!(Vcpu, gpr) as i32;
            match known {
                Some(t) => {
                    let index = code_memory::jump_index(code_memory::jump_key(t, segment), mode);
                    Mem::Jump(RSP, S1, offset + index as i32 * 8, t)
                }
                None => Mem::Index(RSP, S1, 8, offset),
            }
        };
        let parked = self.flags == FlagState::Parked;
        let asm = &mut self.asm;
        let missed = asm.label();
        if parked {
            // EFLAGS is free: the tag is simply compared.
            asm.alu_mem(Alu::Cmp, S0, at(tags));
            asm.jcc(cc::NE, missed);
            asm.jmp_mem(at(parked_codes));
        } else {
            // The tag's complement + address + 1 = 0, without touching the flags.
            asm.mov(S2, RCX);
            asm.load(RCX, at(tags));
            asm.not(RCX);
            asm.lea(RCX, Mem::Index(RCX, S0, 1, 1));
            asm.unless_rcx_zero(|asm| asm.jmp(missed));
            asm.mov(RCX, S2);
            asm.jmp_mem(at(codes));
        }
        self.missed_stub(Missed { entry: missed, parked, based, computed });
    }

    /// Emits what finds an entry of the jump table. `constant`: its place is known; `parked`: EFLAGS is free.
    fn entry_index(&mut self, shift: usize, constant: bool, parked: bool) {
        let asm = &mut self.asm;
        let shift = Mem::Code(shift);
        if constant {
            return asm.load(S1, shift);
        }
        if parked && code_memory::has_bmi2() && !self.mode.segmented() {
            // The bits stand where the index has them: see `jump_index`.
            asm.mov32(S1, S0);
            asm.alu_imm32(Alu::And, S1, code_memory::JUMP_MASK as i32);
            return asm.alu_mem(Alu::Add, S1, shift);
        }
        asm.load(S2, shift);
        if code_memory::has_bmi2() {
            let segmented = self.mode.segmented();
            asm.pext(S1, S0, if segmented { SEGMENTED_JUMP_MASK_OFFSET } else { JUMP_MASK_OFFSET });
        } else {
            asm.movzx8(S1, S0);
        }
        asm.lea(S1, Mem::Index(S2, S1, code_memory::JUMP_WORDS as u8, 0));
    }

    /// Leaves for the dispatcher, or for the assembly that looks further: S0 has what the jump table has not.
    pub fn leave_missed(&mut self, Missed { parked, based, computed, .. }: Missed) {
        let asm = &mut self.asm;
        if parked {
            unpark_flags(asm);
        } else {
            asm.mov(RCX, S2);
        }
        if based {
            asm.mov32(S0, S0);
        }
        if computed {
            asm.call_mem(Mem::Base(RSP, context_offset!(hot.exit_branch)));
        } else {
            asm.jmp_mem(Mem::Base(RSP, context_offset!(near.exit_lookup)));
        }
    }

    /// The target of an indirect branch, in S0.
    fn load_target(&mut self, insn: &Instruction) {
        if memory_operand(insn).is_some() {
            let size = insn.memory_size().size();
            self.operand(insn, AccessKind::new(size, false, self.mode.context()));
            self.load_sized(size, S0, Mem::Base(S0, 0));
        } else {
            let register = insn.op0_register();
            self.read_register(S0, register.full_register().number() as u8);
            match register.size() {
                2 => self.asm.movzx16(S0, S0),
                4 => self.asm.mov32(S0, S0),
                _ => {}
            }
        }
    }

    fn push_return_address(&mut self, insn: &Instruction) {
        let size = operand_size(insn);
        let slot = self.stack_slot(-(size as i32), size, true);
        let next = self.wrap_ip(insn.next_ip());
        if size != 8 || !self.asm.store_address(slot, next) {
            self.asm.mov_address(S1, next);
            self.store_sized(size, slot, S1);
        }
        self.move_stack(-(size as i32));
    }

    /// LOOP, LOOPE, LOOPNE, JCXZ, JECXZ, JRCXZ: none touches the flags.
    fn count_branch(&mut self, insn: &Instruction) {
        use Mnemonic::*;
        let target = insn.near_branch_target();
        let (taken, not_taken) = (self.asm.label(), self.asm.label());
        let width = counter_width(insn);
        let next = self.wrap_ip(insn.next_ip());
        // JRCXZ, the one test that spares the flags, on a zero-extended copy; the counter waits in the context.
        let copied = match insn.mnemonic() {
            Jcxz | Jecxz | Jrcxz => {
                if width != 64 {
                    self.asm.store(context(1), RCX);
                    self.narrow_counter(width);
                }
                width != 64
            }
            _ => {
                match width {
                    64 => self.asm.lea(RCX, Mem::Base(RCX, -1)),
                    32 => self.asm.lea32(RCX, Mem::Base(RCX, -1)),
                    _ => {
                        self.asm.store(context(1), RCX);
                        self.asm.lea32(RCX, Mem::Base(RCX, -1));
                        self.asm.store16(context(1), RCX);
                        self.narrow_counter(width);
                    }
                }
                width == 16
            }
        };
        match insn.mnemonic() {
            Jcxz | Jecxz | Jrcxz => self.asm.unless_rcx_zero(|asm| asm.jmp(not_taken)),
            mnemonic => {
                self.asm.unless_rcx_zero(|asm| match mnemonic {
                    Loope => asm.jcc(4, taken),
                    Loopne => asm.jcc(5, taken),
                    _ => asm.jmp(taken),
                });
                self.asm.jmp(not_taken);
            }
        }
        for (label, to) in [(taken, target), (not_taken, next)] {
            self.asm.bind(label);
            if copied {
                self.asm.load(RCX, context(1));
            }
            self.goto(to);
        }
    }

    fn narrow_counter(&mut self, width: u32) {
        if width == 16 { self.asm.movzx16(RCX, RCX) } else { self.asm.mov32(RCX, RCX) }
    }
}
