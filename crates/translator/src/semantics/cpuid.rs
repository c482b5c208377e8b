//! CPUID, answered from the machine's [`CpuModel`]; the processor's own is never executed while a guest runs.

use arch::cpuid::{CpuModel, Dynamic, EngineFeatures, Error, Feature, FeatureSet, Leaf, capabilities};
use arch::registers::gpr;
use iced_x86::{Instruction, Mnemonic};

use super::Sensitive;
use crate::cpu::{Stop, Vcpu};
use crate::{Config, host};

/// The processor that a machine's vCPUs are, on this host.
pub fn model(config: &Config, tsc_khz: u32) -> Result<CpuModel, Error> {
    model_on(&host::cpuid, config, tsc_khz)
}

/// The same on a host with this CPUID.
pub fn model_on(host_cpuid: &dyn Fn(u32, u32) -> Leaf, config: &Config, tsc_khz: u32) -> Result<CpuModel, Error> {
    let engine = EngineFeatures {
        implements: FeatureSet::system(),
        // String instructions are calls into Rust here: what is short is better moved otherwise.
        declines: FeatureSet::EMPTY.with(Feature::Fsrm).with(Feature::Fzrm).with(Feature::Fsrs),
        host_xcr0: host::xcr0(),
        physical_bits: arch::cpuid::PHYSICAL_BITS,
        arch_capabilities: capabilities::TRANSLATED,
        translated: true,
    };
    CpuModel::new(config.model, host_cpuid, &engine, config.cpus, tsc_khz)
}

pub fn lookup(insn: &Instruction) -> Option<Sensitive> {
    (insn.mnemonic() == Mnemonic::Cpuid).then_some(Sensitive { exec: cpuid, ends_block: false, fp: false })
}

impl Vcpu {
    /// What CPUID shows this vCPU now.
    pub fn cpuid(&self, leaf: u32, subleaf: u32) -> Leaf {
        let state = Dynamic {
            apic_id: self.id,
            apic_enabled: self.apic_base() & crate::apic::base::ENABLE != 0,
            cr4: self.cr4,
            xcr0: self.xcr0,
            xss: self.msrs.xss,
        };
        let mut answer = self.machine.cpuid.leaf(leaf, subleaf, &state);
        // IA32_MISC_ENABLE can hide NX (Intel SDM 4, table 2-2).
        if leaf == 0x8000_0001 && self.msrs.misc_enable & super::msr::NO_EXECUTE_DISABLED != 0 {
            answer.edx &= !(1 << 20);
        }
        answer
    }
}

fn cpuid(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    let leaf = cpu.cpuid(cpu.gpr[gpr::RAX] as u32, cpu.gpr[gpr::RCX] as u32);
    cpu.gpr[gpr::RAX] = u64::from(leaf.eax);
    cpu.gpr[gpr::RBX] = u64::from(leaf.ebx);
    cpu.gpr[gpr::RCX] = u64::from(leaf.ecx);
    cpu.gpr[gpr::RDX] = u64::from(leaf.edx);
    Ok(())
}
