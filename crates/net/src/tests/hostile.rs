//! Frames of every malformed kind: nothing panics, nothing hangs, and memory stays bounded.

use std::net::UdpSocket;

use super::guest::{Guest, MAC};
use super::udp::from_guest;
use crate::packet::Ip;
use crate::plan::{self, GATEWAY_MAC, Place};
use crate::{Backend, GSO_TCP4, GSO_TCP6, Header, NEEDS_CHECKSUM, Offloads};

/// xorshift64*, for repeatable chance.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % below
    }
}

fn ethernet(protocol: u16, payload: &[u8]) -> Vec<u8> {
    [&GATEWAY_MAC[..], &MAC, &protocol.to_be_bytes(), payload].concat()
}

/// Frames that are right, to be made wrong. All lead to the gateway or nowhere.
fn seeds(port: u16) -> Vec<Vec<u8>> {
    let tcp = |flags: u8| {
        let segment = [
            &5000u16.to_be_bytes()[..],
            &port.to_be_bytes(),
            &[0, 0, 0, 1, 0, 0, 0, 1, 0x60, flags, 255, 255, 0, 0, 0, 0, 2, 4, 5, 180],
        ]
        .concat();
        let route = crate::packet::Route {
            guest: GATEWAY_MAC,
            source: "10.0.2.15".parse().unwrap(),
            destination: "10.0.2.2".parse().unwrap(),
        };
        let mut frame = Vec::new();
        route.write(&mut frame, crate::packet::TCP, segment.len());
        frame.extend_from_slice(&segment);
        frame[6..12].copy_from_slice(&MAC);
        frame
    };
    let arp = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &MAC, &[10, 0, 2, 15], &[0; 6], &[10, 0, 2, 2]].concat();
    let mut dhcp = vec![0u8; 300];
    dhcp[..4].copy_from_slice(&[1, 1, 6, 0]);
    dhcp[236..244].copy_from_slice(&[99, 130, 83, 99, 53, 1, 1, 255]);
    let mut neighbour = vec![0x60, 0, 0, 0, 0, 24, 58, 255];
    neighbour.extend_from_slice(&[0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    neighbour.extend_from_slice(&[0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0, 0, 2]);
    neighbour.extend_from_slice(&[135, 0, 0, 0, 0, 0, 0, 0]);
    neighbour.extend_from_slice(&crate::plan::GATEWAY6.octets());
    vec![
        tcp(2),
        tcp(0x10),
        tcp(0x18),
        tcp(0x11),
        tcp(0x04),
        from_guest("10.0.2.15:5000", &format!("10.0.2.2:{port}"), b"payload"),
        from_guest("10.0.2.15:68", "10.0.2.2:67", &dhcp),
        from_guest("10.0.2.15:2000", "10.0.2.2:69", b"\0\x01lib.rs\0octet\0blksize\x001432\0windowsize\x0064\0"),
        from_guest("10.0.2.15:2000", "10.0.2.2:49152", &[0, 4, 0, 0]),
        from_guest("[fd52:696e:6765:72::15]:5000", &format!("[fd52:696e:6765:72::2]:{port}"), b"payload"),
        ethernet(0x0806, &arp),
        ethernet(0x86dd, &neighbour),
    ]
}

#[test]
fn no_frame_of_the_guest_does_harm() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let mut guest = Guest::new(|config| config.tftp = Some(concat!(env!("CARGO_MANIFEST_DIR"), "/src").into()));
    let seeds = seeds(port);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..200_000 {
        let mut frame = seeds[random.next(seeds.len())].clone();
        // IP's own checksum would stop most of it at the door: IPv4 headers are made right again half of the time.
        for _ in 0..random.next(4) {
            let at = 12 + random.next(frame.len() - 12);
            frame[at] =
                if random.next(2) == 0 { random.next(256) as u8 } else { [0, 1, 0x7f, 0x80, 0xff][random.next(5)] };
        }
        match random.next(8) {
            0 => frame.truncate(random.next(frame.len() + 1)),
            1 => frame.resize(frame.len() + random.next(2000), 0x41),
            _ => {}
        }
        if random.next(2) == 0 && frame.len() >= 34 && frame[12..14] == [8, 0] {
            // No destination but the gateway: a test reaches no other hosts.
            frame[30..34].copy_from_slice(&[10, 0, 2, 2]);
            let mut packet = smoltcp::wire::Ipv4Packet::new_unchecked(&mut frame[14..]);
            if packet.header_len() == 20 {
                packet.fill_checksum();
            }
        }
        if leads_outside(&frame) {
            continue;
        }
        let header = Header {
            flags: if random.next(2) == 0 { NEEDS_CHECKSUM } else { 0 },
            gso_type: [0, GSO_TCP4, GSO_TCP6, 0x80, 0xff][random.next(5)],
            gso_size: random.next(65536) as u16,
            ..Header::default()
        };
        guest.net.send(&header, &frame);
        if round % 64 == 0 {
            guest.net.receive(&mut guest.wire);
            guest.wire.to_guest.clear();
        }
    }
}

/// Whether the destination is neither of the link nor unreachable by rule.
fn leads_outside(frame: &[u8]) -> bool {
    let Some(payload) = frame.get(14..) else { return false };
    let packets = [Ip::parse4(payload), Ip::parse6(payload)];
    packets.into_iter().flatten().any(|ip| matches!(plan::place(ip.destination), Place::Outside | Place::Resolver(_)))
}

#[test]
fn a_flood_of_connections_and_sockets_stays_bounded() {
    let mut guest = Guest::new(|_| {});
    guest.net.set_guest_offloads(Offloads::default());
    for port in 1024..6000u16 {
        guest.net.send(&Header::default(), &from_guest(&format!("10.0.2.15:{port}"), "10.0.2.2:9", b"x"));
    }
    guest.net.receive(&mut guest.wire);
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(descriptors < 2000, "{descriptors}");
}
