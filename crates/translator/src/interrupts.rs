//! Interrupt messages: from devices ([`engine::Interrupts`]) and between local APICs, to the vCPUs that they name.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::apic::registers::lvt;
use crate::apic::{Apic, Mode};
use crate::shared::{Machine, VcpuShared, request};

/// Delivery modes, as ICR, MSI data and redirection entries encode them (Intel SDM 3A 11.6.1, 11.11.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    Fixed,
    LowestPriority,
    Smi,
    Nmi,
    Init,
    StartUp,
    ExtInt,
}

impl Delivery {
    /// From the low three bits; mode 3 is reserved.
    pub fn from_bits(bits: u32) -> Option<Self> {
        Some(match bits & 7 {
            0 => Delivery::Fixed,
            1 => Delivery::LowestPriority,
            2 => Delivery::Smi,
            4 => Delivery::Nmi,
            5 => Delivery::Init,
            6 => Delivery::StartUp,
            7 => Delivery::ExtInt,
            _ => return None,
        })
    }

    /// The vector is that of an interrupt, which must be 16 or more.
    pub fn has_vector(self) -> bool {
        matches!(self, Delivery::Fixed | Delivery::LowestPriority)
    }
}

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The sender itself.
    One(u32),
    All,
    AllBut(u32),
    /// The APIC of that id.
    Physical(u32),
    /// The APICs whose logical id matches (Intel SDM 3A 11.6.2.2, 11.12.10).
    Logical(u32),
}

/// An interrupt message on its way.
#[derive(Clone, Copy, Debug)]
pub struct Message {
    pub delivery: Delivery,
    pub vector: u8,
    /// Level-triggered: its end is broadcast to I/O APICs.
    pub level: bool,
    /// MSI's redirection hint: one of those that match, as with lowest priority.
    pub redirect: bool,
    pub destination: Destination,
}

impl VcpuShared {
    /// Makes `vector` (16 or more) pending and lets the vCPU know.
    pub fn post_interrupt(&self, vector: u8, level: bool) {
        if self.apic.post(vector, level) {
            self.request(request::INTERRUPT);
        }
    }

    fn receive(&self, message: &Message) {
        if self.apic.mode() == Mode::Disabled {
            return;
        }
        match message.delivery {
            Delivery::Fixed | Delivery::LowestPriority => {
                if self.apic.enabled() && message.vector >= 16 {
                    self.post_interrupt(message.vector, message.level);
                }
            }
            Delivery::Smi => self.request(request::SMI),
            Delivery::Nmi => self.request_nmi(),
            Delivery::Init => {
                // A start-up IPI from before this INIT has no effect after it.
                self.requests.fetch_and(!request::SIPI, Ordering::SeqCst);
                self.request(request::INIT);
            }
            Delivery::StartUp => {
                self.sipi_vector.store(message.vector, Ordering::SeqCst);
                self.request(request::SIPI);
            }
            Delivery::ExtInt => {
                self.apic.post_extint();
                self.request(request::INTERRUPT);
            }
        }
    }
}

fn logical_match(apic: &Apic, destination: u32) -> bool {
    let own = apic.ldr();
    match apic.mode() {
        Mode::Disabled => false,
        Mode::X2apic => destination >> 16 == own >> 16 && destination & own & 0xffff != 0,
        Mode::Xapic if destination > 0xff => false,
        Mode::Xapic => {
            let own = own >> 24;
            if apic.clustered() {
                (destination >> 4 == 0xf || destination >> 4 == own >> 4) && destination & own & 0xf != 0
            } else {
                destination & own != 0
            }
        }
    }
}

impl Machine {
    /// Delivers a message to all it is for.
    pub fn send(&self, message: &Message) {
        let vcpus = self.vcpus();
        let addressed = |v: &&Arc<VcpuShared>| match message.destination {
            Destination::One(id) | Destination::Physical(id) => v.id == id,
            Destination::All => true,
            Destination::AllBut(id) => v.id != id,
            Destination::Logical(id) => logical_match(&v.apic, id),
        };
        if let Destination::One(id) | Destination::Physical(id) = message.destination {
            // Ids are positions.
            if let Some(v) = vcpus.get(id as usize).filter(addressed) {
                v.receive(message);
            }
        } else if message.delivery == Delivery::LowestPriority || message.redirect {
            // The first among equals: interrupts of one source stay where their data is in the cache.
            let enabled = vcpus.iter().filter(addressed).filter(|v| v.apic.enabled());
            if let Some(v) = enabled.min_by_key(|v| v.apic.ppr() >> 4) {
                v.receive(message);
            }
        } else {
            vcpus.iter().filter(addressed).for_each(|v| v.receive(message));
        }
    }

    /// What an MSI's address and data say (Intel SDM 3A 11.11). Address bits 11:5 extend the destination to 15 bits where
    /// the guest knows of it (Linux `Documentation/virt/kvm/x86/cpuid.rst`, KVM_FEATURE_MSI_EXT_DEST_ID).
    fn decode_msi(&self, address: u64, data: u32) -> Option<Message> {
        const ADDRESS: u64 = 0xfee;
        const REDIRECT: u64 = 1 << 3;
        const LOGICAL: u64 = 1 << 2;
        const LEVEL_ASSERT: u32 = 1 << 14;
        const LEVEL_TRIGGERED: u32 = 1 << 15;
        if address >> 20 != ADDRESS || data & (LEVEL_TRIGGERED | LEVEL_ASSERT) == LEVEL_TRIGGERED {
            return None;
        }
        let id = (address >> 12 & 0xff | (address >> 5 & 0x7f) << 8) as u32;
        // 0xff is the broadcast address of eight bits, unless an x2APIC has it as its own.
        let broadcast = id == 0xff && self.vcpus().len() <= 0xff;
        let destination = match address & LOGICAL {
            _ if broadcast => Destination::All,
            0 => Destination::Physical(id),
            _ => Destination::Logical(id),
        };
        Some(Message {
            delivery: Delivery::from_bits(data >> 8)?,
            vector: data as u8,
            level: data & LEVEL_TRIGGERED != 0,
            redirect: address & REDIRECT != 0,
            destination,
        })
    }
}

/// How devices reach the vCPUs of a machine.
pub struct InterruptLines(pub Arc<Machine>);

impl engine::Interrupts for InterruptLines {
    fn send_msi(&self, address: u64, data: u32) {
        if let Some(message) = self.0.decode_msi(address, data) {
            self.0.send(&message);
        }
    }

    fn set_pic_output(&self, asserted: bool) {
        let was = self.0.pic_asserted.swap(u32::from(asserted), Ordering::SeqCst);
        let vcpus = self.0.vcpus();
        let Some(bootstrap) = vcpus.first().filter(|_| asserted) else {
            return;
        };
        // The pin does what its LVT entry says; masked or off, the level stays for whoever looks at it later.
        match bootstrap.apic.lint0() {
            Some(entry) if entry & lvt::MASKED != 0 => {}
            Some(entry) if lvt::delivery(entry) == lvt::FIXED => {
                if was == 0 && entry as u8 >= 16 {
                    bootstrap.post_interrupt(entry as u8, false);
                }
            }
            Some(entry) if lvt::delivery(entry) == lvt::NMI => {
                if was == 0 {
                    bootstrap.request_nmi();
                }
            }
            _ => bootstrap.request(request::INTERRUPT),
        }
    }

    fn send_smi(&self, all: bool) {
        let own = if all { None } else { crate::signals::current_vcpu() };
        let vcpus = self.0.vcpus();
        // Where no vCPU asks for it, it is the boot processor's.
        let of = |v: &&Arc<VcpuShared>| all || v.id == own.unwrap_or(0);
        vcpus.iter().filter(of).for_each(|v| v.request(request::SMI));
    }

    fn send_nmi(&self, vcpu: u32) {
        if let Some(v) = self.0.vcpus().get(vcpu as usize) {
            v.request_nmi();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apic::registers::reg;
    use crate::apic::testing::{enable_apic, enable_x2apic, machine_of as machine_and_vcpus};
    use engine::Interrupts;

    fn machine_of(cpus: u32) -> Arc<Machine> {
        machine_and_vcpus(cpus).0
    }

    fn pending(machine: &Machine) -> Vec<usize> {
        let vcpus = machine.vcpus();
        vcpus
            .iter()
            .enumerate()
            .filter(|(_, v)| v.apic.deliverable() == Some(0x41))
            .map(|(i, _)| {
                vcpus[i].apic.acknowledge(0x41);
                vcpus[i].apic.end_of_interrupt();
                i
            })
            .collect()
    }

    fn msi(machine: &Arc<Machine>, address: u64, data: u32) -> Vec<usize> {
        InterruptLines(machine.clone()).send_msi(address, data);
        pending(machine)
    }

    #[test]
    fn a_physical_msi_reaches_the_apic_of_that_id() {
        let machine = machine_of(4);
        machine.vcpus().iter().for_each(|v| enable_apic(v));
        assert_eq!(msi(&machine, 0xfee0_2000, 0x41), [2]);
        assert_eq!(msi(&machine, 0xfee0_9000, 0x41), [] as [usize; 0]);
        assert_eq!(msi(&machine, 0xfeef_f000, 0x41), [0, 1, 2, 3]);
    }

    #[test]
    fn a_logical_msi_reaches_all_that_match_and_lowest_priority_one_of_them() {
        let machine = machine_of(4);
        for (i, v) in machine.vcpus().iter().enumerate() {
            enable_apic(v);
            v.apic.set_for_test(reg::LDR, 1 << (24 + i));
        }
        assert_eq!(msi(&machine, 0xfee0_6004, 0x41), [1, 2]);
        assert_eq!(msi(&machine, 0xfee0_6004, 0x141), [1]);
        machine.vcpus()[1].apic.set_for_test(reg::TPR, 0x20);
        assert_eq!(msi(&machine, 0xfee0_6004, 0x141), [2]);
        assert_eq!(msi(&machine, 0xfee0_600c, 0x41), [2]);
    }

    #[test]
    fn the_cluster_model_compares_the_high_nibble() {
        let machine = machine_of(2);
        for (i, v) in machine.vcpus().iter().enumerate() {
            enable_apic(v);
            v.apic.set_for_test(reg::LDR, ((i as u32) << 4 | 1) << 24);
            v.apic.set_for_test(reg::DFR, 0x0fff_ffff);
        }
        assert_eq!(msi(&machine, 0xfee1_1004, 0x41), [1]);
        assert_eq!(msi(&machine, 0xfeef_1004, 0x41), [0, 1]);
    }

    #[test]
    fn extended_destination_bits_name_x2apics_beyond_255() {
        let machine = machine_of(300);
        machine.vcpus().iter().for_each(|v| enable_x2apic(v));
        assert_eq!(msi(&machine, 0xfee0_0000 | 1 << 5 | 5 << 12, 0x41), [261]);
        assert_eq!(msi(&machine, 0xfeef_f000, 0x41), [255]);
    }

    #[test]
    fn x2apic_logical_ids_are_cluster_and_bit() {
        let machine = machine_of(20);
        machine.vcpus().iter().for_each(|v| enable_x2apic(v));
        let message = Message {
            delivery: Delivery::Fixed,
            vector: 0x41,
            level: false,
            redirect: false,
            destination: Destination::Logical(1 << 16 | 0b101),
        };
        machine.send(&message);
        assert_eq!(pending(&machine), [16, 18]);
    }

    #[test]
    fn an_init_forgets_the_startup_before_it() {
        let machine = machine_of(2);
        let ipi = |delivery| Message {
            delivery,
            vector: 9,
            level: false,
            redirect: false,
            destination: Destination::Physical(1),
        };
        machine.send(&ipi(Delivery::StartUp));
        machine.send(&ipi(Delivery::Init));
        let requests = machine.vcpus()[1].requests.load(Ordering::SeqCst);
        assert_eq!(requests, request::INIT);
    }

    #[test]
    fn an_apic_disabled_by_software_takes_only_smi_nmi_init_and_startup() {
        let machine = machine_of(1);
        assert_eq!(msi(&machine, 0xfee0_0000, 0x41), [] as [usize; 0]);
        InterruptLines(machine.clone()).send_msi(0xfee0_0000, 0x400);
        InterruptLines(machine.clone()).send_msi(0xfee0_0000, 0x200);
        assert_eq!(machine.vcpus()[0].requests.load(Ordering::SeqCst), request::NMI | request::SMI);
    }

    #[test]
    fn an_smi_reaches_all_processors_or_one() {
        let machine = machine_of(3);
        let taken = || machine.vcpus().iter().map(|v| v.requests.swap(0, Ordering::SeqCst)).collect::<Vec<_>>();
        InterruptLines(machine.clone()).send_smi(true);
        assert_eq!(taken(), [request::SMI; 3]);
        InterruptLines(machine.clone()).send_smi(false);
        assert_eq!(taken(), [request::SMI, 0, 0]);
    }

    #[test]
    fn a_level_deassert_message_is_nothing() {
        let machine = machine_of(1);
        enable_apic(&machine.vcpus()[0]);
        assert_eq!(msi(&machine, 0xfee0_0000, 0x8041), [] as [usize; 0]);
        assert_eq!(msi(&machine, 0xfee0_0000, 0xc041), [0]);
    }
}
