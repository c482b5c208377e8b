//! Segment descriptors (Intel SDM 3A 3.4.5, 5.8): reading them from the GDT and LDT, and the loads that need no more
//! than a selector.
//!
//! A selector leads to a [`Descriptor`] by [`Vcpu::descriptor`]; what a user of it must check differs from
//! instruction to instruction and stands there. [`Vcpu::load_data_segment`] is the one for DS, ES, FS, GS and SS.

use arch::exception::Vector;
use arch::{Exception, Segment, SegmentRegister};

use crate::cpu::Vcpu;

/// Types of system descriptors (Intel SDM 3A table 3-2).
pub mod system {
    pub const TSS16: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL_GATE16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT_GATE16: u8 = 6;
    pub const TRAP_GATE16: u8 = 7;
    pub const TSS: u8 = 9;
    pub const TSS_BUSY: u8 = 11;
    pub const CALL_GATE: u8 = 12;
    pub const INTERRUPT_GATE: u8 = 14;
    pub const TRAP_GATE: u8 = 15;
}

/// The busy bit of a TSS descriptor's type.
pub const BUSY: u8 = 2;

/// `selector` is one of the four null selectors.
pub const fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// An exception whose error code names a selector; `external` is the EXT bit (Intel SDM 3A 6.13).
pub const fn selector_fault(vector: Vector, selector: u16, external: u32) -> Exception {
    Exception::with_code(vector, (selector & !3) as u32 | external)
}

/// #GP(selector)
pub const fn protection_fault(selector: u16) -> Exception {
    selector_fault(Vector::GeneralProtection, selector, 0)
}

/// Eight bytes of a descriptor table, and where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    pub raw: u64,
    /// Linear address.
    pub address: u64,
}

impl Descriptor {
    /// As [`Segment::attributes`] has them.
    pub const fn attributes(&self) -> u16 {
        (self.raw >> 40) as u16 & 0xf0ff
    }
    /// Type, without S.
    pub const fn kind(&self) -> u8 {
        (self.raw >> 40 & 15) as u8
    }
    pub const fn dpl(&self) -> u8 {
        (self.raw >> 45 & 3) as u8
    }
    pub const fn present(&self) -> bool {
        self.raw >> 47 & 1 != 0
    }
    /// Not code or data.
    pub const fn is_system(&self) -> bool {
        self.raw >> 44 & 1 == 0
    }
    pub const fn is_code(&self) -> bool {
        !self.is_system() && self.kind() & 8 != 0
    }
    pub const fn is_conforming(&self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }
    pub const fn is_writable_data(&self) -> bool {
        !self.is_system() && self.kind() & 10 == 2
    }
    /// Data, or code that may be read.
    pub const fn is_readable(&self) -> bool {
        !self.is_system() && self.kind() & 10 != 8
    }
    pub const fn long(&self) -> bool {
        self.attributes() & Segment::L != 0
    }
    pub const fn default_big(&self) -> bool {
        self.attributes() & Segment::DB != 0
    }
    /// Bits 31:0.
    pub const fn base(&self) -> u64 {
        self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000
    }
    /// In bytes.
    pub const fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.attributes() & Segment::G != 0 { limit << 12 | 0xfff } else { limit }
    }
    /// A gate's target selector.
    pub const fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }
    /// A gate's target offset, bits 31:0.
    pub const fn gate_offset(&self) -> u64 {
        self.raw & 0xffff | self.raw >> 32 & 0xffff_0000
    }
    /// What a segment register holds after the load.
    pub const fn segment(&self, selector: u16) -> Segment {
        Segment { base: self.base(), limit: self.limit(), attributes: self.attributes(), selector }
    }
}

impl Vcpu {
    /// Where the descriptor of a selector that is not null lies, if `size` bytes of it are within its table.
    fn descriptor_address(&self, selector: u16, size: u64) -> Option<u64> {
        let (base, limit) = if selector & 4 != 0 {
            if !self.ldtr.present() {
                return None;
            }
            (self.ldtr.base, u64::from(self.ldtr.limit))
        } else {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        };
        let offset = u64::from(selector & !7);
        if offset + size - 1 > limit {
            return None;
        }
        let address = base.wrapping_add(offset);
        Some(if self.long_mode() { address } else { address & 0xffff_ffff })
    }

    /// Reads a descriptor; `None` if the selector is beyond its table. The error is a page fault.
    pub fn descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Exception> {
        let Some(address) = self.descriptor_address(selector, 8) else {
            return Ok(None);
        };
        let raw = self.read_sized(address, 8, self.system_context())?;
        Ok(Some(Descriptor { raw, address }))
    }

    /// Reads the second half of a 16-byte system descriptor of long mode; `None` if it is beyond the table or
    /// is marked as a descriptor of its own (type bits that must be zero).
    pub fn descriptor_upper(&mut self, selector: u16) -> Result<Option<u64>, Exception> {
        let Some(address) = self.descriptor_address(selector, 16) else {
            return Ok(None);
        };
        let raw = self.read_sized(address.wrapping_add(8), 8, self.system_context())?;
        Ok((raw >> 40 & 0x1f == 0).then_some(raw))
    }

    /// Sets the accessed bit of a code or data descriptor in memory if it is clear.
    pub fn mark_accessed(&mut self, descriptor: &mut Descriptor) -> Result<(), Exception> {
        if descriptor.kind() & 1 == 0 {
            let address = descriptor.address.wrapping_add(5);
            self.set_bits_linear(address, 1, self.system_context())?;
            descriptor.raw |= 1 << 40;
        }
        Ok(())
    }

    /// What SS holds in 64-bit mode while it is null: unusable, but its DPL is still the CPL.
    pub fn null_stack_segment(cpl: u8) -> Segment {
        Segment { base: 0, limit: 0, attributes: u16::from(cpl) << 5, selector: u16::from(cpl) }
    }

    /// Loads DS, ES, FS, GS or SS as MOV does, in every mode (Intel SDM 2B, MOV).
    pub fn load_data_segment(&mut self, register: SegmentRegister, selector: u16) -> Result<(), Exception> {
        let loaded = self.data_segment(register, selector)?;
        self.segments[register as usize] = loaded;
        Ok(())
    }

    /// What `register` holds in real mode with this selector. Limit and attributes stay, for CS, too: this is what makes
    /// "unreal" mode (Intel SDM 3A 10.9.2, 21.1.1).
    pub fn real_mode_segment(&self, register: SegmentRegister, selector: u16) -> Segment {
        Segment { base: u64::from(selector) << 4, selector, ..*self.seg(register) }
    }

    /// What [`Vcpu::load_data_segment`] would load.
    pub fn data_segment(&mut self, register: SegmentRegister, selector: u16) -> Result<Segment, Exception> {
        if !self.protected_mode() {
            return Ok(self.real_mode_segment(register, selector));
        }
        if self.v8086() {
            return Ok(v8086_segment(selector));
        }
        if register == SegmentRegister::Ss {
            return self.stack_segment(selector);
        }
        if is_null(selector) {
            return Ok(Segment { selector, ..Segment::default() });
        }
        let mut descriptor = self.descriptor(selector)?.ok_or(protection_fault(selector))?;
        let (rpl, cpl) = ((selector & 3) as u8, self.cpl());
        let private = !descriptor.is_conforming() && (rpl > descriptor.dpl() || cpl > descriptor.dpl());
        if !descriptor.is_readable() || private {
            return Err(protection_fault(selector));
        }
        if !descriptor.present() {
            return Err(selector_fault(Vector::SegmentNotPresent, selector, 0));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    fn stack_segment(&mut self, selector: u16) -> Result<Segment, Exception> {
        let (rpl, cpl) = ((selector & 3) as u8, self.cpl());
        if is_null(selector) {
            return if self.code64() && cpl < 3 && rpl == cpl {
                Ok(Self::null_stack_segment(cpl))
            } else {
                Err(Exception::general_protection(0))
            };
        }
        self.checked_stack_segment(selector, cpl, Vector::GeneralProtection, 0)
    }

    /// Reads the descriptor of a stack segment for `cpl`. What is wrong with the selector or the type raises
    /// `vector`, absence #SS.
    pub fn checked_stack_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        vector: Vector,
        external: u32,
    ) -> Result<Segment, Exception> {
        let invalid = selector_fault(vector, selector, external);
        let mut descriptor = self.descriptor(selector)?.ok_or(invalid)?;
        let rpl = (selector & 3) as u8;
        if rpl != cpl || !descriptor.is_writable_data() || descriptor.dpl() != cpl {
            return Err(invalid);
        }
        if !descriptor.present() {
            return Err(selector_fault(Vector::StackFault, selector, external));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }
}

/// Virtual-8086 mode gives every segment register fixed attributes (Intel SDM 3A 20.2.1).
pub fn v8086_segment(selector: u16) -> Segment {
    let attributes = Segment::P | Segment::S | 3 << 5 | 3;
    Segment { base: u64::from(selector) << 4, limit: 0xffff, attributes, selector }
}
