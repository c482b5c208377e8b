//! CPUID: the machine's processor model, of which KVM can keep what its host has.
//!
//! The models are the same as on every engine ([`arch::cpuid`]); what stands for "the host's CPUID" here is the kernel's
//! list of what it supports, which is the host's less what KVM can't give to guests.

use arch::cpuid::{CpuModel, Dynamic, EngineFeatures, Feature, FeatureSet, Leaf, features};
use kvm_bindings::*;

use crate::system::System;
use crate::{Config, Error};

/// The leaf of KVM's paravirtual features, and the one among them that is the monitor's to keep: 15 bits of destination in
/// messages.
const KVM_FEATURES: u32 = 0x4000_0001;
const MSI_EXT_DEST_ID: u32 = 1 << 15;
/// An unused sub-leaf of the topology's leaves still names the APIC id.
const FLAG_SUBLEAF: u32 = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

/// What the host's KVM can give.
pub struct Host {
    supported: Vec<kvm_cpuid_entry2>,
    tsc_deadline: bool,
}

impl Host {
    pub fn new(system: &System) -> Result<Self, Error> {
        let supported = system
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::call("say what processors it supports"))?;
        Ok(Host {
            supported: supported.as_slice().to_vec(),
            tsc_deadline: system.capability(KVM_CAP_TSC_DEADLINE_TIMER) != 0,
        })
    }

    fn leaf(&self, leaf: u32, subleaf: u32) -> Leaf {
        let found =
            self.supported.iter().find(|e| e.function == leaf && (e.flags & FLAG_SUBLEAF == 0 || e.index == subleaf));
        found.map_or(Leaf::default(), |e| Leaf { eax: e.eax, ebx: e.ebx, ecx: e.ecx, edx: e.edx })
    }

    /// Where PKRU is in the XSAVE area (leaf 0xd, sub-leaf 9).
    pub fn pkru_offset(&self) -> Option<usize> {
        let component = self.leaf(0xd, 9);
        (component.eax != 0 && self.has(Feature::Pku)).then_some(component.ebx as usize)
    }

    fn is_amd(&self) -> bool {
        let vendor = self.leaf(0, 0).ebx.to_le_bytes();
        [*b"Auth", *b"Hygo"].contains(&vendor)
    }

    fn has(&self, feature: Feature) -> bool {
        let info = feature.info();
        let leaf = self.leaf(info.leaf, info.subleaf);
        let register = match info.register {
            features::Register::Eax => leaf.eax,
            features::Register::Ebx => leaf.ebx,
            features::Register::Ecx => leaf.ecx,
            features::Register::Edx => leaf.edx,
        };
        match feature {
            // Older kernels have these without listing them.
            Feature::X2apic | Feature::Hypervisor => true,
            Feature::TscDeadline => self.tsc_deadline,
            // The kernel would give these to Intel's processors, too, which have others instead.
            Feature::AmdIbpb | Feature::AmdIbrs | Feature::AmdStibp | Feature::AmdSsbd if !self.is_amd() => false,
            _ => register & 1 << info.bit != 0,
        }
    }

    /// The processor that `config` asks for, as far as this host has it.
    pub fn model(&self, config: &Config, tsc_khz: u32) -> Result<CpuModel, Error> {
        let xcr0 = self.leaf(0xd, 0);
        let bits = (self.leaf(0x8000_0008, 0).eax & 0xff).clamp(36, arch::cpuid::PHYSICAL_BITS.into());
        let engine = EngineFeatures {
            implements: [FeatureSet::system(), FeatureSet::hardware()]
                .into_iter()
                .flat_map(FeatureSet::iter)
                .filter(|feature| self.has(*feature))
                .collect(),
            declines: FeatureSet::EMPTY,
            host_xcr0: u64::from(xcr0.edx) << 32 | u64::from(xcr0.eax),
            physical_bits: bits as u8,
            // Where the feature is there the kernel answers with what is true of the host.
            arch_capabilities: 0,
            translated: false,
        };
        Ok(CpuModel::new(config.model, &|leaf, subleaf| self.leaf(leaf, subleaf), &engine, config.cpus, tsc_khz)?)
    }

    /// The model as the kernel takes it, for processor `id`. What follows the vCPU's state, the kernel adds.
    pub fn entries(&self, model: &CpuModel, id: u32) -> Result<CpuId, Error> {
        let state = Dynamic { apic_id: id, apic_enabled: true, cr4: 0, xcr0: 0, xss: 0 };
        let entries: Vec<_> = model
            .leaves(&state)
            .map(|(function, index, leaf, has_subleaves)| {
                let supported = self.leaf(KVM_FEATURES, 0).eax | MSI_EXT_DEST_ID;
                let eax = if function == KVM_FEATURES { leaf.eax & supported } else { leaf.eax };
                let (flags, Leaf { ebx, ecx, edx, .. }) = (if has_subleaves { FLAG_SUBLEAF } else { 0 }, leaf);
                kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
            })
            .collect();
        CpuId::from_entries(&entries).map_err(|_| Error::State(format!("{} CPUID leaves are too many", entries.len())))
    }
}
