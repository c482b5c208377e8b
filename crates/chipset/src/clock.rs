//! Time as the devices see it. A trait, so that tests can turn the hands.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Nanoseconds in a second.
pub const SECOND: u64 = 1_000_000_000;

/// The host's time. Read on vCPU threads and on the timer thread, concurrently.
pub trait Clock: Send + Sync {
    /// Nanoseconds since some fixed moment, never going back.
    fn now(&self) -> u64;
    /// Nanoseconds of UTC since 1970 (without leap seconds). May be set back by the host.
    fn utc(&self) -> u64;
}

/// CLOCK_MONOTONIC and CLOCK_REALTIME.
pub struct HostClock {
    start: Instant,
}

impl HostClock {
    pub fn new() -> Self {
        HostClock { start: Instant::now() }
    }
}

impl Default for HostClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for HostClock {
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn utc(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    }
}

/// How many whole ticks of `hz` fit into `ns` nanoseconds.
pub(crate) fn ticks(ns: u64, hz: u64) -> u64 {
    (u128::from(ns) * u128::from(hz) / u128::from(SECOND)) as u64
}

/// The first nanosecond at which [`ticks`] gives `ticks`.
pub(crate) fn nanoseconds(ticks: u64, hz: u64) -> u64 {
    let ns = (u128::from(ticks) * u128::from(SECOND)).div_ceil(u128::from(hz));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(crate) mod fake {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// A clock that stands still until it is told to go.
    pub struct FakeClock {
        now: AtomicU64,
        utc: AtomicU64,
    }

    impl FakeClock {
        pub fn new() -> Arc<Self> {
            // 2024-02-28 23:59:58, a Wednesday before a leap day.
            Self::at_utc(1_709_164_798)
        }

        pub fn at_utc(seconds: u64) -> Arc<Self> {
            Arc::new(FakeClock { now: AtomicU64::new(SECOND), utc: AtomicU64::new(seconds * SECOND) })
        }

        pub fn advance(&self, ns: u64) {
            self.now.fetch_add(ns, Ordering::SeqCst);
            self.utc.fetch_add(ns, Ordering::SeqCst);
        }
    }

    impl Clock for FakeClock {
        fn now(&self) -> u64 {
            self.now.load(Ordering::SeqCst)
        }

        fn utc(&self) -> u64 {
            self.utc.load(Ordering::SeqCst)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tick_begins_at_its_first_nanosecond() {
        for hz in [18, 1_193_182, 3_579_545] {
            for tick in [0, 1, 2, 1000, 4_294_967_296] {
                let at = nanoseconds(tick, hz);
                assert_eq!(ticks(at, hz), tick);
                assert!(at == 0 || ticks(at - 1, hz) < tick);
            }
        }
    }
}
