//! What threads share: [`Machine`] for all vCPUs, [`VcpuShared`] for what others reach of one.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, RwLock};

use memory::{PageTracker, Ram};

use crate::apic::Apic;
use crate::code_memory::PollWord;
use crate::wait::Parker;

/// Requests to a vCPU, taken by its dispatcher. Bits of [`VcpuShared::requests`].
pub mod request {
    /// Return from `run` with `Exit::Stopped`.
    pub const STOP: u32 = 1 << 0;
    /// Look at the local APIC: an interrupt may be deliverable.
    pub const INTERRUPT: u32 = 1 << 1;
    pub const NMI: u32 = 1 << 2;
    pub const INIT: u32 = 1 << 3;
    /// Start-up IPI; its vector is in [`super::VcpuShared::sipi_vector`].
    pub const SIPI: u32 = 1 << 4;
    /// Another thread asked for code or write permissions to be dropped: see `cache`.
    pub const INVALIDATE: u32 = 1 << 5;
    /// The APIC timer's deadline may have passed.
    pub const TIMER: u32 = 1 << 6;
    /// The memory map has changed.
    pub const MAP: u32 = 1 << 7;
    /// With [`NMI`]: another one came before that was taken.
    pub const SECOND_NMI: u32 = 1 << 8;
    /// System-management interrupt.
    pub const SMI: u32 = 1 << 9;
}

/// What other threads reach of a vCPU.
pub struct VcpuShared {
    pub id: u32,
    /// Bits of [`request`].
    pub requests: AtomicU32,
    pub sipi_vector: AtomicU8,
    /// Not zero: emitted code returns to the dispatcher at its next backward branch or indirect jump.
    pub poll: PollWord,
    pub apic: Apic,
    /// Where the vCPU's thread sleeps while halted.
    pub parker: Parker,
    pub invalidations: crate::invalidation::Invalidations,
}

impl VcpuShared {
    pub fn new(id: u32) -> Self {
        VcpuShared {
            id,
            requests: AtomicU32::new(0),
            sipi_vector: AtomicU8::new(0),
            poll: PollWord::default(),
            apic: Apic::new(id),
            parker: Parker::default(),
            invalidations: crate::invalidation::Invalidations::default(),
        }
    }

    /// Asks the vCPU for something: it will see it before it executes many more instructions, and at once if halted.
    pub fn request(&self, bits: u32) {
        self.flag(bits);
        self.parker.wake();
    }

    /// Makes an NMI pending. A processor takes one at once and remembers one more while it handles that (Intel SDM 3A
    /// 6.7.1), so two must not become one because this one is slower to take the first.
    pub fn request_nmi(&self) {
        let pend = |r| Some(r | if r & request::NMI != 0 { request::SECOND_NMI } else { request::NMI });
        let _ = self.requests.fetch_update(Ordering::SeqCst, Ordering::SeqCst, pend);
        self.request(0);
    }

    /// Takes a pending NMI, if there is one.
    pub fn take_nmi(&self) -> bool {
        let take = |r| match r & (request::NMI | request::SECOND_NMI) {
            0 => None,
            request::NMI => Some(r & !request::NMI),
            _ => Some(r & !request::SECOND_NMI),
        };
        self.requests.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok()
    }

    /// Of the NMIs that came while they were blocked, one is left.
    pub fn merge_nmis(&self) {
        self.requests.fetch_and(!request::SECOND_NMI, Ordering::SeqCst);
    }

    /// [`VcpuShared::request`] from the vCPU's own thread, signal handlers on it included: nobody is to be woken.
    pub fn flag(&self, bits: u32) {
        self.requests.fetch_or(bits, Ordering::SeqCst);
        self.poll.set();
    }
}

/// What all vCPUs of one machine share.
pub struct Machine {
    pub ram: Ram,
    pub tracker: Arc<PageTracker>,
    pub config: crate::Config,
    /// What CPUID says, and which bits of CR4, XCR0 and MSRs there are.
    pub cpuid: arch::cpuid::CpuModel,
    /// Where PKRU is in the guest's XSAVE areas.
    pub pkru: crate::xstate::Component,
    pub time: crate::time::Time,
    /// The level of the 8259's output.
    pub pic_asserted: AtomicU32,
    /// How often a program was entered directly, by vCPUs that have stopped since.
    pub entered_directly: AtomicU64,
    bus: OnceLock<Arc<dyn engine::Bus>>,
    vcpus: RwLock<Vec<Arc<VcpuShared>>>,
}

impl Machine {
    pub fn new(ram: Ram, config: crate::Config, cpuid: arch::cpuid::CpuModel, time: crate::time::Time) -> Self {
        Machine {
            tracker: ram.tracker().clone(),
            ram,
            config,
            pkru: crate::semantics::xsave::pkru_component(&cpuid),
            cpuid,
            time,
            pic_asserted: AtomicU32::new(0),
            entered_directly: AtomicU64::new(0),
            bus: OnceLock::new(),
            vcpus: RwLock::new(Vec::new()),
        }
    }

    /// Set when the first vCPU is made.
    pub fn bus(&self) -> &dyn engine::Bus {
        self.bus.get().map_or(&NoBus, |b| &**b)
    }

    pub fn set_bus(&self, bus: Arc<dyn engine::Bus>) {
        let _ = self.bus.set(bus);
    }

    pub fn add_vcpu(&self, vcpu: Arc<VcpuShared>) {
        self.vcpus.write().unwrap_or_else(|e| e.into_inner()).push(vcpu);
    }

    /// All vCPUs made so far, by id.
    pub fn vcpus(&self) -> std::sync::RwLockReadGuard<'_, Vec<Arc<VcpuShared>>> {
        self.vcpus.read().unwrap_or_else(|e| e.into_inner())
    }
}

/// A bus on which nothing answers: what a machine without devices has.
struct NoBus;

impl engine::Bus for NoBus {
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u16, _: &[u8]) {}
    fn acknowledge_pic(&self) -> u8 {
        0xff
    }
    fn end_of_interrupt(&self, _: u8) {}
}
