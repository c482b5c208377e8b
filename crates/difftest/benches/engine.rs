//! What the engine's elementary operations cost, seen by a guest: a kernel of the test's own runs loops on one vCPU.
//!
//! `cargo bench -p difftest`, or with `-- tlb` those whose names have that. Each line has the median of [`SAMPLES`] runs and the
//! shortest. Loops repeat what is measured [`UNROLLED`] times a turn; times are for one. `RINGER_ENGINE=kvm` measures what
//! KVM takes instead. Time is that which the thread had a processor, so that other programs matter less.

use std::time::Duration;

use arch::registers::{pte, rflags};
use arch::{CpuState, msr};
use difftest::bare::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// How often a turn of a loop has what is measured.
const UNROLLED: u64 = 16;
/// Two pages that take the same entry of a direct-mapped TLB: 1 GiB apart.
const PAGES: [u64; 2] = [0x10_0000_0000, 0x10_4000_0000];
const HANDLER: u64 = CODE + 0x8000;
const TARGETS: u64 = CODE + 0x4000;

/// MSRs of the x2APIC.
const EOI: u32 = 0x80b;
const SPURIOUS: u32 = 0x80f;
const SELF_IPI: u32 = 0x83f;

/// Runs that are timed, and how long one takes at least.
const SAMPLES: usize = 15;
const RUN: Duration = Duration::from_millis(20);

type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// A machine whose processor runs a loop as often as RBP says, then exits.
struct Loop {
    machine: Machine,
    state: CpuState,
}

impl Loop {
    /// `set_up` runs once a run; the body, over and over, leaves RBP alone.
    fn new(set_up: Code, body: Code) -> Loop {
        let mut bare = Bare::new(8 << 20);
        for (i, va) in PAGES.into_iter().enumerate() {
            let page = bare.page();
            bare.map(va, page, pte::P | pte::W);
            bare.write_u64(page, PAGES[i ^ 1]);
            bare.write_u64(page + 8, va + 8);
        }
        // What calls lead to.
        bare.write(TARGETS, &[0xc3]);
        let interrupt = bare.kernel_code(HANDLER, |a| {
            a.push(rax)?;
            a.push(rcx)?;
            a.push(rdx)?;
            wrmsr(a, EOI, 0)?;
            a.pop(rdx)?;
            a.pop(rcx)?;
            a.pop(rax)?;
            a.mov(ebx, 1)?;
            a.iretq()
        });
        bare.gate(0x40, interrupt, Gate::default());
        let trap = bare.kernel_code(HANDLER + 0x100, |a| a.iretq());
        bare.gate(0x41, trap, Gate::default());
        let rip = bare.kernel_code(CODE, |a| {
            let mut turn = a.create_label();
            set_up(a)?;
            a.set_label(&mut turn)?;
            body(a)?;
            a.dec(rbp)?;
            a.jne(turn)?;
            a.out(u32::from(EXIT), al)
        });
        let state = bare.kernel_state(rip);
        Loop { machine: Machine::new(bare, 1), state }
    }

    fn run(&mut self, turns: u64) -> Duration {
        self.state.gpr[5] = turns.max(1);
        self.machine.vcpus[0].set_state(&self.state).expect("a valid state");
        let start = thread_time();
        let end = self.machine.run_for(Duration::from_secs(120));
        let time = thread_time() - start;
        let state = self.machine.state();
        assert_eq!((end, state.gpr[5]), (End::Exit, 0), "no end of {turns} turns: {:x?}", state.gpr);
        time
    }
}

/// What is to be measured: those whose names have one of the command line's words.
struct Selection(Vec<String>);

impl Selection {
    fn has(&self, name: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|word| name.contains(word.as_str()))
    }

    /// Measures one repetition of what the body has [`UNROLLED`] times.
    fn measure(&self, name: &str, set_up: Code, body: Code) {
        if !self.has(name) {
            return;
        }
        let mut guest = Loop::new(set_up, body);
        let mut turns = 16;
        while guest.run(turns) < RUN {
            turns *= 2;
        }
        report(name, turns * UNROLLED, || guest.run(turns));
    }
}

/// Prints what one of `repetitions` took.
fn report(name: &str, repetitions: u64, mut run: impl FnMut() -> Duration) {
    let mut times: Vec<_> = (0..SAMPLES).map(|_| run().as_secs_f64() * 1e9 / repetitions as f64).collect();
    times.sort_by(f64::total_cmp);
    println!("{name:<42} {:9.2} ns  (shortest {:.2})", times[SAMPLES / 2], times[0]);
}

fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes to a timespec that lives.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(result, 0, "the thread's clock");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn wrmsr(a: &mut CodeAssembler, register: u32, value: u32) -> Result<(), IcedError> {
    a.mov(ecx, register)?;
    a.mov(eax, value)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

/// Loads that depend on each other: a register, `[register]`, `[[register]]`...
fn chase(a: &mut CodeAssembler) -> Result<(), IcedError> {
    (0..UNROLLED).try_for_each(|_| a.mov(rax, qword_ptr(rax)))
}

fn memory(selection: &Selection) {
    selection.measure("TLB hit: a dependent load", |a| a.mov(rax, PAGES[0] + 8), chase);
    selection.measure("TLB miss: a dependent load", |a| a.mov(rax, PAGES[0]), chase);
}

fn branches(selection: &Selection) {
    let none: Code = |_| Ok(());
    selection.measure("block entry by direct link", none, |a| {
        (0..UNROLLED).try_for_each(|_| {
            let mut next = a.create_label();
            a.jmp(next)?;
            a.int3()?;
            a.set_label(&mut next)
        })
    });
    selection.measure("block entry by jump table", none, |a| {
        (0..UNROLLED).try_for_each(|_| {
            let mut next = a.create_label();
            a.lea(rax, ptr(next))?;
            a.jmp(rax)?;
            a.int3()?;
            a.set_label(&mut next)
        })
    });
    let target: Code = |a| a.mov(rbx, DIRECT + TARGETS);
    selection.measure("call by register and return", target, |a| {
        (0..UNROLLED).try_for_each(|_| {
            a.call(rbx)?;
            // The jump table tells apart what is 4 bytes apart.
            a.mov(edx, 1)
        })
    });
}

fn exits(selection: &Selection) {
    let none: Code = |_| Ok(());
    selection.measure("exit to the monitor: a port read", none, |a| (0..UNROLLED).try_for_each(|_| a.in_(al, 0x80)));
}

fn interrupts(selection: &Selection) {
    let none: Code = |_| Ok(());
    selection.measure("INT and IRET", none, |a| {
        (0..UNROLLED).try_for_each(|_| {
            a.int(0x41)?;
            a.mov(edx, 1)
        })
    });
    let on: Code = |a| {
        wrmsr(a, msr::APIC_BASE, 0xfee0_0d00)?;
        wrmsr(a, SPURIOUS, 0x1ff)?;
        a.sti()
    };
    selection.measure("interrupt: IPI to itself, EOI and IRET", on, |a| {
        (0..UNROLLED).try_for_each(|_| {
            // Until the handler has run, so that no two become one.
            let mut wait = a.create_label();
            a.xor(ebx, ebx)?;
            wrmsr(a, SELF_IPI, 0x40)?;
            a.set_label(&mut wait)?;
            a.test(ebx, ebx)?;
            a.je(wait)
        })
    });
}

/// Instructions that a fresh machine runs once; one in eight is a branch to the next.
const COLD: u64 = 40_000;

fn cold_code(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rbx, DIRECT + SCRATCH)?;
    for i in 0..COLD / 8 {
        // Constants differ, so that no block is a copy of another.
        let constant = (i * 0x9e37 + 0x1001) as i32 & 0x7fff_ffff;
        a.mov(rax, qword_ptr(rbx))?;
        a.add(rax, constant)?;
        a.lea(rdx, ptr(rax + rax * 4 + constant))?;
        a.mov(qword_ptr(rbx + 8), rdx)?;
        a.movzx(ecx, byte_ptr(rbx + 17))?;
        a.xor(edx, ecx)?;
        a.cmp(edx, constant)?;
        let mut next = a.create_label();
        a.jmp(next)?;
        a.int3()?;
        a.set_label(&mut next)?;
    }
    a.out(u32::from(EXIT), al)
}

/// A machine that has translated nothing yet.
fn cold() -> Machine {
    let bare = Bare::new(8 << 20);
    let rip = bare.kernel_code(0x40_0000, cold_code);
    let state = CpuState { rflags: rflags::FIXED, ..bare.kernel_state(rip) };
    Machine::with_state(bare, &state)
}

fn translation(selection: &Selection) {
    let name = "translation: an instruction's first run";
    if selection.has(name) {
        report(name, COLD, || {
            let mut machine = cold();
            let start = thread_time();
            assert_eq!(machine.run_for(Duration::from_secs(60)), End::Exit);
            thread_time() - start
        });
    }
}

fn main() {
    // Cargo adds options of its own.
    let selection = Selection(std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect());
    translation(&selection);
    memory(&selection);
    branches(&selection);
    exits(&selection);
    interrupts(&selection);
}
