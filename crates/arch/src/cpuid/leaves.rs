//! The leaves of a [`CpuModel`], one function for each group (Intel SDM 2A, CPUID; AMD APM vol. 3, appendix E).

use super::capabilities::{AMD_BTC_NO, AMD_LFENCE_SERIALIZING, AMD_SRSO_NO, AMD_TSA_NO, AMD_VERW_CLEAR};
use super::features::FEATURES;
use super::{APIC_TIMER_HZ, CpuModel, Host, Leaf, Model, Topology};

/// The vendors' strings as EBX, EDX, ECX of leaf 0.
pub(super) const AMD: (u32, u32, u32) = (0x6874_7541, 0x6974_6e65, 0x444d_4163);
pub(super) const HYGON: (u32, u32, u32) = (0x6f67_7948, 0x6e65_476e, 0x656e_6975);

const KVM_BASE: u32 = 0x4000_0000;
/// KVM's features (Linux `Documentation/virt/kvm/x86/cpuid.rst`): its clock in both encodings, no delays at ports, 15
/// bits of destination in MSIs (so that x2APIC needs no interrupt remapping), and that the clock never goes backwards
/// across vCPUs. Not: asynchronous page faults, steal time, PV EOI, PV spin locks, PV TLB flush.
const KVM_FEATURES: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 15 | 1 << 24;

/// Whether ECX matters.
pub(super) const fn has_subleaves(leaf: u32) -> bool {
    matches!(leaf, 4 | 7 | 0xb | 0xd | 0x1f)
}

impl CpuModel {
    /// Fills the table.
    pub(super) fn write_leaves(
        &mut self,
        model: Model,
        cpuid: &dyn Fn(u32, u32) -> Leaf,
        cpus: Topology,
        tsc_khz: u32,
    ) {
        let host = Host::new(cpuid);
        // 0x1f is the highest of Intel's that has content here. AMD's kernels look for their topology elsewhere.
        self.max_basic = if self.amd { 0x16 } else { 0x1f };
        self.max_extended = if self.amd { 0x8000_0021 } else { 0x8000_0008 };
        self.identity(model, &host, cpus);
        self.caches(&host, cpus);
        self.topology(cpus);
        self.xsave();
        self.frequencies(tsc_khz);
        self.hypervisor(tsc_khz);
        self.extended(model, &host, cpus);
        self.feature_bits();
        self.table.sort_unstable_by_key(|(key, _)| *key);
    }

    fn set(&mut self, leaf: u32, subleaf: u32, value: Leaf) {
        self.table.push(((leaf, subleaf), value));
    }

    fn identity(&mut self, model: Model, host: &Host, cpus: Topology) {
        let vendor = host.leaf(0, 0);
        self.set(0, 0, Leaf { eax: self.max_basic, ..vendor });
        let version = host.leaf(1, 0);
        // CLFLUSH line size as the host's; the APIC id comes with the lookup.
        let ebx = (version.ebx & 0xff00) | cpus.package_ids().min(0xff) << 16;
        let htt = u32::from(cpus.package() > 1) << 28;
        self.set(1, 0, Leaf { eax: version.eax & 0x0fff_3fff, ebx, ecx: 0, edx: htt });
        let brand = brand(model, host);
        for (leaf, words) in (0x8000_0002..).zip(brand.chunks_exact(16)) {
            let word =
                |i: usize| words.get(4 * i..4 * i + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
            self.set(leaf, 0, Leaf { eax: word(0), ebx: word(1), ecx: word(2), edx: word(3) });
        }
    }

    /// Caches as the host has them, shared as the guest's topology says: levels 1 and 2 by one core, higher ones by a
    /// package.
    fn caches(&mut self, host: &Host, cpus: Topology) {
        self.set(2, 0, host.leaf(2, 0));
        for subleaf in 0..8 {
            let cache = host.leaf(4, subleaf);
            if cache.eax & 0x1f == 0 {
                break;
            }
            let level = cache.eax >> 5 & 7;
            let sharing = if level >= 3 { cpus.package_ids() } else { cpus.core_ids() };
            let sharing = (sharing - 1).min(0xfff);
            let cores = (cpus.package_ids() / cpus.core_ids() - 1).min(0x3f);
            self.set(4, subleaf, Leaf { eax: cache.eax & 0x3ff | sharing << 14 | cores << 26, ..cache });
        }
    }

    /// Which bits of the APIC id name the thread, the core, the package (Intel SDM 3A 9.9).
    fn topology(&mut self, cpus: Topology) {
        const SMT: u32 = 1 << 8;
        const CORE: u32 = 2 << 8;
        for leaf in if self.amd { &[0xb][..] } else { &[0xb, 0x1f][..] } {
            self.set(
                *leaf,
                0,
                Leaf { eax: cpus.core_ids().trailing_zeros(), ebx: cpus.threads() & 0xffff, ecx: SMT, edx: 0 },
            );
            let shift = cpus.package_ids().trailing_zeros();
            self.set(*leaf, 1, Leaf { eax: shift, ebx: cpus.package() & 0xffff, ecx: CORE, edx: 0 });
        }
    }

    fn xsave(&mut self) {
        let mask = self.layout.mask();
        if mask == 0 {
            return;
        }
        let size = self.layout.standard_size(mask);
        self.set(0xd, 0, Leaf { eax: mask as u32, ebx: 0, ecx: size, edx: (mask >> 32) as u32 });
        let components: Vec<_> = self.layout.leaves().collect();
        for (index, leaf) in components {
            self.set(0xd, index, leaf);
        }
    }

    /// Leaf 0x15: TSC = crystal * EBX / EAX, to some 25 millionths; leaf 0x16: MHz.
    fn frequencies(&mut self, tsc_khz: u32) {
        let crystal_khz = APIC_TIMER_HZ / 1000;
        // Kernels multiply in 32 bits: crystal_khz * EBX must stay below 2^32.
        let (ebx, eax) = ratio(tsc_khz, crystal_khz, u32::MAX / crystal_khz);
        self.set(0x15, 0, Leaf { eax, ebx, ecx: APIC_TIMER_HZ, edx: 0 });
        let mhz = (tsc_khz / 1000).min(0xffff);
        self.set(0x16, 0, Leaf { eax: mhz, ebx: mhz, ecx: 100, edx: 0 });
    }

    fn hypervisor(&mut self, tsc_khz: u32) {
        let word = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
        let signature = Leaf { eax: KVM_BASE + 0x10, ebx: word(b"KVMK"), ecx: word(b"VMKV"), edx: word(b"M\0\0\0") };
        self.set(KVM_BASE, 0, signature);
        self.set(KVM_BASE + 1, 0, Leaf { eax: KVM_FEATURES, ..Leaf::default() });
        // VMware's timing leaf, which others have adopted: TSC and APIC timer in kHz.
        let timing = Leaf { eax: tsc_khz, ebx: APIC_TIMER_HZ / 1000, ..Leaf::default() };
        self.set(KVM_BASE + 0x10, 0, timing);
    }

    fn extended(&mut self, model: Model, host: &Host, cpus: Topology) {
        let vendor = if self.amd { host.leaf(0, 0) } else { Leaf::default() };
        self.set(0x8000_0000, 0, Leaf { eax: self.max_extended, ..vendor });
        if model == Model::Host && self.amd {
            self.set(0x8000_0005, 0, host.leaf(0x8000_0005, 0));
        }
        self.set(0x8000_0006, 0, host.leaf(0x8000_0006, 0));
        let linear_bits = 48;
        let mut sizes = Leaf { eax: u32::from(self.physical_bits) | linear_bits << 8, ..Leaf::default() };
        if self.amd {
            let immune = |bit: u32, host: u32| if self.translated { bit } else { host & bit };
            sizes.ebx = immune(AMD_BTC_NO, host.leaf(0x8000_0008, 0).ebx);
            sizes.ecx = (cpus.package() - 1).min(0xff) | cpus.package_ids().trailing_zeros() << 12;
            let facts = host.leaf(0x8000_0021, 0);
            let clears = if self.translated { 0 } else { facts.eax & AMD_VERW_CLEAR };
            let eax = facts.eax & AMD_LFENCE_SERIALIZING | immune(AMD_SRSO_NO, facts.eax) | clears;
            self.set(0x8000_0021, 0, Leaf { eax, ecx: immune(AMD_TSA_NO, facts.ecx), ..Leaf::default() });
        }
        self.set(0x8000_0008, 0, sizes);
    }

    /// Sets the bit of each feature that the processor has.
    fn feature_bits(&mut self) {
        let max_leaf_7 = FEATURES.iter().filter(|i| i.leaf == 7 && self.has(i.feature)).map(|i| i.subleaf).max();
        self.set(7, 0, Leaf { eax: max_leaf_7.unwrap_or(0), ..Leaf::default() });
        for info in FEATURES.iter().filter(|i| self.features.has(i.feature)) {
            let key = (info.leaf, info.subleaf);
            let leaf = match self.table.iter().position(|(k, _)| *k == key) {
                Some(i) => self.table.get_mut(i).map(|(_, leaf)| leaf),
                None => {
                    self.table.push((key, Leaf::default()));
                    self.table.last_mut().map(|(_, leaf)| leaf)
                }
            };
            if let Some(leaf) = leaf {
                *leaf.register_mut(info.register) |= 1 << info.bit;
            }
        }
        self.mirror_amd_bits();
    }

    /// AMD shows some of leaf 1's EDX again in leaf 0x80000001 (APM vol. 3, E.4.2).
    fn mirror_amd_bits(&mut self) {
        const MIRRORED: u32 = 0x0183_f3ff;
        if !self.amd {
            return;
        }
        let basic = self.table.iter().find(|(k, _)| *k == (1, 0)).map_or(0, |(_, l)| l.edx);
        if let Some((_, leaf)) = self.table.iter_mut().find(|(k, _)| *k == (0x8000_0001, 0)) {
            leaf.edx |= basic & MIRRORED;
        }
    }
}

/// The 48 bytes of the brand string.
fn brand(model: Model, host: &Host) -> Vec<u8> {
    if model != Model::Host {
        let mut text = format!("{model} processor").into_bytes();
        text.resize(48, 0);
        return text;
    }
    (0x8000_0002..=0x8000_0004)
        .flat_map(|leaf| {
            let l = host.leaf(leaf, 0);
            [l.eax, l.ebx, l.ecx, l.edx].into_iter().flat_map(u32::to_le_bytes)
        })
        .collect()
}

/// The fraction closest to `a` / `b` whose numerator is at most `most`; of equals the simplest.
fn ratio(a: u32, b: u32, most: u32) -> (u32, u32) {
    let (a, b) = (u64::from(a), u64::from(b).max(1));
    let candidates = (1..=u64::from(most)).map(|d| ((a * d + b / 2) / b, d)).take_while(|(n, _)| *n <= u64::from(most));
    // By the error times b * d, which is compared over d.
    let error = |(n, d): (u64, u64)| (a * d).abs_diff(n * b);
    let best = candidates.reduce(|x, y| if error(y) * x.1 < error(x) * y.1 { y } else { x });
    best.map_or((0, 1), |(n, d)| (n as u32, d as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_beyond_subleaf_0_are_in_leaves_that_have_subleaves() {
        assert!(FEATURES.iter().all(|i| i.subleaf == 0 || has_subleaves(i.leaf)));
    }
}
