//! The 8042 keyboard controller, with nothing plugged in: what software probes, the output port with A20 and reset, and
//! an honest time-out for whoever speaks to a keyboard or mouse.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::a20::A20Gate;
use crate::irq::InterruptLine;
use crate::{Device, PowerEvents};

/// The byte that waits in the output buffer.
#[derive(Clone, Copy)]
struct Output {
    byte: u8,
    /// From the second port (mouse).
    auxiliary: bool,
    /// In place of an answer that did not come.
    timed_out: bool,
}

/// Status register.
const OUTPUT_FULL: u8 = 1 << 0;
const SYSTEM_FLAG: u8 = 1 << 2;
const LAST_WAS_COMMAND: u8 = 1 << 3;
const NOT_LOCKED: u8 = 1 << 4;
const AUXILIARY_OUTPUT: u8 = 1 << 5;
const TIMED_OUT: u8 = 1 << 6;

/// Configuration byte, cell 0 of the controller's memory.
const KEYBOARD_INTERRUPT: u8 = 1 << 0;
const AUXILIARY_INTERRUPT: u8 = 1 << 1;
const KEYBOARD_OFF: u8 = 1 << 4;
const AUXILIARY_OFF: u8 = 1 << 5;
const TRANSLATE: u8 = 1 << 6;

/// Output port.
const NO_RESET: u8 = 1 << 0;
const A20: u8 = 1 << 1;
const OUTPUT_PORT: u8 = NO_RESET | 0xcc;

/// What a device that isn't there "answers": resend, with the time-out flag.
const RESEND: u8 = 0xfe;

struct State {
    memory: [u8; 32],
    output: Option<Output>,
    output_port: u8,
    /// The command that waits for its data byte.
    pending: Option<u8>,
    last_was_command: bool,
    gate: A20Gate,
}

impl State {
    fn new(gate: A20Gate) -> Self {
        let mut memory = [0; 32];
        memory[0] = SYSTEM_FLAG | KEYBOARD_OFF | AUXILIARY_OFF | TRANSLATE;
        State { memory, output: None, output_port: OUTPUT_PORT, pending: None, last_was_command: false, gate }
    }

    fn status(&self) -> u8 {
        let output = match self.output {
            None => 0,
            Some(output) => {
                let auxiliary = if output.auxiliary { AUXILIARY_OUTPUT } else { 0 };
                let timed_out = if output.timed_out { TIMED_OUT } else { 0 };
                OUTPUT_FULL | auxiliary | timed_out
            }
        };
        let command = if self.last_was_command { LAST_WAS_COMMAND } else { 0 };
        output | command | self.memory[0] & SYSTEM_FLAG | NOT_LOCKED
    }

    fn reply(&mut self, byte: u8) {
        self.output = Some(Output { byte, auxiliary: false, timed_out: false });
    }

    fn time_out(&mut self, auxiliary: bool) {
        self.output = Some(Output { byte: RESEND, auxiliary, timed_out: true });
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
                let full = if self.output.is_some() { 1 << 4 } else { 0 };
                let a20 = if self.gate.enabled() { A20 } else { 0 };
                self.reply(self.output_port & !(1 << 4 | A20) | full | a20);
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
            Some(0xd3) => self.output = Some(Output { byte, auxiliary: true, timed_out: false }),
            Some(_) => self.time_out(true),
            None => {
                self.memory[0] &= !KEYBOARD_OFF;
                self.time_out(false);
            }
        }
        false
    }
}

/// As a [`Device`]: offset 0 is the data port, offset 1 the status and command port.
pub struct KeyboardController {
    state: Mutex<State>,
    keyboard_line: InterruptLine,
    auxiliary_line: InterruptLine,
    power: Arc<dyn PowerEvents>,
}

/// The IRQs of keyboard and mouse.
pub const KEYBOARD_IRQ: u8 = 1;
pub const AUXILIARY_IRQ: u8 = 12;

impl KeyboardController {
    pub fn new(
        keyboard_line: InterruptLine,
        auxiliary_line: InterruptLine,
        gate: A20Gate,
        power: Arc<dyn PowerEvents>,
    ) -> Self {
        KeyboardController { state: Mutex::new(State::new(gate)), keyboard_line, auxiliary_line, power }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Interrupts while a byte waits.
    fn update(&self, state: &State) {
        let waits = |auxiliary: bool| state.output.is_some_and(|output| output.auxiliary == auxiliary);
        self.keyboard_line.set(waits(false) && state.memory[0] & KEYBOARD_INTERRUPT != 0);
        self.auxiliary_line.set(waits(true) && state.memory[0] & AUXILIARY_INTERRUPT != 0);
    }
}

impl Device for KeyboardController {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        let value = match offset {
            0 => state.output.take().map_or(0, |output| output.byte),
            _ => state.status(),
        };
        self.update(&state);
        data.fill(value);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let mut state = self.lock();
        let reset = match offset {
            0 => state.data(value),
            _ => state.command(value),
        };
        // A new byte is a new edge, whatever waited before.
        self.keyboard_line.lower();
        self.auxiliary_line.lower();
        self.update(&state);
        drop(state);
        if reset {
            self.power.init();
        }
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.gate.set(true);
        *state = State::new(state.gate.clone());
        self.update(&state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Controllers, Power, poke, read8, write8};

    struct Bench {
        all: Controllers,
        power: Arc<Power>,
        device: KeyboardController,
    }

    impl Bench {
        fn new() -> Self {
            let all = Controllers::new();
            let power = Arc::new(Power::default());
            let (keyboard, auxiliary) = (all.lines.connect(KEYBOARD_IRQ), all.lines.connect(AUXILIARY_IRQ));
            let gate = A20Gate::new(memory::Ram::new(4 << 20).unwrap().map().clone());
            let device = KeyboardController::new(keyboard, auxiliary, gate, power.clone());
            Bench { all, power, device }
        }

        fn command(&self, command: u8) {
            write8(&self.device, 1, command);
        }

        fn data(&self, byte: u8) {
            write8(&self.device, 0, byte);
        }

        fn status(&self) -> u8 {
            read8(&self.device, 1)
        }

        fn ask(&self, command: u8) -> u8 {
            self.command(command);
            assert_ne!(self.status() & OUTPUT_FULL, 0);
            let answer = read8(&self.device, 0);
            assert_eq!(self.status() & OUTPUT_FULL, 0);
            answer
        }
    }

    #[test]
    fn the_controller_passes_its_tests() {
        let bench = Bench::new();
        assert_eq!(bench.status(), SYSTEM_FLAG | NOT_LOCKED);
        assert_eq!(bench.ask(0xaa), 0x55);
        assert_eq!(bench.ask(0xab), 0x00);
        assert_eq!(bench.ask(0xa9), 0x00);
    }

    #[test]
    fn the_configuration_byte_is_kept() {
        let bench = Bench::new();
        bench.command(0x60);
        assert_ne!(bench.status() & LAST_WAS_COMMAND, 0);
        bench.data(0x74);
        assert_eq!(bench.ask(0x20), 0x74);
        bench.command(0xae);
        assert_eq!(bench.ask(0x20), 0x64);
        bench.command(0xa8);
        assert_eq!(bench.ask(0x20), 0x44);
    }

    #[test]
    fn looped_bytes_interrupt_on_their_port() {
        let bench = Bench::new();
        bench.command(0x60);
        bench.data(KEYBOARD_INTERRUPT | AUXILIARY_INTERRUPT);
        for (command, irq, source) in [(0xd2, KEYBOARD_IRQ, 0), (0xd3, AUXILIARY_IRQ, AUXILIARY_OUTPUT)] {
            bench.command(command);
            bench.data(0xa5);
            assert!(bench.all.asserted(irq));
            assert_eq!(bench.status() & AUXILIARY_OUTPUT, source);
            assert_eq!(read8(&bench.device, 0), 0xa5);
            assert!(!bench.all.asserted(irq));
        }
    }

    #[test]
    fn a_keyboard_that_is_not_there_times_out() {
        let bench = Bench::new();
        bench.data(0xf2);
        assert_eq!(bench.status() & (TIMED_OUT | AUXILIARY_OUTPUT | OUTPUT_FULL), TIMED_OUT | OUTPUT_FULL);
        assert_eq!(read8(&bench.device, 0), RESEND);
        bench.command(0xd4);
        bench.data(0xf2);
        assert_eq!(bench.status() & (TIMED_OUT | AUXILIARY_OUTPUT), TIMED_OUT | AUXILIARY_OUTPUT);
    }

    #[test]
    fn reset_by_pulse_and_by_output_port() {
        let bench = Bench::new();
        bench.command(0xff);
        bench.command(0xd1);
        bench.data(0xdf);
        assert!(bench.power.take().is_empty());
        bench.command(0xfe);
        assert_eq!(bench.power.take(), ["init"]);
        bench.command(0xd1);
        bench.data(0xde);
        assert_eq!(bench.power.take(), ["init"]);
    }

    #[test]
    fn the_output_port_keeps_a20() {
        let bench = Bench::new();
        assert_ne!(bench.ask(0xd0) & A20, 0);
        bench.command(0xd1);
        bench.data(0xdd);
        assert_eq!(bench.ask(0xd0) & A20, 0);
        bench.command(0xdf);
        assert_ne!(bench.ask(0xd0) & A20, 0);
        bench.command(0xdd);
        bench.device.reset();
        assert_ne!(bench.ask(0xd0) & A20, 0);
    }

    #[test]
    fn random_accesses_do_no_harm() {
        let bench = Bench::new();
        poke(&bench.device, 2, 200_000, |_| {
            bench.power.take();
        });
    }
}
