//! Two processors: start-up from real mode, atomicity, code that one writes and the other runs, TLB shootdown.

use std::time::Duration;

use arch::msr;
use arch::registers::pte;
use difftest::bare::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Where the second processor starts in real mode.
const TRAMPOLINE: u64 = 0x6_0000;
/// Its code in long mode, and its stack.
const SECOND: u64 = CODE + 0x2000;
const SECOND_STACK: u64 = 0x7_0000;
const READY: u64 = DIRECT + SCRATCH;
const SHARED: u64 = DIRECT + SCRATCH + 96;
const DONE: u64 = DIRECT + SCRATCH + 256;

fn wrmsr(a: &mut CodeAssembler, register: u32, value: u64) -> Result<(), IcedError> {
    a.mov(ecx, register)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

/// INIT and start-up IPI to processor 1, then waits until it is there.
fn start_second(a: &mut CodeAssembler) -> Result<(), IcedError> {
    wrmsr(a, msr::APIC_BASE, 0xfee0_0d00)?;
    wrmsr(a, 0x80f, 0x1ff)?;
    wrmsr(a, 0x830, 1 << 32 | 0x4500)?;
    wrmsr(a, 0x830, 1 << 32 | 0x4600 | TRAMPOLINE >> 12)?;
    a.mov(rbx, READY)?;
    let mut wait = a.create_label();
    a.set_label(&mut wait)?;
    a.pause()?;
    a.cmp(dword_ptr(rbx), 0)?;
    a.je(wait)
}

/// Writes the way from real mode to long mode, by hand-assembled far jumps, to [`SECOND`].
fn trampoline(bare: &mut Bare) {
    // Identity-mapped for the moment in which paging goes on.
    bare.map(TRAMPOLINE, TRAMPOLINE, pte::P | pte::W);
    bare.map(GDT, GDT, pte::P | pte::W);
    let data = TRAMPOLINE + 0x800;
    bare.write(data, &0x7fu16.to_le_bytes());
    bare.write(data + 2, &(GDT as u32).to_le_bytes());
    let protected = TRAMPOLINE + 0x100;
    let long = TRAMPOLINE + 0x200;
    bare.assemble(TRAMPOLINE, 0, 16, |a| {
        a.cli()?;
        a.mov(ax, cs)?;
        a.mov(ds, ax)?;
        // lgdt with a 32-bit base (operand-size prefix)
        a.db(&[0x66, 0x0f, 0x01, 0x16, 0x00, 0x08])?;
        a.mov(eax, cr0)?;
        a.or(eax, 1)?;
        a.mov(cr0, eax)?;
        // jmp KERNEL_CODE32:protected
        let mut jump = vec![0x66, 0xea];
        jump.extend((protected as u32).to_le_bytes());
        jump.extend(KERNEL_CODE32.to_le_bytes());
        a.db(&jump)
    });
    let root = bare.root as u32;
    bare.assemble(protected, protected, 32, |a| {
        a.mov(eax, u32::from(KERNEL_DATA))?;
        a.mov(ds, eax)?;
        a.mov(ss, eax)?;
        a.mov(eax, cr4)?;
        a.or(eax, 0x6a0)?; // PAE, PGE, OSFXSR, OSXMMEXCPT
        a.mov(cr4, eax)?;
        a.mov(eax, root)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, msr::EFER)?;
        a.rdmsr()?;
        a.or(eax, 0x901)?; // SCE, LME, NXE
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8001_0000u32 as i32)?;
        a.mov(cr0, eax)?;
        let mut jump = vec![0xea];
        jump.extend((long as u32).to_le_bytes());
        jump.extend(KERNEL_CODE.to_le_bytes());
        a.db(&jump)
    });
    bare.assemble(long, long, 64, |a| {
        a.mov(rsp, DIRECT + SECOND_STACK)?;
        a.mov(rax, DIRECT + GDT)?;
        a.sub(rsp, 16)?;
        a.mov(word_ptr(rsp), 0xfff)?;
        a.mov(rax, DIRECT + IDT)?;
        a.mov(qword_ptr(rsp + 2), rax)?;
        a.lidt(ptr(rsp))?;
        a.mov(rax, DIRECT + SECOND)?;
        a.jmp(rax)
    });
}

fn machine(
    first: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    second: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Machine {
    let mut bare = Bare::new(4 << 20);
    trampoline(&mut bare);
    bare.kernel_code(SECOND, |a| {
        a.mov(rbx, READY)?;
        a.mov(dword_ptr(rbx), 1)?;
        second(a)?;
        a.mov(rbx, DONE)?;
        a.mov(dword_ptr(rbx), 1)?;
        a.hlt()
    });
    let rip = bare.kernel_code(CODE, |a| {
        start_second(a)?;
        first(a)?;
        let mut wait = a.create_label();
        a.mov(rbx, DONE)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(rbx), 0)?;
        a.je(wait)?;
        a.int3()
    });
    let state = bare.kernel_state(rip);
    let mut machine = Machine::new(bare, 2);
    machine.vcpus[0].set_state(&state).expect("a valid state");
    let ends = machine.run_all(Duration::from_secs(30));
    assert_eq!(ends[0], End::Exit, "{ends:?}; second at {:x?}", machine.vcpus[1].state().rip);
    assert_eq!(machine.frame().vector, 3, "{:x?}", machine.frame());
    machine
}

#[test]
fn a_processor_starts_in_real_mode_and_reaches_long_mode() {
    let m = machine(|_| Ok(()), |a| a.nop());
    let state = m.vcpus[1].state();
    assert_eq!(state.segments[1].selector, KERNEL_CODE);
    assert!(state.segments[1].long());
}

#[test]
fn locked_increments_of_two_processors_all_count() {
    const N: u32 = 100_000;
    // Across two cache lines: slow on the bus, slower still where the host counts such things.
    const SPLIT: u32 = 500;
    let count = |a: &mut CodeAssembler| {
        a.mov(rbx, SHARED)?;
        for (n, offset) in [(N, 0), (SPLIT, 28)] {
            a.mov(ecx, n)?;
            let mut top = a.create_label();
            a.set_label(&mut top)?;
            a.mov(eax, 1)?;
            a.lock().xadd(qword_ptr(rbx + offset), rax)?;
            a.dec(ecx)?;
            a.jnz(top)?;
        }
        Ok(())
    };
    let m = machine(count, count);
    assert_eq!(m.bare.read_u64(SHARED - DIRECT), 2 * u64::from(N));
    assert_eq!(m.bare.read_u64(SHARED - DIRECT + 28), 2 * u64::from(SPLIT));
}

#[test]
fn code_written_by_another_processor_runs_after_a_serializing_instruction() {
    // The first writes `mov eax, n; ret` and says so; the second serializes, calls it and answers with what it got.
    const FUNCTION: u64 = CODE + 0x4000;
    const ROUNDS: u32 = 2000;
    let m = machine(
        |a| {
            a.mov(rsi, DIRECT + FUNCTION)?;
            a.mov(rbx, SHARED)?;
            a.mov(ecx, 1)?;
            let mut top = a.create_label();
            let mut wait = a.create_label();
            a.set_label(&mut top)?;
            a.mov(byte_ptr(rsi), 0xb8u32 as i32)?;
            a.mov(dword_ptr(rsi + 1), ecx)?;
            a.mov(byte_ptr(rsi + 5), 0xc3u32 as i32)?;
            a.mov(dword_ptr(rbx), ecx)?;
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(dword_ptr(rbx + 4), ecx)?;
            a.jne(wait)?;
            a.inc(ecx)?;
            a.cmp(ecx, ROUNDS as i32)?;
            a.jb(top)
        },
        |a| {
            a.mov(rsi, DIRECT + FUNCTION)?;
            a.mov(rdi, SHARED)?;
            a.mov(r8d, 1)?;
            let mut top = a.create_label();
            a.set_label(&mut top)?;
            a.pause()?;
            a.cmp(dword_ptr(rdi), r8d)?;
            a.jne(top)?;
            a.xor(eax, eax)?;
            a.xor(ecx, ecx)?;
            a.cpuid()?;
            a.call(rsi)?;
            a.mov(dword_ptr(rdi + 4), eax)?; // a stale number would stop the first one for ever
            a.inc(r8d)?;
            a.cmp(r8d, ROUNDS as i32)?;
            a.jb(top)
        },
    );
    assert_eq!(m.bare.read_u64(SHARED - DIRECT) >> 32, u64::from(ROUNDS) - 1);
}

/// One store of eight bytes makes `mov eax, 1000; ret` an `add eax, 2000; ret` and back. Whoever calls it meanwhile finds the one or
/// the other, and never the operation of one with the immediate of the other.
#[test]
fn an_instruction_that_another_processor_replaces_by_one_store_is_the_old_or_the_new_one() {
    const ROUNDS: u32 = 20_000;
    const FUNCTION: u64 = CODE + 0x4000;
    let m = machine(
        |a| {
            let mut top = a.create_label();
            a.mov(rsi, DIRECT + FUNCTION)?;
            a.mov(r8, u64::from_le_bytes([0xb8, 0xe8, 0x03, 0, 0, 0xc3, 0, 0]))?;
            a.mov(r9, u64::from_le_bytes([0x05, 0xd0, 0x07, 0, 0, 0xc3, 0, 0]))?;
            a.mov(rbx, SHARED)?;
            a.set_label(&mut top)?;
            a.mov(qword_ptr(rsi), r8)?;
            a.mov(qword_ptr(rsi), r9)?;
            a.cmp(dword_ptr(rbx + 4), 0)?;
            a.je(top)
        },
        |a| {
            let (mut top, mut wrong, mut right, mut out) =
                (a.create_label(), a.create_label(), a.create_label(), a.create_label());
            a.mov(rsi, DIRECT + FUNCTION)?;
            a.mov(rbx, SHARED)?;
            a.set_label(&mut top)?;
            a.cmp(byte_ptr(rsi), 0)?;
            a.je(top)?;
            a.mov(ecx, ROUNDS)?;
            let mut turn = a.create_label();
            a.set_label(&mut turn)?;
            a.mov(eax, 7)?;
            a.call(rsi)?;
            a.cmp(eax, 1000)?;
            a.je(right)?;
            a.cmp(eax, 2007)?;
            a.jne(wrong)?;
            a.set_label(&mut right)?;
            a.dec(ecx)?;
            a.jnz(turn)?;
            a.jmp(out)?;
            a.set_label(&mut wrong)?;
            a.mov(dword_ptr(rbx), eax)?;
            a.set_label(&mut out)?;
            a.mov(dword_ptr(rbx + 4), 1)
        },
    );
    assert_eq!(m.bare.read_u64(SHARED - DIRECT), 1 << 32, "what was called did something else");
}

#[test]
fn stores_of_one_processor_are_seen_in_order_by_the_other() {
    // Total store order: the reader never sees the second store without the first.
    const N: u32 = 200_000;
    let m = machine(
        |a| {
            a.mov(rbx, SHARED)?;
            a.mov(ecx, 1)?;
            let mut top = a.create_label();
            a.set_label(&mut top)?;
            a.mov(dword_ptr(rbx), ecx)?;
            a.mov(dword_ptr(rbx + 32), ecx)?;
            a.inc(ecx)?;
            a.cmp(ecx, N as i32)?;
            a.jb(top)
        },
        |a| {
            a.mov(rbx, SHARED)?;
            a.xor(edi, edi)?;
            let mut top = a.create_label();
            let mut fine = a.create_label();
            a.set_label(&mut top)?;
            a.mov(eax, dword_ptr(rbx + 32))?;
            a.mov(edx, dword_ptr(rbx))?;
            a.cmp(edx, eax)?;
            a.jae(fine)?;
            a.inc(edi)?;
            a.set_label(&mut fine)?;
            a.cmp(eax, N as i32 - 1)?;
            a.jne(top)?;
            a.mov(dword_ptr(rbx + 40), edi)
        },
    );
    assert_eq!(m.bare.read_u64(SHARED - DIRECT + 40) as u32, 0);
}
