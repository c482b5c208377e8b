//! A guest's packets, made here, and what host and guest see of them.

use super::*;
use packet::{HOST, NO_RECEIVE, NO_SEND, Operation, STREAM};
use std::io::{Read, Write};

const CID: u64 = 3;
const GUEST_PORT: u32 = 5000;

struct Pair {
    mux: Mux,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Pair {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        Pair { mux: Mux::new(CID, path.clone(), Arc::new(listener)), path, _directory: directory }
    }

    /// A program of the host that listens for the guest.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(format!("{}_{port}", self.path.display())).unwrap()
    }

    fn send(&mut self, host_port: u32, operation: Operation, flags: u32, data: &[u8]) {
        self.send_with(host_port, operation, flags, data, 1 << 16, 0);
    }

    fn send_with(&mut self, host_port: u32, op: Operation, flags: u32, data: &[u8], buffer: u32, forwarded: u32) {
        let header = Header {
            source: CID,
            destination: HOST,
            source_port: GUEST_PORT,
            destination_port: host_port,
            length: data.len() as u32,
            kind: STREAM,
            operation: Some(op),
            flags,
            buffer,
            forwarded,
        };
        self.mux.packet(&header, data);
    }

    /// Lets everything happen that can happen now, and gives the packets that the guest gets.
    fn received(&mut self) -> Vec<(Operation, u32, Vec<u8>)> {
        let mut packets = Vec::new();
        for _ in 0..20 {
            let tokens: Vec<_> = self.mux.interests(true).into_iter().map(|(token, ..)| token).collect();
            // Too often ready is never wrong: sockets do not block.
            self.mux.ready(&tokens);
            while let Some((header, data)) = self.mux.next(4096) {
                assert_eq!((header.source, header.destination, header.length as usize), (HOST, CID, data.len()));
                packets.push((header.operation.unwrap(), header.source_port, data));
            }
        }
        packets
    }
}

#[test]
fn the_guest_reaches_who_listens_for_it() {
    let mut pair = Pair::new();
    let listener = pair.listen(1024);
    pair.send(1024, Operation::Request, 0, b"");
    assert_eq!(pair.received(), [(Operation::Response, 1024, vec![])]);
    let (mut host, _) = listener.accept().unwrap();
    pair.send(1024, Operation::ReadWrite, 0, b"hello");
    let mut data = [0; 5];
    host.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"hello");
    host.write_all(b"world").unwrap();
    assert_eq!(pair.received(), [(Operation::ReadWrite, 1024, b"world".to_vec())]);
    // Half closed: the host sees the end, and can still send.
    pair.send(1024, Operation::Shutdown, NO_SEND, b"");
    assert_eq!(host.read(&mut data).unwrap(), 0);
    host.write_all(b"!").unwrap();
    assert_eq!(pair.received(), [(Operation::ReadWrite, 1024, b"!".to_vec())]);
    pair.send(1024, Operation::Shutdown, NO_SEND | NO_RECEIVE, b"");
    assert_eq!(pair.received(), [(Operation::Reset, 1024, vec![])]);
    assert!(host.write_all(b"x").is_err());
}

#[test]
fn the_host_reaches_the_guest_by_the_line_that_asks_for_a_port() {
    let mut pair = Pair::new();
    let mut host = UnixStream::connect(&pair.path).unwrap();
    host.write_all(b"CONNECT 5000\nearly").unwrap();
    let port = 1 << 30;
    assert_eq!(pair.received(), [(Operation::Request, port, vec![])]);
    pair.send(port, Operation::Response, 0, b"");
    let mut line = [0; 14];
    host.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK 1073741824\n");
    assert_eq!(pair.received(), [(Operation::ReadWrite, port, b"early".to_vec())]);
    drop(host);
    assert_eq!(pair.received(), [(Operation::Shutdown, port, vec![])]);
    pair.send(port, Operation::Reset, 0, b"");
    assert!(pair.received().is_empty());
}

#[test]
fn who_does_not_ask_properly_is_closed() {
    let mut pair = Pair::new();
    for line in
        ["CONNECT\n", "CONNECT x\n", "GET / HTTP/1.1\r\n\r\n                      ", "CONNECT 99999999999\n", "\n"]
    {
        let mut host = UnixStream::connect(&pair.path).unwrap();
        host.write_all(line.as_bytes()).unwrap();
        assert!(pair.received().is_empty(), "{line}");
        // A reset, where something was not read.
        assert!(matches!(host.read(&mut [0]), Ok(0) | Err(_)), "{line}");
    }
    // The guest refuses.
    let mut host = UnixStream::connect(&pair.path).unwrap();
    host.write_all(b"CONNECT 5000\n").unwrap();
    pair.received();
    pair.send(1 << 30, Operation::Reset, 0, b"");
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn nobody_gets_more_than_there_is_room_for() {
    let mut pair = Pair::new();
    let listener = pair.listen(7);
    pair.send_with(7, Operation::Request, 0, b"", 10, 0);
    pair.received();
    let (mut host, _) = listener.accept().unwrap();
    host.write_all(b"0123456789abcdef").unwrap();
    assert_eq!(pair.received(), [(Operation::ReadWrite, 7, b"0123456789".to_vec())]);
    pair.send_with(7, Operation::CreditUpdate, 0, b"", 10, 4);
    assert_eq!(pair.received(), [(Operation::ReadWrite, 7, b"abcd".to_vec())]);
    // What can't be true gives no credit.
    pair.send_with(7, Operation::CreditUpdate, 0, b"", 10, 0x8000_0000);
    assert!(pair.received().is_empty());
    // The host reads nothing: when its socket and our buffer are full, more is not allowed.
    let piece = vec![0; 64 << 10];
    let mut reset = false;
    for _ in 0..64 {
        pair.send(7, Operation::ReadWrite, 0, &piece);
        reset |= pair.received().iter().any(|(operation, ..)| *operation == Operation::Reset);
    }
    assert!(reset);
}

#[test]
fn the_guest_hears_of_room_as_the_host_reads() {
    let mut pair = Pair::new();
    let listener = pair.listen(7);
    pair.send(7, Operation::Request, 0, b"");
    pair.received();
    let (mut host, _) = listener.accept().unwrap();
    let mut updates = 0;
    for _ in 0..8 {
        pair.send(7, Operation::ReadWrite, 0, &vec![1; 32 << 10]);
        host.read_exact(&mut vec![0; 32 << 10]).unwrap();
        updates += pair.received().iter().filter(|(op, ..)| *op == Operation::CreditUpdate).count();
    }
    assert_eq!(updates, 4);
}

#[test]
fn packets_of_no_stream_are_answered_by_a_reset() {
    let mut pair = Pair::new();
    for operation in [Operation::Request, Operation::ReadWrite, Operation::Shutdown, Operation::CreditRequest] {
        pair.send(9, operation, 0, b"");
        assert_eq!(pair.received(), [(Operation::Reset, 9, vec![])], "{operation:?}");
    }
    pair.send(9, Operation::Reset, 0, b"");
    assert!(pair.received().is_empty());
}

#[test]
fn any_packets_do_no_harm() {
    let mut pair = Pair::new();
    let _listeners: Vec<_> = (0..4).map(|port| pair.listen(port)).collect();
    let mut random = 0x1357_9bdf_0246_8aceu64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for round in 0..20_000 {
        let mut bytes: [u8; HEADER] = std::array::from_fn(|_| next() as u8);
        if next() % 8 != 0 {
            let mut header = Header::parse(&bytes);
            (header.source, header.destination, header.kind) = (CID, HOST, STREAM);
            (header.source_port, header.destination_port) = ((next() % 4) as u32, (next() % 5) as u32);
            bytes = header.to_bytes();
            bytes[30] = (next() % 9) as u8;
            bytes[31] = 0;
        }
        let data = vec![0; (next() % 100) as usize];
        pair.mux.packet(&Header::parse(&bytes), &data);
        if round % 100 == 0 {
            let tokens: Vec<_> = pair.mux.interests(true).into_iter().map(|(token, ..)| token).collect();
            pair.mux.ready(&tokens);
            while let Some((header, _)) = pair.mux.next(100) {
                assert_eq!(header.destination, CID);
            }
        }
    }
    assert!(pair.mux.interests(true).len() < 600);
}

#[test]
fn a_socket_that_was_left_over_is_replaced_and_one_in_use_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v");
    drop(UnixListener::bind(&path).unwrap());
    let device = Vsock::new(&path, CID).unwrap();
    assert_eq!(Vsock::new(&path, CID).map(|_| ()).unwrap_err().kind(), ErrorKind::AddrInUse);
    drop(device);
    assert!(!path.exists());
    fs::write(&path, "a file").unwrap();
    assert!(Vsock::new(&path, CID).is_err() && path.exists());
    let long = directory.path().join("x".repeat(100));
    assert!(Vsock::new(&long, CID).is_err());
}
