//! From devices to local APICs: messages, the 8259's output, NMIs.
//!
//! A level-triggered message's end must come back to the I/O APIC, and KVM reports the end only of vectors that stand
//! in its table of routes ([`crate::routes`]): so there they are before they are sent. A message that a device sends again
//! and again gets a route as well, and an event that sends it (irqfd): [`crate::source`].

use std::sync::Arc;

use engine::{Interrupts, MessageSource};
use kvm_bindings::*;

use crate::source::Source;
use crate::vm::Vm;

/// MSI data: level-triggered (Intel SDM 3A 11.11.2).
const LEVEL_TRIGGERED: u32 = 1 << 15;
/// MSI data: delivery mode NMI.
const NMI: u32 = 4 << 8;
/// Where messages to local APICs go.
pub const APIC_ADDRESS: u64 = 0xfee0_0000;

/// How devices reach the vCPUs.
pub struct Messages(pub Arc<Vm>);

impl Messages {
    fn signal(&self, address: u64, data: u32) {
        let message = kvm_msi { address_lo: low(address), address_hi: high(address), data, ..Default::default() };
        if let Err(error) = self.0.fd.signal_msi(message) {
            // What the guest has put together may name no processor at all.
            tracing::debug!(%error, address, data, "an interrupt message goes nowhere");
        }
    }
}

/// Whether a message goes to local APICs at once and nothing comes back from it.
pub fn is_edge(address: u64, data: u32) -> bool {
    address >> 20 == APIC_ADDRESS >> 20 && data & LEVEL_TRIGGERED == 0
}

/// The low word of a message's address without the bits that [`high`] takes from it.
pub fn low(address: u64) -> u32 {
    address as u32 & !0xfe0
}

/// Bits 11:5 extend the destination to 15 bits (`Documentation/virt/kvm/x86/cpuid.rst`, KVM_FEATURE_MSI_EXT_DEST_ID);
/// the kernel has them in bits 31:8 of the high word.
pub fn high(address: u64) -> u32 {
    (address as u32 >> 5 & 0x7f) << 8
}

impl Interrupts for Messages {
    fn send_msi(&self, address: u64, data: u32) {
        if address >> 20 != APIC_ADDRESS >> 20 {
            return;
        }
        if data & LEVEL_TRIGGERED != 0 {
            let mut routes = self.0.routes();
            if routes.level_sent(address, data)
                && let Err(error) = routes.tell(&self.0.fd)
            {
                tracing::warn!("the ends of a level-triggered interrupt will be missed: {error}");
            }
        }
        self.signal(address, data);
    }

    fn set_pic_output(&self, asserted: bool) {
        self.0.set_pic_output(asserted);
    }

    fn send_nmi(&self, vcpu: u32) {
        let (low, extended) = (u64::from(vcpu & 0xff), u64::from(vcpu >> 8 & 0x7f));
        self.signal(APIC_ADDRESS | low << 12 | extended << 5, NMI);
    }

    fn message_source(&self) -> Option<Box<dyn MessageSource>> {
        self.0.has_irqfd.then(|| Box::new(Source::new(self.0.clone())) as Box<dyn MessageSource>)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_of_15_bits_are_split_as_the_kernel_has_them() {
        assert_eq!((low(0xfee3_4000), high(0xfee3_4000)), (0xfee3_4000, 0));
        assert_eq!((low(0xfee0_1040), high(0xfee0_1040)), (0xfee0_1000, 0x200));
    }

    #[test]
    fn only_edges_to_local_apics_can_be_sent_by_an_event() {
        assert!(is_edge(0xfee0_1000, 0x41));
        assert!(!is_edge(0xfee0_1000, 0xc041) && !is_edge(0x1000, 0x41) && !is_edge(0x1_fee0_1000, 0x41));
    }
}
