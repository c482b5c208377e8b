//! Where a vCPU's thread sleeps while its processor is halted.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use wake::Linger;

/// For how long a halted processor is kept awake at most. While it is, it may keep others from the host's processor who
/// do what it waits for.
const LINGER: Duration = Duration::from_micros(100);

/// One sleeper (the vCPU's thread), any number of wakers.
///
/// A waker first makes true what the sleeper waits for, then calls [`Parker::wake`], which costs one load while nobody
/// sleeps. The sleeper first says that it sleeps, then looks. Both orders are sequentially consistent, so one of the two
/// sees the other.
pub struct Parker {
    sleeping: AtomicBool,
    lock: Mutex<()>,
    condition: Condvar,
    linger: Linger,
}

impl Default for Parker {
    fn default() -> Self {
        let (sleeping, lock, condition) = Default::default();
        Parker { sleeping, lock, condition, linger: Linger::up_to(LINGER) }
    }
}

impl Parker {
    /// Waits until `wanted` is true or `timeout` is over, asleep if it takes long; spurious returns are possible.
    pub fn park(&self, timeout: Option<Duration>, wanted: impl Fn() -> bool) {
        let begin = Instant::now();
        if self.linger.look(timeout, &wanted) {
            return;
        }
        self.sleep(timeout.map(|timeout| timeout.saturating_sub(begin.elapsed())), wanted);
        self.linger.learn(begin.elapsed());
    }

    fn sleep(&self, timeout: Option<Duration>, wanted: impl Fn() -> bool) {
        let guard = self.lock.lock().unwrap_or_else(|e| e.into_inner());
        self.sleeping.store(true, Ordering::SeqCst);
        if !wanted() {
            // The result only says whether the time is over, which the caller finds out by its own clock.
            match timeout {
                Some(t) => drop(self.condition.wait_timeout(guard, t)),
                None => drop(self.condition.wait(guard)),
            }
        }
        self.sleeping.store(false, Ordering::SeqCst);
    }

    /// Lets the sleeper, if there is one, look again.
    pub fn wake(&self) {
        if self.sleeping.load(Ordering::SeqCst) {
            // With the lock held the sleeper is either waiting or has not looked yet.
            let _guard = self.lock.lock().unwrap_or_else(|e| e.into_inner());
            self.condition.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;
    use std::time::Instant;

    #[test]
    fn a_wake_before_the_sleep_is_not_lost() {
        let parker = Parker::default();
        parker.wake();
        parker.park(None, || true);
    }

    #[test]
    fn a_sleeper_wakes_when_its_time_is_over() {
        let start = Instant::now();
        Parker::default().park(Some(Duration::from_millis(5)), || false);
        assert!(start.elapsed() >= Duration::from_millis(5));
    }

    #[test]
    fn ten_thousand_wakes_are_all_seen() {
        let (parker, count) = (Parker::default(), AtomicU32::new(0));
        std::thread::scope(|s| {
            s.spawn(|| {
                for _ in 0..10_000 {
                    count.fetch_add(1, Ordering::SeqCst);
                    parker.wake();
                }
            });
            let mut seen = 0;
            while seen < 10_000 {
                parker.park(None, || count.load(Ordering::SeqCst) != seen);
                seen = count.load(Ordering::SeqCst);
            }
        });
    }
}
