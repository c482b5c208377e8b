//! For the unit tests of instructions on user memory: a program's vCPU with all vector state enabled.

use arch::registers::cr4;
use iced_x86::{Decoder, DecoderOptions, Instruction};

use crate::cpu::{Stop, Vcpu};
pub use crate::testing::RIP;
use crate::testing::{USER, USER_PT, execute, user_vcpu};
use crate::xstate::layout;

/// Where user memory starts: 2 MiB, mapped one to one by small pages.
pub const BASE: u64 = USER;

/// A vCPU at CPL 3 in 64-bit mode.
pub fn vcpu() -> Box<Vcpu> {
    let mut cpu = user_vcpu();
    cpu.cr4 |= cr4::OSFXSR | cr4::OSXSAVE | cr4::OSXMMEXCPT;
    cpu.xcr0 = layout().native;
    cpu.xsave.reset();
    cpu
}

/// Takes away rights to the page at `va`: clears bits of its entry.
pub fn revoke(cpu: &mut Vcpu, va: u64, bits: u64) {
    let at = USER_PT + (va - BASE >> 12) * 8;
    let entry = cpu.phys_read_u64(at);
    cpu.phys_write(at, &(entry & !bits).to_le_bytes());
    cpu.tlb.flush_all();
}

pub fn write(cpu: &mut Vcpu, va: u64, data: &[u8]) {
    for (i, byte) in data.iter().enumerate() {
        cpu.phys_write(va + i as u64, &[*byte]);
    }
}

pub fn read(cpu: &Vcpu, va: u64, size: usize) -> Vec<u8> {
    let mut data = vec![0; size];
    for (i, byte) in data.iter_mut().enumerate() {
        cpu.phys_read(va + i as u64, std::slice::from_mut(byte));
    }
    data
}

/// Decodes `bytes` in the vCPU's mode.
pub fn decode(cpu: &Vcpu, bytes: &[u8]) -> Instruction {
    Decoder::with_ip(cpu.code_bits(), bytes, RIP, DecoderOptions::NONE).decode()
}

/// Executes one sensitive instruction as the dispatcher would, except for delivery.
pub fn step(cpu: &mut Vcpu, bytes: &[u8]) -> Result<(), Stop> {
    execute(cpu, bytes)
}
