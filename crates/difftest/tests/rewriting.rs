//! Code that is rewritten while it runs, once and all the time: by itself, beside data, through other mappings, across pages.
//! What another processor writes is in `processors`.

use arch::registers::pte;
use difftest::bare::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const PAGE: u64 = 0x60_0000;
const P: u64 = pte::P;
const W: u64 = pte::W;

/// Runs kernel code to its INT3.
fn run(bare: Bare, rip: u64) -> Machine {
    let state = bare.kernel_state(rip);
    let mut m = Machine::with_state(bare, &state);
    assert_eq!(m.run(), End::Exit);
    assert_eq!(m.frame().vector, 3, "{:x?}", m.frame());
    m
}

/// A machine with this code at [`PAGE`], which may be written, and where that page is.
fn writable_code(code: &[u8]) -> (Bare, u64) {
    let mut bare = Bare::new(8 << 20);
    let page = bare.page();
    bare.map(PAGE, page, P | W);
    bare.write(page, code);
    (bare, page)
}

/// Runs `turn` so many times, with RDI = [`PAGE`] and ECX counting down to 1; what it has summed up in RSI.
fn sum_of_turns(bare: Bare, turns: u32, turn: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> u64 {
    let rip = bare.kernel_code(CODE, |a| {
        let mut top = a.create_label();
        a.mov(rdi, PAGE)?;
        a.xor(esi, esi)?;
        a.mov(ecx, turns)?;
        a.set_label(&mut top)?;
        turn(a)?;
        a.dec(ecx)?;
        a.jnz(top)?;
        a.int3()
    });
    run(bare, rip).state().gpr[6]
}

#[test]
fn code_that_is_written_runs_as_written() {
    // A loop that patches the immediate of the instruction that follows the store.
    const TURNS: u32 = 5000;
    let bare = Bare::new(8 << 20);
    let rip = bare.kernel_code(CODE, |a| {
        let mut top = a.create_label();
        let mut patched = a.create_label();
        a.xor(ebx, ebx)?;
        a.mov(ecx, TURNS)?;
        a.set_label(&mut top)?;
        a.mov(dword_ptr(patched), ecx)?;
        a.db(&[0xb8])?;
        a.set_label(&mut patched)?;
        a.db(&[0; 4])?;
        a.add(rbx, rax)?;
        a.dec(ecx)?;
        a.jnz(top)?;
        a.int3()
    });
    let m = run(bare, rip);
    assert_eq!(m.state().gpr[3], u64::from(TURNS) * (u64::from(TURNS) + 1) / 2);
}

/// What a compiler in the guest does: a function with new immediates in each turn and another operation in some, data beside
/// it, a function that stays what it is, stores through another mapping.
#[test]
fn a_page_of_code_and_data_that_is_rewritten_all_the_time_runs_as_written() {
    const OTHER: u64 = PAGE + 0x10_0000;
    const TURNS: u32 = 5000;
    let mut bare = Bare::new(8 << 20);
    let page = bare.pages(1);
    bare.map(PAGE, page, P | W);
    bare.map(OTHER, page, P | W);
    // mov eax, 0; add eax, 0; ret
    bare.write(page, &[0xb8, 0, 0, 0, 0, 0x05, 0, 0, 0, 0, 0xc3]);
    // mov rax, [rdi + 0x208]; ret
    bare.write(page + 0x100, &[0x48, 0x8b, 0x87, 0x08, 0x02, 0, 0, 0xc3]);
    let rip = bare.kernel_code(CODE, |a| {
        let (mut top, mut fill) = (a.create_label(), a.create_label());
        a.mov(rdi, PAGE)?;
        a.mov(rbx, OTHER)?;
        a.xor(esi, esi)?;
        a.mov(ecx, TURNS)?;
        a.set_label(&mut top)?;
        a.mov(dword_ptr(rdi + 1), ecx)?;
        a.mov(eax, ecx)?;
        a.shr(eax, 4)?;
        a.and(eax, 1)?;
        a.imul_3(eax, eax, 0x30)?;
        a.add(eax, 5)?;
        a.mov(byte_ptr(rbx + 5), al)?; // 05: ADD, 35: XOR
        a.lea(edx, dword_ptr(rcx + rcx * 2))?;
        a.mov(dword_ptr(rbx + 6), edx)?;
        a.mov(edx, 20)?;
        a.set_label(&mut fill)?;
        a.mov(qword_ptr(rdi + rdx * 8 + 0x200), rcx)?;
        a.dec(edx)?;
        a.jnz(fill)?;
        a.call(rdi)?;
        a.add(rsi, rax)?;
        a.lea(rax, qword_ptr(rdi + 0x100))?;
        a.call(rax)?;
        a.add(rsi, rax)?;
        a.dec(ecx)?;
        a.jnz(top)?;
        a.int3()
    });
    let m = run(bare, rip);
    let made = |n: u32| if n >> 4 & 1 == 0 { n + n * 3 } else { n ^ (n * 3) };
    let sum: u64 = (1..=TURNS).map(|n| u64::from(made(n)) + u64::from(n)).sum();
    assert_eq!(m.state().gpr[6], sum);
}

/// An operation on EAX or RAX by its encoding before the immediate, how many bytes that has, and what it does to RAX.
type Operation = (&'static [u8], usize, fn(u64, i64) -> u64);

fn low(value: u64) -> u64 {
    value & 0xffff_ffff
}

/// By the immediate, whose sign is extended; CF is set before each.
const OPERATIONS: [Operation; 16] = [
    (&[0xb8], 4, |_, n| low(n as u64)),
    (&[0x48, 0xb8], 8, |_, n| n as u64),
    (&[0x48, 0xc7, 0xc0], 4, |_, n| n as u64),
    (&[0x05], 4, |a, n| low(a.wrapping_add(n as u64))),
    (&[0x48, 0x05], 4, |a, n| a.wrapping_add(n as u64)),
    (&[0x83, 0xc0], 1, |a, n| low(a.wrapping_add(n as u64))),
    (&[0x48, 0x83, 0xe8], 1, |a, n| a.wrapping_sub(n as u64)),
    (&[0x48, 0x2d], 4, |a, n| a.wrapping_sub(n as u64)),
    (&[0x15], 4, |a, n| low(a.wrapping_add(n as u64).wrapping_add(1))),
    (&[0x48, 0x83, 0xd8], 1, |a, n| a.wrapping_sub(n as u64).wrapping_sub(1)),
    (&[0x48, 0x25], 4, |a, n| a & n as u64),
    (&[0x83, 0xe0], 1, |a, n| low(a & n as u64)),
    (&[0x0d], 4, |a, n| low(a | n as u64)),
    (&[0x48, 0x83, 0xf0], 1, |a, n| a ^ n as u64),
    (&[0x35], 4, |a, n| low(a ^ n as u64)),
    // add r10, imm32, of a register that the translator has in memory; RAX stays.
    (&[0x49, 0x81, 0xc2], 4, |a, _| a),
];

/// Every kind of immediate that can be patched, in a function that is called after each patch.
#[test]
fn a_function_whose_immediates_are_patched_all_the_time_has_the_last_ones() {
    const TURNS: u32 = 3000;
    for (opcode, size, operation) in OPERATIONS {
        // stc; the operation; ret
        let code = [&[0xf9], opcode, &[0; 8][..size], &[0xc3]].concat();
        let (bare, _) = writable_code(&code);
        let immediate = PAGE + 1 + opcode.len() as u64;
        let rip = bare.kernel_code(CODE, |a| {
            let mut top = a.create_label();
            a.mov(rdi, PAGE)?;
            a.mov(rbx, immediate)?;
            a.mov(rsi, 0x1234_5678_9abc_def1u64)?;
            a.mov(ecx, TURNS)?;
            a.xor(eax, eax)?;
            a.set_label(&mut top)?;
            a.imul_3(rdx, rsi, 0x1_0001)?;
            a.add(rdx, rcx)?;
            a.mov(rsi, rdx)?;
            match size {
                1 => a.mov(byte_ptr(rbx), dl)?,
                4 => a.mov(dword_ptr(rbx), edx)?,
                _ => a.mov(qword_ptr(rbx), rdx)?,
            }
            a.call(rdi)?;
            a.rol(rax, 7)?;
            a.dec(ecx)?;
            a.jnz(top)?;
            a.int3()
        });
        let m = run(bare, rip);
        let (mut expected, mut seed) = (0u64, 0x1234_5678_9abc_def1u64);
        for turn in (1..=TURNS).rev() {
            seed = seed.wrapping_mul(0x1_0001).wrapping_add(turn.into());
            let n = match size {
                1 => i64::from(seed as i8),
                4 => i64::from(seed as i32),
                _ => seed as i64,
            };
            expected = operation(expected, n).rotate_left(7);
        }
        assert_eq!(m.state().gpr[0], expected, "{opcode:02x?}");
    }
}

/// ADD becomes ADC and back, with CF set and clear: what the caller left in the flags must reach the new code.
#[test]
fn code_that_comes_to_need_the_flags_has_them() {
    const TURNS: u32 = 5000;
    // add eax, 1000; ret
    let (bare, _) = writable_code(&[0x05, 0xe8, 0x03, 0, 0, 0xc3]);
    let sum = sum_of_turns(bare, TURNS, |a| {
        // 05: ADD, 15: ADC; every third turn
        a.mov(eax, ecx)?;
        a.xor(edx, edx)?;
        a.mov(ebx, 3)?;
        a.div(ebx)?;
        a.cmp(edx, 1)?;
        a.sbb(edx, edx)?;
        a.and(edx, 0x10)?;
        a.add(edx, 5)?;
        a.mov(byte_ptr(rdi), dl)?;
        a.xor(eax, eax)?;
        a.bt(ecx, 0)?;
        a.call(rdi)?;
        a.add(rsi, rax)
    });
    let expected: u64 = (1..=TURNS).map(|n| 1000 + u64::from(n % 3 == 0 && n % 2 == 1)).sum();
    assert_eq!(sum, expected);
}

/// `mov eax, n` whose opcode is in one page and whose immediate in the next, and which are neighbours only here.
#[test]
fn an_instruction_across_two_pages_that_is_patched_all_the_time_is_made_of_both() {
    const TURNS: u32 = 5000;
    const SECOND: u64 = PAGE + 0x1000;
    let mut bare = Bare::new(8 << 20);
    let (second, first) = (bare.page(), bare.page());
    bare.map(PAGE, first, P | W);
    bare.map(SECOND, second, P | W);
    for (at, byte) in [(first + 0xffe, 0xb8), (second + 3, 0xc3)] {
        bare.write(at, &[byte]);
    }
    let sum = sum_of_turns(bare, TURNS, |a| {
        a.mov(rdi, SECOND - 2)?;
        a.imul_3(edx, ecx, 0x1_0101)?;
        a.mov(dword_ptr(rdi + 1), edx)?;
        a.call(rdi)?;
        a.add(rsi, rax)
    });
    let expected: u64 = (1..=TURNS).map(|n| u64::from(n.wrapping_mul(0x1_0101))).sum();
    assert_eq!(sum, expected);
}

/// Another operation in each turn, called where the page is mapped: the translator copies code from one address to the other.
#[test]
fn code_that_is_mapped_twice_is_rewritten_at_both_addresses() {
    const OTHER: u64 = PAGE + 0x10_0000;
    const TURNS: u32 = 5000;
    let (mut bare, page) = writable_code(&[0x05, 0x40, 0, 0, 0, 0xc3]);
    bare.map(OTHER, page, P | W);
    let sum = sum_of_turns(bare, TURNS, |a| {
        a.mov(rbx, OTHER)?;
        // 05: ADD, 2D: SUB
        a.mov(edx, ecx)?;
        a.and(edx, 1)?;
        a.imul_3(edx, edx, 0x28)?;
        a.add(edx, 5)?;
        a.mov(byte_ptr(rdi), dl)?;
        for function in [rdi, rbx, rdi] {
            a.mov(eax, 0x1000)?;
            a.call(function)?;
            a.add(rsi, rax)?;
        }
        Ok(())
    });
    let expected: u64 = (1..=TURNS).map(|n| 3 * if n % 2 == 0 { 0x1040 } else { 0xfc0 }).sum();
    assert_eq!(sum, expected);
}

/// A second or so of patching and calling: what the translator does about it must not last for ever, nor must its end be seen.
/// Each turn also writes beside the code, from which a function that stays what it is reads.
#[test]
fn code_that_is_rewritten_for_a_second_runs_as_written_all_the_time() {
    const TICKS: u64 = 5 << 29;
    // mov eax, 0; ret; and at 100H: mov eax, [rdi + 200H]; ret
    let (bare, page) = writable_code(&[0xb8, 0, 0, 0, 0, 0xc3]);
    bare.write(page + 0x100, &[0x8b, 0x87, 0, 2, 0, 0, 0xc3]);
    let rip = bare.kernel_code(CODE, |a| {
        let (mut top, mut out) = (a.create_label(), a.create_label());
        a.mov(rdi, PAGE)?;
        a.xor(ecx, ecx)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.lea(rsi, qword_ptr(rdx + rax))?;
        a.set_label(&mut top)?;
        a.inc(ecx)?;
        a.mov(dword_ptr(rdi + 1), ecx)?;
        a.mov(dword_ptr(rdi + 0x200), ecx)?;
        a.call(rdi)?;
        a.mov(ebx, eax)?;
        a.lea(rax, qword_ptr(rdi + 0x100))?;
        a.call(rax)?;
        a.xor(ebx, ecx)?;
        a.xor(eax, ecx)?;
        a.or(ebx, eax)?;
        a.jnz(out)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.add(rax, rdx)?;
        a.sub(rax, rsi)?;
        a.mov(r8, TICKS)?;
        a.cmp(rax, r8)?;
        a.jb(top)?;
        a.set_label(&mut out)?;
        a.int3()
    });
    let m = run(bare, rip);
    assert_eq!(m.state().gpr[3], 0, "something else in turn {}", m.state().gpr[1]);
}
