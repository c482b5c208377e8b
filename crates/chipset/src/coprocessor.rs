//! How a PC hears of x87 errors (Intel SDM 1 8.7.2; ICH9 datasheet 13.7.2): with CR0.NE clear the processor asserts
//! FERR#, which becomes IRQ 13. The handler writes to port F0H: that ends the interrupt and asserts IGNNE#, under which the
//! processor goes on regardless, until the error is gone and FERR# with it.

use std::sync::{Mutex, PoisonError};

use crate::Device;
use crate::irq::InterruptLine;

pub const ERROR_IRQ: u8 = 13;
pub const ERROR_PORT: u16 = 0xf0;

#[derive(Default)]
struct Pins {
    ferr: bool,
    ignne: bool,
}

/// The logic between FERR#, IRQ 13 and IGNNE#.
pub struct CoprocessorError {
    pins: Mutex<Pins>,
    line: InterruptLine,
}

impl CoprocessorError {
    pub fn new(line: InterruptLine) -> Self {
        CoprocessorError { pins: Mutex::default(), line }
    }

    /// The processor drives FERR#, and reads IGNNE#.
    pub fn set_ferr(&self, asserted: bool) -> bool {
        let mut pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        if asserted != pins.ferr {
            *pins = Pins { ferr: asserted, ignne: false };
            self.line.set(asserted);
        }
        pins.ignne
    }
}

impl Device for CoprocessorError {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {
        let mut pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        pins.ignne = pins.ferr;
        self.line.lower();
    }

    fn reset(&self) {
        self.set_ferr(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Controllers, write8};

    #[test]
    fn an_error_interrupts_until_port_f0_and_is_ignored_until_it_is_gone() {
        let all = Controllers::default();
        let error = CoprocessorError::new(all.lines.connect(ERROR_IRQ));
        write8(&error, 0, 0);
        assert!(!error.set_ferr(true), "what came before the error does not count");
        assert!(all.lines.asserted(ERROR_IRQ));
        write8(&error, 0, 0);
        assert!(!all.lines.asserted(ERROR_IRQ));
        assert!(error.set_ferr(true));
        assert!(!all.lines.asserted(ERROR_IRQ));
        error.set_ferr(false);
        assert!(!error.set_ferr(true));
        assert!(all.lines.asserted(ERROR_IRQ));
        error.reset();
        assert!(!all.lines.asserted(ERROR_IRQ));
    }
}
