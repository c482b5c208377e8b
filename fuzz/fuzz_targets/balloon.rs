//! Any rings and requests for the balloon.
#![no_main]

mod bench;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bench::queues(bench::balloon, data));
