//! What software may expect of the clock.

use super::*;
use crate::clock::fake::FakeClock;
use crate::testing::{Controllers, poke, read8, write8};

const GIB: u64 = 1 << 30;

struct Bench {
    clock: Arc<FakeClock>,
    timers: Timers,
    all: Controllers,
    rtc: Arc<Rtc>,
}

impl Bench {
    /// 2024-02-28 23:59:58, a Wednesday.
    fn new() -> Self {
        let clock = FakeClock::new();
        let timers = Timers::manual(clock.clone());
        let all = Controllers::default();
        let rtc = Rtc::new(clock.clone(), &timers, all.lines.connect(8), 5 * GIB, 4);
        Bench { clock, timers, all, rtc }
    }

    fn get(&self, index: u8) -> u8 {
        write8(&*self.rtc, 0, index);
        read8(&*self.rtc, 1)
    }

    fn set(&self, index: u8, value: u8) {
        write8(&*self.rtc, 0, index);
        write8(&*self.rtc, 1, value);
    }

    fn time(&self) -> [u8; 8] {
        [RTC_CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|index| self.get(index))
    }

    fn pass(&self, ns: u64) {
        self.clock.advance(ns);
        self.timers.run_due();
    }

    fn interrupting(&self) -> bool {
        self.all.asserted(8)
    }
}

#[test]
fn it_shows_utc_in_bcd() {
    let bench = Bench::new();
    assert_eq!(bench.time(), [0x20, 0x24, 0x02, 0x28, 4, 0x23, 0x59, 0x58]);
    bench.pass(2 * SECOND);
    assert_eq!(bench.time(), [0x20, 0x24, 0x02, 0x29, 5, 0x00, 0x00, 0x00]);
    assert_eq!(bench.get(REGISTER_D), 0x80);
}

#[test]
fn binary_and_12_hour_modes() {
    let bench = Bench::new();
    bench.set(REGISTER_B, BINARY);
    assert_eq!(bench.time(), [20, 24, 2, 28, 4, 11 | PM, 59, 58]);
    bench.pass(2 * SECOND);
    assert_eq!(bench.get(HOURS), 12);
    bench.pass(12 * 3600 * SECOND);
    assert_eq!(bench.get(HOURS), 12 | PM);
    bench.set(REGISTER_B, HOURS_24 | BINARY);
    assert_eq!(bench.get(HOURS), 12);
}

#[test]
fn the_time_stands_still_while_it_is_set() {
    let bench = Bench::new();
    bench.set(REGISTER_B, SET | HOURS_24);
    bench.pass(10 * SECOND);
    assert_eq!(bench.get(SECONDS), 0x58);
    for (index, value) in [(RTC_CENTURY, 0x19), (YEAR, 0x99), (MONTH, 0x12), (DAY, 0x31), (HOURS, 0x23)] {
        bench.set(index, value);
    }
    bench.set(REGISTER_B, HOURS_24);
    assert_eq!(bench.time()[..4], [0x19, 0x99, 0x12, 0x31]);
    bench.pass(2 * SECOND);
    assert_eq!(bench.time(), [0x20, 0x00, 0x01, 0x01, 7, 0, 0, 0]);
}

#[test]
fn the_first_update_comes_half_a_second_after_a_divider_reset() {
    let bench = Bench::new();
    bench.pass(123_456_789);
    bench.set(REGISTER_A, 0x70);
    bench.set(SECONDS, 0x10);
    bench.pass(5 * SECOND);
    bench.set(REGISTER_A, 0x26);
    bench.pass(499_000_000);
    assert_eq!(bench.get(SECONDS), 0x10);
    bench.pass(2_000_000);
    assert_eq!(bench.get(SECONDS), 0x11);
}

#[test]
fn a_cell_can_be_set_while_the_clock_runs() {
    let bench = Bench::new();
    bench.set(HOURS, 0x05);
    bench.pass(SECOND);
    assert_eq!(bench.time(), [0x20, 0x24, 0x02, 0x28, 4, 0x05, 0x59, 0x59]);
}

#[test]
fn an_update_announces_itself() {
    let bench = Bench::new();
    assert_eq!(bench.get(REGISTER_A), 0x26);
    bench.pass(SECOND - 244_000);
    assert_eq!(bench.get(REGISTER_A), 0xa6);
    bench.pass(244_000);
    assert_eq!(bench.get(REGISTER_A), 0x26);
}

#[test]
fn the_update_ended_interrupt_comes_every_second() {
    let bench = Bench::new();
    bench.get(REGISTER_C);
    bench.set(REGISTER_B, HOURS_24 | UPDATE_ENDED);
    for _ in 0..3 {
        assert!(!bench.interrupting());
        bench.pass(SECOND);
        assert!(bench.interrupting());
        // Midnight is also when the alarm cells, all zero, match.
        assert_eq!(bench.get(REGISTER_C) & !ALARM, 0x80 | PERIODIC | UPDATE_ENDED);
    }
}

#[test]
fn the_periodic_interrupt_waits_for_register_c() {
    let bench = Bench::new();
    bench.set(REGISTER_A, 0x2f);
    bench.get(REGISTER_C);
    bench.set(REGISTER_B, HOURS_24 | PERIODIC);
    let mut interrupts = 0;
    for _ in 0..1000 {
        bench.pass(10_000_000);
        if bench.interrupting() {
            interrupts += 1;
            bench.get(REGISTER_C);
            assert!(!bench.interrupting());
        }
    }
    assert!((19..=20).contains(&interrupts), "{interrupts}");
    bench.pass(10 * SECOND);
    assert_eq!(bench.timers.next_deadline(), None, "nothing to wake for until register C is read");
    assert_eq!(bench.get(REGISTER_C) & 0xc0, 0xc0);
    assert!(!bench.interrupting());
}

#[test]
fn the_alarm_rings_when_its_cells_match() {
    let bench = Bench::new();
    bench.get(REGISTER_C);
    for (index, value) in [(HOURS_ALARM, 0x06), (MINUTES_ALARM, 0x30), (SECONDS_ALARM, 0x00)] {
        bench.set(index, value);
    }
    bench.set(REGISTER_B, HOURS_24 | ALARM);
    let rings = bench.timers.next_deadline().unwrap();
    assert_eq!(rings - bench.clock.now(), (6 * 3600 + 30 * 60 + 2) * SECOND);
    bench.pass((6 * 3600 + 30 * 60 + 1) * SECOND);
    assert!(!bench.interrupting());
    bench.pass(SECOND);
    assert!(bench.interrupting());
    assert_ne!(bench.get(REGISTER_C) & ALARM, 0);
    assert_eq!(bench.timers.next_deadline().unwrap() - bench.clock.now(), 86_400 * SECOND);
}

#[test]
fn an_alarm_cell_can_match_anything() {
    let bench = Bench::new();
    bench.set(HOURS_ALARM, 0xff);
    bench.set(MINUTES_ALARM, 0xc0);
    bench.set(SECONDS_ALARM, 0x05);
    bench.set(REGISTER_B, HOURS_24 | ALARM);
    assert_eq!(bench.timers.next_deadline().unwrap() - bench.clock.now(), 7 * SECOND);
    bench.set(SECONDS_ALARM, 0x99);
    assert_eq!(bench.timers.next_deadline(), None);
}

#[test]
fn flags_are_set_without_their_interrupts_too() {
    let bench = Bench::new();
    bench.get(REGISTER_C);
    bench.pass(SECOND);
    assert_eq!(bench.get(REGISTER_C) & UPDATE_ENDED, UPDATE_ENDED);
    assert_eq!(bench.get(REGISTER_C) & UPDATE_ENDED, 0);
    assert_eq!(bench.timers.next_deadline(), None);
}

#[test]
fn memory_tells_the_size_of_ram_and_the_boot_order_and_survives_a_reset() {
    let bench = Bench::new();
    let word = |index| u16::from_le_bytes([bench.get(index), bench.get(index + 1)]);
    assert_eq!(word(0x15), 640);
    assert_eq!(word(0x17), 0xffff);
    assert_eq!(u64::from(word(0x34)) << 16, ECAM_BASE - (16 << 20));
    let high = u64::from(word(0x5b)) << 16 | u64::from(bench.get(0x5d)) << 32;
    assert_eq!(high, 5 * GIB - ECAM_BASE);
    assert_eq!(bench.get(0x5f), 3);
    assert_eq!([bench.get(0x3d), bench.get(0x38)], [0x12, 0x30], "disk, floppy, CD-ROM");
    bench.set(0x0f, 0x0a);
    bench.set(REGISTER_B, HOURS_24 | INTERRUPTS);
    bench.pass(SECOND);
    bench.rtc.reset();
    assert!(!bench.interrupting());
    assert_eq!(bench.get(0x0f), 0x0a);
    assert_eq!(bench.get(REGISTER_B), HOURS_24);
}

#[test]
fn random_programs_do_no_harm() {
    let bench = Bench::new();
    poke(&*bench.rtc, 2, 300_000, |random| {
        bench.pass(random.below(1 << 34));
    });
}
