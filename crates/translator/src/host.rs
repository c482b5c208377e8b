//! What the engine asks of the host's processor and kernel besides memory: the time-stamp counter, CPUID, clocks, and a
//! timer that interrupts the thread on which a vCPU runs.
//!
//! CPUID is executed only at start: inside a virtual machine it traps to the outer hypervisor.

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _mm_lfence, _rdtsc};
use std::cell::Cell;
use std::io;
use std::mem::zeroed;
use std::ptr;
use std::sync::OnceLock;
use std::time::Duration;

use arch::cpuid::Leaf;

use crate::shared::{VcpuShared, request};

/// The host's time-stamp counter.
#[inline]
pub fn rdtsc() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC; Linux leaves CR4.TSD clear unless a process asks otherwise.
    unsafe { _rdtsc() }
}

/// One leaf of the host's CPUID.
pub fn cpuid(leaf: u32, subleaf: u32) -> Leaf {
    let r = __cpuid_count(leaf, subleaf);
    Leaf { eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx }
}

/// The host's XCR0: the vector state that its kernel lets programs use; 0 where there is no XSAVE.
pub fn xcr0() -> u64 {
    const OSXSAVE: u32 = 1 << 27;
    if cpuid(1, 0).ecx & OSXSAVE == 0 {
        return 0;
    }
    let (low, high): (u32, u32);
    // SAFETY: OSXSAVE says that XGETBV may be executed; with ECX = 0 it reads XCR0 and nothing else.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

fn clock(id: libc::clockid_t) -> u64 {
    // SAFETY: `ts` is a valid place for the result; the clocks asked for exist in every Linux.
    let ts = unsafe {
        let mut ts: libc::timespec = zeroed();
        libc::clock_gettime(id, &raw mut ts);
        ts
    };
    ts.tv_sec as u64 * 1_000_000_000 + ts.tv_nsec as u64
}

/// CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_ns() -> u64 {
    clock(libc::CLOCK_MONOTONIC)
}

/// CLOCK_REALTIME in nanoseconds since 1970.
pub fn realtime_ns() -> u64 {
    clock(libc::CLOCK_REALTIME)
}

/// What is known of the host's time-stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostTsc {
    /// Ticks a second.
    pub hz: u64,
    /// It ticks at one rate in every power state, the same on all processors (CPUID 0x80000007 EDX bit 8).
    pub invariant: bool,
}

/// The host's time-stamp counter, measured once a process.
pub fn tsc() -> HostTsc {
    static TSC: OnceLock<HostTsc> = OnceLock::new();
    *TSC.get_or_init(|| {
        let invariant = cpuid(0x8000_0000, 0).eax >= 0x8000_0007 && cpuid(0x8000_0007, 0).edx & 1 << 8 != 0;
        HostTsc { hz: measure(advertised_hz()), invariant }
    })
}

/// The frequency as CPUID states it: leaf 0x40000010 of a hypervisor, or the ratio to the crystal in leaf 0x15.
fn advertised_hz() -> Option<u64> {
    const HYPERVISOR: u32 = 1 << 31;
    if cpuid(1, 0).ecx & HYPERVISOR != 0 && (0x4000_0010..0x4000_0100).contains(&cpuid(0x4000_0000, 0).eax) {
        let khz = cpuid(0x4000_0010, 0).eax;
        if khz != 0 {
            return Some(u64::from(khz) * 1000);
        }
    }
    if cpuid(0, 0).eax < 0x15 {
        return None;
    }
    let ratio = cpuid(0x15, 0);
    let hz = u64::from(ratio.ecx) * u64::from(ratio.ebx);
    hz.checked_div(u64::from(ratio.eax)).filter(|&hz| hz != 0)
}

/// A reading of the counter and of CLOCK_MONOTONIC at one moment.
#[derive(Clone, Copy)]
struct Sample {
    ticks: u64,
    ns: u64,
    /// Ticks between the two readings of the counter that the clock's is between.
    width: u64,
}

impl Sample {
    /// The tightest of several, so that being descheduled between the readings does not count.
    fn take() -> Sample {
        let mut best = Sample { ticks: 0, ns: 0, width: u64::MAX };
        for _ in 0..16 {
            let before = ordered_rdtsc();
            let ns = monotonic_ns();
            let width = ordered_rdtsc().wrapping_sub(before);
            if width < best.width {
                best = Sample { ticks: before + width / 2, ns, width };
            }
        }
        best
    }

    /// Ticks a second until a later sample.
    fn rate(&self, later: &Sample) -> u64 {
        let (ticks, ns) = (later.ticks.saturating_sub(self.ticks), later.ns.saturating_sub(self.ns).max(1));
        ((u128::from(ticks) * 1_000_000_000 / u128::from(ns)) as u64).max(1_000_000)
    }

    /// Whether what is not known of either moment is at most the `part`th part of the time between.
    fn tells(&self, later: &Sample, part: u64) -> bool {
        let unknown = self.width.saturating_add(later.width) / 2;
        later.ticks.saturating_sub(self.ticks) / part >= unknown
    }
}

fn ordered_rdtsc() -> u64 {
    // SAFETY: every x86-64 processor has LFENCE.
    unsafe { _mm_lfence() };
    rdtsc()
}

/// Ticks a second, against CLOCK_MONOTONIC. A short look (good to 100 ppm) is enough to trust what CPUID states, which is
/// exact; without it a measurement that is good to 10 ppm counts. How long either takes depends on how closely the clock can be
/// read: less than a millisecond, or a few; a clock that takes a system call has 30.
fn measure(advertised: Option<u64>) -> u64 {
    const PATIENCE_NS: u64 = 30_000_000;
    let start = Sample::take();
    let until = |part| {
        loop {
            std::thread::sleep(Duration::from_micros(250));
            let end = Sample::take();
            if start.tells(&end, part) || end.ns.saturating_sub(start.ns) > PATIENCE_NS {
                return start.rate(&end);
            }
        }
    };
    if let Some(hz) = advertised
        && hz.abs_diff(until(10_000)) < hz / 1000
    {
        return hz;
    }
    // To the kHz, in which CPUID and the guest's clock code count.
    (until(100_000) + 500) / 1000 * 1000
}

thread_local! {
    /// The vCPU that runs on this thread. Constant-initialized and without a destructor, so that a signal handler may
    /// read it.
    static RUNNING: Cell<*const VcpuShared> = const { Cell::new(ptr::null()) };
}

/// Names the vCPU that timer signals on this thread are for. The caller keeps it alive until [`leave_thread`].
pub fn enter_thread(vcpu: &VcpuShared) {
    RUNNING.set(vcpu);
}

/// From here on timer signals on this thread are for nobody.
pub fn leave_thread() {
    RUNNING.set(ptr::null());
}

/// The number of the calling thread, as the kernel knows it.
pub fn thread_id() -> i32 {
    // SAFETY: the system call has no arguments and can't fail.
    unsafe { libc::gettid() }
}

/// Lets sleeps of the calling thread end when they should, not up to 50 us later.
pub fn precise_sleeps() {
    // SAFETY: changes only the slack of the calling thread's own timers.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong) };
}

fn timer_signal() -> i32 {
    libc::SIGRTMIN()
}

/// Async-signal-safe: touches one thread-local word and atomics.
extern "C" fn on_timer(_: i32) {
    let vcpu = RUNNING.get();
    if !vcpu.is_null() {
        // SAFETY: `enter_thread` was given a reference that is good until `leave_thread`, on this very thread.
        unsafe { &*vcpu }.flag(request::TIMER);
    }
}

fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<i32> = OnceLock::new();
    let error = *INSTALLED.get_or_init(|| {
        // SAFETY: the action is fully set up; the handler is async-signal-safe. SA_ONSTACK, as translated code does not
        // keep the host's stack pointer where a frame can be pushed.
        let result = unsafe {
            let mut action: libc::sigaction = zeroed();
            action.sa_sigaction = on_timer as extern "C" fn(i32) as usize;
            action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
            libc::sigaction(timer_signal(), &raw const action, ptr::null_mut())
        };
        if result == 0 { 0 } else { io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL) }
    });
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

/// A one-shot timer that signals the thread that made it.
#[derive(Debug)]
pub struct ThreadTimer {
    id: libc::timer_t,
    thread: i32,
}

// SAFETY: a timer id is a number in the process; any thread may set or delete the timer.
unsafe impl Send for ThreadTimer {}

impl ThreadTimer {
    /// A timer for the calling thread.
    pub fn new() -> io::Result<Self> {
        install_handler()?;
        let thread = thread_id();
        // SAFETY: the structures are fully initialized and live through the calls; `set` holds just our own signal.
        unsafe {
            let mut set: libc::sigset_t = zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, timer_signal());
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut());

            let mut event: libc::sigevent = zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = timer_signal();
            event.sigev_notify_thread_id = thread;
            let mut id: libc::timer_t = ptr::null_mut();
            if libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut id) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(ThreadTimer { id, thread })
        }
    }

    /// The thread it signals.
    pub fn thread(&self) -> i32 {
        self.thread
    }

    /// Fires once, `ns` nanoseconds from now.
    pub fn arm(&self, ns: u64) {
        let ns = ns.max(1);
        // SAFETY: `id` is a timer of this process until `drop`; `spec` is fully set up. A second too large for the field
        // can't come: 2^64 ns are 584 years.
        unsafe {
            let mut spec: libc::itimerspec = zeroed();
            spec.it_value.tv_sec = (ns / 1_000_000_000) as libc::time_t;
            spec.it_value.tv_nsec = (ns % 1_000_000_000) as libc::c_long;
            libc::timer_settime(self.id, 0, &raw const spec, ptr::null_mut());
        }
    }
}

impl Drop for ThreadTimer {
    fn drop(&mut self) {
        // SAFETY: `id` came from timer_create and is deleted once. A signal still queued finds `RUNNING` null or valid.
        unsafe { libc::timer_delete(self.id) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tsc_frequency_agrees_with_the_monotonic_clock() {
        let tsc = tsc();
        let start = Sample::take();
        std::thread::sleep(Duration::from_millis(50));
        let end = Sample::take();
        let ns = u128::from(end.ticks - start.ticks) * 1_000_000_000 / u128::from(tsc.hz);
        let real = u128::from(end.ns - start.ns);
        assert!(ns.abs_diff(real) < real / 1000, "{ns} ns by TSC, {real} ns by clock");
    }

    #[test]
    fn a_measurement_takes_until_its_readings_are_close_enough_for_the_time_between() {
        let start = Sample { ticks: 1_000, ns: 0, width: 100 };
        let after = |ticks| Sample { ticks: 1_000 + ticks, ns: ticks / 2, width: 60 };
        assert!(!start.tells(&after(7_999_999), 100_000));
        assert!(start.tells(&after(8_000_000), 100_000));
        assert!(!start.tells(&Sample { width: u64::MAX, ..after(u64::MAX / 2) }, 10_000));
        assert_eq!(start.rate(&after(8_000_000)), 2_000_000_000);
    }

    #[test]
    fn a_timer_flags_the_vcpu_that_runs_on_its_thread() {
        let vcpu = VcpuShared::new(0);
        enter_thread(&vcpu);
        let timer = ThreadTimer::new().unwrap();
        timer.arm(1_000_000);
        let start = monotonic_ns();
        while vcpu.requests.load(std::sync::atomic::Ordering::SeqCst) & request::TIMER == 0 {
            assert!(monotonic_ns() - start < 5_000_000_000, "the timer never fired");
            std::hint::spin_loop();
        }
        leave_thread();
        assert!(monotonic_ns() - start >= 1_000_000);
    }
}
