//! From devices to local APICs: messages, the 8259's output, NMIs.
//!
//! A level-triggered message's end must come back to the I/O APIC, and KVM reports the end only of vectors that stand
//! in its table of routes (`Documentation/virt/kvm/api.rst`, KVM_CAP_SPLIT_IRQCHIP). [`LevelRoutes`] keeps there the
//! level-triggered messages that were sent last, so that no more than the messages themselves has to be known here.

use std::sync::{Arc, PoisonError};

use engine::Interrupts;
use kvm_bindings::*;

use crate::vm::Vm;

/// MSI data: level-triggered (Intel SDM 3A 11.11.2).
const LEVEL_TRIGGERED: u32 = 1 << 15;
/// MSI data: delivery mode NMI.
const NMI: u32 = 4 << 8;
/// Where messages to local APICs go.
const APIC_ADDRESS: u64 = 0xfee0_0000;

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

/// The low word of a message's address without the bits that [`high`] takes from it.
fn low(address: u64) -> u32 {
    address as u32 & !0xfe0
}

/// Bits 11:5 extend the destination to 15 bits (`Documentation/virt/kvm/x86/cpuid.rst`, KVM_FEATURE_MSI_EXT_DEST_ID);
/// the kernel has them in bits 31:8 of the high word.
fn high(address: u64) -> u32 {
    (address as u32 >> 5 & 0x7f) << 8
}

impl Interrupts for Messages {
    fn send_msi(&self, address: u64, data: u32) {
        if address >> 20 != APIC_ADDRESS >> 20 {
            return;
        }
        if data & LEVEL_TRIGGERED != 0 {
            let mut routes = self.0.routes.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(table) = routes.sent(address, data)
                && let Err(error) = self.0.fd.set_gsi_routing(table)
            {
                tracing::warn!(%error, "the ends of a level-triggered interrupt will be missed");
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
}

/// A level-triggered message that is in the kernel's table.
#[derive(Clone, Copy)]
struct Route {
    address: u64,
    data: u32,
    /// The larger, the later it was sent.
    used: u64,
    /// It was sent, and its end has not come yet.
    open: bool,
}

/// The level-triggered messages whose end the kernel reports.
#[derive(Default)]
pub struct LevelRoutes {
    routes: Vec<Route>,
    clock: u64,
    table: Option<KvmIrqRouting>,
}

impl LevelRoutes {
    /// More than an I/O APIC has inputs, so that those of which an end is awaited always have a place.
    pub const SLOTS: usize = 64;

    /// A message is about to be sent. If the kernel doesn't know it yet, the table that it is to be given.
    fn sent(&mut self, address: u64, data: u32) -> Option<&KvmIrqRouting> {
        self.clock += 1;
        let route = Route { address, data, used: self.clock, open: true };
        if let Some(known) = self.routes.iter_mut().find(|r| (r.address, r.data) == (address, data)) {
            *known = route;
            return None;
        }
        if self.routes.len() < Self::SLOTS {
            self.routes.push(route);
        } else if let Some(oldest) = self.routes.iter_mut().min_by_key(|r| (r.open, r.used)) {
            *oldest = route;
        }
        let entries: Vec<_> = (0..).zip(&self.routes).map(|(gsi, route)| entry(gsi, route)).collect();
        // As many as fit: the limit is far above ours.
        self.table = KvmIrqRouting::from_entries(&entries).ok();
        self.table.as_ref()
    }

    /// The kernel reported the end of `vector`.
    pub fn ended(&mut self, vector: u8) {
        self.routes.iter_mut().filter(|r| r.data as u8 == vector).for_each(|r| r.open = false);
    }
}

fn entry(gsi: u32, route: &Route) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        address_lo: low(route.address),
        address_hi: high(route.address),
        data: route.data,
        ..Default::default()
    };
    let u = kvm_irq_routing_entry__bindgen_ty_1 { msi };
    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, u, ..Default::default() }
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
    fn a_message_that_is_known_changes_no_route() {
        let mut routes = LevelRoutes::default();
        assert_eq!(routes.sent(0xfee0_0000, 0xc030).map(|t| t.as_slice().len()), Some(1));
        assert!(routes.sent(0xfee0_0000, 0xc030).is_none());
        assert_eq!(routes.sent(0xfee0_1000, 0xc030).map(|t| t.as_slice().len()), Some(2));
    }

    #[test]
    fn a_message_whose_end_is_awaited_keeps_its_route() {
        let mut routes = LevelRoutes::default();
        routes.sent(0xfee0_0000, 0xc030);
        for vector in 0..200 {
            routes.sent(0xfee0_1000, 0xc000 | vector);
            if vector as u8 != 0x30 {
                routes.ended(vector as u8);
            }
        }
        assert!(routes.sent(0xfee0_0000, 0xc030).is_none());
        assert!(routes.sent(0xfee0_1000, 0xc000).is_some(), "this one had to go");
        assert_eq!(routes.routes.len(), LevelRoutes::SLOTS);
    }
}
