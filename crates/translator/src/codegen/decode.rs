//! From guest bytes to the items of a block: its instructions, where flags are live between them, and which accesses share
//! a check.

use iced_x86::{Decoder, FlowControl, Instruction, Mnemonic, Register};

use super::block::Setting;
use super::checked::may_store;
use super::classify::{Kind, access_operand, classify, operand_size, raise_general_protection, writes};
use super::groups::{self, Access, Form, Member, Planner, Sharing, Step};
use super::liveness::{Effect, Flags};
use super::operand::memory_operand;
use super::{steady, system};
use crate::mode::{CodeSegment, Mode};
use crate::semantics::stack::operand_size as operand_size_of_stack;

/// Guest instructions in one block at most.
pub const MAX_INSTRUCTIONS: usize = 40;

/// The same while there is no branch among them: long calculations keep their checks and their flags.
pub const MAX_STRAIGHT: usize = 96;

/// Conditional branches that a block goes on behind: what lies behind them is translated again where something branches
/// there.
pub const MAX_BRANCHES: usize = 5;

/// Instructions in a block that holds several turns of a loop, and how many turns those are at most.
pub const MAX_UNROLLED: usize = 56;
const MAX_TURNS: usize = 8;

/// The most bytes that a block leaves out where it goes on at the target of a jump.
const MAX_JUMP: usize = 512;

/// Instructions looked at where a branch leads, to see which flags are needed there.
pub const MAX_LOOKAHEAD: usize = 6;

/// The bytes of a page, and perhaps some of the next.
#[derive(Clone, Copy)]
pub struct GuestCode<'a> {
    pub page: &'a [u8],
    /// Where the block begins.
    pub offset: usize,
    pub segment: CodeSegment,
}

impl<'a> GuestCode<'a> {
    pub fn bytes(self) -> &'a [u8] {
        &self.page[self.offset..]
    }

    /// The bytes from the block's start to the page's end.
    pub fn room(self) -> usize {
        4096 - self.offset % 4096
    }

    /// Where in the block's page an address is, if it is.
    pub fn offset_of(self, address: u64, start: u64) -> Option<usize> {
        let page = |ip: u64| ip.wrapping_add(self.segment.base.into()) & 0xffff_ffff_ffff_f000;
        let same = page(address) == page(start) && self.segment.holds(address, 1);
        same.then(|| (address.wrapping_add(self.segment.base.into()) & 0xfff) as usize)
    }
}

pub struct Item {
    pub insn: Instruction,
    pub offset: usize,
    pub effect: Effect,
    pub kind: Kind,
    /// Flags needed before the instruction.
    pub live_in: Flags,
    /// The part of its access in a group.
    pub member: Option<Member>,
    /// A conditional branch back to the block's start, behind which another turn of the loop follows.
    pub turns: bool,
    /// A jump behind which its target follows.
    pub joined: bool,
}

/// The range of a page's bytes that were looked at beyond the block's own.
#[derive(Clone, Debug, Default)]
pub struct Lookahead(pub std::ops::Range<usize>);

impl Lookahead {
    pub fn add(&mut self, start: usize, end: usize) {
        self.0 = if self.0.is_empty() { start..end } else { self.0.start.min(start)..self.0.end.max(end) };
    }
}

/// What decoding found besides the items.
pub struct Decoded {
    pub lookahead: Lookahead,
    /// So many items are the rounds of a loop that checks before it runs; its plain turn follows (see [`steady`]).
    pub steady: usize,
}

/// Decodes up to the end of the block into `items`, which is empty, and finds where flags are live.
pub fn decode(code: GuestCode, start: u64, setting: &Setting, items: &mut Vec<Item>) -> Option<Decoded> {
    let mode = setting.mode;
    let checked = setting.checked.is_some();
    let bytes = code.bytes();
    let mut lookahead = Lookahead::default();
    let mut decoder = Decoder::with_ip(mode.bits(), bytes, start, mode.decoder_options());
    let mut branches = 0;
    let mut limit = if mode.is_single() { 1 } else { MAX_STRAIGHT };
    let mut turns = 1;
    let (mut round, mut steady) = (0, 0);
    let page = code.room();
    let mut insn = Instruction::default();
    while items.len() < limit {
        let offset = decoder.position();
        if offset >= page && !items.is_empty() {
            break;
        }
        // Not by value: a copy at once would wait for the decoder's single stores.
        decoder.decode_out(&mut insn);
        if insn.is_invalid() && decoder.last_error() == iced_x86::DecoderError::NoMoreBytes && bytes.len() - offset < 15
        {
            if items.is_empty() {
                return None;
            }
            break;
        }
        let too_long = insn.is_invalid() && insn.len() == 15 && needs_more(&bytes[offset..], mode);
        if offset + insn.len() > page && !items.is_empty() {
            // An instruction across the page's end gets a block of its own, so that only such blocks depend on two pages.
            break;
        }
        let outside = !code.segment.holds(insn.ip(), insn.len());
        if outside && !items.is_empty() {
            break;
        }
        let kind = if outside || too_long {
            Kind::Sensitive(raise_general_protection, true)
        } else {
            classify(&insn, mode, setting.inline_tsc)
        };
        let effect = match kind {
            Kind::Sensitive(..) => Effect::SENSITIVE,
            // Where a conditional branch leads every flag may be needed.
            Kind::Branch if insn.flow_control() == FlowControl::ConditionalBranch => Effect::SENSITIVE,
            Kind::Skip | Kind::Access => Effect::NONE,
            // An event that Rust finds then or meanwhile shows all of them.
            Kind::Level => Effect::LOOKS,
            Kind::System if system::is_push(&insn) || insn.mnemonic() == Mnemonic::Sti => Effect::LOOKS,
            Kind::System if !system::is_pop(&insn) => Effect::NONE,
            Kind::String if insn.has_rep_prefix() || insn.has_repne_prefix() => Effect::LOOKS,
            Kind::System if system::is_pop(&insn) => {
                Effect { reads: Flags::NONE, kills: Flags::ALL, touches: false, changes: true }
            }
            _ => Effect::of(&insn),
        };
        items.push(Item { insn, offset, effect, kind, live_in: Flags::ALL, member: None, turns: false, joined: false });
        let body = items.len() / turns;
        // A block that looks at its bytes does so for each turn.
        let closes = !checked
            && insn.is_jcc_short_or_near()
            && insn.near_branch_target() == start
            && matches!(kind, Kind::Branch)
            && offset + insn.len() <= page;
        if closes && turns == 1 {
            round = steady::turns(items, mode);
            if round != 0 && !mode.is_careful() {
                limit = body * (round + 1);
            }
        }
        let another = match round {
            0 => mode.flat() && turns < MAX_TURNS && items.len() + body <= MAX_UNROLLED,
            _ => turns <= round && !mode.is_careful(),
        };
        if closes && another && decoder.set_position(0).is_ok() {
            // The block goes on with another turn of the loop that it is, so that turns share checks.
            if let Some(item) = items.last_mut() {
                item.turns = true;
            }
            decoder.set_ip(start);
            if round == turns {
                steady = items.len();
            }
            turns += 1;
            branches = 0;
            limit = if round == 0 { MAX_UNROLLED } else { limit };
            continue;
        }
        if insn.is_jmp_short_or_near()
            && matches!(kind, Kind::Branch)
            && mode.long()
            && items.len() < limit
            && let Some(target) = ahead(code, start, offset + insn.len(), insn.near_branch_target())
            && decoder.set_position(target).is_ok()
        {
            if let Some(item) = items.last_mut() {
                item.joined = true;
            }
            decoder.set_ip(insn.near_branch_target());
            continue;
        }
        let ends = match kind {
            Kind::Branch => {
                branches += 1;
                limit = limit.min(match turns {
                    1 => MAX_INSTRUCTIONS,
                    _ if steady != 0 => limit,
                    _ => MAX_UNROLLED,
                });
                !insn.is_jcc_short_or_near() || branches > MAX_BRANCHES || closes && turns > 1
            }
            Kind::Sensitive(_, ends) => ends,
            Kind::Access | Kind::Level => true,
            _ => false,
        };
        if ends || offset + insn.len() > page || checked && may_store(&insn, kind) {
            break;
        }
    }
    let mut live = live_out(items, code, start, setting, &mut lookahead);
    for item in items.iter_mut().rev() {
        live = item.effect.before(live);
        item.live_in = live;
    }
    Some(Decoded { lookahead, steady })
}

/// Where in the block's bytes a jump leads, if that is a little further on than `from` in the same page.
fn ahead(code: GuestCode, start: u64, from: usize, target: u64) -> Option<usize> {
    let target = code.offset_of(target, start)?.checked_sub(code.offset)?;
    (from..from + MAX_JUMP).contains(&target).then_some(target)
}

/// The flags needed behind the last instruction, as far as it goes on at a known place in the same page.
fn live_out(items: &[Item], code: GuestCode, start: u64, setting: &Setting, lookahead: &mut Lookahead) -> Flags {
    let Some(last) = items.last() else { return Flags::ALL };
    let next = last.insn.next_ip();
    match last.kind {
        Kind::Branch if last.insn.is_jmp_short_or_near() || last.insn.is_call_near() => {
            live_at(last.insn.near_branch_target(), code, start, setting, lookahead)
        }
        Kind::Branch if last.insn.is_jcc_short_or_near() => live_at(next, code, start, setting, lookahead),
        Kind::Branch | Kind::Access | Kind::Level | Kind::Sensitive(_, true) => Flags::ALL,
        _ => live_at(next, code, start, setting, lookahead),
    }
}

/// The flags that the code at `target` may need, if it is in the block's page.
pub fn live_at(target: u64, code: GuestCode, start: u64, setting: &Setting, lookahead: &mut Lookahead) -> Flags {
    let mode = setting.mode;
    if setting.checked.is_some() {
        return Flags::ALL;
    }
    let end = code.page.len().min(4096);
    let Some(offset) = code.offset_of(target, start).filter(|&offset| offset < end && !mode.is_single()) else {
        return Flags::ALL;
    };
    let mut decoder = Decoder::with_ip(mode.bits(), &code.page[offset..end], target, mode.decoder_options());
    let mut chain = [Effect::SENSITIVE; MAX_LOOKAHEAD];
    let mut count = 0;
    let mut insn = Instruction::default();
    while count < MAX_LOOKAHEAD && decoder.can_decode() {
        decoder.decode_out(&mut insn);
        if !matches!(classify(&insn, mode, false), Kind::Native | Kind::Skip | Kind::Stack) {
            break;
        }
        chain[count] = Effect::of(&insn);
        count += 1;
        if chain[count - 1].kills == Flags::ALL {
            break;
        }
    }
    lookahead.add(offset, offset + decoder.position());
    chain[..count].iter().rev().fold(Flags::ALL, |live, effect| effect.before(live))
}

/// Finds accesses that share checks.
pub fn plan_groups(items: &mut [Item], mode: Mode, sharing: Sharing, planner: &mut Planner) {
    let plan = planner.plan(steps(items, mode), sharing);
    for (item, member) in items.iter_mut().zip(plan) {
        item.member = *member;
    }
}

/// What instructions mean for groups.
pub fn steps(items: &[Item], mode: Mode) -> impl Iterator<Item = (&Instruction, Step)> + Clone {
    items.iter().map(move |i| (&i.insn, step(&i.insn, i.kind, mode)))
}

pub fn step(insn: &Instruction, kind: Kind, mode: Mode) -> Step {
    let word = match kind {
        Kind::Stack => i64::from(insn.stack_pointer_increment()).abs(),
        Kind::Branch => operand_size_of_stack(insn) as i64,
        _ => i64::from(mode.bits()) / 8,
    };
    let push = Access { form: Form::STACK, displacement: -word, size: word, write: true };
    let pop = Access { form: Form::STACK, displacement: 0, size: word, write: false };
    match kind {
        Kind::Skip => Step::Plain(None),
        Kind::System => match insn.mnemonic() {
            Mnemonic::Swapgs | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => Step::Barrier,
            _ if system::is_push(insn) => Step::Stack { access: Some(push), moves: -word },
            _ if system::is_pop(insn) => Step::Stack { access: Some(pop), moves: word },
            _ => Step::Plain(None),
        },
        Kind::String | Kind::Access | Kind::Level | Kind::Bit => Step::Plain(None),
        Kind::Sensitive(..) => Step::Barrier,
        Kind::Native => Step::Plain(based_access(insn)),
        Kind::Stack => match insn.mnemonic() {
            Mnemonic::Pop => Step::Stack { access: Some(pop), moves: word },
            Mnemonic::Push if memory_operand(insn).is_none() => Step::Stack { access: Some(push), moves: -word },
            Mnemonic::Push => Step::Stack { access: None, moves: -word },
            _ => Step::Barrier,
        },
        Kind::Branch => match insn.mnemonic() {
            Mnemonic::Ret => Step::Stack { access: Some(pop), moves: word },
            Mnemonic::Call => Step::Stack { access: Some(push), moves: -word },
            _ => Step::Plain(None),
        },
    }
}

/// The access of an innocuous instruction, if its address is a form and a displacement.
pub fn based_access(insn: &Instruction) -> Option<Access> {
    let operand = access_operand(insn)?;
    let form = Form::of(insn)?;
    let masked = insn.op_mask() != Register::None
        || matches!(
            insn.mnemonic(),
            Mnemonic::Vmaskmovps | Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovd | Mnemonic::Vpmaskmovq
        );
    (!masked).then(|| Access {
        form,
        displacement: groups::distance(insn, insn.memory_displacement64()),
        size: operand_size(insn) as i64,
        write: writes(insn, operand),
    })
}

/// Whether bytes that the decoder refused are refused because 15 of them don't make an instruction yet. (If the fifteenth is the
/// one that makes it invalid, this can't tell.)
pub fn needs_more(bytes: &[u8], mode: Mode) -> bool {
    let Some(most) = bytes.get(..14) else { return false };
    let mut decoder = Decoder::new(mode.bits(), most, mode.decoder_options());
    let insn = decoder.decode();
    insn.is_invalid() && decoder.last_error() == iced_x86::DecoderError::NoMoreBytes
}
