//! SYSCALL and SYSRET inline, between 64-bit code of two privilege levels. What makes them fault, and what else has to be looked
//! at then (a single step, an interrupt that becomes deliverable, alignment checks), [`crate::semantics::transfer`] has.

use arch::registers::{cr4, efer, rflags};
use arch::state::{Segment, SegmentRegister};
use iced_x86::{Code, Instruction};

use super::asm::{Alu, Mem, RCX, RSP, Reg, S0, S1, cc};
use super::block::Builder;
use super::control::Target;
use super::reencode::context;
use super::system::{CR4, RFLAGS, unless_interrupted};
use crate::cpu::Msrs;
use crate::entry::context_offset;
use crate::mode::Mode;
use crate::semantics::transfer::SYSRET_FLAGS;

const EFER: Mem = msr(std::mem::offset_of!(Msrs, efer));
const LSTAR: Mem = msr(std::mem::offset_of!(Msrs, lstar));
const SFMASK: Mem = msr(std::mem::offset_of!(Msrs, sfmask));
/// The selectors of SYSCALL, and above them those of SYSRET.
const SELECTORS: Mem = msr(std::mem::offset_of!(Msrs, star) + 4);

const RETURNS: Mem = Mem::Base(RSP, context_offset!(hot.returns));
const DIRECT: Mem = Mem::Base(RSP, context_offset!(hot.direct));

const fn msr(offset: usize) -> Mem {
    Mem::Base(RSP, context_offset!(msrs) + offset as i32)
}

/// R11's number.
const R11: u8 = 11;

/// Whether the inline emission covers the instruction in this mode.
pub fn emits(insn: &Instruction, mode: Mode) -> bool {
    let known = match insn.code() {
        Code::Syscall => true,
        Code::Sysretq => mode.cpl() == 0,
        _ => false,
    };
    known && mode.long() && !mode.is_single()
}

/// A segment's attributes and selector, as they stand side by side.
fn with_selector(segment: Segment) -> i32 {
    i32::from(segment.selector) << 16 | i32::from(segment.attributes)
}

impl Builder<'_> {
    pub fn switch_level(&mut self, insn: &Instruction) {
        // Rust sees them, and may show them to the handler of a fault.
        self.park();
        match insn.code() {
            Code::Syscall => self.system_call(insn.next_ip()),
            _ => self.system_return(),
        }
        // A SYSCALL of the kernel itself leads to a mode that no slot is known of.
        let outward = insn.code() == Code::Sysretq;
        let slot = self.setting.level_slot.filter(|_| outward == (self.mode.cpl() == 0));
        self.lookup_in(slot, Target::Entry);
    }

    fn system_call(&mut self, next: u64) {
        let slow = self.sensitive_stub(None);
        self.asm.test_mem32_imm(EFER, efer::SCE as i32);
        self.asm.jcc(cc::E, slow);
        self.flags_image();
        let asm = &mut self.asm;
        asm.load32(S0, SFMASK);
        asm.not(S0);
        asm.alu32(Alu::And, S0, S1);
        asm.alu_imm32(Alu::Or, S0, rflags::FIXED as i32);
        if self.mode.smap() {
            asm.test_imm32(S0, rflags::AC as i32);
            asm.jcc(cc::NE, slow);
        }
        asm.store(context(R11), S1);
        asm.store32(RFLAGS, S0);
        asm.mov32(S1, S0);
        self.park_image();
        let asm = &mut self.asm;
        asm.mov_address(RCX, next);
        asm.load32(S0, SELECTORS);
        asm.alu_imm32(Alu::And, S0, 0xfffc);
        asm.shl32(S0, 16);
        asm.lea32(S1, Mem::Base(S0, with_selector(Segment::flat_code(0, true, 0))));
        asm.lea32(S0, Mem::Base(S0, with_selector(Segment::flat_data(8, 0))));
        self.load_flat(SegmentRegister::Cs, S1);
        self.load_flat(SegmentRegister::Ss, S0);
        self.asm.load(S0, LSTAR);
    }

    fn system_return(&mut self) {
        let slow = self.sensitive_stub(None);
        let asm = &mut self.asm;
        asm.test_mem32_imm(EFER, efer::SCE as i32);
        asm.jcc(cc::E, slow);
        asm.test_mem32_imm(CR4, cr4::TSD as i32);
        asm.jcc(cc::NE, slow);
        asm.test_mem32_imm(DIRECT, -1);
        asm.jcc(cc::NE, slow);
        asm.add_mem_imm(RETURNS, 1);
        // Programs are in the lower half.
        asm.mov(S1, RCX);
        asm.shr(S1, 47);
        asm.jcc(cc::NE, slow);
        asm.load32(S1, context(R11));
        unless_interrupted(asm, slow);
        asm.test_imm32(S1, (rflags::TF | rflags::AC) as i32);
        asm.jcc(cc::NE, slow);
        asm.alu_imm32(Alu::And, S1, SYSRET_FLAGS as i32);
        asm.alu_imm32(Alu::Or, S1, rflags::FIXED as i32);
        asm.store32(RFLAGS, S1);
        self.park_image();
        let asm = &mut self.asm;
        asm.load32(S0, SELECTORS);
        asm.alu_imm32(Alu::And, S0, !0xffff);
        asm.lea32(S1, Mem::Base(S0, 16 << 16));
        asm.lea32(S0, Mem::Base(S0, 8 << 16));
        asm.alu_imm32(Alu::Or, S1, with_selector(Segment::flat_code(3, true, 3)));
        asm.alu_imm32(Alu::Or, S0, with_selector(Segment::flat_data(3, 3)));
        self.load_flat(SegmentRegister::Cs, S1);
        self.load_flat(SegmentRegister::Ss, S0);
        self.asm.mov(S0, RCX);
    }

    /// A flat segment whose attributes and selector are in a register.
    fn load_flat(&mut self, register: SegmentRegister, with_selector: Reg) {
        let at = |field: usize| {
            let segment = register as usize * size_of::<Segment>();
            Mem::Base(RSP, context_offset!(segments) + (segment + field) as i32)
        };
        self.asm.store_imm(at(std::mem::offset_of!(Segment, base)), 0);
        // All of the other half, of which the attributes and the selector come next.
        self.asm.store_imm(at(std::mem::offset_of!(Segment, limit)), -1);
        self.asm.store32(at(std::mem::offset_of!(Segment, attributes)), with_selector);
    }
}
