//! Descriptor-table registers and the instructions that drop translations: LGDT, LIDT, SGDT, SIDT, INVLPG, INVPCID.

use arch::cpuid::Feature;
use arch::registers::cr4;
use arch::{DescriptorTable, Exception};
use iced_x86::{Code, Instruction, Mnemonic};

use super::control::{privileged, user_mode_prevention};
use super::{Exec, Sensitive};
use crate::cpu::{Stop, Vcpu};
use crate::mmu::is_canonical;

pub fn lookup(insn: &Instruction) -> Option<Sensitive> {
    let (exec, ends_block): (Exec, bool) = match insn.mnemonic() {
        Mnemonic::Lgdt | Mnemonic::Lidt => (load, false),
        Mnemonic::Sgdt | Mnemonic::Sidt => (store, false),
        Mnemonic::Invlpg => (invlpg, true),
        Mnemonic::Invpcid => (invpcid, true),
        _ => return None,
    };
    Some(Sensitive { exec, ends_block, fp: false })
}

/// Limit, then base: 8 bytes of it in 64-bit mode, else 4, of which a 16-bit operand size uses 3.
fn load(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    privileged(cpu)?;
    let size = if cpu.code64() { 10 } else { 6 };
    let address = cpu.operand_address(insn, 0, size, false)?;
    let mut data = [0; 10];
    cpu.read_linear(address, &mut data[..size], cpu.context())?;
    let limit = u16::from_le_bytes([data[0], data[1]]);
    let mut base = data[2..].iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
    if matches!(insn.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0xff_ffff;
    }
    if !is_canonical(base) {
        return Err(Exception::general_protection(0).into());
    }
    let table = DescriptorTable { base, limit };
    match insn.mnemonic() {
        Mnemonic::Lgdt => cpu.gdtr = table,
        _ => cpu.idtr = table,
    }
    Ok(())
}

fn store(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    user_mode_prevention(cpu)?;
    let table = if insn.mnemonic() == Mnemonic::Sgdt { cpu.gdtr } else { cpu.idtr };
    let size = if cpu.code64() { 10 } else { 6 };
    let mut data = [0; 10];
    data[..2].copy_from_slice(&table.limit.to_le_bytes());
    data[2..].copy_from_slice(&table.base.to_le_bytes());
    let address = cpu.operand_address(insn, 0, size, true)?;
    Ok(cpu.write_linear(address, &data[..size], cpu.context())?)
}

/// A non-canonical address is no error and invalidates nothing.
fn invlpg(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    privileged(cpu)?;
    let (segment, offset) = cpu.effective_address(insn, 0);
    let address = if cpu.code64() && !matches!(segment, arch::SegmentRegister::Fs | arch::SegmentRegister::Gs) {
        offset
    } else {
        cpu.seg(segment).base.wrapping_add(offset)
    };
    let address = if cpu.code64() { address } else { address & 0xffff_ffff };
    if is_canonical(address) {
        cpu.mmu_flush_page(address);
    }
    Ok(())
}

/// Register: the type. Memory: 12 bits of PCID (the rest of the quadword reserved), then a linear address.
fn invpcid(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    if !cpu.machine.cpuid.has(Feature::Invpcid) {
        return Err(Exception::invalid_opcode().into());
    }
    privileged(cpu)?;
    let kind = cpu.read_operand(insn, 0)?;
    let address = cpu.operand_address(insn, 1, 16, false)?;
    let mut data = [0; 16];
    cpu.read_linear(address, &mut data, cpu.context())?;
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
    let (pcid, target) = (word(&data[..8]), word(&data[8..]));
    let invalid_pcid = pcid != 0 && (cpu.cr4 & cr4::PCIDE == 0 && kind <= 1 || pcid > 0xfff);
    if invalid_pcid || kind > 3 || kind == 0 && !is_canonical(target) {
        return Err(Exception::general_protection(0).into());
    }
    match kind {
        0 if pcid == cpu.cr3 & 0xfff || cpu.cr4 & cr4::PCIDE == 0 => cpu.mmu_flush_page(target),
        // Forgetting too much is always allowed (Intel SDM 3A 4.10.4.1).
        0 | 1 => cpu.mmu_flush_pcid(pcid),
        3 => cpu.mmu_flush_local(),
        _ => cpu.mmu_flush_all(),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{execute, fault_of, kernel_vcpu};
    use arch::Vector;
    use arch::registers::gpr::{RAX, RBX};

    const LGDT_RBX: &[u8] = &[0x0f, 0x01, 0x13];
    const SIDT_RBX: &[u8] = &[0x0f, 0x01, 0x0b];
    const INVPCID_RAX_RBX: &[u8] = &[0x66, 0x0f, 0x38, 0x82, 0x03];

    #[test]
    fn lgdt_takes_limit_and_canonical_base() {
        let mut cpu = kernel_vcpu();
        cpu.gpr[RBX] = 0x8000;
        cpu.phys_write(0x8000, &[0x7f, 0, 0, 0x10, 0, 0, 0, 0x88, 0xff, 0xff]);
        execute(&mut cpu, LGDT_RBX).unwrap();
        assert_eq!(cpu.gdtr, DescriptorTable { base: 0xffff_8800_0000_1000, limit: 0x7f });
        cpu.phys_write(0x8009, &[0x7f]);
        assert_eq!(fault_of(&mut cpu, LGDT_RBX).vector, Vector::GeneralProtection);
    }

    #[test]
    fn sidt_stores_ten_bytes_and_umip_keeps_users_from_it() {
        let mut cpu = kernel_vcpu();
        cpu.gpr[RBX] = 0x8000;
        cpu.idtr = DescriptorTable { base: 0xffff_fe00_0000_0000, limit: 0xfff };
        execute(&mut cpu, SIDT_RBX).unwrap();
        let mut data = [0; 10];
        cpu.phys_read(0x8000, &mut data);
        assert_eq!(data, [0xff, 0x0f, 0, 0, 0, 0, 0, 0xfe, 0xff, 0xff]);
        cpu.cr4 |= cr4::UMIP;
        cpu.segments[2] = arch::Segment::flat_data(0x23, 3);
        cpu.gpr[RBX] = 0x20_0000;
        assert_eq!(fault_of(&mut cpu, SIDT_RBX).vector, Vector::GeneralProtection);
    }

    #[test]
    fn invpcid_checks_type_pcid_and_address() {
        let mut cpu = kernel_vcpu();
        cpu.gpr[RBX] = 0x8000;
        for (kind, pcid, address, good) in [
            (0, 0, 0x1000, true),
            (0, 0, 1u64 << 63, false),
            (0, 1, 0x1000, false),
            (2, 0, 0, true),
            (2, 0x1000, 0, false),
            (4, 0u64, 0, false),
        ] {
            cpu.gpr[RAX] = kind;
            cpu.phys_write(0x8000, &pcid.to_le_bytes());
            cpu.phys_write(0x8008, &address.to_le_bytes());
            assert_eq!(execute(&mut cpu, INVPCID_RAX_RBX).is_ok(), good, "{kind} {pcid} {address:#x}");
        }
    }
}
