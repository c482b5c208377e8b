//! The layout of the XSAVE area (Intel SDM 1 13.4).

use super::{Feature, FeatureSet, Leaf};
use crate::registers::xcr0;

/// The legacy region and the XSAVE header, which every area has.
const HEADER_END: u32 = 576;

/// One state component beyond x87 and SSE.
#[derive(Clone, Copy, Debug)]
struct Component {
    index: u32,
    size: u32,
    /// In the standard format.
    offset: u32,
    /// In the compacted format it starts at a multiple of 64.
    aligned: bool,
}

/// The components that a processor has. Offsets are the host's, whose XSAVE instructions fill the area.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    mask: u64,
    components: Vec<Component>,
}

impl Layout {
    pub fn new(features: FeatureSet, host: &dyn Fn(u32, u32) -> Leaf) -> Self {
        let mut mask = 0;
        for (feature, bits) in [
            (Feature::Xsave, xcr0::X87 | xcr0::SSE),
            (Feature::Avx, xcr0::AVX),
            (Feature::Avx512f, xcr0::AVX512),
            (Feature::Pku, xcr0::PKRU),
        ] {
            mask |= if features.has(feature) { bits } else { 0 };
        }
        let mut components = Vec::new();
        for index in (2..63).filter(|i| mask & 1 << i != 0) {
            let leaf = host(0xd, index);
            let component = Component { index, size: leaf.eax, offset: leaf.ebx, aligned: leaf.ecx & 2 != 0 };
            components.push(match component.size {
                // A host without protection keys: the engine stores PKRU itself, behind all else.
                0 => Component { size: 8, offset: end(&components).next_multiple_of(64), ..component },
                _ => component,
            });
        }
        Layout { mask, components }
    }

    pub fn mask(&self) -> u64 {
        self.mask
    }

    /// Bytes of a standard-format area for `xcr0`.
    pub fn standard_size(&self, xcr0: u64) -> u32 {
        match self.mask {
            0 => 0,
            _ => end(self.components.iter().filter(|c| xcr0 & 1 << c.index != 0)),
        }
    }

    /// Bytes of a compacted area with the components of `requested` (Intel SDM 1 13.4.3).
    pub fn compacted_size(&self, requested: u64) -> u32 {
        self.components.iter().filter(|c| requested & 1 << c.index != 0).fold(HEADER_END, |end, c| {
            let start = if c.aligned { end.next_multiple_of(64) } else { end };
            start.saturating_add(c.size)
        })
    }

    /// Leaf 0xd's sub-leaves of the components (Intel SDM 1 13.2).
    pub fn leaves(&self) -> impl Iterator<Item = (u32, Leaf)> {
        self.components
            .iter()
            .map(|c| (c.index, Leaf { eax: c.size, ebx: c.offset, ecx: if c.aligned { 2 } else { 0 }, edx: 0 }))
    }
}

fn end<'a>(components: impl IntoIterator<Item = &'a Component>) -> u32 {
    components.into_iter().map(|c| c.offset.saturating_add(c.size)).max().unwrap_or(0).max(HEADER_END)
}
