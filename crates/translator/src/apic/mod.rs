//! The local APIC (Intel SDM 3A chapter 11), in its xAPIC and x2APIC modes.
//!
//! An [`Apic`] is shared: any thread [posts](Apic::post) a vector, which is an atomic bit in IRR, and then
//! [requests](crate::shared::request::INTERRUPT) the vCPU's attention. All else belongs to the vCPU's own thread:
//! [`registers`] is what the guest reads and writes, [`timer`] the timer, [`crate::events`] takes interrupts from here.
//! Messages between APICs and from devices find their targets in [`crate::interrupts`].

pub mod registers;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub mod timer;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use registers::{lvt, reg};

/// IA32_APIC_BASE's bits (Intel SDM 3A 11.4.4).
pub mod base {
    pub const BSP: u64 = 1 << 8;
    pub const X2APIC: u64 = 1 << 10;
    pub const ENABLE: u64 = 1 << 11;
    pub const MODE: u64 = ENABLE | X2APIC;
    pub const RESET_ADDRESS: u64 = 0xfee0_0000;
}

/// Spurious-interrupt vector register: the APIC is enabled by software.
pub const SVR_ENABLE: u32 = 1 << 8;

/// Error status register bits (Intel SDM 3A 11.5.3).
pub mod error {
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub const RECEIVED_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// How an APIC is addressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Disabled,
    Xapic,
    X2apic,
}

/// A vCPU's local APIC.
pub struct Apic {
    id: u32,
    /// IA32_APIC_BASE
    base: AtomicU64,
    /// Registers at the places where the MMIO page has them, 16 bytes apart there ([`reg`]).
    registers: [AtomicU32; 64],
    /// Errors since ESR was last written.
    errors: AtomicU32,
    /// An ExtINT message has arrived: the vector is to be fetched from the 8259.
    extint: AtomicBool,
    pub timer: timer::Timer,
}

/// One bit for each of 256 vectors, in eight registers from `first`.
type Vectors = usize;
const ISR: Vectors = reg::ISR;
const TMR: Vectors = reg::TMR;
const IRR: Vectors = reg::IRR;

fn place(vectors: Vectors, vector: u8) -> (usize, u32) {
    (vectors + usize::from(vector >> 5), 1 << (vector & 31))
}

impl Apic {
    /// The APIC after power-up: enabled by hardware, disabled by software. Id 0 is the bootstrap processor's.
    pub fn new(id: u32) -> Self {
        let apic = Apic {
            id,
            base: AtomicU64::new(0),
            registers: [const { AtomicU32::new(0) }; 64],
            errors: AtomicU32::new(0),
            extint: AtomicBool::new(false),
            timer: timer::Timer::default(),
        };
        apic.set_base(apic.reset_base());
        apic.reset();
        apic
    }

    /// IA32_APIC_BASE after power-up.
    pub fn reset_base(&self) -> u64 {
        base::RESET_ADDRESS | base::ENABLE | if self.id == 0 { base::BSP } else { 0 }
    }

    /// What INIT does: all registers but the id to their reset values; IA32_APIC_BASE stays (Intel SDM 3A 11.4.7.3).
    pub fn reset(&self) {
        for register in &self.registers {
            register.store(0, Ordering::Relaxed);
        }
        for register in reg::LVTS {
            self.set(register, lvt::MASKED);
        }
        if self.id == 0 {
            // Virtual wire mode, in which firmware leaves it, and KVM and QEMU start it: systems that know of no APIC get
            // the 8259's interrupts (MultiProcessor Specification 1.4, 3.6.2.2).
            self.set(reg::LVT_LINT0, lvt::EXTINT << 8);
        }
        self.set(reg::DFR, u32::MAX);
        self.set(reg::SVR, 0xff);
        self.errors.store(0, Ordering::Relaxed);
        self.extint.store(false, Ordering::Relaxed);
        self.timer.stop();
    }

    pub fn id(&self) -> u32 {
        self.id
    }

    /// IA32_APIC_BASE
    pub fn base(&self) -> u64 {
        self.base.load(Ordering::Relaxed)
    }

    /// Sets IA32_APIC_BASE, already checked. An APIC that is turned off forgets its state.
    pub fn set_base(&self, value: u64) {
        self.base.store(value, Ordering::Relaxed);
        if value & base::ENABLE == 0 {
            self.reset();
        }
    }

    pub fn mode(&self) -> Mode {
        match self.base() & base::MODE {
            base::ENABLE => Mode::Xapic,
            bits if bits & base::ENABLE != 0 => Mode::X2apic,
            _ => Mode::Disabled,
        }
    }

    pub fn bootstrap(&self) -> bool {
        self.base() & base::BSP != 0
    }

    /// Enabled by hardware and software: takes all messages. Otherwise only INIT, NMI and start-up ones, and none at all
    /// while disabled by hardware.
    pub fn enabled(&self) -> bool {
        self.mode() != Mode::Disabled && self.get(reg::SVR) & SVR_ENABLE != 0
    }

    fn get(&self, register: usize) -> u32 {
        self.registers.get(register).map_or(0, |r| r.load(Ordering::Relaxed))
    }

    fn set(&self, register: usize, value: u32) {
        if let Some(r) = self.registers.get(register) {
            r.store(value, Ordering::Relaxed);
        }
    }

    fn set_bit(&self, vectors: Vectors, vector: u8) -> bool {
        let (register, bit) = place(vectors, vector);
        self.registers.get(register).is_some_and(|r| r.fetch_or(bit, Ordering::SeqCst) & bit == 0)
    }

    fn clear_bit(&self, vectors: Vectors, vector: u8) {
        let (register, bit) = place(vectors, vector);
        if let Some(r) = self.registers.get(register) {
            r.fetch_and(!bit, Ordering::SeqCst);
        }
    }

    fn test_bit(&self, vectors: Vectors, vector: u8) -> bool {
        let (register, bit) = place(vectors, vector);
        self.get(register) & bit != 0
    }

    fn highest(&self, vectors: Vectors) -> Option<u8> {
        (0..8usize).rev().find_map(|i| {
            let word = self.get(vectors + i);
            (word != 0).then(|| (i as u32 * 32 + word.ilog2()) as u8)
        })
    }

    /// Accepts a vector of 16 or more. True: it was not pending yet, and the vCPU must be told.
    pub fn post(&self, vector: u8, level: bool) -> bool {
        if level {
            self.set_bit(TMR, vector);
        } else {
            self.clear_bit(TMR, vector);
        }
        self.set_bit(IRR, vector)
    }

    pub(crate) fn post_extint(&self) {
        self.extint.store(true, Ordering::SeqCst);
    }

    pub(crate) fn extint(&self) -> bool {
        self.extint.load(Ordering::SeqCst)
    }

    pub(crate) fn take_extint(&self) -> bool {
        self.extint.swap(false, Ordering::SeqCst)
    }

    pub fn tpr(&self) -> u8 {
        self.get(reg::TPR) as u8
    }

    /// The processor priority (Intel SDM 3A 11.8.3.1): the higher of the task's and that of the interrupt in service.
    pub fn ppr(&self) -> u8 {
        let (tpr, isr) = (self.tpr(), self.highest(ISR).unwrap_or(0));
        if tpr >> 4 >= isr >> 4 { tpr } else { isr & 0xf0 }
    }

    /// The pending vector whose class is above the processor priority's.
    pub fn deliverable(&self) -> Option<u8> {
        if self.mode() == Mode::Disabled {
            return None;
        }
        self.highest(IRR).filter(|v| v >> 4 > self.ppr() >> 4)
    }

    /// The processor takes `vector`: from pending to in service.
    pub fn acknowledge(&self, vector: u8) {
        self.clear_bit(IRR, vector);
        self.set_bit(ISR, vector);
    }

    /// The end of the interrupt in service, and whether it was level-triggered: then I/O APICs are to be told.
    pub fn end_of_interrupt(&self) -> Option<(u8, bool)> {
        let vector = self.highest(ISR)?;
        self.clear_bit(ISR, vector);
        Some((vector, self.test_bit(TMR, vector)))
    }

    /// Where the 8259's output goes on the bootstrap processor (Intel SDM 3A 11.5.1): LINT0, or INTR itself while the
    /// APIC is off.
    pub fn lint0(&self) -> Option<u32> {
        (self.mode() != Mode::Disabled).then(|| self.get(reg::LVT_LINT0))
    }

    /// Whether the 8259's output reaches the processor as an external interrupt.
    pub fn accepts_pic(&self) -> bool {
        self.lint0().is_none_or(|l| l & lvt::MASKED == 0 && lvt::delivery(l) == lvt::EXTINT)
    }

    /// The registers as the MMIO page shows them, 16 bytes apart.
    pub fn save(&self) -> Vec<u8> {
        let mut out = vec![0; self.registers.len() * 16];
        for (slot, register) in out.chunks_exact_mut(16).zip(&self.registers) {
            slot[..4].copy_from_slice(&register.load(Ordering::Relaxed).to_le_bytes());
        }
        out
    }

    /// Takes the registers back; an empty slice means reset state. False if there are not all of them.
    pub fn load(&self, data: &[u8]) -> bool {
        self.reset();
        if data.is_empty() {
            return true;
        }
        if data.len() < self.registers.len() * 16 {
            return false;
        }
        for (slot, register) in data.chunks_exact(16).zip(&self.registers) {
            register.store(slot.iter().take(4).rev().fold(0, |v, &b| v << 8 | u32::from(b)), Ordering::Relaxed);
        }
        true
    }
}
