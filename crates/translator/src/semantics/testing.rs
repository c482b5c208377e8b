//! For the unit tests of instructions on user memory: a program's vCPU with all vector state enabled.

use arch::registers::cr4;

use crate::cpu::{Stop, Vcpu};
pub use crate::testing::RIP;
pub use crate::testing::Vendor;
use crate::testing::{USER, USER_PT, execute, user_vcpu_of};
use crate::vcpu::VcpuBox;
use crate::xstate::layout;

/// Where user memory starts: 2 MiB, mapped one to one by small pages.
pub const BASE: u64 = USER;

/// A vCPU at CPL 3 in 64-bit mode.
pub fn vcpu() -> VcpuBox {
    vcpu_of(Vendor::of_host())
}

/// The same of a vendor.
pub fn vcpu_of(vendor: Vendor) -> VcpuBox {
    let mut cpu = user_vcpu_of(vendor);
    cpu.cr4 |= cr4::OSFXSR | cr4::OSXSAVE | cr4::OSXMMEXCPT;
    cpu.xcr0 = layout().native;
    cpu.xsave.reset();
    cpu.shared.poll.clear();
    cpu
}

/// Takes away rights to the page at `va`: clears bits of its entry.
pub fn revoke(cpu: &mut Vcpu, va: u64, bits: u64) {
    let at = USER_PT + (va - BASE) / 4096 * 8;
    let entry = cpu.phys_read_u64(at);
    cpu.phys_write(at, &(entry & !bits).to_le_bytes());
    cpu.tlb.flush_all();
}

pub fn write(cpu: &mut Vcpu, va: u64, data: &[u8]) {
    let (head, rest) = data.split_at(data.len().min(4096 - va as usize % 4096));
    cpu.phys_write(va, head);
    for (i, page) in rest.chunks(4096).enumerate() {
        cpu.phys_write(va + (head.len() + i * 4096) as u64, page);
    }
}

pub fn read(cpu: &Vcpu, va: u64, size: usize) -> Vec<u8> {
    let mut data = vec![0; size];
    let (head, rest) = data.split_at_mut(size.min(4096 - va as usize % 4096));
    cpu.phys_read(va, head);
    for (i, page) in rest.chunks_mut(4096).enumerate() {
        cpu.phys_read(va + (head.len() + i * 4096) as u64, page);
    }
    data
}

/// Executes one sensitive instruction as the dispatcher would, except for delivery.
pub fn step(cpu: &mut Vcpu, bytes: &[u8]) -> Result<(), Stop> {
    execute(cpu, bytes)
}
