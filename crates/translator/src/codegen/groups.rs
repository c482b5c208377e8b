//! Accesses that share one TLB check.
//!
//! Neighbouring accesses at constant distances from one address ([`Form`]) mostly lie in one page: fields of a structure,
//! slots of a stack frame, elements of an array that a loop walks through. The first of such a [`Group`] checks the whole
//! span that the group touches and keeps its host address; the others use it. Registers that move by constants between the
//! accesses (`add rdi, 16`) don't end a group. If the span crosses a page's end, or the page has no plain mapping for what
//! the group does, the code up to the end of the block runs in [careful mode](crate::mode::Mode::careful), where only close
//! accesses share checks, or none.
//!
//! A group never makes an access happen that the guest doesn't make: its check walks the page tables for what the
//! first access does, and a write that comes later finds the page writable and dirty already, or the code runs carefully.

use iced_x86::{Code, CodeSize, Instruction, Mnemonic, OpKind, Register};

use super::facts::each_written;

/// The widest span that shares a check, in bytes. Wider ones cross pages too often.
const MAX_SPAN: i64 = 1024;
/// The same for [`Sharing::Near`].
const NEAR_SPAN: i64 = 256;
/// The same for [`Sharing::Close`].
const CLOSE_SPAN: i64 = 64;
/// The farthest that a group which stands moves with each round: a page has to hold several.
const MAX_STRIDE: i64 = 512;
/// Groups of one block that keep a host address in the context.
pub const SLOTS: usize = 16;
const RSP_NUMBER: u8 = 4;

/// Which accesses share checks in a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sharing {
    /// All that lie together.
    #[default]
    All,
    /// Reads with reads and writes with writes: for code that reads pages which it may not write.
    Alike,
    /// Of these those close to each other, and no pushes and pops: for code that often works at a page's end.
    Near,
    /// Only those in about one cache line: for code whose data, in this process, lie across a page's end.
    Close,
    /// None.
    Off,
}

/// An address but for its displacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// By the guest's numbers. Without base and index the address is the displacement.
    pub base: Option<u8>,
    /// With its scale.
    pub index: Option<(u8, u8)>,
    /// FS, GS or none.
    pub segment: Register,
}

impl Form {
    /// What stack instructions access.
    pub const STACK: Form = Form { base: Some(RSP_NUMBER), index: None, segment: Register::None };
    /// What others access by the stack pointer, where no stack page is remembered: a frame across two pages would let it alternate
    /// between them.
    const FRAME: Form = Form { segment: Register::SS, ..Form::STACK };

    /// The form of an instruction's memory operand, if it has the addressing of flat 64- or 32-bit code.
    pub fn of(insn: &Instruction) -> Option<Form> {
        let narrow = is_narrow(insn);
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let whole = |r: Register| if narrow { r.is_gpr32() } else { r.is_gpr64() };
        let number = |r: Register| whole(r).then(|| r.number() as u8);
        let known = |r: Register| r == Register::None || whole(r);
        let constant = if narrow {
            base == Register::None && index == Register::None && insn.memory_displ_size() == 4 && !is_moffs(insn)
        } else {
            base == Register::RIP
        };
        let addressed = whole(base) || whole(index);
        if !(constant || addressed && known(base) && known(index)) {
            return None;
        }
        let segment = match insn.memory_segment() {
            // The one has base and limit, the other can't be written.
            Register::FS | Register::GS | Register::CS if narrow => return None,
            s @ (Register::FS | Register::GS) => s,
            _ => Register::None,
        };
        let index = number(index).map(|n| (n, insn.memory_index_scale() as u8));
        // Of two registers that are simply added either may be the base.
        let (base, index) = match (number(base), index) {
            (Some(base), Some((index, 1))) => (Some(base.min(index)), Some((base.max(index), 1))),
            other => other,
        };
        Some(Form { base, index, segment })
    }

    fn uses(self, register: u8) -> bool {
        self.base == Some(register) || self.index.is_some_and(|(n, _)| n == register)
    }

    /// How far the address has moved with its registers.
    fn shift(self, moved: &[i64; 16]) -> i64 {
        let of = |n: u8| moved[usize::from(n & 15)];
        let base = self.base.map_or(0, of);
        base.wrapping_add(self.index.map_or(0, |(n, scale)| of(n).wrapping_mul(scale.into())))
    }
}

/// A memory access at a constant distance from a form.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    pub form: Form,
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

/// What is kept of a group, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// The addend of the stack page, with the TLB.
    StackPage,
    /// The host address of the span's first byte, in this slot of the context.
    Slot(usize),
    /// The same, kept from one turn of a loop to the next: see [`Standing`].
    Standing(usize),
}

/// One instruction's part in a group.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    pub keep: Keep,
    /// How far the access is from the span's first byte.
    pub distance: i32,
    /// The check to be made here, for all.
    pub check: Option<Check>,
}

#[derive(Clone, Copy, Debug)]
pub struct Check {
    pub form: Form,
    /// Of the span's first byte, as registers are now.
    pub displacement: i64,
    /// How many bytes, and whether any member writes.
    pub span: i32,
    pub write: bool,
}

/// A group whose address moves by a constant with each turn of a loop, so that one check does for many turns.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// As registers are where the loop begins.
    pub check: Check,
    pub slot: usize,
    /// How far the span moves with the turns that the block holds.
    pub stride: i64,
    pub members: usize,
}

#[derive(Clone, Debug)]
struct Group {
    form: Form,
    low: i64,
    high: i64,
    write: bool,
    /// How far the form's registers had moved at the first member.
    moved: i64,
    members: usize,
    open: bool,
}

/// Finds groups; keeps its memory from one block to the next.
#[derive(Default)]
pub struct Planner {
    groups: Vec<Group>,
    /// For each instruction its group, and the first byte that it accesses there.
    joined: Vec<Option<(usize, i64)>>,
    plan: Vec<Option<Member>>,
    /// How far registers have moved.
    moved: [i64; 16],
    /// Addresses are modulo 4 GiB.
    narrow: bool,
}

impl Planner {
    /// Finds the groups of a block: for each instruction its membership, if any.
    pub fn plan<'a>(
        &mut self,
        steps: impl Iterator<Item = (&'a Instruction, Step)>,
        sharing: Sharing,
    ) -> &[Option<Member>] {
        self.find(steps, sharing, sharing >= Sharing::Near);
        self.members(|_| None);
        &self.plan
    }

    /// The same for the turns of a loop, which `steps` are: groups that can stand through many of them have no checks among
    /// its members.
    pub fn plan_loop<'a>(
        &mut self,
        steps: impl Iterator<Item = (&'a Instruction, Step)> + Clone,
        sharing: Sharing,
    ) -> (&[Option<Member>], Vec<Standing>) {
        self.find(steps.clone(), sharing, true);
        let mut written = 0u16;
        for (insn, _) in steps.filter(|(insn, _)| constant_move(insn).is_none()) {
            each_written(insn, |n| written |= 1 << (n & 15));
        }
        let moved = self.moved;
        let standing = self.members(|group| {
            let stride = group.form.shift(&moved);
            let steady = (0..16).all(|n| written >> n & 1 == 0 || !group.form.uses(n));
            let near = stride.checked_abs().is_some_and(|s| s <= MAX_STRIDE);
            (steady && near && i32::try_from(group.low).is_ok()).then_some(stride)
        });
        (&self.plan, standing)
    }

    /// Finds the groups of a block, and how far registers have moved at its end. `frame`: the stack is memory like any other.
    fn find<'a>(&mut self, steps: impl Iterator<Item = (&'a Instruction, Step)>, sharing: Sharing, frame: bool) {
        self.groups.clear();
        self.joined.clear();
        self.moved = [0; 16];
        for (insn, step) in steps {
            self.narrow = is_narrow(insn);
            self.joined.push(None);
            let access = match step {
                Step::Plain(access) | Step::Stack { access, .. } => access,
                Step::Barrier => {
                    self.groups.iter_mut().for_each(|g| g.open = false);
                    continue;
                }
            };
            if let Some(mut a) = access {
                let near = frame && a.form == Form::STACK;
                if near {
                    a.form = Form::FRAME;
                }
                if !near || matches!(step, Step::Plain(_)) {
                    self.join(a, sharing);
                }
            }
            match step {
                Step::Stack { moves, .. } => {
                    self.moved[usize::from(RSP_NUMBER)] += moves;
                    if insn.mnemonic() == Mnemonic::Pop && insn.op0_kind() == OpKind::Register {
                        close(&mut self.groups, insn.op0_register());
                    }
                }
                _ => match constant_move(insn) {
                    Some((n, distance)) => {
                        let moved = &mut self.moved[usize::from(n & 15)];
                        *moved = moved.wrapping_add(distance);
                    }
                    None => close_written(insn, &mut self.groups),
                },
            }
        }
    }

    /// Makes the last instruction's access part of a group.
    fn join(&mut self, a: Access, sharing: Sharing) {
        let moved = a.form.shift(&self.moved);
        let low = a.displacement.wrapping_add(moved);
        let Some(high) = low.checked_add(a.size) else { return };
        let widest = match sharing {
            Sharing::All | Sharing::Alike => MAX_SPAN,
            Sharing::Near => NEAR_SPAN,
            Sharing::Close | Sharing::Off => CLOSE_SPAN,
        };
        // The stack's page is remembered only if it can be both read and written.
        let alike = |g: &Group| sharing == Sharing::All || g.write == a.write || a.form == Form::STACK;
        let fits = |g: &Group| {
            let span = g.high.max(high).checked_sub(g.low.min(low));
            g.open && g.form == a.form && alike(g) && span.is_some_and(|s| s <= widest)
        };
        let found = self.groups.iter().position(fits);
        let number = found.unwrap_or(self.groups.len());
        match self.groups.get_mut(number) {
            Some(group) => {
                (group.low, group.high) = (group.low.min(low), group.high.max(high));
                group.write |= a.write;
                group.members += 1;
            }
            None => {
                if a.form == Form::STACK {
                    // There is one stack page.
                    self.groups.iter_mut().filter(|g| g.form == Form::STACK).for_each(|g| g.open = false);
                }
                self.groups.push(Group { form: a.form, low, high, write: a.write, moved, members: 1, open: true });
            }
        }
        if let Some(last) = self.joined.last_mut() {
            *last = Some((number, low));
        }
    }

    /// Finds the memberships of the groups, and those that stand: `stride` tells how far one moves with a loop.
    fn members(&mut self, stride: impl Fn(&Group) -> Option<i64>) -> Vec<Standing> {
        let mut standing = Vec::new();
        let mut slots = 0;
        self.plan.clear();
        self.plan.resize(self.joined.len(), None);
        for (number, group) in self.groups.iter().enumerate() {
            let stack = group.form == Form::STACK;
            let stride = stride(group);
            let moved = if stride.is_some() { 0 } else { group.moved };
            let displacement = group.low.wrapping_sub(moved);
            let encodable =
                group.form == Form { base: None, index: None, ..group.form } || i32::try_from(displacement).is_ok();
            // A single access is checked as it is, except on the stack, whose page is remembered, and where a check does for
            // many turns.
            let alone = group.members < 2 && stride.is_none();
            // Addresses modulo 4 GiB can't be formed beside an addend.
            let by_addend = stack && !self.narrow;
            if !encodable || !stack && alone || !by_addend && slots == SLOTS {
                continue;
            }
            let span = (group.high - group.low) as i32;
            let check = Check { form: group.form, displacement, span, write: group.write };
            let keep = match stride {
                _ if by_addend => Keep::StackPage,
                Some(stride) => {
                    standing.push(Standing { check, slot: slots, stride, members: group.members });
                    Keep::Standing(standing.len() - 1)
                }
                None => Keep::Slot(slots),
            };
            slots += usize::from(!by_addend);
            let mut check = stride.is_none().then_some(check);
            for (member, joined) in self.plan.iter_mut().zip(&self.joined) {
                if let &Some((n, low)) = joined
                    && n == number
                {
                    *member = Some(Member { keep, distance: (low - group.low) as i32, check: check.take() });
                }
            }
        }
        standing
    }
}

/// The code is 32-bit code, whose addresses are modulo 4 GiB.
pub fn is_narrow(insn: &Instruction) -> bool {
    insn.code_size() == CodeSize::Code32
}

/// MOV between the accumulator and a constant address: it has no ModRM byte.
fn is_moffs(insn: &Instruction) -> bool {
    matches!(
        insn.code(),
        Code::Mov_AL_moffs8
            | Code::Mov_AX_moffs16
            | Code::Mov_EAX_moffs32
            | Code::Mov_moffs8_AL
            | Code::Mov_moffs16_AX
            | Code::Mov_moffs32_EAX
    )
}

/// A displacement or an immediate as the distance that it is.
pub fn distance(insn: &Instruction, value: u64) -> i64 {
    if is_narrow(insn) { (value as i32).into() } else { value as i64 }
}

/// `ADD/SUB r, imm`, `INC/DEC r` and `LEA r, [r + imm]`: a whole register moves by a known distance.
pub fn constant_move(insn: &Instruction) -> Option<(u8, i64)> {
    let register = insn.op0_register();
    let whole = if is_narrow(insn) { register.is_gpr32() } else { register.is_gpr64() };
    if insn.op_count() == 0 || insn.op0_kind() != OpKind::Register || !whole {
        return None;
    }
    let distance = match insn.mnemonic() {
        Mnemonic::Add => immediate(insn)?,
        Mnemonic::Sub => immediate(insn)?.wrapping_neg(),
        Mnemonic::Inc => 1,
        Mnemonic::Dec => -1,
        Mnemonic::Lea if insn.memory_base() == register && insn.memory_index() == Register::None => {
            distance(insn, insn.memory_displacement64())
        }
        _ => return None,
    };
    Some((register.number() as u8, distance))
}

fn immediate(insn: &Instruction) -> Option<i64> {
    use OpKind::{Immediate8to32, Immediate8to64, Immediate32, Immediate32to64};
    matches!(insn.op1_kind(), Immediate8to64 | Immediate32to64 | Immediate8to32 | Immediate32)
        .then(|| distance(insn, insn.immediate(1)))
}

fn close(groups: &mut [Group], register: Register) {
    if register.is_gpr() {
        let n = register.full_register().number() as u8;
        groups.iter_mut().filter(|g| g.form.uses(n)).for_each(|g| g.open = false);
    }
}

fn close_written(insn: &Instruction, groups: &mut [Group]) {
    if groups.iter().any(|g| g.open) {
        each_written(insn, |n| groups.iter_mut().filter(|g| g.form.uses(n)).for_each(|g| g.open = false));
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;
    use crate::codegen::decode::{based_access, step};

    fn planned(code: &[u8]) -> Vec<Option<Member>> {
        planned_as(code, Sharing::All)
    }

    fn planned_as(code: &[u8], sharing: Sharing) -> Vec<Option<Member>> {
        plan_code(64, code, sharing)
    }

    fn plan_code(bits: u32, code: &[u8], sharing: Sharing) -> Vec<Option<Member>> {
        let insns: Vec<_> = Decoder::with_ip(bits, code, 0x1000, DecoderOptions::NONE).iter().collect();
        let steps = insns.iter().map(|insn| (insn, Step::Plain(based_access(insn))));
        Planner::default().plan(steps, sharing).to_vec()
    }

    #[test]
    fn accesses_off_one_base_share_the_first_ones_check() {
        // mov rax, [rdi+8]; mov [rdi+0x10], rcx
        let plan = planned(&[0x48, 0x8b, 0x47, 0x08, 0x48, 0x89, 0x4f, 0x10]);
        let (first, second) = (plan[0].unwrap(), plan[1].unwrap());
        let check = first.check.unwrap();
        assert_eq!((check.displacement, check.span, check.write), (8, 16, true));
        assert_eq!((first.distance, second.distance, second.check.is_none()), (0, 8, true));
    }

    /// The same for 32-bit code.
    fn planned_narrow(code: &[u8]) -> Vec<Option<Member>> {
        plan_code(32, code, Sharing::All)
    }

    #[test]
    fn accesses_of_32_bit_code_share_checks() {
        // mov eax, [edi-4]; add edi, 8; mov ecx, [edi-8]
        let plan = planned_narrow(&[0x8b, 0x47, 0xfc, 0x83, 0xc7, 0x08, 0x8b, 0x4f, 0xf8]);
        let check = plan[0].unwrap().check.unwrap();
        assert_eq!((check.displacement, check.span, check.write), (-4, 8, false));
        assert_eq!(plan[2].unwrap().distance, 4);
        // mov ecx, [0xc0001000]; mov [0xc0001008], ecx
        let plan = planned_narrow(&[0x8b, 0x0d, 0, 0x10, 0, 0xc0, 0x89, 0x0d, 8, 0x10, 0, 0xc0]);
        let check = plan[0].unwrap().check.unwrap();
        assert_eq!((check.displacement as u32, check.span, check.write), (0xc000_1000, 12, true));
    }

    #[test]
    fn segments_with_bases_and_writes_to_code_segments_share_nothing_in_32_bit_code() {
        // mov eax, fs:[ebx]; mov eax, fs:[ebx+4]; mov cs:[esi], eax; mov cs:[esi+4], eax
        let plan = planned_narrow(&[0x64, 0x8b, 0x03, 0x64, 0x8b, 0x43, 4, 0x2e, 0x89, 0x06, 0x2e, 0x89, 0x46, 4]);
        assert!(plan.iter().all(Option::is_none));
    }

    #[test]
    fn reads_and_writes_can_be_kept_apart() {
        // mov rax, [rdi]; mov [rdi+8], rcx; mov rax, [rdi+0x10]
        let code = [0x48, 0x8b, 0x07, 0x48, 0x89, 0x4f, 0x08, 0x48, 0x8b, 0x47, 0x10];
        let plan = planned_as(&code, Sharing::Alike);
        assert!(plan[1].is_none(), "a write alone");
        assert!(!plan[0].unwrap().check.unwrap().write && plan[2].is_some());
    }

    #[test]
    fn near_sharing_remembers_no_stack_page_and_keeps_spans_short() {
        // push rax; mov rcx, [rsp]; mov rdx, [rsp+8]; mov rsi, [rsp+0x100]
        let code = [0x50, 0x48, 0x8b, 0x0c, 0x24, 0x48, 0x8b, 0x54, 0x24, 0x08, 0x48, 0x8b, 0xb4, 0x24, 0, 1, 0, 0];
        let mode = crate::mode::Mode::of(&crate::testing::user_vcpu());
        let insns: Vec<_> = Decoder::new(64, &code, DecoderOptions::NONE).iter().collect();
        let steps = insns.iter().map(|i| (i, step(i, crate::codegen::classify::classify(i, mode, false), mode)));
        let mut planner = Planner::default();
        let plan = planner.plan(steps, Sharing::Near);
        assert!(plan[0].is_none());
        assert!(matches!(plan[1].unwrap().keep, Keep::Slot(_)) && plan[1].unwrap().check.unwrap().span == 16);
        assert!(plan[2].is_some() && plan[3].is_none());
    }

    #[test]
    fn a_register_that_moves_by_a_constant_keeps_its_group() {
        // mov eax, [rdi+rsi*4]; inc rsi; mov ecx, [rdi+rsi*4]
        let plan = planned(&[0x8b, 0x04, 0xb7, 0x48, 0xff, 0xc6, 0x8b, 0x0c, 0xb7]);
        assert_eq!(plan[0].unwrap().check.unwrap().span, 8);
        assert_eq!(plan[2].unwrap().distance, 4);
    }

    #[test]
    fn a_base_that_is_written_ends_its_group() {
        // mov rax, [rdi]; mov rdi, rax; mov rax, [rdi]
        let plan = planned(&[0x48, 0x8b, 0x07, 0x48, 0x89, 0xc7, 0x48, 0x8b, 0x07]);
        assert!(plan.iter().all(Option::is_none));
    }

    #[test]
    fn an_access_far_away_on_the_stack_ends_the_stacks_group() {
        // mov rax, [rsp]; mov rax, [rsp+0x1000]; mov rax, [rsp+8]
        let plan = planned(&[0x48, 0x8b, 0x04, 0x24, 0x48, 0x8b, 0x84, 0x24, 0, 0x10, 0, 0, 0x48, 0x8b, 0x44, 0x24, 8]);
        assert!(plan.iter().all(|m| m.unwrap().check.is_some()));
    }

    #[test]
    fn relative_operands_near_each_other_share_a_check() {
        // mov eax, [rip+0x100]; mov ecx, [rip+0x100]
        let plan = planned(&[0x8b, 0x05, 0, 1, 0, 0, 0x8b, 0x0d, 0, 1, 0, 0]);
        let check = plan[0].unwrap().check.unwrap();
        assert_eq!((check.displacement, check.span), (0x1106, 10));
        assert_eq!(plan[1].unwrap().distance, 6);
    }
}
