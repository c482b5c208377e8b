//! Encodes instruction forms with random operands, through iced's encoder.

use iced_x86::{
    Code, Encoder, EncodingKind, Instruction, OpCodeInfo, OpCodeOperandKind as K, OpKind, Register, RoundingControl,
};

use crate::rng::Rng;

/// The bytes of a random instance of `code` at `rip`, or `None` where this choice of operands can't be encoded.
pub fn encode(rng: &mut Rng, code: Code, bits: u32, rip: u64) -> Option<Vec<u8>> {
    let info = code.op_code();
    let mut insn = Instruction::default();
    insn.set_code(code);
    let vector = !matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::D3NOW);
    let evex = info.encoding() == EncodingKind::EVEX;
    let mut form = Form { rng, insn: &mut insn, info, bits, rip, evex, memory: false };
    for (i, kind) in info.op_kinds().iter().enumerate() {
        form.operand(i as u32, *kind)?;
    }
    let memory = form.memory;
    if evex {
        decorate(rng, &mut insn, info, memory);
    } else if !vector {
        if info.can_use_lock_prefix() && (memory && rng.one_in(4) || rng.one_in(40)) {
            insn.set_has_lock_prefix(true);
        }
        if info.can_use_rep_prefix() && rng.one_in(2) {
            insn.set_has_rep_prefix(true);
        } else if info.can_use_repne_prefix() && rng.one_in(2) {
            insn.set_has_repne_prefix(true);
        }
    }
    if memory && rng.one_in(8) {
        let segments: &[Register] =
            &[Register::FS, Register::GS, Register::CS, Register::SS, Register::DS, Register::ES];
        insn.set_segment_prefix(rng.pick(segments));
    }
    let mut encoder = Encoder::new(bits);
    if rng.one_in(4) {
        encoder.set_vex_wig(rng.below(2) as u32);
        encoder.set_vex_lig(rng.below(2) as u32);
        encoder.set_evex_wig(rng.below(2) as u32);
        encoder.set_evex_lig(rng.below(4) as u32);
        encoder.set_prevent_vex2(true);
    }
    encoder.encode(&insn, rip).ok()?;
    Some(encoder.take_buffer())
}

/// EVEX: write mask, zeroing, broadcast, embedded rounding, suppress-all-exceptions.
fn decorate(rng: &mut Rng, insn: &mut Instruction, info: &OpCodeInfo, memory: bool) {
    if info.can_use_op_mask_register() && (info.require_op_mask_register() || rng.one_in(2)) {
        insn.set_op_mask(register(Register::K1, rng.below(7) as u32));
        if info.can_use_zeroing_masking() && rng.one_in(2) {
            insn.set_zeroing_masking(true);
        }
    }
    if memory {
        if info.can_broadcast() && rng.one_in(3) {
            insn.set_is_broadcast(true);
        }
    } else if info.can_use_rounding_control() && rng.one_in(3) {
        insn.set_rounding_control(rng.pick(&[
            RoundingControl::RoundToNearest,
            RoundingControl::RoundDown,
            RoundingControl::RoundUp,
            RoundingControl::RoundTowardZero,
        ]));
    } else if info.can_suppress_all_exceptions() && rng.one_in(3) {
        insn.set_suppress_all_exceptions(true);
    }
}

/// The register `n` places after `first`.
pub fn register(first: Register, n: u32) -> Register {
    first + n
}

struct Form<'a> {
    rng: &'a mut Rng,
    insn: &'a mut Instruction,
    info: &'a OpCodeInfo,
    bits: u32,
    rip: u64,
    evex: bool,
    memory: bool,
}

impl Form<'_> {
    fn operand(&mut self, i: u32, kind: K) -> Option<()> {
        let gprs = if self.bits == 64 { 16 } else { 8 };
        let vectors = match (self.bits, self.evex) {
            (64, true) => 32,
            (64, false) => 16,
            _ => 8,
        };
        let or_memory = |first: Register, n: u32| Some((first, n));
        // Register or memory.
        let choice = match kind {
            K::r8_or_mem => or_memory(Register::AL, gprs),
            K::r16_or_mem => or_memory(Register::AX, gprs),
            K::r32_or_mem | K::r32_or_mem_mpx => or_memory(Register::EAX, gprs),
            K::r64_or_mem | K::r64_or_mem_mpx => or_memory(Register::RAX, gprs),
            K::mm_or_mem => or_memory(Register::MM0, 8),
            K::xmm_or_mem => or_memory(Register::XMM0, vectors),
            K::ymm_or_mem => or_memory(Register::YMM0, vectors),
            K::zmm_or_mem => or_memory(Register::ZMM0, vectors),
            K::k_or_mem => or_memory(Register::K0, 8),
            _ => None,
        };
        if let Some((first, n)) = choice {
            if self.rng.one_in(2) {
                self.memory_operand(i, Register::None);
            } else if first == Register::AL {
                let r = self.byte_register();
                self.register(i, r);
            } else {
                self.random(i, first, n);
            }
            return Some(());
        }
        match kind {
            K::mem | K::mem_mpx | K::mem_mib => self.memory_operand(i, Register::None),
            K::mem_vsib32x | K::mem_vsib64x => self.vsib(i, Register::XMM0, vectors),
            K::mem_vsib32y | K::mem_vsib64y => self.vsib(i, Register::YMM0, vectors),
            K::mem_vsib32z | K::mem_vsib64z => self.vsib(i, Register::ZMM0, vectors),
            K::mem_offs => {
                self.insn.set_op_kind(i, OpKind::Memory);
                self.insn.set_memory_displ_size(self.bits / 8);
                self.insn.set_memory_displacement64(crate::layout::DATA & mask(self.bits / 8));
                self.memory = true;
            }
            K::r8_reg => {
                let r = self.byte_register();
                self.register(i, r);
            }
            K::r8_opcode => {
                let r = self.byte_register();
                self.register(i, r);
            }
            K::r16_reg | K::r16_rm | K::r16_opcode | K::r16_reg_mem => self.random(i, Register::AX, gprs),
            K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv | K::r32_reg_mem => {
                self.random(i, Register::EAX, gprs)
            }
            K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv | K::r64_reg_mem => {
                self.random(i, Register::RAX, gprs)
            }
            K::seg_reg => self.random(i, Register::ES, 6),
            K::k_reg | K::k_rm | K::k_vvvv => self.random(i, Register::K0, 8),
            K::kp1_reg => self.random(i, Register::K0, 8),
            K::mm_reg | K::mm_rm => self.random(i, Register::MM0, 8),
            K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => self.random(i, Register::XMM0, vectors),
            K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => self.random(i, Register::YMM0, vectors),
            K::zmm_reg | K::zmm_rm | K::zmm_vvvv => self.random(i, Register::ZMM0, vectors),
            K::xmmp3_vvvv => self.random(i, Register::XMM0, vectors),
            K::zmmp3_vvvv => self.random(i, Register::ZMM0, vectors),
            K::cr_reg => {
                let r = self.rng.pick(&[Register::CR0, Register::CR2, Register::CR3, Register::CR4, Register::CR8]);
                self.register(i, r);
            }
            K::dr_reg => self.random(i, Register::DR0, 8),
            K::es => self.register(i, Register::ES),
            K::cs => self.register(i, Register::CS),
            K::ss => self.register(i, Register::SS),
            K::ds => self.register(i, Register::DS),
            K::fs => self.register(i, Register::FS),
            K::gs => self.register(i, Register::GS),
            K::al => self.register(i, Register::AL),
            K::cl => self.register(i, Register::CL),
            K::ax => self.register(i, Register::AX),
            K::dx => self.register(i, Register::DX),
            K::eax => self.register(i, Register::EAX),
            K::rax => self.register(i, Register::RAX),
            K::st0 => self.register(i, Register::ST0),
            K::sti_opcode => self.random(i, Register::ST0, 8),
            K::imm4_m2z => self.immediate(i, OpKind::Immediate8, 4),
            K::imm8 if i > 0 && self.second_imm8(i) => self.immediate(i, OpKind::Immediate8_2nd, 8),
            K::imm8 => self.immediate(i, OpKind::Immediate8, 8),
            K::imm8_const_1 => {
                self.insn.set_op_kind(i, OpKind::Immediate8);
                self.insn.set_immediate8(1);
            }
            K::imm8sex16 => self.immediate(i, OpKind::Immediate8to16, 8),
            K::imm8sex32 => self.immediate(i, OpKind::Immediate8to32, 8),
            K::imm8sex64 => self.immediate(i, OpKind::Immediate8to64, 8),
            K::imm16 => self.immediate(i, OpKind::Immediate16, 16),
            K::imm32 => self.immediate(i, OpKind::Immediate32, 32),
            K::imm32sex64 => self.immediate(i, OpKind::Immediate32to64, 32),
            K::imm64 => self.immediate(i, OpKind::Immediate64, 64),
            K::seg_rSI => self.string(i, [OpKind::MemorySegRSI, OpKind::MemorySegESI, OpKind::MemorySegSI]),
            K::es_rDI => self.string(i, [OpKind::MemoryESRDI, OpKind::MemoryESEDI, OpKind::MemoryESDI]),
            K::seg_rDI => self.string(i, [OpKind::MemorySegRDI, OpKind::MemorySegEDI, OpKind::MemorySegDI]),
            K::seg_rBX_al => {
                self.insn.set_op_kind(i, OpKind::Memory);
                let base = match (self.bits, self.rng.one_in(6)) {
                    (64, false) => Register::RBX,
                    (32, true) | (16, false) => Register::BX,
                    _ => Register::EBX,
                };
                self.insn.set_memory_base(base);
                self.insn.set_memory_index(Register::AL);
                self.memory = true;
            }
            K::br16_1 | K::br32_1 | K::br64_1 | K::br16_2 | K::br32_4 | K::br64_4 => self.branch(i, kind),
            K::farbr2_2 | K::farbr4_2 => {
                let wide = kind == K::farbr4_2;
                self.insn.set_op_kind(i, if wide { OpKind::FarBranch32 } else { OpKind::FarBranch16 });
                let selector = self.rng.pick(&crate::generate::state::SELECTORS);
                self.insn.set_far_branch_selector(selector);
                let target = self.rip as u32 + 16 + self.rng.below(100) as u32;
                if wide {
                    self.insn.set_far_branch32(target);
                } else {
                    self.insn.set_far_branch16(target as u16);
                }
            }
            // BND, TMM, TR and the branches of transactions.
            _ => return None,
        }
        Some(())
    }

    /// ENTER and EXTRQ/INSERTQ have two immediates; the second is of another kind.
    fn second_imm8(&self, i: u32) -> bool {
        let kinds = self.info.op_kinds();
        matches!(kinds[i as usize - 1], K::imm8 | K::imm16)
    }

    fn register(&mut self, i: u32, r: Register) {
        self.insn.set_op_kind(i, OpKind::Register);
        self.insn.set_op_register(i, r);
    }

    fn random(&mut self, i: u32, first: Register, n: u32) {
        let r = register(first, self.rng.below(n.into()) as u32);
        self.register(i, r);
    }

    /// AL..R15L; AH..BH only where no other operand needs a REX prefix, or the encoder refuses.
    fn byte_register(&mut self) -> Register {
        // AL CL DL BL AH CH DH BH SPL BPL SIL DIL R8L..R15L
        let n = if self.bits == 64 { 20 } else { 8 };
        register(Register::AL, self.rng.below(n) as u32)
    }

    fn immediate(&mut self, i: u32, kind: OpKind, bits: u32) {
        let value = if self.rng.one_in(3) { self.rng.next_u64() } else { super::values::integer(self.rng) };
        self.insn.set_op_kind(i, kind);
        match kind {
            OpKind::Immediate8 => self.insn.set_immediate8((value & ((1 << bits) - 1)) as u8),
            OpKind::Immediate8_2nd => self.insn.set_immediate8_2nd(value as u8),
            OpKind::Immediate8to16 => self.insn.set_immediate8to16((value as i8).into()),
            OpKind::Immediate8to32 => self.insn.set_immediate8to32((value as i8).into()),
            OpKind::Immediate8to64 => self.insn.set_immediate8to64((value as i8).into()),
            OpKind::Immediate16 => self.insn.set_immediate16(value as u16),
            OpKind::Immediate32 => self.insn.set_immediate32(value as u32),
            OpKind::Immediate32to64 => self.insn.set_immediate32to64((value as i32).into()),
            _ => self.insn.set_immediate64(value),
        }
    }

    fn string(&mut self, i: u32, kinds: [OpKind; 3]) {
        // Both operands must be of one address size: decided by the first.
        let kind = match self.insn.op_kind(0) {
            OpKind::MemorySegRSI | OpKind::MemoryESRDI | OpKind::MemorySegRDI if i > 0 => kinds[0],
            OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI if i > 0 => kinds[1],
            OpKind::MemorySegSI | OpKind::MemoryESDI | OpKind::MemorySegDI if i > 0 => kinds[2],
            _ => match (self.bits, self.rng.one_in(6)) {
                (64, false) => kinds[0],
                (64, true) | (32, false) | (16, true) => kinds[1],
                _ => kinds[2],
            },
        };
        self.insn.set_op_kind(i, kind);
        self.memory = true;
    }

    /// Somewhere near, but not into the instruction itself, which would loop.
    fn branch(&mut self, i: u32, kind: K) {
        let distance =
            if self.rng.one_in(2) { 16 + self.rng.below(100) } else { 0u64.wrapping_sub(8 + self.rng.below(100)) };
        let mut target = self.rip.wrapping_add(distance);
        if !matches!(kind, K::br16_1 | K::br32_1 | K::br64_1) && self.rng.one_in(16) {
            target = self.rip.wrapping_add((self.rng.next_u64() as i32 >> 1) as u64);
        }
        match kind {
            K::br16_1 | K::br16_2 => {
                self.insn.set_op_kind(i, OpKind::NearBranch16);
                self.insn.set_near_branch16(target as u16);
            }
            K::br32_1 | K::br32_4 => {
                self.insn.set_op_kind(i, OpKind::NearBranch32);
                self.insn.set_near_branch32(target as u32);
            }
            _ => {
                self.insn.set_op_kind(i, OpKind::NearBranch64);
                self.insn.set_near_branch64(target);
            }
        }
    }

    fn vsib(&mut self, i: u32, first: Register, n: u32) {
        let index = register(first, self.rng.below(n.into()) as u32);
        self.memory_operand(i, index);
    }

    /// Any addressing form. The registers' values are chosen later, for the address wanted.
    fn memory_operand(&mut self, i: u32, vector_index: Register) {
        self.memory = true;
        let rng = &mut *self.rng;
        let insn = &mut *self.insn;
        insn.set_op_kind(i, OpKind::Memory);
        let vsib = vector_index != Register::None;
        if self.bits == 64 && !vsib && rng.one_in(12) {
            insn.set_memory_base(if rng.one_in(5) { Register::EIP } else { Register::RIP });
            insn.set_memory_displacement64(self.rip + 0x10_0000);
            insn.set_memory_displ_size(8);
            return;
        }
        if self.bits == 16 && !vsib && !rng.one_in(4) {
            use Register::{BP, BX, DI, None, SI};
            let (base, index) = rng.pick(&[
                (BX, SI),
                (BX, DI),
                (BP, SI),
                (BP, DI),
                (SI, None),
                (DI, None),
                (BP, None),
                (BX, None),
                (None, None),
            ]);
            insn.set_memory_base(base);
            insn.set_memory_index(index);
            let scale = if self.evex { 64 } else { 1 };
            let (size, displacement) = match rng.below(3) {
                _ if base == None => (2, rng.below(0x6000)),
                0 => (0, 0),
                1 => (1, ((rng.next_u64() as i8 as i64) * scale) as u64 & 0xffff),
                _ => (2, rng.below(0x10000)),
            };
            insn.set_memory_displ_size(size);
            insn.set_memory_displacement64(displacement);
            return;
        }
        if self.bits == 32 && !vsib && rng.one_in(30) {
            insn.set_memory_base(rng.pick(&[Register::BX, Register::BP, Register::SI, Register::DI]));
            insn.set_memory_displ_size(2);
            insn.set_memory_displacement64(rng.below(0x10000));
            return;
        }
        let (first, n) = match (self.bits, rng.one_in(6)) {
            (64, false) => (Register::RAX, 16),
            (64, true) => (Register::EAX, 16),
            _ => (Register::EAX, 8),
        };
        let base = !rng.one_in(8);
        let mut index = rng.one_in(2);
        if base {
            insn.set_memory_base(register(first, rng.below(n) as u32));
        }
        if vsib {
            insn.set_memory_index(vector_index);
            insn.set_memory_index_scale(1 << rng.below(4));
        } else if index {
            let r = rng.below(n) as u32;
            if r == 4 {
                index = false; // rsp is no index
            } else {
                insn.set_memory_index(register(first, r));
                insn.set_memory_index_scale(1 << rng.below(4));
            }
        }
        let wide = if first == Register::RAX { 8 } else { 4 };
        if !base {
            insn.set_memory_displ_size(if index || vsib { wide } else { self.bits.max(32) / 8 });
            insn.set_memory_displacement64(crate::layout::DATA);
            return;
        }
        match rng.below(3) {
            0 => insn.set_memory_displ_size(0),
            1 => {
                insn.set_memory_displ_size(1);
                // Displacements of EVEX instructions are scaled by up to 64.
                let scale = if self.evex { 64 } else { 1 };
                insn.set_memory_displacement64(((rng.next_u64() as i8 as i64) * scale) as u64 & mask(wide));
            }
            _ => {
                insn.set_memory_displ_size(wide);
                let far = rng.next_u64() as i32 >> rng.below(28);
                insn.set_memory_displacement64(i64::from(far) as u64 & mask(wide));
            }
        }
    }
}

fn mask(bytes: u32) -> u64 {
    if bytes == 8 { u64::MAX } else { (1 << (8 * bytes)) - 1 }
}
