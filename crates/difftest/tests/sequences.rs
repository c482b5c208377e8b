//! Random sequences of instructions: the translator against the real processor.

use difftest::compare::{Plan, Report, sequences};
use difftest::guest::How;

fn check(report: Report) {
    print!("{}", report.text());
    assert_eq!((report.mismatches, report.died), (0, 0), "the translator disagrees with the processor");
    assert!(report.hung <= 1 + report.cases / 1000, "{} cases never ended natively", report.hung);
}

#[test]
fn sequences_of_64_bit_code_do_what_the_processor_does() {
    check(sequences(&Plan::from_env(10_000), 64));
}

/// Most sequences run directly from their first instruction on; each other one begins with what only translated code can do.
#[test]
fn sequences_that_run_directly_do_what_the_processor_does() {
    let plan = Plan::from_env(3_000).run(How::Directly);
    let cases = plan.cases;
    let report = sequences(&plan, 64);
    println!("entered directly {} times", report.entered_directly);
    assert!(report.entered_directly > cases / 2, "only {} entries", report.entered_directly);
    check(report);
}

#[test]
fn sequences_that_look_at_their_bytes_do_what_the_processor_does() {
    check(sequences(&Plan::from_env(5_000).run(How::Checked), 64));
}

#[test]
fn sequences_of_32_bit_code_do_what_the_processor_does() {
    check(sequences(&Plan::from_env(5_000), 32));
}
