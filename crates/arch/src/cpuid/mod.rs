//! CPUID models: what a virtual processor says it is.
//!
//! A [`CpuModel`] is a table of leaves, made once from the host's own leaves (given by the caller, since executing
//! CPUID is behaviour) less what an engine can't keep, or from one of the x86-64 psABI levels. [`CpuModel::leaf`] looks
//! a leaf up and adds what follows the vCPU's state ([`Dynamic`]): its APIC id, the mirrors of CR4, the size of the
//! XSAVE area.
//!
//! The data flow: [`features`] is the whitelist; [`CpuModel::new`] intersects it with host, engine and model; `leaves`
//! writes the leaves; `xstate` knows the XSAVE layout; [`capabilities`] is IA32_ARCH_CAPABILITIES.

pub mod capabilities;
pub mod features;
mod leaves;
mod topology;
mod xstate;

use std::str::FromStr;

use crate::registers::{cr4, efer};
use features::{FEATURES, Kind, Level};
pub use features::{Feature, FeatureSet};
pub use topology::Topology;
use xstate::Layout;

/// What CPUID returns for one leaf and sub-leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// The local APIC timer's input clock in Hz, on every engine: KVM's. Firmware for virtual machines (OVMF) does not ask but
/// takes it for granted, so that it decides how long its timeouts are. Leaf 0x15 calls it the crystal.
pub const APIC_TIMER_HZ: u32 = 1_000_000_000;

/// Which processor to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Model {
    /// What the host has, less what the engine can't keep.
    #[default]
    Host,
    /// x86-64-v2: SSE4.2, POPCNT, CMPXCHG16B.
    V2,
    /// x86-64-v3: AVX2, BMI, FMA.
    V3,
    /// x86-64-v4: AVX-512 F, BW, CD, DQ, VL.
    V4,
}

impl Model {
    pub const fn name(self) -> &'static str {
        match self {
            Model::Host => "host",
            Model::V2 => "x86-64-v2",
            Model::V3 => "x86-64-v3",
            Model::V4 => "x86-64-v4",
        }
    }

    const fn level(self) -> Level {
        match self {
            Model::Host => Level::Host,
            Model::V2 => Level::V2,
            Model::V3 => Level::V3,
            Model::V4 => Level::V4,
        }
    }
}

impl std::fmt::Display for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Model {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        [Model::Host, Model::V2, Model::V3, Model::V4]
            .into_iter()
            .find(|m| m.name() == name)
            .ok_or_else(|| Error::UnknownModel { name: name.to_owned() })
    }
}

/// Why there is no such processor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("there is no processor model '{name}': choose host, x86-64-v2, x86-64-v3 or x86-64-v4")]
    UnknownModel { name: String },
    #[error("processor model {model} needs what this host does not have: {missing}; choose host or a lower level")]
    Missing { model: Model, missing: String },
}

/// The widest guest-physical addresses of any engine, so that a machine fits wherever it goes. More than RAM and the
/// windows of PCI need has a price: EFI firmware maps all of it, page by page.
pub const PHYSICAL_BITS: u8 = 40;

/// What the engine does of its own accord.
#[derive(Clone, Copy, Debug)]
pub struct EngineFeatures {
    /// The features of [`Kind::System`] that it implements, whether or not the host has them.
    pub implements: FeatureSet,
    /// Features of [`Kind::Native`] that it can't keep.
    pub declines: FeatureSet,
    /// XCR0 as the host's kernel has set it (XGETBV): what native code may use.
    pub host_xcr0: u64,
    /// Width of guest-physical addresses, 36 to 52.
    pub physical_bits: u8,
    /// The answer to IA32_ARCH_CAPABILITIES, of [`capabilities`]' bits.
    pub arch_capabilities: u64,
    /// Guest code does not have the hazards of speculation that the host's has (see [`capabilities`]).
    pub translated: bool,
}

/// The parts of a vCPU's state that CPUID shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dynamic {
    pub apic_id: u32,
    /// IA32_APIC_BASE's global enable: the APIC feature bit goes with it (Intel SDM 3A 10.4.3).
    pub apic_enabled: bool,
    pub cr4: u64,
    pub xcr0: u64,
    pub xss: u64,
}

/// A processor: its features and its CPUID leaves.
#[derive(Clone, Debug)]
pub struct CpuModel {
    features: FeatureSet,
    /// Sorted by leaf and sub-leaf.
    table: Vec<((u32, u32), Leaf)>,
    layout: Layout,
    max_basic: u32,
    max_extended: u32,
    amd: bool,
    physical_bits: u8,
    arch_capabilities: u64,
    translated: bool,
}

impl CpuModel {
    /// A processor for a machine of `cpus` cores in one package, whose TSC runs at `tsc_khz`. `host` executes CPUID with
    /// that EAX and ECX.
    pub fn new(
        model: Model,
        host: &dyn Fn(u32, u32) -> Leaf,
        engine: &EngineFeatures,
        cpus: Topology,
        tsc_khz: u32,
    ) -> Result<Self, Error> {
        let features = offered(model, &Host::new(host), engine)?;
        let layout = Layout::new(features, host);
        let identity = host(0, 0);
        let mut cpu = CpuModel {
            features,
            table: Vec::new(),
            layout,
            max_basic: 0,
            max_extended: 0,
            amd: [leaves::AMD, leaves::HYGON].contains(&(identity.ebx, identity.edx, identity.ecx)),
            physical_bits: engine.physical_bits,
            arch_capabilities: engine.arch_capabilities,
            translated: engine.translated,
        };
        cpu.write_leaves(model, host, cpus, tsc_khz);
        Ok(cpu)
    }

    /// What CPUID returns for EAX = `leaf` and ECX = `subleaf` (Intel SDM 2A, CPUID).
    pub fn leaf(&self, leaf: u32, subleaf: u32, state: &Dynamic) -> Leaf {
        let known = match leaf {
            0..0x4000_0000 => leaf <= self.max_basic,
            // The range of hypervisors: what is not there is empty, as under KVM.
            0x4000_0000..0x4000_0100 => true,
            _ => (0x8000_0000..=self.max_extended).contains(&leaf),
        };
        match known {
            true => self.known_leaf(leaf, subleaf, state),
            // AMD: reserved leaves read as zero (APM vol. 3, E.1).
            false if self.amd => Leaf::default(),
            false => self.known_leaf(self.max_basic, subleaf, state),
        }
    }

    fn known_leaf(&self, leaf: u32, subleaf: u32, state: &Dynamic) -> Leaf {
        let key = (leaf, if leaves::has_subleaves(leaf) { subleaf } else { 0 });
        let found = self.table.binary_search_by_key(&key, |(k, _)| *k).ok().and_then(|i| self.table.get(i));
        let mut out = found.map(|(_, l)| *l).unwrap_or_default();
        match leaf {
            1 => {
                out.ebx |= (state.apic_id & 0xff) << 24;
                out.ecx |= u32::from(state.cr4 & cr4::OSXSAVE != 0) << 27;
                if !state.apic_enabled {
                    out.edx &= !(1 << 9);
                }
            }
            7 if subleaf == 0 => out.ecx |= u32::from(state.cr4 & cr4::PKE != 0) << 4,
            // Every sub-leaf has the id, and the invalid ones echo ECX's low byte (Intel SDM 2A, leaf 0bH).
            0xb | 0x1f => {
                out.ecx |= subleaf & 0xff;
                out.edx = state.apic_id;
            }
            0xd if subleaf == 0 => out.ebx = self.layout.standard_size(state.xcr0),
            0xd if subleaf == 1 && self.has(Feature::Xsavec) => {
                out.ebx = self.layout.compacted_size(state.xcr0 | state.xss);
            }
            _ => {}
        }
        out
    }

    /// All leaves that have content, for an engine that has them looked up elsewhere: leaf, sub-leaf, what it says, and
    /// whether the sub-leaf matters.
    pub fn leaves(&self, state: &Dynamic) -> impl Iterator<Item = (u32, u32, Leaf, bool)> {
        let keys = self.table.iter().map(|((leaf, subleaf), _)| (*leaf, *subleaf));
        keys.map(move |(leaf, subleaf)| {
            (leaf, subleaf, self.known_leaf(leaf, subleaf, state), leaves::has_subleaves(leaf))
        })
    }

    pub fn has(&self, feature: Feature) -> bool {
        self.features.has(feature)
    }

    pub fn features(&self) -> FeatureSet {
        self.features
    }

    /// The value of IA32_ARCH_CAPABILITIES; meaningful where [`Feature::ArchCapabilities`] is offered.
    pub fn arch_capabilities(&self) -> u64 {
        self.arch_capabilities
    }

    /// An AMD processor (or Hygon's), which differs from Intel's where the manuals do.
    pub fn is_amd(&self) -> bool {
        self.amd
    }

    /// Width of guest-physical addresses.
    pub fn physical_bits(&self) -> u8 {
        self.physical_bits
    }

    /// The bits of XCR0 that may be set; zero without XSAVE.
    pub fn xcr0_mask(&self) -> u64 {
        self.layout.mask()
    }

    /// Bytes of a standard-format XSAVE area that holds all components.
    pub fn xsave_size(&self) -> u32 {
        self.layout.standard_size(self.layout.mask())
    }

    /// The bits of CR4 that may be set (Intel SDM 3A 2.5): setting another raises #GP.
    pub fn cr4_mask(&self) -> u64 {
        const BITS: [(Feature, u64); 17] = [
            (Feature::Vme, cr4::VME | cr4::PVI),
            (Feature::Tsc, cr4::TSD),
            (Feature::De, cr4::DE),
            (Feature::Pse, cr4::PSE),
            (Feature::Pae, cr4::PAE),
            (Feature::Mce, cr4::MCE),
            (Feature::Pge, cr4::PGE),
            (Feature::Msr, cr4::PCE),
            (Feature::Fxsr, cr4::OSFXSR),
            (Feature::Sse, cr4::OSXMMEXCPT),
            (Feature::Umip, cr4::UMIP),
            (Feature::Fsgsbase, cr4::FSGSBASE),
            (Feature::Pcid, cr4::PCIDE),
            (Feature::Xsave, cr4::OSXSAVE),
            (Feature::Smep, cr4::SMEP),
            (Feature::Smap, cr4::SMAP),
            (Feature::Pku, cr4::PKE),
        ];
        BITS.iter().filter(|(f, _)| self.has(*f)).fold(0, |mask, (_, bits)| mask | bits)
    }

    /// The bits of IA32_EFER that may be written (LMA is the processor's own).
    pub fn efer_mask(&self) -> u64 {
        [(Feature::Syscall, efer::SCE), (Feature::LongMode, efer::LME), (Feature::Nx, efer::NXE)]
            .iter()
            .filter(|(f, _)| self.has(*f))
            .fold(0, |mask, (_, bits)| mask | bits)
    }
}

/// The host's CPUID with its own limits applied, so that a leaf it lacks reads as zero.
struct Host<'a> {
    cpuid: &'a dyn Fn(u32, u32) -> Leaf,
    max_basic: u32,
    max_extended: u32,
    max_leaf_7: u32,
}

impl<'a> Host<'a> {
    fn new(cpuid: &'a dyn Fn(u32, u32) -> Leaf) -> Self {
        let max_basic = cpuid(0, 0).eax;
        let max_leaf_7 = if max_basic >= 7 { cpuid(7, 0).eax } else { 0 };
        Host { cpuid, max_basic, max_extended: cpuid(0x8000_0000, 0).eax, max_leaf_7 }
    }

    fn leaf(&self, leaf: u32, subleaf: u32) -> Leaf {
        let there = match leaf {
            7 => self.max_basic >= 7 && subleaf <= self.max_leaf_7,
            0..0x8000_0000 => leaf <= self.max_basic,
            _ => leaf <= self.max_extended,
        };
        if there { (self.cpuid)(leaf, subleaf) } else { Leaf::default() }
    }

    fn has(&self, feature: Feature) -> bool {
        let info = feature.info();
        let leaf = self.leaf(info.leaf, info.subleaf);
        leaf.register(info.register) & 1 << info.bit != 0
    }
}

impl Leaf {
    fn register(&self, register: features::Register) -> u32 {
        match register {
            features::Register::Eax => self.eax,
            features::Register::Ebx => self.ebx,
            features::Register::Ecx => self.ecx,
            features::Register::Edx => self.edx,
        }
    }

    fn register_mut(&mut self, register: features::Register) -> &mut u32 {
        match register {
            features::Register::Eax => &mut self.eax,
            features::Register::Ebx => &mut self.ebx,
            features::Register::Ecx => &mut self.ecx,
            features::Register::Edx => &mut self.edx,
        }
    }
}

/// The features that `model` has on this host with this engine, or what it lacks.
fn offered(model: Model, host: &Host, engine: &EngineFeatures) -> Result<FeatureSet, Error> {
    let mut features = FeatureSet::EMPTY;
    let mut missing = Vec::new();
    for info in FEATURES.iter().filter(|i| i.level <= model.level()) {
        let runs = match info.kind {
            Kind::System | Kind::Hardware => engine.implements.has(info.feature),
            Kind::Native => host.has(info.feature) && !engine.declines.has(info.feature),
            Kind::Fact => host.has(info.feature),
        };
        let enabled = info.feature.state() & !engine.host_xcr0 == 0;
        if runs && enabled && info.needs.is_none_or(|n| features.has(n)) {
            features = features.with(info.feature);
        } else if info.kind == Kind::Native && info.level < Level::Host {
            missing.push(info.feature);
        }
    }
    // The host model is what there is; a level is a promise.
    if model != Model::Host && !missing.is_empty() {
        let missing = missing.into_iter().map(Feature::name).collect::<Vec<_>>().join(", ");
        return Err(Error::Missing { model, missing });
    }
    Ok(features)
}

#[cfg(test)]
mod tests;
