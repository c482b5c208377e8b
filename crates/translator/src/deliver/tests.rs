//! Delivery as handlers see it.

use arch::registers::{cr0, cr4, debug, gpr, pte, rflags};
use arch::state::DescriptorTable;
use arch::{Exception, Segment, SegmentRegister, Vector};
use engine::Exit;

use super::{Event, deliver};
use crate::cpu::{Stop, Vcpu};
use crate::testing::{
    CODE32, DATA, GDT, IDT, KERNEL_CS, KERNEL_SS, KERNEL_STACK, PT, TSS, TSS_SELECTOR, USER, USER_CS, USER_SS,
    kernel_vcpu, peek, poke, set_gate, test_vcpu, user_vcpu,
};
use crate::vcpu::VcpuBox;

const INTERRUPT: u64 = 14;
const TRAP: u64 = 15;
const HANDLER: u64 = 0xffff_8000_0001_2340;

fn cs(cpu: &Vcpu) -> u16 {
    cpu.seg(SegmentRegister::Cs).selector
}

/// The quadwords on the stack, from the top.
fn frame(cpu: &Vcpu, count: u64) -> Vec<u64> {
    (0..count).map(|i| peek(cpu, cpu.gpr[gpr::RSP] + 8 * i)).collect()
}

#[test]
fn a_fault_in_a_program_comes_in_on_the_stack_of_the_tss() {
    let mut cpu = user_vcpu();
    set_gate(&mut cpu, 14, HANDLER, INTERRUPT, 0, 0);
    cpu.rip = 0x1234;
    cpu.rflags = rflags::FIXED | rflags::IF | rflags::TF | rflags::NT | rflags::CF | rflags::AC;
    let (flags, rsp) = (cpu.rflags, cpu.gpr[gpr::RSP]);
    deliver(&mut cpu, Event::Exception(Exception::page_fault(7, 0xdead))).unwrap();
    assert_eq!((cpu.cr2, cpu.rip, cs(&cpu), cpu.cpl()), (0xdead, HANDLER, KERNEL_CS, 0));
    assert_eq!(cpu.gpr[gpr::RSP], KERNEL_STACK - 48);
    let expected = [7, 0x1234, u64::from(USER_CS), flags | rflags::RF, rsp, u64::from(USER_SS)];
    assert_eq!(frame(&cpu, 6), expected);
    assert_eq!(cpu.rflags, rflags::FIXED | rflags::CF | rflags::AC);
    assert_eq!(cpu.seg(SegmentRegister::Ss).selector, 0);
}

#[test]
fn an_interrupt_in_the_kernel_aligns_the_stack_and_keeps_ss() {
    let mut cpu = kernel_vcpu();
    set_gate(&mut cpu, 0x20, HANDLER, TRAP, 0, 0);
    cpu.gpr[gpr::RSP] = 0x1_f00c;
    cpu.rflags |= rflags::IF;
    deliver(&mut cpu, Event::Interrupt(0x20)).unwrap();
    assert_eq!(cpu.gpr[gpr::RSP], 0x1_f000 - 40);
    assert_eq!(frame(&cpu, 5)[3..], [0x1_f00c, u64::from(KERNEL_SS)]);
    assert_eq!(cpu.seg(SegmentRegister::Ss).selector, KERNEL_SS);
    assert!(cpu.rflags & rflags::IF != 0, "a trap gate keeps IF");
}

#[test]
fn an_ist_gate_takes_its_stack_at_every_level() {
    let mut cpu = kernel_vcpu();
    set_gate(&mut cpu, 2, HANDLER, INTERRUPT, 0, 3);
    poke(&mut cpu, TSS + 36 + 16, 0x2_8008);
    deliver(&mut cpu, Event::Nmi).unwrap();
    assert_eq!(cpu.gpr[gpr::RSP], 0x2_8000 - 40);
    assert!(cpu.nmi_blocked);
}

#[test]
fn software_interrupts_need_the_gates_privilege_and_fault_at_their_own_rip() {
    let mut cpu = user_vcpu();
    set_gate(&mut cpu, 0x80, HANDLER, INTERRUPT, 3, 0);
    set_gate(&mut cpu, 0x81, HANDLER, INTERRUPT, 0, 0);
    set_gate(&mut cpu, 13, HANDLER + 1, INTERRUPT, 0, 0);
    (cpu.insn_rip, cpu.rip) = (0x1000, 0x1002);
    let user = (cpu.segments, cpu.gpr, cpu.rflags);
    deliver(&mut cpu, Event::SoftwareInterrupt(0x80)).unwrap();
    assert_eq!(frame(&cpu, 1), [0x1002]);
    (cpu.segments, cpu.gpr, cpu.rflags) = user;
    cpu.rip = 0x1002;
    deliver(&mut cpu, Event::SoftwareInterrupt(0x81)).unwrap();
    assert_eq!(cpu.rip, HANDLER + 1);
    assert_eq!(frame(&cpu, 2), [0x81 << 3 | 2, 0x1000]);
}

#[test]
fn what_goes_wrong_with_an_interrupts_gate_says_so_in_the_error_code() {
    let mut cpu = kernel_vcpu();
    set_gate(&mut cpu, 13, HANDLER, INTERRUPT, 0, 0);
    set_gate(&mut cpu, 11, HANDLER, INTERRUPT, 0, 0);
    deliver(&mut cpu, Event::Interrupt(0x30)).unwrap();
    assert_eq!(frame(&cpu, 1), [0x30 << 3 | 2 | 1], "no gate there");
    set_gate(&mut cpu, 0x31, HANDLER, INTERRUPT, 0, 0);
    let gate = peek(&cpu, IDT + 0x310);
    poke(&mut cpu, IDT + 0x310, gate & !(1 << 47));
    deliver(&mut cpu, Event::Interrupt(0x31)).unwrap();
    assert_eq!(frame(&cpu, 1), [0x31 << 3 | 2 | 1], "not present");
    poke(&mut cpu, IDT + 0x310, gate & !0xffff_0000 | 0x78 << 16);
    cpu.gdtr.limit = 0x77;
    deliver(&mut cpu, Event::Interrupt(0x31)).unwrap();
    assert_eq!(frame(&cpu, 1), [0x79], "the selector is beyond the GDT");
    poke(&mut cpu, IDT + 0x310, gate & !0xffff_0000);
    deliver(&mut cpu, Event::Interrupt(0x31)).unwrap();
    assert_eq!(frame(&cpu, 1), [1], "a null selector");
}

#[test]
fn a_page_fault_on_the_way_of_a_contributory_exception_is_served_first() {
    let mut cpu = kernel_vcpu();
    set_gate(&mut cpu, 14, HANDLER, INTERRUPT, 0, 1);
    set_gate(&mut cpu, 13, HANDLER, INTERRUPT, 0, 0);
    poke(&mut cpu, TSS + 36, KERNEL_STACK);
    cpu.gpr[gpr::RSP] = 0x80_0000; // not mapped
    deliver(&mut cpu, Event::Exception(Exception::general_protection(0))).unwrap();
    assert_eq!(cpu.cr2, 0x80_0000 - 48);
    assert_eq!(frame(&cpu, 1), [2]);
}

#[test]
fn two_page_faults_make_a_double_fault_and_a_third_shuts_down() {
    let mut cpu = kernel_vcpu();
    set_gate(&mut cpu, 14, HANDLER, INTERRUPT, 0, 0);
    set_gate(&mut cpu, 8, HANDLER + 8, INTERRUPT, 0, 1);
    poke(&mut cpu, TSS + 36, KERNEL_STACK);
    cpu.gpr[gpr::RSP] = 0x80_0000;
    deliver(&mut cpu, Event::Exception(Exception::page_fault(0, 5))).unwrap();
    assert_eq!((cpu.rip, cpu.cr2), (HANDLER + 8, 0x80_0000 - 48));
    assert_eq!(frame(&cpu, 1), [0]);
    set_gate(&mut cpu, 8, HANDLER + 8, INTERRUPT, 0, 0);
    cpu.gpr[gpr::RSP] = 0x80_0000;
    let stopped = deliver(&mut cpu, Event::Exception(Exception::page_fault(0, 5)));
    assert_eq!(stopped, Err(Stop::Exit(Exit::TripleFault)));
}

#[test]
fn no_idt_is_a_triple_fault() {
    for mut cpu in [kernel_vcpu(), test_vcpu(4 << 20)] {
        cpu.idtr.limit = 0;
        let stopped = deliver(&mut cpu, Event::Exception(Exception::invalid_opcode()));
        assert_eq!(stopped, Err(Stop::Exit(Exit::TripleFault)));
    }
}

#[test]
fn a_debug_exception_sets_dr6_and_lifts_general_detect() {
    let mut cpu = kernel_vcpu();
    set_gate(&mut cpu, 1, HANDLER, INTERRUPT, 0, 0);
    cpu.dr6 = debug::DR6_INIT | 4;
    cpu.dr7 = debug::DR7_GD | 0x400;
    cpu.debug_shadow = true;
    deliver(&mut cpu, Event::Exception(Exception::debug(debug::DR6_BS | 1))).unwrap();
    assert_eq!((cpu.dr6, cpu.dr7), (debug::DR6_INIT | debug::DR6_BS | 1, 0x400));
    assert_eq!(frame(&cpu, 3)[2] & rflags::RF, 0, "a trap");
    assert!(!cpu.debug_shadow);
}

#[test]
fn a_fault_drops_the_breakpoints_its_instruction_hit() {
    let mut cpu = kernel_vcpu();
    set_gate(&mut cpu, 14, HANDLER, INTERRUPT, 0, 0);
    cpu.pending_debug = 1;
    deliver(&mut cpu, Event::Exception(Exception::page_fault(0, 0))).unwrap();
    assert_eq!(cpu.pending_debug, 0);
}

#[test]
fn system_accesses_ignore_ac_under_smap() {
    let mut cpu = kernel_vcpu();
    set_gate(&mut cpu, 3, HANDLER, INTERRUPT, 0, 1);
    set_gate(&mut cpu, 14, HANDLER, INTERRUPT, 0, 2);
    poke(&mut cpu, TSS + 36, USER + 0x1000);
    poke(&mut cpu, TSS + 44, KERNEL_STACK);
    cpu.cr4 |= cr4::SMAP;
    cpu.rflags |= rflags::AC;
    deliver(&mut cpu, Event::Int3).unwrap();
    assert_eq!(frame(&cpu, 1), [3]);
    assert_eq!(cpu.cr2, USER + 0x1000 - 40);
}

#[test]
fn the_code_descriptor_is_marked_accessed() {
    let mut cpu = kernel_vcpu();
    set_gate(&mut cpu, 3, HANDLER, INTERRUPT, 0, 0);
    let descriptor = peek(&cpu, GDT + 8);
    poke(&mut cpu, GDT + 8, descriptor & !(1 << 40));
    deliver(&mut cpu, Event::Int3).unwrap();
    assert_eq!(peek(&cpu, GDT + 8), descriptor);
}

#[test]
fn real_mode_uses_the_vector_table() {
    let mut cpu = test_vcpu(4 << 20);
    cpu.segments[SegmentRegister::Cs as usize] = Segment::real_mode(0x1000, true);
    cpu.segments[SegmentRegister::Ss as usize] = Segment::real_mode(0x2000, false);
    (cpu.rip, cpu.gpr[gpr::RSP]) = (0x55, 0);
    cpu.rflags |= rflags::IF | rflags::ZF;
    poke(&mut cpu, (0x21 * 4) & !7, 0x1234_5678_0000_0000);
    deliver(&mut cpu, Event::SoftwareInterrupt(0x21)).unwrap();
    assert_eq!((cs(&cpu), cpu.rip, cpu.gpr[gpr::RSP]), (0x1234, 0x5678, 0xfffa));
    assert_eq!(peek(&cpu, 0x2_fff8) >> 16, 0x0242_1000_0055);
    assert_eq!(cpu.rflags, rflags::FIXED | rflags::ZF);
}

/// Flat 32-bit protected mode without paging; a 32-bit TSS with a stack for level 0.
fn protected_vcpu() -> VcpuBox {
    let mut cpu = test_vcpu(8 << 20);
    cpu.cr0 |= cr0::PE;
    cpu.gdtr = DescriptorTable { base: GDT, limit: 0xff };
    cpu.idtr = DescriptorTable { base: IDT, limit: 0x7ff };
    cpu.tr = Segment { base: TSS, limit: 0x67, attributes: 0x8b, selector: TSS_SELECTOR };
    for (i, descriptor) in [CODE32, DATA, CODE32 | 3 << 45, DATA | 3 << 45].into_iter().enumerate() {
        poke(&mut cpu, GDT + 8 + 8 * i as u64, descriptor);
    }
    poke(&mut cpu, GDT + u64::from(TSS_SELECTOR), 0x0000_8b00_0000_0067 | TSS << 16);
    poke(&mut cpu, TSS + 4, KERNEL_STACK | u64::from(KERNEL_SS) << 32);
    cpu.segments = [Segment::flat_data(0x23, 3); 6];
    cpu.segments[SegmentRegister::Cs as usize] = Segment::flat_code(0x1b, false, 3);
    cpu.gpr[gpr::RSP] = 0x3_0000;
    cpu
}

fn gate32(cpu: &mut Vcpu, vector: u64, low: u64, kind: u64) {
    poke(cpu, IDT + 8 * vector, low | (0x80 | kind) << 40);
}

fn words(cpu: &Vcpu, address: u64, count: u64) -> Vec<u32> {
    let word = |at| {
        let mut data = [0; 4];
        cpu.phys_read(at, &mut data);
        u32::from_le_bytes(data)
    };
    (0..count).map(|i| word(address + 4 * i)).collect()
}

#[test]
fn a_32_bit_gate_to_an_inner_level_pushes_32_bit_values() {
    let mut cpu = protected_vcpu();
    gate32(&mut cpu, 13, 0x8765 | 8 << 16 | 1 << 48, INTERRUPT);
    cpu.rip = 0x77;
    deliver(&mut cpu, Event::Exception(Exception::general_protection(0x18))).unwrap();
    assert_eq!((cpu.rip, cs(&cpu), cpu.cpl()), (0x1_8765, 8, 0));
    assert_eq!(cpu.gpr[gpr::RSP], KERNEL_STACK - 24);
    let flags = (rflags::FIXED | rflags::RF) as u32;
    assert_eq!(words(&cpu, KERNEL_STACK - 24, 6), [0x18, 0x77, 0x1b, flags, 0x3_0000, 0x23]);
    assert_eq!(cpu.seg(SegmentRegister::Ss).selector, KERNEL_SS);
}

#[test]
fn leaving_virtual_8086_mode_saves_and_nulls_the_data_segments() {
    let mut cpu = protected_vcpu();
    gate32(&mut cpu, 13, 0x100 | 8 << 16, INTERRUPT);
    for (i, segment) in cpu.segments.iter_mut().enumerate() {
        *segment = crate::descriptor::v8086_segment(0x100 + i as u16);
    }
    cpu.rflags |= rflags::VM;
    deliver(&mut cpu, Event::Exception(Exception::general_protection(0))).unwrap();
    let base = KERNEL_STACK - 40;
    assert_eq!(cpu.gpr[gpr::RSP], base);
    assert_eq!(words(&cpu, base + 16, 6), [0x3_0000, 0x102, 0x100, 0x103, 0x104, 0x105]);
    assert_eq!(cpu.rflags & rflags::VM, 0);
    assert_eq!(*cpu.seg(SegmentRegister::Gs), Segment::default());
}

#[test]
fn a_null_inner_stack_is_an_invalid_tss() {
    let mut cpu = protected_vcpu();
    gate32(&mut cpu, 0x30, 0x100 | 8 << 16, INTERRUPT);
    gate32(&mut cpu, 10, 0x200 | 0x18 << 16, INTERRUPT);
    poke(&mut cpu, TSS + 4, KERNEL_STACK);
    deliver(&mut cpu, Event::Interrupt(0x30)).unwrap();
    assert_eq!(cpu.rip, 0x200);
    assert_eq!(words(&cpu, 0x3_0000 - 16, 1), [1]);
}

#[test]
fn a_task_gate_switches_tasks_and_pushes_the_error_code_there() {
    let mut cpu = protected_vcpu();
    let tss = 0x1_3000;
    gate32(&mut cpu, 8, 0x48 << 16, 5);
    poke(&mut cpu, GDT + 0x48, 0x0000_8900_0000_0067 | tss << 16);
    poke(&mut cpu, tss + 0x20, 0x4000 | rflags::FIXED << 32);
    poke(&mut cpu, tss + 0x38, 0x3_8000);
    poke(&mut cpu, tss + 0x48, 0x10 | 8 << 32);
    poke(&mut cpu, tss + 0x50, 0x10 | 0x10 << 32);
    cpu.rip = 0x99;
    deliver(&mut cpu, Event::Exception(Exception::new(Vector::DoubleFault))).unwrap();
    assert_eq!((cpu.rip, cs(&cpu), cpu.gpr[gpr::RSP], cpu.tr.selector), (0x4000, 8, 0x3_7ffc, 0x48));
    assert_eq!(words(&cpu, TSS + 0x20, 1), [0x99]);
    assert_eq!(words(&cpu, TSS + 0x48, 2), [0x23, 0x1b]);
    assert_eq!(peek(&cpu, tss) as u16, TSS_SELECTOR, "the link");
    assert_eq!(peek(&cpu, GDT + 0x48) >> 40 & 15, 11, "busy");
    assert!(cpu.rflags & rflags::NT != 0 && cpu.cr0 & cr0::TS != 0);
    let back = crate::testing::execute(&mut cpu, &[0xcf]);
    assert_eq!(back, Ok(()));
    assert_eq!((cpu.rip, cpu.tr.selector, cpu.cpl(), cpu.gpr[gpr::RSP]), (0x99, TSS_SELECTOR, 3, 0x3_0000));
    assert_eq!(peek(&cpu, GDT + 0x48) >> 40 & 15, 9, "available again");
}

#[test]
fn a_read_only_stack_page_faults_before_anything_is_pushed() {
    let mut cpu = user_vcpu();
    set_gate(&mut cpu, 0x20, HANDLER, INTERRUPT, 0, 0);
    set_gate(&mut cpu, 14, HANDLER, INTERRUPT, 0, 1);
    poke(&mut cpu, TSS + 36, 0x2_8000);
    poke(&mut cpu, TSS + 4, KERNEL_STACK + 16);
    poke(&mut cpu, PT + (KERNEL_STACK >> 12) * 8, KERNEL_STACK | pte::P);
    deliver(&mut cpu, Event::Interrupt(0x20)).unwrap();
    assert_eq!(cpu.cr2, KERNEL_STACK);
    assert_eq!(frame(&cpu, 3)[0], 3);
    assert_eq!(peek(&cpu, KERNEL_STACK - 8), 0);
}
