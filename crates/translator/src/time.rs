//! Virtual time (being written).
/// The clocks all vCPUs share.
#[derive(Default)]
pub struct Time;
