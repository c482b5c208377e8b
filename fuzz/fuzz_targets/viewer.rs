//! What viewers say to the VNC server.
#![no_main]

use display::vnc::protocol::Message;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut rest = data;
    while let Ok(message) = Message::read(&mut rest) {
        std::hint::black_box(&message);
    }
});
