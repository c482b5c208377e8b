//! ACPI fixed hardware: the power-management event and control registers, the power-management timer, soft-off.
//!
//! Status bits that are enabled assert the system control interrupt. The machine is always in ACPI mode: SCI_EN can't be
//! cleared, and there is no SMI command port. The only sleep state is S5.
//!
//! Behind ACPI's registers are an ICH9's own. SMI_EN and SMI_STS are [`Smi`]'s. General-purpose events never happen, and the
//! TCO timer is halted.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::clock::{Clock, nanoseconds, ticks};
use crate::constants::{PM_SIZE, PM_TIMER_HZ, S5_SLEEP_TYPE};
use crate::irq::InterruptLine;
use crate::smi::Smi;
use crate::timer::{Timer, Timers};
use crate::{Device, PowerEvents};

/// Register offsets in the block (ACPI 6.5, 4.8.3).
const STATUS: usize = 0;
const ENABLE: usize = 2;
const CONTROL: usize = 4;
const TIMER: usize = 8;
const REGISTERS: usize = 12;
/// The rest of the block (Intel ICH9 13.8.3, 13.9): general-purpose event enables, SMIs, TCO.
const REST: usize = PM_SIZE as usize - REGISTERS;
const GPE0_ENABLE: std::ops::Range<usize> = 0x28..0x30;
/// SMI_EN and SMI_STS.
const SMI: std::ops::Range<usize> = 0x30..0x38;
const TCO_RELOAD: usize = 0x60;
const TCO_DATA: std::ops::Range<usize> = 0x62..0x64;
const TCO_CONTROL_HIGH: usize = 0x69;
const TCO_HALTED: u8 = 1 << 3;
const TCO_CONTROL_2: usize = 0x6a;
const TCO_SCRATCH: std::ops::Range<usize> = 0x6c..0x6f;
const TCO_TIMER: std::ops::Range<usize> = 0x72..0x74;

/// Status and enable bits (ACPI 6.5, tables 4.13, 4.14).
const TIMER_CARRY: u16 = 1 << 0;
const GLOBAL_LOCK: u16 = 1 << 5;
const POWER_BUTTON: u16 = 1 << 8;
/// Can be enabled but never happens: the FADT's FIX_RTC says that alarms are told elsewhere. Linux enables it all the
/// same, and logs an error where that does not stay.
const REAL_TIME_CLOCK: u16 = 1 << 10;
const EVENTS: u16 = TIMER_CARRY | GLOBAL_LOCK | POWER_BUTTON | REAL_TIME_CLOCK;
/// Control bits (ACPI 6.5, table 4.15).
const SCI_ENABLE: u16 = 1 << 0;
const BUS_MASTER_RELOAD: u16 = 1 << 1;
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_TYPE: u16 = 7 << SLEEP_TYPE_SHIFT;
const SLEEP_ENABLE: u16 = 1 << 13;

/// The carry status is set whenever the highest bit of the 32-bit timer changes.
const CARRY_PERIOD: u64 = 1 << 31;

struct State {
    status: u16,
    enable: u16,
    /// Bus-master reload and the sleep type; the rest is constant or write-only.
    control: u16,
    /// How often the highest bit of the timer had changed when that was last looked at.
    carries: u64,
    rest: [u8; REST],
}

/// The rest of the block after a reset.
fn initial_rest() -> [u8; REST] {
    let mut rest = [0; REST];
    for (offset, value) in [(TCO_CONTROL_HIGH, TCO_HALTED), (TCO_TIMER.start, 4)] {
        rest[offset - REGISTERS] = value;
    }
    rest
}

/// The bits that software can change of a byte in the rest of the block.
fn writable(offset: usize) -> u8 {
    const TCO_RELOAD_HIGH: usize = TCO_RELOAD + 1;
    match offset {
        TCO_RELOAD_HIGH => 0x03,
        TCO_CONTROL_HIGH => 0x03,
        TCO_CONTROL_2 => 0x3e,
        TCO_RELOAD => 0xff,
        _ if [GPE0_ENABLE, TCO_DATA, TCO_SCRATCH, TCO_TIMER].iter().any(|range| range.contains(&offset)) => 0xff,
        _ => 0,
    }
}

/// As a [`Device`]: the whole power-management block of I/O ports.
pub struct PowerManagement {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
    line: InterruptLine,
    timer: Timer,
    power: Arc<dyn PowerEvents>,
    smi: Arc<Smi>,
}

impl PowerManagement {
    /// `line` is the system control interrupt.
    pub fn new(
        clock: Arc<dyn Clock>,
        timers: &Timers,
        line: InterruptLine,
        power: Arc<dyn PowerEvents>,
        smi: Arc<Smi>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|device: &std::sync::Weak<PowerManagement>| {
            let device = device.clone();
            let timer = timers.create(move || {
                if let Some(device) = device.upgrade() {
                    device.update(&mut device.lock());
                }
            });
            let carries = ticks(clock.now(), PM_TIMER_HZ) / CARRY_PERIOD;
            let state = Mutex::new(State { status: 0, enable: 0, control: 0, carries, rest: initial_rest() });
            PowerManagement { state, clock, line, timer, power, smi }
        })
    }

    /// The user presses the power button: a system that handles ACPI events shuts down.
    pub fn press_power_button(&self) {
        let mut state = self.lock();
        state.status |= POWER_BUTTON;
        self.update(&mut state);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the carry status up to date, drives the interrupt, and arms the timer if the next carry interrupts.
    fn update(&self, state: &mut State) {
        let carries = ticks(self.clock.now(), PM_TIMER_HZ) / CARRY_PERIOD;
        if carries != state.carries {
            state.carries = carries;
            state.status |= TIMER_CARRY;
        }
        self.line.set(state.status & state.enable != 0);
        if state.enable & !state.status & TIMER_CARRY != 0 {
            self.timer.arm(nanoseconds((carries + 1).saturating_mul(CARRY_PERIOD), PM_TIMER_HZ));
        } else {
            self.timer.cancel();
        }
    }

    fn registers(&self, state: &State) -> [u8; REGISTERS] {
        let mut registers = [0; REGISTERS];
        let timer = ticks(self.clock.now(), PM_TIMER_HZ) as u32;
        registers[STATUS..ENABLE].copy_from_slice(&state.status.to_le_bytes());
        registers[ENABLE..CONTROL].copy_from_slice(&state.enable.to_le_bytes());
        registers[CONTROL..CONTROL + 2].copy_from_slice(&(state.control | SCI_ENABLE).to_le_bytes());
        registers[TIMER..].copy_from_slice(&timer.to_le_bytes());
        registers
    }

    /// Writes the control register; says whether the machine is to be turned off.
    fn write_control(state: &mut State, value: u16) -> bool {
        state.control = value & (BUS_MASTER_RELOAD | SLEEP_TYPE);
        let sleep_type = (value & SLEEP_TYPE) >> SLEEP_TYPE_SHIFT;
        value & SLEEP_ENABLE != 0 && sleep_type == u16::from(S5_SLEEP_TYPE)
    }
}

impl Device for PowerManagement {
    fn width(&self) -> usize {
        4
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        // The timer is read often, and nothing follows from that.
        if offset < TIMER as u64 {
            self.update(&mut state);
        }
        let registers = self.registers(&state);
        data.fill(0);
        let mut rest = state.rest;
        rest.iter_mut().skip(SMI.start - REGISTERS).zip(self.smi.registers()).for_each(|(to, from)| *to = from);
        let bytes = registers.iter().chain(&rest).skip(offset as usize);
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        let mut off = false;
        for (at, &byte) in (offset as usize..).zip(data) {
            let shift = 8 * (at % 2);
            let (bits, rest) = (u16::from(byte) << shift, !(0xff << shift));
            match at & !1 {
                STATUS => state.status &= !bits,
                ENABLE => state.enable = (state.enable & rest | bits) & EVENTS,
                CONTROL => {
                    let value = state.control & rest | bits;
                    off |= Self::write_control(&mut state, value);
                }
                _ if SMI.contains(&at) => self.smi.write_register(at - SMI.start, byte),
                _ => {
                    let mask = writable(at);
                    if let Some(old) = at.checked_sub(REGISTERS).and_then(|index| state.rest.get_mut(index)) {
                        *old = *old & !mask | byte & mask;
                    }
                }
            }
        }
        self.update(&mut state);
        drop(state);
        if off {
            self.power.power_off();
        }
    }

    fn reset(&self) {
        let mut state = self.lock();
        let carries = state.carries;
        *state = State { status: 0, enable: 0, control: 0, carries, rest: initial_rest() };
        self.line.lower();
        self.timer.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SECOND;
    use crate::clock::fake::FakeClock;
    use crate::constants::SCI_IRQ;
    use crate::testing::{Controllers, Power, poke, read};

    struct Bench {
        clock: Arc<FakeClock>,
        timers: Timers,
        all: Controllers,
        power: Arc<Power>,
        smi: Arc<Smi>,
        device: Arc<PowerManagement>,
    }

    impl Bench {
        fn new() -> Self {
            let clock = FakeClock::new();
            let timers = Timers::manual(clock.clone());
            let all = Controllers::default();
            let (power, smi) = (Arc::new(Power::default()), Smi::new(Some(all.recorder.clone())));
            let device =
                PowerManagement::new(clock.clone(), &timers, all.lines.connect(SCI_IRQ), power.clone(), smi.clone());
            Bench { clock, timers, all, power, smi, device }
        }

        fn word(&self, offset: usize) -> u16 {
            u16::from_le_bytes(read(&*self.device, offset as u64))
        }

        fn set_word(&self, offset: usize, value: u16) {
            self.device.write(offset as u64, &value.to_le_bytes());
        }

        fn timer(&self) -> u32 {
            u32::from_le_bytes(read(&*self.device, TIMER as u64))
        }
    }

    #[test]
    fn the_timer_runs_at_its_rate() {
        let bench = Bench::new();
        let before = bench.timer();
        bench.clock.advance(10 * SECOND);
        assert_eq!(bench.timer().wrapping_sub(before), 35_795_450);
    }

    #[test]
    fn a_carry_of_the_timer_interrupts() {
        let bench = Bench::new();
        assert_eq!(bench.timers.next_deadline(), None);
        bench.set_word(ENABLE, TIMER_CARRY);
        let carry = bench.timers.next_deadline().unwrap();
        bench.clock.advance(carry - bench.clock.now());
        bench.timers.run_due();
        assert_eq!(bench.timer(), 1 << 31);
        assert!(bench.all.asserted(SCI_IRQ));
        bench.set_word(STATUS, TIMER_CARRY);
        assert!(!bench.all.asserted(SCI_IRQ));
        assert!(bench.timers.next_deadline().is_some());
    }

    #[test]
    fn s5_turns_the_machine_off() {
        let bench = Bench::new();
        bench.set_word(CONTROL, 5 << 10);
        assert!(bench.power.take().is_empty());
        bench.set_word(CONTROL, 5 << 10 | SLEEP_ENABLE);
        assert_eq!(bench.power.take(), ["off"]);
        bench.set_word(CONTROL, 1 << 10 | SLEEP_ENABLE);
        assert!(bench.power.take().is_empty());
        assert_eq!(bench.word(CONTROL), 1 << 10 | SCI_ENABLE);
        bench.device.write(CONTROL as u64 + 1, &[0x34]);
        assert_eq!(bench.power.take(), ["off"]);
    }

    #[test]
    fn the_power_button_interrupts_until_its_status_is_cleared() {
        let bench = Bench::new();
        bench.set_word(ENABLE, POWER_BUTTON | 0x8000);
        assert_eq!(bench.word(ENABLE), POWER_BUTTON);
        bench.device.press_power_button();
        assert!(bench.all.asserted(SCI_IRQ));
        bench.set_word(STATUS, 0);
        assert_eq!(bench.word(STATUS), POWER_BUTTON);
        bench.device.write(STATUS as u64 + 1, &[0x01]);
        assert!(!bench.all.asserted(SCI_IRQ));
        bench.device.press_power_button();
        bench.device.reset();
        assert!(!bench.all.asserted(SCI_IRQ));
    }

    #[test]
    fn smis_have_their_registers_and_the_watchdog_is_halted() {
        let bench = Bench::new();
        bench.device.write(0x30, &[0x21, 0, 0, 2]);
        assert_eq!(read::<4>(&*bench.device, 0x30), [0x21, 0, 0, 2]);
        bench.smi.write(0, &[1]);
        assert_eq!(read::<4>(&*bench.device, 0x34), [0x20, 0, 0, 0]);
        bench.device.write(0x34, &[0xff; 4]);
        assert_eq!(read::<4>(&*bench.device, 0x34), [0; 4]);
        bench.device.write(0x68, &[0xff; 2]);
        assert_eq!(read::<2>(&*bench.device, 0x68), [0, 0x0b]);
        bench.device.write(0x28, &[0xff; 4]);
        assert_eq!((read::<4>(&*bench.device, 0x20), read::<4>(&*bench.device, 0x28)), ([0; 4], [0xff; 4]));
        bench.device.reset();
        assert_eq!(read::<4>(&*bench.device, 0x28), [0; 4]);
    }

    #[test]
    fn random_accesses_do_no_harm() {
        let bench = Bench::new();
        poke(&*bench.device, 0x80, 200_000, |random| {
            bench.clock.advance(random.below(1 << 40));
            bench.timers.run_due();
        });
    }
}
