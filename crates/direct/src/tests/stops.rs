//! Whatever guest code does that the processor does not do alone is a stop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use iced_x86::code_asm::*;

use super::{CODE, DATA, Ram, registers, stop_of};
use crate::{Error, KickSlot, Protection, RESERVED, Space, Stop};

#[test]
fn syscall_of_every_number_stops_and_reaches_no_kernel() {
    let ram = Ram::new(2);
    let mut space = ram.program(&[0x0f, 0x05]);
    // exit_group, kill, munmap and fork among them: had one been done, the process would not go on like this.
    for number in (0..600).chain([u64::MAX, 1 << 30, 0x4000_0000 | 9, 0xffff_ffff]) {
        let mut registers = registers();
        (registers.rax, registers.rdi, registers.rsi, registers.rdx) = (number, 0, u64::MAX, 7);
        assert_eq!(space.run(&mut registers).unwrap(), Stop::Syscall);
        assert_eq!((registers.rax, registers.rip), (number, CODE + 2));
        assert_eq!((registers.rdi, registers.rsi, registers.rdx), (0, u64::MAX, 7));
        assert_eq!((registers.rcx, registers.r11), (CODE + 2, registers.eflags));
    }
}

#[test]
fn guest_code_goes_on_behind_its_syscall_with_the_result_it_is_given() {
    let ram = Ram::new(2);
    let mut a = CodeAssembler::new(64).unwrap();
    a.syscall().unwrap();
    a.mov(qword_ptr(DATA), rax).unwrap();
    a.int3().unwrap();
    let mut space = ram.program(&a.assemble(CODE).unwrap());
    let mut registers = registers();
    assert_eq!(space.run(&mut registers).unwrap(), Stop::Syscall);
    // What the host's kernel would take as "to be repeated" (ERESTARTSYS).
    registers.rax = -512i64 as u64;
    assert_eq!(space.run(&mut registers).unwrap(), Stop::Breakpoint);
    assert_eq!(ram.word(4096), -512i64 as u64);
}

#[test]
fn int_80h_reaches_no_kernel() {
    for number in [1, 2, 20, 37, 91] {
        let ram = Ram::new(2);
        let mut space = ram.program(&[0xcd, 0x80]);
        let mut registers = registers();
        (registers.rax, registers.rbx) = (number, 0);
        let stop = space.run(&mut registers).unwrap();
        // On hosts without 32-bit system calls there is no such interrupt.
        assert!(matches!(stop, Stop::Syscall | Stop::Exception { signal: libc::SIGSEGV }), "{stop:?}");
        assert_eq!(registers.rax, number);
    }
}

#[test]
fn a_page_fault_says_its_address_and_leaves_the_instruction_undone() {
    let ram = Ram::new(2);
    // mov rax, [rsi]
    let mut space = ram.program(&[0x48, 0x8b, 0x06, 0xcc]);
    for address in [0, 8, 0x1234_5678, DATA + 0x1000, 0x7fff_ffff_e000, 0xffff_8000_0000_0000, u64::MAX - 7] {
        let mut registers = registers();
        (registers.rsi, registers.rax) = (address, 77);
        assert_eq!(space.run(&mut registers).unwrap(), Stop::Page { address });
        assert_eq!((registers.rip, registers.rax), (CODE, 77));
    }
    // A jump.
    let mut registers = registers();
    registers.rip = 0x5000_0123;
    assert_eq!(space.run(&mut registers).unwrap(), Stop::Page { address: 0x5000_0123 });
}

#[test]
fn pages_allow_only_what_they_are_mapped_for() {
    let ram = Ram::new(2);
    // mov [rsi], rax
    let mut space = ram.program(&[0x48, 0x89, 0x06, 0xcc]);
    let mut start = registers();
    start.rsi = CODE + 0x100;
    assert_eq!(space.run(&mut start).unwrap(), Stop::Page { address: CODE + 0x100 });
    let mut start = registers();
    start.rip = DATA;
    assert_eq!(space.run(&mut start).unwrap(), Stop::Page { address: DATA });
    space.map(DATA, 4096, 4096, Protection::Read);
    let mut start = registers();
    start.rsi = DATA + 8;
    assert_eq!(space.run(&mut start).unwrap(), Stop::Page { address: DATA + 8 });
    space.map(DATA, 4096, 4096, Protection::ReadWrite);
    assert_eq!(space.run(&mut start).unwrap(), Stop::Breakpoint);
}

#[test]
fn exceptions_stop_at_their_instruction() {
    // xor edx, edx; xor ecx, ecx; div ecx
    let (stop, registers) = stop_of(&[0x31, 0xd2, 0x31, 0xc9, 0xf7, 0xf1]);
    assert_eq!((stop, registers.rip), (Stop::Exception { signal: libc::SIGFPE }, CODE + 4));
    // ud2
    let (stop, registers) = stop_of(&[0x0f, 0x0b]);
    assert_eq!((stop, registers.rip), (Stop::Exception { signal: libc::SIGILL }, CODE));
    // hlt; cli; in al, dx: #GP
    for code in [0xf4, 0xfa, 0xec] {
        let (stop, registers) = stop_of(&[code]);
        assert_eq!((stop, registers.rip), (Stop::Exception { signal: libc::SIGSEGV }, CODE));
    }
    // int 81h: #GP
    let (stop, registers) = stop_of(&[0xcd, 0x81]);
    assert_eq!((stop, registers.rip), (Stop::Exception { signal: libc::SIGSEGV }, CODE));
}

#[test]
fn an_address_that_is_not_canonical_is_an_exception() {
    let ram = Ram::new(2);
    let mut space = ram.program(&[0x48, 0x8b, 0x06]);
    let mut start = registers();
    start.rsi = 1 << 63;
    assert_eq!(space.run(&mut start).unwrap(), Stop::Exception { signal: libc::SIGSEGV });
    let mut start = registers();
    start.rip = 1 << 63;
    assert_eq!(space.run(&mut start).unwrap(), Stop::Exception { signal: libc::SIGSEGV });
    assert_eq!(start.rip, 1 << 63);
}

#[test]
fn performance_counters_cannot_be_read() {
    let (stop, registers) = stop_of(&[0x0f, 0x33]);
    assert_eq!((stop, registers.rip), (Stop::Exception { signal: libc::SIGSEGV }, CODE));
}

#[test]
fn the_time_stamp_counter_is_the_hosts_or_stops() {
    for code in [&[0x0f, 0x31, 0x0f, 0x05][..], &[0x0f, 0x01, 0xf9, 0x0f, 0x05]] {
        let ram = Ram::new(2);
        let mut space = ram.program(code);
        let end = CODE + code.len() as u64;
        for faults in [false, true, true, false] {
            space.fault_tsc(faults);
            let mut start = registers();
            let stop = space.run(&mut start).unwrap();
            let expected =
                if faults { (Stop::Exception { signal: libc::SIGSEGV }, CODE) } else { (Stop::Syscall, end) };
            assert_eq!((stop, start.rip), expected);
            // As it is when all its pages are gone.
            space.unmap_all();
            space.map(CODE, 4096, 0, Protection::ReadExecute);
            ram.write(0, code);
        }
    }
    assert!(Space::stop_time() > std::time::Duration::ZERO && Space::stop_time().as_secs() < 1);
}

#[test]
fn cpuid_stops_where_the_host_can_have_it_fault() {
    let ram = Ram::new(2);
    let mut space = ram.program(&[0x0f, 0xa2, 0x0f, 0x05]);
    let mut start = registers();
    assert_eq!((space.run(&mut start).unwrap(), start.rip), (Stop::Syscall, CODE + 4));
    let possible = std::fs::read_to_string("/proc/cpuinfo").unwrap().contains(" cpuid_fault");
    assert_eq!(space.fault_cpuid(), possible);
    let (stop, rip) = match possible {
        true => (Stop::Exception { signal: libc::SIGSEGV }, CODE),
        false => (Stop::Syscall, CODE + 4),
    };
    for _ in 0..2 {
        let mut start = registers();
        assert_eq!((space.run(&mut start).unwrap(), start.rip), (stop, rip));
        // Another space of this thread does not have it, and this one has it even when all its pages are gone.
        let mut start = registers();
        assert_eq!(ram.program(&[0x0f, 0xa2, 0x0f, 0x05]).run(&mut start).unwrap(), Stop::Syscall);
        space.unmap_all();
        space.map(CODE, 4096, 0, Protection::ReadExecute);
        ram.write(0, &[0x0f, 0xa2, 0x0f, 0x05]);
    }
    // The thread itself has it back when it rests.
    space.rest();
    std::arch::x86_64::__cpuid(0);
}

#[test]
fn guarded_instructions_are_stops_and_others_run() {
    let ram = Ram::new(2);
    // inc eax; xgetbv; inc eax; xgetbv; syscall
    let mut space = ram.program(&[0xff, 0xc0, 0x0f, 0x01, 0xd0, 0xff, 0xc0, 0x0f, 0x01, 0xd0, 0x0f, 0x05]);
    assert!(space.guard(&[CODE + 2, CODE + 7]), "this host has breakpoint registers");
    let mut start = registers();
    assert_eq!((space.run(&mut start).unwrap(), start.rip, start.rax), (Stop::Guard, CODE + 2, 1));
    start.rip += 3;
    assert_eq!((space.run(&mut start).unwrap(), start.rip, start.rax), (Stop::Guard, CODE + 7, 2));
    // It stays where it is until it is passed over, and goes on where it is guarded no more.
    assert_eq!((space.run(&mut start).unwrap(), start.rip), (Stop::Guard, CODE + 7));
    assert!(space.guard(&[CODE, CODE + 11, CODE + 12, CODE + 13]));
    assert_eq!((space.run(&mut start).unwrap(), start.rip), (Stop::Syscall, CODE + 12));
    start.rip = CODE;
    assert_eq!((space.run(&mut start).unwrap(), start.rip), (Stop::Guard, CODE));
    // An instruction whose page was missing first.
    assert!(space.guard(&[]));
    space.unmap(CODE, 4096);
    start.rip = CODE;
    assert_eq!(space.run(&mut start).unwrap(), Stop::Page { address: CODE });
    space.map(CODE, 4096, 0, Protection::ReadExecute);
    assert!(space.guard(&[CODE]));
    assert_eq!((space.run(&mut start).unwrap(), start.rip), (Stop::Guard, CODE));
    assert!(!space.guard(&[CODE; Space::MOST_GUARDS + 1]) && !space.guard(&[u64::MAX]));
    start.rcx = 0;
    assert_eq!((space.run(&mut start).unwrap(), start.rip), (Stop::Syscall, CODE + 12));
}

#[test]
fn int3_is_a_breakpoint_and_tf_is_a_step() {
    let (stop, registers) = stop_of(&[0xcc]);
    assert_eq!((stop, registers.rip), (Stop::Breakpoint, CODE + 1));
    let ram = Ram::new(2);
    let mut space = ram.program(&[0x90, 0xff, 0xc0, 0x0f, 0x05]);
    let mut start = super::registers();
    start.eflags |= 0x100;
    for (next, count) in [(CODE + 1, 0), (CODE + 3, 1)] {
        assert_eq!(space.run(&mut start).unwrap(), Stop::Step);
        assert_eq!((start.rip, start.rax, start.eflags & 0x100), (next, count, 0x100));
    }
    // int1, which is a debug exception but no step.
    let (stop, registers) = stop_of(&[0xf1]);
    assert_eq!(stop, Stop::Exception { signal: libc::SIGTRAP });
    assert!([CODE, CODE + 1].contains(&registers.rip), "{:x}", registers.rip);
}

#[test]
fn a_kick_stops_an_endless_loop() {
    let ram = Ram::new(2);
    let mut space = ram.program(&[0xeb, 0xfe]);
    let kicker = space.kicker();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        kicker.kick();
    });
    let mut registers = registers();
    assert_eq!(space.run(&mut registers).unwrap(), Stop::Kicked);
    assert_eq!(registers.rip, CODE);
    thread.join().unwrap();
}

#[test]
fn a_kick_before_run_is_kept_and_kicks_are_one() {
    let ram = Ram::new(2);
    // The first run has mappings to do, the second has not.
    let mut space = ram.program(&[0xeb, 0xfe]);
    for _ in 0..2 {
        space.kicker().kick();
        space.kicker().kick();
        let mut registers = registers();
        registers.rbx = 5;
        assert_eq!(space.run(&mut registers).unwrap(), Stop::Kicked);
        assert_eq!((registers.rip, registers.rbx), (CODE, 5));
    }
    ram.write(0, &[0xcc]);
    assert_eq!(space.run(&mut registers()).unwrap(), Stop::Breakpoint);
}

#[test]
fn kicks_at_any_moment_are_never_lost() {
    let ram = Ram::new(64);
    let mut space = ram.program(&[0xeb, 0xfe]);
    let kicker = space.kicker();
    let (taken, next) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        // Each one is taken before the next one is sent, so that all are to be seen.
        while next.recv().is_ok() {
            kicker.kick();
        }
    });
    for round in 0..2000u64 {
        taken.send(()).unwrap();
        // Some come in the midst of a batch.
        for page in 0..round % 5 {
            space.map(0x10_0000 + page * 0x2000, 4096, 4096 * (page + 1), Protection::Read);
        }
        assert_eq!(space.run(&mut registers()).unwrap(), Stop::Kicked);
    }
    drop(taken);
    thread.join().unwrap();
}

#[test]
fn a_slot_kicks_the_space_that_is_in_it_and_no_other() {
    let ram = Ram::new(2);
    let [mut first, mut second] = [(); 2].map(|()| ram.program(&[0xcc]));
    let slot = KickSlot::default();
    slot.kick();
    slot.put(first.kicker());
    slot.put(second.kicker());
    slot.kick();
    slot.take();
    slot.take();
    slot.kick();
    assert_eq!(first.run(&mut registers()).unwrap(), Stop::Breakpoint);
    assert_eq!(second.run(&mut registers()).unwrap(), Stop::Kicked);
    assert_eq!(second.run(&mut registers()).unwrap(), Stop::Breakpoint);
}

#[test]
fn a_slot_can_be_kicked_while_its_kickers_come_and_go() {
    let slot = KickSlot::default();
    let ram = Ram::new(2);
    let end = AtomicBool::new(false);
    let ended = || end.load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended() {
                slot.kick();
            }
        });
        for _ in 0..10 {
            let mut space = ram.program(&[0xeb, 0xfe]);
            for _ in 0..20 {
                slot.put(space.kicker());
                assert_eq!(space.run(&mut registers()).unwrap(), Stop::Kicked);
                slot.take();
            }
        }
        end.store(true, Ordering::Relaxed);
    });
}

#[test]
fn signals_from_outside_are_swallowed() {
    let ram = Ram::new(2);
    // dec rcx; jnz; int3
    let mut space = ram.program(&[0x48, 0xff, 0xc9, 0x75, 0xfb, 0xcc]);
    let signals =
        [libc::SIGTERM, libc::SIGSTOP, libc::SIGCONT, libc::SIGWINCH, libc::SIGINT, libc::SIGSEGV, libc::SIGTRAP];
    for signal in signals {
        // SAFETY: no memory is passed; it is this thread's own process.
        unsafe { libc::kill(space.pid() as i32, signal) };
        let mut registers = registers();
        registers.rcx = 1000;
        assert_eq!(space.run(&mut registers).unwrap(), Stop::Breakpoint, "signal {signal}");
        assert_eq!((registers.rip, registers.rcx), (CODE + 6, 0));
    }
}

#[test]
fn a_jump_into_the_stub_runs_no_system_call() {
    let ram = Ram::new(2);
    // jmp rsi
    let mut space = ram.program(&[0xff, 0xe6]);
    let mut page = Vec::new();
    for target in RESERVED.start..RESERVED.start + 4096 {
        let mut start = registers();
        // munmap of everything, exit and more, were it done.
        (start.rsi, start.rax, start.rbx, start.r12) = (target, 231, RESERVED.start + 4096, 3);
        let stop = space.run(&mut start).unwrap();
        assert!(stop != Stop::Kicked, "{stop:?} at {target:#x}");
        page.push(stop);
    }
    assert!(page.contains(&Stop::Syscall) && page.contains(&Stop::Breakpoint));
}

#[test]
fn a_jump_to_the_vsyscall_page_is_a_page_fault_there() {
    for target in [0u64, 0x400, 0x800, 0x10] {
        let ram = Ram::new(2);
        // call rsi
        let mut space = ram.program(&[0xff, 0xd6]);
        let mut start = registers();
        (start.rsi, start.rdi) = (0xffff_ffff_ff60_0000 + target, DATA + 0x100);
        let stop = space.run(&mut start).unwrap();
        assert_eq!(stop, Stop::Page { address: 0xffff_ffff_ff60_0000 + target });
        assert_eq!((start.rip, start.rsp), (0xffff_ffff_ff60_0000 + target, DATA + 0x7f8));
        assert_eq!((ram.word(4096 + 0x7f8), ram.word(4096 + 0x100)), (CODE + 2, 0));
    }
}

#[test]
fn sysenter_reaches_no_kernel() {
    let ram = Ram::new(2);
    let mut space = ram.program(&[0x0f, 0x34]);
    for number in [1, 37, 91, 252] {
        let mut start = registers();
        (start.rax, start.rbp) = (number, DATA + 0x100);
        let stop = space.run(&mut start).unwrap();
        assert!(matches!(stop, Stop::Syscall | Stop::Page { .. } | Stop::Exception { .. }), "{stop:?}");
    }
    ram.write(0, &[0xcc]);
    assert_eq!(space.run(&mut registers()).unwrap(), Stop::Breakpoint);
}

#[test]
fn random_code_stops_or_is_kicked_and_changes_nothing_of_the_process() {
    let ram = Ram::new(16);
    let mut space = ram.program(&[0xcc]);
    assert_eq!(space.run(&mut registers()).unwrap(), Stop::Breakpoint);
    let maps = |space: &Space| std::fs::read_to_string(format!("/proc/{}/maps", space.pid())).unwrap();
    let before = maps(&space);
    let kicker = space.kicker();
    let end = AtomicBool::new(false);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut kinds = [0; 6];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(2));
                kicker.kick();
            }
        });
        for round in 0..5000 {
            let mut code: Vec<u8> = (0..64).flat_map(|_| random().to_le_bytes()).collect();
            // Every second program begins with an entry to the kernel, or a switch of the mode, behind some prefixes.
            let entries: [&[u8]; 6] =
                [&[0x0f, 0x05], &[0x0f, 0x34], &[0xcd, 0x80], &[0xcf], &[0xcb], &[0x9d, 0x0f, 0x05]];
            if round % 2 == 0 {
                let entry = entries[random() as usize % entries.len()];
                code[..entry.len()].copy_from_slice(entry);
            }
            ram.write(0, &code);
            ram.write(
                4096 + 0x800,
                &[CODE + 64, 0x23 | (random() & 0x10), random() & 0x10_0fff, DATA, 0x2b].map(u64::to_le_bytes).concat(),
            );
            let mut start = registers();
            for register in super::registers::words(&mut start) {
                *register = match random() % 4 {
                    0 => random(),
                    1 => random() % 512,
                    2 => CODE + random() % 4096,
                    _ => DATA + random() % (8 * 4096),
                };
            }
            start.rsp = DATA + 0x800;
            for _ in 0..4 {
                let stop = match space.run(&mut start) {
                    Ok(stop) => stop,
                    Err(Error::Registers(_)) => break,
                    Err(error) => panic!("{error} with {code:02x?}"),
                };
                kinds[match stop {
                    Stop::Page { .. } => 0,
                    Stop::Syscall => 1,
                    Stop::Step => 2,
                    Stop::Breakpoint => 3,
                    Stop::Exception { .. } => 4,
                    Stop::Kicked => 5,
                    Stop::Guard => unreachable!("nothing is guarded"),
                }] += 1;
            }
        }
        end.store(true, Ordering::Relaxed);
    });
    assert_eq!(maps(&space), before);
    assert!(kinds.iter().all(|&count| count > 0), "{kinds:?}");
}
