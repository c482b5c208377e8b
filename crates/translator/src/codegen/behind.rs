//! What stands behind a block's body and mostly does not run: slow paths of checks, instructions that Rust executes after
//! all, targets of branches, exits.

use super::asm::{Label, Mem, RSP, S1};
use super::block::Builder;
use super::control::Missed;
use super::operand::{FlagState, unpark_flags};
use crate::access::AccessKind;
use crate::body::{Link, Site};
use crate::entry::{KIND_DISTANCE, context_offset};

/// The slow path of a check, to be emitted behind the body: calls Rust with `kind`, then goes on at `back`.
pub struct SlowStub {
    pub entry: Label,
    pub back: Label,
    pub kind: AccessKind,
    pub why: Slow,
}

/// Why a check failed.
pub enum Slow {
    /// The TLB entry doesn't fit.
    Miss {
        /// Where the page's end is in the way, careful code is entered.
        detour: bool,
    },
    /// The segment doesn't allow it, as far as emitted code can tell.
    Segment,
}

/// Code to be emitted behind the body.
pub enum Behind {
    Slow {
        stub: SlowStub,
        point: u8,
        parked: bool,
    },
    /// An instruction that Rust code executes where emitted code doesn't suffice.
    Sensitive {
        entry: Label,
        item: usize,
        parked: bool,
        /// Where the block goes on; if nowhere, the instruction ends it.
        back: Option<Label>,
    },
    Missed(Missed),
    /// The block's bytes are others now.
    Stale(Label),
    /// A branch's target that is not linked directly.
    Goto {
        entry: Label,
        target: u64,
        item: usize,
        parked: bool,
    },
}

pub struct PendingLink {
    label: Label,
    target: u64,
    /// A rel32 in the body that a link patches to go straight to the target.
    patch: usize,
    parked: bool,
}

impl Builder<'_> {
    pub fn slow_stub(&mut self, stub: SlowStub) {
        let parked = self.flags == FlagState::Parked;
        self.behind.push(Behind::Slow { stub, point: (self.points.len() - 1) as u8, parked });
    }

    /// A label whose code, behind the body, has Rust execute the current instruction, of which nothing is done yet; `back`:
    /// where the block goes on then. The flags are there as they are now.
    pub fn sensitive_stub(&mut self, back: Option<Label>) -> Label {
        let entry = self.asm.label();
        let parked = self.flags == FlagState::Parked;
        self.behind.push(Behind::Sensitive { entry, item: self.current, parked, back });
        entry
    }

    pub fn missed_stub(&mut self, missed: Missed) {
        self.behind.push(Behind::Missed(missed));
    }

    /// What `entry` leads to leaves a block whose bytes are others now. The flags are parked.
    pub fn stale_stub(&mut self, entry: Label) {
        self.behind.push(Behind::Stale(entry));
    }

    /// A label whose code, at the block's end, leaves for `target` until it is linked. `patch` is the rel32 field that
    /// refers to it.
    pub fn link(&mut self, label: Label, target: u64, patch: usize) {
        let parked = self.flags == FlagState::Parked;
        self.pending.push(PendingLink { label, target, patch, parked });
    }

    /// A conditional branch's target that needs code of its own: emitted behind the body.
    pub fn goto_stub(&mut self, entry: Label, target: u64) {
        let parked = self.flags == FlagState::Parked;
        self.behind.push(Behind::Goto { entry, target, item: self.current, parked });
    }

    /// A jump to careful code, which the slow path takes where a page's end is in the way. Until it is linked it leads nowhere: to
    /// what stands behind it.
    fn detour(&mut self, return_offset: u16, target: i32, parked: bool) {
        let behind = self.asm.label();
        self.asm.jmp(behind);
        self.asm.bind(behind);
        self.links.push(Link::detour(self.position(), target, parked));
        debug_assert_eq!(self.links.last().map(|l| l.return_offset), Some(return_offset));
    }

    fn emit_behind(&mut self, behind: Behind) {
        match behind {
            Behind::Slow { stub, point, parked } => {
                let (call, detours) = match stub.why {
                    Slow::Miss { detour } => {
                        self.asm.test_eax_imm32(stub.kind.bits() as i32);
                        self.asm.bind(stub.entry);
                        let (plain, or_detour) = (context_offset!(near.slow), context_offset!(near.slow_or_detour));
                        (if detour { or_detour } else { plain }, detour)
                    }
                    Slow::Segment => {
                        self.asm.bind(stub.entry);
                        self.asm.mov_imm(S1, stub.kind.bits() as u64);
                        (context_offset!(hot.resolve), false)
                    }
                };
                let before = self.asm.position();
                self.asm.call_mem(Mem::Base(RSP, call));
                let return_offset = self.position();
                debug_assert!(
                    matches!(stub.why, Slow::Segment) || self.asm.position() - before + 4 == KIND_DISTANCE,
                    "the kind is where `slow` looks for it"
                );
                self.sites.push(Site { return_offset, point, parked });
                self.asm.jmp(stub.back);
                if detours {
                    let target = self.points[usize::from(point)].guest_offset.into();
                    self.detour(return_offset, target, parked);
                }
            }
            Behind::Sensitive { entry, item, parked, back } => {
                self.asm.bind(entry);
                self.current = item;
                if parked {
                    unpark_flags(&mut self.asm);
                }
                let insn = self.items[item].insn;
                if let Some(s) = super::classify::sensitive(&insn) {
                    self.sensitive(&insn, s.exec, back.is_none());
                }
                // What was parked is so still.
                if let Some(back) = back {
                    self.asm.jmp(back);
                }
            }
            Behind::Missed(missed) => {
                self.asm.bind(missed.entry);
                self.leave_missed(missed);
            }
            Behind::Stale(entry) => {
                self.asm.bind(entry);
                unpark_flags(&mut self.asm);
                self.asm.call_mem(Mem::Base(RSP, context_offset!(hot.exit_stale)));
            }
            Behind::Goto { entry, target, item, parked } => {
                self.asm.bind(entry);
                self.current = item;
                self.flags_are(parked);
                self.goto(target);
            }
        }
    }

    /// Emits what stands behind the body, which may have something behind it as well. Returns an empty list.
    pub fn emit_all_behind(&mut self) -> Vec<Behind> {
        let mut all_behind = std::mem::take(&mut self.behind);
        while !all_behind.is_empty() {
            for behind in all_behind.drain(..) {
                self.emit_behind(behind);
            }
            std::mem::swap(&mut all_behind, &mut self.behind);
        }
        all_behind
    }

    /// Emits what leaves the block where it is not linked. Returns an empty list.
    pub fn emit_links(&mut self) -> Vec<PendingLink> {
        let mut all_pending = std::mem::take(&mut self.pending);
        for pending in all_pending.drain(..) {
            self.asm.bind(pending.label);
            let stub_offset = self.position();
            self.asm.call_mem(Mem::Base(RSP, context_offset!(near.exit_link)));
            let return_offset = self.position();
            self.links.push(Link {
                stub_offset,
                return_offset,
                patch_offset: pending.patch as u16,
                target: pending.target.wrapping_sub(self.start) as i32,
                parked: pending.parked,
                detour: false,
            });
        }
        all_pending
    }
}
