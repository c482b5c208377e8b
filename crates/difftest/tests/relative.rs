//! A page of a program's code that is mapped at several addresses: one translation runs at all of them
//! (`translator::codegen::relative`), and nothing that can be seen of it is another address's.

use arch::registers::pte;
use difftest::bare::*;
use difftest::program::*;
use iced_x86::code_asm::*;

/// Where the two pages are mapped; the second one comes after the first.
const ADDRESSES: [u64; 4] = [0x70_0000, 0x7_1234_5000, 0x7fff_89ab_c000, 0x5555_0000_0000];
const ROUNDS: u64 = 3;
const WORD: u64 = 0x1234_5678_9abc_def0;
/// Bytes of DATA for what is noted of one call.
const NOTES: u64 = 64;

/// A program that goes through all addresses in turns, calling what `code` puts there: a function that gets the address of its
/// notes in RBX. `other` is what stands at the beginning of the page behind it. With it the frame of the first page.
fn at_all_addresses(code: Code, other: Code) -> (Program, u64) {
    let mut program = Program::new(&|a| {
        let mut again = a.create_label();
        a.mov(rbx, DATA)?;
        a.mov(r13d, ROUNDS as u32)?;
        a.set_label(&mut again)?;
        for address in ADDRESSES {
            a.mov(rax, address)?;
            a.call(rax)?;
            a.add(rbx, NOTES as i32)?;
        }
        a.dec(r13d)?;
        a.jnz(again)?;
        a.int3()
    });
    let pages = program.bare.pages(2);
    program.bare.assemble(pages, ADDRESSES[0], 64, code);
    program.bare.assemble(pages + 4096, ADDRESSES[0] + 4096, 64, other);
    for address in ADDRESSES {
        program.bare.map(address, pages, pte::P | pte::U | pte::W);
        program.bare.map(address + 4096, pages + 4096, pte::P | pte::U);
    }
    (program, pages)
}

/// Runs a program without running it directly, until an exception ends it.
fn translated(program: Program) -> Machine {
    let state = program.state.clone();
    let mut machine = Machine::with_state(program.bare, &state);
    assert_eq!(machine.run(), End::Exit);
    machine
}

/// The same to its end: the words of its notes, by call and place.
fn notes(program: Program) -> impl Fn(u64, u64) -> u64 {
    let data = program.data;
    let machine = translated(program);
    assert_eq!(machine.frame().vector, 3, "{:x?}", machine.frame());
    move |call, at| machine.bare.read_u64(data + call * NOTES + at)
}

fn ret(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    a.ret()
}

#[test]
fn a_page_at_several_addresses_finds_itself_and_its_neighbour_at_each() {
    let (program, _) = at_all_addresses(
        &|a| {
            let (mut start, mut inner, mut over, mut word) =
                (a.create_label(), a.create_label(), a.create_label(), a.create_label());
            let mut far = a.create_label();
            a.set_label(&mut start)?;
            a.lea(rax, ptr(start))?;
            a.mov(qword_ptr(rbx), rax)?;
            a.call(inner)?;
            a.mov(rax, qword_ptr(word))?;
            a.mov(qword_ptr(rbx + 16), rax)?;
            a.lea(rax, ptr(far))?;
            a.jmp(rax)?;
            a.ud2()?;
            a.set_label(&mut far)?;
            a.call(ADDRESSES[0] + 4096)?;
            a.mov(qword_ptr(rbx + 24), rax)?;
            // Flags that a branch to another page leaves as they are.
            a.xor(eax, eax)?;
            a.call(ADDRESSES[0] + 4096 + 64)?;
            a.setz(byte_ptr(rbx + 32))?;
            a.ret()?;
            a.set_label(&mut inner)?;
            a.mov(rax, qword_ptr(rsp))?;
            a.mov(qword_ptr(rbx + 8), rax)?;
            a.jmp(over)?;
            a.ud2()?;
            a.set_label(&mut over)?;
            a.ret()?;
            a.set_label(&mut word)?;
            a.dq(&[WORD])
        },
        &|a| {
            let mut here = a.create_label();
            a.set_label(&mut here)?;
            a.lea(rax, ptr(here))?;
            a.ret()?;
            a.nops_with_size(64 - 8)?;
            a.ret()
        },
    );
    let note = notes(program);
    for (call, address) in (0..).zip(ADDRESSES.repeat(ROUNDS as usize)) {
        // LEA has 7 bytes, MOV 3, CALL 5.
        assert_eq!(note(call, 0), address, "LEA in call {call}");
        assert_eq!(note(call, 8), address + 15, "the return address in call {call}");
        assert_eq!(note(call, 16), WORD, "a constant of the page in call {call}");
        assert_eq!(note(call, 24), address + 4096, "the neighbour in call {call}");
        assert_eq!(note(call, 32) & 0xff, 1, "ZF in call {call}");
    }
}

#[test]
fn an_exception_in_a_page_at_several_addresses_says_where_it_was() {
    // In the last round, at the last but one address: a page that is not there, an instruction that is the kernel's, an error.
    let last = DATA + (ROUNDS * ADDRESSES.len() as u64 - 2) * NOTES;
    let ways: [(u64, Code); 4] = [
        (14, &|a| a.mov(ecx, dword_ptr(0x1000))),
        (13, &|a| a.cli()),
        (0, &|a| {
            a.xor(ecx, ecx)?;
            a.div(ecx)
        }),
        (6, &|a| a.ud2()),
    ];
    for (vector, way) in ways {
        let (program, pages) = at_all_addresses(
            &|a| {
                let mut go_on = a.create_label();
                a.mov(rax, last)?;
                a.cmp(rax, rbx)?;
                a.jne(go_on)?;
                way(a)?;
                a.set_label(&mut go_on)?;
                a.call(ADDRESSES[0] + 4096)?;
                a.ret()
            },
            &ret,
        );
        let machine = translated(program);
        let frame = machine.frame();
        assert_eq!(frame.vector, vector);
        // MOV of 10 bytes or 5, CMP of 3, JNE of 6 or 2, and XOR.
        let offset = frame.rip.wrapping_sub(ADDRESSES[2]);
        assert!((10..24).contains(&offset), "{frame:x?}");
        let mut code = [0; 2];
        machine.bare.read(pages + offset, &mut code);
        let expected: &[u8] = match vector {
            14 => &[0x8b],
            13 => &[0xfa],
            0 => &[0xf7, 0xf1],
            _ => &[0x0f, 0x0b],
        };
        assert_eq!(&code[..expected.len()], expected, "{frame:x?}");
    }
}

#[test]
fn an_x87_error_in_a_page_at_several_addresses_says_where_it_was() {
    let (program, _) = at_all_addresses(
        &|a| {
            let mut error = a.create_label();
            a.fninit()?;
            // Division by zero is not masked.
            a.mov(word_ptr(rbx), 0x37b)?;
            a.fldcw(word_ptr(rbx))?;
            a.fld1()?;
            a.fldz()?;
            a.lea(rax, ptr(error))?;
            a.mov(qword_ptr(rbx + 8), rax)?;
            a.set_label(&mut error)?;
            a.fdivp(st1, st0)?;
            // Another page's code comes in between.
            a.call(ADDRESSES[0] + 4096)?;
            a.fnstenv(ptr(rbx + 16))?;
            a.fnclex()?;
            a.ret()
        },
        &ret,
    );
    let note = notes(program);
    for call in 0..ROUNDS * ADDRESSES.len() as u64 {
        assert_eq!(note(call, 28) as u32, note(call, 8) as u32, "call {call}");
    }
}

#[test]
fn an_instruction_across_two_pages_finds_itself_wherever_they_are() {
    let (mut program, pages) = at_all_addresses(
        &|a| {
            a.call(ADDRESSES[0] + 4090)?;
            a.mov(qword_ptr(rbx), rax)?;
            a.ret()
        },
        &ret,
    );
    // LEA of what is behind it, and RET.
    program.bare.write(pages + 4090, &[0x48, 0x8d, 0x05, 0, 0, 0, 0, 0xc3]);
    // At the last address another page follows, where LEA goes on otherwise.
    let other = program.bare.page();
    program.bare.write(other, &[1, 0xc3]);
    let last = ADDRESSES[ADDRESSES.len() - 1];
    program.bare.map(last + 4096, other, pte::P | pte::U);
    let note = notes(program);
    for (call, address) in (0..).zip(ADDRESSES.repeat(ROUNDS as usize)) {
        let behind = address + 4090 + 7 + if address == last { 1 << 24 } else { 0 };
        assert_eq!(note(call, 0), behind, "call {call}");
    }
}

#[test]
fn code_that_is_written_at_one_address_runs_as_written_at_all() {
    // MOV EAX, n and RET; each call makes it another n for the next one, wherever that is.
    let (program, _) = at_all_addresses(
        &|a| {
            let mut next = a.create_label();
            a.mov(eax, 0)?;
            a.mov(qword_ptr(rbx), rax)?;
            a.inc(eax)?;
            a.lea(rcx, ptr(next))?;
            a.jmp(rcx)?;
            a.set_label(&mut next)?;
            a.sub(rcx, 5 + 3 + 2 + 7 + 2 - 1)?;
            a.mov(dword_ptr(rcx), eax)?;
            a.ret()
        },
        &ret,
    );
    let note = notes(program);
    for call in 0..ROUNDS * ADDRESSES.len() as u64 {
        assert_eq!(note(call, 0), call);
    }
}
