//! The border between Rust and emitted code.

/// Fields of a [`crate::Vcpu`] that only emitted code and its entry use.
#[repr(C)]
#[derive(Default)]
pub struct Hot {
    /// The host's stack pointer while guest code runs.
    pub host_rsp: u64,
}
