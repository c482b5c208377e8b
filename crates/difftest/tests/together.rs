//! Two processors whose programs run directly, and interrupts that programs do not expect.

use std::time::{Duration, Instant};

use arch::registers::pte;
use arch::{CpuState, msr};
use difftest::bare::*;
use difftest::program::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const PAGE: u64 = 0x70_0000;
/// The second processor's program, its stack (with the first one's in one page), and its kernel stack and TSS.
const SECOND: u64 = 0x41_0000;
const SECOND_TOP: u64 = 0x1_0000;
const SECOND_TSS: u64 = 0x3800;
const HANDLER: u64 = CODE + 0x3000;
const SHARED: u64 = DATA;
/// MSRs of the x2APIC.
const EOI: u32 = 0x80b;
const SPURIOUS: u32 = 0x80f;
const COMMAND: u32 = 0x830;
const TIMER: u32 = 0x832;
const INITIAL: u32 = 0x838;
const DIVIDE: u32 = 0x83e;

fn wrmsr(a: &mut CodeAssembler, register: u32, value: u64) -> Result<(), IcedError> {
    a.mov(ecx, register)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

fn enable(a: &mut CodeAssembler) -> Result<(), IcedError> {
    wrmsr(a, msr::APIC_BASE, 0xfee0_0c00)?;
    wrmsr(a, SPURIOUS, 0x1ff)
}

/// An interrupt handler that keeps the program's registers.
fn handler(program: &mut Program, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    let rip = program.bare.kernel_code(HANDLER, |a| {
        for register in [rax, rcx, rdx, rsi] {
            a.push(register)?;
        }
        write(a)?;
        wrmsr(a, EOI, 0)?;
        for register in [rsi, rdx, rcx, rax] {
            a.pop(register)?;
        }
        a.iretq()
    });
    program.bare.gate(0x40, rip, Gate::default());
    // A gate that does nothing but serialize.
    let serialize = program.bare.kernel_code(HANDLER + 0x800, |a| a.iretq());
    program.bare.gate(0x60, serialize, Gate { dpl: 3, ..Gate::default() });
}

/// Runs a program on each processor until the first one ends with INT3; it waits for the second one itself.
fn run(mut program: Program, second: Code) -> Machine {
    let code = program.bare.page();
    program.bare.map(SECOND, code, pte::P | pte::U);
    program.bare.assemble(code, SECOND, 64, second);
    let (low, high) = tss_descriptor(DIRECT + SECOND_TSS, 0x67);
    program.bare.write_u64(GDT + 0x50, low);
    program.bare.write_u64(GDT + 0x58, high);
    program.bare.write_u64(SECOND_TSS + 4, DIRECT + SECOND_TOP);
    program.bare.write(SECOND_TSS + 102, &0x68u16.to_le_bytes());
    let mut state: CpuState = program.state.clone();
    (state.rip, state.gpr[4], state.tr.base, state.tr.selector) =
        (SECOND, USER_STACK - 2048, DIRECT + SECOND_TSS, 0x50);
    let (mut machine, direct) = program.machine(2);
    machine.vcpus[1].set_state(&state).expect("a valid state");
    let ends = machine.run_all(Duration::from_secs(30));
    assert_eq!(ends[0], End::Exit, "{ends:?}; at {:x} and {:x}", machine.state().rip, machine.vcpus[1].state().rip);
    let frame = machine.frame();
    assert_eq!(frame.vector, 3, "{frame:x?}, CR2 {:x}", machine.state().cr2);
    assert_direct(direct.as_deref(), 2);
    machine
}

/// Waits until a word of the shared page has this value.
fn wait_for(a: &mut CodeAssembler, offset: i32, value: i32) -> Result<(), IcedError> {
    let mut wait = a.create_label();
    a.set_label(&mut wait)?;
    a.pause()?;
    a.cmp(dword_ptr(r12 + offset), value)?;
    a.jne(wait)
}

fn for_ever(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.pause()?;
    a.jmp(again)
}

#[test]
fn locked_increments_of_two_programs_all_count() {
    const N: u32 = 300_000;
    let count = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.mov(r12, SHARED)?;
        a.mov(ecx, N)?;
        a.set_label(&mut again)?;
        a.mov(eax, 1)?;
        a.lock().xadd(qword_ptr(r12), rax)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.lock().inc(dword_ptr(r12 + 64))?;
        Ok(())
    };
    let program = Program::new(&|a| {
        count(a)?;
        wait_for(a, 64, 2)?;
        a.int3()
    });
    let data = program.data;
    let machine = run(program, &|a| {
        count(a)?;
        for_ever(a)
    });
    assert_eq!(machine.bare.read_u64(data), 2 * u64::from(N));
}

#[test]
fn stores_of_one_program_are_seen_in_order_by_the_other() {
    const N: i32 = 500_000;
    let program = Program::new(&|a| {
        let (mut again, mut fine) = (a.create_label(), a.create_label());
        a.mov(r12, SHARED)?;
        a.xor(edi, edi)?;
        a.set_label(&mut again)?;
        a.mov(eax, dword_ptr(r12 + 64))?;
        a.mov(edx, dword_ptr(r12))?;
        a.cmp(edx, eax)?;
        a.jae(fine)?;
        a.inc(edi)?;
        a.set_label(&mut fine)?;
        a.cmp(eax, N)?;
        a.jne(again)?;
        a.int3()
    });
    let machine = run(program, &|a| {
        let mut again = a.create_label();
        a.mov(r12, SHARED)?;
        a.mov(ecx, 1)?;
        a.set_label(&mut again)?;
        a.mov(dword_ptr(r12), ecx)?;
        a.mov(dword_ptr(r12 + 64), ecx)?;
        a.inc(ecx)?;
        a.cmp(ecx, N)?;
        a.jbe(again)?;
        for_ever(a)
    });
    assert_eq!(machine.state().gpr[7], 0);
}

#[test]
fn code_that_one_program_writes_runs_in_the_other_once_it_has_serialized() {
    const ROUNDS: i32 = 200;
    let mut program = Program::new(&|a| {
        let mut again = a.create_label();
        a.mov(r12, SHARED)?;
        a.mov(rsi, PAGE)?;
        a.mov(r13d, 1)?;
        a.set_label(&mut again)?;
        a.mov(dword_ptr(rsi + 1), r13d)?;
        a.mov(dword_ptr(r12), r13d)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(r12 + 64), r13d)?;
        a.jne(wait)?;
        a.inc(r13d)?;
        a.cmp(r13d, ROUNDS)?;
        a.jbe(again)?;
        a.int3()
    });
    let frame = program.bare.page();
    program.bare.write(frame, &[0xb8, 0, 0, 0, 0, 0xc3]);
    program.bare.map(PAGE, frame, pte::P | pte::U | pte::W);
    handler(&mut program, |a| a.nop());
    run(program, &|a| {
        let mut again = a.create_label();
        a.mov(r12, SHARED)?;
        a.mov(rsi, PAGE)?;
        a.mov(r13d, 1)?;
        a.set_label(&mut again)?;
        a.pause()?;
        a.cmp(dword_ptr(r12), r13d)?;
        a.jne(again)?;
        a.int(0x60)?;
        a.call(rsi)?;
        a.mov(dword_ptr(r12 + 64), eax)?; // a stale number would stop the first one for ever
        a.inc(r13d)?;
        a.jmp(again)
    });
}

/// The first processor's kernel changes a page that the other's program reads all the time, and flushes it there by an IPI.
#[test]
fn a_page_that_was_shot_down_is_not_seen_by_the_other_program_any_more() {
    const ROUNDS: i32 = 300;
    // Of the shared page: the epoch (odd: in transition), the acknowledgements, the errors, and that the second one is there.
    const EPOCH: i32 = 0;
    const ACKNOWLEDGED: i32 = 64;
    const ERRORS: i32 = 128;
    const READY: i32 = 192;
    let mut program = Program::new(&|a| {
        let mut again = a.create_label();
        a.mov(r12, SHARED)?;
        a.mov(r13d, 1)?;
        call(a, 0)?;
        wait_for(a, READY, 1)?;
        a.set_label(&mut again)?;
        a.inc(dword_ptr(r12 + EPOCH))?;
        call(a, 1)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(r12 + ACKNOWLEDGED), r13d)?;
        a.jne(wait)?;
        a.inc(dword_ptr(r12 + EPOCH))?;
        a.mov(ecx, 200)?;
        let mut delay = a.create_label();
        a.set_label(&mut delay)?;
        a.pause()?;
        a.dec(ecx)?;
        a.jnz(delay)?;
        a.inc(r13d)?;
        a.cmp(r13d, ROUNDS)?;
        a.jbe(again)?;
        a.mov(edi, dword_ptr(r12 + ERRORS))?;
        a.int3()
    });
    let frames = [program.bare.page(), program.bare.page()];
    program.bare.write_u64(frames[1], 2);
    program.bare.map(PAGE, frames[0], pte::P | pte::U);
    let (entry, data) = (program.entry(PAGE), program.data);
    handler(&mut program, |a| {
        a.mov(rax, PAGE)?;
        a.invlpg(ptr(rax))?;
        a.mov(rax, DIRECT + data)?;
        a.inc(dword_ptr(rax + ACKNOWLEDGED))
    });
    let program = program.kernel(&[&|a| enable(a), &|a| {
        a.mov(rsi, entry)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.xor(rax, (frames[0] ^ frames[1]) as i32)?;
        a.mov(qword_ptr(rsi), rax)?;
        wrmsr(a, COMMAND, 1 << 32 | 0x4040)
    }]);
    let machine = run(program, &|a| {
        let (mut again, mut fine) = (a.create_label(), a.create_label());
        a.mov(r12, SHARED)?;
        a.mov(r13, PAGE)?;
        call(a, 0)?;
        a.mov(dword_ptr(r12 + READY), 1)?;
        a.set_label(&mut again)?;
        a.mov(eax, dword_ptr(r12 + EPOCH))?;
        a.mov(edx, dword_ptr(r13))?;
        a.cmp(eax, dword_ptr(r12 + EPOCH))?;
        a.jne(again)?;
        a.test(eax, 1)?;
        a.jnz(again)?;
        a.and(eax, 2)?;
        a.cmp(eax, edx)?;
        a.je(fine)?;
        a.inc(dword_ptr(r12 + ERRORS))?;
        a.set_label(&mut fine)?;
        a.jmp(again)
    });
    assert_eq!(machine.state().gpr[7], 0);
}

#[test]
fn a_program_that_loops_for_ever_is_interrupted_by_the_timer() {
    let mut program = Program::new(&|a| {
        let mut again = a.create_label();
        call(a, 0)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut again)?;
        a.inc(rbx)?;
        a.jmp(again)
    });
    let count = DIRECT + SCRATCH;
    handler(&mut program, |a| {
        let mut more = a.create_label();
        a.mov(rax, count)?;
        a.inc(dword_ptr(rax))?;
        a.cmp(dword_ptr(rax), 100)?;
        a.jb(more)?;
        a.int3()?;
        a.set_label(&mut more)?;
        a.nop()
    });
    let start = Instant::now();
    let machine = program
        .kernel(&[&|a| {
            enable(a)?;
            wrmsr(a, DIVIDE, 0xb)?;
            wrmsr(a, TIMER, 0x2_0040)?; // periodic
            wrmsr(a, INITIAL, 100_000)
        }])
        .run_to_end(20);
    assert_eq!(machine.bare.read_u64(SCRATCH), 100);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert!(machine.state().gpr[3] > 1000, "the program went on in between");
}

#[test]
fn a_program_that_loops_for_ever_is_stopped_with_its_machine() {
    let program = Program::new(&|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.jmp(again)
    });
    let (mut machine, direct) = program.machine(1);
    let start = Instant::now();
    assert_eq!(machine.run_for(Duration::from_millis(100)), End::Timeout);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(machine.state().rip, USER);
    assert_direct(direct.as_deref(), 1);
}
