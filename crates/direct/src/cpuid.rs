//! CPUID that faults, on hosts that can do that: Intel's processors by an MSR, newer ones of AMD as well.
//!
//! Linux switches it for each task (`arch_prctl(ARCH_SET_CPUID)`). The MSR is written when the processor goes from a task
//! that has it to one that has not, or back; under a hypervisor that takes 7 µs, where a stop takes less than 4 in all. So
//! a thread that runs a space which has it, has it as well: until it rests, or runs another space. Measured (Linux 6.18
//! in a virtual machine): 3.8 µs for a stop where neither has it or both have, 18 where only the process has it.
//!
//! The monitor's own code may execute CPUID on such a thread, in a library's first look for a feature of the processor, say:
//! its handler of SIGSEGV calls [`resume_monitor`].

use std::arch::x86_64::__cpuid_count;
use std::cell::Cell;
use std::io;

/// `arch_prctl`'s number for it (Linux, `asm/prctl.h`). The argument is whether CPUID works.
pub const ARCH_SET_CPUID: libc::c_int = 0x1012;

thread_local! {
    /// Constant-initialized and without a destructor, so that a signal handler may read it.
    static FAULTS: Cell<bool> = const { Cell::new(false) };
}

/// Has CPUID fault on this thread, or work.
pub fn set(faults: bool) -> io::Result<()> {
    if FAULTS.get() != faults {
        switch(faults)?;
        FAULTS.set(faults);
    }
    Ok(())
}

fn switch(faults: bool) -> io::Result<()> {
    // SAFETY: no memory is passed.
    match unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_CPUID, libc::c_long::from(!faults)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// For a handler of SIGSEGV, with the registers of the thread that it runs on: does what the thread's own CPUID ought to have
/// done, and says whether that was it. Calls nothing that a signal handler may not.
///
/// # Safety
/// They must be the registers with which that signal, and no other, has just come.
pub unsafe fn resume_monitor(registers: &mut [i64; 23]) -> bool {
    let pc = registers[libc::REG_RIP as usize] as *const u8;
    /// What CPUID faults with (Intel SDM 3A 6.15).
    const GENERAL_PROTECTION: i64 = 13;
    if !FAULTS.get() || registers[libc::REG_TRAPNO as usize] != GENERAL_PROTECTION {
        return false;
    }
    // SAFETY: the instruction at `pc` has been fetched, as it faulted otherwise than by a page; the second byte is part of any
    // instruction that begins with 0FH.
    if unsafe { *pc != 0x0f || *pc.add(1) != 0xa2 } || switch(false).is_err() {
        return false;
    }
    let [leaf, subleaf] = [libc::REG_RAX, libc::REG_RCX].map(|register| registers[register as usize] as u32);
    let result = __cpuid_count(leaf, subleaf);
    let values = [
        (libc::REG_RAX, result.eax),
        (libc::REG_RBX, result.ebx),
        (libc::REG_RCX, result.ecx),
        (libc::REG_RDX, result.edx),
    ];
    for (register, value) in values {
        registers[register as usize] = i64::from(value);
    }
    registers[libc::REG_RIP as usize] += 2;
    FAULTS.set(switch(true).is_ok());
    true
}
