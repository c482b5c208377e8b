//! Re-encoding: the guest's own instruction bytes with only the operands changed.
//!
//! An innocuous instruction keeps its opcode, its mandatory prefixes and its immediates; its memory operand becomes
//! `[S0]`, and general-purpose registers that live elsewhere are renamed ([`Names`]). Working on the bytes, and not on a
//! decoded form, keeps every encoding the processor knows, also those an encoder would normalize.

use iced_x86::{Decoder, DecoderOptions, Instruction, OpAccess, OpKind};

use super::asm::{Asm, GUEST_RSP, Mem, RDI, RSP, Reg, S0, S1, S2};
use super::facts::{facts, with_register_uses};
use crate::entry::context_offset;

mod in_place;

/// Where a guest register lives while guest code runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    Host(Reg),
    /// In the context, at [`context`].
    Memory,
}

/// The home of guest register `n` (by encoding).
pub fn home(n: u8) -> Home {
    match n {
        4 => Home::Host(GUEST_RSP),
        10 | 11 | 14 | 15 => Home::Memory,
        _ => Home::Host(Reg(n)),
    }
}

/// Guest register `n` in the context.
pub fn context(n: u8) -> Mem {
    Mem::Base(RSP, n as i32 * 8)
}

/// An instruction taken apart.
#[derive(Clone, Debug)]
pub struct Parts<'a> {
    pub lock: bool,
    pub rep: Option<u8>,
    pub operand_size: bool,
    pub address_size: bool,
    rex: u8,
    encoding: Encoding,
    /// The opcode with its escape bytes; for VEX and EVEX the one byte after the prefix.
    opcode: &'a [u8],
    modrm: Option<u8>,
    /// Immediates.
    tail: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    Legacy,
    /// The second and third byte of the three-byte form.
    Vex([u8; 2]),
    Evex([u8; 3]),
}

impl<'a> Parts<'a> {
    /// Takes apart the bytes of an instruction that was decoded as `insn`.
    pub fn new(bytes: &'a [u8], insn: &Instruction, bits: u32) -> Option<Self> {
        let facts = facts(insn.code());
        let mut p = Parts {
            lock: false,
            rep: None,
            operand_size: false,
            address_size: false,
            rex: 0,
            encoding: Encoding::Legacy,
            opcode: &[],
            modrm: None,
            tail: &[],
        };
        let mut i = 0;
        loop {
            match *bytes.get(i)? {
                0xf0 => p.lock = true,
                b @ (0xf2 | 0xf3) => p.rep = Some(b),
                0x66 => p.operand_size = true,
                0x67 => p.address_size = true,
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
                b @ 0x40..=0x4f if bits == 64 => {
                    // REX counts only right before the opcode.
                    p.rex = b;
                    i += 1;
                    if is_prefix(*bytes.get(i)?, bits) {
                        p.rex = 0;
                    } else {
                        break;
                    }
                    continue;
                }
                _ => break,
            }
            i += 1;
        }
        let first = *bytes.get(i)?;
        let vector_prefix = |b: u8| bits == 64 || b >= 0xc0;
        // Outside 64-bit mode the bits that would name registers beyond the eighth are ignored: make them say "none" (they are
        // inverted). `low`: of vvvv.
        let low = if bits == 64 { 0 } else { 0x40 };
        match first {
            0xc5 if vector_prefix(*bytes.get(i + 1)?) => {
                let b = *bytes.get(i + 1)?;
                p.encoding = Encoding::Vex([b & 0x80 | 0x61, b & 0x7f | low]);
                i += 2;
                p.opcode = bytes.get(i..i + 1)?;
            }
            0xc4 if vector_prefix(*bytes.get(i + 1)?) => {
                let few = if bits == 64 { 0 } else { 0x20 };
                let w = if bits != 64 && ignores_w(bytes, i + 2, insn, bits) { 0x80 } else { 0 };
                p.encoding = Encoding::Vex([*bytes.get(i + 1)? | few, (*bytes.get(i + 2)? | low) & !w]);
                i += 3;
                p.opcode = bytes.get(i..i + 1)?;
            }
            0x62 if vector_prefix(*bytes.get(i + 1)?) => {
                let (few, v) = if bits == 64 { (0, 0) } else { (0x30, 0x08) };
                let w = if bits != 64 && ignores_w(bytes, i + 2, insn, bits) { 0x80 } else { 0 };
                let p1 = (*bytes.get(i + 2)? | low) & !w;
                p.encoding = Encoding::Evex([*bytes.get(i + 1)? | few, p1, *bytes.get(i + 3)? | v]);
                i += 4;
                p.opcode = bytes.get(i..i + 1)?;
            }
            0x0f => {
                let length = match *bytes.get(i + 1)? {
                    0x38 | 0x3a => 3,
                    _ => 2,
                };
                p.opcode = bytes.get(i..i + length)?;
            }
            _ => p.opcode = bytes.get(i..i + 1)?,
        }
        i += p.opcode.len();
        let x87 = p.opcode.len() == 1 && matches!(p.opcode[0], 0xd8..=0xdf) && p.encoding == Encoding::Legacy;
        if facts.modrm || x87 || has_implied_modrm(&p) {
            let modrm = *bytes.get(i)?;
            p.modrm = Some(modrm);
            i += 1;
            if modrm < 0xc0 {
                i += displacement_length(
                    modrm,
                    bytes.get(i).copied(),
                    bits == 16 && !p.address_size || bits == 32 && p.address_size,
                );
            }
        }
        p.tail = bytes.get(i..)?;
        Some(p)
    }

    fn reg(&self) -> u8 {
        self.modrm.map_or(0, |m| m >> 3 & 7)
            | match self.encoding {
                Encoding::Legacy => (self.rex >> 2 & 1) << 3,
                Encoding::Vex([b, _]) => (!b >> 7 & 1) << 3,
                Encoding::Evex([b, ..]) => (!b >> 7 & 1) << 3,
            }
    }

    fn rm(&self) -> u8 {
        self.modrm.map_or(0, |m| m & 7) | self.extension_b() << 3
    }

    fn extension_b(&self) -> u8 {
        match self.encoding {
            Encoding::Legacy => self.rex & 1,
            Encoding::Vex([b, _]) => !b >> 5 & 1,
            Encoding::Evex([b, ..]) => !b >> 5 & 1,
        }
    }

    fn vvvv(&self) -> u8 {
        match self.encoding {
            Encoding::Legacy => 0,
            Encoding::Vex([_, b]) => !b >> 3 & 15,
            Encoding::Evex([_, b, _]) => !b >> 3 & 15,
        }
    }

    fn has_memory(&self) -> bool {
        self.modrm.is_some_and(|m| m < 0xc0)
    }
}

fn is_prefix(b: u8, bits: u32) -> bool {
    matches!(b, 0xf0 | 0xf2 | 0xf3 | 0x66 | 0x67 | 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65)
        || bits == 64 && matches!(b, 0x40..=0x4f)
}

/// Instructions without register or memory operands whose ModRM byte is part of the opcode (MFENCE, ...), or that iced
/// describes by fixed operands (group 5 and the like are all known by their operand kinds).
fn has_implied_modrm(p: &Parts) -> bool {
    p.encoding == Encoding::Legacy && matches!(p.opcode, [0x0f, 0x01 | 0xae | 0xc7 | 0x18..=0x1f | 0x0d])
}

fn displacement_length(modrm: u8, sib: Option<u8>, bits16: bool) -> usize {
    let (mode, rm) = (modrm >> 6, modrm & 7);
    if bits16 {
        return match (mode, rm) {
            (0, 6) | (2, _) => 2,
            (1, _) => 1,
            _ => 0,
        };
    }
    let sib_length = (rm == 4) as usize;
    sib_length
        + match mode {
            0 if rm == 5 => 4,
            0 if rm == 4 && sib.is_some_and(|s| s & 7 == 5) => 4,
            1 => 1,
            2 => 4,
            _ => 0,
        }
}

/// What the guest's memory operand becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// `[S0]`: its host address.
    Host,
    /// `[S0 + guest rsp + displacement]`: S0 holds the addend of its page.
    Stack(i32),
    /// `[register + displacement]`: a host address that is kept in S2.
    At(Reg, i32),
}

/// Which scratch registers an instruction left as they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spared {
    pub s0: bool,
    pub s2: bool,
}

impl Spared {
    pub const ALL: Spared = Spared { s0: true, s2: true };
}

/// Emits the instruction on `operand` (if it has a memory operand) with its registers renamed: loads displaced registers
/// into scratch ones first, stores them back afterwards. All scratch registers that the operand doesn't use are free.
///
/// `None`: the form is not one that can be re-encoded.
pub fn emit(asm: &mut Asm, bytes: &[u8], insn: &Instruction, bits: u32, operand: Operand) -> Option<Spared> {
    let p = Parts::new(bytes, insn, bits)?;
    let f = facts(insn.code());
    let memory = p.has_memory();
    if bits == 64
        && let Some(form) = in_place::form(&p)
    {
        return in_place::emit(asm, &p, insn, form);
    }
    let legacy = p.encoding == Encoding::Legacy;

    // 40..4f in 32- and 16-bit code: INC and DEC r, which 64-bit mode spells with a ModRM byte.
    let short_inc = legacy && bits != 64 && p.opcode.len() == 1 && matches!(p.opcode[0], 0x40..=0x4f);
    let opcode_register = f.opcode_gpr.then(|| p.opcode[p.opcode.len() - 1] & 7 | p.extension_b() << 3);
    let high_byte = |n: u8, byte: bool| byte && legacy && p.rex == 0 && (4..8).contains(&n);

    let free = match operand {
        _ if !memory => &[S1, S0, S2][..],
        Operand::At(..) => &[S1, S0],
        Operand::Host | Operand::Stack(_) => &[S1, S2],
    };
    let mut names = Names { insn, used: [None; 3], count: 0, free };
    let reg = (f.reg_gpr && p.modrm.is_some()).then(|| p.reg());
    let rm = (f.rm_gpr && p.modrm.is_some() && !memory).then(|| p.rm());
    let vvvv = f.vvvv_gpr.then(|| p.vvvv());
    let mut any_high = false;
    let mut rename = |n: Option<u8>, byte: bool, names: &mut Names| -> Option<Option<u8>> {
        match n {
            None => Some(None),
            Some(n) if high_byte(n, byte) => {
                any_high = true;
                Some(Some(n))
            }
            Some(n) => names.rename(n).map(|r| Some(r.0)),
        }
    };
    let mut new_reg = rename(reg, f.reg_byte, &mut names)?;
    let new_rm = rename(rm, f.rm_byte, &mut names)?;
    let new_vvvv = rename(vvvv, false, &mut names)?;
    let new_opcode = rename(opcode_register, f.reg_byte, &mut names)?;

    // AH, CH, DH and BH exclude REX, so nothing beside them may live in r8-r15: lend rdi, which such an instruction can't
    // name as a byte register (a wide operand of MOVZX and the like may only be the register that was renamed).
    let lends = any_high && (memory || [new_reg, new_rm].iter().flatten().any(|&r| r >= 8));
    let mut address = if let Operand::At(reg, _) = operand { reg } else { S0 };
    let mut operand = operand;
    names.load(asm);
    if lends {
        asm.store(Mem::Base(RSP, context_offset!(hot.lent)), RDI);
        if memory {
            match operand {
                Operand::Host => asm.mov(RDI, S0),
                Operand::Stack(displacement) => asm.lea(RDI, Mem::Index(S0, GUEST_RSP, 1, displacement)),
                Operand::At(base, displacement) => asm.lea(RDI, Mem::Base(base, displacement)),
            }
            operand = Operand::Host;
            address = RDI;
        } else {
            asm.mov(RDI, Reg(new_reg?));
            new_reg = Some(RDI.0);
        }
    }

    if p.lock {
        asm.byte(0xf0);
    }
    // In 16-bit code the operand-size prefix means the opposite; as a mandatory prefix it stays.
    let mandatory = f.mandatory_66 || f.fp != super::facts::FpClass::None && f.fp != super::facts::FpClass::X87;
    if legacy && (p.operand_size ^ (bits == 16 && !mandatory)) {
        asm.byte(0x66);
    }
    if let (Some(b), true) = (p.rep, legacy) {
        asm.byte(b);
    }

    let field = |new: Option<u8>, old: u8| new.unwrap_or(old);
    let r = field(new_reg, p.reg());
    let b = if memory { address.0 } else { field(new_rm, p.rm()) };
    // The extension of an index register.
    let index_high = match operand {
        Operand::Stack(_) if memory => GUEST_RSP.0 >> 3,
        _ => 0,
    };
    match p.encoding {
        Encoding::Legacy => {
            let mut ext = p.rex & 0x08;
            let byte_rex = p.rex != 0
                || renamed_byte(&f_pair(f.reg_byte, reg, new_reg))
                || renamed_byte(&f_pair(f.rm_byte, rm, new_rm));
            if let Some(n) = new_opcode {
                ext |= n >> 3;
            } else if p.modrm.is_some() {
                ext |= (r >> 3) << 2 | index_high << 1 | b >> 3;
            } else {
                ext |= p.rex & 7;
            }
            let needs = ext != 0 || byte_rex && !any_high;
            if needs {
                if any_high {
                    return None;
                }
                asm.byte(0x40 | ext);
            }
            if short_inc {
                let digit = if p.opcode[0] & 8 != 0 { 1 } else { 0 };
                asm.bytes(&[0xff, 0xc0 | digit << 3 | new_opcode? & 7]);
            } else {
                let (last, escape) = p.opcode.split_last()?;
                asm.bytes(escape);
                // 82 is another 80, which 64-bit mode doesn't have.
                let last = if p.opcode == [0x82] { 0x80 } else { *last };
                asm.byte(new_opcode.map_or(last, |n| last & !7 | n & 7));
            }
        }
        Encoding::Vex([p1, p2]) => {
            let x = if memory { (index_high ^ 1) << 6 } else { p1 & 0x40 };
            let p1 = (!r & 8) << 4 | x | (!b & 8) << 2 | p1 & 0x1f;
            let p2 = new_vvvv.map_or(p2, |v| p2 & 0x87 | (!v & 15) << 3);
            asm.bytes(&[0xc4, p1, p2]);
            asm.bytes(p.opcode);
        }
        Encoding::Evex([p0, p1, p2]) => {
            let x = if memory { (index_high ^ 1) << 6 } else { p0 & 0x40 };
            let p0 = (!r & 8) << 4 | x | (!b & 8) << 2 | p0 & 0x1f;
            let p1 = new_vvvv.map_or(p1, |v| p1 & 0x87 | (!v & 15) << 3);
            asm.bytes(&[0x62, p0, p1, p2]);
            asm.bytes(p.opcode);
        }
    }
    if let Some(modrm) = p.modrm {
        let reg_bits = if f.reg_gpr { r & 7 } else { modrm >> 3 & 7 } << 3;
        match operand {
            Operand::Stack(displacement) if memory => {
                asm.bytes(&[0x84 | reg_bits, (GUEST_RSP.0 & 7) << 3 | b & 7]);
                asm.bytes(&displacement.to_le_bytes());
            }
            Operand::At(_, displacement) if memory && displacement != 0 => match i8::try_from(displacement) {
                // A short displacement of EVEX counts operands, not bytes (Intel SDM 2A 2.7.5).
                Ok(short) if !matches!(p.encoding, Encoding::Evex(_)) => {
                    asm.bytes(&[0x40 | reg_bits | b & 7, short as u8])
                }
                _ => {
                    asm.byte(0x80 | reg_bits | b & 7);
                    asm.bytes(&displacement.to_le_bytes());
                }
            },
            _ => asm.byte(if memory { 0 } else { 0xc0 } | reg_bits | b & 7),
        }
    }
    asm.immediate = asm.position()..asm.position() + p.tail.len();
    asm.bytes(p.tail);
    if f.register_byte
        && bits != 64
        && let Some(last) = asm.code.last_mut()
    {
        // Outside 64-bit mode there is no register for its highest bit.
        *last &= 0x7f;
    }

    if lends {
        if !memory {
            asm.mov(GUEST_RSP, RDI);
        }
        asm.load(RDI, Mem::Base(RSP, context_offset!(hot.lent)));
    }
    names.store(asm);
    Some(names.spared())
}

/// Whether [`emit`] needs no scratch register beside those of the memory operand.
pub fn spares_scratch(bytes: &[u8], insn: &Instruction, bits: u32) -> bool {
    let Some(p) = Parts::new(bytes, insn, bits) else { return false };
    let f = facts(insn.code());
    let at_home = |n: u8| home(n) != Home::Memory;
    if bits == 64
        && let Some(form) = in_place::form(&p)
    {
        return form.other().is_none_or(at_home);
    }
    let opcode_register = p.opcode.last().map_or(0, |o| o & 7 | p.extension_b() << 3);
    !(f.reg_gpr && p.modrm.is_some() && !at_home(p.reg())
        || f.rm_gpr && p.modrm.is_some() && !p.has_memory() && !at_home(p.rm())
        || f.vvvv_gpr && !at_home(p.vvvv())
        || f.opcode_gpr && !at_home(opcode_register))
}

/// Whether the W bit, at `at` in the bytes, means nothing outside 64-bit mode, where it would make general registers wide.
fn ignores_w(bytes: &[u8], at: usize, insn: &Instruction, bits: u32) -> bool {
    let mut other = bytes.to_vec();
    match other.get_mut(at) {
        Some(b) if *b & 0x80 != 0 => *b &= 0x7f,
        _ => return false,
    }
    Decoder::new(bits, &other, DecoderOptions::NONE).decode().code() == insn.code()
}

/// Whether RDI is lent while an instruction accesses memory: AH, CH, DH and BH exclude the register that addresses are in.
pub fn lends(insn: &Instruction) -> bool {
    use iced_x86::Register::{AH, BH, CH, DH};
    let operands = || 0..insn.op_count();
    operands().any(|i| insn.op_kind(i) == OpKind::Register && matches!(insn.op_register(i), AH | BH | CH | DH))
        && operands().any(|i| insn.op_kind(i) == OpKind::Memory)
}

type BytePair = (bool, Option<u8>, Option<u8>);

fn f_pair(byte: bool, old: Option<u8>, new: Option<u8>) -> BytePair {
    (byte, old, new)
}

/// A byte register whose new name is spl-dil or r8b-r15b needs a REX prefix.
fn renamed_byte(&(byte, old, new): &BytePair) -> bool {
    byte && old != new
}

/// The displaced registers of one instruction and the scratch registers that stand for them.
struct Names<'a> {
    insn: &'a Instruction,
    used: [Option<(u8, Reg)>; 3],
    count: usize,
    free: &'a [Reg],
}

impl Names<'_> {
    /// The host register for guest register `n`.
    fn rename(&mut self, n: u8) -> Option<Reg> {
        if let Home::Host(reg) = home(n) {
            return Some(reg);
        }
        if let Some((_, reg)) = self.used.iter().flatten().find(|(guest, _)| *guest == n) {
            return Some(*reg);
        }
        let reg = *self.free.get(self.count)?;
        self.used[self.count] = Some((n, reg));
        self.count += 1;
        Some(reg)
    }

    fn spared(&self) -> Spared {
        let left = |scratch| self.used.iter().flatten().all(|&(_, reg)| reg != scratch);
        Spared { s0: left(S0), s2: left(S2) }
    }

    fn load(&self, asm: &mut Asm) {
        for &(guest, reg) in self.used.iter().flatten() {
            if usage(self.insn, guest).read {
                asm.load(reg, context(guest));
            }
        }
    }

    fn store(&self, asm: &mut Asm) {
        for &(guest, reg) in self.used.iter().flatten() {
            if usage(self.insn, guest).written {
                asm.store(context(guest), reg);
            }
        }
    }
}

/// What an instruction does with a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Usage {
    /// The value before it matters.
    read: bool,
    written: bool,
}

/// How an instruction uses general-purpose register `n`.
fn usage(insn: &Instruction, n: u8) -> Usage {
    let mut usage = Usage { read: false, written: false };
    with_register_uses(insn, |info| {
        let of =
            |register: iced_x86::Register| register.is_gpr() && register.full_register().number() == usize::from(n);
        for used in info.used_registers().iter().filter(|u| of(u.register())) {
            match used.access() {
                OpAccess::None | OpAccess::NoMemAccess => {}
                OpAccess::Read | OpAccess::CondRead => usage.read = true,
                // 8 and 16 bits leave the rest of the register alone, 32 clear it.
                OpAccess::Write => {
                    usage.written = true;
                    usage.read |= used.register().size() < 4;
                }
                OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => {
                    usage = Usage { read: true, written: true };
                }
            }
        }
    });
    usage
}
