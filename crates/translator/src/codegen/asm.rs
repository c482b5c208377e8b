//! A small assembler for the host code that surrounds re-encoded guest instructions.
//!
//! It knows only the forms that the translator emits, always in 64-bit operand size unless a name says otherwise.
//! Branch targets are [`Label`]s, resolved by [`Asm::bind`]; all branches are rel32. Whatever depends on where the code
//! stands, in guest or host memory, is noted ([`Asm::moved`]).

use crate::body::Field;

/// A host general-purpose register, by encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reg(pub u8);

pub const RAX: Reg = Reg(0);
pub const RCX: Reg = Reg(1);
pub const RDX: Reg = Reg(2);
pub const RSP: Reg = Reg(4);
pub const RBP: Reg = Reg(5);
pub const RSI: Reg = Reg(6);
pub const RDI: Reg = Reg(7);
/// Holds the guest's rsp.
pub const GUEST_RSP: Reg = Reg(15);
/// Scratch: the address of a memory operand, first guest-virtual, then host. Its low three bits are neither 4 nor 5, so
/// that `[S0]` needs neither SIB nor displacement.
pub const S0: Reg = Reg(14);
/// Scratch.
pub const S1: Reg = Reg(10);
/// Scratch.
pub const S2: Reg = Reg(11);

/// A host memory operand.
#[derive(Clone, Copy, Debug)]
pub enum Mem {
    /// `[base + disp]`
    Base(Reg, i32),
    /// `[base + index * scale + disp]`; scale is 1, 2, 4 or 8
    Index(Reg, Reg, u8, i32),
    /// `[index * scale + disp]`
    Scaled(Reg, u8, i32),
    /// `[disp]`, sign-extended
    Absolute(i32),
    /// `[base + 8 * index + disp]` in the jump table's entry for a guest address
    Jump(Reg, Reg, i32, u64),
    /// RIP-relative, to an offset in the code memory
    Code(usize),
}

/// Two-operand arithmetic, by its /digit in group 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Alu {
    Add = 0,
    Or = 1,
    And = 4,
    Xor = 6,
    Cmp = 7,
}

/// Condition codes, as encoded.
pub mod cc {
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const A: u8 = 7;
    pub const NS: u8 = 9;

    /// The flags one of which must be set for a condition, or for its inverse none, as [`Asm::flags_to_ax`](super::Asm::flags_to_ax)
    /// has them: the byte, and which bits; if that is all there is to it.
    pub fn flags_in_ax(condition: u8) -> Option<(i32, u8)> {
        match condition >> 1 {
            0 => Some((0, 1)),
            1 => Some((1, 1)),
            2 => Some((1, 0x40)),
            3 => Some((1, 0x41)),
            4 => Some((1, 0x80)),
            5 => Some((1, 4)),
            _ => None,
        }
    }
}

/// A place in the code, perhaps not known yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label(usize);

const UNBOUND: usize = usize::MAX;

/// Assembles one block, as if it stood at the start of the code memory.
#[derive(Default)]
pub struct Asm {
    pub code: Vec<u8>,
    labels: Vec<usize>,
    fixups: Vec<(usize, Label)>,
    /// What moving the code changes: where, how, and the guest address that it is about.
    pub moved: Vec<(u16, Field, u64)>,
    /// Guest addresses are in the page that `near.code_page` names, or as far from it: see [`super::relative`].
    pub relative: bool,
    /// Where the last re-encoded instruction has its immediate.
    pub immediate: std::ops::Range<usize>,
}

impl Asm {
    /// Forgets everything but its memory.
    pub fn clear(&mut self) {
        self.code.clear();
        self.labels.clear();
        self.fixups.clear();
        self.moved.clear();
        self.relative = false;
    }

    /// Bytes emitted so far.
    pub fn position(&self) -> usize {
        self.code.len()
    }

    pub fn label(&mut self) -> Label {
        self.labels.push(UNBOUND);
        Label(self.labels.len() - 1)
    }

    pub fn bind(&mut self, label: Label) {
        self.labels[label.0] = self.code.len();
    }

    /// Resolves all branches to labels.
    pub fn finish(&mut self) {
        for &(at, label) in &self.fixups {
            let target = self.labels[label.0];
            assert_ne!(target, UNBOUND, "a branch to a label that was never bound");
            let rel = target as i32 - (at as i32 + 4);
            self.code[at..at + 4].copy_from_slice(&rel.to_le_bytes());
        }
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    pub fn byte(&mut self, byte: u8) {
        self.code.push(byte);
    }

    fn imm32(&mut self, value: i32) {
        self.bytes(&value.to_le_bytes());
    }

    fn rex(&mut self, wide: bool, reg: u8, mem: Mem) {
        let (x, b) = match mem {
            Mem::Base(base, _) => (0, base.0 >> 3),
            Mem::Index(base, index, ..) | Mem::Jump(base, index, ..) => (index.0 >> 3, base.0 >> 3),
            Mem::Scaled(index, _, _) => (index.0 >> 3, 0),
            Mem::Absolute(_) | Mem::Code(_) => (0, 0),
        };
        let rex = (wide as u8) << 3 | (reg >> 3) << 2 | x << 1 | b;
        if rex != 0 {
            self.byte(0x40 | rex);
        }
    }

    /// ModRM, SIB and displacement; `tail` is how many immediate bytes follow (for RIP-relative operands).
    fn modrm(&mut self, reg: u8, mem: Mem, tail: usize) {
        let reg = (reg & 7) << 3;
        let scale_bits = |s: u8| (s.trailing_zeros() as u8) << 6;
        match mem {
            Mem::Base(base, disp) => {
                let rm = base.0 & 7;
                let mode = if disp == 0 && rm != 5 {
                    0x00
                } else if i8::try_from(disp).is_ok() {
                    0x40
                } else {
                    0x80
                };
                self.byte(mode | reg | rm);
                if rm == 4 {
                    self.byte(0x24);
                }
                self.displacement(mode, disp);
            }
            Mem::Index(base, index, scale, disp) => {
                let mode = if disp == 0 && base.0 & 7 != 5 {
                    0x00
                } else if i8::try_from(disp).is_ok() {
                    0x40
                } else {
                    0x80
                };
                self.byte(mode | reg | 4);
                self.byte(scale_bits(scale) | (index.0 & 7) << 3 | base.0 & 7);
                self.displacement(mode, disp);
            }
            Mem::Scaled(index, scale, disp) => {
                self.byte(reg | 4);
                self.byte(scale_bits(scale) | (index.0 & 7) << 3 | 5);
                self.imm32(disp);
            }
            Mem::Absolute(disp) => {
                self.byte(reg | 4);
                self.byte(0x25);
                self.imm32(disp);
            }
            Mem::Jump(base, index, disp, address) => {
                self.byte(0x84 | reg);
                self.byte(0xc0 | (index.0 & 7) << 3 | base.0 & 7);
                self.note(Field::JumpIndex, address);
                self.imm32(disp);
            }
            Mem::Code(target) => {
                self.byte(reg | 5);
                let next = self.code.len() + 4 + tail;
                self.note(Field::HostWord, 0);
                self.imm32(target as i32 - next as i32);
            }
        }
    }

    fn displacement(&mut self, mode: u8, disp: i32) {
        match mode {
            0x40 => self.byte(disp as u8),
            0x80 => self.imm32(disp),
            _ => {}
        }
    }

    fn op_mem(&mut self, wide: bool, opcode: u8, reg: Reg, mem: Mem) {
        self.rex(wide, reg.0, mem);
        self.byte(opcode);
        self.modrm(reg.0, mem, 0);
    }

    fn op_reg(&mut self, wide: bool, opcode: u8, reg: u8, rm: Reg) {
        let rex = (wide as u8) << 3 | (reg >> 3) << 2 | rm.0 >> 3;
        if rex != 0 {
            self.byte(0x40 | rex);
        }
        self.byte(opcode);
        self.byte(0xc0 | (reg & 7) << 3 | rm.0 & 7);
    }

    /// The same for opcodes behind 0F, with a REX prefix in any case: it makes byte registers of 4 to 7 the low ones.
    fn op_reg_0f(&mut self, wide: bool, opcode: u8, reg: u8, rm: Reg) {
        let rex = 0x40 | (wide as u8) << 3 | (reg >> 3) << 2 | rm.0 >> 3;
        self.bytes(&[rex, 0x0f, opcode, 0xc0 | (reg & 7) << 3 | rm.0 & 7]);
    }

    pub fn mov(&mut self, to: Reg, from: Reg) {
        if to != from {
            self.op_reg(true, 0x8b, to.0, from);
        }
    }

    /// 32-bit move: clears the upper half.
    pub fn mov32(&mut self, to: Reg, from: Reg) {
        self.op_reg(false, 0x8b, to.0, from);
    }

    pub fn load(&mut self, to: Reg, from: Mem) {
        self.op_mem(true, 0x8b, to, from);
    }

    pub fn load32(&mut self, to: Reg, from: Mem) {
        self.op_mem(false, 0x8b, to, from);
    }

    pub fn load16(&mut self, to: Reg, from: Mem) {
        self.rex(false, to.0, from);
        self.bytes(&[0x0f, 0xb7]);
        self.modrm(to.0, from, 0);
    }

    /// 1, 4 or 8 bytes, whose sign is extended to 64 bits.
    pub fn load_signed(&mut self, size: usize, to: Reg, from: Mem) {
        match size {
            1 => {
                self.rex(true, to.0, from);
                self.bytes(&[0x0f, 0xbe]);
                self.modrm(to.0, from, 0);
            }
            4 => self.op_mem(true, 0x63, to, from),
            _ => self.load(to, from),
        }
    }

    pub fn store(&mut self, to: Mem, from: Reg) {
        self.op_mem(true, 0x89, from, to);
    }

    pub fn store32(&mut self, to: Mem, from: Reg) {
        self.op_mem(false, 0x89, from, to);
    }

    pub fn store16(&mut self, to: Mem, from: Reg) {
        self.byte(0x66);
        self.op_mem(false, 0x89, from, to);
    }

    /// The low 1, 2, 4 or 8 bytes of a register to memory.
    pub fn store_low(&mut self, size: usize, to: Mem, from: Reg) {
        match size {
            1 => self.op_mem(false, 0x88, from, to),
            2 => self.store16(to, from),
            4 => self.store32(to, from),
            _ => self.store(to, from),
        }
    }

    /// 1, 2, 4 or 8 bytes to a register, as MOV does: 4 clear the upper half, fewer leave the rest alone. One byte only to
    /// AL, CL, DL, BL, or a register beyond the first eight.
    pub fn load_low(&mut self, size: usize, to: Reg, from: Mem) {
        match size {
            1 => self.op_mem(false, 0x8a, to, from),
            2 => {
                self.byte(0x66);
                self.load32(to, from);
            }
            4 => self.load32(to, from),
            _ => self.load(to, from),
        }
    }

    /// REP MOVS or REP STOS by elements of 1, 2, 4 or 8 bytes.
    pub fn repeat_string(&mut self, size: usize, moves: bool) {
        let opcode = (if moves { 0xa4 } else { 0xaa }) | u8::from(size != 1);
        match size {
            2 => self.bytes(&[0x66, 0xf3, opcode]),
            8 => self.bytes(&[0xf3, 0x48, opcode]),
            _ => self.bytes(&[0xf3, opcode]),
        }
    }

    /// Stores a sign-extended 32-bit constant as 64 bits.
    pub fn store_imm(&mut self, to: Mem, value: i32) {
        self.rex(true, 0, to);
        self.byte(0xc7);
        self.modrm(0, to, 4);
        self.imm32(value);
    }

    /// The shortest move of a constant that leaves the flags alone.
    pub fn mov_imm(&mut self, to: Reg, value: u64) {
        if let Ok(v) = u32::try_from(value) {
            if to.0 >= 8 {
                self.byte(0x41);
            }
            self.byte(0xb8 | to.0 & 7);
            self.imm32(v as i32);
        } else if let Ok(v) = i32::try_from(value as i64) {
            self.bytes(&[0x48 | to.0 >> 3, 0xc7, 0xc0 | to.0 & 7]);
            self.imm32(v);
        } else {
            self.bytes(&[0x48 | to.0 >> 3, 0xb8 | to.0 & 7]);
            self.bytes(&value.to_le_bytes());
        }
    }

    /// [`Asm::mov_imm`] of a guest address, which depends on where the guest's code is.
    pub fn mov_address(&mut self, to: Reg, address: u64) {
        if self.relative {
            return self.mov_relative_address(to, address as i64);
        }
        self.mov_imm(to, address);
        let (field, size) = if u32::try_from(address).is_ok() {
            (Field::Address32, 4)
        } else if i32::try_from(address as i64).is_ok() {
            (Field::AddressSigned, 4)
        } else {
            (Field::Address64, 8)
        };
        self.moved.push(((self.code.len() - size) as u16, field, address));
    }

    /// `mov qword [mem], address`, if that is one of those that have a signed immediate, and not a shorter one as well.
    pub fn store_address(&mut self, mem: Mem, address: u64) -> bool {
        match i32::try_from(address as i64) {
            Ok(value) if value < 0 && !self.relative => {
                self.store_imm(mem, value);
                self.moved.push(((self.code.len() - 4) as u16, Field::AddressSigned, address));
                true
            }
            _ => false,
        }
    }

    /// Moves the number of the block's next sensitive instruction to a register.
    pub fn mov_sensitive(&mut self, to: Reg) {
        self.mov_imm(to, 0);
        self.moved.push(((self.code.len() - 4) as u16, Field::Sensitive, 0));
    }

    /// Notes the field that is emitted next.
    fn note(&mut self, field: Field, address: u64) {
        self.moved.push((self.code.len() as u16, field, address));
    }

    pub fn lea(&mut self, to: Reg, mem: Mem) {
        self.op_mem(true, 0x8d, to, mem);
    }

    /// LEA with a displacement of four bytes whatever its value, so that its length is always the same.
    pub fn lea_far(&mut self, to: Reg, base: Reg, disp: i32) {
        self.bytes(&[0x48 | (to.0 >> 3) << 2 | base.0 >> 3, 0x8d, 0x80 | (to.0 & 7) << 3 | base.0 & 7]);
        self.imm32(disp);
    }

    /// LEA with a 32-bit result: the address modulo 4 GiB.
    pub fn lea32(&mut self, to: Reg, mem: Mem) {
        self.op_mem(false, 0x8d, to, mem);
    }

    pub fn alu_mem(&mut self, op: Alu, to: Reg, from: Mem) {
        self.op_mem(true, (op as u8) << 3 | 3, to, from);
    }

    pub fn alu_mem32(&mut self, op: Alu, to: Reg, from: Mem) {
        self.op_mem(false, (op as u8) << 3 | 3, to, from);
    }

    pub fn alu_imm(&mut self, op: Alu, to: Reg, value: i32) {
        self.alu_imm_sized(true, op, to, value);
    }

    pub fn alu_imm32(&mut self, op: Alu, to: Reg, value: i32) {
        self.alu_imm_sized(false, op, to, value);
    }

    fn alu_imm_sized(&mut self, wide: bool, op: Alu, to: Reg, value: i32) {
        if let Ok(v) = i8::try_from(value) {
            self.op_reg(wide, 0x83, op as u8, to);
            self.byte(v as u8);
        } else {
            self.op_reg(wide, 0x81, op as u8, to);
            self.imm32(value);
        }
    }

    /// `cmp dword [mem], imm8`
    pub fn cmp_mem32_imm8(&mut self, mem: Mem, value: i8) {
        self.rex(false, 0, mem);
        self.byte(0x83);
        self.modrm(7, mem, 1);
        self.byte(value as u8);
    }

    /// Compares 1, 2, 4 or 8 bytes of memory with a constant, 8 by way of a register.
    pub fn compare_constant(&mut self, size: usize, mem: Mem, value: u64, by_way_of: Reg) {
        if size == 8 {
            self.mov_imm(by_way_of, value);
            self.alu_mem(Alu::Cmp, by_way_of, mem);
            return;
        }
        if size == 2 {
            self.byte(0x66);
        }
        self.rex(false, 0, mem);
        self.byte(if size == 1 { 0x80 } else { 0x81 });
        self.modrm(7, mem, size);
        self.bytes(&value.to_le_bytes()[..size]);
    }

    /// `op reg, [mem]` of 4 or 8 bytes, by its opcode.
    pub fn operate(&mut self, wide: bool, opcode: u8, reg: Reg, mem: Mem) {
        self.op_mem(wide, opcode, reg, mem);
    }

    /// `test byte [mem], imm8`
    pub fn test_mem8_imm8(&mut self, mem: Mem, value: u8) {
        self.rex(false, 0, mem);
        self.byte(0xf6);
        self.modrm(0, mem, 1);
        self.byte(value);
    }

    /// NOT: leaves the flags alone.
    pub fn not(&mut self, reg: Reg) {
        self.op_reg(true, 0xf7, 2, reg);
    }

    pub fn shr32(&mut self, reg: Reg, count: u8) {
        self.op_reg(false, 0xc1, 5, reg);
        self.byte(count);
    }

    pub fn shr(&mut self, reg: Reg, count: u8) {
        self.op_reg(true, 0xc1, 5, reg);
        self.byte(count);
    }

    pub fn sar(&mut self, reg: Reg, count: u8) {
        self.op_reg(true, 0xc1, 7, reg);
        self.byte(count);
    }

    /// A move that extends the sign of the low 2, 4 or 8 bytes.
    pub fn mov_signed(&mut self, size: usize, to: Reg, from: Reg) {
        match size {
            2 => self.op_reg_0f(true, 0xbf, to.0, from),
            4 => self.op_reg(true, 0x63, to.0, from),
            _ => self.mov(to, from),
        }
    }

    /// BT, BTS, BTR or BTC (by its second opcode byte) of 2, 4 or 8 bytes in a register.
    pub fn bit(&mut self, size: usize, opcode: u8, word: Reg, number: Reg) {
        if size == 2 {
            self.byte(0x66);
        }
        self.op_reg_0f(size == 8, opcode, number.0, word);
    }

    /// The same, LOCKed, of memory at `[S0]`; the number has to be below that of the operand's bits.
    pub fn locked_bit(&mut self, size: usize, opcode: u8, number: Reg) {
        self.byte(0xf0);
        if size == 2 {
            self.byte(0x66);
        }
        self.rex(size == 8, number.0, Mem::Base(S0, 0));
        self.bytes(&[0x0f, opcode]);
        self.modrm(number.0, Mem::Base(S0, 0), 0);
    }

    /// RORX (BMI2), 32 bits: leaves the flags alone.
    pub fn rorx32(&mut self, to: Reg, from: Reg, count: u8) {
        self.bytes(&[0xc4, ((to.0 >> 3 ^ 1) << 7) | 0x40 | ((from.0 >> 3 ^ 1) << 5) | 0x03, 0x7b, 0xf0]);
        self.bytes(&[0xc0 | (to.0 & 7) << 3 | from.0 & 7, count]);
    }

    /// PEXT (BMI2): gathers the bits of `from` that the mask at an offset in the code memory selects. Leaves the flags alone.
    pub fn pext(&mut self, to: Reg, from: Reg, mask: usize) {
        self.bytes(&[0xc4, ((to.0 >> 3 ^ 1) << 7) | 0x62, 0x80 | (!from.0 & 15) << 3 | 0x02, 0xf5]);
        self.modrm(to.0, Mem::Code(mask), 0);
    }

    pub fn alu(&mut self, op: Alu, to: Reg, from: Reg) {
        self.op_reg(true, (op as u8) << 3 | 3, to.0, from);
    }

    pub fn alu32(&mut self, op: Alu, to: Reg, from: Reg) {
        self.op_reg(false, (op as u8) << 3 | 3, to.0, from);
    }

    /// `and dword [mem], imm32`
    pub fn and_mem32_imm(&mut self, mem: Mem, value: i32) {
        self.rex(false, 0, mem);
        self.byte(0x81);
        self.modrm(4, mem, 4);
        self.imm32(value);
    }

    pub fn lfence(&mut self) {
        self.bytes(&[0x0f, 0xae, 0xe8]);
    }

    pub fn rdtsc(&mut self) {
        self.bytes(&[0x0f, 0x31]);
    }

    /// `or dword [mem], imm32`
    pub fn or_mem32_imm(&mut self, mem: Mem, value: i32) {
        self.rex(false, 0, mem);
        self.byte(0x81);
        self.modrm(1, mem, 4);
        self.imm32(value);
    }

    /// `add qword [mem], imm32`
    pub fn add_mem_imm(&mut self, mem: Mem, value: i32) {
        self.rex(true, 0, mem);
        self.byte(0x81);
        self.modrm(0, mem, 4);
        self.imm32(value);
    }

    /// `sub dword [mem], 1`
    pub fn count_down(&mut self, mem: Mem) {
        self.rex(false, 5, mem);
        self.byte(0x83);
        self.modrm(5, mem, 1);
        self.byte(1);
    }

    /// NEG, 32 bits.
    pub fn neg32(&mut self, reg: Reg) {
        self.op_reg(false, 0xf7, 3, reg);
    }

    /// `imul reg, reg, imm32`, 32 bits
    pub fn multiply32(&mut self, reg: Reg, by: i32) {
        self.op_reg(false, 0x69, reg.0, reg);
        self.imm32(by);
    }

    /// CMOVB, 32 bits.
    pub fn move32_if_below(&mut self, to: Reg, from: Reg) {
        self.op_reg_0f(false, 0x42, to.0, from);
    }

    /// `shl reg, 32`
    pub fn shift_high(&mut self, reg: Reg) {
        self.op_reg(true, 0xc1, 4, reg);
        self.byte(32);
    }

    /// `shr reg, 32`
    pub fn shift_low(&mut self, reg: Reg) {
        self.op_reg(true, 0xc1, 5, reg);
        self.byte(32);
    }

    pub fn movzx8(&mut self, to: Reg, from: Reg) {
        self.op_reg_0f(false, 0xb6, to.0, from);
    }

    pub fn movzx16(&mut self, to: Reg, from: Reg) {
        self.op_reg_0f(false, 0xb7, to.0, from);
    }

    /// 16-bit move: keeps the rest of the register.
    pub fn mov16(&mut self, to: Reg, from: Reg) {
        self.byte(0x66);
        self.op_reg(false, 0x8b, to.0, from);
    }

    /// `shl reg, count`, 32 bits
    pub fn shl32(&mut self, reg: Reg, count: u8) {
        self.op_reg(false, 0xc1, 4, reg);
        self.byte(count);
    }

    /// `test dword [mem], imm32`
    pub fn test_mem32_imm(&mut self, mem: Mem, value: i32) {
        self.rex(false, 0, mem);
        self.byte(0xf7);
        self.modrm(0, mem, 4);
        self.imm32(value);
    }

    /// `test reg, imm32`, 32 bits
    pub fn test_imm32(&mut self, reg: Reg, value: i32) {
        self.op_reg(false, 0xf7, 0, reg);
        self.imm32(value);
    }

    /// `test eax, imm32`
    pub fn test_eax_imm32(&mut self, value: i32) {
        self.byte(0xa9);
        self.imm32(value);
    }

    /// AH = SF, ZF, AF, PF, CF; AL = OF.
    pub fn flags_to_ax(&mut self) {
        self.bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
    }

    /// The inverse: 0x7f + 1 overflows, 0x7f + 0 does not.
    pub fn flags_from_ax(&mut self) {
        self.bytes(&[0x04, 0x7f, 0x9e]);
    }

    fn rel32(&mut self, label: Label) {
        self.fixups.push((self.code.len(), label));
        self.imm32(0);
    }

    pub fn jmp(&mut self, to: Label) {
        self.byte(0xe9);
        self.rel32(to);
    }

    pub fn jcc(&mut self, condition: u8, to: Label) {
        self.bytes(&[0x0f, 0x80 | condition]);
        self.rel32(to);
    }

    /// A jump back to a byte of the code.
    pub fn jmp_back(&mut self, to: usize) {
        self.byte(0xe9);
        let next = self.code.len() + 4;
        self.imm32(to as i32 - next as i32);
    }

    /// JRCXZ over what `body` emits (at most 127 bytes): it runs if rcx is not zero.
    pub fn unless_rcx_zero(&mut self, body: impl FnOnce(&mut Self)) {
        self.bytes(&[0xe3, 0]);
        let start = self.code.len();
        body(self);
        let length = self.code.len() - start;
        assert!(length <= 127, "too far for JRCXZ");
        self.code[start - 1] = length as u8;
    }

    pub fn jmp_mem(&mut self, mem: Mem) {
        self.rex(false, 0, mem);
        self.byte(0xff);
        self.modrm(4, mem, 0);
    }

    pub fn call_mem(&mut self, mem: Mem) {
        self.rex(false, 0, mem);
        self.byte(0xff);
        self.modrm(2, mem, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    fn disassemble(emit: impl FnOnce(&mut Asm)) -> String {
        let mut asm = Asm::default();
        emit(&mut asm);
        asm.finish();
        let mut decoder = Decoder::with_ip(64, &asm.code, 0, DecoderOptions::NONE);
        let mut formatter = IntelFormatter::new();
        let mut lines = Vec::new();
        while decoder.can_decode() {
            let mut text = String::new();
            formatter.format(&decoder.decode(), &mut text);
            lines.push(text);
        }
        lines.join("; ")
    }

    #[test]
    fn what_is_emitted_is_what_is_named() {
        let cases: [(&str, String); 16] = [
            ("cmp byte ptr [r14+5],0C3h", disassemble(|a| a.compare_constant(1, Mem::Base(S0, 5), 0xc3, S1))),
            ("cmp word ptr [r14],9090h", disassemble(|a| a.compare_constant(2, Mem::Base(S0, 0), 0x9090, S1))),
            ("cmp dword ptr [r14+800h],1", disassemble(|a| a.compare_constant(4, Mem::Base(S0, 0x800), 1, S1))),
            ("movsx r10,byte ptr [r10]", disassemble(|a| a.load_signed(1, S1, Mem::Base(S1, 0)))),
            ("movsxd r10,[r10]", disassemble(|a| a.load_signed(4, S1, Mem::Base(S1, 0)))),
            ("mov r14,[rsp+50h]", disassemble(|a| a.load(S0, Mem::Base(RSP, 0x50)))),
            ("mov [rbp],r11", disassemble(|a| a.store(Mem::Base(RBP, 0), S2))),
            ("lea r14d,[rdi+r10*4-8]", disassemble(|a| a.lea32(S0, Mem::Index(RDI, S1, 4, -8)))),
            ("xor r11,[rsp+r10+1000h]", disassemble(|a| a.alu_mem(Alu::Xor, S2, Mem::Index(RSP, S1, 1, 0x1000)))),
            ("cmp r11,0FFCh", disassemble(|a| a.alu_imm(Alu::Cmp, S2, 0xffc))),
            ("pext r10,r14,[100h]", disassemble(|a| a.pext(S1, S0, 0x100))),
            ("rorx r10d,r14d,7", disassemble(|a| a.rorx32(S1, S0, 7))),
            ("cmp dword ptr [8],0", disassemble(|a| a.cmp_mem32_imm8(Mem::Code(8), 0))),
            ("jmp qword ptr [rsp+r10*8+8000h]", disassemble(|a| a.jmp_mem(Mem::Index(RSP, S1, 8, 0x8000)))),
            ("jmp qword ptr [rsp+r10*8-8000h]", disassemble(|a| a.jmp_mem(Mem::Jump(RSP, S1, -0x8000, 0x1000)))),
            ("mov r14,0FFFFFFFF81000000h", disassemble(|a| a.mov_imm(S0, 0xffff_ffff_8100_0000))),
        ];
        for (expected, got) in cases {
            assert_eq!(expected, got);
        }
    }
}
