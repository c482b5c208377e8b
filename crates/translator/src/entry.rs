//! The border between Rust and emitted code, in assembly.
//!
//! [`enter`] loads the guest's registers and jumps into a block, which finds the guest's RIP in r14 as after a branch. The block leaves by one of the thunks, whose addresses
//! stand in [`Near`] and [`Hot`] so that emitted code reaches them as `[rsp + constant]`:
//!
//! - `exit_link`, called by the stub of a direct branch that is not linked yet; the return address names the stub;
//! - `exit_stale`, called the same way by a block that finds its bytes changed;
//! - `exit_lookup`, jumped to with the guest RIP in r14: a branch missed the jump table; `exit_branch` the same, called, of one
//!   that computed its target, which the return address tells of; `exit_branch_event` instead of `exit_event`;
//! - `exit_lookup_parked`, the same with the flags parked, where a block was: see [`crate::codegen::relative`];
//! - `exit_event`, jumped to with the guest RIP in r14: the poll word is set;
//! - `helper`, called with the index of a sensitive instruction in r14;
//! - `slow`, called with what the check of an address left in r14 and r10 (see [`Tlb::address`](crate::tlb::Tlb::address)), and an
//!   [`AccessKind`](crate::access::AccessKind) right before the call, as the immediate of an instruction that never runs; comes
//!   back with the host address in r14;
//! - `slow_or_detour`, the same for a group, behind whose call stand two jumps: the second leads to careful code, and is taken
//!   where the group crosses a page's end, once it is linked;
//! - `resolve`, for operands whose address only Rust computes, called with the access kind in r10d;
//! - `bounced`, jumped to when an instruction has run on the bounce buffer, and `stored_split`, the same for a store to two
//!   pages of RAM;
//! - `signal`, where the host's signal handler sends emitted code that faulted.
//!
//! Rust's own code is compiled for plain SSE2, so that the light path of `slow` (a TLB fill) needs to preserve only
//! xmm0-xmm15 when the guest's vector state is loaded; everything else saves the whole of it by XSAVE first.

use std::arch::global_asm;
use std::mem::offset_of;

use crate::Vcpu;

/// Why emitted code was left; what [`enter`] returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Left {
    /// A direct branch without a link; `hot.return_address` names its stub.
    Link = 0,
    /// An indirect branch to `rip` that the jump table does not know.
    Lookup = 1,
    /// `rip` is current, nothing special: look for events and go on.
    Event = 2,
    /// A stop is in `engine.stop`.
    Stop = 3,
    /// A host signal hit emitted code; see `hot.signal_*`.
    Signal = 4,
    /// The check of a group failed at `rip`: see [`crate::codegen::groups`].
    Careful = 5,
    /// The block whose stub `hot.return_address` names was made from other bytes: see [`crate::codegen::checked`].
    Stale = 6,
}

/// What emitted code uses most, just below its stack: a displacement of one byte reaches it.
#[repr(C)]
pub struct Near {
    pub slow: u64,
    pub slow_or_detour: u64,
    pub exit_link: u64,
    pub exit_lookup: u64,
    pub exit_event: u64,
    pub helper: u64,
    /// The page that the code of a relative block runs in: see [`crate::codegen::relative`].
    pub code_page: u64,
    /// Host flags while an inline TLB check needs them: see `Asm::flags_to_ax`.
    pub saved_ax: u64,
}

/// Fields of a [`Vcpu`] that only emitted code and its entry use.
#[repr(C, align(16))]
pub struct Hot {
    /// Where the bounce buffer's user goes on, and where thunks return to.
    pub return_address: u64,
    /// The host's stack pointer while guest code runs.
    pub host_rsp: u64,
    pub target: u64,
    /// What follows the host code of the branch to a computed address by which emitted code was left last; zero if by none.
    pub branch: u64,
    /// See [`crate::mmu::segmentation`].
    pub segment_ends: [crate::mmu::segmentation::Ends; 6],
    /// A guest register lent to the translator within one instruction.
    pub lent: u64,
    pub resolve: u64,
    pub exit_branch: u64,
    pub exit_branch_event: u64,
    pub exit_stale: u64,
    pub exit_lookup_parked: u64,
    pub bounced: u64,
    pub stored_split: u64,
    /// XSAVE's and XRSTOR's component mask.
    pub xsave_mask: u64,
    /// Not zero: the host has XSAVEOPT.
    pub xsaveopt: u64,
    pub load_fp: u64,
    pub signal_code: u64,
    pub signal_address: u64,
    pub signal_pc: u64,
    /// Guest TSC minus host TSC, less the guest's own adjustment.
    pub tsc_offset: u64,
    /// Host addresses of groups' spans: see [`crate::codegen::groups`].
    pub group_spans: [u64; crate::codegen::groups::SLOTS],
    /// One of them, which emitted code holds in r11, across the slow path.
    pub held: u64,
    /// The guest-virtual address of the access that `slow` was called for.
    pub accessed: u64,
    /// The page of the relative block whose x87 instruction ran last.
    pub x87_page: u64,
    /// What emitted code holds in r10, while it is asked where a group's span ends.
    pub index: u64,
    /// Rounds of a loop until its checks are made again: see [`crate::codegen::steady`].
    pub rounds: u32,
    /// The address of the word of requests from others.
    pub requests: u64,
    /// How many more detours to careful code emitted code takes before it lets Rust see one.
    pub detours: i32,
    /// Not zero: programs are to run directly, so that what returns to them goes by the dispatcher.
    pub direct: u64,
    /// Returns to programs by SYSRET.
    pub returns: u64,
    pub split: Split,
    /// xmm0-xmm15 across the light path.
    pub xmm: [u128; 16],
    /// Of the block that runs: see [`crate::codegen::checked`].
    pub immediates: [u64; crate::codegen::checked::MAX_IMMEDIATES],
}

/// How far before the return address of a call of `slow` the access kind stands.
pub const KIND_DISTANCE: usize = 8;

/// A store across the end of a page that has run on the bounce buffer: where its two pieces go.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Split {
    pub from: u64,
    pub first: u64,
    pub first_length: u64,
    pub second: u64,
    pub second_length: u64,
    /// Where emitted code goes on.
    pub resume: u64,
}

/// The offset of a [`Vcpu`] field from what rsp points at.
macro_rules! context_offset {
    ($($field:tt)+) => { std::mem::offset_of!($crate::Vcpu, $($field)+) as i32 - std::mem::offset_of!($crate::Vcpu, gpr) as i32 };
}
pub(crate) use context_offset;

unsafe extern "C" {
    /// Runs guest code from `code` (a host address). `context` is the address of a [`Vcpu`]'s `gpr`.
    fn ringer_enter(context: *mut u64, code: u64) -> u64;
    fn ringer_exit_link();
    fn ringer_exit_stale();
    fn ringer_exit_lookup();
    fn ringer_exit_lookup_parked();
    fn ringer_exit_branch();
    fn ringer_exit_branch_event();
    fn ringer_exit_event();
    fn ringer_helper();
    fn ringer_slow();
    fn ringer_slow_or_detour();
    fn ringer_resolve();
    fn ringer_bounced();
    fn ringer_stored_split();
    fn ringer_load_fp();
    fn ringer_signal();
}

fn address(thunk: unsafe extern "C" fn()) -> u64 {
    thunk as usize as u64
}

impl Default for Near {
    fn default() -> Self {
        Near {
            slow: address(ringer_slow),
            slow_or_detour: address(ringer_slow_or_detour),
            exit_link: address(ringer_exit_link),
            exit_lookup: address(ringer_exit_lookup),
            exit_event: address(ringer_exit_event),
            helper: address(ringer_helper),
            code_page: 0,
            saved_ax: 0,
        }
    }
}

impl Hot {
    /// `xsave_mask`: the state components that guests can use on this host; `requests`: those to this vCPU, which must outlive
    /// its code.
    pub fn new(xsave_mask: u64, requests: &std::sync::atomic::AtomicU32) -> Self {
        Hot {
            return_address: 0,
            host_rsp: 0,
            target: 0,
            branch: 0,
            segment_ends: Default::default(),
            lent: 0,
            resolve: address(ringer_resolve),
            exit_branch: address(ringer_exit_branch),
            exit_branch_event: address(ringer_exit_branch_event),
            exit_stale: address(ringer_exit_stale),
            exit_lookup_parked: address(ringer_exit_lookup_parked),
            bounced: address(ringer_bounced),
            stored_split: address(ringer_stored_split),
            xsave_mask,
            xsaveopt: u64::from(crate::host::cpuid(0xd, 1).eax & 1),
            load_fp: address(ringer_load_fp),
            signal_code: 0,
            signal_address: 0,
            signal_pc: 0,
            tsc_offset: 0,
            group_spans: [0; crate::codegen::groups::SLOTS],
            held: 0,
            accessed: 0,
            x87_page: 0,
            index: 0,
            rounds: 0,
            requests: requests.as_ptr() as u64,
            detours: 0,
            direct: 0,
            returns: 0,
            split: Split::default(),
            xmm: [0; 16],
            immediates: [0; _],
        }
    }
}

/// Where a signal handler sends a thread that faulted in emitted code.
pub fn signal_thunk() -> u64 {
    address(ringer_signal)
}

/// Runs guest code until it leaves.
///
/// # Safety
/// `code` must be the entry of a live block in `vcpu`'s own code memory, translated for `vcpu`'s current mode.
pub unsafe fn enter(vcpu: &mut Vcpu, code: u64) -> Left {
    // SAFETY: the thunks keep the System V ABI's callee-saved registers, and touch only `vcpu`. The pointer is derived from the
    // whole of `vcpu`, since emitted code reaches every field and the stack words below `gpr`.
    let reason = unsafe {
        let whole: *mut Vcpu = vcpu;
        ringer_enter(whole.cast::<u8>().add(offset_of!(Vcpu, gpr)).cast(), code)
    };
    match reason {
        0 => Left::Link,
        1 => Left::Lookup,
        2 => Left::Event,
        3 => Left::Stop,
        4 => Left::Signal,
        5 => Left::Careful,
        _ => Left::Stale,
    }
}

global_asm!(
    // Guest registers that live in host registers, to and from the context. rax and flags apart.
    ".macro SAVE_GPRS",
    "mov [rsp + 8*1], rcx",
    "mov [rsp + 8*2], rdx",
    "mov [rsp + 8*3], rbx",
    "mov [rsp + 8*4], r15",
    "mov [rsp + 8*5], rbp",
    "mov [rsp + 8*6], rsi",
    "mov [rsp + 8*7], rdi",
    "mov [rsp + 8*8], r8",
    "mov [rsp + 8*9], r9",
    "mov [rsp + 8*12], r12",
    "mov [rsp + 8*13], r13",
    ".endm",
    ".macro LOAD_GPRS",
    "mov rcx, [rsp + 8*1]",
    "mov rdx, [rsp + 8*2]",
    "mov rbx, [rsp + 8*3]",
    "mov r15, [rsp + 8*4]",
    "mov rbp, [rsp + 8*5]",
    "mov rsi, [rsp + 8*6]",
    "mov rdi, [rsp + 8*7]",
    "mov r8, [rsp + 8*8]",
    "mov r9, [rsp + 8*9]",
    "mov r12, [rsp + 8*12]",
    "mov r13, [rsp + 8*13]",
    ".endm",
    // rax and the arithmetic flags.
    ".macro SAVE_FLAGS",
    "mov [rsp + 8*0], rax",
    "lahf",
    "seto al",
    "movzx ecx, ah",
    "and ecx, 0xd5",
    "movzx eax, al",
    "shl eax, 11",
    "or eax, ecx",
    "mov rcx, [rsp + {rflags}]",
    "and rcx, ~0x8d5",
    "or rcx, rax",
    "mov [rsp + {rflags}], rcx",
    ".endm",
    ".macro LOAD_FLAGS",
    "mov rcx, [rsp + {rflags}]",
    "mov eax, ecx",
    "shr eax, 11",
    "and eax, 1",
    "mov ah, cl",
    "add al, 0x7f",
    "sahf",
    "mov rax, [rsp + 8*0]",
    ".endm",
    ".macro SAVE_ALL",
    "SAVE_GPRS",
    "SAVE_FLAGS",
    ".endm",
    ".macro LOAD_ALL",
    "LOAD_FLAGS",
    "LOAD_GPRS",
    ".endm",
    // The guest's vector state, if it is in the registers: to memory. Clobbers rax, rdx.
    ".macro SAVE_FP",
    "cmp qword ptr [rsp + {fp_loaded}], 0",
    "je 77f",
    "mov eax, [rsp + {xsave_mask}]",
    "xor edx, edx",
    // XSAVEOPT leaves out what is in its initial state or unchanged since it was loaded.
    "cmp qword ptr [rsp + {xsaveopt}], 0",
    "je 78f",
    "xsaveopt64 [rsp + {xsave}]",
    "jmp 79f",
    "78:",
    "xsave64 [rsp + {xsave}]",
    "79:",
    "mov qword ptr [rsp + {fp_loaded}], 0",
    "mov dword ptr [rsp - 8], 0x1f80",
    "ldmxcsr [rsp - 8]",
    "fninit",
    "77:",
    ".endm",
    // What Rust's own code may clobber of the guest's vector state.
    ".macro SAVE_XMM",
    "movups [rsp + {xmm} + 16*0], xmm0",
    "movups [rsp + {xmm} + 16*1], xmm1",
    "movups [rsp + {xmm} + 16*2], xmm2",
    "movups [rsp + {xmm} + 16*3], xmm3",
    "movups [rsp + {xmm} + 16*4], xmm4",
    "movups [rsp + {xmm} + 16*5], xmm5",
    "movups [rsp + {xmm} + 16*6], xmm6",
    "movups [rsp + {xmm} + 16*7], xmm7",
    "movups [rsp + {xmm} + 16*8], xmm8",
    "movups [rsp + {xmm} + 16*9], xmm9",
    "movups [rsp + {xmm} + 16*10], xmm10",
    "movups [rsp + {xmm} + 16*11], xmm11",
    "movups [rsp + {xmm} + 16*12], xmm12",
    "movups [rsp + {xmm} + 16*13], xmm13",
    "movups [rsp + {xmm} + 16*14], xmm14",
    "movups [rsp + {xmm} + 16*15], xmm15",
    ".endm",
    ".macro LOAD_XMM",
    "movups xmm0, [rsp + {xmm} + 16*0]",
    "movups xmm1, [rsp + {xmm} + 16*1]",
    "movups xmm2, [rsp + {xmm} + 16*2]",
    "movups xmm3, [rsp + {xmm} + 16*3]",
    "movups xmm4, [rsp + {xmm} + 16*4]",
    "movups xmm5, [rsp + {xmm} + 16*5]",
    "movups xmm6, [rsp + {xmm} + 16*6]",
    "movups xmm7, [rsp + {xmm} + 16*7]",
    "movups xmm8, [rsp + {xmm} + 16*8]",
    "movups xmm9, [rsp + {xmm} + 16*9]",
    "movups xmm10, [rsp + {xmm} + 16*10]",
    "movups xmm11, [rsp + {xmm} + 16*11]",
    "movups xmm12, [rsp + {xmm} + 16*12]",
    "movups xmm13, [rsp + {xmm} + 16*13]",
    "movups xmm14, [rsp + {xmm} + 16*14]",
    "movups xmm15, [rsp + {xmm} + 16*15]",
    ".endm",
    // Goes to the block that Rust code finds, if it finds one; it touches no more vector registers than these.
    ".macro GO_TO_FOUND function",
    "mov rbx, [rsp + {fp_loaded}]",
    "test rbx, rbx",
    "je 71f",
    "SAVE_XMM",
    "71:",
    "mov rbp, rsp",
    "lea rdi, [rsp - {gpr}]",
    "mov rsp, [rsp + {host_rsp}]",
    "call \\function",
    "mov rsp, rbp",
    "test rbx, rbx",
    "je 72f",
    "LOAD_XMM",
    "72:",
    "test rax, rax",
    "je 73f",
    "mov [rsp + {return_address}], rax",
    "LOAD_ALL",
    "mov r14, [rsp + {rip}]",
    "jmp [rsp + {return_address}]",
    "73:",
    ".endm",
    ".global ringer_enter",
    "ringer_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "sub rsp, 8",
    "mov [rdi + {host_rsp}], rsp",
    "mov rsp, rdi",
    "mov [rsp + {target}], rsi",
    "LOAD_ALL",
    "mov r14, [rsp + {rip}]",
    "jmp [rsp + {target}]",
    // Back to the caller of `enter`, with the reason in ebx.
    "ringer_leave:",
    "SAVE_FP",
    "mov eax, ebx",
    "mov rsp, [rsp + {host_rsp}]",
    "add rsp, 8",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".global ringer_exit_link",
    "ringer_exit_link:",
    "pop qword ptr [rsp + {return_address}]",
    "SAVE_ALL",
    "GO_TO_FOUND {link_code_light}",
    "mov ebx, 0",
    "jmp ringer_leave",
    ".global ringer_exit_stale",
    "ringer_exit_stale:",
    "pop qword ptr [rsp + {return_address}]",
    "SAVE_ALL",
    "mov ebx, 6",
    "jmp ringer_leave",
    ".global ringer_exit_lookup_parked",
    "ringer_exit_lookup_parked:",
    "mov r10, rax",
    "mov eax, [rsp + {saved_ax}]",
    "add al, 0x7f",
    "sahf",
    "mov rax, r10",
    "jmp ringer_exit_lookup",
    ".global ringer_exit_branch",
    "ringer_exit_branch:",
    "pop qword ptr [rsp + {branch}]",
    ".global ringer_exit_lookup",
    "ringer_exit_lookup:",
    "SAVE_ALL",
    "mov [rsp + {rip}], r14",
    "GO_TO_FOUND {find_code_light}",
    "mov ebx, 1",
    "jmp ringer_leave",
    ".global ringer_exit_branch_event",
    "ringer_exit_branch_event:",
    "pop qword ptr [rsp + {branch}]",
    ".global ringer_exit_event",
    "ringer_exit_event:",
    "SAVE_ALL",
    "mov [rsp + {rip}], r14",
    "mov ebx, 2",
    "jmp ringer_leave",
    ".global ringer_signal",
    "ringer_signal:",
    "SAVE_ALL",
    "mov ebx, 4",
    "jmp ringer_leave",
    // A sensitive instruction: rdi = vCPU, rsi = its index. Back to the block unless the callee says otherwise.
    ".global ringer_helper",
    "ringer_helper:",
    "pop qword ptr [rsp + {return_address}]",
    "SAVE_ALL",
    "mov rbx, [rsp + {fp_loaded}]",
    "SAVE_FP",
    "mov rbp, rsp",
    "lea rdi, [rsp - {gpr}]",
    "mov rsi, r14",
    "mov rsp, [rsp + {host_rsp}]",
    "call {run_sensitive}",
    "mov rsp, rbp",
    "cmp eax, -2",
    // Another block begins: it loads the vector state itself if it needs it.
    "je 1f",
    "ja 3f",
    "mov ebx, eax",
    "jmp ringer_leave",
    "3:",
    "test rbx, rbx",
    "je 1f",
    "call ringer_restore_fp",
    "1:",
    "LOAD_ALL",
    "mov r14, [rsp + {rip}]",
    "jmp [rsp + {return_address}]",
    // A group's check failed. The low word of the kind is its span; the second jump's distance is zero until it is linked.
    ".global ringer_slow_or_detour",
    "ringer_slow_or_detour:",
    "mov [rsp + 8 + {held}], r11",
    "mov [rsp + 8 + {index}], r10",
    "mov r11, [rsp]",
    "mov r10d, r14d",
    "and r10d, 0xfff",
    "add r10w, [r11 - {kind}]",
    "cmp r10d, 0x1000",
    "mov r10, [rsp + 8 + {index}]",
    "jbe 1f",
    "cmp dword ptr [r11 + 6], 0",
    "je 1f",
    "sub dword ptr [rsp + 8 + {detours}], 1",
    "js 1f",
    "add r11, 5",
    "add rsp, 8",
    "jmp r11",
    "1:",
    "test dword ptr [r11 - {kind}], {stack_kind}",
    "je 4f",
    // The stack has moved to another page, which the TLB mostly has: Tlb::enter_stack, with rdx = -16 times the context.
    "mov [rsp + 8 + 8*1], rcx",
    "mov [rsp + 8 + 8*2], rdx",
    "mov ecx, [r11 - {kind}]",
    "shr ecx, {context_shift}",
    "and ecx, 3",
    "mov edx, ecx",
    "shl rdx, 4",
    "neg rdx",
    "xor r14, [rsp + rdx + 8 + {tlb} + {tlb_stack}]",
    "mov r10d, r14d",
    "and r10d, 0xfff",
    "add r10w, [r11 - {kind}]",
    "cmp r10d, 0x1000",
    "ja 2f",
    "mov r10, r14",
    "shr r10, 7",
    "and r10d, {tlb_mask}",
    "imul ecx, ecx, {tlb_table}",
    "add r10, rcx",
    "mov rcx, r14",
    "and rcx, -0x1000",
    "cmp rcx, [rsp + r10 + 8 + {tlb} + {tlb_entries} + {tlb_read}]",
    "jne 2f",
    "cmp rcx, [rsp + r10 + 8 + {tlb} + {tlb_entries} + {tlb_write}]",
    "jne 2f",
    "mov r14, [rsp + r10 + 8 + {tlb} + {tlb_entries} + {tlb_host}]",
    "sub r14, rcx",
    "mov [rsp + rdx + 8 + {tlb} + {tlb_stack}], rcx",
    "mov [rsp + rdx + 8 + {tlb} + {tlb_stack} + {tlb_addend}], r14",
    "mov rcx, [rsp + r10 + 8 + {tlb} + {tlb_entries} + {tlb_frame}]",
    "sar rdx, 1",
    "mov [rsp + rdx + 8 + {tlb} + {tlb_stack_frame}], rcx",
    "mov rcx, [rsp + 8 + 8*1]",
    "mov rdx, [rsp + 8 + 8*2]",
    "mov r11, [rsp + 8 + {held}]",
    "ret",
    "2:",
    "xor r14, [rsp + rdx + 8 + {tlb} + {tlb_stack}]",
    "mov rcx, [rsp + 8 + 8*1]",
    "mov rdx, [rsp + 8 + 8*2]",
    "4:",
    "mov r11, [rsp + 8 + {held}]",
    // A TLB miss: rdi = vCPU, rsi and ecx = what the check left, edx = kind.
    ".global ringer_slow",
    "ringer_slow:",
    "mov [rsp + 8 + {held}], r11",
    "mov r11, [rsp]",
    "mov r11d, [r11 - {kind}]",
    "pop qword ptr [rsp + {return_address}]",
    "SAVE_ALL",
    "mov rbx, [rsp + {fp_loaded}]",
    "test rbx, rbx",
    "je 1f",
    "SAVE_XMM",
    "1:",
    "mov rbp, rsp",
    "mov r12d, r11d",
    "lea rdi, [rsp - {gpr}]",
    "mov rsi, r14",
    "mov edx, r12d",
    "mov ecx, r10d",
    "mov rsp, [rsp + {host_rsp}]",
    "call {fill_light}",
    "mov rsp, rbp",
    "test rbx, rbx",
    "je 2f",
    "LOAD_XMM",
    "2:",
    "test rax, rax",
    "je 3f",
    "mov r14, rax",
    "LOAD_ALL",
    "mov r11, [rsp + {held}]",
    "jmp [rsp + {return_address}]",
    // Not a plain page of RAM: the whole vector state is saved, and Rust may do anything.
    "3:",
    "SAVE_FP",
    "lea rdi, [rsp - {gpr}]",
    "mov rsi, [rsp + {accessed}]",
    "mov edx, r12d",
    "mov rsp, [rsp + {host_rsp}]",
    "call {access_slow}",
    "mov rsp, rbp",
    "jmp ringer_accessed",
    ".global ringer_resolve",
    "ringer_resolve:",
    "pop qword ptr [rsp + {return_address}]",
    "SAVE_ALL",
    "mov rbx, [rsp + {fp_loaded}]",
    "SAVE_FP",
    "mov rbp, rsp",
    "lea rdi, [rsp - {gpr}]",
    "mov esi, r10d",
    "mov rsp, [rsp + {host_rsp}]",
    "call {access_resolve}",
    "mov rsp, rbp",
    // rax: the host address, or zero with the reason for leaving in engine.left
    "ringer_accessed:",
    "test rax, rax",
    "je 2f",
    "mov r14, rax",
    // Back to the block; rbx: whether its vector state is to be loaded again.
    "ringer_go_back:",
    "test rbx, rbx",
    "je 1f",
    "call ringer_restore_fp",
    "1:",
    "LOAD_ALL",
    "mov r11, [rsp + {held}]",
    "jmp [rsp + {return_address}]",
    "2:",
    "mov ebx, edx",
    "jmp ringer_leave",
    // The instruction has run on the bounce buffer: the result goes where it belongs.
    ".global ringer_bounced",
    "ringer_bounced:",
    "SAVE_ALL",
    "mov rbx, [rsp + {fp_loaded}]",
    "SAVE_FP",
    "mov rbp, rsp",
    "lea rdi, [rsp - {gpr}]",
    "mov rsp, [rsp + {host_rsp}]",
    "call {access_bounced}",
    "mov rsp, rbp",
    "cmp eax, -1",
    "je ringer_go_back",
    "mov ebx, eax",
    "jmp ringer_leave",
    // A store across the end of a page has run on the buffer: to its two pages. Keeps registers and flags.
    ".global ringer_stored_split",
    "ringer_stored_split:",
    "mov [rsp + 8*1], rcx",
    "mov [rsp + 8*6], rsi",
    "mov [rsp + 8*7], rdi",
    "mov rsi, [rsp + {split_from}]",
    "mov rdi, [rsp + {split_first}]",
    "mov rcx, [rsp + {split_first_length}]",
    "rep movsb",
    "mov rdi, [rsp + {split_second}]",
    "mov rcx, [rsp + {split_second_length}]",
    "rep movsb",
    "mov rcx, [rsp + 8*1]",
    "mov rsi, [rsp + 8*6]",
    "mov rdi, [rsp + 8*7]",
    "jmp [rsp + {split_resume}]",
    // Called by blocks that use vector state before it is loaded. Keeps all registers and flags.
    ".global ringer_load_fp",
    "ringer_load_fp:",
    "pop qword ptr [rsp + {return_address}]",
    "mov [rsp + 8*0], rax",
    "mov [rsp + 8*2], rdx",
    "pushfq",
    "call ringer_restore_fp_pushed",
    "popfq",
    "mov rax, [rsp + 8*0]",
    "mov rdx, [rsp + 8*2]",
    "jmp [rsp + {return_address}]",
    // Loads the vector state; rsp is one call below the context. Clobbers rax, rdx.
    "ringer_restore_fp:",
    "mov eax, [rsp + 8 + {xsave_mask}]",
    "xor edx, edx",
    "xrstor64 [rsp + 8 + {xsave}]",
    "mov qword ptr [rsp + 8 + {fp_loaded}], 1",
    "ret",
    "ringer_restore_fp_pushed:",
    "mov eax, [rsp + 16 + {xsave_mask}]",
    "xor edx, edx",
    "xrstor64 [rsp + 16 + {xsave}]",
    "mov qword ptr [rsp + 16 + {fp_loaded}], 1",
    "ret",
    gpr = const offset_of!(Vcpu, gpr),
    saved_ax = const context_offset!(near.saved_ax),
    rip = const context_offset!(rip),
    rflags = const context_offset!(rflags),
    fp_loaded = const context_offset!(fp_loaded),
    xsave = const context_offset!(xsave),
    host_rsp = const context_offset!(hot.host_rsp),
    target = const context_offset!(hot.target),
    return_address = const context_offset!(hot.return_address),
    xsave_mask = const context_offset!(hot.xsave_mask),
    xsaveopt = const context_offset!(hot.xsaveopt),
    xmm = const context_offset!(hot.xmm),
    held = const context_offset!(hot.held),
    accessed = const context_offset!(hot.accessed),
    index = const context_offset!(hot.index),
    branch = const context_offset!(hot.branch),
    kind = const KIND_DISTANCE,
    stack_kind = const crate::access::STACK_KIND,
    context_shift = const crate::access::CONTEXT_SHIFT,
    tlb = const context_offset!(tlb),
    tlb_mask = const (crate::tlb::ENTRIES - 1) << 5,
    tlb_entries = const crate::tlb::layout::TABLES,
    tlb_table = const crate::tlb::layout::TABLE_SIZE,
    tlb_read = const crate::tlb::layout::READ,
    tlb_write = const crate::tlb::layout::WRITE,
    tlb_host = const crate::tlb::layout::HOST,
    tlb_frame = const crate::tlb::layout::FRAME,
    tlb_stack = const crate::tlb::layout::STACK,
    tlb_addend = const crate::tlb::layout::ADDEND,
    tlb_stack_frame = const crate::tlb::layout::STACK_FRAME,
    detours = const context_offset!(hot.detours),
    split_from = const context_offset!(hot.split.from),
    split_first = const context_offset!(hot.split.first),
    split_first_length = const context_offset!(hot.split.first_length),
    split_second = const context_offset!(hot.split.second),
    split_second_length = const context_offset!(hot.split.second_length),
    split_resume = const context_offset!(hot.split.resume),
    run_sensitive = sym crate::run::run_sensitive,
    find_code_light = sym crate::run::find_code_light,
    link_code_light = sym crate::run::link_code_light,
    fill_light = sym crate::access::fill_light,
    access_slow = sym crate::access::access_slow,
    access_resolve = sym crate::access::access_resolve,
    access_bounced = sym crate::access::access_bounced,
);
