//! One thread that wakes devices at deadlines. It sleeps while nothing is armed.
//!
//! A device creates a [`Timer`] with a callback and arms it with an absolute deadline of the machine's clock. The
//! callback runs once per arming, on the timer thread, and with no lock of this module held; a periodic device arms the
//! next deadline there, computed from its own phase, so that a starved host loses ticks but never gets a burst of them.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::clock::Clock;

type Callback = Arc<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct Slot {
    /// Absolute, in the clock's nanoseconds.
    deadline: Option<u64>,
    callback: Option<Callback>,
}

#[derive(Default)]
struct State {
    /// A machine has about ten timers; a scan of them is faster than any heap, and cancelling is exact.
    slots: Vec<Slot>,
    paused: bool,
    stopped: bool,
}

impl State {
    fn earliest(&self) -> Option<u64> {
        self.slots.iter().filter_map(|slot| slot.deadline).min()
    }

    /// Takes the timer whose deadline passed first.
    fn take_due(&mut self, now: u64) -> Option<Callback> {
        let slot = self
            .slots
            .iter_mut()
            .filter(|slot| slot.deadline.is_some_and(|deadline| deadline <= now))
            .min_by_key(|slot| slot.deadline)?;
        slot.deadline = None;
        slot.callback.clone()
    }
}

struct Shared {
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.lock();
        while !state.stopped {
            let now = self.clock.now();
            if !state.paused
                && let Some(callback) = state.take_due(now)
            {
                drop(state);
                callback();
                state = self.lock();
                continue;
            }
            let earliest = if state.paused { None } else { state.earliest() };
            state = match earliest {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let wait = Duration::from_nanos(deadline.saturating_sub(now));
                    self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

/// The timer service of one machine. Dropping it ends its thread; timers that are left never fire again.
pub struct Timers {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Timers {
    /// Starts the timer thread.
    pub fn start(clock: Arc<dyn Clock>) -> std::io::Result<Self> {
        let mut timers = Self::without_thread(clock);
        let shared = timers.shared.clone();
        timers.thread = Some(wake::thread("timers").spawn(move || shared.run())?);
        Ok(timers)
    }

    fn without_thread(clock: Arc<dyn Clock>) -> Self {
        let shared = Arc::new(Shared { clock, state: Mutex::default(), changed: Condvar::new() });
        Timers { shared, thread: None }
    }

    /// A new timer, not armed. The callback may run once more just after [`Timer::cancel`] or a new [`Timer::arm`], if
    /// it had been due: it must look at its device's state.
    pub fn create(&self, callback: impl Fn() + Send + Sync + 'static) -> Timer {
        let mut state = self.shared.lock();
        state.slots.push(Slot { deadline: None, callback: Some(Arc::new(callback)) });
        Timer { shared: self.shared.clone(), index: state.slots.len() - 1 }
    }

    /// From now on nothing fires, until [`resume`](Self::resume). What comes due meanwhile fires then, once.
    pub fn pause(&self) {
        self.shared.lock().paused = true;
    }

    pub fn resume(&self) {
        self.shared.lock().paused = false;
        self.shared.changed.notify_one();
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // It can only fail if a callback panicked, which the panic hook has reported.
            let _ = thread.join();
        }
    }
}

/// One deadline of one device.
pub struct Timer {
    shared: Arc<Shared>,
    index: usize,
}

impl Timer {
    /// Sets the deadline, in place of an earlier one. A deadline that has passed fires at once.
    pub fn arm(&self, deadline: u64) {
        let mut state = self.shared.lock();
        let wake = state.earliest().is_none_or(|earliest| deadline < earliest);
        if let Some(slot) = state.slots.get_mut(self.index) {
            slot.deadline = Some(deadline);
        }
        if wake {
            self.shared.changed.notify_one();
        }
    }

    pub fn cancel(&self) {
        if let Some(slot) = self.shared.lock().slots.get_mut(self.index) {
            slot.deadline = None;
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        if let Some(slot) = self.shared.lock().slots.get_mut(self.index) {
            *slot = Slot::default();
        }
    }
}

#[cfg(test)]
impl Timers {
    /// A service that fires only in [`run_due`](Self::run_due).
    pub fn manual(clock: Arc<dyn Clock>) -> Self {
        Self::without_thread(clock)
    }

    /// Fires all that is due, and returns how many times.
    pub fn run_due(&self) -> usize {
        let mut fired = 0;
        loop {
            let now = self.shared.clock.now();
            let Some(callback) = Some(self.shared.lock()).filter(|s| !s.paused).and_then(|mut s| s.take_due(now))
            else {
                return fired;
            };
            callback();
            fired += 1;
        }
    }

    /// The next deadline at which the thread would wake.
    pub fn next_deadline(&self) -> Option<u64> {
        self.shared.lock().earliest()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::HostClock;
    use crate::clock::fake::FakeClock;
    use std::sync::mpsc;

    #[test]
    fn timers_fire_in_the_order_of_their_deadlines() {
        let clock = FakeClock::new();
        let timers = Timers::manual(clock.clone());
        let (sender, fired) = mpsc::channel();
        let make = |name: u32| {
            let sender = sender.clone();
            timers.create(move || sender.send(name).unwrap())
        };
        let (first, second, third) = (make(1), make(2), make(3));
        let now = clock.now();
        second.arm(now + 20);
        first.arm(now + 10);
        third.arm(now + 30);
        third.cancel();
        assert_eq!(timers.run_due(), 0);
        clock.advance(100);
        assert_eq!(timers.run_due(), 2);
        assert_eq!(fired.try_iter().collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn a_paused_service_fires_once_when_resumed() {
        let clock = FakeClock::new();
        let timers = Timers::manual(clock.clone());
        let (sender, fired) = mpsc::channel();
        let timer = timers.create(move || sender.send(()).unwrap());
        timer.arm(clock.now() + 10);
        timers.pause();
        clock.advance(100);
        assert_eq!(timers.run_due(), 0);
        timers.resume();
        timers.run_due();
        assert_eq!(fired.try_iter().count(), 1);
    }

    #[test]
    fn the_thread_wakes_for_an_earlier_deadline() {
        let clock = Arc::new(HostClock::new());
        let timers = Timers::start(clock.clone()).unwrap();
        let (sender, fired) = mpsc::channel();
        let late = sender.clone();
        let late = timers.create(move || late.send("late").unwrap());
        let soon = timers.create(move || sender.send("soon").unwrap());
        late.arm(clock.now() + 3_600_000_000_000);
        soon.arm(clock.now() + 1_000_000);
        assert_eq!(fired.recv_timeout(Duration::from_secs(20)), Ok("soon"));
        drop(timers);
        drop((late, soon));
        assert!(fired.try_recv().is_err());
    }
}
