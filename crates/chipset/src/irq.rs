//! Interrupt lines: from devices to the interrupt controllers.
//!
//! Lines 0 to 15 are the ISA IRQs and reach both the 8259 pair and the I/O APIC; lines 16 to 23 reach the I/O APIC
//! only. Several devices may share a line: it is asserted while any of them asserts it.

use std::sync::{Arc, Mutex, PoisonError};

use crate::constants::{IOAPIC_PINS, PIT_GSI, PIT_IRQ};
use crate::ioapic::IoApic;
use crate::pic::{CASCADE, Pic};

/// The wiring of all lines.
pub struct Lines {
    /// How many devices assert each line. The lock is held while the controllers hear of a change, so that they hear
    /// of changes in order.
    assertions: [Mutex<u32>; IOAPIC_PINS],
    pic: Arc<Pic>,
    ioapic: Arc<IoApic>,
}

impl Lines {
    pub fn new(pic: Arc<Pic>, ioapic: Arc<IoApic>) -> Self {
        Lines { assertions: Default::default(), pic, ioapic }
    }

    /// One device's connection to line `number`, not asserted. A line that isn't there goes nowhere.
    pub fn connect(self: &Arc<Self>, number: u8) -> InterruptLine {
        InterruptLine { lines: self.clone(), number, asserted: Mutex::new(false) }
    }

    fn change(&self, number: u8, assert: bool) {
        let Some(count) = self.assertions.get(usize::from(number)) else { return };
        let mut count = count.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *count > 0;
        *count = if assert { count.saturating_add(1) } else { count.saturating_sub(1) };
        let after = *count > 0;
        if before != after {
            self.drive(number, after);
        }
    }

    fn drive(&self, number: u8, level: bool) {
        if number < 16 && number != CASCADE {
            self.pic.set_line(number, level);
        }
        match number {
            // On a PC the timer comes in at input 2, which the cascade leaves free.
            PIT_IRQ => self.ioapic.set_line(PIT_GSI, level),
            CASCADE => {}
            _ => self.ioapic.set_line(number, level),
        }
    }

    #[cfg(test)]
    pub fn asserted(&self, number: u8) -> bool {
        *self.assertions[usize::from(number)].lock().unwrap() > 0
    }
}

/// One device's end of an interrupt line.
pub struct InterruptLine {
    lines: Arc<Lines>,
    number: u8,
    asserted: Mutex<bool>,
}

impl InterruptLine {
    /// Asserts the line or lets go of it; saying the same twice changes nothing.
    pub fn set(&self, assert: bool) {
        let mut asserted = self.asserted.lock().unwrap_or_else(PoisonError::into_inner);
        if *asserted != assert {
            *asserted = assert;
            self.lines.change(self.number, assert);
        }
    }

    pub fn raise(&self) {
        self.set(true);
    }

    pub fn lower(&self) {
        self.set(false);
    }

    pub fn number(&self) -> u8 {
        self.number
    }
}

impl Drop for InterruptLine {
    fn drop(&mut self) {
        self.lower();
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Controllers, read8, write8};

    /// The 8259 pair's requests: what its IRRs say.
    fn requests(all: &Controllers) -> u16 {
        u16::from(read8(&*all.pic, 0)) | u16::from(read8(&*all.pic, 2)) << 8
    }

    #[test]
    fn a_shared_line_stays_asserted_until_the_last_device_lets_go() {
        let all = Controllers::new();
        let (a, b) = (all.lines.connect(5), all.lines.connect(5));
        a.raise();
        a.raise();
        b.raise();
        a.lower();
        assert_eq!(requests(&all), 1 << 5);
        drop(b);
        assert_eq!(requests(&all), 0);
    }

    #[test]
    fn the_timer_reaches_input_2_of_the_io_apic() {
        let all = Controllers::new();
        for (register, value) in [(0x14, 0x30u32), (0x10, 0x31)] {
            write8(&*all.ioapic, 0, register);
            crate::Device::write(&*all.ioapic, 0x10, &value.to_le_bytes());
        }
        all.lines.connect(0).raise();
        assert_eq!(all.recorder.take(), [(0xfee0_0000, 0x4030)]);
    }

    #[test]
    fn lines_from_16_up_leave_the_8259_pair_alone() {
        let all = Controllers::new();
        let lines: Vec<_> = (16..=255).map(|n| all.lines.connect(n)).collect();
        lines.iter().for_each(|line| line.raise());
        assert_eq!(requests(&all), 0);
    }
}
