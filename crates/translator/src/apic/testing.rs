//! Machines of several processors, for unit tests of interrupts.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::registers::reg;
use super::{Apic, SVR_ENABLE, base};
use crate::shared::{Machine, VcpuShared};
use crate::time::Time;
use crate::vcpu::VcpuBox;
use crate::{Config, semantics};

/// A machine of `cpus` processors with little RAM and nothing on its bus.
pub fn machine_of(cpus: u32) -> (Arc<Machine>, Vec<VcpuBox>) {
    let config = Config { cpus: arch::cpuid::Topology::of_cores(cpus), ..Config::default() };
    let time = Time::new();
    let cpuid = semantics::cpuid::model(&config, time.tsc_khz()).unwrap();
    let machine = Arc::new(Machine::new(memory::Ram::new(4 << 20).unwrap(), config, cpuid, time));
    let vcpus = (0..cpus).map(|id| VcpuBox::new(id, machine.clone()).unwrap()).collect();
    (machine, vcpus)
}

/// Enables a local APIC by software.
pub fn enable_apic(vcpu: &VcpuShared) {
    vcpu.apic.set_for_test(reg::SVR, SVR_ENABLE | 0xff);
    vcpu.requests.store(0, Ordering::SeqCst);
}

/// Enables it and puts it in x2APIC mode.
pub fn enable_x2apic(vcpu: &VcpuShared) {
    vcpu.apic.set_base(vcpu.apic.base() | base::X2APIC);
    enable_apic(vcpu);
}

impl Apic {
    /// Sets a register past all rules.
    pub(crate) fn set_for_test(&self, register: usize, value: u32) {
        self.set(register, value);
    }
}
