//! Delivery of exceptions and interrupts (Intel SDM 3A chapter 6): from an [`Event`] to the first instruction of its
//! handler.
//!
//! [`deliver`] tries the event; a fault on the way becomes the next event, a double fault or a triple fault
//! ([`escalate`], table 6-5). An attempt takes the way of the mode: [`long`] (IA-32e), [`legacy`] (protected and
//! virtual-8086), or the vector table of real mode. It changes registers only after everything that may fault.

mod legacy;
mod long;

pub(crate) use long::stack_from_tss;

use arch::registers::{debug, rflags};
use arch::state::Activity;
use arch::{Exception, SegmentRegister, Vector};
use engine::Exit;

use crate::cpu::{Stop, Vcpu};
use crate::mmu::Stack;

/// What goes through the IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A fault (RIP is that of the instruction) or a #DB trap (RIP is that of the next).
    Exception(Exception),
    /// An external interrupt's vector.
    Interrupt(u8),
    /// INT n.
    SoftwareInterrupt(u8),
    Int3,
    Into,
    /// INT1: a #DB that checks no privilege and leaves DR6 alone.
    Icebp,
    Nmi,
}

impl Event {
    fn vector(&self) -> u8 {
        match *self {
            Event::Exception(e) => e.vector as u8,
            Event::Interrupt(vector) | Event::SoftwareInterrupt(vector) => vector,
            Event::Int3 => Vector::Breakpoint as u8,
            Event::Into => Vector::Overflow as u8,
            Event::Icebp => Vector::Debug as u8,
            Event::Nmi => Vector::Nmi as u8,
        }
    }

    /// Raised by an instruction that asks for it.
    fn by_instruction(&self) -> bool {
        matches!(self, Event::SoftwareInterrupt(_) | Event::Int3 | Event::Into | Event::Icebp)
    }
}

/// An event as the ways through the IDT need it.
struct Delivery {
    vector: u8,
    error_code: Option<u32>,
    /// The gate's DPL must allow it: INT n, INT3, INTO.
    checks_dpl: bool,
    /// The EXT bit of error codes (Intel SDM 3A 6.13).
    external: u32,
    /// RFLAGS to push.
    flags: u64,
}

impl Delivery {
    fn of(cpu: &Vcpu, event: &Event) -> Self {
        let checks_dpl = matches!(event, Event::SoftwareInterrupt(_) | Event::Int3 | Event::Into);
        let error_code = match event {
            Event::Exception(e) if e.vector.has_error_code() => Some(e.error_code),
            _ => None,
        };
        Delivery {
            vector: event.vector(),
            error_code,
            checks_dpl,
            external: u32::from(!checks_dpl),
            flags: pushed_flags(cpu, event),
        }
    }

    /// An error code that names this vector's gate.
    fn gate_fault(&self, vector: Vector) -> Exception {
        Exception::with_code(vector, u32::from(self.vector) << 3 | 2 | self.external)
    }

    fn general_protection(&self) -> Exception {
        Exception::general_protection(self.external)
    }
}

/// RF in the pushed image is set for faults, so that their instruction breakpoint does not hit again, and clear for
/// what an instruction asked for (Intel SDM 3B 17.3.1.1).
fn pushed_flags(cpu: &Vcpu, event: &Event) -> u64 {
    let breakpoint_or_trap = |e: &Exception| e.vector == Vector::Debug && e.dr6 & debug::DR6_BD == 0;
    match event {
        Event::Exception(e) if breakpoint_or_trap(e) => cpu.rflags,
        Event::Exception(_) => cpu.rflags | rflags::RF,
        event if event.by_instruction() => cpu.rflags & !rflags::RF,
        _ => cpu.rflags,
    }
}

/// Delivers an event. `cpu.rip` is what its handler returns to: the faulting instruction's, else the next one's.
pub fn deliver(cpu: &mut Vcpu, event: Event) -> Result<(), Stop> {
    let mut event = event;
    loop {
        let Err(second) = attempt(cpu, &event) else {
            return Ok(());
        };
        if event.by_instruction() {
            // The instruction itself faults.
            cpu.rip = cpu.insn_rip;
        }
        event = Event::Exception(escalate(cpu, &event, second)?);
    }
}

/// How exceptions combine (Intel SDM 3A table 6-4).
#[derive(PartialEq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

impl Class {
    fn of(exception: &Exception) -> Self {
        match exception.vector {
            Vector::DivideError
            | Vector::InvalidTss
            | Vector::SegmentNotPresent
            | Vector::StackFault
            | Vector::GeneralProtection => Class::Contributory,
            Vector::PageFault => Class::PageFault,
            Vector::DoubleFault => Class::DoubleFault,
            _ => Class::Benign,
        }
    }
}

/// What is delivered when `second` was raised while `first` was (Intel SDM 3A table 6-5).
fn escalate(cpu: &mut Vcpu, first: &Event, second: Exception) -> Result<Exception, Stop> {
    let first = match first {
        Event::Exception(e) => Class::of(e),
        _ => Class::Benign,
    };
    let doubles = match (first, Class::of(&second)) {
        (Class::DoubleFault, _) => return Err(Stop::Exit(Exit::TripleFault)),
        (Class::Contributory, Class::Contributory) => true,
        (Class::PageFault, Class::Contributory | Class::PageFault) => true,
        _ => false,
    };
    if !doubles {
        return Ok(second);
    }
    if second.vector == Vector::PageFault {
        cpu.cr2 = second.fault_address;
    }
    Ok(Exception::new(Vector::DoubleFault))
}

/// Delivers an event, or says what was raised on the way.
fn attempt(cpu: &mut Vcpu, event: &Event) -> Result<(), Exception> {
    let delivery = Delivery::of(cpu, event);
    if matches!(event, Event::Exception(e) if e.vector != Vector::Debug) {
        // The instruction will run again: what it hit before it faulted is not a completed access.
        cpu.pending_debug = 0;
    }
    if !cpu.code64() {
        // The pointers of x87 are relative to segments that the event may change.
        cpu.settle_x87_pointers();
    }
    match event {
        Event::Exception(e) if e.vector == Vector::PageFault => {
            cpu.cr2 = e.fault_address;
            cpu.page_fault_delivered();
        }
        Event::Exception(e) if e.vector == Vector::Debug => {
            // B0-B3 describe this exception; BD, BS and BT are only ever set (Intel SDM 3B 17.2.3).
            cpu.dr6 = cpu.dr6 & !0xf | e.dr6;
            cpu.dr7 &= !debug::DR7_GD;
        }
        Event::Nmi => cpu.nmi_blocked = true,
        _ => {}
    }
    if cpu.long_mode() {
        long::enter(cpu, &delivery)?;
    } else if cpu.protected_mode() {
        legacy::enter(cpu, &delivery)?;
    } else {
        enter_real_mode(cpu, &delivery)?;
    }
    cpu.interrupt_shadow = false;
    cpu.debug_shadow = false;
    cpu.activity = Activity::Running;
    cpu.engine.delivered = true;
    Ok(())
}

/// Through the interrupt vector table of real mode (Intel SDM 3A 20.1.4).
fn enter_real_mode(cpu: &mut Vcpu, delivery: &Delivery) -> Result<(), Exception> {
    let offset = u64::from(delivery.vector) * 4;
    if offset + 3 > u64::from(cpu.idtr.limit) {
        return Err(delivery.gate_fault(Vector::GeneralProtection));
    }
    let address = cpu.idtr.base.wrapping_add(offset) & 0xffff_ffff;
    let target = cpu.read_sized(address, 4, cpu.system_context())?;
    let mut stack = Stack::current_for_event(cpu, delivery.external);
    let code_selector = u64::from(cpu.seg(SegmentRegister::Cs).selector);
    stack.push_all(cpu, 2, &[delivery.flags, code_selector, cpu.rip])?;
    cpu.gpr[arch::registers::gpr::RSP] = stack.pointer;
    cpu.rflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
    cpu.segments[SegmentRegister::Cs as usize] = cpu.real_mode_segment(SegmentRegister::Cs, (target >> 16) as u16);
    cpu.rip = target & 0xffff;
    Ok(())
}

#[cfg(test)]
mod tests;
