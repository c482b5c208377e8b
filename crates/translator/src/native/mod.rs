//! Direct execution: programs' code runs as it is, on the host's processor, where that pays.
//!
//! User-mode code of a 64-bit guest needs no translation for what it computes, only an address space. So each of the guest's
//! address spaces may have a process of the host ([`direct::Space`]) in which the same addresses lead to the same pages of the
//! guest's RAM; a [`Shadow`] is what is mapped there. A program that runs there stops with its first system call, page fault or
//! exception, and when an interrupt is due: then its registers come back here, and translated code goes on from that very
//! instruction, which raises what it has to raise. All of the kernel's code is translated.
//!
//! To go there and come back takes some microseconds, so that it pays only for programs that compute for longer at a time: an
//! [`Account`](account::Account) tells for each address space.
//!
//! What may run there: see [`Vcpu::may_run_natively`] and [`direct::sensitive`]. What is mapped there follows the guest's page
//! tables as a TLB does: a page is mapped when it is first used, and forgotten when INVLPG or CR3 says so. After a flush of
//! everything what is mapped is compared with the tables instead of being dropped ([`Shadow::stale`]). Pages that hold
//! translated code are not writable there; those whose code runs there are watched like translated code.

mod account;
mod pages;
mod shadow;
mod state;

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arch::registers::{cr0, cr4, debug, efer, rflags, xcr0};
use arch::state::{Segment, SegmentRegister};
use direct::{Space, Stop as Left, USER_END};
use engine::Exit;
use memory::PAGE_SIZE;
use rustc_hash::FxHashSet;

use crate::cpu::{Context, Stop, Vcpu};
use crate::mmu::walk::ADDRESS;
use account::{Accounts, Now};
use shadow::Shadow;

/// When programs run directly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    Never,
    /// Where it pays.
    #[default]
    Auto,
    /// Wherever it is possible, if only for one instruction: for tests.
    Always,
}

/// Address spaces that have a process at a time.
const SHADOWS: usize = 8;
/// A program that so often in a row had a page fault within so many microseconds touches one new page after the other: translated
/// code goes on from the next one to the next jump, and the next, since a fault takes a sixth of the time there.
const FAULTS: u32 = 2;
const SOON_US: u64 = 10;
/// Pages that are mapped at once after that.
const MOST_AWAITED: usize = 256;
/// A program that runs for longer at a time is asked for how much of that it had the processor.
const LONG_US: u64 = 100;
/// So many times in a row a program may leave code that is barred at once.
const MOST_BARRED: u32 = 32;
/// The selectors that programs have, of Linux guests as of the Linux host: what they read of them is the same.
const CS: Segment = Segment::flat_code(0x33, true, 3);
const SS: Segment = Segment::flat_data(0x2b, 3);

/// What direct execution of one vCPU did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub entries: u64,
    pub system_calls: u64,
    pub page_faults: u64,
    pub pages_mapped: u64,
    pub others: u64,
    pub comparisons: u64,
    pub processes: u64,
    /// By the host's time-stamp counter: what programs ran directly, and what their mappings took.
    pub ran: u64,
    pub mapping: u64,
    pub page_stops: u64,
}

/// Direct execution of one vCPU.
#[derive(Default)]
pub struct Native {
    shadows: Vec<Shadow>,
    accounts: Accounts,
    /// The host can't do it.
    refused: bool,
    /// The next instruction is the translator's.
    owed: bool,
    /// Translated code is to come back soon: the program has more that can run directly.
    pub brief: bool,
    /// What the guest had page faults for since programs ran last: it is about to map these pages.
    awaited: Vec<u64>,
    /// The last one has yet to be returned from.
    faulted: bool,
    /// Page faults soon after the program began to run, in a row.
    faults: u32,
    clock: u64,
    /// How often in a row the program was found in code that may not run directly.
    barred: u32,
    /// Frames that may be mapped writable, and executable, in some shadow.
    writable: FxHashSet<u64>,
    executable: FxHashSet<u64>,
    pub counts: Counts,
    /// The entries that the machine's number has already.
    reported: u64,
}

impl Vcpu {
    /// Whether the program at RIP can run directly. What it could read or do otherwise than on its own processor is excluded
    /// here, or by its bytes ([`direct::sensitive`]):
    ///
    /// - selectors are readable by MOV and PUSH, and must be those that the host gives;
    /// - PUSHF shows IF and IOPL; TF and breakpoints are the translator's;
    /// - the descriptor tables that SLDT, VERR and VERW go by are the host's: there must be no LDT;
    /// - FSGSBASE works natively if the host's kernel is new enough, so it has to for the guest;
    /// - the vector state must be all that the host has (XSAVE and its like are excluded by their bytes).
    fn may_run_natively(&self) -> bool {
        let kept = rflags::TF | rflags::IF | rflags::IOPL | rflags::VM | rflags::NT | rflags::ID;
        let data = [SegmentRegister::Ds, SegmentRegister::Es, SegmentRegister::Fs, SegmentRegister::Gs];
        let base = |s| self.seg(s).base < USER_END;
        *self.seg(SegmentRegister::Cs) == CS
            && *self.seg(SegmentRegister::Ss) == SS
            && self.msrs.efer & (efer::LMA | efer::SCE) == efer::LMA | efer::SCE
            && data.iter().all(|&s| self.seg(s).selector == 0)
            && base(SegmentRegister::Fs)
            && base(SegmentRegister::Gs)
            && self.ldtr.selector == 0
            && self.rflags & kept == rflags::IF
            && (self.rflags & rflags::AC == 0 || self.cr0 & cr0::AM != 0)
            && self.dr7 & 0xff == 0
            && self.pending_debug == 0
            && !self.interrupt_shadow
            && self.cr0 & (cr0::EM | cr0::TS | cr0::NE) == cr0::NE
            && self.cr4 & NEEDED == NEEDED
            && self.xcr0 & !xcr0::PKRU == crate::xstate::layout().native
            && self.rip < USER_END
    }

    /// Whether the program at RIP is to run directly now.
    pub fn native_is_due(&mut self) -> bool {
        if self.hot.direct == 0 || self.cpl() != 3 || std::mem::take(&mut self.engine.native.owed) {
            return false;
        }
        let native = &mut self.engine.native;
        if std::mem::take(&mut native.faulted) && native.faults >= FAULTS {
            native.brief = true;
            return false;
        }
        self.may_run_natively() && !self.reserved_is_mapped()
    }

    /// The guest is told of a page fault.
    pub fn page_fault_delivered(&mut self) {
        let native = &mut self.engine.native;
        if self.hot.direct == 0 || self.cr2 >= USER_END {
            return;
        }
        native.faulted = true;
        if native.awaited.len() < MOST_AWAITED {
            native.awaited.push(self.cr2 & !(PAGE_SIZE - 1));
        }
    }

    /// Runs the program at RIP directly until something is the translator's.
    pub fn run_natively(&mut self) -> Result<(), Stop> {
        let Some(index) = self.shadow() else { return Ok(()) };
        self.engine.native.owed = true;
        if self.engine.native.shadows[index].bars(self.rip) {
            // Where it stays in such code it has all the time that translated code takes until its next interrupt.
            let native = &mut self.engine.native;
            native.barred += 1;
            native.brief = native.barred < MOST_BARRED;
            return Ok(());
        }
        self.engine.native.barred = 0;
        if self.engine.native.shadows[index].stale {
            let before = crate::host::rdtsc();
            self.compare_pages(index);
            self.engine.native.accounts.pay(crate::host::rdtsc().wrapping_sub(before));
        }
        for page in std::mem::take(&mut self.engine.native.awaited) {
            self.map_awaited(index, page);
        }
        self.engine.native.shadows[index].relieve(self.machine.time.tsc_hz());
        let own_tsc =
            self.machine.time.tsc_offset() != Some(0) || self.msrs.tsc_adjust != 0 || self.cr4 & cr4::TSD != 0;
        self.engine.native.shadows[index].space.fault_tsc(own_tsc);
        let mut registers = self.program_registers();
        self.load_vector_state(index)?;
        self.engine.native.counts.entries += 1;
        self.shared.invalidations.set_running(true);
        self.shared.poll.watch(self.engine.native.shadows[index].space.kicker());
        let mut ran = 0;
        let left = loop {
            // A request made before the process could be stopped.
            if self.shared.poll.is_set() {
                break Ok(Left::Kicked);
            }
            let asked = crate::host::rdtsc();
            let applied = self.engine.native.shadows[index].space.apply();
            let before = crate::host::rdtsc();
            let left = applied.and_then(|()| self.engine.native.shadows[index].space.run(&mut registers));
            let took = crate::host::rdtsc().wrapping_sub(before);
            self.engine.native.accounts.pay(before.wrapping_sub(asked));
            self.engine.native.counts.mapping += before.wrapping_sub(asked);
            self.engine.native.counts.ran += took;
            self.engine.native.counts.page_stops += u64::from(matches!(left, Ok(Left::Page { .. })));
            let why = match left {
                Ok(Left::Page { address }) => self.program_faulted(index, address, registers.rip),
                Err(direct::Error::Full) if self.engine.native.shadows[index].has_many() => {
                    self.engine.native.shadows[index].clear();
                    account::Reason::Page
                }
                Err(direct::Error::Full) => {
                    self.refuse_native("the host allows too little address space to a process");
                    break Ok(Left::Kicked);
                }
                // What the program gave itself where it stopped for a page: bases and selectors that no process can begin
                // with. It goes on translated.
                Err(direct::Error::Registers(_)) => break Ok(Left::Kicked),
                Ok(Left::Syscall | Left::Kicked) => account::Reason::Kernel,
                _ => account::Reason::Fault,
            };
            let earned = self.processor_time(index, took);
            self.engine.native.accounts.ran(earned, why);
            ran += took;
            if !matches!(why, account::Reason::Page | account::Reason::Change) {
                break left;
            }
        };
        self.shared.poll.unwatch();
        self.shared.invalidations.set_running(false);
        let left = left.map_err(|e| failed(&e))?;
        self.take_program_registers(&registers);
        self.take_vector_state(index)?;
        if left == Left::Guard {
            self.engine.native.shadows[index].hit(self.rip);
        }
        if self.rflags & rflags::ID != 0 {
            // POPF sets it, but nothing of ptrace's clears it: the next program there would begin with it.
            self.engine.native.shadows.swap_remove(index);
        }
        // What a test asks for must not depend on how fast the host is.
        let auto = self.machine.config.direct == Mode::Auto;
        let soon = self.engine.native.accounts.switch() as u64 + SOON_US * self.machine.time.tsc_hz() / 1_000_000;
        let soon = auto && matches!(left, Left::Page { .. }) && ran < soon;
        self.engine.native.faults = if soon { self.engine.native.faults + 1 } else { 0 };
        self.account_for(left);
        Ok(())
    }

    /// Of the ticks that a program ran for by the clock, those in which it had the processor: the host may have given it to
    /// others.
    fn processor_time(&mut self, index: usize, took: u64) -> u64 {
        let hz = self.machine.time.tsc_hz();
        let shadow = &mut self.engine.native.shadows[index];
        if took < LONG_US * (hz / 1_000_000) {
            shadow.short += took;
            return took;
        }
        let worked = in_ticks(shadow.space.processor_time(), hz);
        let since = worked.saturating_sub(std::mem::replace(&mut shadow.worked, worked));
        took.min(since.saturating_sub(std::mem::take(&mut shadow.short)))
    }

    /// Sees to it that what made the program stop is what the translator does next.
    fn account_for(&mut self, left: Left) {
        match left {
            Left::Kicked => self.engine.native.owed = false,
            Left::Page { .. } => {
                self.engine.native.brief = true;
                self.engine.native.counts.page_faults += 1;
            }
            Left::Syscall => {
                // RCX and R11, which the host's SYSCALL has overwritten, the guest's will overwrite as well.
                self.rip = self.rip.wrapping_sub(2);
                self.engine.native.counts.system_calls += 1;
            }
            Left::Step => {
                self.pending_debug |= debug::DR6_BS;
                self.engine.native.owed = false;
            }
            Left::Breakpoint => {
                self.engine.native.counts.others += 1;
                self.rip = self.breakpoint_before(self.rip);
            }
            Left::Guard => {
                self.engine.native.brief = true;
                self.engine.native.counts.others += 1;
            }
            Left::Exception { signal } => {
                if signal == libc::SIGTRAP {
                    self.rip = self.int1_at(self.rip);
                }
                self.engine.native.brief = true;
                self.engine.native.counts.others += 1;
            }
        }
        if self.machine.config.direct == Mode::Auto && self.engine.native.accounts.is_empty() {
            self.hot.direct = 0;
        }
    }

    /// Where the breakpoint instruction begins that ends here: INT3 has one byte, or two as INT 3.
    fn breakpoint_before(&mut self, end: u64) -> u64 {
        end.wrapping_sub(if self.follows(end, 0xcc) { 1 } else { 2 })
    }

    /// Where the INT1 is that the processor has stopped for: right before `rip`, as it is a trap, or there, as virtual machines
    /// on AMD's processors have it.
    fn int1_at(&mut self, rip: u64) -> u64 {
        rip.wrapping_sub(u64::from(self.follows(rip, 0xf1)))
    }

    /// Whether the program has this byte right before an address.
    fn follows(&mut self, address: u64, byte: u8) -> bool {
        let mut before = [0];
        self.read_linear(address.wrapping_sub(1), &mut before, Context::User).is_ok() && before == [byte]
    }

    /// An interrupt came while a program ran: it is one that computes.
    pub fn program_interrupted(&mut self) {
        if self.machine.config.direct != Mode::Auto || self.engine.native.refused || !self.code64() {
            return;
        }
        let hz = self.machine.time.tsc_hz();
        let process = self.process_number();
        let left = self.hot.returns + self.engine.counts.left[crate::entry::Left::Stop as usize];
        let now = Now { clock: crate::host::rdtsc(), worked: in_ticks(direct::thread_time(), hz), left };
        let on = self.engine.native.accounts.tick(self.cr3, process, now, hz);
        self.hot.direct = u64::from(on);
    }

    /// A number that tells processes apart which have the same CR3 one after the other: of the tables that its table for programs'
    /// addresses leads to.
    fn process_number(&self) -> u64 {
        let table = self.cr3 & ADDRESS;
        let entries = (0..256).map(|i| self.phys_read_u64(table + i * 8) & ADDRESS);
        entries.fold(0, |number: u64, entry| number.rotate_left(5) ^ entry)
    }

    /// Lets the host put this thread where it likes: it is about to wait, or does not run programs directly now.
    pub fn rest_native(&mut self) {
        if let Some(shadow) = self.engine.native.shadows.first_mut() {
            shadow.space.rest();
        }
    }

    /// CR3 has another value.
    pub fn native_switched(&mut self) {
        if self.machine.config.direct == Mode::Auto {
            self.hot.direct = u64::from(self.engine.native.accounts.select(self.cr3));
        }
    }

    /// The shadow of the current address space.
    fn shadow(&mut self) -> Option<usize> {
        let native = &mut self.engine.native;
        native.clock += 1;
        if let Some(index) = native.shadows.iter().position(|s| s.cr3 == self.cr3) {
            native.shadows[index].used = native.clock;
            return Some(index);
        }
        if native.refused {
            return None;
        }
        if native.shadows.len() == SHADOWS {
            let oldest = (0..SHADOWS).min_by_key(|&i| native.shadows[i].used).unwrap_or_default();
            native.shadows[oldest].reuse(self.cr3, native.clock);
            return Some(oldest);
        }
        let hz = self.machine.time.tsc_hz();
        match Space::new(self.machine.ram.file()) {
            Ok(space) => {
                native.counts.processes += 1;
                native.accounts.stops_take(in_ticks(Space::stop_time(), hz));
                native.shadows.push(Shadow::new(space, self.cr3, native.clock));
                Some(native.shadows.len() - 1)
            }
            Err(e) => {
                self.refuse_native(&e.to_string());
                None
            }
        }
    }

    /// From here on all programs are translated.
    fn refuse_native(&mut self, why: &str) {
        tracing::info!("vCPU {} runs all programs translated: {why}", self.id);
        self.engine.native.refused = true;
        self.hot.direct = 0;
    }

    /// Ends the processes: they belong to the thread that made them.
    pub fn end_native(&mut self) {
        let entries = self.engine.native.counts.entries;
        let before = std::mem::replace(&mut self.engine.native.reported, entries);
        self.machine.entered_directly.fetch_add(entries - before, Ordering::Relaxed);
        self.engine.native.shadows.clear();
        self.engine.native.writable.clear();
        self.engine.native.executable.clear();
    }
}

const NEEDED: u64 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;

/// A time in ticks of the time-stamp counter.
fn in_ticks(time: Duration, hz: u64) -> u64 {
    (time.as_nanos() * u128::from(hz) / 1_000_000_000) as u64
}

fn failed(e: &direct::Error) -> Stop {
    Stop::Exit(Exit::Failed(format!("direct execution: {e}")))
}

/// What was flushed, or is to be seen.
impl Native {
    /// Everything may have changed: all address spaces, or those with a PCID.
    pub fn flushed(&mut self, pcid: Option<u64>) {
        for shadow in &mut self.shadows {
            shadow.stale |= pcid.is_none_or(|pcid| shadow.cr3 & 0xfff == pcid);
        }
    }

    /// INVLPG in an address space.
    pub fn page_flushed(&mut self, cr3: u64, va: u64) {
        if let Some(shadow) = self.shadows.iter_mut().find(|s| s.cr3 == cr3) {
            shadow.flush_page(va);
        }
    }

    /// Stores to these frames must not go unnoticed any more.
    pub fn protect(&mut self, frames: Range<u64>) {
        if self.writable.is_empty() {
            return;
        }
        for frame in frames.step_by(PAGE_SIZE as usize) {
            if self.writable.remove(&frame) {
                self.shadows.iter_mut().for_each(|s| s.protect(frame));
            }
        }
    }

    /// Whether code of this frame may run directly without having been looked at since.
    pub fn executes(&self, frame: u64) -> bool {
        !self.executable.is_empty() && self.executable.contains(&frame)
    }

    /// A frame was written whose code may be mapped.
    pub fn code_written(&mut self, frame: u64) {
        if self.executable.remove(&frame) {
            self.shadows.iter_mut().for_each(|s| s.drop_code(frame));
        }
    }
}
