//! Interrupt lines: from devices to the interrupt controllers.
//!
//! Lines 0 to 15 are the ISA IRQs and reach both the 8259 pair and the I/O APIC; lines 16 to 23, the PIRQs, reach the I/O
//! APIC, and the 8259 pair where the chipset routes them to an ISA IRQ. Several devices may share a line: it is asserted
//! while any of them asserts it.

use std::sync::{Arc, Mutex, PoisonError};

use crate::constants::{IOAPIC_PINS, PIT_GSI, PIT_IRQ};
use crate::ioapic::IoApic;
use crate::pic::{CASCADE, Pic};

/// Lines that can be routed to the 8259 pair: from 16 on.
pub const PIRQS: u8 = 8;
const FIRST_PIRQ: u8 = 16;

#[derive(Default)]
struct PicInputs {
    /// How many lines assert each input.
    assertions: [u32; 16],
    /// Where each PIRQ goes, and whether it is asserted.
    routes: [(Option<u8>, bool); PIRQS as usize],
}

/// The wiring of all lines.
pub struct Lines {
    /// How many devices assert each line. The lock is held while the controllers hear of a change, so that they hear
    /// of changes in order.
    assertions: [Mutex<u32>; IOAPIC_PINS],
    /// Locked after a line, and while the 8259 pair hears of a change.
    inputs: Mutex<PicInputs>,
    pic: Arc<Pic>,
    ioapic: Arc<IoApic>,
}

impl Lines {
    pub fn new(pic: Arc<Pic>, ioapic: Arc<IoApic>) -> Self {
        Lines { assertions: Default::default(), inputs: Mutex::default(), pic, ioapic }
    }

    /// One device's connection to line `number`, not asserted. A line that isn't there goes nowhere.
    pub fn connect(self: &Arc<Self>, number: u8) -> InterruptLine {
        InterruptLine { lines: self.clone(), number, level: Mutex::default() }
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
        let mut inputs = self.inputs.lock().unwrap_or_else(PoisonError::into_inner);
        match inputs.routes.get_mut(usize::from(number.wrapping_sub(FIRST_PIRQ))) {
            Some((route, asserted)) => {
                *asserted = level;
                let route = *route;
                self.drive_input(&mut inputs, route, level);
            }
            None if number != CASCADE => self.drive_input(&mut inputs, Some(number), level),
            None => {}
        }
        drop(inputs);
        match number {
            // On a PC the timer comes in at input 2, which the cascade leaves free.
            PIT_IRQ => self.ioapic.set_line(PIT_GSI, level),
            CASCADE => {}
            _ => self.ioapic.set_line(number, level),
        }
    }

    /// One line more, or one less, asserts an input of the 8259 pair.
    fn drive_input(&self, inputs: &mut PicInputs, input: Option<u8>, assert: bool) {
        let Some(input) = input else { return };
        let Some(count) = inputs.assertions.get_mut(usize::from(input)) else { return };
        let before = *count > 0;
        *count = if assert { count.saturating_add(1) } else { count.saturating_sub(1) };
        if before != (*count > 0) {
            self.pic.set_line(input, !before);
        }
    }

    /// Routes PIRQ `pirq` (0 is line 16) to an ISA IRQ of the 8259 pair, or nowhere.
    pub fn route(&self, pirq: u8, irq: Option<u8>) {
        let mut inputs = self.inputs.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((route, asserted)) = inputs.routes.get_mut(usize::from(pirq)) else { return };
        let (before, asserted) = (std::mem::replace(route, irq), *asserted);
        if before != irq && asserted {
            self.drive_input(&mut inputs, before, false);
            self.drive_input(&mut inputs, irq, true);
        }
    }

    #[cfg(any(test, feature = "testing"))]
    pub fn asserted(&self, number: u8) -> bool {
        *self.assertions[usize::from(number)].lock().unwrap() > 0
    }
}

/// One device's end of an interrupt line.
pub struct InterruptLine {
    lines: Arc<Lines>,
    number: u8,
    level: Mutex<Level>,
}

#[derive(Default)]
struct Level {
    /// The device asserts the line.
    asserted: bool,
    /// It is cut off from the line.
    muted: bool,
    /// What the line was told.
    driven: bool,
}

impl InterruptLine {
    /// Asserts the line or lets go of it; saying the same twice changes nothing.
    pub fn set(&self, assert: bool) {
        self.change(|level| level.asserted = assert);
    }

    /// Cuts the device off from the line, or joins them again: what it asserts counts only then.
    pub fn mute(&self, muted: bool) {
        self.change(|level| level.muted = muted);
    }

    fn change(&self, change: impl FnOnce(&mut Level)) {
        let mut level = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut level);
        let drive = level.asserted && !level.muted;
        if level.driven != drive {
            level.driven = drive;
            self.lines.change(self.number, drive);
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
    use crate::testing::{Controllers, write8};

    #[test]
    fn a_shared_line_stays_asserted_until_the_last_device_lets_go() {
        let all = Controllers::default();
        let (a, b) = (all.lines.connect(5), all.lines.connect(5));
        a.raise();
        a.raise();
        b.raise();
        a.lower();
        assert_eq!(all.requests(), 1 << 5);
        drop(b);
        assert_eq!(all.requests(), 0);
    }

    #[test]
    fn the_timer_reaches_input_2_of_the_io_apic() {
        let all = Controllers::default();
        for (register, value) in [(0x14, 0x30u32), (0x10, 0x31)] {
            write8(&*all.ioapic, 0, register);
            crate::Device::write(&*all.ioapic, 0x10, &value.to_le_bytes());
        }
        all.lines.connect(0).raise();
        assert_eq!(all.recorder.take(), [(0xfee0_0000, 0x4030)]);
    }

    #[test]
    fn lines_from_16_up_leave_the_8259_pair_alone() {
        let all = Controllers::default();
        let lines: Vec<_> = (16..=255).map(|n| all.lines.connect(n)).collect();
        lines.iter().for_each(|line| line.raise());
        assert_eq!(all.requests(), 0);
    }
}
