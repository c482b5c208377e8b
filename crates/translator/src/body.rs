//! [`Body`]: what a translation knows of its code, wherever in guest and host memory it stands.
//!
//! The same physical page is often mapped at other addresses in the next process: shared libraries under address space
//! layout randomization. Its code is then not translated again: the host code is copied, and what depends on where it
//! stands is put right ([`Body::relocate`]). All positions here are relative: to the block's first host byte, and to its first
//! guest byte.

use std::ops::Range;

use iced_x86::Instruction;
use memory::PAGE_SIZE;

use crate::code_memory::{jump_index, jump_key};
use crate::mode::{CodeSegment, Mode};
use crate::record::Record;

/// Where code comes from, whatever address it is mapped at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    /// The frame (see `phys`), and in the low bits the offset in it.
    pub address: u64,
    pub mode: Mode,
    pub segment: CodeSegment,
}

impl Origin {
    pub fn frame(self) -> u64 {
        self.address & !(PAGE_SIZE - 1)
    }

    /// What the jump table knows the code by if it is at `rip`.
    pub fn jump_key(self, rip: u64) -> u64 {
        jump_key(rip, self.segment)
    }
}

/// Where a guest instruction's host code begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    pub host_offset: u16,
    pub guest_offset: u16,
    /// The true arithmetic flags are in `near.saved_ax` when the operation itself runs.
    pub parked: bool,
}

/// A slow-path call of a memory access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Where the call returns to.
    pub return_offset: u16,
    /// Index of the instruction's [`Point`].
    pub point: u8,
    pub parked: bool,
}

/// A direct branch: to a guest address in the same page, or, of kernels, in any (see [`crate::cache`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// The stub that leaves to the dispatcher (of a detour: nothing), and where its call returns to.
    pub stub_offset: u16,
    pub return_offset: u16,
    /// The branch's rel32.
    pub patch_offset: u16,
    /// The target's distance from the block's first guest byte.
    pub target: i32,
    /// The branch leaves with the flags parked.
    pub parked: bool,
    /// The branch is that of a group's failed check to careful code (see [`crate::codegen::groups`]), the call its slow path's.
    pub detour: bool,
}

impl Link {
    /// The link of a group's failed check. Behind its slow path's call stand two jumps: back to the body, and the one that a link
    /// leads to careful code; `end` is their end, where that one leads while there is no link.
    pub fn detour(end: u16, target: i32, parked: bool) -> Self {
        const JUMP: u16 = 5;
        Link {
            stub_offset: end,
            return_offset: end.saturating_sub(2 * JUMP),
            patch_offset: end.saturating_sub(4),
            target,
            parked,
            detour: true,
        }
    }

    /// Whether it leads from a block at an offset of a page to another page.
    pub fn is_far(self, offset: usize) -> bool {
        let target = (offset % PAGE_SIZE as usize) as i64 + i64::from(self.target);
        !(0..PAGE_SIZE as i64).contains(&target)
    }
}

/// How a field of host code depends on where the code stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// A guest address as a zero-extended, a sign-extended or a full immediate.
    Address32,
    AddressSigned,
    Address64,
    /// A displacement into the jump table, by the guest address.
    JumpIndex,
    /// The distance to a word in code memory.
    HostWord,
    /// The number of a sensitive instruction.
    Sensitive,
}

impl Field {
    pub const ALL: [Field; 6] =
        [Field::Address32, Field::AddressSigned, Field::Address64, Field::JumpIndex, Field::HostWord, Field::Sensitive];

    /// The field depends on the guest address of the code, not only on where the host's copy is.
    pub fn is_guest_address(self) -> bool {
        !matches!(self, Field::HostWord | Field::Sensitive)
    }
}

/// A field that moving code changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relocation {
    pub offset: u16,
    pub field: Field,
    /// The guest address that it is about, from the block's first guest byte.
    pub delta: i32,
}

/// An immediate that stands in host code as it does in guest code.
#[derive(Clone, Copy, Debug)]
pub struct Immediate {
    pub host_offset: u16,
    pub guest_offset: u16,
    pub length: u8,
}

/// What serves to take up code again after its bytes were written: see [`crate::rewritten`].
#[derive(Clone, Debug)]
pub struct Template {
    /// The bytes at [`Record::lookahead`].
    pub ahead: Box<[u8]>,
    pub immediates: Box<[Immediate]>,
}

/// Where a copy of the code stands.
#[derive(Clone, Copy, Debug)]
pub struct Position {
    pub rip: u64,
    /// In code memory.
    pub host: usize,
}

/// See the [module](self).
#[derive(Clone, Copy, Debug)]
pub struct Body<'a> {
    pub origin: Origin,
    /// The frame of the bytes beyond the first page, if there are any.
    pub second_page: Option<u64>,
    /// Of the host code.
    pub length: u16,
    /// Where to enter with the flags parked.
    pub parked_entry: u16,
    /// The same for who comes by the jump table, if the block is [relative](crate::codegen::relative); or else zero.
    pub parked_way_in: u16,
    /// The code can stand at other guest addresses.
    pub movable: bool,
    /// It looks at its bytes itself: writes to them need not be noticed.
    pub checked: bool,
    pub record: Record<'a>,
}

impl Body<'_> {
    /// The part of its page that translation looked at.
    pub fn extent(&self) -> Range<usize> {
        let start = (self.origin.address % PAGE_SIZE) as usize;
        let end = (start + self.record.bytes.len()).min(PAGE_SIZE as usize);
        let ahead = self.record.lookahead();
        if ahead.is_empty() { start..end } else { start.min(ahead.start)..end.max(ahead.end) }
    }

    /// The part of the next page that its instructions reach into.
    pub fn beyond(&self) -> Range<usize> {
        let end = (self.origin.address % PAGE_SIZE) as usize + self.record.bytes.len();
        0..end.saturating_sub(PAGE_SIZE as usize)
    }

    /// The instruction at an offset, with its bytes, in code at `rip`.
    pub fn decode(&self, rip: u64, guest_offset: u16) -> Option<(Instruction, [u8; 15])> {
        let offset = guest_offset as usize;
        let rest = self.record.bytes.get(offset..)?;
        let insn = crate::access::decode(rest, self.origin.mode, rip.wrapping_add(offset as u64));
        let mut bytes = [0; 15];
        let length = insn.len().min(rest.len());
        bytes[..length].copy_from_slice(&rest[..length]);
        Some((insn, bytes))
    }

    /// Whether translation looked at any of these bytes of a frame.
    pub fn overlaps(&self, frame: u64, bytes: &Range<usize>) -> bool {
        let overlap = |span: Range<usize>| span.start < bytes.end && bytes.start < span.end;
        let start = (self.origin.address % PAGE_SIZE) as usize;
        let end = start + self.record.bytes.len();
        let of_first = || overlap(start..end.min(PAGE_SIZE as usize)) || overlap(self.record.lookahead());
        // Both may be one frame, mapped twice in a row.
        frame == self.origin.frame() && of_first() || self.second_page == Some(frame) && overlap(self.beyond())
    }

    /// The guest address that a link leads to from code at `rip`.
    pub fn target(&self, rip: u64, link: Link) -> u64 {
        target(self.origin.mode, rip, link)
    }

    /// Moves `code` to another position. `sensitive` gives the numbers of its sensitive instructions in order. False if it
    /// can't stand there: then `code` is of no use any more.
    pub fn relocate(
        &self,
        code: &mut [u8],
        from: Position,
        to: Position,
        mut sensitive: impl FnMut() -> Option<u32>,
    ) -> bool {
        let mode = self.origin.mode;
        // At its own address a block may hold what it can't hold elsewhere: 32-bit code at the very end of its 4 GiB.
        let same = from.rip == to.rip;
        for r in self.record.relocations().filter(|r| !(same && r.field.is_guest_address())) {
            let address = |rip: u64| wrap(mode, rip.wrapping_add_signed(r.delta.into()));
            let value = address(to.rip);
            let done = match r.field {
                Field::Address32 => u32::try_from(value).ok().and_then(|v| put(code, r.offset, v.to_le_bytes())),
                Field::AddressSigned if u32::try_from(value).is_ok() => None,
                Field::AddressSigned => {
                    i32::try_from(value as i64).ok().and_then(|v| put(code, r.offset, v.to_le_bytes()))
                }
                Field::Address64 if is_short(value) => None,
                Field::Address64 => put(code, r.offset, value.to_le_bytes()),
                Field::JumpIndex => {
                    let moved = (jump_index(value, mode) as i32 - jump_index(address(from.rip), mode) as i32) * 8;
                    add(code, r.offset, moved)
                }
                Field::HostWord => add(code, r.offset, (from.host as i32).wrapping_sub(to.host as i32)),
                Field::Sensitive => sensitive().and_then(|n| put(code, r.offset, n.to_le_bytes())),
            };
            if done.is_none() {
                return false;
            }
        }
        true
    }
}

/// Whether a constant has a shorter form than 64 bits.
fn is_short(value: u64) -> bool {
    u32::try_from(value).is_ok() || i32::try_from(value as i64).is_ok()
}

/// The guest address that a link leads to from code of a mode at `rip`.
pub fn target(mode: Mode, rip: u64, link: Link) -> u64 {
    wrap(mode, rip.wrapping_add_signed(link.target.into()))
}

fn wrap(mode: Mode, address: u64) -> u64 {
    if mode.long() { address } else { address & 0xffff_ffff }
}

fn put<const N: usize>(code: &mut [u8], offset: u16, bytes: [u8; N]) -> Option<()> {
    *code.get_mut(offset as usize..)?.first_chunk_mut::<N>()? = bytes;
    Some(())
}

fn add(code: &mut [u8], offset: u16, n: i32) -> Option<()> {
    let field = code.get_mut(offset as usize..)?.first_chunk_mut::<4>()?;
    *field = i32::from_le_bytes(*field).wrapping_add(n).to_le_bytes();
    Some(())
}

#[cfg(test)]
mod tests;
