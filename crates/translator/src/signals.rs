//! Host signals that guest instructions raise in emitted code: they become guest exceptions.
//!
//! The handler runs on its own stack, since rsp points into the [`Vcpu`] while guest code runs. If the fault was in this
//! thread's code memory, it notes what happened and sends the thread to the `signal` thunk, which saves the guest's
//! registers as they were; otherwise the signal takes the course it took before. A CPUID of the monitor's own, on a thread where it
//! faults since a program is to stop there, is done.

use std::cell::Cell;
use std::io;
use std::mem::zeroed;
use std::ptr;
use std::sync::OnceLock;

use crate::Vcpu;
use crate::entry::signal_thunk;

const SIGNALS: [i32; 5] = [libc::SIGSEGV, libc::SIGFPE, libc::SIGILL, libc::SIGBUS, libc::SIGTRAP];
const STACK_SIZE: usize = 128 << 10;

thread_local! {
    /// The vCPU that runs on this thread. Constant-initialized and without a destructor, so that a signal handler may
    /// read it.
    static CURRENT: Cell<*mut Vcpu> = const { Cell::new(ptr::null_mut()) };
}

/// The id of the vCPU that runs on this thread.
pub fn current_vcpu() -> Option<u32> {
    let vcpu = CURRENT.get();
    // SAFETY: null, or the vCPU that this very thread is running (see `Attached`); its id, written when it was made, is
    // read by address, since the thread may be inside a method of it.
    (!vcpu.is_null()).then(|| unsafe { (&raw const (*vcpu).id).read() })
}

static PREVIOUS: OnceLock<[libc::sigaction; SIGNALS.len()]> = OnceLock::new();

/// Installs the handlers, once a process.
pub fn install() -> io::Result<()> {
    let mut result = Ok(());
    PREVIOUS.get_or_init(|| {
        // SAFETY: zeroed sigactions are valid; the new ones are fully set up and the handler is async-signal-safe.
        unsafe {
            let mut previous: [libc::sigaction; SIGNALS.len()] = zeroed();
            for (signal, old) in SIGNALS.iter().zip(&mut previous) {
                let mut action: libc::sigaction = zeroed();
                action.sa_sigaction = on_fault as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                if libc::sigaction(*signal, &raw const action, old) != 0 {
                    result = Err(io::Error::last_os_error());
                }
            }
            previous
        }
    });
    result
}

extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a ucontext_t and siginfo_t that live until the handler returns; `CURRENT` is null or names the
    // vCPU that this very thread is running (see `Attached`).
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let registers = &mut context.uc_mcontext.gregs;
        let pc = registers[libc::REG_RIP as usize] as u64;
        if signal == libc::SIGSEGV && direct::cpuid::resume_monitor(registers) {
            return;
        }
        let vcpu = CURRENT.get();
        if !vcpu.is_null() {
            let s0 = registers[libc::REG_R14 as usize] as u64;
            // A jump through an empty table entry: the guest's last byte of address space. It is a lookup like any other.
            if pc == 0 {
                registers[libc::REG_RIP as usize] = (*vcpu).near.exit_lookup as i64;
                return;
            }
            if (*vcpu).engine.cache.offset_of(pc).is_some() {
                let hot = &mut (*vcpu).hot;
                hot.signal_code = registers[libc::REG_TRAPNO as usize] as u64;
                hot.signal_address = if signal == libc::SIGSEGV { s0 } else { (*info).si_addr() as u64 };
                hot.signal_pc = pc;
                registers[libc::REG_RIP as usize] = signal_thunk() as i64;
                return;
            }
        }
        let previous = SIGNALS.iter().position(|&s| s == signal).and_then(|i| PREVIOUS.get().map(|p| p[i]));
        let mut action: libc::sigaction = zeroed();
        match previous {
            Some(old) if old.sa_sigaction != libc::SIG_IGN => action = old,
            _ => action.sa_sigaction = libc::SIG_DFL,
        }
        // The instruction runs again and raises the signal for whoever had it before.
        libc::sigaction(signal, &raw const action, ptr::null_mut());
    }
}

/// This thread runs a vCPU: signals have a stack of their own, and only those that the engine handles arrive here.
pub struct Attached {
    stack: Vec<u8>,
    old_stack: libc::stack_t,
    old_mask: libc::sigset_t,
}

impl Attached {
    /// `vcpu` must stay where it is until the value is dropped.
    pub fn new(vcpu: *mut Vcpu) -> io::Result<Self> {
        install()?;
        // SAFETY: the stack and the set outlive their use by the kernel: `Drop` takes both back first.
        unsafe {
            let mut attached = Attached { stack: vec![0; STACK_SIZE], old_stack: zeroed(), old_mask: zeroed() };
            let stack = libc::stack_t { ss_sp: attached.stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: STACK_SIZE };
            if libc::sigaltstack(&raw const stack, &raw mut attached.old_stack) != 0 {
                return Err(io::Error::last_os_error());
            }
            // Handlers of others may run without a stack of their own, so their signals go to other threads.
            let mut blocked: libc::sigset_t = zeroed();
            libc::sigfillset(&raw mut blocked);
            for signal in SIGNALS {
                libc::sigdelset(&raw mut blocked, signal);
            }
            libc::sigdelset(&raw mut blocked, libc::SIGRTMIN());
            libc::sigdelset(&raw mut blocked, libc::SIGABRT);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const blocked, &raw mut attached.old_mask);
            CURRENT.set(vcpu);
            Ok(attached)
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        CURRENT.set(ptr::null_mut());
        // SAFETY: both were filled by the kernel in `new`.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.old_mask, ptr::null_mut());
            libc::sigaltstack(&raw const self.old_stack, ptr::null_mut());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::arch::x86_64::__cpuid;

    #[test]
    fn the_monitors_own_cpuid_is_done_where_it_faults() {
        super::install().unwrap();
        let expected = __cpuid(0);
        if direct::cpuid::set(true).is_err() {
            // A processor without this has nothing to be done.
            let list = std::fs::read_to_string("/proc/cpuinfo").unwrap();
            assert!(!list.contains(" cpuid_fault"));
            return;
        }
        for _ in 0..3 {
            assert_eq!(__cpuid(0), expected);
        }
        direct::cpuid::set(false).unwrap();
        assert_eq!(__cpuid(0), expected);
    }
}
