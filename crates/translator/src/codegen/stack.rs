//! PUSH, POP, PUSHA, POPA and LEAVE inline, and the stack moves of calls and returns.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::asm::{GUEST_RSP, Mem, RBP, RSP, Reg, S0, S1, S2};
use super::block::Builder;
use super::classify::Kind;
use super::decode::Item;
use super::groups::{Keep, Member};
use super::operand::memory_operand;
use super::reencode::{Home, home};
use crate::access::AccessKind;
use crate::entry::context_offset;
use crate::mode::Mode;
use crate::semantics::stack::operand_size;

/// Whether the inline emission covers the instruction in this mode: pushes and pops of registers, pushes of constants and
/// memory, all registers at once, LEAVE.
pub fn emits(insn: &Instruction, mode: Mode) -> bool {
    match insn.mnemonic() {
        Mnemonic::Leave => !mode.long() || insn.code() == Code::Leaveq,
        Mnemonic::Pusha | Mnemonic::Pushad | Mnemonic::Popa | Mnemonic::Popad => true,
        _ if mode.long() && word(insn) != 8 => false,
        Mnemonic::Pop => insn.op0_kind() == OpKind::Register,
        _ => true,
    }
}

/// The bytes by which an instruction moves the stack pointer.
fn word(insn: &Instruction) -> usize {
    insn.stack_pointer_increment().unsigned_abs() as usize
}

impl Builder<'_> {
    /// Loads 2, 4 or 8 bytes, zero-extended.
    pub fn load_sized(&mut self, size: usize, to: Reg, from: Mem) {
        match size {
            2 => self.asm.load16(to, from),
            4 => self.asm.load32(to, from),
            _ => self.asm.load(to, from),
        }
    }

    pub fn store_sized(&mut self, size: usize, to: Mem, from: Reg) {
        match size {
            2 => self.asm.store16(to, from),
            4 => self.asm.store32(to, from),
            _ => self.asm.store(to, from),
        }
    }

    /// Adds to the guest's stack pointer, leaving the flags alone: at once, or with what the next instruction adds. Clobbers S2.
    pub fn move_stack(&mut self, distance: i32) {
        let distance = distance + std::mem::take(&mut self.unmoved);
        if self.next_moves_stack() {
            self.unmoved = distance;
        } else {
            self.set_stack(GUEST_RSP, distance);
        }
    }

    /// Whether the next instruction is a push, a pop, a call or a return that needs no check of its own: nothing sees the stack
    /// pointer before it has moved on.
    fn next_moves_stack(&self) -> bool {
        use Mnemonic::*;
        let plain = |r: Register| r.full_register() != Register::RSP;
        let moves = |item: &Item| match (item.kind, item.insn.mnemonic()) {
            (Kind::Stack, Push) if item.insn.op0_kind() == OpKind::Register => plain(item.insn.op0_register()),
            (Kind::Stack, Push) => memory_operand(&item.insn).is_none(),
            (Kind::Stack, Pop) => plain(item.insn.op0_register()),
            (Kind::Branch, Call) => item.insn.is_call_near(),
            (Kind::Branch, Ret) => true,
            _ => false,
        };
        let checked = |item: &Item| matches!(item.member, Some(Member { keep: Keep::StackPage, check: None, .. }));
        self.mode.long()
            && self.addend
            && self.goes_on()
            && self.items.get(self.current).is_some_and(|i| i.insn.op0_register().full_register() != Register::RSP)
            && self.items.get(self.current + 1).is_some_and(|next| moves(next) && checked(next))
    }

    /// Sets the guest's stack pointer to a register's value plus a distance.
    fn set_stack(&mut self, from: Reg, distance: i32) {
        let mem = Mem::Base(from, distance);
        match self.mode.stack_bits() {
            64 => self.asm.lea(GUEST_RSP, mem),
            32 => self.asm.lea32(GUEST_RSP, mem),
            _ => {
                self.asm.lea32(S2, mem);
                self.asm.mov16(GUEST_RSP, S2);
            }
        }
    }

    pub fn stack_instruction(&mut self, insn: &Instruction) {
        let size = word(insn);
        match insn.mnemonic() {
            Mnemonic::Leave => self.leave(operand_size(insn)),
            Mnemonic::Pusha | Mnemonic::Pushad => self.push_all(size / 8),
            Mnemonic::Popa | Mnemonic::Popad => self.pop_all(size / 8),
            Mnemonic::Pop => {
                let n = insn.op0_register().full_register().number() as u8;
                let slot = self.stack_slot(0, size, false);
                match home(n) {
                    Home::Host(reg) if size == 8 && reg != GUEST_RSP => {
                        self.asm.load(reg, slot);
                        self.move_stack(size as i32);
                    }
                    _ => {
                        self.load_sized(size, S1, slot);
                        self.move_stack(size as i32);
                        self.write_sized_register(n, size, S1);
                    }
                }
            }
            _ if memory_operand(insn).is_some() => {
                self.operand(insn, AccessKind::new(size, false, self.mode.context()));
                self.load_sized(size, S0, Mem::Base(S0, 0));
                let lent = Mem::Base(RSP, context_offset!(hot.lent));
                self.asm.store(lent, S0);
                let slot = self.stack_slot(-(size as i32), size, true);
                self.asm.load(S1, lent);
                self.store_sized(size, slot, S1);
                self.move_stack(-(size as i32));
            }
            _ => {
                let slot = self.stack_slot(-(size as i32), size, true);
                if insn.op0_kind() == OpKind::Register {
                    let n = insn.op0_register().full_register().number() as u8;
                    match home(n) {
                        Home::Host(reg) => self.store_sized(size, slot, reg),
                        Home::Memory => {
                            self.read_register(S1, n);
                            self.store_sized(size, slot, S1);
                        }
                    }
                } else if size == 8 {
                    self.asm.store_imm(slot, insn.immediate(0) as i32);
                } else {
                    self.asm.mov_imm(S1, insn.immediate(0) & 0xffff_ffff);
                    self.store_sized(size, slot, S1);
                }
                self.move_stack(-(size as i32));
            }
        }
    }

    fn leave(&mut self, size: usize) {
        self.addend = false;
        self.free_flags();
        match self.mode.stack_bits() {
            64 => self.asm.mov(S0, RBP),
            _ => self.asm.mov32(S0, RBP),
        }
        self.check_stack(AccessKind::new(size, false, self.mode.context()));
        self.note_flags();
        self.load_sized(size, S1, Mem::Base(S0, 0));
        self.set_stack(RBP, size as i32);
        self.write_sized_register(RBP.0, size, S1);
    }

    /// PUSHA: the registers in the order of their encodings, the first at the top.
    fn push_all(&mut self, size: usize) {
        let all = 8 * size as i32;
        self.stack_slot(-all, all as usize, true);
        for n in 0..8 {
            let Home::Host(reg) = home(n) else { continue };
            self.store_sized(size, Mem::Base(S0, (7 - i32::from(n)) * size as i32), reg);
        }
        self.move_stack(-all);
    }

    fn pop_all(&mut self, size: usize) {
        let all = 8 * size as i32;
        self.stack_slot(0, all as usize, false);
        for n in (0..8).filter(|&n| n != 4) {
            self.load_sized(size, S1, Mem::Base(S0, (7 - i32::from(n)) * size as i32));
            self.write_sized_register(n, size, S1);
        }
        self.move_stack(all);
    }
}
