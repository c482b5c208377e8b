//! The 8042 keyboard controller: two ports for keyboard and mouse, the output port with A20 and reset, and interrupts.
//!
//! Data flow: whoever types calls [`KeyboardController::key`], the [keyboard](crate::ps2::keyboard) makes scan codes of it,
//! and the controller takes them over, translated if software wants that, one byte at a time: the next one when software
//! has read the last. Bytes of software go the other way, to the controller itself or to a device.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::a20::A20Gate;
use crate::clock::Clock;
use crate::irq::InterruptLine;
use crate::ps2::codes;
use crate::ps2::keyboard::Keyboard;
use crate::ps2::mouse::Mouse;
use crate::timer::{Timer, Timers};
use crate::{Device, PowerEvents};

/// The byte that waits in the output buffer.
#[derive(Clone, Copy)]
struct Output {
    byte: u8,
    /// From the second port (mouse).
    auxiliary: bool,
}

/// Status register.
const OUTPUT_FULL: u8 = 1 << 0;
const SYSTEM_FLAG: u8 = 1 << 2;
const LAST_WAS_COMMAND: u8 = 1 << 3;
const NOT_LOCKED: u8 = 1 << 4;
const AUXILIARY_OUTPUT: u8 = 1 << 5;

/// Configuration byte, cell 0 of the controller's memory.
const KEYBOARD_INTERRUPT: u8 = 1 << 0;
const AUXILIARY_INTERRUPT: u8 = 1 << 1;
const KEYBOARD_OFF: u8 = 1 << 4;
const AUXILIARY_OFF: u8 = 1 << 5;
const TRANSLATE: u8 = 1 << 6;

/// Output port.
const NO_RESET: u8 = 1 << 0;
const A20: u8 = 1 << 1;
const KEYBOARD_FULL: u8 = 1 << 4;
const AUXILIARY_FULL: u8 = 1 << 5;
const OUTPUT_PORT: u8 = NO_RESET | 0xcc;

/// How long whoever types waits for software to take the key before.
const PATIENCE: Duration = Duration::from_millis(100);

struct State {
    memory: [u8; 32],
    output: Option<Output>,
    /// The output buffer has been filled since the interrupt lines were set.
    fresh: bool,
    /// What the data port reads while there is nothing new.
    last: u8,
    output_port: u8,
    /// The command that waits for its data byte.
    pending: Option<u8>,
    last_was_command: bool,
    gate: A20Gate,
    /// The keyboard has sent the byte that, translated, becomes the highest bit of the next.
    breaking: bool,
    keyboard: Keyboard,
    mouse: Mouse,
}

impl State {
    fn new(gate: A20Gate) -> Self {
        let mut memory = [0; 32];
        memory[0] = SYSTEM_FLAG | KEYBOARD_OFF | AUXILIARY_OFF | TRANSLATE;
        State {
            memory,
            output: None,
            fresh: false,
            last: 0,
            output_port: OUTPUT_PORT,
            pending: None,
            last_was_command: false,
            breaking: false,
            keyboard: Keyboard::new(),
            mouse: Mouse::new(),
            gate,
        }
    }

    fn status(&self) -> u8 {
        let output = match self.output {
            None => 0,
            Some(Output { auxiliary: false, .. }) => OUTPUT_FULL,
            Some(Output { auxiliary: true, .. }) => OUTPUT_FULL | AUXILIARY_OUTPUT,
        };
        let command = if self.last_was_command { LAST_WAS_COMMAND } else { 0 };
        output | command | self.memory[0] & SYSTEM_FLAG | NOT_LOCKED
    }

    fn put(&mut self, byte: u8, auxiliary: bool) {
        self.output = Some(Output { byte, auxiliary });
        self.last = byte;
        self.fresh = true;
    }

    /// The controller's own answer.
    fn reply(&mut self, byte: u8) {
        self.put(byte, false);
    }

    /// Takes the next byte of a device, if there is room and the device's port is on.
    fn fill(&mut self) {
        if self.output.is_none() && self.memory[0] & KEYBOARD_OFF == 0 {
            while let Some(byte) = self.keyboard.next() {
                if self.memory[0] & TRANSLATE == 0 {
                    self.breaking = false;
                    return self.put(byte, false);
                }
                if byte == 0xf0 {
                    self.breaking = true;
                    continue;
                }
                let release = if std::mem::take(&mut self.breaking) { 0x80 } else { 0 };
                return self.put(codes::translate(byte) | release, false);
            }
        }
        if self.output.is_none()
            && self.memory[0] & AUXILIARY_OFF == 0
            && let Some(byte) = self.mouse.next()
        {
            self.put(byte, true);
        }
    }

    /// A command byte at port 0x64. Says whether it resets the processor.
    fn command(&mut self, command: u8) -> bool {
        self.last_was_command = true;
        self.pending = None;
        match command {
            0x20..=0x3f => self.reply(self.memory[usize::from(command & 0x1f)]),
            0x60..=0x7f | 0xd1..=0xd4 => self.pending = Some(command),
            // No password.
            0xa4 => self.reply(0xf1),
            0xa7 => self.memory[0] |= AUXILIARY_OFF,
            0xa8 => self.memory[0] &= !AUXILIARY_OFF,
            // The lines of both ports are in order.
            0xa9 | 0xab => self.reply(0x00),
            // The self-test passes, and turns both ports off.
            0xaa => {
                self.memory[0] |= SYSTEM_FLAG | KEYBOARD_OFF | AUXILIARY_OFF;
                self.reply(0x55);
            }
            0xad => self.memory[0] |= KEYBOARD_OFF,
            0xae => self.memory[0] &= !KEYBOARD_OFF,
            // Input port: the keyboard is not locked.
            0xc0 => self.reply(0x80),
            0xd0 => {
                let full = match self.output {
                    None => 0,
                    Some(Output { auxiliary: false, .. }) => KEYBOARD_FULL,
                    Some(Output { auxiliary: true, .. }) => AUXILIARY_FULL,
                };
                let a20 = if self.gate.enabled() { A20 } else { 0 };
                self.reply(self.output_port & !(KEYBOARD_FULL | AUXILIARY_FULL | A20) | full | a20);
            }
            // The A20 gate without a data byte, as some controllers have it.
            0xdd | 0xdf => self.gate.set(command == 0xdf),
            // Test inputs: both clocks low.
            0xe0 => self.reply(0x00),
            // Pulses the output lines whose bits are clear.
            0xf0..=0xff => return command & NO_RESET == 0,
            _ => {}
        }
        false
    }

    /// A data byte at port 0x60. Says whether it resets the processor.
    fn data(&mut self, byte: u8) -> bool {
        self.last_was_command = false;
        match self.pending.take() {
            Some(command @ 0x60..=0x7f) => self.memory[usize::from(command & 0x1f)] = byte,
            Some(0xd1) => {
                self.output_port = byte;
                self.gate.set(byte & A20 != 0);
                return byte & NO_RESET == 0;
            }
            Some(0xd2) => self.reply(byte),
            Some(0xd3) => self.put(byte, true),
            // To a device: its port is on then.
            Some(_) => {
                self.memory[0] &= !AUXILIARY_OFF;
                self.mouse.write(byte);
            }
            None => {
                self.memory[0] &= !KEYBOARD_OFF;
                self.keyboard.write(byte);
            }
        }
        false
    }
}

/// As a [`Device`]: offset 0 is the data port, offset 1 the status and command port.
pub struct KeyboardController {
    state: Mutex<State>,
    /// Software has taken what was typed.
    taken: Condvar,
    keyboard_line: InterruptLine,
    auxiliary_line: InterruptLine,
    clock: Arc<dyn Clock>,
    /// When the key that is held down repeats.
    repetition: Timer,
    power: Arc<dyn PowerEvents>,
}

/// The IRQs of keyboard and mouse.
pub const KEYBOARD_IRQ: u8 = 1;
pub const AUXILIARY_IRQ: u8 = 12;

impl KeyboardController {
    pub fn new(
        clock: Arc<dyn Clock>,
        timers: &Timers,
        keyboard_line: InterruptLine,
        auxiliary_line: InterruptLine,
        gate: A20Gate,
        power: Arc<dyn PowerEvents>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let weak = weak.clone();
            let repetition = timers.create(move || {
                if let Some(controller) = weak.upgrade() {
                    controller.repeat();
                }
            });
            KeyboardController {
                state: Mutex::new(State::new(gate)),
                taken: Condvar::new(),
                keyboard_line,
                auxiliary_line,
                clock,
                repetition,
                power,
            }
        })
    }

    /// A key goes down or comes up: its code of the first scan code set, 0x80 set for those after 0xe0. Waits a little
    /// while software has not taken the keys before, as no keyboard can be typed on faster than it is read.
    pub fn key(&self, key: u8, down: bool) {
        let state = self.lock();
        let waiting = |state: &mut State| !state.keyboard.is_idle();
        let waited = self.taken.wait_timeout_while(state, PATIENCE, waiting);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.keyboard.key(key, down);
        match state.keyboard.repetition() {
            Some([delay, _]) if down => self.repetition.arm(self.clock.now().saturating_add(delay)),
            Some(_) => {}
            None => self.repetition.cancel(),
        }
        self.update(&mut state);
    }

    fn repeat(&self) {
        let mut state = self.lock();
        if let Some([_, period]) = state.keyboard.repetition() {
            state.keyboard.repeat();
            self.repetition.arm(self.clock.now().saturating_add(period));
            self.update(&mut state);
        }
    }

    /// The mouse moves by `dx` to the right and `dy` up, its wheel by `dz` towards the user, and these buttons are down
    /// now: from bit 0 on left, right, middle, and two at the sides.
    pub fn mouse(&self, dx: i32, dy: i32, dz: i32, buttons: u8) {
        let mut state = self.lock();
        state.mouse.event(dx, dy, dz, buttons);
        self.update(&mut state);
    }

    /// The lights of the keyboard: from bit 0 on scroll lock, num lock, caps lock.
    pub fn lights(&self) -> u8 {
        self.lock().keyboard.lights()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the next byte in, and interrupts while one waits.
    fn update(&self, state: &mut State) {
        state.fill();
        let waits = |auxiliary: bool| state.output.is_some_and(|output| output.auxiliary == auxiliary);
        let keyboard = waits(false) && state.memory[0] & KEYBOARD_INTERRUPT != 0;
        let auxiliary = waits(true) && state.memory[0] & AUXILIARY_INTERRUPT != 0;
        if std::mem::take(&mut state.fresh) {
            // A new byte is a new edge, whatever waited before.
            self.keyboard_line.lower();
            self.auxiliary_line.lower();
        }
        self.keyboard_line.set(keyboard);
        self.auxiliary_line.set(auxiliary);
        if state.keyboard.is_idle() {
            self.taken.notify_all();
        }
    }
}

impl Device for KeyboardController {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        let value = match offset {
            0 => {
                let byte = state.output.take().map_or(state.last, |output| output.byte);
                self.update(&mut state);
                byte
            }
            _ => state.status(),
        };
        data.fill(value);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let mut state = self.lock();
        let reset = match offset {
            0 => state.data(value),
            _ => state.command(value),
        };
        if state.keyboard.repetition().is_none() {
            self.repetition.cancel();
        }
        self.update(&mut state);
        drop(state);
        if reset {
            self.power.init();
        }
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.gate.set(true);
        *state = State::new(state.gate.clone());
        self.repetition.cancel();
        self.update(&mut state);
    }
}

#[cfg(test)]
mod tests;
