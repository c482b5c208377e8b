//! Any rings and requests for the disk.
#![no_main]

mod bench;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bench::queues(bench::block, data));
