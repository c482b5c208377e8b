//! Memory operands: from the guest's addressing form to a host address in [`S0`].
//!
//! [`Builder::address`] emits the guest-virtual address, [`Builder::check`] the TLB lookup with its slow path. This pair is
//! the only place that knows how guest memory is reached.

use std::mem::offset_of;

use arch::{Segment, SegmentRegister};
use iced_x86::{Instruction, OpKind, Register};

use super::asm::{Alu, Asm, GUEST_RSP, Label, Mem, RAX, RSP, Reg, S0, S1, S2, cc};
use super::behind::{Slow, SlowStub};
use super::block::Builder;
use super::groups::{Check, Form, Keep, Member};
use super::reencode::{Home, Operand, context, home};
use crate::access::AccessKind;
use crate::code_memory::has_bmi2;
use crate::entry::context_offset;
use crate::mmu::operand::segment_register;
use crate::mmu::segmentation::Ends;
use crate::tlb;

/// Where host flags are while a guest value of them is still needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlagState {
    /// In EFLAGS (or dead).
    Host,
    /// In `near.saved_ax`; EFLAGS holds nothing.
    Parked,
}

/// Offsets of a TLB entry's fields, for `[rsp + S1 + offset]`.
fn tlb_offset(context: crate::cpu::Context, field: usize) -> i32 {
    context_offset!(tlb) + (tlb::table_offset(context) + field) as i32
}

/// Where the host address of a group's span is kept.
pub fn kept(slot: usize) -> Mem {
    Mem::Base(RSP, context_offset!(hot.group_spans) + slot as i32 * 8)
}

pub const SAVED_AX: Mem = Mem::Base(RSP, context_offset!(near.saved_ax));

/// Clobbers S1 and EFLAGS.
pub fn park_flags(asm: &mut Asm) {
    asm.mov(S1, RAX);
    asm.flags_to_ax();
    asm.store32(SAVED_AX, RAX);
    asm.mov(RAX, S1);
}

/// Clobbers S1.
pub fn unpark_flags(asm: &mut Asm) {
    asm.mov(S1, RAX);
    asm.load32(RAX, SAVED_AX);
    asm.flags_from_ax();
    asm.mov(RAX, S1);
}

/// The number of a general-purpose register of any width, as encoded.
fn number(register: Register) -> Option<u8> {
    register.is_gpr().then(|| register.full_register().number() as u8)
}

impl Builder<'_> {
    /// Emits the guest-virtual address of `insn`'s memory operand, in 64-bit mode or in a flat segment, into S0. Clobbers S1
    /// and, with a segment base, the flags.
    pub fn address(&mut self, insn: &Instruction) {
        self.offset(insn);
        self.add_segment_base(insn.memory_segment());
    }

    /// The same for an address of a group's form.
    pub fn form_address(&mut self, form: Form, displacement: i64) {
        let disp = displacement as i32;
        let base = form.base.map(|n| self.register_in(n, S0));
        let index = form.index.map(|(n, scale)| (self.register_in(n, S1), scale));
        match (base, index) {
            (Some(base), None) => self.lea_address(S0, Mem::Base(base, disp)),
            (Some(base), Some((index, scale))) => self.lea_address(S0, Mem::Index(base, index, scale, disp)),
            (None, Some((index, scale))) => self.lea_address(S0, Mem::Scaled(index, scale, disp)),
            // Relative to RIP.
            (None, None) if self.mode.long() => self.asm.mov_address(S0, displacement as u64),
            (None, None) => self.asm.mov_imm(S0, displacement as u32 as u64),
        }
        self.add_segment_base(form.segment);
    }

    /// LEA with a result of the mode's address size.
    pub fn lea_address(&mut self, to: Reg, mem: Mem) {
        match (mem, self.mode.long()) {
            // Which the host does by renaming.
            (Mem::Base(base, 0), true) => self.asm.mov(to, base),
            (Mem::Base(base, 0), false) => self.asm.mov32(to, base),
            (_, true) => self.asm.lea(to, mem),
            (_, false) => self.asm.lea32(to, mem),
        }
    }

    /// The host register that has guest register `n`: its home, or `scratch` after a load.
    pub fn register_in(&mut self, n: u8, scratch: Reg) -> Reg {
        match home(n) {
            Home::Host(reg) => reg,
            Home::Memory => {
                self.asm.load(scratch, context(n));
                scratch
            }
        }
    }

    /// In 64-bit mode; elsewhere the segment is flat.
    fn add_segment_base(&mut self, segment: Register) {
        if self.mode.long() && matches!(segment, Register::FS | Register::GS) {
            self.asm.alu_mem(Alu::Add, S0, segment_base(segment_register(segment)));
        }
    }

    /// Emits the effective address (without the segment's base) into S0. Leaves the flags alone.
    pub fn offset(&mut self, insn: &Instruction) {
        self.offset_in(insn, S0, false);
    }

    /// The same into any register; `short`: only its low 32 bits, zero-extended. Clobbers S0 and S1.
    pub fn offset_in(&mut self, insn: &Instruction, to: Reg, short: bool) {
        let (base, index, scale) = (insn.memory_base(), insn.memory_index(), insn.memory_index_scale() as u8);
        let displacement = insn.memory_displacement64();
        if base == Register::RIP || base == Register::EIP || base == Register::None && index == Register::None {
            let wide = base == Register::RIP
                || self.mode.long()
                    && (base != Register::EIP && insn.memory_displ_size() != 4
                        || base == Register::None && !self.address_size_32(insn));
            let address = match insn.memory_displ_size() {
                _ if wide => displacement,
                2 => displacement & 0xffff,
                _ => displacement & 0xffff_ffff,
            };
            if insn.is_ip_rel_memory_operand() {
                self.narrow_addresses |= !wide;
                self.asm.mov_address(to, address);
            } else {
                self.asm.mov_imm(to, address);
            }
            if short {
                self.asm.mov32(to, to);
            }
            return;
        }
        let word = base.is_gpr16() || index.is_gpr16();
        let narrow = short || word || base.is_gpr32() || index.is_gpr32();
        // `lea` with a 32-bit result takes the address modulo 4 GiB, which is what 32-bit addressing means.
        let disp = displacement as i32;
        let base = number(base).map(|n| self.register_in(n, S0));
        let index = match number(index) {
            Some(n) if index == Register::AL => {
                let al = self.register_in(n, S1);
                self.asm.movzx8(S1, al); // XLAT
                Some(S1)
            }
            Some(n) => Some(self.register_in(n, S1)),
            None => None,
        };
        let asm = &mut self.asm;
        let mem = match (base, index) {
            (Some(base), None) => Mem::Base(base, disp),
            (Some(base), Some(index)) => Mem::Index(base, index, scale, disp),
            (None, Some(index)) => Mem::Scaled(index, scale, disp),
            (None, None) => Mem::Absolute(disp),
        };
        match mem {
            Mem::Base(base, 0) if narrow => asm.mov32(to, base),
            Mem::Base(base, 0) => asm.mov(to, base),
            mem if narrow => asm.lea32(to, mem),
            mem => asm.lea(to, mem),
        }
        if word {
            // 16-bit addressing wraps at 64K.
            asm.movzx16(to, to);
        }
    }

    fn address_size_32(&self, insn: &Instruction) -> bool {
        insn.memory_displ_size() == 4 && self.has_address_prefix(insn)
    }

    /// Emits the check of an access at the guest-virtual address in S0: afterwards S0 is a host address. Clobbers S1; flags
    /// that are needed later are parked first. The label is where the slow path comes back to.
    pub fn check(&mut self, kind: AccessKind) -> Label {
        let entry = self.asm.label();
        let back = self.asm.label();
        self.look_up(kind, entry);
        self.asm.bind(back);
        self.slow_stub(SlowStub { entry, back, kind, why: Slow::Miss { detour: false } });
        back
    }

    /// [`Builder::check`] of an access at the offset in S0 of a segment: is it within the segment's limit, and allowed by its
    /// type? What emitted code can't tell goes to Rust.
    fn check_in_segment(&mut self, segment: SegmentRegister, kind: AccessKind) {
        let entry = self.asm.label();
        let ends = context_offset!(hot.segment_ends) + (segment as usize * size_of::<Ends>()) as i32;
        let end = ends + if kind.write() { offset_of!(Ends, write) as i32 } else { 0 };
        self.asm.lea(S1, Mem::Base(S0, kind.size() as i32));
        self.asm.alu_mem(Alu::Cmp, S1, Mem::Base(RSP, end));
        self.asm.jcc(cc::A, entry);
        self.asm.alu_mem32(Alu::Add, S0, segment_base(segment));
        let back = self.check(kind);
        self.slow_stub(SlowStub { entry, back, kind, why: Slow::Segment });
    }

    /// Emits the comparison of the address in S0 with its TLB entry, and the jump to `slow` if they differ or the access
    /// leaves the page. A hit leaves the host address in S0, a miss what [`Tlb::address`](tlb::Tlb::address) wants: the address
    /// XOR the tag there, and in S1 the entry.
    pub fn look_up(&mut self, kind: AccessKind, slow: Label) {
        let host = self.look_up_offset(kind, slow);
        self.asm.alu_mem(Alu::Add, S0, host);
    }

    /// The same, but a hit leaves the offset in the page in S0; what is returned is the host address of the page, by S1.
    pub fn look_up_offset(&mut self, kind: AccessKind, slow: Label) -> Mem {
        let entry = |field| Mem::Index(RSP, S1, 1, tlb_offset(kind.context(), field));
        let tag = entry(if kind.write() { offset_of!(tlb::Entry, write) } else { offset_of!(tlb::Entry, read) });
        let asm = &mut self.asm;
        // An entry is 32 bytes: the page number times 32 is the address shifted right by 7, less its low bits.
        if has_bmi2() {
            asm.rorx32(S1, S0, 7);
        } else {
            asm.mov32(S1, S0);
            asm.shr32(S1, 7);
        }
        asm.alu_imm32(Alu::And, S1, ((tlb::ENTRIES - 1) << 5) as i32);
        // What is left of the address on a hit is the offset in the page.
        asm.alu_mem(Alu::Xor, S0, tag);
        asm.alu_imm(Alu::Cmp, S0, 4096 - kind.size() as i32);
        asm.jcc(cc::A, slow);
        entry(offset_of!(tlb::Entry, host))
    }

    /// Emits what makes a member of a group accessible: its operand.
    pub fn group_operand(&mut self, insn: &Instruction, member: Member, write: bool) -> Operand {
        if let Some(check) = member.check {
            self.group_check(member, check, write);
        }
        match member.keep {
            Keep::StackPage => {
                self.stack_addend();
                Operand::Stack(insn.memory_displacement64() as i32)
            }
            Keep::Slot(slot) => Operand::At(self.hold(slot), member.distance),
            Keep::Standing(n) => {
                let register = self.standing_register(n);
                Operand::At(register, member.distance)
            }
        }
    }

    /// Sees to it that the addend of the stack page is in S0.
    fn stack_addend(&mut self) {
        if !self.addend {
            self.asm.load(S0, self.stack_page(offset_of!(tlb::StackPage, addend)));
            self.addend = true;
        }
    }

    /// The register that a slot is loaded into.
    pub fn hold(&mut self, slot: usize) -> Reg {
        if self.held != Some(slot) {
            self.asm.load(S2, kept(slot));
            self.held = Some(slot);
        }
        S2
    }

    /// Emits the check of a group. Afterwards the stack page's addend is in S0, or the span's host address in S2.
    fn group_check(&mut self, member: Member, check: Check, write: bool) {
        self.free_flags();
        let (slow, done) = (self.asm.label(), self.asm.label());
        let mut kind = AccessKind::new(check.span as usize, check.write, self.mode.context()).group();
        if write {
            kind = kind.writes_first();
        }
        self.form_address(check.form, check.displacement);
        self.addend = member.keep == Keep::StackPage;
        match member.keep {
            Keep::StackPage => {
                kind = kind.stack();
                self.check_stack_page(check.span, slow);
                self.asm.bind(done);
            }
            Keep::Slot(slot) if check.form == Form::STACK => {
                kind = kind.stack();
                self.check_stack_page(check.span, slow);
                self.asm.bind(done);
                self.asm.lea32(S1, Mem::Base(GUEST_RSP, check.displacement as i32));
                self.asm.lea(S2, Mem::Index(S0, S1, 1, 0));
                self.asm.store(kept(slot), S2);
                self.held = Some(slot);
            }
            Keep::Slot(slot) | Keep::Standing(slot) => {
                self.look_up(kind, slow);
                self.asm.bind(done);
                self.asm.mov(S2, S0);
                self.asm.store(kept(slot), S2);
                self.held = Some(slot);
            }
        }
        self.slow_stub(SlowStub { entry: slow, back: done, kind, why: Slow::Miss { detour: true } });
    }

    /// Emits the comparison of the address in S0 with the stack page, whose addend S0 is afterwards.
    fn check_stack_page(&mut self, span: i32, slow: Label) {
        let page = self.stack_page(offset_of!(tlb::StackPage, page));
        self.asm.alu_mem(Alu::Xor, S0, page);
        self.asm.alu_imm(Alu::Cmp, S0, 4096 - span);
        self.asm.jcc(cc::A, slow);
        self.asm.load(S0, self.stack_page(offset_of!(tlb::StackPage, addend)));
    }

    /// A field of the context's stack page.
    fn stack_page(&self, field: usize) -> Mem {
        Mem::Base(RSP, context_offset!(tlb) + (tlb::stack_offset(self.mode.context()) + field) as i32)
    }

    /// Emits address and check of `insn`'s memory operand: the host address in S0. What emitted code can't compute, Rust
    /// does.
    pub fn operand(&mut self, insn: &Instruction, kind: AccessKind) {
        self.addend = false;
        self.free_flags();
        match self.way(insn, kind.write()) {
            Way::Flat => {
                self.address(insn);
                self.check(kind);
            }
            Way::Segment(segment) => {
                self.offset(insn);
                self.check_in_segment(segment, kind);
            }
            Way::Resolve => {
                self.asm.mov_imm(S1, kind.bits() as u64);
                self.resolve();
            }
        }
    }

    fn way(&self, insn: &Instruction, write: bool) -> Way {
        if self.mode.checks_alignment() {
            return Way::Resolve;
        }
        match insn.memory_segment() {
            _ if self.mode.long() => Way::Flat,
            Register::CS if self.mode.flat() && write => Way::Resolve,
            segment @ (Register::FS | Register::GS) => Way::Segment(segment_register(segment)),
            _ if self.mode.flat() => Way::Flat,
            segment => Way::Segment(segment_register(segment)),
        }
    }

    /// Makes `size` bytes of stack at `[guest stack pointer + displacement]` accessible: where they are, by way of S0.
    pub fn stack_slot(&mut self, displacement: i32, size: usize, write: bool) -> Mem {
        if let Some(member) = self.member() {
            if let Some(check) = member.check {
                self.group_check(member, check, write);
            }
            let slot = match member.keep {
                Keep::StackPage => {
                    self.stack_addend();
                    Mem::Index(S0, GUEST_RSP, 1, displacement + self.unmoved)
                }
                Keep::Slot(slot) => Mem::Base(self.hold(slot), member.distance),
                Keep::Standing(n) => Mem::Base(self.standing_register(n), member.distance),
            };
            self.note_flags();
            return slot;
        }
        self.addend = false;
        self.free_flags();
        let slot = Mem::Base(GUEST_RSP, displacement);
        match self.mode.stack_bits() {
            64 => self.asm.lea(S0, slot),
            _ => self.asm.lea32(S0, slot),
        }
        self.check_stack(AccessKind::new(size, write, self.mode.context()));
        self.note_flags();
        Mem::Base(S0, 0)
    }

    /// The same for what S0 has as a stack pointer.
    pub fn check_stack(&mut self, kind: AccessKind) {
        if self.mode.stack_bits() == 16 {
            self.asm.movzx16(S0, S0);
        }
        if self.mode.flat() {
            self.check(kind);
        } else {
            self.check_in_segment(SegmentRegister::Ss, kind);
        }
    }

    /// Copies a guest register (by number) to a host register.
    pub fn read_register(&mut self, to: Reg, n: u8) {
        match home(n) {
            Home::Host(reg) => self.asm.mov(to, reg),
            Home::Memory => self.asm.load(to, context(n)),
        }
    }

    pub fn write_register(&mut self, n: u8, from: Reg) {
        match home(n) {
            Home::Host(reg) => self.asm.mov(reg, from),
            Home::Memory => self.asm.store(context(n), from),
        }
    }

    /// The same for the low `size` bytes: 2 leave the rest of the register alone.
    pub fn write_sized_register(&mut self, n: u8, size: usize, from: Reg) {
        match home(n) {
            _ if size != 2 => self.write_register(n, from),
            Home::Host(reg) => self.asm.mov16(reg, from),
            Home::Memory => self.asm.store16(context(n), from),
        }
    }
}

/// How an operand's address is found.
enum Way {
    /// It is what addressing computes.
    Flat,
    /// With base and limit of a segment.
    Segment(SegmentRegister),
    /// By Rust.
    Resolve,
}

fn segment_base(segment: SegmentRegister) -> Mem {
    Mem::Base(RSP, context_offset!(segments) + (segment as usize * size_of::<Segment>()) as i32)
}

/// The index of the one memory operand, if there is one that is read or written.
pub fn memory_operand(insn: &Instruction) -> Option<u32> {
    (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory)
}
