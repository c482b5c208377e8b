//! A stack in use by an instruction or a delivery that may still fault: the stack pointer moves here, and the vCPU's
//! only when everything went well.

use arch::registers::gpr;
use arch::{Exception, Segment, SegmentRegister, Vector};

use super::is_canonical;
use super::segmentation::limit_allows;
use crate::cpu::{Context, Vcpu};
use crate::descriptor::Descriptor;

/// A stack segment with its pointer.
#[derive(Clone, Copy, Debug)]
pub struct Stack {
    pub segment: Segment,
    pub pointer: u64,
    /// Of the stack pointer: 2, 4 or 8 bytes.
    width: usize,
    context: Context,
    /// Error code of the #SS that an access outside the segment raises.
    error_code: u32,
}

impl Stack {
    /// The current stack, for an instruction's own accesses.
    pub fn current(cpu: &Vcpu) -> Self {
        Stack {
            segment: *cpu.seg(SegmentRegister::Ss),
            pointer: cpu.gpr[gpr::RSP],
            width: cpu.stack_width(),
            context: cpu.context(),
            error_code: 0,
        }
    }

    /// The current stack as a far call to `code` uses it: in IA-32e mode that's already the way of the code called.
    pub fn of_target(cpu: &Vcpu, code: &Descriptor) -> Self {
        let stack = Self::current(cpu);
        match (cpu.code64(), cpu.long_mode() && code.long()) {
            (false, true) => Self::flat(cpu, stack.pointer, cpu.cpl(), 0),
            (true, false) => {
                let width = if stack.segment.default_big() { 4 } else { 2 };
                Stack { pointer: stack.pointer & 0xffff_ffff, width, ..stack }
            }
            _ => stack,
        }
    }

    /// The current stack, for an event's frame; `external` is the EXT bit of a fault's error code.
    pub fn current_for_event(cpu: &Vcpu, external: u32) -> Self {
        let context = if cpu.cpl() == 3 { Context::User } else { cpu.system_context() };
        Stack { context, error_code: external, ..Self::current(cpu) }
    }

    /// The stack of 64-bit code at `pointer`.
    pub fn flat(cpu: &Vcpu, pointer: u64, cpl: u8, error_code: u32) -> Self {
        let context = if cpl == 3 { Context::User } else { cpu.system_context() };
        Stack { segment: Vcpu::null_stack_segment(cpl), pointer, width: 8, context, error_code }
    }

    /// A stack outside 64-bit mode that a task-state segment named.
    pub fn inner(cpu: &Vcpu, segment: Segment, pointer: u64, external: u32) -> Self {
        let context = if segment.dpl() == 3 { Context::User } else { cpu.system_context() };
        let width = if segment.default_big() { 4 } else { 2 };
        Stack { segment, pointer, width, context, error_code: u32::from(segment.selector & !3) | external }
    }

    fn moved(&self, distance: u64) -> u64 {
        let moved = self.pointer.wrapping_add(distance);
        match self.width {
            2 => self.pointer & !0xffff | moved & 0xffff,
            4 => moved & 0xffff_ffff,
            _ => moved,
        }
    }

    fn address(&self, pointer: u64, size: usize) -> Result<u64, Exception> {
        let offset = if self.width == 2 { pointer & 0xffff } else { pointer };
        let allowed = if self.width == 8 {
            is_canonical(offset) && is_canonical(offset.wrapping_add(size as u64 - 1))
        } else {
            limit_allows(&self.segment, offset, size)
        };
        if !allowed {
            return Err(Exception::with_code(Vector::StackFault, self.error_code));
        }
        Ok(if self.width == 8 { offset } else { self.segment.base.wrapping_add(offset) & 0xffff_ffff })
    }

    /// Pushes the low `size` (2, 4 or 8) bytes of `value`.
    pub fn push(&mut self, cpu: &mut Vcpu, size: usize, value: u64) -> Result<(), Exception> {
        let pointer = self.moved((size as u64).wrapping_neg());
        let address = self.address(pointer, size)?;
        cpu.check_alignment(address, size)?;
        cpu.write_sized(address, size, value, self.context)?;
        self.pointer = pointer;
        Ok(())
    }

    /// Pushes a selector with a 32-bit operand size: four bytes of stack, of which two are written.
    pub fn push_selector(&mut self, cpu: &mut Vcpu, selector: u16) -> Result<(), Exception> {
        let pointer = self.moved(4u64.wrapping_neg());
        let address = self.address(pointer, 2)?;
        cpu.check_alignment(address, 2)?;
        cpu.write_sized(address, 2, u64::from(selector), self.context)?;
        self.pointer = pointer;
        Ok(())
    }

    /// Pushes several values of `size` bytes, the first at the highest address.
    pub fn push_all(&mut self, cpu: &mut Vcpu, size: usize, values: &[u64]) -> Result<(), Exception> {
        values.iter().try_for_each(|&value| self.push(cpu, size, value))
    }

    pub fn pop(&mut self, cpu: &mut Vcpu, size: usize) -> Result<u64, Exception> {
        let address = self.address(self.pointer, size)?;
        cpu.check_alignment(address, size)?;
        let value = cpu.read_sized(address, size, self.context)?;
        self.pointer = self.moved(size as u64);
        Ok(value)
    }

    /// Pops `frame.len()` values, the first from the lowest address. With a 64-bit stack they are read at once.
    pub fn pop_frame(&mut self, cpu: &mut Vcpu, size: usize, frame: &mut [u64]) -> Result<(), Exception> {
        let length = frame.len() * size;
        let mut bytes = [0; 40];
        let Some(bytes) = bytes.get_mut(..length).filter(|_| self.width == 8) else {
            for value in frame {
                *value = self.pop(cpu, size)?;
            }
            return Ok(());
        };
        let address = self.address(self.pointer, length)?;
        cpu.check_alignment(address, size)?;
        cpu.read_linear(address, bytes, self.context)?;
        for (value, slot) in frame.iter_mut().zip(bytes.chunks_exact(size)) {
            *value = slot.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
        }
        self.pointer = self.moved(length as u64);
        Ok(())
    }

    /// The value `slot` places above the lowest, which stays where it is.
    pub fn peek(&self, cpu: &mut Vcpu, size: usize, slot: usize) -> Result<u64, Exception> {
        let address = self.address(self.moved((slot * size) as u64), size)?;
        cpu.read_sized(address, size, self.context)
    }

    /// A selector, of whose place only two bytes are read.
    pub fn peek_selector(&self, cpu: &mut Vcpu, size: usize, slot: usize) -> Result<u16, Exception> {
        let address = self.address(self.moved((slot * size) as u64), 2)?;
        cpu.check_alignment(address, size)?;
        Ok(cpu.read_sized(address, 2, self.context)? as u16)
    }

    /// Takes `bytes` off without reading them.
    pub fn release(&mut self, bytes: u64) {
        self.pointer = self.moved(bytes);
    }

    /// Pushes quadwords, the last at the lowest address, in one write that faults before anything is stored.
    pub fn push_frame(&mut self, cpu: &mut Vcpu, frame: &[u64]) -> Result<(), Exception> {
        let mut bytes = [0; 48];
        let size = frame.len() * 8;
        for (slot, value) in bytes.chunks_exact_mut(8).zip(frame.iter().rev()) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
        let pointer = self.moved((size as u64).wrapping_neg());
        let address = self.address(pointer, size)?;
        cpu.write_linear(address, &bytes[..size], self.context)?;
        self.pointer = pointer;
        Ok(())
    }
}
