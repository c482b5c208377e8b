//! The XSAVE area: in the standard format on both sides. PKRU is apart in [`CpuState`], and in the area here.

use arch::CpuState;

use super::Context;
use crate::{Error, calls};

/// Where XSTATE_BV is, and the end of the header (Intel SDM 1 13.4.2).
const XSTATE_BV: usize = 512;
const HEADER_END: usize = 576;
/// The component of the SSE registers, and where they are.
const SSE: u64 = 1 << 1;
const XMM: std::ops::Range<usize> = 160..416;
/// The state component of protection keys (Intel SDM 1 13.1).
const PKRU: u32 = 9;

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

/// The area, as large as the processor model has it, and PKRU.
pub fn read(context: &Context<'_>) -> Result<(Vec<u8>, u32), Error> {
    let mut area = vec![0; context.vm.xsave_size.div_ceil(4)];
    calls::get_xsave(context.fd, &mut area, context.vm.has_xsave2).map_err(Error::call("give the XSAVE area"))?;
    let mut bytes: Vec<u8> = area.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.truncate(context.xsave_size);
    let mut pkru = 0;
    if let Some(offset) = context.vm.pkru_offset {
        let present = word(&bytes, XSTATE_BV) & 1 << PKRU != 0;
        if let Some(place) = bytes.get_mut(offset..).and_then(|b| b.first_chunk_mut::<8>()) {
            pkru = if present { u64::from_le_bytes(*place) as u32 } else { 0 };
            *place = [0; 8];
        }
    }
    let in_use = word(&bytes, XSTATE_BV) & !(1 << PKRU);
    if let Some(place) = bytes.get_mut(XSTATE_BV..).and_then(|b| b.first_chunk_mut::<8>()) {
        *place = in_use.to_le_bytes();
    }
    Ok((bytes, pkru))
}

/// Sets all state components: to what the area says, or to their initial state.
pub fn write(context: &Context<'_>, state: &CpuState) -> Result<(), Error> {
    let most = context.vm.xsave_size;
    let length = state.xsave.len();
    if length != 0 && !(HEADER_END..=most).contains(&length) {
        return Err(Error::State(format!("the XSAVE area has {length} bytes instead of {HEADER_END} to {most}")));
    }
    let mut bytes = vec![0; most];
    match bytes.get_mut(..length).filter(|_| length != 0) {
        Some(place) => place.copy_from_slice(&state.xsave),
        // x87 control word and MXCSR after reset; what isn't in XSTATE_BV is initial, but MXCSR is always taken.
        None => {
            bytes.splice(0..2, 0x037fu16.to_le_bytes());
            bytes.splice(24..28, 0x1f80u32.to_le_bytes());
        }
    }
    let mut in_use = word(&bytes, XSTATE_BV) & context.vm.xcr0_mask() & !(1 << PKRU);
    if in_use & SSE == 0 {
        // The kernel takes MXCSR only along with the registers, which are zero in their initial state.
        if let Some(registers) = bytes.get_mut(XMM) {
            registers.fill(0);
        }
        in_use |= SSE;
    }
    if let Some(offset) = context.vm.pkru_offset.filter(|_| state.pkru != 0)
        && let Some(place) = bytes.get_mut(offset..).and_then(|b| b.first_chunk_mut::<8>())
    {
        *place = u64::from(state.pkru).to_le_bytes();
        in_use |= 1 << PKRU;
    }
    // XCOMP_BV and what is reserved behind it are zero in the standard format.
    if let Some(header) = bytes.get_mut(XSTATE_BV..HEADER_END) {
        header.fill(0);
        header.iter_mut().zip(in_use.to_le_bytes()).for_each(|(to, from)| *to = from);
    }
    let area: Vec<u32> =
        bytes.chunks(4).map(|chunk| chunk.iter().rev().fold(0, |w, byte| w << 8 | u32::from(*byte))).collect();
    calls::set_xsave(context.fd, &area)
        .map_err(|error| Error::State(format!("KVM does not take its XSAVE area ({error})")))
}
