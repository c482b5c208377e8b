//! The 8254 interval timer and the system control port B (0x61), which drives the gate of counter 2 and shows its output.
//!
//! Counters are functions of time (`channel`); only counter 0, whose output is IRQ 0, needs a timer, and only while
//! there is a rise of its output to come. A starved host makes it miss rises, never lag behind: the next one is
//! always computed from the phase of the counter.

mod channel;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Device;
use crate::clock::{Clock, nanoseconds, ticks};
use crate::constants::PIT_HZ;
use crate::irq::InterruptLine;
use crate::timer::{Timer, Timers};
use channel::Channel;

/// Interrupts come no closer than this, in ticks (10 us): a guest can ask for one every tick, and no host could do it.
const LEAST_INTERVAL: u64 = 12;
/// How long the refresh-request bit of port B stays, in nanoseconds.
const REFRESH: u64 = 15_085;

struct State {
    channels: [Channel; 3],
    /// The tick of the rise for which the timer is armed.
    next_rise: Option<u64>,
    /// Port B, bits 3 to 1: speaker data and the two parity-check enables.
    port_b: u8,
}

impl State {
    fn new() -> Self {
        // Counters 0 and 1 have their gates tied high.
        State { channels: [Channel::new(true), Channel::new(true), Channel::new(false)], next_rise: None, port_b: 0 }
    }
}

/// As a [`Device`]: the four ports of the 8254. Port B is at offset [`PORT_B_OFFSET`].
pub struct Pit {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
    line: Arc<InterruptLine>,
    timer: Timer,
}

/// The device offset of system control port B.
pub const PORT_B_OFFSET: u64 = 4;
const CONTROL: u64 = 3;

impl Pit {
    /// `line` is the output of counter 0.
    pub fn new(clock: Arc<dyn Clock>, timers: &Timers, line: impl Into<Arc<InterruptLine>>) -> Arc<Self> {
        let line = line.into();
        Arc::new_cyclic(|pit: &std::sync::Weak<Pit>| {
            let pit = pit.clone();
            let timer = timers.create(move || {
                if let Some(pit) = pit.upgrade() {
                    pit.rise();
                }
            });
            Pit { state: Mutex::new(State::new()), clock, line, timer }
        })
    }

    /// The state as of now, and the tick that is now.
    fn lock(&self) -> (MutexGuard<'_, State>, u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = ticks(self.clock.now(), PIT_HZ);
        state.channels.iter_mut().for_each(|channel| channel.settle(now));
        (state, now)
    }

    /// Called by the timer.
    fn rise(&self) {
        let (mut state, now) = self.lock();
        if state.next_rise.is_some_and(|at| at <= now) {
            self.line.lower();
            self.line.raise();
            self.arm(&mut state, now + LEAST_INTERVAL);
        }
    }

    /// Arms the timer for the first rise of counter 0 after tick `after`.
    fn arm(&self, state: &mut State, after: u64) {
        state.next_rise = state.channels[0].next_rise(after);
        match state.next_rise {
            Some(at) => self.timer.arm(nanoseconds(at, PIT_HZ)),
            None => self.timer.cancel(),
        }
    }

    /// Follows a change of counter 0.
    fn reprogrammed(&self, state: &mut State, now: u64) {
        let channel = &state.channels[0];
        self.line.set(channel.rests_high() || channel.output(now));
        self.arm(state, now);
    }

    fn control(&self, state: &mut State, now: u64, value: u8) {
        let select = usize::from(value >> 6);
        if select == 3 {
            return read_back(&mut state.channels, now, value);
        }
        if value & 0x30 == 0 {
            return state.channels[select].latch_count(now);
        }
        state.channels[select].set_mode(value);
        if select == 0 {
            self.reprogrammed(state, now);
        }
    }

    fn read_port_b(&self, state: &State, now: u64) -> u8 {
        let counter = &state.channels[2];
        let refresh = ((self.clock.now() / REFRESH) & 1) as u8;
        state.port_b | u8::from(counter.gate()) | refresh << 4 | u8::from(counter.output(now)) << 5
    }
}

/// The read-back command (8254 datasheet): latches count (bit 5 clear) and status (bit 4 clear) of the counters in
/// bits 3 to 1.
fn read_back(channels: &mut [Channel; 3], now: u64, value: u8) {
    for (index, channel) in channels.iter_mut().enumerate() {
        if value & (2 << index) == 0 {
            continue;
        }
        if value & 0x20 == 0 {
            channel.latch_count(now);
        }
        if value & 0x10 == 0 {
            channel.latch_status(now);
        }
    }
}

impl Device for Pit {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (mut state, now) = self.lock();
        let value = match offset {
            PORT_B_OFFSET => self.read_port_b(&state, now),
            _ => state.channels.get_mut(offset as usize).map_or(0xff, |channel| channel.read(now)),
        };
        data.fill(value);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let (mut state, now) = self.lock();
        match offset {
            CONTROL => self.control(&mut state, now, value),
            PORT_B_OFFSET => {
                state.port_b = value & 0x0e;
                state.channels[2].set_gate(now, value & 1 != 0);
            }
            0 => {
                state.channels[0].write(now, value);
                self.reprogrammed(&mut state, now);
            }
            _ => {
                if let Some(channel) = state.channels.get_mut(offset as usize) {
                    channel.write(now, value);
                }
            }
        }
    }

    fn reset(&self) {
        let (mut state, _) = self.lock();
        *state = State::new();
        self.timer.cancel();
        self.line.lower();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SECOND;
    use crate::clock::fake::FakeClock;
    use crate::testing::{Controllers, poke, read8, write8};

    struct Bench {
        clock: Arc<FakeClock>,
        timers: Timers,
        all: Controllers,
        pit: Arc<Pit>,
    }

    impl Bench {
        fn new() -> Self {
            let clock = FakeClock::new();
            let timers = Timers::manual(clock.clone());
            let all = Controllers::default();
            // Input 2 of the I/O APIC counts the edges.
            write8(&*all.ioapic, 0, 0x14);
            all.ioapic.write(0x10, &0x30u32.to_le_bytes());
            let pit = Pit::new(clock.clone(), &timers, all.lines.connect(0));
            Bench { clock, timers, all, pit }
        }

        fn program(&self, control: u8, count: u16) {
            write8(&*self.pit, 3, control);
            for byte in count.to_le_bytes() {
                write8(&*self.pit, 0, byte);
            }
            self.all.recorder.take();
        }

        /// Lets time pass in steps of a microsecond, and counts interrupts.
        fn interrupts_in(&self, ns: u64) -> usize {
            for _ in 0..ns / 1000 {
                self.clock.advance(1000);
                self.timers.run_due();
            }
            self.all.recorder.take().len()
        }
    }

    #[test]
    fn rate_generator_interrupts_at_its_rate() {
        let bench = Bench::new();
        bench.program(0x34, 11932);
        let count = bench.interrupts_in(SECOND);
        assert!((99..=100).contains(&count), "{count}");
    }

    #[test]
    fn a_starved_host_loses_ticks_but_not_their_phase() {
        let bench = Bench::new();
        bench.program(0x36, 1193);
        bench.interrupts_in(10_000_000);
        let phase = bench.timers.next_deadline().unwrap() % 1_000_000;
        bench.clock.advance(3 * SECOND + 333_333);
        assert_eq!(bench.timers.run_due(), 1);
        assert_eq!(bench.all.recorder.take().len(), 1);
        let next = bench.timers.next_deadline().unwrap();
        let tick = next - bench.clock.now();
        assert!(tick <= 1_000_000, "{tick}");
        // 1193 ticks are 153 ns short of a millisecond.
        let drift = (next % 1_000_000).abs_diff(phase);
        assert!(drift.abs_diff(3001 * 153) < 3000, "{drift}");
    }

    #[test]
    fn a_one_shot_interrupts_once_and_then_wakes_nobody() {
        let bench = Bench::new();
        assert_eq!(bench.timers.next_deadline(), None);
        bench.program(0x30, 1000);
        assert!(!bench.all.asserted(0));
        assert_eq!(bench.interrupts_in(2_000_000), 1);
        assert!(bench.all.asserted(0));
        assert_eq!(bench.timers.next_deadline(), None);
    }

    #[test]
    fn counter_0_without_a_count_arms_no_timer() {
        let bench = Bench::new();
        write8(&*bench.pit, 3, 0x34);
        write8(&*bench.pit, 0, 0x00);
        assert_eq!(bench.timers.next_deadline(), None);
        write8(&*bench.pit, 0, 0x10);
        assert!(bench.timers.next_deadline().is_some());
        bench.pit.reset();
        assert_eq!(bench.timers.next_deadline(), None);
    }

    #[test]
    fn the_shortest_period_is_bounded_by_what_a_host_can_do() {
        let bench = Bench::new();
        bench.program(0x34, 1);
        assert!(bench.interrupts_in(1_000_000) <= 100);
    }

    #[test]
    fn port_b_gates_counter_2_and_shows_its_output() {
        let bench = Bench::new();
        write8(&*bench.pit, PORT_B_OFFSET, 0x00);
        write8(&*bench.pit, 3, 0xb0);
        write8(&*bench.pit, 2, 0xff);
        write8(&*bench.pit, 2, 0xff);
        bench.clock.advance(SECOND);
        assert_eq!(read8(&*bench.pit, PORT_B_OFFSET) & 0x2f, 0);
        write8(&*bench.pit, PORT_B_OFFSET, 0x01);
        bench.clock.advance(54_924_000);
        assert_eq!(read8(&*bench.pit, PORT_B_OFFSET) & 0x2f, 0x01);
        bench.clock.advance(2_000);
        assert_eq!(read8(&*bench.pit, PORT_B_OFFSET) & 0x2f, 0x21);
    }

    #[test]
    fn the_refresh_bit_toggles() {
        let bench = Bench::new();
        let mut seen = [0, 0];
        for _ in 0..100 {
            seen[usize::from(read8(&*bench.pit, PORT_B_OFFSET) >> 4 & 1)] += 1;
            bench.clock.advance(REFRESH);
        }
        assert_eq!(seen, [50, 50]);
    }

    #[test]
    fn read_back_latches_several_counters() {
        let bench = Bench::new();
        bench.program(0x34, 1000);
        write8(&*bench.pit, 3, 0xe2);
        assert_eq!(read8(&*bench.pit, 0), 0x80 | 0x34);
        write8(&*bench.pit, 3, 0xd2);
        bench.clock.advance(50_000);
        let count = u16::from_le_bytes([read8(&*bench.pit, 0), read8(&*bench.pit, 0)]);
        assert!(count >= 999, "{count}");
    }

    #[test]
    fn random_programs_do_no_harm() {
        let bench = Bench::new();
        poke(&*bench.pit, 5, 200_000, |random| {
            bench.clock.advance(random.below(100_000));
            bench.timers.run_due();
            bench.all.recorder.take();
        });
    }
}
