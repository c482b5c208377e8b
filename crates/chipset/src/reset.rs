//! The ports by which software resets the machine: the reset control register (0xcf9) and system control port A (0x92).
//!
//! The reset control register resets the whole machine. Port A, and the keyboard controller, send the processor to its
//! reset vector (INIT): so software for the 80286 left protected mode, and firmware knows what to do then.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::a20::A20Gate;
use crate::{Device, PowerEvents};

/// Reset control register (Intel ICH9 13.7.5): the 0 to 1 change of bit 2 resets; bits 1 and 3 say how.
const RESET_CPU: u8 = 1 << 2;
const KIND: u8 = 1 << 1 | 1 << 3;

/// The reset control register.
pub struct ResetControl {
    value: AtomicU8,
    power: Arc<dyn PowerEvents>,
}

impl ResetControl {
    pub fn new(power: Arc<dyn PowerEvents>) -> Self {
        ResetControl { value: AtomicU8::new(0), power }
    }
}

impl Device for ResetControl {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.value.load(Ordering::Relaxed));
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let before = self.value.swap(value & (RESET_CPU | KIND), Ordering::Relaxed);
        if value & !before & RESET_CPU != 0 {
            self.power.reset();
        }
    }

    fn reset(&self) {
        self.value.store(0, Ordering::Relaxed);
    }
}

/// System control port A: bit 1 is the A20 gate, the 0 to 1 change of bit 0 sends the processor to its reset vector.
pub struct SystemControlA {
    value: AtomicU8,
    gate: A20Gate,
    power: Arc<dyn PowerEvents>,
}

const FAST_RESET: u8 = 1 << 0;
const A20: u8 = 1 << 1;

impl SystemControlA {
    pub fn new(gate: A20Gate, power: Arc<dyn PowerEvents>) -> Self {
        SystemControlA { value: AtomicU8::new(0), gate, power }
    }
}

impl Device for SystemControlA {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        let a20 = if self.gate.enabled() { A20 } else { 0 };
        data.fill(self.value.load(Ordering::Relaxed) | a20);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        self.gate.set(value & A20 != 0);
        let before = self.value.swap(value & FAST_RESET, Ordering::Relaxed);
        if value & !before & FAST_RESET != 0 {
            self.power.init();
        }
    }

    fn reset(&self) {
        self.value.store(0, Ordering::Relaxed);
        self.gate.set(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::constants::RESET_VALUE;
    use crate::testing::{Power, read8, write8};

    #[test]
    fn the_reset_value_of_the_fadt_resets() {
        let power = Arc::new(Power::default());
        let register = ResetControl::new(power.clone());
        write8(&register, 0, RESET_VALUE);
        assert_eq!(power.take(), ["reset"]);
        register.reset();
        assert_eq!(read8(&register, 0), 0);
    }

    #[test]
    fn only_the_rise_of_the_reset_bit_resets() {
        let power = Arc::new(Power::default());
        let register = ResetControl::new(power.clone());
        for (value, resets) in [(0x02, 0), (0x06, 1), (0x0e, 0), (0x0a, 0), (0x04, 1)] {
            write8(&register, 0, value);
            assert_eq!(power.take().len(), resets, "{value:#x}");
            assert_eq!(read8(&register, 0), value);
        }
    }

    #[test]
    fn port_a_has_the_a20_gate_and_a_fast_reset() {
        let (power, ram) = (Arc::new(Power::default()), memory::Ram::new(4 << 20).unwrap());
        let port = SystemControlA::new(A20Gate::new(ram.map().clone()), power.clone());
        assert_eq!(read8(&port, 0), 0x02);
        write8(&port, 0, 0x00);
        assert!(power.take().is_empty() && !ram.map().a20());
        write8(&port, 0, 0x03);
        assert_eq!(power.take(), ["init"]);
        assert_eq!(read8(&port, 0), 0x03);
        write8(&port, 0, 0x01);
        port.reset();
        assert!(ram.map().a20());
    }
}
