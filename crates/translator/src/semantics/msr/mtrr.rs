//! Memory type range registers (Intel SDM 3A 12.11): checked and kept. Translated code always uses the host's memory as
//! what it is, write-back; that is transparent to the guest but for speed.

use arch::{Exception, msr};

use super::{fault, within};
use crate::Vcpu;

/// Eight variable ranges, fixed ranges, write-combining.
const CAPABILITIES: u64 = 8 | 1 << 8 | 1 << 10;

fn valid_type(t: u8) -> bool {
    matches!(t, 0 | 1 | 4 | 5 | 6)
}

/// Which field of [`crate::cpu::Msrs`] an MTRR is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mtrr {
    DefaultType,
    Variable(usize),
    Fixed(usize),
}

fn decode(index: u32) -> Option<Mtrr> {
    Some(match index {
        msr::MTRR_DEF_TYPE => Mtrr::DefaultType,
        _ if (msr::MTRR_PHYS_BASE0..msr::MTRR_PHYS_BASE0 + 16).contains(&index) => {
            Mtrr::Variable((index - msr::MTRR_PHYS_BASE0) as usize)
        }
        msr::MTRR_FIX_64K => Mtrr::Fixed(0),
        msr::MTRR_FIX_16K_80000 => Mtrr::Fixed(1),
        msr::MTRR_FIX_16K_A0000 => Mtrr::Fixed(2),
        _ if (msr::MTRR_FIX_4K_C0000..msr::MTRR_FIX_4K_C0000 + 8).contains(&index) => {
            Mtrr::Fixed((index - msr::MTRR_FIX_4K_C0000) as usize + 3)
        }
        _ => return None,
    })
}

impl Vcpu {
    pub(super) fn read_mtrr(&self, index: u32) -> Option<u64> {
        if index == msr::MTRR_CAP {
            return Some(CAPABILITIES);
        }
        match decode(index)? {
            Mtrr::DefaultType => Some(self.msrs.mtrr_def_type),
            Mtrr::Variable(i) => self.msrs.mtrr_variable.get(i).copied(),
            Mtrr::Fixed(i) => self.msrs.mtrr_fixed.get(i).copied(),
        }
    }

    pub(super) fn write_mtrr(&mut self, index: u32, value: u64) -> Result<(), Exception> {
        let address = ((1 << self.machine.cpuid.physical_bits()) - 1) & !0xfff;
        let slot = match decode(index).ok_or_else(fault)? {
            Mtrr::DefaultType => {
                // Type, fixed-range enable, enable.
                within(value, 0xcff)?;
                Some(&mut self.msrs.mtrr_def_type).filter(|_| valid_type(value as u8))
            }
            Mtrr::Variable(i) if i % 2 == 0 => {
                within(value, address | 0xff)?;
                self.msrs.mtrr_variable.get_mut(i).filter(|_| valid_type(value as u8))
            }
            Mtrr::Variable(i) => {
                const VALID: u64 = 1 << 11;
                within(value, address | VALID)?;
                self.msrs.mtrr_variable.get_mut(i)
            }
            Mtrr::Fixed(i) => {
                self.msrs.mtrr_fixed.get_mut(i).filter(|_| value.to_le_bytes().into_iter().all(valid_type))
            }
        };
        *slot.ok_or_else(fault)? = value;
        Ok(())
    }
}
