//! Task-state segments (Intel SDM 3A chapter 7): the stacks of inner privilege levels, and task switches, which exist
//! outside IA-32e mode only.

use arch::registers::{cr0, debug, gpr, rflags};
use arch::{Exception, Segment, SegmentRegister, Vector};

use crate::cpu::Vcpu;
use crate::descriptor::{BUSY, Descriptor, is_null, selector_fault, system, v8086_segment};
use crate::mmu::segmentation::limit_allows;

/// What a task switch came from: decides about the busy bits, NT and the link (Intel SDM 3A table 7-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    Jump,
    /// CALL, or an event through a task gate: the old task is nested.
    Call,
    Return,
}

/// Whether a TSS descriptor is of the 32-bit (386) kind.
pub fn is_wide(tss: &Descriptor) -> bool {
    tss.kind() & 8 != 0
}

/// SS and ESP for privilege level `cpl` from the current TSS.
pub fn inner_stack(cpu: &mut Vcpu, cpl: u8, external: u32) -> Result<(u16, u64), Exception> {
    let wide = cpu.tr.kind() & 8 != 0;
    let (offset, size) = if wide { (4 + 8 * u64::from(cpl), 4) } else { (2 + 4 * u64::from(cpl), 2) };
    if offset + size as u64 + 1 > u64::from(cpu.tr.limit) {
        return Err(selector_fault(Vector::InvalidTss, cpu.tr.selector, external));
    }
    let context = cpu.system_context();
    let base = cpu.tr.base;
    let pointer = cpu.read_sized(base.wrapping_add(offset) & 0xffff_ffff, size, context)?;
    let selector = cpu.read_sized(base.wrapping_add(offset + size as u64) & 0xffff_ffff, 2, context)?;
    Ok((selector as u16, pointer))
}

/// Reads the descriptor of a TSS that a task gate names: it has to be in the GDT, available and present.
pub fn available_tss(cpu: &mut Vcpu, selector: u16, external: u32) -> Result<Descriptor, Exception> {
    let invalid = selector_fault(Vector::GeneralProtection, selector, external);
    if selector & 4 != 0 || is_null(selector) {
        return Err(invalid);
    }
    let tss = cpu.descriptor(selector)?.ok_or(invalid)?;
    if !tss.is_system() || !matches!(tss.kind(), system::TSS | system::TSS16) {
        return Err(invalid);
    }
    if !tss.present() {
        return Err(selector_fault(Vector::SegmentNotPresent, selector, external));
    }
    Ok(tss)
}

/// What a TSS holds of a task.
struct TaskState {
    cr3: Option<u64>,
    rip: u64,
    flags: u64,
    gpr: [u64; 8],
    /// In the order of [`SegmentRegister`].
    selectors: [u16; 6],
    ldt: u16,
    /// The T flag: a debug exception follows the switch.
    trap: bool,
}

/// Offsets of the fields in the two kinds of TSS (Intel SDM 3A figures 7-2 and 7-10).
struct Layout {
    field: usize,
    ip: u64,
    registers: u64,
    segments: u64,
    segment_count: usize,
    ldt: u64,
    minimum_limit: u32,
}

const WIDE: Layout =
    Layout { field: 4, ip: 0x20, registers: 0x28, segments: 0x48, segment_count: 6, ldt: 0x60, minimum_limit: 0x67 };
const NARROW: Layout =
    Layout { field: 2, ip: 0x0e, registers: 0x12, segments: 0x22, segment_count: 4, ldt: 0x2a, minimum_limit: 0x2b };

fn layout(wide: bool) -> &'static Layout {
    if wide { &WIDE } else { &NARROW }
}

/// Switches to the task of `tss`, whose descriptor was found valid for the purpose (Intel SDM 3A 7.3). The flags that
/// are saved are `cpu.rflags`, the RIP is `cpu.rip`. Faults after the new task's state is loaded are raised in its
/// context.
pub fn switch(cpu: &mut Vcpu, selector: u16, tss: &Descriptor, reason: Reason) -> Result<(), Exception> {
    let context = cpu.system_context();
    let wide = is_wide(tss);
    if tss.limit() < layout(wide).minimum_limit {
        return Err(selector_fault(Vector::InvalidTss, selector, 0));
    }
    // Everything that will be touched must be mapped before anything changes.
    let old_wide = cpu.tr.kind() & 8 != 0;
    cpu.probe_write(cpu.tr.base & 0xffff_ffff, layout(old_wide).minimum_limit as usize + 1, context)?;
    let new = read_state(cpu, tss.base(), wide)?;

    if reason != Reason::Call {
        let old = cpu.tr.selector;
        if let Some(descriptor) = cpu.descriptor(old)? {
            cpu.clear_bits_linear(descriptor.address.wrapping_add(5), BUSY, context)?;
        }
    }
    let mut saved_flags = cpu.rflags;
    if reason == Reason::Return {
        saved_flags &= !rflags::NT;
    }
    let old_selector = cpu.tr.selector;
    save_state(cpu, old_wide, saved_flags)?;
    let mut flags = new.flags;
    if reason == Reason::Call {
        cpu.write_sized(tss.base(), 2, u64::from(old_selector), context)?;
        flags |= rflags::NT;
    }
    if reason != Reason::Return {
        cpu.set_bits_linear(tss.address.wrapping_add(5), BUSY, context)?;
    }
    let mut loaded = tss.segment(selector);
    loaded.attributes |= u16::from(BUSY);
    cpu.tr = loaded;
    cpu.cr0 |= cr0::TS;
    load_state(cpu, &new, flags)
}

fn field(cpu: &mut Vcpu, base: u64, offset: u64, size: usize) -> Result<u64, Exception> {
    cpu.read_sized(base.wrapping_add(offset) & 0xffff_ffff, size, cpu.system_context())
}

fn read_state(cpu: &mut Vcpu, base: u64, wide: bool) -> Result<TaskState, Exception> {
    let layout = layout(wide);
    let size = layout.field;
    let step = size as u64;
    let cr3 = if wide && cpu.paging() { Some(field(cpu, base, 0x1c, 4)?) } else { None };
    let rip = field(cpu, base, layout.ip, size)?;
    let flags = field(cpu, base, layout.ip + step, size)?;
    let mut registers = [0; 8];
    for (i, register) in registers.iter_mut().enumerate() {
        *register = field(cpu, base, layout.registers + i as u64 * step, size)?;
    }
    let mut selectors = [0; 6];
    for (i, selector) in selectors.iter_mut().enumerate().take(layout.segment_count) {
        *selector = field(cpu, base, layout.segments + i as u64 * step, 2)? as u16;
    }
    let ldt = field(cpu, base, layout.ldt, 2)? as u16;
    let trap = wide && field(cpu, base, 0x64, 1)? & 1 != 0;
    Ok(TaskState { cr3, rip, flags, gpr: registers, selectors, ldt, trap })
}

/// Stores the current task's registers into its TSS.
fn save_state(cpu: &mut Vcpu, wide: bool, flags: u64) -> Result<(), Exception> {
    let layout = layout(wide);
    let (base, size, context) = (cpu.tr.base, layout.field, cpu.system_context());
    let step = size as u64;
    let put = |cpu: &mut Vcpu, offset: u64, size: usize, value: u64| {
        cpu.write_sized(base.wrapping_add(offset) & 0xffff_ffff, size, value, context)
    };
    put(cpu, layout.ip, size, cpu.rip)?;
    put(cpu, layout.ip + step, size, flags)?;
    for i in 0..8 {
        put(cpu, layout.registers + i as u64 * step, size, cpu.gpr[i])?;
    }
    for i in 0..layout.segment_count {
        let selector = u64::from(cpu.segments[i].selector);
        put(cpu, layout.segments + i as u64 * step, 2, selector)?;
    }
    Ok(())
}

/// Loads the new task's registers: first all that can't fault, then LDTR and the segments.
fn load_state(cpu: &mut Vcpu, new: &TaskState, flags: u64) -> Result<(), Exception> {
    if let Some(cr3) = new.cr3 {
        cpu.cr3 = cr3;
        cpu.mmu_flush_all();
    }
    cpu.rflags = flags & rflags::KNOWN | rflags::FIXED;
    cpu.rip = new.rip;
    cpu.gpr[gpr::RAX..=gpr::RDI].copy_from_slice(&new.gpr);
    // Local breakpoints belong to the old task (Intel SDM 3B 17.2.4).
    cpu.dr7 &= !0x155;
    for (segment, &selector) in cpu.segments.iter_mut().zip(&new.selectors) {
        *segment = Segment { selector, ..Segment::default() };
    }
    cpu.ldtr = Segment { selector: new.ldt, ..Segment::default() };
    load_ldt(cpu, new.ldt)?;
    if flags & rflags::VM != 0 {
        for (segment, &selector) in cpu.segments.iter_mut().zip(&new.selectors) {
            *segment = v8086_segment(selector);
        }
    } else {
        load_segments(cpu, &new.selectors)?;
    }
    if new.trap {
        cpu.pending_debug |= debug::DR6_BT;
    }
    if !limit_allows(cpu.seg(SegmentRegister::Cs), cpu.rip, 1) {
        return Err(Exception::general_protection(0));
    }
    Ok(())
}

fn load_ldt(cpu: &mut Vcpu, selector: u16) -> Result<(), Exception> {
    if is_null(selector) {
        return Ok(());
    }
    let invalid = selector_fault(Vector::InvalidTss, selector, 0);
    if selector & 4 != 0 {
        return Err(invalid);
    }
    let descriptor = cpu.descriptor(selector)?.ok_or(invalid)?;
    if !descriptor.is_system() || descriptor.kind() != system::LDT || !descriptor.present() {
        return Err(invalid);
    }
    cpu.ldtr = descriptor.segment(selector);
    Ok(())
}

/// CS decides the new task's CPL; what is wrong with any of the selectors is #TS (Intel SDM 3A table 7-1).
fn load_segments(cpu: &mut Vcpu, selectors: &[u16; 6]) -> Result<(), Exception> {
    use SegmentRegister::{Cs, Ds, Es, Fs, Gs, Ss};
    let code_selector = selectors[Cs as usize];
    let cpl = (code_selector & 3) as u8;
    let invalid = selector_fault(Vector::InvalidTss, code_selector, 0);
    if is_null(code_selector) {
        return Err(invalid);
    }
    let mut code = cpu.descriptor(code_selector)?.ok_or(invalid)?;
    let privilege = if code.is_conforming() { code.dpl() <= cpl } else { code.dpl() == cpl };
    if !code.is_code() || !privilege {
        return Err(invalid);
    }
    if !code.present() {
        return Err(selector_fault(Vector::SegmentNotPresent, code_selector, 0));
    }
    let stack_selector = selectors[Ss as usize];
    if is_null(stack_selector) {
        return Err(selector_fault(Vector::InvalidTss, stack_selector, 0));
    }
    let stack = cpu.checked_stack_segment(stack_selector, cpl, Vector::InvalidTss, 0)?;
    cpu.mark_accessed(&mut code)?;
    cpu.segments[Ss as usize] = stack;
    cpu.segments[Cs as usize] = code.segment(code_selector);
    for register in [Es, Ds, Fs, Gs] {
        let result = cpu.load_data_segment(register, selectors[register as usize]);
        result.map_err(|e| match e.vector {
            Vector::GeneralProtection => Exception::with_code(Vector::InvalidTss, e.error_code),
            _ => e,
        })?;
    }
    Ok(())
}

/// The TSS to which IRET with NT set returns (Intel SDM 3A 7.4).
pub fn previous_tss(cpu: &mut Vcpu) -> Result<(u16, Descriptor), Exception> {
    let selector = field(cpu, cpu.tr.base, 0, 2)? as u16;
    let invalid = selector_fault(Vector::InvalidTss, selector, 0);
    if selector & 4 != 0 || is_null(selector) {
        return Err(invalid);
    }
    let tss = cpu.descriptor(selector)?.ok_or(invalid)?;
    if !tss.is_system() || !matches!(tss.kind(), system::TSS_BUSY | system::TSS16_BUSY) {
        return Err(invalid);
    }
    if !tss.present() {
        return Err(selector_fault(Vector::SegmentNotPresent, selector, 0));
    }
    Ok((selector, tss))
}
