//! What software may expect of the controller and of what is plugged into it.

use super::*;
use crate::clock::fake::FakeClock;
use crate::ps2::{ACKNOWLEDGE, RESEND};
use crate::testing::{Controllers, Power, poke, read8, write8};

struct Bench {
    all: Controllers,
    power: Arc<Power>,
    clock: Arc<FakeClock>,
    timers: Timers,
    device: Arc<KeyboardController>,
}

impl Bench {
    fn new() -> Self {
        let all = Controllers::default();
        let power = Arc::new(Power::default());
        let clock = FakeClock::new();
        let timers = Timers::manual(clock.clone());
        let (keyboard, auxiliary) = (all.lines.connect(KEYBOARD_IRQ), all.lines.connect(AUXILIARY_IRQ));
        let gate = A20Gate::new(memory::Ram::new(4 << 20).unwrap().map().clone());
        let device = KeyboardController::new(clock.clone(), &timers, keyboard, auxiliary, gate, power.clone());
        Bench { all, power, clock, timers, device }
    }

    /// With the configuration byte set.
    fn configured(configuration: u8) -> Self {
        let bench = Self::new();
        bench.command(0x60);
        bench.data(configuration);
        bench
    }

    /// All that waits.
    fn take(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.status() & OUTPUT_FULL != 0 {
            bytes.push(read8(&*self.device, 0));
        }
        bytes
    }

    fn to_keyboard(&self, bytes: &[u8]) -> Vec<u8> {
        let send = |byte: &u8| {
            self.data(*byte);
            self.take()
        };
        bytes.iter().flat_map(send).collect()
    }

    fn to_mouse(&self, bytes: &[u8]) -> Vec<u8> {
        let send = |byte: &u8| {
            self.command(0xd4);
            self.data(*byte);
            self.take()
        };
        bytes.iter().flat_map(send).collect()
    }

    fn press(&self, keys: &[u8]) -> Vec<u8> {
        keys.iter().for_each(|key| self.device.key(*key, true));
        keys.iter().rev().for_each(|key| self.device.key(*key, false));
        self.take()
    }

    fn command(&self, command: u8) {
        write8(&*self.device, 1, command);
    }

    fn data(&self, byte: u8) {
        write8(&*self.device, 0, byte);
    }

    fn status(&self) -> u8 {
        read8(&*self.device, 1)
    }

    fn ask(&self, command: u8) -> u8 {
        self.command(command);
        assert_ne!(self.status() & OUTPUT_FULL, 0);
        let answer = read8(&*self.device, 0);
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
        assert_eq!(read8(&*bench.device, 0), 0xa5);
        assert!(!bench.all.asserted(irq));
    }
}

#[test]
fn keys_arrive_as_the_codes_of_the_set_that_is_chosen() {
    let bench = Bench::configured(TRANSLATE);
    assert_eq!(bench.press(&[0x1e]), [0x1e, 0x9e]);
    assert_eq!(bench.press(&[0xc8]), [0xe0, 0x48, 0xe0, 0xc8]);
    assert_eq!(bench.press(&[0x41]), [0x41, 0xc1]);
    let bench = Bench::configured(0);
    assert_eq!(bench.press(&[0x1e]), [0x1c, 0xf0, 0x1c]);
    assert_eq!(bench.press(&[0xc8]), [0xe0, 0x75, 0xe0, 0xf0, 0x75]);
    assert_eq!(bench.to_keyboard(&[0xf0, 1]), [ACKNOWLEDGE, ACKNOWLEDGE]);
    assert_eq!(bench.press(&[0x1e]), [0x1e, 0x9e]);
    assert_eq!(bench.to_keyboard(&[0xf0, 3, 0xf0, 0]), [ACKNOWLEDGE, ACKNOWLEDGE, ACKNOWLEDGE, ACKNOWLEDGE, 3]);
    assert_eq!(bench.press(&[0x1e]), [0x1c], "in set 3 it has no break code by itself");
    assert_eq!(bench.to_keyboard(&[0xf8]), [ACKNOWLEDGE]);
    assert_eq!(bench.press(&[0xc8]), [0x63, 0xf0, 0x63]);
    assert_eq!(bench.to_keyboard(&[0xfd, 0x1c, 0xf4]), [ACKNOWLEDGE; 3]);
    assert_eq!(bench.press(&[0x1e]), [0x1c]);
}

#[test]
fn pause_and_print_screen_are_different() {
    let bench = Bench::configured(TRANSLATE);
    assert_eq!(bench.press(&[0xc6]), [0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5]);
    assert_eq!(bench.press(&[0x54]), [0xe0, 0x2a, 0xe0, 0x37, 0xe0, 0xb7, 0xe0, 0xaa]);
    assert_eq!(bench.press(&[0x38, 0x54]), [0x38, 0x54, 0xd4, 0xb8]);
    assert_eq!(bench.press(&[0x1d, 0xc6]), [0x1d, 0xe0, 0x46, 0xe0, 0xc6, 0x9d]);
    let bench = Bench::configured(0);
    assert_eq!(bench.press(&[0xc6]), [0xe1, 0x14, 0x77, 0xe1, 0xf0, 0x14, 0xf0, 0x77]);
}

#[test]
fn the_keyboard_answers_commands() {
    let bench = Bench::configured(TRANSLATE);
    assert_eq!(bench.to_keyboard(&[0xff]), [ACKNOWLEDGE, 0xaa]);
    assert_eq!(bench.to_keyboard(&[0xee]), [0xee]);
    assert_eq!(bench.to_keyboard(&[0xf2]), [ACKNOWLEDGE, 0xab, 0x41]);
    assert_eq!(bench.to_keyboard(&[0xed]), [ACKNOWLEDGE]);
    assert_eq!(bench.to_keyboard(&[0x06]), [ACKNOWLEDGE]);
    assert_eq!(bench.device.lights(), 6);
    assert_eq!(bench.to_keyboard(&[0x12]), [RESEND]);
    assert_eq!(bench.to_keyboard(&[0xf5]), [ACKNOWLEDGE]);
    assert!(bench.press(&[0x1e]).is_empty());
    assert_eq!(bench.to_keyboard(&[0xf4]), [ACKNOWLEDGE]);
    assert_eq!(bench.press(&[0x1e]), [0x1e, 0x9e]);
    assert_eq!(Bench::configured(0).to_keyboard(&[0xf2]), [ACKNOWLEDGE, 0xab, 0x83]);
}

#[test]
fn a_key_that_is_held_down_repeats() {
    let bench = Bench::configured(TRANSLATE);
    bench.device.key(0x1e, true);
    bench.device.key(0x1e, true);
    assert_eq!(bench.take(), [0x1e]);
    bench.clock.advance(499_000_000);
    bench.timers.run_due();
    assert!(bench.take().is_empty());
    bench.clock.advance(2_000_000);
    bench.timers.run_due();
    assert_eq!(bench.take(), [0x1e]);
    bench.clock.advance(92_000_000);
    bench.timers.run_due();
    assert_eq!(bench.take(), [0x1e]);
    bench.device.key(0x1e, false);
    bench.clock.advance(1_000_000_000);
    bench.timers.run_due();
    assert_eq!(bench.take(), [0x9e]);
}

#[test]
fn keys_that_nobody_reads_end_in_an_overrun() {
    let bench = Bench::configured(TRANSLATE);
    for key in 0x02..0x0e {
        bench.device.key(key, true);
        bench.device.key(key, false);
    }
    let bytes = bench.take();
    assert_eq!(bytes.first(), Some(&0x02));
    // In set 2 it is 0, which the controller translates.
    assert_eq!(bytes.last(), Some(&0xff));
    assert!(bytes.len() <= 17);
    assert_eq!(bench.press(&[0x1e]), [0x1e, 0x9e]);
}

#[test]
fn each_byte_interrupts_once_on_its_line() {
    let bench = Bench::configured(TRANSLATE | KEYBOARD_INTERRUPT | AUXILIARY_INTERRUPT);
    assert_eq!(bench.to_mouse(&[0xf4]), [ACKNOWLEDGE]);
    bench.device.key(0xc8, true);
    assert!(bench.all.asserted(KEYBOARD_IRQ) && !bench.all.asserted(AUXILIARY_IRQ));
    bench.device.mouse(1, 1, 0, 0);
    assert_eq!(read8(&*bench.device, 0), 0xe0);
    assert!(bench.all.asserted(KEYBOARD_IRQ), "the second byte");
    assert_eq!(read8(&*bench.device, 0), 0x48);
    assert!(!bench.all.asserted(KEYBOARD_IRQ) && bench.all.asserted(AUXILIARY_IRQ));
    assert_eq!(bench.take(), [0x08, 1, 1]);
    assert!(!bench.all.asserted(AUXILIARY_IRQ));
    assert_eq!(read8(&*bench.device, 0), 1, "an empty buffer holds what was read last");
}

#[test]
fn a_port_that_is_off_keeps_what_comes() {
    let bench = Bench::configured(TRANSLATE);
    bench.command(0xad);
    bench.device.key(0x1e, true);
    assert!(bench.take().is_empty());
    bench.command(0xae);
    assert_eq!(bench.take(), [0x1e]);
}

#[test]
fn the_mouse_tells_movements_and_buttons() {
    let bench = Bench::configured(0);
    assert_eq!(bench.to_mouse(&[0xff]), [ACKNOWLEDGE, 0xaa, 0x00]);
    bench.device.mouse(5, 5, 0, 1);
    assert!(bench.take().is_empty(), "nobody has asked it to tell");
    assert_eq!(bench.to_mouse(&[0xf4]), [ACKNOWLEDGE]);
    bench.device.mouse(3, -2, 0, 0);
    assert_eq!(bench.take(), [0x28, 3, 0xfe]);
    bench.device.mouse(-300, 0, 0, 1);
    assert_eq!(bench.take(), [0x19, 0x01, 0, 0x19, 0xd3, 0]);
    bench.device.mouse(0, 0, 0, 0);
    assert_eq!(bench.take(), [0x08, 0, 0]);
    assert_eq!(bench.to_mouse(&[0xe9]), [ACKNOWLEDGE, 0x20, 2, 100]);
    bench.device.mouse(0, 0, 1, 0);
    assert!(bench.take().is_empty(), "it has no wheel");
}

#[test]
fn clicks_that_wait_are_not_lost() {
    let bench = Bench::configured(0);
    bench.to_mouse(&[0xf4]);
    for buttons in [1, 0, 1, 0] {
        bench.device.mouse(1, 0, 0, buttons);
    }
    assert_eq!(bench.take(), [0x09, 1, 0, 0x08, 1, 0, 0x09, 1, 0, 0x08, 1, 0]);
    (0..1000).for_each(|n| bench.device.mouse(1, 0, 0, n as u8 & 1));
    assert!(bench.take().len() < 200);
}

#[test]
fn knocking_finds_a_wheel_and_then_five_buttons() {
    let bench = Bench::configured(0);
    assert_eq!(bench.to_mouse(&[0xf2]), [ACKNOWLEDGE, 0]);
    bench.to_mouse(&[0xf3, 200, 0xf3, 100, 0xf3, 80]);
    assert_eq!(bench.to_mouse(&[0xf2]), [ACKNOWLEDGE, 3]);
    bench.to_mouse(&[0xf4]);
    bench.device.mouse(0, 0, -1, 0);
    assert_eq!(bench.take(), [0x08, 0, 0, 0xff]);
    bench.to_mouse(&[0xf3, 200, 0xf3, 200, 0xf3, 80]);
    assert_eq!(bench.to_mouse(&[0xf2]), [ACKNOWLEDGE, 4]);
    bench.device.mouse(0, 0, 1, 0x08);
    assert_eq!(bench.take(), [0x08, 0, 0, 0x11]);
    assert_eq!(bench.to_mouse(&[0xff, 0xf2]), [ACKNOWLEDGE, 0xaa, 0, ACKNOWLEDGE, 0]);
}

#[test]
fn in_remote_mode_the_mouse_waits_to_be_asked() {
    let bench = Bench::configured(0);
    bench.to_mouse(&[0xf4, 0xf0]);
    bench.device.mouse(7, 0, 0, 0);
    assert!(bench.take().is_empty());
    assert_eq!(bench.to_mouse(&[0xeb]), [ACKNOWLEDGE, 0x08, 7, 0]);
    assert_eq!(bench.to_mouse(&[0xeb]), [ACKNOWLEDGE, 0x08, 0, 0]);
    assert_eq!(bench.to_mouse(&[0xee, 0xf4, 0x55, 0xec]), [ACKNOWLEDGE, 0xf4, 0x55, ACKNOWLEDGE]);
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
    poke(&*bench.device, 2, 200_000, |random| {
        bench.power.take();
        if random.below(16) == 0 {
            bench.device.mouse(random.draw() as i32, random.draw() as i32, random.draw() as i32, random.draw() as u8);
        }
        if random.below(16) == 0 {
            bench.take();
            bench.device.key(random.draw() as u8, random.below(2) == 0);
            bench.clock.advance(100_000_000);
            bench.timers.run_due();
        }
    });
}
