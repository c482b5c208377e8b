//! The real-time clock and CMOS memory: an MC146818 with 114 bytes of memory.
//!
//! The time is the host's UTC plus an offset, which changes when the guest sets the clock. Nothing ticks: flags
//! are worked out from the time that has passed whenever somebody looks, and a timer is armed only for the next event
//! that interrupts. An event whose flag is still set interrupts nobody again, so a starved host can't cause a burst.
//!
//! Time cells and memory survive a reset, as with a battery.

mod calendar;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Device;
use crate::clock::{Clock, SECOND, nanoseconds, ticks};
use crate::constants::{ECAM_BASE, RTC_CENTURY};
use crate::irq::InterruptLine;
use crate::timer::{Timer, Timers};
use calendar::{Moment, SECONDS_PER_DAY};

/// Cells (MC146818 datasheet, "Address map").
const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;

/// Register A: update in progress; the divider is held in reset while bits 6 and 5 are set; rate select.
const UPDATE_IN_PROGRESS: u8 = 0x80;
const DIVIDER_RESET: u8 = 0x60;
const RATE_SELECT: u8 = 0x0f;
/// Register B.
const SET: u8 = 0x80;
const BINARY: u8 = 0x04;
const HOURS_24: u8 = 0x02;
/// Interrupt enables in register B, flags in register C.
const PERIODIC: u8 = 0x40;
const ALARM: u8 = 0x20;
const UPDATE_ENDED: u8 = 0x10;
const INTERRUPTS: u8 = PERIODIC | ALARM | UPDATE_ENDED;
const SQUARE_WAVE: u8 = 0x08;
/// Register C: an enabled flag is set.
const INTERRUPT_REQUEST: u8 = 0x80;
/// Register D: the battery is good.
const VALID: u8 = 0x80;

const PM: u8 = 0x80;
/// An alarm cell with both upper bits set matches anything.
const ANY: u8 = 0xc0;
/// How long before an update its flag goes up, in nanoseconds (datasheet: 244 us).
const UPDATE_WARNING: i128 = 244_000;
/// The first update comes half a second after the divider is let go.
const HALF_SECOND: i128 = SECOND as i128 / 2;

struct State {
    index: u8,
    cells: [u8; 128],
    /// Nanoseconds to add to the host's UTC, while the clock runs.
    offset: i128,
    /// Flags of register C.
    flags: u8,
    /// The second, and the period of the periodic interrupt, up to which the flags are worked out.
    seen_second: i64,
    seen_period: u64,
}

/// As a [`Device`]: offset 0 is the index port, offset 1 the data port.
pub struct Rtc {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
    line: Arc<InterruptLine>,
    timer: Timer,
}

impl Rtc {
    /// A clock that shows the host's time, with the CMOS cells that tell of `ram_size` bytes of RAM and of `cpus`.
    pub fn new(
        clock: Arc<dyn Clock>,
        timers: &Timers,
        line: impl Into<Arc<InterruptLine>>,
        ram_size: u64,
        cpus: u32,
    ) -> Arc<Self> {
        let line = line.into();
        let state = State {
            index: 0,
            cells: initial_cells(ram_size, cpus),
            offset: 0,
            flags: 0,
            seen_second: (clock.utc() / SECOND) as i64,
            seen_period: 0,
        };
        Arc::new_cyclic(|rtc: &std::sync::Weak<Rtc>| {
            let rtc = rtc.clone();
            let timer = timers.create(move || {
                if let Some(rtc) = rtc.upgrade() {
                    let mut state = rtc.lock();
                    rtc.update(&mut state);
                }
            });
            Rtc { state: Mutex::new(state), clock, line, timer }
        })
    }

    /// Notes the types of the floppy drives (0: there is none), for firmware and systems that ask CMOS.
    pub fn set_floppy_drives(&self, types: [u8; 2]) {
        const DRIVES: usize = 0x10;
        const EQUIPMENT: usize = 0x14;
        let mut state = self.lock();
        let [first, second] = types.map(|kind| kind & 15);
        state.cells[DRIVES] = first << 4 | second;
        // There are drives, and how many besides the first.
        let count = types.iter().filter(|kind| **kind != 0).count() as u8;
        let bits = if count > 0 { 1 | (count - 1) << 6 } else { 0 };
        state.cells[EQUIPMENT] = state.cells[EQUIPMENT] & !0xc1 | bits;
        sum_up(&mut state.cells);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works out the flags, drives the line, and arms the timer for what comes next.
    fn update(&self, state: &mut State) {
        let (now, utc) = (self.clock.now(), self.clock.utc());
        state.work_out_flags(now, utc);
        self.line.set(state.flags & state.enabled() != 0);
        match state.next_interrupt(now, utc) {
            Some(at) => self.timer.arm(at),
            None => self.timer.cancel(),
        }
    }

    fn read_data(&self, state: &mut State) -> u8 {
        let utc = self.clock.utc();
        match state.index {
            REGISTER_A => state.cells[REGISTER_A as usize] | state.update_in_progress(utc),
            REGISTER_C => {
                self.update(state);
                let pending = state.flags & state.enabled() != 0;
                let value = state.flags | if pending { INTERRUPT_REQUEST } else { 0 };
                state.flags = 0;
                self.update(state);
                value
            }
            REGISTER_D => VALID,
            index => {
                if is_time(index) && state.running() {
                    state.store_time(utc);
                }
                state.cell(index)
            }
        }
    }

    fn write_data(&self, state: &mut State, value: u8) {
        let utc = self.clock.utc();
        match state.index {
            REGISTER_A => state.set_control(REGISTER_A, value & !UPDATE_IN_PROGRESS, utc),
            // Setting SET clears the update-ended enable.
            REGISTER_B if value & SET != 0 => state.set_control(REGISTER_B, value & !UPDATE_ENDED, utc),
            REGISTER_B => state.set_control(REGISTER_B, value, utc),
            REGISTER_C | REGISTER_D => {}
            index if is_time(index) && state.running() => {
                let phase = state.guest_time(utc).rem_euclid(i128::from(SECOND));
                state.store_time(utc);
                state.set_cell(index, value);
                state.load_time(utc, phase);
            }
            index => state.set_cell(index, value),
        }
        self.update(state);
    }
}

/// Whether a cell shows the time while the clock runs.
fn is_time(index: u8) -> bool {
    matches!(index, SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | RTC_CENTURY)
}

impl State {
    fn cell(&self, index: u8) -> u8 {
        self.cells[usize::from(index & 0x7f)]
    }

    fn set_cell(&mut self, index: u8, value: u8) {
        self.cells[usize::from(index & 0x7f)] = value;
    }

    fn enabled(&self) -> u8 {
        self.cell(REGISTER_B) & INTERRUPTS
    }

    fn divider_reset(&self) -> bool {
        self.cell(REGISTER_A) & DIVIDER_RESET == DIVIDER_RESET
    }

    /// Whether the time cells advance. If not, they hold what was written.
    fn running(&self) -> bool {
        self.cell(REGISTER_B) & SET == 0 && !self.divider_reset()
    }

    /// The guest's time, in nanoseconds since 1970.
    fn guest_time(&self, utc: u64) -> i128 {
        i128::from(utc) + self.offset
    }

    fn guest_second(&self, utc: u64) -> i64 {
        self.guest_time(utc).div_euclid(i128::from(SECOND)) as i64
    }

    fn update_in_progress(&self, utc: u64) -> u8 {
        let phase = self.guest_time(utc).rem_euclid(i128::from(SECOND));
        let soon = phase >= i128::from(SECOND) - UPDATE_WARNING;
        if self.running() && soon { UPDATE_IN_PROGRESS } else { 0 }
    }

    /// Writes register A or B. Stopping the clock leaves the time in the cells; starting it takes the time from them.
    fn set_control(&mut self, index: u8, value: u8, utc: u64) {
        let (ran, was_reset) = (self.running(), self.divider_reset());
        if ran {
            self.store_time(utc);
        }
        let rate = self.cell(REGISTER_A) & RATE_SELECT;
        self.set_cell(index, value);
        if self.cell(REGISTER_A) & RATE_SELECT != rate {
            self.seen_period = u64::MAX;
        }
        if !ran && self.running() {
            // SET leaves the divider running, a divider reset doesn't.
            let phase = if was_reset { HALF_SECOND } else { self.guest_time(utc).rem_euclid(i128::from(SECOND)) };
            self.load_time(utc, phase);
        }
    }

    /// Puts the time into the cells.
    fn store_time(&mut self, utc: u64) {
        let moment = Moment::from_seconds(self.guest_second(utc));
        let encoded = [
            (SECONDS, self.encode(moment.second)),
            (MINUTES, self.encode(moment.minute)),
            (HOURS, self.encode_hour(moment.hour)),
            (WEEKDAY, moment.weekday()),
            (DAY, self.encode(moment.day)),
            (MONTH, self.encode(moment.month)),
            (YEAR, self.encode(moment.year.rem_euclid(100) as u8)),
            (RTC_CENTURY, self.encode(moment.year.div_euclid(100).rem_euclid(100) as u8)),
        ];
        encoded.into_iter().for_each(|(index, value)| self.set_cell(index, value));
    }

    /// Takes the time from the cells, `phase` nanoseconds into its second.
    fn load_time(&mut self, utc: u64, phase: i128) {
        let decoded = |index| self.decode(self.cell(index));
        let moment = Moment {
            year: i64::from(decoded(RTC_CENTURY)) * 100 + i64::from(decoded(YEAR)),
            month: decoded(MONTH),
            day: decoded(DAY),
            hour: self.decode_hour(self.cell(HOURS)),
            minute: decoded(MINUTES),
            second: decoded(SECONDS),
        };
        let seconds = moment.to_seconds();
        self.offset = i128::from(seconds) * i128::from(SECOND) + phase - i128::from(utc);
        self.seen_second = seconds;
    }

    /// A number below 100 as cells hold it: binary or BCD.
    fn encode(&self, value: u8) -> u8 {
        if self.cell(REGISTER_B) & BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.cell(REGISTER_B) & BINARY != 0 { value } else { (value >> 4) * 10 + (value & 15) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.cell(REGISTER_B) & HOURS_24 != 0 {
            return self.encode(hour);
        }
        let half = if hour >= 12 { PM } else { 0 };
        self.encode((hour + 11) % 12 + 1) | half
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.cell(REGISTER_B) & HOURS_24 != 0 {
            return self.decode(value);
        }
        let half = if value & PM != 0 { 12 } else { 0 };
        self.decode(value & !PM) % 12 + half
    }

    /// The rate of the periodic interrupt in Hz. The first two selections repeat the rates of 8 and 9.
    fn periodic_rate(&self) -> Option<u64> {
        match self.cell(REGISTER_A) & RATE_SELECT {
            _ if self.divider_reset() => None,
            0 => None,
            select @ (1 | 2) => Some(32_768 >> (select + 6)),
            select => Some(32_768 >> (select - 1)),
        }
    }

    fn work_out_flags(&mut self, now: u64, utc: u64) {
        if let Some(rate) = self.periodic_rate() {
            let period = ticks(now, rate);
            if period > self.seen_period {
                self.flags |= PERIODIC;
            }
            self.seen_period = period;
        }
        if self.running() {
            let second = self.guest_second(utc);
            if second > self.seen_second {
                self.flags |= UPDATE_ENDED;
                if self.next_alarm(self.seen_second).is_some_and(|at| at <= second) {
                    self.flags |= ALARM;
                }
            }
            self.seen_second = second;
        }
    }

    /// When the next interrupt is due, on the monotonic clock. What has its flag set already waits for a read of register C.
    fn next_interrupt(&self, now: u64, utc: u64) -> Option<u64> {
        let waiting = self.enabled() & !self.flags;
        let at_second = |second: i64| {
            let ahead = i128::from(second) * i128::from(SECOND) - self.guest_time(utc);
            now.saturating_add(u64::try_from(ahead.max(0)).unwrap_or(u64::MAX))
        };
        let running = self.running();
        let periodic = || Some(nanoseconds(self.seen_period.saturating_add(1), self.periodic_rate()?));
        let ended = || running.then(|| at_second(self.seen_second.saturating_add(1)));
        let alarm = || if running { self.next_alarm(self.seen_second).map(at_second) } else { None };
        let due = |flag, at: &dyn Fn() -> Option<u64>| if waiting & flag != 0 { at() } else { None };
        [due(PERIODIC, &periodic), due(UPDATE_ENDED, &ended), due(ALARM, &alarm)].into_iter().flatten().min()
    }

    /// The first second after `after` at which the alarm cells match, at most a day later.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let matches = |index: u8, now: u8| {
            let cell = self.cell(index);
            cell & ANY == ANY || cell == now
        };
        let last = after.checked_add(SECONDS_PER_DAY)?;
        let mut second = after + 1;
        while second <= last {
            let time = second.rem_euclid(SECONDS_PER_DAY);
            // From a part that doesn't match, on to where that part changes.
            let step = if !matches(HOURS_ALARM, self.encode_hour((time / 3600) as u8)) {
                3600
            } else if !matches(MINUTES_ALARM, self.encode((time / 60 % 60) as u8)) {
                60
            } else if !matches(SECONDS_ALARM, self.encode((time % 60) as u8)) {
                1
            } else {
                return Some(second);
            };
            second += step - time % step;
        }
        None
    }
}

/// Memory as firmware would have filled it (the cells that PC firmwares and kernels agree on).
fn initial_cells(ram_size: u64, cpus: u32) -> [u8; 128] {
    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    let mut cells = [0; 128];
    let mut word = |index: usize, value: u64| {
        let value = value.min(0xffff) as u16;
        cells[index..index + 2].copy_from_slice(&value.to_le_bytes());
    };
    let low = ram_size.min(ECAM_BASE);
    let extended = low.saturating_sub(MIB) / KIB;
    // Base memory in KiB; extended memory in KiB, twice; what lies above 16 MiB, in units of 64 KiB.
    word(0x15, 640);
    word(0x17, extended);
    word(0x30, extended);
    word(0x34, low.saturating_sub(16 * MIB) / (64 * KIB));
    // What lies above 4 GiB, in units of 64 KiB.
    let high = (ram_size - low) / (64 * KIB);
    word(0x5b, high & 0xffff);
    cells[0x5d] = (high >> 16).min(0xff) as u8;
    // What to boot from, as Bochs's BIOS and its successors have it: disk (2), floppy (1), CD-ROM (3). SeaBIOS and EFI firmware have
    // a list in fw_cfg, which comes first.
    (cells[0x3d], cells[0x38]) = (0x12, 0x30);
    // Processors besides the first.
    cells[0x5f] = cpus.saturating_sub(1).min(0xff) as u8;
    sum_up(&mut cells);
    // Divider running, 1024 Hz; 24-hour mode, BCD.
    cells[usize::from(REGISTER_A)] = 0x26;
    cells[usize::from(REGISTER_B)] = HOURS_24;
    cells
}

/// Makes the checksum of the cells that firmware looks after right.
fn sum_up(cells: &mut [u8; 128]) {
    let checksum: u16 = cells[0x10..0x2e].iter().map(|&cell| u16::from(cell)).sum();
    cells[0x2e..0x30].copy_from_slice(&checksum.to_be_bytes());
}

impl Device for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            1 => self.read_data(&mut self.lock()),
            // The index can only be written.
            _ => 0xff,
        };
        data.fill(value);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let mut state = self.lock();
        match offset {
            // Bit 7 gates NMI. Nothing in this chipset raises one, so there is nothing to hold back.
            0 => state.index = value & 0x7f,
            _ => self.write_data(&mut state, value),
        }
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.index = 0;
        state.flags = 0;
        let control = state.cell(REGISTER_B) & !(INTERRUPTS | SQUARE_WAVE);
        state.set_cell(REGISTER_B, control);
        self.update(&mut state);
    }
}

#[cfg(test)]
mod tests;
