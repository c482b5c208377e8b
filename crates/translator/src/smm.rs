//! System-management mode (Intel SDM 3C chapter 32): the way in, and the way out by RSM.
//!
//! An SMI saves the state below SMBASE + 10000H and continues at SMBASE + 8000H, in a mode like real mode but with segments
//! of 4 GiB, by a memory map of its own ([`memory::MemoryMap::smm_sections`]): that is where SMRAM is. RSM loads whatever
//! is in the save area then. It has the layout of processors with 64-bit mode as AMD documents it (AMD64 Architecture
//! Programmer's Manual 2, table 10-1), which is what firmware for virtual machines knows; SMBASE can be relocated, I/O
//! instructions can't be restarted.

use arch::registers::{cr0, cr4, debug, efer, rflags};
use arch::state::{Activity, DescriptorTable, Segment, SegmentRegister, Smm};
use engine::Exit;

use crate::Vcpu;
use crate::cpu::Stop;
use crate::shared::request;

/// A vCPU's own part of [`Smm`].
#[derive(Clone, Copy, Debug)]
pub struct SmmState {
    pub base: u32,
    pub active: bool,
    nmis_were_blocked: bool,
    /// A debug trap that was due when the SMI came. It has no place in the save area.
    debug: u64,
}

impl Default for SmmState {
    fn default() -> Self {
        SmmState { base: Smm::RESET_BASE, active: false, nmis_were_blocked: false, debug: 0 }
    }
}

/// The save area: its offset from SMBASE, and its size.
const AREA: u64 = 0xfe00;
const SIZE: usize = 0x200;
/// The handler's offset from SMBASE.
const ENTRY: u64 = 0x8000;

/// Offsets in the area. First six segment registers in the order of their encodings, 16 bytes each.
const SEGMENTS: usize = 0x00;
const GDTR: usize = 0x60;
const LDTR: usize = 0x70;
const IDTR: usize = 0x80;
const TR: usize = 0x90;
/// A byte: HLT goes on after RSM.
const HALT_RESTART: usize = 0xc9;
const EFER: usize = 0xd0;
const REVISION: usize = 0xfc;
const SMBASE: usize = 0x100;
const CR4: usize = 0x148;
const CR3: usize = 0x150;
const CR0: usize = 0x158;
const DR7: usize = 0x160;
const DR6: usize = 0x168;
const RFLAGS: usize = 0x170;
const RIP: usize = 0x178;
/// RAX; the others follow downwards.
const RAX: usize = 0x1f8;

/// The layout's number, and that SMBASE can be relocated.
const REVISION_ID: u32 = 0x64 | 1 << 17;
/// Segment attributes that the area has room for: all but the limit's bits.
const ATTRIBUTES: u16 = 0xf0ff;
/// What an SMI clears of CR0.
const CR0_CLEARED: u64 = cr0::PE | cr0::EM | cr0::TS | cr0::PG;

/// The save area's bytes.
struct Area([u8; SIZE]);

impl Area {
    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.iter_mut().zip(self.0.iter().skip(at)).for_each(|(to, from)| *to = *from);
        bytes
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.get(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.get(at))
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
    }

    fn put_u64(&mut self, at: usize, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    fn segment(&self, at: usize) -> Segment {
        Segment {
            selector: u16::from_le_bytes(self.get(at)),
            attributes: u16::from_le_bytes(self.get(at + 2)) & ATTRIBUTES,
            limit: self.u32(at + 4),
            base: self.u64(at + 8),
        }
    }

    fn put_segment(&mut self, at: usize, segment: &Segment) {
        self.put(at, &segment.selector.to_le_bytes());
        self.put(at + 2, &(segment.attributes & ATTRIBUTES).to_le_bytes());
        self.put(at + 4, &segment.limit.to_le_bytes());
        self.put_u64(at + 8, segment.base);
    }

    fn table(&self, at: usize) -> DescriptorTable {
        DescriptorTable { limit: self.u32(at + 4) as u16, base: self.u64(at + 8) }
    }

    fn put_table(&mut self, at: usize, table: &DescriptorTable) {
        self.put(at + 4, &u32::from(table.limit).to_le_bytes());
        self.put_u64(at + 8, table.base);
    }
}

fn segment_at(index: usize) -> usize {
    SEGMENTS + 16 * index
}

fn register_at(index: usize) -> usize {
    RAX - 8 * index
}

impl Vcpu {
    /// For [`arch::CpuState::smm`].
    pub fn saved_smm(&self) -> Smm {
        let SmmState { base, active, nmis_were_blocked, .. } = self.smm;
        let pending = self.shared.requests.load(std::sync::atomic::Ordering::SeqCst) & request::SMI != 0;
        Smm { base, active, pending, nmis_were_blocked }
    }

    /// The inverse. What was pending before is forgotten already.
    pub fn restore_smm(&mut self, smm: &Smm) {
        let Smm { base, active, pending, nmis_were_blocked } = *smm;
        self.smm = SmmState { base, active, nmis_were_blocked, debug: 0 };
        if pending {
            self.shared.flag(request::SMI);
        }
    }

    /// An SMI (Intel SDM 3C 32.4, 32.5).
    pub fn enter_smm(&mut self) {
        let area = self.state_to_save();
        let plain = self.map_is_all();
        self.smm.active = true;
        self.smm.nmis_were_blocked = std::mem::replace(&mut self.nmi_blocked, true);
        self.smm.debug = std::mem::take(&mut self.pending_debug);
        self.debug_shadow = false;
        self.activity = Activity::Running;
        self.rflags = rflags::FIXED;
        self.rip = ENTRY;
        let attributes = Segment::P | Segment::S | Segment::G | 0x3;
        let data = Segment { base: 0, limit: u32::MAX, attributes, selector: 0 };
        self.segments = [data; 6];
        let (base, selector) = (u64::from(self.smm.base), (self.smm.base >> 4) as u16);
        self.segments[SegmentRegister::Cs as usize] = Segment { base, selector, ..data };
        self.cr0 &= !CR0_CLEARED;
        self.cr4 = 0;
        self.msrs.efer = 0;
        self.dr7 = debug::DR7_INIT;
        self.idtr = DescriptorTable::default();
        self.change_map(plain);
        self.write_area(&area);
    }

    fn state_to_save(&self) -> Area {
        let mut area = Area([0; SIZE]);
        for (index, segment) in self.segments.iter().enumerate() {
            area.put_segment(segment_at(index), segment);
        }
        area.put_segment(LDTR, &self.ldtr);
        area.put_segment(TR, &self.tr);
        area.put_table(GDTR, &self.gdtr);
        area.put_table(IDTR, &self.idtr);
        area.put(HALT_RESTART, &[u8::from(self.activity == Activity::Halted)]);
        area.put_u64(EFER, self.msrs.efer);
        area.put(REVISION, &REVISION_ID.to_le_bytes());
        area.put(SMBASE, &self.smm.base.to_le_bytes());
        let rest = [(CR4, self.cr4), (CR3, self.cr3), (CR0, self.cr0), (DR7, self.dr7), (DR6, self.dr6)];
        rest.into_iter()
            .chain([(RFLAGS, self.rflags), (RIP, self.rip)])
            .for_each(|(at, value)| area.put_u64(at, value));
        for (index, value) in self.gpr.iter().enumerate() {
            area.put_u64(register_at(index), *value);
        }
        area
    }

    /// RSM, in system-management mode. A state that can't be makes the processor shut down (Intel SDM 3C 32.4.2).
    pub fn leave_smm(&mut self) -> Result<(), Stop> {
        let area = self.read_area();
        let (new_cr0, new_cr4, new_efer) = (area.u64(CR0), area.u64(CR4), area.u64(EFER));
        if !self.possible(new_cr0, new_cr4, new_efer) {
            return Err(Stop::Exit(Exit::TripleFault));
        }
        let plain = self.map_is_all();
        for (index, segment) in self.segments.iter_mut().enumerate() {
            *segment = area.segment(segment_at(index));
        }
        (self.ldtr, self.tr) = (area.segment(LDTR), area.segment(TR));
        (self.gdtr, self.idtr) = (area.table(GDTR), area.table(IDTR));
        for (index, register) in self.gpr.iter_mut().enumerate() {
            *register = area.u64(register_at(index));
        }
        (self.cr0, self.cr3, self.cr4) = (new_cr0 | cr0::ET, area.u64(CR3), new_cr4);
        let active = new_cr0 & cr0::PG != 0 && new_efer & efer::LME != 0;
        self.msrs.efer = new_efer & !efer::LMA | if active { efer::LMA } else { 0 };
        (self.dr6, self.dr7) = (area.u64(DR6) & 0xffff_ffff, area.u64(DR7) & 0xffff_ffff);
        self.rflags = area.u64(RFLAGS) & rflags::KNOWN | rflags::FIXED;
        self.rip = area.u64(RIP);
        if !self.code64() {
            self.rip &= 0xffff_ffff;
        }
        self.smm.base = area.u32(SMBASE);
        self.smm.active = false;
        self.pending_debug = std::mem::take(&mut self.smm.debug);
        if !self.smm.nmis_were_blocked {
            self.unblock_nmis();
        }
        let [halted] = area.get(HALT_RESTART);
        if halted & 1 != 0 {
            self.activity = Activity::Halted;
        }
        self.change_map(plain);
        Ok(())
    }

    /// What MOV to these registers would refuse.
    fn possible(&self, new_cr0: u64, new_cr4: u64, new_efer: u64) -> bool {
        let both = |value: u64, set: u64, without: u64| value & set != 0 && value & without == 0;
        let long = new_cr0 & cr0::PG != 0 && new_efer & efer::LME != 0;
        new_cr0 >> 32 == 0
            && !both(new_cr0, cr0::PG, cr0::PE)
            && !both(new_cr0, cr0::NW, cr0::CD)
            && new_cr4 & !self.machine.cpuid.cr4_mask() == 0
            && new_efer & !(self.machine.cpuid.efer_mask() | efer::LMA) == 0
            && !(long && new_cr4 & cr4::PAE == 0)
            && (long || new_cr4 & cr4::PCIDE == 0)
    }

    /// The area in pieces that lie in one page, and that a bus takes where there is no RAM: SMBASE is any number.
    fn area_pieces(&self, is_ram: impl Fn(&Vcpu, u64) -> bool) -> Vec<(u64, std::ops::Range<usize>)> {
        let start = u64::from(self.smm.base) + AREA;
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < SIZE {
            let at = start + done as u64;
            let in_page = (memory::PAGE_SIZE - at % memory::PAGE_SIZE) as usize;
            let length = (SIZE - done).min(in_page).min(if is_ram(self, at) { SIZE } else { 8 });
            pieces.push((at, done..done + length));
            done += length;
        }
        pieces
    }

    fn write_area(&mut self, area: &Area) {
        for (at, range) in self.area_pieces(|cpu, at| cpu.writable(at).is_some()) {
            if let Some(bytes) = area.0.get(range) {
                self.phys_write(at, bytes);
            }
        }
    }

    fn read_area(&self) -> Area {
        let mut area = Area([0; SIZE]);
        for (at, range) in self.area_pieces(|cpu, at| cpu.readable(at).is_some()) {
            if let Some(bytes) = area.0.get_mut(range) {
                self.phys_read(at, bytes);
            }
        }
        area
    }
}

#[cfg(test)]
mod tests;
