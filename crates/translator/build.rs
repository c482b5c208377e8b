//! Tabulates what the encoder must know of each instruction form (`src/codegen/facts.rs`). iced's opcode table is made at run time
//! in several milliseconds, most of them for texts that nobody here reads.

use std::fmt::Write;
use std::path::PathBuf;
use std::{env, fs, io};

use iced_x86::{Code, EncodingKind, MandatoryPrefix, OpCodeOperandKind as K};

#[path = "src/codegen/facts/form.rs"]
mod form;
use form::{Facts, FpClass};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/codegen/facts/form.rs");
    let mut distinct: Vec<Facts> = Vec::new();
    let of_form: Vec<usize> = Code::values()
        .map(|code| {
            let facts = facts_of(code);
            distinct.iter().position(|known| *known == facts).unwrap_or_else(|| {
                distinct.push(facts);
                distinct.len() - 1
            })
        })
        .collect();
    let mut text = String::new();
    writeln!(text, "pub static FACTS: [Facts; {}] = {distinct:?};", distinct.len()).map_err(io::Error::other)?;
    writeln!(text, "pub static OF_FORM: [u8; {}] = {of_form:?};", of_form.len()).map_err(io::Error::other)?;
    let directory = env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("cargo gives no OUT_DIR"))?;
    fs::write(PathBuf::from(directory).join("facts.rs"), text)
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
