//! How a space's process is made: cloned without a copy of the monitor's memory, executing the stub, emptied of all that
//! the kernel gave it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use libc::{c_int, c_long, c_ulong, c_void};

use crate::operations::{self, Call, List};
use crate::stub::{FIRST_ERROR, Stub};
use crate::trace::{Event, Resume, Tracee};
use crate::{Error, PAGE_SIZE, RESERVED, Registers, USER_END, cpuid, kick, pin};

/// The process's descriptors: guest RAM, and the list of operations until it is mapped.
pub const RAM: c_int = 0;
const LIST: c_int = 1;
/// The stub's file, which `execveat` closes.
const STUB: c_int = 2;

/// How much stack the child has before it executes the stub.
const STACK: usize = 64 << 10;

/// What the child does, for who asks why it failed.
const STEPS: [&str; 11] = [
    "clone",
    "the parent is there",
    "prctl(PR_SET_PDEATHSIG)",
    "prctl(PR_SET_NO_NEW_PRIVS)",
    "setrlimit(RLIMIT_CORE)",
    "fcntl(F_DUPFD)",
    "dup3",
    "close_range",
    "sigaction",
    "sigprocmask",
    "execveat of a file in memory",
];

/// What the child is given, and what it says. It is on the parent's stack, whose thread is stopped until the child has
/// executed the stub or ended.
struct Child {
    parent: libc::pid_t,
    ram: c_int,
    list: c_int,
    stub: c_int,
    /// The index in [`STEPS`] at which it is, and the error of that step.
    step: AtomicUsize,
    error: AtomicI32,
}

/// Makes the process and begins to trace it. Its address space has nothing but [`RESERVED`] when this returns. Returns
/// with it the registers with which the stub runs, whatever guest code has had: 64-bit code of privilege level 3.
pub fn spawn(ram: BorrowedFd, stub: &Stub, list: &mut List) -> Result<(Tracee, Registers), Error> {
    let file = stub.file().map_err(Error::host("memfd_create of an executable file"))?;
    quiet_stops();
    let mut tracee = clone(ram, list.as_fd(), file.as_fd())?;
    tracee.seize()?;
    // No system call is to be repeated that a signal has interrupted, as the stub's first one is.
    let registers = Registers { orig_rax: u64::MAX, ..tracee.registers()? };
    set_up(&mut tracee, stub, list, registers)?;
    Ok((tracee, registers))
}

/// Lets stops of traced processes be known to who waits for them alone: each would be a SIGCHLD to this process as well,
/// which wakes some other thread of it to do nothing.
fn quiet_stops() {
    static QUIET: Once = Once::new();
    // SAFETY: sigaction fills the zeroed structure with what is set, and sets it again but for a flag.
    QUIET.call_once(|| unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGCHLD, std::ptr::null(), &mut action) == 0 {
            action.sa_flags |= libc::SA_NOCLDSTOP;
            libc::sigaction(libc::SIGCHLD, &action, std::ptr::null_mut());
        }
    });
}

/// Starts the child, and returns when it runs the stub.
fn clone(ram: BorrowedFd, list: BorrowedFd, stub: BorrowedFd) -> Result<Tracee, Error> {
    let child = Child {
        // SAFETY: no memory is passed.
        parent: unsafe { libc::getpid() },
        ram: ram.as_raw_fd(),
        list: list.as_raw_fd(),
        stub: stub.as_raw_fd(),
        step: AtomicUsize::new(0),
        error: AtomicI32::new(0),
    };
    let mut stack = vec![0u128; STACK / 16];
    let mut pidfd: c_int = -1;
    // SAFETY: zeros are a signal set; sigfillset and sigprocmask write to local variables.
    let before = unsafe {
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        before
    };
    // SAFETY: the child runs `begin` on a stack of its own, which ends where `stack` does. CLONE_VFORK holds this thread
    // until the child has left this memory (by execveat or exit), so that what it is given stays alive. All signals are
    // blocked, so no handler of the monitor runs in it. `begin` does nothing but system calls.
    let (pid, error) = unsafe {
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD;
        let top = stack.as_mut_ptr_range().end;
        let pid = libc::clone(begin, top.cast(), flags, (&raw const child).cast_mut().cast(), &raw mut pidfd);
        let error = io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        (pid, error)
    };
    if pid == -1 {
        return Err(Error::Host { step: STEPS[0], source: error });
    }
    // SAFETY: the kernel has made this descriptor for this call.
    let mut tracee = Tracee::new(pid, unsafe { OwnedFd::from_raw_fd(pidfd) });
    match child.error.load(Ordering::Relaxed) {
        0 => Ok(tracee),
        error => {
            while !matches!(tracee.wait(), Err(Error::Gone(_) | Error::Trace { .. })) {}
            let step = STEPS.get(child.step.load(Ordering::Relaxed)).copied().unwrap_or(STEPS[0]);
            Err(Error::Host { step, source: io::Error::from_raw_os_error(error) })
        }
    }
}

/// The child's first function, on the parent's memory: all it does is system calls.
extern "C" fn begin(child: *mut c_void) -> c_int {
    // SAFETY: `clone` passes the address of a `Child` that outlives this function.
    let child = unsafe { &*child.cast::<Child>() };
    if become_stub(child).is_none() {
        // SAFETY: errno is this thread's: parent and child share it, and the parent is stopped.
        child.error.store(unsafe { *libc::__errno_location() }.max(1), Ordering::Relaxed);
    }
    // SAFETY: it doesn't return. Nothing of the monitor's (`atexit`) runs.
    unsafe { libc::syscall(libc::SYS_exit_group, 127) as c_int }
}

/// The steps to the stub; `None` if one failed, with `errno` set.
fn become_stub(child: &Child) -> Option<()> {
    let at = |step| child.step.store(step, Ordering::Relaxed);
    at(2);
    call(libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as c_long, libc::SIGKILL as c_long, 0, 0, 0])?;
    // The parent may have been killed before it was asked for.
    at(1);
    (call(libc::SYS_getppid, [0; 5])? == child.parent as c_long).then_some(())?;
    at(3);
    call(libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS as c_long, 1, 0, 0, 0])?;
    at(4);
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    call(libc::SYS_setrlimit, [libc::RLIMIT_CORE as c_long, &raw const none as c_long, 0, 0, 0])?;

    // Guest RAM and list are descriptors 0 and 1; all others are closed. First out of the way of these numbers.
    let mut descriptors = [child.ram, child.list, child.stub];
    at(5);
    for descriptor in &mut descriptors {
        *descriptor = call(libc::SYS_fcntl, [*descriptor as c_long, libc::F_DUPFD as c_long, 3, 0, 0])? as c_int;
    }
    at(6);
    for (descriptor, number) in descriptors.into_iter().zip([RAM, LIST, STUB]) {
        let flags = if number == STUB { libc::O_CLOEXEC } else { 0 };
        call(libc::SYS_dup3, [descriptor as c_long, number as c_long, flags as c_long, 0, 0])?;
    }
    at(7);
    call(libc::SYS_close_range, [3, c_long::from(u32::MAX), 0, 0, 0])?;

    // Ignored signals stay ignored over execve; the table is this process's own (no CLONE_SIGHAND).
    at(8);
    let default = [0 as c_ulong; 4];
    for signal in (1..=64).filter(|&signal| signal != libc::SIGKILL && signal != libc::SIGSTOP) {
        call(libc::SYS_rt_sigaction, [signal as c_long, &raw const default as c_long, 0, 8, 0])?;
    }
    at(9);
    let open = 0u64;
    call(libc::SYS_rt_sigprocmask, [libc::SIG_SETMASK as c_long, &raw const open as c_long, 0, 8, 0])?;

    at(10);
    let arguments = [c"ringer-direct".as_ptr(), std::ptr::null()];
    let (empty, arguments) = (c"".as_ptr() as c_long, &raw const arguments as c_long);
    let environment = [std::ptr::null::<u8>()];
    let environment = &raw const environment as c_long;
    call(libc::SYS_execveat, [STUB as c_long, empty, arguments, environment, libc::AT_EMPTY_PATH as c_long])?;
    Some(())
}

/// A system call; `None` if it failed.
fn call(number: c_long, [a, b, c, d, e]: [c_long; 5]) -> Option<c_long> {
    // SAFETY: the addresses among the arguments are of local variables and C strings with the layout of that call.
    let result = unsafe { libc::syscall(number, a, b, c, d, e) };
    (result != -1).then_some(result)
}

/// What is done inside a process that has just begun: it gets the list, and loses all else.
fn set_up(tracee: &mut Tracee, stub: &Stub, list: &mut List, registers: Registers) -> Result<(), Error> {
    // There is no list yet: the first call is in registers.
    let first = Registers {
        rip: stub.call,
        r12: 1,
        rax: libc::SYS_mmap as u64,
        rdi: operations::ADDRESS,
        rsi: operations::SIZE as u64,
        rdx: libc::PROT_READ as u64,
        r10: (libc::MAP_SHARED | libc::MAP_FIXED) as u64,
        r8: LIST as u64,
        r9: 0,
        ..registers
    };
    if let Some((_, source)) = execute(tracee, stub, first)?.failed {
        return Err(Error::Host { step: "mmap of the list of operations", source });
    }

    // What these calls point to stands on the list's last page, behind their own entries.
    let mut end = operations::SIZE - PAGE_SIZE as usize;
    let mut put = |words: &[u64]| {
        let address = list.put(end, words);
        end += size_of_val(words);
        address
    };
    let name = put(&[u64::from_le_bytes(*b"ringer-d"), u64::from_le_bytes(*b"irect\0\0\0")]);
    let interval = pin::INTERVAL.as_micros() as u64;
    let timer = put(&[0, interval, 0, interval]);
    let filter = filter(stub);
    let program = put(&filter);
    let program = put(&[filter.len() as u64, program]);
    let calls = [
        ("prctl(PR_SET_NAME)", libc::SYS_prctl, [libc::PR_SET_NAME as u64, name, 0, 0, 0, 0]),
        ("close", libc::SYS_close, [LIST as u64, 0, 0, 0, 0, 0]),
        ("munmap of what the kernel has mapped", libc::SYS_munmap, [0, RESERVED.start, 0, 0, 0, 0]),
        ("munmap of what the kernel has mapped", libc::SYS_munmap, [RESERVED.end, USER_END - RESERVED.end, 0, 0, 0, 0]),
        ("setitimer", libc::SYS_setitimer, [libc::ITIMER_REAL as u64, timer, 0, 0, 0, 0]),
        (
            "seccomp",
            libc::SYS_seccomp,
            [libc::SECCOMP_SET_MODE_FILTER as u64, libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW, program, 0, 0, 0],
        ),
    ];
    let count = list.write(calls.iter().map(|&(_, number, words)| Call { number, words }));
    match batch(tracee, stub, registers, count)?.failed {
        None => Ok(()),
        Some((index, source)) => {
            Err(Error::Host { step: calls.get(index).map_or("the first operations", |call| call.0), source })
        }
    }
}

/// What a batch came to.
pub struct Done {
    /// A kick arrived in its midst.
    pub kicked: bool,
    /// The index of the operation that failed, and why.
    pub failed: Option<(usize, io::Error)>,
}

/// Has the stub do the first `count` operations of the list.
pub fn batch(tracee: &mut Tracee, stub: &Stub, registers: Registers, count: u64) -> Result<Done, Error> {
    execute(tracee, stub, Registers { rip: stub.next, rbx: operations::ADDRESS, r12: count, ..registers })
}

/// Runs the stub with these registers until it is done.
fn execute(tracee: &mut Tracee, stub: &Stub, registers: Registers) -> Result<Done, Error> {
    tracee.set_registers(&registers)?;
    let mut kicked = false;
    let registers = loop {
        tracee.resume(Resume::Batch)?;
        match tracee.wait()? {
            Event::Signal(libc::SIGTRAP) => {
                let registers = tracee.registers()?;
                if registers.rip == stub.done {
                    break registers;
                }
            }
            Event::Signal(kick::SIGNAL) => kicked = true,
            Event::Signal(_) | Event::Call | Event::Job => {}
        }
    };
    let failed = (registers.rax >= FIRST_ERROR).then(|| {
        let index = registers.rbx.wrapping_sub(operations::ADDRESS) as usize / operations::OPERATION;
        (index, io::Error::from_raw_os_error(registers.rax.wrapping_neg() as i32))
    });
    Ok(Done { kicked, failed })
}

/// The seccomp filter: what batches need, at the stub's own instruction. Guest code makes no system calls, with one
/// exception that the kernel makes itself where code jumps to the vsyscall page: SIGSYS makes a stop of that.
fn filter(stub: &Stub) -> Vec<u64> {
    /// `AUDIT_ARCH_X86_64` (Linux, `audit.h`).
    const X86_64: u32 = 0xc000_003e;
    let instruction = |code: u32, yes: u8, no: u8, k: u32| {
        u64::from(code as u16) | u64::from(yes) << 16 | u64::from(no) << 24 | u64::from(k) << 32
    };
    // Offsets in `struct seccomp_data`: the number at 0, the architecture at 4, the instruction pointer at 8, the first
    // argument at 16.
    let load = |offset| instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    let equal = |k, yes, no| instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, yes, no, k);
    let end = |k| instruction(libc::BPF_RET | libc::BPF_K, 0, 0, k);
    let behind = stub.call + 2;
    vec![
        load(4),
        equal(X86_64, 0, 17),
        load(0),
        equal(libc::SYS_gettimeofday as u32, 14, 0),
        equal(libc::SYS_time as u32, 13, 0),
        equal(libc::SYS_getcpu as u32, 12, 0),
        equal(libc::SYS_mmap as u32, 7, 0),
        equal(libc::SYS_munmap as u32, 6, 0),
        equal(libc::SYS_prctl as u32, 3, 0),
        equal(libc::SYS_arch_prctl as u32, 0, 9),
        load(16),
        equal(cpuid::ARCH_SET_CPUID as u32, 2, 7),
        load(16),
        equal(libc::PR_SET_TSC as u32, 0, 5),
        load(8),
        equal(behind as u32, 0, 3),
        load(12),
        equal((behind >> 32) as u32, 2, 1),
        end(libc::SECCOMP_RET_TRAP),
        end(libc::SECCOMP_RET_KILL_PROCESS),
        end(libc::SECCOMP_RET_ALLOW),
    ]
}
