//! Which bytes of a memory operand an instruction really accesses.
//!
//! Masked moves (VMASKMOV, VPMASKMOV) and most EVEX instructions under an opmask raise no fault for elements that are
//! masked out, and don't access them (Intel SDM 2A 2.7.5). Their inline path is safe where the whole operand lies in
//! one ordinary page; where it does not, the slow path asks here which bytes it may touch.

use iced_x86::{EncodingKind, Instruction, MemorySize, Mnemonic, OpKind, Register};

use crate::cpu::{Vcpu, XsaveArea};

/// A bit for each byte of the memory operand, the lowest for the first; `None` if the instruction accesses it whole.
pub fn masked_bytes(cpu: &Vcpu, insn: &Instruction) -> Option<u64> {
    masked_in(&cpu.xsave, insn)
}

fn masked_in(state: &XsaveArea, insn: &Instruction) -> Option<u64> {
    use Mnemonic::*;
    match insn.mnemonic() {
        Vmaskmovps | Vpmaskmovd => Some(sign_mask(state, insn, 4)),
        Vmaskmovpd | Vpmaskmovq => Some(sign_mask(state, insn, 8)),
        _ if insn.op_mask() == Register::None || insn.encoding() != EncodingKind::EVEX => None,
        _ if !(0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory) => None,
        // The count of a shift; what is shifted by an immediate count is masked as usual.
        Vpsllw | Vpslld | Vpsllq | Vpsrlw | Vpsrld | Vpsrlq | Vpsraw | Vpsrad | Vpsraq
            if insn.op2_kind() == OpKind::Memory =>
        {
            None
        }
        mnemonic if accesses_all(mnemonic) => None,
        _ => Some(by_opmask(state, insn)),
    }
}

/// The mask of VMASKMOV and VPMASKMOV: the sign bits of the elements of the second operand.
fn sign_mask(state: &XsaveArea, insn: &Instruction, size: usize) -> u64 {
    let mask = state.vector(vector_index(insn.op1_register()));
    let elements = insn.memory_size().size() / size;
    let selected = (0..elements).filter(|i| mask[(i + 1) * size - 1] & 0x80 != 0);
    selected.fold(0, |bytes, i| bytes | element(i, size))
}

/// The bytes of element `i`.
fn element(i: usize, size: usize) -> u64 {
    low_bits(size) << (i * size)
}

fn low_bits(count: usize) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

/// The number of an xmm, ymm or zmm register.
pub fn vector_index(register: Register) -> usize {
    match register {
        r if r.is_xmm() => r as usize - Register::XMM0 as usize,
        r if r.is_ymm() => r as usize - Register::YMM0 as usize,
        r if r.is_zmm() => r as usize - Register::ZMM0 as usize,
        _ => 0,
    }
}

/// The number of an opmask register.
pub fn opmask_index(register: Register) -> usize {
    (register as usize).wrapping_sub(Register::K0 as usize) & 7
}

fn by_opmask(state: &XsaveArea, insn: &Instruction) -> u64 {
    use Mnemonic::*;
    let mask = state.opmask(opmask_index(insn.op_mask()));
    let size = insn.memory_size().size();
    let granule = granule(insn);
    // Of the operand's elements; where the operand is broadcast, the first again and again.
    let elements = (size / granule).max(1);
    let lanes = if insn.is_broadcast() || repeats(insn.mnemonic()) { lanes(insn, granule) } else { elements };
    let mask = mask & low_bits(lanes);
    match insn.mnemonic() {
        // These pack the selected elements.
        Vcompressps | Vcompresspd | Vpcompressb | Vpcompressw | Vpcompressd | Vpcompressq | Vexpandps | Vexpandpd
        | Vpexpandb | Vpexpandw | Vpexpandd | Vpexpandq => low_bits(mask.count_ones() as usize * granule),
        _ => {
            let selected = (0..lanes).filter(|i| mask >> i & 1 != 0);
            selected.fold(0, |bytes, i| bytes | element(i % elements, granule))
        }
    }
}

/// How many bytes of the memory operand one bit of the mask stands for.
fn granule(insn: &Instruction) -> usize {
    use Mnemonic::*;
    match insn.mnemonic() {
        Vpdpbusd | Vpdpbusds | Vpdpwssd | Vpdpwssds | Vfcmaddcsh | Vfcmulcsh | Vfmaddcsh | Vfmulcsh => 4,
        Vpmuldq | Vpmuludq => 8,
        _ => insn.memory_size().element_size().max(1),
    }
}

/// How many elements of `granule` bytes a broadcast feeds.
fn lanes(insn: &Instruction, granule: usize) -> usize {
    if insn.is_broadcast() {
        return broadcast_width(insn.memory_size()) / granule;
    }
    insn.op0_register().size() / granule
}

/// The bytes that an embedded broadcast makes of its element: less than the vector length where elements get wider.
fn broadcast_width(size: MemorySize) -> usize {
    use MemorySize::*;
    match size {
        Broadcast32_Float16 => 4,
        Broadcast64_Float16 | Broadcast64_Float32 | Broadcast64_Int32 | Broadcast64_UInt32 => 8,
        Broadcast128_2xBFloat16
        | Broadcast128_2xFloat16
        | Broadcast128_2xInt16
        | Broadcast128_2xInt32
        | Broadcast128_2xUInt32
        | Broadcast128_Float16
        | Broadcast128_Float32
        | Broadcast128_Float64
        | Broadcast128_Int16
        | Broadcast128_Int32
        | Broadcast128_Int64
        | Broadcast128_UInt16
        | Broadcast128_UInt32
        | Broadcast128_UInt52
        | Broadcast128_UInt64 => 16,
        Broadcast256_2xBFloat16
        | Broadcast256_2xFloat16
        | Broadcast256_2xInt16
        | Broadcast256_2xInt32
        | Broadcast256_2xUInt32
        | Broadcast256_Float16
        | Broadcast256_Float32
        | Broadcast256_Float64
        | Broadcast256_Int16
        | Broadcast256_Int32
        | Broadcast256_Int64
        | Broadcast256_UInt16
        | Broadcast256_UInt32
        | Broadcast256_UInt52
        | Broadcast256_UInt64 => 32,
        _ => 64,
    }
}

/// The broadcast instructions.
fn repeats(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Vbroadcastss
            | Vbroadcastsd
            | Vbroadcastf32x2
            | Vbroadcastf32x4
            | Vbroadcastf32x8
            | Vbroadcastf64x2
            | Vbroadcastf64x4
            | Vbroadcasti32x2
            | Vbroadcasti32x4
            | Vbroadcasti32x8
            | Vbroadcasti64x2
            | Vbroadcasti64x4
            | Vpbroadcastb
            | Vpbroadcastw
            | Vpbroadcastd
            | Vpbroadcastq
    )
}

/// Instructions whose exception class has no fault suppression (Intel SDM 2A 2.8, the classes with "NF"), as the test
/// finds them on a processor. VEXTRACT is one too, but it stores: it must not write what is masked out, and so misses the
/// fault of a page of which it would write nothing.
fn accesses_all(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Valignd
            | Valignq
            | Vmovddup
            | Vmovshdup
            | Vmovsldup
            | Vpconflictd
            | Vpconflictq
            | Vpshufd
            | Vpshufhw
            | Vpshuflw
            | Vcvtne2ps2bf16
            | Vdbpsadbw
            | Vgf2p8affineinvqb
            | Vgf2p8affineqb
            | Vinsertf32x4
            | Vinsertf32x8
            | Vinsertf64x2
            | Vinsertf64x4
            | Vinserti32x4
            | Vinserti32x8
            | Vinserti64x2
            | Vinserti64x4
            | Vpackssdw
            | Vpacksswb
            | Vpackusdw
            | Vpackuswb
            | Vpalignr
            | Vpermb
            | Vpermd
            | Vpermi2b
            | Vpermi2d
            | Vpermi2pd
            | Vpermi2ps
            | Vpermi2q
            | Vpermi2w
            | Vpermilpd
            | Vpermilps
            | Vpermpd
            | Vpermps
            | Vpermq
            | Vpermt2b
            | Vpermt2d
            | Vpermt2pd
            | Vpermt2ps
            | Vpermt2q
            | Vpermt2w
            | Vpermw
            | Vpmaddubsw
            | Vpmaddwd
            | Vpmultishiftqb
            | Vpshufb
            | Vpunpckhbw
            | Vpunpckhdq
            | Vpunpckhqdq
            | Vpunpckhwd
            | Vpunpcklbw
            | Vpunpckldq
            | Vpunpcklqdq
            | Vpunpcklwd
            | Vshuff32x4
            | Vshuff64x2
            | Vshufi32x4
            | Vshufi64x2
            | Vshufpd
            | Vshufps
            | Vunpckhpd
            | Vunpckhps
            | Vunpcklpd
            | Vunpcklps
    )
}

#[cfg(test)]
mod tests;
