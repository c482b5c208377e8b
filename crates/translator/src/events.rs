//! What happens between instructions: INIT and start-up, SMIs, debug traps, NMIs, interrupts, in the order of Intel SDM
//! 3A table 6-2; and sleeping while halted.
//!
//! The requests NMI and INTERRUPT stay set for as long as something is pending that can't be taken yet (blocked, RFLAGS.IF
//! clear, interrupt shadow), so that one look at the word tells code that enables interrupts whether to leave. The poll
//! word, which interrupts running code, is set only when something new comes.

use std::sync::atomic::Ordering;
use std::time::Duration;

use arch::registers::{gpr, rflags};
use arch::state::{Activity, Segment, SegmentRegister};
use arch::{Exception, Vector};

use crate::Vcpu;
use crate::cpu::Stop;
use crate::deliver::{Event, deliver};
use crate::shared::request;

/// Where a pending interrupt's vector comes from.
enum Pending {
    Apic(u8),
    /// The 8259 pair.
    External,
}

impl Vcpu {
    fn requests(&self) -> u32 {
        self.shared.requests.load(Ordering::SeqCst)
    }

    /// Clears request bits; true if any of them was set.
    fn take_request(&self, bits: u32) -> bool {
        self.shared.requests.fetch_and(!bits, Ordering::SeqCst) & bits != 0
    }

    /// Whether [`Vcpu::take_events`] may have something to do now.
    #[inline]
    pub fn event_deliverable(&self) -> bool {
        let requests = self.shared.requests.load(Ordering::Relaxed);
        requests & self.unmasked() != 0
            || self.pending_debug != 0 && !self.debug_shadow
            || self.pending_event.is_some()
            || !self.interrupt_shadow
                && (requests & request::NMI != 0 && !self.nmi_blocked
                    || requests & request::INTERRUPT != 0 && self.rflags & rflags::IF != 0)
    }

    /// Of the timer, INIT, start-up and SMI, those that can be taken now: system-management mode holds off all but the first,
    /// and SMIs wait for a processor to be started.
    fn unmasked(&self) -> u32 {
        if self.smm.active {
            request::TIMER
        } else if self.interrupt_shadow || self.activity == Activity::WaitForSipi {
            request::TIMER | request::INIT | request::SIPI
        } else {
            request::TIMER | request::INIT | request::SIPI | request::SMI
        }
    }

    /// Takes what is pending and may be taken between two instructions.
    pub fn take_events(&mut self) -> Result<(), Stop> {
        if self.take_request(request::TIMER) {
            self.host_timer_fired();
        }
        self.take_startup();
        if self.activity == Activity::WaitForSipi {
            return Ok(());
        }
        if let Some((vector, code)) = self.pending_event.take() {
            deliver(self, self.saved_event(vector, code))?;
        }
        if self.unmasked() & request::SMI != 0 && self.take_request(request::SMI) {
            self.enter_smm();
            return Ok(());
        }
        if self.pending_debug != 0 && !self.debug_shadow {
            let bits = std::mem::take(&mut self.pending_debug);
            deliver(self, Event::Exception(Exception::debug(bits)))?;
        }
        if !self.interrupt_shadow {
            if !self.nmi_blocked && self.shared.take_nmi() {
                deliver(self, Event::Nmi)?;
            }
            self.take_interrupt()?;
        }
        Ok(())
    }

    /// IRET ends the time in which NMIs are blocked; also if it faults (Intel SDM 3A 6.7.1).
    pub fn unblock_nmis(&mut self) {
        if std::mem::take(&mut self.nmi_blocked) {
            self.shared.merge_nmis();
        }
    }

    /// The event that a state came with. CR2 and DR6 are in place: they stay what they are.
    fn saved_event(&self, vector: u8, code: Option<u32>) -> Event {
        match Vector::of(vector) {
            Some(Vector::Nmi) => Event::Nmi,
            // Without its error code it is an interrupt on that vector, as the 8259 has them in real mode.
            Some(exception) if exception.has_error_code() == code.is_some() => Event::Exception(Exception {
                fault_address: self.cr2,
                ..Exception::with_code(exception, code.unwrap_or(0))
            }),
            _ => Event::Interrupt(vector),
        }
    }

    fn take_interrupt(&mut self) -> Result<(), Stop> {
        if self.rflags & rflags::IF == 0 || !self.take_request(request::INTERRUPT) {
            return Ok(());
        }
        let vector = match self.pending_interrupt() {
            None => return Ok(()),
            Some(Pending::Apic(vector)) => {
                self.shared.apic.acknowledge(vector);
                vector
            }
            Some(Pending::External) => {
                self.shared.apic.take_extint();
                self.machine.bus().acknowledge_pic()
            }
        };
        // What else is pending waits for the next chance; what comes from now on asks for itself.
        if self.pending_interrupt().is_some() {
            self.shared.requests.fetch_or(request::INTERRUPT, Ordering::SeqCst);
        }
        if self.cpl() == 3 {
            self.program_interrupted();
        } else {
            self.rest_native();
        }
        deliver(self, Event::Interrupt(vector))
    }

    fn pending_interrupt(&self) -> Option<Pending> {
        let apic = &self.shared.apic;
        // The 8259's output is wired to the bootstrap processor.
        let pic = self.id == 0 && self.machine.pic_asserted.load(Ordering::SeqCst) != 0 && apic.accepts_pic();
        if pic || apic.extint() { Some(Pending::External) } else { apic.deliverable().map(Pending::Apic) }
    }

    /// INIT and the start-up IPI (Intel SDM 3A 9.4.2).
    fn take_startup(&mut self) {
        if self.smm.active || self.requests() & (request::INIT | request::SIPI) == 0 {
            return;
        }
        if self.take_request(request::INIT) {
            self.init_state();
            self.shared.apic.reset();
            let signature = self.cpuid(1, 0).eax;
            self.gpr[gpr::RDX] = u64::from(signature);
            self.activity = if self.shared.apic.bootstrap() { Activity::Running } else { Activity::WaitForSipi };
        }
        // Where no INIT came before, a start-up IPI is ignored.
        if self.take_request(request::SIPI) && self.activity == Activity::WaitForSipi {
            let vector = self.shared.sipi_vector.load(Ordering::SeqCst);
            let selector = u16::from(vector) << 8;
            self.segments[SegmentRegister::Cs as usize] = Segment::real_mode(selector, true);
            self.rip = 0;
            self.activity = Activity::Running;
        }
    }

    /// The requests that end a halt: those that change something for a processor in this state.
    fn waking_requests(&self) -> u32 {
        let always = request::STOP | request::INVALIDATE | request::TIMER;
        let (init, smi) = if self.smm.active { (0, 0) } else { (request::INIT, request::SMI) };
        if self.activity == Activity::WaitForSipi {
            return always | init | request::SIPI;
        }
        let nmi = if self.nmi_blocked { 0 } else { request::NMI };
        let interrupt = if self.rflags & rflags::IF != 0 { request::INTERRUPT } else { 0 };
        always | init | smi | nmi | interrupt
    }

    /// Sleeps while halted or waiting for a start-up IPI, until a request comes that matters.
    pub fn halt(&mut self) {
        // The shadow of STI covered the HLT itself.
        self.interrupt_shadow = false;
        self.debug_shadow = false;
        loop {
            self.poll_apic_timer();
            let waking = self.waking_requests();
            let awaited = |requests: u32| requests & waking != 0;
            if awaited(self.requests()) || self.pending_debug != 0 {
                return;
            }
            self.rest_native();
            let timeout = self.apic_timer_remaining().map(Duration::from_nanos);
            let shared = &self.shared;
            shared.parker.park(timeout, || awaited(shared.requests.load(Ordering::SeqCst)));
        }
    }
}

#[cfg(test)]
mod tests;
