//! FNSTENV, FLDENV, FNSAVE and FRSTOR: x87 state in its oldest format (Intel SDM 1 8.1.10). And FNCLEX and FNINIT where
//! CR0.NE may be clear, outside 64-bit mode: they end what FERR# tells (`ferr`).
//!
//! They are not run natively because the environment has the addresses of the last instruction and operand, which would be
//! the host's.

use arch::registers::{cr0, xcr0};
use arch::{Exception, Vector};
use iced_x86::{Code, CodeSize, Instruction};

use super::Sensitive;
use crate::cpu::{Stop, Vcpu, XsaveArea};
use crate::xstate::{component, legacy};

/// The entry for an instruction that stores or loads the x87 environment.
pub fn lookup(insn: &Instruction) -> Option<Sensitive> {
    use Code::*;
    let exec: super::Exec = match insn.code() {
        Fnstenv_m14byte | Fnstenv_m28byte => fnstenv,
        Fldenv_m14byte | Fldenv_m28byte => fldenv,
        Fnsave_m94byte | Fnsave_m108byte => fnsave,
        Frstor_m94byte | Frstor_m108byte => frstor,
        Fnclex if insn.code_size() != CodeSize::Code64 => fnclex,
        Fninit if insn.code_size() != CodeSize::Code64 => fninit,
        _ => return None,
    };
    Some(Sensitive { exec, ends_block: false, fp: true })
}

/// One of the four layouts of the environment.
#[derive(Clone, Copy)]
struct Layout {
    /// Fields of four bytes, of which control, status and tag word use two.
    wide: bool,
    /// Real and virtual-8086 mode: pointers are linear addresses, spread over two fields.
    real: bool,
}

impl Layout {
    fn of(cpu: &Vcpu, insn: &Instruction) -> Self {
        use Code::*;
        let narrow = matches!(insn.code(), Fnstenv_m14byte | Fldenv_m14byte | Fnsave_m94byte | Frstor_m94byte);
        Layout { wide: !narrow, real: !cpu.protected_mode() || cpu.v8086() }
    }

    /// Bytes of the environment.
    fn size(self) -> usize {
        if self.wide { 28 } else { 14 }
    }

    /// The linear address of an image that begins with an environment, whose words have to be aligned where that is checked.
    fn address(self, cpu: &Vcpu, insn: &Instruction, size: usize, write: bool) -> Result<u64, Exception> {
        let va = cpu.operand_address(insn, 0, size, write)?;
        cpu.check_alignment(va, if self.wide { 4 } else { 2 })?;
        Ok(va)
    }

    fn encode(self, state: &XsaveArea) -> Vec<u8> {
        let (fop, fip, fdp) = match state.in_use() & xcr0::X87 {
            0 => (0, 0, 0),
            _ => (
                u32::from(state.u16_at(legacy::FOP) & 0x7ff),
                state.u64_at(legacy::FIP) as u32,
                state.u64_at(legacy::FDP) as u32,
            ),
        };
        // Outside real mode selectors stand beside the pointers: zero, as on processors that have deprecated them
        // (CPUID.7.0:EBX[13]).
        let pointers = match (self.real, self.wide) {
            (false, true) => [fip, fop << 16, fdp, 0xffff_0000],
            (false, false) => [fip, 0, fdp, 0],
            (true, true) => [fip & 0xffff, fip >> 16 << 12 | fop, fdp & 0xffff, fdp >> 16 << 12],
            (true, false) => [fip, fip >> 16 << 12 | fop, fdp, fdp >> 16 << 12],
        };
        let words = [state.fcw(), state.fsw(), tag_word(state)].map(|w| u32::from(w) | 0xffff_0000);
        let fields = words.into_iter().chain(pointers);
        match self.wide {
            true => fields.flat_map(u32::to_le_bytes).collect(),
            false => fields.flat_map(|f| (f as u16).to_le_bytes()).collect(),
        }
    }

    fn decode(self, bytes: &[u8], state: &mut XsaveArea) {
        let field = |i: usize| -> u32 {
            let width = self.size() / 7;
            bytes[i * width..(i + 1) * width].iter().rev().fold(0, |value, &b| value << 8 | u32::from(b))
        };
        let word = |i: usize| field(i) as u16;
        let (fip, fop, fdp) = match (self.real, self.wide) {
            (false, true) => (field(3), field(4) >> 16, field(5)),
            (false, false) => (field(3), 0, field(5)),
            (true, true) => {
                (field(3) & 0xffff | field(4) >> 12 << 16, field(4), field(5) & 0xffff | field(6) >> 12 << 16)
            }
            (true, false) => (field(3) | field(4) >> 12 << 16, field(4), field(5) | field(6) >> 12 << 16),
        };
        state.set_x87_top(word(1) >> 11);
        state.set_x87_words(word(0), word(1));
        let tags = word(2);
        let used = (0..8).filter(|i| tags >> (2 * i) & 3 != 3).fold(0u8, |used, i| used | 1 << i);
        state.put(legacy::FTW, &[used, 0]);
        state.put(legacy::FOP, &(fop as u16 & 0x7ff).to_le_bytes());
        state.put(legacy::FIP, &u64::from(fip).to_le_bytes());
        state.put(legacy::FDP, &u64::from(fdp).to_le_bytes());
    }
}

/// The full tag word: two bits for each physical register (valid, zero, special, empty).
fn tag_word(state: &XsaveArea) -> u16 {
    (0..8).fold(0, |tags, i| {
        let tag = if state.ftw() >> i & 1 == 0 { 3 } else { kind(&state.x87_physical(i)) };
        tags | tag << (2 * i)
    })
}

/// The tag of a register that is not empty.
fn kind(value: &[u8; 10]) -> u16 {
    let mantissa = value.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
    let exponent = u16::from_le_bytes([value[8], value[9]]) & 0x7fff;
    match (exponent, mantissa) {
        (0, 0) => 1,
        (0, _) | (0x7fff, _) => 2,
        _ if mantissa >> 63 == 0 => 2,
        _ => 0,
    }
}

fn require_x87(cpu: &Vcpu) -> Result<(), Exception> {
    if cpu.cr0 & (cr0::TS | cr0::EM) != 0 { Err(Exception::device_not_available()) } else { Ok(()) }
}

/// The same for instructions that wait for what is pending.
fn require_waiting(cpu: &Vcpu) -> Result<(), Exception> {
    require_x87(cpu)?;
    if cpu.xsave.x87_pending() { Err(Exception::new(Vector::X87FloatingPoint)) } else { Ok(()) }
}

fn fnstenv(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    require_x87(cpu)?;
    let layout = Layout::of(cpu, insn);
    let va = layout.address(cpu, insn, layout.size(), true)?;
    cpu.settle_x87_pointers();
    let environment = layout.encode(&cpu.xsave);
    let context = cpu.context();
    cpu.write_linear(va, &environment, context)?;
    // All exceptions are masked afterwards.
    let (fcw, fsw) = (cpu.xsave.fcw(), cpu.xsave.fsw());
    cpu.xsave.set_x87_words(fcw | 0x3f, fsw);
    cpu.settle_ferr();
    Ok(())
}

fn fldenv(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    require_waiting(cpu)?;
    let layout = Layout::of(cpu, insn);
    let va = layout.address(cpu, insn, layout.size(), false)?;
    let mut bytes = [0; 28];
    let context = cpu.context();
    cpu.read_linear(va, &mut bytes[..layout.size()], context)?;
    layout.decode(&bytes, &mut cpu.xsave);
    cpu.settle_ferr();
    Ok(())
}

fn fnsave(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    require_x87(cpu)?;
    let layout = Layout::of(cpu, insn);
    let va = layout.address(cpu, insn, layout.size() + 80, true)?;
    cpu.settle_x87_pointers();
    let mut image = layout.encode(&cpu.xsave);
    cpu.xsave.materialize(component::X87);
    for i in 0..8 {
        image.extend(cpu.xsave.get::<10>(legacy::ST + i * 16));
    }
    let context = cpu.context();
    cpu.write_linear(va, &image, context)?;
    initialize(cpu);
    Ok(())
}

/// What the registers hold stays, though they are empty.
fn initialize(cpu: &mut Vcpu) {
    cpu.xsave.set_x87_top(0);
    cpu.xsave.set_x87_words(crate::xstate::FCW_INIT, 0);
    cpu.xsave.put(legacy::FTW, &[0; legacy::MXCSR - legacy::FTW]);
    cpu.settle_ferr();
}

fn fninit(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    require_x87(cpu)?;
    cpu.xsave.materialize(component::X87);
    initialize(cpu);
    Ok(())
}

fn fnclex(cpu: &mut Vcpu, _: &Instruction) -> Result<(), Stop> {
    const EXCEPTIONS: u16 = 0x80ff;
    require_x87(cpu)?;
    let (fcw, fsw) = (cpu.xsave.fcw(), cpu.xsave.fsw());
    cpu.xsave.set_x87_words(fcw, fsw & !EXCEPTIONS);
    cpu.settle_ferr();
    Ok(())
}

fn frstor(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    require_waiting(cpu)?;
    let layout = Layout::of(cpu, insn);
    let size = layout.size();
    let va = layout.address(cpu, insn, size + 80, false)?;
    let mut bytes = [0; 108];
    let context = cpu.context();
    cpu.read_linear(va, &mut bytes[..size + 80], context)?;
    layout.decode(&bytes[..size], &mut cpu.xsave);
    for (i, value) in bytes[size..size + 80].chunks_exact(10).enumerate() {
        cpu.xsave.put(legacy::ST + i * 16, value);
        cpu.xsave.put(legacy::ST + i * 16 + 10, &[0; 6]);
    }
    cpu.settle_ferr();
    Ok(())
}
