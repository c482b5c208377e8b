//! Random sequences of instructions: the translator against the real processor.

use difftest::compare::{Plan, Report, sequences};

fn check(report: Report) {
    print!("{}", report.text());
    assert_eq!((report.mismatches, report.died), (0, 0), "the translator disagrees with the processor");
}

#[test]
fn sequences_of_64_bit_code_do_what_the_processor_does() {
    check(sequences(&Plan::from_env(10_000), 64));
}

#[test]
fn sequences_of_32_bit_code_do_what_the_processor_does() {
    check(sequences(&Plan::from_env(5_000), 32));
}
