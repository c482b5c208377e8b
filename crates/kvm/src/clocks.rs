//! The clocks that all vCPUs of a machine share: the time-stamp counter and KVM's paravirtual clock.
//!
//! A vCPU's counter is the host's plus an offset, of which IA32_TSC_ADJUST is the vCPU's own part. The rest is the machine's:
//! the kernel chooses it when the first vCPU is made, so that the counter begins at about 0.

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_CLOCK_HOST_TSC, kvm_clock_data};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::{Error, calls};

/// The machine's clocks.
pub struct Clocks {
    /// KVM_CAP_ADJUST_CLOCK.
    settable: bool,
    base: Mutex<Base>,
}

/// The part of the counters' offset that is the machine's.
#[derive(Clone, Copy)]
enum Base {
    /// No vCPU has been made, and nothing was set.
    Open,
    Set(u64),
    /// The kernel keeps its offsets to itself.
    Hidden,
}

fn host_counter() -> u64 {
    // SAFETY: RDTSC is there on every x86-64 processor, and Linux lets programs use it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Makes a call of the kernel and says what the host's counter read meanwhile. Where the host does other things in the
/// middle of it, the call is made once more; so it must be one that can be.
fn timed<T>(mut call: impl FnMut() -> Result<T, Error>) -> Result<(T, u64), Error> {
    /// Ticks that a call takes at most, some 0.1 ms, and how often it is tried.
    const NARROW: u64 = 1 << 18;
    const TRIES: u32 = 32;
    let mut tries = 0;
    loop {
        let before = host_counter();
        let result = call()?;
        let width = host_counter().wrapping_sub(before);
        tries += 1;
        if width < NARROW || tries == TRIES {
            return Ok((result, before.wrapping_add(width / 2)));
        }
    }
}

impl Clocks {
    pub fn new(settable: bool) -> Self {
        Clocks { settable, base: Mutex::new(Base::Open) }
    }

    fn base(&self) -> MutexGuard<'_, Base> {
        self.base.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A vCPU has been made and has not run yet.
    pub fn vcpu_made(&self, vcpu: &VcpuFd) {
        let mut base = self.base();
        match (calls::tsc_offset(vcpu), *base) {
            (Ok(offset), Base::Open) => *base = Base::Set(offset),
            (Ok(_), _) => {}
            (Err(error), _) => {
                tracing::debug!(%error, "the offsets of time-stamp counters can't be known");
                *base = Base::Hidden;
            }
        }
    }

    /// What a vCPU's counter is ahead of the host's while its IA32_TSC_ADJUST is 0, if the kernel says it.
    pub fn tsc_offset(&self) -> Option<u64> {
        match *self.base() {
            Base::Set(offset) => Some(offset),
            Base::Open | Base::Hidden => None,
        }
    }

    fn check(&self) -> Result<(), Error> {
        match *self.base() {
            Base::Hidden => Err(Error::Missing("KVM_VCPU_TSC_OFFSET (Linux 5.16)".into())),
            _ if !self.settable => Err(Error::Missing("KVM_CAP_ADJUST_CLOCK".into())),
            _ => Ok(()),
        }
    }

    pub fn read(&self, vm: &VmFd) -> Result<engine::Clocks, Error> {
        self.check()?;
        let (data, now) = timed(|| vm.get_clock().map_err(Error::call("read its clock")))?;
        // Where the kernel's clock follows the counter, it says which reading belongs to it.
        let host = if data.flags & KVM_CLOCK_HOST_TSC != 0 { data.host_tsc } else { now };
        let offset = self.tsc_offset().ok_or_else(|| Error::State("no vCPU has been made".into()))?;
        Ok(engine::Clocks { tsc: host.wrapping_add(offset), paravirtual: data.clock })
    }

    pub fn set(&self, vm: &VmFd, clocks: &engine::Clocks) -> Result<(), Error> {
        self.check()?;
        let data = kvm_clock_data { clock: clocks.paravirtual, ..Default::default() };
        let ((), now) = timed(|| vm.set_clock(&data).map_err(Error::call("set its clock")))?;
        *self.base() = Base::Set(clocks.tsc.wrapping_sub(now));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_was_interrupted_is_made_again_but_not_for_ever() {
        let mut calls = 0;
        let mut slow = |times: u32| {
            calls = 0;
            let made = timed(|| {
                calls += 1;
                if calls <= times {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                Ok(calls)
            });
            made.unwrap().0
        };
        assert!(slow(2) >= 3);
        assert_eq!(slow(u32::MAX), 32);
    }
}
