//! Runs cases on the real processor, in a child process.
//!
//! The parent puts the cases of a batch into shared memory and forks. The child maps the regions of [`crate::layout`], installs one
//! signal handler for all that a processor exception becomes, and enters it by an INT3. From then on it lives in that handler:
//! whatever the kernel saved in the signal frame (registers, flags, XSAVE area, vector, error code, CR2) is the case's outcome; the
//! next case's state is written over the frame, and the return from the handler (`rt_sigreturn`) loads all of it at once. So
//! there is no hand-written code that loads or saves state, and what is compared is what the processor gave to the kernel.
//!
//! If the child dies or hangs, the parent notes that for the case it was at and forks again for the rest.

use std::io;
use std::ptr::{addr_of_mut, null_mut};

use arch::registers::rflags;

use crate::case::{Input, Outcome, Status, TRACE, XSAVE_COMPONENTS, XSAVE_SIZE};
use crate::layout::*;

/// Shared between the parent and its children.
#[repr(C)]
struct Shared {
    current: u32,
    count: u32,
    inputs: [Input; SLOTS],
    outcomes: [Outcome; SLOTS],
}

/// The native side: reusable for any number of batches.
pub struct Native {
    shared: *mut Shared,
    template: Vec<u8>,
    /// The child has the local descriptor table.
    local: bool,
}

// SAFETY: the pointer is to a shared anonymous mapping that this value owns.
unsafe impl Send for Native {}

/// What the signal handler needs; only set in the child, which has one thread.
struct Child {
    shared: *mut Shared,
    template: *const u8,
    /// The thread pointer of Rust and libc code.
    fs_base: u64,
    started: bool,
}

static mut CHILD: Child = Child { shared: null_mut(), template: null_mut(), fs_base: 0, started: false };

impl Native {
    pub fn new(template: Vec<u8>, local: bool) -> io::Result<Self> {
        // SAFETY: reads the auxiliary vector.
        if unsafe { libc::getauxval(libc::AT_HWCAP2) } & HWCAP2_FSGSBASE == 0 {
            return Err(io::Error::other("the host's kernel doesn't enable RDFSBASE, which the native side needs"));
        }
        // SAFETY: a fresh anonymous mapping; all-zero bytes are valid values of its plain-data fields.
        let shared = unsafe {
            libc::mmap(
                null_mut(),
                size_of::<Shared>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if shared == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Native { shared: shared.cast(), template, local })
    }

    /// Runs up to [`SLOTS`] cases.
    pub fn run(&mut self, inputs: &[Input]) -> io::Result<&[Outcome]> {
        // SAFETY: the mapping is valid, and no child is running, so nobody else refers to it.
        let shared = unsafe { &mut *self.shared };
        shared.inputs[..inputs.len()].clone_from_slice(inputs);
        shared.count = inputs.len() as u32;
        shared.current = 0;
        for outcome in &mut shared.outcomes[..inputs.len()] {
            outcome.status = Status::None;
        }
        let mut next = 0;
        while next < inputs.len() {
            // SAFETY: the child makes only system calls and touches only its own and the shared memory.
            let pid = unsafe { libc::fork() };
            let stopped = match pid {
                -1 => return Err(io::Error::last_os_error()),
                0 => self.child(),
                _ => {
                    let mut status = 0;

                    // SAFETY: waits for our own child.
                    while unsafe { libc::waitpid(pid, &mut status, 0) } == -1 {
                        let e = io::Error::last_os_error();
                        if e.kind() != io::ErrorKind::Interrupted {
                            return Err(e);
                        }
                    }
                    libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGALRM
                }
            };
            // SAFETY: the child has ended; it wrote this word.
            next = unsafe { std::ptr::read_volatile(&raw const (*self.shared).current) } as usize;
            if next < inputs.len() {
                // SAFETY: as above.
                let outcome = unsafe { &mut (*self.shared).outcomes[next] };
                outcome.status = if stopped { Status::Hung } else { Status::Died };
                next += 1;
                // SAFETY: as above.
                unsafe { (*self.shared).current = next as u32 };
            }
        }
        // SAFETY: no child runs any more.
        Ok(unsafe { &(&(*self.shared).outcomes)[..inputs.len()] })
    }

    /// The child: never returns.
    fn child(&self) -> ! {
        // SAFETY: the child has this one thread. The regions are mapped where nothing else is (MAP_FIXED_NOREPLACE), and the
        // handler is installed for the signals that exceptions become; INT3 enters it.
        unsafe {
            let map = |at: u64, size: usize, protection| {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
                if libc::mmap(at as *mut _, size, protection, flags, -1, 0) as u64 != at {
                    libc::_exit(101);
                }
            };
            let rw = libc::PROT_READ | libc::PROT_WRITE;
            map(CODE, CODE_SIZE, rw | libc::PROT_EXEC);
            std::ptr::write_bytes(CODE as *mut u8, 0xcc, CODE_SIZE);
            for page in WRITABLE {
                map(page, PAGE, rw);
            }
            map(READ_ONLY, PAGE, rw);
            std::ptr::copy_nonoverlapping(self.template.as_ptr(), READ_ONLY as *mut u8, PAGE);
            libc::mprotect(READ_ONLY as *mut _, PAGE, libc::PROT_READ);

            // LSL of one of Linux's selectors gives the processor's number: that of the guest's is 0.
            let mut first: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(0, &mut first);
            libc::sched_setaffinity(0, size_of_val(&first), &first);

            if self.local && crate::local::install().is_err() {
                libc::_exit(103);
            }
            let fs_base: u64;
            std::arch::asm!("rdfsbase {0}", out(reg) fs_base);
            CHILD = Child { shared: self.shared, template: self.template.as_ptr(), fs_base, started: false };

            let stack_size = 256 << 10;
            let stack = libc::mmap(null_mut(), stack_size, rw, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
            let stack = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: stack_size };
            libc::sigaltstack(&stack, null_mut());
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            // Nothing may interrupt the handler: a fault in it kills the child.
            libc::sigfillset(&mut action.sa_mask);
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP] {
                libc::sigaction(signal, &action, null_mut());
            }
            // A case that never ends: SIGALRM kills the child.
            libc::signal(libc::SIGALRM, libc::SIG_DFL);
            libc::alarm(4);
            std::arch::asm!("int3");
            libc::_exit(102)
        }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: our own mapping, to which no reference is left.
        unsafe { libc::munmap(self.shared.cast(), size_of::<Shared>()) };
    }
}

/// The kernel has set CR4.FSGSBASE (Linux 5.9 on processors since 2012).
const HWCAP2_FSGSBASE: u64 = 1 << 1;

/// Where the kernel puts each general-purpose register, in the order of instruction encodings.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// XSAVE bytes 464..512 belong to software: the kernel keeps its own description of the frame there.
const SOFTWARE: std::ops::Range<usize> = 464..512;

/// Takes the outcome of the case that ended and starts the next one.
///
/// On entry FS may be anything, so nothing may touch thread-local storage before it is restored.
extern "C" fn handler(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: runs in the child only, on its alternate stack, with every exception signal blocked; the kernel passes a valid frame.
    unsafe {
        let child = &*addr_of_mut!(CHILD);
        // The kernel leaves AC as it was, and a misaligned access of our own would fault; NT and ID it doesn't take from the
        // frame when the handler returns, and they would live on into the next case.
        std::arch::asm!("pushfq", "and dword ptr [rsp], {clear}", "popfq", clear = const !((rflags::AC | rflags::NT | rflags::ID) as i32));
        let (fs_base, gs_base): (u64, u64);
        std::arch::asm!("rdfsbase {0}", "rdgsbase {1}", out(reg) fs_base, out(reg) gs_base);
        let mut data_selectors = [0u16; 4];
        std::arch::asm!("mov {0:x}, ds", "mov {1:x}, es", "mov {2:x}, fs", "mov {3:x}, gs",
            out(reg) data_selectors[0], out(reg) data_selectors[1], out(reg) data_selectors[2], out(reg) data_selectors[3]);
        std::arch::asm!("wrfsbase {0}", in(reg) child.fs_base);

        let shared = &mut *child.shared;
        let context = &mut *context.cast::<libc::ucontext_t>();
        let regs = &mut context.uc_mcontext.gregs;
        let xsave = context.uc_mcontext.fpregs.cast::<u8>();
        if child.started {
            let case = shared.current as usize;
            let input = &shared.inputs[case];
            let out = &mut shared.outcomes[case];
            let vector = regs[libc::REG_TRAPNO as usize] as u8;
            if vector == 1 && input.steps != 0 && out.steps < input.steps && (out.steps as usize) < TRACE {
                out.trace[out.steps as usize] = trace_word(
                    regs[libc::REG_RIP as usize] as u64,
                    regs[libc::REG_EFL as usize] as u64,
                    regs[libc::REG_RSP as usize] as u64,
                );
                out.steps += 1;
                std::arch::asm!("wrfsbase {0}", in(reg) fs_base);
                return;
            }
            for (to, from) in out.gpr.iter_mut().zip(GREGS) {
                *to = regs[from as usize] as u64;
            }
            out.rip = regs[libc::REG_RIP as usize] as u64;
            out.rflags = regs[libc::REG_EFL as usize] as u64;
            out.fs_base = fs_base;
            out.gs_base = gs_base;
            let segments = regs[libc::REG_CSGSFS as usize] as u64;
            out.selectors = [segments as u16, (segments >> 48) as u16, 0, 0, 0, 0];
            out.selectors[2..].copy_from_slice(&data_selectors);
            out.vector = vector;
            out.error = regs[libc::REG_ERR as usize] as u32;
            out.cr2 = regs[libc::REG_CR2 as usize] as u64;
            std::ptr::copy_nonoverlapping(xsave, out.xsave.as_mut_ptr(), XSAVE_SIZE.min(frame_size(xsave)));
            for (i, page) in WRITABLE.iter().enumerate() {
                std::ptr::copy_nonoverlapping(*page as *const u8, out.memory[i * PAGE..].as_mut_ptr(), PAGE);
            }
            let slot = input.slot as usize;
            out.code.fill(0xcc);
            std::ptr::copy_nonoverlapping(slot_address(slot) as *const u8, out.code.as_mut_ptr(), slot_size(slot));
            // The slot is left as it was before the case, so that a stray jump into it finds INT3.
            std::ptr::write_bytes(slot_address(slot) as *mut u8, 0xcc, slot_size(slot));
            out.status = Status::Exception;
            shared.current += 1;
        }
        (*addr_of_mut!(CHILD)).started = true;
        if shared.current == shared.count {
            libc::_exit(0);
        }

        let input = &shared.inputs[shared.current as usize];
        let out = &mut shared.outcomes[shared.current as usize];
        out.steps = 0;
        let slot = input.slot as usize;
        std::ptr::copy_nonoverlapping(input.code.as_ptr(), slot_address(slot) as *mut u8, slot_size(slot));
        let template = std::slice::from_raw_parts(child.template, crate::case::TEMPLATE);
        input.fill_memory(template, &mut out.memory);
        for (i, page) in WRITABLE.iter().enumerate() {
            std::ptr::copy_nonoverlapping(out.memory[i * PAGE..].as_ptr(), *page as *mut u8, PAGE);
        }
        for (from, to) in input.gpr.iter().zip(GREGS) {
            regs[to as usize] = *from as i64;
        }
        regs[libc::REG_RIP as usize] = input.rip as i64;
        regs[libc::REG_EFL as usize] = input.rflags as i64;
        let s = input.selectors;
        regs[libc::REG_CSGSFS as usize] =
            (u64::from(s[0]) | u64::from(s[5]) << 16 | u64::from(s[4]) << 32 | u64::from(s[1]) << 48) as i64;
        let size = XSAVE_SIZE.min(frame_size(xsave));
        std::ptr::copy_nonoverlapping(input.xsave.as_ptr(), xsave, SOFTWARE.start);
        std::ptr::copy_nonoverlapping(input.xsave[576..].as_ptr(), xsave.add(576), size - 576);
        let bv = XSAVE_COMPONENTS & frame_components(xsave);
        xsave.add(512).cast::<u64>().write(bv);
        std::arch::asm!("mov ds, {0:x}", "mov es, {1:x}", "mov fs, {2:x}", "mov gs, {3:x}", "wrfsbase {4}", "wrgsbase {5}",
            in(reg) s[2], in(reg) s[3], in(reg) s[4], in(reg) s[5], in(reg) input.fs_base, in(reg) input.gs_base);
    }
}

/// What is recorded of each single step.
pub fn trace_word(rip: u64, rflags: u64, rsp: u64) -> u64 {
    rip & 0xffff_ffff | (rflags & 0xcd5) << 32 | (rsp & 0xffff) << 48
}

/// The size of the frame's XSAVE area, from the kernel's description in it.
unsafe fn frame_size(xsave: *const u8) -> usize {
    // SAFETY: the caller passes a signal frame's area: struct _fpx_sw_bytes is at 464, xstate_size at 16 in it.
    unsafe { xsave.add(SOFTWARE.start + 16).cast::<u32>().read() as usize }
}

/// The components the kernel restores from the frame.
unsafe fn frame_components(xsave: *const u8) -> u64 {
    // SAFETY: as above; xfeatures is at 8.
    unsafe { xsave.add(SOFTWARE.start + 8).cast::<u64>().read() }
}
