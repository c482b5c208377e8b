//! Any accesses to a virtio function.
#![no_main]

mod bench;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bench::registers(bench::network, data));
