//! What must be undone when the process ends, however it ends: the terminal's mode, half-built files, children.
//!
//! An action is registered where its need arises. It runs when its [`Guard`] is dropped, or, if the process is ended by
//! a signal or a panic first, by [`run_all`]; never twice.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

type Action = Box<dyn FnOnce() + Send>;

/// By the order of registration, and the next number to give.
static ACTIONS: Mutex<(BTreeMap<u64, Action>, u64)> = Mutex::new((BTreeMap::new(), 0));

fn actions() -> MutexGuard<'static, (BTreeMap<u64, Action>, u64)> {
    ACTIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs its action when dropped.
#[must_use]
pub struct Guard(u64);

/// Registers what has to be done before the process ends.
pub fn register(action: impl FnOnce() + Send + 'static) -> Guard {
    let mut actions = actions();
    let number = actions.1;
    actions.1 += 1;
    actions.0.insert(number, Box::new(action));
    Guard(number)
}

impl Guard {
    /// Forgets the action: its need has gone.
    pub fn cancel(self) {
        actions().0.remove(&self.0);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let action = actions().0.remove(&self.0);
        if let Some(action) = action {
            action();
        }
    }
}

/// Runs all registered actions, the last registered first.
pub fn run_all() {
    loop {
        // The lock is not held while an action runs: it may take long, or register another one.
        let next = actions().0.pop_last();
        match next {
            Some((_, action)) => action(),
            None => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn an_action_runs_once_and_a_cancelled_one_never() {
        let count = Arc::new(AtomicU32::new(0));
        let action = |count: &Arc<AtomicU32>| {
            let count = count.clone();
            move || _ = count.fetch_add(1, Ordering::SeqCst)
        };
        drop(register(action(&count)));
        assert_eq!(count.load(Ordering::SeqCst), 1);
        register(action(&count)).cancel();
        assert_eq!(count.load(Ordering::SeqCst), 1);
        let guard = register(action(&count));
        run_all();
        drop(guard);
        assert_eq!(count.load(Ordering::SeqCst), 2);
    }
}
