//! The local APIC's registers, 16 bytes apart on both sides.

use arch::CpuState;
use kvm_bindings::kvm_lapic_state;
use kvm_ioctls::VcpuFd;

use crate::Error;

/// IA32_APIC_BASE (Intel SDM 3A 11.4.4).
const BASE: u64 = 0xfee0_0000;
const BASE_BSP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;

/// Numbers of registers: the MMIO offset / 16.
mod register {
    pub const ID: usize = 0x02;
    pub const TPR: usize = 0x08;
    pub const LDR: usize = 0x0d;
    pub const DFR: usize = 0x0e;
    pub const SVR: usize = 0x0f;
    pub const ISR: usize = 0x10;
    pub const IRR: usize = 0x20;
    pub const LVT_LINT0: usize = 0x35;
    pub const LVTS: std::ops::RangeInclusive<usize> = 0x32..=0x37;
}

/// IA32_APIC_BASE after power-on.
pub fn reset_base(id: u32) -> u64 {
    BASE | BASE_ENABLE | if id == 0 { BASE_BSP } else { 0 }
}

fn get(apic: &[u8], register: usize) -> u32 {
    apic.get(16 * register..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

fn set(apic: &mut [u8], register: usize, value: u32) {
    if let Some(place) = apic.get_mut(16 * register..).and_then(|b| b.first_chunk_mut()) {
        *place = value.to_le_bytes();
    }
}

pub fn read(fd: &VcpuFd) -> Result<Vec<u8>, Error> {
    let state = fd.get_lapic().map_err(Error::call("give the local APIC"))?;
    Ok(state.regs.iter().map(|byte| *byte as u8).collect())
}

/// The registers after power-on (Intel SDM 3A 11.4.7.1).
fn reset() -> Vec<u8> {
    let mut apic = vec![0; size_of::<kvm_lapic_state>()];
    register::LVTS.for_each(|lvt| set(&mut apic, lvt, 1 << 16));
    set(&mut apic, register::DFR, u32::MAX);
    set(&mut apic, register::SVR, 0xff);
    apic
}

/// Sets all registers of processor `id`; IA32_APIC_BASE is `base` already.
pub fn write(fd: &VcpuFd, id: u32, state: &CpuState, base: u64) -> Result<(), Error> {
    let mut apic = if state.apic.is_empty() { reset() } else { state.apic.clone() };
    let size = size_of::<kvm_lapic_state>();
    if apic.len() < size {
        return Err(Error::State(format!("the local APIC state has {} bytes instead of {size}", apic.len())));
    }
    // What follows from the processor's number is not taken from elsewhere.
    if base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE | BASE_X2APIC {
        set(&mut apic, register::ID, id);
        set(&mut apic, register::LDR, (id >> 4) << 16 | 1 << (id & 15));
    } else {
        set(&mut apic, register::ID, id << 24);
    }
    if u64::from(get(&apic, register::TPR) >> 4) != state.cr8 {
        set(&mut apic, register::TPR, (state.cr8 as u32 & 0xf) << 4);
    }
    let mut lapic = kvm_lapic_state::default();
    lapic.regs.iter_mut().zip(&apic).for_each(|(to, from)| *to = *from as _);
    fd.set_lapic(&lapic).map_err(|error| Error::State(format!("KVM does not take its local APIC ({error})")))
}

/// What a rising edge of the 8259's output is to the processor, if not the 8259's interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lint0 {
    Fixed(u8),
    Nmi,
}

/// What the local vector table says about LINT0 (Intel SDM 3A 11.5.1).
pub fn lint0(fd: &VcpuFd) -> Result<Option<Lint0>, Error> {
    Ok(decode_lint0(get(&read(fd)?, register::LVT_LINT0)))
}

fn decode_lint0(entry: u32) -> Option<Lint0> {
    const MASKED: u32 = 1 << 16;
    match (entry & MASKED, entry >> 8 & 7) {
        (0, 0) if entry as u8 >= 16 => Some(Lint0::Fixed(entry as u8)),
        (0, 4) => Some(Lint0::Nmi),
        _ => None,
    }
}

/// Turns `vector` from in service to requested, if it is in service: what the processor would do who had not taken it.
pub fn take_back(apic: &mut [u8], vector: u8) -> bool {
    let (word, bit) = (usize::from(vector >> 5), 1 << (vector & 31));
    let in_service = get(apic, register::ISR + word);
    if in_service & bit == 0 {
        return false;
    }
    set(apic, register::ISR + word, in_service & !bit);
    let requested = get(apic, register::IRR + word);
    set(apic, register::IRR + word, requested | bit);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lint0_is_an_event_of_its_own_only_if_it_is_open_and_not_for_the_8259() {
        assert_eq!(decode_lint0(0x40), Some(Lint0::Fixed(0x40)));
        assert_eq!(decode_lint0(0x400), Some(Lint0::Nmi));
        for none in [0x1_0040, 0x1_0400, 0x700, 0x0f, 0x240] {
            assert_eq!(decode_lint0(none), None, "{none:#x}");
        }
    }

    #[test]
    fn an_interrupt_that_was_not_delivered_is_requested_again() {
        let mut apic = reset();
        set(&mut apic, register::ISR + 2, 1 << 5);
        assert!(take_back(&mut apic, 0x45));
        assert_eq!((get(&apic, register::ISR + 2), get(&apic, register::IRR + 2)), (0, 1 << 5));
        assert!(!take_back(&mut apic, 0x45));
    }
}
