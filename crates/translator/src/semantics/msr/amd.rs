//! MSRs that kernels read without asking on AMD processors (AMD64 APM vol. 2, appendix A; Processor Programming
//! References). Constants: what firmware sets up, and writes that agree with it.

use arch::Exception;

use super::{fault, within};
use crate::Vcpu;

const SYSCFG: u32 = 0xc001_0010;
const HWCR: u32 = 0xc001_0015;
const TOP_MEM: u32 = 0xc001_001a;
const TOP_MEM2: u32 = 0xc001_001d;
const NB_CFG: u32 = 0xc001_001f;
const VM_CR: u32 = 0xc001_0114;
const DE_CFG: u32 = 0xc001_1029;

/// HWCR: the TSC counts at the frequency of P-state 0.
const TSC_FREQ_SEL: u64 = 1 << 24;
/// VM_CR: SVM is locked and disabled.
const SVM_DISABLED: u64 = 1 << 3 | 1 << 4;
/// DE_CFG: LFENCE is serializing.
const LFENCE_SERIALIZE: u64 = 1 << 1;
/// SYSCFG: fixed MTRRs' extended attributes and TOM2.
const SYSCFG_WRITABLE: u64 = 0x7 << 18 | 1 << 21 | 1 << 22;

impl Vcpu {
    pub(super) fn read_amd_msr(&self, index: u32) -> Option<u64> {
        if !self.machine.cpuid.is_amd() {
            return None;
        }
        Some(match index {
            SYSCFG | NB_CFG => 0,
            HWCR => TSC_FREQ_SEL,
            TOP_MEM => memory::HOLE_START,
            TOP_MEM2 => memory::HIGH_START,
            VM_CR => SVM_DISABLED,
            DE_CFG => LFENCE_SERIALIZE,
            _ => return None,
        })
    }

    /// `None`: there is no such MSR.
    pub(super) fn write_amd_msr(&mut self, index: u32, value: u64) -> Option<Result<(), Exception>> {
        let constant = self.read_amd_msr(index)?;
        Some(match index {
            SYSCFG => within(value, SYSCFG_WRITABLE).map(drop),
            // Bits of HWCR that concern caches, SMM and power stay without effect.
            HWCR | NB_CFG | DE_CFG => Ok(()),
            _ if value == constant => Ok(()),
            _ => Err(fault()),
        })
    }
}
