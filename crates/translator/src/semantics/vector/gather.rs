//! Gathers and scatters: one address for each element (Intel SDM 2C, VGATHER, VPGATHER, VSCATTER, VPSCATTER).
//!
//! Elements are done from the lowest on, and each clears its bit of the mask, so that after a fault the instruction can
//! be started again and does only what is left.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use arch::Exception;
use arch::registers::{debug, rflags};

use super::masked::{opmask_index, vector_index};
use super::require_vector;
use crate::cpu::{Stop, Vcpu};

/// Index and data element sizes in bytes, and whether memory is written.
pub fn shape(mnemonic: Mnemonic) -> Option<(usize, usize, bool)> {
    use Mnemonic::*;
    Some(match mnemonic {
        Vgatherdps | Vpgatherdd => (4, 4, false),
        Vgatherdpd | Vpgatherdq => (4, 8, false),
        Vgatherqps | Vpgatherqd => (8, 4, false),
        Vgatherqpd | Vpgatherqq => (8, 8, false),
        Vscatterdps | Vpscatterdd => (4, 4, true),
        Vscatterdpd | Vpscatterdq => (4, 8, true),
        Vscatterqps | Vpscatterqd => (8, 4, true),
        Vscatterqpd | Vpscatterqq => (8, 8, true),
        _ => return None,
    })
}

/// The linear address of an element.
fn element_address(
    cpu: &Vcpu,
    insn: &Instruction,
    operand: u32,
    element: usize,
    size: usize,
    write: bool,
) -> Result<u64, Exception> {
    let index = cpu.xsave.vector(vector_index(insn.memory_index()));
    let offset = insn.virtual_address(operand, element, |register, lane, bytes| {
        if register.is_segment_register() {
            Some(0) // the offset is wanted
        } else if register.is_vector_register() {
            let lane = index.get(lane * bytes..)?;
            match bytes {
                4 => lane.first_chunk().map(|b| u64::from(u32::from_le_bytes(*b))),
                _ => lane.first_chunk().map(|b| u64::from_le_bytes(*b)),
            }
        } else {
            Some(cpu.read_register(register))
        }
    });
    cpu.linear_unaligned(cpu.operand_segment(insn), offset.unwrap_or(0), size, write)
}

/// The mask register as a number with a bit for each element.
fn mask_of(cpu: &Vcpu, insn: &Instruction, size: usize, count: usize) -> u64 {
    let mask = if insn.encoding() == EncodingKind::EVEX {
        cpu.xsave.opmask(opmask_index(insn.op_mask()))
    } else {
        let signs = cpu.xsave.vector(vector_index(insn.op2_register()));
        (0..count).filter(|i| signs[(i + 1) * size - 1] & 0x80 != 0).fold(0, |mask, i| mask | 1 << i)
    };
    mask & ((1 << count) - 1)
}

/// Writes what is left of the mask. An opmask register keeps its upper bits until all is done; the elements of a vector register
/// become all ones or zero, and what is above them zero. To AMD's processors elements up to the first one that is left become
/// zero, and all above stays as it was.
fn set_mask(cpu: &mut Vcpu, insn: &Instruction, size: usize, count: usize, left: u64) {
    if insn.encoding() == EncodingKind::EVEX {
        let register = opmask_index(insn.op_mask());
        let above = if left == 0 { 0 } else { cpu.xsave.opmask(register) >> count << count };
        cpu.xsave.set_opmask(register, above | left);
        return;
    }
    let register = vector_index(insn.op2_register());
    let mut value = [0; 64];
    if left != 0 {
        // Elements beyond those that are gathered as well, up to the vector length.
        let old = cpu.xsave.vector(register);
        if cpu.machine.cpuid.is_amd() {
            value = old;
            value[..left.trailing_zeros() as usize * size].fill(0);
            cpu.xsave.set_vector(register, &value);
            return;
        }
        let length = insn.memory_index().size().max(insn.op0_register().size());
        for (element, place) in value[..length].chunks_mut(size).enumerate() {
            let set =
                if element < count { left >> element & 1 != 0 } else { old[(element + 1) * size - 1] & 0x80 != 0 };
            place.fill(if set { 0xff } else { 0 });
        }
    }
    cpu.xsave.set_vector(register, &value);
}

pub fn exec(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    require_vector(cpu, insn)?;
    let Some((index_size, size, scatter)) = shape(insn.mnemonic()) else {
        return Err(Exception::invalid_opcode().into());
    };
    if insn.encoding() == EncodingKind::EVEX && insn.op_mask() == Register::None {
        return Err(Exception::invalid_opcode().into());
    }
    let operand = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory).unwrap_or(0);
    let data = if scatter { insn.op1_register() } else { insn.op0_register() };
    let register = vector_index(data);
    let count = (insn.memory_index().size() / index_size).min(data.size() / size);
    let context = cpu.context();
    let mut value = cpu.xsave.vector(register);
    let all = mask_of(cpu, insn, size, count);
    let mut left = all;
    let mut fault = None;
    while left != 0 {
        let element = left.trailing_zeros() as usize;
        let place = &mut value[element * size..(element + 1) * size];
        let done = element_address(cpu, insn, operand, element, size, scatter).and_then(|va| match scatter {
            true => cpu.write_linear(va, place, context),
            false => cpu.read_linear(va, place, context),
        });
        if let Err(e) = done {
            fault = Some(e);
            break;
        }
        left &= left - 1;
    }
    set_mask(cpu, insn, size, count, left);
    let amd = cpu.machine.cpuid.is_amd();
    if !scatter {
        // What is above the vector length is cleared with the first element (by AMD's processors at the end), what is below it but
        // above the elements (where indices are wider than elements) only at the end.
        let length = insn.memory_index().size().max(data.size());
        match fault {
            None => value[count * size..].fill(0),
            Some(_) if left != all && !(amd && insn.encoding() == EncodingKind::VEX) => value[length..].fill(0),
            Some(_) => {}
        }
        cpu.xsave.set_vector(register, &value);
    }
    match fault {
        None => Ok(()),
        // A trap that is due after some elements comes instead of the fault of another; RF keeps an instruction breakpoint from
        // hitting again when the rest is done (Intel SDM 2C, VPGATHER), though not on AMD's processors.
        Some(_) if left != all && cpu.rflags & rflags::TF != 0 => {
            if !amd {
                cpu.rflags |= rflags::RF;
            }
            Err(Exception::debug(debug::DR6_BS).into())
        }
        Some(e) => Err(e.into()),
    }
}
