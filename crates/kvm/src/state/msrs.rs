//! The model-specific registers that are part of a vCPU's state: [`arch::msr::SAVED`] and the MTRRs.

use arch::msr;
use kvm_bindings::*;
use kvm_ioctls::VcpuFd;

use super::{Context, apic};
use crate::{Error, calls};

/// The registers that this host's KVM keeps for our vCPUs, and what they hold after power-on.
pub struct MsrSet(Vec<(u32, u64)>);

/// Registers that are set by other means, or need others to be set before.
const APART: [u32; 3] = [msr::EFER, msr::APIC_BASE, msr::TSC_DEADLINE];

impl MsrSet {
    /// Asks a vCPU that has not run yet.
    pub fn of_new_vcpu(fd: &VcpuFd) -> Self {
        let all: Vec<_> = msr::SAVED.iter().copied().chain(msr::mtrrs()).map(|number| entry(number, 0)).collect();
        let readable = taken(all, |list| fd.get_msrs(list).ok());
        // Some can be read, but not set, while the processor model is without what they are for.
        let kept = taken(readable, |list| fd.set_msrs(list).ok());
        MsrSet(kept.iter().map(|entry| (entry.index, entry.data)).collect())
    }

    fn reset_value(&self, number: u32) -> Option<u64> {
        self.0.iter().find(|(n, _)| *n == number).map(|(_, value)| *value)
    }
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// Those that a call takes, which does them in their order up to the first that it does not.
fn taken(entries: Vec<kvm_msr_entry>, mut call: impl FnMut(&mut Msrs) -> Option<usize>) -> Vec<kvm_msr_entry> {
    let (mut left, mut taken) = (entries.as_slice(), Vec::new());
    while !left.is_empty() {
        let Ok(mut list) = Msrs::from_entries(left) else { break };
        let done = call(&mut list).unwrap_or(0).min(left.len());
        taken.extend(list.as_slice().iter().take(done).copied());
        left = left.get(done + 1..).unwrap_or_default();
    }
    taken
}

/// Those that are not at their reset values.
pub fn read(context: &Context<'_>, sregs: &kvm_sregs) -> Result<Vec<(u32, u64)>, Error> {
    let entries: Vec<_> = context.msrs.0.iter().map(|(number, _)| entry(*number, 0)).collect();
    let mut list = Msrs::from_entries(&entries).map_err(|e| Error::State(format!("the list of MSRs: {e:?}")))?;
    let read = context.fd.get_msrs(&mut list).map_err(Error::call("give MSRs"))?;
    if read < entries.len() {
        let number = entries.get(read).map_or(0, |e| e.index);
        return Err(Error::State(format!("KVM does not give MSR {number:#x}")));
    }
    let values = list.as_slice().iter().map(|entry| match entry.index {
        msr::EFER => (msr::EFER, sregs.efer),
        msr::APIC_BASE => (msr::APIC_BASE, sregs.apic_base),
        index => (index, entry.data),
    });
    let reset = |number: u32| match number {
        msr::EFER => 0,
        msr::APIC_BASE => apic::reset_base(context.id),
        _ => context.msrs.reset_value(number).unwrap_or(0),
    };
    Ok(values.filter(|(number, value)| *value != reset(*number)).collect())
}

/// The value of a register in a list of them: the last, as if they were written one after the other.
pub fn given(msrs: &[(u32, u64)], number: u32) -> Option<u64> {
    msrs.iter().rev().find(|(n, _)| *n == number).map(|(_, value)| *value)
}

/// Sets all: to `msrs`, or to their reset values.
pub fn write(context: &Context<'_>, msrs: &[(u32, u64)]) -> Result<(), Error> {
    let given = |number: u32| given(msrs, number);
    if let Some((number, value)) = msrs.iter().find(|(n, v)| context.msrs.reset_value(*n).is_none() && *v != 0) {
        return Err(Error::State(format!("this host's KVM has no MSR {number:#x}, which is to be {value:#x}")));
    }
    let entries: Vec<_> = context
        .msrs
        .0
        .iter()
        .filter(|(number, _)| !APART.contains(number))
        .map(|(number, reset)| entry(*number, given(*number).unwrap_or(*reset)))
        .collect();
    set(context.fd, &entries)?;
    move_counter(context, given(msr::TSC_ADJUST).unwrap_or(0))
}

/// To be called when the local APIC is in the mode in which the deadline counts.
pub fn write_deadline(context: &Context<'_>, deadline: u64) -> Result<(), Error> {
    match context.msrs.reset_value(msr::TSC_DEADLINE) {
        Some(_) => set(context.fd, &[entry(msr::TSC_DEADLINE, deadline)]),
        None => Ok(()),
    }
}

fn set(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), Error> {
    let list = Msrs::from_entries(entries).map_err(|e| Error::State(format!("the list of MSRs: {e:?}")))?;
    let set = fd.set_msrs(&list).map_err(Error::call("set MSRs"))?;
    match entries.get(set) {
        None => Ok(()),
        Some(refused) => Err(Error::State(format!("MSR {:#x} can't be {:#x}", refused.index, refused.data))),
    }
}

/// IA32_TSC_ADJUST is set without an effect on the counter where the monitor sets it: so that is moved as well.
fn move_counter(context: &Context<'_>, adjust: u64) -> Result<(), Error> {
    let Some(base) = context.tsc_offset else { return Ok(()) };
    calls::set_tsc_offset(context.fd, base.wrapping_add(adjust)).map_err(Error::call("set the time-stamp counter"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_that_the_kernel_lacks_are_passed_over() {
        let lacks = |number: u32| [0, 3, 4, 9].contains(&number);
        let mut calls = 0;
        let known = taken((0..10).map(|number| entry(number, 0)).collect(), |list| {
            calls += 1;
            let done = list.as_slice().iter().take_while(|e| !lacks(e.index)).count();
            list.as_mut_slice().iter_mut().take(done).for_each(|e| e.data = 1);
            // The kernel says so by an error if it can't do the first.
            (done > 0).then_some(done)
        });
        assert_eq!(known.iter().map(|e| e.index).collect::<Vec<_>>(), [1, 2, 5, 6, 7, 8]);
        assert!(known.iter().all(|e| e.data == 1));
        assert_eq!(calls, 4);
    }

    #[test]
    fn of_a_register_that_is_given_twice_the_last_value_counts() {
        let msrs = [(msr::EFER, 0xd01), (msr::PAT, 1), (msr::EFER, 0xd00)];
        assert_eq!(
            (given(&msrs, msr::EFER), given(&msrs, msr::PAT), given(&msrs, msr::STAR)),
            (Some(0xd00), Some(1), None)
        );
    }
}
