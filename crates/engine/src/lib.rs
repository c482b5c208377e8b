//! The border between a machine and the engine that runs its processors.
//!
//! A machine gives an engine a [`Bus`] (what lies outside RAM) and gets back one [`Vcpu`] for each processor and one
//! [`Interrupts`] for all of them. The machine starts one host thread a vCPU and calls [`Vcpu::run`]; the engine calls
//! the bus in the middle of instructions, so a machine never holds a half-executed one. `run` returns only for what the
//! machine must decide. Local APICs belong to the engine; 8259, 8254 and I/O APIC belong to the machine and reach the
//! vCPUs through [`Interrupts`].
//!
//! Nothing here knows KVM or the translator.
#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;
use std::sync::Arc;

pub use arch::CpuState;

/// What a vCPU reaches beyond RAM. Called from vCPU threads, concurrently.
pub trait Bus: Send + Sync {
    /// A read of 1 to 64 bytes at a guest-physical address that is not RAM. Where nothing answers, all ones.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// A write of 1 to 64 bytes at a guest-physical address that is not RAM. Where nothing answers, it is dropped.
    fn mmio_write(&self, address: u64, data: &[u8]);
    /// [`Bus::mmio_read`] by a vCPU in system-management mode, whose accesses bear a mark on the bus.
    fn mmio_read_from_smm(&self, address: u64, data: &mut [u8]) {
        self.mmio_read(address, data);
    }
    /// The same for [`Bus::mmio_write`].
    fn mmio_write_from_smm(&self, address: u64, data: &[u8]) {
        self.mmio_write(address, data);
    }
    /// IN: 1, 2 or 4 bytes.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// OUT: 1, 2 or 4 bytes.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// The interrupt-acknowledge cycle to the 8259 pair, when a vCPU takes an external interrupt (ExtINT).
    /// Returns its vector (the spurious one if the request has gone).
    fn acknowledge_pic(&self) -> u8;
    /// A local APIC broadcasts the end of a level-triggered interrupt (Intel SDM 3A 10.8.5): for I/O APICs.
    fn end_of_interrupt(&self, vector: u8);
    /// A vCPU drives its FERR# output, by which it tells of x87 errors while CR0.NE is clear, and reads its IGNNE# input:
    /// whether to go on regardless (Intel SDM 1 8.7.2). Where nothing is wired to them it is to.
    fn set_ferr(&self, _asserted: bool) -> bool {
        true
    }
}

/// How devices interrupt vCPUs. Called from any thread; never blocks on a running vCPU.
pub trait Interrupts: Send + Sync {
    /// A message-signalled interrupt: a write of `data` to `address` in 0xfee0_0000..0xfef0_0000 (Intel SDM 3A 10.11).
    /// The I/O APIC delivers through this too.
    fn send_msi(&self, address: u64, data: u32);
    /// The level of the 8259's INTR output, wired to LINT0 of the boot processor (and to its INTR pin while its APIC is
    /// disabled). The engine calls [`Bus::acknowledge_pic`] when it takes it.
    fn set_pic_output(&self, asserted: bool);
    /// A non-maskable interrupt to one vCPU.
    fn send_nmi(&self, vcpu: u32);
    /// A system-management interrupt (Intel SDM 3C 32.2): to all vCPUs or, if not to `all`, to the one whose access to a
    /// device this call is part of. Of no effect on an engine without that mode.
    fn send_smi(&self, _all: bool) {}
    /// Something that a source of messages, such as one vector of a device, keeps and sends them by instead of
    /// [`Interrupts::send_msi`], if the engine knows a shorter way for what is sent again and again.
    fn message_source(&self) -> Option<Box<dyn MessageSource>> {
        None
    }
}

/// The way to the vCPUs of one source of messages, which mostly sends the same one.
pub trait MessageSource: Send + Sync {
    /// As [`Interrupts::send_msi`]. What is sent is always this message: the source may change it, or be masked and not
    /// call at all, without telling.
    fn send(&self, address: u64, data: u32);
}

/// Registers of devices that are written only to say that there is work. An engine that has such a thing wakes the
/// device's thread by itself, without a vCPU's thread coming out of the guest.
pub trait Doorbells: Send + Sync {
    /// From now on a write of any size at this guest-physical address raises `event` (an eventfd) and doesn't reach the
    /// bus. False: that is not possible, and the bus hears of writes as ever.
    fn attach(&self, address: u64, event: BorrowedFd<'_>) -> bool;
    /// Ends what `attach` with the same arguments began.
    fn detach(&self, address: u64, event: BorrowedFd<'_>);
}

/// Why [`Vcpu::run`] returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// A triple fault: the machine resets (Intel SDM 3A 6.15, interrupt 8).
    TripleFault,
    /// [`VcpuControl::stop`] was called; the state may be read, and `run` called again.
    Stopped,
    /// The engine can't go on. The text names what failed, where and, if known, what to do.
    Failed(String),
}

/// One virtual processor, owned by one thread at a time.
pub trait Vcpu: Send {
    /// Runs until the machine has to decide something. Waits inside for halted and not-yet-started processors.
    fn run(&mut self) -> Exit;
    /// The whole state; only between calls of `run`.
    fn state(&self) -> CpuState;
    /// Replaces the whole state; only between calls of `run`.
    fn set_state(&mut self, state: &CpuState) -> Result<(), Error>;
    /// A handle by which other threads stop this vCPU.
    fn control(&self) -> Arc<dyn VcpuControl>;
}

/// Stops a vCPU from another thread.
pub trait VcpuControl: Send + Sync {
    /// Makes the current or next [`Vcpu::run`] return [`Exit::Stopped`] soon, once. Idempotent until then.
    fn stop(&self);
}

/// A way to run processors.
pub trait Engine: Send + Sync {
    /// The name users type after `--accel`.
    fn name(&self) -> &'static str;
    /// Creates processor `id` (also its APIC id), in reset state: processor 0 running, all others waiting for SIPI.
    fn create_vcpu(&self, id: u32, bus: Arc<dyn Bus>) -> Result<Box<dyn Vcpu>, Error>;
    fn interrupts(&self) -> Arc<dyn Interrupts>;
    /// Whether its vCPUs have system-management mode, in which they go by a memory map of its own
    /// (`memory::MemoryMap::smm_sections`).
    fn has_smm(&self) -> bool {
        false
    }
    /// The engine's [`Doorbells`], if it has any.
    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        None
    }
    /// What the machine's clocks read now.
    fn clocks(&self) -> Result<Clocks, Error>;
    /// Lets them go on from what they read elsewhere. To be called while no vCPU runs, and before [`Vcpu::set_state`] of
    /// all of them, which brings what a vCPU has computed from them into line.
    fn set_clocks(&self, clocks: &Clocks) -> Result<(), Error>;
}

/// What the clocks read that all vCPUs of a machine share, at one moment. They are no part of [`CpuState`], because they
/// go on: two vCPUs whose states are taken one after the other still agree about the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clocks {
    /// The time-stamp counter of a vCPU whose IA32_TSC_ADJUST is 0. What else a vCPU counts is its own, and in its state.
    pub tsc: u64,
    /// The paravirtual clock (Linux `Documentation/virt/kvm/x86/msr.rst`, MSR_KVM_SYSTEM_TIME_NEW), in nanoseconds.
    pub paravirtual: u64,
}

/// Why an engine or a vCPU could not be made or set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what}: {source}")]
    Host { what: String, source: std::io::Error },
    #[error("the {engine} engine can't run on this host: {why}")]
    Unsupported { engine: &'static str, why: String },
    #[error("the vCPU state is not valid: {0}")]
    State(String),
}
