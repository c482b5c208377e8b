//! Keeps a thread and the processes that it traces on one CPU of the host.
//!
//! Each stop wakes the tracer, each run the process. On one CPU that is a switch of tasks; on two it is an interrupt to a
//! CPU that may sleep. Linux puts a task that is woken on an idle CPU if there is one, so they must be told to stay.
//!
//! A thread that uses spaces is pinned to the CPU it is on, and so are its processes when they run. Every 20 ms (a timer
//! of the process's own makes it stop) comes a moment in which the thread has all its CPUs back and sleeps as shortly
//! as it can. If another task wanted its CPU it gets it then, and the thread is woken on an idle one, where it is pinned
//! again; else it stays. A thread that is about to wait for something else gets its CPUs back for good (`rest`).
//!
//! Measured on two CPUs of a virtual machine (Linux 6.18): a system call of guest code that stops and goes on takes
//! 3.5 to 3.9 µs on one CPU, 40 to 55 µs on two. A moment takes about 60 µs, 0.3 % of the time. Two threads that begin on
//! the same CPU are on two within 50 ms, whether their guest code runs without a stop (4.0 and 4.0 billion rounds of a
//! loop a second, 4.4 for one alone), or stops all the time (185 and 190 thousand stops a second, 250 for one alone), or
//! one does this and one that. A task that wants the CPU all the time gets half of it (135 thousand stops a second are left).
//! Four threads on two CPUs get the same shares, 59 thousand stops a second each.

use std::cell::RefCell;
use std::time::{Duration, Instant};

/// How long a process runs between two such moments.
pub const INTERVAL: Duration = Duration::from_millis(20);
/// A moment less than this after the last one is not needed: several spaces of a thread have a timer each.
const TOO_SOON: Duration = Duration::from_millis(15);

/// A CPU of the host.
pub type Cpu = usize;

/// A thread and where it is pinned.
struct Thread {
    /// How many spaces it has.
    spaces: usize,
    pinned: Option<Pinned>,
}

struct Pinned {
    cpu: Cpu,
    /// The CPUs that the thread may use when it is not pinned.
    allowed: libc::cpu_set_t,
    since: Instant,
}

thread_local! {
    static THREAD: RefCell<Thread> = const { RefCell::new(Thread { spaces: 0, pinned: None }) };
}

/// Which thread this is, among those that are there.
pub type ThreadId = usize;

/// The thread that calls.
pub fn thread() -> ThreadId {
    THREAD.with(|thread| std::ptr::from_ref(thread).addr())
}

/// The thread has one more space. Returns where it is pinned, if it is.
pub fn enter() -> Option<Cpu> {
    THREAD.with_borrow_mut(|thread| thread.spaces += 1);
    here()
}

/// The thread has one space less, and is free after its last one.
pub fn leave() {
    let last = THREAD.with_borrow_mut(|thread| {
        thread.spaces = thread.spaces.saturating_sub(1);
        thread.spaces == 0
    });
    if last {
        rest();
    }
}

/// Where the thread is pinned: where it is, if it has not been yet. `None` if the host doesn't let it.
pub fn here() -> Option<Cpu> {
    THREAD.with_borrow_mut(|thread| {
        if thread.pinned.is_none() {
            thread.pinned = Pinned::new();
        }
        thread.pinned.as_ref().map(|pinned| pinned.cpu)
    })
}

/// Lets the host move the thread, if it wants to.
pub fn moment() {
    THREAD.with_borrow_mut(|thread| {
        if thread.pinned.as_ref().is_some_and(|pinned| pinned.since.elapsed() > TOO_SOON && pinned.has_others()) {
            if let Some(pinned) = thread.pinned.take() {
                pinned.free();
            }
            std::thread::sleep(Duration::from_nanos(1));
            thread.pinned = Pinned::new();
        }
    });
}

/// Gives the thread its CPUs back.
pub fn rest() {
    if let Some(pinned) = THREAD.with_borrow_mut(|thread| thread.pinned.take()) {
        pinned.free();
    }
}

/// Has a process, which is stopped, run on this CPU from now on.
pub fn follow(pid: libc::pid_t, cpu: Option<Cpu>) {
    if let Some(cpu) = cpu {
        set(pid, &only(cpu));
    }
}

impl Pinned {
    /// Pins this thread to where it is.
    fn new() -> Option<Pinned> {
        let allowed = get()?;
        // SAFETY: no memory is passed.
        let cpu = usize::try_from(unsafe { libc::sched_getcpu() }).ok()?;
        let most = 8 * size_of::<libc::cpu_set_t>();
        (cpu < most && set(0, &only(cpu))).then(|| Pinned { cpu, allowed, since: Instant::now() })
    }

    /// Whether there is another CPU that the thread may use.
    fn has_others(&self) -> bool {
        // SAFETY: the set is only read.
        unsafe { libc::CPU_COUNT(&self.allowed) > 1 }
    }

    /// Gives this thread back what it had, unless somebody else has decided otherwise since.
    fn free(&self) {
        // SAFETY: both sets are only read.
        if get().is_some_and(|now| unsafe { libc::CPU_EQUAL(&now, &only(self.cpu)) }) {
            set(0, &self.allowed);
        }
    }
}

/// The set of this CPU.
fn only(cpu: Cpu) -> libc::cpu_set_t {
    // SAFETY: zeros are the empty set; callers have a CPU that sets can have.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        set
    }
}

/// The CPUs that this thread may use; `None` on hosts with more than a set can have.
fn get() -> Option<libc::cpu_set_t> {
    // SAFETY: zeros are the empty set, which the call fills.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        (libc::sched_getaffinity(0, size_of_val(&set), &mut set) == 0).then_some(set)
    }
}

/// Sets the CPUs that a process, or this thread (0), may use. What the host does not allow stays as it is.
fn set(pid: libc::pid_t, cpus: &libc::cpu_set_t) -> bool {
    // SAFETY: the set is only read.
    unsafe { libc::sched_setaffinity(pid, size_of_val(cpus), cpus) == 0 }
}
