//! One of the three counters of an 8254, as a function of time: nothing here ticks. Times are ticks of its input clock.

/// What the counting element does.
#[derive(Clone, Copy)]
enum Counting {
    /// No count since the control word, or no trigger yet.
    Idle,
    /// Loaded at tick `start`.
    Running { start: u64 },
    /// Stopped by the gate, so many ticks after it was loaded.
    Held { elapsed: u64 },
}

/// The names and numbers of the modes are the 8254 datasheet's ("Mode definitions").
pub struct Channel {
    mode: u8,
    bcd: bool,
    /// 1: low byte only, 2: high byte only, 3: low, then high.
    access: u8,
    gate: bool,
    /// The count register: what was written last, in ticks. None since the control word.
    register: Option<u32>,
    /// What the counting element was loaded with.
    period: u32,
    counting: Counting,
    /// When a periodic mode will take over a new count: at the end of the current period.
    reload_at: Option<u64>,
    /// The low byte of a count whose high byte is to come.
    written_low: Option<u8>,
    read_high_next: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Channel {
    pub fn new(gate: bool) -> Self {
        Channel {
            mode: 0,
            bcd: false,
            access: 3,
            gate,
            register: None,
            period: 0x1_0000,
            counting: Counting::Idle,
            reload_at: None,
            written_low: None,
            read_high_next: false,
            latched_count: None,
            latched_status: None,
        }
    }

    /// A control word, bits 5 to 0, that isn't a command.
    pub fn set_mode(&mut self, control: u8) {
        let mode = match (control >> 1) & 7 {
            // Bit 2 of the mode doesn't count for modes 2 and 3.
            mode @ (6 | 7) => mode & 3,
            mode => mode,
        };
        *self = Channel { mode, bcd: control & 1 != 0, access: (control >> 4) & 3, ..Channel::new(self.gate) };
    }

    /// Holds the current count until it has been read.
    pub fn latch_count(&mut self, now: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.count(now));
        }
    }

    /// Holds the status byte until it has been read.
    pub fn latch_status(&mut self, now: u64) {
        if self.latched_status.is_none() {
            let output = u8::from(self.output(now)) << 7;
            let null_count = u8::from(self.null_count()) << 6;
            self.latched_status = Some(output | null_count | self.access << 4 | self.mode << 1 | u8::from(self.bcd));
        }
    }

    /// Whether the count that was written last has yet to reach the counting element.
    fn null_count(&self) -> bool {
        matches!(self.counting, Counting::Idle) || self.reload_at.is_some()
    }

    pub fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.count(now)).to_le_bytes();
        let (byte, more) = match self.access {
            1 => (low, false),
            2 => (high, false),
            _ if self.read_high_next => (high, false),
            _ => (low, true),
        };
        self.read_high_next = more;
        if !more {
            self.latched_count = None;
        }
        byte
    }

    pub fn write(&mut self, now: u64, value: u8) {
        match (self.access, self.written_low.take()) {
            (1, _) => self.set_count(now, u16::from(value)),
            (2, _) => self.set_count(now, u16::from(value) << 8),
            (_, Some(low)) => self.set_count(now, u16::from_le_bytes([low, value])),
            (_, None) => {
                self.written_low = Some(value);
                if self.mode == 0 {
                    // The first byte stops the counter and takes OUT low.
                    self.counting = Counting::Idle;
                }
            }
        }
    }

    fn set_count(&mut self, now: u64, value: u16) {
        let ticks = if self.bcd { from_bcd(value) } else { u32::from(value) };
        // 0 stands for the most that the counter can do.
        self.register = Some(if ticks == 0 { self.modulus() } else { ticks });
        match (self.mode, self.counting) {
            // One-shots wait for their trigger, the gate.
            (1 | 5, _) => self.reload_at = None,
            (2 | 3, Counting::Running { start }) => {
                let periods = now.saturating_sub(start) / u64::from(self.period) + 1;
                self.reload_at.get_or_insert(start + periods * u64::from(self.period));
            }
            (2 | 3, _) if !self.gate => {}
            _ => self.load(now),
        }
    }

    /// Loads the counting element with the count register.
    fn load(&mut self, now: u64) {
        let Some(period) = self.register else { return };
        self.period = period;
        self.reload_at = None;
        self.counting = if self.gate { Counting::Running { start: now } } else { Counting::Held { elapsed: 0 } };
    }

    /// Takes over a new count whose time has come. Every access calls this first.
    pub fn settle(&mut self, now: u64) {
        if let Some(at) = self.reload_at
            && at <= now
        {
            self.load(at);
        }
    }

    pub fn set_gate(&mut self, now: u64, gate: bool) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        match (self.mode, self.counting, gate) {
            (0 | 4, Counting::Held { elapsed }, true) => {
                self.counting = Counting::Running { start: now.saturating_sub(elapsed) };
            }
            (0 | 4, _, true) => {}
            (_, _, true) => self.load(now),
            (1 | 5, _, false) => {}
            (_, Counting::Running { start }, false) => {
                self.counting = Counting::Held { elapsed: now.saturating_sub(start) };
                self.reload_at = None;
            }
            (_, _, false) => {}
        }
    }

    pub fn gate(&self) -> bool {
        self.gate
    }

    fn modulus(&self) -> u32 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    fn elapsed(&self, now: u64) -> Option<u64> {
        match self.counting {
            Counting::Idle => None,
            Counting::Running { start } => Some(now.saturating_sub(start)),
            Counting::Held { elapsed } => Some(elapsed),
        }
    }

    /// The OUT pin.
    pub fn output(&self, now: u64) -> bool {
        let Some(elapsed) = self.elapsed(now) else { return self.mode != 0 };
        let period = u64::from(self.period);
        match self.mode {
            0 | 1 => elapsed >= period,
            2 => !self.gate || period == 1 || elapsed % period != period - 1,
            3 => !self.gate || elapsed % period < period.div_ceil(2),
            _ => elapsed != period,
        }
    }

    /// What the counting element shows.
    fn count(&self, now: u64) -> u16 {
        let modulus = self.modulus();
        let elapsed = self.elapsed(now).unwrap_or(0);
        let within = (elapsed % u64::from(self.period)) as u32;
        let count = match self.mode {
            2 => self.period - within,
            3 => {
                // It counts down by two, twice a period, from the even number at or below the period.
                let half = self.period.div_ceil(2);
                (self.period & !1).saturating_sub(2 * (within % half))
            }
            // One-shots go on counting, round and round.
            _ => self.period + modulus - (elapsed % u64::from(modulus)) as u32,
        } % modulus;
        if self.bcd { to_bcd(count) } else { count as u16 }
    }

    /// The first tick after `now` at which OUT rises, if none but time has a hand in it.
    pub fn next_rise(&self, now: u64) -> Option<u64> {
        let Counting::Running { start } = self.counting else { return None };
        let period = u64::from(self.period);
        let once = |at: u64| (at > now).then_some(at);
        match self.mode {
            0 | 1 => once(start + period),
            2 | 3 => Some(start + (now.saturating_sub(start) / period + 1) * period),
            _ => once(start + period + 1),
        }
    }

    /// Whether OUT is low for so short a time between rises that an interrupt line needn't follow: periodic modes, whose
    /// rises are all that counts, and the strobe.
    pub fn rests_high(&self) -> bool {
        self.mode >= 2
    }
}

fn from_bcd(value: u16) -> u32 {
    (0..4).rev().fold(0, |number, digit| number * 10 + u32::from(value >> (4 * digit) & 15))
}

fn to_bcd(value: u32) -> u16 {
    (0..4).fold((0, value), |(bcd, rest), digit| (bcd | (rest % 10) << (4 * digit), rest / 10)).0 as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mode, low and high byte, with the count written at tick 0.
    fn loaded(mode: u8, count: u16) -> Channel {
        let mut channel = Channel::new(true);
        channel.set_mode(0x30 | mode << 1);
        let [low, high] = count.to_le_bytes();
        channel.write(0, low);
        channel.write(0, high);
        channel
    }

    fn outputs(channel: &mut Channel, ticks: std::ops::Range<u64>) -> String {
        ticks
            .map(|now| {
                channel.settle(now);
                if channel.output(now) { '^' } else { '_' }
            })
            .collect()
    }

    fn read_word(channel: &mut Channel, now: u64) -> u16 {
        channel.settle(now);
        u16::from_le_bytes([channel.read(now), channel.read(now)])
    }

    #[test]
    fn mode_0_goes_high_at_terminal_count_and_counts_on() {
        let mut channel = loaded(0, 4);
        assert_eq!(outputs(&mut channel, 0..8), "____^^^^");
        assert_eq!(channel.next_rise(0), Some(4));
        assert_eq!(channel.next_rise(4), None);
        assert_eq!(read_word(&mut channel, 5), 0xffff);
        channel.write(9, 2);
        assert!(!channel.output(9), "the first byte of a new count takes OUT low");
        channel.write(9, 0);
        assert_eq!(outputs(&mut channel, 9..13), "__^^");
    }

    #[test]
    fn mode_0_waits_while_its_gate_is_low() {
        let mut channel = loaded(0, 4);
        channel.set_gate(2, false);
        assert_eq!(channel.next_rise(2), None);
        assert_eq!(outputs(&mut channel, 2..20), "_".repeat(18));
        assert_eq!(read_word(&mut channel, 19), 2);
        channel.set_gate(20, true);
        assert_eq!(outputs(&mut channel, 20..24), "__^^");
    }

    #[test]
    fn mode_1_is_triggered_by_its_gate() {
        let mut channel = Channel::new(false);
        channel.set_mode(0x12);
        channel.write(0, 3);
        assert_eq!(outputs(&mut channel, 0..4), "^^^^");
        channel.set_gate(4, true);
        assert_eq!(outputs(&mut channel, 4..9), "___^^");
        channel.set_gate(9, false);
        channel.set_gate(10, true);
        channel.set_gate(11, false);
        channel.set_gate(12, true);
        assert_eq!(outputs(&mut channel, 12..16), "___^", "a new trigger starts over");
    }

    #[test]
    fn mode_2_is_low_for_the_last_tick_of_each_period() {
        let mut channel = loaded(2, 3);
        assert_eq!(outputs(&mut channel, 0..9), "^^_^^_^^_");
        assert_eq!(channel.next_rise(0), Some(3));
        assert_eq!(channel.next_rise(3), Some(6));
        assert_eq!(read_word(&mut channel, 4), 2);
        channel.set_gate(5, false);
        assert!(channel.output(5));
        channel.set_gate(7, true);
        assert_eq!(outputs(&mut channel, 7..10), "^^_", "the gate starts a new period");
    }

    #[test]
    fn mode_2_takes_a_new_count_at_the_end_of_the_period() {
        let mut channel = loaded(2, 4);
        channel.write(1, 2);
        channel.write(1, 0);
        channel.latch_status(1);
        assert_ne!(channel.read(1) & 0x40, 0, "null count");
        assert_eq!(outputs(&mut channel, 1..8), "^^_^_^_");
        channel.latch_status(8);
        assert_eq!(channel.read(8) & 0x40, 0);
    }

    #[test]
    fn mode_3_is_a_square_wave() {
        assert_eq!(outputs(&mut loaded(3, 4), 0..8), "^^__^^__");
        assert_eq!(outputs(&mut loaded(3, 5), 0..10), "^^^__^^^__");
        assert_eq!(outputs(&mut loaded(7, 4), 0..4), "^^__");
        let mut channel = loaded(3, 0);
        assert_eq!(channel.next_rise(0), Some(65_536));
        assert_eq!(read_word(&mut channel, 1), 65_534);
        assert_eq!(read_word(&mut channel, 32_768), 0);
    }

    #[test]
    fn mode_4_strobes_once() {
        let mut channel = loaded(4, 3);
        assert_eq!(outputs(&mut channel, 0..7), "^^^_^^^");
        assert_eq!(channel.next_rise(0), Some(4));
        assert_eq!(channel.next_rise(4), None);
    }

    #[test]
    fn mode_5_strobes_after_its_gate() {
        let mut channel = Channel::new(false);
        channel.set_mode(0x1a);
        channel.write(0, 2);
        assert_eq!(outputs(&mut channel, 0..4), "^^^^");
        channel.set_gate(4, true);
        assert_eq!(outputs(&mut channel, 4..8), "^^_^");
    }

    #[test]
    fn a_latched_count_stays_until_it_is_read() {
        let mut channel = loaded(2, 1000);
        channel.latch_count(1);
        channel.latch_count(500);
        assert_eq!(read_word(&mut channel, 600), 999);
        assert_eq!(read_word(&mut channel, 600), 400);
    }

    #[test]
    fn status_comes_before_the_latched_count() {
        let mut channel = loaded(3, 1000);
        channel.latch_count(10);
        channel.latch_status(10);
        assert_eq!(channel.read(20), 0x80 | 0x36);
        assert_eq!(read_word(&mut channel, 20), 980);
    }

    #[test]
    fn bcd_counts_in_tens() {
        let mut channel = Channel::new(true);
        channel.set_mode(0x31);
        channel.write(0, 0x00);
        channel.write(0, 0x10);
        assert_eq!(read_word(&mut channel, 1), 0x0999);
        assert_eq!(read_word(&mut channel, 1001), 0x9999);
        channel.write(0, 0);
        channel.write(0, 0);
        assert_eq!(channel.next_rise(0), Some(10_000));
    }

    #[test]
    fn single_byte_access_sets_the_other_byte_to_zero() {
        let mut channel = Channel::new(true);
        channel.set_mode(0x24);
        channel.write(0, 0x12);
        assert_eq!(channel.next_rise(0), Some(0x1200));
        assert_eq!(channel.read(0), 0x12);
        channel.set_mode(0x14);
        channel.write(0, 0x34);
        assert_eq!(channel.next_rise(0), Some(0x34));
    }
}
