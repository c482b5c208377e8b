//! x87 errors with CR0.NE clear: they are not exceptions of the processor, but an interrupt that devices make of FERR#
//! (Intel SDM 1 8.7.2).
//!
//! An instruction that waits for the x87 stands still while an error is pending, until an interrupt comes: as IRQ 13 does,
//! if it is let through. The handler has IGNNE# asserted and may use the x87 then, error or not.

use arch::Vector;
use arch::registers::cr0;
use arch::state::Activity;

use crate::Vcpu;

impl Vcpu {
    /// Whether an exception is to be told by FERR# instead of being delivered.
    pub fn told_by_ferr(&self, vector: Vector) -> bool {
        vector == Vector::X87FloatingPoint && self.cr0 & cr0::NE == 0
    }

    /// The instruction at RIP waits for an x87 error to be handled.
    pub fn assert_ferr(&mut self) {
        if self.machine.bus().set_ferr(true) {
            // It is executed as if nothing were pending. The processor can do that only if nothing is.
            let (fcw, fsw) = (self.xsave.fcw(), self.xsave.fsw());
            self.xsave.set_x87_words(fcw, fsw & (fcw | !0x3f));
        } else {
            self.activity = Activity::Halted;
        }
    }

    /// An instruction may have cleared what was pending.
    pub fn settle_ferr(&mut self) {
        if self.cr0 & cr0::NE == 0 && !self.xsave.x87_pending() {
            self.machine.bus().set_ferr(false);
        }
    }
}
