//! Which instruction-set extensions the host has, by CPUID.

use std::arch::x86_64::{__cpuid, __cpuid_count};

use iced_x86::CpuidFeature::{self, *};

/// Which output register.
#[derive(Clone, Copy)]
enum Reg {
    A,
    B,
    C,
    D,
}
use Reg::*;

/// Extension, leaf, subleaf, register, bit.
#[rustfmt::skip]
const BITS: &[(CpuidFeature, u32, u32, Reg, u32)] = &[
    (FPU, 1, 0, D, 0), (FPU287, 1, 0, D, 0), (FPU387, 1, 0, D, 0), (TSC, 1, 0, D, 4), (MSR, 1, 0, D, 5), (CX8, 1, 0, D, 8),
    (SEP, 1, 0, D, 11), (CMOV, 1, 0, D, 15), (CLFSH, 1, 0, D, 19), (MMX, 1, 0, D, 23), (FXSR, 1, 0, D, 24), (SSE, 1, 0, D, 25),
    (SSE2, 1, 0, D, 26), (SSE3, 1, 0, C, 0), (PCLMULQDQ, 1, 0, C, 1), (MONITOR, 1, 0, C, 3), (SMX, 1, 0, C, 6), (SSSE3, 1, 0, C, 9),
    (FMA, 1, 0, C, 12), (CMPXCHG16B, 1, 0, C, 13), (SSE4_1, 1, 0, C, 19), (SSE4_2, 1, 0, C, 20), (MOVBE, 1, 0, C, 22),
    (POPCNT, 1, 0, C, 23), (AES, 1, 0, C, 25), (XSAVE, 1, 0, C, 26), (AVX, 1, 0, C, 28), (F16C, 1, 0, C, 29), (VMX, 1, 0, C, 5),
    (FSGSBASE, 7, 0, B, 0), (BMI1, 7, 0, B, 3), (AVX2, 7, 0, B, 5), (BMI2, 7, 0, B, 8), (INVPCID, 7, 0, B, 10),
    (AVX512F, 7, 0, B, 16), (AVX512DQ, 7, 0, B, 17), (ADX, 7, 0, B, 19), (SMAP, 7, 0, B, 20), (AVX512_IFMA, 7, 0, B, 21),
    (CLFLUSHOPT, 7, 0, B, 23), (CLWB, 7, 0, B, 24), (AVX512CD, 7, 0, B, 28), (SHA, 7, 0, B, 29), (AVX512BW, 7, 0, B, 30),
    (AVX512VL, 7, 0, B, 31), (AVX512_VBMI, 7, 0, C, 1), (PKU, 7, 0, C, 4), (AVX512_VBMI2, 7, 0, C, 6), (GFNI, 7, 0, C, 8),
    (VAES, 7, 0, C, 9), (VPCLMULQDQ, 7, 0, C, 10), (AVX512_VNNI, 7, 0, C, 11), (AVX512_BITALG, 7, 0, C, 12),
    (AVX512_VPOPCNTDQ, 7, 0, C, 14), (CLDEMOTE, 7, 0, C, 25), (MOVDIRI, 7, 0, C, 27), (MOVDIR64B, 7, 0, C, 28),
    (AVX512_VP2INTERSECT, 7, 0, D, 8), (SERIALIZE, 7, 0, D, 14), (CET_IBT, 7, 0, D, 20), (AVX512_FP16, 7, 0, D, 23),
    (AVX_VNNI, 7, 1, A, 4), (AVX512_BF16, 7, 1, A, 5), (CMPCCXADD, 7, 1, A, 7), (AVX_IFMA, 7, 1, A, 23),
    (RAO_INT, 7, 1, A, 3), (SHA512, 7, 1, A, 0), (SM3, 7, 1, A, 1), (SM4, 7, 1, A, 2), (WRMSRNS, 7, 1, A, 19),
    (AVX_VNNI_INT8, 7, 1, D, 4), (AVX_NE_CONVERT, 7, 1, D, 5), (AVX_VNNI_INT16, 7, 1, D, 10),
    (XSAVEOPT, 0xd, 1, A, 0), (XSAVEC, 0xd, 1, A, 1), (XSAVES, 0xd, 1, A, 3),
    (LZCNT, 0x8000_0001, 0, C, 5), (SSE4A, 0x8000_0001, 0, C, 6), (PREFETCHW, 0x8000_0001, 0, C, 8), (XOP, 0x8000_0001, 0, C, 11),
    (FMA4, 0x8000_0001, 0, C, 16), (TBM, 0x8000_0001, 0, C, 21), (SYSCALL, 0x8000_0001, 0, D, 11), (D3NOW, 0x8000_0001, 0, D, 31),
    (D3NOWEXT, 0x8000_0001, 0, D, 30),
];

/// Part of every 64-bit processor.
const ALWAYS: &[CpuidFeature] =
    &[INTEL8086, INTEL186, INTEL286, INTEL386, INTEL486, X64, MULTIBYTENOP, PAUSE, CpuidFeature::CPUID];

/// The extensions that the host has.
pub struct Host(Vec<CpuidFeature>);

impl Host {
    pub fn detect() -> Self {
        let mut all = ALWAYS.to_vec();
        let (basic, extended) = (__cpuid(0).eax, __cpuid(0x8000_0000).eax);
        for &(feature, leaf, subleaf, register, bit) in BITS {
            if leaf > if leaf >> 31 == 0 { basic } else { extended } {
                continue;
            }
            let r = __cpuid_count(leaf, subleaf);
            let value = match register {
                A => r.eax,
                B => r.ebx,
                C => r.ecx,
                D => r.edx,
            };
            if value >> bit & 1 != 0 {
                all.push(feature);
            }
        }
        Host(all)
    }

    /// Whether the host has all that an instruction form asks for.
    pub fn supports(&self, features: &[CpuidFeature]) -> bool {
        features.iter().all(|f| self.0.contains(f))
    }
}
