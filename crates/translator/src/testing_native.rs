//! Runs single instructions natively in tests, to compare with what the engine does.

use std::sync::{Mutex, MutexGuard, OnceLock};

/// How an instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// SIGSEGV or SIGBUS.
    Fault,
    /// SIGILL.
    Undefined,
}

const PAGE: usize = 4096;

struct Pages {
    /// One writable and executable page.
    code: usize,
    /// No access, two pages that can be written, no access.
    data: usize,
}

/// The right to run instructions: one thread at a time.
pub struct Native(MutexGuard<'static, Pages>);

/// Where the signal handler goes on; 0: the signal is not ours.
static RECOVERY: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
/// The stack pointer to go on with there.
static STACK: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
static CODE: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

extern "C" fn handler(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    use std::sync::atomic::Ordering::SeqCst;
    // SAFETY: the kernel gives a valid context.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let registers = &mut context.uc_mcontext.gregs;
    let rip = registers[libc::REG_RIP as usize] as usize;
    let code = CODE.load(SeqCst);
    if code == 0 || !(code..code + PAGE).contains(&rip) {
        // Not from the code page: let it kill the process when it happens again.
        // SAFETY: restoring the default disposition is always allowed.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    registers[libc::REG_RIP as usize] = RECOVERY.load(SeqCst) as i64;
    registers[libc::REG_RAX as usize] = if signal == libc::SIGILL { 2 } else { 1 };
}

fn map(pages: usize, protection: i32) -> usize {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new private mapping.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, protection, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at as usize
}

fn pages() -> &'static Mutex<Pages> {
    static PAGES: OnceLock<Mutex<Pages>> = OnceLock::new();
    PAGES.get_or_init(|| {
        let code = map(1, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
        let data = map(4, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: the mappings were just made; the handler is async-signal-safe.
        unsafe {
            libc::mprotect(data as *mut _, PAGE, libc::PROT_NONE);
            libc::mprotect((data + 3 * PAGE) as *mut _, PAGE, libc::PROT_NONE);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as extern "C" fn(_, _, _) as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL] {
                libc::sigaction(signal, &action, std::ptr::null_mut());
            }
        }
        CODE.store(code, std::sync::atomic::Ordering::SeqCst);
        Mutex::new(Pages { code, data })
    })
}

impl Native {
    pub fn new() -> Self {
        Native(pages().lock().unwrap_or_else(|e| e.into_inner()))
    }

    pub fn with_avx512() -> Option<Self> {
        (is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")).then(Self::new)
    }

    /// The two writable pages.
    pub fn data(&self) -> usize {
        self.0.data + PAGE
    }

    /// Runs an instruction whose operand is at `[rax]` under k1 = `mask`, `split` bytes of the operand before the end of
    /// the pages with access, or, if `low_bad`, before their start.
    pub fn masked(&self, bytes: &[u8], mask: u64, split: usize, low_bad: bool) -> Outcome {
        let at = if low_bad { self.data() - split } else { self.data() + 2 * PAGE - split };
        self.run(bytes, at, mask)
    }

    fn run(&self, bytes: &[u8], rax: usize, k1: u64) -> Outcome {
        let mut code = bytes.to_vec();
        // xor eax, eax; ret
        code.extend([0x31, 0xc0, 0xc3]);
        let outcome: u64;
        // SAFETY: the code page is writable and holds one instruction, whose memory operand is ours or faults; a fault
        // goes on at label 2 with the stack as it was before the call.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.0.code as *mut u8, code.len());
            std::arch::asm!(
                "push rbx",
                "push rbp",
                "lea rcx, [rip + 2f]",
                "mov [r12], rcx",
                "mov [r13], rsp",
                "kmovq k1, r14",
                "call r15",
                "jmp 3f",
                "2: mov rsp, [r13]",
                "3:",
                "pop rbp",
                "pop rbx",
                in("r12") RECOVERY.as_ptr(),
                in("r13") STACK.as_ptr(),
                in("r14") k1,
                in("r15") self.0.code,
                inout("rax") rax => outcome,
                clobber_abi("C"),
            );
        }
        match outcome {
            0 => Outcome::Done,
            2 => Outcome::Undefined,
            _ => Outcome::Fault,
        }
    }
}
