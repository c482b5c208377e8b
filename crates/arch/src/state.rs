//! [`CpuState`]: a vCPU's whole architectural state in a form that belongs to no engine.

use crate::registers::{cr0, debug, rflags, xcr0};

/// Which segment register; the discriminant is the encoding in instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SegmentRegister {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
}

/// A segment register (or LDTR, TR) with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    pub base: u64,
    /// In bytes, granularity already applied.
    pub limit: u32,
    /// Descriptor bits 40..56 shifted down: type (0-3), S (4), DPL (5-6), P (7), AVL (12), L (13), D/B (14), G (15),
    /// limit bits masked out. Zero: the register is unusable (null selector).
    pub attributes: u16,
    pub selector: u16,
}

impl Segment {
    pub const ACCESSED: u16 = 1 << 0;
    pub const S: u16 = 1 << 4;
    pub const P: u16 = 1 << 7;
    pub const L: u16 = 1 << 13;
    pub const DB: u16 = 1 << 14;
    pub const G: u16 = 1 << 15;

    /// What real mode loads: base = selector * 16, 64 KiB limit.
    pub const fn real_mode(selector: u16, code: bool) -> Self {
        Segment {
            base: (selector as u64) << 4,
            limit: 0xffff,
            attributes: Self::P | Self::S | if code { 0xb } else { 0x3 },
            selector,
        }
    }

    /// A flat 4 GiB code segment; `attributes` gives L or D/B besides.
    pub const fn flat_code(selector: u16, long: bool, dpl: u8) -> Self {
        Segment {
            base: 0,
            limit: u32::MAX,
            attributes: Self::P | Self::S | Self::G | 0xb | (dpl as u16) << 5 | if long { Self::L } else { Self::DB },
            selector,
        }
    }

    /// A flat 4 GiB writable data segment.
    pub const fn flat_data(selector: u16, dpl: u8) -> Self {
        Segment {
            base: 0,
            limit: u32::MAX,
            attributes: Self::P | Self::S | Self::G | Self::DB | 0x3 | (dpl as u16) << 5,
            selector,
        }
    }

    pub const fn kind(&self) -> u8 {
        (self.attributes & 0xf) as u8
    }
    pub const fn dpl(&self) -> u8 {
        (self.attributes >> 5 & 3) as u8
    }
    pub const fn present(&self) -> bool {
        self.attributes & Self::P != 0
    }
    pub const fn long(&self) -> bool {
        self.attributes & Self::L != 0
    }
    pub const fn default_big(&self) -> bool {
        self.attributes & Self::DB != 0
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DescriptorTable {
    pub base: u64,
    pub limit: u16,
}

/// What a vCPU is doing besides executing (Intel SDM 3A 8.4, INIT and SIPI).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activity {
    #[default]
    Running,
    Halted,
    /// An application processor after INIT, waiting for its start-up IPI.
    WaitForSipi,
}

/// System-management mode (Intel SDM 3C chapter 32): where a vCPU keeps its state, and whether it is in there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Smm {
    /// SMBASE: the handler is at 8000H from it, the saved state ends at 10000H.
    pub base: u32,
    pub active: bool,
    /// An SMI came that has not been taken yet.
    pub pending: bool,
    /// NMIs were blocked already when SMM was entered; RSM leaves them so.
    pub nmis_were_blocked: bool,
}

impl Smm {
    /// SMBASE after power-on.
    pub const RESET_BASE: u32 = 0x3_0000;
    pub const RESET: Smm = Smm { base: Self::RESET_BASE, active: false, pending: false, nmis_were_blocked: false };
}

/// A vCPU's state, authoritative whenever its engine is not executing.
#[derive(Clone, Debug, PartialEq)]
pub struct CpuState {
    /// rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8..r15: the order of instruction encodings.
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    /// Indexed by [`SegmentRegister`].
    pub segments: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    /// CR8: the task priority, bits 4..8 of the local APIC's TPR.
    pub cr8: u64,
    /// DR0-DR3, then DR6 and DR7.
    pub dr: [u64; 6],
    pub xcr0: u64,
    pub pkru: u32,
    /// Model-specific registers that differ from their reset values, by number.
    pub msrs: Vec<(u32, u64)>,
    /// x87, SSE and later state in the standard (not compacted) XSAVE format.
    pub xsave: Vec<u8>,
    /// The local APIC's registers at their MMIO layout, 16 bytes apart; empty: reset state.
    pub apic: Vec<u8>,
    pub activity: Activity,
    /// An event that was being delivered when the state was taken: vector, and the error code if one is pushed. CR2 and
    /// DR6 are those of the event already. An interrupt of the local APIC is in its registers instead.
    pub pending_exception: Option<(u8, Option<u32>)>,
    pub nmi_pending: bool,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// Interrupts are inhibited for one instruction (after STI, MOV SS, POP SS).
    pub interrupt_shadow: bool,
    pub smm: Smm,
}

impl CpuState {
    /// The state after power-on or reset (Intel SDM 3A table 9-1).
    pub fn reset() -> Self {
        let data = Segment::real_mode(0, false);
        let mut code = Segment::real_mode(0xf000, true);
        code.base = 0xffff_0000;
        let mut gpr = [0; 16];
        gpr[crate::registers::gpr::RDX] = 0x600;
        CpuState {
            gpr,
            rip: 0xfff0,
            rflags: rflags::FIXED,
            segments: [data, code, data, data, data, data],
            ldtr: Segment { limit: 0xffff, attributes: Segment::P | 0x2, ..Default::default() },
            tr: Segment { limit: 0xffff, attributes: Segment::P | 0xb, ..Default::default() },
            gdtr: DescriptorTable { base: 0, limit: 0xffff },
            idtr: DescriptorTable { base: 0, limit: 0xffff },
            cr0: cr0::ET | cr0::NW | cr0::CD,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            dr: [0, 0, 0, 0, debug::DR6_INIT, debug::DR7_INIT],
            xcr0: xcr0::X87,
            pkru: 0,
            msrs: Vec::new(),
            xsave: Vec::new(),
            apic: Vec::new(),
            activity: Activity::Running,
            pending_exception: None,
            nmi_pending: false,
            nmi_blocked: false,
            interrupt_shadow: false,
            smm: Smm::RESET,
        }
    }
}
