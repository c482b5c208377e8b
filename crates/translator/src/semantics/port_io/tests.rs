//! Ports, who may use them, and strings of them.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use super::*;
use crate::testing::{TSS, USER, execute, fault_of, kernel_vcpu, peek, poke, user_vcpu};
use arch::registers::gpr::{RAX, RCX, RDI, RDX, RSI};

const IN_AL_DX: &[u8] = &[0xec];
const IN_EAX_80: &[u8] = &[0xe5, 0x80];
const OUT_DX_AX: &[u8] = &[0x66, 0xef];
const REP_INSB: &[u8] = &[0xf3, 0x6c];
const REP_OUTSW: &[u8] = &[0xf3, 0x66, 0x6f];

/// Counts the bytes read and remembers writes.
#[derive(Default)]
struct Ports {
    read: AtomicU8,
    written: Mutex<Vec<(u16, Vec<u8>)>>,
}

impl engine::Bus for Ports {
    fn mmio_read(&self, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill_with(|| self.read.fetch_add(1, Ordering::SeqCst) + 1);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.written.lock().unwrap().push((port, data.to_vec()));
    }
    fn acknowledge_pic(&self) -> u8 {
        0
    }
    fn end_of_interrupt(&self, _: u8) {}
}

fn with_ports(cpu: &Vcpu) -> Arc<Ports> {
    let ports = Arc::new(Ports::default());
    cpu.machine.set_bus(ports.clone());
    ports
}

#[test]
fn reads_and_writes_have_their_operands_width() {
    let mut cpu = kernel_vcpu();
    let ports = with_ports(&cpu);
    cpu.gpr[RAX] = u64::MAX;
    execute(&mut cpu, IN_AL_DX).unwrap();
    assert_eq!(cpu.gpr[RAX], 0xffff_ffff_ffff_ff01);
    execute(&mut cpu, IN_EAX_80).unwrap();
    assert_eq!(cpu.gpr[RAX], 0x0504_0302);
    cpu.gpr[RDX] = 0xffff_0070;
    execute(&mut cpu, OUT_DX_AX).unwrap();
    assert_eq!(*ports.written.lock().unwrap(), [(0x70, vec![2, 3])]);
}

#[test]
fn the_permission_bitmap_decides_for_programs() {
    let mut cpu = user_vcpu();
    with_ports(&cpu);
    cpu.gpr[RDX] = 0x3f;
    let denied = Exception::general_protection(0);
    poke(&mut cpu, TSS + 96, 104 << 48);
    assert_eq!(fault_of(&mut cpu, IN_AL_DX), denied); // the TSS ends before it
    cpu.tr.limit = 104 + 16;
    poke(&mut cpu, TSS + 104, 0);
    execute(&mut cpu, IN_AL_DX).unwrap();
    poke(&mut cpu, TSS + 104, 1 << 63);
    assert_eq!(fault_of(&mut cpu, IN_AL_DX), denied);
    cpu.gpr[RDX] = 0x3e;
    execute(&mut cpu, IN_AL_DX).unwrap();
    assert_eq!(fault_of(&mut cpu, OUT_DX_AX), denied); // 0x3e and 0x3f
    cpu.gpr[RDX] = 0x1000;
    assert_eq!(fault_of(&mut cpu, IN_AL_DX), denied); // beyond the limit
    cpu.rflags |= rflags::IOPL;
    execute(&mut cpu, IN_AL_DX).unwrap();
}

#[test]
fn rep_ins_fills_memory_and_counts() {
    let mut cpu = user_vcpu();
    with_ports(&cpu);
    cpu.rflags |= rflags::IOPL;
    (cpu.gpr[RDI], cpu.gpr[RCX]) = (USER + 0xffc, 8);
    execute(&mut cpu, REP_INSB).unwrap();
    assert_eq!(peek(&cpu, USER + 0xff8) >> 32, 0x0403_0201);
    assert_eq!(peek(&cpu, USER + 0x1000), 0x0807_0605);
    assert_eq!((cpu.gpr[RDI], cpu.gpr[RCX]), (USER + 0x1004, 0));
    execute(&mut cpu, REP_INSB).unwrap();
    assert_eq!(cpu.gpr[RDI], USER + 0x1004);
}

#[test]
fn long_repetitions_come_back_for_more() {
    let mut cpu = kernel_vcpu();
    let ports = with_ports(&cpu);
    (cpu.gpr[RSI], cpu.gpr[RCX]) = (0x8000, 100);
    execute(&mut cpu, REP_OUTSW).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[RCX]), (cpu.insn_rip, 100 - u64::from(BATCH)));
    execute(&mut cpu, REP_OUTSW).unwrap();
    assert_ne!(cpu.rip, cpu.insn_rip);
    assert_eq!((cpu.gpr[RSI], cpu.gpr[RCX]), (0x8000 + 200, 0));
    assert_eq!(ports.written.lock().unwrap().len(), 100);
}

#[test]
fn ins_does_not_read_the_port_when_it_can_not_store() {
    let mut cpu = kernel_vcpu();
    let ports = with_ports(&cpu);
    (cpu.gpr[RDI], cpu.gpr[RCX]) = (1 << 40, 1);
    let fault = fault_of(&mut cpu, REP_INSB);
    assert_eq!((fault.vector, fault.fault_address), (arch::Vector::PageFault, 1 << 40));
    assert_eq!(ports.read.load(Ordering::SeqCst), 0);
    assert_eq!(cpu.gpr[RCX], 1);
}

#[test]
fn an_io_breakpoint_traps_after_the_access() {
    let mut cpu = kernel_vcpu();
    with_ports(&cpu);
    cpu.cr4 |= cr4::DE;
    cpu.dr[1] = 0x70;
    cpu.dr7 |= 1 << 2 | 2 << 20 | 1 << 22; // DR1: I/O, two ports
    cpu.gpr[RDX] = 0x71;
    execute(&mut cpu, IN_AL_DX).unwrap();
    assert_eq!(cpu.pending_debug, 2);
    cpu.pending_debug = 0;
    cpu.gpr[RDX] = 0x72;
    execute(&mut cpu, IN_AL_DX).unwrap();
    assert_eq!(cpu.pending_debug, 0);
}
