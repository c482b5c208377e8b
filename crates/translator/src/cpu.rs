//! [`Vcpu`]: one processor's state, laid out for emitted code and used as plain data by the rest of the engine.
//!
//! While guest code runs, host `rsp` points at [`Vcpu::gpr`], so that every hot field is `[rsp + constant]`; the words
//! of [`Vcpu::stack`] just below serve as the stack of emitted code, and what it needs most often lies below those: the
//! constant is a byte then, and less of the host's instruction cache is filled. Guest registers other than r10, r11, r14 and r15
//! then live in host registers; whenever Rust code holds a `&mut Vcpu` all of them are in `gpr`, all flags in `rflags`,
//! and, if [`Vcpu::fp_loaded`] is zero, all x87/SSE/AVX state in `xsave`.

use std::sync::Arc;

use arch::registers::{cr0, cr4, debug, efer, rflags, xcr0};
use arch::state::{Activity, DescriptorTable, Segment, SegmentRegister};

use crate::shared::{Machine, VcpuShared};
use crate::tlb::Tlb;

/// Words below `gpr` for what emitted code and its thunks push: two return addresses and the flags at most. Signal handlers
/// have stacks of their own. More words here move what lies below out of a short displacement's reach.
pub const STACK_WORDS: usize = 4;
/// Room for the standard-format XSAVE area of every component up to PKRU.
pub const XSAVE_SIZE: usize = 4096;

/// The XSAVE area, aligned as the instruction wants it.
#[repr(C, align(64))]
pub struct XsaveArea(pub [u8; XSAVE_SIZE]);

/// Through which eyes memory is seen: selects a software TLB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Context {
    /// CPL 3.
    User = 0,
    /// CPL 0-2, user pages forbidden by SMAP (RFLAGS.AC clear).
    Supervisor = 1,
    /// CPL 0-2, user pages allowed: SMAP off or RFLAGS.AC set.
    SupervisorUser = 2,
}

pub const CONTEXTS: usize = 3;

/// Why the guest's next instruction can't simply run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Deliver this through the IDT; the saved RIP is that of the instruction ([`Vcpu::insn_rip`]).
    Fault(arch::Exception),
    /// Leave [`engine::Vcpu::run`].
    Exit(engine::Exit),
}

impl From<arch::Exception> for Stop {
    fn from(e: arch::Exception) -> Self {
        Stop::Fault(e)
    }
}

/// Model-specific registers that are plain storage or need only checks; the rest is computed by `semantics::msr`.
#[derive(Clone, Debug)]
pub struct Msrs {
    pub efer: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub mtrr_def_type: u64,
    /// PHYSBASE0, PHYSMASK0, PHYSBASE1, ...
    pub mtrr_variable: [u64; 16],
    /// 64K_00000, 16K_80000, 16K_A0000, then the eight 4K ones.
    pub mtrr_fixed: [u64; 11],
    pub mcg_status: u64,
    pub xss: u64,
    pub spec_ctrl: u64,
    pub kvm_system_time: u64,
    pub kvm_wall_clock: u64,
}

impl Default for Msrs {
    fn default() -> Self {
        Msrs {
            efer: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            tsc_adjust: 0,
            pat: 0x0007_0406_0007_0406,
            misc_enable: 1,
            mtrr_def_type: 0,
            mtrr_variable: [0; 16],
            mtrr_fixed: [0; 11],
            mcg_status: 0,
            xss: 0,
            spec_ctrl: 0,
            kvm_system_time: 0,
            kvm_wall_clock: 0,
        }
    }
}

/// One virtual processor.
#[repr(C, align(64))]
pub struct Vcpu {
    /// Mappings for each [`Context`].
    pub tlb: Tlb,
    pub near: crate::entry::Near,
    pub stack: [u64; STACK_WORDS],
    /// In the order of instruction encodings ([`arch::registers::gpr`]).
    pub gpr: [u64; 16],
    /// The next instruction to execute. In a semantics function: already the following one (see [`crate::semantics`]).
    pub rip: u64,
    /// All of RFLAGS.
    pub rflags: u64,
    /// Indexed by [`SegmentRegister`].
    pub segments: [Segment; 6],
    /// Not zero: x87/SSE/AVX state is in the host's registers, not in `xsave`. Semantics functions always see zero.
    pub fp_loaded: u64,
    /// What emitted code needs besides: see [`crate::entry`].
    pub hot: crate::entry::Hot,
    pub xsave: XsaveArea,

    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    pub xcr0: u64,
    pub pkru: u32,
    pub msrs: Msrs,
    pub activity: Activity,
    pub nmi_blocked: bool,
    /// Interrupts wait until after the next instruction (STI, MOV SS, POP SS).
    pub interrupt_shadow: bool,
    /// Debug exceptions wait as well (MOV SS, POP SS).
    pub debug_shadow: bool,
    /// DR6 bits of a #DB trap to deliver after the current instruction (data breakpoints, TF, task switches).
    pub pending_debug: u64,
    /// An event that came with the state, to be delivered before anything else: vector, error code.
    pub pending_event: Option<(u8, Option<u32>)>,
    pub smm: crate::smm::SmmState,
    /// The RIP of the instruction that a semantics function executes.
    pub insn_rip: u64,
    /// The processor's number, and its APIC id.
    pub id: u32,
    /// What other threads reach of this vCPU: requests, local APIC.
    pub shared: Arc<VcpuShared>,
    /// What all vCPUs share: RAM, bus, the other vCPUs.
    pub machine: Arc<Machine>,
    /// The memory map that this vCPU works by.
    pub map: Arc<memory::Sections>,
    pub engine: crate::run::EngineState,
    /// What makes the local APIC's timer interrupt the thread that runs this vCPU.
    pub timer: crate::apic::timer::HostTimer,
}

const _: () = {
    let near = std::mem::offset_of!(Vcpu, tlb) + crate::tlb::stack_offset(Context::Supervisor);
    assert!(std::mem::offset_of!(Vcpu, gpr) - near <= 128, "a short displacement reaches the stack pages");
};

impl Vcpu {
    /// The current privilege level: the DPL of SS, which every mode keeps equal to it (Intel SDM 3A 5.5); 3 in
    /// virtual-8086 mode, 0 in real mode.
    pub fn cpl(&self) -> u8 {
        if self.cr0 & cr0::PE == 0 {
            0
        } else if self.rflags & rflags::VM != 0 {
            3
        } else {
            self.segments[SegmentRegister::Ss as usize].dpl()
        }
    }

    pub fn seg(&self, s: SegmentRegister) -> &Segment {
        &self.segments[s as usize]
    }

    /// IA-32e mode is active (EFER.LMA).
    pub fn long_mode(&self) -> bool {
        self.msrs.efer & efer::LMA != 0
    }

    /// Executing 64-bit code (EFER.LMA and CS.L).
    pub fn code64(&self) -> bool {
        self.long_mode() && self.segments[SegmentRegister::Cs as usize].long()
    }

    pub fn protected_mode(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    pub fn v8086(&self) -> bool {
        self.rflags & rflags::VM != 0
    }

    pub fn paging(&self) -> bool {
        self.cr0 & cr0::PG != 0
    }

    /// 16, 32 or 64: how code at CS is decoded.
    pub fn code_bits(&self) -> u32 {
        let cs = self.seg(SegmentRegister::Cs);
        if self.code64() {
            64
        } else if cs.default_big() && !self.v8086() {
            32 // in real mode too: the D bit stays until CS is loaded
        } else {
            16
        }
    }

    /// The context in which ordinary data accesses of the current instruction are made.
    pub fn context(&self) -> Context {
        if self.cpl() == 3 {
            Context::User
        } else if self.cr4 & cr4::SMAP != 0 && self.rflags & rflags::AC == 0 {
            Context::Supervisor
        } else {
            Context::SupervisorUser
        }
    }

    /// Sets the arithmetic flags in `mask` to `value`'s.
    pub fn set_flags(&mut self, mask: u64, value: u64) {
        self.rflags = self.rflags & !mask | value & mask;
    }

    /// Whether AVX state instructions are enabled by CR4 and XCR0.
    pub fn avx_enabled(&self) -> bool {
        self.cr4 & cr4::OSXSAVE != 0 && self.xcr0 & xcr0::AVX != 0
    }

    /// Puts registers, segments and system state to what INIT leaves (Intel SDM 3A table 9-1). MSRs, XSAVE state and TSC
    /// stay as they are.
    pub fn init_state(&mut self) {
        let reset = arch::CpuState::reset();
        self.gpr = reset.gpr;
        self.rip = reset.rip;
        self.rflags = reset.rflags;
        self.segments = reset.segments;
        self.ldtr = reset.ldtr;
        self.tr = reset.tr;
        self.gdtr = reset.gdtr;
        self.idtr = reset.idtr;
        self.cr0 = reset.cr0 & !(cr0::CD | cr0::NW) | self.cr0 & (cr0::CD | cr0::NW);
        self.cr2 = 0;
        self.cr3 = 0;
        self.cr4 = 0;
        self.dr = [0; 4];
        self.dr6 = debug::DR6_INIT;
        self.dr7 = debug::DR7_INIT;
        self.msrs.efer = 0;
        self.nmi_blocked = false;
        self.interrupt_shadow = false;
        self.debug_shadow = false;
        self.pending_debug = 0;
        self.mmu_flush_all();
    }
}
