//! Process-context identifiers: what a switch of address spaces keeps, what drops it, and what happens meanwhile to the
//! memory that another address space maps (Intel SDM 3A 4.10.1, 4.10.4).

use arch::registers::{cr4, pte};
use difftest::bare::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const PAGE: u64 = 0x60_0000;
const P: u64 = pte::P;
const W: u64 = pte::W;
const NO_FLUSH: u64 = 1 << 63;
/// MOV EBX, 1 and MOV EBX, 2, each with a RET behind it.
const FUNCTIONS: [[u8; 8]; 2] = [[0xbb, 1, 0, 0, 0, 0xc3, 0, 0], [0xbb, 2, 0, 0, 0, 0xc3, 0, 0]];

type Code<'a> = &'a dyn Fn(&mut CodeAssembler, &Space) -> Result<(), IcedError>;

/// What the code of a test needs to know.
struct Space {
    root: u64,
    /// The linear address of PAGE's entry.
    entry: u64,
    bits: u64,
    /// Where PAGE is mapped first, and then.
    frames: [u64; 2],
}

impl Space {
    fn enter(&self, a: &mut CodeAssembler, pcid: u64, keep: bool) -> Result<(), IcedError> {
        a.mov(rax, self.root | pcid | if keep { NO_FLUSH } else { 0 })?;
        a.mov(cr3, rax)
    }

    /// Calls the function at PAGE, and reads it: EBX and ECX are what it returns and its immediate.
    fn use_page(&self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        a.mov(rsi, PAGE)?;
        a.call(rsi)?;
        a.mov(ecx, dword_ptr(rsi + 1))
    }

    fn remap(&self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        a.mov(rdi, self.entry)?;
        a.mov(rax, self.frames[1] | self.bits)?;
        a.mov(qword_ptr(rdi), rax)
    }

    fn invpcid(&self, a: &mut CodeAssembler, kind: u64, pcid: u64) -> Result<(), IcedError> {
        a.sub(rsp, 16)?;
        a.mov(rax, pcid)?;
        a.mov(qword_ptr(rsp), rax)?;
        a.mov(rax, PAGE)?;
        a.mov(qword_ptr(rsp + 8), rax)?;
        a.mov(rax, kind)?;
        a.invpcid(rax, xmmword_ptr(rsp))?;
        a.add(rsp, 16)
    }
}

/// Runs kernel code with PCIDs on in PCID 0; what EBX and ECX are at its end.
fn run(global: bool, code: Code) -> (u64, u64) {
    let mut bare = Bare::new(8 << 20);
    let frames = [bare.page(), bare.page()];
    for (frame, function) in frames.into_iter().zip(FUNCTIONS) {
        bare.write(frame, &function);
    }
    let bits = P | W | if global { pte::G } else { 0 };
    bare.map(PAGE, frames[0], bits);
    let space = Space { root: bare.root, entry: DIRECT + bare.entry(PAGE, 0), bits, frames };
    let rip = bare.kernel_code(CODE, |a| {
        a.mov(rax, cr4)?;
        a.or(rax, (cr4::PCIDE | cr4::PGE) as i32)?;
        a.mov(cr4, rax)?;
        code(a, &space)?;
        a.int3()
    });
    let state = bare.kernel_state(rip);
    let mut m = Machine::with_state(bare, &state);
    assert_eq!(m.run(), End::Exit);
    assert_eq!(m.frame().vector, 3);
    (m.state().gpr[3] & 0xffff_ffff, m.state().gpr[1])
}

/// The page is used in PCID 1, and mapped elsewhere; `drop` runs in PCID 2, and `enter` is how PCID 1 is entered again.
fn after_remap(global: bool, drop: Code, keep: bool) -> (u64, u64) {
    run(global, &|a, space| {
        space.enter(a, 1, false)?;
        space.use_page(a)?;
        space.enter(a, 2, true)?;
        space.enter(a, 1, true)?;
        space.use_page(a)?;
        space.enter(a, 2, true)?;
        space.remap(a)?;
        drop(a, space)?;
        space.enter(a, 1, keep)?;
        space.use_page(a)
    })
}

#[test]
fn what_drops_translations_of_another_pcid() {
    let new = (2, 2);
    assert_eq!(after_remap(false, &|_, _| Ok(()), false), new, "MOV CR3 without bit 63");
    assert_eq!(after_remap(false, &|a, s| s.invpcid(a, 0, 1), true), new, "INVPCID of an address");
    assert_eq!(after_remap(false, &|a, s| s.invpcid(a, 1, 1), true), new, "INVPCID of a PCID");
    assert_eq!(after_remap(false, &|a, s| s.invpcid(a, 3, 0), true), new, "INVPCID of all PCIDs");
    assert_eq!(after_remap(true, &|a, s| s.invpcid(a, 2, 0), true), new, "INVPCID of everything");
    assert_eq!(after_remap(true, &|a, _| a.invlpg(byte_ptr(PAGE as u32)), true), new, "INVLPG of a global page");
    for bit in [7, 20] {
        let toggle: Code = &|a, _| {
            for _ in 0..2 {
                a.mov(rax, cr4)?;
                a.btc(rax, bit)?;
                a.mov(cr4, rax)?;
            }
            Ok(())
        };
        assert_eq!(after_remap(true, toggle, true), new, "CR4 bit {bit}");
    }
    let other_pcids = (0..40u64).map(|n| n + 3);
    let many: Code = &|a, s| {
        other_pcids.clone().try_for_each(|pcid| {
            s.enter(a, pcid, true)?;
            a.mov(al, byte_ptr(PAGE as u32))
        })?;
        s.invpcid(a, 1, 1)
    };
    assert_eq!(after_remap(false, many, true), new, "with many other PCIDs in between");
}

#[test]
fn a_pcid_that_is_given_to_other_tables_is_flushed_by_its_new_owner() {
    let result = run(false, &|a, space| {
        space.enter(a, 1, false)?;
        space.use_page(a)?;
        space.enter(a, 2, false)?;
        space.remap(a)?;
        // As an operating system does that gives PCID 1 to a new process.
        space.enter(a, 1, false)?;
        space.enter(a, 2, true)?;
        space.enter(a, 1, true)?;
        space.use_page(a)
    });
    assert_eq!(result, (2, 2));
}

#[test]
fn a_switch_within_a_pcid_flushes_it_unless_told_not_to() {
    let result = run(false, &|a, space| {
        space.enter(a, 1, false)?;
        space.use_page(a)?;
        space.remap(a)?;
        space.enter(a, 1, false)?;
        space.use_page(a)
    });
    assert_eq!(result, (2, 2));
}

#[test]
fn code_that_another_pcid_writes_is_new_in_this_one() {
    // Through the direct map, so that no translation of PAGE is concerned.
    let result = run(false, &|a, space| {
        space.enter(a, 1, false)?;
        space.use_page(a)?;
        space.enter(a, 2, true)?;
        a.mov(rdi, DIRECT + space.frames[0])?;
        a.mov(dword_ptr(rdi + 1), 5)?;
        space.enter(a, 1, true)?;
        space.use_page(a)
    });
    assert_eq!(result, (5, 5));
}

#[test]
fn stores_are_seen_by_code_that_another_pcid_has_run_meanwhile() {
    // The page can be written in PCID 1 before anyone runs code of it.
    let result = run(false, &|a, space| {
        space.enter(a, 1, false)?;
        a.mov(rsi, PAGE)?;
        a.mov(qword_ptr(rsi + 64), rsi)?;
        space.enter(a, 2, true)?;
        a.mov(rdi, DIRECT + space.frames[0])?;
        a.call(rdi)?;
        space.enter(a, 1, true)?;
        a.mov(dword_ptr(rsi + 1), 7)?;
        space.enter(a, 2, true)?;
        a.call(rdi)?;
        a.mov(ecx, dword_ptr(rdi + 1))
    });
    assert_eq!(result, (7, 7));
}

#[test]
fn turning_pcids_off_and_on_drops_them_all() {
    let result = run(false, &|a, space| {
        space.enter(a, 1, false)?;
        space.use_page(a)?;
        // PCIDE can be set only in PCID 0.
        space.enter(a, 0, true)?;
        space.remap(a)?;
        for _ in 0..2 {
            a.mov(rax, cr4)?;
            a.btc(rax, 17)?;
            a.mov(cr4, rax)?;
        }
        space.enter(a, 1, true)?;
        space.use_page(a)
    });
    assert_eq!(result, (2, 2));
}
