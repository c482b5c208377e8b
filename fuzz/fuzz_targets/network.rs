//! Any rings and requests for the network card.
#![no_main]

mod bench;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bench::queues(bench::network, data));
