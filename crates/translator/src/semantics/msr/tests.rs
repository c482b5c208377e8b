//! RDMSR and WRMSR as a kernel meets them.

use super::*;
use crate::testing::{execute, fault_of, kernel_vcpu, user_vcpu};
use arch::Vector;
use arch::registers::gpr::{RAX, RCX, RDX};

const RDMSR: &[u8] = &[0x0f, 0x32];
const WRMSR: &[u8] = &[0x0f, 0x30];

fn good(cpu: &mut Vcpu, index: u32, value: u64) {
    cpu.write_msr(index, value).unwrap_or_else(|e| panic!("{index:#x} = {value:#x}: {e:?}"));
    assert_eq!(cpu.read_msr(index), Ok(value), "{index:#x}");
}

fn bad(cpu: &mut Vcpu, index: u32, value: u64) {
    assert_eq!(cpu.write_msr(index, value), Err(fault()), "{index:#x} = {value:#x}");
}

#[test]
fn values_travel_in_edx_and_eax() {
    let mut cpu = kernel_vcpu();
    cpu.gpr[RCX] = 0xdead_0000_0000 | u64::from(msr::STAR);
    (cpu.gpr[RDX], cpu.gpr[RAX]) = (0xffff_ffff_0023_0010, 0xaaaa_bbbb_1234_5678);
    execute(&mut cpu, WRMSR).unwrap();
    assert_eq!(cpu.msrs.star, 0x0023_0010_1234_5678);
    (cpu.gpr[RDX], cpu.gpr[RAX]) = (u64::MAX, u64::MAX);
    execute(&mut cpu, RDMSR).unwrap();
    assert_eq!((cpu.gpr[RDX], cpu.gpr[RAX]), (0x0023_0010, 0x1234_5678));
}

#[test]
fn programs_get_no_msr() {
    let mut cpu = user_vcpu();
    cpu.gpr[RCX] = u64::from(msr::TSC);
    assert_eq!(fault_of(&mut cpu, RDMSR).vector, Vector::GeneralProtection);
    assert_eq!(fault_of(&mut cpu, WRMSR).vector, Vector::GeneralProtection);
}

#[test]
fn unknown_and_read_only_msrs_fault() {
    let mut cpu = kernel_vcpu();
    for index in [0xc001_0000, 0x400, 0x17b, 0x1ff, 0x210, msr::PRED_CMD, msr::KVM_STEAL_TIME, msr::KVM_PV_EOI_EN] {
        assert_eq!(cpu.read_msr(index), Err(fault()), "{index:#x}");
    }
    for index in [0xc001_0000, 0x400, msr::MCG_CAP, msr::MTRR_CAP, msr::ARCH_CAPABILITIES, msr::FEATURE_CONTROL] {
        bad(&mut cpu, index, 0);
    }
}

#[test]
fn addresses_must_be_canonical_and_upper_halves_clear() {
    let mut cpu = kernel_vcpu();
    for index in
        [msr::LSTAR, msr::CSTAR, msr::FS_BASE, msr::GS_BASE, msr::KERNEL_GS_BASE, msr::SYSENTER_ESP, msr::SYSENTER_EIP]
    {
        good(&mut cpu, index, 0xffff_8000_0000_1000);
        bad(&mut cpu, index, 0x0000_8000_0000_0000);
    }
    for index in [msr::SFMASK, msr::TSC_AUX] {
        good(&mut cpu, index, 0x47700);
        bad(&mut cpu, index, 1 << 32);
    }
}

#[test]
fn efer_keeps_lma_and_forbids_lme_changes_under_paging() {
    let mut cpu = kernel_vcpu();
    let all = efer::LME | efer::LMA | efer::NXE | efer::SCE;
    good(&mut cpu, msr::EFER, all);
    cpu.write_msr(msr::EFER, all & !efer::LMA).unwrap();
    assert_eq!(cpu.msrs.efer, all);
    bad(&mut cpu, msr::EFER, all & !efer::LME);
    bad(&mut cpu, msr::EFER, all | 1 << 1);
    bad(&mut cpu, msr::EFER, all | 1 << 14);
}

#[test]
fn memory_types_are_checked() {
    let mut cpu = kernel_vcpu();
    good(&mut cpu, msr::PAT, 0x0407_0506_0007_0406);
    bad(&mut cpu, msr::PAT, 0x0002_0406_0007_0406);
    good(&mut cpu, msr::MTRR_DEF_TYPE, 0xc06);
    bad(&mut cpu, msr::MTRR_DEF_TYPE, 0xc02);
    bad(&mut cpu, msr::MTRR_DEF_TYPE, 0x1000);
    good(&mut cpu, msr::MTRR_PHYS_BASE0, 0x8000_0006);
    bad(&mut cpu, msr::MTRR_PHYS_BASE0, 0x8000_0007);
    good(&mut cpu, msr::MTRR_PHYS_BASE0 + 1, 0xff_8000_0800);
    bad(&mut cpu, msr::MTRR_PHYS_BASE0 + 1, 1 << 52);
    good(&mut cpu, msr::MTRR_FIX_4K_C0000 + 7, 0x0606_0606_0606_0606);
    bad(&mut cpu, msr::MTRR_FIX_64K, 3);
}

#[test]
fn writing_the_tsc_adjusts_it() {
    let mut cpu = kernel_vcpu();
    cpu.write_msr(msr::TSC, 1 << 60).unwrap();
    let tsc = cpu.read_msr(msr::TSC).unwrap();
    assert!((1 << 60..(1 << 60) + (1 << 40)).contains(&tsc));
    assert_ne!(cpu.read_msr(msr::TSC_ADJUST), Ok(0));
    cpu.write_msr(msr::TSC_ADJUST, 0).unwrap();
    assert!(cpu.read_msr(msr::TSC).unwrap() < 1 << 59);
}

#[test]
fn the_kvm_clock_gives_the_time_since_the_machine_was_made() {
    let mut cpu = kernel_vcpu();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let word = |cpu: &Vcpu, at: u64| crate::testing::peek(cpu, at);
    cpu.write_msr(msr::KVM_SYSTEM_TIME_NEW, 0x9000 | 1).unwrap();
    let (version, mul_shift) = (word(&cpu, 0x9000) as u32, word(&cpu, 0x9018));
    assert!(version != 0 && version % 2 == 0);
    let (mul, shift, flags) = (mul_shift as u32, (mul_shift >> 32) as i8, (mul_shift >> 40) as u8);
    assert_eq!(flags, 1);
    let ticks = u128::from(cpu.guest_tsc() - word(&cpu, 0x9008));
    let shifted = if shift < 0 { ticks >> -shift } else { ticks << shift };
    let ns = ((shifted * u128::from(mul)) >> 32) as u64 + word(&cpu, 0x9010);
    let real = cpu.machine.time.clocks().paravirtual;
    assert!(real.abs_diff(ns) < 10_000_000, "{ns} {real}");
    assert!(ns > 20_000_000, "{ns}");
    let begin = word(&cpu, 0x9008);
    cpu.write_msr(msr::TSC_ADJUST, 12345).unwrap();
    assert_eq!(word(&cpu, 0x9008), begin + 12345);
    assert!(word(&cpu, 0x9000) as u32 > version);
}

#[test]
fn the_wall_clock_is_the_time_of_day_less_the_kvm_clock() {
    let mut cpu = kernel_vcpu();
    cpu.write_msr(msr::KVM_WALL_CLOCK_NEW, 0x9ffc).unwrap();
    let mut seconds = [0; 4];
    cpu.phys_read(0xa000, &mut seconds);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!(now.abs_diff(u64::from(u32::from_le_bytes(seconds))) <= 2);
}

#[test]
fn a_clock_outside_of_ram_is_ignored() {
    let mut cpu = kernel_vcpu();
    for gpa in [0xfee0_0000, u64::MAX, 0x7f_fff0, 1 << 45] {
        cpu.write_msr(msr::KVM_SYSTEM_TIME_NEW, gpa | 1).unwrap();
        cpu.write_msr(msr::KVM_WALL_CLOCK_NEW, gpa).unwrap();
    }
}

#[test]
fn an_amd_kernel_finds_what_it_reads_without_asking() {
    use arch::cpuid::{CpuModel, EngineFeatures, FeatureSet, Leaf, Model, Topology};
    let vendor = |leaf: u32, subleaf: u32| match leaf {
        0 => Leaf { eax: 0x10, ebx: 0x6874_7541, edx: 0x6974_6e65, ecx: 0x444d_4163 },
        _ => crate::host::cpuid(leaf, subleaf),
    };
    let engine = EngineFeatures {
        implements: FeatureSet::system(),
        declines: FeatureSet::EMPTY,
        host_xcr0: 7,
        physical_bits: 46,
        arch_capabilities: 0,
        translated: true,
    };
    let cpuid = CpuModel::new(Model::Host, &vendor, &engine, Topology::default(), 2_000_000).unwrap();
    let ram = memory::Ram::new(4 << 20).unwrap();
    let machine = crate::shared::Machine::new(ram, Default::default(), cpuid, Default::default());
    let mut cpu = crate::vcpu::VcpuBox::new(0, std::sync::Arc::new(machine)).unwrap();
    for index in [0xc001_0010, 0xc001_0015, 0xc001_001a, 0xc001_001d, 0xc001_1029] {
        let value = cpu.read_msr(index).unwrap();
        cpu.write_msr(index, value).unwrap();
    }
    assert_eq!(cpu.read_msr(0xc001_0015), Ok(1 << 24));
    bad(&mut cpu, 0xc001_001a, 5);
    assert_eq!(cpu.read_msr(0xc001_0020), Err(fault()));
}

#[test]
fn misc_enable_can_hide_no_execute() {
    let mut cpu = kernel_vcpu();
    let shown = |cpu: &crate::Vcpu| cpu.cpuid(0x8000_0001, 0).edx >> 20 & 1;
    assert_eq!(shown(&cpu), 1);
    cpu.write_msr(msr::MISC_ENABLE, 1 << 34 | 1 << 18 | 1).unwrap();
    assert_eq!(cpu.read_msr(msr::MISC_ENABLE), Ok(1 << 34 | 1 << 18 | 1 << 12 | 1 << 11 | 1));
    assert_eq!(shown(&cpu), 0);
    let efer = cpu.read_msr(msr::EFER).unwrap();
    bad(&mut cpu, msr::EFER, efer | arch::registers::efer::NXE);
    cpu.write_msr(msr::MISC_ENABLE, 1).unwrap();
    assert_eq!(shown(&cpu), 1);
}

#[test]
fn saved_msrs_restore_to_the_same() {
    let mut cpu = kernel_vcpu();
    for (index, value) in [
        (msr::STAR, 5),
        (msr::LSTAR, 0xffff_ffff_8000_0000),
        (msr::MTRR_DEF_TYPE, 0xc06),
        (msr::MTRR_PHYS_BASE0 + 3, 0x800),
        (msr::PAT, 6),
        (msr::MISC_ENABLE, 1),
    ] {
        cpu.write_msr(index, value).unwrap();
    }
    let saved = cpu.saved_msrs();
    let mut other = crate::testing::test_vcpu(8 << 20);
    other.restore_msrs(&saved).unwrap();
    assert_eq!(other.saved_msrs(), saved);
    assert_eq!(other.msrs.efer, cpu.msrs.efer);
    assert_eq!(other.restore_msrs(&[(0x400, 1)]), Err((0x400, 1)));
}
