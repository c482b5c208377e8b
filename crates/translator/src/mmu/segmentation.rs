//! From segment and offset to a linear address (Intel SDM 3A 3.4, 5.3-5.5): limits and types outside 64-bit mode,
//! canonical addresses inside it.

use arch::registers::{cr0, rflags};
use arch::{Exception, Segment, SegmentRegister, Vector};

use crate::cpu::Vcpu;

/// How far a segment reaches, for emitted code, which has bases and types from nowhere else: outside 64-bit mode, an
/// access whose end is not above these is allowed. Zero for what only [`Vcpu::linear`] can decide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Ends {
    pub read: u64,
    pub write: u64,
}

impl Ends {
    fn of(segment: &Segment, typed: bool) -> Self {
        if is_expand_down(segment) {
            return Ends::default();
        }
        let end = |write| if typed && !type_allows(segment, write) { 0 } else { u64::from(segment.limit) + 1 };
        Ends { read: end(false), write: end(true) }
    }
}

/// Bits 63:47 are all equal.
pub const fn is_canonical(address: u64) -> bool {
    (address << 16) as i64 >> 16 == address as i64
}

impl Vcpu {
    /// The linear address of `size` bytes at `offset` of a segment, if an access there is allowed: else #SS(0) for
    /// the stack segment and #GP(0) for others, or #AC(0) where alignment is checked. `offset` is already truncated
    /// to the address size.
    pub fn linear(&self, seg: SegmentRegister, offset: u64, size: usize, write: bool) -> Result<u64, Exception> {
        if let Some(address) = self.flat_address(seg, offset)
            && is_canonical(address)
        {
            // Before an end that isn't.
            self.check_alignment(address, size)?;
        }
        let address = self.linear_unaligned(seg, offset, size, write)?;
        self.check_alignment(address, size)?;
        Ok(address)
    }

    /// In 64-bit mode, the linear address, canonical or not.
    pub fn flat_address(&self, seg: SegmentRegister, offset: u64) -> Option<u64> {
        let base = match seg {
            SegmentRegister::Fs | SegmentRegister::Gs => self.seg(seg).base,
            _ => 0,
        };
        self.code64().then(|| base.wrapping_add(offset))
    }

    /// The same without the check of alignment.
    pub fn linear_unaligned(
        &self,
        seg: SegmentRegister,
        offset: u64,
        size: usize,
        write: bool,
    ) -> Result<u64, Exception> {
        Ok(if let Some(address) = self.flat_address(seg, offset) {
            let last = address.wrapping_add((size as u64).saturating_sub(1));
            if !is_canonical(address) || !is_canonical(last) {
                return Err(segment_fault(seg));
            }
            address
        } else {
            let segment = self.seg(seg);
            let typed = self.protected_mode() && !self.v8086();
            if typed && !type_allows(segment, write) || !limit_allows(segment, offset, size) {
                return Err(segment_fault(seg));
            }
            segment.base.wrapping_add(offset) & 0xffff_ffff
        })
    }

    /// Tells emitted code about the segments as they are now.
    pub fn find_segment_ends(&mut self) {
        let typed = self.protected_mode() && !self.v8086();
        let known = &mut self.engine.ends_of;
        if *known != (self.segments, typed) {
            *known = (self.segments, typed);
            self.hot.segment_ends = std::array::from_fn(|i| Ends::of(&self.segments[i], typed));
        }
    }

    /// #AC(0) for an unaligned access of a program with alignment checks on (Intel SDM 3A 6.15, interrupt 17).
    pub fn check_alignment(&self, address: u64, size: usize) -> Result<(), Exception> {
        let checked = self.rflags & rflags::AC != 0 && self.cr0 & cr0::AM != 0 && matches!(size, 2 | 4 | 8);
        if checked && address & (size as u64 - 1) != 0 && self.cpl() == 3 {
            return Err(Exception::new(Vector::AlignmentCheck));
        }
        Ok(())
    }

    /// Whether the stack pointer is SP, ESP or RSP: 2, 4 or 8 bytes.
    pub fn stack_width(&self) -> usize {
        if self.code64() {
            8
        } else if self.seg(SegmentRegister::Ss).default_big() {
            4
        } else {
            2
        }
    }
}

fn segment_fault(seg: SegmentRegister) -> Exception {
    match seg {
        SegmentRegister::Ss => Exception::new(Vector::StackFault),
        _ => Exception::general_protection(0),
    }
}

/// Whether a segment's type lets it be read or written as data; an unusable (null) one does neither.
fn type_allows(segment: &Segment, write: bool) -> bool {
    let (code, second) = (segment.kind() & 8 != 0, segment.kind() & 2 != 0);
    segment.present() && if write { !code && second } else { !code || second }
}

fn is_expand_down(segment: &Segment) -> bool {
    segment.kind() & 0xc == 4 && segment.attributes & Segment::S != 0
}

/// Whether `size` bytes at `offset` lie within a segment (Intel SDM 3A 5.3).
pub fn limit_allows(segment: &Segment, offset: u64, size: usize) -> bool {
    let last = offset.wrapping_add((size as u64).saturating_sub(1));
    let limit = u64::from(segment.limit);
    if is_expand_down(segment) {
        let top = if segment.default_big() { 0xffff_ffff } else { 0xffff };
        offset > limit && last <= top && last >= offset
    } else {
        // With the whole 4 GiB an access wraps around instead.
        limit == 0xffff_ffff && offset <= limit || last <= limit && last >= offset
    }
}
