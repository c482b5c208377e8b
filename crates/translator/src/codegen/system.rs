//! Privileged instructions that kernels and firmware execute all day, and PUSHF, emitted inline as far as nothing can go
//! wrong. Elsewhere, and where emitted code finds that more is to be done, `semantics` has them.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::asm::{Alu, Asm, Label, Mem, RAX, RCX, RDX, RSP, S0, S1, cc};
use super::block::Builder;
use super::control::Target;
use super::operand::{FlagState, SAVED_AX};
use crate::entry::context_offset;
use crate::mmu::operand::segment_register;
use crate::mode::Mode;
use crate::shared::request;
use arch::registers::{cr4, rflags};

const FS_BASE: Mem = Mem::Base(RSP, context_offset!(segments) + 4 * size_of::<arch::Segment>() as i32);
const GS_BASE: Mem = Mem::Base(RSP, context_offset!(segments) + 5 * size_of::<arch::Segment>() as i32);
const KERNEL_GS_BASE: Mem =
    Mem::Base(RSP, context_offset!(msrs) + std::mem::offset_of!(crate::cpu::Msrs, kernel_gs_base) as i32);
const TSC_AUX: Mem = Mem::Base(RSP, context_offset!(msrs) + std::mem::offset_of!(crate::cpu::Msrs, tsc_aux) as i32);
pub const RFLAGS: Mem = Mem::Base(RSP, context_offset!(rflags));
const PKRU: Mem = Mem::Base(RSP, context_offset!(pkru));
pub const CR4: Mem = Mem::Base(RSP, context_offset!(cr4));
/// See [`Builder::push_flags`].
const LENT: Mem = Mem::Base(RSP, context_offset!(hot.lent));

/// How far a pending interrupt's bit is below IF.
const INTERRUPT_TO_IF: u8 = 8;
const _: () = assert!((request::INTERRUPT as u64) << INTERRUPT_TO_IF == rflags::IF);

/// Whether the inline emission covers the instruction in this mode.
pub fn emits(insn: &Instruction, mode: Mode, inline_tsc: bool) -> bool {
    if mode.is_single() || mode.checks_alignment() {
        return false;
    }
    // At level 0 no virtual-8086 mode and no IOPL is in the way.
    let privileged = mode.cpl() == 0;
    match insn.mnemonic() {
        Mnemonic::Swapgs => privileged && mode.long(),
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => mode.long(),
        Mnemonic::Cli | Mnemonic::Sti => privileged,
        Mnemonic::Rdtsc | Mnemonic::Rdtscp => mode.reads_tsc() && inline_tsc,
        Mnemonic::Cld | Mnemonic::Std | Mnemonic::Rdpkru => true,
        Mnemonic::Mov if insn.op0_kind() == OpKind::Register && insn.op1_kind() == OpKind::Register => {
            insn.op1_register().is_segment_register() || privileged && control_register(insn.op1_register()).is_some()
        }
        // Virtual-8086 code has 16 bits.
        _ if is_push(insn) => (privileged || mode.bits() != 16) && has_own_size(insn, mode),
        _ => is_pop(insn) && privileged && has_own_size(insn, mode),
    }
}

/// The mode that STAC or CLAC leads to, where emitted code can switch to it.
pub fn access_mode(insn: &Instruction, mode: Mode) -> Option<Mode> {
    let on = match insn.mnemonic() {
        Mnemonic::Stac => true,
        Mnemonic::Clac => false,
        _ => return None,
    };
    mode.with_user_pages(on).filter(|_| mode.long() && !mode.is_single())
}

/// Where a segment register's selector stands.
fn selector(register: Register) -> Mem {
    let segment = segment_register(register) as usize * size_of::<arch::Segment>();
    let at = segment + std::mem::offset_of!(arch::Segment, selector);
    Mem::Base(RSP, context_offset!(segments) + at as i32)
}

/// Where a control register that is plain storage stands.
fn control_register(register: Register) -> Option<Mem> {
    let at = match register {
        Register::CR0 => context_offset!(cr0),
        Register::CR2 => context_offset!(cr2),
        Register::CR3 => context_offset!(cr3),
        Register::CR4 => return Some(CR4),
        _ => return None,
    };
    Some(Mem::Base(RSP, at))
}

/// The operand size is that of the mode: others are rare.
fn has_own_size(insn: &Instruction, mode: Mode) -> bool {
    8 * image_size(insn) == mode.bits() as usize
}

/// PUSHF in all sizes.
pub fn is_push(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq)
}

/// POPF in all sizes.
pub fn is_pop(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq)
}

pub fn is_flags_on_stack(insn: &Instruction) -> bool {
    is_push(insn) || is_pop(insn)
}

/// In bytes.
fn image_size(insn: &Instruction) -> usize {
    match insn.code() {
        Code::Pushfw | Code::Popfw => 2,
        Code::Pushfd | Code::Popfd => 4,
        _ => 8,
    }
}

impl Builder<'_> {
    /// Emits the instruction; true if it ended the block.
    pub fn system_instruction(&mut self, insn: &Instruction) -> bool {
        match insn.mnemonic() {
            Mnemonic::Swapgs => {
                self.asm.load(S0, GS_BASE);
                self.asm.load(S1, KERNEL_GS_BASE);
                self.asm.store(GS_BASE, S1);
                self.asm.store(KERNEL_GS_BASE, S0);
            }
            Mnemonic::Rdfsbase => self.read_segment_base(insn, FS_BASE),
            Mnemonic::Rdgsbase => self.read_segment_base(insn, GS_BASE),
            Mnemonic::Wrfsbase => self.write_segment_base(insn, FS_BASE),
            Mnemonic::Wrgsbase => self.write_segment_base(insn, GS_BASE),
            Mnemonic::Cli => {
                self.free_flags();
                self.asm.and_mem32_imm(RFLAGS, !rflags::IF as i32);
            }
            Mnemonic::Sti => return self.set_interrupt_flag(insn),
            Mnemonic::Rdtsc => self.read_tsc(),
            Mnemonic::Rdtscp => {
                // It waits for what is before it.
                self.asm.lfence();
                self.read_tsc();
                self.asm.load(RCX, TSC_AUX);
            }
            Mnemonic::Cld => {
                self.free_flags();
                self.asm.and_mem32_imm(RFLAGS, !rflags::DF as i32);
            }
            Mnemonic::Std => {
                self.free_flags();
                self.asm.or_mem32_imm(RFLAGS, rflags::DF as i32);
            }
            Mnemonic::Rdpkru => self.read_protection_keys(),
            Mnemonic::Mov => self.read_system_register(insn),
            _ if is_push(insn) => self.push_flags(image_size(insn)),
            _ => self.pop_flags(image_size(insn)),
        }
        false
    }

    /// STAC and CLAC. The mode says how AC is before, so that the arithmetic flags need not be touched to change it.
    pub fn switch_access(&mut self, insn: &Instruction) {
        let distance = rflags::AC as i32;
        self.asm.load32(S0, RFLAGS);
        self.asm.lea32(S0, Mem::Base(S0, if insn.mnemonic() == Mnemonic::Stac { distance } else { -distance }));
        self.asm.store32(RFLAGS, S0);
        let next = insn.next_ip();
        self.asm.mov_address(S0, next);
        self.lookup_in(self.setting.access_slot, Target::Known(next));
    }

    /// MOV from a control or a segment register to a general-purpose one.
    fn read_system_register(&mut self, insn: &Instruction) {
        let (to, from) = (insn.op0_register(), insn.op1_register());
        match control_register(from) {
            Some(mem) if to.size() == 4 => self.asm.load32(S0, mem),
            Some(mem) => self.asm.load(S0, mem),
            None => self.asm.load16(S0, selector(from)),
        }
        self.write_sized_register(to.full_register().number() as u8, to.size(), S0);
    }

    /// RDPKRU, which Linux executes for each page that it pins for a device. What makes it fault, Rust finds out.
    fn read_protection_keys(&mut self) {
        self.free_flags();
        let slow = self.sensitive_stub(None);
        self.asm.test_mem32_imm(CR4, cr4::PKE as i32);
        self.asm.jcc(cc::E, slow);
        self.asm.mov32(S0, RCX);
        self.asm.alu_imm32(Alu::Cmp, S0, 0);
        self.asm.jcc(cc::NE, slow);
        self.asm.load32(RAX, PKRU);
        self.asm.mov_imm(RDX, 0);
    }

    /// RDFSBASE and RDGSBASE.
    fn read_segment_base(&mut self, insn: &Instruction, base: Mem) {
        self.require_base_access();
        let to = insn.op0_register();
        match to.size() {
            4 => self.asm.load32(S0, base),
            _ => self.asm.load(S0, base),
        }
        self.write_register(to.full_register().number() as u8, S0);
    }

    /// WRFSBASE and WRGSBASE. Whether an address that isn't canonical faults, Rust finds out.
    fn write_segment_base(&mut self, insn: &Instruction, base: Mem) {
        let slow = self.require_base_access();
        let from = insn.op0_register();
        self.read_register(S0, from.full_register().number() as u8);
        if from.size() == 4 {
            self.asm.mov32(S0, S0);
        } else {
            self.asm.mov(S1, S0);
            self.asm.sar(S1, 47);
            self.asm.alu_imm(Alu::Add, S1, 1);
            self.asm.alu_imm(Alu::Cmp, S1, 1);
            self.asm.jcc(cc::A, slow);
        }
        self.asm.store(base, S0);
    }

    /// To Rust, which is where the label leads, unless there is CR4.FSGSBASE.
    fn require_base_access(&mut self) -> Label {
        self.free_flags();
        let slow = self.sensitive_stub(None);
        self.asm.test_mem32_imm(CR4, cr4::FSGSBASE as i32);
        self.asm.jcc(cc::E, slow);
        slow
    }

    fn read_tsc(&mut self) {
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

    /// STI. Where an interrupt is pending already, Rust sees to it that the next instruction runs first. One that comes later
    /// is noticed only at a branch, which then is that instruction or comes after it: so it must be in the same block.
    fn set_interrupt_flag(&mut self, insn: &Instruction) -> bool {
        self.free_flags();
        if !self.goes_on() {
            self.need_flags();
            self.sensitive(insn, crate::semantics::flags::sti, true);
            return true;
        }
        let slow = self.sensitive_stub(None);
        self.asm.load(S0, Mem::Base(RSP, context_offset!(hot.requests)));
        self.asm.test_mem32_imm(Mem::Base(S0, 0), (request::INTERRUPT | request::NMI) as i32);
        self.asm.jcc(cc::NE, slow);
        self.asm.or_mem32_imm(RFLAGS, rflags::IF as i32);
        false
    }

    /// PUSHF: the arithmetic flags from where they are parked, the others from the context.
    fn push_flags(&mut self, size: usize) {
        self.park();
        self.flags_image();
        self.asm.store(LENT, S1);
        let slot = self.stack_slot(-(size as i32), size, true);
        self.asm.load(S1, LENT);
        self.store_sized(size, slot, S1);
        self.move_stack(-(size as i32));
    }

    /// POPF at level 0. TF, a change of AC, and IF with an interrupt pending are Rust's.
    fn pop_flags(&mut self, size: usize) {
        let slot = self.stack_slot(0, size, false);
        self.load_sized(size, S1, slot);
        let slow = self.sensitive_stub(None);
        let asm = &mut self.asm;
        unless_interrupted(asm, slow);
        let (mut settable, mut cleared) = (rflags::DF | rflags::NT | rflags::IF | rflags::IOPL, rflags::RF);
        let mut changes_more = rflags::TF;
        if size > 2 {
            settable |= rflags::ID;
            cleared |= rflags::VIP | rflags::VIF;
            changes_more |= rflags::AC;
        }
        asm.mov32(S0, S1);
        asm.alu_mem32(Alu::Xor, S0, RFLAGS);
        asm.test_imm32(S0, changes_more as i32);
        asm.jcc(cc::NE, slow);
        asm.alu_imm32(Alu::And, S0, settable as i32);
        asm.alu_mem32(Alu::Xor, S0, RFLAGS);
        asm.alu_imm32(Alu::And, S0, !cleared as i32);
        asm.store32(RFLAGS, S0);
        self.park_image();
        self.move_stack(size as i32);
    }

    /// RFLAGS as it is pushed, in S1; the arithmetic flags are parked. Clobbers S0.
    pub fn flags_image(&mut self) {
        let asm = &mut self.asm;
        asm.load32(S1, SAVED_AX);
        asm.mov32(S0, S1);
        asm.alu_imm32(Alu::And, S0, 1);
        asm.shl32(S0, 11);
        asm.shr32(S1, 8);
        asm.alu_imm32(Alu::And, S1, (rflags::ARITHMETIC & 0xff) as i32);
        asm.alu(Alu::Add, S1, S0);
        asm.load32(S0, RFLAGS);
        asm.alu_imm32(Alu::And, S0, !(rflags::ARITHMETIC | rflags::RF | rflags::VM) as i32);
        asm.alu(Alu::Add, S1, S0);
    }

    /// The arithmetic flags of the image in S1 are the guest's, parked. Clobbers S0 and S1.
    pub fn park_image(&mut self) {
        let asm = &mut self.asm;
        // As `flags_to_ax` has them.
        asm.mov32(S0, S1);
        asm.shr32(S0, 11);
        asm.alu_imm32(Alu::And, S0, 1);
        asm.alu_imm32(Alu::And, S1, (rflags::ARITHMETIC & 0xff) as i32);
        asm.shl32(S1, 8);
        asm.alu(Alu::Add, S1, S0);
        asm.store32(SAVED_AX, S1);
        self.flags = FlagState::Parked;
    }
}

/// To `slow` if an interrupt is pending that the image of RFLAGS in S1 allows. Clobbers S0.
pub fn unless_interrupted(asm: &mut Asm, slow: Label) {
    asm.load(S0, Mem::Base(RSP, context_offset!(hot.requests)));
    asm.load32(S0, Mem::Base(S0, 0));
    // To where IF is.
    asm.shl32(S0, INTERRUPT_TO_IF);
    asm.alu32(Alu::And, S0, S1);
    asm.alu_imm32(Alu::And, S0, rflags::IF as i32);
    asm.jcc(cc::NE, slow);
}
