//! Virtual time: the guest's time-stamp counter and everything that is derived from it.
//!
//! The guest's counter is the host's, at its frequency: all vCPUs agree, and it never stops, however the host schedules us. An
//! offset comes in where a machine is to go on from another's time; without it programs that run directly can read it. A vCPU sees it plus its own IA32_TSC_ADJUST. Where
//! the host's counter is not invariant, the guest's is CLOCK_MONOTONIC, scaled to the nominal frequency.
//!
//! [`KvmClock`] is what the guest needs to turn the counter into nanoseconds by itself (Linux
//! `Documentation/virt/kvm/x86/msr.rst`, MSR_KVM_SYSTEM_TIME_NEW).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use engine::Clocks;

use crate::host;

const NS: u64 = 1_000_000_000;

/// The clocks all vCPUs share.
pub struct Time {
    host: host::HostTsc,
    /// Added to the host's counter.
    offset: AtomicU64,
    /// Two readings that belong together: from here the paravirtual clock follows the counter.
    epoch: Mutex<Clocks>,
    /// 2^32 * 10^9 / hz
    ns_per_tick: u64,
}

impl Default for Time {
    fn default() -> Self {
        Self::new()
    }
}

impl Time {
    /// Time that begins now. The first call in a process measures the host's frequency (1 to 30 ms).
    pub fn new() -> Self {
        Self::with_host(host::tsc())
    }

    fn with_host(host: host::HostTsc) -> Self {
        let ns_per_tick = ((u128::from(NS) << 32) / u128::from(host.hz)) as u64;
        let epoch = Mutex::new(Clocks { tsc: 0, paravirtual: 0 });
        let mut time = Time { host, offset: AtomicU64::new(0), epoch, ns_per_tick };
        time.epoch = Mutex::new(Clocks { tsc: time.tsc(), paravirtual: 0 });
        time
    }

    /// Ticks of the guest's counter a second.
    pub fn tsc_hz(&self) -> u64 {
        self.host.hz
    }

    pub fn tsc_khz(&self) -> u32 {
        (self.host.hz / 1000).min(u64::from(u32::MAX)) as u32
    }

    /// What RDTSC must add to the host's counter, if that is all there is to do.
    pub fn tsc_offset(&self) -> Option<u64> {
        self.host.invariant.then(|| self.offset.load(Ordering::Relaxed))
    }

    fn host_ticks(&self) -> u64 {
        if self.host.invariant {
            host::rdtsc()
        } else {
            (u128::from(host::monotonic_ns()) * u128::from(self.host.hz) / u128::from(NS)) as u64
        }
    }

    /// The guest's counter, before IA32_TSC_ADJUST.
    pub fn tsc(&self) -> u64 {
        self.host_ticks().wrapping_add(self.offset.load(Ordering::Relaxed))
    }

    fn epoch(&self) -> Clocks {
        *self.epoch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the machine's clocks read now.
    pub fn clocks(&self) -> Clocks {
        let tsc = self.tsc();
        Clocks { tsc, paravirtual: self.kvm_clock(0).reading(tsc) }
    }

    /// Lets them go on from there (a restored machine continues where it was).
    pub fn set_clocks(&self, clocks: &Clocks) {
        *self.epoch.lock().unwrap_or_else(PoisonError::into_inner) = *clocks;
        self.set_tsc(clocks.tsc);
    }

    /// Makes the counter read `value` now.
    pub fn set_tsc(&self, value: u64) {
        self.offset.store(value.wrapping_sub(self.host_ticks()), Ordering::Relaxed);
    }

    /// Ticks to nanoseconds, rounded down.
    pub fn ticks_to_ns(&self, ticks: u64) -> u64 {
        ((u128::from(ticks) * u128::from(self.ns_per_tick)) >> 32) as u64
    }

    /// Nanoseconds to ticks, rounded up.
    pub fn ns_to_ticks(&self, ns: u64) -> u64 {
        let ticks = (u128::from(ns) * u128::from(self.host.hz)).div_ceil(u128::from(NS));
        ticks.min(u128::from(u64::MAX)) as u64
    }

    /// Nanoseconds from now until the counter reads `tsc`; 0 if that is past.
    pub fn ns_until(&self, tsc: u64) -> u64 {
        // One more, as rounding down would wake us just before.
        match tsc.saturating_sub(self.tsc()) {
            0 => 0,
            ticks => self.ticks_to_ns(ticks).saturating_add(1),
        }
    }

    /// The contents of the clock structure of a vCPU with that IA32_TSC_ADJUST.
    pub fn kvm_clock(&self, tsc_adjust: u64) -> KvmClock {
        // ns = ((ticks << shift) * mul) >> 32. The shift that leaves `mul` its top bit is the most precise.
        let hz = u128::from(self.host.hz);
        let mul = |shift: i8| {
            let ns = u128::from(NS) << 32;
            if shift < 0 { (ns << shift.unsigned_abs()) / hz } else { (ns >> shift) / hz }
        };
        let shift = (-31..=31).find(|&s| mul(s) <= u128::from(u32::MAX)).unwrap_or(31);
        let mul = mul(shift).min(u128::from(u32::MAX)) as u32;
        let epoch = self.epoch();
        KvmClock { tsc_timestamp: epoch.tsc.wrapping_add(tsc_adjust), system_time: epoch.paravirtual, mul, shift }
    }

    /// The wall clock, in nanoseconds since 1970, when the paravirtual one read 0.
    pub fn boot_wall_ns(&self) -> u64 {
        host::realtime_ns().saturating_sub(self.clocks().paravirtual)
    }
}

/// How the guest turns its counter into nanoseconds since the machine was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmClock {
    /// What the vCPU's counter read when the clock read `system_time` nanoseconds.
    pub tsc_timestamp: u64,
    pub system_time: u64,
    pub mul: u32,
    pub shift: i8,
}

impl KvmClock {
    /// The clock when the vCPU's counter reads `tsc`, as guests compute it.
    fn reading(&self, tsc: u64) -> u64 {
        let ticks = u128::from(tsc.wrapping_sub(self.tsc_timestamp));
        let shifted = if self.shift < 0 { ticks >> self.shift.unsigned_abs() } else { ticks << self.shift };
        self.system_time.wrapping_add(((shifted * u128::from(self.mul)) >> 32) as u64)
    }

    /// The structure `pvclock_vcpu_time_info` without its version.
    pub fn encode(&self, paused: bool) -> [u8; 28] {
        /// All vCPUs' counters agree, so that readings on different vCPUs may be compared.
        const TSC_STABLE: u8 = 1 << 0;
        const GUEST_STOPPED: u8 = 1 << 1;
        let mut out = [0; 28];
        let (timestamp, mul) = (self.tsc_timestamp.to_le_bytes(), self.mul.to_le_bytes());
        out[4..12].copy_from_slice(&timestamp);
        out[12..20].copy_from_slice(&self.system_time.to_le_bytes());
        out[20..24].copy_from_slice(&mul);
        out[24] = self.shift as u8;
        out[25] = TSC_STABLE | if paused { GUEST_STOPPED } else { 0 };
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::HostTsc;

    fn at(hz: u64) -> Time {
        Time::with_host(HostTsc { hz, invariant: false })
    }

    #[test]
    fn the_guests_counter_is_the_hosts_and_its_clock_starts_at_zero() {
        let time = Time::new();
        let (begin, start) = (time.tsc(), std::time::Instant::now());
        assert_eq!(time.offset.load(Ordering::Relaxed), 0);
        assert!(time.clocks().paravirtual < 1_000_000_000);
        std::thread::sleep(std::time::Duration::from_millis(20));
        let (guest, host) = (time.ticks_to_ns(time.tsc() - begin) as i64, start.elapsed().as_nanos() as i64);
        assert!((guest - host).abs() < 1_000_000, "{guest} and {host}");
    }

    #[test]
    fn a_guest_computes_nanoseconds_from_the_clock_structure() {
        for hz in [100_000_000, 999_999_000, 1_000_000_000, 2_000_000_000, 2_599_998_000, 5_700_000_000] {
            let time = at(hz);
            let (clock, start) = (time.kvm_clock(7), time.epoch().tsc + 7);
            let ns = clock.reading(start + hz * 3600);
            assert!(ns.abs_diff(3_600_000_000_000) < 10_000, "{hz}: {ns}");
            assert_eq!(clock.tsc_timestamp, start);
        }
    }

    #[test]
    fn a_deadline_is_past_when_the_time_until_it_is_over() {
        let time = at(2_599_998_000);
        for ns in [1, 999, 1_000_000, 86_400_000_000_000] {
            let ticks = time.ns_to_ticks(ns);
            // A part in 10^9 is what the fixed-point ratio is good for.
            assert!(time.ticks_to_ns(ticks) + 1 + ns / 1_000_000_000 >= ns);
            assert!(time.ns_until(time.tsc() + ticks) <= ns + 1);
        }
        assert_eq!(time.ns_until(0), 0);
    }

    #[test]
    fn restored_clocks_go_on_from_their_values() {
        let time = at(1_000_000_000);
        for clocks in [Clocks { tsc: 1 << 50, paravirtual: 7 }, Clocks { tsc: 5, paravirtual: 1 << 60 }] {
            time.set_clocks(&clocks);
            let is = time.clocks();
            let (ticks, ns) = (is.tsc - clocks.tsc, is.paravirtual - clocks.paravirtual);
            assert!(ticks < 1_000_000_000, "{ticks}");
            assert!(ticks.abs_diff(ns) <= 1, "{ticks} ticks are {ns} ns");
        }
    }
}
