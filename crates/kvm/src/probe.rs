//! Does this /dev/kvm run an ordinary kernel?
//!
//! Some hosts have a /dev/kvm without hardware virtualization behind it (paravirtual kinds such as PVM): guests that are
//! made for it run well, but of any other kernel every instruction is emulated, a thousand times slower than it should
//! be, until one comes that can't be. Neither the device nor its capabilities tell. So a small guest does what kernels
//! do, at CPL 0 with paging on: a loop of plain instructions; then CR3, MSRs, SWAPGS, INVLPG, IRET, vector registers.
//! What counts is how long the loop takes by the time-stamp counter, at best of some times, compared with the same loop
//! here: about as long in hardware (also where that is itself emulated), hundreds of times as long where KVM emulates.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use arch::registers::{cr0, cr4, efer, gpr, pte, rflags};
use arch::{CpuState, DescriptorTable, Segment, msr};
use engine::{Bus, Exit, Vcpu as _, VcpuControl};
use memory::vm_memory::{Bytes, GuestAddress};

use crate::Error;
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// What the probe says of a host's KVM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Guests run in the processor.
    Runs,
    /// They don't; in words that follow "because".
    DoesNotRun(String),
}

/// Times round the loop of plain instructions, two in each; and how often that loop is timed.
const PLAIN: u32 = 4000;
const ROUNDS: u32 = 8;
/// Times round the loop of privileged ones.
const PRIVILEGED: u32 = 10;
/// How many times as long as here is too long.
const FACTOR: u64 = 50;
/// How long it may take at once, and until a busy host has had enough time for it.
const LONGEST: Duration = Duration::from_millis(40);
const PATIENCE: Duration = Duration::from_secs(5);

/// Places in the guest's first 64 KiB.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x4000;
const CODE: u64 = 0x5000;
const STACK_TOP: u64 = 0x7000;
const END: u64 = 0x1_0000;
const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;

/// The guest, in 64-bit mode. R8D counts a loop down, R9D rounds of the privileged loop, R10D those of the plain one; R12
/// is the least time of a round.
#[rustfmt::skip]
const GUEST: &[u8] = &[
    0x0f, 0x31,                         // round: rdtsc
    0x48, 0xc1, 0xe2, 0x20,             // shl rdx, 32
    0x48, 0x09, 0xd0,                   // or rax, rdx
    0x49, 0x89, 0xc3,                   // mov r11, rax
    0x41, 0xb8, 0xa0, 0x0f, 0x00, 0x00, // mov r8d, PLAIN
    0x41, 0xff, 0xc8,                   // plain: dec r8d
    0x75, 0xfb,                         // jnz plain
    0x0f, 0x31,                         // rdtsc
    0x48, 0xc1, 0xe2, 0x20,             // shl rdx, 32
    0x48, 0x09, 0xd0,                   // or rax, rdx
    0x4c, 0x29, 0xd8,                   // sub rax, r11
    0x4c, 0x39, 0xe0,                   // cmp rax, r12
    0x4c, 0x0f, 0x42, 0xe0,             // cmovb r12, rax
    0x41, 0xff, 0xca,                   // dec r10d
    0x75, 0xd1,                         // jnz round
    0x0f, 0x20, 0xd8,                   // privileged: mov rax, cr3
    0x0f, 0x22, 0xd8,                   // mov cr3, rax
    0xb9, 0x02, 0x01, 0x00, 0xc0,       // mov ecx, KERNEL_GS_BASE
    0x31, 0xc0,                         // xor eax, eax
    0x31, 0xd2,                         // xor edx, edx
    0x0f, 0x30,                         // wrmsr
    0x0f, 0x32,                         // rdmsr
    0x0f, 0x01, 0xf8,                   // swapgs
    0x0f, 0x01, 0xf8,                   // swapgs
    0x0f, 0x01, 0x3c, 0x24,             // invlpg [rsp]
    0x48, 0x89, 0xe0,                   // mov rax, rsp
    0x6a, 0x10,                         // push DATA_SELECTOR
    0x50,                               // push rax
    0x9c,                               // pushfq
    0x6a, 0x08,                         // push CODE_SELECTOR
    0x48, 0x8d, 0x15, 0x03, 0x00, 0x00, 0x00, // lea rdx, [next]
    0x52,                               // push rdx
    0x48, 0xcf,                         // iretq
    0x41, 0xff, 0xc9,                   // next: dec r9d
    0x75, 0xcb,                         // jnz privileged
    0xdb, 0xe3,                         // fninit
    0x66, 0x0f, 0xef, 0xc0,             // pxor xmm0, xmm0
    0xe6, 0xf4,                         // out 0xf4, al: done
    0xf4,                               // hlt
];

/// A bus on which nothing answers: what the vCPU has until the machine takes it.
pub struct NoBus;

impl Bus for NoBus {
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

/// Stops the vCPU at the guest's end, and notes that it was reached.
struct ProbeBus {
    vcpu: Arc<dyn VcpuControl>,
    done: Arc<AtomicBool>,
}

impl Bus for ProbeBus {
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u16, _: &[u8]) {
        self.done.store(true, Ordering::SeqCst);
        self.vcpu.stop();
    }
    fn acknowledge_pic(&self) -> u8 {
        0xff
    }
    fn end_of_interrupt(&self, _: u8) {}
}

fn state() -> CpuState {
    let mut state = CpuState::reset();
    let data = Segment::flat_data(DATA_SELECTOR, 0);
    state.segments = [data, Segment::flat_code(CODE_SELECTOR, true, 0), data, data, data, data];
    state.gdtr = DescriptorTable { base: GDT, limit: 0x17 };
    state.cr0 = cr0::PE | cr0::ET | cr0::NE | cr0::MP | cr0::WP | cr0::PG;
    state.cr3 = PML4;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    state.msrs = vec![(msr::EFER, efer::LME | efer::LMA)];
    state.rip = CODE;
    state.rflags = rflags::FIXED;
    state.gpr = [0; 16];
    state.gpr[gpr::R9] = PRIVILEGED.into();
    state.gpr[gpr::R10] = ROUNDS.into();
    state.gpr[gpr::R12] = u64::MAX;
    state.gpr[gpr::RSP] = STACK_TOP;
    state
}

/// Puts the guest into RAM.
fn load(vm: &Vm) -> Result<(), Error> {
    let write = |at: u64, bytes: &[u8]| {
        let written = vm.ram.view().write_slice(bytes, GuestAddress(at));
        written.map_err(|e| Error::State(format!("the probe's guest is not in RAM: {e}")))
    };
    let bits = pte::P | pte::W;
    write(PML4, &(PDPT | bits).to_le_bytes())?;
    write(PDPT, &(DIRECTORY | bits).to_le_bytes())?;
    write(DIRECTORY, &(bits | pte::PS).to_le_bytes())?;
    write(GDT + u64::from(CODE_SELECTOR), &0x00af_9b00_0000_ffffu64.to_le_bytes())?;
    write(GDT + u64::from(DATA_SELECTOR), &0x00cf_9300_0000_ffffu64.to_le_bytes())?;
    write(CODE, GUEST)
}

/// Runs the guest on a vCPU that has nothing to do yet.
pub fn run(vcpu: &mut Vcpu, vm: &Vm) -> Result<Verdict, Error> {
    load(vm)?;
    let control = vcpu.control();
    let done = Arc::new(AtomicBool::new(false));
    vcpu.set_bus(Arc::new(ProbeBus { vcpu: control.clone(), done: done.clone() }));
    vcpu.replace_state(&state())?;
    let (begin, here) = (Instant::now(), outside().max(1));
    let (exit, there) = loop {
        let exit = watched(vcpu, &control);
        let there = vcpu.export()?.gpr[gpr::R12];
        // A guest that was stopped before its share of the processor let it finish one round has shown nothing yet; with
        // one that was as fast as here, it is worth the wait for its end.
        let shown = done.load(Ordering::SeqCst) || there != u64::MAX && there / here >= FACTOR;
        if exit != Exit::Stopped || shown || begin.elapsed() > PATIENCE {
            break (exit, there);
        }
    };
    memory::discard(vm.ram.view(), 0, END)
        .map_err(|source| Error::Call { what: "free the probe's pages".into(), source })?;
    tracing::debug!(here, there, ?exit, "the probe of KVM: ticks of the same loop");
    let slow = there.checked_div(here).filter(|times| there != u64::MAX && *times >= FACTOR);
    let emulates = slow.map(|times| format!("it emulates kernels instead of running them, {times} times slower here"));
    Ok(match (exit, emulates) {
        (Exit::Failed(why), Some(emulates)) => Verdict::DoesNotRun(format!("{emulates}; and {why}")),
        (_, Some(emulates)) => Verdict::DoesNotRun(emulates),
        (Exit::Failed(why), None) => Verdict::DoesNotRun(why),
        (Exit::TripleFault, None) => Verdict::DoesNotRun("it can't do what every kernel does at its start".into()),
        (Exit::Stopped, None) if done.load(Ordering::SeqCst) => Verdict::Runs,
        (Exit::Stopped, None) => Verdict::DoesNotRun("the host has had no time to show that it runs kernels".into()),
    })
}

/// The time of the guest's plain loop outside a guest.
fn outside() -> u64 {
    let once = || {
        // SAFETY: RDTSC is there on every x86-64 processor, and Linux lets programs use it; the loop changes nothing
        // but a register of its own and flags.
        unsafe {
            let begin = std::arch::x86_64::_rdtsc();
            std::arch::asm!("2: dec {count:e}", "jnz 2b", count = inout(reg) PLAIN => _, options(nomem, nostack));
            std::arch::x86_64::_rdtsc().wrapping_sub(begin)
        }
    };
    (0..ROUNDS).map(|_| once()).min().unwrap_or_default()
}

/// Runs the vCPU, and stops it when it has taken too long.
fn watched(vcpu: &mut Vcpu, control: &Arc<dyn VcpuControl>) -> Exit {
    let (finished, waiting) = mpsc::channel::<()>();
    let watchdog = control.clone();
    let thread = wake::thread("kvm-probe").spawn(move || {
        // Emulated, the guest would take much longer still: to wait for all of it shows nothing more.
        if waiting.recv_timeout(LONGEST) == Err(mpsc::RecvTimeoutError::Timeout) {
            watchdog.stop();
        }
    });
    let Ok(thread) = thread else {
        return Exit::Failed("can't start a thread".into());
    };
    let exit = vcpu.run();
    drop(finished);
    // It has nothing to panic for.
    let _ = thread.join();
    exit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_jumps_lead_to_their_labels() {
        let at = |bytes: &[u8]| GUEST.windows(bytes.len()).position(|w| w == bytes).unwrap() as i64;
        let target = |from: i64| from + 2 + i64::from(GUEST[from as usize + 1] as i8);
        assert_eq!(target(at(&[0x75, 0xd1])), 0);
        assert_eq!(target(at(&[0x75, 0xfb])), at(&[0x41, 0xff, 0xc8]));
        let count = at(&[0x41, 0xb8]) as usize + 2;
        assert_eq!(GUEST[count..count + 4], PLAIN.to_le_bytes());
        assert_eq!(target(at(&[0x75, 0xcb])), at(&[0x0f, 0x20, 0xd8]));
        let lea = at(&[0x48, 0x8d, 0x15]);
        assert_eq!(lea + 7 + i64::from(GUEST[lea as usize + 3]), at(&[0x41, 0xff, 0xc9]));
    }
}
