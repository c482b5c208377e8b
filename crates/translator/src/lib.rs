//! The `translate` engine: a processor in software, by same-ISA binary translation.
//!
//! Guest and host speak the same instruction set. An *innocuous* guest instruction is re-encoded with its memory operand
//! replaced by a translated host address, and runs directly on the hardware; a *sensitive* one becomes emitted code or a
//! call into [`semantics`]. The data flow to follow:
//!
//! 1. [`run`] is the dispatcher: it takes pending events, finds or makes the block for the vCPU's RIP and mode, enters it.
//! 2. [`codegen`] turns guest bytes into a block of host code; [`cache`] keeps blocks, links them and drops them when
//!    the bytes they came from are written.
//! 3. [`entry`] is the border between Rust and emitted code, in assembly: registers are loaded and saved there.
//! 4. Emitted code finds memory through [`tlb`]; misses, MMIO and odd accesses come to [`access`], which asks [`mmu`].
//!    What is known of address spaces that are not the current one waits in [`spaces`].
//! 5. Faults and sensitive instructions end in [`semantics`] and [`deliver`]; interrupts come from [`apic`].
//!
//! `unsafe` is used where host memory and host code are touched: the emitter, the entry code, signal handling and guest
//! RAM. `semantics`, `mmu`, `deliver` and `apic` work on [`Vcpu`] as ordinary data.

pub mod access;
pub mod apic;
pub mod body;
pub mod cache;
pub mod code_memory;
pub mod codegen;
pub mod cpu;
pub mod deliver;
pub mod descriptor;
pub mod entry;
pub mod events;
mod ferr;
pub mod fetches;
pub mod flush;
pub mod host;
pub mod interrupts;
pub mod invalidation;
pub mod jumps;
pub mod large_pages;
pub mod mmu;
pub mod mode;
pub mod native;
pub mod perf_map;
pub mod phys;
mod record;
pub mod rewritten;
pub mod run;
pub mod semantics;
pub mod shared;
mod signals;
pub mod smm;
mod snippets;
pub mod spaces;
pub mod stats;
pub mod task;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod testing_native;
pub mod time;
pub mod tlb;
mod translate;
pub mod vcpu;
pub mod wait;
pub mod xstate;

pub use cpu::Vcpu;
pub use direct::host_is_amd;

use std::io;
use std::sync::Arc;

use memory::Ram;

/// How the virtual processors are to be.
#[derive(Clone, Debug)]
pub struct Config {
    /// The vCPUs that the machine will have.
    pub cpus: arch::cpuid::Topology,
    /// Which processor they are.
    pub model: arch::cpuid::Model,
    /// Bytes of host code that each vCPU may keep.
    pub translation_cache: usize,
    /// Name emitted code for `perf` in `/tmp/perf-PID.map`.
    pub perf_map: bool,
    /// When programs run directly instead of translated.
    pub direct: native::Mode,
    /// All code looks at its bytes itself, as what is [rewritten] all the time does: for tests of that.
    pub checked: bool,
    /// Print counts on stderr when a vCPU stops.
    pub stats: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            cpus: arch::cpuid::Topology::default(),
            model: arch::cpuid::Model::default(),
            translation_cache: code_memory::DEFAULT_SIZE,
            perf_map: false,
            direct: native::Mode::default(),
            checked: false,
            stats: false,
        }
    }
}

/// The engine: makes the vCPUs of one machine.
pub struct Translator {
    machine: Arc<shared::Machine>,
    /// Kept alive for the tracker and the memory map, which refer to it weakly.
    _device_changes: Arc<invalidation::DeviceChanges>,
}

impl Translator {
    /// An engine for a machine with this RAM.
    pub fn new(ram: Ram, config: Config) -> Result<Self, engine::Error> {
        let unsupported = |why: String| engine::Error::Unsupported { engine: "translate", why };
        if host::xcr0() == 0 {
            // Vector registers go from the guest's to the monitor's by it.
            let why = "its processor has no XSAVE (Intel's and AMD's have it since 2011; a virtual machine's by its CPU model)";
            return Err(unsupported(why.into()));
        }
        let time = time::Time::new();
        let cpuid = semantics::cpuid::model(&config, time.tsc_khz()).map_err(|e| unsupported(e.to_string()))?;
        let machine = Arc::new(shared::Machine::new(ram, config, cpuid, time));
        let device_changes = Arc::new(invalidation::DeviceChanges(machine.clone()));
        let watcher: Arc<dyn memory::CodeWatcher> = device_changes.clone();
        machine.tracker.watch(Arc::downgrade(&watcher));
        let observer: Arc<dyn memory::MapObserver> = device_changes.clone();
        machine.ram.map().observe(Arc::downgrade(&observer));
        Ok(Translator { machine, _device_changes: device_changes })
    }

    /// How often a program was entered directly until the vCPUs last stopped.
    pub fn entered_directly(&self) -> u64 {
        self.machine.entered_directly.load(std::sync::atomic::Ordering::Relaxed)
    }
}

impl engine::Engine for Translator {
    fn name(&self) -> &'static str {
        "translate"
    }

    fn create_vcpu(&self, id: u32, bus: Arc<dyn engine::Bus>) -> Result<Box<dyn engine::Vcpu>, engine::Error> {
        self.machine.set_bus(bus);
        let host = |source: io::Error| engine::Error::Host { what: format!("can't make vCPU {id}"), source };
        Ok(Box::new(vcpu::Handle(vcpu::VcpuBox::new(id, self.machine.clone()).map_err(host)?)))
    }

    fn interrupts(&self) -> Arc<dyn engine::Interrupts> {
        Arc::new(interrupts::InterruptLines(self.machine.clone()))
    }

    fn has_smm(&self) -> bool {
        true
    }

    fn clocks(&self) -> Result<engine::Clocks, engine::Error> {
        Ok(self.machine.time.clocks())
    }

    fn set_clocks(&self, clocks: &engine::Clocks) -> Result<(), engine::Error> {
        self.machine.time.set_clocks(clocks);
        Ok(())
    }
}
