//! The saved x87/SSE/AVX state of a vCPU: where the parts of an XSAVE area are, and how to read and change registers in it.
//!
//! [`crate::Vcpu::xsave`] is in the standard format, with the host's offsets, because the host's XSAVE and XRSTOR fill
//! and load it. A clear bit in its XSTATE_BV means that the component is in its initial state *and that its bytes are
//! stale* (Intel SDM 1 13.6); only MXCSR is always there. The accessors here hide that, and keep what is in its
//! initial state so. PKRU is not in the area: it is [`crate::Vcpu::pkru`].

use std::sync::OnceLock;

use arch::SegmentRegister;
use arch::registers::xcr0;

use crate::cpu::{Vcpu, XSAVE_SIZE, XsaveArea};
use crate::host;

/// Numbers of state components (Intel SDM 1 13.1).
pub mod component {
    pub const X87: u32 = 0;
    pub const SSE: u32 = 1;
    pub const AVX: u32 = 2;
    pub const OPMASK: u32 = 5;
    pub const ZMM_HI256: u32 = 6;
    pub const HI16_ZMM: u32 = 7;
    pub const PKRU: u32 = 9;
}

/// Where the header starts; its first word is XSTATE_BV, its second XCOMP_BV.
pub const HEADER: usize = 512;
/// Where the components beyond x87 and SSE start.
pub const EXTENDED: usize = 576;
/// XCOMP_BV: the area is in the compacted format.
pub const COMPACTED: u64 = 1 << 63;

/// Offsets in the legacy region (Intel SDM 1 table 10-2).
pub mod legacy {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
    pub const MXCSR_MASK: usize = 28;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
    /// The end of XMM15.
    pub const END: usize = 416;
}

/// MXCSR after reset.
pub const MXCSR_INIT: u32 = 0x1f80;
/// The x87 control word after FNINIT.
pub const FCW_INIT: u16 = 0x37f;

/// A state component beyond x87 and SSE.
#[derive(Clone, Copy, Debug, Default)]
pub struct Component {
    pub offset: usize,
    pub size: usize,
    /// Starts at a multiple of 64 in the compacted format.
    pub aligned: bool,
}

/// The components that guest code uses natively, and where they are in a standard-format area.
#[derive(Debug)]
pub struct Layout {
    /// Bits of XCR0 that XSAVE and XRSTOR of guest state use: what the host's kernel allows, of x87 to AVX-512.
    pub native: u64,
    /// The bits of MXCSR that may be set.
    pub mxcsr_mask: u32,
    components: [Component; 10],
}

impl Layout {
    fn of_host() -> Self {
        let native = host::xcr0() & (xcr0::X87 | xcr0::SSE | xcr0::AVX | xcr0::AVX512) | xcr0::X87 | xcr0::SSE;
        let mut components = [Component::default(); 10];
        for (i, component) in components.iter_mut().enumerate().skip(2) {
            let leaf = host::cpuid(0xd, i as u32);
            let (offset, size) = (leaf.ebx as usize, leaf.eax as usize);
            if native & 1 << i != 0 && offset + size <= XSAVE_SIZE {
                *component = Component { offset, size, aligned: leaf.ecx & 2 != 0 };
            }
        }
        Layout { native, mxcsr_mask: mxcsr_mask(), components }
    }

    /// A component beyond x87 and SSE; of size 0 if there is none of that number.
    pub fn component(&self, index: u32) -> Component {
        self.components.get(index as usize).copied().unwrap_or_default()
    }
}

/// The layout on this host.
pub fn layout() -> &'static Layout {
    static LAYOUT: OnceLock<Layout> = OnceLock::new();
    LAYOUT.get_or_init(Layout::of_host)
}

fn mxcsr_mask() -> u32 {
    let mut area = XsaveArea([0; XSAVE_SIZE]);
    // SAFETY: FXSAVE writes 512 bytes at an aligned address; every x86-64 processor has it.
    unsafe { std::arch::x86_64::_fxsave64(area.0.as_mut_ptr()) };
    match area.u32_at(legacy::MXCSR_MASK) {
        0 => 0xffbf, // processors without the field (Intel SDM 1 11.6.6)
        mask => mask,
    }
}

impl Default for XsaveArea {
    /// Every component in its initial state.
    fn default() -> Self {
        let mut area = XsaveArea([0; XSAVE_SIZE]);
        area.reset();
        area
    }
}

impl XsaveArea {
    /// Puts everything in its initial state, as after power-on and XRSTOR of nothing.
    pub fn reset(&mut self) {
        self.0 = [0; XSAVE_SIZE];
        self.put(legacy::FCW, &FCW_INIT.to_le_bytes());
        self.set_mxcsr(MXCSR_INIT);
        self.put(legacy::MXCSR_MASK, &layout().mxcsr_mask.to_le_bytes());
    }

    /// The bytes of a fixed-size field; zeros where the area has none.
    pub fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        self.0.get(offset..).and_then(|s| s.first_chunk()).copied().unwrap_or([0; N])
    }

    pub fn put(&mut self, offset: usize, bytes: &[u8]) {
        if let Some(place) = self.0.get_mut(offset..offset + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    pub fn u16_at(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.get(offset))
    }

    pub fn u32_at(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.get(offset))
    }

    pub fn u64_at(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.get(offset))
    }

    /// XSTATE_BV: which components are not in their initial state (XINUSE).
    pub fn in_use(&self) -> u64 {
        self.u64_at(HEADER)
    }

    fn has(&self, component: u32) -> bool {
        self.in_use() & 1 << component != 0
    }

    /// Marks components as being in their initial state. MXCSR is not touched.
    pub fn initialize(&mut self, components: u64) {
        self.put(HEADER, &(self.in_use() & !components).to_le_bytes());
    }

    /// Makes a component's bytes those of its state, so that they may be changed one by one.
    pub fn materialize(&mut self, component: u32) {
        if self.has(component) {
            return;
        }
        match component {
            component::X87 => {
                self.0[..legacy::MXCSR].fill(0);
                self.put(legacy::FCW, &FCW_INIT.to_le_bytes());
                self.0[legacy::ST..legacy::XMM].fill(0);
            }
            component::SSE => self.0[legacy::XMM..legacy::END].fill(0),
            _ => {
                let Component { offset, size, .. } = layout().component(component);
                self.0[offset..offset + size].fill(0);
            }
        }
        self.put(HEADER, &(self.in_use() | 1 << component).to_le_bytes());
    }

    pub fn mxcsr(&self) -> u32 {
        self.u32_at(legacy::MXCSR)
    }

    pub fn set_mxcsr(&mut self, value: u32) {
        self.put(legacy::MXCSR, &value.to_le_bytes());
    }

    /// The parts of a vector register: (component, offset in the area, bytes).
    fn parts(register: usize) -> [(u32, usize, usize); 3] {
        let at = |index: u32, slot: usize, size: usize| {
            let c = layout().component(index);
            (index, c.offset + slot * size, if c.size == 0 { 0 } else { size })
        };
        match register {
            0..16 => [
                (component::SSE, legacy::XMM + register * 16, 16),
                at(component::AVX, register, 16),
                at(component::ZMM_HI256, register, 32),
            ],
            _ => [at(component::HI16_ZMM, register & 15, 64), (0, 0, 0), (0, 0, 0)],
        }
    }

    /// All 64 bytes of vector register `register` (0 to 31); zeros above what the host has.
    pub fn vector(&self, register: usize) -> [u8; 64] {
        let mut value = [0; 64];
        let mut start = 0;
        for (component, offset, size) in Self::parts(register) {
            if size != 0 && self.has(component) {
                value[start..start + size].copy_from_slice(&self.0[offset..offset + size]);
            }
            start += size;
        }
        value
    }

    /// Sets all 64 bytes of a vector register.
    pub fn set_vector(&mut self, register: usize, value: &[u8; 64]) {
        let mut start = 0;
        for (component, offset, size) in Self::parts(register) {
            let part = &value[start..start + size];
            start += size;
            if size != 0 && (self.has(component) || part.iter().any(|&b| b != 0)) {
                self.materialize(component);
                self.0[offset..offset + size].copy_from_slice(part);
            }
        }
    }

    /// Opmask register k0 to k7.
    pub fn opmask(&self, register: usize) -> u64 {
        let c = layout().component(component::OPMASK);
        if c.size == 0 || !self.has(component::OPMASK) { 0 } else { self.u64_at(c.offset + (register & 7) * 8) }
    }

    pub fn set_opmask(&mut self, register: usize, value: u64) {
        let c = layout().component(component::OPMASK);
        if c.size != 0 && (value != 0 || self.has(component::OPMASK)) {
            self.materialize(component::OPMASK);
            self.put(c.offset + (register & 7) * 8, &value.to_le_bytes());
        }
    }
}

/// The x87 registers in the legacy region.
impl XsaveArea {
    fn x87_u16(&self, offset: usize, initial: u16) -> u16 {
        if self.has(component::X87) { self.u16_at(offset) } else { initial }
    }

    pub fn fcw(&self) -> u16 {
        self.x87_u16(legacy::FCW, FCW_INIT)
    }

    pub fn fsw(&self) -> u16 {
        self.x87_u16(legacy::FSW, 0)
    }

    /// The abridged tag word: a set bit for each physical register that is not empty.
    pub fn ftw(&self) -> u8 {
        self.x87_u16(legacy::FTW, 0) as u8
    }

    /// Sets control and status word as FXRSTOR and FLDENV do. The summary bits follow from them (Intel SDM 1 8.1.3.3): ES and B say whether an
    /// exception is pending that is not masked.
    pub fn set_x87_words(&mut self, fcw: u16, fsw: u16) {
        const SUMMARY: u16 = 0x8080;
        self.materialize(component::X87);
        let fcw = fcw & 0x1f7f | 0x40;
        let pending = fsw & !fcw & 0x3f != 0;
        let fsw = if pending { fsw | SUMMARY } else { fsw & !SUMMARY };
        self.put(legacy::FCW, &fcw.to_le_bytes());
        self.put(legacy::FSW, &fsw.to_le_bytes());
    }

    /// An unmasked x87 exception waits for the next waiting instruction.
    pub fn x87_pending(&self) -> bool {
        self.fsw() & 0x80 != 0
    }

    /// The register at physical index `index` (0 to 7), of which MM registers are the low 8 bytes.
    pub fn x87_physical(&self, index: usize) -> [u8; 10] {
        if self.has(component::X87) { self.get(self.physical_offset(index)) } else { [0; 10] }
    }

    pub fn set_x87_physical(&mut self, index: usize, value: &[u8; 10]) {
        self.materialize(component::X87);
        let offset = self.physical_offset(index);
        self.put(offset, value);
        self.put(offset + 10, &[0; 6]);
    }

    /// What every MMX instruction but EMMS does first: the top of the stack is register 0, and no register is empty
    /// (Intel SDM 1 9.5.1).
    pub fn enter_mmx(&mut self) {
        self.set_x87_top(0);
        self.put(legacy::FTW, &[0xff, 0]);
    }

    /// Moves the top of the stack; registers keep their contents.
    pub fn set_x87_top(&mut self, top: u16) {
        self.materialize(component::X87);
        let registers: [[u8; 10]; 8] = std::array::from_fn(|i| self.x87_physical(i));
        self.put(legacy::FSW, &(self.fsw() & !0x3800 | (top & 7) << 11).to_le_bytes());
        for (i, value) in registers.iter().enumerate() {
            self.set_x87_physical(i, value);
        }
    }

    /// The area holds the registers in the order of the stack.
    fn physical_offset(&self, index: usize) -> usize {
        let top = usize::from(self.fsw() >> 11 & 7);
        legacy::ST + (index.wrapping_sub(top) & 7) * 16
    }
}

impl Vcpu {
    /// Makes x87's pointers the guest's: while guest code runs, the processor notes where the emitted code is, and what its
    /// operand and opcode are.
    pub fn settle_x87_pointers(&mut self) {
        if !self.xsave.has(component::X87) {
            return;
        }
        // Opcode and data pointer are noted only with an exception: then they are those of the instruction that FIP names.
        let mut base = 0;
        let instruction = self.xsave.u64_at(legacy::FIP);
        if self.engine.cache.offset_of(instruction).is_some() {
            let guest = self.instruction_at(instruction, self.hot.x87_page);
            self.xsave.put(legacy::FIP, &guest.map_or(0, |(insn, ..)| insn.ip()).to_le_bytes());
            if let (Some((insn, bytes, _)), true) = (guest, self.xsave.x87_pending()) {
                self.xsave.put(legacy::FOP, &x87_opcode(&bytes).to_le_bytes());
                base = match self.operand_segment(&insn) {
                    s @ (SegmentRegister::Fs | SegmentRegister::Gs) => self.seg(s).base,
                    s if !self.code64() => self.seg(s).base,
                    _ => 0,
                };
            }
        }
        let data = self.xsave.u64_at(legacy::FDP);
        if let Some(guest) = self.guest_data_address(data) {
            let offset = guest.wrapping_sub(base);
            let offset = if self.code64() { offset } else { offset & 0xffff_ffff };
            self.xsave.put(legacy::FDP, &offset.to_le_bytes());
        }
    }

    /// The guest's address of RAM at a host address, as the TLB maps it now; zero if it is RAM that the TLB does not
    /// map. `None`: not a host address, so the guest's own.
    fn guest_data_address(&self, host: u64) -> Option<u64> {
        if let Some(bounced) = self.engine.bounce.guest_address(host) {
            return Some(bounced);
        }
        let inside = self.machine.ram.contains_host(host as usize);
        inside.then(|| self.tlb.guest_address(host).unwrap_or(0))
    }
}

/// FOP for an instruction: the low bits of its opcode, and its ModRM byte (Intel SDM 1 8.1.9).
fn x87_opcode(bytes: &[u8; 15]) -> u16 {
    let mut opcode = bytes.iter().skip_while(|b| !matches!(b, 0xd8..=0xdf)).copied();
    let (first, second) = (opcode.next().unwrap_or(0), opcode.next().unwrap_or(0));
    u16::from(first & 7) << 8 | u16::from(second)
}
