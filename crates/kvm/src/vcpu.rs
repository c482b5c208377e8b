//! The loop around `KVM_RUN`.
//!
//! Port and memory-mapped accesses come out of the guest in the middle of an instruction: the bus answers, and the next
//! `KVM_RUN` completes it. So a vCPU stops only when a `KVM_RUN` with `immediate_exit` has returned: then there is
//! nothing half done, and the state may be read. Halting, start-up IPIs and local APICs are the kernel's own affair.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use arch::CpuState;
use engine::{Bus, Exit, Interrupts, VcpuControl};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::control::Control;
use crate::interrupts::{APIC_ADDRESS, Messages};
use crate::state::{self, Context, Lint0, MsrSet};
use crate::vm::Vm;
use crate::{Error, calls, words};

/// A virtual processor.
pub struct Vcpu {
    id: u32,
    fd: VcpuFd,
    vm: Arc<Vm>,
    bus: Arc<dyn Bus>,
    control: Arc<Control>,
    xsave_size: usize,
    /// The 8259's vector that was given to the kernel, and where the vCPU was then: it has not been taken as long as
    /// the vCPU is there still.
    queued: Option<Queued>,
    /// Why the state can't be relied on any more: the next `run` says so.
    broken: std::cell::RefCell<Option<String>>,
}

#[derive(Clone, Copy)]
struct Queued {
    vector: u8,
    rip: u64,
    rsp: u64,
}

impl Vcpu {
    /// Makes processor `id`, as power-on leaves it.
    pub fn new(id: u32, vm: Arc<Vm>, bus: Arc<dyn Bus>) -> Result<Self, Error> {
        let mut fd = vm.fd.create_vcpu(id.into()).map_err(Error::call(format!("make vCPU {id}")))?;
        let khz = || fd.get_tsc_khz().map_err(Error::call("say the rate of its time-stamp counter"));
        let model = vm.model(khz)?;
        let cpuid = vm.host.entries(model, id)?;
        let xsave_size = model.xsave_size() as usize;
        fd.set_cpuid2(&cpuid).map_err(Error::call(format!("make vCPU {id} a processor of this model")))?;
        vm.msrs.get_or_init(|| MsrSet::of_new_vcpu(&fd));
        vm.clocks.vcpu_made(&fd);
        let immediate_exit = &raw mut fd.get_kvm_run().immediate_exit;
        let control = Arc::new(Control::new(immediate_exit));
        vm.add_vcpu(control.clone());
        let broken = std::cell::RefCell::default();
        let mut vcpu = Vcpu { id, fd, vm, bus, control, xsave_size, queued: None, broken };
        let activity = if id == 0 { arch::state::Activity::Running } else { arch::state::Activity::WaitForSipi };
        vcpu.replace_state(&CpuState { activity, ..CpuState::reset() })?;
        Ok(vcpu)
    }

    pub fn set_bus(&mut self, bus: Arc<dyn Bus>) {
        self.bus = bus;
    }

    /// The same processor on another bus, as power-on leaves it.
    pub fn with_bus(mut self, bus: Arc<dyn Bus>) -> Result<Self, Error> {
        self.bus = bus;
        self.replace_state(&CpuState::reset())?;
        Ok(self)
    }

    fn context<'a>(&'a self, msrs: &'a MsrSet) -> Context<'a> {
        let (fd, vm, id) = (&self.fd, &*self.vm, self.id);
        Context { fd, vm, id, msrs, xsave_size: self.xsave_size, tsc_offset: vm.clocks.tsc_offset() }
    }

    /// What [`Vm::msrs`] has been since the first vCPU.
    fn msrs(&self) -> Result<&MsrSet, Error> {
        self.vm.msrs.get().ok_or_else(|| Error::State("no vCPU has been made".into()))
    }

    pub fn replace_state(&mut self, state: &CpuState) -> Result<(), Error> {
        self.queued = None;
        // What was asked of the vCPU in its former life and is only in the kernel's hands (an access to be completed, a
        // start-up IPI) must go first.
        self.settle()?;
        let result = state::import(&self.context(self.msrs()?), state);
        self.broken.replace(result.as_ref().err().map(ToString::to_string));
        result
    }

    /// Completes what the kernel has half done, without running the guest.
    fn settle(&mut self) -> Result<(), Error> {
        if self.fd.get_kvm_run().exit_reason == 0 {
            return Ok(()); // has never run
        }
        // An access in several pieces comes out once for each.
        const MOST_PIECES: usize = 64;
        for _ in 0..MOST_PIECES {
            self.control.kick_self();
            let result = self.fd.run().map(drop);
            self.control.unkick();
            match result {
                Ok(()) => {}
                Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => return Ok(()),
                Err(error) => return Err(Error::call("complete an instruction")(error)),
            }
        }
        Ok(())
    }

    pub fn export(&self) -> Result<CpuState, Error> {
        let mut state = state::export(&self.context(self.msrs()?))?;
        if let Some(queued) = self.queued
            && (state.rip, state.gpr[arch::registers::gpr::RSP]) == (queued.rip, queued.rsp)
            && state.pending_exception.is_none()
        {
            state.pending_exception = Some((queued.vector, None));
        }
        Ok(state)
    }

    /// The 8259's output has risen, and it is not known to be an interrupt of its own: LINT0, where it leads, may be set
    /// for another kind of event, which KVM leaves to us (Intel SDM 3A 11.5.1).
    fn follow_lint0(&self) -> Result<(), Error> {
        match state::lint0(&self.fd)? {
            Some(Lint0::Fixed(vector)) => Messages(self.vm.clone()).send_msi(APIC_ADDRESS, vector.into()),
            Some(Lint0::Nmi) => Messages(self.vm.clone()).send_nmi(self.id),
            None => {}
        }
        Ok(())
    }

    /// Gives the kernel the 8259's interrupt, or asks it to come back when the guest can take one.
    fn offer_pic_interrupt(&mut self) -> Result<(), Error> {
        let rose = self.id == 0 && self.vm.pic_rose.swap(false, Ordering::SeqCst);
        let asserted = self.id == 0 && self.vm.pic_asserted.load(Ordering::SeqCst);
        let run = self.fd.get_kvm_run();
        if rose && run.ready_for_interrupt_injection == 0 {
            self.follow_lint0()?;
        }
        let run = self.fd.get_kvm_run();
        if !asserted {
            run.request_interrupt_window = 0;
            return Ok(());
        }
        let ready = run.ready_for_interrupt_injection != 0;
        run.request_interrupt_window = u8::from(!ready);
        if !ready || self.control.is_stopping() {
            return Ok(());
        }
        let regs = self.fd.get_regs().map_err(Error::call("give registers"))?;
        let vector = self.bus.acknowledge_pic();
        calls::queue_interrupt(&self.fd, vector).map_err(Error::call("queue an interrupt"))?;
        self.queued = Some(Queued { vector, rip: regs.rip, rsp: regs.rsp });
        // Another may follow it.
        self.fd.get_kvm_run().request_interrupt_window = u8::from(self.vm.pic_asserted.load(Ordering::SeqCst));
        Ok(())
    }

    fn run_until_exit(&mut self) -> Exit {
        loop {
            if let Err(error) = self.offer_pic_interrupt() {
                return Exit::Failed(error.to_string());
            }
            let exit = match self.fd.run() {
                Ok(VcpuExit::IoIn(port, data)) => {
                    let (data, length) = (data.as_mut_ptr(), data.len());
                    let size = port_access_size(&mut self.fd);
                    // SAFETY: the kernel's buffer in the vCPU's shared page, which stays mapped and which nothing else
                    // refers to until the next KVM_RUN.
                    let data = unsafe { std::slice::from_raw_parts_mut(data, length) };
                    data.chunks_mut(size).for_each(|data| self.bus.pio_read(port, data));
                    continue;
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    let (data, length) = (data.as_ptr(), data.len());
                    let size = port_access_size(&mut self.fd);
                    // SAFETY: as above.
                    let data = unsafe { std::slice::from_raw_parts(data, length) };
                    data.chunks(size).for_each(|data| self.bus.pio_write(port, data));
                    continue;
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    if !self.vm.slots().read(address, data) {
                        self.bus.mmio_read(address, data);
                    }
                    continue;
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    if !self.vm.slots().write(self.vm.ram.tracker(), address, data) {
                        self.bus.mmio_write(address, data);
                    }
                    continue;
                }
                Ok(VcpuExit::IoapicEoi(vector)) => {
                    self.vm.end_of_interrupt(vector);
                    self.bus.end_of_interrupt(vector);
                    continue;
                }
                Ok(VcpuExit::Shutdown) => Exit::TripleFault,
                Ok(VcpuExit::IrqWindowOpen) => continue,
                Ok(VcpuExit::Intr) => {
                    if self.control.take_kick() {
                        return Exit::Stopped;
                    }
                    continue;
                }
                Ok(VcpuExit::FailEntry(reason, _)) => Exit::Failed(words::failed_entry(reason)),
                Ok(VcpuExit::InternalError) => Exit::Failed(words::internal_error(&mut self.fd, &self.vm.ram)),
                Ok(VcpuExit::MemoryFault { gpa, .. }) => Exit::Failed(words::memory_fault(Some(gpa))),
                Ok(other) => Exit::Failed(format!("KVM came back from the guest for no known reason: {other:?}")),
                Err(error) => match error.errno() {
                    libc::EINTR => {
                        if self.control.take_kick() {
                            return Exit::Stopped;
                        }
                        continue;
                    }
                    // A processor that waits for its start-up IPI was woken.
                    libc::EAGAIN => continue,
                    libc::EFAULT => Exit::Failed(words::memory_fault(None)),
                    _ => Exit::Failed(format!("KVM can't run the vCPU: {error}")),
                },
            };
            return exit;
        }
    }
}

/// Bytes of one access of the instruction that came out: REP INS and REP OUTS come out with several.
fn port_access_size(fd: &mut VcpuFd) -> usize {
    // SAFETY: KVM_RUN has just returned for KVM_EXIT_IO, for which the kernel fills this part of the union.
    let size = unsafe { fd.get_kvm_run().__bindgen_anon_1.io.size };
    usize::from(size).max(1)
}

impl engine::Vcpu for Vcpu {
    fn run(&mut self) -> Exit {
        if let Some(why) = self.broken.get_mut().take() {
            return Exit::Failed(why);
        }
        self.control.enter();
        let exit = self.run_until_exit();
        self.control.leave();
        exit
    }

    fn state(&self) -> CpuState {
        self.export().unwrap_or_else(|error| {
            self.broken.replace(Some(error.to_string()));
            CpuState::reset()
        })
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), engine::Error> {
        Ok(self.replace_state(state)?)
    }

    fn control(&self) -> Arc<dyn VcpuControl> {
        self.control.clone()
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.control.vcpu_gone();
    }
}
