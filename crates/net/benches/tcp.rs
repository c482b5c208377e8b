//! How fast a guest's TCP becomes a socket's, with the crate's own segment handling and with smoltcp's sockets in its
//! place. The guest is the same in both cases: it sends segments of 64 KiB as its window allows, over no machine.
//!
//! `cargo bench -p net`

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use net::{Backend, GSO_TCP4, Header, NEEDS_CHECKSUM, Offloads, Sink, UserConfig, UserNet};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Packet, TcpPacket};

const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 0x0a, 0, 2, 2];
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const HEADERS: usize = 14 + 20 + 20;
const DATA: usize = 64_000;
/// As much passes in each direction.
const TOTAL: u64 = 4 << 30;

/// What the guest is attached to.
trait Stack {
    fn send(&mut self, header: &Header, frame: &[u8]);
    /// Shows each frame for the guest.
    fn receive(&mut self, show: &mut dyn FnMut(&[&[u8]]));
}

struct Ours(UserNet);

struct Show<'a>(&'a mut dyn FnMut(&[&[u8]]), usize);

impl Sink for Show<'_> {
    fn deliver(&mut self, _: &Header, pieces: &[&[u8]]) -> bool {
        // A guest's queue has an end, so that it gets to answer.
        self.1 += 1;
        if self.1 > 16 {
            return false;
        }
        (self.0)(pieces);
        true
    }
}

impl Stack for Ours {
    fn send(&mut self, header: &Header, frame: &[u8]) {
        self.0.send(header, frame);
    }

    fn receive(&mut self, show: &mut dyn FnMut(&[&[u8]])) {
        self.0.receive(&mut Show(show, 0));
    }
}

/// A proxy of one connection by smoltcp's sockets, with buffers of the same size and packets as large as IP has them.
struct Smoltcp {
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    wire: Wire,
    host: TcpStream,
    started: Instant,
}

#[derive(Default)]
struct Wire {
    incoming: Option<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
}

struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Sent<'a>(&'a mut VecDeque<Vec<u8>>);

impl TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; length];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sent<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, Sent<'_>)> {
        Some((Received(self.incoming.take()?), Sent(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Sent<'_>> {
        (self.outgoing.len() < 16).then_some(Sent(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 14 + 65_535;
        capabilities.checksum = ChecksumCapabilities::ignored();
        capabilities
    }
}

impl Smoltcp {
    fn new(port: u16) -> Self {
        let mut wire = Wire::default();
        let now = smoltcp::time::Instant::ZERO;
        let mut interface = Interface::new(Config::new(EthernetAddress(GATEWAY_MAC).into()), &mut wire, now);
        interface.update_ip_addrs(|addresses| addresses.push(IpCidr::new(GATEWAY.into(), 24)).unwrap());
        let buffer = || tcp::SocketBuffer::new(vec![0; 1 << 20]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.listen(port).unwrap();
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(socket);
        let host = TcpStream::connect(("127.0.0.1", port)).unwrap();
        host.set_nonblocking(true).unwrap();
        Smoltcp { interface, sockets, handle, wire, host, started: Instant::now() }
    }

    fn poll(&mut self) {
        let now = smoltcp::time::Instant::from_micros(self.started.elapsed().as_micros() as i64);
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
        let socket = self.sockets.get_mut::<tcp::Socket>(self.handle);
        if socket.can_recv() {
            let host = &mut self.host;
            socket.recv(|data| (host.write(data).unwrap_or(0), ())).unwrap();
        }
        if socket.can_send() {
            let host = &mut self.host;
            socket.send(|room| (host.read(room).unwrap_or(0), ())).unwrap();
        }
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
    }
}

impl Stack for Smoltcp {
    fn send(&mut self, _: &Header, frame: &[u8]) {
        self.wire.incoming = Some(frame.to_vec());
        self.poll();
    }

    fn receive(&mut self, show: &mut dyn FnMut(&[&[u8]])) {
        self.poll();
        for frame in self.wire.outgoing.drain(..) {
            show(&[&frame]);
        }
    }
}

/// A guest's TCP that never loses anything.
struct Guest {
    port: u16,
    frame: Vec<u8>,
    sequence: u32,
    acknowledged: u32,
    window: u32,
    next: u32,
    received: u64,
    open: bool,
    answer: bool,
}

impl Guest {
    fn connect(stack: &mut dyn Stack, port: u16) -> Self {
        let mut guest = Guest {
            port,
            frame: vec![0; HEADERS + DATA],
            sequence: 1,
            acknowledged: 1,
            window: 0,
            next: 0,
            received: 0,
            open: false,
            answer: false,
        };
        // smoltcp asks who is there.
        let arp = [
            &GATEWAY_MAC[..],
            &GUEST_MAC,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
            &GUEST_MAC,
            &GUEST.octets(),
            &[0; 6],
            &GATEWAY.octets(),
        ];
        stack.send(&Header::default(), &arp.concat());
        guest.transmit(stack, 0, true);
        while !guest.open {
            guest.take(stack);
        }
        guest.transmit(stack, 0, false);
        guest
    }

    fn transmit(&mut self, stack: &mut dyn Stack, length: usize, syn: bool) {
        // MSS 65480 and a window scale of 7 in the SYN.
        const OPTIONS: [u8; 8] = [2, 4, 0xff, 0xc8, 1, 3, 3, 7];
        let options = if syn { OPTIONS.len() } else { 0 };
        let total = HEADERS + options + length;
        let frame = &mut self.frame[..total];
        frame[..6].copy_from_slice(&GATEWAY_MAC);
        frame[6..12].copy_from_slice(&GUEST_MAC);
        frame[12..14].copy_from_slice(&[8, 0]);
        let mut ip = Ipv4Packet::new_unchecked(&mut frame[14..]);
        ip.set_version(4);
        ip.set_header_len(20);
        ip.set_total_len((total - 14) as u16);
        ip.set_hop_limit(64);
        ip.set_next_header(smoltcp::wire::IpProtocol::Tcp);
        ip.set_src_addr(GUEST);
        ip.set_dst_addr(GATEWAY);
        ip.fill_checksum();
        let mut tcp = TcpPacket::new_unchecked(&mut frame[34..]);
        tcp.clear_flags();
        tcp.set_src_port(40_000);
        tcp.set_dst_port(self.port);
        tcp.set_seq_number(smoltcp::wire::TcpSeqNumber(self.sequence as i32));
        tcp.set_ack_number(smoltcp::wire::TcpSeqNumber(self.next as i32));
        tcp.set_ack(!syn);
        tcp.set_syn(syn);
        tcp.set_psh(length > 0);
        tcp.set_header_len((20 + options) as u8);
        tcp.set_window_len(if syn { 65_535 } else { 8192 });
        if syn {
            frame[54..62].copy_from_slice(&OPTIONS);
        }
        let gso = length > 1460;
        let header = Header {
            flags: NEEDS_CHECKSUM,
            gso_type: if gso { GSO_TCP4 } else { 0 },
            gso_size: if gso { 1460 } else { 0 },
            ..Header::default()
        };
        self.sequence = self.sequence.wrapping_add(length as u32 + u32::from(syn));
        stack.send(&header, &self.frame[..total]);
    }

    fn take(&mut self, stack: &mut dyn Stack) {
        stack.receive(&mut |pieces| {
            let head = pieces[0];
            if head[12..14] != [8, 0] {
                return;
            }
            let length: usize = pieces.iter().map(|piece| piece.len()).sum();
            let tcp = TcpPacket::new_unchecked(&head[34..]);
            assert!(!tcp.rst());
            let data = (length - 34 - usize::from(tcp.header_len())) as u32;
            self.acknowledged = tcp.ack_number().0 as u32;
            self.window = u32::from(tcp.window_len());
            if tcp.syn() {
                self.next = (tcp.seq_number().0 as u32).wrapping_add(1);
                self.open = true;
                return;
            }
            // The scale that either offers.
            self.window <<= 5;
            if tcp.seq_number().0 as u32 == self.next {
                self.next = self.next.wrapping_add(data);
                self.received += u64::from(data);
            }
            self.answer |= data > 0;
        });
    }
}

fn out(stack: &mut dyn Stack, port: u16) -> f64 {
    let mut guest = Guest::connect(stack, port);
    let started = Instant::now();
    let mut sent = 0;
    while sent < TOTAL {
        let in_flight = guest.sequence.wrapping_sub(guest.acknowledged);
        if in_flight + DATA as u32 <= guest.window {
            guest.transmit(stack, DATA, false);
            sent += DATA as u64;
        }
        if in_flight + 4 * DATA as u32 > guest.window {
            guest.take(stack);
        }
    }
    rate(started.elapsed())
}

fn back(stack: &mut dyn Stack, port: u16) -> f64 {
    let mut guest = Guest::connect(stack, port);
    let started = Instant::now();
    while guest.received < TOTAL {
        guest.take(stack);
        if std::mem::take(&mut guest.answer) {
            guest.transmit(stack, 0, false);
        }
    }
    rate(started.elapsed())
}

fn rate(time: Duration) -> f64 {
    TOTAL as f64 * 8.0 / time.as_secs_f64() / 1e9
}

/// A server on the host that takes all, or gives as much as is taken.
fn serve(gives: bool) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut buffer = vec![7; 1 << 20];
        let mut stream = listener.accept().unwrap().0;
        loop {
            match if gives { stream.write(&buffer) } else { stream.read(&mut buffer) } {
                Ok(0) => return,
                Err(error) if error.kind() != ErrorKind::Interrupted => return,
                _ => {}
            }
        }
    });
    port
}

fn ours() -> Ours {
    let mut net = UserNet::new(UserConfig::new(GUEST_MAC)).unwrap();
    net.set_guest_offloads(Offloads { checksum: true, tso4: true, tso6: true });
    Ours(net)
}

fn main() {
    for (name, gives) in [("guest to host", false), ("host to guest", true)] {
        let run = if gives { back } else { out };
        let port = serve(gives);
        let own = run(&mut ours(), port);
        let port = serve(gives);
        let smoltcp = run(&mut Smoltcp::new(port), port);
        println!("{name}: own segment handling {own:.1} Gbit/s, smoltcp's sockets {smoltcp:.1} Gbit/s");
    }
}
