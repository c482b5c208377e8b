//! [`Mode`]: everything besides the bytes that decides what an instruction is translated to.

use arch::registers::{cr0, cr4, rflags, xcr0};
use arch::state::SegmentRegister;
use iced_x86::DecoderOptions;

use crate::cpu::{Context, Vcpu};

/// A block's key beyond its address. A vCPU may enter a block only in the mode it was translated for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mode(u32);

const STACK32: u32 = 1 << 2;
const FLAT: u32 = 1 << 7;
const SINGLE: u32 = 1 << 8;
const TS: u32 = 1 << 9;
const EM: u32 = 1 << 10;
const MP: u32 = 1 << 11;
const SSE: u32 = 1 << 12;
const AVX: u32 = 1 << 13;
const AVX512: u32 = 1 << 14;
const ALIGN: u32 = 1 << 15;
/// RDTSC and RDTSCP fault.
const TIMELESS: u32 = 1 << 16;
/// CR4.SMAP: at level 0 STAC and CLAC switch between contexts.
const SMAP: u32 = 1 << 17;
/// The processor is AMD's.
const AMD: u32 = 1 << 18;
const MORE_CAREFUL: u32 = 1 << 30;
const CAREFUL: u32 = 1 << 31;

/// Where code lies that runs outside 64-bit mode: CS. Blocks take it as constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CodeSegment {
    pub base: u32,
    /// The last offset.
    pub limit: u32,
}

impl CodeSegment {
    /// That of 64-bit code, too, which knows neither base nor limit.
    pub const FLAT: CodeSegment = CodeSegment { base: 0, limit: u32::MAX };

    pub fn of(cpu: &Vcpu) -> Self {
        if cpu.code64() {
            return Self::FLAT;
        }
        let cs = cpu.seg(SegmentRegister::Cs);
        CodeSegment { base: cs.base as u32, limit: cs.limit }
    }

    /// Whether an instruction of `length` bytes at `ip` can be fetched.
    pub fn holds(self, ip: u64, length: usize) -> bool {
        self.limit == u32::MAX || ip.saturating_add(length as u64) <= u64::from(self.limit) + 1
    }
}

impl Mode {
    /// The mode a vCPU is in.
    pub fn of(cpu: &Vcpu) -> Mode {
        let bits = cpu.code_bits();
        let mut m = match bits {
            16 => 0,
            32 => 1,
            _ => 2,
        };
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        m |= flag(bits != 64 && cpu.seg(SegmentRegister::Ss).default_big(), STACK32);
        m |= (cpu.cpl() as u32) << 3 | (cpu.context() as u32) << 5;
        m |= flag(bits == 64 || bits == 32 && flat(cpu), FLAT);
        m |= flag(cpu.cr0 & cr0::TS != 0, TS) | flag(cpu.cr0 & cr0::EM != 0, EM) | flag(cpu.cr0 & cr0::MP != 0, MP);
        m |= flag(cpu.cr4 & cr4::OSFXSR != 0, SSE);
        m |= flag(cpu.avx_enabled(), AVX);
        m |= flag(cpu.avx_enabled() && cpu.xcr0 & xcr0::AVX512 == xcr0::AVX512, AVX512);
        m |= flag(cpu.cpl() == 3 && cpu.cr0 & cr0::AM != 0 && cpu.rflags & rflags::AC != 0, ALIGN);
        m |= flag(cpu.cpl() != 0 && cpu.cr4 & cr4::TSD != 0, TIMELESS);
        m |= flag(cpu.cr4 & cr4::SMAP != 0, SMAP);
        m |= flag(cpu.machine.cpuid.is_amd(), AMD);
        Mode(m)
    }

    /// The same mode, but blocks are one instruction long and always return to the dispatcher.
    pub fn single(self) -> Mode {
        Mode(self.0 | SINGLE)
    }

    /// The same mode, but only accesses close to each other share checks, and from careful mode: every one is checked by itself.
    /// What follows a block runs plainly.
    pub fn careful(self) -> Mode {
        Mode(self.0 | if self.is_careful() { MORE_CAREFUL } else { CAREFUL })
    }

    /// Not careful.
    pub fn plain(self) -> Mode {
        Mode(self.0 & !(CAREFUL | MORE_CAREFUL))
    }

    pub fn is_careful(self) -> bool {
        self.0 & CAREFUL != 0
    }

    /// No accesses share checks.
    pub fn is_most_careful(self) -> bool {
        self.0 & MORE_CAREFUL != 0
    }

    pub fn is_single(self) -> bool {
        self.0 & SINGLE != 0
    }

    pub fn cpl(self) -> u8 {
        (self.0 >> 3 & 3) as u8
    }

    /// 16, 32 or 64.
    pub fn bits(self) -> u32 {
        16 << (self.0 & 3)
    }

    pub fn long(self) -> bool {
        self.0 & 3 == 2
    }

    /// Segments other than FS and GS have base 0 and no limit, and the stack is as wide as the code.
    pub fn flat(self) -> bool {
        self.0 & FLAT != 0
    }

    /// Bits of the stack pointer.
    pub fn stack_bits(self) -> u32 {
        match (self.long(), self.0 & STACK32 != 0) {
            (true, _) => 64,
            (_, true) => 32,
            _ => 16,
        }
    }

    /// Emitted code adds bases and checks limits, and the jump table knows blocks by their code segment, too.
    pub fn segmented(self) -> bool {
        !self.flat()
    }

    pub fn context(self) -> Context {
        match self.0 >> 5 & 3 {
            0 => Context::User,
            1 => Context::Supervisor,
            _ => Context::SupervisorUser,
        }
    }

    /// The mode that STAC or CLAC leads to, where there is SMAP.
    pub fn with_user_pages(self, allowed: bool) -> Option<Mode> {
        let context = if allowed { Context::SupervisorUser } else { Context::Supervisor };
        (self.cpl() == 0 && self.smap()).then_some(self.in_context(context))
    }

    /// CR4.SMAP
    pub fn smap(self) -> bool {
        self.0 & SMAP != 0
    }

    fn in_context(self, context: Context) -> Mode {
        Mode(self.0 & !(3 << 5) | (context as u32) << 5)
    }

    /// Where SYSCALL leads in 64-bit code, under SMAP with AC clear.
    pub fn after_syscall(self) -> Mode {
        let context = if self.smap() { Context::Supervisor } else { Context::SupervisorUser };
        Mode(self.0 & !(3 << 3 | ALIGN | TIMELESS)).in_context(context)
    }

    /// Where SYSRET leads from 64-bit code to such, with AC and CR4.TSD clear.
    pub fn after_sysret(self) -> Mode {
        Mode(self.0 & !(ALIGN | TIMELESS) | 3 << 3).in_context(Context::User)
    }

    /// Misaligned accesses raise #AC (CPL 3, CR0.AM, RFLAGS.AC).
    pub fn checks_alignment(self) -> bool {
        self.0 & ALIGN != 0
    }

    /// The time-stamp counter may be read.
    pub fn reads_tsc(self) -> bool {
        self.0 & TIMELESS == 0
    }

    /// The processor is AMD's, which has some instructions differently.
    pub fn is_amd(self) -> bool {
        self.0 & AMD != 0
    }

    /// How guest code is decoded. To AMD's processors near branches with an operand-size prefix are 16 bits wide in 64-bit
    /// code too, and far pointers in memory never have 64 bits (AMD APM 3, Jcc, CALL, RET, LSS).
    pub fn decoder_options(self) -> u32 {
        if self.is_amd() { DecoderOptions::AMD } else { DecoderOptions::NONE }
    }

    pub fn task_switched(self) -> bool {
        self.0 & TS != 0
    }
    pub fn emulate_fpu(self) -> bool {
        self.0 & EM != 0
    }
    pub fn monitor_fpu(self) -> bool {
        self.0 & MP != 0
    }
    pub fn sse(self) -> bool {
        self.0 & SSE != 0
    }
    pub fn avx(self) -> bool {
        self.0 & AVX != 0
    }
    pub fn avx512(self) -> bool {
        self.0 & AVX512 != 0
    }
}

/// A present, writable, expand-up data segment of 4 GiB.
fn open(cpu: &Vcpu, s: SegmentRegister) -> bool {
    let seg = cpu.seg(s);
    seg.limit == u32::MAX && seg.present() && seg.kind() & 0xe == 0x2
}

/// Whether CS, SS, DS and ES are the flat 4 GiB segments of a 32-bit system, readable and (but for CS) writable.
fn flat(cpu: &Vcpu) -> bool {
    use SegmentRegister::*;
    let unlimited = |s: SegmentRegister| {
        let seg = cpu.seg(s);
        seg.base == 0 && seg.limit == u32::MAX && seg.present()
    };
    let data = |s: SegmentRegister| cpu.seg(s).base == 0 && open(cpu, s);
    // Readable code; expand-up writable data.
    unlimited(Cs) && cpu.seg(Cs).kind() & 0x2 != 0 && data(Ss) && data(Ds) && data(Es) && cpu.seg(Ss).default_big()
}
