//! The dispatcher: takes events, finds or makes the block for the vCPU's RIP and mode, enters it, and deals with why it was left.

use std::sync::Arc;

use engine::Exit;
use rustc_hash::{FxHashMap, FxHashSet};

use arch::registers::{debug, rflags};
use arch::state::{Activity, Segment, SegmentRegister};
use arch::{Exception, Vector};

use crate::access::{Bounce, canonical};
use crate::body::Origin;
use crate::cache::{BlockId, Cache, Found, LinkId};
use crate::code_memory::{CodeMemory, jump_key};
use crate::codegen::block::Workspace;
use crate::codegen::groups::Sharing;
use crate::codegen::relative::in_page;
use crate::cpu::{Stop, Vcpu};
use crate::deliver::{Event, deliver};
use crate::entry::{Left, enter};
use crate::fetches::Fetches;
use crate::mode::{CodeSegment, Mode};
use crate::perf_map::PerfMap;
use crate::rewritten::Rewritten;
use crate::shared::request;
use crate::spaces::Spaces;
use crate::translate::{CODE_PAGE, Reached, least_sharing};

/// Code whose groups' failures are remembered.
const MAX_FAILURES: usize = 1 << 14;
/// After so many checks that failed for want of a plain page the code's accesses share fewer.
const MANY_FAILURES: u8 = 16;
/// Code segments whose limits are remembered.
const MAX_CODE_SEGMENTS: usize = 4096;

/// After so many detours to careful code one is looked at...
const DETOURS: i32 = 1024;
/// ...and if they took less time than this, in ticks of the host's TSC, its block loses its groups. A detour takes about 100, and
/// several times that where an access itself crosses the page's end.
const SOON: u64 = DETOURS as u64 * 400;
/// So many ticks after a block's accesses were kept from sharing checks, what comes back to its code elsewhere tries again: a
/// process may have had its stack frame across a page's end.
const FORGIVEN: u64 = 1 << 31;

/// The dispatcher's and the cache's own state.
pub struct EngineState {
    pub cache: Cache,
    /// Why emitted code was left with [`Left::Stop`].
    pub stop: Option<Stop>,
    pub counts: crate::stats::Counts,
    pub bounce: Bounce,
    /// Where in the bounce buffer the operand is.
    pub bounce_at: usize,
    /// The current address space's code pages, and the global ones.
    pub fetches: Fetches,
    pub global_fetches: Fetches,
    /// Other address spaces.
    pub spaces: Spaces,
    /// The mode of the block that runs.
    mode: Option<Mode>,
    /// The code segment whose limit the jump table goes by, and the limits of those of other bases.
    code_segment: CodeSegment,
    code_limits: FxHashMap<(Mode, u32), u32>,
    /// The segments that emitted code was told about, and whether their types count.
    pub ends_of: ([Segment; 6], bool),
    /// The next block runs more carefully than this, in whose block a check failed.
    careful: Option<Mode>,
    /// The place whose group's check failed, to be linked to the careful code that comes next.
    failed_check: Option<LinkId>,
    /// When detours were last looked at.
    detoured: u64,
    /// Code whose groups' checks failed.
    pub failures: FxHashMap<Origin, Failures>,
    /// The bytes that are translated: a page, and perhaps the beginning of the next.
    pub code_page: Vec<u8>,
    pub workspace: Workspace,
    /// What was saved or restored last, for its memory.
    pub image: Option<Box<crate::semantics::xsave::Image>>,
    pub rewritten: Rewritten,
    /// An event was delivered since a block was last entered, or else TF was cleared without a trap to follow.
    pub delivered: bool,
    pub native: crate::native::Native,
    /// Pages of device memory (indices) that could be written unnoticed since their dirty ones were last collected.
    pub device_pages: FxHashSet<usize>,
}

/// How checks of groups failed in some code.
#[derive(Clone, Copy, Default)]
pub struct Failures {
    pub sharing: Sharing,
    /// How often with this sharing.
    count: u8,
    /// When it became this one.
    since: u64,
}

impl EngineState {
    pub fn new(memory: Arc<CodeMemory>, perf_map: Option<PerfMap>) -> Self {
        EngineState {
            cache: Cache::new(memory, perf_map),
            stop: None,
            counts: Default::default(),
            bounce: Bounce::default(),
            bounce_at: 0,
            fetches: Fetches::default(),
            global_fetches: Fetches::default(),
            spaces: Spaces::default(),
            mode: None,
            code_segment: CodeSegment::FLAT,
            code_limits: FxHashMap::default(),
            // Whose ends are those that a vCPU begins with: zero but for the limit.
            ends_of: ([Segment { limit: u32::MAX, ..Segment::default() }; 6], false),
            careful: None,
            failed_check: None,
            detoured: 0,
            failures: FxHashMap::default(),
            code_page: vec![0; CODE_PAGE],
            workspace: Workspace::default(),
            image: None,
            rewritten: Rewritten::default(),
            delivered: false,
            native: Default::default(),
            device_pages: FxHashSet::default(),
        }
    }

    /// A group's check failed at a place in a block, at a page's end or for want of a plain page: the code goes on carefully. After
    /// `enough` of the one, or much of the other, it is translated with less sharing.
    pub fn run_carefully(&mut self, id: BlockId, place: u64, crosses: bool, enough: bool) {
        let mode = self.cache.block(id).map_or(Mode::default(), |(_, body)| body.origin.mode);
        self.careful = Some(mode);
        if !self.cache.is_live(id) {
            return;
        }
        self.failed_check = self.cache.find_link(place, 0).filter(|_| crosses).map(|(link, ..)| link);
        let Some(origin) = self.cache.block(id).map(|(_, body)| body.origin) else { return };
        if crosses && !enough {
            return;
        }
        // A guest that makes code for hours must not make the list longer and longer.
        if self.failures.len() >= MAX_FAILURES {
            self.failures.clear();
        }
        let failures = self.failures.entry(origin).or_default();
        failures.count += 1;
        if enough || failures.count == MANY_FAILURES {
            let sharing = match failures.sharing.max(least_sharing(mode)) {
                Sharing::All if !enough => Sharing::Alike,
                Sharing::All | Sharing::Alike => Sharing::Near,
                Sharing::Near if enough => Sharing::Close,
                Sharing::Near | Sharing::Close | Sharing::Off => Sharing::Off,
            };
            *failures = Failures { sharing, count: 0, since: crate::host::rdtsc() };
            self.failed_check = None;
            self.cache.remove_origin(origin);
        }
    }

    /// Code that shares fewer checks since long ago, and is to run at another address now, may share all again.
    pub fn forgive(&mut self, origin: Origin) {
        let Some(failures) = self.failures.get(&origin) else { return };
        if failures.sharing > Sharing::Alike && crate::host::rdtsc().wrapping_sub(failures.since) > FORGIVEN {
            self.failures.remove(&origin);
            self.cache.remove_origin(origin);
        }
    }

    /// Forgets which virtual address leads to which block.
    pub fn drop_address_caches(&mut self) {
        self.cache.jumps.clear(true);
        self.cache.unlink_far();
        self.cache.stats.global_flushes += 1;
        self.fetches.clear();
        self.global_fetches.clear();
    }

    /// The same for what is not in global pages.
    pub fn drop_local_addresses(&mut self) {
        self.cache.jumps.clear(false);
        self.fetches.clear();
    }

    /// The same for what is in one page, or in a large page around it.
    pub fn drop_address(&mut self, va: u64) {
        if self.global_fetches.near(va) {
            self.drop_address_caches();
        } else if self.fetches.near(va) {
            self.drop_local_addresses();
        }
    }
}

/// Executes a sensitive instruction for emitted code. -1: back to the block; else the [`Left`] to leave with.
pub(crate) extern "C" fn run_sensitive(cpu: &mut Vcpu, index: u64) -> i32 {
    let Some(mut s) = cpu.engine.cache.sensitive(index) else {
        cpu.engine.stop =
            Some(Stop::Exit(Exit::Failed(format!("a block names sensitive instruction {index}, which there isn't"))));
        return Left::Stop as i32;
    };
    cpu.engine.counts.sensitive += 1;
    if cpu.machine.config.stats {
        *cpu.engine.counts.mnemonics.entry(s.insn.mnemonic()).or_default() += 1;
    }
    if s.relative {
        s.insn = in_page(s.insn, cpu.near.code_page);
    }
    cpu.insn_rip = s.insn.ip();
    cpu.rip = s.insn.next_ip();
    let known = (cpu.engine.cache.stats.invalidated, cpu.tlb.shared_checks());
    match (s.exec)(cpu, &s.insn) {
        Ok(()) if s.ends_block && cpu.next_code().is_some() => CHAINED,
        // An interrupt that it made pending (a deadline in the past, an IPI to itself) comes before the next instruction.
        Ok(()) if s.ends_block || cpu.event_deliverable() || cpu.rip != s.insn.next_ip() => Left::Event as i32,
        Ok(()) if cpu.mode_is_single() => Left::Event as i32,
        Ok(()) if s.loads_segment && cpu.segment_changed_mode() => Left::Event as i32,
        // It may have stored to the block it is in (a string operation, say): what follows must be translated anew. Or to a
        // device that changed the memory map: what follows stands on checks that hold no longer.
        Ok(()) if (cpu.engine.cache.stats.invalidated, cpu.tlb.shared_checks()) != known => Left::Event as i32,
        Ok(()) => -1,
        Err(stop) => {
            cpu.engine.stop = Some(stop);
            Left::Stop as i32
        }
    }
}

/// An indirect branch in 64-bit code missed the jump table: the host code of the block at RIP, if there is one and nothing
/// needs the dispatcher; else 0. As in the light path of accesses, only xmm0-xmm15 are saved: no memory copies by libc.
pub(crate) extern "C" fn find_code_light(cpu: &mut Vcpu) -> u64 {
    cpu.find_known_code().unwrap_or(0)
}

/// A direct branch has no link: it gets one to the host code of the block at its target, on the same conditions.
pub(crate) extern "C" fn link_code_light(cpu: &mut Vcpu) -> u64 {
    cpu.link_known_code().unwrap_or(0)
}

/// From [`run_sensitive`]: go on at `hot.return_address`, where another block begins.
const CHAINED: i32 = -2;

/// How a step ended that did not fail.
enum Next {
    /// Straight on: no events need to be looked for.
    Block,
    /// An instruction may have changed what can be delivered.
    Events,
}

impl Vcpu {
    /// After an instruction that ended a block: where the next one is, if nothing needs the dispatcher. It becomes the
    /// return address.
    fn next_code(&mut self) -> Option<()> {
        if self.shared.poll.is_set()
            || self.pending_debug != 0
            || self.dr7 & 0xff != 0
            || self.rflags & rflags::TF != 0
            || self.mode_is_single()
            || self.activity != Activity::Running
            || self.hot.direct != 0 && self.cpl() == 3
        {
            return None;
        }
        if self.shadow_shades() {
            return None;
        }
        self.find_next_code()?;
        // There are no breakpoints for it to hold off.
        self.rflags &= !rflags::RF;
        self.interrupt_shadow = false;
        self.debug_shadow = false;
        Some(())
    }

    /// Whether something is pending that only the shadow of STI or MOV SS may hold off, or that nothing does. If not, the
    /// next instruction can run in company: it runs before anything new is looked for.
    fn shadow_shades(&mut self) -> bool {
        let shadows = (std::mem::take(&mut self.interrupt_shadow), std::mem::take(&mut self.debug_shadow));
        let pending = self.event_deliverable();
        (self.interrupt_shadow, self.debug_shadow) = shadows;
        pending
    }

    fn find_next_code(&mut self) -> Option<()> {
        let mode = Mode::of(self);
        let segment = CodeSegment::of(self);
        if !mode.long() {
            if !segment.holds(self.rip, 1) {
                return None;
            }
            self.segments_changed();
        }
        self.hot.return_address = self.engine.cache.jump(mode, jump_key(self.rip, segment))?;
        self.engine.mode = Some(mode);
        Some(())
    }

    /// To be called before code outside 64-bit mode runs, if segments may have changed.
    fn segments_changed(&mut self) {
        self.find_segment_ends();
        let segment = CodeSegment::of(self);
        if std::mem::replace(&mut self.engine.code_segment, segment) == segment {
            return;
        }
        // The jump table goes by mode and base: a mode's blocks at one base must have the same limit. Firmware goes to and fro
        // between real mode and flat segments, both at 0.
        let at = (Mode::of(self), segment.base);
        let limits = &mut self.engine.code_limits;
        if limits.insert(at, segment.limit).is_some_and(|limit| limit != segment.limit) {
            self.engine.cache.jumps.clear(true);
        }
        if self.engine.code_limits.len() > MAX_CODE_SEGMENTS {
            self.engine.code_limits.clear();
            self.engine.cache.jumps.clear(true);
        }
    }

    /// After an instruction that loaded a segment register for a block that goes on: whether it must not.
    fn segment_changed_mode(&mut self) -> bool {
        self.find_segment_ends();
        self.engine.mode != Some(Mode::of(self))
    }

    /// The mode to look for known code in, if any may be entered without the dispatcher.
    fn mode_of_known_code(&self) -> Option<Mode> {
        if self.mode_is_single() || self.shared.poll.is_set() || self.engine.native.brief {
            return None;
        }
        // Not that of the block that ran: STAC and CLAC change it on their way.
        Some(Mode::of(self)).filter(|mode| mode.long())
    }

    /// For [`link_code_light`].
    fn link_known_code(&mut self) -> Option<u64> {
        let mode = self.mode_of_known_code()?;
        let (link, target, parked) = self.engine.cache.find_link(self.hot.return_address, self.near.code_page)?;
        let (gpa, global) = self.fetched(target)?;
        let origin = self.origin(gpa, mode);
        let cache = &mut self.engine.cache;
        let id = cache.find(origin, target)?;
        if cache.second_page(id).is_some() || !cache.has_room_for_link() {
            return None;
        }
        cache.link(link, id, global);
        let entry = cache.entry(id);
        self.rip = target;
        if parked {
            self.unpark();
        }
        self.engine.mode = Some(mode);
        self.hot.branch = 0;
        Some(entry)
    }

    /// For [`find_code_light`].
    fn find_known_code(&mut self) -> Option<u64> {
        let mode = self.mode_of_known_code().filter(|_| canonical(self.rip))?;
        let key = jump_key(self.rip, CodeSegment::FLAT);
        let recalled = self.engine.cache.jumps.recall(mode, key);
        if let Some(entry) = recalled.filter(|entry| !self.engine.cache.leads_out(*entry)) {
            self.engine.cache.stats.lookups += 1;
            self.engine.mode = Some(mode);
            self.hot.branch = 0;
            return Some(entry);
        }
        let (gpa, global) = self.fetched(self.rip)?;
        let origin = self.origin(gpa, mode);
        let cache = &mut self.engine.cache;
        let id = cache.find(origin, self.rip)?;
        // A block across two pages depends on more than this has looked at; a list that grows is copied.
        if cache.second_page(id).is_some() || !cache.jumps.has_room(mode, global) {
            return None;
        }
        cache.enter_jump(id, self.rip, global);
        cache.stats.lookups += 1;
        self.engine.mode = Some(mode);
        self.hot.branch = 0;
        Some(cache.entry(id))
    }

    /// The block that is running was translated to run one instruction.
    pub fn mode_is_single(&self) -> bool {
        self.engine.mode.is_some_and(Mode::is_single)
    }

    /// Runs until the machine has to decide something.
    pub fn run_loop(&mut self) -> Exit {
        loop {
            match self.run_until_stop() {
                Ok(()) => return Exit::Stopped,
                Err(Stop::Exit(exit)) => return exit,
                Err(Stop::Fault(e)) if self.told_by_ferr(e.vector) => self.assert_ferr(),
                Err(Stop::Fault(e)) => {
                    if let Err(Stop::Exit(exit)) = deliver(self, Event::Exception(e)) {
                        return exit;
                    }
                }
            }
        }
    }

    /// `Ok`: someone asked this vCPU to stop. A fault is that of the instruction at `rip`.
    fn run_until_stop(&mut self) -> Result<(), Stop> {
        let mut link: Option<LinkId> = None;
        let mut look_for_events = true;
        loop {
            if look_for_events || self.shared.poll.is_set() {
                link = None;
                self.shared.poll.clear();
                let requests = self.shared.requests.load(std::sync::atomic::Ordering::SeqCst);
                if requests & request::INVALIDATE != 0 {
                    self.take_invalidations();
                }
                if requests & request::MAP != 0 {
                    self.shared.requests.fetch_and(!request::MAP, std::sync::atomic::Ordering::SeqCst);
                    self.follow_map();
                }
                if requests & request::STOP != 0 {
                    self.shared.requests.fetch_and(!request::STOP, std::sync::atomic::Ordering::SeqCst);
                    return Ok(());
                }
                self.review_checks();
                if self.event_deliverable() {
                    self.take_events()?;
                }
                if self.activity != Activity::Running {
                    self.halt();
                    continue;
                }
            }
            if self.native_is_due() {
                link = None;
                self.run_natively()?;
                look_for_events = true;
                continue;
            }
            look_for_events = match self.step(&mut link)? {
                Next::Block => false,
                Next::Events => true,
            };
        }
    }

    /// Enters one block and follows links until something needs the dispatcher.
    fn step(&mut self, link: &mut Option<LinkId>) -> Result<Next, Stop> {
        let stepping = self.rflags & rflags::TF != 0;
        let breakpoints = self.dr7 & 0xff != 0;
        let single = stepping || breakpoints || self.interrupt_shadow && self.shadow_shades();
        let mut mode = Mode::of(self);
        if single {
            mode = mode.single();
            self.begin_single_step()?;
        }
        if let Some(failed) = self.engine.careful.take() {
            mode = mode.careful();
            if failed.is_careful() {
                mode = mode.careful();
            }
        }
        if !mode.long() {
            self.segments_changed();
        }
        let shadowed = self.interrupt_shadow;
        let code = match self.entered_before(mode, link) {
            Some(code) => code,
            None => {
                let Reached { id, global, first_global } = self.find_block(mode)?;
                let cache = &mut self.engine.cache;
                let branch = link.take();
                // What a branch is linked to is mostly reached by nothing else; if it is, it is found then.
                if branch.is_none() {
                    cache.enter_jump(id, self.rip, first_global);
                }
                for link in [branch, self.engine.failed_check.take()].into_iter().flatten() {
                    cache.link(link, id, global);
                }
                cache.entry(id)
            }
        };
        self.engine.mode = Some(mode);
        self.hot.tsc_offset = self.machine.time.tsc_offset().unwrap_or_default();
        self.shared.invalidations.set_running(true);
        // A request made before `running` was seen must be taken before the block may run on what it changes.
        if self.shared.poll.is_set() {
            self.shared.invalidations.set_running(false);
            return Ok(Next::Events);
        }
        if shadowed {
            // The shadow covers the one instruction that runs now.
            self.interrupt_shadow = false;
            self.debug_shadow = false;
        }
        self.rflags &= !rflags::RF;
        self.engine.delivered = false;
        self.hot.branch = 0;
        let brief = self.engine.native.brief;
        if brief {
            self.shared.poll.miss_all();
        }
        // SAFETY: the block is live, was made for this vCPU's memory and its present mode, and code memory outlives the call.
        let left = unsafe { enter(self, code) };
        if brief {
            self.engine.native.brief = false;
            self.shared.poll.miss_none();
        }
        self.shared.invalidations.set_running(false);
        if self.hot.branch != 0
            && !self.fetchable(self.rip)
            && let Some(at) = self.engine.cache.last_instruction(self.hot.branch, self.near.code_page)
        {
            return Err(self.branch_fault(at));
        }
        // No trap follows INT n and its like, nor a fault of theirs: TF is off in the handler already. That of a load of SS is
        // lost.
        if stepping
            && !self.debug_shadow
            && !matches!(left, Left::Stop | Left::Signal | Left::Careful | Left::Stale)
            && !self.engine.delivered
        {
            self.pending_debug |= debug::DR6_BS;
        }
        self.engine.counts.left[left as usize] += 1;
        match left {
            Left::Link => {
                self.set_link_target(link);
                Ok(Next::Block)
            }
            Left::Lookup => {
                self.engine.cache.stats.lookups += 1;
                Ok(Next::Block)
            }
            Left::Event => Ok(Next::Events),
            Left::Careful => {
                // The same instruction again. It may stand in the shadow of an STI that was emitted inline.
                self.interrupt_shadow = self.rflags & rflags::IF != 0;
                Ok(Next::Block)
            }
            Left::Stale => {
                self.drop_stale_block();
                // None of its instructions has run, perhaps not the one behind an STI.
                self.interrupt_shadow = self.rflags & rflags::IF != 0;
                Ok(Next::Block)
            }
            Left::Stop => Err(self.take_stop()),
            Left::Signal => Err(self.signal_stop()),
        }
    }

    /// The host code for RIP, where emitted code would find it as well and nothing is to be linked to it: handlers of
    /// exceptions begin here again and again.
    fn entered_before(&self, mode: Mode, link: &Option<LinkId>) -> Option<u64> {
        if !mode.long() || link.is_some() || self.engine.failed_check.is_some() {
            return None;
        }
        self.engine.cache.jump(mode, jump_key(self.rip, CodeSegment::FLAT))
    }

    /// Whether RIP may be this: canonical, or within the code segment.
    pub fn fetchable(&self, rip: u64) -> bool {
        if self.code64() { canonical(rip) } else { CodeSegment::of(self).holds(rip, 1) }
    }

    /// An indirect branch or return whose target isn't canonical or is outside the code segment raises #GP itself, before the stack
    /// pointer has moved (Intel SDM 2A, CALL; 2B, RET). Emitted code looks only at the table of known targets, so this
    /// undoes the branch.
    fn branch_fault(&mut self, at: u64) -> Stop {
        use iced_x86::Mnemonic;
        let mut bytes = [0; 15];
        for (i, byte) in bytes.iter_mut().enumerate() {
            match self.fetch_address(self.linear_code(at.wrapping_add(i as u64))) {
                Ok((gpa, _)) => self.phys_read(gpa, std::slice::from_mut(byte)),
                Err(_) => break, // the instruction ends before
            }
        }
        let insn = crate::access::decode(&bytes, Mode::of(self), at);
        let size = crate::semantics::stack::operand_size(&insn) as u64;
        let moved = match insn.mnemonic() {
            Mnemonic::Ret if insn.op_count() == 1 => size + u64::from(insn.immediate16()),
            Mnemonic::Ret => size,
            Mnemonic::Call => size.wrapping_neg(),
            _ => 0,
        };
        let rsp = &mut self.gpr[arch::registers::gpr::RSP];
        let before = rsp.wrapping_sub(moved);
        *rsp = match self.engine.mode.map_or(64, Mode::stack_bits) {
            16 => *rsp & !0xffff | before & 0xffff,
            32 => before & 0xffff_ffff,
            _ => before,
        };
        self.insn_rip = at;
        self.rip = at;
        Exception::general_protection(0).into()
    }

    /// After [`Left::Link`]: the branch's target becomes RIP, and the stub will be linked to its block.
    fn set_link_target(&mut self, link: &mut Option<LinkId>) {
        if let Some((site, target, parked)) = self.engine.cache.find_link(self.hot.return_address, self.near.code_page)
        {
            self.rip = target;
            if parked {
                self.unpark();
            }
            *link = Some(site);
        }
    }

    fn take_stop(&mut self) -> Stop {
        match self.engine.stop.take() {
            Some(Stop::Fault(e)) => {
                self.rip = self.insn_rip;
                Stop::Fault(e)
            }
            Some(stop) => stop,
            None => Stop::Exit(Exit::Failed("emitted code stopped without saying why".into())),
        }
    }

    /// Instruction breakpoints, before an instruction runs by itself (Intel SDM 3B 17.3.1.1); on the one behind MOV SS or POP
    /// SS they count for nothing (3A 6.8.3).
    fn begin_single_step(&mut self) -> Result<(), Stop> {
        if self.dr7 & 0xff == 0 || self.rflags & rflags::RF != 0 || self.debug_shadow {
            return Ok(());
        }
        let at = self.linear_rip();
        let hit = (0..4)
            .filter(|i| self.dr7 >> (2 * i) & 3 != 0 && self.dr7 >> (16 + 4 * i) & 3 == 0 && self.dr[*i as usize] == at)
            .fold(0, |bits, i| bits | 1 << i);
        if hit == 0 { Ok(()) } else { Err(Stop::Fault(Exception::debug(hit))) }
    }

    pub fn linear_rip(&self) -> u64 {
        self.linear_code(self.rip)
    }

    pub fn linear_code(&self, rip: u64) -> u64 {
        if self.code64() { rip } else { self.seg(SegmentRegister::Cs).base.wrapping_add(rip) & 0xffff_ffff }
    }

    /// Counts a detour to careful code. True if they come so fast that the present one's block is better off without groups.
    pub fn detoured_enough(&mut self) -> bool {
        self.hot.detours -= 1;
        if self.hot.detours >= 0 {
            return false;
        }
        let now = crate::host::rdtsc();
        self.hot.detours = DETOURS;
        now.wrapping_sub(std::mem::replace(&mut self.engine.detoured, now)) < SOON
    }

    /// What a host signal in emitted code means for the guest.
    fn signal_stop(&mut self) -> Stop {
        let (pc, trap) = (self.hot.signal_pc, self.hot.signal_code);
        let Some((insn, _, parked)) = self.instruction_at(pc, self.near.code_page) else {
            return Stop::Exit(Exit::Failed(format!(
                "host trap {trap} at {pc:#x} in emitted code of no known instruction"
            )));
        };
        if parked {
            self.unpark();
        }
        self.insn_rip = insn.ip();
        self.rip = insn.ip();
        if crate::codegen::reencode::lends(&insn) {
            self.gpr[arch::registers::gpr::RDI] = self.hot.lent;
        }
        let exception = match trap {
            0 => Exception::new(Vector::DivideError),
            6 => Exception::invalid_opcode(),
            12 => Exception::with_code(Vector::StackFault, 0),
            13 => {
                use iced_x86::Mnemonic::{Call, Leave, Pop, Push, Ret};
                let memory = crate::codegen::classify::access_operand(&insn).is_some();
                let implicit = !memory && matches!(insn.mnemonic(), Call | Leave | Pop | Push | Ret);
                let explicit = crate::codegen::classify::access_operand(&insn).is_some_and(|operand| {
                    let (segment, offset) = self.effective_address(&insn, operand);
                    segment == SegmentRegister::Ss && !canonical(offset)
                });
                let stack = implicit || explicit;
                Exception::with_code(if stack { Vector::StackFault } else { Vector::GeneralProtection }, 0)
            }
            16 => Exception::new(Vector::X87FloatingPoint),
            19 if self.cr4 & arch::registers::cr4::OSXMMEXCPT == 0 => Exception::invalid_opcode(),
            19 => Exception::new(Vector::SimdFloatingPoint),
            _ => {
                let address = self.hot.signal_address;
                return Stop::Exit(Exit::Failed(format!(
                    "guest instruction at {:#x} ({insn}) made host trap {trap} at address {address:#x}; if it is 14, the \
                     host may be out of memory for the guest's RAM",
                    insn.ip()
                )));
            }
        };
        Stop::Fault(exception)
    }

    /// The guest instruction whose operation is at a host address; `page`: where it ran if its block is relative.
    pub fn instruction_at(&self, pc: u64, page: u64) -> Option<Found> {
        if let Some(found) = self.engine.cache.instruction_at(pc, page) {
            return Some(found);
        }
        // The copy of a bounced instruction.
        let site = self.site_at(self.engine.cache.snippets.site(pc)?)?;
        Some((site.insn, site.bytes, site.parked))
    }
}

#[cfg(test)]
mod tests;
