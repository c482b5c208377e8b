//! The process of a space: what it has, and that it ends with it.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use super::{CODE, DATA, Ram, registers};
use crate::{Error, Protection, RESERVED, Space, Stop};

/// The lines of a process's /proc/PID/maps, but for the page that each process seems to have in the kernel's half.
fn maps(pid: u32) -> Vec<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    maps.lines().filter(|line| !line.contains("[vsyscall]")).map(String::from).collect()
}

#[test]
fn nothing_is_mapped_but_the_stub_and_its_list_which_nobody_there_can_write() {
    let ram = Ram::new(2);
    let space = ram.space();
    let maps = maps(space.pid());
    let starts = |index: usize, start: u64, end: u64, access: &str| {
        maps.get(index).is_some_and(|line| line.starts_with(&format!("{start:x}-{end:x} {access} ")))
    };
    let middle = RESERVED.start + 4096;
    assert!(starts(0, RESERVED.start, middle, "r-xp") && starts(1, middle, RESERVED.end, "r--s"), "{maps:#?}");
    assert_eq!(maps.len(), 2, "{maps:#?}");
}

#[test]
fn guest_code_cannot_write_the_reserved_pages() {
    let ram = Ram::new(2);
    // mov [rsi], rax
    let mut space = ram.program(&[0x48, 0x89, 0x06, 0xcc]);
    for address in RESERVED.step_by(2048) {
        let mut start = registers();
        start.rsi = address;
        assert_eq!(space.run(&mut start).unwrap(), Stop::Page { address });
    }
}

#[test]
fn the_process_has_guest_ram_and_no_other_file() {
    let ram = Ram::new(2);
    let space = ram.space();
    let files = fs::read_dir(format!("/proc/{}/fd", space.pid())).unwrap();
    let files: Vec<_> = files.map(|file| fs::read_link(file.unwrap().path()).unwrap()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    assert!(files[0].to_string_lossy().starts_with("/memfd:ram"), "{files:?}");
}

#[test]
fn the_process_has_a_name_a_filter_and_no_privileges_to_gain() {
    let ram = Ram::new(2);
    let space = ram.space();
    let status = fs::read_to_string(format!("/proc/{}/status", space.pid())).unwrap();
    for line in [
        "Name:\tringer-direct",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        "SigBlk:\t0000000000000000",
        "SigIgn:\t0000000000000000",
    ] {
        assert!(status.lines().any(|had| had == line), "{line} in {status}");
    }
}

#[test]
fn a_space_killed_from_outside_is_an_error_and_no_hang() {
    let ram = Ram::new(2);
    let kill = |space: &Space| {
        // SAFETY: no memory is passed; it is this thread's own process.
        unsafe { libc::kill(space.pid() as i32, libc::SIGKILL) };
    };
    // While it is stopped.
    let mut space = ram.program(&[0xeb, 0xfe]);
    kill(&space);
    for _ in 0..2 {
        let error = space.run(&mut registers()).unwrap_err();
        assert!(matches!(error, Error::Gone(_)), "{error}");
        assert!(error.to_string().contains("SIGKILL"), "{error}");
    }
    assert!(matches!(space.vector_state(&mut [0; 4096]), Err(Error::Gone(_))));
    space.kicker().kick();
    // While it runs.
    let mut space = ram.program(&[0xeb, 0xfe]);
    let pid = space.pid() as i32;
    let thread = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(30));
        // SAFETY: no memory is passed; the process is not reaped before this thread has ended.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    });
    assert!(matches!(space.run(&mut registers()), Err(Error::Gone(_))));
    thread.join().unwrap();
}

#[test]
fn a_dropped_space_leaves_no_process_and_its_kicker_does_nothing() {
    let ram = Ram::new(2);
    let mut space = ram.program(&[0xcc]);
    assert_eq!(space.run(&mut registers()).unwrap(), Stop::Breakpoint);
    let (pid, kicker) = (space.pid(), space.kicker());
    let path = format!("/proc/{pid}");
    assert!(Path::new(&path).exists());
    drop(space);
    assert!(!Path::new(&path).exists(), "a zombie is left");
    kicker.kick();
}

#[test]
fn another_thread_cannot_run_a_space_but_can_drop_it() {
    let ram = Ram::new(2);
    let mut space = ram.program(&[0xcc]);
    let path = format!("/proc/{}", space.pid());
    let mut space = std::thread::scope(|scope| {
        let other = scope.spawn(move || {
            assert!(matches!(space.run(&mut registers()), Err(Error::Thread)));
            space
        });
        other.join().unwrap()
    });
    assert_eq!(space.run(&mut registers()).unwrap(), Stop::Breakpoint);
    std::thread::spawn(move || drop(space)).join().unwrap();
    assert!(!Path::new(&path).exists());
}

#[test]
fn spaces_end_with_the_thread_that_forgets_them() {
    let pid = std::thread::spawn(|| {
        let ram = Ram::new(2);
        let space = ram.program(&[0xeb, 0xfe]);
        let pid = space.pid();
        std::mem::forget(space);
        pid
    });
    let pid = pid.join().unwrap();
    let mut status = 0;
    // SAFETY: the status is written to a local variable.
    let ended = unsafe { libc::waitpid(pid as i32, &mut status, libc::__WALL) };
    assert_eq!((ended, libc::WIFSIGNALED(status), libc::WTERMSIG(status)), (pid as i32, true, libc::SIGKILL));
}

#[test]
fn two_spaces_on_one_thread_have_their_own_pages_and_registers() {
    let ram = Ram::new(4);
    ram.write(0, &[0x48, 0xff, 0x06, 0xcc]);
    let mut spaces = [2u64, 3].map(|page| {
        let mut space = ram.space();
        space.map(CODE, 4096, 0, Protection::ReadExecute);
        space.map(DATA, 4096, page * 4096, Protection::ReadWrite);
        space
    });
    // inc qword [rsi]
    for round in 0..10 {
        for (index, space) in spaces.iter_mut().enumerate() {
            for _ in 0..=index {
                let mut start = registers();
                start.rsi = DATA;
                assert_eq!(space.run(&mut start).unwrap(), Stop::Breakpoint);
            }
        }
        assert_eq!((ram.word(2 * 4096), ram.word(3 * 4096)), (round + 1, 2 * (round + 1)));
    }
}

#[test]
fn a_space_that_cannot_be_made_says_at_which_step() {
    // SAFETY: it isn't a descriptor at all, which is what this test is about; nothing of ours is closed or written.
    let none = unsafe { BorrowedFd::borrow_raw(1 << 20) };
    let error = Space::new(none).err().unwrap();
    assert!(matches!(error, Error::Host { step: "fcntl(F_DUPFD)", .. }), "{error}");
    assert!(error.to_string().contains("Bad file descriptor"), "{error}");
}

#[test]
fn a_mapping_that_the_host_refuses_is_an_error_and_is_forgotten() {
    // A directory can't be mapped.
    let directory = fs::File::open("/").unwrap();
    let mut space = Space::new(directory.as_fd()).unwrap();
    space.map(CODE, 4096, 0, Protection::ReadExecute);
    let error = space.run(&mut registers()).unwrap_err();
    assert!(matches!(error, Error::Mapping { what: "map", address: CODE, length: 4096, .. }), "{error}");
    assert_eq!(space.run(&mut registers()).unwrap(), Stop::Page { address: CODE });
}

#[test]
fn stops_are_no_signals_to_the_monitor() {
    let ram = Ram::new(2);
    let _space = ram.space();
    // SAFETY: zeros are a value of it, and sigaction fills it.
    let action = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        assert_eq!(libc::sigaction(libc::SIGCHLD, std::ptr::null(), &mut action), 0);
        action
    };
    assert_ne!(action.sa_flags & libc::SA_NOCLDSTOP, 0);
}

/// The CPUs that this thread, or a process, may use.
fn cpus(pid: u32) -> String {
    let path = if pid == 0 { "/proc/thread-self/status".into() } else { format!("/proc/{pid}/status") };
    let status = fs::read_to_string(path).unwrap();
    status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_string()
}

#[test]
fn tracer_and_process_are_on_one_cpu_until_they_rest() {
    let ram = Ram::new(2);
    let before = cpus(0);
    let mut space = ram.program(&[0xcc]);
    assert_eq!(space.run(&mut registers()).unwrap(), Stop::Breakpoint);
    assert_eq!(cpus(space.pid()), cpus(0));
    assert!(cpus(0).parse::<usize>().is_ok());
    space.rest();
    assert_eq!(cpus(0), before);
    assert_eq!(space.run(&mut registers()).unwrap(), Stop::Breakpoint);
    assert_eq!(cpus(space.pid()), cpus(0));
    // The last one's end is a rest as well.
    let other = ram.space();
    drop(space);
    assert!(cpus(0).parse::<usize>().is_ok());
    drop(other);
    assert_eq!(cpus(0), before);
}

#[test]
fn a_process_has_worked_when_its_code_has_run() {
    let ram = Ram::new(2);
    // jmp $
    let mut space = ram.program(&[0xeb, 0xfe]);
    let before = space.processor_time();
    let kicker = space.kicker();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        kicker.kick();
    });
    while space.run(&mut registers()).unwrap() != Stop::Kicked {}
    thread.join().unwrap();
    let worked = space.processor_time() - before;
    assert!(worked > Duration::from_millis(1) && worked < Duration::from_secs(10), "{worked:?}");
}
