//! What the encoder must know of each instruction form, tabulated from iced's opcode table by the build script: to make that table
//! takes longer than to boot firmware.

use std::cell::RefCell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use iced_x86::{Code, Instruction, InstructionInfo, InstructionInfoFactory, InstructionInfoOptions};

mod form;
pub use form::{Facts, FpClass};

/// What the build script made of iced's opcode table: the facts that there are, and which of them each form has.
mod table {
    use super::form::Facts;
    use super::form::FpClass::*;

    include!(concat!(env!("OUT_DIR"), "/facts.rs"));
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
    &table::FACTS[usize::from(table::OF_FORM[code as usize])]
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
    fn every_form_has_facts() {
        assert_eq!(table::OF_FORM.len(), Code::values().len());
        assert!(table::OF_FORM.iter().all(|&index| usize::from(index) < table::FACTS.len()));
    }

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
