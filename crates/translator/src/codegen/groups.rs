//! Accesses that share one TLB check.
//!
//! Neighbouring accesses off one base register mostly lie in one page: fields of a structure, slots of a stack frame. The
//! first of such a [`Group`] checks the whole span that the group touches and keeps the page's addend; the others only
//! add it: `[addend + base + displacement]`. If the span crosses a page's end, or the page has no plain mapping for what
//! the group does, the first access leaves for the dispatcher, which runs the code up to the end of the block in
//! [careful mode](crate::mode::Mode::careful), where every access is checked by itself.
//!
//! A group never makes an access happen that the guest doesn't make: its check walks the page tables for what the
//! first access does, and a write that comes later finds the page writable and dirty already, or the code runs carefully.

use iced_x86::{Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpAccess, Register};

use super::asm::Reg;
use super::reencode::{Home, home};

/// The widest span that shares a check, in bytes. Wider ones cross pages too often.
const MAX_SPAN: i64 = 1024;
/// Groups of one block that keep an addend in the context.
pub const SLOTS: usize = 16;
const RSP_NUMBER: u8 = 4;

/// A memory access at a constant distance from a base register.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// The guest's number of the base register.
    pub base: u8,
    pub displacement: i64,
    pub size: i64,
    pub write: bool,
}

/// What an instruction means for groups.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// An access that may share a check, or none; registers change as the instruction says.
    Plain(Option<Access>),
    /// A stack access of a PUSH, POP, CALL or RET, which moves rsp by `moves`.
    Stack { access: Option<Access>, moves: i64 },
    /// Rust code runs: mappings and registers may change.
    Barrier,
}

/// Where the addend of a group is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// With the stack page, in the TLB.
    StackPage,
    /// In this slot of the context.
    Slot(usize),
}

/// One instruction's part in a group.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    pub base: Reg,
    pub keep: Keep,
    /// The check to be made here, for all: span from base, and whether any member writes.
    pub check: Option<Check>,
}

#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// Of the span's first byte, from the base register as it is now.
    pub low: i32,
    pub span: i32,
    pub write: bool,
}

#[derive(Clone, Debug)]
struct Group {
    base: u8,
    low: i64,
    high: i64,
    write: bool,
    first: usize,
    /// How far the base had moved at the first member.
    moved: i64,
    members: Vec<usize>,
}

/// Finds the groups of a block: for each instruction its membership, if any.
pub fn plan(steps: &[(Instruction, Step)]) -> Vec<Option<Member>> {
    let mut groups: Vec<Group> = Vec::new();
    let mut open: [Option<usize>; 16] = [None; 16];
    let mut moved = [0i64; 16];
    let mut factory = InstructionInfoFactory::new();
    for (i, (insn, step)) in steps.iter().enumerate() {
        let access = match step {
            Step::Plain(access) | Step::Stack { access, .. } => *access,
            Step::Barrier => {
                open = [None; 16];
                continue;
            }
        };
        if let Some(a) = access {
            join(&mut groups, &mut open, &moved, i, a);
        }
        match step {
            Step::Stack { moves, .. } => {
                moved[RSP_NUMBER as usize] += moves;
                if insn.mnemonic() == Mnemonic::Pop && insn.op0_register().is_gpr() {
                    close(&mut open, insn.op0_register());
                }
            }
            _ => match stack_adjustment(insn) {
                Some(distance) => moved[RSP_NUMBER as usize] += distance,
                None => close_written(&mut factory, insn, &mut open),
            },
        }
    }
    members(&groups, steps.len())
}

fn join(groups: &mut Vec<Group>, open: &mut [Option<usize>; 16], moved: &[i64; 16], i: usize, a: Access) {
    let base = a.base as usize;
    let (low, high) = (a.displacement + moved[base], a.displacement + moved[base] + a.size);
    if let Some(group) = open[base].map(|g| &mut groups[g]) {
        let span = (group.low.min(low), group.high.max(high));
        if span.1 - span.0 <= MAX_SPAN {
            (group.low, group.high) = span;
            group.write |= a.write;
            group.members.push(i);
            return;
        }
    }
    open[base] = Some(groups.len());
    groups.push(Group { base: a.base, low, high, write: a.write, first: i, moved: moved[base], members: vec![i] });
}

fn members(groups: &[Group], count: usize) -> Vec<Option<Member>> {
    let mut plan = vec![None; count];
    let mut slots = 0;
    for group in groups {
        let Home::Host(base) = home(group.base) else { continue };
        let stack = group.base == RSP_NUMBER;
        // A single access is checked as it is, except on the stack, whose page is remembered.
        if !stack && (group.members.len() < 2 || slots == SLOTS) {
            continue;
        }
        let keep = if stack {
            Keep::StackPage
        } else {
            slots += 1;
            Keep::Slot(slots - 1)
        };
        for &i in &group.members {
            let check = (i == group.first).then(|| Check {
                low: (group.low - group.moved) as i32,
                span: (group.high - group.low) as i32,
                write: group.write,
            });
            plan[i] = Some(Member { base, keep, check });
        }
    }
    plan
}

/// `ADD/SUB rsp, imm` and `LEA rsp, [rsp + imm]`: the stack moves by a known distance.
fn stack_adjustment(insn: &Instruction) -> Option<i64> {
    if insn.op0_register() != Register::RSP {
        return None;
    }
    match insn.mnemonic() {
        Mnemonic::Add if insn.op1_kind() != iced_x86::OpKind::Register => immediate(insn),
        Mnemonic::Sub if insn.op1_kind() != iced_x86::OpKind::Register => immediate(insn).map(|n| -n),
        Mnemonic::Cmp | Mnemonic::Test => Some(0),
        Mnemonic::Lea if insn.memory_base() == Register::RSP && insn.memory_index() == Register::None => {
            Some(insn.memory_displacement64() as i64)
        }
        _ => None,
    }
}

fn immediate(insn: &Instruction) -> Option<i64> {
    use iced_x86::OpKind::*;
    matches!(insn.op1_kind(), Immediate8to64 | Immediate32to64).then(|| insn.immediate(1) as i64)
}

fn close(open: &mut [Option<usize>; 16], register: Register) {
    if register.is_gpr() {
        open[register.full_register().number()] = None;
    }
}

fn close_written(factory: &mut InstructionInfoFactory, insn: &Instruction, open: &mut [Option<usize>; 16]) {
    let info = factory.info_options(insn, InstructionInfoOptions::NO_MEMORY_USAGE);
    for used in info.used_registers() {
        if !matches!(used.access(), OpAccess::Read | OpAccess::CondRead) {
            close(open, used.register());
        }
    }
}

/// Whether a base register can have groups: it lives in a host register.
pub fn groupable(base: Register) -> bool {
    base.is_gpr64() && matches!(home(base.number() as u8), Home::Host(_))
}
