//! Blocks that look at their own bytes: code of pages that are rewritten all the time ([`crate::rewritten`]).
//!
//! Stores to such a page are seen by nobody. Instead each block begins with a comparison of the bytes that it was made from
//! with those in RAM, and leaves to be made anew where they differ ([`Left::Stale`](crate::entry::Left)):
//!
//! ```text
//!     park the flags             ; what comes next may need any of them
//! parked entry:
//!     S0 = the page's host address
//!     cmp dword [S0 + 123h], ...
//!     jne stale
//!     ...
//! ```
//!
//! So that this is enough, nothing is looked at beyond the block's own instructions, and the block ends behind one that
//! may store: the next one looks again. Immediates that the guest's compiler may patch are not compared, but read from the page, into
//! [`Hot::immediates`](crate::entry::Hot), where operations take them from.
//! Only in machines with one processor: another one could replace a whole instruction between that and the comparison.

use std::ops::Range;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::asm::{Label, Mem, RSP, S0, S1, cc};
use super::block::{Builder, constant_operation};
use super::classify::{Kind, access_operand, writes};
use super::decode::MAX_STRAIGHT;
use super::reencode::{Home, home};
use crate::entry::context_offset;

/// Immediates that a block loads. That is as many as it can have.
pub const MAX_IMMEDIATES: usize = MAX_STRAIGHT;

const PAGE: usize = memory::PAGE_SIZE as usize;

/// Where a block finds the bytes that it was made from.
#[derive(Clone, Copy, Debug)]
pub struct Checked {
    /// The host address of the page in which it begins.
    pub page: u64,
    /// The same of the page behind, if bytes of it were given as well.
    pub next: u64,
}

impl Checked {
    /// The host address of a byte, by its distance from the start of the first page.
    fn address(self, offset: usize) -> u64 {
        if offset < PAGE { self.page + offset as u64 } else { self.next + (offset - PAGE) as u64 }
    }
}

/// Whether an instruction may store to memory; at least whenever it does.
pub fn may_store(insn: &Instruction, kind: Kind) -> bool {
    match kind {
        Kind::Skip | Kind::Access | Kind::Level => false,
        // A call's block ends with it.
        Kind::Branch => false,
        Kind::Native => access_operand(insn).is_some_and(|operand| writes(insn, operand)),
        Kind::Stack => match insn.mnemonic() {
            Mnemonic::Pop => insn.op0_kind() == OpKind::Memory,
            Mnemonic::Leave | Mnemonic::Popa | Mnemonic::Popad => false,
            _ => true,
        },
        Kind::Sensitive(..) | Kind::System | Kind::String | Kind::Bit => true,
    }
}

/// How many bytes an immediate has that can be loaded into a register and used from there, extended by its sign.
fn loadable(insn: &Instruction) -> Option<usize> {
    let size = insn.op0_register().size();
    let in_host = matches!(home(insn.op0_register().full_register().number() as u8), Home::Host(_));
    if !constant_operation(insn) || !in_host || size < 4 {
        return None;
    }
    Some(match insn.op_kind(insn.op_count() - 1) {
        OpKind::Immediate8to32 | OpKind::Immediate8to64 => 1,
        OpKind::Immediate32 | OpKind::Immediate32to64 => 4,
        OpKind::Immediate64 => 8,
        _ => return None,
    })
}

impl Builder<'_> {
    /// Where in the block's bytes the immediate of an instruction is, if it is to be loaded.
    fn loaded_immediate(&self, insn: &Instruction, offset: usize) -> Option<Range<usize>> {
        let end = offset + insn.len();
        let start = end - loadable(insn)?;
        // In one piece.
        (self.code.offset + start >= PAGE || self.code.offset + end <= PAGE).then_some(start..end)
    }

    /// Begins a block that looks at its own bytes; where to enter it with the flags parked.
    pub fn check_bytes(&mut self) -> usize {
        let Some(checked) = self.setting.checked else { return 0 };
        self.park();
        let entry = self.asm.position();
        let stale = self.asm.label();
        let mut page = None;
        let mut ranges: Vec<Range<usize>> = Vec::new();
        let mut loaded = 0;
        for i in 0..self.items.len() {
            let (insn, start) = (self.items[i].insn, self.items[i].offset);
            let mut end = start + insn.len();
            if matches!(self.items[i].kind, Kind::Native)
                && let Some(immediate) = self.loaded_immediate(&insn, start)
            {
                end = immediate.start;
                let place = self.byte_of_block(checked, immediate.start, &mut page);
                self.asm.load_signed(immediate.len(), S1, place);
                self.asm.store(slot(loaded), S1);
                loaded += 1;
            }
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        for range in ranges {
            self.compare_bytes(checked, range, &mut page, stale);
        }
        self.stale_stub(stale);
        entry
    }

    /// Where one of the block's bytes is, by way of S0. `page`: the page that S0 leads to.
    fn byte_of_block(&mut self, checked: Checked, at: usize, page: &mut Option<u64>) -> Mem {
        let place = checked.address(self.code.offset + at);
        let base = place & !(PAGE as u64 - 1);
        if *page != Some(base) {
            self.asm.mov_imm(S0, base);
            *page = Some(base);
        }
        Mem::Base(S0, (place - base) as i32)
    }

    /// Emits comparisons of a range of the block's bytes.
    fn compare_bytes(&mut self, checked: Checked, range: Range<usize>, page: &mut Option<u64>, stale: Label) {
        let mut at = range.start;
        while at < range.end {
            let room = PAGE - (self.code.offset + at) % PAGE;
            let size = [8, 4, 2, 1].into_iter().find(|&size| size <= room.min(range.end - at)).unwrap_or(1);
            let place = self.byte_of_block(checked, at, page);
            let mut bytes = [0; 8];
            bytes[..size].copy_from_slice(&self.bytes[at..at + size]);
            self.asm.compare_constant(size, place, u64::from_le_bytes(bytes), S1);
            self.asm.jcc(cc::NE, stale);
            at += size;
        }
    }

    /// Emits an innocuous operation on the immediate that was loaded for it; false if none was.
    pub fn with_loaded_immediate(&mut self, insn: &Instruction, offset: usize) -> bool {
        if self.setting.checked.is_none() || self.loaded_immediate(insn, offset).is_none() {
            return false;
        }
        let Home::Host(register) = home(insn.op0_register().full_register().number() as u8) else { return false };
        let wide = insn.op0_register().size() == 8;
        self.asm.operate(wide, opcode(insn.mnemonic()), register, slot(self.loaded_immediates));
        self.loaded_immediates += 1;
        true
    }
}

/// Where a loaded immediate is.
fn slot(number: usize) -> Mem {
    Mem::Base(RSP, context_offset!(hot.immediates) + number as i32 * 8)
}

/// Of the form `op r, r/m`; TEST is the same both ways round.
fn opcode(mnemonic: Mnemonic) -> u8 {
    match mnemonic {
        Mnemonic::Add => 0x03,
        Mnemonic::Or => 0x0b,
        Mnemonic::Adc => 0x13,
        Mnemonic::Sbb => 0x1b,
        Mnemonic::And => 0x23,
        Mnemonic::Sub => 0x2b,
        Mnemonic::Xor => 0x33,
        Mnemonic::Cmp => 0x3b,
        Mnemonic::Test => 0x85,
        // MOV
        _ => 0x8b,
    }
}
