//! Instructions on segment registers, descriptors and segment bases: MOV, PUSH and POP of segment registers, LDS and its
//! like, LAR, LSL, VERR, VERW, LLDT, LTR, SLDT, STR, SWAPGS and the FSGSBASE four (Intel SDM 2A, 2B).

use arch::registers::{cr4, gpr, rflags};
use arch::{Exception, Segment, SegmentRegister, Vector};
use iced_x86::{Code, Instruction, Mnemonic, Register};

use super::{Exec, Sensitive};
use crate::cpu::{Stop, Vcpu};
use crate::descriptor::{BUSY, Descriptor, is_null, protection_fault, selector_fault, system};
use crate::mmu::operand::segment_register;
use crate::mmu::{Stack, is_canonical};

/// The function for an instruction of this module.
pub fn lookup(insn: &Instruction) -> Option<Sensitive> {
    let exec: Exec = match insn.code() {
        Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg | Code::Mov_rm16_Sreg => store_selector,
        Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 | Code::Mov_Sreg_rm16 => load_selector,
        _ => match insn.mnemonic() {
            Mnemonic::Push if insn.op0_register().is_segment_register() => push,
            Mnemonic::Pop if insn.op0_register().is_segment_register() => pop,
            Mnemonic::Lds => |cpu, insn| load_far_pointer(cpu, insn, SegmentRegister::Ds),
            Mnemonic::Les => |cpu, insn| load_far_pointer(cpu, insn, SegmentRegister::Es),
            Mnemonic::Lfs => |cpu, insn| load_far_pointer(cpu, insn, SegmentRegister::Fs),
            Mnemonic::Lgs => |cpu, insn| load_far_pointer(cpu, insn, SegmentRegister::Gs),
            Mnemonic::Lss => |cpu, insn| load_far_pointer(cpu, insn, SegmentRegister::Ss),
            Mnemonic::Lar => lar,
            Mnemonic::Lsl => lsl,
            Mnemonic::Verr => |cpu, insn| verify(cpu, insn, Descriptor::is_readable),
            Mnemonic::Verw => |cpu, insn| verify(cpu, insn, Descriptor::is_writable_data),
            Mnemonic::Lldt => lldt,
            Mnemonic::Ltr => ltr,
            Mnemonic::Sldt => |cpu, insn| store_system_selector(cpu, insn, cpu.ldtr.selector),
            Mnemonic::Str => |cpu, insn| store_system_selector(cpu, insn, cpu.tr.selector),
            Mnemonic::Swapgs => swapgs,
            Mnemonic::Rdfsbase => |cpu, insn| read_base(cpu, insn, SegmentRegister::Fs),
            Mnemonic::Rdgsbase => |cpu, insn| read_base(cpu, insn, SegmentRegister::Gs),
            Mnemonic::Wrfsbase => |cpu, insn| write_base(cpu, insn, SegmentRegister::Fs),
            Mnemonic::Wrgsbase => |cpu, insn| write_base(cpu, insn, SegmentRegister::Gs),
            _ => return None,
        },
    };
    Some(Sensitive { exec, ends_block: loads_segment(insn), fp: false })
}

/// Whether the block ends: outside 64-bit mode segments are part of what code was translated for, and SS inhibits interrupts.
fn loads_segment(insn: &Instruction) -> bool {
    let target = match insn.mnemonic() {
        Mnemonic::Mov | Mnemonic::Pop => insn.op0_register(),
        Mnemonic::Lds => Register::DS,
        Mnemonic::Les => Register::ES,
        Mnemonic::Lfs => Register::FS,
        Mnemonic::Lgs => Register::GS,
        Mnemonic::Lss => Register::SS,
        _ => return false,
    };
    target == Register::SS || target.is_segment_register() && insn.code_size() != iced_x86::CodeSize::Code64
}

/// After MOV SS and POP SS interrupts and debug traps wait for one instruction (Intel SDM 3A 6.8.3). A second such load in a row does not
/// extend the wait.
fn inhibit_events(cpu: &mut Vcpu, register: SegmentRegister) {
    if register == SegmentRegister::Ss {
        cpu.interrupt_shadow = true;
        cpu.debug_shadow = true;
    }
}

fn load_selector(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    if insn.op0_register() == Register::CS {
        return Err(Exception::invalid_opcode().into());
    }
    let register = segment_register(insn.op0_register());
    let selector = cpu.read_operand(insn, 1)? as u16;
    cpu.load_data_segment(register, selector)?;
    inhibit_events(cpu, register);
    Ok(())
}

/// Registers get the selector zero-extended to the operand size, memory always 16 bits.
fn store_selector(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let selector = cpu.read_register(insn.op1_register());
    Ok(cpu.write_operand(insn, 0, selector)?)
}

/// Operand size of PUSH and POP in bytes.
fn stack_operand_size(insn: &Instruction) -> usize {
    insn.stack_pointer_increment().unsigned_abs() as usize
}

/// The stack pointer moves by the operand size; outside 64-bit mode only the selector's 16 bits are written (Intel SDM 2B, PUSH).
fn push(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let selector = cpu.read_register(insn.op0_register());
    let mut stack = Stack::current(cpu);
    match stack_operand_size(insn) {
        4 => stack.push_selector(cpu, selector as u16)?,
        size => stack.push(cpu, size, selector)?,
    }
    cpu.gpr[gpr::RSP] = stack.pointer;
    Ok(())
}

fn pop(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let register = segment_register(insn.op0_register());
    let mut stack = Stack::current(cpu);
    let selector = stack.pop(cpu, stack_operand_size(insn))? as u16;
    cpu.load_data_segment(register, selector)?;
    cpu.gpr[gpr::RSP] = stack.pointer;
    inhibit_events(cpu, register);
    Ok(())
}

fn load_far_pointer(cpu: &mut Vcpu, insn: &Instruction, register: SegmentRegister) -> Result<(), Stop> {
    let target = insn.op0_register();
    let (offset, selector) = cpu.read_far_pointer(insn, 1, target.size())?;
    cpu.load_data_segment(register, selector)?;
    cpu.write_register(target, offset);
    Ok(())
}

/// LAR, LSL, VERR, VERW, LLDT, LTR, SLDT and STR do not exist in real and virtual-8086 mode.
fn require_protected_mode(cpu: &Vcpu) -> Result<(), Exception> {
    if cpu.protected_mode() && !cpu.v8086() { Ok(()) } else { Err(Exception::invalid_opcode()) }
}

fn require_privilege(cpu: &Vcpu) -> Result<(), Exception> {
    if cpu.cpl() == 0 { Ok(()) } else { Err(Exception::general_protection(0)) }
}

/// The descriptor that an instruction asks about, if the current program may see it: at its CPL and the selector's RPL.
fn visible_descriptor(cpu: &mut Vcpu, insn: &Instruction, operand: u32) -> Result<Option<Descriptor>, Exception> {
    require_protected_mode(cpu)?;
    let selector = cpu.read_operand(insn, operand)? as u16;
    if is_null(selector) {
        return Ok(None);
    }
    let (rpl, cpl) = ((selector & 3) as u8, cpu.cpl());
    let descriptor = cpu.descriptor(selector)?;
    Ok(descriptor.filter(|d| d.is_conforming() || d.dpl() >= cpl && d.dpl() >= rpl))
}

fn set_zero_flag(cpu: &mut Vcpu, set: bool) {
    cpu.set_flags(rflags::ZF, if set { rflags::ZF } else { 0 });
}

fn lar(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    use system::{CALL_GATE, CALL_GATE16, LDT, TASK_GATE, TSS, TSS_BUSY, TSS16, TSS16_BUSY};
    let long = cpu.long_mode();
    let known = |d: &Descriptor| match d.kind() {
        _ if !d.is_system() => true,
        LDT | TSS | TSS_BUSY | CALL_GATE => true,
        TSS16 | TSS16_BUSY | CALL_GATE16 | TASK_GATE => !long,
        _ => false,
    };
    let descriptor = visible_descriptor(cpu, insn, 1)?.filter(known);
    if let Some(descriptor) = descriptor {
        let mask = if insn.op0_register().size() == 2 { 0xff00 } else { 0xff_ff00 };
        cpu.write_register(insn.op0_register(), descriptor.raw >> 32 & mask);
    }
    set_zero_flag(cpu, descriptor.is_some());
    Ok(())
}

fn lsl(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    use system::{LDT, TSS, TSS_BUSY, TSS16, TSS16_BUSY};
    let long = cpu.long_mode();
    let known = |d: &Descriptor| match d.kind() {
        _ if !d.is_system() => true,
        LDT | TSS | TSS_BUSY => true,
        TSS16 | TSS16_BUSY => !long,
        _ => false,
    };
    let descriptor = visible_descriptor(cpu, insn, 1)?.filter(known);
    if let Some(descriptor) = descriptor {
        cpu.write_register(insn.op0_register(), u64::from(descriptor.limit()));
    }
    set_zero_flag(cpu, descriptor.is_some());
    Ok(())
}

/// VERR and VERW.
fn verify(cpu: &mut Vcpu, insn: &Instruction, allows: fn(&Descriptor) -> bool) -> Result<(), Stop> {
    let descriptor = visible_descriptor(cpu, insn, 0)?;
    set_zero_flag(cpu, descriptor.is_some_and(|d| allows(&d)));
    Ok(())
}

/// The descriptor of an LDT or TSS of one of `kinds`, with its full base, as LLDT and LTR load it.
fn system_segment(cpu: &mut Vcpu, selector: u16, kinds: &[u8]) -> Result<(Descriptor, Segment), Exception> {
    let invalid = protection_fault(selector);
    if selector & 4 != 0 {
        return Err(invalid);
    }
    let descriptor = cpu.descriptor(selector)?.ok_or(invalid)?;
    let upper = if cpu.long_mode() { cpu.descriptor_upper(selector)?.ok_or(invalid)? } else { 0 };
    if !descriptor.is_system() || !kinds.contains(&descriptor.kind()) {
        return Err(invalid);
    }
    if !descriptor.present() {
        return Err(selector_fault(Vector::SegmentNotPresent, selector, 0));
    }
    let mut segment = descriptor.segment(selector);
    segment.base |= upper << 32;
    if cpu.long_mode() && !is_canonical(segment.base) {
        return Err(invalid);
    }
    Ok((descriptor, segment))
}

fn lldt(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    require_protected_mode(cpu)?;
    require_privilege(cpu)?;
    let selector = cpu.read_operand(insn, 0)? as u16;
    cpu.ldtr = if is_null(selector) {
        Segment { selector, ..Segment::default() }
    } else {
        system_segment(cpu, selector, &[system::LDT])?.1
    };
    Ok(())
}

fn ltr(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    require_protected_mode(cpu)?;
    require_privilege(cpu)?;
    let selector = cpu.read_operand(insn, 0)? as u16;
    if is_null(selector) {
        return Err(Exception::general_protection(0).into());
    }
    let kinds: &[u8] = if cpu.long_mode() { &[system::TSS] } else { &[system::TSS, system::TSS16] };
    let (descriptor, mut segment) = system_segment(cpu, selector, kinds)?;
    cpu.set_bits_linear(descriptor.address.wrapping_add(5), BUSY, cpu.system_context())?;
    segment.attributes |= u16::from(BUSY);
    cpu.tr = segment;
    Ok(())
}

/// SLDT and STR: as MOV from a segment register, but not for programs under UMIP.
fn store_system_selector(cpu: &mut Vcpu, insn: &Instruction, selector: u16) -> Result<(), Stop> {
    require_protected_mode(cpu)?;
    if cpu.cr4 & cr4::UMIP != 0 {
        require_privilege(cpu)?;
    }
    Ok(cpu.write_operand(insn, 0, u64::from(selector))?)
}

fn swapgs(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    if !cpu.code64() {
        return Err(Exception::invalid_opcode().into());
    }
    require_privilege(cpu)?;
    std::mem::swap(&mut cpu.segments[SegmentRegister::Gs as usize].base, &mut cpu.msrs.kernel_gs_base);
    Ok(())
}

fn require_base_access(cpu: &Vcpu) -> Result<(), Exception> {
    if cpu.code64() && cpu.cr4 & cr4::FSGSBASE != 0 { Ok(()) } else { Err(Exception::invalid_opcode()) }
}

fn read_base(cpu: &mut Vcpu, insn: &Instruction, register: SegmentRegister) -> Result<(), Stop> {
    require_base_access(cpu)?;
    cpu.write_register(insn.op0_register(), cpu.seg(register).base);
    Ok(())
}

fn write_base(cpu: &mut Vcpu, insn: &Instruction, register: SegmentRegister) -> Result<(), Stop> {
    require_base_access(cpu)?;
    let base = cpu.read_register(insn.op0_register());
    if !is_canonical(base) {
        return Err(Exception::general_protection(0).into());
    }
    cpu.segments[register as usize].base = base;
    Ok(())
}
