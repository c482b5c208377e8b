//! RDMSR and WRMSR. What an MSR holds lives in [`Msrs`], in the local APIC or in the clocks; one that does
//! not exist, a reserved bit or a non-canonical address raises #GP(0) (Intel SDM volume 4, 2.1).

use arch::cpuid::Feature;
use arch::registers::{cr0, efer, gpr};
use arch::{Exception, SegmentRegister, msr};
use iced_x86::{Instruction, Mnemonic};

use super::Sensitive;
use crate::cpu::{Msrs, Stop, Vcpu};
use crate::mmu::is_canonical;

mod amd;
mod clock;
mod mtrr;
#[cfg(test)]
mod tests;

const MCG_STATUS_MASK: u64 = 7;
/// FEATURE_CONTROL: locked with nothing enabled, as firmware leaves it.
const FEATURE_CONTROL_LOCKED: u64 = 1;
/// The microcode revision, in the high half: as unknown to any update as KVM's.
const MICROCODE_REVISION: u64 = 1 << 32;
/// MISC_ENABLE: branch trace and precise sampling are not available: always set.
const MISC_ENABLE_FIXED: u64 = 1 << 11 | 1 << 12;
/// MISC_ENABLE: no-execute is neither shown by CPUID nor can it be turned on.
pub const NO_EXECUTE_DISABLED: u64 = 1 << 34;
/// Fast strings, thermal monitor, performance monitoring, prefetchers, SpeedStep, MONITOR (which there is not), SpeedStep lock,
/// CPUID limit, xTPR, NX disable.
const MISC_ENABLE_WRITABLE: u64 =
    1 << 0 | 1 << 3 | 1 << 7 | 1 << 9 | 1 << 16 | 1 << 18 | 1 << 20 | 1 << 22 | 1 << 23 | NO_EXECUTE_DISABLED;
const DEBUGCTL: u32 = 0x1d9;

pub fn lookup(insn: &Instruction) -> Option<Sensitive> {
    let exec: super::Exec = match insn.mnemonic() {
        Mnemonic::Rdmsr => rdmsr,
        // Nothing that blocks are translated for depends on an MSR: EFER.LME can't change under paging. Interrupts that
        // become pending set the poll word.
        Mnemonic::Wrmsr => wrmsr,
        _ => return None,
    };
    Some(Sensitive { exec, ends_block: false, fp: false })
}

fn fault() -> Exception {
    Exception::general_protection(0)
}

/// `value`, if all its bits are in `mask`.
fn within(value: u64, mask: u64) -> Result<u64, Exception> {
    if value & !mask == 0 { Ok(value) } else { Err(fault()) }
}

fn canonical(value: u64) -> Result<u64, Exception> {
    if is_canonical(value) { Ok(value) } else { Err(fault()) }
}

fn rdmsr(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    if cpu.cpl() != 0 {
        return Err(fault().into());
    }
    let index = cpu.gpr[gpr::RCX] as u32;
    let value =
        cpu.read_msr(index).inspect_err(|_| tracing::debug!(index = format_args!("{index:#x}"), "RDMSR: #GP"))?;
    cpu.gpr[gpr::RAX] = value & 0xffff_ffff;
    cpu.gpr[gpr::RDX] = value >> 32;
    Ok(())
}

fn wrmsr(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    if cpu.cpl() != 0 {
        return Err(fault().into());
    }
    let index = cpu.gpr[gpr::RCX] as u32;
    let value = cpu.gpr[gpr::RDX] << 32 | cpu.gpr[gpr::RAX] & 0xffff_ffff;
    cpu.write_msr(index, value).inspect_err(|_| {
        tracing::debug!(index = format_args!("{index:#x}"), value = format_args!("{value:#x}"), "WRMSR: #GP")
    })?;
    Ok(())
}

impl Vcpu {
    fn require(&self, feature: Feature) -> Result<(), Exception> {
        if self.machine.cpuid.has(feature) { Ok(()) } else { Err(fault()) }
    }

    /// The value that RDMSR gives at CPL 0.
    pub fn read_msr(&self, index: u32) -> Result<u64, Exception> {
        let m = &self.msrs;
        Ok(match index {
            msr::TSC => self.guest_tsc(),
            msr::TSC_ADJUST => m.tsc_adjust,
            msr::TSC_DEADLINE => self.tsc_deadline(),
            msr::TSC_AUX => m.tsc_aux,
            msr::APIC_BASE => self.apic_base(),
            msr::X2APIC_FIRST..=msr::X2APIC_LAST => self.x2apic_read(index)?,

            msr::EFER => m.efer,
            msr::STAR => m.star,
            msr::LSTAR => m.lstar,
            msr::CSTAR => m.cstar,
            msr::SFMASK => m.sfmask,
            msr::FS_BASE => self.seg(SegmentRegister::Fs).base,
            msr::GS_BASE => self.seg(SegmentRegister::Gs).base,
            msr::KERNEL_GS_BASE => m.kernel_gs_base,
            msr::SYSENTER_CS => m.sysenter_cs,
            msr::SYSENTER_ESP => m.sysenter_esp,
            msr::SYSENTER_EIP => m.sysenter_eip,
            msr::XSS => self.require(Feature::Xsaves).map(|()| m.xss)?,
            msr::SPEC_CTRL => self.require(Feature::SpecCtrl).map(|()| m.spec_ctrl)?,
            msr::ARCH_CAPABILITIES => {
                self.require(Feature::ArchCapabilities).map(|()| self.machine.cpuid.arch_capabilities())?
            }

            msr::PLATFORM_ID => 0,
            msr::FEATURE_CONTROL => FEATURE_CONTROL_LOCKED,
            msr::BIOS_SIGN_ID => MICROCODE_REVISION,
            // The ratio of the TSC to 100 MHz, bits 15:8 in both.
            msr::PLATFORM_INFO | msr::PERF_STATUS => ((self.machine.time.tsc_hz() / 100_000_000) & 0xff) << 8,
            msr::MISC_ENABLE => m.misc_enable | MISC_ENABLE_FIXED,
            // No banks, and with them none of the machine-check MSRs from 0x400 on.
            msr::MCG_CAP => 0,
            msr::MCG_STATUS => m.mcg_status,
            DEBUGCTL => 0,

            msr::PAT => m.pat,
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => m.kvm_system_time,
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => m.kvm_wall_clock,
            _ => return self.read_mtrr(index).or_else(|| self.read_amd_msr(index)).ok_or_else(fault),
        })
    }

    /// What WRMSR does at CPL 0.
    pub fn write_msr(&mut self, index: u32, value: u64) -> Result<(), Exception> {
        const LOW: u64 = 0xffff_ffff;
        match index {
            msr::TSC => self.set_tsc_adjust(value.wrapping_sub(self.machine.time.tsc())),
            msr::TSC_ADJUST => self.set_tsc_adjust(value),
            msr::TSC_DEADLINE => self.set_tsc_deadline(value),
            msr::TSC_AUX => self.msrs.tsc_aux = within(value, LOW)?,
            msr::APIC_BASE => self.set_apic_base(value)?,
            msr::X2APIC_FIRST..=msr::X2APIC_LAST => self.x2apic_write(index, value)?,

            msr::EFER => self.write_efer(value)?,
            msr::STAR => self.msrs.star = value,
            msr::LSTAR => self.msrs.lstar = canonical(value)?,
            msr::CSTAR => self.msrs.cstar = canonical(value)?,
            msr::SFMASK => self.msrs.sfmask = within(value, LOW)?,
            msr::FS_BASE => self.segments[SegmentRegister::Fs as usize].base = canonical(value)?,
            msr::GS_BASE => self.segments[SegmentRegister::Gs as usize].base = canonical(value)?,
            msr::KERNEL_GS_BASE => self.msrs.kernel_gs_base = canonical(value)?,
            msr::SYSENTER_CS => self.msrs.sysenter_cs = value & LOW,
            msr::SYSENTER_ESP => self.msrs.sysenter_esp = canonical(value)?,
            msr::SYSENTER_EIP => self.msrs.sysenter_eip = canonical(value)?,
            // No supervisor state component is offered.
            msr::XSS => {
                self.require(Feature::Xsaves)?;
                self.msrs.xss = within(value, 0)?;
            }
            // IBRS, STIBP and BHI_DIS_S: stored, see `arch::cpuid::capabilities`.
            msr::SPEC_CTRL => {
                self.require(Feature::SpecCtrl)?;
                let bhi_dis_s = if self.machine.cpuid.has(Feature::BhiCtrl) { 1 << 10 } else { 0 };
                self.msrs.spec_ctrl = within(value, 3 | bhi_dis_s)?;
            }
            // IBPB: translated branches do not leave the guest's targets in the predictors for it to flush.
            msr::PRED_CMD => {
                self.require(Feature::SpecCtrl)?;
                within(value, 1)?;
            }

            // Microcode updates start with a zero here; there are none.
            msr::BIOS_SIGN_ID => {}
            msr::MISC_ENABLE => {
                within(value & !MISC_ENABLE_FIXED, MISC_ENABLE_WRITABLE)?;
                self.msrs.misc_enable = value & MISC_ENABLE_WRITABLE;
            }
            msr::MCG_STATUS => self.msrs.mcg_status = within(value, MCG_STATUS_MASK)?,
            // Branch records and stepping on branches can be asked for, and do not happen.
            DEBUGCTL => drop(within(value, 3)?),

            msr::PAT => {
                if !value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7)) {
                    return Err(fault());
                }
                self.msrs.pat = value;
            }
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => self.set_kvm_clock(value),
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => self.write_kvm_wall_clock(value),
            _ => match self.write_amd_msr(index, value) {
                Some(result) => result?,
                None => self.write_mtrr(index, value)?,
            },
        }
        Ok(())
    }

    /// IA32_EFER: LMA is the processor's own, LME can't change while paging is on (Intel SDM 3A 2.2.1).
    fn write_efer(&mut self, value: u64) -> Result<(), Exception> {
        let no_execute = if self.msrs.misc_enable & NO_EXECUTE_DISABLED != 0 { efer::NXE } else { 0 };
        within(value, (self.machine.cpuid.efer_mask() | efer::LMA) & !no_execute)?;
        let changed = value ^ self.msrs.efer;
        if changed & efer::LME != 0 && self.cr0 & cr0::PG != 0 {
            return Err(fault());
        }
        self.msrs.efer = value & !efer::LMA | self.msrs.efer & efer::LMA;
        if changed & efer::NXE != 0 {
            self.mmu_flush_all();
        }
        Ok(())
    }

    /// The MSRs that are not at their reset values: for [`arch::CpuState::msrs`].
    pub fn saved_msrs(&self) -> Vec<(u32, u64)> {
        let saved = msr::SAVED.iter().copied().chain(msr::mtrrs());
        let differs = |&(index, value): &(u32, u64)| match index {
            msr::PAT => value != Msrs::default().pat,
            msr::MISC_ENABLE => value != Msrs::default().misc_enable | MISC_ENABLE_FIXED,
            msr::APIC_BASE => value != self.shared.apic.reset_base(),
            _ => value != 0,
        };
        saved.filter_map(|i| self.read_msr(i).ok().map(|v| (i, v))).filter(differs).collect()
    }

    /// Sets all MSRs: to what [`Vcpu::saved_msrs`] or a loader gave, the others to their reset values. The error is one
    /// that can't be. The local APIC's registers must be in place already, for the deadline counts only in its mode.
    pub fn restore_msrs(&mut self, msrs: &[(u32, u64)]) -> Result<(), (u32, u64)> {
        self.msrs = Msrs::default();
        self.shared.apic.set_base(self.shared.apic.reset_base());
        for &(index, value) in msrs {
            let result = match index {
                // As they stand, whatever the way there was.
                msr::EFER => within(value, self.machine.cpuid.efer_mask() | efer::LMA).map(|v| self.msrs.efer = v),
                msr::APIC_BASE => self.check_apic_base(value).map(|()| self.shared.apic.set_base(value)),
                _ => self.write_msr(index, value),
            };
            result.map_err(|_| (index, value))?;
        }
        Ok(())
    }
}
