//! IA32_ARCH_CAPABILITIES: which speculation hazards a guest has to work around.
//!
//! A kernel reads this once and builds itself accordingly: page-table isolation, retpolines, buffer clearing. Under
//! translation none of those does what it does on hardware, so what matters is not the host's model but what a
//! work-around by the guest could achieve. There are three cases.
//!
//! - *The hazard can't occur.* The hardware never walks the guest's page tables and never runs at the guest's
//!   privilege level: permission is checked by translated code. So nothing is mapped-but-forbidden for Meltdown or
//!   L1TF to read, no guest page size change to trip the instruction TLB, no device of the host within reach of the
//!   guest's loads, no TSX, no nested VM entry.
//! - *The guest can't act on it.* VERW, retpolines, branch-history clearing and stuffed return stacks are instructions
//!   whose effect on predictors and buffers is lost in translation: guest CALL, RET and indirect JMP all become a
//!   hash lookup and one host jump, and guest kernel and user code share one host privilege level, so the guest's own
//!   kernel/user split is not protected against branch steering, with or without them. A guest that is told to do
//!   them pays and gains nothing. The host's kernel keeps its own mitigations between this process and all others;
//!   see the threat model: do not keep two mutually distrusting tenants in one guest.
//! - *It is the host's secret, and the guest can act or must not be reassured.* Then the bit stays clear: speculative
//!   store bypass (SSB_NO) and gather data sampling (GDS_NO) are shown as they are unknown; LFENCE against Spectre v1
//!   runs natively and helps, and no bit turns it off.
//!
//! Linux takes retpolines unless enhanced IBRS is there (`spectre_v2_select_mitigation`), so IBRS_ALL is set, and with
//! it SPEC_CTRL must exist: a register that stores IBRS once at boot. IBPB comes with it in CPUID. Newer Linux clears branch
//! history on each system call whatever BHI_NO says, unless SPEC_CTRL has BHI_DIS_S: so it is offered, and stored.

/// Meltdown.
pub const RDCL_NO: u64 = 1 << 0;
/// Enhanced IBRS: set once, never switched.
pub const IBRS_ALL: u64 = 1 << 1;
/// A nested hypervisor need not flush L1D at VM entry.
pub const SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
/// Microarchitectural data sampling.
pub const MDS_NO: u64 = 1 << 5;
/// Machine check on page size change (instruction TLB multihit).
pub const PSCHANGE_MC_NO: u64 = 1 << 6;
/// TSX asynchronous abort.
pub const TAA_NO: u64 = 1 << 8;
/// Shared buffers data read (MMIO stale data).
pub const SBDR_SSDP_NO: u64 = 1 << 13;
/// Fill buffer stale data propagator (MMIO stale data).
pub const FBSDP_NO: u64 = 1 << 14;
/// Primary stale data propagator (MMIO stale data).
pub const PSDP_NO: u64 = 1 << 15;
/// Branch history injection.
pub const BHI_NO: u64 = 1 << 20;
/// Post-barrier return stack buffer predictions.
pub const PBRSB_NO: u64 = 1 << 24;
/// Register file data sampling.
pub const RFDS_NO: u64 = 1 << 27;
/// Indirect target selection.
pub const ITS_NO: u64 = 1 << 62;

/// What a translating engine answers for IA32_ARCH_CAPABILITIES.
pub const TRANSLATED: u64 = RDCL_NO
    | IBRS_ALL
    | SKIP_L1DFL_VMENTRY
    | MDS_NO
    | PSCHANGE_MC_NO
    | TAA_NO
    | SBDR_SSDP_NO
    | FBSDP_NO
    | PSDP_NO
    | BHI_NO
    | PBRSB_NO
    | RFDS_NO
    | ITS_NO;

/// AMD's bits of the same meaning, leaf 0x80000008 EBX: branch type confusion (Retbleed).
pub const AMD_BTC_NO: u32 = 1 << 29;
/// Leaf 0x80000021 EAX: speculative return stack overflow.
pub const AMD_SRSO_NO: u32 = 1 << 29;
/// Leaf 0x80000021 EAX: VERW clears buffers, which is what Linux has it for on the way to a program.
pub const AMD_VERW_CLEAR: u32 = 1 << 5;
/// Leaf 0x80000021 ECX: transient scheduler attacks by the store queue, and by the first-level cache.
pub const AMD_TSA_NO: u32 = 1 << 1 | 1 << 2;
/// Leaf 0x80000021 EAX: LFENCE is always serializing, a fact of the host.
pub const AMD_LFENCE_SERIALIZING: u32 = 1 << 2;
