//! Control registers: MOV to and from CRn, CLTS, LMSW, SMSW, XGETBV and XSETBV, and what each write checks and changes
//! (Intel SDM 3A 2.5, 2B MOV - Control Registers).

use arch::cpuid::Feature;
use arch::registers::{cr0, cr4, efer, gpr, xcr0};
use arch::{Exception, SegmentRegister};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{Exec, Sensitive};
use crate::cpu::{Stop, Vcpu};

#[cfg(test)]
mod tests;

pub fn lookup(insn: &Instruction) -> Option<Sensitive> {
    let (exec, ends_block, fp): (Exec, bool, bool) = match insn.mnemonic() {
        Mnemonic::Mov if insn.op0_register().is_cr() => (write_cr, true, false),
        Mnemonic::Mov if insn.op1_register().is_cr() => (read_cr, false, false),
        Mnemonic::Clts => (clts, true, false),
        Mnemonic::Lmsw => (lmsw, true, false),
        Mnemonic::Smsw => (smsw, false, false),
        // XCR1 shows which components are in use: that is in the saved state.
        Mnemonic::Xgetbv => (xgetbv, false, true),
        Mnemonic::Xsetbv => (xsetbv, true, false),
        _ => return None,
    };
    Some(Sensitive { exec, ends_block, fp })
}

fn fault() -> Exception {
    Exception::general_protection(0)
}

/// #GP(0) unless at CPL 0.
pub(super) fn privileged(cpu: &Vcpu) -> Result<(), Exception> {
    if cpu.cpl() == 0 { Ok(()) } else { Err(fault()) }
}

/// CR0 bits that can be set; the others below bit 32 stay clear, ET stays set.
const CR0_DEFINED: u64 =
    cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;

fn read_cr(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let value = match insn.op1_register() {
        Register::CR0 => cpu.cr0,
        Register::CR2 => cpu.cr2,
        Register::CR3 => cpu.cr3,
        Register::CR4 => cpu.cr4,
        Register::CR8 => u64::from(cpu.shared.apic.tpr() >> 4),
        _ => return Err(Exception::invalid_opcode().into()),
    };
    privileged(cpu)?;
    cpu.write_register(insn.op0_register(), value);
    Ok(())
}

fn write_cr(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let register = insn.op0_register();
    if !matches!(register, Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4 | Register::CR8) {
        return Err(Exception::invalid_opcode().into());
    }
    privileged(cpu)?;
    let value = cpu.read_register(insn.op1_register());
    match register {
        Register::CR0 => cpu.write_cr0(value)?,
        Register::CR2 => cpu.cr2 = value,
        Register::CR3 => cpu.write_cr3(value)?,
        Register::CR4 => cpu.write_cr4(value)?,
        _ if value > 0xf => return Err(fault().into()),
        _ => cpu.set_task_priority((value as u8) << 4),
    }
    Ok(())
}

impl Vcpu {
    /// MOV to CR0.
    pub fn write_cr0(&mut self, value: u64) -> Result<(), Exception> {
        if value >> 32 != 0 || value & (cr0::PG | cr0::PE) == cr0::PG || value & (cr0::NW | cr0::CD) == cr0::NW {
            return Err(fault());
        }
        let value = value & CR0_DEFINED | cr0::ET;
        let changed = value ^ self.cr0;
        if changed & cr0::PG != 0 {
            if value & cr0::PG != 0 { self.check_paging_on()? } else { self.check_paging_off()? }
        }
        let paging = value & cr0::PG != 0;
        let pae = self.cr4 & cr4::PAE != 0 && self.msrs.efer & efer::LME == 0;
        if paging && pae && changed & (cr0::PG | cr0::CD | cr0::NW) != 0 {
            self.check_pdptes(self.cr3)?;
        }
        self.cr0 = value;
        if changed & cr0::PG != 0 {
            let active = paging && self.msrs.efer & efer::LME != 0;
            self.msrs.efer = self.msrs.efer & !efer::LMA | if active { efer::LMA } else { 0 };
        }
        // PE alone changes nothing about addresses: paging is off before and after. Firmware goes to and fro all the time.
        if changed & (cr0::PG | cr0::WP) != 0 {
            self.mmu_flush_all();
        }
        Ok(())
    }

    /// Entering IA-32e mode needs PAE, a CS without L and a TSS that is not a 16-bit one (Intel SDM 3A 10.8.5).
    fn check_paging_on(&self) -> Result<(), Exception> {
        if self.msrs.efer & efer::LME == 0 {
            return Ok(());
        }
        let tss16 = matches!(self.tr.kind(), 1 | 3);
        if self.cr4 & cr4::PAE == 0 || self.seg(SegmentRegister::Cs).long() || tss16 {
            return Err(fault());
        }
        Ok(())
    }

    /// Paging can't be turned off from 64-bit code, nor with PCIDs on.
    fn check_paging_off(&self) -> Result<(), Exception> {
        if self.cr4 & cr4::PCIDE != 0 || self.code64() { Err(fault()) } else { Ok(()) }
    }

    /// PAE paging: the four page-directory-pointer entries that CR3 names have no reserved bit set (Intel SDM 3A 4.4.1).
    fn check_pdptes(&self, cr3: u64) -> Result<(), Exception> {
        let width = self.machine.cpuid.physical_bits();
        let reserved = !((1 << width) - 1) | 0x1e6;
        for i in 0..4 {
            let entry = self.phys_read_u64((cr3 & 0xffff_ffe0) + 8 * i);
            if entry & 1 != 0 && entry & reserved != 0 {
                return Err(fault());
            }
        }
        Ok(())
    }

    /// MOV to CR3.
    pub fn write_cr3(&mut self, value: u64) -> Result<(), Exception> {
        if self.long_mode() {
            let no_flush = if self.cr4 & cr4::PCIDE != 0 { 1 << 63 } else { 0 };
            if (value & !no_flush) >> self.machine.cpuid.physical_bits() != 0 {
                return Err(fault());
            }
        } else if self.cr4 & cr4::PAE != 0 && self.paging() {
            self.check_pdptes(value)?;
        }
        self.mmu_load_cr3(value);
        Ok(())
    }

    /// MOV to CR4.
    pub fn write_cr4(&mut self, value: u64) -> Result<(), Exception> {
        if value & !self.machine.cpuid.cr4_mask() != 0 {
            return Err(fault());
        }
        let changed = value ^ self.cr4;
        if self.long_mode() && value & cr4::PAE == 0 {
            return Err(fault());
        }
        if changed & value & cr4::PCIDE != 0 && (!self.long_mode() || self.cr3 & 0xfff != 0) {
            return Err(fault());
        }
        const PAGING: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP | cr4::PKE;
        if self.paging() && !self.long_mode() && value & cr4::PAE != 0 && changed & PAGING != 0 {
            self.check_pdptes(self.cr3)?;
        }
        self.cr4 = value;
        if changed & PAGING != 0 {
            self.mmu_flush_all();
        }
        Ok(())
    }
}

fn clts(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    privileged(cpu)?;
    cpu.cr0 &= !cr0::TS;
    Ok(())
}

/// Loads the low four bits of CR0; PE can be set, not cleared.
fn lmsw(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    const LOADED: u64 = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
    privileged(cpu)?;
    let value = cpu.read_operand(insn, 0)? & LOADED;
    Ok(cpu.write_cr0(cpu.cr0 & (!LOADED | cr0::PE) | value)?)
}

fn smsw(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    user_mode_prevention(cpu)?;
    // A memory operand is 16 bits wide; a register takes as much of CR0 as it has room for.
    let value = if insn.op0_kind() == OpKind::Register { cpu.cr0 } else { cpu.cr0 & 0xffff };
    Ok(cpu.write_operand(insn, 0, value)?)
}

/// #GP(0) for SGDT, SIDT, SMSW (and SLDT, STR) at CPL above 0 with CR4.UMIP.
pub(super) fn user_mode_prevention(cpu: &Vcpu) -> Result<(), Exception> {
    if cpu.cr4 & cr4::UMIP != 0 { privileged(cpu) } else { Ok(()) }
}

fn xgetbv(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::invalid_opcode().into());
    }
    let value = match cpu.gpr[gpr::RCX] as u32 {
        0 => cpu.xcr0,
        1 if cpu.machine.cpuid.has(Feature::Xgetbv1) => cpu.xcr0 & cpu.state_in_use(),
        _ => return Err(fault().into()),
    };
    cpu.gpr[gpr::RAX] = value & 0xffff_ffff;
    cpu.gpr[gpr::RDX] = value >> 32;
    Ok(())
}

impl Vcpu {
    /// XINUSE, as the host's XSAVE left it in the header's XSTATE_BV (Intel SDM 1 13.4.2, 13.6).
    fn state_in_use(&self) -> u64 {
        let bits = self.xsave.0[512..520].iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
        // PKRU is not kept there.
        bits & !xcr0::PKRU | if self.pkru != 0 { xcr0::PKRU } else { 0 }
    }
}

fn xsetbv(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::invalid_opcode().into());
    }
    privileged(cpu)?;
    let value = cpu.gpr[gpr::RDX] << 32 | cpu.gpr[gpr::RAX] & 0xffff_ffff;
    let whole = |set: u64, needs: u64| value & set == 0 || value & (set | needs) == set | needs;
    let valid = value & xcr0::X87 != 0
        && value & !cpu.machine.cpuid.xcr0_mask() == 0
        && whole(xcr0::AVX, xcr0::SSE)
        && whole(xcr0::AVX512, xcr0::AVX);
    if cpu.gpr[gpr::RCX] as u32 != 0 || !valid {
        return Err(fault().into());
    }
    cpu.xcr0 = value;
    Ok(())
}
