//! Instructions on segment registers, descriptors and segment bases: MOV, PUSH and POP of segment registers, LDS and
//! its like, LAR, LSL, VERR, VERW, LLDT, LTR, SLDT, STR, SWAPGS and the FSGSBASE four (Intel SDM 2A, 2B).

use arch::registers::{cr4, gpr, rflags};
use arch::{Exception, Segment, SegmentRegister, Vector};
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

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
    Some(Sensitive { exec, ends_block: loaded_segment(insn) == Register::SS, fp: false })
}

/// Whether segments change, which outside 64-bit mode may be part of what code was translated for.
pub fn loads_segment(insn: &Instruction) -> bool {
    loaded_segment(insn).is_segment_register()
}

/// The segment register that is loaded, if it is one. SS inhibits interrupts.
fn loaded_segment(insn: &Instruction) -> Register {
    let target = match insn.mnemonic() {
        Mnemonic::Mov | Mnemonic::Pop if insn.op0_kind() == OpKind::Register => insn.op0_register(),
        Mnemonic::Lds => Register::DS,
        Mnemonic::Les => Register::ES,
        Mnemonic::Lfs => Register::FS,
        Mnemonic::Lgs => Register::GS,
        Mnemonic::Lss => Register::SS,
        _ => return Register::None,
    };
    if target.is_segment_register() { target } else { Register::None }
}

/// After MOV SS and POP SS interrupts and debug traps wait for one instruction (Intel SDM 3A 6.8.3).
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

/// The stack pointer moves by the operand size; outside 64-bit mode Intel's processors write only the selector's 16 bits
/// (Intel SDM 2B, PUSH), AMD's all of the zero-extended operand (AMD APM 3, PUSH).
fn push(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let selector = cpu.read_register(insn.op0_register());
    let mut stack = Stack::current(cpu);
    match stack_operand_size(insn) {
        4 if !cpu.machine.cpuid.is_amd() => stack.push_selector(cpu, selector as u16)?,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{
        CODE64, DATA, DPL3, GDT, KERNEL_CS, KERNEL_SS, TSS, TSS_SELECTOR, USER, USER_CS, USER_SS, Vendor, execute,
        fault_of, kernel_vcpu, peek, poke, user_vcpu, user_vcpu_of,
    };

    /// MOV sreg, eax
    const MOV_ES: &[u8] = &[0x8e, 0xc0];
    const MOV_SS: &[u8] = &[0x8e, 0xd0];
    const MOV_GS: &[u8] = &[0x8e, 0xe8];

    fn with_rax(cpu: &mut Vcpu, value: u64) -> &mut Vcpu {
        cpu.gpr[gpr::RAX] = value;
        cpu
    }

    #[test]
    fn a_load_reads_the_descriptor_and_marks_it_accessed() {
        let mut cpu = user_vcpu();
        let descriptor = 0x12c0_f200_5678_0fff | 3 << 48;
        poke(&mut cpu, GDT + 0x38, descriptor);
        execute(with_rax(&mut cpu, 0x3b), MOV_GS).unwrap();
        let gs = *cpu.seg(SegmentRegister::Gs);
        assert_eq!((gs.base, gs.limit, gs.selector), (0x1200_5678, 0x30ff_ffff, 0x3b));
        assert_eq!(peek(&cpu, GDT + 0x38), descriptor | 1 << 40);
        execute(with_rax(&mut cpu, 2), MOV_GS).unwrap();
        assert_eq!(*cpu.seg(SegmentRegister::Gs), Segment { selector: 2, ..Segment::default() });
    }

    #[test]
    fn loads_check_privilege_type_and_presence() {
        let not_present = selector_fault(Vector::SegmentNotPresent, 0x38, 0);
        let cases = [
            (KERNEL_SS, protection_fault(KERNEL_SS)),
            (USER_CS & !3, protection_fault(KERNEL_CS)),
            (0x98, protection_fault(0x98)),
            (0x27, protection_fault(0x24)),
            (TSS_SELECTOR, protection_fault(TSS_SELECTOR)),
            (0x3b, not_present),
        ];
        for (selector, expected) in cases {
            let mut cpu = user_vcpu();
            poke(&mut cpu, GDT + 0x28, CODE64);
            poke(&mut cpu, GDT + 0x38, (DATA | DPL3) & !(1 << 47));
            let expected = if selector == USER_CS & !3 { protection_fault(selector) } else { expected };
            assert_eq!(fault_of(with_rax(&mut cpu, selector.into()), MOV_ES), expected, "{selector:x}");
        }
    }

    #[test]
    fn ss_takes_only_stacks_of_the_current_level() {
        let mut cpu = kernel_vcpu();
        execute(with_rax(&mut cpu, 0), MOV_SS).unwrap();
        assert_eq!(cpu.cpl(), 0, "null in 64-bit mode");
        assert!(cpu.interrupt_shadow && cpu.debug_shadow);
        assert_eq!(fault_of(with_rax(&mut cpu, 3), MOV_SS), Exception::general_protection(0));
        assert_eq!(fault_of(with_rax(&mut cpu, USER_SS.into()), MOV_SS), protection_fault(USER_SS));
        poke(&mut cpu, GDT + 0x38, DATA & !(1 << 47));
        assert_eq!(fault_of(with_rax(&mut cpu, 0x38), MOV_SS), selector_fault(Vector::StackFault, 0x38, 0));
        let mut cpu = user_vcpu();
        assert_eq!(fault_of(with_rax(&mut cpu, 0), MOV_SS), Exception::general_protection(0));
    }

    #[test]
    fn a_pop_that_faults_leaves_the_stack_pointer() {
        let mut cpu = user_vcpu();
        let rsp = cpu.gpr[gpr::RSP];
        poke(&mut cpu, rsp, KERNEL_SS.into());
        assert_eq!(fault_of(&mut cpu, &[0x0f, 0xa1]), protection_fault(KERNEL_SS));
        assert_eq!(cpu.gpr[gpr::RSP], rsp);
        poke(&mut cpu, rsp, USER_SS.into());
        execute(&mut cpu, &[0x0f, 0xa1]).unwrap();
        assert_eq!((cpu.gpr[gpr::RSP], cpu.seg(SegmentRegister::Fs).selector), (rsp + 8, USER_SS));
        poke(&mut cpu, rsp, u64::MAX);
        execute(&mut cpu, &[0x0f, 0xa0]).unwrap();
        assert_eq!((cpu.gpr[gpr::RSP], peek(&cpu, rsp)), (rsp, USER_SS.into()));
    }

    #[test]
    fn a_32_bit_push_writes_two_bytes_of_four_but_for_amd() {
        for (vendor, above) in [(Vendor::Intel, 0xffff_0000), (Vendor::Amd, 0)] {
            let mut cpu = user_vcpu_of(vendor);
            cpu.segments[SegmentRegister::Cs as usize] = Segment::flat_code(0x1b, false, 3);
            let rsp = cpu.gpr[gpr::RSP];
            poke(&mut cpu, rsp - 8, u64::MAX);
            execute(&mut cpu, &[0x16]).unwrap();
            let written = peek(&cpu, rsp - 8) >> 32;
            assert_eq!((cpu.gpr[gpr::RSP], written), (rsp - 4, above | u64::from(USER_SS)), "{vendor:?}");
        }
    }

    #[test]
    fn selectors_are_stored_zero_extended_to_registers() {
        let mut cpu = user_vcpu();
        execute(with_rax(&mut cpu, u64::MAX), &[0x8c, 0xd0]).unwrap();
        assert_eq!(cpu.gpr[gpr::RAX], u64::from(USER_SS));
        execute(with_rax(&mut cpu, u64::MAX), &[0x66, 0x8c, 0xd0]).unwrap();
        assert_eq!(cpu.gpr[gpr::RAX], !0xffff | u64::from(USER_SS));
        poke(&mut cpu, USER, u64::MAX);
        execute(with_rax(&mut cpu, USER), &[0x48, 0x8c, 0x10]).unwrap();
        assert_eq!(peek(&cpu, USER), !0xffff | u64::from(USER_SS));
    }

    #[test]
    fn lar_and_lsl_tell_programs_what_they_may_see() {
        let (lar, lsl) = (&[0x0f, 0x02, 0xc8], &[0x0f, 0x03, 0xc8]);
        let mut cpu = user_vcpu();
        execute(with_rax(&mut cpu, USER_CS.into()), lar).unwrap();
        assert_eq!((cpu.gpr[gpr::RCX], cpu.rflags & rflags::ZF), (0xaf_fb00, rflags::ZF));
        execute(with_rax(&mut cpu, USER_SS.into()), lsl).unwrap();
        assert_eq!(cpu.gpr[gpr::RCX], 0xffff_ffff);
        for hidden in [0, KERNEL_CS, 0x98, TSS_SELECTOR] {
            execute(with_rax(&mut cpu, hidden.into()), lsl).unwrap();
            assert_eq!((cpu.gpr[gpr::RCX], cpu.rflags & rflags::ZF), (0xffff_ffff, 0), "{hidden:x}");
        }
        let mut cpu = kernel_vcpu();
        execute(with_rax(&mut cpu, TSS_SELECTOR.into()), lsl).unwrap();
        assert_eq!(cpu.gpr[gpr::RCX], 0x67);
    }

    #[test]
    fn verr_and_verw_ask_for_reading_and_writing() {
        let mut cpu = user_vcpu();
        for (selector, readable, writable) in [(USER_CS, true, false), (USER_SS, true, true), (KERNEL_SS, false, false)]
        {
            execute(with_rax(&mut cpu, selector.into()), &[0x0f, 0x00, 0xe0]).unwrap();
            assert_eq!(cpu.rflags & rflags::ZF != 0, readable, "VERR {selector:x}");
            execute(&mut cpu, &[0x0f, 0x00, 0xe8]).unwrap();
            assert_eq!(cpu.rflags & rflags::ZF != 0, writable, "VERW {selector:x}");
        }
    }

    #[test]
    fn ltr_loads_a_16_byte_descriptor_and_marks_it_busy() {
        let ltr: &[u8] = &[0x0f, 0x00, 0xd8];
        let mut cpu = kernel_vcpu();
        poke(&mut cpu, GDT + u64::from(TSS_SELECTOR) + 8, 0xffff_8000);
        execute(with_rax(&mut cpu, TSS_SELECTOR.into()), ltr).unwrap();
        assert_eq!((cpu.tr.base, cpu.tr.kind()), (0xffff_8000_0000_0000 | TSS, 11));
        assert_eq!(fault_of(&mut cpu, ltr), protection_fault(TSS_SELECTOR), "busy");
        assert_eq!(fault_of(with_rax(&mut cpu, 0), ltr), Exception::general_protection(0));
        assert_eq!(fault_of(with_rax(&mut cpu, 0x78), ltr), protection_fault(0x78), "half beyond the limit");
        assert_eq!(fault_of(&mut user_vcpu(), ltr), Exception::general_protection(0));
    }

    #[test]
    fn a_null_ldt_is_unusable() {
        let lldt: &[u8] = &[0x0f, 0x00, 0xd0];
        let mut cpu = kernel_vcpu();
        poke(&mut cpu, GDT + 0x50, 0x0000_8200_0000_000f | TSS << 16);
        poke(&mut cpu, TSS + 8, DATA);
        execute(with_rax(&mut cpu, 0x50), lldt).unwrap();
        execute(with_rax(&mut cpu, 0x0c), MOV_ES).unwrap();
        assert_eq!(fault_of(with_rax(&mut cpu, 0x14), MOV_ES), protection_fault(0x14));
        execute(with_rax(&mut cpu, 0), lldt).unwrap();
        assert_eq!(fault_of(with_rax(&mut cpu, 0x0c), MOV_ES), protection_fault(0x0c));
    }

    #[test]
    fn umip_hides_sldt_from_programs() {
        let mut cpu = user_vcpu();
        cpu.tr.selector = 0x40;
        execute(with_rax(&mut cpu, u64::MAX), &[0x0f, 0x00, 0xc8]).unwrap();
        assert_eq!(cpu.gpr[gpr::RAX], 0x40);
        cpu.cr4 |= cr4::UMIP;
        assert_eq!(fault_of(&mut cpu, &[0x0f, 0x00, 0xc8]), Exception::general_protection(0));
    }

    #[test]
    fn segment_bases_are_read_written_and_swapped() {
        let mut cpu = kernel_vcpu();
        let wrgsbase: &[u8] = &[0xf3, 0x48, 0x0f, 0xae, 0xd8];
        assert_eq!(fault_of(with_rax(&mut cpu, USER), wrgsbase), Exception::invalid_opcode());
        cpu.cr4 |= cr4::FSGSBASE;
        execute(&mut cpu, wrgsbase).unwrap();
        assert_eq!(fault_of(with_rax(&mut cpu, 1 << 47), wrgsbase), Exception::general_protection(0));
        cpu.msrs.kernel_gs_base = 0xffff_8000_0000_0000;
        execute(&mut cpu, &[0x0f, 0x01, 0xf8]).unwrap();
        assert_eq!(cpu.msrs.kernel_gs_base, USER);
        execute(&mut cpu, &[0xf3, 0x0f, 0xae, 0xc8]).unwrap();
        assert_eq!(cpu.gpr[gpr::RAX], 0, "RDGSBASE eax");
        execute(&mut cpu, &[0xf3, 0x48, 0x0f, 0xae, 0xc8]).unwrap();
        assert_eq!(cpu.gpr[gpr::RAX], 0xffff_8000_0000_0000);
        assert_eq!(fault_of(&mut user_vcpu(), &[0x0f, 0x01, 0xf8]), Exception::general_protection(0));
    }

    #[test]
    fn lss_loads_segment_and_register_of_at_most_32_bits_on_amd() {
        // LSS RSP, [RAX]
        let lss: &[u8] = &[0x48, 0x0f, 0xb2, 0x20];
        let mut cpu = user_vcpu_of(Vendor::Intel);
        poke(&mut cpu, USER, 0x1122_3344_5566_7788);
        poke(&mut cpu, USER + 8, USER_SS.into());
        execute(with_rax(&mut cpu, USER), lss).unwrap();
        assert_eq!(cpu.gpr[gpr::RSP], 0x1122_3344_5566_7788);
        assert!(!cpu.interrupt_shadow);
        let mut cpu = user_vcpu_of(Vendor::Amd);
        poke(&mut cpu, USER, u64::from(USER_SS) << 32 | 0x5566_7788);
        execute(with_rax(&mut cpu, USER), lss).unwrap();
        assert_eq!(cpu.gpr[gpr::RSP], 0x5566_7788);
    }

    #[test]
    fn only_loads_that_inhibit_events_end_a_block() {
        let ends = |bits, bytes: &[u8]| {
            let insn = iced_x86::Decoder::new(bits, bytes, 0).decode();
            lookup(&insn).unwrap().ends_block
        };
        assert!(ends(64, MOV_SS) && ends(32, MOV_SS) && !ends(64, MOV_ES));
        assert!(!ends(32, &[0x8c, 0xd8]) && !ends(64, &[0x0f, 0x01, 0xf8]));
    }
}
