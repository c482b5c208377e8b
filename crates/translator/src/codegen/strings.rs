//! MOVS, STOS and LODS inline, by flat addresses of the mode's own size: single elements, and repetitions that stay within
//! one page of each operand. All else, backward ones among it, is left to [`crate::semantics::string`] with nothing done yet.

use iced_x86::Instruction;

use super::asm::{Alu, Label, Mem, RAX, RCX, RDI, RSI, RSP, Reg, S0, S1, S2, cc};
use super::block::Builder;
use super::reencode::context;
use crate::access::AccessKind;
use crate::entry::context_offset;
use crate::mode::Mode;
use crate::semantics::string::{Form, Kind, Repeat};
use arch::registers::rflags;
use arch::state::SegmentRegister;

const PAGE: i32 = memory::PAGE_SIZE as i32;

/// Whether the inline emission covers the instruction in this mode.
pub fn emits(insn: &Instruction, mode: Mode) -> bool {
    if !mode.flat() || mode.is_single() || mode.checks_alignment() {
        return false;
    }
    let Some(form) = Form::of(insn) else { return false };
    let own_size = if mode.long() { u64::MAX } else { u32::MAX.into() };
    let flat = !matches!(form.segment, SegmentRegister::Fs | SegmentRegister::Gs);
    form.mask == own_size
        && match form.kind {
            Kind::Movs => flat && matches!(form.repeat, Repeat::Once | Repeat::Count),
            Kind::Stos => matches!(form.repeat, Repeat::Once | Repeat::Count),
            Kind::Lods => flat && form.repeat == Repeat::Once,
            Kind::Cmps | Kind::Scas => false,
        }
}

impl Builder<'_> {
    pub fn string_instruction(&mut self, insn: &Instruction) {
        let Some(form) = Form::of(insn) else { return };
        self.free_flags();
        self.note_flags();
        self.held = None;
        let back = self.asm.label();
        let slow = self.sensitive_stub(Some(back));
        self.asm.test_mem32_imm(Mem::Base(RSP, context_offset!(rflags)), rflags::DF as i32);
        self.asm.jcc(cc::NE, slow);
        if form.repeat == Repeat::Once {
            self.one_element(&form, slow);
        } else {
            self.elements_in_a_page(&form, slow);
        }
        self.asm.bind(back);
    }

    /// The host address of `size` bytes at what a register points to, in S0.
    fn pointed_to(&mut self, pointer: Reg, size: usize, write: bool, slow: Label) {
        if self.mode.long() {
            self.asm.mov(S0, pointer);
        } else {
            self.asm.mov32(S0, pointer);
        }
        self.look_up(AccessKind::new(size, write, self.mode.context()), slow);
    }

    fn one_element(&mut self, form: &Form, slow: Label) {
        let size = form.size;
        let step = size as i32;
        match form.kind {
            Kind::Stos => {
                self.pointed_to(RDI, size, true, slow);
                self.asm.store_low(size, Mem::Base(S0, 0), RAX);
                self.lea_address(RDI, Mem::Base(RDI, step));
            }
            Kind::Lods => {
                self.pointed_to(RSI, size, false, slow);
                self.asm.load_low(size, RAX, Mem::Base(S0, 0));
                self.lea_address(RSI, Mem::Base(RSI, step));
            }
            _ => {
                self.pointed_to(RDI, size, true, slow);
                self.asm.mov(S2, S0);
                self.pointed_to(RSI, size, false, slow);
                self.asm.load_low(size, S1, Mem::Base(S0, 0));
                self.asm.store_low(size, Mem::Base(S2, 0), S1);
                self.lea_address(RDI, Mem::Base(RDI, step));
                self.lea_address(RSI, Mem::Base(RSI, step));
            }
        }
    }

    /// The host's own REP does the work, on host addresses; rdi and rsi wait in the context with what they become.
    fn elements_in_a_page(&mut self, form: &Form, slow: Label) {
        let (size, moves) = (form.size, form.kind == Kind::Movs);
        let most = PAGE / size as i32;
        if self.mode.long() {
            self.asm.alu_imm(Alu::Cmp, RCX, most);
        } else {
            self.asm.alu_imm32(Alu::Cmp, RCX, most);
            self.asm.mov32(RCX, RCX);
        }
        self.asm.jcc(cc::A, slow);
        self.stays_in_page(RDI, size, slow);
        if moves {
            self.stays_in_page(RSI, size, slow);
        }
        self.pointed_to(RDI, 1, true, slow);
        if moves {
            self.asm.mov(S2, S0);
            self.pointed_to(RSI, 1, false, slow);
            self.advance(RSI, size);
            self.asm.mov(RSI, S0);
        }
        self.advance(RDI, size);
        self.asm.mov(RDI, if moves { S2 } else { S0 });
        self.asm.repeat_string(size, moves);
        self.asm.load(RDI, context(RDI.0));
        if moves {
            self.asm.load(RSI, context(RSI.0));
        }
    }

    /// To `slow` unless the first and the last byte of `rcx` elements lie in one page. None at all pass or don't.
    fn stays_in_page(&mut self, pointer: Reg, size: usize, slow: Label) {
        self.lea_address(S0, Mem::Index(pointer, RCX, size as u8, -1));
        if self.mode.long() {
            self.asm.alu(Alu::Xor, S0, pointer);
        } else {
            self.asm.alu32(Alu::Xor, S0, pointer);
        }
        self.asm.alu_imm(Alu::Cmp, S0, PAGE - 1);
        self.asm.jcc(cc::A, slow);
    }

    /// What a pointer becomes, to the context.
    fn advance(&mut self, pointer: Reg, size: usize) {
        self.lea_address(S1, Mem::Index(pointer, RCX, size as u8, 0));
        self.asm.store(context(pointer.0), S1);
    }
}
