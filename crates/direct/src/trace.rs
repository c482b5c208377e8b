//! The calls of ptrace, and of waiting, on one process.

use std::ffi::c_void;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;

use crate::{Error, Registers, kick};

/// The set of registers that is an XSAVE area (Linux, `elf.h`).
const NT_X86_XSTATE: usize = 0x202;

/// Why the process has stopped, as far as its wait status says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A system call, before it is done (`PTRACE_SYSEMU` only).
    Call,
    /// A signal, before it is delivered.
    Signal(i32),
    /// It has stopped or gone on as a job (SIGSTOP, SIGCONT), or `PTRACE_INTERRUPT`.
    Job,
}

/// How it goes on.
#[derive(Clone, Copy, Debug)]
pub enum Resume {
    /// System calls are done.
    Batch,
    /// System calls stop, and are not done.
    Guest,
}

/// A child of this thread, traced by this thread. It is killed and reaped when this is dropped.
pub struct Tracee {
    pid: libc::pid_t,
    pidfd: Arc<OwnedFd>,
    /// How it ended, once it has been waited for: its number may be another process's from then on.
    ended: Option<ExitStatus>,
}

impl Tracee {
    /// For a child that this thread has just made.
    pub fn new(pid: libc::pid_t, pidfd: OwnedFd) -> Self {
        Self { pid, pidfd: Arc::new(pidfd), ended: None }
    }

    pub fn pid(&self) -> libc::pid_t {
        self.pid
    }

    pub fn pidfd(&self) -> &Arc<OwnedFd> {
        &self.pidfd
    }

    /// Begins to trace: the process dies with this thread, its system calls are told from SIGTRAP. It is stopped then.
    ///
    /// `PTRACE_SEIZE` and not `PTRACE_TRACEME`, since a signal that stops a traced child before its `execve` would leave
    /// the parent in `clone(CLONE_VFORK)` for ever.
    pub fn seize(&mut self) -> Result<(), Error> {
        let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;
        self.ptrace(libc::PTRACE_SEIZE, 0, options as usize).map_err(Error::host("PTRACE_SEIZE"))?;
        self.ptrace(libc::PTRACE_INTERRUPT, 0, 0).map_err(Error::host("PTRACE_INTERRUPT"))?;
        while self.wait()? != Event::Job {
            self.resume(Resume::Batch)?;
        }
        Ok(())
    }

    /// Lets it go on from a stop. Whatever signal it was, it isn't delivered.
    pub fn resume(&mut self, how: Resume) -> Result<(), Error> {
        let (request, what) = match how {
            Resume::Batch => (libc::PTRACE_CONT, "resume the code"),
            Resume::Guest => (libc::PTRACE_SYSEMU, "resume the guest code"),
        };
        let done = self.ptrace(request, 0, 0);
        self.check(what, done)
    }

    /// Waits for the next stop.
    pub fn wait(&mut self) -> Result<Event, Error> {
        self.alive()?;
        let mut status = 0;
        // SAFETY: the status is written to a local variable.
        while unsafe { libc::waitpid(self.pid, &mut status, libc::__WALL) } == -1 {
            let source = io::Error::last_os_error();
            // The thread of a vCPU gets signals of its own.
            if source.kind() != io::ErrorKind::Interrupted {
                return Err(Error::Trace { what: "wait for a stop", source });
            }
        }
        if !libc::WIFSTOPPED(status) {
            let status = ExitStatus::from_raw(status);
            self.ended = Some(status);
            return Err(Error::Gone(status));
        }
        Ok(match libc::WSTOPSIG(status) {
            _ if status >> 16 == libc::PTRACE_EVENT_STOP => Event::Job,
            signal if signal == libc::SIGTRAP | 0x80 => Event::Call,
            signal => Event::Signal(signal),
        })
    }

    pub fn registers(&mut self) -> Result<Registers, Error> {
        // SAFETY: it is integers only, for which zeros are a value.
        let mut registers: Registers = unsafe { std::mem::zeroed() };
        let done = self.ptrace(libc::PTRACE_GETREGS, 0, &raw mut registers as usize);
        self.check("read the registers", done).map(|()| registers)
    }

    pub fn set_registers(&mut self, registers: &Registers) -> Result<(), Error> {
        let done = self.ptrace(libc::PTRACE_SETREGS, 0, &raw const *registers as usize);
        self.check("set the registers", done)
    }

    /// The code and the address that came with the signal it has stopped for.
    pub fn signal(&mut self) -> Result<(i32, u64), Error> {
        // SAFETY: it is integers and pointers only, for which zeros are a value.
        let mut information: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let done = self.ptrace(libc::PTRACE_GETSIGINFO, 0, &raw mut information as usize);
        self.check("read the signal", done)?;
        // SAFETY: all of the structure is initialized; what these bytes mean, the code says, and callers ask it first.
        Ok((information.si_code, unsafe { information.si_addr() } as u64))
    }

    /// The XSAVE area; the length is what the kernel has written.
    pub fn vector_state(&mut self, area: &mut [u8]) -> Result<usize, Error> {
        let mut part = libc::iovec { iov_base: area.as_mut_ptr().cast::<c_void>(), iov_len: area.len() };
        let done = self.ptrace(libc::PTRACE_GETREGSET, NT_X86_XSTATE, &raw mut part as usize);
        self.check("read the vector registers", done).map(|()| part.iov_len)
    }

    pub fn set_vector_state(&mut self, area: &[u8]) -> Result<(), Error> {
        let mut part = libc::iovec { iov_base: area.as_ptr().cast_mut().cast::<c_void>(), iov_len: area.len() };
        let done = self.ptrace(libc::PTRACE_SETREGSET, NT_X86_XSTATE, &raw mut part as usize);
        self.check("set the vector registers", done)
    }

    /// Has it stop before the instructions at these addresses, and before no others: at most four, by the debug registers
    /// (Intel SDM 3B 18.2.4: a bit of DR7 for each, which with zeros in its other fields is a breakpoint for execution).
    pub fn set_breakpoints(&mut self, addresses: &[u64]) -> io::Result<()> {
        const DEBUG: usize = std::mem::offset_of!(libc::user, u_debugreg);
        let set =
            |register: usize, value: u64| self.ptrace(libc::PTRACE_POKEUSER, DEBUG + 8 * register, value as usize);
        set(7, 0)?;
        for (register, &address) in addresses.iter().enumerate() {
            set(register, address)?;
        }
        set(7, (0..addresses.len()).map(|register| 1 << (2 * register)).sum())
    }

    /// An error if it is known to have ended: its number may not be used any more.
    fn alive(&self) -> Result<(), Error> {
        self.ended.map_or(Ok(()), |status| Err(Error::Gone(status)))
    }

    /// Says what a call of ptrace meant. If there is no such process in a stop, it has been killed: SIGKILL alone takes
    /// it out of a stop. Then its end is waited for.
    fn check(&mut self, what: &'static str, done: io::Result<()>) -> Result<(), Error> {
        let Err(source) = done else { return Ok(()) };
        self.alive()?;
        if source.raw_os_error() == Some(libc::ESRCH) {
            kick::send(&self.pidfd, libc::SIGKILL);
            loop {
                self.wait()?;
            }
        }
        Err(Error::Trace { what, source })
    }

    /// A call of ptrace. `data` is a number, or the address of what the request reads or writes.
    fn ptrace(&self, request: libc::c_uint, address: usize, data: usize) -> io::Result<()> {
        if self.ended.is_some() {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        // SAFETY: the requests made in this file write only through `data`, if it is an address: then their callers derive
        // it from a mutable borrow of the type that the request writes. It is of this thread's own child, not yet reaped.
        match unsafe { libc::ptrace(request, self.pid, address, data) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        kick::send(&self.pidfd, libc::SIGKILL);
        // Stops from before the signal may come first.
        while self.ended.is_none() && !matches!(self.wait(), Err(Error::Trace { .. })) {}
    }
}
