//! Registers go in and come out unchanged, and are the ones that guest code has.

use iced_x86::code_asm::*;

use super::{CODE, DATA, Ram, registers};
use crate::{Error, Registers, Stop};

/// The status flags, DF and AC.
const FLAGS: u64 = 0x4_0cd5;

#[test]
fn general_registers_flags_and_bases_go_in_and_out_unchanged() {
    let ram = Ram::new(2);
    let mut space = ram.program(&[0xcc]);
    for seed in 1..50u64 {
        let value = |index: u64| (seed * 64 + index).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut start = registers();
        for (index, register) in words(&mut start).into_iter().enumerate() {
            *register = value(index as u64);
        }
        start.eflags = 0x202 | value(20) & FLAGS;
        (start.fs_base, start.gs_base) = (value(21) >> 18, value(22) >> 18);
        let mut end = start;
        assert_eq!(space.run(&mut end).unwrap(), Stop::Breakpoint);
        let expected = Registers { rip: CODE + 1, orig_rax: u64::MAX, ..start };
        assert_eq!(format!("{end:?}"), format!("{expected:?}"));
    }
}

/// The general registers.
pub fn words(registers: &mut Registers) -> [&mut u64; 16] {
    let r = registers;
    [
        &mut r.rax, &mut r.rbx, &mut r.rcx, &mut r.rdx, &mut r.rsi, &mut r.rdi, &mut r.rbp, &mut r.rsp, &mut r.r8,
        &mut r.r9, &mut r.r10, &mut r.r11, &mut r.r12, &mut r.r13, &mut r.r14, &mut r.r15,
    ]
}

#[test]
fn guest_code_computes_with_the_registers_it_is_given() {
    let ram = Ram::new(2);
    let mut a = CodeAssembler::new(64).unwrap();
    a.lea(rax, rbx + r15 * 2).unwrap();
    a.mov(qword_ptr(rsp), rax).unwrap();
    a.mov(rcx, qword_ptr(0).fs()).unwrap();
    a.add(rcx, qword_ptr(8).gs()).unwrap();
    a.std().unwrap();
    a.syscall().unwrap();
    let mut space = ram.program(&a.assemble(CODE).unwrap());
    ram.write(4096 + 0x100, &40u64.to_le_bytes());
    ram.write(4096 + 0x208, &2u64.to_le_bytes());
    let mut start = registers();
    (start.rbx, start.r15, start.fs_base, start.gs_base) = (1000, 11, DATA + 0x100, DATA + 0x200);
    // RCX is lost to SYSCALL, so it is stepped up to there.
    start.eflags |= 0x100;
    for _ in 0..4 {
        assert_eq!(space.run(&mut start).unwrap(), Stop::Step);
    }
    assert_eq!((start.rax, start.rcx, ram.word(4096 + 0x800)), (1022, 42, 1022));
    start.eflags &= !0x100;
    assert_eq!(space.run(&mut start).unwrap(), Stop::Syscall);
    assert_eq!(start.eflags & 0x400, 0x400);
}

#[test]
fn a_base_that_guest_code_sets_comes_out() {
    if std::arch::x86_64::__cpuid_count(7, 0).ebx & 1 == 0 {
        return;
    }
    let ram = Ram::new(2);
    // wrfsbase rax; wrgsbase rbx; int3
    let mut space = ram.program(&[0xf3, 0x48, 0x0f, 0xae, 0xd0, 0xf3, 0x48, 0x0f, 0xae, 0xdb, 0xcc]);
    let mut start = registers();
    (start.rax, start.rbx) = (0x1234_5678_9abc, 0xffff_8000_0000_1000);
    assert_eq!(space.run(&mut start).unwrap(), Stop::Breakpoint);
    assert_eq!((start.fs_base, start.gs_base), (0x1234_5678_9abc, 0xffff_8000_0000_1000));
    // Which can't be set from outside again: the host's kernel takes user addresses only.
    assert!(matches!(space.run(&mut start), Err(Error::Registers(_))));
    start.gs_base = 0;
    start.rip = CODE + 10;
    assert_eq!(space.run(&mut start).unwrap(), Stop::Breakpoint);
}

#[test]
fn registers_that_no_user_code_has_are_refused_before_anything_is_set() {
    let ram = Ram::new(2);
    let mut space = ram.program(&[0xcc]);
    for wrong in [
        Registers { cs: 0x10, ..registers() },
        Registers { cs: 0, ..registers() },
        Registers { ss: 0x18, ..registers() },
        Registers { ds: 0x1_0003, ..registers() },
        Registers { fs_base: 1 << 47, ..registers() },
        Registers { gs_base: u64::MAX, ..registers() },
    ] {
        let mut start = wrong;
        assert!(matches!(space.run(&mut start), Err(Error::Registers(_))), "{wrong:?}");
        assert_eq!(format!("{start:?}"), format!("{wrong:?}"));
    }
    assert_eq!(space.run(&mut registers()).unwrap(), Stop::Breakpoint);
}

#[test]
fn thirty_two_bit_code_runs_and_its_system_calls_stop() {
    let ram = Ram::new(2);
    // inc eax (40 is a prefix in 64-bit code); int 80h
    let mut space = ram.program(&[0x40, 0x40, 0xcd, 0x80]);
    let mut start = Registers { cs: 0x23, rax: 18, rsp: 0x1000, ..registers() };
    let stop = space.run(&mut start).unwrap();
    assert!(matches!(stop, Stop::Syscall | Stop::Exception { signal: libc::SIGSEGV }), "{stop:?}");
    assert_eq!((start.rax, start.cs), (20, 0x23));
    // And mappings are done as before.
    space.map(0x1000, 4096, 0, crate::Protection::ReadExecute);
    start.rip = 0x1000;
    space.run(&mut start).unwrap();
    assert_eq!(start.rax, 22);
}

#[test]
fn vector_state_goes_in_and_out_unchanged() {
    let ram = Ram::new(2);
    let mut space = ram.program(&[0xcc]);
    assert_eq!(space.run(&mut registers()).unwrap(), Stop::Breakpoint);
    let mut area = vec![0u8; space.vector_size()];
    assert_eq!(space.vector_state(&mut area).unwrap(), area.len());
    // Software bytes of the legacy region say which components this host has (Linux, `uapi/asm/sigcontext.h`).
    let mut components = u64::from_le_bytes(area[464..472].try_into().unwrap()) & 0xe7;
    if components == 0 {
        components = 3;
    }
    area[512..520].copy_from_slice(&components.to_le_bytes());
    for (index, byte) in area.iter_mut().enumerate() {
        // XMM registers, and all beyond the header: YMM and ZMM. The offset of PKRU's lies behind these if it exists.
        if (160..416).contains(&index) || (576..832).contains(&index) && components & 4 != 0 {
            *byte = (index * 7 % 251) as u8;
        }
    }
    if components & 0xe0 == 0xe0 {
        for (component, length) in [(5, 64), (6, 512), (7, 1024)] {
            let offset = std::arch::x86_64::__cpuid_count(0xd, component).ebx as usize;
            for (index, byte) in area[offset..offset + length].iter_mut().enumerate() {
                *byte = (index * 11 % 253) as u8;
            }
        }
    }
    // MXCSR and the x87's control word.
    area[24..28].copy_from_slice(&0x3f80u32.to_le_bytes());
    area[0..2].copy_from_slice(&0x0f7fu16.to_le_bytes());
    space.set_vector_state(&area).unwrap();
    let mut after = vec![0u8; area.len()];
    space.vector_state(&mut after).unwrap();
    assert_eq!(after, area);
    // Nor do a run, and a batch of mappings, change it.
    space.map(DATA + 0x10_0000, 4096, 0, crate::Protection::Read);
    assert_eq!(space.run(&mut registers()).unwrap(), Stop::Breakpoint);
    space.vector_state(&mut after).unwrap();
    assert_eq!(after, area);
}

#[test]
fn guest_code_computes_with_the_vector_registers_it_is_given() {
    let ram = Ram::new(2);
    let mut a = CodeAssembler::new(64).unwrap();
    a.paddq(xmm3, xmm9).unwrap();
    a.movdqu(xmmword_ptr(rsp), xmm3).unwrap();
    a.int3().unwrap();
    let mut space = ram.program(&a.assemble(CODE).unwrap());
    // An area as short as its header allows is enough.
    let mut area = [0u8; 576];
    (area[24..28]).copy_from_slice(&0x1f80u32.to_le_bytes());
    area[512] = 2;
    area[160 + 3 * 16] = 40;
    area[160 + 9 * 16] = 2;
    space.set_vector_state(&area).unwrap();
    assert_eq!(space.run(&mut registers()).unwrap(), Stop::Breakpoint);
    assert_eq!(ram.word(4096 + 0x800), 42);
    let mut short = [0u8; 600];
    assert_eq!(space.vector_state(&mut short).unwrap(), 600);
    assert_eq!(short[160 + 3 * 16], 42);
    assert!(matches!(space.set_vector_state(&area[..575]), Err(Error::Registers(_))));
}
