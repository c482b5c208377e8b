//! Runs cases on both sides and reports where they disagree.
//!
//! Environment: `DIFF_SEED` (default fixed, so that CI runs the same cases every time), `DIFF_CASES` (how many), `DIFF_FIRST`
//! (number of the first), `DIFF_ONLY` (a mnemonic or iced form name), `DIFF_SHOW` (most mismatches shown in full).

use std::collections::BTreeMap;

use iced_x86::Mnemonic;

use crate::case::{self, Outcome, Status, describe, describe_vectors, differences, template};
use crate::generate::{Case, Generator};
use crate::guest::{Guest, How};
use crate::layout::{SEGMENT_SLOTS, SLOTS};
use crate::native::Native;
use crate::sequence::Sequences;

/// The seed of CI.
pub const SEED: u64 = 20_241_122;

/// What to run.
pub struct Plan {
    pub seed: u64,
    pub first: u64,
    pub cases: u64,
    pub only: Option<String>,
    pub show: usize,
    pub how: How,
}

impl Plan {
    /// From the environment, with a default number of cases.
    pub fn from_env(cases: u64) -> Self {
        let number = |name: &str, default: u64| match std::env::var(name) {
            Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {text:?}")),
            Err(_) => default,
        };
        Plan {
            seed: number("DIFF_SEED", SEED),
            first: number("DIFF_FIRST", 0),
            cases: number("DIFF_CASES", cases),
            only: std::env::var("DIFF_ONLY").ok(),
            show: number("DIFF_SHOW", 40) as usize,
            how: How::Named,
        }
    }

    /// The same cases, run otherwise.
    pub fn run(self, how: How) -> Self {
        Plan { how, ..self }
    }
}

/// What came out.
#[derive(Default)]
pub struct Report {
    pub cases: u64,
    pub mismatches: u64,
    /// By exception vector, how many cases ended in it natively.
    pub vectors: BTreeMap<u8, u64>,
    /// By first instruction form, how many cases disagreed.
    pub forms: BTreeMap<String, u64>,
    /// Full reports of the first ones.
    pub shown: Vec<String>,
    /// Cases that the native side could not finish.
    pub died: u64,
    /// The same of those that stood still, on AMD's processors. A far call from a segment to 64-bit code pushes onto a stack pointer
    /// whose upper half is the host's kernel's (see `Ignore::narrow_stack`), and Linux takes that page fault for an erratum
    /// (is_errata100): it returns from it for ever. On a virtual EPYC, one sequence in ten thousand does not get past its first
    /// instruction, with no time spent in the kernel, unless a debugger steps it; why is not known.
    pub hung: u64,
    /// How often cases were entered directly.
    pub entered_directly: u64,
}

impl Report {
    /// A text with everything found.
    pub fn text(&self) -> String {
        let mut text = self.shown.join("\n");
        text += &format!(
            "{} mismatches in {} cases ({} died natively, {} hung)\n",
            self.mismatches, self.cases, self.died, self.hung
        );
        text += &format!("ended in vectors: {:?}\n", self.vectors);
        let mut forms: Vec<_> = self.forms.iter().collect();
        forms.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
        for (form, n) in forms {
            text += &format!("{n:6} {form}\n");
        }
        text
    }
}

/// Single instructions of `bits`-bit code.
pub fn instructions(plan: &Plan, bits: u32) -> Report {
    instructions_of(plan, Generator::new(plan.seed, bits, plan.only.clone()), SLOTS)
}

/// Single instructions of `bits`-bit code in segments of a local descriptor table, with bases, limits and types.
pub fn segmented_instructions(plan: &Plan, bits: u32) -> Report {
    instructions_of(plan, Generator::segmented(plan.seed, bits, plan.only.clone()), SEGMENT_SLOTS)
}

fn instructions_of(plan: &Plan, generator: Generator, slots: usize) -> Report {
    let bits = generator.bits();
    let coverage = generator.coverage();
    println!(
        "{bits}-bit code: {} forms compared, {} not supported by this host, {} excluded",
        coverage.forms,
        coverage.unsupported,
        coverage.excluded.len()
    );
    run(plan, slots, |index| generator.case(index))
}

/// Sequences of `bits`-bit code.
pub fn sequences(plan: &Plan, bits: u32) -> Report {
    let sequences = Sequences::new(plan.seed, bits);
    run(plan, SLOTS, |index| sequences.case(index))
}

fn run(plan: &Plan, slots: usize, make: impl Fn(u64) -> Case) -> Report {
    let template = template(plan.seed);
    let mut native = Native::new(template.clone(), slots == SEGMENT_SLOTS).expect("a native child process");
    let mut guest = Guest::new(template, plan.how);
    let mut report = Report::default();
    let end = plan.first + plan.cases;
    let mut next = plan.first;
    while next < end {
        let count = (end - next).min(slots as u64 - next % slots as u64);
        let cases: Vec<Case> = (next..next + count).map(&make).collect();
        let inputs: Vec<_> = cases.iter().map(|c| (*c.input).clone()).collect();
        let natives = native.run(&inputs).expect("a native child process");
        guest.load(if slots == SEGMENT_SLOTS { &[] } else { &inputs });
        for (case, native) in cases.iter().zip(natives) {
            // ENTER that faults at its end has copied frame pointers, over others maybe: to do it once more, as translated code
            // does after the process has, is seen, as it would be after a fault that the host handles.
            if plan.how == How::Directly && case.instruction().mnemonic() == Mnemonic::Enter {
                continue;
            }
            report.cases += 1;
            if native.status != Status::Exception {
                match native.status == Status::Hung && translator::host_is_amd() {
                    true => report.hung += 1,
                    false => report.died += 1,
                }
                report.shown.push(format!(
                    "case {}: the native process died\n{}{}",
                    case.index,
                    case.disassemble(),
                    describe(&case.input)
                ));
                continue;
            }
            *report.vectors.entry(native.vector).or_default() += 1;
            if slots == SEGMENT_SLOTS {
                // Small offsets are code everywhere: what a case jumps to has to be as it is natively, INT3.
                guest.load_alone(&case.input);
            }
            let outcome = guest.run(&case.input);
            let found = differences(native, outcome, case.ignore);
            if !found.is_empty() {
                report.mismatches += 1;
                *report.forms.entry(format!("{:?}", case.instruction().code())).or_default() += 1;
                if report.shown.len() < plan.show {
                    let text = full_report(plan.seed, case, native, &found);
                    report.shown.push(format!("{text}{}\n", guest.note));
                }
            }
            if outcome_is_fatal(guest.last()) {
                report.entered_directly += guest.entered_directly();
                guest = Guest::new(case::template(plan.seed), plan.how);
                guest.load(if slots == SEGMENT_SLOTS { &[] } else { &inputs });
            }
        }
        next += count;
    }
    report.entered_directly += guest.entered_directly();
    report
}

/// After a case that the guest did not end, the vCPU is made anew.
fn outcome_is_fatal(outcome: &Outcome) -> bool {
    outcome.status != Status::Exception
}

fn full_report(seed: u64, case: &Case, native: &Outcome, found: &str) -> String {
    format!(
        "case {} (DIFF_SEED={seed} DIFF_FIRST={} DIFF_CASES=1), {}-bit\n{}{}{}native: vector {} error {:x} cr2 {:x} rip {:x} rflags {:x}\n{found}",
        case.index,
        case.index,
        case.bits,
        case.disassemble(),
        describe(&case.input),
        if std::env::var("DIFF_VECTORS").is_ok() { describe_vectors(&case.input) } else { String::new() },
        native.vector,
        native.error,
        native.cr2,
        native.rip,
        native.rflags,
    )
}
