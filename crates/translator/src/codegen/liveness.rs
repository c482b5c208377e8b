//! Which arithmetic flags are needed where: a TLB check may clobber the host's flags only where none are.

use iced_x86::{Instruction, Mnemonic, RflagsBits};

/// A set of the six arithmetic flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags(u32);

impl Flags {
    pub const NONE: Flags = Flags(0);
    pub const ALL: Flags =
        Flags(RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF);

    fn from_bits(bits: u32) -> Flags {
        Flags(bits & Self::ALL.0)
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    fn union(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }

    fn minus(self, other: Flags) -> Flags {
        Flags(self.0 & !other.0)
    }
}

/// What one instruction does with the flags.
#[derive(Clone, Copy, Debug)]
pub struct Effect {
    pub reads: Flags,
    /// Overwritten whatever the operands are.
    pub kills: Flags,
    /// Touches the flags in any way.
    pub touches: bool,
    /// May leave others behind.
    pub changes: bool,
}

impl Effect {
    /// An instruction that Rust code executes sees and may change all flags.
    pub const SENSITIVE: Effect = Effect { reads: Flags::ALL, kills: Flags::NONE, touches: true, changes: true };

    pub const NONE: Effect = Effect { reads: Flags::NONE, kills: Flags::NONE, touches: false, changes: false };

    /// All flags are seen, none is changed.
    pub const LOOKS: Effect = Effect { reads: Flags::ALL, kills: Flags::NONE, touches: false, changes: false };

    pub fn of(insn: &Instruction) -> Effect {
        let (reads, modified) = (Flags::from_bits(insn.rflags_read()), Flags::from_bits(insn.rflags_modified()));
        let kills = if conditional(insn) { Flags::NONE } else { modified };
        Effect { reads, kills, touches: !reads.is_empty() || !modified.is_empty(), changes: !modified.is_empty() }
    }

    /// The flags needed before the instruction, given those needed after it.
    pub fn before(&self, after: Flags) -> Flags {
        after.minus(self.kills).union(self.reads)
    }
}

/// A count of zero leaves the flags alone (Intel SDM 2, SAL and RCL): shifts by CL, and repeated comparisons.
fn conditional(insn: &Instruction) -> bool {
    use Mnemonic::*;
    match insn.mnemonic() {
        Sal | Shl | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd => {
            let last = insn.op_count().saturating_sub(1);
            insn.op_kind(last) == iced_x86::OpKind::Register
        }
        Cmpsb | Cmpsw | Cmpsd | Cmpsq | Scasb | Scasw | Scasd | Scasq => true,
        _ => false,
    }
}
