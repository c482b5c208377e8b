//! A vCPU with a small operating system's tables, for unit tests of what belongs to the system.
//!
//! Guest-physical memory: page tables at 1000H, GDT at [`GDT`], IDT at [`IDT`], TSS at [`TSS`]. The first 2 MiB are
//! mapped one to one for the supervisor, the second for users, by 4 KiB pages; the third by one large supervisor
//! page.

use std::sync::Arc;

use arch::cpuid::Leaf;
use arch::registers::{cr0, cr4, efer, gpr, pte};
use arch::state::{DescriptorTable, Segment, SegmentRegister};

use crate::Config;
use crate::codegen::block::Setting;
use crate::codegen::groups::Sharing;
use crate::cpu::{Stop, Vcpu};
use crate::mode::Mode;
use crate::shared::Machine;
use crate::vcpu::VcpuBox;

pub const PML4: u64 = 0x1000;
pub const PDPT: u64 = 0x2000;
pub const PD: u64 = 0x3000;
/// Of the first 2 MiB.
pub const PT: u64 = 0x4000;
/// Of the second 2 MiB.
pub const USER_PT: u64 = 0x5000;
pub const GDT: u64 = 0x1_0000;
pub const IDT: u64 = 0x1_1000;
pub const TSS: u64 = 0x1_2000;
/// Where user memory begins.
pub const USER: u64 = 0x20_0000;
/// The stack that the TSS names for level 0.
pub const KERNEL_STACK: u64 = 0x2_0000;
pub const KERNEL_CS: u16 = 0x08;
pub const KERNEL_SS: u16 = 0x10;
pub const USER_CS32: u16 = 0x1b;
pub const USER_SS: u16 = 0x23;
pub const USER_CS: u16 = 0x2b;
/// A 32-bit code segment of level 0.
pub const KERNEL_CS32: u16 = 0x30;
pub const TSS_SELECTOR: u16 = 0x40;

pub const CODE64: u64 = 0x00af_9b00_0000_ffff;
pub const CODE32: u64 = 0x00cf_9b00_0000_ffff;
pub const DATA: u64 = 0x00cf_9300_0000_ffff;
/// DPL 3 in a descriptor.
pub const DPL3: u64 = 3 << 45;

/// Whose processor a vCPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    Intel,
    Amd,
}

impl Vendor {
    pub const ALL: [Vendor; 2] = [Vendor::Intel, Vendor::Amd];

    pub fn of_host() -> Self {
        if crate::host_is_amd() { Vendor::Amd } else { Vendor::Intel }
    }
}

/// A vCPU in reset state, alone in a machine with `memory` bytes of RAM.
pub fn test_vcpu(memory: u64) -> VcpuBox {
    test_vcpu_of(Vendor::of_host(), memory)
}

/// The same, of a host that is this one but for the vendor.
fn test_vcpu_of(vendor: Vendor, memory: u64) -> VcpuBox {
    let config = Config::default();
    let cpuid = |leaf: u32, subleaf: u32| match (leaf, vendor) {
        (0, Vendor::Intel) => Leaf { eax: 0x16, ebx: 0x756e_6547, edx: 0x4965_6e69, ecx: 0x6c65_746e },
        (0, Vendor::Amd) => Leaf { eax: 0x10, ebx: 0x6874_7541, edx: 0x6974_6e65, ecx: 0x444d_4163 },
        _ => crate::host::cpuid(leaf, subleaf),
    };
    let model = match vendor == Vendor::of_host() {
        true => crate::semantics::cpuid::model(&config, 2_000_000),
        false => crate::semantics::cpuid::model_on(&cpuid, &config, 2_000_000),
    };
    let model = model.unwrap();
    let ram = memory::Ram::new(memory).unwrap();
    let machine = Machine::new(ram, config, model, Default::default());
    let mut cpu = VcpuBox::new(0, Arc::new(machine)).unwrap();
    cpu.init_state();
    cpu
}

/// A vCPU in 64-bit mode at level 0.
pub fn kernel_vcpu() -> VcpuBox {
    kernel_vcpu_of(Vendor::of_host())
}

/// The same of a vendor.
pub fn kernel_vcpu_of(vendor: Vendor) -> VcpuBox {
    let mut cpu = test_vcpu_of(vendor, 8 << 20);
    let table = pte::P | pte::W | pte::U;
    poke(&mut cpu, PML4, PDPT | table);
    poke(&mut cpu, PDPT, PD | table);
    poke(&mut cpu, PD, PT | table);
    poke(&mut cpu, PD + 8, USER_PT | table);
    poke(&mut cpu, PD + 16, 0x40_0000 | pte::P | pte::W | pte::PS);
    for page in 0..512 {
        poke(&mut cpu, PT + page * 8, page << 12 | pte::P | pte::W);
        poke(&mut cpu, USER_PT + page * 8, (USER + (page << 12)) | table);
    }
    let descriptors = [0, CODE64, DATA, CODE32 | DPL3, DATA | DPL3, CODE64 | DPL3, CODE32, 0];
    for (i, descriptor) in descriptors.into_iter().enumerate() {
        poke(&mut cpu, GDT + 8 * i as u64, descriptor);
    }
    poke(&mut cpu, GDT + u64::from(TSS_SELECTOR), 0x0000_8900_0000_0067 | TSS << 16);
    poke(&mut cpu, TSS + 4, KERNEL_STACK);
    cpu.gdtr = DescriptorTable { base: GDT, limit: 0x7f };
    cpu.idtr = DescriptorTable { base: IDT, limit: 0xfff };
    cpu.tr = Segment { base: TSS, limit: 0x67, attributes: 0x8b, selector: TSS_SELECTOR };
    cpu.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
    cpu.cr3 = PML4;
    cpu.cr4 = cr4::PAE | cr4::PGE;
    cpu.msrs.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
    cpu.segments = [Segment::default(); 6];
    cpu.segments[SegmentRegister::Cs as usize] = Segment::flat_code(KERNEL_CS, true, 0);
    cpu.segments[SegmentRegister::Ss as usize] = Segment::flat_data(KERNEL_SS, 0);
    cpu.gpr[gpr::RSP] = 0x1_f000;
    cpu.mmu_flush_all();
    cpu
}

/// The same vCPU running a 64-bit program.
pub fn user_vcpu() -> VcpuBox {
    user_vcpu_of(Vendor::of_host())
}

/// The same of a vendor.
pub fn user_vcpu_of(vendor: Vendor) -> VcpuBox {
    let mut cpu = kernel_vcpu_of(vendor);
    cpu.segments[SegmentRegister::Cs as usize] = Segment::flat_code(USER_CS, true, 3);
    cpu.segments[SegmentRegister::Ss as usize] = Segment::flat_data(USER_SS, 3);
    cpu.gpr[gpr::RSP] = USER + 0x8008;
    cpu
}

/// Writes a quadword at a guest-physical address.
pub fn poke(cpu: &mut Vcpu, gpa: u64, value: u64) {
    cpu.phys_write(gpa, &value.to_le_bytes());
}

/// Reads a quadword at a guest-physical address.
pub fn peek(cpu: &Vcpu, gpa: u64) -> u64 {
    let mut data = [0; 8];
    cpu.phys_read(gpa, &mut data);
    u64::from_le_bytes(data)
}

/// Puts a gate of long mode into the IDT.
pub fn set_gate(cpu: &mut Vcpu, vector: u8, target: u64, kind: u64, dpl: u64, ist: u64) {
    let low = target & 0xffff
        | u64::from(KERNEL_CS) << 16
        | ist << 32
        | (0x80 | dpl << 5 | kind) << 40
        | (target >> 16 & 0xffff) << 48;
    poke(cpu, IDT + 16 * u64::from(vector), low);
    poke(cpu, IDT + 16 * u64::from(vector) + 8, target >> 32);
}

/// Where [`execute`] pretends that instructions are.
pub const RIP: u64 = 0x6000;

/// Executes one sensitive instruction as the dispatcher would, without delivering what it raises.
pub fn execute(cpu: &mut Vcpu, bytes: &[u8]) -> Result<(), Stop> {
    let insn = crate::access::decode(bytes, Mode::of(cpu), RIP);
    cpu.insn_rip = insn.ip();
    cpu.rip = insn.next_ip();
    let exec =
        crate::semantics::lookup(&insn).map_or(crate::semantics::stack::exec as crate::semantics::Exec, |s| s.exec);
    exec(cpu, &insn)
}

/// The fault that an instruction raises.
pub fn fault_of(cpu: &mut Vcpu, bytes: &[u8]) -> arch::Exception {
    match execute(cpu, bytes) {
        Err(Stop::Fault(e)) => e,
        other => unreachable!("expected a fault, got {other:?}"),
    }
}

/// How code that runs in a mode is translated, with the second part of the jump table for it.
pub fn setting(mode: Mode) -> Setting {
    Setting {
        relative: false,
        mode,
        inline_tsc: true,
        sharing: Sharing::All,
        jump_slot: Some(1),
        access_slot: None,
        level_slot: None,
        template: false,
        checked: None,
        far_links: false,
    }
}
