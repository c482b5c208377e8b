//! 16550A serial ports.
//!
//! Data flow: the guest's registers are `uart`; what it sends goes through `output` to a sink on the host; what
//! the host sends comes in by [`Serial::push_input`], no more than the receiver holds, and a callback says when there
//! is room again. No baud rate slows this down; it only sets the character time-out.
//!
//! `vm-superio` has a serial port too. It ignores the FIFO control register, has no trigger levels, character
//! time-outs, line-status or modem-status interrupts, always shows an empty transmitter, and writes to its sink on the vCPU's
//! thread: too little of what this machine promises.

mod output;
mod uart;

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::Device;
use crate::clock::Clock;
use crate::irq::InterruptLine;
use crate::timer::{Timer, Timers};
use output::Output;
use uart::{Effect, Uart};

type Callback = Arc<dyn Fn() + Send + Sync>;

struct State {
    uart: Uart,
    /// The timer is armed for a character time-out.
    timing: bool,
    /// Input was turned away; whoever brought it wants to know of room.
    input_waits: bool,
    on_room: Option<Callback>,
}

/// As a [`Device`]: the eight ports of a UART.
pub struct Serial {
    state: Mutex<State>,
    output: Output,
    clock: Arc<dyn Clock>,
    line: InterruptLine,
    timer: Timer,
}

impl Serial {
    /// A port that sends to `sink`, from a thread of its own.
    pub fn new(
        clock: Arc<dyn Clock>,
        timers: &Timers,
        line: InterruptLine,
        sink: Box<dyn Write + Send>,
    ) -> std::io::Result<Arc<Self>> {
        // The thread needs the port, and the port the thread's queue.
        let late = Arc::new(Mutex::new(Weak::<Serial>::new()));
        let port = late.clone();
        let output = Output::start(sink, move || {
            let port = port.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
            if let Some(port) = port {
                port.transmit_held();
            }
        })?;
        let serial = Arc::new_cyclic(|serial: &Weak<Serial>| {
            let serial = serial.clone();
            let timer = timers.create(move || {
                if let Some(serial) = serial.upgrade() {
                    serial.time_out();
                }
            });
            let state = State { uart: Uart::new(), timing: false, input_waits: false, on_room: None };
            Serial { state: Mutex::new(state), output, clock, line, timer }
        });
        *late.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&serial);
        Ok(serial)
    }

    /// Gives the guest input. Returns how many of the bytes the port took; when it took fewer than all, the callback of
    /// [`on_room`](Self::on_room) runs once there is room again.
    pub fn push_input(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        let taken = state.uart.receive(bytes);
        state.input_waits = taken < bytes.len();
        self.update(&mut state, taken > 0);
        taken
    }

    /// Sets what runs when input that was turned away has room. It runs on a vCPU's thread, with no lock held, and
    /// should do no more than wake whoever reads the host's input.
    pub fn on_room(&self, callback: impl Fn() + Send + Sync + 'static) {
        self.lock().on_room = Some(Arc::new(callback));
    }

    /// Waits until the sink has all that the guest sent, for at most `patience`. Says whether it has.
    pub fn drain_output(&self, patience: Duration) -> bool {
        self.output.drain(patience)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drives the line and the character time-out after a change. `received` says that the receiver was active, which
    /// starts the time-out anew.
    fn update(&self, state: &mut State, received: bool) {
        self.line.set(state.uart.interrupt());
        let awaits = state.uart.awaits_time_out();
        if awaits && (received || !state.timing) {
            self.timer.arm(self.clock.now().saturating_add(state.uart.time_out_after()));
        } else if state.timing && !awaits {
            self.timer.cancel();
        }
        state.timing = awaits;
    }

    /// Called by the timer.
    fn time_out(&self) {
        let mut state = self.lock();
        if std::mem::take(&mut state.timing) {
            state.uart.set_time_out();
            self.update(&mut state, false);
        }
    }

    /// Called by the output thread when its queue has room.
    fn transmit_held(&self) {
        let mut state = self.lock();
        if state.uart.holds_back() {
            state.uart.release(|byte| self.output.push(byte));
            self.update(&mut state, false);
        }
    }

    fn transmit(&self, state: &mut State, byte: u8) {
        // Writing takes the interrupt back; the next one is a new edge.
        self.line.set(state.uart.interrupt());
        if !state.uart.holds_back() && self.output.push(byte) {
            state.uart.sent();
        } else {
            state.uart.hold(byte);
        }
    }

    /// Ends an access that may have made room; takes the lock, because the callback runs without it.
    fn finish(&self, mut state: MutexGuard<'_, State>, received: bool) {
        self.update(&mut state, received);
        let callback = if state.input_waits && state.uart.room() > 0 {
            state.input_waits = false;
            state.on_room.clone()
        } else {
            None
        };
        drop(state);
        if let Some(callback) = callback {
            callback();
        }
    }
}

impl Device for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        data.fill(state.uart.read(offset));
        self.finish(state, offset == 0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let mut state = self.lock();
        if let Effect::Transmit(byte) = state.uart.write(offset, value) {
            self.transmit(&mut state, byte);
        }
        self.finish(state, false);
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.uart = Uart::new();
        self.finish(state, false);
    }
}

#[cfg(test)]
mod tests;
