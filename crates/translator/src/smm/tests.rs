use arch::Vector;
use arch::registers::gpr;
use memory::map::Smram;

use super::*;
use crate::testing::{KERNEL_CS, PML4, execute, fault_of, kernel_vcpu, peek, poke, test_vcpu, user_vcpu};

const RSM: &[u8] = &[0x0f, 0xaa];
const SAVED: u64 = 0x3_0000 + AREA;

fn request_smi(cpu: &mut Vcpu) {
    cpu.shared.flag(request::SMI);
    cpu.take_events().unwrap();
}

/// All that a program can see and RSM restores.
fn visible(cpu: &Vcpu) -> arch::CpuState {
    arch::CpuState {
        gpr: cpu.gpr,
        rip: cpu.rip,
        rflags: cpu.rflags,
        segments: cpu.segments,
        ldtr: cpu.ldtr,
        tr: cpu.tr,
        gdtr: cpu.gdtr,
        idtr: cpu.idtr,
        cr0: cpu.cr0,
        cr2: cpu.cr2,
        cr3: cpu.cr3,
        cr4: cpu.cr4,
        dr: [cpu.dr[0], cpu.dr[1], cpu.dr[2], cpu.dr[3], cpu.dr6, cpu.dr7],
        msrs: vec![(arch::msr::EFER, cpu.msrs.efer)],
        activity: cpu.activity,
        nmi_blocked: cpu.nmi_blocked,
        smm: cpu.saved_smm(),
        ..arch::CpuState::reset()
    }
}

#[test]
fn an_smi_enters_a_flat_real_mode_at_smbase() {
    let mut cpu = user_vcpu();
    cpu.rflags |= rflags::IF | rflags::CF;
    cpu.cr0 |= cr0::TS | cr0::EM;
    request_smi(&mut cpu);
    assert!(cpu.smm.active && cpu.nmi_blocked);
    assert_eq!((cpu.rip, cpu.rflags, cpu.cr4, cpu.msrs.efer), (0x8000, rflags::FIXED, 0, 0));
    assert_eq!(cpu.cr0, cr0::WP | cr0::NE | cr0::ET);
    assert_eq!((cpu.dr7, cpu.code_bits(), cpu.cpl()), (0x400, 16, 0));
    let cs = cpu.seg(SegmentRegister::Cs);
    assert_eq!((cs.base, cs.selector, cs.limit), (0x3_0000, 0x3000, u32::MAX));
    let ss = cpu.seg(SegmentRegister::Ss);
    assert_eq!((ss.base, ss.selector, ss.limit, ss.default_big()), (0, 0, u32::MAX, false));
    assert_eq!(cpu.shared.requests.load(std::sync::atomic::Ordering::SeqCst) & request::SMI, 0);
}

#[test]
fn the_save_area_has_the_layout_that_firmware_reads() {
    let mut cpu = kernel_vcpu();
    cpu.gpr = std::array::from_fn(|i| 0x1111_1111_1111_1111 * i as u64);
    (cpu.rip, cpu.rflags) = (0xffff_8000_1234_5678, 0x246);
    let saved = cpu.cr3;
    request_smi(&mut cpu);
    let at = |offset: u64| peek(&cpu, 0x3_8000 + offset);
    assert_eq!(at(0x7efc) as u32, 0x2_0064);
    assert_eq!(at(0x7f00) as u32, 0x3_0000);
    assert_eq!([at(0x7ff8), at(0x7fc8), at(0x7f80)], [0, 0x6666_6666_6666_6666, u64::MAX]);
    assert_eq!([at(0x7f78), at(0x7f70), at(0x7f50)], [0xffff_8000_1234_5678, 0x246, saved]);
    assert_eq!(at(0x7f58), cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET);
    assert_eq!(at(0x7f48), cr4::PAE | cr4::PGE);
    assert_eq!(at(0x7ed0), efer::LME | efer::LMA | efer::NXE | efer::SCE);
    assert_eq!(at(0x7e10) & 0xffff_ffff, 0xa09b_0000 | u64::from(KERNEL_CS));
    assert_eq!((at(0x7e64) as u32, at(0x7e68)), (0x7f, crate::testing::GDT));
}

#[test]
fn rsm_restores_what_the_smi_found() {
    for mut cpu in [kernel_vcpu(), user_vcpu(), test_vcpu(8 << 20)] {
        cpu.gpr = std::array::from_fn(|i| 0x0123_4567_89ab_cdef << i);
        cpu.rip = 0x1234;
        cpu.dr6 |= 1;
        let before = visible(&cpu);
        request_smi(&mut cpu);
        cpu.gpr = [7; 16];
        cpu.cr3 = 0;
        execute(&mut cpu, RSM).unwrap();
        assert_eq!(visible(&cpu), before);
    }
}

#[test]
fn rsm_is_undefined_outside() {
    assert_eq!(fault_of(&mut kernel_vcpu(), RSM).vector, Vector::InvalidOpcode);
}

#[test]
fn the_handler_relocates_smbase_and_changes_registers() {
    let mut cpu = kernel_vcpu();
    request_smi(&mut cpu);
    cpu.phys_write(SAVED + SMBASE as u64, &0x12_3000u32.to_le_bytes());
    poke(&mut cpu, SAVED + RAX as u64, 0x55);
    execute(&mut cpu, RSM).unwrap();
    assert_eq!(cpu.gpr[gpr::RAX], 0x55);
    request_smi(&mut cpu);
    assert_eq!((cpu.seg(SegmentRegister::Cs).base, cpu.seg(SegmentRegister::Cs).selector), (0x12_3000, 0x2300));
    assert_eq!(peek(&cpu, 0x12_3000 + AREA + CR3 as u64), PML4);
}

#[test]
fn smbase_may_be_any_number_and_where_no_ram_is() {
    let mut cpu = kernel_vcpu();
    cpu.gpr[gpr::RAX] = 0x1234_5678;
    for base in [0x12_3457, 0x70_0000 - AREA as u32 + 0xf00, 0xfff0_0001, 0xfee0_0000 - AREA as u32, u32::MAX] {
        cpu.smm.base = base;
        request_smi(&mut cpu);
        assert_eq!(cpu.seg(SegmentRegister::Cs).base, u64::from(base));
        let left = execute(&mut cpu, RSM);
        let in_ram = u64::from(base) < 0x70_0000;
        assert!(!in_ram || left.is_ok() && cpu.gpr[gpr::RAX] == 0x1234_5678, "{base:#x}");
        cpu = kernel_vcpu();
        cpu.gpr[gpr::RAX] = 0x1234_5678;
    }
}

#[test]
fn an_impossible_state_shuts_the_processor_down() {
    for (at, value) in [(CR0, cr0::PG), (CR0, cr0::NW | cr0::PE), (CR4, 1 << 31), (CR4, 0), (EFER, 1 << 40)] {
        let mut cpu = kernel_vcpu();
        request_smi(&mut cpu);
        poke(&mut cpu, SAVED + at as u64, value);
        assert_eq!(execute(&mut cpu, RSM), Err(Stop::Exit(Exit::TripleFault)), "{at:#x}");
    }
}

#[test]
fn smis_nmis_and_init_wait_for_rsm() {
    let mut cpu = kernel_vcpu();
    request_smi(&mut cpu);
    cpu.shared.flag(request::SMI | request::INIT | request::SIPI | request::NMI);
    assert!(!cpu.event_deliverable());
    cpu.take_events().unwrap();
    assert!(cpu.smm.active && cpu.rip == 0x8000);
    execute(&mut cpu, RSM).unwrap();
    assert!(cpu.event_deliverable());
    cpu.shared.requests.fetch_and(!(request::INIT | request::SIPI), std::sync::atomic::Ordering::SeqCst);
    cpu.take_events().unwrap();
    assert!(cpu.smm.active, "an SMI comes before an NMI");
    execute(&mut cpu, RSM).unwrap();
    assert!(!cpu.nmi_blocked && cpu.shared.take_nmi());
    cpu.shared.flag(request::INIT);
    cpu.take_events().unwrap();
    assert_eq!((cpu.rip, cpu.smm.base), (0xfff0, 0x3_0000));
}

#[test]
fn an_smi_waits_for_the_instruction_behind_sti_and_for_the_start_of_a_processor() {
    let mut cpu = kernel_vcpu();
    cpu.interrupt_shadow = true;
    request_smi(&mut cpu);
    assert!(!cpu.smm.active);
    cpu.interrupt_shadow = false;
    cpu.activity = Activity::WaitForSipi;
    assert!(!cpu.event_deliverable());
    cpu.take_events().unwrap();
    assert!(!cpu.smm.active);
    cpu.shared.flag(request::SIPI);
    cpu.take_events().unwrap();
    assert!(cpu.smm.active);
    execute(&mut cpu, RSM).unwrap();
    assert_eq!((cpu.rip, cpu.activity), (0, Activity::Running));
}

#[test]
fn a_halted_processor_halts_again_unless_the_handler_says_no() {
    for again in [true, false] {
        let mut cpu = kernel_vcpu();
        cpu.activity = Activity::Halted;
        request_smi(&mut cpu);
        assert_eq!(cpu.activity, Activity::Running);
        if !again {
            cpu.phys_write(SAVED + HALT_RESTART as u64, &[0]);
        }
        execute(&mut cpu, RSM).unwrap();
        assert_eq!(cpu.activity, if again { Activity::Halted } else { Activity::Running });
    }
}

#[test]
fn nmis_that_were_blocked_stay_blocked_and_a_debug_trap_comes_after() {
    let mut cpu = kernel_vcpu();
    cpu.nmi_blocked = true;
    cpu.pending_debug = debug::DR6_BS;
    request_smi(&mut cpu);
    assert_eq!(cpu.pending_debug, 0);
    execute(&mut cpu, RSM).unwrap();
    assert!(cpu.nmi_blocked);
    assert_eq!(cpu.pending_debug, debug::DR6_BS);
}

#[test]
fn smram_is_there_in_its_mode_only() {
    let mut cpu = kernel_vcpu();
    let ram = cpu.machine.ram.clone();
    poke(&mut cpu, 0x70_0000, 0x1122_3344);
    ram.map().set_smram(&[Smram { start: 0x70_0000, size: 0x10_0000, ram: 0x70_0000, open: false }]);
    cpu.follow_map();
    poke(&mut cpu, 0x70_0000, 5);
    assert_eq!(peek(&cpu, 0x70_0000), u64::MAX);
    request_smi(&mut cpu);
    assert_eq!(peek(&cpu, 0x70_0000), 0x1122_3344);
    execute(&mut cpu, RSM).unwrap();
    assert_eq!(peek(&cpu, 0x70_0000), u64::MAX);
}

#[test]
fn the_state_of_a_processor_in_smm_can_be_taken_elsewhere() {
    let mut cpu = kernel_vcpu();
    cpu.nmi_blocked = true;
    request_smi(&mut cpu);
    cpu.shared.flag(request::SMI);
    let smm = cpu.saved_smm();
    assert!(smm.active && smm.pending && smm.nmis_were_blocked);
    let mut other = kernel_vcpu();
    other.restore_smm(&smm);
    assert_eq!(other.saved_smm(), smm);
}

#[test]
fn without_paging_addresses_are_known_across_smm_unless_something_changed_what_they_are() {
    fn vcpu() -> crate::vcpu::VcpuBox {
        let mut cpu = test_vcpu(8 << 20);
        let smram = Smram { start: 0xa_0000, size: 0x2_0000, ram: 0xa_0000, open: false };
        cpu.machine.ram.clone().map().set_smram(&[smram]);
        cpu.follow_map();
        cpu.smm.base = 0xa_0000;
        touch(&mut cpu, 0x9000);
        request_smi(&mut cpu);
        touch(&mut cpu, 0xa_9000);
        cpu
    }
    fn touch(cpu: &mut Vcpu, va: u64) {
        cpu.write_sized(va, 8, 1, cpu.context()).unwrap();
    }
    fn known(cpu: &Vcpu) -> [bool; 2] {
        [0x9000, 0xa_9000].map(|va| cpu.tlb.entry(cpu.context(), va).host_address(va, 8, true).is_some())
    }
    let mut cpu = vcpu();
    assert_eq!(known(&cpu), [false, true]);
    execute(&mut cpu, RSM).unwrap();
    assert_eq!(known(&cpu), [true, false], "SMRAM is there in the mode only");
    request_smi(&mut cpu);
    assert_eq!(known(&cpu), [false, true]);
    cpu.machine.ram.clone().map().set_smram(&[]);
    cpu.follow_map();
    execute(&mut cpu, RSM).unwrap();
    assert_eq!(known(&cpu), [false, false], "the map changed");
    for (at, value) in [(DR7, 0x401), (CR0, cr0::PG | cr0::PE)] {
        let mut cpu = vcpu();
        poke(&mut cpu, 0xa_0000 + AREA + at as u64, value);
        execute(&mut cpu, RSM).unwrap();
        assert_eq!(known(&cpu), [false, false], "{at:#x}");
        request_smi(&mut cpu);
        assert_eq!(known(&cpu), [false, false], "{at:#x}");
    }
}
