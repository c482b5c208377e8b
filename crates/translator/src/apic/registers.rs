//! The local APIC's registers as the guest reads and writes them: as 32-bit words of the MMIO page in xAPIC mode, as
//! MSRs 0x800-0x83f in x2APIC mode (Intel SDM 3A 11.4.1, 11.12.1.2). Both forms meet in [`Vcpu::apic_register`] and
//! [`Vcpu::set_apic_register`].

use std::sync::atomic::Ordering;

use arch::{Exception, msr};

use super::{Apic, Mode, SVR_ENABLE, base, error};
use crate::Vcpu;
use crate::interrupts::{Delivery, Destination, Message};
use crate::shared::request;

/// Register numbers: the MMIO offset / 16, the MSR number - 0x800.
pub mod reg {
    pub const ID: usize = 0x02;
    pub const VERSION: usize = 0x03;
    pub const TPR: usize = 0x08;
    pub const APR: usize = 0x09;
    pub const PPR: usize = 0x0a;
    pub const EOI: usize = 0x0b;
    pub const RRD: usize = 0x0c;
    pub const LDR: usize = 0x0d;
    pub const DFR: usize = 0x0e;
    pub const SVR: usize = 0x0f;
    pub const ISR: usize = 0x10;
    pub const TMR: usize = 0x18;
    pub const IRR: usize = 0x20;
    pub const ESR: usize = 0x28;
    pub const ICR: usize = 0x30;
    pub const ICR_HIGH: usize = 0x31;
    pub const LVT_TIMER: usize = 0x32;
    pub const LVT_THERMAL: usize = 0x33;
    pub const LVT_PERFORMANCE: usize = 0x34;
    pub const LVT_LINT0: usize = 0x35;
    pub const LVT_LINT1: usize = 0x36;
    pub const LVT_ERROR: usize = 0x37;
    pub const INITIAL_COUNT: usize = 0x38;
    pub const CURRENT_COUNT: usize = 0x39;
    pub const DIVIDE: usize = 0x3e;
    pub const SELF_IPI: usize = 0x3f;

    pub const LVTS: std::ops::RangeInclusive<usize> = LVT_TIMER..=LVT_ERROR;
}

/// Local vector table entries (Intel SDM 3A figure 11-8).
pub mod lvt {
    pub const MASKED: u32 = 1 << 16;
    /// What [`delivery`] gives.
    pub const FIXED: u32 = 0;
    pub const NMI: u32 = 4;
    pub const EXTINT: u32 = 7;

    pub const fn delivery(entry: u32) -> u32 {
        entry >> 8 & 7
    }
}

/// Version 0x14 (an integrated APIC) with six LVT entries, without suppression of EOI broadcasts.
const VERSION: u32 = 0x14 | 5 << 16;
/// Delivery status and remote IRR of an LVT entry: read-only, not reserved.
const LVT_STATUS: u32 = 1 << 12 | 1 << 14;
const ICR_STATUS: u32 = 1 << 12;
/// Reserved bits of the x2APIC's ICR.
const ICR_RESERVED: u64 = 0xfff3_2000;

/// The writable bits of an LVT entry.
const fn lvt_mask(register: usize) -> u32 {
    match register {
        reg::LVT_TIMER => 0x7_00ff,
        reg::LVT_LINT0 | reg::LVT_LINT1 => 0x1_a7ff,
        reg::LVT_ERROR => 0x1_00ff,
        _ => 0x1_07ff,
    }
}

impl Apic {
    /// The logical id (Intel SDM 3A 11.6.2.2, 11.12.10.2).
    pub(crate) fn ldr(&self) -> u32 {
        match self.mode() {
            Mode::X2apic => (self.id >> 4) << 16 | 1 << (self.id & 15),
            _ => self.get(reg::LDR),
        }
    }

    /// The xAPIC's logical ids are clusters of four rather than a flat set of eight.
    pub(crate) fn clustered(&self) -> bool {
        self.get(reg::DFR) >> 28 != 0xf
    }
}

/// The registers themselves.
impl Vcpu {
    /// All of them for [`arch::CpuState`]: as the MMIO page shows them, 16 bytes apart.
    pub fn saved_apic(&self) -> Vec<u8> {
        let mut page = self.shared.apic.save();
        for register in [reg::ID, reg::VERSION, reg::PPR, reg::LDR, reg::CURRENT_COUNT] {
            if let Some(place) = page.get_mut(16 * register..).and_then(|rest| rest.first_chunk_mut()) {
                *place = self.apic_register(register).to_le_bytes();
            }
        }
        page
    }

    fn apic_register(&self, register: usize) -> u32 {
        let apic = &self.shared.apic;
        match register {
            reg::ID if apic.mode() == Mode::X2apic => apic.id,
            reg::ID => apic.id << 24,
            reg::VERSION => VERSION,
            reg::PPR => u32::from(apic.ppr()),
            reg::LDR => apic.ldr(),
            reg::CURRENT_COUNT => self.apic_timer_count(),
            _ => apic.get(register),
        }
    }

    fn set_apic_register(&mut self, register: usize, value: u32) {
        let shared = self.shared.clone();
        let apic = &shared.apic;
        match register {
            reg::TPR => self.set_task_priority(value as u8),
            reg::EOI => self.end_of_interrupt(),
            reg::LDR => apic.set(reg::LDR, value & 0xff00_0000),
            reg::DFR => apic.set(reg::DFR, value | 0x0fff_ffff),
            reg::SVR => {
                apic.set(reg::SVR, value & 0x1ff);
                if value & SVR_ENABLE == 0 {
                    reg::LVTS.for_each(|l| apic.set(l, apic.get(l) | lvt::MASKED));
                }
            }
            // Writing shows the errors gathered since the last write, whatever the value (Intel SDM 3A 11.5.3).
            reg::ESR => apic.set(reg::ESR, apic.errors.swap(0, Ordering::Relaxed)),
            reg::ICR => {
                apic.set(reg::ICR, value & !ICR_STATUS);
                self.send_ipi(value);
            }
            reg::ICR_HIGH => apic.set(reg::ICR_HIGH, value & 0xff00_0000),
            reg::LVT_TIMER..=reg::LVT_ERROR => self.set_lvt(register, value),
            reg::INITIAL_COUNT => self.start_apic_timer(value),
            reg::DIVIDE => {
                apic.set(reg::DIVIDE, value & 0xb);
            }
            reg::SELF_IPI => self.send_ipi(1 << 18 | value & 0xff),
            _ => {}
        }
    }

    fn set_lvt(&mut self, register: usize, value: u32) {
        let apic = &self.shared.apic;
        let forced = if apic.get(reg::SVR) & SVR_ENABLE == 0 { lvt::MASKED } else { 0 };
        let old = apic.get(register);
        apic.set(register, value & lvt_mask(register) | forced);
        match register {
            reg::LVT_TIMER => self.apic_timer_mode_changed(old),
            // The 8259 may be waiting at a pin that was masked.
            reg::LVT_LINT0 => self.shared.flag(request::INTERRUPT),
            _ => {}
        }
    }

    /// CR8 and TPR: a lowered priority may let an interrupt in.
    pub fn set_task_priority(&mut self, value: u8) {
        self.shared.apic.set(reg::TPR, u32::from(value));
        self.shared.flag(request::INTERRUPT);
    }

    fn end_of_interrupt(&mut self) {
        if let Some((vector, level)) = self.shared.apic.end_of_interrupt() {
            if level {
                self.machine.bus().end_of_interrupt(vector);
            }
            if self.shared.apic.deliverable().is_some() {
                self.shared.flag(request::INTERRUPT);
            }
        }
    }

    /// The error interrupt (Intel SDM 3A 11.5.3).
    fn apic_error(&mut self, bits: u32) {
        let apic = &self.shared.apic;
        apic.errors.fetch_or(bits, Ordering::Relaxed);
        let entry = apic.get(reg::LVT_ERROR);
        if entry & lvt::MASKED == 0 && entry as u8 >= 16 {
            self.shared.post_interrupt(entry as u8, false);
        }
    }

    /// A write to the low half of ICR (Intel SDM 3A 11.6.1).
    fn send_ipi(&mut self, icr: u32) {
        let apic = &self.shared.apic;
        let (id, high) = (apic.id, apic.get(reg::ICR_HIGH));
        let (delivery, vector) = (Delivery::from_bits(icr >> 8), icr as u8);
        let Some(delivery) = delivery.filter(|&d| d != Delivery::ExtInt) else {
            return;
        };
        if delivery.has_vector() && vector < 16 {
            return self.apic_error(error::SEND_ILLEGAL_VECTOR);
        }
        const LEVEL_ASSERT: u32 = 1 << 14;
        const LEVEL_TRIGGERED: u32 = 1 << 15;
        if delivery == Delivery::Init && icr & (LEVEL_ASSERT | LEVEL_TRIGGERED) == LEVEL_TRIGGERED {
            return; // INIT level de-assert only synchronizes arbitration ids, which are no more
        }
        let destination = match icr >> 18 & 3 {
            0 => {
                let x2apic = apic.mode() == Mode::X2apic;
                let target = if x2apic { high } else { high >> 24 };
                let broadcast = target == if x2apic { u32::MAX } else { 0xff };
                match icr & 1 << 11 {
                    _ if broadcast => Destination::All,
                    0 => Destination::Physical(target),
                    _ => Destination::Logical(target),
                }
            }
            1 => Destination::One(id),
            2 => Destination::All,
            _ => Destination::AllBut(id),
        };
        // IPIs are edge-triggered, INIT apart.
        self.machine.send(&Message { delivery, vector, level: false, redirect: false, destination });
    }
}

/// The MMIO page.
impl Vcpu {
    /// The register at `gpa`, if the local APIC's page is there.
    fn apic_page_offset(&self, gpa: u64) -> Option<u64> {
        let apic = &self.shared.apic;
        (apic.mode() == Mode::Xapic && gpa & !0xfff == apic.base() & !0xfff).then_some(gpa & 0xfff)
    }

    /// A read of the local APIC's page; false if `gpa` is not there.
    pub fn apic_mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let Some(offset) = self.apic_page_offset(gpa) else {
            return false;
        };
        // Only aligned 32-bit accesses are defined (Intel SDM 3A 11.4.1): smaller ones get their part of the word.
        let (register, byte) = ((offset / 16) as usize, (offset % 16) as usize);
        let value = match register {
            reg::APR | reg::RRD | reg::EOI | reg::SELF_IPI => 0,
            _ => self.apic_register(register),
        };
        let mut word = [0; 16];
        word[..4].copy_from_slice(&value.to_le_bytes());
        data.fill(0);
        data.iter_mut().zip(&word[byte..]).for_each(|(to, from)| *to = *from);
        true
    }

    /// A write to the local APIC's page; false if `gpa` is not there.
    pub fn apic_mmio_write(&mut self, gpa: u64, data: &[u8]) -> bool {
        let Some(offset) = self.apic_page_offset(gpa) else {
            return false;
        };
        if let (0, Ok(word)) = (offset % 16, <[u8; 4]>::try_from(data)) {
            match (offset / 16) as usize {
                reg::SELF_IPI => self.apic_error(error::ILLEGAL_REGISTER),
                register => self.set_apic_register(register, u32::from_le_bytes(word)),
            }
        }
        true
    }
}

/// The MSRs.
impl Vcpu {
    /// RDMSR of IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.shared.apic.base()
    }

    /// Whether IA32_APIC_BASE can hold `value`: no reserved bits, no x2APIC mode without the APIC.
    pub fn check_apic_base(&self, value: u64) -> Result<(), Exception> {
        let address = ((1 << self.machine.cpuid.physical_bits()) - 1) & !0xfff;
        let reserved = value & !(address | base::MODE | base::BSP) != 0;
        if reserved || value & base::MODE == base::X2APIC { Err(Exception::general_protection(0)) } else { Ok(()) }
    }

    /// WRMSR to IA32_APIC_BASE: illegal transitions (Intel SDM 3A figure 11-27) raise #GP as well.
    pub fn set_apic_base(&mut self, value: u64) -> Result<(), Exception> {
        self.check_apic_base(value)?;
        let (old, new) = (self.shared.apic.base() & base::MODE, value & base::MODE);
        let legal = matches!((old, new), (0, base::ENABLE) | (base::ENABLE, 0 | base::MODE) | (base::MODE, 0));
        if new != old && !legal {
            return Err(Exception::general_protection(0));
        }
        self.shared.apic.set_base(value);
        self.shared.flag(request::INTERRUPT);
        Ok(())
    }

    fn x2apic_register(&self, index: u32) -> Result<usize, Exception> {
        match self.shared.apic.mode() {
            Mode::X2apic => Ok(index.wrapping_sub(msr::X2APIC_FIRST) as usize),
            _ => Err(Exception::general_protection(0)),
        }
    }

    /// RDMSR of 0x800-0x8ff.
    pub fn x2apic_read(&self, index: u32) -> Result<u64, Exception> {
        match self.x2apic_register(index)? {
            reg::ICR => {
                let apic = &self.shared.apic;
                Ok(u64::from(apic.get(reg::ICR_HIGH)) << 32 | u64::from(apic.get(reg::ICR)))
            }
            register @ (reg::ID
            | reg::VERSION
            | reg::TPR
            | reg::PPR
            | reg::LDR
            | reg::SVR..=0x28
            | reg::LVT_TIMER..=reg::CURRENT_COUNT
            | reg::DIVIDE) => Ok(u64::from(self.apic_register(register))),
            _ => Err(Exception::general_protection(0)),
        }
    }

    /// WRMSR to 0x800-0x8ff.
    pub fn x2apic_write(&mut self, index: u32, value: u64) -> Result<(), Exception> {
        let register = self.x2apic_register(index)?;
        let allowed: u64 = match register {
            reg::TPR => 0xff,
            reg::EOI | reg::ESR => 0,
            reg::SVR => 0x1ff,
            reg::ICR => !ICR_RESERVED,
            reg::LVT_TIMER..=reg::LVT_ERROR => u64::from(lvt_mask(register) | LVT_STATUS),
            reg::INITIAL_COUNT => u64::from(u32::MAX),
            reg::DIVIDE => 0xb,
            reg::SELF_IPI => 0xff,
            _ => return Err(Exception::general_protection(0)),
        };
        if value & !allowed != 0 {
            return Err(Exception::general_protection(0));
        }
        if register == reg::ICR {
            self.shared.apic.set(reg::ICR_HIGH, (value >> 32) as u32);
        }
        self.set_apic_register(register, value as u32);
        Ok(())
    }
}
