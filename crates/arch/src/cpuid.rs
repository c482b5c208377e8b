//! CPUID models: what a virtual processor says it is.
//!
//! A [`CpuModel`] is a table of leaves, made from the host's own leaves (given by the caller, since executing CPUID is
//! behaviour) less what an engine can't keep, or from one of the psABI levels.

/// What CPUID returns for one leaf and sub-leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}
