//! What must be undone when the process ends, however it ends: the terminal's mode, half-built files, children.
//!
//! An action is registered where its need arises. It runs when its [`Guard`] is dropped, or, if a signal ends the
//! process first, by [`run_all`]; never twice.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

type Action = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Registry {
    actions: BTreeMap<u64, Action>,
    /// The number of the next action: they are kept in the order of registration.
    next: u64,
}

static PROCESS: Mutex<Registry> = Mutex::new(Registry { actions: BTreeMap::new(), next: 0 });

/// Set by [`run_all`].
static ENDING: AtomicBool = AtomicBool::new(false);

/// Runs its action when dropped.
#[must_use]
pub struct Guard {
    registry: &'static Mutex<Registry>,
    number: u64,
}

/// Registers what has to be done before the process ends.
pub fn register(action: impl FnOnce() + Send + 'static) -> Guard {
    register_in(&PROCESS, Box::new(action))
}

/// Runs all registered actions, the last registered first, because the process is about to end.
pub fn run_all() {
    ENDING.store(true, Ordering::SeqCst);
    run_all_in(&PROCESS);
}

/// Does not return once the process is about to end: what fails from then on fails because of the cleanup, and is not
/// worth a message.
pub fn wait_if_ending() {
    while ENDING.load(Ordering::SeqCst) {
        thread::park();
    }
}

impl Guard {
    /// Forgets the action: its need has gone.
    pub fn cancel(self) {
        lock(self.registry).actions.remove(&self.number);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let action = lock(self.registry).actions.remove(&self.number);
        if let Some(action) = action {
            action();
        }
    }
}

fn register_in(registry: &'static Mutex<Registry>, action: Action) -> Guard {
    let mut entries = lock(registry);
    let number = entries.next;
    entries.next += 1;
    entries.actions.insert(number, action);
    Guard { registry, number }
}

fn run_all_in(registry: &Mutex<Registry>) {
    loop {
        // The lock is not held while an action runs: it may take long, or register another one.
        let last = lock(registry).actions.pop_last();
        match last {
            Some((_, action)) => action(),
            None => return,
        }
    }
}

fn lock(registry: &Mutex<Registry>) -> MutexGuard<'_, Registry> {
    registry.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    static REGISTRY: Mutex<Registry> = Mutex::new(Registry { actions: BTreeMap::new(), next: 0 });
    static COUNT: AtomicU32 = AtomicU32::new(0);

    fn count() -> Guard {
        register_in(&REGISTRY, Box::new(|| _ = COUNT.fetch_add(1, Ordering::SeqCst)))
    }

    #[test]
    fn an_action_runs_once_and_a_cancelled_one_never() {
        drop(count());
        assert_eq!(COUNT.load(Ordering::SeqCst), 1);
        count().cancel();
        assert_eq!(COUNT.load(Ordering::SeqCst), 1);
        let guard = count();
        run_all_in(&REGISTRY);
        drop(guard);
        assert_eq!(COUNT.load(Ordering::SeqCst), 2);
    }
}
