//! Loops whose checks stand before them.
//!
//! A loop that is one block and walks through memory in constant steps checks before a turn whether the pages that the turn
//! accesses are in the TLB, and for how many more rounds of turns that stays so (a round is the turns that the block holds, a
//! few for a short loop). So many rounds then run without checks, on host addresses in the scratch registers or in the
//! context, which move along; then all is checked again:
//!
//! ```text
//! entry:  look up each group; any not there, or at its page's end: to plain
//!         rounds = how often all of them can move before one leaves its page
//! turn:   the guest's turns; their exits leave the block
//!         move the host addresses; rounds -= 1; not negative: to turn
//!         poll; to entry
//! plain:  one turn with checks of its own; then to the block's beginning
//! ```
//!
//! The checks before the loop only look: what isn't in the TLB, the plain turn asks for, at the instruction that needs it. So
//! no page is seen to be accessed that the guest doesn't access, and what faults does so where it should.

use iced_x86::Mnemonic;

use super::asm::{Alu, Label, Mem, RSP, Reg, S0, S1, S2, cc};
use super::block::Builder;
use super::classify::{Kind, access_operand};
use super::decode::{Item, steps};
use super::groups::{Keep, Planner, Sharing, Standing};
use super::liveness::Flags;
use super::operand::{FlagState, kept};
use super::reencode::{Home, home, spares_scratch};
use crate::access::AccessKind;
use crate::entry::context_offset;
use crate::mode::Mode;

/// Instructions in a round, if that takes no more turns than [`MAX_TURNS`].
const ROUND: usize = 24;
const MAX_TURNS: usize = 4;
/// Instructions in all rounds and the plain turn.
const MAX_ITEMS: usize = 120;
/// Rounds between two looks at the poll word.
const MAX_ROUNDS: i64 = 64;
/// The fixed point of the number of rounds: page offsets times this fit in 32 bits.
const POINT: u8 = 16;

const ROUNDS: Mem = Mem::Base(RSP, context_offset!(hot.rounds));

/// The loop at a block's beginning.
pub struct Steady {
    entry: Label,
    turn: Label,
    plain: Label,
    standing: Vec<(Standing, Option<Reg>)>,
}

/// How many turns a round of the loop has whose one turn `items` are; 0: it is not one that can check before it runs.
pub fn turns(items: &[Item], mode: Mode) -> usize {
    let plain = |i: &Item| match i.kind {
        Kind::Native | Kind::Skip => true,
        Kind::Branch => i.insn.is_jcc_short_or_near(),
        _ => false,
    };
    let suits = mode.flat()
        && !mode.is_single()
        && !mode.checks_alignment()
        && items.iter().all(plain)
        && items.iter().rev().fold(Flags::ALL, |live, i| i.effect.before(live)).is_empty();
    if !suits {
        return 0;
    }
    let turns = ROUND.div_ceil(items.len()).min(MAX_TURNS);
    if (turns + 1) * items.len() > MAX_ITEMS {
        return 0;
    }
    let mut planner = Planner::default();
    let (members, standing) = planner.plan_loop((0..turns).flat_map(|_| steps(items, mode)), Sharing::All);
    let accesses = items.iter().filter(|i| access_operand(&i.insn).is_some()).count() * turns;
    let stand = members.iter().flatten().filter(|m| matches!(m.keep, Keep::Standing(_))).count();
    if !standing.is_empty() && 2 * stand >= accesses { turns } else { 0 }
}

/// Finds the groups of a loop's rounds.
pub fn plan(items: &mut [Item], mode: Mode, sharing: Sharing, planner: &mut Planner) -> Vec<Standing> {
    let (members, standing) = planner.plan_loop(steps(items, mode), sharing.min(Sharing::Alike));
    for (item, member) in items.iter_mut().zip(members) {
        item.member = *member;
    }
    standing
}

impl Builder<'_> {
    /// Emits the checks before a loop that the block's first `length` instructions are.
    pub fn enter_loop(&mut self, length: usize, standing: Vec<Standing>) {
        let (entry, turn, plain) = (self.asm.label(), self.asm.label(), self.asm.label());
        self.asm.bind(entry);
        self.count_rounds(&standing, plain);
        let registers = self.free_registers(length, standing.len());
        let mut order: Vec<usize> = (0..standing.len()).collect();
        order.sort_by_key(|&n| std::cmp::Reverse(standing[n].members));
        let mut standing: Vec<_> = standing.into_iter().map(|s| (s, None)).collect();
        for (&n, &register) in order.iter().zip(registers) {
            self.asm.load(register, kept(standing[n].0.slot));
            standing[n].1 = Some(register);
        }
        self.asm.bind(turn);
        self.held = None;
        self.steady = Some(Steady { entry, turn, plain, standing });
    }

    /// Emits the lookups, and what puts into the context how many more rounds they are good for.
    fn count_rounds(&mut self, standing: &[Standing], plain: Label) {
        let mut strides: Vec<i64> = standing.iter().map(|s| s.stride.abs()).filter(|&s| s != 0).collect();
        strides.sort_unstable();
        strides.dedup();
        // S2: the least of all, as bytes if all groups move alike, or as rounds.
        let scale = |asm: &mut super::asm::Asm, reg, stride: i64| asm.multiply32(reg, ((1 << POINT) / stride) as i32);
        let most = match strides[..] {
            [] => MAX_ROUNDS - 1,
            [stride] => (MAX_ROUNDS * stride).min(4096) - 1,
            _ => (MAX_ROUNDS << POINT) - 1,
        };
        self.asm.mov_imm(S2, most as u64);
        for s in standing {
            self.form_address(s.check.form, s.check.displacement);
            let kind = AccessKind::new(s.check.span as usize, s.check.write, self.mode.context());
            let host = self.look_up_offset(kind, plain);
            self.asm.load(S1, host);
            self.asm.alu(Alu::Add, S1, S0);
            self.asm.store(kept(s.slot), S1);
            if s.stride == 0 {
                continue;
            }
            if s.stride > 0 {
                self.asm.neg32(S0);
                self.asm.alu_imm32(Alu::Add, S0, 4096 - s.check.span);
            }
            if strides.len() > 1 {
                scale(&mut self.asm, S0, s.stride.abs());
            }
            self.asm.alu32(Alu::Cmp, S0, S2);
            self.asm.move32_if_below(S2, S0);
        }
        if let [stride] = strides[..] {
            scale(&mut self.asm, S2, stride);
        }
        if !strides.is_empty() {
            self.asm.shr32(S2, POINT);
        }
        self.asm.store32(ROUNDS, S2);
    }

    /// Scratch registers that the loop leaves alone, best first.
    fn free_registers(&self, length: usize, groups: usize) -> &'static [Reg] {
        let spares = |i: &Item| match i.kind {
            Kind::Native if i.insn.mnemonic() == Mnemonic::Lea => {
                let at_home =
                    |r: iced_x86::Register| !r.is_gpr() || home(r.full_register().number() as u8) != Home::Memory;
                at_home(i.insn.op0_register())
                    && i.insn.op0_register().size() != 2
                    && at_home(i.insn.memory_base())
                    && at_home(i.insn.memory_index())
            }
            Kind::Native if access_operand(&i.insn).is_some() => {
                matches!(i.member, Some(m) if matches!(m.keep, Keep::Standing(_))) && self.spares_scratch(i)
            }
            Kind::Native => self.spares_scratch(i),
            _ => true,
        };
        match self.items[..length].iter().all(spares) {
            true if groups <= 3 => &[S2, S0, S1],
            // S2 serves the others by turns.
            true => &[S0, S1],
            false => &[],
        }
    }

    fn spares_scratch(&self, item: &Item) -> bool {
        let bytes = &self.bytes[item.offset..item.offset + item.insn.len()];
        spares_scratch(bytes, &item.insn, self.mode.bits())
    }

    /// The register that has the host address of a standing group.
    pub fn standing_register(&mut self, n: usize) -> Reg {
        let place = self.steady.as_ref().and_then(|l| l.standing.get(n)).map(|&(s, reg)| (s.slot, reg));
        match place {
            Some((_, Some(register))) => register,
            Some((slot, None)) => self.hold(slot),
            None => S2,
        }
    }

    /// Emits what follows the last turn of a round. The plain turn comes next.
    pub fn close_round(&mut self) {
        let Some(l) = self.steady.take() else { return };
        for (s, register) in l.standing.iter().filter(|(s, _)| s.stride != 0) {
            match *register {
                Some(register) => self.asm.alu_imm(Alu::Add, register, s.stride as i32),
                None => self.asm.add_mem_imm(kept(s.slot), s.stride as i32),
            }
        }
        self.asm.count_down(ROUNDS);
        self.asm.jcc(cc::NS, l.turn);
        self.poll(self.start);
        self.asm.jmp(l.entry);
        self.asm.bind(l.plain);
        self.held = None;
        self.addend = false;
        (self.flags, self.saved) = (FlagState::Host, false);
    }
}
