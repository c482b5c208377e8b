//! Saving and restoring x87/SSE/AVX state: FXSAVE, FXRSTOR and the XSAVE family (Intel SDM 1 chapter 13).
//!
//! All of it is copying between guest memory and [`crate::Vcpu::xsave`]: a save makes the image of what the instruction
//! writes and a list of the ranges it consists of; a restore reads the ranges that it needs, checks them, and only then
//! changes the state. What the instructions leave alone in memory is left alone here too.

use arch::Exception;
use arch::cpuid::{CpuModel, Dynamic, Feature};
use arch::registers::{cr0, cr4, gpr, xcr0};
use iced_x86::{Instruction, Mnemonic};

use super::Sensitive;
use crate::cpu::{Stop, Vcpu, XSAVE_SIZE, XsaveArea};
use crate::xstate::{COMPACTED, Component, EXTENDED, HEADER, MXCSR_INIT, component, layout, legacy};

/// The entry for FXSAVE, XSAVE and their relatives.
pub fn lookup(insn: &Instruction) -> Option<Sensitive> {
    use Mnemonic::*;
    let exec = match insn.mnemonic() {
        Fxsave | Fxsave64 => fxsave,
        Fxrstor | Fxrstor64 => fxrstor,
        Xsave | Xsave64 | Xsaveopt | Xsaveopt64 => xsave,
        Xsavec | Xsavec64 => xsavec,
        Xsaves | Xsaves64 => xsaves,
        Xrstor | Xrstor64 => xrstor,
        Xrstors | Xrstors64 => xrstors,
        _ => return None,
    };
    // PKRU may come with XRSTOR, which changes what memory may be accessed.
    let ends_block = matches!(insn.mnemonic(), Xrstor | Xrstor64 | Xrstors | Xrstors64);
    Some(Sensitive { exec, ends_block, fp: true })
}

/// With REX.W, FIP and FDP have 64 bits; else 32, with selectors beside them.
fn wide_pointers(insn: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(insn.mnemonic(), Fxsave64 | Fxrstor64 | Xsave64 | Xsaveopt64 | Xsavec64 | Xsaves64 | Xrstor64 | Xrstors64)
}

/// Bytes to write or to load, in one buffer at the offsets they have in memory. What is in no range is of no meaning.
pub struct Image {
    bytes: [u8; XSAVE_SIZE],
    /// (start, end), adjacent ones joined.
    ranges: [(usize, usize); 12],
    count: usize,
}

impl Image {
    /// One without ranges: the one that was last given [back](Image::back), which spares to fill 4 KiB with zeros.
    fn of(cpu: &mut Vcpu) -> Box<Self> {
        let mut image = cpu
            .engine
            .image
            .take()
            .unwrap_or_else(|| Box::new(Image { bytes: [0; XSAVE_SIZE], ranges: [(0, 0); 12], count: 0 }));
        image.count = 0;
        image
    }

    fn back(self: Box<Self>, cpu: &mut Vcpu) {
        cpu.engine.image = Some(self);
    }

    /// Adds a range behind the ones before.
    fn add(&mut self, start: usize, end: usize) {
        if self.count != 0 && self.ranges[self.count - 1].1 == start {
            self.ranges[self.count - 1].1 = end;
        } else if start < end && self.count < self.ranges.len() {
            self.ranges[self.count] = (start, end);
            self.count += 1;
        }
    }

    fn put(&mut self, start: usize, bytes: &[u8]) {
        self.bytes[start..start + bytes.len()].copy_from_slice(bytes);
        self.add(start, start + bytes.len());
    }

    fn write(&self, cpu: &mut Vcpu, va: u64) -> Result<(), Exception> {
        let context = cpu.context();
        for &(start, end) in &self.ranges[..self.count] {
            cpu.write_linear(va.wrapping_add(start as u64), &self.bytes[start..end], context)?;
        }
        Ok(())
    }

    fn read(&mut self, cpu: &mut Vcpu, va: u64) -> Result<(), Exception> {
        let context = cpu.context();
        for &(start, end) in &self.ranges[..self.count] {
            cpu.read_linear(va.wrapping_add(start as u64), &mut self.bytes[start..end], context)?;
        }
        Ok(())
    }

    fn u64_at(&self, offset: usize) -> u64 {
        self.bytes[offset..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b))
    }
}

/// Where a component is in an area whose XCOMP_BV is `compaction` (0: the standard format).
#[derive(Clone, Copy)]
struct Format {
    compaction: u64,
}

impl Format {
    const STANDARD: Format = Format { compaction: 0 };

    /// (offset, size) of components 2 and up that are in an area, in order. The compacted format puts each of XCOMP_BV
    /// behind the other (Intel SDM 1 13.4.3).
    fn components(self, cpu: &Vcpu) -> impl Iterator<Item = (u32, usize, usize)> + use<> {
        let mut end = EXTENDED;
        let pkru = cpu.machine.pkru;
        (2..10u32).filter_map(move |i| {
            let c = if i == component::PKRU { pkru } else { layout().component(i) };
            if self.compaction == 0 {
                return (c.size != 0).then_some((i, c.offset, c.size));
            }
            if self.compaction & 1 << i == 0 {
                return None;
            }
            let start = if c.aligned { end.next_multiple_of(64) } else { end };
            end = start + c.size;
            Some((i, start, c.size))
        })
    }
}

/// Where PKRU is in a guest's areas: as its CPUID says, on hosts without protection keys too.
pub fn pkru_component(model: &CpuModel) -> Component {
    if !model.has(Feature::Pku) {
        return Component::default();
    }
    // What the leaf says of a component is the same at any time.
    let state = Dynamic { apic_id: 0, apic_enabled: true, cr4: 0, xcr0: 0, xss: 0 };
    let leaf = model.leaf(0xd, component::PKRU, &state);
    let fits = leaf.ebx as usize + 8 <= XSAVE_SIZE;
    Component { offset: leaf.ebx as usize, size: if fits { 8 } else { 0 }, aligned: leaf.ecx & 2 != 0 }
}

/// The linear address of the area, checked for alignment and `size` bytes.
fn area(cpu: &mut Vcpu, insn: &Instruction, size: usize, alignment: u64, write: bool) -> Result<u64, Exception> {
    let (segment, offset) = cpu.effective_address(insn, 0);
    let aligned = |cpu: &Vcpu, va: u64| {
        // Where alignment is checked, Intel's processors look at the low bits first.
        if !cpu.machine.cpuid.is_amd() {
            cpu.check_alignment(va, 4)?;
        }
        if va.is_multiple_of(alignment) { Ok(()) } else { Err(Exception::general_protection(0)) }
    };
    if let Some(va) = cpu.flat_address(segment, offset) {
        aligned(cpu, va)?;
    }
    let va = cpu.linear(segment, offset, size, write)?;
    aligned(cpu, va)?;
    if write {
        // Processors try the last byte before they write any, even if it is of a part that is not written.
        cpu.probe_write(va.wrapping_add(size as u64 - 1), 1, cpu.context())?;
    }
    Ok(va)
}

/// #NM where the operating system restores state lazily or emulates x87.
fn require_fpu(cpu: &Vcpu) -> Result<(), Exception> {
    if cpu.cr0 & (cr0::TS | cr0::EM) != 0 { Err(Exception::device_not_available()) } else { Ok(()) }
}

/// #UD for what the guest's CPUID or the operating system does not have, #NM for lazily restored state.
fn require_xsave(cpu: &Vcpu, feature: Feature) -> Result<(), Exception> {
    if !cpu.machine.cpuid.has(feature) || cpu.cr4 & cr4::OSXSAVE == 0 {
        Err(Exception::invalid_opcode())
    } else if cpu.cr0 & cr0::TS != 0 {
        Err(Exception::device_not_available())
    } else {
        Ok(())
    }
}

fn require_supervisor(cpu: &Vcpu) -> Result<(), Exception> {
    if cpu.cpl() != 0 { Err(Exception::general_protection(0)) } else { Ok(()) }
}

/// How many of the 16 vector registers that other modes lack an instruction sees: outside 64-bit mode half of them.
fn vector_registers(cpu: &Vcpu) -> usize {
    if cpu.code64() { 16 } else { 8 }
}

/// The bytes of a component that an instruction sees: outside 64-bit mode not those of registers 8 to 31.
fn visible(component: u32, size: usize, registers: usize) -> usize {
    match component {
        component::AVX | component::ZMM_HI256 => size * registers / 16,
        component::HI16_ZMM if registers < 16 => 0,
        _ => size,
    }
}

/// Bytes 0 to 23 of a legacy region. AMD's processors save opcode and pointers only with a pending exception, and zero
/// otherwise (AMD APM 2, 11.4.4; CPUID 8000_0008H:EBX[2]).
fn x87_words(state: &XsaveArea, wide: bool, amd: bool) -> [u8; legacy::MXCSR] {
    let mut words: [u8; legacy::MXCSR] = state.get(0);
    words[legacy::FTW + 1] = 0;
    if amd && !state.x87_pending() {
        words[legacy::FOP..].fill(0);
    }
    if !wide {
        // FCS and FDS: zero, as on all processors that have deprecated them (CPUID.7.0:EBX[13]).
        words[legacy::FIP + 4..legacy::FDP].fill(0);
        words[legacy::FDP + 4..].fill(0);
    }
    words
}

/// Puts the x87 state into an image, with MXCSR between its parts if that is wanted.
fn image_x87(image: &mut Image, cpu: &mut Vcpu, wide: bool, mxcsr: bool) {
    cpu.xsave.materialize(component::X87);
    image.put(0, &x87_words(&cpu.xsave, wide, cpu.machine.cpuid.is_amd()));
    if mxcsr {
        image_mxcsr(image, &cpu.xsave);
    }
    image.put(legacy::ST, &cpu.xsave.0[legacy::ST..legacy::XMM]);
}

fn image_mxcsr(image: &mut Image, state: &XsaveArea) {
    image.put(legacy::MXCSR, &state.mxcsr().to_le_bytes());
    image.put(legacy::MXCSR_MASK, &layout().mxcsr_mask.to_le_bytes());
}

fn image_xmm(image: &mut Image, state: &XsaveArea, registers: usize) {
    if state.in_use() & xcr0::SSE != 0 {
        image.put(legacy::XMM, &state.0[legacy::XMM..legacy::XMM + 16 * registers]);
    } else {
        image.put(legacy::XMM, &[0; 16 * 16][..16 * registers]);
    }
}

/// XINUSE as the guest sees it: outside 64-bit mode, ZMM16 to ZMM31 count as in their initial state to Intel's processors.
fn in_use(cpu: &Vcpu) -> u64 {
    let visible = if cpu.code64() || cpu.machine.cpuid.is_amd() { u64::MAX } else { !xcr0::HI16_ZMM };
    let native = cpu.xsave.in_use() & layout().native & visible;
    if cpu.pkru != 0 { native | xcr0::PKRU } else { native }
}

/// XINUSE, which XGETBV with ECX = 1 gives and'ed with XCR0.
pub fn xinuse(cpu: &Vcpu) -> u64 {
    in_use(cpu)
}

fn requested(cpu: &Vcpu, enabled: u64) -> u64 {
    let mask = cpu.gpr[gpr::RDX] << 32 | cpu.gpr[gpr::RAX] & 0xffff_ffff;
    mask & enabled
}

/// Makes the image of the components in `saved`, of which those in `written` go to memory.
fn image_of(cpu: &mut Vcpu, insn: &Instruction, written: u64, mxcsr: bool, format: Format) -> Box<Image> {
    let mut image = Image::of(cpu);
    let (registers, pkru) = (vector_registers(cpu), cpu.pkru);
    if written & xcr0::X87 != 0 {
        image_x87(&mut image, cpu, wide_pointers(insn), mxcsr);
    } else if mxcsr {
        image_mxcsr(&mut image, &cpu.xsave);
    }
    if written & xcr0::SSE != 0 {
        image_xmm(&mut image, &cpu.xsave, registers);
    }
    // The header comes here by its place; its words are added by the caller.
    for (i, offset, size) in format.components(cpu).filter(|c| written & 1 << c.0 != 0) {
        if i == component::PKRU {
            image.put(offset, &u64::from(pkru).to_le_bytes());
            continue;
        }
        let size = visible(i, size, registers);
        let source = layout().component(i).offset;
        if cpu.xsave.in_use() & 1 << i != 0 {
            image.put(offset, &cpu.xsave.0[source..source + size]);
        } else {
            image.put(offset, &[0; 1024][..size.min(1024)]);
        }
    }
    image
}

/// The size of an area that holds `components`.
fn extent(cpu: &Vcpu, components: u64, format: Format) -> usize {
    format
        .components(cpu)
        .filter(|c| components & 1 << c.0 != 0)
        .map(|(_, offset, size)| offset + size)
        .fold(EXTENDED, usize::max)
}

fn fxsave(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    require_fpu(cpu)?;
    let va = area(cpu, insn, 512, 16, true)?;
    cpu.settle_x87_pointers();
    let image = image_of(cpu, insn, xcr0::X87 | xcr0::SSE, true, Format::STANDARD);
    image.write(cpu, va)?;
    image.back(cpu);
    Ok(())
}

fn fxrstor(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    require_fpu(cpu)?;
    let va = area(cpu, insn, 512, 16, false)?;
    let mut image = Image::of(cpu);
    let registers = vector_registers(cpu);
    image.add(0, legacy::XMM + 16 * registers);
    image.read(cpu, va)?;
    check_mxcsr(&image)?;
    load_x87(cpu, &image, wide_pointers(insn));
    load_mxcsr(cpu, &image);
    load_xmm(cpu, &image, registers);
    image.back(cpu);
    Ok(())
}

/// XSAVE and XSAVEOPT: the standard format, whose header is updated in place (Intel SDM 1 13.7, 13.9).
fn xsave(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let optimized = matches!(insn.mnemonic(), Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64);
    require_xsave(cpu, if optimized { Feature::Xsaveopt } else { Feature::Xsave })?;
    let wanted = requested(cpu, cpu.xcr0);
    let va = area(cpu, insn, extent(cpu, wanted, Format::STANDARD), 64, true)?;
    cpu.settle_x87_pointers();
    let used = in_use(cpu);
    let written = if optimized { wanted & used } else { wanted };
    let mxcsr = wanted & (xcr0::SSE | xcr0::AVX) != 0;
    let header = va + HEADER as u64;
    let context = cpu.context();
    let old = cpu.read_sized(header, 8, context)?;
    let image = image_of(cpu, insn, written, mxcsr, Format::STANDARD);
    image.write(cpu, va)?;
    image.back(cpu);
    cpu.write_sized(header, 8, old & !wanted | used & wanted, context)?;
    Ok(())
}

fn xsavec(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    require_xsave(cpu, Feature::Xsavec)?;
    save_compacted(cpu, insn, cpu.xcr0)
}

fn xsaves(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    require_xsave(cpu, Feature::Xsaves)?;
    require_supervisor(cpu)?;
    save_compacted(cpu, insn, cpu.xcr0 | cpu.msrs.xss)
}

/// XSAVEC and XSAVES: the compacted format, of which only what is in use is written (Intel SDM 1 13.10, 13.11).
fn save_compacted(cpu: &mut Vcpu, insn: &Instruction, enabled: u64) -> Result<(), Stop> {
    let wanted = requested(cpu, enabled);
    let format = Format { compaction: wanted | COMPACTED };
    let va = area(cpu, insn, extent(cpu, wanted, format), 64, true)?;
    cpu.settle_x87_pointers();
    let mut used = in_use(cpu);
    if cpu.xsave.mxcsr() != MXCSR_INIT {
        used |= xcr0::SSE;
    }
    let written = wanted & used;
    let image = image_of(cpu, insn, written, written & xcr0::SSE != 0, format);
    image.write(cpu, va)?;
    image.back(cpu);
    let mut header = [0; 16];
    header[..8].copy_from_slice(&written.to_le_bytes());
    header[8..].copy_from_slice(&format.compaction.to_le_bytes());
    let context = cpu.context();
    cpu.write_linear(va + HEADER as u64, &header, context)?;
    Ok(())
}

fn xrstor(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    require_xsave(cpu, Feature::Xsave)?;
    let va = area(cpu, insn, EXTENDED, 64, false)?;
    let header = read_header(cpu, va)?;
    if header.compaction & COMPACTED != 0 && cpu.machine.cpuid.has(Feature::Xsavec) {
        return restore(cpu, insn, va, &header, cpu.xcr0);
    }
    // The standard form (Intel SDM 2D, XRSTOR): components that are not enabled, and reserved bytes 8 to 23.
    if header.present & !cpu.xcr0 != 0 || header.compaction != 0 || header.third != 0 {
        return Err(Exception::general_protection(0).into());
    }
    restore(cpu, insn, va, &header, cpu.xcr0)
}

fn xrstors(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    require_xsave(cpu, Feature::Xsaves)?;
    require_supervisor(cpu)?;
    let va = area(cpu, insn, EXTENDED, 64, false)?;
    let header = read_header(cpu, va)?;
    if header.compaction & COMPACTED == 0 {
        return Err(Exception::general_protection(0).into());
    }
    restore(cpu, insn, va, &header, cpu.xcr0 | cpu.msrs.xss)
}

/// An XSAVE header.
struct Header {
    /// XSTATE_BV
    present: u64,
    /// XCOMP_BV
    compaction: u64,
    /// Bytes 16 to 23.
    third: u64,
    /// Bytes 24 to 63 have a bit set.
    rest: bool,
}

fn read_header(cpu: &mut Vcpu, va: u64) -> Result<Header, Exception> {
    let mut bytes = [0; EXTENDED - HEADER];
    let context = cpu.context();
    cpu.read_linear(va + HEADER as u64, &mut bytes, context)?;
    let word = |i: usize| bytes[i * 8..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
    Ok(Header { present: word(0), compaction: word(1), third: word(2), rest: bytes[24..].iter().any(|&b| b != 0) })
}

/// What XRSTOR and XRSTORS have in common once the header is known (Intel SDM 1 13.8, 13.12).
fn restore(cpu: &mut Vcpu, insn: &Instruction, va: u64, header: &Header, enabled: u64) -> Result<(), Stop> {
    let compacted = header.compaction & COMPACTED != 0;
    let format = if compacted { Format { compaction: header.compaction } } else { Format::STANDARD };
    if compacted {
        let listed = header.compaction & !COMPACTED;
        if listed & !enabled != 0 || header.present & !listed != 0 || header.third != 0 || header.rest {
            return Err(Exception::general_protection(0).into());
        }
    }
    let wanted = requested(cpu, enabled);
    let loaded = wanted & header.present;
    let mxcsr = match compacted {
        true => loaded & xcr0::SSE != 0,
        false => wanted & (xcr0::SSE | xcr0::AVX) != 0,
    };
    let registers = vector_registers(cpu);

    let mut image = Image::of(cpu);
    if loaded & xcr0::X87 != 0 {
        image.add(0, legacy::MXCSR);
    }
    if mxcsr {
        image.add(legacy::MXCSR, legacy::ST);
    }
    if loaded & xcr0::X87 != 0 {
        image.add(legacy::ST, legacy::XMM);
    }
    if loaded & xcr0::SSE != 0 {
        image.add(legacy::XMM, legacy::XMM + 16 * registers);
    }
    for (i, offset, size) in format.components(cpu).filter(|c| loaded & 1 << c.0 != 0) {
        image.add(offset, offset + visible(i, size, registers));
    }
    // Also the end of the area has to be a good address.
    area(cpu, insn, extent(cpu, loaded, format), 64, false)?;
    image.read(cpu, va)?;
    if mxcsr {
        check_mxcsr(&image)?;
        load_mxcsr(cpu, &image);
    } else if compacted && wanted & xcr0::SSE != 0 {
        cpu.xsave.set_mxcsr(MXCSR_INIT);
    }

    if loaded & xcr0::X87 != 0 {
        load_x87(cpu, &image, wide_pointers(insn));
    }
    if loaded & xcr0::SSE != 0 {
        load_xmm(cpu, &image, registers);
    }
    for (i, offset, size) in format.components(cpu).filter(|c| loaded & 1 << c.0 != 0) {
        if i == component::PKRU {
            set_pkru(cpu, image.u64_at(offset) as u32);
            continue;
        }
        let size = visible(i, size, registers);
        let place = layout().component(i).offset;
        if size != 0 {
            cpu.xsave.materialize(i);
            cpu.xsave.put(place, &image.bytes[offset..offset + size]);
        }
    }
    image.back(cpu);
    initialize(cpu, wanted & !header.present, registers);
    Ok(())
}

/// Puts components in their initial state; registers that the mode lacks keep theirs.
fn initialize(cpu: &mut Vcpu, components: u64, registers: usize) {
    if components & xcr0::PKRU != 0 {
        set_pkru(cpu, 0);
    }
    if registers == 16 {
        cpu.xsave.initialize(components);
        return;
    }
    cpu.xsave.initialize(components & (xcr0::X87 | xcr0::OPMASK));
    if components & xcr0::SSE != 0 && cpu.xsave.in_use() & xcr0::SSE != 0 {
        cpu.xsave.0[legacy::XMM..legacy::XMM + 16 * registers].fill(0);
    }
    for i in [component::AVX, component::ZMM_HI256] {
        let c = layout().component(i);
        if components & 1 << i != 0 && cpu.xsave.in_use() & 1 << i != 0 {
            cpu.xsave.0[c.offset..c.offset + visible(i, c.size, registers)].fill(0);
        }
    }
}

fn set_pkru(cpu: &mut Vcpu, value: u32) {
    if cpu.pkru != value {
        cpu.pkru = value;
        cpu.mmu_flush_all();
    }
}

/// Reserved bits of MXCSR may not be set.
fn check_mxcsr(image: &Image) -> Result<(), Exception> {
    let mxcsr = image.u64_at(legacy::MXCSR) as u32;
    if mxcsr & !layout().mxcsr_mask != 0 { Err(Exception::general_protection(0)) } else { Ok(()) }
}

fn load_mxcsr(cpu: &mut Vcpu, image: &Image) {
    cpu.xsave.set_mxcsr(image.u64_at(legacy::MXCSR) as u32);
}

fn load_xmm(cpu: &mut Vcpu, image: &Image, registers: usize) {
    cpu.xsave.materialize(component::SSE);
    cpu.xsave.put(legacy::XMM, &image.bytes[legacy::XMM..legacy::XMM + 16 * registers]);
}

fn load_x87(cpu: &mut Vcpu, image: &Image, wide: bool) {
    let amd = cpu.machine.cpuid.is_amd();
    let state = &mut cpu.xsave;
    let words = image.u64_at(0);
    state.set_x87_words(words as u16, (words >> 16) as u16);
    state.put(legacy::FTW, &[image.bytes[legacy::FTW], 0]);
    state.put(legacy::FOP, &((words >> 48) as u16 & 0x7ff).to_le_bytes());
    let pointer = |at: usize| if wide { image.u64_at(at) } else { image.u64_at(at) & 0xffff_ffff };
    // FIP holds a linear address of up to 57 bits, sign-extended; so does AMD's FDP, Intel's all of its bits.
    let extended = |pointer: u64| ((pointer << 7) as i64 >> 7) as u64;
    let fdp = pointer(legacy::FDP);
    state.put(legacy::FIP, &extended(pointer(legacy::FIP)).to_le_bytes());
    state.put(legacy::FDP, &if amd { extended(fdp) } else { fdp }.to_le_bytes());
    for i in 0..8 {
        let start = legacy::ST + i * 16;
        state.put(start, &image.bytes[start..start + 10]);
        state.put(start + 10, &[0; 6]);
    }
}

#[cfg(test)]
mod tests;
