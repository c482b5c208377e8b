//! Sleeping while halted (being written).
/// Where a vCPU's thread sleeps while halted.
#[derive(Default)]
pub struct Parker;
impl Parker {
    pub fn wake(&self) {}
}
