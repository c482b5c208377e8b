//! Any rings and requests for the socket device.
#![no_main]

mod bench;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bench::queues(bench::sockets, data));
