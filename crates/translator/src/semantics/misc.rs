//! Small sensitive instructions: HLT, time-stamp and processor-id reads, caches, protection keys, hypercalls, and those
//! that do not exist on the virtual processor.

use arch::cpuid::Feature;
use arch::registers::{cr4, gpr};
use arch::{Exception, state::Activity};
use iced_x86::{Instruction, Mnemonic};

use super::control::privileged;
use super::{Exec, Sensitive};
use crate::cpu::{Stop, Vcpu};

#[cfg(test)]
mod tests;

pub fn lookup(insn: &Instruction) -> Option<Sensitive> {
    use Mnemonic::*;
    let (exec, ends_block): (Exec, bool) = match insn.mnemonic() {
        Hlt => (hlt, true),
        Rdtsc => (rdtsc, false),
        Rdtscp => (rdtscp, false),
        Rdpid => (rdpid, false),
        Rdpmc => (rdpmc, true),
        // Caches are the host's and coherent: nothing is to be written back or may be dropped.
        Wbinvd | Wbnoinvd | Invd => (|cpu, _| Ok(privileged(cpu)?), false),
        // Offered whether the host has it or not. What it orders is in order already where one instruction ends.
        Serialize => (|_, _| Ok(()), false),
        Rdpkru => (rdpkru, false),
        Wrpkru => (wrpkru, true),
        Vmcall | Vmmcall => (hypercall, false),
        Rsm => (rsm, true),
        _ if absent(insn.mnemonic()) => (undefined, true),
        _ => return None,
    };
    Some(Sensitive { exec, ends_block, fp: false })
}

/// Instructions that raise #UD on every model: what CPUID hides although a host may run it, and UD itself.
fn absent(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    match mnemonic {
        Ud0 | Ud1 | Ud2 => true,
        Monitor | Mwait | Monitorx | Mwaitx | Umonitor | Umwait | Tpause => true,
        // VMX; CR4.VMXE can't be set
        Vmclear | Vmlaunch | Vmptrld | Vmptrst | Vmread | Vmresume | Vmwrite | Vmxoff | Vmxon | Vmfunc | Invept
        | Invvpid => true,
        // SVM
        Vmrun | Vmload | Vmsave | Vmgexit | Stgi | Clgi | Skinit | Invlpga | Invlpgb | Tlbsync | Psmash | Pvalidate
        | Rmpadjust | Rmpupdate | Rmpquery => true,
        // SMX, SGX, TDX, total memory encryption
        Getsec | Encls | Enclu | Enclv | Seamcall | Seamops | Seamret | Tdcall | Pconfig => true,
        // TSX
        Xbegin | Xend | Xabort | Xtest | Xsusldtrk | Xresldtrk => true,
        // Shadow stacks
        Incsspd | Incsspq | Saveprevssp | Rstorssp | Wrssd | Wrssq | Wrussd | Wrussq | Setssbsy | Clrssbsy => true,
        // User interrupts, queues, FRED, MSR lists
        Uiret | Clui | Stui | Testui | Senduipi | Enqcmd | Enqcmds | Erets | Eretu | Lkgs | Wrmsrns | Rdmsrlist
        | Wrmsrlist => true,
        _ => false,
    }
}

fn undefined(_: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    Err(Exception::invalid_opcode().into())
}

fn require(cpu: &Vcpu, feature: Feature) -> Result<(), Exception> {
    if cpu.machine.cpuid.has(feature) { Ok(()) } else { Err(Exception::invalid_opcode()) }
}

/// Whatever the mode and the privilege level, where it was entered (Intel SDM 2B RSM).
fn rsm(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    if cpu.smm.active { cpu.leave_smm() } else { Err(Exception::invalid_opcode().into()) }
}

fn hlt(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    privileged(cpu)?;
    cpu.activity = Activity::Halted;
    Ok(())
}

fn time_stamp(cpu: &mut Vcpu) -> Result<(), Exception> {
    if cpu.cr4 & cr4::TSD != 0 {
        privileged(cpu)?;
    }
    let tsc = cpu.guest_tsc();
    cpu.gpr[gpr::RAX] = tsc & 0xffff_ffff;
    cpu.gpr[gpr::RDX] = tsc >> 32;
    Ok(())
}

fn rdtsc(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    Ok(time_stamp(cpu)?)
}

fn rdtscp(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    require(cpu, Feature::Rdtscp)?;
    time_stamp(cpu)?;
    cpu.gpr[gpr::RCX] = cpu.msrs.tsc_aux;
    Ok(())
}

fn rdpid(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    require(cpu, Feature::Rdpid)?;
    cpu.write_register(insn.op0_register(), cpu.msrs.tsc_aux);
    Ok(())
}

/// There are no performance counters: every number is a wrong one.
fn rdpmc(_: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    Err(Exception::general_protection(0).into())
}

/// #UD without CR4.PKE, #GP(0) unless ECX is 0 (and EDX, where it is an operand).
fn check_pkru(cpu: &Vcpu, zeros: u64) -> Result<(), Exception> {
    if cpu.cr4 & cr4::PKE == 0 {
        return Err(Exception::invalid_opcode());
    }
    if zeros as u32 != 0 { Err(Exception::general_protection(0)) } else { Ok(()) }
}

fn rdpkru(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    check_pkru(cpu, cpu.gpr[gpr::RCX])?;
    cpu.gpr[gpr::RAX] = u64::from(cpu.pkru);
    cpu.gpr[gpr::RDX] = 0;
    Ok(())
}

fn wrpkru(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    check_pkru(cpu, cpu.gpr[gpr::RCX] | cpu.gpr[gpr::RDX])?;
    let value = cpu.gpr[gpr::RAX] as u32;
    if value != cpu.pkru {
        cpu.pkru = value;
        cpu.mmu_flush_all();
    }
    Ok(())
}

/// VMCALL as KVM's paravirtual interface has it (Linux `Documentation/virt/kvm/x86/hypercalls.rst`): CPUID offers no
/// hypercall, so each is unknown.
fn hypercall(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    const EPERM: i64 = 1;
    const ENOSYS: i64 = 1000;
    let error = if cpu.cpl() == 0 { -ENOSYS } else { -EPERM };
    cpu.gpr[gpr::RAX] = if cpu.code64() { error as u64 } else { u64::from(error as u32) };
    Ok(())
}
