//! The local APIC's timer (Intel SDM 3A 11.5.4): one-shot, periodic, TSC-deadline.
//!
//! In all modes the timer is one number: the guest's TSC (before IA32_TSC_ADJUST) at which it expires. A host timer
//! signals the vCPU's thread around then; what decides is always the counter itself. The host timer is set only when
//! none is running that fires sooner: a kernel that pushes its deadline out on each of many writes costs one system call
//! for the first. When that one fires too early, it is set again for the rest.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use arch::cpuid::APIC_TIMER_HZ;

use super::Apic;
use super::registers::{lvt, reg};
use crate::Vcpu;
use crate::host::{self, ThreadTimer};
use crate::shared::request;

/// No expiry.
const NEVER: u64 = u64::MAX;
/// The least period in nanoseconds: a guest that asks for less gets this much, so that it still gets to run.
const MIN_PERIOD_NS: u64 = 20_000;
/// A timer that is later than this, in nanoseconds, was held up by a host that paused or starved us.
const PAUSE_NS: u64 = 1_000_000_000;

/// LVT timer mode bits.
const MODE: u32 = 3 << 17;
const PERIODIC: u32 = 1 << 17;
const TSC_DEADLINE: u32 = 2 << 17;

/// The guest's side of the timer. Written by the vCPU's own thread only.
pub struct Timer {
    /// In ticks of the machine's counter.
    expiry: AtomicU64,
    /// Ticks between expiries; 0: one-shot.
    period: AtomicU64,
    /// IA32_TSC_DEADLINE; 0 when not armed.
    deadline: AtomicU64,
}

impl Default for Timer {
    fn default() -> Self {
        Timer { expiry: AtomicU64::new(NEVER), period: AtomicU64::new(0), deadline: AtomicU64::new(0) }
    }
}

impl Timer {
    pub fn stop(&self) {
        self.set(NEVER, 0, 0);
    }

    fn set(&self, expiry: u64, period: u64, deadline: u64) {
        self.expiry.store(expiry, Ordering::Relaxed);
        self.period.store(period, Ordering::Relaxed);
        self.deadline.store(deadline, Ordering::Relaxed);
    }

    fn expiry(&self) -> u64 {
        self.expiry.load(Ordering::Relaxed)
    }
}

/// The host's side: belongs to the thread that runs the vCPU.
#[derive(Debug)]
pub struct HostTimer {
    timer: Option<ThreadTimer>,
    /// When `timer` fires, in ticks of the machine's counter.
    fires: u64,
}

impl Default for HostTimer {
    fn default() -> Self {
        HostTimer { timer: None, fires: NEVER }
    }
}

impl Apic {
    /// The divider of the timer's clock (Intel SDM 3A figure 11-10): 2, 4, ... 128, 1.
    fn timer_divider(&self) -> u64 {
        let bits = self.get(reg::DIVIDE);
        match bits & 3 | bits >> 1 & 4 {
            7 => 1,
            n => 2 << n,
        }
    }

    fn tsc_deadline_mode(&self) -> bool {
        self.get(reg::LVT_TIMER) & MODE == TSC_DEADLINE
    }
}

/// What the guest does to the timer.
impl Vcpu {
    /// Nanoseconds of `count` ticks of the timer's divided clock.
    fn apic_count_to_ns(&self, count: u32) -> u64 {
        u64::from(count) * self.shared.apic.timer_divider() * (1_000_000_000 / u64::from(APIC_TIMER_HZ))
    }

    /// A write to the initial-count register: starts, or with zero stops, the one-shot or periodic timer.
    pub(super) fn start_apic_timer(&mut self, count: u32) {
        let shared = self.shared.clone();
        let apic = &shared.apic;
        if apic.tsc_deadline_mode() {
            return; // ignored (Intel SDM 3A 11.5.4.1)
        }
        apic.set(reg::INITIAL_COUNT, count);
        if count == 0 {
            return apic.timer.stop();
        }
        let periodic = apic.get(reg::LVT_TIMER) & MODE == PERIODIC;
        let ns = self.apic_count_to_ns(count);
        let period = if periodic { self.machine.time.ns_to_ticks(ns.max(MIN_PERIOD_NS)) } else { 0 };
        apic.timer.set(self.machine.time.tsc().saturating_add(self.machine.time.ns_to_ticks(ns)), period, 0);
        self.arm_host_timer();
    }

    /// Starts the one-shot or periodic timer again where its count stood when the registers were saved.
    pub(crate) fn resume_apic_timer(&mut self) {
        let shared = self.shared.clone();
        let apic = &shared.apic;
        let (initial, current) = (apic.get(reg::INITIAL_COUNT), apic.get(reg::CURRENT_COUNT));
        if apic.tsc_deadline_mode() || initial == 0 || current == 0 {
            return;
        }
        self.start_apic_timer(initial);
        let left = self.machine.time.ns_to_ticks(self.apic_count_to_ns(current.min(initial)));
        apic.timer.expiry.store(self.machine.time.tsc().saturating_add(left), Ordering::Relaxed);
    }

    /// The current-count register.
    pub(super) fn apic_timer_count(&self) -> u32 {
        let apic = &self.shared.apic;
        let expiry = apic.timer.expiry();
        if expiry == NEVER || apic.tsc_deadline_mode() {
            return 0;
        }
        let per_count = self.apic_count_to_ns(1).max(1);
        let left = self.machine.time.ns_until(expiry).div_ceil(per_count);
        left.min(u64::from(apic.get(reg::INITIAL_COUNT))) as u32
    }

    /// The LVT's timer entry was written; it was `old`.
    pub(super) fn apic_timer_mode_changed(&mut self, old: u32) {
        let shared = self.shared.clone();
        let apic = &shared.apic;
        let new = apic.get(reg::LVT_TIMER);
        if old & MODE == new & MODE {
            return;
        }
        if old & MODE == TSC_DEADLINE || new & MODE == TSC_DEADLINE {
            // To or from TSC-deadline mode: disarmed (Intel SDM 3A 11.5.4.1).
            apic.set(reg::INITIAL_COUNT, 0);
            apic.timer.stop();
        } else if apic.timer.expiry() != NEVER {
            let ns = self.apic_count_to_ns(apic.get(reg::INITIAL_COUNT)).max(MIN_PERIOD_NS);
            let period = if new & MODE == PERIODIC { self.machine.time.ns_to_ticks(ns) } else { 0 };
            apic.timer.period.store(period, Ordering::Relaxed);
        }
    }

    /// RDMSR of IA32_TSC_DEADLINE.
    pub fn tsc_deadline(&self) -> u64 {
        self.shared.apic.timer.deadline.load(Ordering::Relaxed)
    }

    /// WRMSR to IA32_TSC_DEADLINE: ignored in other modes, disarms with zero.
    pub fn set_tsc_deadline(&mut self, value: u64) {
        let apic = &self.shared.apic;
        if !apic.tsc_deadline_mode() {
            return;
        }
        if value == 0 {
            return apic.timer.stop();
        }
        // With an adjustment beyond the deadline the counter is past it.
        let expiry = value.saturating_sub(self.msrs.tsc_adjust);
        apic.timer.set(expiry.min(NEVER - 1), 0, value);
        if self.machine.time.tsc() >= expiry { self.expire_apic_timer() } else { self.arm_host_timer() }
    }

    /// IA32_TSC_ADJUST has changed: the deadline is compared with what the guest reads.
    pub fn tsc_adjusted(&mut self) {
        let deadline = self.tsc_deadline();
        if deadline != 0 {
            self.set_tsc_deadline(deadline);
        }
    }
}

/// Expiry.
impl Vcpu {
    /// Expires the timer if its time has come, and sees to it that the host's timer runs if not.
    pub fn poll_apic_timer(&mut self) {
        let expiry = self.shared.apic.timer.expiry();
        if expiry == NEVER {
            return;
        }
        let Some(late) = self.machine.time.tsc().checked_sub(expiry) else {
            return self.arm_host_timer();
        };
        if self.machine.time.ticks_to_ns(late) > PAUSE_NS {
            self.tell_pause();
        }
        self.expire_apic_timer();
    }

    /// [`request::TIMER`] was set: the host's timer is no longer running (if it is, setting it again does no harm).
    pub(crate) fn host_timer_fired(&mut self) {
        self.timer.fires = NEVER;
        self.poll_apic_timer();
    }

    /// Nanoseconds until the timer expires, if it is to.
    pub(crate) fn apic_timer_remaining(&self) -> Option<u64> {
        let expiry = self.shared.apic.timer.expiry();
        (expiry != NEVER).then(|| self.machine.time.ns_until(expiry))
    }

    fn expire_apic_timer(&mut self) {
        let apic = &self.shared.apic;
        let (expiry, period) = (apic.timer.expiry(), apic.timer.period.load(Ordering::Relaxed));
        // Periods that went by while the host did not run us are one interrupt, not a burst of them.
        let late = self.machine.time.tsc().saturating_sub(expiry);
        match late.checked_div(period) {
            None => apic.timer.stop(),
            Some(missed) => {
                let next = expiry.saturating_add(missed.saturating_add(1).saturating_mul(period));
                apic.timer.expiry.store(next.min(NEVER - 1), Ordering::Relaxed);
            }
        }
        let entry = apic.get(reg::LVT_TIMER);
        if entry & lvt::MASKED == 0 && entry as u8 >= 16 {
            self.shared.post_interrupt(entry as u8, false);
        }
        if period != 0 {
            self.arm_host_timer();
        }
    }

    /// Sets the host's timer, unless one runs that fires sooner.
    fn arm_host_timer(&mut self) {
        let expiry = self.shared.apic.timer.expiry();
        if let Some(timer) = &self.timer.timer
            && expiry < self.timer.fires
        {
            timer.arm(self.machine.time.ns_until(expiry));
            self.timer.fires = expiry;
        }
    }

    /// To be called when this thread begins to run the vCPU, and paired with [`Vcpu::leave_thread`].
    pub fn enter_thread(&mut self) -> io::Result<()> {
        host::enter_thread(&self.shared);
        if self.timer.timer.as_ref().is_none_or(|t| t.thread() != host::thread_id()) {
            host::precise_sleeps();
            self.timer = HostTimer { timer: Some(ThreadTimer::new()?), fires: NEVER };
        }
        // What signals were missed since the last run is not known.
        self.shared.flag(request::TIMER | request::INTERRUPT);
        Ok(())
    }

    /// This thread has stopped running the vCPU.
    pub fn leave_thread(&mut self) {
        host::leave_thread();
    }
}
