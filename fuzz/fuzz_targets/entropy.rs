//! Any rings and requests for the entropy device.
#![no_main]

mod bench;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bench::queues(bench::entropy, data));
