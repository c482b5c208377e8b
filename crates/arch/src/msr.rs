//! Numbers of the model-specific registers (Intel SDM volume 4) and of KVM's paravirtual ones (Linux
//! `Documentation/virt/kvm/x86/msr.rst`).

pub const TSC: u32 = 0x10;
pub const PLATFORM_ID: u32 = 0x17;
pub const APIC_BASE: u32 = 0x1b;
pub const FEATURE_CONTROL: u32 = 0x3a;
pub const TSC_ADJUST: u32 = 0x3b;
pub const SPEC_CTRL: u32 = 0x48;
pub const PRED_CMD: u32 = 0x49;
pub const BIOS_SIGN_ID: u32 = 0x8b;
pub const PLATFORM_INFO: u32 = 0xce;
pub const MTRR_CAP: u32 = 0xfe;
pub const ARCH_CAPABILITIES: u32 = 0x10a;
pub const SYSENTER_CS: u32 = 0x174;
pub const SYSENTER_ESP: u32 = 0x175;
pub const SYSENTER_EIP: u32 = 0x176;
pub const MCG_CAP: u32 = 0x179;
pub const MCG_STATUS: u32 = 0x17a;
pub const PERF_STATUS: u32 = 0x198;
pub const MISC_ENABLE: u32 = 0x1a0;
pub const MTRR_PHYS_BASE0: u32 = 0x200;
pub const MTRR_FIX_64K: u32 = 0x250;
pub const MTRR_FIX_16K_80000: u32 = 0x258;
pub const MTRR_FIX_16K_A0000: u32 = 0x259;
pub const MTRR_FIX_4K_C0000: u32 = 0x268;
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
pub const PAT: u32 = 0x277;
pub const TSC_DEADLINE: u32 = 0x6e0;
pub const X2APIC_FIRST: u32 = 0x800;
pub const X2APIC_LAST: u32 = 0x8ff;
pub const XSS: u32 = 0xda0;
pub const EFER: u32 = 0xc000_0080;
pub const STAR: u32 = 0xc000_0081;
pub const LSTAR: u32 = 0xc000_0082;
pub const CSTAR: u32 = 0xc000_0083;
pub const SFMASK: u32 = 0xc000_0084;
pub const FS_BASE: u32 = 0xc000_0100;
pub const GS_BASE: u32 = 0xc000_0101;
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const TSC_AUX: u32 = 0xc000_0103;

pub const KVM_WALL_CLOCK: u32 = 0x11;
pub const KVM_SYSTEM_TIME: u32 = 0x12;
pub const KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
pub const KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
pub const KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;
pub const KVM_STEAL_TIME: u32 = 0x4b56_4d03;
pub const KVM_PV_EOI_EN: u32 = 0x4b56_4d04;
pub const KVM_POLL_CONTROL: u32 = 0x4b56_4d05;

/// What a vCPU's state holds besides [`mtrrs`]. Segment bases and the TSC itself are kept elsewhere; the clock is written
/// again after the TSC is right.
pub const SAVED: &[u32] = &[
    APIC_BASE,
    TSC_ADJUST,
    TSC_AUX,
    TSC_DEADLINE,
    EFER,
    STAR,
    LSTAR,
    CSTAR,
    SFMASK,
    KERNEL_GS_BASE,
    SYSENTER_CS,
    SYSENTER_ESP,
    SYSENTER_EIP,
    XSS,
    SPEC_CTRL,
    MISC_ENABLE,
    MCG_STATUS,
    PAT,
    KVM_SYSTEM_TIME_NEW,
    KVM_WALL_CLOCK_NEW,
];

/// The memory type range registers (Intel SDM 3A 12.11): eight variable ranges of two, the fixed ones, the default type.
pub fn mtrrs() -> impl Iterator<Item = u32> {
    (MTRR_PHYS_BASE0..MTRR_PHYS_BASE0 + 16)
        .chain([MTRR_FIX_64K, MTRR_FIX_16K_80000, MTRR_FIX_16K_A0000])
        .chain(MTRR_FIX_4K_C0000..MTRR_FIX_4K_C0000 + 8)
        .chain([MTRR_DEF_TYPE])
}
