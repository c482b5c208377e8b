//! Looking for a moment before sleeping.
//!
//! To put a thread to sleep and to wake it again takes a host 5 to 50 µs, on virtual machines most of all, and a guest's
//! request for a disk waits twice for that: until the device's thread is awake, and until the vCPU's is. Where what is
//! waited for usually comes sooner than that, the waiting thread does better to look for it for a while. Whether it does,
//! it learns from how long its last waits were, so that a thread that has nothing to do costs nothing.

use std::hint::spin_loop;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

/// For how long to look when short waits begin.
const FIRST: Duration = Duration::from_micros(10);
/// Looks between two looks at the clock.
const LOOKS: u32 = 16;

/// Where all processors are ours alone to wait on, whoever is waited for can't come meanwhile.
static ALONE: LazyLock<bool> = LazyLock::new(|| available_parallelism().is_ok_and(|processors| processors.get() < 2));

/// How one thread waits.
#[derive(Debug)]
pub struct Linger {
    /// For how long it looks at present, in nanoseconds.
    window: AtomicU32,
    most: Duration,
}

impl Linger {
    /// One who never looks longer than `most`, and takes no longer wait for worth it.
    pub const fn up_to(most: Duration) -> Self {
        Linger { window: AtomicU32::new(0), most }
    }

    /// Looks as long as it has been worth it lately, and no longer than `limit`. True: `come` has said so.
    pub fn look(&self, limit: Option<Duration>, come: impl Fn() -> bool) -> bool {
        let window = Duration::from_nanos(self.window.load(Ordering::Relaxed).into());
        let window = limit.map_or(window, |limit| limit.min(window));
        if window.is_zero() {
            return false;
        }
        let begin = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if come() {
                    return true;
                }
                spin_loop();
            }
            if begin.elapsed() >= window {
                return false;
            }
        }
    }

    /// A wait for which it was not enough to look took `waited` in all.
    pub fn learn(&self, waited: Duration) {
        let window = Duration::from_nanos(self.window.load(Ordering::Relaxed).into());
        let next = match () {
            () if waited > self.most && window <= FIRST => Duration::ZERO,
            () if waited > self.most => window / 2,
            () if *ALONE => Duration::ZERO,
            () => (window * 2).max(FIRST).min(self.most),
        };
        self.window.store(next.as_nanos() as u32, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const MOST: Duration = Duration::from_micros(100);

    fn window(linger: &Linger) -> Duration {
        Duration::from_nanos(linger.window.load(Ordering::Relaxed).into())
    }

    #[test]
    fn who_waits_long_does_not_look_at_all() {
        let linger = Linger::up_to(MOST);
        (0..100).for_each(|_| linger.learn(Duration::from_millis(4)));
        assert!(!linger.look(None, || panic!("there is nothing to be seen")));
        linger.learn(Duration::from_micros(30));
        (0..3).for_each(|_| linger.learn(Duration::from_millis(1)));
        assert!(window(&linger).is_zero(), "one short wait is soon forgotten");
    }

    #[test]
    fn who_waits_briefly_looks_ever_longer_up_to_the_limit() {
        let linger = Linger::up_to(MOST);
        (0..20).for_each(|_| linger.learn(Duration::from_micros(60)));
        if *ALONE {
            return assert!(window(&linger).is_zero());
        }
        assert_eq!(window(&linger), MOST);
        let looks = Cell::new(0);
        let third = || looks.replace(looks.get() + 1) == 2;
        assert!(linger.look(None, third));
        assert!(!linger.look(Some(Duration::ZERO), || true), "no time is left");
        let begin = Instant::now();
        assert!(!linger.look(None, || false) && begin.elapsed() >= MOST);
    }
}
