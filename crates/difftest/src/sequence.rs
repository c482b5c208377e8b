//! Makes cases of many instructions: what only shows between instructions (flags that live across them, branches, calls,
//! code that writes itself, single steps, faults half-way).
//!
//! Some registers stay pointers into the data region throughout, and one counts loops; every other is free for random
//! instructions. So a sequence runs long, and ends where it was meant to.

use arch::registers::rflags;
use iced_x86::code_asm::{CodeAssembler, CodeLabel};
use iced_x86::{
    Code, Encoder, FlowControl, IcedError, Instruction, InstructionInfoFactory, MemoryOperand, OpAccess, OpKind,
    Register,
};

use crate::case::{Ignore, TRACE};
use crate::generate::{Case, Generator, state, values};
use crate::layout::*;
use crate::rng::Rng;

/// Makes sequences out of a generator's forms.
pub struct Sequences {
    generator: Generator,
    forms: Vec<Code>,
    bits: u32,
    seed: u64,
}

/// The registers that keep their meaning throughout a sequence.
struct Roles {
    pointers: &'static [Register],
    counter: Register,
}

const ROLES64: Roles = Roles {
    pointers: &[Register::RBX, Register::RBP, Register::R12, Register::R13, Register::RSI],
    counter: Register::R11D,
};
const ROLES32: Roles = Roles { pointers: &[Register::EBX, Register::EBP], counter: Register::ESI };

impl Sequences {
    pub fn new(seed: u64, bits: u32) -> Self {
        let generator = Generator::new(seed, bits, None);
        let forms = generator.forms().iter().copied().filter(|c| calm(*c)).collect();
        Sequences { generator, forms, bits, seed }
    }

    /// Sequence `index`, to run in slot `index % SLOTS`.
    pub fn case(&self, index: u64) -> Case {
        let mut rng = Rng::for_case(self.seed ^ 0x5e9, index);
        let slot = (index % SLOTS as u64) as usize;
        let rip = slot_address(slot) + SLOT_ENTRY as u64;
        let room = slot_size(slot) - SLOT_ENTRY - 16;
        loop {
            let mut input = state::blank();
            input.slot = slot as u32;
            input.rip = rip;
            state::randomize(&mut rng, &mut input, self.bits);
            input.rflags &= !(rflags::AC | rflags::TF | rflags::RF | rflags::DF);
            calm_floating_point(&mut rng, &mut input.xsave);
            let roles = if self.bits == 64 { &ROLES64 } else { &ROLES32 };
            let first = if self.bits == 64 { Register::RAX } else { Register::EAX };
            for pointer in roles.pointers {
                input.gpr[*pointer as usize - first as usize] = DATA + 256 + rng.below(2 * PAGE as u64 - 1024);
            }
            input.gpr[4] = DATA + PAGE as u64 + 512 + 8 * rng.below(256);
            if rng.one_in(4) {
                input.rflags |= rflags::TF;
            }
            input.steps = TRACE as u32;
            let pointers = roles.pointers.iter().map(|r| (*r, input.gpr[*r as usize - first as usize])).collect();
            let Ok(assembler) = CodeAssembler::new(self.bits) else { continue };
            let stepped = input.rflags & rflags::TF != 0;
            let mut writer =
                Writer { rng: &mut rng, of: self, a: assembler, roles, pointers, later: Vec::new(), stepped };
            if writer.body(room).is_err() {
                continue;
            }
            let Ok(code) = writer.a.assemble(rip) else { continue };
            if code.len() > room {
                continue;
            }
            input.code[SLOT_ENTRY..SLOT_ENTRY + code.len()].copy_from_slice(&code);
            // Flags that a later instruction overwrites are not kept across memory accesses: see `Ignore`.
            let ignore = Ignore { flags_at_fault: rflags::ARITHMETIC, ..Ignore::default() };
            return Case { index, input, code, bits: self.bits, ignore };
        }
    }

    pub fn forms(&self) -> usize {
        self.forms.len()
    }
}

/// No exceptions from floating point, most of the time, and no x87 exception waiting.
fn calm_floating_point(rng: &mut Rng, xsave: &mut [u8]) {
    if rng.one_in(8) {
        return;
    }
    xsave[0] |= 0x3f;
    xsave[2] &= 0x7f;
    xsave[3] &= 0x7f;
    xsave[24] |= 0x80;
    xsave[25] |= 0x1f;
}

/// Whether a form does no more than compute: no change of control, of the stack, of segments, or of control words.
fn calm(code: Code) -> bool {
    let info = code.op_code();
    let mut insn = Instruction::default();
    insn.set_code(code);
    let text = format!("{:?}", code.mnemonic());
    insn.flow_control() == FlowControl::Next
        && !info.is_privileged()
        && !info.is_save_restore()
        && !info.is_stack_instruction()
        && !info.is_input_output()
        && !insn.is_string_instruction()
        && !info.op_kinds().iter().any(|k| {
            use iced_x86::OpCodeOperandKind as K;
            matches!(
                k,
                K::seg_reg
                    | K::mem_offs
                    | K::seg_rBX_al
                    | K::seg_rDI
                    | K::es_rDI
                    | K::mem_vsib32x
                    | K::mem_vsib64x
                    | K::mem_vsib32y
                    | K::mem_vsib64y
                    | K::mem_vsib32z
                    | K::mem_vsib64z
                    | K::es
                    | K::cs
                    | K::ss
                    | K::ds
                    | K::fs
                    | K::gs
            )
        })
        && ![
            "Fldcw",
            "Fldenv",
            "Frstor",
            "Fninit",
            "Finit",
            "Fnstenv",
            "Fnsave",
            "Fstenv",
            "Fsave",
            "Ldmxcsr",
            "Vldmxcsr",
            "Fxsave",
            "Wrfsbase",
            "Wrgsbase",
            "Rdfsbase",
            "Rdgsbase",
            "Std",
            "Enter",
            "Leave",
            "Movdir64b",
            "Lar",
            "Lsl",
            "Verr",
            "Verw",
            "Bt",
            "Bts",
            "Btr",
            "Btc",
            "Cli",
            "Sti",
            "Hlt",
            "Div",
            "Idiv",
            "Bound",
            "Aam",
            "Wbinvd",
            "Lds",
            "Les",
            "Lfs",
            "Lgs",
            "Lss",
            "Arpl",
            "Clui",
            "Aaa",
            "Aas",
            "Daa",
            "Das",
            "Aad",
            "Serialize",
            "Maskmovq",
            "Maskmovdqu",
            "Vmaskmovdqu",
        ]
        .contains(&text.as_str())
}

struct Writer<'a> {
    rng: &'a mut Rng,
    of: &'a Sequences,
    a: CodeAssembler,
    roles: &'a Roles,
    /// Pointer registers and their values.
    pointers: Vec<(Register, u64)>,
    /// Functions to be written behind the end, each called from somewhere.
    later: Vec<CodeLabel>,
    /// TF may be set.
    stepped: bool,
}

type Result = std::result::Result<(), IcedError>;

impl Writer<'_> {
    fn body(&mut self, room: usize) -> Result {
        let items = 4 + self.rng.below((room / 24) as u64);
        for _ in 0..items {
            self.item(0)?;
        }
        self.a.int3()?;
        for mut label in std::mem::take(&mut self.later) {
            self.a.set_label(&mut label)?;
            for _ in 0..1 + self.rng.below(3) {
                self.random()?;
            }
            self.a.ret()?;
            if self.rng.one_in(2) {
                self.a.int3()?;
            }
        }
        Ok(())
    }

    fn item(&mut self, depth: u32) -> Result {
        match self.rng.below(24) {
            0..10 => self.random(),
            10..13 => self.flags(),
            13 | 14 => self.forward(depth),
            15 if depth == 0 => self.looping(),
            16 => self.calling(),
            17 => self.stack(),
            // iced's assembler has labels in operands only in 64-bit code.
            18 if self.of.bits == 64 => self.self_modifying(),
            19 if self.of.bits == 64 => self.indirect(),
            20 if self.of.bits == 64 => self.string(),
            21 if self.rng.one_in(6) => self.fault(),
            22 if self.rng.one_in(4) => self.single_step(),
            23 if depth == 0 => self.walking(),
            _ => self.random(),
        }
    }

    fn add(&mut self, insn: std::result::Result<Instruction, IcedError>) -> Result {
        self.a.add_instruction(insn?)
    }

    /// A register that random instructions may change.
    fn free(&mut self) -> Register {
        if self.of.bits == 64 {
            self.rng.pick(&[
                Register::EAX,
                Register::ECX,
                Register::EDX,
                Register::EDI,
                Register::R8D,
                Register::R9D,
                Register::R10D,
                Register::R14D,
            ])
        } else {
            self.rng.pick(&[Register::EAX, Register::ECX, Register::EDX])
        }
    }

    /// An operand in writable memory.
    fn memory(&mut self, size: u64) -> MemoryOperand {
        let at = self.rng.below(self.pointers.len() as u64) as usize;
        let (register, value) = self.pointers[at];
        let page = PAGE as u64;
        let mut target = match self.rng.below(8) {
            0..5 => DATA + self.rng.below(2 * page - 256),
            5 => DATA + page - self.rng.below(64),
            _ => (value & !63) + 64 * self.rng.below(2),
        };
        if !self.rng.one_in(4) {
            target &= !(size.max(1) - 1);
        }
        let displacement = target.wrapping_sub(value) as i64;
        MemoryOperand::with_base_displ_size(register, displacement, if self.of.bits == 64 { 8 } else { 4 })
    }

    /// Any calm instruction that leaves the pointers and the counter alone.
    fn random(&mut self) -> Result {
        for _ in 0..50 {
            let form = self.rng.pick(&self.of.forms);
            let Some(bytes) = crate::generate::encode_form(self.rng, form, self.of.bits, CODE) else { continue };
            let mut insn = crate::generate::decoder(self.of.bits, &bytes, CODE).decode();
            if insn.is_invalid() || !self.of.generator.admits(&insn) {
                continue;
            }
            if (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory) {
                if insn.memory_index().is_vector_register() {
                    continue;
                }
                let size = insn.memory_size().size() as u64;
                let operand = self.memory(size.clamp(1, 64));
                insn.set_memory_base(operand.base);
                insn.set_memory_index(Register::None);
                insn.set_memory_index_scale(1);
                insn.set_segment_prefix(Register::None);
                insn.set_memory_displ_size(operand.displ_size);
                let mask = if operand.displ_size == 8 { u64::MAX } else { 0xffff_ffff };
                insn.set_memory_displacement64(operand.displacement as u64 & mask);
            }
            if self.disturbs(&insn) {
                continue;
            }
            insn.set_ip(0); // for the assembler: not yet known
            if Encoder::new(self.of.bits).encode(&insn, 0).is_err() {
                continue; // AH..BH beside a register that needs REX
            }
            let undefined = crate::generate::ignore(&insn).flags;
            if undefined != 0 && self.stepped && translator::host_is_amd() {
                // What AMD's processors leave undefined may be as it was before, which translated code does not keep for an
                // instruction that will overwrite it; a step would show it.
                continue;
            }
            // What is undefined now must not decide a branch later.
            self.a.add_instruction(insn)?;
            return if undefined != 0 { self.define_flags() } else { Ok(()) };
        }
        Ok(())
    }

    fn disturbs(&self, insn: &Instruction) -> bool {
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(insn);
        info.used_registers().iter().any(|used| {
            let full = used.register().full_register();
            let written = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None);
            let kept = full == Register::RSP
                || full == self.roles.counter.full_register()
                || self.roles.pointers.iter().any(|p| p.full_register() == full);
            kept && written
        })
    }

    /// Overwrites undefined flags by a comparison.
    fn define_flags(&mut self) -> Result {
        let (a, b) = (self.free(), self.free());
        self.add(Instruction::with2(Code::Cmp_r32_rm32, a, b))
    }

    /// Flags made, and read in every way there is.
    fn flags(&mut self) -> Result {
        let (a, b) = (self.free(), self.free());
        match self.rng.below(12) {
            0 => self.a.clc(),
            1 => self.a.stc(),
            2 => self.a.cmc(),
            3 => self.a.lahf(),
            4 => {
                self.a.pushfq_or_d(self.of.bits)?;
                let r = self.wide(a);
                self.pop(r)
            }
            5 => self.add(Instruction::with2(Code::Adc_r32_rm32, a, b)),
            6 => self.add(Instruction::with2(Code::Sbb_r32_rm32, a, b)),
            7 => {
                let set =
                    self.rng.pick(&[Code::Setb_rm8, Code::Setl_rm8, Code::Seto_rm8, Code::Setp_rm8, Code::Sete_rm8]);
                self.add(Instruction::with1(set, Register::AL))
            }
            8 => {
                let cmov = self.rng.pick(&[
                    Code::Cmovb_r32_rm32,
                    Code::Cmovle_r32_rm32,
                    Code::Cmovs_r32_rm32,
                    Code::Cmovo_r32_rm32,
                ]);
                self.add(Instruction::with2(cmov, a, b))
            }
            9 => self.add(Instruction::with1(Code::Inc_rm32, a)),
            10 => self.add(Instruction::with2(Code::Rcl_rm32_imm8, a, 1)),
            _ => self.a.sahf(),
        }
    }

    fn wide(&self, r: Register) -> Register {
        if self.of.bits == 64 { r.full_register() } else { r }
    }

    fn push(&mut self, r: Register) -> Result {
        self.add(Instruction::with1(if self.of.bits == 64 { Code::Push_r64 } else { Code::Push_r32 }, r))
    }

    fn pop(&mut self, r: Register) -> Result {
        self.add(Instruction::with1(if self.of.bits == 64 { Code::Pop_r64 } else { Code::Pop_r32 }, r))
    }

    fn branch(&mut self, to: CodeLabel) -> Result {
        let a = &mut self.a;
        match self.rng.below(17) {
            0 => a.jo(to),
            1 => a.jno(to),
            2 => a.jb(to),
            3 => a.jae(to),
            4 => a.je(to),
            5 => a.jne(to),
            6 => a.jbe(to),
            7 => a.ja(to),
            8 => a.js(to),
            9 => a.jns(to),
            10 => a.jp(to),
            11 => a.jnp(to),
            12 => a.jl(to),
            13 => a.jge(to),
            14 => a.jle(to),
            15 => a.jg(to),
            _ => a.jmp(to),
        }
    }

    fn forward(&mut self, depth: u32) -> Result {
        let mut label = self.a.create_label();
        self.branch(label)?;
        for _ in 0..1 + self.rng.below(3) {
            if depth < 2 { self.item(depth + 1)? } else { self.random()? }
        }
        self.a.set_label(&mut label)?;
        self.a.zero_bytes()
    }

    fn looping(&mut self) -> Result {
        let counter = self.roles.counter;
        let n = 1 + self.rng.below(40) as u32;
        self.add(Instruction::with2(Code::Mov_r32_imm32, counter, n))?;
        let mut top = self.a.create_label();
        self.a.set_label(&mut top)?;
        for _ in 0..1 + self.rng.below(4) {
            self.item(1)?;
        }
        self.add(Instruction::with1(Code::Dec_rm32, counter))?;
        self.a.jne(top)
    }

    /// A loop that walks through memory in constant steps, perhaps beyond a page's end.
    fn walking(&mut self) -> Result {
        let turns = 1 + self.rng.below(120);
        let pointers: Vec<_> = (0..1 + self.rng.below(3)).map(|_| self.rng.pick(&self.pointers)).collect();
        let widest = (2400 / turns as i64).min(130);
        self.add(Instruction::with2(Code::Mov_r32_imm32, self.roles.counter, turns as u32))?;
        let (mut top, mut out) = (self.a.create_label(), self.a.create_label());
        self.a.set_label(&mut top)?;
        for &(pointer, _) in &pointers {
            for _ in 0..1 + self.rng.below(3) {
                if self.rng.one_in(6) { self.random()? } else { self.access()? }
            }
            let step = match self.rng.below(4) {
                0 => 16.min(widest),
                1 => 0,
                _ => self.rng.below(2 * widest as u64) as i64 - widest,
            };
            let add = if self.of.bits == 64 { Code::Add_rm64_imm32 } else { Code::Add_rm32_imm32 };
            self.add(Instruction::with2(add, pointer, step as i32))?;
            if self.rng.one_in(6) {
                let bit = 1u32 << self.rng.below(32);
                self.add(Instruction::with2(Code::Test_rm32_imm32, Register::EAX, bit))?;
                self.a.jne(out)?;
            }
        }
        self.access()?;
        self.add(Instruction::with2(Code::Sub_rm32_imm32, self.roles.counter, 1))?;
        self.a.jne(top)?;
        self.a.set_label(&mut out)?;
        for (pointer, value) in pointers {
            let low = if self.of.bits == 64 { Code::Mov_rm64_imm32 } else { Code::Mov_rm32_imm32 };
            self.add(Instruction::with2(low, pointer, value as i32))?;
        }
        Ok(())
    }

    /// One of the accesses that walks are made of.
    fn access(&mut self) -> Result {
        let (form, size) = self.rng.pick(&[
            (Code::Mov_r32_rm32, 4),
            (Code::Mov_rm32_r32, 4),
            (Code::Add_r32_rm32, 4),
            (Code::Add_rm32_r32, 4),
            (Code::Xor_r32_rm32, 4),
            (Code::Movups_xmm_xmmm128, 16),
            (Code::Movups_xmmm128_xmm, 16),
        ]);
        let memory = self.memory(size);
        let register = if size == 16 { Register::XMM3 } else { self.free() };
        self.add(match form {
            Code::Mov_rm32_r32 | Code::Add_rm32_r32 | Code::Movups_xmmm128_xmm => {
                Instruction::with2(form, memory, register)
            }
            _ => Instruction::with2(form, register, memory),
        })
    }

    fn calling(&mut self) -> Result {
        let label = self.a.create_label();
        self.later.push(label);
        self.a.call(label)
    }

    fn stack(&mut self) -> Result {
        let (from, to) = (self.free(), self.free());
        let (from, to) = (self.wide(from), self.wide(to));
        self.push(from)?;
        if self.rng.one_in(2) {
            self.random()?;
        }
        if self.rng.one_in(4) {
            // Through memory: POP and PUSH with two memory operands.
            let memory = self.memory(8);
            let (pop, push) =
                if self.of.bits == 64 { (Code::Pop_rm64, Code::Push_rm64) } else { (Code::Pop_rm32, Code::Push_rm32) };
            self.add(Instruction::with1(pop, memory))?;
            self.add(Instruction::with1(push, memory))?;
        }
        self.pop(to)
    }

    /// A store into the immediate of an instruction that comes soon, perhaps next.
    fn self_modifying(&mut self) -> Result {
        use iced_x86::code_asm::{byte_ptr, dword_ptr};
        let mut target = self.a.create_label();
        let value = values::integer(self.rng) as u32 as i32;
        match self.rng.below(3) {
            0 => self.a.mov(dword_ptr(target), value)?,
            1 => self.a.mov(byte_ptr(target), value as i8 as i32)?,
            _ => self.a.add(byte_ptr(target), value as i8 as i32)?,
        }
        for _ in 0..self.rng.below(3) {
            self.random()?;
        }
        // `mov eax, imm32`, or with another register: the label is at the immediate.
        self.a.db(&[0xb8 + self.rng.below(3) as u8])?;
        self.a.set_label(&mut target)?;
        self.a.db(&(self.rng.next_u64() as u32).to_le_bytes())
    }

    fn indirect(&mut self) -> Result {
        let mut label = self.a.create_label();
        use iced_x86::code_asm::{ptr, rdi};
        self.a.lea(rdi, ptr(label))?;
        if self.rng.one_in(2) {
            self.a.jmp(rdi)?;
        } else {
            self.a.push(rdi)?;
            self.a.ret()?;
        }
        if self.rng.one_in(2) {
            self.random()?;
        }
        self.a.set_label(&mut label)?;
        self.a.zero_bytes()
    }

    fn string(&mut self) -> Result {
        let count = self.rng.below(70) as u32;
        self.add(Instruction::with2(Code::Mov_r32_imm32, Register::ECX, count))?;
        let at = DATA + self.rng.below(2 * PAGE as u64 - 700);
        self.add(Instruction::with2(Code::Mov_r32_imm32, Register::EDI, at as u32))?;
        match self.rng.below(3) {
            0 => self.a.rep().stosd(),
            1 => self.a.rep().stosb(),
            _ => self.a.repne().scasb(),
        }
    }

    /// An access that can't be made.
    fn fault(&mut self) -> Result {
        let target = self.rng.pick(&[
            DATA - 8,
            DATA + 3 * PAGE as u64 + 64,
            DATA + 2 * PAGE as u64 - 2,
            DATA + 2 * PAGE as u64 + 16,
        ]);
        let (pointer, value) = self.pointers[0];
        let size = if self.of.bits == 64 { 8 } else { 4 };
        let operand = MemoryOperand::with_base_displ_size(pointer, target.wrapping_sub(value) as i64, size);
        self.add(Instruction::with2(Code::Add_rm32_r32, operand, Register::EAX))
    }

    /// Switches TF on for a few instructions.
    fn single_step(&mut self) -> Result {
        use iced_x86::code_asm::{dword_ptr, esp, rsp};
        // From here on, as a fault or a jump may leave it set.
        self.stepped = true;
        for on in [true, false] {
            self.a.pushfq_or_d(self.of.bits)?;
            let top = if self.of.bits == 64 { dword_ptr(rsp) } else { dword_ptr(esp) };
            if on {
                self.a.or(top, 0x100)?
            } else {
                self.a.and(top, !0x100)?
            }
            if self.of.bits == 64 {
                self.a.popfq()?
            } else {
                self.a.popfd()?
            }
            for _ in 0..1 + self.rng.below(3) {
                self.random()?;
            }
        }
        Ok(())
    }
}

/// PUSHF in the width of the mode.
trait PushFlags {
    fn pushfq_or_d(&mut self, bits: u32) -> Result;
}

impl PushFlags for CodeAssembler {
    fn pushfq_or_d(&mut self, bits: u32) -> Result {
        if bits == 64 { self.pushfq() } else { self.pushfd() }
    }
}
