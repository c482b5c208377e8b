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
        // Its own source: a small directory with files.
        config.tftp = Some(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz_targets").into());
        config.boot_file = Some("frames.rs".into());
        UserNet::new(config).expect("sockets can be watched")
    });
}

/// The fuzzer can't guess checksums: makes an IPv4 header's right, and that of its payload where there is none to be made
/// by the header of the frame.
fn complete(frame: &mut [u8], wanted: bool) {
    let Some((ethernet, packet)) = frame.split_first_chunk_mut::<14>() else { return };
    if !wanted || ethernet[12..] != [8, 0] || packet.len() < 20 || packet[0] != 0x45 {
        return;
    }
    let length = packet.len() as u16;
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    packet[10..12].fill(0);
    let sum: u32 = packet[..20].chunks_exact(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    packet[10..12].copy_from_slice(&(!folded as u16).to_be_bytes());
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    NET.with_borrow_mut(|net| {
        let mut rest = data;
        // Each frame has its length and its header before it.
        while let Some(([low, high], after)) = rest.split_first_chunk() {
            let length = usize::from(u16::from_le_bytes([*low, *high & 0x7f])).min(after.len());
            let (frame, following) = after.split_at(length);
            if let Some((header, frame)) = frame.split_first_chunk::<HEADER_LENGTH>() {
                let mut frame = frame.to_vec();
                complete(&mut frame, high & 0x80 != 0);
                net.send(&Header::from_bytes(header), &frame);
            }
            net.receive(&mut Drain);
            rest = following;
        }
        net.reset();
    });
});
