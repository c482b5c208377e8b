//! Direct execution: user code of a 64-bit guest runs on the host's processor, in a process of its own.
//!
//! A [`Space`] is a process of the host whose user address space mirrors the guest's: pages of guest RAM (a memfd) are
//! mapped at the guest's virtual addresses. The thread that makes a space traces it (ptrace). Whatever happens in it
//! that the processor does not do alone (system call, page fault, exception, a kick from another thread) stops it, and
//! [`Space::run`] returns with its registers. This crate knows nothing of guests' page tables nor of the translator: it
//! offers the process, its mappings, its registers, and [`sensitive`], the scan for code that may not run there unguarded.
//!
//! The data flow to follow:
//!
//! 1. [`process`] makes the process from a tiny program ([`stub`]) and empties its address space of all else;
//!    [`trace`] has the calls of ptrace that hold it.
//! 2. [`Space::map`] and [`Space::unmap`] write a list ([`operations`]), which the stub does inside the process before
//!    guest code runs again. Only then do system calls of the process reach the host.
//! 3. [`space`] is the loop that runs guest code and says why it stopped; [`kick`] makes it stop.
//! 4. [`scan`] finds instructions that would tell of the host. A space can stop before them: CPUID by making it fault
//!    ([`cpuid`]), a few others by breakpoints ([`Space::guard`]).
//! 5. [`pin`] keeps tracer and process on one CPU of the host, without which a stop takes ten times as long.
//!
//! # What guest code can't do
//!
//! It runs by `PTRACE_SYSEMU` alone, by which every system call, of whatever entry, is a stop and is not done. The stub
//! and its list are mapped read-only. A seccomp filter allows `mmap`, `munmap` and `arch_prctl(ARCH_SET_CPUID)` at the
//! stub's one `SYSCALL` instruction and kills the process for anything else: it would take a fault of the kernel to get there.
//!
//! `unsafe` is used for the system calls, for the pages that are shared with the process, and for the child's few
//! steps between `clone` and `execveat`.

pub mod cpuid;
mod error;
mod kick;
mod operations;
mod pin;
mod process;
mod scan;
mod space;
mod stub;
#[cfg(test)]
mod tests;
mod trace;

use std::ops::Range;

pub use error::Error;
pub use kick::{KickSlot, Kicker};
pub use libc::user_regs_struct as Registers;
pub use operations::Protection;
pub use scan::{BEFORE, BEHIND, Sensitive, host_is_amd, sensitive};
pub use space::{Space, Stop, thread_time};

/// The size of a page, the unit of all mappings.
pub const PAGE_SIZE: u64 = 4096;

/// Where a process's own addresses end, and so the guest's: the upper half is the host kernel's, and the last page
/// below it is never mapped (Linux, `TASK_SIZE_MAX` of four-level paging; user addresses have no more with five levels
/// unless asked for).
pub const USER_END: u64 = 0x7fff_ffff_f000;

/// The addresses that a space needs for itself: the stub's code, then its list of operations.
///
/// No ordinary program is there: it is above what executables use and far below where Linux puts stacks and libraries.
pub const RESERVED: Range<u64> = stub::CODE..operations::ADDRESS + operations::SIZE as u64;
