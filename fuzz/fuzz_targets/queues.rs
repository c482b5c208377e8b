//! Any rings and requests for the block device.
#![no_main]

mod bench;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bench::BENCH.with(|bench| bench::support::hostile::queues(bench, u64::MAX, 2, data));
});
