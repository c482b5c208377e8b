//! The local APIC (being written).
use crate::Vcpu;
/// A vCPU's local APIC.
#[derive(Default)]
pub struct Apic;
impl Vcpu {
    /// A read of the local APIC's page; false if `gpa` is not there.
    pub fn apic_mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool { let _ = (gpa, data); false }
    /// A write to the local APIC's page; false if `gpa` is not there.
    pub fn apic_mmio_write(&mut self, gpa: u64, data: &[u8]) -> bool { let _ = (gpa, data); false }
}
