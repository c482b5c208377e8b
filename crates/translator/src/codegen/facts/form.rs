//! What the build script writes for each form, and the encoder reads.

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
