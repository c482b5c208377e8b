//! The dispatcher.

/// The dispatcher's and the cache's own state.
#[derive(Default)]
pub struct EngineState {}

impl EngineState {
    /// Forgets which virtual address leads to which block.
    pub fn drop_address_caches(&mut self) {}
}
