//! The `kvm` engine: processors in hardware, behind Linux's /dev/kvm.
//!
//! The machine is the same as on every engine; only what runs its processors differs. KVM keeps the local APICs and
//! the guest's clocks; 8259, 8254 and I/O APIC stay with the machine (KVM's *split* irqchip). The data flow to follow:
//!
//! 1. [`system`] opens /dev/kvm and asks for every capability before it is used; [`vm`] is one machine's VM: the
//!    vCPUs, [`routes`] of interrupts, and [`slots`], the memory map.
//! 2. [`vcpu`] is the loop around `KVM_RUN`: ports and memory-mapped accesses go to the bus, the 8259's interrupts come
//!    in, failures are put in [`words`]. [`control`] gets a vCPU out of the guest from another thread.
//! 3. [`state`] turns [`arch::CpuState`] into what the kernel keeps, and back; [`cpuid`] the machine's processor model.
//! 4. [`probe`] finds out whether this /dev/kvm runs an ordinary kernel at all, or only pretends to.
//!
//! `unsafe` is used for the system calls that take addresses and for the page that kernel and vCPU share.

mod calls;
mod clocks;
mod control;
mod cpuid;
mod doorbells;
mod error;
mod interrupts;
mod probe;
mod routes;
mod slots;
mod source;
mod state;
mod system;
mod vcpu;
mod vm;
mod words;

use std::sync::{Arc, Mutex, PoisonError};

use arch::cpuid::{Model, Topology};
use memory::Ram;

pub use error::Error;
pub use probe::Verdict;

/// How the virtual processors are to be.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The vCPUs that the machine will have.
    pub cpus: Topology,
    /// Which processor they are.
    pub model: Model,
}

/// The engine: makes the vCPUs of one machine.
pub struct Kvm {
    vm: Arc<vm::Vm>,
    /// The first vCPU, if a probe has made it already.
    probed: Mutex<Option<vcpu::Vcpu>>,
}

impl Kvm {
    /// An engine for a machine with this RAM.
    pub fn new(ram: Ram, config: Config) -> Result<Self, Error> {
        let system = system::System::open()?;
        let vm = Arc::new(vm::Vm::new(&system, ram, config)?);
        let observer: Arc<dyn memory::MapObserver> = vm.clone();
        vm.ram.map().observe(Arc::downgrade(&observer));
        Ok(Kvm { vm, probed: Mutex::default() })
    }

    /// Whether this KVM runs a kernel in its processor, found out by running a small one for 50 ms at most. To be
    /// called before anything is in RAM, whose first pages it uses and leaves empty.
    pub fn probe(&self) -> Result<Verdict, Error> {
        let mut vcpu = vcpu::Vcpu::new(0, self.vm.clone(), Arc::new(probe::NoBus))?;
        let verdict = probe::run(&mut vcpu, &self.vm)?;
        *self.probed.lock().unwrap_or_else(PoisonError::into_inner) = Some(vcpu);
        Ok(verdict)
    }
}

impl engine::Engine for Kvm {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn create_vcpu(&self, id: u32, bus: Arc<dyn engine::Bus>) -> Result<Box<dyn engine::Vcpu>, engine::Error> {
        let probed = self.probed.lock().unwrap_or_else(PoisonError::into_inner).take_if(|_| id == 0);
        let vcpu = match probed {
            Some(vcpu) => vcpu.with_bus(bus)?,
            None => vcpu::Vcpu::new(id, self.vm.clone(), bus)?,
        };
        Ok(Box::new(vcpu))
    }

    fn interrupts(&self) -> Arc<dyn engine::Interrupts> {
        Arc::new(interrupts::Messages(self.vm.clone()))
    }

    fn clocks(&self) -> Result<engine::Clocks, engine::Error> {
        Ok(self.vm.clocks.read(&self.vm.fd)?)
    }

    fn set_clocks(&self, clocks: &engine::Clocks) -> Result<(), engine::Error> {
        Ok(self.vm.clocks.set(&self.vm.fd, clocks)?)
    }

    fn doorbells(&self) -> Option<Arc<dyn engine::Doorbells>> {
        self.vm.has_io_events.then(|| Arc::new(doorbells::IoEvents(self.vm.clone())) as Arc<dyn engine::Doorbells>)
    }
}
