//! From a run of guest instructions to one block of host code.

use iced_x86::{Code, Decoder, Instruction, Mnemonic, OpKind};

use super::asm::{Asm, Mem, RCX, RSP, S0, S1, cc};
use super::behind::{Behind, PendingLink};
use super::checked::Checked;
use super::classify::{Kind, access_operand, operand_size, raise_invalid_opcode, writes};
use super::decode::{Decoded, GuestCode, Item, Lookahead, decode, live_at, plan_groups};
use super::facts::{FpClass, facts};
use super::groups::{Member, Planner, Sharing, constant_move};
use super::operand::{FlagState, park_flags, unpark_flags};
use super::reencode::{self, Home, Operand, Spared, home};
use super::steady::{self, Steady};
use crate::access::AccessKind;
use crate::body::{Immediate, Link, Point, Relocation, Site};
use crate::entry::context_offset;
use crate::mode::Mode;
use crate::semantics::Exec;

/// No further instruction begins behind so many host bytes; reached only by absurd code.
const MAX_HOST_BYTES: usize = 24 << 10;
/// More than all slow paths and stubs of a block take.
const MAX_STUB_BYTES: usize = 32 << 10;
/// More than a block can have.
pub const MAX_BLOCK_BYTES: usize = MAX_HOST_BYTES + MAX_STUB_BYTES;
const _: () = assert!(MAX_BLOCK_BYTES <= u16::MAX as usize && super::decode::MAX_STRAIGHT <= u8::MAX as usize);
const _: () = assert!(super::decode::MAX_UNROLLED <= super::decode::MAX_STRAIGHT);

/// An instruction that a block hands to Rust.
#[derive(Clone, Copy)]
pub struct SensitiveInsn {
    pub insn: Instruction,
    pub exec: Exec,
    pub ends_block: bool,
    /// Outside 64-bit mode, where segments may be part of what the block was made for.
    pub loads_segment: bool,
    /// Its addresses count from the page that its block runs in.
    pub relative: bool,
}

/// What translation makes of a run of instructions; the cache turns it into a block. See [`crate::body`] for its parts.
pub struct Translated {
    /// As it has to be at the start of code memory.
    pub code: Vec<u8>,
    /// Where slow paths and exits begin, behind what runs when all goes well.
    pub body_length: usize,
    pub guest_length: usize,
    pub points: Vec<Point>,
    /// Where the last instruction's code ends.
    pub end: u16,
    pub sites: Vec<Site>,
    pub links: Vec<Link>,
    pub relocations: Vec<Relocation>,
    pub sensitive: Vec<SensitiveInsn>,
    pub parked_entry: usize,
    /// Of a relative block: where the jump table leads with the flags parked. Zero: it is none.
    pub parked_way_in: usize,
    pub lookahead: std::ops::Range<usize>,
    /// The code can be moved to other guest addresses.
    pub movable: bool,
    /// It looks at its bytes itself.
    pub checked: bool,
    /// If the setting asks for them.
    pub immediates: Vec<Immediate>,
    spare: Spare,
}

/// Memory that one translation leaves to the next: there are many, and each is short.
#[derive(Default)]
pub struct Workspace {
    points: Vec<Point>,
    sites: Vec<Site>,
    links: Vec<Link>,
    relocations: Vec<Relocation>,
    sensitive: Vec<SensitiveInsn>,
    spare: Spare,
}

#[derive(Default)]
struct Spare {
    asm: Asm,
    items: Vec<Item>,
    behind: Vec<Behind>,
    pending: Vec<PendingLink>,
    planner: Planner,
}

impl From<Translated> for Workspace {
    fn from(mut t: Translated) -> Self {
        t.spare.asm.code = t.code;
        t.spare.asm.clear();
        t.spare.items.clear();
        t.spare.behind.clear();
        t.spare.pending.clear();
        t.points.clear();
        t.sites.clear();
        t.links.clear();
        t.relocations.clear();
        t.sensitive.clear();
        Workspace {
            points: t.points,
            sites: t.sites,
            links: t.links,
            relocations: t.relocations,
            sensitive: t.sensitive,
            spare: t.spare,
        }
    }
}

/// What a block is made for, besides its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    pub mode: Mode,
    /// RDTSC is the host's plus an offset, and there is RDTSCP.
    pub inline_tsc: bool,
    /// Which accesses may share checks.
    pub sharing: Sharing,
    /// Which part of the jump table this mode uses; none: indirect branches leave to the dispatcher.
    pub jump_slot: Option<usize>,
    /// The same for the mode that STAC or CLAC leads to.
    pub access_slot: Option<usize>,
    /// The same for the mode that SYSCALL or SYSRET leads to.
    pub level_slot: Option<usize>,
    /// The code is rewritten often: it is noted what a block needs to follow that.
    pub template: bool,
    /// It is rewritten all the time: the block looks at its bytes itself, which nobody watches.
    pub checked: Option<Checked>,
    /// Direct branches to other pages can be linked: see [`crate::cache`].
    pub far_links: bool,
    /// The block can run in any page: see [`super::relative`]. Its guest address is its offset in the page.
    pub relative: bool,
}

pub struct Builder<'a> {
    pub asm: Asm,
    pub mode: Mode,
    pub setting: Setting,
    pub code: GuestCode<'a>,
    pub bytes: &'a [u8],
    lookahead: Lookahead,
    /// Guest address of the block.
    pub start: u64,
    pub items: Vec<Item>,
    pub current: usize,
    pub flags: FlagState,
    /// They were parked, and have not changed since: EFLAGS has what is in `near.saved_ax`, if it has anything.
    pub saved: bool,
    pub points: Vec<Point>,
    pub sites: Vec<Site>,
    pub behind: Vec<Behind>,
    pub pending: Vec<PendingLink>,
    pub links: Vec<Link>,
    sensitive: Vec<SensitiveInsn>,
    immediates: Vec<Immediate>,
    /// The slot of the group whose host address is in S2.
    pub held: Option<usize>,
    /// The addend of the stack page is in S0.
    pub addend: bool,
    /// How far the guest's stack pointer is still to be moved, by the instruction that comes next.
    pub unmoved: i32,
    /// The loop whose rounds are being emitted.
    pub steady: Option<Steady>,
    /// How many of the immediates that were loaded have been used.
    pub loaded_immediates: usize,
    /// An address relative to EIP was emitted, or to IP.
    pub narrow_addresses: bool,
    /// Not used any more, but kept for the next block.
    planner: Planner,
}

/// Translates the code at `start`. Its first instruction must be complete in `code`; `None` if it isn't.
pub fn translate(code: GuestCode, start: u64, setting: &Setting, workspace: &mut Workspace) -> Option<Translated> {
    let mode = setting.mode;
    let bytes = code.bytes();
    let Workspace { points, sites, links, relocations, sensitive, spare } = std::mem::take(workspace);
    let Spare { asm, mut items, behind, pending, mut planner } = spare;
    let Decoded { lookahead, steady } = decode(code, start, setting, &mut items)?;
    let standing = match steady {
        0 => Vec::new(),
        _ => steady::plan(&mut items[..steady], mode, setting.sharing, &mut planner),
    };
    if setting.sharing != Sharing::Off && mode.flat() && !mode.checks_alignment() {
        plan_groups(&mut items[steady..], mode, setting.sharing, &mut planner);
    }
    let mut b = Builder {
        asm,
        mode,
        setting: *setting,
        code,
        bytes,
        start,
        items,
        lookahead,
        current: 0,
        flags: FlagState::Host,
        saved: false,
        points,
        sites,
        behind,
        pending,
        links,
        sensitive,
        immediates: Vec::new(),
        held: None,
        addend: false,
        unmoved: 0,
        steady: None,
        loaded_immediates: 0,
        narrow_addresses: false,
        planner,
    };
    b.way_in();
    let checked_entry = b.check_bytes();
    b.prologue();
    if steady != 0 {
        b.enter_loop(steady, standing);
    }
    let mut ended = false;
    let mut end = 0;
    let mut guest_length = 0;
    for i in 0..b.items.len() {
        if b.asm.position() > MAX_HOST_BYTES && i >= steady {
            break;
        }
        b.current = i;
        let (insn, kind, offset) = (b.items[i].insn, b.items[i].kind, b.items[i].offset);
        // A block that is a loop goes through its first instructions several times.
        guest_length = guest_length.max(offset + insn.len());
        b.points.push(Point {
            host_offset: b.position(),
            guest_offset: offset as u16,
            parked: b.flags == FlagState::Parked,
        });
        ended = b.instruction(&insn, kind);
        end = b.position();
        if ended {
            break;
        }
        if i + 1 == steady {
            b.close_round();
        }
    }
    if !ended {
        let (next, length) = b.items.get(b.current).map_or((start, 0), |i| {
            let next = if i.joined { i.insn.near_branch_target() } else { i.insn.next_ip() };
            (next, i.offset + i.insn.len())
        });
        let next = b.wrap_ip(next);
        if b.crosses_page(length) {
            b.goto_unlinked(next);
        } else {
            b.goto(next);
        }
    }
    Some(b.finish(guest_length, end, checked_entry, relocations))
}

/// Emits the operation itself, on `[S0]` if it has a memory operand.
pub fn emit_operation(asm: &mut Asm, bytes: &[u8], insn: &Instruction, operand: Operand) -> Option<Spared> {
    use Mnemonic::*;
    let bits = insn.code_size_bits();
    match insn.code() {
        // The moffs forms have no ModRM byte: the ordinary ones with [S0] (r14: REX.B).
        Code::Mov_AL_moffs8 => asm.bytes(&[0x41, 0x8a, 0x06]),
        Code::Mov_AX_moffs16 => asm.bytes(&[0x66, 0x41, 0x8b, 0x06]),
        Code::Mov_EAX_moffs32 => asm.bytes(&[0x41, 0x8b, 0x06]),
        Code::Mov_RAX_moffs64 => asm.bytes(&[0x49, 0x8b, 0x06]),
        Code::Mov_moffs8_AL => asm.bytes(&[0x41, 0x88, 0x06]),
        Code::Mov_moffs16_AX => asm.bytes(&[0x66, 0x41, 0x89, 0x06]),
        Code::Mov_moffs32_EAX => asm.bytes(&[0x41, 0x89, 0x06]),
        Code::Mov_moffs64_RAX => asm.bytes(&[0x49, 0x89, 0x06]),
        _ if insn.mnemonic() == Xlatb => asm.bytes(&[0x41, 0x8a, 0x06]),
        _ => return reencode::emit(asm, bytes, insn, bits, operand),
    }
    Some(Spared::ALL)
}

/// Whether the immediate of an instruction stands in host code as it does in guest code, and [nothing else](constant_operation)
/// depends on it.
fn has_free_immediate(insn: &Instruction) -> bool {
    let last = insn.op_count().saturating_sub(1);
    let free = matches!(
        insn.op_kind(last),
        OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
    );
    free && constant_operation(insn)
}

/// Whether nothing in a translation but the operation itself depends on the value of an instruction's immediate, if it has one: no
/// address, and not which flags it changes. Additions to the registers that addresses are made of are followed by groups.
pub fn constant_operation(insn: &Instruction) -> bool {
    use Mnemonic::*;
    let known = matches!(insn.mnemonic(), Mov | Add | Adc | Sub | Sbb | And | Or | Xor | Cmp | Test);
    known && insn.op0_kind() == OpKind::Register && constant_move(insn).is_none()
}

/// The code size an instruction was decoded for.
trait CodeSizeBits {
    fn code_size_bits(&self) -> u32;
}

impl CodeSizeBits for Instruction {
    fn code_size_bits(&self) -> u32 {
        match self.code_size() {
            iced_x86::CodeSize::Code16 => 16,
            iced_x86::CodeSize::Code32 => 32,
            _ => 64,
        }
    }
}

impl Builder<'_> {
    pub fn position(&self) -> u16 {
        self.asm.position() as u16
    }

    pub fn current_ip(&self) -> u64 {
        self.items[self.current].insn.ip()
    }

    /// Instruction pointers outside 64-bit mode are 32 bits wide.
    pub fn wrap_ip(&self, ip: u64) -> u64 {
        if self.mode.long() { ip } else { ip & 0xffff_ffff }
    }

    /// Loads the vector state if the block needs it and it isn't loaded.
    fn prologue(&mut self) {
        let used =
            self.items.iter().any(|i| matches!(i.kind, Kind::Native) && facts(i.insn.code()).fp != FpClass::None);
        if !used {
            return;
        }
        let loaded = Mem::Base(RSP, context_offset!(fp_loaded));
        let load = Mem::Base(RSP, context_offset!(hot.load_fp));
        let done = self.asm.label();
        if self.items.first().is_some_and(|i| i.live_in.is_empty()) {
            self.asm.cmp_mem32_imm8(loaded, 0);
            self.asm.jcc(cc::NE, done);
            self.asm.call_mem(load);
        } else {
            self.asm.mov(S1, RCX);
            self.asm.load(RCX, loaded);
            self.asm.unless_rcx_zero(|asm| asm.jmp(done));
            self.asm.call_mem(load);
        }
        self.asm.bind(done);
        if !self.items.first().is_some_and(|i| i.live_in.is_empty()) {
            self.asm.mov(RCX, S1);
        }
    }

    /// Before code that clobbers EFLAGS: parks them if a value in them is still needed.
    pub fn free_flags(&mut self) {
        if !self.items[self.current].live_in.is_empty() {
            self.park();
        }
    }

    /// The guest's arithmetic flags are parked from here on, needed or not.
    pub fn park(&mut self) {
        if self.flags == FlagState::Host {
            if !self.saved {
                park_flags(&mut self.asm);
            }
            (self.flags, self.saved) = (FlagState::Parked, true);
        }
    }

    /// Code is emitted to which the flags come so.
    pub fn flags_are(&mut self, parked: bool) {
        (self.flags, self.saved) = (if parked { FlagState::Parked } else { FlagState::Host }, parked);
    }

    /// Puts needed flags back into EFLAGS.
    pub fn need_flags(&mut self) {
        if self.flags == FlagState::Parked {
            unpark_flags(&mut self.asm);
            (self.flags, self.saved) = (FlagState::Host, true);
        }
    }

    /// Whether another instruction of the block surely follows the current one.
    pub fn goes_on(&self) -> bool {
        self.current + 1 < self.items.len() && self.asm.position() + MAX_HOST_BYTES / 2 < MAX_HOST_BYTES
    }

    /// Calls the `resolve` thunk; the access kind is in S1.
    pub fn resolve(&mut self) {
        self.asm.call_mem(Mem::Base(RSP, context_offset!(hot.resolve)));
        let return_offset = self.position();
        let (point, parked) = ((self.points.len() - 1) as u8, self.flags == FlagState::Parked);
        self.sites.push(Site { return_offset, point, parked });
    }

    /// Emits one instruction; true if it ended the block.
    fn instruction(&mut self, insn: &Instruction, kind: Kind) -> bool {
        let follows_addend = matches!(kind, Kind::Skip | Kind::Branch | Kind::Stack | Kind::Native);
        self.addend &= follows_addend;
        let ended = match kind {
            Kind::Skip => false,
            Kind::Sensitive(exec, ends_block) => {
                self.need_flags();
                self.sensitive(insn, exec, ends_block);
                self.held = None;
                ends_block
            }
            Kind::Branch => {
                let addend = self.addend && insn.is_jcc_short_or_near();
                let ended = self.branch(insn);
                self.addend = addend;
                ended
            }
            Kind::Stack => {
                self.stack_instruction(insn);
                false
            }
            Kind::System => self.system_instruction(insn),
            Kind::Access => {
                self.switch_access(insn);
                true
            }
            Kind::Level => {
                self.switch_level(insn);
                true
            }
            Kind::String => {
                self.string_instruction(insn);
                false
            }
            Kind::Bit => {
                self.bit_instruction(insn);
                false
            }
            Kind::Native => {
                self.native(insn);
                false
            }
        };
        self.addend &= follows_addend;
        self.saved &= match kind {
            Kind::Skip | Kind::Branch | Kind::Stack => true,
            Kind::Native => !self.items[self.current].effect.changes,
            _ => false,
        };
        ended
    }

    pub fn sensitive(&mut self, insn: &Instruction, exec: Exec, ends_block: bool) {
        let loads_segment = !self.mode.long() && crate::semantics::segments::loads_segment(insn);
        let relative = self.setting.relative;
        self.sensitive.push(SensitiveInsn { insn: *insn, exec, ends_block, loads_segment, relative });
        self.asm.mov_sensitive(S0);
        self.asm.call_mem(Mem::Base(RSP, context_offset!(near.helper)));
    }

    /// Before an operation that touches the flags: those that are needed behind it, and that it leaves alone, are in EFLAGS.
    pub fn settle_flags(&mut self) {
        if self.items[self.current].live_in.is_empty() {
            (self.flags, self.saved) = (FlagState::Host, false);
        } else {
            self.need_flags();
        }
    }

    /// Notes where the flags are now: the guest's instruction itself can fault only from here on.
    pub fn note_flags(&mut self) {
        if let Some(point) = self.points.last_mut() {
            point.parked = self.flags == FlagState::Parked;
        }
    }

    fn native(&mut self, insn: &Instruction) {
        let item = &self.items[self.current];
        let (effect, offset) = (item.effect, item.offset);
        if insn.mnemonic() == Mnemonic::Lea {
            return self.lea(insn);
        }
        let mut form = Operand::Host;
        if let Some(operand) = access_operand(insn) {
            let write = writes(insn, operand);
            if let Some(member) = self.member() {
                form = self.group_operand(insn, member, write);
            } else {
                self.operand(insn, AccessKind::new(operand_size(insn), write, self.mode.context()));
            }
        }
        if effect.touches {
            self.settle_flags();
        }
        self.note_flags();
        if self.with_loaded_immediate(insn, offset) {
            return;
        }
        let before = self.asm.position();
        self.asm.immediate = 0..0;
        let bytes = &self.bytes[offset..offset + insn.len()];
        match emit_operation(&mut self.asm, bytes, insn, form) {
            Some(spared) => {
                self.held = self.held.filter(|_| spared.s2);
                self.addend &= spared.s0;
                self.note_x87(insn);
            }
            None => {
                self.asm.code.truncate(before);
                tracing::warn!(?insn, "an instruction form has no translation; it raises #UD");
                self.need_flags();
                self.sensitive(insn, raise_invalid_opcode, true);
                return;
            }
        }
        let immediate = self.asm.immediate.clone();
        if self.setting.template && has_free_immediate(insn) && !immediate.is_empty() {
            self.immediates.push(Immediate {
                host_offset: immediate.start as u16,
                guest_offset: (offset + insn.len() - immediate.len()) as u16,
                length: immediate.len() as u8,
            });
        }
    }

    fn lea(&mut self, insn: &Instruction) {
        let register = insn.op0_register();
        let n = register.full_register().number() as u8;
        match home(n) {
            Home::Host(reg) if register.size() != 2 => {
                let base = insn.memory_base();
                self.addend &= !base.is_gpr() || home(base.full_register().number() as u8) != Home::Memory;
                self.offset_in(insn, reg, register.size() == 4);
            }
            _ => {
                self.addend = false;
                self.offset_in(insn, S0, register.size() == 4);
                self.write_sized_register(n, register.size(), S0);
            }
        }
    }

    /// Whether an address-size prefix stands before the instruction.
    pub fn has_address_prefix(&self, insn: &Instruction) -> bool {
        let offset = insn.ip().wrapping_sub(self.start) as usize;
        self.bytes[offset..offset + insn.len()]
            .iter()
            .take_while(|b| matches!(b, 0xf0 | 0xf2 | 0xf3 | 0x66 | 0x67 | 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65))
            .any(|&b| b == 0x67)
    }

    /// Whether the instruction at an offset lies across the page's end: a block of its own that can't be linked to.
    fn crosses_page(&self, offset: usize) -> bool {
        let rest = self.bytes.get(offset..self.code.room()).unwrap_or_default();
        rest.len() < 15 && {
            let mut decoder = Decoder::new(self.mode.bits(), rest, self.mode.decoder_options());
            !rest.is_empty() && decoder.decode().is_invalid()
        }
    }

    /// The conditional branch back to the block's start is followed by what it leads to.
    pub fn goes_on_with_next_turn(&self) -> bool {
        self.items[self.current].turns
    }

    /// The jump is followed by what it leads to.
    pub fn goes_on_at_target(&self) -> bool {
        self.items[self.current].joined && self.current + 1 < self.items.len()
    }

    pub fn member(&self) -> Option<Member> {
        self.items[self.current].member
    }

    /// Whether no flag is needed at `target`, as far as the code of this page tells.
    pub fn flags_dead_at(&mut self, target: u64) -> bool {
        let offset = target.wrapping_sub(self.start);
        if let Some(item) = self.items.iter().find(|i| i.offset as u64 == offset) {
            return item.live_in.is_empty();
        }
        live_at(target, self.code, self.start, &self.setting, &mut self.lookahead).is_empty()
    }

    fn finish(
        mut self,
        guest_length: usize,
        end: u16,
        checked_entry: usize,
        mut relocations: Vec<Relocation>,
    ) -> Translated {
        let body_length = self.asm.position();
        let all_behind = self.emit_all_behind();
        let all_pending = self.emit_links();
        let parked_way_in = self.parked_way_in();
        let mut parked_entry = if checked_entry == 0 { self.linked_entry() } else { checked_entry };
        let unparks = checked_entry == 0 && self.items.first().is_some_and(|i| !i.live_in.is_empty());
        if unparks {
            parked_entry = self.asm.position();
            unpark_flags(&mut self.asm);
        }
        if unparks || parked_way_in != 0 {
            self.asm.jmp_back(self.linked_entry());
        }
        self.asm.finish();
        let movable = self.relocations(&mut relocations);
        Translated {
            parked_entry,
            parked_way_in,
            lookahead: self.lookahead.0,
            code: std::mem::take(&mut self.asm.code),
            body_length,
            guest_length,
            points: self.points,
            end,
            sites: self.sites,
            links: self.links,
            relocations,
            sensitive: self.sensitive,
            movable,
            checked: self.setting.checked.is_some(),
            immediates: self.immediates,
            spare: Spare {
                asm: self.asm,
                items: self.items,
                behind: all_behind,
                pending: all_pending,
                planner: self.planner,
            },
        }
    }

    /// Notes what moving the code changes; whether all of it could be said.
    fn relocations(&self, relocations: &mut Vec<Relocation>) -> bool {
        // In 16-bit code addresses wrap at 64K; 32-bit addressing in 64-bit code does at 4G, and
        // some of its branches at 64K.
        let mut movable = self.mode.bits() != 16 && !self.mode.segmented() && !self.narrow_addresses;
        for &(offset, field, address) in &self.asm.moved {
            let distance = if field.is_guest_address() { address.wrapping_sub(self.start) as i64 } else { 0 };
            match i32::try_from(distance) {
                Ok(delta) => relocations.push(Relocation { offset, field, delta }),
                Err(_) => movable = false,
            }
        }
        if !movable {
            relocations.retain(|r| !r.field.is_guest_address());
        }
        movable
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::DecoderOptions;

    use super::*;

    #[test]
    fn an_immediate_that_groups_follow_is_not_free() {
        let free = |bits, code: &[u8]| has_free_immediate(&Decoder::new(bits, code, DecoderOptions::NONE).decode());
        let (add_edi, add_edi_wide) = ([0x83, 0xc7, 8], [0x81, 0xc7, 0, 1, 0, 0]);
        assert!(free(64, &add_edi) && free(64, &add_edi_wide), "an address of 64-bit code is made of whole registers");
        assert!(!free(32, &add_edi) && !free(32, &add_edi_wide));
        assert!(free(32, &[0xbf, 0, 1, 0, 0]), "mov edi, 100h ends groups whatever it moves");
    }
}
