//! UDP, name service and pings.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use super::guest::{GUEST6, Guest, MAC};
use crate::fragments::Reassembly;
use crate::packet::{Ethernet, Ip, Route};
use crate::plan::GATEWAY_MAC;
use crate::{Forward, udp};

/// A frame from the guest. Routes are written towards the guest, so the hardware addresses are turned round.
pub fn from_guest(source: &str, destination: &str, payload: &[u8]) -> Vec<u8> {
    let (source, destination): (SocketAddr, SocketAddr) = (source.parse().unwrap(), destination.parse().unwrap());
    let route = Route { guest: GATEWAY_MAC, source: source.ip(), destination: destination.ip() };
    let mut frame = udp::frame(route, source.port(), destination.port(), payload);
    frame[6..12].copy_from_slice(&MAC);
    frame
}

/// Source and payload of the datagram for the guest in a frame.
pub fn read(frame: &[u8]) -> (SocketAddr, Vec<u8>) {
    let ethernet = Ethernet::parse(frame).unwrap();
    assert_eq!(ethernet.destination, MAC);
    let ip = Ip::parse4(ethernet.payload).or_else(|| Ip::parse6(ethernet.payload)).unwrap();
    let datagram = udp::Datagram::parse(&ip, true).unwrap();
    (datagram.source, datagram.payload.to_vec())
}

/// The next frame for the guest that is not a router advertisement.
fn wait(guest: &mut Guest) -> Vec<u8> {
    ask(guest, &[])
}

/// Sends a frame and waits for one.
fn ask(guest: &mut Guest, frame: &[u8]) -> Vec<u8> {
    let mut frames = guest.raw(frame);
    for _ in 0..3000 {
        if let Some(at) = frames.iter().position(|frame| frame[12..14] != [0x86, 0xdd] || frame[20] != 58) {
            guest.wire.to_guest.extend(frames.drain(at + 1..));
            return frames.remove(at);
        }
        std::thread::sleep(Duration::from_millis(1));
        frames = guest.raw(&[]);
    }
    panic!("no frame has come")
}

#[test]
fn datagrams_come_and_go_by_one_port_whatever_the_destination() {
    let servers = [UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap()];
    let mut guest = Guest::new(|_| {});
    let mut peers = Vec::new();
    for server in [&servers[0], &servers[1], &servers[0]] {
        let to = format!("10.0.2.2:{}", server.local_addr().unwrap().port());
        guest.raw(&from_guest("10.0.2.15:5000", &to, b"question"));
        let mut buffer = [0; 100];
        let (length, peer) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"question");
        peers.push(peer.port());
        server.send_to(b"answer", peer).unwrap();
        assert_eq!(read(&wait(&mut guest)), (to.parse().unwrap(), b"answer".to_vec()));
    }
    assert!(peers.iter().all(|port| *port == peers[0]), "{peers:?}");
}

#[test]
fn large_datagrams_pass_in_fragments() {
    let server = UdpSocket::bind("[::1]:0").unwrap();
    let mut guest = Guest::new(|_| {});
    let to = format!("[fd52:696e:6765:72::2]:{}", server.local_addr().unwrap().port());
    let payload: Vec<u8> = (0..1400u32).map(|i| i as u8).collect();
    guest.raw(&from_guest(&format!("[{GUEST6}]:5000"), &to, &payload));
    let mut buffer = [0; 65536];
    let (_, peer) = server.recv_from(&mut buffer).unwrap();
    server.send_to(&vec![7; 60_000], peer).unwrap();
    let mut reassembly = Reassembly::default();
    let whole = loop {
        let frame = wait(&mut guest);
        assert!(frame.len() <= 1514);
        let ip = Ip::parse6(Ethernet::parse(&frame).unwrap().payload).unwrap();
        if let Some(whole) = reassembly.add(&ip, ip.fragment.unwrap(), Instant::now()) {
            break whole;
        }
    };
    assert_eq!((whole.len(), &whole[8..]), (60_008, &[7; 60_000][..]));
}

#[test]
fn closed_ports_are_told_of() {
    let closed = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut guest = Guest::new(|_| {});
    let frame = ask(&mut guest, &from_guest("10.0.2.15:5000", &format!("10.0.2.2:{closed}"), b"x"));
    let ip = Ip::parse4(Ethernet::parse(&frame).unwrap().payload).unwrap();
    assert_eq!((ip.protocol, &ip.payload[..2]), (1, &[3, 3][..]));
    // It quotes the ports by which the guest knows its socket.
    assert_eq!(ip.payload[28..30], 5000u16.to_be_bytes());
    assert_eq!(ip.payload[30..32], closed.to_be_bytes());
}

#[test]
fn strangers_do_not_reach_the_guest() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let others = [UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.2:0").unwrap()];
    let mut guest = Guest::new(|_| {});
    let to = |socket: &UdpSocket| format!("10.0.2.2:{}", socket.local_addr().unwrap().port());
    guest.raw(&from_guest("10.0.2.15:5000", &to(&server), b"x"));
    guest.raw(&from_guest("10.0.2.15:5000", &to(&others[0]), b"x"));
    let (_, peer) = server.recv_from(&mut [0; 10]).unwrap();
    others[1].send_to(b"stranger", peer).unwrap();
    server.send_to(b"friend", peer).unwrap();
    assert_eq!(read(&wait(&mut guest)).1, b"friend");
    assert!(guest.raw(&[]).is_empty());
}

#[test]
fn forwarded_ports_know_their_peers() {
    let forward: Forward = "udp:127.0.0.1:0-:53".parse().unwrap();
    let mut guest = Guest::new(|config| config.forwards.push(forward));
    let address = guest.net.listening()[0];
    let peers = [UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap()];
    for peer in &peers {
        peer.send_to(b"question", address).unwrap();
        let (from, payload) = read(&wait(&mut guest));
        assert_eq!((from.ip(), &payload[..]), ("10.0.2.2".parse::<IpAddr>().unwrap(), &b"question"[..]));
        guest.raw(&from_guest("10.0.2.15:53", &from.to_string(), b"answer"));
        let mut buffer = [0; 100];
        let (length, from) = peer.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from), (&b"answer"[..], address));
    }
}

#[test]
fn resolvers_answer_names_only() {
    let mut guest = Guest::new(|_| {});
    let frames = guest.raw(&from_guest("10.0.2.15:5000", "10.0.2.3:54", b"x"));
    let refused = frames.iter().any(|frame| frame[23] == 1 && frame[34..36] == [3, 3]);
    assert!(refused, "{frames:?}");
}
