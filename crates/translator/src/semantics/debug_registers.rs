//! MOV to and from the debug registers (Intel SDM 3B 18.2).

use arch::Exception;
use arch::registers::{cr4, debug};
use iced_x86::{Instruction, Mnemonic};

use super::control::privileged;
use super::{Exec, Sensitive};
use crate::cpu::{Stop, Vcpu};

/// DR6: what can be written besides the bits that are always one: B0-B3, BD, BS, BT.
const DR6_WRITABLE: u64 = 0xe00f;
/// DR7: enables, LE, GE, GD, conditions and lengths.
const DR7_WRITABLE: u64 = 0xffff_23ff;

pub fn lookup(insn: &Instruction) -> Option<Sensitive> {
    let exec: Exec = match insn.mnemonic() {
        Mnemonic::Mov if insn.op0_register().is_dr() => write,
        Mnemonic::Mov if insn.op1_register().is_dr() => read,
        _ => return None,
    };
    Some(Sensitive { exec, ends_block: true, fp: false })
}

/// Which register DR`number` is now, after the checks that reads and writes share.
fn select(cpu: &Vcpu, number: usize) -> Result<usize, Exception> {
    if !matches!(number, 0..=7) {
        return Err(Exception::invalid_opcode());
    }
    privileged(cpu)?;
    let number = match number {
        4 | 5 if cpu.cr4 & cr4::DE != 0 => return Err(Exception::invalid_opcode()),
        4 | 5 => number + 2,
        _ => number,
    };
    // A debugger that protects its registers sees the access before it happens; the handler finds GD cleared.
    if cpu.dr7 & debug::DR7_GD != 0 {
        return Err(Exception::debug(debug::DR6_BD));
    }
    Ok(number)
}

fn read(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let value = match select(cpu, insn.op1_register().number())? {
        6 => cpu.dr6,
        7 => cpu.dr7,
        n => cpu.dr.get(n).copied().unwrap_or(0),
    };
    cpu.write_register(insn.op0_register(), value);
    Ok(())
}

fn write(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let number = select(cpu, insn.op0_register().number())?;
    let value = cpu.read_register(insn.op1_register());
    if number >= 6 && value >> 32 != 0 {
        return Err(Exception::general_protection(0).into());
    }
    match number {
        6 => cpu.dr6 = value & DR6_WRITABLE | debug::DR6_INIT,
        7 => cpu.dr7 = value & DR7_WRITABLE | debug::DR7_INIT,
        n => {
            if let Some(slot) = cpu.dr.get_mut(n) {
                *slot = value;
            }
        }
    }
    if number != 6 {
        // Watched pages take the slow path: which ones may have changed.
        cpu.mmu_flush_all();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{execute, fault_of, kernel_vcpu};
    use arch::Vector;
    use arch::registers::gpr::RAX;

    const MOV_DR7_RAX: &[u8] = &[0x0f, 0x23, 0xf8];
    const MOV_RAX_DR6: &[u8] = &[0x0f, 0x21, 0xf0];
    const MOV_RAX_DR4: &[u8] = &[0x0f, 0x21, 0xe0];

    #[test]
    fn reserved_bits_of_dr7_stay_as_they_are() {
        let mut cpu = kernel_vcpu();
        cpu.gpr[RAX] = 0xffff_dfff;
        execute(&mut cpu, MOV_DR7_RAX).unwrap();
        assert_eq!(cpu.dr7, 0xffff_07ff);
        cpu.gpr[RAX] = 1 << 32;
        assert_eq!(fault_of(&mut cpu, MOV_DR7_RAX).vector, Vector::GeneralProtection);
    }

    #[test]
    fn dr4_is_dr6_unless_debug_extensions_are_on() {
        let mut cpu = kernel_vcpu();
        cpu.dr6 = 0xffff_4ff1;
        execute(&mut cpu, MOV_RAX_DR4).unwrap();
        assert_eq!(cpu.gpr[RAX], 0xffff_4ff1);
        cpu.cr4 |= cr4::DE;
        assert_eq!(fault_of(&mut cpu, MOV_RAX_DR4).vector, Vector::InvalidOpcode);
    }

    #[test]
    fn general_detect_traps_an_access_before_it_happens() {
        let mut cpu = kernel_vcpu();
        cpu.dr7 |= debug::DR7_GD;
        let stop = execute(&mut cpu, MOV_RAX_DR6);
        assert_eq!(stop, Err(Stop::Fault(Exception::debug(debug::DR6_BD))));
    }
}
