//! 16550A serial ports.
//!
//! Data flow: the guest's registers are `uart`; what it sends goes through `output` to a sink on the host; what the host
//! sends waits in a queue from which the receiver is filled. No baud rate slows this down; it only sets the character
//! time-out.
//!
//! Input is never lost: it stays in the queue until a driver listens, and goes back there if the driver throws its
//! FIFO away unread, as drivers do when they open a port. To the guest that looks like bytes that came a
//! little later. So a script can be piped into a machine that has yet to boot.
//!
//! `vm-superio` has a serial port too. It ignores the FIFO control register, has no trigger levels, character
//! time-outs, line-status or modem-status interrupts, always shows an empty transmitter, and writes to its sink on the vCPU's
//! thread: too little of what this machine promises.

mod output;
mod uart;

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::Device;
use crate::clock::Clock;
use crate::irq::InterruptLine;
use crate::timer::{Timer, Timers};
pub use output::Output;
use uart::{Effect, Uart};

/// How many bytes of input may wait for the guest.
const INPUT_CAPACITY: usize = 64 << 10;
/// How long a sink may take nothing before [`Serial::flush`] gives it up.
const PATIENCE: Duration = Duration::from_secs(10);

struct State {
    uart: Uart,
    /// Input for which the receiver has no room yet, or that nobody listens for.
    waiting: VecDeque<u8>,
    /// The timer is armed for a character time-out.
    timing: bool,
}

impl State {
    /// Hands waiting input to the receiver. Says whether there was any.
    fn feed(&mut self) -> bool {
        for byte in self.uart.take_discarded().into_iter().rev() {
            self.waiting.push_front(byte);
        }
        let count = self.uart.room().min(self.waiting.len());
        self.waiting.drain(..count).for_each(|byte| self.uart.receive(byte));
        count > 0
    }
}

/// As a [`Device`]: the eight ports of a UART.
pub struct Serial {
    state: Mutex<State>,
    /// There is less waiting input than there was.
    room: Condvar,
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
            let state = Mutex::new(State { uart: Uart::new(), waiting: VecDeque::new(), timing: false });
            Serial { state, room: Condvar::new(), output, clock, line, timer }
        });
        *late.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&serial);
        Ok(serial)
    }

    /// Gives the guest input. Returns how many of the bytes the port took: the rest found 64 KiB
    /// waiting.
    pub fn push_input(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        let taken = bytes.len().min(INPUT_CAPACITY.saturating_sub(state.waiting.len()));
        state.waiting.extend(bytes.iter().take(taken));
        let received = state.feed();
        self.update(&mut state, received);
        taken
    }

    /// Gives the guest input, and waits while too much of it waits already.
    pub fn send_input(&self, bytes: &[u8]) {
        let mut rest = bytes;
        loop {
            let taken = self.push_input(rest);
            rest = rest.get(taken..).unwrap_or_default();
            if rest.is_empty() {
                return;
            }
            let full = |state: &mut State| state.waiting.len() >= INPUT_CAPACITY;
            drop(self.room.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Waits until the sink has all that the guest sent. A sink that takes nothing for ten seconds is given up.
    pub fn flush(&self) {
        if !self.output.flush(PATIENCE) {
            tracing::warn!("serial port output is lost: nobody has read any for {} seconds", PATIENCE.as_secs());
        }
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

    /// Follows an access of the guest. `read` says that it took a byte from the receiver.
    fn finish(&self, state: &mut State, read: bool) {
        let received = state.feed();
        if received {
            self.room.notify_all();
        }
        self.update(state, read || received);
    }
}

impl Device for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        data.fill(state.uart.read(offset));
        self.finish(&mut state, offset == 0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let mut state = self.lock();
        if let Effect::Transmit(byte) = state.uart.write(offset, value) {
            self.transmit(&mut state, byte);
        }
        self.finish(&mut state, false);
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.uart.reset();
        self.finish(&mut state, false);
    }
}

#[cfg(test)]
mod tests;
