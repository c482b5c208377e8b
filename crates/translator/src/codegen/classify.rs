//! What kind of thing an instruction is to the translator: innocuous, sensitive, a branch, a stack instruction, or nothing.
//!
//! Only what is known to touch nothing but the guest's registers and one checked memory operand runs natively
//! ([`native`]); what nobody claims raises #UD.

use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpAccess, OpKind,
};

use super::facts::{FormMemo, FpClass, Memo, facts};
use super::operand::memory_operand;
use crate::cpu::Stop;
use crate::mode::Mode;
use crate::semantics::{self, Exec};

#[derive(Clone, Copy)]
pub enum Kind {
    Sensitive(Exec, bool),
    /// A near branch, call or return, emitted inline.
    Branch,
    /// PUSH, POP, PUSHA, POPA, LEAVE, emitted inline.
    Stack,
    /// A privileged instruction, emitted inline.
    System,
    /// STAC or CLAC, emitted inline: the block ends, since what follows runs in another mode.
    Access,
    /// SYSCALL or SYSRET, likewise.
    Level,
    /// MOVS, STOS or LODS, emitted inline.
    String,
    /// BT, BTS, BTR or BTC on memory by a number in a register, emitted inline.
    Bit,
    Skip,
    Native,
}

/// More than 15 bytes, or some outside the code segment (Intel SDM 3A 6.15, interrupt 13).
pub fn raise_general_protection(_: &mut crate::Vcpu, _: &Instruction) -> Result<(), Stop> {
    Err(arch::Exception::general_protection(0).into())
}

pub fn raise_invalid_opcode(_: &mut crate::Vcpu, _: &Instruction) -> Result<(), Stop> {
    Err(arch::Exception::invalid_opcode().into())
}

pub fn raise_device_not_available(_: &mut crate::Vcpu, _: &Instruction) -> Result<(), Stop> {
    Err(arch::Exception::device_not_available().into())
}

pub fn classify(insn: &Instruction, mode: Mode, inline_tsc: bool) -> Kind {
    if insn.is_invalid() {
        return Kind::Sensitive(raise_invalid_opcode, true);
    }
    let fp = facts(insn.code()).fp;
    if let Some(exec) = fp_blocked(insn, fp, mode) {
        return Kind::Sensitive(exec, true);
    }
    if plain(insn) {
        return Kind::Native;
    }
    if super::system::emits(insn, mode, inline_tsc) {
        return Kind::System;
    }
    if let Some(next) = super::system::access_mode(insn, mode) {
        return if next == mode { Kind::Skip } else { Kind::Access };
    }
    if super::level::emits(insn, mode) {
        return Kind::Level;
    }
    if super::strings::emits(insn, mode) {
        return Kind::String;
    }
    if super::bits::emits(insn, mode) {
        return Kind::Bit;
    }
    if let Some(s) = sensitive(insn) {
        return Kind::Sensitive(s.exec, s.ends_block);
    }
    let inline = !mode.checks_alignment();
    match insn.flow_control() {
        FlowControl::Next => {}
        FlowControl::UnconditionalBranch
        | FlowControl::ConditionalBranch
        | FlowControl::IndirectBranch
        | FlowControl::Return
        | FlowControl::Call
        | FlowControl::IndirectCall
            if is_near_branch(insn) =>
        {
            let inline = inline && super::control::emits(insn, mode);
            return if inline { Kind::Branch } else { Kind::Sensitive(semantics::stack::exec, true) };
        }
        _ => return Kind::Sensitive(raise_invalid_opcode, true),
    }
    if is_stack(insn) {
        let inline = inline && super::stack::emits(insn, mode);
        return if inline { Kind::Stack } else { Kind::Sensitive(semantics::stack::exec, false) };
    }
    if mode.is_amd() && is_prefetch_of_register(insn) {
        return Kind::Sensitive(raise_invalid_opcode, true);
    }
    if skips(insn) {
        return Kind::Skip;
    }
    if native(insn) { Kind::Native } else { Kind::Sensitive(raise_invalid_opcode, true) }
}

/// Whether an instruction is innocuous in every mode that allows it, which is remembered by its form: most are. What is
/// emitted inline in some modes is either sensitive in others, or nothing that runs natively.
fn plain(insn: &Instruction) -> bool {
    static PLAIN: FormMemo = FormMemo::new();
    PLAIN.get(insn, || {
        sensitive(insn).is_none()
            && insn.flow_control() == FlowControl::Next
            && !is_stack(insn)
            && !skips(insn)
            && native(insn)
    })
}

/// [`semantics::lookup`], which for most forms has nothing: that is remembered.
pub fn sensitive(insn: &Instruction) -> Option<semantics::Sensitive> {
    static INNOCUOUS: FormMemo = FormMemo::new();
    let mut found = None;
    let innocuous = INNOCUOUS.get(insn, || {
        found = semantics::lookup(insn);
        found.is_none()
    });
    if innocuous { None } else { found.or_else(|| semantics::lookup(insn)) }
}

/// The exception that CR0, CR4 and XCR0 call for, if any (Intel SDM 3A 2.5, 13.1).
pub fn fp_blocked(insn: &Instruction, fp: FpClass, mode: Mode) -> Option<Exec> {
    let ud: Option<Exec> = Some(raise_invalid_opcode);
    let nm: Option<Exec> = Some(raise_device_not_available);
    let switched = if mode.task_switched() { nm } else { None };
    match fp {
        FpClass::None => None,
        FpClass::X87 if insn.code() == Code::Wait => {
            if mode.task_switched() && mode.monitor_fpu() {
                nm
            } else {
                None
            }
        }
        FpClass::X87 => {
            if mode.emulate_fpu() {
                nm
            } else {
                switched
            }
        }
        FpClass::Mmx => {
            if mode.emulate_fpu() {
                ud
            } else {
                switched
            }
        }
        FpClass::Sse => {
            if mode.emulate_fpu() || !mode.sse() {
                ud
            } else {
                switched
            }
        }
        FpClass::Avx => {
            if !mode.avx() {
                ud
            } else {
                switched
            }
        }
        FpClass::Avx512 => {
            if !mode.avx512() {
                ud
            } else {
                switched
            }
        }
    }
}

pub fn is_near_branch(insn: &Instruction) -> bool {
    use Mnemonic::*;
    match insn.mnemonic() {
        Jmp | Call => {
            insn.is_jmp_near_indirect()
                || insn.is_call_near_indirect()
                || insn.is_jmp_short_or_near()
                || insn.is_call_near()
        }
        Ret | Loop | Loope | Loopne | Jcxz | Jecxz | Jrcxz => true,
        _ => insn.is_jcc_short_or_near(),
    }
}

pub fn is_stack(insn: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(insn.mnemonic(), Push | Pop | Pusha | Pushad | Popa | Popad | Leave)
}

/// Instructions whose slow path executes the whole of them in Rust.
pub fn runs_whole_in_rust(insn: &Instruction) -> bool {
    is_stack(insn) || is_near_branch(insn) || super::system::is_flags_on_stack(insn)
}

/// Hints that do nothing a guest can see. RDSSP is one where there are no shadow stacks (Intel SDM 2B): software asks by it
/// whether there are, without a look at CPUID.
pub fn skips(insn: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        insn.mnemonic(),
        Nop | Reservednop
            | Endbr32
            | Endbr64
            | Rdsspd
            | Rdsspq
            | Prefetchnta
            | Prefetcht0
            | Prefetcht1
            | Prefetcht2
            | Prefetchw
            | Prefetch
            | Prefetchwt1
            | Cldemote
    )
}

/// PREFETCH and its like need a memory operand (AMD APM 3, PREFETCH); to Intel's processors they are NOPs without one.
fn is_prefetch_of_register(insn: &Instruction) -> bool {
    use Code::*;
    matches!(insn.code(), Reservednop_rm16_r16_0F0D | Reservednop_rm32_r32_0F0D | Reservednop_rm64_r64_0F0D)
        && insn.op0_kind() == OpKind::Register
}

/// Whether an instruction may run on the host's processor as it is: it touches only registers that are the guest's and
/// the one memory operand that was checked.
pub fn native(insn: &Instruction) -> bool {
    use Mnemonic::*;
    if insn.is_privileged() || insn.is_vsib() {
        return false;
    }
    let operands_ok = (0..insn.op_count()).all(|i| match insn.op_kind(i) {
        OpKind::Register => {
            let r = insn.op_register(i);
            !(r.is_segment_register() || r.is_cr() || r.is_dr() || r.is_tr() || r.is_tmm() || r.is_bnd())
        }
        OpKind::Memory => true,
        OpKind::NearBranch16
        | OpKind::NearBranch32
        | OpKind::NearBranch64
        | OpKind::FarBranch16
        | OpKind::FarBranch32 => false,
        OpKind::MemorySegSI
        | OpKind::MemorySegESI
        | OpKind::MemorySegRSI
        | OpKind::MemorySegDI
        | OpKind::MemorySegEDI
        | OpKind::MemorySegRDI
        | OpKind::MemoryESDI
        | OpKind::MemoryESEDI
        | OpKind::MemoryESRDI => false,
        _ => true,
    });
    operands_ok
        && !matches!(
            insn.mnemonic(),
            Syscall
                | Sysenter
                | Sysexit
                | Sysret
                | Int
                | Int1
                | Int3
                | Into
                | Iret
                | Iretd
                | Iretq
                | Cpuid
                | Rdtsc
                | Rdtscp
                | Rdpid
                | Rdpmc
                | Xgetbv
                | Xsetbv
                | Sgdt
                | Sidt
                | Sldt
                | Str
                | Smsw
                | Lar
                | Lsl
                | Verr
                | Verw
                | Rdpkru
                | Wrpkru
                | Rdfsbase
                | Rdgsbase
                | Wrfsbase
                | Wrgsbase
                | Pushf
                | Pushfd
                | Pushfq
                | Popf
                | Popfd
                | Popfq
                | Cli
                | Sti
                | Clac
                | Stac
                | Hlt
                | Monitor
                | Mwait
                | Monitorx
                | Mwaitx
                | Umonitor
                | Umwait
                | Tpause
                | Xbegin
                | Xend
                | Xabort
                | Xtest
                | Vmcall
                | Vmmcall
                | Vmfunc
                | Encls
                | Enclu
                | Enclv
                | Rdpru
                | Clzero
                | Enqcmd
                | Enqcmds
                | Senduipi
                | Uiret
                | Stui
                | Clui
                | Testui
                | Incsspd
                | Incsspq
                | Saveprevssp
                | Rstorssp
                | Wrssd
                | Wrssq
                | Setssbsy
                | Clrssbsy
                | Ptwrite
                | Getsec
                | Pconfig
                | Rsm
                | Ud0
                | Ud1
                | Ud2
                | Enter
                | Pusha
                | Pushad
                | Popa
                | Popad
                | Bound
                | Aaa
                | Aas
                | Daa
                | Das
                | Aam
                | Aad
                | Arpl
                | Salc
                | Xsave
                | Xsave64
                | Xsaveopt
                | Xsaveopt64
                | Xsavec
                | Xsavec64
                | Xsaves
                | Xsaves64
                | Xrstor
                | Xrstor64
                | Xrstors
                | Xrstors64
                | Fxsave
                | Fxsave64
                | Fxrstor
                | Fxrstor64
                | Fnsave
                | Fsave
                | Frstor
                | Fnstenv
                | Fstenv
                | Fldenv
                | Maskmovq
                | Maskmovdqu
                | Vmaskmovdqu
                | Movdir64b
                | Std
                | Cld
                | Hreset
                | Ldtilecfg
                | Sttilecfg
                | Tilerelease
                | Lkgs
                | Erets
                | Eretu
                | Wrmsrns
        )
}

/// The operand whose address is translated, if the instruction accesses memory.
pub fn access_operand(insn: &Instruction) -> Option<u32> {
    if matches!(insn.mnemonic(), Mnemonic::Lea | Mnemonic::Nop | Mnemonic::Reservednop) {
        return None;
    }
    memory_operand(insn)
}

/// How many bytes an instruction's memory operand is checked for. One, where the size is none of the instruction's
/// business (CLFLUSH and the like).
pub fn operand_size(insn: &Instruction) -> usize {
    match insn.mnemonic() {
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb | Mnemonic::Xlatb => 1,
        // AMD's processors read 32 bits also where 16 are wanted, and the host's does when it runs here.
        Mnemonic::Movsxd if crate::host_is_amd() => 4,
        _ => insn.memory_size().size().clamp(1, 64),
    }
}

/// Whether the memory operand is written.
pub fn writes(insn: &Instruction, operand: u32) -> bool {
    static WRITES: Memo = Memo::new();
    WRITES.get(insn.code(), || {
        let mut factory = InstructionInfoFactory::new();
        let options = InstructionInfoOptions::NO_MEMORY_USAGE | InstructionInfoOptions::NO_REGISTER_USAGE;
        matches!(
            factory.info_options(insn, options).op_access(operand),
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        )
    })
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    #[test]
    fn asking_for_a_shadow_stack_does_nothing_where_there_is_none() {
        // RDSSPQ RSI, as Xen and unwinders of C++ have it unconditionally; RDSSPD EAX; ENDBR64.
        for bytes in [&[0xf3, 0x48, 0x0f, 0x1e, 0xce][..], &[0xf3, 0x0f, 0x1e, 0xc8], &[0xf3, 0x0f, 0x1e, 0xfa]] {
            let insn = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
            assert!(!insn.is_invalid() && skips(&insn) && sensitive(&insn).is_none(), "{bytes:x?}");
        }
    }
}
