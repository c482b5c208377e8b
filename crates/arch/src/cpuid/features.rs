//! The features a virtual processor may have: a whitelist.
//!
//! What is not in this table is never offered, whatever the host has. Each entry says where CPUID shows the feature,
//! who makes it work ([`Kind`]), from which model on it is offered ([`Level`]) and what it can't be without. Entries
//! stand after those they need, so that one pass in table order settles all dependencies.
//!
//! Left out on purpose:
//! - TSX (HLE, RTM, TSXLDTRK): an abort restores registers as the hardware had them, which are not the guest's, and a
//!   transaction can't span a call into the monitor.
//! - VMX, SVM, SMX, SGX: no nested virtualization, no enclaves: both need state that only the host's kernel can give.
//! - AMX: the host's kernel gives tile state only to processes that ask for it (ARCH_REQ_XCOMP_PERM), and it needs XFD.
//! - CET (shadow stacks, IBT): guest CALL and RET are not host CALL and RET, so the hardware can't check them.
//! - MPX: bound checks are lost in re-encoded branches; and compilers and kernels have dropped it.
//! - Intel PT, LBR, PEBS (DS, DTES64, DS-CPL), performance monitoring (leaf 0xa, PDCM): they would show the
//!   translated code, not the guest's.
//! - MONITOR/MWAIT, WAITPKG (UMONITOR, UMWAIT, TPAUSE): they arm on host-physical lines and would put the host's
//!   processor to sleep on the guest's say; HLT does it.
//! - ENQCMD, PASID, UINTR, PCONFIG, key locker, FRED, LKGS, WRMSRNS, LAM, LASS, HRESET, PBNDKB: state of the host's
//!   kernel, or privileged extensions whose absence costs a guest nothing.
//! - LA57: five-level paging; the engines walk four levels.
//! - Thermal and power (TM, TM2, ACPI, EIST, digital sensors, HWP): there is no hardware behind them.
//! - OSXSAVE and OSPKE: not features but mirrors of CR4; the lookup sets them.
//! - AVX512_4VNNIW, AVX512_4FMAPS, PREFETCHWT1, AVX512ER, AVX512PF: Xeon Phi only.

use crate::registers::xcr0;

/// Which register of a leaf a feature bit is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Who makes a feature work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Guest code uses the hardware's: offered where the host has it and the engine does not decline.
    Native,
    /// The engine implements it, whatever the host has: offered where the engine says so.
    System,
    /// The processor that the guest really runs on does it: offered where an engine has one and says so. Translated code
    /// does not flush buffers or steer predictors by what the guest executes.
    Hardware,
    /// No ability, but a way of the host's that guest code will meet: shown as it is, never required.
    Fact,
}

/// The least model that offers a feature: the x86-64 psABI levels, then everything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    V1,
    V2,
    V3,
    V4,
    Host,
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Info {
    pub feature: Feature,
    pub leaf: u32,
    pub subleaf: u32,
    pub register: Register,
    pub bit: u32,
    pub kind: Kind,
    pub level: Level,
    pub needs: Option<Feature>,
    name: &'static str,
}

macro_rules! features {
    (@needs) => { None };
    (@needs $needs:ident) => { Some(Feature::$needs) };
    ($($name:ident $leaf:literal/$subleaf:literal $register:ident $bit:literal $kind:ident $level:ident
       $(needs $needs:ident)?;)*) => {
        /// A processor feature, by its usual name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Feature { $($name),* }

        /// All features there can be, each after the one it needs.
        pub const FEATURES: &[Info] = &[$(Info {
            feature: Feature::$name,
            leaf: $leaf,
            subleaf: $subleaf,
            register: Register::$register,
            bit: $bit,
            kind: Kind::$kind,
            level: Level::$level,
            needs: features!(@needs $($needs)?),
            name: stringify!($name),
        }),*];
    };
}

features! {
    // Leaf 1 EDX (Intel SDM 2A table 3-11)
    Fpu 1/0 Edx 0 Native V1;
    Vme 1/0 Edx 1 System V1;
    De 1/0 Edx 2 System V1;
    Pse 1/0 Edx 3 System V1;
    Tsc 1/0 Edx 4 System V1;
    Msr 1/0 Edx 5 System V1;
    Pae 1/0 Edx 6 System V1;
    // 64-bit kernels expect machine checks; IA32_MCG_CAP then says that there are no banks.
    Mce 1/0 Edx 7 System V1;
    Cx8 1/0 Edx 8 Native V1;
    Apic 1/0 Edx 9 System V1;
    Sep 1/0 Edx 11 System V1;
    Mtrr 1/0 Edx 12 System V1;
    Pge 1/0 Edx 13 System V1;
    Mca 1/0 Edx 14 System V1 needs Mce;
    Cmov 1/0 Edx 15 Native V1;
    Pat 1/0 Edx 16 System V1;
    Pse36 1/0 Edx 17 System V1;
    Clfsh 1/0 Edx 19 Native V1;
    Mmx 1/0 Edx 23 Native V1;
    Fxsr 1/0 Edx 24 Native V1;
    Sse 1/0 Edx 25 Native V1 needs Fxsr;
    Sse2 1/0 Edx 26 Native V1 needs Sse;
    SelfSnoop 1/0 Edx 27 Fact V1;
    // Leaf 1 ECX (Intel SDM 2A table 3-10)
    Sse3 1/0 Ecx 0 Native V2 needs Sse2;
    Pclmulqdq 1/0 Ecx 1 Native Host needs Sse2;
    Ssse3 1/0 Ecx 9 Native V2 needs Sse3;
    Cx16 1/0 Ecx 13 Native V2;
    Pcid 1/0 Ecx 17 System V1;
    Sse41 1/0 Ecx 19 Native V2 needs Ssse3;
    Sse42 1/0 Ecx 20 Native V2 needs Sse41;
    X2apic 1/0 Ecx 21 System V1 needs Apic;
    Movbe 1/0 Ecx 22 Native V3;
    Popcnt 1/0 Ecx 23 Native V2;
    TscDeadline 1/0 Ecx 24 System V1 needs Apic;
    Aes 1/0 Ecx 25 Native Host needs Sse2;
    Xsave 1/0 Ecx 26 Native V3 needs Fxsr;
    Avx 1/0 Ecx 28 Native V3 needs Xsave;
    Fma 1/0 Ecx 12 Native V3 needs Avx;
    F16c 1/0 Ecx 29 Native V3 needs Avx;
    Rdrand 1/0 Ecx 30 Native Host;
    Hypervisor 1/0 Ecx 31 System V1;
    // Leaf 6: the local APIC's timer runs in all sleep states.
    Arat 6/0 Eax 2 System V1 needs Apic;
    // Leaf 7 EBX
    Fsgsbase 7/0 Ebx 0 System V1;
    TscAdjust 7/0 Ebx 1 System V1;
    Bmi1 7/0 Ebx 3 Native V3;
    Avx2 7/0 Ebx 5 Native V3 needs Avx;
    FdpExceptionOnly 7/0 Ebx 6 Fact V1;
    Smep 7/0 Ebx 7 System V1;
    Bmi2 7/0 Ebx 8 Native V3;
    Erms 7/0 Ebx 9 Native Host;
    Invpcid 7/0 Ebx 10 System V1;
    FcsFdsDeprecated 7/0 Ebx 13 Fact V1;
    Avx512f 7/0 Ebx 16 Native V4 needs Avx2;
    Avx512dq 7/0 Ebx 17 Native V4 needs Avx512f;
    Rdseed 7/0 Ebx 18 Native Host;
    Adx 7/0 Ebx 19 Native Host;
    Smap 7/0 Ebx 20 System V1;
    Avx512ifma 7/0 Ebx 21 Native Host needs Avx512f;
    Clflushopt 7/0 Ebx 23 Native Host;
    Clwb 7/0 Ebx 24 Native Host;
    Avx512cd 7/0 Ebx 28 Native V4 needs Avx512f;
    Sha 7/0 Ebx 29 Native Host needs Sse2;
    Avx512bw 7/0 Ebx 30 Native V4 needs Avx512f;
    Avx512vl 7/0 Ebx 31 Native V4 needs Avx512f;
    // Leaf 7 ECX
    Avx512vbmi 7/0 Ecx 1 Native Host needs Avx512bw;
    Umip 7/0 Ecx 2 System V1;
    // The engine checks keys in its own TLB, but PKRU lives in the XSAVE area, whose layout is the host's: a level,
    // which must be the same on every host, can't have it.
    Pku 7/0 Ecx 3 System Host needs Xsave;
    Avx512vbmi2 7/0 Ecx 6 Native Host needs Avx512bw;
    Gfni 7/0 Ecx 8 Native Host needs Sse2;
    Vaes 7/0 Ecx 9 Native Host needs Avx;
    Vpclmulqdq 7/0 Ecx 10 Native Host needs Avx;
    Avx512vnni 7/0 Ecx 11 Native Host needs Avx512f;
    Avx512bitalg 7/0 Ecx 12 Native Host needs Avx512bw;
    Avx512vpopcntdq 7/0 Ecx 14 Native Host needs Avx512f;
    Rdpid 7/0 Ecx 22 System V1;
    Cldemote 7/0 Ecx 25 Native Host;
    Movdiri 7/0 Ecx 27 Native Host;
    Movdir64b 7/0 Ecx 28 Native Host;
    // Leaf 7 EDX
    Fsrm 7/0 Edx 4 Native Host;
    Avx512vp2intersect 7/0 Edx 8 Native Host needs Avx512f;
    MdClear 7/0 Edx 10 Hardware Host;
    Serialize 7/0 Edx 14 System V1;
    Avx512fp16 7/0 Edx 23 Native Host needs Avx512bw;
    // IBRS and IBPB as MSRs that store and do nothing; see `capabilities` for why they are here at all.
    SpecCtrl 7/0 Edx 26 System V1;
    Stibp 7/0 Edx 27 Hardware Host needs SpecCtrl;
    L1dFlush 7/0 Edx 28 Hardware Host;
    ArchCapabilities 7/0 Edx 29 System V1;
    Ssbd 7/0 Edx 31 Hardware Host needs SpecCtrl;
    // Leaf 7, sub-leaf 1
    Sha512 7/1 Eax 0 Native Host needs Avx2;
    Sm3 7/1 Eax 1 Native Host needs Avx;
    Sm4 7/1 Eax 2 Native Host needs Avx;
    AvxVnni 7/1 Eax 4 Native Host needs Avx2;
    Avx512bf16 7/1 Eax 5 Native Host needs Avx512bw;
    Cmpccxadd 7/1 Eax 7 Native Host;
    Fzrm 7/1 Eax 10 Native Host;
    Fsrs 7/1 Eax 11 Native Host;
    Fsrc 7/1 Eax 12 Native Host;
    AvxIfma 7/1 Eax 23 Native Host needs Avx2;
    AvxVnniInt8 7/1 Edx 4 Native Host needs Avx2;
    AvxNeConvert 7/1 Edx 5 Native Host needs Avx2;
    AvxVnniInt16 7/1 Edx 10 Native Host needs Avx2;
    // Leaf 7, sub-leaf 2: BHI_DIS_S in SPEC_CTRL, also stored only; without it kernels clear branch history by a loop.
    BhiCtrl 7/2 Edx 4 System V1 needs SpecCtrl;
    // Leaf 0xd, sub-leaf 1
    Xsaveopt 0xd/1 Eax 0 Native Host needs Xsave;
    Xsavec 0xd/1 Eax 1 Native Host needs Xsave;
    Xgetbv1 0xd/1 Eax 2 Native Host needs Xsave;
    Xsaves 0xd/1 Eax 3 System Host needs Xsavec;
    // Leaf 0x80000001
    LahfLm 0x8000_0001/0 Ecx 0 Native V2;
    Lzcnt 0x8000_0001/0 Ecx 5 Native V3;
    Sse4a 0x8000_0001/0 Ecx 6 Native Host needs Sse3;
    MisalignSse 0x8000_0001/0 Ecx 7 Fact V1;
    Prefetchw 0x8000_0001/0 Ecx 8 Native Host;
    Syscall 0x8000_0001/0 Edx 11 System V1;
    Nx 0x8000_0001/0 Edx 20 System V1;
    Mmxext 0x8000_0001/0 Edx 22 Native Host needs Mmx;
    Page1Gb 0x8000_0001/0 Edx 26 System V1;
    Rdtscp 0x8000_0001/0 Edx 27 System V1;
    LongMode 0x8000_0001/0 Edx 29 System V1;
    InvariantTsc 0x8000_0007/0 Edx 8 System V1;
    // Leaf 0x80000008: what AMD's processors have of leaf 7 EDX.
    AmdIbpb 0x8000_0008/0 Ebx 12 Hardware Host;
    AmdIbrs 0x8000_0008/0 Ebx 14 Hardware Host;
    AmdStibp 0x8000_0008/0 Ebx 15 Hardware Host;
    AmdSsbd 0x8000_0008/0 Ebx 24 Hardware Host;
}

const _: () = assert!(FEATURES.len() <= 128, "FeatureSet has 128 bits");

impl Feature {
    pub const fn info(self) -> &'static Info {
        &FEATURES[self as usize]
    }

    /// The bits of XCR0 that the host's kernel must have enabled for the feature to run.
    pub const fn state(self) -> u64 {
        match self {
            Feature::Avx => xcr0::X87 | xcr0::SSE | xcr0::AVX,
            Feature::Avx512f => xcr0::AVX512,
            _ => 0,
        }
    }

    /// As users write it.
    pub fn name(self) -> String {
        self.info().name.to_ascii_lowercase()
    }
}

/// A set of features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeatureSet(u128);

impl FeatureSet {
    pub const EMPTY: Self = FeatureSet(0);

    /// Everything that is an engine's to implement ([`Kind::System`]).
    pub const fn system() -> Self {
        Self::of_kind(Kind::System)
    }

    /// Everything that needs the processor itself ([`Kind::Hardware`]).
    pub const fn hardware() -> Self {
        Self::of_kind(Kind::Hardware)
    }

    const fn of_kind(kind: Kind) -> Self {
        let (mut set, mut i) = (0, 0);
        while i < FEATURES.len() {
            if FEATURES[i].kind as u8 == kind as u8 {
                set |= 1 << i;
            }
            i += 1;
        }
        FeatureSet(set)
    }

    pub const fn has(self, feature: Feature) -> bool {
        self.0 & 1 << feature as u8 != 0
    }

    #[must_use]
    pub const fn with(self, feature: Feature) -> Self {
        FeatureSet(self.0 | 1 << feature as u8)
    }

    #[must_use]
    pub const fn without(self, feature: Feature) -> Self {
        FeatureSet(self.0 & !(1 << feature as u8))
    }

    pub fn iter(self) -> impl Iterator<Item = Feature> {
        FEATURES.iter().map(|i| i.feature).filter(move |&f| self.has(f))
    }
}

impl FromIterator<Feature> for FeatureSet {
    fn from_iter<T: IntoIterator<Item = Feature>>(features: T) -> Self {
        features.into_iter().fold(FeatureSet::EMPTY, FeatureSet::with)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_feature_stands_after_the_one_it_needs() {
        for (i, info) in FEATURES.iter().enumerate() {
            assert_eq!(info.feature as usize, i);
            assert!(info.needs.is_none_or(|n| (n as usize) < i), "{}", info.feature.name());
        }
    }

    #[test]
    fn no_two_features_share_a_bit() {
        for a in FEATURES {
            let place = |i: &Info| (i.leaf, i.subleaf, i.register as u8, i.bit);
            assert_eq!(FEATURES.iter().filter(|b| place(b) == place(a)).count(), 1, "{}", a.feature.name());
        }
    }
}
