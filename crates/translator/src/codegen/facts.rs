//! What the encoder must know of each instruction form, tabulated from iced's opcode table by the build script: to make that table
//! takes longer than to boot firmware.

use std::cell::RefCell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use iced_x86::{
    Code, CodeSize, Instruction, InstructionInfo, InstructionInfoFactory, InstructionInfoOptions, OpAccess, OpKind,
    Register,
};

use super::operand::memory_operand;

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

/// Answers that depend on an instruction's form, on whether it has a memory operand, and on whether it is 64-bit code
/// (VZEROUPPER); not where it has a mask.
#[derive(Default)]
pub struct FormMemo([Memo; 4]);

impl FormMemo {
    pub const fn new() -> Self {
        FormMemo([const { Memo::new() }; 4])
    }

    pub fn get(&self, insn: &Instruction, find: impl FnOnce() -> bool) -> bool {
        if insn.op_mask() != Register::None {
            return find();
        }
        let long = insn.code_size() == CodeSize::Code64;
        let memo = &self.0[usize::from(memory_operand(insn).is_some()) | usize::from(long) << 1];
        memo.get(insn.code(), find)
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

/// Finds the general-purpose registers that an instruction may write.
pub fn each_written(insn: &Instruction, mut found: impl FnMut(u8)) {
    static FIRST: FormMemo = FormMemo::new();
    static NO_OTHERS: FormMemo = FormMemo::new();
    if !NO_OTHERS.get(insn, || written_by_form(insn).1 == 0) {
        return each_written_now(insn, found);
    }
    if insn.op0_kind() == OpKind::Register
        && insn.op0_register().is_gpr()
        && FIRST.get(insn, || written_by_form(insn).0)
    {
        found(insn.op0_register().full_register().number() as u8);
    }
}

/// Whether an instruction of this form may write its first operand, if that is a general-purpose register; and which others
/// this one may write, a bit each.
fn written_by_form(insn: &Instruction) -> (bool, u16) {
    const SPARE: [[Register; 4]; 5] = [
        [Register::R8L, Register::R8W, Register::R8D, Register::R8],
        [Register::R9L, Register::R9W, Register::R9D, Register::R9],
        [Register::R12L, Register::R12W, Register::R12D, Register::R12],
        [Register::R13L, Register::R13W, Register::R13D, Register::R13],
        [Register::R14L, Register::R14W, Register::R14D, Register::R14],
    ];
    // One that neither another operand means nor the instruction by itself.
    let means = |r: Register| {
        (1..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).full_register() == r)
    };
    let spare = SPARE.into_iter().find(|s| !means(s[3]));
    let mut probe = *insn;
    let mut first = None;
    if let Some(spare) = spare
        && insn.op0_kind() == OpKind::Register
        && insn.op0_register().is_gpr()
    {
        probe.set_op0_register(spare[insn.op0_register().size().trailing_zeros() as usize & 3]);
        first = Some(spare[3].number() as u8);
    }
    let (mut writes_first, mut others) = (false, 0);
    each_written_now(&probe, |n| {
        if first == Some(n) {
            writes_first = true;
        } else {
            others |= 1 << (n & 15);
        }
    });
    (writes_first, others)
}

fn each_written_now(insn: &Instruction, mut found: impl FnMut(u8)) {
    with_register_uses(insn, |info| {
        for used in info.used_registers() {
            if !matches!(used.access(), OpAccess::Read | OpAccess::CondRead) && used.register().is_gpr() {
                found(used.register().full_register().number() as u8);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    #[test]
    fn every_form_has_facts() {
        assert_eq!(table::OF_FORM.len(), Code::values().len());
        assert!(table::OF_FORM.iter().all(|&index| usize::from(index) < table::FACTS.len()));
    }

    #[test]
    fn what_a_form_writes_is_what_its_instructions_write() {
        let mut random = 0x1234_5678_9abc_def1_u64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        for round in 0..400_000 {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&next().to_le_bytes());
            bytes[8..].copy_from_slice(&next().to_le_bytes());
            if round % 3 == 0 {
                (bytes[0], bytes[1]) = (0x48 | bytes[0] & 7, 0x0f);
            }
            let bits = if round % 4 == 0 { 32 } else { 64 };
            let insn = Decoder::new(bits, &bytes, DecoderOptions::NONE).decode();
            if insn.is_invalid() {
                continue;
            }
            let (mut known, mut now) = (0u16, 0u16);
            each_written(&insn, |n| known |= 1 << n);
            each_written_now(&insn, |n| now |= 1 << n);
            assert_eq!(known, now, "{insn} {:?}", insn.code());
        }
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
