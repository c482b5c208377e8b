//! Rules of CPUID, checked against a made-up host.

use super::*;

/// An Intel server with AVX-512 and protection keys.
fn host(leaf: u32, subleaf: u32) -> Leaf {
    let l = |eax, ebx, ecx, edx| Leaf { eax, ebx, ecx, edx };
    match (leaf, subleaf) {
        (0, _) => l(0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69),
        (1, _) => l(0x000a_06f1, 0x0710_0800, u32::MAX, u32::MAX),
        (2, _) => l(0x00fe_ff01, 0xf0, 0, 0),
        (4, 0) => l(0x7c00_4121, 0x02c0_003f, 0x3f, 0),
        (4, 1) => l(0x7c00_4143, 0x03c0_003f, 0x7ff, 0),
        (4, 2) => l(0x7c0f_c163, 0x0380_003f, 0xffff, 4),
        (7, 0) => l(2, u32::MAX, u32::MAX, u32::MAX),
        (7, _) => l(u32::MAX, u32::MAX, u32::MAX, u32::MAX),
        (0xd, 0) => l(0x602e7, 0x2b00, 0x2b00, 0),
        (0xd, 1) => l(0x1f, 0, 0x1900, 0),
        (0xd, 2) => l(256, 576, 0, 0),
        (0xd, 5) => l(64, 1088, 0, 0),
        (0xd, 6) => l(512, 1152, 0, 0),
        (0xd, 7) => l(1024, 1664, 0, 0),
        (0xd, 9) => l(8, 2688, 0, 0),
        (0x8000_0000, _) => l(0x8000_0008, 0, 0, 0),
        (0x8000_0001, _) => l(0, 0, u32::MAX, u32::MAX),
        (0x8000_0002, _) => l(0x2065_6854, 0x74736f68, 0, 0),
        (0x8000_0006, _) => l(0, 0, 0x0100_6040, 0),
        (0x8000_0007, _) => l(0, 0, 0, 0x100),
        (0x8000_0008, _) => l(0x3934, 0, 0, 0),
        _ => Leaf::default(),
    }
}

const HOST_XCR0: u64 = 0x2e7;

fn engine() -> EngineFeatures {
    EngineFeatures {
        implements: FeatureSet::system(),
        declines: FeatureSet::EMPTY,
        host_xcr0: HOST_XCR0,
        physical_bits: 46,
        arch_capabilities: capabilities::TRANSLATED,
        translated: true,
    }
}

fn model(kind: Model, cpus: u32) -> CpuModel {
    CpuModel::new(kind, &host, &engine(), Topology::of_cores(cpus), 2_600_000).unwrap()
}

fn state() -> Dynamic {
    Dynamic { apic_id: 0, apic_enabled: true, cr4: 0, xcr0: 1, xss: 0 }
}

#[test]
fn leaves_beyond_the_last_repeat_the_highest_basic_one() {
    let cpu = model(Model::Host, 2);
    let highest = cpu.leaf(0x1f, 1, &state());
    assert_ne!(highest, Leaf::default());
    for leaf in [0x20, 0x1000, 0x3fff_ffff, 0x4000_0100, 0x7fff_ffff, 0x8000_0009, u32::MAX] {
        assert_eq!(cpu.leaf(leaf, 1, &state()), highest, "{leaf:#x}");
    }
}

#[test]
fn unknown_subleaves_are_zero() {
    let cpu = model(Model::Host, 2);
    for (leaf, subleaf) in [(4, 9), (7, 3), (0xd, 3), (0xd, 17), (0xd, 63), (5, 0), (0xa, 0), (0x14, 0), (0x12, 0)] {
        assert_eq!(cpu.leaf(leaf, subleaf, &state()), Leaf::default(), "{leaf:#x}/{subleaf}");
    }
}

#[test]
fn subleaf_is_ignored_where_there_are_none() {
    let cpu = model(Model::Host, 2);
    assert_eq!(cpu.leaf(1, 77, &state()), cpu.leaf(1, 0, &state()));
    assert_eq!(cpu.leaf(0x8000_0001, 77, &state()), cpu.leaf(0x8000_0001, 0, &state()));
}

#[test]
fn control_registers_are_mirrored() {
    let cpu = model(Model::Host, 1);
    let on = Dynamic { cr4: cr4::OSXSAVE | cr4::PKE, ..state() };
    assert_eq!(cpu.leaf(1, 0, &state()).ecx & 1 << 27, 0);
    assert_ne!(cpu.leaf(1, 0, &on).ecx & 1 << 27, 0);
    assert_eq!(cpu.leaf(7, 0, &state()).ecx & 1 << 4, 0);
    assert_ne!(cpu.leaf(7, 0, &on).ecx & 1 << 4, 0);
}

#[test]
fn a_disabled_apic_takes_its_feature_bit_with_it() {
    let cpu = model(Model::Host, 1);
    assert_ne!(cpu.leaf(1, 0, &state()).edx & 1 << 9, 0);
    assert_eq!(cpu.leaf(1, 0, &Dynamic { apic_enabled: false, ..state() }).edx & 1 << 9, 0);
}

#[test]
fn xsave_sizes_follow_xcr0() {
    let cpu = model(Model::Host, 1);
    let size = |xcr0| cpu.leaf(0xd, 0, &Dynamic { xcr0, ..state() }).ebx;
    assert_eq!(size(1), 576);
    assert_eq!(size(3), 576);
    assert_eq!(size(7), 832);
    assert_eq!(size(0xe7), 2688);
    assert_eq!(size(0x2e7), 2696);
    let all = cpu.leaf(0xd, 0, &state());
    assert_eq!((all.eax, all.edx, all.ecx), (0x2e7, 0, 2696));
    let compacted = |xcr0| cpu.leaf(0xd, 1, &Dynamic { xcr0, ..state() }).ebx;
    assert_eq!(compacted(7), 832);
    assert_eq!(compacted(0x207), 840);
    assert_eq!(compacted(0x2e7), 576 + 256 + 64 + 512 + 1024 + 8);
}

#[test]
fn tile_and_shadow_stack_state_is_never_there() {
    let cpu = model(Model::Host, 1);
    assert_eq!(cpu.xcr0_mask(), 0x2e7);
    assert_eq!(cpu.leaf(0xd, 1, &state()).ecx, 0);
}

#[test]
fn protection_keys_without_the_hosts_get_room_behind_all_else() {
    let without = |leaf, subleaf| match (leaf, subleaf) {
        (0xd, 9) => Leaf::default(),
        _ => host(leaf, subleaf),
    };
    let cpu = CpuModel::new(Model::Host, &without, &engine(), Topology::of_cores(1), 1_000_000).unwrap();
    assert_eq!(cpu.leaf(0xd, 9, &state()), Leaf { eax: 8, ebx: 2688, ecx: 0, edx: 0 });
}

#[test]
fn state_that_the_hosts_kernel_has_not_enabled_hides_its_features() {
    let engine = EngineFeatures { host_xcr0: 7, ..engine() };
    let cpu = CpuModel::new(Model::Host, &host, &engine, Topology::of_cores(1), 1_000_000).unwrap();
    assert!(cpu.has(Feature::Avx2) && !cpu.has(Feature::Avx512f) && !cpu.has(Feature::Avx512vbmi));
    let error = CpuModel::new(Model::V4, &host, &engine, Topology::of_cores(1), 1_000_000).unwrap_err().to_string();
    assert!(error.contains("x86-64-v4") && error.contains("avx512f"), "{error}");
}

#[test]
fn system_features_do_not_need_the_hosts() {
    let bare = |leaf, subleaf| match leaf {
        7 => Leaf { ebx: 0, ecx: 0, edx: 0, ..host(leaf, subleaf) },
        _ => host(leaf, subleaf),
    };
    let cpu = CpuModel::new(Model::Host, &bare, &engine(), Topology::of_cores(1), 1_000_000).unwrap();
    for feature in [Feature::Smep, Feature::Smap, Feature::Umip, Feature::Fsgsbase, Feature::Invpcid, Feature::Pku] {
        assert!(cpu.has(feature), "{}", feature.name());
    }
    assert!(!cpu.has(Feature::Avx2));
}

#[test]
fn what_an_engine_declines_goes_with_all_that_needs_it() {
    let engine = EngineFeatures { declines: FeatureSet::EMPTY.with(Feature::Avx), ..engine() };
    let cpu = CpuModel::new(Model::Host, &host, &engine, Topology::of_cores(1), 1_000_000).unwrap();
    assert!(!cpu.has(Feature::Avx) && !cpu.has(Feature::Vaes) && !cpu.has(Feature::Avx512bf16));
    assert_eq!(cpu.xcr0_mask(), 0x203);
}

#[test]
fn levels_have_what_the_psabi_says_and_no_more() {
    let v2 = model(Model::V2, 1);
    assert!(v2.has(Feature::Sse42) && v2.has(Feature::Cx16) && v2.has(Feature::Popcnt) && v2.has(Feature::LahfLm));
    assert!(!v2.has(Feature::Xsave) && !v2.has(Feature::Aes) && !v2.has(Feature::Rdrand) && !v2.has(Feature::Pku));
    assert_eq!(v2.leaf(0xd, 0, &state()), Leaf::default());
    let v3 = model(Model::V3, 1);
    assert!(v3.has(Feature::Avx2) && v3.has(Feature::Movbe) && v3.has(Feature::Lzcnt) && v3.has(Feature::Bmi2));
    assert!(!v3.has(Feature::Avx512f) && !v3.has(Feature::Sha));
    let v4 = model(Model::V4, 1);
    assert!(v4.has(Feature::Avx512vl) && !v4.has(Feature::Avx512vbmi));
}

#[test]
fn what_is_not_in_the_whitelist_is_hidden() {
    let cpu = model(Model::Host, 2);
    let basic = cpu.leaf(1, 0, &state());
    for bit in [2, 3, 4, 5, 6, 7, 8, 15] {
        assert_eq!(basic.ecx & 1 << bit, 0, "leaf 1 ECX bit {bit}");
    }
    let seven = cpu.leaf(7, 0, &state());
    // HLE, RTM, MPX, SGX, PT
    assert_eq!(seven.ebx & (1 << 4 | 1 << 11 | 1 << 14 | 1 << 2 | 1 << 25), 0);
    // WAITPKG, CET_SS, LA57, KL, ENQCMD, PKS
    assert_eq!(seven.ecx & (1 << 5 | 1 << 7 | 1 << 16 | 1 << 23 | 1 << 29 | 1 << 31), 0);
    // UINTR, MD_CLEAR, CET_IBT, AMX, STIBP, L1D_FLUSH, SSBD
    assert_eq!(
        seven.edx & (1 << 5 | 1 << 10 | 1 << 20 | 7 << 22 & !(1 << 23) | 1 << 25 | 1 << 27 | 1 << 28 | 1 << 31),
        0
    );
    // The last sub-leaf: all that 7/2 has is BHI_CTRL.
    assert_eq!(seven.eax, 2);
    assert_eq!(cpu.leaf(7, 2, &state()), Leaf { edx: 1 << 4, ..Leaf::default() });
    // SVM
    assert_eq!(cpu.leaf(0x8000_0001, 0, &state()).ecx & 1 << 2, 0);
}

#[test]
fn flushes_and_predictor_controls_are_shown_where_the_processor_itself_runs_the_guest() {
    let engine = EngineFeatures {
        implements: FeatureSet::system().iter().chain(FeatureSet::hardware().iter()).collect(),
        ..engine()
    };
    let cpu = CpuModel::new(Model::Host, &host, &engine, Topology::of_cores(1), 2_600_000).unwrap();
    let bits = 1 << 10 | 1 << 27 | 1 << 28 | 1 << 31;
    assert_eq!(cpu.leaf(7, 0, &state()).edx & bits, bits);
    assert_eq!(cpu.leaf(0x8000_0008, 0, &state()).ebx, 1 << 12 | 1 << 14 | 1 << 15 | 1 << 24);
    // A level is the same on every engine.
    let level = CpuModel::new(Model::V3, &host, &engine, Topology::of_cores(1), 2_600_000).unwrap();
    assert_eq!(level.leaf(7, 0, &state()).edx & bits, 0);
}

#[test]
fn every_processor_is_a_core_of_one_package() {
    for cpus in [1, 2, 3, 8, 300] {
        let cpu = model(Model::Host, cpus);
        let me = Dynamic { apic_id: cpus - 1, ..state() };
        for leaf in [0xb, 0x1f] {
            let (smt, core, end) = (cpu.leaf(leaf, 0, &me), cpu.leaf(leaf, 1, &me), cpu.leaf(leaf, 2, &me));
            assert_eq!((smt.eax, smt.ebx, smt.ecx), (0, 1, 0x100));
            assert_eq!((core.ebx, core.ecx), (cpus, 0x201));
            assert!(1 << core.eax >= cpus, "all ids of the package fit under the shift");
            assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
            assert!([smt, core, end].iter().all(|l| l.edx == cpus - 1));
        }
        let basic = cpu.leaf(1, 0, &me);
        assert_eq!(basic.ebx >> 24, (cpus - 1) & 0xff);
        assert_eq!(basic.edx >> 28 & 1, u32::from(cpus > 1));
        assert_eq!(basic.ebx >> 8 & 0xff, 8, "CLFLUSH line size is the host's");
    }
}

#[test]
fn sockets_are_packages_of_their_own_and_threads_share_a_core() {
    let shape = |sockets, cores, threads| {
        let topology = Topology::new(sockets, cores, threads).unwrap();
        CpuModel::new(Model::Host, &host, &engine(), topology, 2_600_000).unwrap()
    };
    // Two packages: neither has a second processor. Firmware that lists only the first of each lists both.
    let cpu = shape(2, 1, 1);
    let basic = cpu.leaf(1, 0, &state());
    assert_eq!((basic.edx >> 28 & 1, basic.ebx >> 16 & 0xff), (0, 1));
    assert_eq!((cpu.leaf(0xb, 1, &state()).eax, cpu.leaf(0xb, 1, &state()).ebx), (0, 1));
    assert_eq!(cpu.leaf(4, 2, &state()).eax >> 14 & 0xfff, 0, "the last level is the package's");
    // Two packages of two cores with two threads.
    let cpu = shape(2, 2, 2);
    let basic = cpu.leaf(1, 0, &state());
    assert_eq!((basic.edx >> 28 & 1, basic.ebx >> 16 & 0xff), (1, 4));
    let (smt, core) = (cpu.leaf(0xb, 0, &state()), cpu.leaf(0xb, 1, &state()));
    assert_eq!((smt.eax, smt.ebx, core.eax, core.ebx), (1, 2, 2, 4));
    let (first, last) = (cpu.leaf(4, 0, &state()).eax, cpu.leaf(4, 2, &state()).eax);
    assert_eq!((first >> 14 & 0xfff, last >> 14 & 0xfff, last >> 26), (1, 3, 1));
}

#[test]
fn private_caches_are_private_and_the_last_level_is_shared() {
    let cpu = model(Model::Host, 4);
    assert_eq!(cpu.leaf(4, 0, &state()).eax >> 14 & 0xfff, 0);
    assert_eq!(cpu.leaf(4, 2, &state()).eax >> 14 & 0xfff, 3);
    assert_eq!(cpu.leaf(4, 2, &state()).eax >> 26, 3);
}

#[test]
fn the_tsc_frequency_is_right_where_kernels_calculate_it_in_32_bits() {
    for khz in [1_000_000u32, 2_600_000, 2_599_990, 3_999_975, 4_200_000, 4_294_967, 5_711_113, 800_001] {
        let cpu = CpuModel::new(Model::Host, &host, &engine(), Topology::of_cores(1), khz).unwrap();
        let ratio = cpu.leaf(0x15, 0, &state());
        let computed = (ratio.ecx / 1000).checked_mul(ratio.ebx).expect("no overflow") / ratio.eax;
        assert!(computed.abs_diff(khz) <= khz / 40_000, "{khz} became {computed}");
        assert_eq!(cpu.leaf(0x4000_0010, 0, &state()).eax, khz);
    }
}

#[test]
fn the_apic_timer_counts_nanoseconds_as_firmware_takes_for_granted() {
    let cpu = model(Model::Host, 1);
    assert_eq!(cpu.leaf(0x15, 0, &state()).ecx, 1_000_000_000);
    assert_eq!(cpu.leaf(0x4000_0010, 0, &state()).ebx, 1_000_000);
}

#[test]
fn kvm_signature_and_clock_are_announced() {
    let cpu = model(Model::Host, 1);
    let base = cpu.leaf(0x4000_0000, 0, &state());
    let text: Vec<u8> = [base.ebx, base.ecx, base.edx].into_iter().flat_map(u32::to_le_bytes).collect();
    assert_eq!(text, b"KVMKVMKVM\0\0\0");
    assert_eq!(base.eax, 0x4000_0010);
    assert_eq!(cpu.leaf(0x4000_0001, 0, &state()).eax, 0x0100_800b);
    assert_eq!(cpu.leaf(0x4000_0002, 0, &state()), Leaf::default());
}

#[test]
fn addresses_are_as_wide_as_the_engine_says_and_linear_ones_48_bits() {
    assert_eq!(model(Model::Host, 1).leaf(0x8000_0008, 0, &state()).eax, 46 | 48 << 8);
}

#[test]
fn model_names_round_trip_and_others_are_refused_with_the_choices() {
    for model in [Model::Host, Model::V2, Model::V3, Model::V4] {
        assert_eq!(model.name().parse(), Ok(model));
    }
    let error = "pentium".parse::<Model>().unwrap_err().to_string();
    assert!(error.contains("pentium") && error.contains("x86-64-v3"));
}

#[test]
fn cr4_bits_follow_features() {
    let all = model(Model::Host, 1).cr4_mask();
    assert_eq!(all & (cr4::PKE | cr4::SMAP | cr4::OSXSAVE | cr4::LA57), cr4::PKE | cr4::SMAP | cr4::OSXSAVE);
    assert_eq!(model(Model::V2, 1).cr4_mask() & (cr4::OSXSAVE | cr4::PKE), 0);
}

#[test]
fn amd_processors_read_zero_where_there_is_no_leaf_and_mirror_basic_features() {
    let amd = |leaf, subleaf| match leaf {
        0 => Leaf { eax: 0x10, ebx: leaves::AMD.0, ecx: leaves::AMD.2, edx: leaves::AMD.1 },
        4 => Leaf::default(),
        _ => host(leaf, subleaf),
    };
    let cpu = CpuModel::new(Model::Host, &amd, &engine(), Topology::of_cores(3), 2_000_000).unwrap();
    assert_eq!(cpu.leaf(0x1000, 0, &state()), Leaf::default());
    assert_eq!(cpu.leaf(0x8000_0022, 0, &state()), Leaf::default());
    assert_eq!(cpu.leaf(0x8000_0001, 0, &state()).edx & 0x3ff, cpu.leaf(1, 0, &state()).edx & 0x3ff);
    let sizes = cpu.leaf(0x8000_0008, 0, &state());
    assert_eq!((sizes.ebx, sizes.ecx), (capabilities::AMD_BTC_NO, 2 | 2 << 12));
    // A guest that is told so does not clear buffers on each way to a program.
    assert_eq!(cpu.leaf(0x8000_0021, 0, &state()).ecx, capabilities::AMD_TSA_NO);
}
