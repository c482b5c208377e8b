//! A space: the loop that runs guest code in its process, and says why it stopped.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::operations::{List, Operation, Pending, Protection};
use crate::pin::{self, Cpu};
use crate::stub::Stub;
use crate::trace::{Event, Resume, Tracee};
use crate::{Error, Kicker, PAGE_SIZE, RESERVED, Registers, USER_END, cpuid, kick, process};

/// The page at which Linux does three old system calls for whoever jumps there ("vsyscall").
const VSYSCALL: Range<u64> = 0xffff_ffff_ff60_0000..0xffff_ffff_ff60_1000;

/// The least XSAVE area: legacy region and header (Intel SDM 1, 13.4).
const XSAVE_HEADER_END: usize = 576;
/// The most that any processor's area takes is 11008 bytes so far, with the tiles of AMX.
const XSAVE_MOST: usize = 64 << 10;

/// RFLAGS.RF: the next instruction has no breakpoint (Intel SDM 3B 18.3.1.1).
const RF: u64 = 1 << 16;

/// Why guest code has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// An access to a page that isn't mapped, or not in this way. The instruction has not been done.
    Page { address: u64 },
    /// A SYSCALL or INT 80H instruction. RIP is behind it, and RCX and R11 are as SYSCALL leaves them. INT 80H loses the
    /// upper half of RAX.
    Syscall,
    /// The trap behind an instruction that began with RFLAGS.TF set.
    Step,
    /// An INT3; RIP is behind it.
    Breakpoint,
    /// Before an instruction that is guarded ([`Space::guard`]).
    Guard,
    /// Any other exception, as the signal that Linux makes of it (SIGILL for #UD; SIGFPE for #DE, #MF, #XM; SIGBUS for
    /// #AC or memory that the host could not give; SIGTRAP for INT1; SIGSEGV for all else). The instruction has not
    /// been done, but for SIGTRAP: RIP is behind the INT1, or at it where the host is a virtual machine on AMD's processors.
    Exception { signal: i32 },
    /// [`Kicker::kick`]; between two instructions, of which none need have been done since `run`.
    Kicked,
}

/// What else hosts can do, found out with the first space.
#[derive(Clone, Copy, Debug)]
struct Abilities {
    faults_cpuid: bool,
    breakpoints: bool,
}

static ABILITIES: OnceLock<Abilities> = OnceLock::new();

/// Stops that are timed with each new space.
const TIMED: usize = 4;
/// The shortest of them all, in nanoseconds: others may have had the processor during the rest.
static LEAST_STOP: AtomicU64 = AtomicU64::new(u64::MAX);

/// A process in which guest code runs. The thread that made it is the one that can run it; it ends with that thread.
/// Another thread may drop it.
pub struct Space {
    tracee: Tracee,
    list: List,
    stub: &'static Stub,
    /// The stub's registers.
    registers: Registers,
    pending: Pending,
    /// CPUID faults, or will before the next run.
    faults_cpuid: bool,
    /// So do RDTSC and RDTSCP.
    faults_tsc: bool,
    /// A kick has arrived that nobody has been told of.
    kicked: bool,
    /// Where the process is pinned.
    cpu: Option<Cpu>,
    /// An XSAVE area as long as the kernel takes it, for those that are shorter.
    vector: Vec<u8>,
    /// A range that can't be mapped was asked for, which the next run says.
    refused: Option<(u64, u64)>,
    /// Who made it.
    thread: pin::ThreadId,
}

impl Space {
    /// Linear addresses that guest pages can't be mapped at.
    pub const RESERVED: Range<u64> = RESERVED;
    /// Instructions that a space can be made to stop before: the processor's debug registers.
    pub const MOST_GUARDS: usize = 4;

    /// A space with nothing mapped, for a guest whose RAM is this memfd.
    pub fn new(ram: BorrowedFd) -> Result<Space, Error> {
        let stub = Stub::get().map_err(Error::host("the stub"))?;
        let mut list = List::new().map_err(Error::host("memfd_create and mmap of the list of operations"))?;
        // The process begins where its tracer is.
        let cpu = pin::enter();
        let (tracee, registers) = process::spawn(ram, stub, &mut list).inspect_err(|_| pin::leave())?;
        let (pending, vector, thread) = (Pending::default(), vec![0; XSAVE_MOST], pin::thread());
        let mut space = Space {
            tracee,
            list,
            stub,
            registers,
            pending,
            faults_cpuid: false,
            faults_tsc: false,
            kicked: false,
            cpu,
            vector,
            refused: None,
            thread,
        };
        let size = space.tracee.vector_state(&mut space.vector)?;
        space.vector.truncate(size);
        space.vector.shrink_to_fit();
        space.expect("RDPMC disabled for programs", stub.rdpmc, Stop::Exception { signal: libc::SIGSEGV })?;
        for _ in 0..TIMED {
            let before = Instant::now();
            space.expect("PTRACE_SYSEMU", stub.call, Stop::Syscall)?;
            LEAST_STOP.fetch_min(before.elapsed().as_nanos() as u64, Ordering::Relaxed);
        }
        if ABILITIES.get().is_none() {
            let abilities = space.abilities();
            ABILITIES.get_or_init(|| abilities);
        }
        Ok(space)
    }

    /// Tries what not every host can do, and takes it back.
    fn abilities(&mut self) -> Abilities {
        let stub = self.stub;
        let set = self.tracee.set_breakpoints(&[stub.rdpmc]).is_ok();
        let breakpoints = set && self.expect("a breakpoint register", stub.rdpmc, Stop::Guard).is_ok();
        let mut faults_cpuid = cpuid::set(true).is_ok();
        if faults_cpuid {
            self.faults_cpuid = true;
            self.pending.push(Operation::Cpuid { faults: true });
            let fault = Stop::Exception { signal: libc::SIGSEGV };
            faults_cpuid = self.expect("arch_prctl(ARCH_SET_CPUID)", stub.cpuid, fault).is_ok();
            self.faults_cpuid = false;
            self.pending.push(Operation::Cpuid { faults: false });
        }
        // What can't be taken back, the next use of the process will say.
        let breakpoints = self.tracee.set_breakpoints(&[]).is_ok() && breakpoints;
        Abilities { faults_cpuid, breakpoints }
    }

    /// Has CPUID stop from the next [`run`](Space::run) on, as an exception; `false` if this host can't do that.
    pub fn fault_cpuid(&mut self) -> bool {
        if !self.faults_cpuid && ABILITIES.get().is_some_and(|abilities| abilities.faults_cpuid) {
            self.faults_cpuid = true;
            self.pending.push(Operation::Cpuid { faults: true });
        }
        self.faults_cpuid
    }

    /// Has RDTSC and RDTSCP stop from the next [`run`](Space::run) on, as exceptions, or read the host's counter again.
    ///
    /// That they do is CR4.TSD, which Linux writes on the way from this thread to the process and back. In a virtual machine on
    /// AMD's processors each of these is an exit: a stop takes 16 µs then instead of 7.
    pub fn fault_tsc(&mut self, faults: bool) {
        if self.faults_tsc != faults {
            self.faults_tsc = faults;
            self.pending.push(Operation::Tsc { faults });
        }
    }

    /// What it takes on this host to run code that stops at once, as measured with the spaces that were made so far.
    pub fn stop_time() -> Duration {
        Duration::from_nanos(LEAST_STOP.load(Ordering::Relaxed))
    }

    /// Has guest code stop before the instructions at these addresses ([`Stop::Guard`]), and no longer before those that were
    /// given last time; `false` if that can't be, and it stops nowhere then.
    pub fn guard(&mut self, addresses: &[u64]) -> bool {
        let able = ABILITIES.get().is_some_and(|abilities| abilities.breakpoints);
        let possible = addresses.len() <= Self::MOST_GUARDS && addresses.iter().all(|&address| address < USER_END);
        if able && possible && self.tracee.set_breakpoints(addresses).is_ok() {
            return true;
        }
        // None is set as long as DR7 is zero; where that fails there were none.
        let _ = self.tracee.set_breakpoints(&[]);
        false
    }

    /// Shows that one of the stub's instructions stops on this host as it ought to. A system call would be `getpid`, for
    /// which the seccomp filter kills the process.
    fn expect(&mut self, step: &'static str, instruction: u64, expected: Stop) -> Result<(), Error> {
        let mut registers = Registers { rip: instruction, rax: libc::SYS_getpid as u64, rcx: 0, ..self.registers };
        loop {
            match self.run(&mut registers) {
                Ok(Stop::Kicked) => {}
                Ok(stop) if stop == expected => return Ok(()),
                Ok(stop) => return Err(Error::Host { step, source: io::Error::other(format!("{stop:?}")) }),
                Err(error) => return Err(Error::Host { step, source: io::Error::other(error) }),
            }
        }
    }

    /// Maps `length` bytes of guest RAM from `offset` on at `address`, in place of what is there. It is done before the
    /// next [`run`](Space::run), in the order in which it was asked for.
    ///
    /// A range that can't be mapped is an error of that `run`: [`Error::Range`].
    pub fn map(&mut self, address: u64, length: u64, offset: u64, protection: Protection) {
        let in_ram = offset.is_multiple_of(PAGE_SIZE) && offset.checked_add(length).is_some_and(|end| end >> 63 == 0);
        let own = address < RESERVED.end && address.saturating_add(length) > RESERVED.start;
        if !is_user(address, length) || !in_ram || own {
            self.refused = Some((address, length));
        } else if length != 0 {
            self.pending.push(Operation::Map { address, length, offset, protection });
        }
    }

    /// Makes `length` bytes at `address` inaccessible, before the next [`run`](Space::run). What the space needs for
    /// itself stays.
    pub fn unmap(&mut self, address: u64, length: u64) {
        if !is_user(address, length) {
            self.refused = Some((address, length));
            return;
        }
        let end = address + length;
        for (start, end) in [(address, end.min(RESERVED.start)), (address.max(RESERVED.end), end)] {
            if start < end {
                self.pending.push(Operation::Unmap { address: start, length: end - start });
            }
        }
    }

    /// Makes everything inaccessible, and forgets what has been asked for before.
    pub fn unmap_all(&mut self) {
        self.pending.clear();
        self.refused = None;
        self.pending.push(Operation::Unmap { address: 0, length: RESERVED.start });
        self.pending.push(Operation::Unmap { address: RESERVED.end, length: USER_END - RESERVED.end });
        if self.faults_cpuid {
            self.pending.push(Operation::Cpuid { faults: true });
        }
        self.pending.push(Operation::Tsc { faults: self.faults_tsc });
    }

    /// Runs guest code from these registers on until it stops, and leaves its registers there. Vector registers are the
    /// process's own: [`vector_state`](Space::vector_state), [`set_vector_state`](Space::set_vector_state).
    ///
    /// `orig_rax` is not looked at. After an error the registers are as they were.
    pub fn run(&mut self, registers: &mut Registers) -> Result<Stop, Error> {
        check_registers(registers)?;
        self.apply()?;
        if std::mem::take(&mut self.kicked) {
            return Ok(Stop::Kicked);
        }
        // No system call is to be repeated, as Linux does where a signal has interrupted one; and no guard overlooked by RF, which
        // stops leave set.
        let eflags = registers.eflags & !RF;
        self.tracee.set_registers(&Registers { orig_rax: u64::MAX, eflags, ..*registers })?;
        let stop = loop {
            self.tracee.resume(Resume::Guest)?;
            match self.tracee.wait()? {
                Event::Call => break Stop::Syscall,
                Event::Signal(kick::SIGNAL) => break Stop::Kicked,
                Event::Signal(libc::SIGALRM) => {
                    pin::moment();
                    self.pin();
                }
                Event::Signal(signal) => {
                    if let Some(stop) = self.exception(signal)? {
                        break stop;
                    }
                }
                Event::Job => {}
            }
        };
        *registers = self.tracee.registers()?;
        match stop {
            Stop::Syscall => registers.rax = registers.orig_rax,
            Stop::Exception { signal: libc::SIGSYS } => return Ok(self.undo_vsyscall(registers)),
            Stop::Page { .. } | Stop::Exception { .. } if VSYSCALL.contains(&registers.rip) => {
                return Ok(Stop::Page { address: registers.rip });
            }
            _ => {}
        }
        registers.orig_rax = u64::MAX;
        Ok(stop)
    }

    /// What exception has become this signal. Signals that somebody has sent are none.
    fn exception(&mut self, signal: i32) -> Result<Option<Stop>, Error> {
        /// `SEGV_MAPERR`, `SEGV_ACCERR`, `SEGV_PKUERR`, `TRAP_TRACE`, `TRAP_HWBKPT`, `SI_KERNEL` (Linux, `siginfo.h`).
        const MAPERR: i32 = 1;
        const ACCERR: i32 = 2;
        const PKUERR: i32 = 4;
        const TRACE: i32 = 2;
        const HWBKPT: i32 = 4;
        const KERNEL: i32 = 0x80;
        let (code, address) = self.tracee.signal()?;
        Ok(match (signal, code) {
            (_, ..=0) => None,
            (libc::SIGSEGV, MAPERR | ACCERR | PKUERR) => Some(Stop::Page { address }),
            (libc::SIGTRAP, TRACE) => Some(Stop::Step),
            (libc::SIGTRAP, HWBKPT) => Some(Stop::Guard),
            (libc::SIGTRAP, KERNEL) => Some(Stop::Breakpoint),
            (libc::SIGSEGV | libc::SIGTRAP | libc::SIGILL | libc::SIGFPE | libc::SIGBUS | libc::SIGSYS, _) => {
                Some(Stop::Exception { signal })
            }
            _ => None,
        })
    }

    /// A jump to the vsyscall page, which Linux takes as a call of one of its functions: the seccomp filter has stopped
    /// that, but the call has returned. It becomes what it is to guest code, a fault of the jump. RAX is lost, the
    /// register of such a function's result.
    fn undo_vsyscall(&mut self, registers: &mut Registers) -> Stop {
        let function = match registers.rax as i64 {
            libc::SYS_gettimeofday => 0,
            libc::SYS_time => 0x400,
            _ => 0x800,
        };
        registers.rip = VSYSCALL.start + function;
        registers.rsp = registers.rsp.wrapping_sub(8);
        registers.orig_rax = u64::MAX;
        Stop::Page { address: registers.rip }
    }

    /// Does what [`map`](Space::map) and [`unmap`](Space::unmap) have asked for, and pins the process to this thread's
    /// CPU: what [`run`](Space::run) begins with. For a caller who has to know that old mappings are gone.
    pub fn apply(&mut self) -> Result<(), Error> {
        if self.thread != pin::thread() {
            return Err(Error::Thread);
        }
        self.pin();
        cpuid::set(self.faults_cpuid).map_err(|source| Error::Trace { what: "switch CPUID for the thread", source })?;
        if let Some((address, length)) = self.refused.take() {
            self.pending.clear();
            return Err(Error::Range { address, length });
        }
        if self.pending.is_empty() {
            return Ok(());
        }
        let pending = std::mem::take(&mut self.pending);
        for operations in pending.batches() {
            let count = self.list.write_operations(operations);
            let done = process::batch(&mut self.tracee, self.stub, self.registers, count)?;
            self.kicked |= done.kicked;
            let Some((index, source)) = done.failed else { continue };
            if source.raw_os_error() == Some(libc::ENOMEM) {
                return Err(Error::Full);
            }
            let (what, (address, length)) =
                operations.get(index).map_or(("map", (0, 0)), |failed| (failed.name(), failed.range()));
            return Err(Error::Mapping { what, address, length, source });
        }
        self.pending = pending;
        self.pending.clear();
        Ok(())
    }

    /// Keeps the process on the CPU of this thread.
    fn pin(&mut self) {
        let cpu = pin::here();
        if cpu != self.cpu {
            pin::follow(self.tracee.pid(), cpu);
            self.cpu = cpu;
        }
    }

    /// Gives this thread back the CPUs that it may use, until a space of it runs again: for a thread that is about to
    /// wait for something else.
    pub fn rest(&mut self) {
        pin::rest();
        // If it fails, each switch to another task takes longer; `resume_monitor` does CPUID as before.
        let _ = cpuid::set(false);
    }

    /// Reads the vector registers as an XSAVE area of the standard format, as much of it as `area` takes; returns how
    /// many bytes have been written.
    pub fn vector_state(&mut self, area: &mut [u8]) -> Result<usize, Error> {
        self.tracee.vector_state(area)
    }

    /// Sets the vector registers from an XSAVE area of the standard format, at least its header (576 bytes). Components
    /// that its XSTATE_BV doesn't have get their initial state.
    pub fn set_vector_state(&mut self, area: &[u8]) -> Result<(), Error> {
        if area.len() < XSAVE_HEADER_END {
            return Err(Error::Registers("an XSAVE area without its header"));
        }
        if let Some(area) = area.get(..self.vector.len()) {
            return self.tracee.set_vector_state(area);
        }
        let (given, rest) = self.vector.split_at_mut(area.len());
        given.copy_from_slice(area);
        rest.fill(0);
        self.tracee.set_vector_state(&self.vector)
    }

    /// How long the XSAVE area is on this host, in bytes.
    pub fn vector_size(&self) -> usize {
        self.vector.len()
    }

    /// What stops this space from other threads.
    pub fn kicker(&self) -> Kicker {
        Kicker::new(self.tracee.pidfd().clone())
    }

    /// How long the process has had a processor in all; zero if it is gone.
    pub fn processor_time(&self) -> Duration {
        // A clock of any process: its number inverted, and 2 for scheduled time (Linux, `posix-timers.h`).
        time_of(!self.tracee.pid() << 3 | 2)
    }

    /// The number of the process, for who looks at it from outside.
    pub fn pid(&self) -> u32 {
        self.tracee.pid().unsigned_abs()
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        if self.thread == pin::thread() {
            pin::leave();
            let _ = cpuid::set(false);
        }
    }
}

/// How long the thread that calls has had a processor.
pub fn thread_time() -> Duration {
    time_of(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn time_of(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the time is written to a local variable.
    match unsafe { libc::clock_gettime(clock, &mut time) } {
        0 => Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32),
        _ => Duration::ZERO,
    }
}

/// Whether these are whole pages among the user addresses.
fn is_user(address: u64, length: u64) -> bool {
    let pages = address.is_multiple_of(PAGE_SIZE) && length.is_multiple_of(PAGE_SIZE);
    pages && address.checked_add(length).is_some_and(|end| end <= USER_END)
}

/// What the kernel refuses to set, which would leave registers half set.
fn check_registers(registers: &Registers) -> Result<(), Error> {
    if registers.fs_base >= USER_END || registers.gs_base >= USER_END {
        return Err(Error::Registers("a segment base above the user addresses"));
    }
    // A selector that no user code can have (Linux, `invalid_selector`); CS and SS must not be null.
    let possible = |selector: u64| selector <= 0xffff && (selector == 0 || selector & 3 == 3);
    let selectors = [registers.cs, registers.ss, registers.ds, registers.es, registers.fs, registers.gs];
    if !selectors.into_iter().all(possible) || registers.cs == 0 || registers.ss == 0 {
        return Err(Error::Registers("a selector of another privilege level"));
    }
    Ok(())
}
