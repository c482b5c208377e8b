//! Makes cases: an instruction and the state it starts from, out of a seed and a number.
//!
//! Most cases are instances of the forms that iced's encoder knows, taken in turn, so that every form that the host
//! supports is met equally often. The rest are random bytes shaped like instructions: they meet redundant prefixes, reserved
//! bits, and encodings that an encoder wouldn't make.

mod encode;
pub mod exclude;
mod features;
pub mod state;
pub mod values;

pub use encode::encode as encode_form;

use arch::registers::rflags;
use iced_x86::{Code, CodeSize, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};

use crate::case::{Ignore, Input};
use crate::layout::*;
use crate::rng::Rng;

/// A case, ready to run on either side.
pub struct Case {
    pub index: u64,
    pub input: Box<Input>,
    /// The code from the entry on.
    pub code: Vec<u8>,
    pub bits: u32,
    pub ignore: Ignore,
}

/// Where cases come from.
pub struct Generator {
    seed: u64,
    bits: u32,
    /// Code and data are in segments of the local descriptor table.
    segmented: bool,
    forms: Vec<Code>,
    host: features::Host,
    only: Option<String>,
}

/// The forms left out for want of a feature, and those excluded with their reasons.
pub struct Coverage {
    pub forms: usize,
    pub unsupported: usize,
    pub excluded: Vec<(Code, &'static str)>,
}

impl Generator {
    /// `bits`: 64, or 32 for compatibility mode. `only`: a mnemonic or form name in lower case, to narrow a search.
    pub fn new(seed: u64, bits: u32, only: Option<String>) -> Self {
        let host = features::Host::detect();
        let mut forms = forms(&host, bits).0;
        if let Some(only) = &only {
            forms.retain(|c| {
                let (mnemonic, form) = (format!("{:?}", c.mnemonic()), format!("{c:?}"));
                mnemonic.eq_ignore_ascii_case(only) || form.eq_ignore_ascii_case(only)
            });
        }
        Generator { seed, bits, segmented: false, forms, host, only }
    }

    /// The same in segments of the local descriptor table; `bits`: 16 or 32.
    pub fn segmented(seed: u64, bits: u32, only: Option<String>) -> Self {
        Generator { segmented: true, ..Self::new(seed, bits, only) }
    }

    pub fn bits(&self) -> u32 {
        self.bits
    }

    pub fn forms(&self) -> &[Code] {
        &self.forms
    }

    /// Whether an instruction is one that is compared.
    pub fn admits(&self, insn: &Instruction) -> bool {
        exclude::reason(insn).is_none() && self.host.supports(insn.cpuid_features())
    }

    pub fn coverage(&self) -> Coverage {
        let (forms, unsupported, excluded) = forms(&self.host, self.bits);
        Coverage { forms: forms.len(), unsupported, excluded }
    }

    /// Case `index`, to run in slot `index % SLOTS`, or `index % SEGMENT_SLOTS`.
    pub fn case(&self, index: u64) -> Case {
        let mut rng = Rng::for_case(self.seed, index);
        let slots = if self.segmented { SEGMENT_SLOTS } else { SLOTS };
        let slot = (index % slots as u64) as usize;
        let base = if self.segmented { CODE } else { 0 };
        loop {
            let straddle = slot % 4 == 3 && rng.one_in(2);
            let entry = if straddle { SLOT_MIDDLE - 1 - rng.below(9) as usize } else { SLOT_ENTRY };
            let rip = slot_address(slot) + entry as u64 - base;
            let bytes = if self.only.is_none() && rng.one_in(8) {
                Some(random_bytes(&mut rng, self.bits))
            } else if self.forms.is_empty() {
                None
            } else {
                let form = self.forms[(index % self.forms.len() as u64) as usize];
                encode::encode(&mut rng, form, self.bits, rip).map(|b| redundant_prefixes(&mut rng, b, self.bits))
            };
            let Some(mut code) = bytes else { continue };
            code.truncate(15);
            let mut decoder = decoder(self.bits, &code, rip);
            let insn = decoder.decode();
            if insn.is_invalid() {
                // Worth a try now and then: the processor must refuse it as well. Some that iced refuses are instructions
                // of extensions it was not asked for (reserved NOPs, MPX): on both sides they do the same.
                if !rng.one_in(16) || undecodable_but_dangerous(&code) || reserved_to_intel(&code) {
                    continue;
                }
            } else if !self.admits(&insn) || peculiar(&insn, &code) || state::uses_its_mask_as_address(&insn) {
                continue;
            } else if (insn.ip()..insn.next_ip()).contains(&insn.near_branch_target()) {
                continue; // a loop of one
            }
            let constants = decoder.get_constant_offsets(&insn);
            let mut input = state::blank();
            input.slot = slot as u32;
            input.rip = rip;
            state::randomize(&mut rng, &mut input, self.bits);
            if self.segmented {
                state::use_segments(&mut rng, &mut input, self.bits);
            }
            if !insn.is_invalid() {
                code.truncate(insn.len());
                state::solve(&mut rng, &mut input, &insn, constants, &mut code, self.bits);
            }
            input.code[entry..entry + code.len()].copy_from_slice(&code);
            let mut ignore = ignore(&insn);
            ignore.segmented = self.segmented;
            ignore.narrow_stack = self.segmented && translator::host_is_amd();
            ignore.vector_alignment = translator::host_is_amd() && input.rflags & rflags::AC != 0 && is_vector(&insn);
            ignore.resume_flag = translator::host_is_amd() && input.rflags & rflags::RF != 0;
            if format!("{:?}", insn.mnemonic()).starts_with('X') && ignore.large_area {
                let address = insn.virtual_address(0, 0, |r, _, _| state::register_value(&input, r));
                let size = if self.bits == 64 { 2688 } else { 1664 };
                ignore.guest_area_end = address.unwrap_or(0).wrapping_add(size);
            }
            return Case { index, input, code, bits: self.bits, ignore };
        }
    }
}

impl Case {
    pub fn instruction(&self) -> Instruction {
        decoder(self.bits, &self.code, self.input.rip).decode()
    }

    /// The bytes and their meaning, one instruction a line.
    pub fn disassemble(&self) -> String {
        use iced_x86::{Formatter, IntelFormatter};
        let mut formatter = IntelFormatter::new();
        let mut decoder = decoder(self.bits, &self.code, self.input.rip);
        let mut out = String::new();
        while decoder.can_decode() {
            let from = decoder.position();
            let insn = decoder.decode();
            let mut text = String::new();
            formatter.format(&insn, &mut text);
            let bytes: String = self.code[from..decoder.position()].iter().map(|b| format!("{b:02x} ")).collect();
            out.push_str(&format!("  {:x}: {bytes:45} {text} ({:?})\n", insn.ip(), insn.code()));
        }
        out
    }
}

/// Decodes as the host does: see `translator`'s for where AMD's processors differ.
pub fn decoder(bits: u32, code: &[u8], rip: u64) -> Decoder<'_> {
    let options = if translator::host_is_amd() { DecoderOptions::AMD } else { DecoderOptions::NONE };
    Decoder::with_ip(bits, code, rip, options)
}

/// What need not agree after an instruction.
pub fn ignore(insn: &Instruction) -> Ignore {
    let name = format!("{:?}", insn.mnemonic());
    Ignore {
        flags: flags(insn.rflags_undefined()) | rotated_by_its_width(insn),
        // What iced doesn't know may be another name of what it does (SAL).
        flags_at_fault: if insn.is_invalid() { rflags::ARITHMETIC } else { flags(insn.rflags_modified()) },
        segmented: false,
        narrow_stack: false,
        vector_alignment: false,
        call: translator::host_is_amd() && insn.mnemonic() == Mnemonic::Call,
        resume_flag: false,
        any_operand: insn.is_vsib()
            || matches!(
                insn.code(),
                Code::Cmpsb_m8_m8 | Code::Cmpsw_m16_m16 | Code::Cmpsd_m32_m32 | Code::Cmpsq_m64_m64
            ),
        large_area: ["save", "rstor", "Fldenv", "Fnstenv", "askmov"].iter().any(|part| name.contains(part)),
        masked: insn.op_mask() != iced_x86::Register::None
            || name.contains("maskmov")
            || translator::host_is_amd() && name.contains("ompress"),
        may_fault_in_vain: name.starts_with("Maskmov") || name == "Vmaskmovdqu",
        extended: insn.memory_size().size() == 10,
        // To AMD's processors UD1 ends with its opcode.
        undecodable: insn.is_invalid() || translator::host_is_amd() && insn.mnemonic() == Mnemonic::Ud1,
        guest_area_end: 0,
        x87_store: name.starts_with("Fst") || name.starts_with("Fist") || name == "Fbstp",
        converting_store: name == "Vcvtps2ph",
        narrow_pointers: (0..insn.op_count())
            .any(|i| matches!(insn.op_kind(i), OpKind::MemorySegESI | OpKind::MemoryESEDI)),
        sticky_at_fault: name == "Vcvtps2ph"
            || (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_mm()),
    }
}

/// RCL and RCR of 8 and 16 bits by a multiple of 9 or 17, which changes nothing: AMD's processors leave OF undefined as with any
/// count but 1 (AMD APM 3, RCL), while to Intel's and iced it stays.
fn rotated_by_its_width(insn: &Instruction) -> u64 {
    let rotates = matches!(insn.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr);
    if rotates && translator::host_is_amd() && insn.op1_kind() == OpKind::Immediate8 && insn.immediate8() & 0x1f > 1 {
        rflags::OF
    } else {
        0
    }
}

/// Whether an instruction works on vector registers, or masks for them.
fn is_vector(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| {
        let register = insn.op_register(i);
        insn.op_kind(i) == OpKind::Register && (register.is_vector_register() || register.is_k())
    })
}

/// What AMD's processors do in ways of their own that no guest's program asks for: with REPE or REPNE before them, LOOPE and LOOPNE
/// go by that prefix; a far call with REX.W pushes 64 bits each, though its pointer has 32; outside 64-bit mode VPINSRD and VPEXTRD
/// are undefined with W.
fn peculiar(insn: &Instruction, code: &[u8]) -> bool {
    let prefixes = || code.iter().take_while(|b| is_prefix(**b));
    translator::host_is_amd()
        && match insn.mnemonic() {
            Mnemonic::Loope | Mnemonic::Loopne => prefixes().any(|b| matches!(b, 0xf2 | 0xf3)),
            Mnemonic::Vpinsrd | Mnemonic::Vpextrd => {
                let vex: Vec<u8> = code.iter().copied().skip_while(|b| is_prefix(*b)).take(3).collect();
                insn.code_size() != CodeSize::Code64 && matches!(*vex, [0x62 | 0xc4, _, third] if third & 0x80 != 0)
            }
            Mnemonic::Call => insn.code() == Code::Call_m1632 && prefixes().any(|b| b & 0xf8 == 0x48),
            _ => false,
        }
}

/// RFLAGS bits for iced's, which are numbered in their own way.
fn flags(bits: u32) -> u64 {
    use iced_x86::RflagsBits as B;
    let pairs = [
        (B::OF, rflags::OF),
        (B::SF, rflags::SF),
        (B::ZF, rflags::ZF),
        (B::AF, rflags::AF),
        (B::CF, rflags::CF),
        (B::PF, rflags::PF),
    ];
    pairs.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, flag)| flag).sum()
}

/// The forms of `bits`-bit code that are compared; how many the host lacks; those excluded.
fn forms(host: &features::Host, bits: u32) -> (Vec<Code>, usize, Vec<(Code, &'static str)>) {
    let mut forms = Vec::new();
    let mut unsupported = 0;
    let mut excluded = Vec::new();
    for code in Code::values() {
        let info = code.op_code();
        if !info.is_instruction() || !info.is_available_in_mode(bits) {
            continue;
        }
        let mut insn = Instruction::default();
        insn.set_code(code);
        if !host.supports(code.cpuid_features()) {
            unsupported += 1;
        } else if let Some(reason) = exclude::reason(&insn) {
            excluded.push((code, reason));
        } else if encode_some(code, bits) {
            forms.push(code);
        } else {
            excluded.push((code, "can't be encoded with any operands (pseudo-instruction)"));
        }
    }
    (forms, unsupported, excluded)
}

/// Whether any choice of operands can be encoded and comes back from the decoder as a supported instruction.
fn encode_some(code: Code, bits: u32) -> bool {
    let mut rng = Rng::new(code as u64);
    let at = if bits == 16 { 0x1000 } else { CODE };
    (0..200).any(|_| {
        encode::encode(&mut rng, code, bits, at)
            .is_some_and(|b| decoder(bits, &b, at).decode().mnemonic() != Mnemonic::INVALID)
    })
}

/// Prefixes that change nothing, or make something else of the instruction (which is then taken for what it is).
fn redundant_prefixes(rng: &mut Rng, mut bytes: Vec<u8>, bits: u32) -> Vec<u8> {
    if rng.one_in(10) {
        const PREFIXES: [u8; 9] = [0x66, 0xf2, 0xf3, 0x2e, 0x3e, 0x26, 0x36, 0x65, 0x67];
        let n = if rng.one_in(16) { 12 } else { 1 + rng.below(2) };
        for _ in 0..n {
            bytes.insert(0, rng.pick(&PREFIXES));
        }
    }
    if bits == 64 && rng.one_in(40) {
        // A REX prefix before another prefix has no effect; before the opcode it has.
        bytes.insert(0, 0x40 | rng.next_u64() as u8 & 0xf);
    }
    bytes
}

/// Bytes in the shape of an instruction: prefixes, an opcode of some map, ModRM, and whatever follows.
fn random_bytes(rng: &mut Rng, bits: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    const PREFIXES: [u8; 12] = [0x66, 0xf2, 0xf3, 0xf0, 0x2e, 0x64, 0x65, 0x67, 0x66, 0xf3, 0xf2, 0x36];
    while rng.one_in(3) {
        bytes.push(rng.pick(&PREFIXES));
    }
    if bits == 64 && rng.one_in(3) {
        bytes.push(0x40 | rng.next_u64() as u8 & 0xf);
    }
    match rng.below(8) {
        0..3 => {}
        3..5 => bytes.push(0x0f),
        5 => bytes.extend([0x0f, rng.pick(&[0x38, 0x3a])]),
        6 => {
            let second = rng.next_u64() as u8;
            bytes.extend([0xc4, second & 0xe0 | (1 + second % 3), rng.next_u64() as u8]);
        }
        _ => {
            let p = rng.next_u64().to_le_bytes();
            bytes.extend([0x62, p[0] & 0xf0 | rng.pick(&[1, 2, 3, 5, 6]), p[1] | 4, p[2]]);
        }
    }
    while bytes.len() < 15 {
        bytes.push(rng.next_u64() as u8);
    }
    bytes
}

/// VEX and EVEX instructions that AMD's processors may execute though bits are set that Intel reserves (those that extend the
/// number of a mask register, say). The translator refuses them.
fn reserved_to_intel(code: &[u8]) -> bool {
    let opcode = code.iter().find(|b| !is_prefix(**b));
    translator::host_is_amd() && matches!(opcode, Some(0x62 | 0xc4 | 0xc5))
}

fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x66 | 0x67 | 0xf2 | 0xf3 | 0xf0 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 | 0x40..=0x4f)
}

/// Bytes that iced can't decode here but that may do something on the host that is not to be tried.
fn undecodable_but_dangerous(code: &[u8]) -> bool {
    let opcode = code.iter().position(|b| !is_prefix(*b));
    match opcode.map(|at| &code[at..]) {
        // VIA's and Cyrix's own, SMM, VMX, SGX, AMX, MPX, SVM
        Some([0x0f, second, ..]) => {
            matches!(second, 0x01 | 0x1a | 0x1b | 0x0a | 0x36..=0x3f | 0x78 | 0x79 | 0xa6 | 0xa7 | 0xaa | 0xc7)
        }
        _ => false,
    }
}
