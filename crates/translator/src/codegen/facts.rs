//! What the encoder must know of each instruction form, tabulated once from iced's opcode table.

use std::cell::RefCell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use iced_x86::{
    Code, EncodingKind, Instruction, InstructionInfo, InstructionInfoFactory, InstructionInfoOptions, MandatoryPrefix,
    OpCodeOperandKind as K,
};

/// Which state an instruction belongs to, for #UD and #NM (Intel SDM 3A table 2-2 and 13.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FpClass {
    /// General-purpose: always allowed.
    None,
    X87,
    Mmx,
    Sse,
    Avx,
    Avx512,
}

/// Facts of one [`Code`].
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// ModRM.reg names a general-purpose register.
    pub reg_gpr: bool,
    /// ModRM.rm, where it is a register, names a general-purpose one.
    pub rm_gpr: bool,
    /// VEX.vvvv or EVEX.vvvv names a general-purpose register.
    pub vvvv_gpr: bool,
    /// The low three bits of the opcode name a general-purpose register.
    pub opcode_gpr: bool,
    /// The register operands are 8 bits wide (4-7 without REX are AH, CH, DH, BH).
    pub reg_byte: bool,
    pub rm_byte: bool,
    /// There is a ModRM byte.
    pub modrm: bool,
    /// 66 is part of the opcode, or must not stand before it, and is no operand size.
    pub mandatory_66: bool,
    /// The last byte's upper half names a vector register.
    pub register_byte: bool,
    pub fp: FpClass,
}

fn facts_of(code: Code) -> Facts {
    let op_code = code.op_code();
    let mut f = Facts {
        reg_gpr: false,
        rm_gpr: false,
        vvvv_gpr: false,
        opcode_gpr: false,
        reg_byte: false,
        rm_byte: false,
        modrm: false,
        mandatory_66: matches!(op_code.mandatory_prefix(), MandatoryPrefix::PNP | MandatoryPrefix::P66),
        register_byte: false,
        fp: FpClass::None,
    };
    let (mut vector, mut mask, mut mmx, mut x87) = (false, false, false, false);
    for kind in op_code.op_kinds() {
        match kind {
            K::r8_or_mem => (f.rm_gpr, f.rm_byte, f.modrm) = (true, true, true),
            K::r16_or_mem | K::r32_or_mem | K::r32_or_mem_mpx | K::r64_or_mem | K::r64_or_mem_mpx => {
                (f.rm_gpr, f.modrm) = (true, true)
            }
            K::r8_reg => (f.reg_gpr, f.reg_byte, f.modrm) = (true, true, true),
            K::r16_reg | K::r16_reg_mem | K::r32_reg | K::r32_reg_mem | K::r64_reg | K::r64_reg_mem => {
                (f.reg_gpr, f.modrm) = (true, true)
            }
            K::r16_rm | K::r32_rm | K::r64_rm => (f.rm_gpr, f.modrm) = (true, true),
            K::r8_opcode => (f.opcode_gpr, f.reg_byte) = (true, true),
            K::r16_opcode | K::r32_opcode | K::r64_opcode => f.opcode_gpr = true,
            K::r32_vvvv | K::r64_vvvv => f.vvvv_gpr = true,
            K::k_reg | K::kp1_reg | K::k_rm | K::k_vvvv | K::k_or_mem => (mask, f.modrm) = (true, true),
            K::mm_reg | K::mm_rm | K::mm_or_mem => (mmx, f.modrm) = (true, true),
            K::st0 | K::sti_opcode => x87 = true,
            K::mem | K::mem_mpx | K::mem_mib | K::sibmem => f.modrm = true,
            K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y | K::mem_vsib32z | K::mem_vsib64z => {
                (vector, f.modrm) = (true, true)
            }
            K::xmm_is4 | K::ymm_is4 | K::xmm_is5 | K::ymm_is5 => (vector, f.register_byte) = (true, true),
            other => {
                let name = format!("{other:?}");
                if name.starts_with("xmm") || name.starts_with("ymm") || name.starts_with("zmm") {
                    (vector, f.modrm) = (true, true);
                } else if name.ends_with("_reg") || name.ends_with("_rm") || name.ends_with("_or_mem") {
                    f.modrm = true;
                }
            }
        }
    }
    f.fp = match op_code.encoding() {
        EncodingKind::EVEX => FpClass::Avx512,
        _ if mask => FpClass::Avx512,
        EncodingKind::VEX if vector || matches!(code, Code::VEX_Vzeroupper | Code::VEX_Vzeroall) => FpClass::Avx,
        EncodingKind::VEX if matches!(code, Code::VEX_Vldmxcsr_m32 | Code::VEX_Vstmxcsr_m32) => FpClass::Avx,
        EncodingKind::Legacy if vector || matches!(code, Code::Ldmxcsr_m32 | Code::Stmxcsr_m32) => FpClass::Sse,
        EncodingKind::Legacy if mmx || code == Code::Emms => FpClass::Mmx,
        EncodingKind::Legacy
            if x87
                || matches!(op_code.op_code(), 0xd8..=0xdf | 0xd8c0..=0xdfff)
                    && op_code.table() == iced_x86::OpCodeTableKind::Normal
                || code == Code::Wait =>
        {
            FpClass::X87
        }
        _ => FpClass::None,
    };
    f
}

/// Answers that depend on an instruction's form alone, found out once for each.
#[derive(Default)]
pub struct Memo(OnceLock<Box<[AtomicU8]>>);

impl Memo {
    pub const fn new() -> Self {
        Memo(OnceLock::new())
    }

    /// The answer for `code`, from `find` the first time.
    pub fn get(&self, code: Code, find: impl FnOnce() -> bool) -> bool {
        let table = self.0.get_or_init(|| Code::values().map(|_| AtomicU8::new(0)).collect());
        let place = &table[code as usize];
        match place.load(Ordering::Relaxed) {
            0 => {
                let answer = find();
                place.store(1 + u8::from(answer), Ordering::Relaxed);
                answer
            }
            known => known == 2,
        }
    }
}

/// The facts of a form.
pub fn facts(code: Code) -> &'static Facts {
    static TABLE: OnceLock<Vec<Facts>> = OnceLock::new();
    &TABLE.get_or_init(|| Code::values().map(facts_of).collect())[code as usize]
}

/// Looks at the registers that an instruction uses.
pub fn with_register_uses<R>(insn: &Instruction, look: impl FnOnce(&InstructionInfo) -> R) -> R {
    thread_local! {
        static FACTORY: RefCell<InstructionInfoFactory> = RefCell::new(InstructionInfoFactory::new());
    }
    FACTORY.with_borrow_mut(|factory| look(factory.info_options(insn, InstructionInfoOptions::NO_MEMORY_USAGE)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_follow_the_registers_used() {
        for (code, class) in [
            (Code::Add_rm64_r64, FpClass::None),
            (Code::Fld_m64fp, FpClass::X87),
            (Code::Fadd_st0_sti, FpClass::X87),
            (Code::Fninit, FpClass::X87),
            (Code::Paddb_mm_mmm64, FpClass::Mmx),
            (Code::Paddb_xmm_xmmm128, FpClass::Sse),
            (Code::Cvtsi2sd_xmm_rm64, FpClass::Sse),
            (Code::VEX_Vaddps_ymm_ymm_ymmm256, FpClass::Avx),
            (Code::VEX_Andn_r64_r64_rm64, FpClass::None),
            (Code::VEX_Kmovq_kr_r64, FpClass::Avx512),
            (Code::EVEX_Vaddps_zmm_k1z_zmm_zmmm512b32_er, FpClass::Avx512),
            (Code::Crc32_r32_rm8, FpClass::None),
            (Code::Movnti_m64_r64, FpClass::None),
        ] {
            assert_eq!(facts(code).fp, class, "{code:?}");
        }
    }
}
