//! Threads that finish requests which have to wait, for a device's thread that goes on with others meanwhile.
//!
//! [`Helpers::give`] -> a queue of tasks -> one of a few threads, which are started as they are needed -> a list of finished
//! requests and an [`Event`], by which the device's thread learns of them. Only that thread ever touches the virtqueue.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::{Chain, Event};

/// The most threads: what makes the disks of hosts busy, and is no burden to them.
const MOST: usize = 8;

/// The rest of a request: returns how many device-writable bytes were written.
pub(crate) type Task = Box<dyn FnOnce(&Chain) -> u32 + Send>;

/// Threads of one virtqueue. They have ended, and touch no guest memory any more, when this is dropped; what they have not
/// begun then is never done.
pub(crate) struct Helpers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    name: &'static str,
}

struct Shared {
    state: Mutex<State>,
    /// There is a task, or the end has come.
    work: Condvar,
    finished: Arc<Event>,
}

#[derive(Default)]
struct State {
    tasks: VecDeque<(Chain, Task)>,
    /// Threads that wait for a task.
    idle: usize,
    done: Vec<(Chain, u32)>,
    end: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn help(&self) {
        let mut state = self.state();
        loop {
            if state.end {
                return;
            }
            let Some((chain, task)) = state.tasks.pop_front() else {
                state.idle += 1;
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                continue;
            };
            drop(state);
            let written = task(&chain);
            state = self.state();
            state.done.push((chain, written));
            self.finished.set();
        }
    }
}

impl Helpers {
    /// None yet: threads called `name` are started when there is something to do.
    pub(crate) fn new(name: &'static str) -> io::Result<Self> {
        let finished = Arc::new(Event::new()?);
        let shared = Arc::new(Shared { state: Mutex::default(), work: Condvar::new(), finished });
        Ok(Helpers { shared, threads: Vec::new(), name })
    }

    /// Set when requests are finished; [`Helpers::take_finished`] takes it back.
    pub(crate) fn finished(&self) -> &Arc<Event> {
        &self.shared.finished
    }

    /// Who was `woken` has to take it back in any case: the descriptor may be readable without the flag being set, and the next
    /// wait would be none, nor the one after it.
    pub(crate) fn take_finished(&self, woken: bool) -> Vec<(Chain, u32)> {
        if !woken && !self.shared.finished.is_set() {
            return Vec::new();
        }
        self.shared.finished.clear();
        std::mem::take(&mut self.shared.state().done)
    }

    /// Leaves a request to a helper. Where there can't be a thread, it is done at once.
    pub(crate) fn give(&mut self, chain: Chain, task: Task) {
        let mut state = self.shared.state();
        state.tasks.push_back((chain, task));
        let enough = state.idle >= state.tasks.len() || self.threads.len() >= MOST;
        drop(state);
        self.shared.work.notify_one();
        if enough {
            return;
        }
        let shared = self.shared.clone();
        match wake::thread(self.name).spawn(move || shared.help()) {
            Ok(thread) => self.threads.push(thread),
            Err(_) if !self.threads.is_empty() => {}
            Err(_) => {
                let mut state = self.shared.state();
                let Some((chain, task)) = state.tasks.pop_front() else { return };
                let written = task(&chain);
                state.done.push((chain, written));
                self.shared.finished.set();
            }
        }
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        self.shared.state().end = true;
        self.shared.work.notify_all();
        // A panic there has been reported by the panic hook.
        self.threads.drain(..).for_each(|thread| _ = thread.join());
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    /// As when a thread that sets the event loses its processor between flag and descriptor, and another takes it back meanwhile.
    #[test]
    fn a_descriptor_that_is_raised_alone_wakes_once() {
        let helpers = Helpers::new("test").unwrap();
        rustix::io::write(helpers.finished().as_fd(), &1u64.to_ne_bytes()).unwrap();
        assert!(!helpers.finished().is_set());
        assert!(helpers.take_finished(true).is_empty());
        rustix::io::read(helpers.finished().as_fd(), &mut [0; 8]).expect_err("it would wake again");
    }
}
