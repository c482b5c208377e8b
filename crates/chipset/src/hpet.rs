//! The high precision event timer (IA-PC HPET specification 1.0a): a counter of 64 bits and three comparators.
//!
//! The counter is a function of the machine's clock. Each comparator has a timer that is armed for the next match while
//! the counter runs and its interrupt is wanted. With legacy replacement, comparators 0 and 1 take the places of the 8254
//! and the real-time clock on their interrupt lines, and those two are cut off ([`InterruptLine::mute`]).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::Device;
use crate::clock::Clock;
use crate::constants::{HPET_IDENTITY, PIT_IRQ, RTC_IRQ};
use crate::irq::{InterruptLine, Lines};
use crate::timer::{Timer, Timers};

/// Nanoseconds of a tick, and the same in the register's femtoseconds.
const TICK: u64 = 10;
const PERIOD: u64 = TICK * 1_000_000;
const COMPARATORS: usize = 3;
/// Interrupts of a comparator come no closer than this, in ticks (10 us): a guest can ask for more, and no host could
/// do it.
const LEAST_INTERVAL: u64 = 1000;
/// The I/O APIC inputs that comparators can be routed to: 20 to 23.
const ROUTES: u32 = 0x00f0_0000;

/// Registers.
const CAPABILITIES: u64 = 0x000;
const CONFIGURATION: u64 = 0x010;
const STATUS: u64 = 0x020;
const COUNTER: u64 = 0x0f0;
const FIRST_COMPARATOR: u64 = 0x100;
const COMPARATOR_SIZE: u64 = 0x20;
/// Of each comparator.
const CONTROL: u64 = 0x00;
const VALUE: u64 = 0x08;
const MESSAGE: u64 = 0x10;

/// Configuration: the counter runs; legacy replacement.
const RUNS: u64 = 1 << 0;
const LEGACY: u64 = 1 << 1;

/// A comparator's control register.
const LEVEL: u64 = 1 << 1;
const INTERRUPTS: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const SET_VALUE: u64 = 1 << 6;
const NARROW: u64 = 1 << 8;
const ROUTE_SHIFT: u32 = 9;
const BY_MESSAGE: u64 = 1 << 14;
const WRITABLE: u64 = LEVEL | INTERRUPTS | PERIODIC | SET_VALUE | NARROW | 31 << ROUTE_SHIFT | BY_MESSAGE;
/// It can be periodic, has 64 bits, and can send messages.
const FIXED: u64 = 1 << 4 | 1 << 5 | 1 << 15 | (ROUTES as u64) << 32;

#[derive(Clone, Copy)]
struct Comparator {
    control: u64,
    value: u64,
    period: u64,
    message: u64,
    /// The counter's value at the match for which the timer is armed.
    armed: Option<u64>,
}

struct State {
    configuration: u64,
    status: u32,
    /// The counter while it stands, and what the clock said when it began to run with that.
    counter: u64,
    started: u64,
    comparators: [Comparator; COMPARATORS],
}

impl State {
    fn new() -> Self {
        let comparator = Comparator { control: 0, value: u64::MAX, period: 0, message: 0, armed: None };
        State { configuration: 0, status: 0, counter: 0, started: 0, comparators: [comparator; COMPARATORS] }
    }

    fn runs(&self) -> bool {
        self.configuration & RUNS != 0
    }

    fn legacy(&self) -> bool {
        self.configuration & LEGACY != 0
    }

    fn count(&self, now: u64) -> u64 {
        let passed = if self.runs() { now.saturating_sub(self.started) / TICK } else { 0 };
        self.counter.wrapping_add(passed)
    }

    /// When the counter is at `value` again, if that is before the end of time.
    fn time_of(&self, value: u64) -> Option<u64> {
        value.wrapping_sub(self.counter).checked_mul(TICK)?.checked_add(self.started)
    }
}

impl Comparator {
    /// How far the counter, which is at `count`, is from a match; a match right now is one wrap away.
    fn distance(&self, count: u64) -> u64 {
        if self.control & NARROW != 0 {
            u64::from((self.value as u32).wrapping_sub(count as u32).wrapping_sub(1)) + 1
        } else {
            self.value.wrapping_sub(count).wrapping_sub(1).saturating_add(1)
        }
    }

    /// After a match: the next value of a periodic comparator that is ahead of `count`.
    fn advance(&mut self, count: u64) {
        if self.control & PERIODIC == 0 || self.period == 0 {
            return;
        }
        let mask = if self.control & NARROW != 0 { u64::from(u32::MAX) } else { u64::MAX };
        let behind = count.wrapping_sub(self.value) & mask;
        let steps = behind / self.period + 1;
        self.value = self.value.wrapping_add(steps.wrapping_mul(self.period)) & mask;
    }
}

/// Interrupt lines of all comparators, and those of the devices that legacy replacement cuts off.
struct Wiring {
    legacy: [InterruptLine; 2],
    routed: Vec<InterruptLine>,
    replaced: Vec<Arc<InterruptLine>>,
}

/// The timer block: 1 KiB of registers.
pub struct Hpet {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
    timers: [Timer; COMPARATORS],
    wiring: Wiring,
    interrupts: Arc<dyn engine::Interrupts>,
}

impl Hpet {
    /// `replaced`: the lines of the 8254 and the real-time clock.
    pub fn new(
        clock: Arc<dyn Clock>,
        timers: &Timers,
        lines: &Arc<Lines>,
        replaced: Vec<Arc<InterruptLine>>,
        interrupts: Arc<dyn engine::Interrupts>,
    ) -> Arc<Self> {
        let legacy = [lines.connect(PIT_IRQ), lines.connect(RTC_IRQ)];
        let routed = (0..COMPARATORS * 4).map(|index| lines.connect(20 + (index % 4) as u8)).collect();
        Arc::new_cyclic(|hpet: &Weak<Hpet>| {
            let timer = |index: usize| {
                let hpet = hpet.clone();
                timers.create(move || {
                    if let Some(hpet) = hpet.upgrade() {
                        hpet.matched(index);
                    }
                })
            };
            Hpet {
                state: Mutex::new(State::new()),
                clock,
                timers: [timer(0), timer(1), timer(2)],
                wiring: Wiring { legacy, routed, replaced },
                interrupts,
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The line of comparator `index` as it is configured; `None`: it has none.
    fn line(&self, state: &State, index: usize) -> Option<&InterruptLine> {
        if state.legacy() && index < 2 {
            return self.wiring.legacy.get(index);
        }
        let control = state.comparators.get(index)?.control;
        let route = (control >> ROUTE_SHIFT & 31) as usize;
        self.wiring.routed.get(index * 4 + route.checked_sub(20).filter(|input| *input < 4)?)
    }

    /// Called by the timer.
    fn matched(&self, index: usize) {
        let mut state = self.lock();
        let now = state.count(self.clock.now());
        let Some(comparator) = state.comparators.get_mut(index) else { return };
        let due = comparator.armed.is_some_and(|armed| now.wrapping_sub(armed) < 1 << 63);
        if !due {
            return;
        }
        comparator.armed = None;
        comparator.advance(now);
        let (control, message) = (comparator.control, comparator.message);
        if control & INTERRUPTS != 0 {
            if control & LEVEL != 0 {
                state.status |= 1 << index;
            }
            if control & BY_MESSAGE != 0 {
                self.interrupts.send_msi(message >> 32, message as u32);
            } else if let Some(line) = self.line(&state, index) {
                // An edge stays until the next one, as the 8254's does.
                line.lower();
                line.raise();
            }
        }
        self.arm(&mut state, index, LEAST_INTERVAL);
    }

    /// Arms the timer of a comparator for its next match, `least` ticks from now at the earliest.
    fn arm(&self, state: &mut State, index: usize, least: u64) {
        let count = state.count(self.clock.now());
        let runs = state.runs();
        let Some(comparator) = state.comparators.get_mut(index) else { return };
        comparator.armed = None;
        let distance = comparator.distance(count).max(least);
        let target = (runs && comparator.control & INTERRUPTS != 0).then(|| count.checked_add(distance)).flatten();
        let timer = self.timers.get(index);
        comparator.armed = target;
        match target.and_then(|target| state.time_of(target)) {
            Some(time) => timer.into_iter().for_each(|timer| timer.arm(time)),
            None => timer.into_iter().for_each(Timer::cancel),
        }
    }

    fn arm_all(&self, state: &mut State) {
        (0..COMPARATORS).for_each(|index| self.arm(state, index, 0));
    }

    /// Lets go of the lines of comparators that don't assert them any more.
    fn settle_lines(&self, state: &State) {
        for index in 0..COMPARATORS {
            let active = state.status & 1 << index != 0;
            let own = self.line(state, index).map(std::ptr::from_ref);
            let lines = self.wiring.routed.iter().skip(index * 4).take(4).chain(self.wiring.legacy.get(index));
            let level = state.comparators.get(index).is_some_and(|comparator| comparator.control & LEVEL != 0);
            for line in lines {
                let is_own = own == Some(std::ptr::from_ref(line));
                if !is_own || level && !active {
                    line.lower();
                }
            }
        }
        self.wiring.replaced.iter().for_each(|line| line.mute(state.legacy()));
    }

    fn read_register(&self, register: u64) -> u64 {
        let state = self.lock();
        match register {
            CAPABILITIES => u64::from(HPET_IDENTITY) | PERIOD << 32,
            CONFIGURATION => state.configuration,
            STATUS => state.status.into(),
            COUNTER => state.count(self.clock.now()),
            _ => {
                let offset = register.wrapping_sub(FIRST_COMPARATOR);
                let Some(comparator) = state.comparators.get((offset / COMPARATOR_SIZE) as usize) else { return 0 };
                match offset % COMPARATOR_SIZE {
                    CONTROL => comparator.control | FIXED,
                    VALUE => comparator.value,
                    MESSAGE => comparator.message,
                    _ => 0,
                }
            }
        }
    }

    /// A write of the bits in `mask`.
    fn write_register(&self, register: u64, value: u64, mask: u64) {
        let mut state = self.lock();
        let merge = |old: u64| old & !mask | value & mask;
        match register {
            CONFIGURATION => {
                let now = self.clock.now();
                (state.counter, state.started) = (state.count(now), now);
                state.configuration = merge(state.configuration) & (RUNS | LEGACY);
                self.arm_all(&mut state);
            }
            STATUS => state.status &= !((value & mask) as u32),
            COUNTER => {
                let now = self.clock.now();
                state.counter = merge(state.count(now));
                state.started = now;
                self.arm_all(&mut state);
            }
            _ => {
                let offset = register.wrapping_sub(FIRST_COMPARATOR);
                let index = (offset / COMPARATOR_SIZE) as usize;
                let Some(comparator) = state.comparators.get_mut(index) else { return };
                match offset % COMPARATOR_SIZE {
                    CONTROL => {
                        comparator.control = merge(comparator.control) & WRITABLE;
                        if comparator.control & NARROW != 0 {
                            comparator.value &= u64::from(u32::MAX);
                            comparator.period &= u64::from(u32::MAX);
                        }
                    }
                    VALUE => {
                        // A periodic comparator takes its period, unless it is told to take its value first (2.3.9.2.2).
                        if comparator.control & PERIODIC == 0 || comparator.control & SET_VALUE != 0 {
                            comparator.value = merge(comparator.value);
                        }
                        if comparator.control & PERIODIC != 0 {
                            comparator.period = merge(comparator.period);
                        }
                        // The high half may follow.
                        if mask >> 32 != 0 || comparator.control & NARROW != 0 {
                            comparator.control &= !SET_VALUE;
                        }
                    }
                    MESSAGE => comparator.message = merge(comparator.message),
                    _ => return,
                }
                self.arm(&mut state, index, 0);
            }
        }
        self.settle_lines(&state);
    }
}

impl Device for Hpet {
    fn width(&self) -> usize {
        8
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.read_register(offset & !7).to_le_bytes();
        data.iter_mut().zip(bytes.iter().skip(offset as usize & 7)).for_each(|(to, from)| *to = *from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (mut value, mut mask) = ([0; 8], [0; 8]);
        let start = offset as usize & 7;
        value.iter_mut().skip(start).zip(data).for_each(|(to, from)| *to = *from);
        mask.iter_mut().skip(start).zip(data).for_each(|(to, _)| *to = 0xff);
        self.write_register(offset & !7, u64::from_le_bytes(value), u64::from_le_bytes(mask));
    }

    fn reset(&self) {
        let mut state = self.lock();
        *state = State::new();
        self.timers.iter().for_each(Timer::cancel);
        self.settle_lines(&state);
        self.wiring.legacy.iter().chain(&self.wiring.routed).for_each(InterruptLine::lower);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::fake::FakeClock;
    use crate::testing::{Controllers, poke};

    struct Bench {
        clock: Arc<FakeClock>,
        timers: Timers,
        all: Controllers,
        hpet: Arc<Hpet>,
        pit: Arc<InterruptLine>,
    }

    impl Bench {
        fn new() -> Self {
            let clock = FakeClock::new();
            let timers = Timers::manual(clock.clone());
            let all = Controllers::default();
            let pit = Arc::new(all.lines.connect(PIT_IRQ));
            let hpet = Hpet::new(clock.clone(), &timers, &all.lines, vec![pit.clone()], all.recorder.clone());
            Bench { clock, timers, all, hpet, pit }
        }

        fn set(&self, register: u64, value: u64) {
            self.hpet.write(register, &value.to_le_bytes());
        }

        fn get(&self, register: u64) -> u64 {
            let mut data = [0; 8];
            self.hpet.read(register, &mut data);
            u64::from_le_bytes(data)
        }

        fn pass(&self, ticks: u64) -> usize {
            self.clock.advance(ticks * TICK);
            self.timers.run_due()
        }
    }

    const FIRST: u64 = FIRST_COMPARATOR;
    const ROUTE_20: u64 = 20 << ROUTE_SHIFT;

    #[test]
    fn the_counter_runs_when_it_is_let() {
        let bench = Bench::new();
        bench.pass(100);
        assert_eq!(bench.get(COUNTER), 0);
        bench.set(CONFIGURATION, RUNS);
        bench.pass(100);
        assert_eq!(bench.get(COUNTER), 100);
        bench.set(CONFIGURATION, 0);
        bench.pass(100);
        assert_eq!(bench.get(COUNTER), 100);
        bench.set(COUNTER, 7);
        assert_eq!(bench.get(COUNTER), 7);
    }

    #[test]
    fn a_match_is_told_once_by_a_one_shot() {
        let bench = Bench::new();
        bench.set(FIRST, INTERRUPTS | LEVEL | ROUTE_20);
        bench.set(FIRST + VALUE, 5000);
        bench.set(CONFIGURATION, RUNS);
        bench.pass(4999);
        assert!(!bench.all.asserted(20));
        bench.pass(1);
        assert!(bench.all.asserted(20) && bench.get(STATUS) == 1);
        bench.set(STATUS, 1);
        assert!(!bench.all.asserted(20));
        assert_eq!(bench.pass(1 << 40), 0);
    }

    #[test]
    fn a_periodic_comparator_matches_again_and_misses_what_a_starved_host_missed() {
        let bench = Bench::new();
        bench.set(FIRST, INTERRUPTS | PERIODIC | SET_VALUE | ROUTE_20 | LEVEL);
        bench.set(FIRST + VALUE, 10_000);
        assert_eq!(bench.get(FIRST) & SET_VALUE, 0);
        bench.set(FIRST + VALUE, 2000);
        bench.set(CONFIGURATION, RUNS);
        assert_eq!((bench.pass(10_000), bench.pass(1999), bench.pass(1)), (1, 0, 1));
        assert_eq!(bench.pass(2000 * 5 + 7), 1);
        assert_eq!(bench.get(FIRST + VALUE), 24_000);
    }

    #[test]
    fn a_narrow_comparator_wraps() {
        let bench = Bench::new();
        bench.set(COUNTER, 0xffff_ff00);
        bench.set(FIRST, INTERRUPTS | NARROW | ROUTE_20 | LEVEL);
        bench.set(FIRST + VALUE, 0x1000);
        bench.set(CONFIGURATION, RUNS);
        assert_eq!((bench.pass(0x10ff), bench.pass(1)), (0, 1));
    }

    #[test]
    fn legacy_replacement_takes_the_8254_off_its_line() {
        let bench = Bench::new();
        bench.pit.raise();
        assert!(bench.all.asserted(PIT_IRQ));
        bench.set(CONFIGURATION, RUNS | LEGACY);
        assert!(!bench.all.asserted(PIT_IRQ));
        bench.set(FIRST, INTERRUPTS);
        bench.set(FIRST + VALUE, bench.get(COUNTER) + 2000);
        bench.pass(2000);
        assert!(bench.all.asserted(PIT_IRQ));
        bench.set(CONFIGURATION, RUNS);
        assert!(bench.all.asserted(PIT_IRQ), "the 8254's level is back");
    }

    #[test]
    fn a_comparator_can_send_messages() {
        let bench = Bench::new();
        bench.set(FIRST + COMPARATOR_SIZE + MESSAGE, 0xfee0_1000_0000_0042);
        bench.set(FIRST + COMPARATOR_SIZE, INTERRUPTS | BY_MESSAGE);
        bench.set(FIRST + COMPARATOR_SIZE + VALUE, 3000);
        bench.set(CONFIGURATION, RUNS);
        bench.pass(3000);
        assert_eq!(bench.all.recorder.take(), [(0xfee0_1000, 0x42)]);
    }

    #[test]
    fn random_accesses_do_no_harm() {
        let bench = Bench::new();
        poke(&*bench.hpet, 0x400, 100_000, |random| {
            bench.clock.advance(random.below(100_000));
            bench.timers.run_due();
            bench.all.recorder.take();
        });
        bench.hpet.reset();
        assert_eq!(bench.get(CONFIGURATION), 0);
    }
}
