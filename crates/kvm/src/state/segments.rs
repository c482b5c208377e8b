//! Segment registers as the kernel has them: the descriptor's bits one by one.

use arch::Segment;
use kvm_bindings::kvm_segment;

/// Bit positions in [`Segment::attributes`].
const AVL: u16 = 1 << 12;

pub fn from_segment(segment: &kvm_segment) -> Segment {
    // An unusable register has whatever was in it before; all that counts of it is its base (FS and GS in 64-bit mode).
    if segment.unusable != 0 || segment.present == 0 {
        return Segment { base: segment.base, limit: 0, attributes: 0, selector: segment.selector };
    }
    let flag = |set: u8, bit: u16| if set != 0 { bit } else { 0 };
    let attributes = u16::from(segment.type_ & 0xf)
        | flag(segment.s, Segment::S)
        | u16::from(segment.dpl & 3) << 5
        | Segment::P
        | flag(segment.avl, AVL)
        | flag(segment.l, Segment::L)
        | flag(segment.db, Segment::DB)
        | flag(segment.g, Segment::G);
    Segment { base: segment.base, limit: segment.limit, attributes, selector: segment.selector }
}

pub fn to_segment(segment: &Segment) -> kvm_segment {
    let bit = |bit: u16| u8::from(segment.attributes & bit != 0);
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: segment.kind(),
        present: bit(Segment::P),
        dpl: segment.dpl(),
        db: bit(Segment::DB),
        s: bit(Segment::S),
        l: bit(Segment::L),
        g: bit(Segment::G),
        avl: bit(AVL),
        unusable: u8::from(!segment.present()),
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arch::CpuState;

    #[test]
    fn segments_survive_the_way_through_the_kernels_form() {
        let reset = CpuState::reset();
        let long = Segment::flat_code(0x10, true, 3);
        let task = Segment { base: 0xffff_8000_0000_3000, limit: 0x67, attributes: Segment::P | 0xb, selector: 0x40 };
        let fs = Segment { base: 0x7fff_1234_5678, ..Segment::default() };
        for segment in reset.segments.iter().chain([&reset.tr, &reset.ldtr, &long, &task, &fs]) {
            assert_eq!(from_segment(&to_segment(segment)), *segment);
        }
    }
}
