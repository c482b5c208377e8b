//! Paging: permissions, error codes, accessed and dirty bits, what the TLB may keep and what must drop it.

use arch::registers::{pte, rflags};
use difftest::bare::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const PAGE: u64 = 0x60_0000;
const USER: u64 = 0x40_0000;
const P: u64 = pte::P;
const W: u64 = pte::W;
const U: u64 = pte::U;

type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Vector, error code and CR2.
type Ending = (u64, u64, u64);

/// A machine whose page at [`PAGE`] is mapped with `bits`, running kernel or user code.
fn machine(bits: u64, user: bool, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Machine {
    let mut bare = Bare::new(8 << 20);
    let page = bare.page();
    // A RET, for those who jump there, and something to read.
    bare.write(page, &[0xc3, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77]);
    bare.map(PAGE, page, bits);
    let state = if user {
        let code = bare.page();
        bare.map(USER, code, P | U);
        bare.assemble(code, USER, 64, write);
        let stack = bare.page();
        bare.map(0x50_0000, stack, P | W | U | pte::NX);
        bare.user_state(USER, 0x50_1000, 64)
    } else {
        let rip = bare.kernel_code(CODE, write);
        bare.kernel_state(rip)
    };
    Machine::with_state(bare, &state)
}

/// The vector the code ends in, and for page faults the error code and address.
fn outcome(machine: &mut Machine) -> Ending {
    assert_eq!(machine.run(), End::Exit);
    let frame = machine.frame();
    (frame.vector, frame.error, machine.state().cr2)
}

const READ: Code = |a| {
    a.mov(rax, PAGE)?;
    a.mov(rbx, qword_ptr(rax))?;
    a.int3()
};
const WRITE: Code = |a| {
    a.mov(rax, PAGE)?;
    a.mov(qword_ptr(rax + 8), rax)?;
    a.int3()
};
const EXECUTE: Code = |a| {
    a.mov(rax, PAGE)?;
    a.call(rax)?;
    a.int3()
};

#[test]
fn permissions_are_those_of_the_page_and_the_level() {
    const OK: Ending = (3, 0, 0);
    let fault = |error: u64, offset: u64| (14, error, PAGE + offset);
    let nx = pte::NX;
    let cases: [(&str, u64, bool, Code, Ending); 17] = [
        ("kernel reads a kernel page", P, false, READ, OK),
        ("kernel writes a writable page", P | W, false, WRITE, OK),
        ("kernel writes a read-only page (CR0.WP)", P, false, WRITE, fault(3, 8)),
        ("kernel executes", P, false, EXECUTE, OK),
        ("kernel executes a no-execute page", P | nx, false, EXECUTE, fault(0x11, 0)),
        ("kernel reads a page that isn't there", 0, false, READ, fault(0, 0)),
        ("kernel writes a page that isn't there", 0, false, WRITE, fault(2, 8)),
        ("kernel reads a user page (SMAP)", P | U, false, READ, fault(1, 0)),
        ("kernel writes a user page (SMAP)", P | U | W, false, WRITE, fault(3, 8)),
        ("kernel executes a user page (SMEP)", P | U, false, EXECUTE, fault(0x11, 0)),
        ("user reads a user page", P | U, true, READ, OK),
        ("user writes a user page", P | U | W, true, WRITE, OK),
        ("user writes a read-only page", P | U, true, WRITE, fault(7, 8)),
        ("user reads a kernel page", P | W, true, READ, fault(5, 0)),
        ("user executes a kernel page", P, true, EXECUTE, fault(0x15, 0)),
        ("user executes a no-execute page", P | U | nx, true, EXECUTE, fault(0x15, 0)),
        ("user reads a page that isn't there", 0, true, READ, fault(4, 0)),
    ];
    for (name, bits, user, code, expected) in cases {
        let found = outcome(&mut machine(bits, user, code));
        let found = if expected.0 == 3 { (found.0, 0, 0) } else { found };
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn a_reserved_bit_is_a_fault_of_its_own() {
    let mut m = machine(P | W | 1 << 51, false, READ);
    assert_eq!(outcome(&mut m), (14, 9, PAGE));
}

#[test]
fn stac_lets_the_kernel_reach_user_pages_until_clac() {
    let mut m = machine(P | U | W, false, |a| {
        a.mov(rax, PAGE)?;
        a.stac()?;
        a.mov(rbx, qword_ptr(rax))?;
        a.clac()?;
        a.mov(rcx, qword_ptr(rax))?;
        a.int3()
    });
    let (vector, error, _) = outcome(&mut m);
    assert_eq!((vector, error), (14, 1));
    assert_eq!(m.state().gpr[3] & 0xff, 0xc3);
    assert_eq!(m.frame().rflags & rflags::AC, 0);
}

#[test]
fn stac_and_clac_leave_the_arithmetic_flags_alone_and_need_smap_to_matter() {
    let toggle_smap: Code = |a| {
        a.mov(rdi, cr4)?;
        a.btc(rdi, 21)?;
        a.mov(cr4, rdi)
    };
    let mut m = machine(P | U | W, false, |a| {
        let (mut again, mut read) = (a.create_label(), a.create_label());
        a.mov(rax, PAGE)?;
        a.xor(ebx, ebx)?;
        a.mov(ecx, 50)?;
        a.jmp(again)?;
        a.set_label(&mut read)?;
        a.mov(r9, qword_ptr(rax))?;
        a.inc(rbx)?;
        a.ret()?;
        a.set_label(&mut again)?;
        a.stc()?;
        a.stac()?;
        a.adc(rbx, 0)?;
        a.stac()?;
        // Calls and returns in the mode that STAC led to.
        a.call(read)?;
        a.cmp(ecx, 1)?;
        a.clac()?;
        a.setz(dl)?;
        a.clac()?;
        a.dec(ecx)?;
        a.jnz(again)?;
        toggle_smap(a)?;
        for _ in 0..2 {
            a.clac()?;
            a.call(read)?;
            a.stac()?;
            a.call(read)?;
        }
        toggle_smap(a)?;
        a.call(read)?;
        a.clac()?;
        a.call(read)?;
        a.int3()
    });
    let (vector, error, address) = outcome(&mut m);
    assert_eq!((vector, error, address), (14, 1, PAGE));
    let gpr = m.state().gpr;
    assert_eq!((gpr[3], gpr[2] & 0xff), (105, 1));
    assert_eq!(m.frame().rflags & rflags::AC, 0);
}

#[test]
fn without_wp_the_kernel_writes_read_only_pages() {
    let mut m = machine(P, false, |a| {
        a.mov(rcx, cr0)?;
        a.btr(rcx, 16)?;
        a.mov(cr0, rcx)?;
        WRITE(a)
    });
    assert_eq!(outcome(&mut m).0, 3);
}

#[test]
fn accessed_and_dirty_bits_are_set_by_what_was_done() {
    let entry = |m: &mut Machine| {
        let at = m.bare.entry(PAGE, 0);
        m.bare.read_u64(at) & (pte::A | pte::D)
    };
    let mut m = machine(P | W, false, |a| a.int3());
    outcome(&mut m);
    assert_eq!(entry(&mut m), 0);
    let mut m = machine(P | W, false, READ);
    outcome(&mut m);
    assert_eq!(entry(&mut m), pte::A);
    let mut m = machine(P | W, false, WRITE);
    outcome(&mut m);
    assert_eq!(entry(&mut m), pte::A | pte::D);
    // A write after a read of the same page: the cached translation must not hide it.
    let mut m = machine(P | W, false, |a| {
        a.mov(rax, PAGE)?;
        a.mov(rbx, qword_ptr(rax))?;
        WRITE(a)
    });
    outcome(&mut m);
    assert_eq!(entry(&mut m), pte::A | pte::D);
    let mut m = machine(P, false, WRITE);
    outcome(&mut m);
    assert_eq!(entry(&mut m) & pte::D, 0, "a write that faults leaves D alone");
}

#[test]
fn large_pages_map_their_whole_range() {
    let mut bare = Bare::new(8 << 20);
    bare.write_u64(0x20_0000 + 0x12_3458, 0xfeed);
    bare.map_large(0x8000_0000, 0x20_0000, P | W);
    let at = bare.entry(0x40_0000_0000, 2);
    bare.write_u64(at, P | W | pte::PS); // 1 GiB from physical address 0
    let rip = bare.kernel_code(CODE, |a| {
        a.mov(rax, 0x8012_3458u64)?;
        a.mov(rbx, qword_ptr(rax))?;
        a.mov(rax, 0x40_0032_3458u64)?;
        a.mov(rcx, qword_ptr(rax))?;
        a.mov(qword_ptr(rax), rax)?;
        a.int3()
    });
    let state = bare.kernel_state(rip);
    let mut m = Machine::with_state(bare, &state);
    assert_eq!(outcome(&mut m).0, 3);
    assert_eq!((m.state().gpr[3], m.state().gpr[1]), (0xfeed, 0xfeed));
    assert_eq!(m.bare.read_u64(at) & (pte::A | pte::D), pte::A | pte::D);
}

/// Kernel code that maps [`PAGE`] elsewhere, drops translations as `flush` does, and reads; the value it got is in RBX.
fn after_remap(global: bool, flush: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> u64 {
    let mut bare = Bare::new(8 << 20);
    let (old, new) = (bare.page(), bare.page());
    bare.write_u64(old, 1);
    bare.write_u64(new, 2);
    let bits = P | W | if global { pte::G } else { 0 };
    bare.map(PAGE, old, bits);
    let entry = DIRECT + bare.entry(PAGE, 0);
    let rip = bare.kernel_code(CODE, |a| {
        a.mov(rsi, PAGE)?;
        a.mov(rbx, qword_ptr(rsi))?;
        a.mov(rdi, entry)?;
        a.mov(rax, new | bits)?;
        a.mov(qword_ptr(rdi), rax)?;
        flush(a)?;
        a.mov(rbx, qword_ptr(rsi))?;
        a.int3()
    });
    let state = bare.kernel_state(rip);
    let mut m = Machine::with_state(bare, &state);
    assert_eq!(outcome(&mut m).0, 3);
    m.state().gpr[3]
}

#[test]
fn translations_are_dropped_by_what_drops_them() {
    assert_eq!(after_remap(false, |a| a.invlpg(byte_ptr(rsi))), 2, "INVLPG");
    assert_eq!(after_remap(true, |a| a.invlpg(byte_ptr(rsi))), 2, "INVLPG of a global page");
    let reload: Code = |a| {
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)
    };
    assert_eq!(after_remap(false, reload), 2, "MOV CR3");
    assert_eq!(
        after_remap(true, |a| {
            a.mov(rax, cr4)?;
            a.btc(rax, 7)?;
            a.mov(cr4, rax)
        }),
        2,
        "CR4.PGE"
    );
    assert_eq!(
        after_remap(true, |a| {
            a.mov(rax, cr0)?;
            a.btc(rax, 16)?;
            a.mov(cr0, rax)?;
            // CR0.WP need not flush; INVPCID of all contexts with global pages does.
            a.sub(rsp, 16)?;
            a.mov(qword_ptr(rsp), 0)?;
            a.mov(qword_ptr(rsp + 8), 0)?;
            a.mov(eax, 2)?;
            a.invpcid(rax, xmmword_ptr(rsp))
        }),
        2,
        "INVPCID type 2"
    );
    assert_eq!(
        after_remap(false, |a| {
            a.sub(rsp, 16)?;
            a.mov(qword_ptr(rsp), 0)?;
            a.mov(qword_ptr(rsp + 8), rsi)?;
            a.xor(eax, eax)?;
            a.invpcid(rax, xmmword_ptr(rsp))
        }),
        2,
        "INVPCID type 0"
    );
}

#[test]
fn each_pcid_has_its_own_translations() {
    // Two address spaces that differ in one page; the second one is entered and left without flushing.
    let mut bare = Bare::new(8 << 20);
    let (one, two) = (bare.page(), bare.page());
    bare.write_u64(one, 1);
    bare.write_u64(two, 2);
    bare.map(PAGE, one, P | W);
    let first = bare.root;
    bare.root = bare.page();
    bare.map(PAGE, two, P | W);
    let kernel = bare.read_u64(first + 8 * 256);
    bare.write_u64(bare.root + 8 * 256, kernel);
    let second = bare.root;
    bare.root = first;
    let rip = bare.kernel_code(CODE, |a| {
        a.mov(rsi, PAGE)?;
        a.mov(rax, cr4)?;
        a.bts(rax, 17)?;
        a.mov(cr4, rax)?;
        a.mov(rbx, qword_ptr(rsi))?;
        for (cr, to) in [(second | 1, rcx), (1 << 63 | first, rdx), (1 << 63 | second | 1, rdi)] {
            a.mov(rax, cr)?;
            a.mov(cr3, rax)?;
            a.mov(to, qword_ptr(rsi))?;
        }
        a.mov(r8, cr3)?;
        a.int3()
    });
    let state = bare.kernel_state(rip);
    let mut m = Machine::with_state(bare, &state);
    assert_eq!(outcome(&mut m).0, 3);
    let g = m.state().gpr;
    assert_eq!((g[3], g[1], g[2], g[7]), (1, 2, 1, 2));
    assert_eq!(g[8], second | 1, "bit 63 is not kept");
}

#[test]
fn a_write_across_pages_is_done_whole_or_not_at_all() {
    let mut bare = Bare::new(8 << 20);
    let page = bare.page();
    bare.map(PAGE, page, P | W);
    let rip = bare.kernel_code(CODE, |a| {
        a.mov(rax, PAGE + 4092)?;
        a.mov(rbx, u64::MAX)?;
        a.mov(qword_ptr(rax), rbx)?;
        a.int3()
    });
    let state = bare.kernel_state(rip);
    let mut m = Machine::with_state(bare, &state);
    assert_eq!(outcome(&mut m), (14, 2, PAGE + 4096));
    assert_eq!(m.bare.read_u64(page + 4088), 0);
}

#[test]
fn devices_are_reached_through_any_instruction() {
    let mut bare = Bare::new(8 << 20);
    bare.map(PAGE, 0xd000_0000, P | W);
    let rip = bare.kernel_code(CODE, |a| {
        a.mov(rsi, PAGE)?;
        a.mov(eax, dword_ptr(rsi + 0x10))?;
        a.movups(xmm1, xmmword_ptr(rsi + 0x20))?;
        a.movzx(ebx, byte_ptr(rsi + 0x31))?;
        a.add(dword_ptr(rsi + 0x40), 1)?;
        a.mov(qword_ptr(rsi + 0x48), rsi)?;
        a.mov(rdi, rsi)?;
        a.add(rdi, 0x50)?;
        a.mov(ecx, 3)?;
        a.mov(eax, 0xab)?;
        a.rep().stosb()?;
        a.mov(eax, dword_ptr(rsi + 0x10))?;
        a.int3()
    });
    let state = bare.kernel_state(rip);
    let mut m = Machine::with_state(bare, &state);
    assert_eq!(outcome(&mut m).0, 3);
    let state = m.state();
    assert_eq!((state.gpr[0], state.gpr[3]), (0x1312_1110, 0x31));
    let xmm: Vec<u8> = (0x20..0x30).collect();
    assert_eq!(state.xsave[160 + 16..][..16], xmm);
    let writes = m.port.mmio_writes();
    assert_eq!(writes[0], (0xd000_0040, 0x4342_4141u32.to_le_bytes().to_vec()));
    assert_eq!(writes[1], (0xd000_0048, PAGE.to_le_bytes().to_vec()));
    let bytes: Vec<_> = writes[2..]
        .iter()
        .flat_map(|(at, data)| data.iter().enumerate().map(move |(i, b)| (at + i as u64, *b)))
        .collect();
    assert_eq!(bytes, [(0xd000_0050, 0xab), (0xd000_0051, 0xab), (0xd000_0052, 0xab)]);
}

#[test]
fn a_device_that_changes_the_memory_map_leaves_the_stack_where_it_is() {
    let mut bare = Bare::new(8 << 20);
    bare.map(PAGE, AREA_REGISTER & !0xfff, P | W);
    let rip = bare.kernel_code(CODE, |a| {
        // By two registers: accesses that share a check, which then fails, would run in code that shares none.
        a.mov(rsi, PAGE + (AREA_REGISTER & 0xfff))?;
        a.mov(rdi, rsi)?;
        a.mov(rbx, 0x1234_5678_9abcu64)?;
        a.push(rbx)?;
        a.mov(byte_ptr(rsi), 1)?;
        a.pop(rcx)?;
        a.push(rbx)?;
        a.mov(byte_ptr(rdi), 3)?;
        a.pop(rdx)?;
        a.int3()
    });
    let stack = DIRECT + bare.pages(1) + 0x800;
    let mut state = bare.kernel_state(rip);
    state.gpr[4] = stack;
    let mut m = Machine::with_state(bare, &state);
    assert_eq!(outcome(&mut m).0, 3);
    let gpr = m.state().gpr;
    assert_eq!((gpr[1], gpr[2]), (gpr[3], gpr[3]));
    assert_eq!(m.port.mmio_writes(), [(AREA_REGISTER, vec![1]), (AREA_REGISTER, vec![3])]);
}

/// Shared libraries: the translator copies its code from one address to the next.
#[test]
fn code_that_is_mapped_at_many_addresses_knows_at_which_it_runs() {
    const ADDRESSES: [u64; 7] = [
        0x7f12_3456_7000,
        0x40_0000,
        0x5555_5555_4000,
        0x7fff_f7ff_e000,
        0x7f12_3457_8000,
        0xffff_ffff_c000_0000,
        0x7e00_0000_0000,
    ];
    const CONSTANT: u64 = 0x1111_1111;
    const PATCHED: u64 = 0x2222_2222;
    let mut bare = Bare::new(8 << 20);
    let pages = bare.pages(2);
    for va in ADDRESSES.into_iter().chain([PAGE]) {
        bare.map(va, pages, P | W);
        bare.map(va + 0x1000, pages + 0x1000, P | W);
    }
    // rsi sums up what the code knows of where it is.
    bare.assemble(pages, 0, 64, |a| {
        let (mut start, mut near, mut fault, mut go_on) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.set_label(&mut start)?;
        a.mov(ecx, CONSTANT as i32)?; // its bytes 1-4
        a.add(rsi, rcx)?;
        a.lea(rax, ptr(start))?;
        a.add(rsi, rax)?;
        a.call(near)?;
        a.call(0x1000u64)?;
        a.cmp(rdi, 1)?;
        a.jne(go_on)?;
        a.jmp(fault)?;
        a.set_label(&mut go_on)?;
        a.ret()?;
        a.set_label(&mut near)?;
        a.mov(rax, qword_ptr(rsp))?;
        a.add(rsi, rax)?;
        a.ret()?;
        a.set_label(&mut fault)?;
        a.ud2()
    });
    // The second page: adds its return address as well.
    bare.write(pages + 0x1000, &[0x48, 0x03, 0x34, 0x24, 0xc3]);
    let rip = bare.kernel_code(CODE, |a| {
        a.xor(esi, esi)?;
        a.xor(edi, edi)?;
        for round in 0..4 {
            if round == 3 {
                a.mov(rax, PAGE + 1)?;
                a.mov(dword_ptr(rax), PATCHED as i32)?;
            }
            for address in ADDRESSES {
                a.mov(rax, address)?;
                a.call(rax)?;
            }
        }
        a.mov(edi, 1)?;
        a.mov(rax, ADDRESSES[2])?;
        a.call(rax)
    });
    let state = bare.kernel_state(rip);
    let mut bytes = [0; 0x40];
    bare.read(pages, &mut bytes);
    let ud2 = bytes.windows(2).position(|w| w == [0x0f, 0x0b]).unwrap() as u64;
    let calls: Vec<u64> = (0..0x30).filter(|&i| bytes[i] == 0xe8).map(|i| i as u64 + 5).collect();
    let mut m = Machine::with_state(bare, &state);
    assert_eq!(outcome(&mut m).0, 6);
    assert_eq!(m.frame().rip, ADDRESSES[2] + ud2);
    let once = |address: u64| calls.iter().fold(address, |sum, call| sum.wrapping_add(address + call));
    let all = ADDRESSES.iter().fold(0u64, |sum, a| sum.wrapping_add(once(*a)));
    let constants = CONSTANT * 7 * 3 + PATCHED * 8;
    let expected = all.wrapping_mul(4).wrapping_add(once(ADDRESSES[2])).wrapping_add(constants);
    assert_eq!(m.state().gpr[6], expected);
}

/// Where a branch between global pages leads after its target was mapped elsewhere: the branch runs a few times, the page is
/// another one from then on, and translations are dropped as `flush` does. RBX has what the code there moved to it.
fn branch_after_remap(bits: u64, flush: Code) -> u64 {
    const FROM: u64 = 0x7000_0000;
    const TO: u64 = 0x7000_5000;
    let mut bare = Bare::new(8 << 20);
    let (from, old, new) = (bare.page(), bare.page(), bare.page());
    for (page, value) in [(old, 1), (new, 2)] {
        bare.assemble(page, TO, 64, |a| {
            a.mov(ebx, value)?;
            a.jmp(rdx)
        });
    }
    bare.map(FROM, from, P | W | bits);
    bare.map(TO, old, P | W | bits);
    let entry = DIRECT + bare.entry(TO, 0);
    // A jump forward, and a call back to it from code that ends in the next page.
    bare.assemble(from, FROM, 64, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 5)?;
        a.lea(rdx, ptr(again))?;
        a.jmp(TO)?;
        a.set_label(&mut again)?;
        a.lea(rdx, ptr(FROM + 0x100))?;
        a.call(TO)
    });
    bare.assemble(from + 0x100, FROM + 0x100, 64, |a| {
        a.pop(rax)?;
        a.sub(ecx, 1)?;
        let mut out = a.create_label();
        a.jz(out)?;
        a.lea(rdx, ptr(FROM + 0x100))?;
        a.push(rax)?;
        a.test(ecx, ecx)?;
        a.jnz(TO)?;
        a.set_label(&mut out)?;
        a.mov(rdi, entry)?;
        a.mov(rax, new | P | W | bits)?;
        a.mov(qword_ptr(rdi), rax)?;
        a.mov(rsi, TO)?;
        flush(a)?;
        a.lea(rdx, ptr(FROM + 0x300))?;
        a.xor(ebx, ebx)?;
        a.jmp(TO)
    });
    bare.assemble(from + 0x300, FROM + 0x300, 64, |a| a.int3());
    let state = bare.kernel_state(FROM);
    let mut m = Machine::with_state(bare, &state);
    assert_eq!(outcome(&mut m).0, 3);
    assert_eq!(m.state().gpr[1], 0);
    m.state().gpr[3]
}

#[test]
fn a_branch_to_another_page_goes_where_that_page_is_mapped_after_a_flush() {
    let invlpg: Code = |a| a.invlpg(byte_ptr(rsi));
    assert_eq!(branch_after_remap(0, invlpg), 2, "INVLPG");
    assert_eq!(branch_after_remap(pte::G, invlpg), 2, "INVLPG of a global page");
    let reload: Code = |a| {
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)
    };
    assert_eq!(branch_after_remap(0, reload), 2, "MOV CR3");
    let toggle: Code = |a| {
        a.mov(rax, cr4)?;
        a.btc(rax, 7)?;
        a.mov(cr4, rax)
    };
    assert_eq!(branch_after_remap(pte::G, toggle), 2, "CR4.PGE");
    let all: Code = |a| {
        a.sub(rsp, 16)?;
        a.mov(qword_ptr(rsp), 0)?;
        a.mov(qword_ptr(rsp + 8), 0)?;
        a.mov(eax, 2)?;
        a.invpcid(rax, xmmword_ptr(rsp))
    };
    assert_eq!(branch_after_remap(pte::G, all), 2, "INVPCID type 2");
}

#[test]
fn a_page_that_is_not_global_is_branched_to_where_each_address_space_has_it() {
    const FROM: u64 = 0x7000_0000;
    const TO: u64 = 0x7020_5000;
    let mut bare = Bare::new(8 << 20);
    let (from, one, two) = (bare.page(), bare.page(), bare.page());
    for (page, value) in [(one, 1), (two, 0x10)] {
        bare.assemble(page, TO, 64, |a| {
            a.lea(rbx, ptr(rbx + value))?;
            a.jmp(rdx)
        });
    }
    bare.map(FROM, from, P | W | pte::G);
    bare.map(TO, one, P | W);
    // The other address space differs in the table that maps the target.
    let mut bytes = [0; 4096];
    let mut copy = |bare: &mut Bare, from: u64| {
        let to = bare.page();
        bare.read(from, &mut bytes);
        bare.write(to, &bytes);
        to
    };
    let root = bare.kernel_state(FROM).cr3;
    let entries = [bare.entry(TO, 3), bare.entry(TO, 2), bare.entry(TO, 1), bare.entry(TO, 0)];
    let other_root = copy(&mut bare, root);
    let mut table = other_root;
    for entry in &entries[..3] {
        let below = bare.read_u64(*entry);
        let below_copy = copy(&mut bare, below & !0xfff);
        bare.write_u64(table + entry % 4096, below_copy | below & 0xfff);
        table = below_copy;
    }
    bare.write_u64(table + entries[3] % 4096, two | P | W);
    bare.assemble(from, FROM, 64, |a| {
        a.mov(ecx, 6)?;
        let mut next = a.create_label();
        a.set_label(&mut next)?;
        a.lea(rdx, ptr(FROM + 0x100))?;
        a.jmp(TO)
    });
    bare.assemble(from + 0x100, FROM + 0x100, 64, |a| {
        a.mov(rax, cr3)?;
        a.xor(rax, (root ^ other_root) as i32)?;
        a.mov(cr3, rax)?;
        a.sub(ecx, 1)?;
        a.lea(rdx, ptr(FROM + 0x100))?;
        a.jnz(TO)?;
        a.int3()
    });
    let state = bare.kernel_state(FROM);
    let mut m = Machine::with_state(bare, &state);
    assert_eq!(outcome(&mut m).0, 3);
    assert_eq!(m.state().gpr[3], 0x33);
}
