//! A vCPU's state between engines: what goes in comes out, and a processor that moves in mid-flight goes on as if it had
//! not.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arch::state::Activity;
use arch::{CpuState, msr};
use difftest::bare::*;
use difftest::engines;
use difftest::rng::Rng;
use engine::{Bus, Engine, Exit, Vcpu, VcpuControl};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Registers of the local APIC that are not state: id, version, processor priority, current count.
const DERIVED: [usize; 4] = [0x02, 0x03, 0x0a, 0x39];
const XSTATE_BV: usize = 512;
/// Where the components x87, SSE and AVX are in the area. The last's place is the same on all processors.
const X87: [std::ops::Range<usize>; 2] = [0..24, 32..160];
const SSE: std::ops::Range<usize> = 160..416;
const AVX: std::ops::Range<usize> = 576..832;

/// The state in a form in which equal states are equal: MSRs in order, nothing derived, components that are in their
/// initial state with its bytes.
fn canonical(mut state: CpuState) -> CpuState {
    state.msrs.sort_unstable();
    for register in DERIVED {
        state.apic[16 * register..16 * register + 4].fill(0);
    }
    if state.msrs.iter().any(|(number, value)| *number == msr::APIC_BASE && value & 1 << 10 != 0) {
        state.apic[16 * 0x0d..16 * 0x0d + 4].fill(0); // the logical id follows from the id
    }
    state.xsave.resize(832, 0);
    let in_use = state.xsave[XSTATE_BV];
    for (bit, ranges) in [(1, &X87[..]), (2, &[SSE][..]), (4, &[AVX][..])] {
        if in_use & bit == 0 {
            ranges.iter().for_each(|range| state.xsave[range.clone()].fill(0));
            if bit == 1 {
                state.xsave[..2].copy_from_slice(&0x37fu16.to_le_bytes());
            }
        }
    }
    state.xsave[28..32].fill(0); // MXCSR_MASK
    state.xsave[416..512].fill(0); // not used
    state.xsave[XSTATE_BV..576].fill(0);
    state
}

fn random_state(rng: &mut Rng, bare: &Bare) -> CpuState {
    let mut state = bare.kernel_state(rng.next_u64());
    state.gpr.iter_mut().for_each(|register| *register = rng.next_u64());
    state.rip = DIRECT + rng.next_u64() % 0x10_0000;
    state.rflags = 2 | rng.next_u64() & 0xcd5;
    state.cr2 = rng.next_u64();
    state.cr8 = rng.next_u64() & 0xf;
    state.dr = [0; 4]
        .map(|_| rng.next_u64() >> 17)
        .into_iter()
        .chain([0xffff_0ff0, 0x400])
        .collect::<Vec<_>>()
        .try_into()
        .unwrap();
    state.segments[4].base = rng.next_u64() >> 17;
    state.segments[5].base = rng.next_u64() >> 17 | 0xffff_8000_0000_0000;
    for number in [msr::STAR, msr::KERNEL_GS_BASE, msr::LSTAR, msr::SYSENTER_ESP, msr::SYSENTER_EIP, msr::SYSENTER_CS] {
        // Zero is where they are after reset, and canonical and of 32 bits is what all processors take.
        state.msrs.push((number, 1 + (rng.next_u64() >> 33)));
    }
    state.msrs.push((msr::PAT, 0x0007_0106_0007_0406));
    state.msrs.push((msr::MTRR_DEF_TYPE, 0xc06));
    state.msrs.push((msr::MTRR_PHYS_BASE0 + 1, 0x800));
    let mut xsave = vec![0; 832];
    let in_use = rng.next_u64() as u8 & 7 & state.xcr0 as u8;
    X87[1].clone().chain(SSE).chain(AVX).for_each(|at| xsave[at] = rng.next_u64() as u8);
    // ST registers have 80 bits in 128.
    (0..8).for_each(|n| xsave[32 + 16 * n + 10..48 + 16 * n].fill(0));
    xsave[..2].copy_from_slice(&(0x37f & !(rng.next_u64() as u16 & 0x3f)).to_le_bytes());
    xsave[2..4].copy_from_slice(&(rng.next_u64() as u16 & 0x3800).to_le_bytes());
    xsave[4] = rng.next_u64() as u8;
    xsave[24..28].copy_from_slice(&(0x1f80 | rng.next_u64() as u32 & 0x6000).to_le_bytes());
    xsave[XSTATE_BV] = in_use;
    state.xsave = xsave;
    let x2apic = rng.next_u64() & 1 != 0;
    state.msrs.push((msr::APIC_BASE, if x2apic { 0xfee0_0d00 } else { 0xfee0_0900 }));
    state.msrs.retain(|(number, value)| *number != msr::APIC_BASE || *value != 0xfee0_0900);
    state.apic = vec![0; 1024];
    let mut set = |register: usize, value: u32| state.apic[16 * register..][..4].copy_from_slice(&value.to_le_bytes());
    set(0x08, (state.cr8 as u32) << 4);
    set(0x0d, if x2apic { 1 } else { (rng.next_u64() as u32) << 24 });
    set(0x0e, u32::MAX);
    set(0x0f, 0x1ff);
    for lvt in 0x32..=0x37 {
        set(lvt, (1 << 16) | (0x30 + lvt as u32));
    }
    // In service below what is requested, as it would be.
    set(0x12, 1 << (rng.next_u64() % 32));
    set(0x24, rng.next_u64() as u32);
    set(0x1c, rng.next_u64() as u32);
    set(0x3e, 0xb);
    state.activity = if rng.next_u64() & 1 == 0 { Activity::Running } else { Activity::Halted };
    state.nmi_pending = rng.next_u64() & 1 == 0;
    state.nmi_blocked = rng.next_u64() & 1 == 0;
    state.interrupt_shadow = state.activity == Activity::Running && rng.next_u64() & 1 == 0;
    state.pending_exception = match rng.next_u64() % 4 {
        0 if state.activity == Activity::Running => Some((14, Some(rng.next_u64() as u32 & 7))),
        1 if state.activity == Activity::Running => Some((6, None)),
        2 if state.activity == Activity::Running => Some((0x30, None)),
        _ => None,
    };
    state
}

/// What is not the same, by field; of byte arrays the places.
fn differences(is: &CpuState, expected: &CpuState) -> String {
    let bytes = |name: &str, is: &[u8], expected: &[u8]| {
        let places = is.iter().zip(expected).enumerate().filter(|(_, (a, b))| a != b);
        places.map(|(at, (a, b))| format!("{name}[{at:#x}] {a:#x} {b:#x}; ")).collect::<String>()
    };
    let mut out = bytes("xsave", &is.xsave, &expected.xsave) + &bytes("apic", &is.apic, &expected.apic);
    let empty = |state: &CpuState| CpuState { xsave: Vec::new(), apic: Vec::new(), ..state.clone() };
    let (is, expected) = (empty(is), empty(expected));
    if is != expected {
        out += &format!("{is:x?}\n{expected:x?}");
    }
    out
}

#[test]
fn a_state_comes_out_of_every_engine_as_it_went_in() {
    let bare = Bare::new(4 << 20);
    let nothing: Arc<dyn Bus> = Arc::new(Port::default());
    for engine in engines::all(&bare.ram, 1) {
        let mut vcpu = engine.create_vcpu(0, nothing.clone()).expect("a vCPU");
        let mut rng = Rng::new(1);
        for round in 0..300 {
            let state = random_state(&mut rng, &bare);
            vcpu.set_state(&state).unwrap_or_else(|e| panic!("round {round} on {}: {e}", engine.name()));
            let (is, expected) = (canonical(vcpu.state()), canonical(state));
            let differs = differences(&is, &expected);
            assert!(differs.is_empty(), "round {round} on {}: is, expected: {differs}", engine.name());
        }
    }
}

/// The bus of one machine with several engines: what a guest writes to any port stops it.
#[derive(Default)]
struct Stops {
    done: AtomicBool,
    vcpus: Mutex<Vec<Arc<dyn VcpuControl>>>,
}

impl Stops {
    fn stop(&self) {
        self.vcpus.lock().unwrap().iter().for_each(|vcpu| vcpu.stop());
    }
}

impl Bus for Stops {
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0x5a);
    }
    fn pio_write(&self, port: u16, _: &[u8]) {
        if port == EXIT {
            self.done.store(true, Ordering::SeqCst);
            self.stop();
        }
    }
    fn acknowledge_pic(&self) -> u8 {
        0xff
    }
    fn end_of_interrupt(&self, _: u8) {}
}

const HANDLER: u64 = CODE + 0x1000;
const DATA: u64 = DIRECT + SCRATCH;

fn wrmsr(a: &mut CodeAssembler, register: u32, value: u32) -> Result<(), IcedError> {
    a.mov(ecx, register)?;
    a.mov(eax, value)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

/// Computes with everything that a processor has to remember, `rounds` times; then stops by a breakpoint's stub.
fn program(bare: &mut Bare, rounds: u32) -> CpuState {
    let handler = bare.kernel_code(HANDLER, |a| {
        a.push(rax)?;
        a.push(rcx)?;
        a.push(rdx)?;
        a.mov(rdx, DATA)?;
        a.inc(qword_ptr(rdx + 64))?;
        wrmsr(a, 0x80b, 0)?;
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()
    });
    bare.gate(0x41, handler, Gate::default());
    let rip = bare.kernel_code(CODE, |a| {
        a.mov(ecx, msr::APIC_BASE)?;
        a.mov(eax, 0xfee0_0d00u32)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        wrmsr(a, 0x80f, 0x1ff)?;
        a.mov(rbp, DATA)?;
        a.mov(r15d, rounds)?;
        a.mov(rbx, 0x9e37_79b9_7f4a_7c15u64)?;
        a.movq(xmm3, rbx)?;
        a.pxor(xmm5, xmm5)?;
        a.fninit()?;
        a.fld1()?;
        a.sti()?;
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.imul_2(rbx, r15)?;
        a.rol(rbx, 13)?;
        a.adc(rbx, 0x0123_4567)?;
        a.pushfq()?;
        a.pop(rsi)?;
        a.and(rsi, 0xcd5)?;
        a.add(r8, rsi)?;
        // Vector and x87 registers across rounds.
        a.movq(xmm4, rbx)?;
        a.paddq(xmm5, xmm4)?;
        a.pxor(xmm3, xmm5)?;
        a.fld1()?;
        a.faddp(st1, st0)?;
        // MSRs, debug and control registers, segment bases.
        a.mov(ecx, msr::KERNEL_GS_BASE)?;
        a.rdmsr()?;
        a.add(eax, ebx)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.swapgs()?;
        a.rdgsbase(rdi)?;
        a.add(r9, rdi)?;
        a.mov(dr0, rdi)?;
        a.mov(rsi, dr0)?;
        a.add(r10, rsi)?;
        a.mov(rsi, cr2)?;
        a.add(rsi, r15)?;
        a.mov(cr2, rsi)?;
        // Memory and a port.
        a.xor(qword_ptr(rbp), rbx)?;
        a.in_(eax, dx)?;
        a.add(r11, rax)?;
        // An interrupt now and then.
        let mut none = a.create_label();
        a.test(r15d, 63)?;
        a.jnz(none)?;
        wrmsr(a, 0x83f, 0x41)?;
        a.nop()?;
        a.set_label(&mut none)?;
        a.dec(r15d)?;
        a.jnz(top)?;
        a.movq(r12, xmm3)?;
        a.fistp(qword_ptr(rbp + 8))?;
        a.mov(r13, qword_ptr(rbp + 8))?;
        a.mov(r14, cr2)?;
        a.mov(rsi, qword_ptr(rbp))?;
        a.mov(rdi, qword_ptr(rbp + 64))?;
        a.int3()
    });
    bare.kernel_state(rip)
}

/// A vCPU and the engine that it is of.
struct Processor {
    engine: Arc<dyn Engine>,
    vcpu: Box<dyn Vcpu>,
}

/// How a run over several engines ended.
struct Run {
    gpr: [u64; 16],
    moves: u32,
    /// The most time that clocks may have stood still, because they were being moved.
    moving: Duration,
}

/// Runs a program on these in turn, on each for a random while, the clocks with it.
fn run(bare: &Bare, bus: &Stops, start: &CpuState, on: &mut [&mut Processor], seed: u64) -> Run {
    bare.write(SCRATCH, &[0; 0x200]);
    bus.done.store(false, Ordering::SeqCst);
    *bus.vcpus.lock().unwrap() = on.iter().map(|processor| processor.vcpu.control()).collect();
    let mut rng = Rng::new(seed);
    let (mut state, mut moves, mut moving) = (start.clone(), 0, Duration::ZERO);
    loop {
        let at = moves as usize % on.len();
        if moves > 0 {
            let begin = Instant::now();
            let clocks = on[(moves as usize - 1) % on.len()].engine.clocks().expect("clocks that can be read");
            on[at].engine.set_clocks(&clocks).expect("clocks that can be set");
            moving += begin.elapsed();
        }
        let (stop, Processor { engine, vcpu }) = (on.len() > 1 && moves < 60, &mut *on[at]);
        vcpu.set_state(&state).unwrap_or_else(|e| panic!("{} after {moves} moves: {e}", engine.name()));
        let (pause, control) = (Duration::from_micros(100 + rng.below(3000)), vcpu.control());
        let exit = std::thread::scope(|scope| {
            if stop {
                scope.spawn(move || {
                    std::thread::sleep(pause);
                    control.stop();
                });
            }
            vcpu.run()
        });
        assert_eq!(exit, Exit::Stopped, "{} after {moves} moves", engine.name());
        state = vcpu.state();
        if bus.done.load(Ordering::SeqCst) {
            return Run { gpr: state.gpr, moves, moving };
        }
        moves += 1;
    }
}

/// A vCPU on each engine of this host. Made twice, there is something to move between on every host.
fn processors(bare: &Bare, bus: &Arc<Stops>) -> Vec<Processor> {
    let processor = |engine: Arc<dyn Engine>| {
        let vcpu = engine.create_vcpu(0, bus.clone()).expect("a vCPU");
        Processor { engine, vcpu }
    };
    engines::all(&bare.ram, 1).into_iter().map(processor).collect()
}

#[test]
fn a_processor_that_moves_in_mid_flight_goes_on_as_if_it_had_not() {
    let mut bare = Bare::new(4 << 20);
    let start = program(&mut bare, 20_000);
    let bus = Arc::new(Stops::default());
    let (mut one, mut two) = (processors(&bare, &bus), processors(&bare, &bus));
    let alone: Vec<_> = one.iter_mut().map(|on| run(&bare, &bus, &start, &mut [on], 0).gpr).collect();
    assert!(alone.iter().all(|registers| *registers == alone[0]), "{alone:x?}");
    let mut all = 0;
    for (seed, from) in (1..).zip(&mut one) {
        for to in &mut two {
            let Run { gpr, moves, .. } = run(&bare, &bus, &start, &mut [from, to], seed);
            println!("{} to {} and back: {moves} moves", from.engine.name(), to.engine.name());
            assert_eq!(gpr, alone[0], "{} and {} after {moves} moves", from.engine.name(), to.engine.name());
            all += moves;
        }
    }
    assert!(all > 0);
}

/// Variables of [`timekeeper`]: the last reading of the counter and of the paravirtual clock, how often either went back,
/// interrupts of the timer, how often one came too early, its deadline, the first readings, the counter's rate.
const LAST_TSC: i32 = 0;
const LAST_CLOCK: i32 = 8;
const WENT_BACK: i32 = 16;
const TICKS: i32 = 24;
const EARLY: i32 = 32;
const DEADLINE: i32 = 40;
const FIRST_TSC: i32 = 48;
const FIRST_CLOCK: i32 = 56;
const KHZ: i32 = 64;
/// The clock's structure in guest memory.
const CLOCK: u64 = SCRATCH + 0x100;
/// What the guest moves its counter by.
const ADJUSTED: u32 = 0x1234;
const TIMES: u32 = 40_000;
const TIMES_PER_TICK: u32 = 256;

/// RAX = the counter; clobbers RDX.
fn counter(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)
}

/// Counts RAX at [`WENT_BACK`] if it is less than what is at `last`, and puts it there.
fn compare(a: &mut CodeAssembler, last: i32) -> Result<(), IcedError> {
    let mut fine = a.create_label();
    a.cmp(rax, qword_ptr(rbp + last))?;
    a.jae(fine)?;
    a.inc(qword_ptr(rbp + WENT_BACK))?;
    a.set_label(&mut fine)?;
    a.mov(qword_ptr(rbp + last), rax)
}

/// RDI = the counter, RAX = the paravirtual clock at the same moment; clobbers RCX, RDX and RSI.
fn clocks(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut again, mut left, mut shifted) = (a.create_label(), a.create_label(), a.create_label());
    let place = (CLOCK - SCRATCH) as i32;
    a.set_label(&mut again)?;
    a.mov(esi, dword_ptr(rbp + place))?;
    counter(a)?;
    a.mov(rdi, rax)?;
    a.sub(rax, qword_ptr(rbp + place + 8))?;
    a.movsx(ecx, byte_ptr(rbp + place + 28))?;
    a.test(ecx, ecx)?;
    a.jns(left)?;
    a.neg(ecx)?;
    a.shr(rax, cl)?;
    a.jmp(shifted)?;
    a.set_label(&mut left)?;
    a.shl(rax, cl)?;
    a.set_label(&mut shifted)?;
    a.mov(ecx, dword_ptr(rbp + place + 24))?;
    a.mul(rcx)?;
    a.shrd(rax, rdx, 32)?;
    a.add(rax, qword_ptr(rbp + place + 16))?;
    // The structure may have been written anew meanwhile.
    a.cmp(esi, dword_ptr(rbp + place))?;
    a.jne(again)
}

/// Reads its clocks, and sleeps now and then until the timer's deadline.
fn timekeeper(bare: &mut Bare) -> CpuState {
    let handler = bare.kernel_code(HANDLER, |a| {
        a.push(rax)?;
        a.push(rcx)?;
        a.push(rdx)?;
        let mut late = a.create_label();
        counter(a)?;
        a.cmp(rax, qword_ptr(rbp + DEADLINE))?;
        a.jae(late)?;
        a.inc(qword_ptr(rbp + EARLY))?;
        a.set_label(&mut late)?;
        a.inc(qword_ptr(rbp + TICKS))?;
        wrmsr(a, 0x80b, 0)?;
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()
    });
    bare.gate(0x41, handler, Gate::default());
    let rip = bare.kernel_code(CODE, |a| {
        a.mov(rbp, DATA)?;
        wrmsr(a, msr::APIC_BASE, 0xfee0_0d00)?;
        wrmsr(a, 0x80f, 0x1ff)?;
        wrmsr(a, 0x832, 0x4_0041)?; // TSC deadline
        a.mov(eax, 0x4000_0010)?;
        a.cpuid()?;
        a.mov(qword_ptr(rbp + KHZ), rax)?;
        a.mov(ecx, msr::TSC_ADJUST)?;
        a.xor(eax, eax)?;
        a.mov(edx, ADJUSTED)?;
        a.wrmsr()?;
        wrmsr(a, msr::KVM_SYSTEM_TIME_NEW, CLOCK as u32 | 1)?;
        clocks(a)?;
        a.mov(qword_ptr(rbp + FIRST_TSC), rdi)?;
        a.mov(qword_ptr(rbp + FIRST_CLOCK), rax)?;
        a.mov(r15d, TIMES)?;
        let (mut top, mut none, mut asleep) = (a.create_label(), a.create_label(), a.create_label());
        a.set_label(&mut top)?;
        a.nop()?; // one label an instruction
        clocks(a)?;
        compare(a, LAST_CLOCK)?;
        a.mov(rax, rdi)?;
        compare(a, LAST_TSC)?;
        a.test(r15d, TIMES_PER_TICK - 1)?;
        a.jnz(none)?;
        a.mov(rbx, qword_ptr(rbp + TICKS))?;
        counter(a)?;
        a.add(rax, 300_000)?;
        a.mov(qword_ptr(rbp + DEADLINE), rax)?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 32)?;
        a.mov(ecx, msr::TSC_DEADLINE)?;
        a.wrmsr()?;
        a.set_label(&mut asleep)?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        a.cmp(rbx, qword_ptr(rbp + TICKS))?;
        a.je(asleep)?;
        a.set_label(&mut none)?;
        a.dec(r15d)?;
        a.jnz(top)?;
        a.mov(ecx, msr::TSC_ADJUST)?;
        a.rdmsr()?;
        a.int3()
    });
    bare.kernel_state(rip)
}

#[test]
fn clocks_and_timers_go_on_when_a_processor_moves() {
    let mut bare = Bare::new(4 << 20);
    let start = timekeeper(&mut bare);
    let bus = Arc::new(Stops::default());
    let (mut one, mut two) = (processors(&bare, &bus), processors(&bare, &bus));
    for (seed, from) in (1..).zip(&mut one) {
        for to in &mut two {
            let name = format!("{} to {}", from.engine.name(), to.engine.name());
            let begin = Instant::now();
            let run = run(&bare, &bus, &start, &mut [from, to], seed);
            let most = begin.elapsed();
            println!("{name} and back: {} moves in {most:?}, of which {:?} for the clocks", run.moves, run.moving);
            let at = |offset: i32| bare.read_u64(SCRATCH + offset as u64);
            assert_eq!(at(WENT_BACK), 0, "{name}: clocks went back");
            assert_eq!(at(EARLY), 0, "{name}: the timer came before its deadline");
            assert_eq!(at(TICKS), u64::from(TIMES / TIMES_PER_TICK), "{name}: interrupts of the timer");
            assert_eq!((run.gpr[2] as u32, run.gpr[0] as u32), (ADJUSTED, 0), "{name}: IA32_TSC_ADJUST");
            // Both clocks have gone on by the same time, and no further than the host's.
            let ns = at(LAST_CLOCK) - at(FIRST_CLOCK);
            assert!(u128::from(ns) <= most.as_nanos() * 1001 / 1000, "{name}: {ns} ns in {most:?}");
            let by_counter = (at(LAST_TSC) - at(FIRST_TSC)) * 1_000_000 / at(KHZ);
            let apart = ns / 500 + run.moving.as_nanos() as u64;
            assert!(ns.abs_diff(by_counter) <= apart, "{name}: {ns} ns by the clock, {by_counter} by the counter");
        }
    }
}
