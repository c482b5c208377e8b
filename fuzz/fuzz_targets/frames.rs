//! Any frames of a guest for the user network, which is restricted: whatever is in them, none leads out.
#![no_main]

use std::cell::RefCell;

use net::{Backend, HEADER_LENGTH, Header, Sink, UserConfig, UserNet};

/// Takes everything.
struct Drain;

impl Sink for Drain {
    fn deliver(&mut self, _: &Header, pieces: &[&[u8]]) -> bool {
        assert!(pieces.iter().map(|piece| piece.len()).sum::<usize>() <= net::LONGEST_FRAME);
        true
    }
}

thread_local! {
    static NET: RefCell<UserNet> = RefCell::new({
        let mut config = UserConfig::new([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        config.restrict = true;
        UserNet::new(config).expect("sockets can be watched")
    });
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    NET.with_borrow_mut(|net| {
        let mut rest = data;
        // Each frame has its length and its header before it.
        while let Some(([low, high], after)) = rest.split_first_chunk() {
            let length = usize::from(u16::from_le_bytes([*low, *high])).min(after.len());
            let (frame, following) = after.split_at(length);
            if let Some((header, frame)) = frame.split_first_chunk::<HEADER_LENGTH>() {
                net.send(&Header::from_bytes(header), frame);
            }
            net.receive(&mut Drain);
            rest = following;
        }
        net.reset();
    });
});
