//! Exceptions, interrupts and NMIs that wait or were on their way into the guest.

use arch::CpuState;
use arch::registers::rflags;
use kvm_bindings::*;

use super::apic;

/// The vector of NMIs.
const NMI: u8 = 2;

pub fn export(events: &kvm_vcpu_events, state: &mut CpuState, apic: &mut [u8]) {
    let (exception, interrupt, nmi) = (&events.exception, &events.interrupt, &events.nmi);
    if exception.injected != 0 || exception.pending != 0 {
        let code = (exception.has_error_code != 0).then_some(exception.error_code);
        state.pending_exception = Some((exception.nr, code));
    } else if interrupt.injected != 0 && !apic::take_back(apic, interrupt.nr) {
        // The 8259's, or INT n: nothing remembers these but the event itself.
        state.pending_exception = Some((interrupt.nr, None));
    }
    state.nmi_pending = nmi.pending != 0 || nmi.injected != 0;
    // One that didn't get in any more has not blocked others yet.
    state.nmi_blocked = nmi.masked != 0 && nmi.injected == 0;
    state.interrupt_shadow = interrupt.shadow != 0;
}

pub fn import(state: &CpuState) -> kvm_vcpu_events {
    let mut events =
        kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW, ..Default::default() };
    match state.pending_exception {
        Some((vector, code)) if vector < 32 && vector != NMI => {
            events.exception.injected = 1;
            events.exception.nr = vector;
            events.exception.has_error_code = u8::from(code.is_some());
            events.exception.error_code = code.unwrap_or(0);
        }
        Some((vector, _)) => {
            events.interrupt.injected = 1;
            events.interrupt.nr = vector;
        }
        None => {}
    }
    events.nmi.pending = u8::from(state.nmi_pending);
    events.nmi.masked = u8::from(state.nmi_blocked);
    if state.interrupt_shadow {
        // Intel's processors have two shadows, and refuse that of STI while interrupts are off (Intel SDM 3C 26.3.1.5).
        let sti = state.rflags & rflags::IF != 0;
        events.interrupt.shadow = if sti { KVM_X86_SHADOW_INT_STI } else { KVM_X86_SHADOW_INT_MOV_SS } as u8;
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pending_events_survive_the_way_through_the_kernels_form() {
        let reset = CpuState::reset;
        for state in [
            CpuState { pending_exception: Some((14, Some(6))), ..reset() },
            CpuState { pending_exception: Some((6, None)), nmi_blocked: true, ..reset() },
            CpuState { pending_exception: Some((0x30, None)), ..reset() },
            CpuState { nmi_pending: true, interrupt_shadow: true, ..reset() },
        ] {
            let mut back = reset();
            export(&import(&state), &mut back, &mut []);
            assert_eq!(back, state);
        }
    }
}
