//! SYSCALL, SYSRET, SYSENTER, SYSEXIT. Where compatibility mode is concerned, vendors differ: Intel has SYSCALL in
//! 64-bit mode only and SYSENTER in every protected mode, AMD has SYSCALL in both and no SYSENTER in long mode (AMD
//! APM 3, SYSCALL and SYSENTER). Which of them a vCPU is, its CPUID says.

use arch::registers::{debug, efer, gpr, rflags};
use arch::{Exception, Segment, SegmentRegister};
use iced_x86::Instruction;

use crate::cpu::{Stop, Vcpu};
use crate::mmu::is_canonical;

/// What SYSRET takes from R11.
pub const SYSRET_FLAGS: u64 = 0x3c_7fd7;

pub fn syscall(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    let from_64 = cpu.code64();
    let exists = from_64 || cpu.long_mode() && cpu.machine.cpuid.is_amd();
    if !exists || cpu.msrs.efer & efer::SCE == 0 {
        return Err(Exception::invalid_opcode().into());
    }
    cpu.gpr[gpr::RCX] = cpu.rip;
    cpu.gpr[gpr::R11] = cpu.rflags & !rflags::RF;
    cpu.rip = if from_64 { cpu.msrs.lstar } else { cpu.msrs.cstar };
    cpu.rflags = cpu.rflags & !(cpu.msrs.sfmask | rflags::RF) | rflags::FIXED;
    step_by_new_flags(cpu);
    let selector = (cpu.msrs.star >> 32) as u16 & !3;
    load_flat(cpu, selector, selector.wrapping_add(8), true, 0);
    Ok(())
}

/// `wide`: with REX.W, to 64-bit code.
pub fn sysret(cpu: &mut Vcpu, wide: bool) -> Result<(), Stop> {
    let exists = cpu.code64() || cpu.long_mode() && cpu.machine.cpuid.is_amd();
    if !exists || cpu.msrs.efer & efer::SCE == 0 {
        return Err(Exception::invalid_opcode().into());
    }
    let target = cpu.gpr[gpr::RCX];
    // AMD's processors return to such an address, and fault there (AMD APM 3, SYSRET).
    let refused = wide && !is_canonical(target) && !cpu.machine.cpuid.is_amd();
    if cpu.cpl() != 0 || refused {
        return Err(Exception::general_protection(0).into());
    }
    cpu.rip = if wide { target } else { target & 0xffff_ffff };
    cpu.rflags = cpu.gpr[gpr::R11] & SYSRET_FLAGS | rflags::FIXED;
    step_by_new_flags(cpu);
    let base = (cpu.msrs.star >> 48) as u16;
    let code = if wide { base.wrapping_add(16) } else { base };
    load_flat(cpu, code | 3, base.wrapping_add(8) | 3, wide, 3);
    Ok(())
}

/// Whether a single-step trap follows, TF says as it is after SYSCALL and SYSRET, not as it was before: a system call of a
/// program that is stepped through shows itself when it is over.
fn step_by_new_flags(cpu: &mut Vcpu) {
    if cpu.rflags & rflags::TF != 0 {
        cpu.pending_debug |= debug::DR6_BS;
    } else {
        cpu.engine.delivered = true;
    }
}

/// SYSENTER and SYSEXIT are invalid in an AMD processor's long mode.
fn require_sysenter(cpu: &Vcpu) -> Result<(), Exception> {
    if cpu.long_mode() && cpu.machine.cpuid.is_amd() { Err(Exception::invalid_opcode()) } else { Ok(()) }
}

pub fn sysenter(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    require_sysenter(cpu)?;
    let selector = cpu.msrs.sysenter_cs as u16 & !3;
    if !cpu.protected_mode() || selector == 0 {
        return Err(Exception::general_protection(0).into());
    }
    let long = cpu.long_mode();
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
    cpu.gpr[gpr::RSP] = cpu.msrs.sysenter_esp & mask;
    cpu.rip = cpu.msrs.sysenter_eip & mask;
    load_flat(cpu, selector, selector.wrapping_add(8), long, 0);
    Ok(())
}

/// `wide`: with REX.W, to 64-bit code.
pub fn sysexit(cpu: &mut Vcpu, wide: bool) -> Result<(), Stop> {
    if cpu.cpl() != 0 {
        // Before all else, on AMD's processors: to programs it does exist.
        return Err(Exception::general_protection(0).into());
    }
    require_sysenter(cpu)?;
    let selector = cpu.msrs.sysenter_cs as u16 & !3;
    if !cpu.protected_mode() || selector == 0 {
        return Err(Exception::general_protection(0).into());
    }
    let (target, stack) = (cpu.gpr[gpr::RDX], cpu.gpr[gpr::RCX]);
    if wide && !(is_canonical(target) && is_canonical(stack)) {
        return Err(Exception::general_protection(0).into());
    }
    let (mask, distance) = if wide { (u64::MAX, 32) } else { (0xffff_ffff, 16) };
    cpu.gpr[gpr::RSP] = stack & mask;
    cpu.rip = target & mask;
    let code = selector.wrapping_add(distance);
    load_flat(cpu, code | 3, code.wrapping_add(8) | 3, wide, 3);
    Ok(())
}

/// CS and SS get fixed contents; no descriptor is read.
fn load_flat(cpu: &mut Vcpu, code: u16, stack: u16, long: bool, cpl: u8) {
    cpu.segments[SegmentRegister::Cs as usize] = Segment::flat_code(code, long, cpl);
    cpu.segments[SegmentRegister::Ss as usize] = Segment::flat_data(stack, cpl);
}
