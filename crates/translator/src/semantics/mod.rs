//! What sensitive instructions do, as Rust functions on [`Vcpu`].
//!
//! [`lookup`] says for a decoded instruction whether it has such a function. When a block reaches the instruction, all
//! guest state is saved to the [`Vcpu`], `insn_rip` is set to the instruction's own RIP, `rip` to that of the next one, and the
//! function is called. It returns `Ok` after it changed the state (a branch sets `rip`), or a [`Stop`]; with
//! [`Stop::Fault`] no guest state may have changed, except as the architecture says (REP strings keep their progress).

pub mod bits;
pub mod control;
pub mod cpuid;
pub mod debug_registers;
pub mod flags;
pub mod legacy;
pub mod misc;
pub mod msr;
pub mod port_io;
pub mod segments;
mod span;
pub mod stack;
pub mod string;
pub mod tables;
#[cfg(test)]
mod testing;
pub mod transfer;
pub mod vector;
#[cfg(test)]
mod vendors;
pub mod x87;
pub mod xsave;

use iced_x86::Instruction;

use crate::cpu::{Stop, Vcpu};

pub type Exec = fn(&mut Vcpu, &Instruction) -> Result<(), Stop>;

/// How a sensitive instruction is executed.
#[derive(Clone, Copy)]
pub struct Sensitive {
    pub exec: Exec,
    /// The instruction may change RIP, the mode (see [`crate::run`]) or interruptibility: the block ends here.
    pub ends_block: bool,
    /// The function reads or writes x87/SSE/AVX state in [`Vcpu::xsave`].
    pub fp: bool,
}

/// The function for an instruction, if it is a sensitive one.
pub fn lookup(insn: &Instruction) -> Option<Sensitive> {
    string::lookup(insn)
        .or_else(|| xsave::lookup(insn))
        .or_else(|| bits::lookup(insn))
        .or_else(|| vector::lookup(insn))
        .or_else(|| x87::lookup(insn))
        .or_else(|| legacy::lookup(insn))
        .or_else(|| transfer::lookup(insn))
        .or_else(|| segments::lookup(insn))
        .or_else(|| control::lookup(insn))
        .or_else(|| debug_registers::lookup(insn))
        .or_else(|| tables::lookup(insn))
        .or_else(|| flags::lookup(insn))
        .or_else(|| msr::lookup(insn))
        .or_else(|| cpuid::lookup(insn))
        .or_else(|| port_io::lookup(insn))
        .or_else(|| misc::lookup(insn))
}
