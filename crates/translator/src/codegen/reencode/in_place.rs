//! Displaced registers used where they are: `add r14, rax` becomes `add [context of r14], rax`.
//!
//! The common integer instructions have a form with a memory operand for one of their two registers. It is used if what is
//! written is all 64 bits: fewer would leave the rest of the context's word alone, where a register's is cleared, or make the next
//! load of it wait.

use iced_x86::Instruction;

use super::{Encoding, Home, Names, Parts, Spared, home};
use crate::codegen::asm::{Asm, RSP, S0, S1, S2};

/// An instruction on registers as one on memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// The opcode's last byte.
    opcode: u8,
    /// The register in ModRM.reg (or the opcode's extension there).
    reg: u8,
    /// The displaced register whose context stands in for ModRM.rm.
    memory: u8,
    /// ModRM.reg is no register.
    extension: bool,
}

impl Form {
    /// The register beside the displaced one, if there is one.
    pub fn other(self) -> Option<u8> {
        (!self.extension).then_some(self.reg)
    }
}

/// What an instruction does with ModRM.rm.
enum Rm {
    Read,
    /// It writes it, and perhaps reads it.
    Write,
}

/// The form of an instruction, if it has one here. Only for 64-bit code.
pub fn form(p: &Parts) -> Option<Form> {
    if p.encoding != Encoding::Legacy || p.lock || p.rep.is_some() || p.modrm? < 0xc0 {
        return None;
    }
    let (reg, rm) = (p.reg(), p.rm());
    let digit = p.modrm? >> 3 & 7;
    let displaced = |n: u8| home(n) == Home::Memory;
    let &opcode = p.opcode.last()?;
    let (access, extension, swapped) = match *p.opcode {
        // ADD, OR, ADC, SBB, AND, SUB, XOR, CMP and MOV, with the register first or last.
        [op @ (0x00..=0x3f | 0x88..=0x8b)] if op & 7 < 4 => {
            let compares = op & 0xf8 == 0x38;
            let access = |op: u8| if op & 2 != 0 || compares { Rm::Read } else { Rm::Write };
            let swapped = !displaced(rm);
            let op = if swapped { op ^ 2 } else { op };
            (access(op), false, swapped.then_some(op))
        }
        // TEST
        [op @ (0x84 | 0x85)] => (Rm::Read, false, (!displaced(rm)).then_some(op)),
        // MOVSXD; IMUL with a constant
        [0x63 | 0x69 | 0x6b] => (Rm::Read, false, None),
        // The same eight with a constant, and shifts
        [0x80 | 0x81 | 0x83] => (if digit == 7 { Rm::Read } else { Rm::Write }, true, None),
        [0xc1 | 0xd1] if digit >= 4 => (Rm::Write, true, None),
        [0xc6 | 0xc7] if digit == 0 => (Rm::Write, true, None),
        // TEST with a constant, NOT, NEG
        [0xf6 | 0xf7] if digit == 0 => (Rm::Read, true, None),
        [0xf6 | 0xf7] if matches!(digit, 2 | 3) => (Rm::Write, true, None),
        // INC, DEC
        [0xff] if digit < 2 => (Rm::Write, true, None),
        // CMOVcc, IMUL, MOVZX, MOVSX
        [0x0f, 0x40..=0x4f | 0xaf | 0xb6 | 0xb7 | 0xbe | 0xbf] => (Rm::Read, false, None),
        _ => return None,
    };
    let form = match swapped {
        Some(opcode) => Form { opcode, reg: rm, memory: reg, extension },
        None => Form { opcode, reg: if extension { digit } else { reg }, memory: rm, extension },
    };
    // All of these have byte forms with even opcodes.
    let whole = p.rex & 8 != 0 && form.opcode & 1 != 0;
    if matches!(access, Rm::Write) && !whole {
        return None;
    }
    // With itself, a register may be cleared whatever it was.
    let same = !form.extension && form.reg == form.memory;
    (displaced(form.memory) && !same).then_some(form)
}

/// As [`super::emit`].
pub fn emit(asm: &mut Asm, p: &Parts, insn: &Instruction, form: Form) -> Option<Spared> {
    let mut names = Names { insn, used: [None; 3], count: 0, free: &[S1, S0, S2] };
    let reg = if form.extension { form.reg } else { names.rename(form.reg)?.0 };
    names.load(asm);
    if p.operand_size {
        asm.byte(0x66);
    }
    // Displaced registers are r8 and above: there was a REX, and byte registers are those that go with one.
    asm.byte(0x40 | p.rex & 8 | (reg >> 3) << 2);
    let (_, escape) = p.opcode.split_last()?;
    asm.bytes(escape);
    // [rsp + displacement]
    asm.bytes(&[form.opcode, 0x44 | (reg & 7) << 3, 0x20 | RSP.0, form.memory * 8]);
    asm.bytes(p.tail);
    names.store(asm);
    Some(names.spared())
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    use super::super::{Operand, emit};
    use super::Asm;

    fn translated(bytes: &[u8]) -> String {
        let insn = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        let mut asm = Asm::default();
        emit(&mut asm, bytes, &insn, 64, Operand::Host).unwrap();
        let mut formatter = IntelFormatter::new();
        let mut lines = Vec::new();
        for host in Decoder::new(64, &asm.code, DecoderOptions::NONE).iter() {
            let mut text = String::new();
            formatter.format(&host, &mut text);
            lines.push(text);
        }
        lines.join("; ")
    }

    #[test]
    fn a_displaced_register_is_used_in_the_context_as_source_and_as_whole_destination() {
        for (bytes, expected) in [
            (&[0x4c, 0x89, 0xf0][..], "mov rax,[rsp+70h]"), // mov rax, r14
            (&[0x49, 0x89, 0xc6], "mov [rsp+70h],rax"),     // mov r14, rax
            (&[0x4d, 0x89, 0xfe], "mov r10,[rsp+78h]; mov [rsp+70h],r10"), // mov r14, r15
            (&[0x44, 0x01, 0xf0], "add eax,[rsp+70h]"),     // add eax, r14d
            (&[0x49, 0x83, 0xc6, 0x01], "add qword ptr [rsp+70h],1"), // add r14, 1
            (&[0x41, 0x83, 0xfe, 0x01], "cmp dword ptr [rsp+70h],1"), // cmp r14d, 1
            (&[0x44, 0x38, 0xd6], "cmp sil,[rsp+50h]"),     // cmp sil, r10b
            (&[0x49, 0x0f, 0x44, 0xc3], "cmove rax,[rsp+58h]"), // cmove rax, r11
            (&[0x41, 0xf6, 0xc7, 0x08], "test byte ptr [rsp+78h],8"), // test r15b, 8
        ] {
            assert_eq!(translated(bytes), expected);
        }
    }

    #[test]
    fn a_displaced_register_is_loaded_if_its_value_matters_and_stored_if_it_changes() {
        for (bytes, expected) in [
            (&[0x41, 0x89, 0xc6][..], "mov r10d,eax; mov [rsp+70h],r10"), // mov r14d, eax
            (&[0x45, 0x31, 0xf6], "xor r10d,r10d; mov [rsp+70h],r10"),    // xor r14d, r14d
            (&[0x4d, 0x31, 0xf6], "xor r10,r10; mov [rsp+70h],r10"),      // xor r14, r14
            (&[0x4d, 0x85, 0xf6], "mov r10,[rsp+70h]; test r10,r10"),     // test r14, r14
            (&[0x41, 0x88, 0xc6], "mov r10,[rsp+70h]; mov r10b,al; mov [rsp+70h],r10"), // mov r14b, al
            (&[0x4c, 0x8b, 0x30], "mov r10,[r14]; mov [rsp+70h],r10"),    // mov r14, [rax]
            (&[0x4c, 0x89, 0x30], "mov r10,[rsp+70h]; mov [r14],r10"),    // mov [rax], r14
            (&[0x4c, 0x87, 0xf0], "mov r10,[rsp+70h]; xchg rax,r10; mov [rsp+70h],r10"), // xchg rax, r14
        ] {
            assert_eq!(translated(bytes), expected);
        }
    }
}
