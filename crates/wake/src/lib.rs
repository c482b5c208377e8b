//! Threads of a machine: how they are made, woken, and told to end.
#![forbid(unsafe_code)]

mod linger;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

pub use linger::Linger;

/// Bytes of a thread's stack. Stacks of 2 MiB, which they have if nothing is said, happen to begin at a multiple of that,
/// and where the host uses transparent huge pages the first write takes all of it (until Linux 6.7, which excepts stacks).
const STACK: usize = 1 << 20;

/// What makes a thread of this name; all threads of a machine come from here.
pub fn thread(name: impl Into<String>) -> thread::Builder {
    thread::Builder::new().name(name.into()).stack_size(STACK)
}

/// Something that has happened and that a thread can wait for: a flag with a file descriptor, readable while it is set.
///
/// Setting what is set already costs no system call, so a driver that notifies a busy device is not slowed down. The
/// descriptor is an eventfd, which others may raise as well ([`engine::Doorbells`]).
#[derive(Debug)]
pub struct Event {
    fd: OwnedFd,
    set: AtomicBool,
}

impl Event {
    pub fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Event { fd, set: AtomicBool::new(false) })
    }

    pub fn set(&self) {
        if !self.set.swap(true, Ordering::SeqCst) {
            // The counter of an eventfd that only ever counts to 1 can't be full, and there is no other error.
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }

    /// Takes it back, before looking for the work it announces. True: it was set.
    pub fn clear(&self) -> bool {
        // In this order: a `set` that comes in between is not lost, it finds the flag still up, and its work is seen
        // by the caller, who looks for work after this.
        let raised = rustix::io::read(&self.fd, &mut [0; 8]).is_ok();
        self.set.swap(false, Ordering::SeqCst) || raised
    }

    /// Whether it is set, without taking it back: how a worker checks its `stop`. Who has waited for the event must not go by this
    /// whether to take it back: another thread's `set` that overlaps with `clear` can leave the descriptor readable alone.
    pub fn is_set(&self) -> bool {
        self.set.load(Ordering::SeqCst)
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Waits until one of the events is set (or something odd has happened to the descriptors, which looks the same).
pub fn wait_any(events: &[&Event]) {
    wait_any_for(events, None);
}

/// The same, but no longer than `limit`. Returns whether it was an event.
pub fn wait_any_for(events: &[&Event], limit: Option<Duration>) -> bool {
    wait_any_or(events, None, limit)
}

/// The same, or until there is something to be read from `descriptor`.
pub fn wait_any_or(events: &[&Event], descriptor: Option<BorrowedFd<'_>>, limit: Option<Duration>) -> bool {
    let mut fds: Vec<PollFd<'_>> = events.iter().map(|event| PollFd::new(*event, PollFlags::IN)).collect();
    fds.extend(descriptor.map(|descriptor| PollFd::from_borrowed_fd(descriptor, PollFlags::IN)));
    let end = limit.map(|limit| Instant::now() + limit);
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
        match poll(&mut fds, left.as_ref()) {
            Err(Errno::INTR) => {}
            result => return result != Ok(0),
        }
    }
}

/// A thread of a device. It ends when this is dropped: its `stop` event is set, and the drop waits for it.
#[derive(Debug)]
pub struct Worker {
    stop: Arc<Event>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread; `work` returns soon after the event that it is given is set, and leaves it set.
    pub fn start(name: &str, work: impl FnOnce(&Event) + Send + 'static) -> io::Result<Self> {
        let stop = Arc::new(Event::new()?);
        let told = stop.clone();
        let thread = thread(name).spawn(move || work(&told))?;
        Ok(Worker { stop, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.set();
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_set_event_wakes_its_waiter_once() {
        let event = Event::new().unwrap();
        assert!(!event.clear());
        event.set();
        event.set();
        wait_any(&[&event]);
        assert!(event.is_set() && event.clear() && !event.clear());
    }

    #[test]
    fn dropping_a_worker_ends_its_thread() {
        let (sender, receiver) = mpsc::channel();
        let worker = Worker::start("test", move |stop| {
            wait_any(&[stop]);
            sender.send(()).unwrap();
        });
        drop(worker.unwrap());
        receiver.try_recv().unwrap();
    }

    #[test]
    fn no_event_is_lost_between_two_threads() {
        let (ping, pong) = (Arc::new(Event::new().unwrap()), Arc::new(Event::new().unwrap()));
        let (theirs, ours) = (ping.clone(), pong.clone());
        let other = std::thread::spawn(move || {
            for _ in 0..2000 {
                while !theirs.clear() {
                    wait_any(&[&theirs]);
                }
                ours.set();
            }
        });
        for _ in 0..2000 {
            ping.set();
            while !pong.clear() {
                wait_any(&[&pong]);
            }
        }
        other.join().unwrap();
    }
}
