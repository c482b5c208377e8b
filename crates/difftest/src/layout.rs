//! Where everything lies, at the same virtual addresses in the native child process and in the guest.
//!
//! All of it is below 2 GiB, so that 32-bit code and RIP-relative operands reach it.

/// Code: [`SLOTS`] slots of [`SLOT_SIZE`] bytes, readable, writable and executable. Each case of a batch has its own slot, so
/// that the translator's cached code is dropped once a batch and not once a case.
pub const CODE: u64 = 0x1000_0000;
pub const SLOT_SIZE: usize = 1024;
pub const SLOTS: usize = 256;
/// Slot 0 begins in the middle of a page, so that every fourth slot has a page boundary in its middle and
/// the last one ends at the region's end, with nothing mapped behind it.
pub const SLOT_SHIFT: u64 = 512;
/// As many slots as code in a segment of 64 KiB can have.
pub const SEGMENT_SLOTS: usize = 62;
pub const CODE_SIZE: usize = SLOTS * SLOT_SIZE;
/// Where a case's code begins in its slot, unless it is to straddle the page boundary at [`SLOT_MIDDLE`].
pub const SLOT_ENTRY: usize = 256;
pub const SLOT_MIDDLE: usize = 512;

/// The address of a slot.
pub const fn slot_address(slot: usize) -> u64 {
    CODE + SLOT_SHIFT + (slot * SLOT_SIZE) as u64
}

/// How much of a slot is mapped.
pub const fn slot_size(slot: usize) -> usize {
    if slot == SLOTS - 1 { SLOT_SIZE - SLOT_SHIFT as usize } else { SLOT_SIZE }
}

/// Data: six pages, of which the first two and the fifth are writable, the third is read-only, the others unmapped.
pub const DATA: u64 = 0x1010_0000;
pub const PAGE: usize = 4096;
/// The pages of the data region that a case may write.
pub const WRITABLE: [u64; 3] = [DATA, DATA + PAGE as u64, DATA + 4 * PAGE as u64];
pub const READ_ONLY: u64 = DATA + 2 * PAGE as u64;
/// Bytes of writable memory: what a case starts with and what is compared afterwards.
pub const MEMORY: usize = WRITABLE.len() * PAGE;

/// The offset of a data address in the [`MEMORY`] bytes of a case, if `len` bytes from it are writable and contiguous there.
pub fn memory_offset(address: u64, len: usize) -> Option<usize> {
    let offset = address.wrapping_sub(DATA) as usize;
    let end = offset.checked_add(len)?;
    if end <= 2 * PAGE {
        Some(offset)
    } else if offset >= 4 * PAGE && end <= 5 * PAGE {
        Some(offset - 2 * PAGE)
    } else {
        None
    }
}

/// The selectors that Linux gives to user code; the guest's descriptor table is laid out to agree.
pub const USER_CODE32: u16 = 0x23;
pub const USER_DATA: u16 = 0x2b;
pub const USER_CODE64: u16 = 0x33;
