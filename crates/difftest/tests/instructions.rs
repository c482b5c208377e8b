//! Every instruction form that iced can encode and the host supports, with edge-case operands: the translator against the real
//! processor. See `difftest::compare` for the environment variables, `difftest::generate::exclude` for what is left out.

use difftest::compare::{Plan, Report, instructions, segmented_instructions};
use difftest::guest::How;

/// Of 64-bit and 32-bit code together: what CI promises.
const CASES_64: u64 = 240_000;
const CASES_32: u64 = 80_000;
/// Of 64-bit code that runs directly: each costs a process of the host.
const CASES_DIRECT: u64 = 12_000;
/// Of 64-bit code, and of 16-bit code in segments, that looks at its bytes itself.
const CASES_CHECKED: u64 = 20_000;
/// Of 16- and of 32-bit code in segments with bases and limits.
const CASES_SEGMENTED: u64 = 30_000;

fn check(report: Report) {
    print!("{}", report.text());
    assert_eq!((report.mismatches, report.died), (0, 0), "the translator disagrees with the processor");
    assert!(report.hung <= 1 + report.cases / 1000, "{} cases never ended natively", report.hung);
}

#[test]
fn instructions_of_64_bit_code_do_what_the_processor_does() {
    check(instructions(&Plan::from_env(CASES_64), 64));
}

/// Most of them can: what is left to translated code are instructions that would tell of the host, and flags such as TF.
#[test]
fn instructions_that_run_directly_do_what_the_processor_does() {
    let plan = Plan::from_env(CASES_DIRECT).run(How::Directly);
    let cases = plan.cases;
    let report = instructions(&plan, 64);
    println!("entered directly {} times", report.entered_directly);
    assert!(report.entered_directly > cases / 2, "only {} entries", report.entered_directly);
    check(report);
}

#[test]
fn instructions_that_look_at_their_bytes_do_what_the_processor_does() {
    check(instructions(&Plan::from_env(CASES_CHECKED).run(How::Checked), 64));
    check(segmented_instructions(&Plan::from_env(CASES_CHECKED).run(How::Checked), 16));
}

#[test]
fn instructions_of_32_bit_code_do_what_the_processor_does() {
    check(instructions(&Plan::from_env(CASES_32), 32));
}

#[test]
fn instructions_of_32_bit_code_in_segments_do_what_the_processor_does() {
    check(segmented_instructions(&Plan::from_env(CASES_SEGMENTED), 32));
}

#[test]
fn instructions_of_16_bit_code_do_what_the_processor_does() {
    check(segmented_instructions(&Plan::from_env(CASES_SEGMENTED), 16));
}
