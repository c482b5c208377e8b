//! Programs that run directly see memory as the guest's page tables say: accessed and dirty bits, what was flushed, other address
//! spaces, code that is written, what is no RAM.

use arch::registers::{cr4, pte};
use difftest::bare::*;
use difftest::program::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const PAGE: u64 = 0x70_0000;
const P: u64 = pte::P;
const U: u64 = pte::U;
const W: u64 = pte::W;
const A: u64 = pte::A;
const D: u64 = pte::D;
const NO_FLUSH: u64 = 1 << 63;
/// MOV EAX, n and RET.
const FUNCTION: [u8; 6] = [0xb8, 1, 0, 0, 0, 0xc3];
const SLOT: u64 = DIRECT + SCRATCH;

/// Frames with FUNCTION, for 1 and for 2.
fn numbered(program: &mut Program) -> [u64; 2] {
    let frames = [program.bare.page(), program.bare.page()];
    for (number, frame) in (1..).zip(frames) {
        program.bare.write(frame, &FUNCTION);
        program.bare.write(frame + 1, &[number]);
    }
    frames
}

/// Sets an entry, from the kernel.
fn set_entry(a: &mut CodeAssembler, entry: u64, value: u64) -> Result<(), IcedError> {
    a.mov(rsi, entry)?;
    a.mov(rax, value)?;
    a.mov(qword_ptr(rsi), rax)
}

fn flush_page(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rax, PAGE)?;
    a.invlpg(ptr(rax))
}

fn reload_cr3(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rax, cr3)?;
    a.mov(cr3, rax)
}

/// INVPCID of a kind, for this PCID and PAGE.
fn invpcid(a: &mut CodeAssembler, kind: u64, pcid: u64) -> Result<(), IcedError> {
    a.mov(rsi, SLOT)?;
    a.mov(rax, pcid)?;
    a.mov(qword_ptr(rsi), rax)?;
    a.mov(rax, PAGE)?;
    a.mov(qword_ptr(rsi + 8), rax)?;
    a.mov(rax, kind)?;
    a.invpcid(rax, xmmword_ptr(rsi))
}

type Flush = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// All ways to flush PAGE in PCID 0, or where there are no PCIDs.
const FLUSHES: [(&str, bool, Flush); 7] = [
    ("INVLPG", false, flush_page),
    ("MOV to CR3", false, reload_cr3),
    ("CR4.PGE", false, |a| {
        for _ in 0..2 {
            a.mov(rax, cr4)?;
            a.xor(rax, cr4::PGE as i32)?;
            a.mov(cr4, rax)?;
        }
        Ok(())
    }),
    ("INVPCID of an address", true, |a| invpcid(a, 0, 0)),
    ("INVPCID of a PCID", true, |a| invpcid(a, 1, 0)),
    ("INVPCID of everything", true, |a| invpcid(a, 2, 0)),
    ("INVPCID of everything local", true, |a| invpcid(a, 3, 0)),
];

#[test]
fn accessed_and_dirty_bits_are_set_by_what_a_program_does() {
    const PAGES: u64 = 24;
    let mut program = Program::new(&|a| {
        a.mov(r12, PAGE)?;
        // Twice, since the second time the pages are there.
        for _ in 0..2 {
            a.mov(eax, dword_ptr(r12 + 0x1000))?;
            a.mov(dword_ptr(r12 + 0x3000), eax)?;
            a.mov(eax, dword_ptr(r12 + 0x5000))?;
            a.lock().cmpxchg(dword_ptr(r12 + 0x7000), ecx)?; // a write cycle also where it compares unequal
            a.lea(rax, qword_ptr(r12 + 0x9000))?;
            a.call(rax)?;
            a.prefetcht0(ptr(r12 + 0xb000))?;
            a.mov(eax, dword_ptr(r12 + 0xd000))?;
            call(a, 0)?;
        }
        a.mov(dword_ptr(r12 + 0xd000), eax)?;
        a.int3()
    })
    .kernel(&[&|a| a.nop()]);
    let frames = program.bare.pages(PAGES);
    program.bare.write(frames + 0x9000, &FUNCTION);
    for page in 0..PAGES {
        program.bare.map(PAGE + page * 4096, frames + page * 4096, P | U | W);
    }
    let entries = program.bare.entry(PAGE, 0);
    let machine = program.run_to_end(3);
    for page in 0..PAGES {
        let bits = machine.bare.read_u64(entries + 8 * page) & (A | D);
        let expected = match page {
            1 | 5 | 9 => A,
            3 | 7 | 13 => A | D,
            11 if bits == A => A, // a hint may use the entry
            _ => 0,
        };
        assert_eq!(bits, expected, "page {page}");
    }
}

#[test]
fn bits_that_the_kernel_clears_and_flushes_are_set_again() {
    for (name, pcids, flush) in FLUSHES {
        let mut program = Program::new(&|a| {
            a.mov(r12, PAGE)?;
            a.mov(r13d, 5)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.mov(dword_ptr(r12), eax)?;
            call(a, 0)?;
            a.mov(ebx, dword_ptr(r12))?;
            call(a, 1)?;
            a.dec(r13d)?;
            a.jnz(again)?;
            a.int3()
        });
        let frame = program.bare.page();
        program.bare.map(PAGE, frame, P | U | W);
        let entry = program.entry(PAGE);
        let expect = |a: &mut CodeAssembler, bits: u64| {
            let mut fine = a.create_label();
            a.mov(rsi, entry)?;
            a.mov(rax, qword_ptr(rsi))?;
            a.and(eax, (A | D) as i32)?;
            a.cmp(eax, bits as i32)?;
            a.je(fine)?;
            a.ud2()?;
            a.set_label(&mut fine)?;
            set_entry(a, entry, frame | P | U | W)?;
            flush(a)
        };
        if pcids {
            program.state.cr4 |= cr4::PCIDE;
        }
        program.kernel(&[&|a| expect(a, A | D), &|a| expect(a, A)]).run_to_end(10);
        println!("{name}");
    }
}

#[test]
fn a_page_that_was_flushed_is_what_the_tables_say() {
    for (name, pcids, flush) in FLUSHES {
        // The function's number is read and executed, the word behind it written.
        let mut program = Program::new(&|a| {
            a.mov(r12, PAGE)?;
            a.mov(r13d, 20)?;
            a.xor(r14d, r14d)?;
            let (mut again, mut wrong) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.xor(r14d, 1)?;
            call(a, 0)?; // to the frame of 2
            for expected in [2, 1] {
                a.mov(eax, dword_ptr(r12 + 1))?;
                a.cmp(eax, expected)?;
                a.jne(wrong)?;
                a.call(r12)?;
                a.cmp(eax, expected)?;
                a.jne(wrong)?;
                a.inc(dword_ptr(r12 + 8))?;
                call(a, if expected == 2 { 1 } else { 0 })?;
            }
            a.dec(r13d)?;
            a.jnz(again)?;
            a.int3()?;
            a.set_label(&mut wrong)?;
            a.ud2()
        });
        let frames = numbered(&mut program);
        program.bare.map(PAGE, frames[0], P | U | W);
        let entry = program.entry(PAGE);
        if pcids {
            program.state.cr4 |= cr4::PCIDE;
        }
        let remap = |a: &mut CodeAssembler, frame: u64| {
            set_entry(a, entry, frame | P | U | W)?;
            flush(a)
        };
        let machine = program.kernel(&[&|a| remap(a, frames[1]), &|a| remap(a, frames[0])]).run_to_end(60);
        for frame in frames {
            assert_eq!(machine.bare.read_u64(frame + 8), 20, "{name}");
        }
    }
}

#[test]
fn a_page_that_is_made_read_only_and_flushed_faults() {
    for (bits, error) in [(P | U, 7), (0, 6), (P | W, 7)] {
        for (name, pcids, flush) in FLUSHES {
            let mut program = Program::new(&|a| {
                a.mov(r12, PAGE)?;
                for _ in 0..4 {
                    a.inc(dword_ptr(r12))?;
                    call(a, 1)?;
                }
                call(a, 0)?;
                a.inc(dword_ptr(r12))?;
                a.ud2()
            });
            let frame = program.bare.page();
            program.bare.map(PAGE, frame, P | U | W);
            let entry = program.entry(PAGE);
            if pcids {
                program.state.cr4 |= cr4::PCIDE;
            }
            let change = |a: &mut CodeAssembler| {
                set_entry(a, entry, frame | bits)?;
                flush(a)
            };
            let machine = program.kernel(&[&change, &|a| a.nop()]).run(5);
            let found = machine.frame();
            // An INC reads first, but asks for both.
            assert_eq!((found.vector, found.error | 2), (14, error), "{name}, {bits:x}");
            assert_eq!((machine.state().cr2, machine.bare.read_u64(frame)), (PAGE, 4), "{name}, {bits:x}");
        }
    }
}

#[test]
fn a_large_page_is_flushed_as_a_whole() {
    let mut program = Program::new(&|a| {
        a.mov(r12, 0x80_0000u64)?;
        for offset in [0, 0x1000, 0x10_0000, 0x1f_f000] {
            a.mov(eax, dword_ptr(r12 + offset))?;
            a.mov(dword_ptr(r12 + offset + 8), 1)?;
        }
        call(a, 0)?;
        a.mov(eax, dword_ptr(r12 + 0x10_0000))?;
        a.ud2()
    });
    // The upper half of RAM.
    program.bare.map_large(0x80_0000, 0x60_0000, P | U | W);
    let entry = DIRECT + program.bare.entry(0x80_0000, 1);
    let machine = program
        .kernel(&[&|a| {
            set_entry(a, entry, 0)?;
            a.mov(rax, 0x80_0000u64 + 0x5000)?;
            a.invlpg(ptr(rax))
        }])
        .run(2);
    assert_eq!((machine.frame().vector, machine.frame().error, machine.state().cr2), (14, 4, 0x90_0000));
    assert_eq!(machine.bare.read_u64(0x60_0000 + 0x1f_f008), 1);
}

/// Two address spaces that differ in one page, with and without PCIDs, and with NO_FLUSH.
#[test]
fn each_address_space_has_its_own_pages() {
    for (pcids, keep) in [(false, false), (true, false), (true, true)] {
        let mut program = Program::new(&|a| {
            a.mov(r12, PAGE)?;
            a.mov(r13d, 50)?;
            let mut again = a.create_label();
            let mut wrong = a.create_label();
            a.set_label(&mut again)?;
            for number in [2, 1] {
                call(a, number - 1)?;
                a.call(r12)?;
                a.cmp(eax, number as i32)?;
                a.jne(wrong)?;
                a.cmp(dword_ptr(r12 + 1), number as i32)?;
                a.jne(wrong)?;
                a.inc(dword_ptr(r12 + 8))?;
            }
            a.dec(r13d)?;
            a.jnz(again)?;
            a.int3()?;
            a.set_label(&mut wrong)?;
            a.ud2()
        });
        let frames = numbered(&mut program);
        let roots = [program.bare.root, program.bare.page()];
        // What the second one shares: all but the tables of its programs.
        program.bare.map(PAGE, frames[0], P | U | W);
        let stack = program.bare.entry(USER_STACK - 4096, 0);
        let stack = program.bare.read_u64(stack);
        let other = &mut program.bare;
        let mut entries = vec![0; 4096];
        other.read(roots[0], &mut entries);
        other.write(roots[1] + 2048, &entries[2048..]);
        other.root = roots[1];
        for (va, gpa, bits) in
            [(USER, program.code, P | U), (PAGE, frames[1], P | U | W), (USER_STACK - 4096, 0, stack)]
        {
            other.map(va, gpa, bits);
        }
        if pcids {
            program.state.cr4 |= cr4::PCIDE;
        }
        let enter = |a: &mut CodeAssembler, index: usize| {
            let pcid = if pcids { index as u64 } else { 0 };
            a.mov(rax, roots[index] | pcid | if keep { NO_FLUSH } else { 0 })?;
            a.mov(cr3, rax)
        };
        let machine = program.kernel(&[&|a| enter(a, 0), &|a| enter(a, 1)]).run_to_end(100);
        for frame in frames {
            assert_eq!(machine.bare.read_u64(frame + 8), 50, "PCIDs: {pcids}, NO_FLUSH: {keep}");
        }
    }
}

/// The kernel changes a page of another PCID than its own, and flushes that.
#[test]
fn pages_of_a_pcid_that_is_not_current_are_flushed() {
    for kind in [0, 1, 2, 3] {
        let mut program = Program::new(&|a| {
            a.mov(r12, PAGE)?;
            a.mov(eax, dword_ptr(r12))?;
            a.inc(dword_ptr(r12 + 8))?;
            call(a, 0)?;
            a.mov(ebx, dword_ptr(r12))?;
            a.inc(dword_ptr(r12 + 8))?;
            a.int3()
        });
        let frames = [program.bare.page(), program.bare.page()];
        program.bare.write_u64(frames[0], 1);
        program.bare.write_u64(frames[1], 2);
        program.bare.map(PAGE, frames[0], P | U | W);
        let entry = program.entry(PAGE);
        let root = program.bare.root;
        program.state.cr4 |= cr4::PCIDE;
        program.state.cr3 = root | 5;
        let machine = program
            .kernel(&[&|a| {
                a.mov(rax, root | 6 | NO_FLUSH)?;
                a.mov(cr3, rax)?;
                set_entry(a, entry, frames[1] | P | U | W)?;
                invpcid(a, kind, 5)?;
                a.mov(rax, root | 5 | NO_FLUSH)?;
                a.mov(cr3, rax)
            }])
            .run_to_end(2);
        assert_eq!(machine.state().gpr[3], 2, "kind {kind}");
        assert_eq!(machine.bare.read_u64(frames[1] + 8), 1, "kind {kind}");
    }
}

/// How a program's code gets written.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Writer {
    Itself,
    Alias,
    Kernel,
}

#[test]
fn code_that_is_written_runs_as_written_by_whomever() {
    const ALIAS: u64 = 0x72_0000;
    for writer in [Writer::Itself, Writer::Alias, Writer::Kernel] {
        let mut program = Program::new(&|a| {
            let (mut again, mut wrong) = (a.create_label(), a.create_label());
            a.mov(r12, PAGE)?;
            a.mov(r15, ALIAS)?;
            a.mov(r13d, 300)?;
            a.set_label(&mut again)?;
            match writer {
                Writer::Itself => a.mov(dword_ptr(r12 + 1), r13d)?,
                Writer::Alias => a.mov(dword_ptr(r15 + 1), r13d)?,
                Writer::Kernel => call(a, 0)?,
            }
            a.call(r12)?;
            a.cmp(eax, r13d)?;
            a.jne(wrong)?;
            a.cmp(dword_ptr(r12 + 1), r13d)?;
            a.jne(wrong)?;
            a.dec(r13d)?;
            a.jnz(again)?;
            a.int3()?;
            a.set_label(&mut wrong)?;
            a.ud2()
        });
        let frame = program.bare.page();
        program.bare.write(frame, &FUNCTION);
        program.bare.map(PAGE, frame, P | U | W);
        program.bare.map(ALIAS, frame, P | U | W | pte::NX);
        program
            .kernel(&[&|a| {
                a.mov(rsi, DIRECT + frame)?;
                a.mov(dword_ptr(rsi + 1), r13d)
            }])
            .run_to_end(10);
    }
}

/// A counter beside the code that counts it, in a page that is read, written and executed all the time.
#[test]
fn a_page_of_code_and_data_has_both() {
    let mut program = Program::new(&|a| {
        a.mov(rax, PAGE)?;
        a.jmp(rax)
    });
    let frame = program.bare.page();
    program.bare.map(PAGE, frame, P | U | W);
    program.bare.assemble(frame, PAGE, 64, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 5000)?;
        a.mov(rbx, PAGE + 0x800)?;
        a.set_label(&mut again)?;
        a.inc(dword_ptr(rbx))?;
        a.mov(eax, dword_ptr(rbx + 8))?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.int3()
    });
    let machine = program.run_to_end(2);
    assert_eq!(machine.bare.read_u64(frame + 0x800), 5000);
}

/// An instruction of two pages, of which the second changes its frame.
#[test]
fn an_instruction_across_two_pages_is_made_of_both() {
    let mut program = Program::new(&|a| {
        let (mut again, mut wrong) = (a.create_label(), a.create_label());
        a.mov(r12, PAGE + 4096 - 3)?;
        a.mov(r13d, 20)?;
        a.set_label(&mut again)?;
        for (function, expected) in [(0, 0x1100_5555), (1, 0x2200_5555)] {
            call(a, function)?;
            a.call(r12)?;
            a.cmp(eax, expected)?;
            a.jne(wrong)?;
        }
        a.dec(r13d)?;
        a.jnz(again)?;
        a.int3()?;
        a.set_label(&mut wrong)?;
        a.ud2()
    });
    let frames = [program.bare.page(), program.bare.page(), program.bare.page()];
    program.bare.write(frames[0] + 4096 - 3, &[0xb8, 0x55, 0x55]);
    program.bare.write(frames[1], &[0, 0x11, 0xc3]);
    program.bare.write(frames[2], &[0, 0x22, 0xc3]);
    program.bare.map(PAGE, frames[0], P | U);
    program.bare.map(PAGE + 4096, frames[1], P | U);
    let entry = program.entry(PAGE + 4096);
    let remap = |a: &mut CodeAssembler, frame: u64| {
        set_entry(a, entry, frame | P | U)?;
        a.mov(rax, PAGE + 4096)?;
        a.invlpg(ptr(rax))
    };
    program.kernel(&[&|a| remap(a, frames[1]), &|a| remap(a, frames[2])]).run_to_end(20);
}

/// CPUID whose bytes come together only when the second page is mapped, or written.
#[test]
fn cpuid_across_two_pages_is_the_guests() {
    let mut program = Program::new(&|a| {
        a.mov(r12, PAGE + 4096 - 1)?;
        a.mov(r13, PAGE)?;
        a.mov(r14, PAGE + 4096)?;
        a.call(r13)?;
        a.call(r14)?; // both pages have run by now
        call(a, 0)?;
        a.mov(eax, 0x4000_0000)?;
        a.call(r12)?;
        a.int3()
    });
    let frames = [program.bare.page(), program.bare.page()];
    program.bare.write(frames[0], &[0x90; 4096]);
    program.bare.write(frames[0], &[0xc3]);
    program.bare.write(frames[0] + 4095, &[0x0f]);
    program.bare.write(frames[1], &[0xc3, 0xc3]);
    program.bare.map(PAGE, frames[0], P | U);
    program.bare.map(PAGE + 4096, frames[1], P | U);
    let machine = program
        .kernel(&[&|a| {
            a.mov(rsi, DIRECT + frames[1])?;
            a.mov(byte_ptr(rsi), 0xa2u32 as i32)?;
            a.mov(eax, 0x4000_0000)?;
            a.cpuid()?;
            a.mov(rsi, SLOT)?;
            a.mov(dword_ptr(rsi), eax)?;
            a.mov(dword_ptr(rsi + 4), ebx)
        }])
        .run_to_end(2);
    let answer = machine.bare.read_u64(SCRATCH);
    let gpr = machine.state().gpr;
    assert_eq!((gpr[0], gpr[3]), (answer & 0xffff_ffff, answer >> 32));
}

/// Global pages, which outlive a change of CR3.
#[test]
fn global_pages_are_seen_as_they_are() {
    let mut program = Program::new(&|a| {
        a.mov(r12, PAGE)?;
        a.mov(r13d, 10)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(dword_ptr(r12))?;
        call(a, 0)?;
        a.dec(r13d)?;
        a.jnz(again)?;
        a.int3()
    });
    let frames = [program.bare.page(), program.bare.page()];
    program.bare.map(PAGE, frames[0], P | U | W | pte::G);
    let entry = program.entry(PAGE);
    let machine = program
        .kernel(&[&|a| {
            a.mov(rsi, entry)?;
            a.mov(rax, qword_ptr(rsi))?;
            a.xor(rax, (frames[0] ^ frames[1]) as i32)?;
            a.mov(qword_ptr(rsi), rax)?;
            flush_page(a)
        }])
        .run_to_end(10);
    assert_eq!(frames.map(|frame| machine.bare.read_u64(frame)), [5, 5]);
}

#[test]
fn devices_and_rom_are_what_they_are_to_programs_too() {
    const DEVICE: u64 = 0xd000_0000;
    let mut program = Program::new(&|a| {
        a.mov(r12, PAGE)?; // the device
        a.mov(r13, PAGE + 0x1000)?; // RAM that the device governs
        a.mov(r15, DATA)?;
        a.mov(dword_ptr(r13), 0x11)?;
        a.mov(eax, dword_ptr(r12 + 0x10))?;
        a.mov(dword_ptr(r15), eax)?;
        a.mov(dword_ptr(r12 + 0x20), 0x77)?;
        // Read-only, then nothing, then RAM again.
        for (mode, at) in [(1, 4), (0, 8), (3, 12)] {
            a.mov(eax, dword_ptr(r13))?;
            a.mov(byte_ptr(r12 + (AREA_REGISTER - DEVICE) as i32), mode)?;
            a.mov(dword_ptr(r13), mode + 0x30)?;
            a.mov(eax, dword_ptr(r13))?;
            a.mov(dword_ptr(r15 + at), eax)?;
        }
        a.int3()
    });
    program.bare.map(PAGE, DEVICE, P | U | W);
    program.bare.map(PAGE + 0x1000, AREA, P | U | W);
    let data = program.data;
    let machine = program.run_to_end(2);
    let word = |at: u64| machine.bare.read_u64(data + at) as u32;
    assert_eq!(word(0), 0x1312_1110);
    assert_eq!(word(4), 0x11, "read-only");
    assert_eq!(word(12), 0x33, "RAM again");
    let writes = machine.port.mmio_writes();
    assert!(writes.contains(&(DEVICE + 0x20, vec![0x77, 0, 0, 0])), "{writes:x?}");
    assert!(writes.contains(&(AREA, vec![0x31, 0, 0, 0])), "{writes:x?}");
}

/// More pages than a process is given at a time.
#[test]
fn a_program_has_as_many_pages_as_it_uses() {
    let mut program = Program::new(&|a| {
        let (mut again, mut page) = (a.create_label(), a.create_label());
        a.mov(r13d, 2)?;
        a.set_label(&mut again)?;
        a.mov(r12, 0x1000_0000u64)?;
        a.mov(ecx, 70_000)?;
        a.set_label(&mut page)?;
        a.inc(dword_ptr(r12 + 16))?;
        a.add(r12, 4096)?;
        a.dec(ecx)?;
        a.jnz(page)?;
        a.dec(r13d)?;
        a.jnz(again)?;
        a.int3()
    });
    // One table for all: the same two megabytes again and again, in an order that makes no two neighbours one mapping.
    let frames = program.bare.pages(512);
    let table = program.bare.page();
    for index in 0..512 {
        program.bare.write_u64(table + 8 * index, (frames + (index ^ 1) * 4096) | P | U | W);
    }
    for region in 0..140 {
        let entry = program.bare.entry(0x1000_0000 + (region << 21), 1);
        program.bare.write_u64(entry, table | P | U | W);
    }
    let machine = program.run_to_end(1);
    let total: u64 = (0..512).map(|n| machine.bare.read_u64(frames + n * 4096 + 16)).sum();
    assert_eq!(total, 140_000);
}
