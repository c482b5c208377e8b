//! BT, BTS, BTR and BTC on memory with the bit's number in a register: the number, which is signed, reaches far beyond
//! the operand (Intel SDM 2A, BT; 1 3.1.1.9).
//!
//! The word that holds the bit is what the instruction accesses, and what is checked. Of it only one byte can change, so
//! an atomic operation on that byte is as good as one on the word, and never crosses a page or a cache line.

use std::sync::atomic::{AtomicU8, Ordering};

use arch::registers::rflags;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::Sensitive;
use super::span::Span;
use crate::cpu::{Stop, Vcpu};
use crate::mmu::Access;

/// The entry for a bit instruction whose operand is not where its ModRM byte says.
pub fn lookup(insn: &Instruction) -> Option<Sensitive> {
    by_register(insn).then_some(Sensitive { exec, ends_block: false, fp: false })
}

/// It is a bit instruction on memory with the number in a register.
pub fn by_register(insn: &Instruction) -> bool {
    use Mnemonic::*;
    let bits = matches!(insn.mnemonic(), Bt | Bts | Btr | Btc);
    bits && insn.op0_kind() == OpKind::Memory && insn.op1_kind() == OpKind::Register
}

/// What an address may be: the instruction's address size.
pub fn address_mask(insn: &Instruction) -> u64 {
    let register = match (insn.memory_base(), insn.memory_index()) {
        (Register::None, index) => index,
        (base, _) => base,
    };
    let bytes = if register == Register::None { insn.memory_displ_size() as usize } else { register.size() };
    match bytes {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

fn exec(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let (register, mnemonic) = (insn.op1_register(), insn.mnemonic());
    let size = register.size();
    let value = cpu.read_register(register);
    let number = match size {
        2 => i64::from(value as i16),
        4 => i64::from(value as i32),
        _ => value as i64,
    };
    let word = number.div_euclid(8 * size as i64).wrapping_mul(size as i64);
    let bit = number.rem_euclid(8 * size as i64) as u32;

    let access = if mnemonic == Mnemonic::Bt { Access::Read } else { Access::Write };
    let (segment, offset) = cpu.effective_address(insn, 0);
    let offset = offset.wrapping_add(word as u64) & address_mask(insn);
    let va = cpu.linear(segment, offset, size, access == Access::Write)?;
    let context = cpu.context();
    let crosses = va % 4096 + size as u64 > 4096;
    if access == Access::Write {
        cpu.probe_write(va, size, context)?;
    } else if crosses {
        cpu.read_sized(va, size, context)?;
    }

    let byte_va = va.wrapping_add(u64::from(bit / 8));
    let byte_va = if cpu.long_mode() { byte_va } else { byte_va & 0xffff_ffff };
    // A fault is that of the word.
    let at_word = |mut e: arch::Exception| {
        if !crosses && e.vector == arch::Vector::PageFault {
            e.fault_address = va;
        }
        e
    };
    let old = match Span::find(cpu, byte_va, access, context).map_err(at_word)? {
        Some(span) => {
            // SAFETY: the span is a byte of guest RAM, which only atomic and raw accesses touch.
            let byte = unsafe { AtomicU8::from_ptr(span.host) };
            let bits = 1u8 << (bit % 8);
            let old = match mnemonic {
                Mnemonic::Bts => byte.fetch_or(bits, Ordering::SeqCst),
                Mnemonic::Btr => byte.fetch_and(!bits, Ordering::SeqCst),
                Mnemonic::Btc => byte.fetch_xor(bits, Ordering::SeqCst),
                _ => byte.load(Ordering::SeqCst),
            };
            if access == Access::Write {
                span.stored(cpu, 0, 1);
            }
            old & bits != 0
        }
        None => {
            let old = cpu.read_sized(va, size, context)?;
            let bits = 1u64 << bit;
            let new = match mnemonic {
                Mnemonic::Bts => old | bits,
                Mnemonic::Btr => old & !bits,
                _ => old ^ bits,
            };
            if access == Access::Write {
                cpu.write_sized(va, size, new, context)?;
            }
            old & bits != 0
        }
    };
    cpu.set_flags(rflags::CF, if old { rflags::CF } else { 0 });
    Ok(())
}

#[cfg(test)]
mod tests;
