//! Against the real processor: every masked form that it has, with operands that reach into a page without access.

use std::collections::BTreeMap;

use super::*;
use crate::testing_native::{Native, Outcome};
use iced_x86::{Decoder, DecoderOptions};

/// xorshift64*
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// EVEX instructions with operand [rax] under k1: all maps, opcodes, prefixes, widths and lengths that
/// decode, with vvvv as zmm0 (for two operands) and zmm2 (for those that must differ).
fn forms() -> Vec<(Vec<u8>, Instruction)> {
    let mut forms = Vec::new();
    for bits in 0u32..7 * 256 * 4 * 2 * 3 * 2 * 2 {
        let (map, bits) = (bits % 7 + 1, bits / 7);
        let (opcode, bits) = (bits % 256, bits / 256);
        let (prefix, bits) = (bits % 4, bits / 4);
        let (wide, bits) = (bits % 2, bits / 2);
        let (length, bits) = (bits % 3, bits / 3);
        let (broadcast, second) = (bits % 2, bits / 2 * 2);
        for extension in 0..8 {
            let bytes = [
                0x62,
                0xf0 | map as u8,
                (wide << 7 | (15 - second) << 3 | 4 | prefix) as u8,
                (length << 5 | broadcast << 4 | 8 | 1) as u8,
                opcode as u8,
                extension << 3,
                0x01,
            ];
            let insn = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE).decode();
            let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
            if !insn.is_invalid()
                && memory
                && insn.op_mask() == Register::K1
                && insn.memory_base() == Register::RAX
                && !insn.is_vsib()
            {
                forms.push((bytes[..insn.len()].to_vec(), insn));
            }
            // The reg field is part of the opcode only in the shift groups.
            if !(0x71..=0x73).contains(&opcode) {
                break;
            }
        }
    }
    forms
}

/// Misaligned, these fault whatever the mask.
fn checks_alignment(insn: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(insn.mnemonic(), Vmovapd | Vmovaps | Vmovdqa32 | Vmovdqa64)
}

/// See `accesses_all`.
fn stores_without_suppression(insn: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        insn.mnemonic(),
        Vextractf32x4
            | Vextractf32x8
            | Vextractf64x2
            | Vextractf64x4
            | Vextracti32x4
            | Vextracti32x8
            | Vextracti64x2
            | Vextracti64x4
    )
}

#[test]
fn masked_forms_touch_exactly_the_bytes_that_the_processor_touches() {
    let Some(native) = Native::with_avx512() else { return };
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut wrong: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut tried = 0;
    for (bytes, insn) in forms() {
        let size = insn.memory_size().size();
        if checks_alignment(&insn) || stores_without_suppression(&insn) {
            continue;
        }
        for round in 0..64u64 {
            let mask = match round {
                0 => 0,
                1 => u64::MAX,
                2..10 => 1 << (random.next() % 64).min(random.next() % 64).min(random.next() % 16),
                _ => random.next() & random.next(),
            };
            let split = match round % 4 {
                0 => 0,
                _ => random.next() as usize % (size + 1),
            };
            // Either the end or the start of the operand lies in the page without access.
            let low_bad = round & 1 != 0 && round > 1;
            let outcome = native.masked(&bytes, mask, split, low_bad);
            if outcome == Outcome::Undefined {
                break;
            }
            tried += 1;
            let mut state = XsaveArea::default();
            state.set_opmask(1, mask);
            let touched = masked_in(&state, &insn).unwrap_or(low_bits(size)) & low_bits(size);
            let bad = if low_bad { low_bits(split) } else { low_bits(size) & !low_bits(split) };
            let expected = if touched & bad != 0 { Outcome::Fault } else { Outcome::Done };
            if outcome != expected {
                wrong
                    .entry(format!("{:?} b{} {:?}", insn.mnemonic(), insn.is_broadcast(), insn.memory_size()))
                    .or_default()
                    .push(format!("k1={mask:#x} split={split} low_bad={low_bad}: {outcome:?}"));
            }
        }
    }
    assert!(tried > 10_000, "only {tried} cases ran");
    for (form, cases) in &wrong {
        println!("{form}: {} of 64, {}", cases.len(), cases[..cases.len().min(3)].join("; "));
    }
    assert!(wrong.is_empty(), "{} forms", wrong.len());
}
