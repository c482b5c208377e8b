//! The slow path of memory accesses: TLB misses, MMIO, page-crossing operands, writes to translated code.
//!
//! Emitted code calls here through [`crate::entry`] with a guest-virtual address. A plain page of RAM is entered into the
//! TLB and its host address returned ([`fill_light`]); so is a buffer for an operand across two of them. Everything else *bounces*: the operand is copied to a buffer, or read
//! from the device; the guest's own instruction runs on the buffer, in a copy made for this place ([`Snippet`]); what it wrote is
//! written back ([`access_bounced`]). So MMIO needs no emulator of instructions. A write to a page that holds translated
//! code runs the same way but directly on RAM, which keeps LOCKed instructions atomic, and drops the code afterwards.

use iced_x86::{Decoder, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind};
use memory::PAGE_SIZE;

use arch::{Exception, SegmentRegister, Vector};

use crate::codegen::asm::{Asm, Mem, RSP};
use crate::codegen::classify::operand_size;
use crate::codegen::facts::{FpClass, facts};
use crate::codegen::reencode::Operand;
use crate::codegen::relative;
use crate::cpu::{Context, Stop, Vcpu};
use crate::entry::{Left, Split, context_offset};
use crate::mmu::Access;
use crate::mode::Mode;
use crate::semantics::Exec;

/// Size, direction and context of an access, in one word for emitted code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessKind(u32);

/// In an [`AccessKind`]: how far the context is shifted, and that the access is to the stack.
pub const CONTEXT_SHIFT: u32 = 17;
pub const STACK_KIND: u32 = 1 << 20;

impl AccessKind {
    pub fn new(size: usize, write: bool, context: Context) -> Self {
        AccessKind(size as u32 | (write as u32) << 16 | (context as u32) << CONTEXT_SHIFT)
    }

    /// The access is that of a group (see `codegen::groups`): the size is its span.
    pub fn group(self) -> Self {
        AccessKind(self.0 | 1 << 19)
    }

    /// The access is to the stack, whose page is remembered; the answer is an addend.
    pub fn stack(self) -> Self {
        AccessKind(self.0 | STACK_KIND)
    }

    /// The first member of a group writes.
    pub fn writes_first(self) -> Self {
        AccessKind(self.0 | 1 << 21)
    }

    fn is_group(self) -> bool {
        self.0 & 1 << 19 != 0
    }

    pub fn is_stack(self) -> bool {
        self.0 & STACK_KIND != 0
    }

    pub fn bits(self) -> u32 {
        self.0
    }
    /// In bytes.
    pub fn size(self) -> usize {
        (self.0 & 0xffff) as usize
    }
    pub fn write(self) -> bool {
        self.0 & 1 << 16 != 0
    }
    pub fn context(self) -> Context {
        match self.0 >> CONTEXT_SHIFT & 3 {
            0 => Context::User,
            1 => Context::Supervisor,
            _ => Context::SupervisorUser,
        }
    }
    fn access(self) -> Access {
        // A group asks only for what its first member does: the rest may never happen.
        let write = if self.is_group() { self.0 & 1 << 21 != 0 } else { self.write() };
        if write { Access::Write } else { Access::Read }
    }
}

/// What the slow path tells the assembly: a host address, or zero and why emitted code is left.
#[repr(C)]
pub struct Accessed {
    host: u64,
    left: u64,
}

impl Accessed {
    fn leave(left: Left) -> Self {
        Accessed { host: 0, left: left as u64 }
    }
}

/// The largest operand of an innocuous instruction.
const MAX_OPERAND: usize = 64;

/// A piece of a bounced operand: guest-physical address and length, within one page.
type Piece = (u64, usize);

/// An access in progress between [`access_slow`] and [`access_bounced`].
#[repr(C, align(64))]
pub struct Bounce {
    /// The operand lies at its own offset modulo 64, since instructions check alignment.
    buffer: [u8; 3 * MAX_OPERAND],
    /// The operand's linear address, and that of its copy in the buffer.
    va: u64,
    copy: u64,
    pieces: [Piece; 2],
    write: bool,
    /// The instruction runs on RAM itself, not on the buffer.
    direct: bool,
    /// Which bytes of the operand are written, from the lowest; all where the instruction has no mask.
    mask: u64,
    /// Where the block goes on.
    resume: u64,
    next_rip: u64,
    block: Option<crate::cache::BlockId>,
}

impl Default for Bounce {
    fn default() -> Self {
        Bounce {
            buffer: [0; 3 * MAX_OPERAND],
            va: 0,
            copy: 0,
            pieces: [(0, 0); 2],
            write: false,
            direct: false,
            mask: u64::MAX,
            resume: 0,
            next_rip: 0,
            block: None,
        }
    }
}

impl Bounce {
    /// The guest's address of a byte in the buffer.
    pub fn guest_address(&self, host: u64) -> Option<u64> {
        let inside = host.wrapping_sub(self.buffer.as_ptr() as u64) < self.buffer.len() as u64;
        inside.then(|| self.va.wrapping_add(host).wrapping_sub(self.copy))
    }
}

/// A TLB miss or a failed check, light path: the host address (of the stack page: its addend) or 0. Answers what needs
/// neither the whole of the vector state saved nor devices. Must not touch vector registers beyond xmm0-xmm15: no memory
/// copies by libc, no device access. `compared` and `entry`: see [`Tlb::address`](crate::tlb::Tlb::address).
pub(crate) extern "C" fn fill_light(cpu: &mut Vcpu, compared: u64, kind: u32, entry: u32) -> u64 {
    let kind = AccessKind(kind);
    let va = cpu.tlb.address(kind, compared, entry);
    cpu.hot.accessed = va;
    fill(cpu, va, kind)
}

fn fill(cpu: &mut Vcpu, va: u64, kind: AccessKind) -> u64 {
    if !canonical(va) {
        return 0;
    }
    if va % PAGE_SIZE + kind.size() as u64 > PAGE_SIZE {
        return cross(cpu, va, kind).unwrap_or(0);
    }
    // The stack often moves to a page that the TLB has.
    if kind.is_stack()
        && let Some(addend) = cpu.tlb.enter_stack(kind.context(), va)
    {
        return addend;
    }
    if let Some(host) = cpu.store_beside_known_code(va, kind) {
        return host;
    }
    let Ok(mapping) = cpu.fill_tlb(va, kind.access(), kind.context()) else { return 0 };
    let host = if kind.is_stack() {
        cpu.tlb.enter_stack(kind.context(), va)
    } else {
        cpu.tlb.entry(kind.context(), va).host_address(va, kind.size(), kind.write())
    };
    host.or_else(|| cpu.store_beside_code(va, kind, &mapping)).unwrap_or(0)
}

/// An access that crosses the end of a page.
fn cross(cpu: &mut Vcpu, va: u64, kind: AccessKind) -> Option<u64> {
    let first = (PAGE_SIZE - va % PAGE_SIZE) as usize;
    let (next, rest) = (va.wrapping_add(first as u64), kind.size() - first);
    let context = kind.context();
    let known = |cpu: &Vcpu, va, size| cpu.tlb.entry(context, va).host_address(va, size, kind.write()).is_some();
    // A group may never get as far as the second page: it must not be seen to be accessed.
    let filled = known(cpu, va, first) && known(cpu, next, rest);
    if !kind.is_group() && !filled {
        let plain = canonical(next)
            && cpu.fill_tlb(va, kind.access(), context).is_ok()
            && cpu.fill_tlb(next, kind.access(), context).is_ok();
        plain.then_some(())?;
    }
    let a = cpu.tlb.entry(context, va).host_address(va, first, kind.write())?;
    let b = cpu.tlb.entry(context, next).host_address(next, rest, kind.write())?;
    if a + first as u64 == b {
        // Neighbours in the host's memory as well. The stack's addend is that of both, and found with its page.
        if kind.is_stack() { cpu.tlb.enter_stack(context, va) } else { Some(a) }
    } else if kind.is_group() {
        None
    } else {
        bounce_light(cpu, va, kind, [(a, first), (b, rest)])
    }
}

/// The operand in two pieces of RAM, copied to the buffer. A store goes on in a copy of the instruction.
fn bounce_light(cpu: &mut Vcpu, va: u64, kind: AccessKind, pieces: [(u64, usize); 2]) -> Option<u64> {
    // What the full path has not seen yet may be no plain store.
    let store = if kind.write() { Some(cpu.engine.cache.snippets.store(cpu.hot.return_address)?) } else { None };
    let at = buffer_offset(va, kind.size());
    let bounce = &mut cpu.engine.bounce;
    let buffer = bounce.buffer[at..].as_mut_ptr();
    // SAFETY: the pieces are in mapped pages of RAM, up to the end of the one and from the beginning of the other, so that what is
    // copied besides them is in the same pages; in the buffer the page's end is two thirds on (see [`buffer_offset`]).
    unsafe {
        let middle = buffer.add(pieces[0].1);
        copy_line(middle.sub(MAX_OPERAND), (pieces[0].0 as *const u8).add(pieces[0].1).sub(MAX_OPERAND));
        copy_line(middle, pieces[1].0 as *const u8);
    }
    (bounce.va, bounce.copy) = (va, buffer as u64);
    if let Some(store) = store {
        let [(first, first_length), (second, second_length)] = pieces;
        cpu.hot.split = Split {
            from: buffer as u64,
            first,
            first_length: first_length as u64,
            second,
            second_length: second_length as u64,
            resume: store.resume,
        };
        cpu.hot.return_address = store.snippet;
        if store.x87 {
            cpu.hot.x87_page = cpu.near.code_page;
        }
    }
    Some(buffer as u64)
}

/// Copies [`MAX_OPERAND`] bytes without vector registers beyond xmm15.
///
/// # Safety
/// As for [`std::ptr::copy_nonoverlapping`].
unsafe fn copy_line(to: *mut u8, from: *const u8) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_storeu_si128};
    // SAFETY: the caller's; every host has SSE2.
    unsafe {
        let parts: [__m128i; MAX_OPERAND / 16] =
            std::array::from_fn(|i| _mm_loadu_si128(from.cast::<__m128i>().add(i)));
        for (i, part) in parts.into_iter().enumerate() {
            _mm_storeu_si128(to.cast::<__m128i>().add(i), part);
        }
    }
}

/// Where in the buffer an operand is put: at its own offset modulo 64.
fn buffer_offset(va: u64, size: usize) -> usize {
    MAX_OPERAND + (va % MAX_OPERAND as u64) as usize - if va % 64 + size as u64 > 128 { 64 } else { 0 }
}

/// A TLB miss that is no plain page of RAM.
pub(crate) extern "C" fn access_slow(cpu: &mut Vcpu, va: u64, kind: u32) -> Accessed {
    let Some(site) = cpu.locate_site() else {
        return lost(cpu, "memory access");
    };
    let kind = AccessKind(kind);
    if let Some(host) = store_to_code(cpu, va, kind, &site) {
        return Accessed { host, left: 0 };
    }
    cpu.enter_instruction(&site);
    if kind.is_group() {
        // The instruction runs again, with its own check.
        cpu.rip = cpu.insn_rip;
        let place = cpu.hot.return_address;
        let crosses = va % PAGE_SIZE + kind.size() as u64 > PAGE_SIZE;
        let enough = crosses && cpu.detoured_enough();
        cpu.engine.run_carefully(site.block, place, crosses, enough);
        return Accessed::leave(Left::Careful);
    }
    access(cpu, va, kind, &site)
}

/// A store that is none for the TLB only because the page holds code: its host address.
fn store_to_code(cpu: &mut Vcpu, va: u64, kind: AccessKind, site: &SiteInfo) -> Option<u64> {
    if !kind.write() || !canonical(va) || site.insn.op_mask() != iced_x86::Register::None {
        return None;
    }
    let mapping = cpu.fill_tlb(va, kind.access(), kind.context()).ok()?;
    cpu.store_to_code(va, kind, &mapping, site.block)
}

/// An operand whose address only Rust computes: segments with bases and limits, alignment checks.
pub(crate) extern "C" fn access_resolve(cpu: &mut Vcpu, kind: u32) -> Accessed {
    let kind = AccessKind(kind);
    let Some(site) = cpu.locate_site() else {
        return lost(cpu, "memory operand");
    };
    cpu.enter_instruction(&site);
    let insn = site.insn;
    if crate::codegen::classify::runs_whole_in_rust(&insn) {
        return run_whole(cpu, &insn);
    }
    let Some(operand) = crate::codegen::classify::access_operand(&insn) else {
        return lost(cpu, "operand");
    };
    if waits_for_fpu(&insn) && cpu.xsave.x87_pending() {
        return stop(cpu, Stop::Fault(Exception::new(Vector::X87FloatingPoint)));
    }
    let (segment, offset) = cpu.effective_address(&insn, operand);
    let checked = cpu.alignment_checked();
    let unaligned = |cpu: &Vcpu, va| checked && misaligned(&insn, va) && !masked_out(cpu, &insn);
    // An operand that begins in canonical space and ends outside.
    if cpu.flat_address(segment, offset).is_some_and(|va| canonical(va) && unaligned(cpu, va)) {
        return stop(cpu, Stop::Fault(Exception::with_code(Vector::AlignmentCheck, 0)));
    }
    let va = match cpu.linear_unaligned(segment, offset, kind.size(), kind.write()) {
        Ok(va) => va,
        // The general path knows which bytes are touched, and whether another fault comes first.
        Err(_) if cpu.code64() => {
            let base =
                if matches!(segment, SegmentRegister::Fs | SegmentRegister::Gs) { cpu.seg(segment).base } else { 0 };
            return access(cpu, base.wrapping_add(offset), kind, &site);
        }
        Err(_) if touched_bytes_allowed(cpu, &insn, segment, offset, kind.write()) => {
            let va = cpu.seg(segment).base.wrapping_add(offset) & 0xffff_ffff;
            return access(cpu, va, kind, &site);
        }
        // What must be aligned is looked at first.
        Err(_)
            if must_be_aligned(cpu, &insn)
                && !cpu.seg(segment).base.wrapping_add(offset).is_multiple_of(kind.size() as u64) =>
        {
            return stop(cpu, Stop::Fault(Exception::general_protection(0)));
        }
        Err(e) => return stop(cpu, Stop::Fault(e)),
    };
    if unaligned(cpu, va) {
        return stop(cpu, Stop::Fault(Exception::with_code(Vector::AlignmentCheck, 0)));
    }
    if va % PAGE_SIZE + kind.size() as u64 <= PAGE_SIZE {
        let host = fill(cpu, va, kind);
        if host != 0 {
            return Accessed { host, left: 0 };
        }
    }
    access(cpu, va, kind, &site)
}

fn lost(cpu: &mut Vcpu, what: &str) -> Accessed {
    let at = cpu.hot.return_address;
    stop(
        cpu,
        Stop::Exit(engine::Exit::Failed(format!("a {what} at host address {at:#x} belongs to no translated block"))),
    )
}

fn stop(cpu: &mut Vcpu, stop: Stop) -> Accessed {
    cpu.engine.stop = Some(stop);
    Accessed::leave(Left::Stop)
}

/// Executes a branch or a stack instruction.
fn run_whole(cpu: &mut Vcpu, insn: &Instruction) -> Accessed {
    let exec = crate::codegen::classify::sensitive(insn).map_or(crate::semantics::stack::exec as Exec, |s| s.exec);
    match exec(cpu, insn) {
        Ok(()) => Accessed::leave(Left::Event),
        Err(s) => stop(cpu, s),
    }
}

pub fn canonical(va: u64) -> bool {
    (va as i64) << 16 >> 16 == va as i64
}

/// Where in a block an access stands, found from the return address of its slow-path call.
pub struct SiteInfo {
    pub block: crate::cache::BlockId,
    pub insn: Instruction,
    pub bytes: [u8; 15],
    /// The true arithmetic flags are in `near.saved_ax`.
    pub parked: bool,
    /// Host address after the instruction.
    pub end: u64,
}

impl Vcpu {
    /// Makes `rip`, `insn_rip` and the flags those of the instruction at a site.
    fn enter_instruction(&mut self, site: &SiteInfo) {
        self.insn_rip = site.insn.ip();
        self.rip = site.insn.next_ip();
        if site.parked {
            self.unpark();
        }
    }

    /// Takes the arithmetic flags from where emitted code parked them.
    pub fn unpark(&mut self) {
        use arch::registers::rflags;
        let ax = self.near.saved_ax;
        let flags = ax >> 8 & 0xd5 | if ax & 1 != 0 { rflags::OF } else { 0 };
        self.set_flags(rflags::ARITHMETIC, flags);
    }

    fn alignment_checked(&self) -> bool {
        Mode::of(self).checks_alignment()
    }
}

/// No byte of the operand is accessed.
fn masked_out(cpu: &Vcpu, insn: &Instruction) -> bool {
    crate::semantics::vector::masked_bytes(cpu, insn) == Some(0) && !stores_extract(insn)
}

/// Whether the part of a masked operand that is accessed lies within its segment, outside 64-bit mode.
fn touched_bytes_allowed(cpu: &Vcpu, insn: &Instruction, segment: SegmentRegister, offset: u64, write: bool) -> bool {
    let mask = match crate::semantics::vector::masked_bytes(cpu, insn) {
        Some(mask) if !stores_extract(insn) => mask,
        _ => return false,
    };
    let (first, end) = (mask.trailing_zeros(), 64 - mask.leading_zeros());
    mask == 0 || {
        let start = offset.wrapping_add(first.into()) & 0xffff_ffff;
        cpu.linear_unaligned(segment, start, (end - first) as usize, write).is_ok()
    }
}

/// VEXTRACT's mask decides what is stored, but not what is checked (Intel SDM 2A 2.8, exceptions type E6NF).
fn stores_extract(insn: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        insn.mnemonic(),
        Vextractf32x4
            | Vextractf32x8
            | Vextractf64x2
            | Vextractf64x4
            | Vextracti32x4
            | Vextracti32x8
            | Vextracti64x2
            | Vextracti64x4
    )
}

/// Whether #AC follows where alignment is checked. Operands of 2, 4 and 8 bytes are checked as a whole, even if they are vectors
/// of smaller elements; longer vectors never are (those that must be aligned raise #GP). Of far pointers and of x87
/// images it is the width of the parts that counts.
fn misaligned(insn: &Instruction, va: u64) -> bool {
    if matches!(insn.mnemonic(), Mnemonic::Vcvtph2ps | Mnemonic::Vcvtps2ph) {
        return false; // checked by no processor known
    }
    let size = match insn.mnemonic() {
        Mnemonic::Movsxd => operand_size(insn),
        _ => insn.memory_size().size(),
    };
    let width = match size {
        size @ (2 | 4 | 8) => size as u64,
        6 | 28 | 108 => 4,
        10 => 8,
        14 | 94 => 2,
        _ => return false,
    };
    !va.is_multiple_of(width)
}

/// x87 and MMX instructions report what is pending from earlier ones before they access memory.
fn waits_for_fpu(insn: &Instruction) -> bool {
    let mmx = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_mm());
    (mmx || facts(insn.code()).fp == FpClass::X87) && !matches!(insn.mnemonic(), Mnemonic::Fnstcw | Mnemonic::Fnstsw)
}

/// Whether the operand must be aligned to its size, or #GP comes before any fault of its pages: SSE's, but for those that
/// say otherwise, and the aligned and non-temporal moves of AVX and later (Intel SDM 2A 2.4.1, 2.6.11). AMD's processors don't
/// ask it of the SHA instructions.
fn must_be_aligned(cpu: &Vcpu, insn: &Instruction) -> bool {
    use Mnemonic::*;
    let size = insn.memory_size().size();
    match insn.mnemonic() {
        Movups | Movupd | Movdqu | Lddqu | Pcmpestri | Pcmpestri64 | Pcmpestrm | Pcmpestrm64 | Pcmpistri
        | Pcmpistrm | Cmpxchg16b => insn.mnemonic() == Cmpxchg16b,
        Vmovaps | Vmovapd | Vmovdqa | Vmovdqa32 | Vmovdqa64 | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa => size >= 16,
        Sha1msg1 | Sha1msg2 | Sha1nexte | Sha1rnds4 | Sha256msg1 | Sha256msg2 | Sha256rnds2 => {
            !cpu.machine.cpuid.is_amd()
        }
        _ => size == 16 && insn.encoding() == iced_x86::EncodingKind::Legacy,
    }
}

fn access(cpu: &mut Vcpu, va: u64, kind: AccessKind, site: &SiteInfo) -> Accessed {
    cpu.engine.counts.bounced += 1;
    let size = kind.size();
    if crate::codegen::classify::runs_whole_in_rust(&site.insn) {
        return run_whole(cpu, &site.insn);
    }
    if waits_for_fpu(&site.insn) && cpu.xsave.x87_pending() {
        return stop(cpu, Stop::Fault(Exception::new(Vector::X87FloatingPoint)));
    }
    let mask = crate::semantics::vector::masked_bytes(cpu, &site.insn);
    if must_be_aligned(cpu, &site.insn) && mask != Some(0) && !va.is_multiple_of(size as u64) {
        return stop(cpu, Stop::Fault(Exception::general_protection(0)));
    }
    let bytes = mask.unwrap_or(u64::MAX);
    let checked = if stores_extract(&site.insn) { u64::MAX } else { bytes };
    // To AMD's processors no part of what stores an extract may lie outside either.
    let touched = if cpu.machine.cpuid.is_amd() { checked } else { bytes } & low_bits(size);
    let byte = |i: u32| va.wrapping_add(i.into());
    let outside = !canonical(byte(touched.trailing_zeros())) || !canonical(byte(63 - touched.leading_zeros().min(63)));
    if cpu.code64() && touched != 0 && outside {
        let stack = cpu.operand_segment(&site.insn) == SegmentRegister::Ss;
        let vector = if stack { Vector::StackFault } else { Vector::GeneralProtection };
        return stop(cpu, Stop::Fault(Exception::with_code(vector, 0)));
    }
    let first = size.min((PAGE_SIZE - va % PAGE_SIZE) as usize);
    let mut pieces: [Piece; 2] = [(0, 0); 2];
    let mut start = 0;
    for (i, length) in [first, size - first].into_iter().enumerate() {
        let touched = length != 0 && checked >> start & low_bits(length) != 0;
        if touched {
            // A fault is at the first byte that is touched.
            let skip = (checked >> start).trailing_zeros() as u64;
            let page_va = wrap(cpu, va.wrapping_add(start as u64));
            match cpu.fill_tlb(page_va.wrapping_add(skip), kind.access(), kind.context()) {
                Ok(m) => pieces[i] = (m.gpa - skip, length),
                Err(e) => return stop(cpu, Stop::Fault(e)),
            }
        }
        start += length;
    }
    cpu.watch_access(va, size, kind.write());
    let direct = mask.is_none() && pieces[1].1 == 0 && cpu.ram(pieces[0].0).is_some();
    let buffer_at = buffer_offset(va, size);
    // Also where it only writes, unless a device would see it: an x87 store that raises an exception leaves the operand alone.
    let ram = pieces.iter().all(|p| p.1 == 0 || cpu.ram(p.0).is_some());
    let reads = !direct && (ram || reads_operand(&site.insn, kind.write()));
    if reads {
        let mut at = 0;
        for (i, &(gpa, length)) in pieces.iter().enumerate() {
            let piece = if i == 0 { first } else { size - first };
            if length != 0 {
                let mut data = [0; MAX_OPERAND];
                read_pieces(cpu, gpa, &mut data[..length], bytes >> at);
                cpu.engine.bounce.buffer[buffer_at + at..buffer_at + at + length].copy_from_slice(&data[..length]);
            }
            at += piece;
        }
    }
    let key = cpu.hot.return_address;
    let plain = ram && mask.is_none() && !must_be_aligned(cpu, &site.insn) && !waits_for_fpu(&site.insn);
    if kind.write() && plain && pieces[1].1 != 0 && cpu.engine.cache.snippets.store(key).is_none() {
        let Some(code) = site.copy_instruction(context_offset!(hot.stored_split)) else {
            return lost(cpu, "split store");
        };
        cpu.engine.cache.snippets.add_store(key, &code, site.end, relative::is_noted(&site.insn));
    }
    let snippet = match cpu.snippet(site) {
        Some(address) => address,
        None => return lost(cpu, "bounced instruction"),
    };
    cpu.hot.return_address = snippet;
    let host = match cpu.ram(pieces[0].0) {
        Some(p) if direct => p as u64,
        _ => cpu.engine.bounce.buffer[buffer_at..].as_ptr() as u64,
    };
    let bounce = &mut cpu.engine.bounce;
    (bounce.va, bounce.copy) = (va, host);
    bounce.pieces = [(pieces[0].0, first), (pieces[1].0, size - first)];
    if pieces[0].1 == 0 {
        bounce.pieces[0].0 = u64::MAX;
    }
    if pieces[1].1 == 0 {
        bounce.pieces[1] = (u64::MAX, size - first);
    }
    bounce.write = kind.write();
    bounce.direct = direct;
    bounce.mask = bytes;
    bounce.resume = site.end;
    bounce.next_rip = site.insn.next_ip();
    bounce.block = Some(site.block);
    // The copy runs instead of what notes it.
    if relative::is_noted(&site.insn) {
        cpu.hot.x87_page = cpu.near.code_page;
    }
    cpu.engine.bounce_at = buffer_at;
    Accessed { host, left: 0 }
}

fn wrap(cpu: &Vcpu, va: u64) -> u64 {
    if cpu.code64() { va } else { va & 0xffff_ffff }
}

fn low_bits(n: usize) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

/// Reads the masked-in bytes at `gpa`; RAM, where reading too much does no harm, in one go.
fn read_pieces(cpu: &mut Vcpu, gpa: u64, data: &mut [u8], mask: u64) {
    if mask & low_bits(data.len()) == low_bits(data.len()) || cpu.readable(gpa).is_some() {
        cpu.phys_read(gpa, data);
        return;
    }
    for (i, byte) in data.iter_mut().enumerate() {
        if mask >> i & 1 != 0 {
            cpu.phys_read(gpa + i as u64, std::slice::from_mut(byte));
        }
    }
}

/// Whether the instruction reads its memory operand: a device must not see a read that the guest didn't make.
fn reads_operand(insn: &Instruction, write: bool) -> bool {
    if !write {
        return true;
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(insn);
    (0..insn.op_count()).any(|i| {
        insn.op_kind(i) == OpKind::Memory && !matches!(info.op_access(i), OpAccess::Write | OpAccess::CondWrite)
    })
}

/// The instruction has run on the buffer, or directly on a page of code. -1: back to the block.
pub(crate) extern "C" fn access_bounced(cpu: &mut Vcpu) -> i32 {
    let (pieces, write, direct, mask) =
        (cpu.engine.bounce.pieces, cpu.engine.bounce.write, cpu.engine.bounce.direct, cpu.engine.bounce.mask);
    let known = cpu.tlb.shared_checks();
    if write && direct {
        cpu.ram_stored(pieces[0].0, pieces[0].1);
    } else if write {
        let mut start = cpu.engine.bounce_at;
        let mut shift = 0;
        for (gpa, length) in pieces {
            let mask = if shift < 64 { mask >> shift } else { 0 } & low_bits(length);
            let mut data = [0; MAX_OPERAND];
            data[..length].copy_from_slice(&cpu.engine.bounce.buffer[start..start + length]);
            if gpa != u64::MAX {
                write_pieces(cpu, gpa, &data[..length], mask);
            }
            start += length;
            shift += length;
        }
    }
    let bounce = &cpu.engine.bounce;
    let live = bounce.block.is_some_and(|id| cpu.engine.cache.is_live(id));
    // A device that changed the memory map, or a page that lost its write tag: the block's earlier checks hold no longer.
    if cpu.pending_debug != 0 || !live || cpu.mode_is_single() || cpu.tlb.shared_checks() != known {
        cpu.rip = bounce.next_rip;
        return Left::Event as i32;
    }
    cpu.hot.return_address = bounce.resume;
    -1
}

fn write_pieces(cpu: &mut Vcpu, gpa: u64, data: &[u8], mask: u64) {
    if mask == low_bits(data.len()) {
        cpu.phys_write(gpa, data);
        return;
    }
    for (i, byte) in data.iter().enumerate() {
        if mask >> i & 1 != 0 {
            cpu.phys_write(gpa + i as u64, std::slice::from_ref(byte));
        }
    }
}

impl Vcpu {
    /// A copy of the instruction at a site that ends in the `bounced` thunk; made once for each site.
    fn snippet(&mut self, site: &SiteInfo) -> Option<u64> {
        let key = self.hot.return_address;
        if let Some(at) = self.engine.cache.snippets.bounced(key) {
            return Some(at);
        }
        let code = site.copy_instruction(context_offset!(hot.bounced))?;
        self.engine.cache.snippets.add_bounced(key, &code)
    }

    /// The block and instruction whose slow path was called.
    pub fn locate_site(&self) -> Option<SiteInfo> {
        self.site_at(self.hot.return_address)
    }

    /// The block and instruction whose slow path returns to a host address.
    pub fn site_at(&self, address: u64) -> Option<SiteInfo> {
        let (id, offset) = self.engine.cache.find_by_host(address)?;
        let (block, body) = self.engine.cache.block(id)?;
        let (point, end, parked) = body.record.site(offset)?;
        let (insn, bytes) = body.decode(block.address(self.near.code_page), point.guest_offset)?;
        let end = self.engine.cache.host_address(block.start(), end);
        Some(SiteInfo { block: id, insn, bytes, parked, end })
    }
}

impl SiteInfo {
    /// A copy of the instruction, on `[S0]`, that ends in a thunk.
    fn copy_instruction(&self, thunk: i32) -> Option<Vec<u8>> {
        let mut asm = Asm::default();
        let bytes = self.bytes.get(..self.insn.len())?;
        crate::codegen::block::emit_operation(&mut asm, bytes, &self.insn, Operand::Host)?;
        asm.jmp_mem(Mem::Base(RSP, thunk));
        asm.finish();
        Some(asm.code)
    }
}

/// Decodes one instruction.
pub fn decode(bytes: &[u8], mode: Mode, ip: u64) -> Instruction {
    Decoder::with_ip(mode.bits(), bytes, ip, mode.decoder_options()).decode()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::kernel_vcpu;

    #[test]
    fn a_stack_group_across_two_pages_leaves_its_addend_with_the_stack_page() {
        let mut cpu = kernel_vcpu();
        let context = Context::SupervisorUser;
        for page in [0x5000, 0x9000, 0xa000] {
            cpu.write_sized(page, 8, 1, context).unwrap();
        }
        let other = cpu.tlb.enter_stack(context, 0x5000);
        let kind = AccessKind::new(16, true, context).group().stack();
        let addend = fill(&mut cpu, 0x9ff8, kind);
        assert_eq!(cpu.tlb.stack(context).page, 0x9000);
        assert_eq!(cpu.tlb.stack(context).addend, addend);
        assert_eq!(other, Some(addend), "RAM is one piece in the host's memory");
    }
}
