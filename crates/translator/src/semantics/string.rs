//! MOVS, CMPS, STOS, LODS and SCAS, with and without REP.
//!
//! Work goes by chunks: as many elements as lie in one page of each operand, where both pages are RAM. A chunk is done by
//! the host's own string instruction on host pointers, which gives overlap, direction, element atomicity and flags for
//! free. What does not fit (an element across a page end, MMIO, a watched page, the edge of a segment) goes one element
//! at a time through `read_linear`/`write_linear`.
//!
//! Between chunks rcx, rsi and rdi are exact, so that a fault, a single-step trap or a request from another thread finds
//! the state that the architecture promises between iterations (Intel SDM 2B, REP).

use std::arch::asm;

use arch::Exception;
use arch::registers::{gpr, rflags};
use arch::state::SegmentRegister;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::Sensitive;
use super::span::Span;
use crate::cpu::{Context, Stop, Vcpu};
use crate::mmu::Access;
use crate::mmu::operand::segment_register;

/// The entry for a string instruction. Repeated ones may leave with RIP at themselves.
pub fn lookup(insn: &Instruction) -> Option<Sensitive> {
    Form::of(insn)?;
    Some(Sensitive { exec, ends_block: false, fp: false })
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Movs,
    Cmps,
    Stos,
    Lods,
    Scas,
}

impl Kind {
    /// Reads at rSI.
    fn has_source(self) -> bool {
        matches!(self, Kind::Movs | Kind::Cmps | Kind::Lods)
    }

    /// Accesses memory at rDI.
    fn has_destination(self) -> bool {
        self != Kind::Lods
    }

    fn compares(self) -> bool {
        matches!(self, Kind::Cmps | Kind::Scas)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Repeat {
    Once,
    Count,
    WhileEqual,
    WhileNotEqual,
}

/// A string instruction, taken apart.
pub struct Form {
    pub kind: Kind,
    /// Bytes in an element: 1, 2, 4 or 8.
    pub size: usize,
    /// What an address register can hold.
    pub mask: u64,
    /// Of the operand at rSI.
    pub segment: SegmentRegister,
    pub repeat: Repeat,
}

impl Form {
    #[inline(always)]
    pub fn of(insn: &Instruction) -> Option<Form> {
        use Mnemonic::*;
        let (kind, size) = match insn.mnemonic() {
            Movsb => (Kind::Movs, 1),
            Movsw => (Kind::Movs, 2),
            Movsd => (Kind::Movs, 4),
            Movsq => (Kind::Movs, 8),
            Cmpsb => (Kind::Cmps, 1),
            Cmpsw => (Kind::Cmps, 2),
            Cmpsd => (Kind::Cmps, 4),
            Cmpsq => (Kind::Cmps, 8),
            Stosb => (Kind::Stos, 1),
            Stosw => (Kind::Stos, 2),
            Stosd => (Kind::Stos, 4),
            Stosq => (Kind::Stos, 8),
            Lodsb => (Kind::Lods, 1),
            Lodsw => (Kind::Lods, 2),
            Lodsd => (Kind::Lods, 4),
            Lodsq => (Kind::Lods, 8),
            Scasb => (Kind::Scas, 1),
            Scasw => (Kind::Scas, 2),
            Scasd => (Kind::Scas, 4),
            Scasq => (Kind::Scas, 8),
            _ => return None,
        };
        // MOVSD and CMPSD are also SSE2 instructions, which have no such operands.
        let mask = (0..insn.op_count()).find_map(|i| match insn.op_kind(i) {
            OpKind::MemorySegSI | OpKind::MemoryESDI => Some(0xffff),
            OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(0xffff_ffff),
            OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(u64::MAX),
            _ => None,
        })?;
        let repeat = match (insn.has_rep_prefix(), insn.has_repne_prefix()) {
            (false, false) => Repeat::Once,
            _ if !kind.compares() => Repeat::Count,
            (true, _) => Repeat::WhileEqual,
            (false, true) => Repeat::WhileNotEqual,
        };
        let segment = match insn.memory_segment() {
            segment @ (Register::FS | Register::GS) => segment_register(segment),
            // Other prefixes count for nothing in 64-bit mode.
            _ if insn.code_size() == iced_x86::CodeSize::Code64 => SegmentRegister::Ds,
            segment => segment_register(segment),
        };
        Some(Form { kind, size, mask, segment, repeat })
    }

    /// An address or count register after it became `value`.
    fn set(&self, cpu: &mut Vcpu, register: usize, value: u64) {
        let old = cpu.gpr[register];
        cpu.gpr[register] = match self.mask {
            0xffff => old & !0xffff | value & 0xffff,
            mask => value & mask,
        };
    }

    /// What processors do to registers when the count is zero: a 32-bit address size clears the upper half of rCX, and in
    /// MOVS and STOS of the addresses used.
    fn nothing_to_do(&self, cpu: &mut Vcpu) {
        self.set(cpu, gpr::RCX, 0);
        if matches!(self.kind, Kind::Movs | Kind::Stos) {
            self.set(cpu, gpr::RDI, cpu.gpr[gpr::RDI]);
            if self.kind == Kind::Movs {
                self.set(cpu, gpr::RSI, cpu.gpr[gpr::RSI]);
            }
        }
    }

    /// How many elements from `va` on lie in its page, all of whose offsets are in the address size.
    fn room(&self, va: u64, offset: u64, backward: bool) -> u64 {
        let in_page = va & 0xfff;
        let above = (4096 - in_page).min((self.mask - offset).min(0xffff) + 1);
        // Sizes are powers of two, and a division costs more than all the rest.
        let elements = |bytes: u64| bytes >> self.size.trailing_zeros();
        if !backward {
            elements(above)
        } else if elements(above) == 0 {
            0
        } else {
            elements(in_page.min(offset)) + 1
        }
    }
}

/// What a chunk did.
struct Done {
    elements: u64,
    /// Flags of the last comparison.
    flags: u64,
    /// A REPE or REPNE ends here.
    ended: bool,
}

fn exec(cpu: &mut Vcpu, insn: &Instruction) -> Result<(), Stop> {
    let Some(form) = Form::of(insn) else { return Err(Exception::invalid_opcode().into()) };
    let backward = cpu.rflags & rflags::DF != 0;
    let context = cpu.context();
    let stepping = cpu.rflags & rflags::TF != 0;
    loop {
        let count = if form.repeat == Repeat::Once { 1 } else { cpu.gpr[gpr::RCX] & form.mask };
        if count == 0 {
            form.nothing_to_do(cpu);
            return Ok(());
        }
        let done = Run { form: &form, count: if stepping { 1 } else { count }, backward, context }.chunk(cpu)?;

        let distance = done.elements.wrapping_mul(form.size as u64);
        let distance = if backward { distance.wrapping_neg() } else { distance };
        if form.kind.has_source() {
            form.set(cpu, gpr::RSI, cpu.gpr[gpr::RSI].wrapping_add(distance));
        }
        if form.kind.has_destination() {
            form.set(cpu, gpr::RDI, cpu.gpr[gpr::RDI].wrapping_add(distance));
        }
        let left = count - done.elements;
        if form.repeat != Repeat::Once {
            form.set(cpu, gpr::RCX, left);
        }
        if left == 0 || done.ended {
            finish(cpu, &form, &done);
            return Ok(());
        }
        if stepping || cpu.pending_debug != 0 || cpu.shared.poll.is_set() {
            // An event between iterations pushes RF set, so that the resumed instruction meets no breakpoint on itself
            // (Intel SDM 3B 17.3.1.1). The flags are those from before, as Intel's processors show them. AMD's show those of the
            // last comparison, and RF clear to who steps.
            let amd = cpu.machine.cpuid.is_amd();
            cpu.rip = cpu.insn_rip;
            if amd {
                finish(cpu, &form, &done);
            }
            if !(amd && stepping) {
                cpu.rflags |= rflags::RF;
            }
            return Ok(());
        }
    }
}

/// Flags change only when the instruction is done: a fault or trap after some iterations leaves those it began with
/// (Intel SDM 2B, REP).
fn finish(cpu: &mut Vcpu, form: &Form, done: &Done) {
    if form.kind.compares() {
        cpu.set_flags(rflags::ARITHMETIC, done.flags);
    }
}

/// One operand's part of a chunk.
struct Piece {
    span: Span,
    /// Elements that lie in the span's page, in the direction of the instruction; at least 1.
    room: u64,
}

/// What an instruction does the same way with each of its operands.
struct Run<'a> {
    form: &'a Form,
    /// Elements at most.
    count: u64,
    backward: bool,
    context: Context,
}

impl Run<'_> {
    /// The elements of an operand that a chunk may take. `None`: the next one does not lie in one plain page.
    #[inline(always)]
    fn piece(
        &self,
        cpu: &mut Vcpu,
        segment: SegmentRegister,
        register: usize,
        access: Access,
    ) -> Result<Option<Piece>, Exception> {
        let (form, write) = (self.form, access == Access::Write);
        let offset = cpu.gpr[register] & form.mask;
        let va = cpu.linear(segment, offset, form.size, write)?;
        let mut room = form.room(va, offset, self.backward).min(self.count);
        if room == 0 {
            return Ok(None);
        }
        if room > 1 && !cpu.code64() {
            let extent = room * form.size as u64;
            let low = if self.backward { offset - (extent - form.size as u64) } else { offset };
            if cpu.linear(segment, low, extent as usize, write).is_err() {
                room = 1;
            }
        }
        Ok(Span::find(cpu, va, access, self.context)?.map(|span| Piece { span, room }))
    }

    #[inline]
    fn source(&self, cpu: &mut Vcpu) -> Result<Option<Piece>, Exception> {
        self.piece(cpu, self.form.segment, gpr::RSI, Access::Read)
    }

    #[inline]
    fn destination(&self, cpu: &mut Vcpu, access: Access) -> Result<Option<Piece>, Exception> {
        self.piece(cpu, SegmentRegister::Es, gpr::RDI, access)
    }

    /// Does up to `count` (1 or more) elements; at least one, or a fault with nothing done.
    fn chunk(&self, cpu: &mut Vcpu) -> Result<Done, Exception> {
        match self.form.kind {
            Kind::Movs => self.movs(cpu),
            Kind::Cmps => self.cmps(cpu),
            Kind::Stos => self.stos(cpu),
            Kind::Lods => self.lods(cpu),
            Kind::Scas => self.scas(cpu),
        }
    }

    /// Of two faults, MOVS takes that of its source.
    fn movs(&self, cpu: &mut Vcpu) -> Result<Done, Exception> {
        let Some(source) = self.source(cpu)? else { return self.element(cpu) };
        let Some(destination) = self.destination(cpu, Access::Write)? else { return self.element(cpu) };
        let room = source.room.min(destination.room);
        // SAFETY: both spans have `room` elements in one page each, in the direction given.
        unsafe { native::movs(self.form.size, self.backward, destination.span.host, source.span.host, room) };
        self.stored(cpu, destination.span, room);
        Ok(Done { elements: room, flags: 0, ended: false })
    }

    /// Of two faults, CMPS takes that of its destination, on the processors at hand (AMD's at times that of its source).
    fn cmps(&self, cpu: &mut Vcpu) -> Result<Done, Exception> {
        let Some(destination) = self.destination(cpu, Access::Read)? else { return self.element(cpu) };
        let Some(source) = self.source(cpu)? else { return self.element(cpu) };
        let room = source.room.min(destination.room);
        let (size, until_equal) = (self.form.size, self.form.repeat == Repeat::WhileNotEqual);
        // SAFETY: as in `movs`.
        let (left, flags) =
            unsafe { native::cmps(size, self.backward, until_equal, source.span.host, destination.span.host, room) };
        Ok(self.compared(room - left, flags))
    }

    fn stos(&self, cpu: &mut Vcpu) -> Result<Done, Exception> {
        let Some(Piece { span, room }) = self.destination(cpu, Access::Write)? else { return self.element(cpu) };
        // SAFETY: as in `movs`.
        unsafe { native::stos(self.form.size, self.backward, span.host, cpu.gpr[gpr::RAX], room) };
        self.stored(cpu, span, room);
        Ok(Done { elements: room, flags: 0, ended: false })
    }

    fn lods(&self, cpu: &mut Vcpu) -> Result<Done, Exception> {
        let Some(Piece { span, room }) = self.source(cpu)? else { return self.element(cpu) };
        let before = (room as usize - 1) * self.form.size;
        let mut value = [0; 8];
        // SAFETY: as in `movs`; the last element is the only one whose value is seen.
        unsafe {
            let last = if self.backward { span.host.sub(before) } else { span.host.add(before) };
            std::ptr::copy_nonoverlapping(last, value.as_mut_ptr(), self.form.size);
        }
        load(cpu, self.form.size, u64::from_le_bytes(value));
        Ok(Done { elements: room, flags: 0, ended: false })
    }

    fn scas(&self, cpu: &mut Vcpu) -> Result<Done, Exception> {
        let Some(Piece { span, room }) = self.destination(cpu, Access::Read)? else { return self.element(cpu) };
        let (size, until_equal) = (self.form.size, self.form.repeat == Repeat::WhileNotEqual);
        // SAFETY: as in `movs`.
        let (left, flags) =
            unsafe { native::scas(size, self.backward, until_equal, cpu.gpr[gpr::RAX], span.host, room) };
        Ok(self.compared(room - left, flags))
    }

    /// One element, wherever it lies.
    #[cold]
    fn element(&self, cpu: &mut Vcpu) -> Result<Done, Exception> {
        let (size, context) = (self.form.size, self.context);
        let linear = |cpu: &Vcpu, segment, register: usize, write| {
            cpu.linear(segment, cpu.gpr[register] & self.form.mask, size, write)
        };
        let mut a = cpu.gpr[gpr::RAX].to_le_bytes();
        let mut b = [0; 8];
        if self.form.kind.compares() {
            let va = linear(cpu, SegmentRegister::Es, gpr::RDI, false)?;
            cpu.read_linear(va, &mut b[..size], context)?;
        }
        if self.form.kind.has_source() {
            let va = linear(cpu, self.form.segment, gpr::RSI, false)?;
            cpu.read_linear(va, &mut a[..size], context)?;
        }
        let mut flags = 0;
        match self.form.kind {
            Kind::Movs | Kind::Stos => {
                let va = linear(cpu, SegmentRegister::Es, gpr::RDI, true)?;
                cpu.write_linear(va, &a[..size], context)?;
            }
            Kind::Lods => load(cpu, size, u64::from_le_bytes(a)),
            Kind::Cmps | Kind::Scas => {
                // SAFETY: two local buffers of eight bytes.
                flags = unsafe { native::cmps(size, false, false, a.as_mut_ptr(), b.as_mut_ptr(), 1) }.1;
            }
        }
        Ok(self.compared(1, flags))
    }

    fn stored(&self, cpu: &mut Vcpu, span: Span, elements: u64) {
        let len = elements as usize * self.form.size;
        span.stored(cpu, if self.backward { len - self.form.size } else { 0 }, len);
    }

    fn compared(&self, elements: u64, flags: u64) -> Done {
        let equal = flags & rflags::ZF != 0;
        let ended = match self.form.repeat {
            Repeat::WhileEqual => !equal,
            Repeat::WhileNotEqual => equal,
            Repeat::Once | Repeat::Count => false,
        };
        Done { elements, flags, ended }
    }
}

fn load(cpu: &mut Vcpu, size: usize, value: u64) {
    let rax = &mut cpu.gpr[gpr::RAX];
    *rax = match size {
        1 => *rax & !0xff | value & 0xff,
        2 => *rax & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    };
}

/// The host's string instructions. The caller vouches for `count` elements of `size` bytes at each pointer, upwards or,
/// with `backward`, downwards.
mod native {
    use super::asm;

    /// One function per instruction: `$plain` and `$reversed` are its four sizes without and with DF.
    macro_rules! by_size {
        ($size:expr, $backward:expr, $prefix:literal, $insn:literal, ($($tail:tt)*)) => {
            match ($size, $backward) {
                (1, false) => asm!(concat!($prefix, " ", $insn, "b"), $($tail)*),
                (2, false) => asm!(concat!($prefix, " ", $insn, "w"), $($tail)*),
                (4, false) => asm!(concat!($prefix, " ", $insn, "d"), $($tail)*),
                (_, false) => asm!(concat!($prefix, " ", $insn, "q"), $($tail)*),
                (1, true) => asm!("std", concat!($prefix, " ", $insn, "b"), "cld", $($tail)*),
                (2, true) => asm!("std", concat!($prefix, " ", $insn, "w"), "cld", $($tail)*),
                (4, true) => asm!("std", concat!($prefix, " ", $insn, "d"), "cld", $($tail)*),
                (_, true) => asm!("std", concat!($prefix, " ", $insn, "q"), "cld", $($tail)*),
            }
        };
    }

    pub unsafe fn movs(size: usize, backward: bool, to: *mut u8, from: *const u8, count: u64) {
        // SAFETY: the caller vouches for the memory; DF is clear again at the end.
        unsafe {
            by_size!(size, backward, "rep", "movs", (
                inout("rcx") count => _, inout("rsi") from => _, inout("rdi") to => _, options(nostack)
            ))
        }
    }

    pub unsafe fn stos(size: usize, backward: bool, to: *mut u8, value: u64, count: u64) {
        // SAFETY: as in `movs`.
        unsafe {
            by_size!(size, backward, "rep", "stos", (
                inout("rcx") count => _, in("rax") value, inout("rdi") to => _, options(nostack)
            ))
        }
    }

    /// Compares while equal, or with `until_equal` while not; the count that is left and the last comparison's flags.
    pub unsafe fn cmps(
        size: usize,
        backward: bool,
        until_equal: bool,
        a: *const u8,
        b: *const u8,
        count: u64,
    ) -> (u64, u64) {
        let (left, flags): (u64, u64);
        // SAFETY: as in `movs`; CLD leaves the other flags for PUSHFQ.
        unsafe {
            if until_equal {
                by_size!(size, backward, "repne", "cmps", (
                    "pushfq", "pop {f}", f = lateout(reg) flags,
                    inout("rcx") count => left, inout("rsi") a => _, inout("rdi") b => _, options(readonly)
                ))
            } else {
                by_size!(size, backward, "repe", "cmps", (
                    "pushfq", "pop {f}", f = lateout(reg) flags,
                    inout("rcx") count => left, inout("rsi") a => _, inout("rdi") b => _, options(readonly)
                ))
            }
        }
        (left, flags)
    }

    /// As [`cmps`], comparing `value` with memory.
    pub unsafe fn scas(
        size: usize,
        backward: bool,
        until_equal: bool,
        value: u64,
        at: *const u8,
        count: u64,
    ) -> (u64, u64) {
        let (left, flags): (u64, u64);
        // SAFETY: as in `cmps`.
        unsafe {
            if until_equal {
                by_size!(size, backward, "repne", "scas", (
                    "pushfq", "pop {f}", f = lateout(reg) flags,
                    inout("rcx") count => left, in("rax") value, inout("rdi") at => _, options(readonly)
                ))
            } else {
                by_size!(size, backward, "repe", "scas", (
                    "pushfq", "pop {f}", f = lateout(reg) flags,
                    inout("rcx") count => left, in("rax") value, inout("rdi") at => _, options(readonly)
                ))
            }
        }
        (left, flags)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{BASE, RIP, Vendor, read, revoke, step, vcpu, vcpu_of, write};
    use super::*;
    use arch::registers::pte;
    use arch::{Vector, state::Segment};

    const REP_MOVSB: &[u8] = &[0xf3, 0xa4];
    const REP_MOVSQ: &[u8] = &[0xf3, 0x48, 0xa5];
    const REP_STOSB: &[u8] = &[0xf3, 0xaa];
    const REPE_CMPSB: &[u8] = &[0xf3, 0xa6];
    const REPNE_SCASB: &[u8] = &[0xf2, 0xae];

    fn registers(cpu: &mut Vcpu, rcx: u64, rsi: u64, rdi: u64) {
        cpu.gpr[gpr::RCX] = rcx;
        cpu.gpr[gpr::RSI] = rsi;
        cpu.gpr[gpr::RDI] = rdi;
    }

    fn assert_registers(cpu: &Vcpu, rcx: u64, rsi: u64, rdi: u64) {
        assert_eq!((cpu.gpr[gpr::RCX], cpu.gpr[gpr::RSI], cpu.gpr[gpr::RDI]), (rcx, rsi, rdi));
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
    }

    /// What copying element by element does to a buffer.
    fn copied(mut data: Vec<u8>, size: usize, count: usize, from: usize, to: usize, backward: bool) -> Vec<u8> {
        for i in 0..count {
            let distance = i * size;
            let (from, to) = if backward { (from - distance, to - distance) } else { (from + distance, to + distance) };
            let element = data[from..from + size].to_vec();
            data[to..to + size].copy_from_slice(&element);
        }
        data
    }

    #[test]
    fn rep_movs_equals_one_copy_after_another_for_every_size_overlap_and_direction() {
        let encodings: [(usize, &[u8]); 4] =
            [(1, REP_MOVSB), (2, &[0xf3, 0x66, 0xa5]), (4, &[0xf3, 0xa5]), (8, REP_MOVSQ)];
        let mut cpu = vcpu();
        for (size, bytes) in encodings {
            for backward in [false, true] {
                for gap in [0isize, 1, 3, 8, 13, 64, -1, -3, -8, -5000, 5001] {
                    let (data, count) = (pattern(40_000), 9001 / size);
                    let from: usize = if backward { 20_003 } else { 10_001 };
                    let to = from.saturating_add_signed(gap);
                    write(&mut cpu, BASE, &data);
                    cpu.rflags = if backward { 2 | rflags::DF } else { 2 };
                    registers(&mut cpu, count as u64, BASE + from as u64, BASE + to as u64);
                    step(&mut cpu, bytes).expect("mapped memory");
                    let expected = copied(data, size, count, from, to, backward);
                    assert!(read(&cpu, BASE, 40_000) == expected, "size {size} backward {backward} gap {gap}");
                    let moved = (count * size) as u64;
                    let end = |at: usize| if backward { BASE + at as u64 - moved } else { BASE + at as u64 + moved };
                    assert_registers(&cpu, 0, end(from), end(to));
                }
            }
        }
    }

    #[test]
    fn a_fault_in_rep_movs_leaves_the_registers_at_the_element_that_faults() {
        let mut cpu = vcpu();
        revoke(&mut cpu, BASE + 0x3000, pte::P);
        registers(&mut cpu, 5000, BASE + 0x10, BASE + 0x1ffd);
        let error = step(&mut cpu, REP_MOVSB).expect_err("a page is not present");
        let Stop::Fault(e) = error else { panic!("{error:?}") };
        assert_eq!((e.vector, e.error_code, e.fault_address), (Vector::PageFault, 6, BASE + 0x3000));
        assert_registers(&cpu, 5000 - 0x1003, BASE + 0x1013, BASE + 0x3000);

        // An element across the page end: its address is that of the first byte that can't be written.
        registers(&mut cpu, 3, BASE + 0x10, BASE + 0x2ff4);
        let Err(Stop::Fault(e)) = step(&mut cpu, REP_MOVSQ) else { panic!("no fault") };
        assert_eq!(e.fault_address, BASE + 0x3000);
        assert_registers(&cpu, 2, BASE + 0x18, BASE + 0x2ffc);
    }

    #[test]
    fn rep_stos_fills_backward_and_across_pages() {
        let mut cpu = vcpu();
        write(&mut cpu, BASE, &[1; 0x3000]);
        cpu.gpr[gpr::RAX] = 0x1122_3344_5566_7788;
        cpu.rflags |= rflags::DF;
        registers(&mut cpu, 0x200, 0, BASE + 0x1803);
        step(&mut cpu, &[0xf3, 0x48, 0xab]).expect("mapped memory");
        assert_eq!(cpu.gpr[gpr::RDI], BASE + 0x803);
        let data = read(&cpu, BASE, 0x3000);
        let words = data[0x80b..0x180b].chunks_exact(8);
        assert!(words.into_iter().all(|w| w == 0x1122_3344_5566_7788u64.to_le_bytes()));
        assert!(data[..0x80b].iter().chain(&data[0x180b..]).all(|&b| b == 1));
    }

    #[test]
    fn repe_cmps_stops_at_the_first_difference_with_its_flags() {
        let mut cpu = vcpu();
        let data = pattern(0x3000);
        write(&mut cpu, BASE, &data);
        write(&mut cpu, BASE + 0x8123, &data);
        write(&mut cpu, BASE + 0x8123 + 0x1ffe, &[data[0x1ffe].wrapping_add(1)]);
        registers(&mut cpu, 0x3000, BASE, BASE + 0x8123);
        step(&mut cpu, REPE_CMPSB).expect("mapped memory");
        assert_registers(&cpu, 0x3000 - 0x1fff, BASE + 0x1fff, BASE + 0x8123 + 0x1fff);
        assert_eq!(cpu.rflags & (rflags::ZF | rflags::CF | rflags::SF), rflags::CF | rflags::SF);
    }

    #[test]
    fn repne_scas_finds_a_byte_or_runs_out() {
        let mut cpu = vcpu();
        write(&mut cpu, BASE, &[0xff; 0x2000]);
        write(&mut cpu, BASE + 0x1234, &[0]);
        cpu.gpr[gpr::RAX] = 0;
        registers(&mut cpu, u64::MAX, 0, BASE);
        step(&mut cpu, REPNE_SCASB).expect("mapped memory");
        assert_eq!(cpu.gpr[gpr::RDI], BASE + 0x1235);
        assert_ne!(cpu.rflags & rflags::ZF, 0);
        registers(&mut cpu, 0x100, 0, BASE);
        step(&mut cpu, REPNE_SCASB).expect("mapped memory");
        assert_eq!((cpu.gpr[gpr::RDI], cpu.gpr[gpr::RCX], cpu.rflags & rflags::ZF), (BASE + 0x100, 0, 0));
    }

    #[test]
    fn a_fault_in_repe_cmps_keeps_the_flags_from_before() {
        let mut cpu = vcpu();
        revoke(&mut cpu, BASE + 0x1000, pte::P);
        cpu.rflags = 2 | rflags::ARITHMETIC;
        registers(&mut cpu, 10, BASE + 0xffc, BASE + 0x5000);
        assert!(matches!(step(&mut cpu, REPE_CMPSB), Err(Stop::Fault(_))));
        assert_registers(&cpu, 6, BASE + 0x1000, BASE + 0x5004);
        assert_eq!(cpu.rflags, 2 | rflags::ARITHMETIC);
    }

    #[test]
    fn of_two_faults_movs_takes_that_of_its_source_and_cmps_that_of_its_destination() {
        let mut cpu = vcpu();
        revoke(&mut cpu, BASE + 0x1000, pte::P);
        revoke(&mut cpu, BASE + 0x3000, pte::P);
        for (bytes, at) in [(REP_MOVSB, 0x1000), (REPE_CMPSB, 0x3000), (&[0xa4], 0x1000), (&[0xa6], 0x3000)] {
            registers(&mut cpu, 1, BASE + 0x1000, BASE + 0x3000);
            let Err(Stop::Fault(e)) = step(&mut cpu, bytes) else { panic!("no fault") };
            assert_eq!(e.fault_address, BASE + at);
        }
    }

    #[test]
    fn a_count_of_zero_touches_nothing_but_clears_upper_halves_under_a_32_bit_address_size() {
        let mut cpu = vcpu();
        registers(&mut cpu, 0, 1 << 63, 1 << 63);
        step(&mut cpu, REP_MOVSB).expect("no access is made");
        assert_registers(&cpu, 0, 1 << 63, 1 << 63);
        registers(&mut cpu, 1 << 32, 1 << 63 | 5, 1 << 63 | 6);
        step(&mut cpu, &[0x67, 0xf3, 0xa4]).expect("no access is made");
        assert_registers(&cpu, 0, 5, 6);
        registers(&mut cpu, 1 << 32, 1 << 63 | 5, 1 << 63 | 6);
        step(&mut cpu, &[0x67, 0xf3, 0xa6]).expect("no access is made");
        assert_registers(&cpu, 0, 1 << 63 | 5, 1 << 63 | 6);
    }

    #[test]
    fn single_step_and_requests_stop_between_iterations_with_rf() {
        let mut cpu = vcpu_of(Vendor::Intel);
        cpu.rflags |= rflags::TF;
        registers(&mut cpu, 3, 0, BASE);
        step(&mut cpu, REP_STOSB).expect("mapped memory");
        assert_eq!((cpu.rip, cpu.gpr[gpr::RCX]), (RIP, 2));
        assert_ne!(cpu.rflags & rflags::RF, 0);
        cpu.rflags = 2;
        cpu.shared.request(crate::shared::request::INTERRUPT);
        registers(&mut cpu, 0x5000, 0, BASE + 0x800);
        step(&mut cpu, REP_STOSB).expect("mapped memory");
        assert_eq!((cpu.rip, cpu.gpr[gpr::RCX]), (RIP, 0x4800));
        registers(&mut cpu, 5, 0, BASE + 0x800);
        step(&mut cpu, REP_STOSB).expect("mapped memory");
        assert_eq!((cpu.rip, cpu.gpr[gpr::RCX]), (RIP + 2, 0));
    }

    #[test]
    fn sixteen_bit_addresses_wrap_and_segment_limits_hold() {
        let mut cpu = vcpu();
        cpu.segments[1] = Segment::flat_code(0x33, false, 3);
        cpu.segments[1].attributes &= !Segment::DB;
        cpu.cr0 &= !(1 << 31);
        cpu.msrs.efer = 0;
        cpu.segments[0] = Segment { base: 0x30_0000, limit: 0xffff, ..Segment::flat_data(0x2b, 3) };
        cpu.gpr[gpr::RAX] = 0x55;
        registers(&mut cpu, 0xabcd_0020, 0, 0xdead_fff0);
        step(&mut cpu, REP_STOSB).expect("within the limit");
        assert_eq!((cpu.gpr[gpr::RCX], cpu.gpr[gpr::RDI]), (0xabcd_0000, 0xdead_0010));
        let mut byte = [0; 1];
        for gpa in [0x30_0000, 0x30_000f, 0x30_fff0, 0x30_ffff] {
            cpu.phys_read(gpa, &mut byte);
            assert_eq!(byte, [0x55], "{gpa:#x}");
        }
        cpu.segments[0].limit = 0x107;
        registers(&mut cpu, 0x20, 0, 0x100);
        let Err(Stop::Fault(e)) = step(&mut cpu, REP_STOSB) else { panic!("no fault") };
        assert_eq!(e.vector, Vector::GeneralProtection);
        assert_eq!((cpu.gpr[gpr::RCX], cpu.gpr[gpr::RDI]), (0x18, 0x108));
    }

    #[test]
    fn lods_loads_the_last_element() {
        let mut cpu = vcpu();
        write(&mut cpu, BASE + 0xff0, &pattern(64));
        registers(&mut cpu, 6, BASE + 0xff0, 0);
        cpu.gpr[gpr::RAX] = u64::MAX;
        step(&mut cpu, &[0xf3, 0x66, 0xad]).expect("mapped memory");
        let last = u16::from_le_bytes([pattern(64)[10], pattern(64)[11]]);
        assert_eq!(cpu.gpr[gpr::RAX], u64::MAX << 16 | u64::from(last));
        assert_eq!(cpu.gpr[gpr::RSI], BASE + 0xffc);
    }

    #[test]
    fn stores_to_pages_with_translated_code_are_done_by_chunks_too() {
        let mut cpu = vcpu();
        let page = cpu.machine.ram.page_index(BASE).expect("RAM");
        cpu.machine.tracker.mark_code(page, 1);
        cpu.gpr[gpr::RAX] = 0x77;
        registers(&mut cpu, 0x1800, 0, BASE + 0x100);
        step(&mut cpu, REP_STOSB).expect("mapped memory");
        assert!(read(&cpu, BASE + 0x100, 0x1800).iter().all(|&b| b == 0x77));
        assert!(cpu.machine.tracker.is_dirty(page));
    }
}
