//! The instructions that are not compared, each with the reason. All else that the host supports is.

use iced_x86::{Instruction, Mnemonic};

/// Why a mnemonic is left out.
pub const MNEMONICS: &[(Mnemonic, &str)] = &[
    // The host's kernel answers it, not the processor.
    (Mnemonic::Syscall, "enters the host's kernel"),
    (Mnemonic::Sysenter, "enters the host's kernel"),
    (Mnemonic::Sgdt, "under UMIP, Linux emulates it for user code"),
    (Mnemonic::Sidt, "under UMIP, Linux emulates it for user code"),
    (Mnemonic::Sldt, "under UMIP, Linux emulates it for user code"),
    (Mnemonic::Smsw, "under UMIP, Linux emulates it for user code"),
    (Mnemonic::Str, "under UMIP, Linux emulates it for user code"),
    // What it reads differs between the host and any guest, by design.
    (Mnemonic::Cpuid, "names the processor and its topology: the guest has its own"),
    (Mnemonic::Xgetbv, "shows components that the guest isn't given (AMX)"),
    (Mnemonic::Rdtsc, "time"),
    (Mnemonic::Rdtscp, "time, and the host's processor number"),
    (Mnemonic::Rdpid, "the host's processor number"),
    (Mnemonic::Rdpmc, "performance counters: CR4.PCE is the host's choice"),
    (Mnemonic::Rdrand, "random"),
    (Mnemonic::Rdseed, "random"),
    // What it does is the implementation's choice.
    (Mnemonic::Xsaveopt64, "may skip components that were not modified since the last XRSTOR of this area"),
    (Mnemonic::Xsaveopt, "may skip components that were not modified since the last XRSTOR of this area"),
    (Mnemonic::Xbegin, "transactions abort at the processor's discretion; the guest has none"),
    (Mnemonic::Xend, "the guest has no transactions"),
    (Mnemonic::Xabort, "the guest has no transactions"),
    (Mnemonic::Xtest, "the guest has no transactions"),
    (Mnemonic::Xsusldtrk, "the guest has no transactions"),
    (Mnemonic::Xresldtrk, "the guest has no transactions"),
    (Mnemonic::Monitor, "at CPL 3 #UD or not by an MSR that is the host's choice"),
    (Mnemonic::Mwait, "at CPL 3 #UD or not by an MSR that is the host's choice"),
    (Mnemonic::Umonitor, "waits"),
    (Mnemonic::Umwait, "waits"),
    (Mnemonic::Tpause, "waits"),
    (Mnemonic::Ptwrite, "writes to a trace that the guest has not"),
    (Mnemonic::Enqcmd, "talks to a device"),
    (Mnemonic::Enqcmds, "talks to a device"),
    // State that the guest is not given.
    (Mnemonic::Ldtilecfg, "AMX"),
    (Mnemonic::Sttilecfg, "AMX"),
    (Mnemonic::Tilerelease, "AMX"),
    (Mnemonic::Vmcall, "the host's own hypervisor answers it"),
    (Mnemonic::Vmmcall, "the host's own hypervisor answers it"),
    (Mnemonic::Vmfunc, "the host's own hypervisor answers it"),
    (Mnemonic::Encls, "SGX"),
    (Mnemonic::Enclu, "SGX"),
    (Mnemonic::Enclv, "SGX"),
    (Mnemonic::Getsec, "SMX"),
    (Mnemonic::Senduipi, "user interrupts"),
    (Mnemonic::Uiret, "user interrupts"),
    (Mnemonic::Clui, "user interrupts"),
    (Mnemonic::Stui, "user interrupts"),
    (Mnemonic::Testui, "user interrupts"),
    (Mnemonic::Invd, "privileged; not worth the risk should the host let it through"),
    (Mnemonic::Int1, "Linux takes it for a hardware breakpoint that it must have set"),
];

/// Why this instruction is left out, if it is.
pub fn reason(insn: &Instruction) -> Option<&'static str> {
    if let Some((_, reason)) = MNEMONICS.iter().find(|(m, _)| *m == insn.mnemonic()) {
        return Some(reason);
    }
    if insn.mnemonic() == Mnemonic::Int && insn.immediate8() == 0x80 {
        return Some("enters the host's kernel");
    }
    None
}
