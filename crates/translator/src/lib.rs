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
//! 5. Faults and sensitive instructions end in [`semantics`] and [`deliver`]; interrupts come from [`apic`].
//!
//! `unsafe` is used where host memory and host code are touched: the emitter, the entry code, signal handling and guest
//! RAM. `semantics`, `mmu`, `deliver` and `apic` work on [`Vcpu`] as ordinary data.

pub mod apic;
pub mod cache;
pub mod cpu;
pub mod deliver;
pub mod descriptor;
pub mod entry;
pub mod events;
pub mod flush;
pub mod host;
pub mod interrupts;
pub mod mmu;
pub mod phys;
pub mod run;
pub mod semantics;
pub mod shared;
pub mod task;
#[cfg(test)]
mod testing;
pub mod time;
pub mod tlb;
pub mod wait;
pub mod xstate;

pub use cpu::Vcpu;

/// How the virtual processors are to be.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// How many vCPUs the machine will have, 1 or more.
    pub cpus: u32,
    /// Which processor they are.
    pub model: arch::cpuid::Model,
}
