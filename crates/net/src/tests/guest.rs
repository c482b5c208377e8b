//! A guest without a machine: smoltcp's TCP/IP behind a card of memory.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as SmolInstant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr};

use crate::{Backend, Header, Sink, UserConfig, UserNet};

pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
pub const GUEST6: &str = "fd52:696e:6765:72::15";

/// Frames on their way, both ways.
#[derive(Default)]
pub struct Wire {
    pub to_guest: VecDeque<Vec<u8>>,
    from_guest: VecDeque<Vec<u8>>,
    /// Every n-th frame for the guest is lost; 0: none.
    pub lose: usize,
    count: usize,
    mtu: usize,
}

impl Sink for Wire {
    fn deliver(&mut self, header: &Header, pieces: &[&[u8]]) -> bool {
        if self.to_guest.len() >= 64 {
            return false;
        }
        assert_eq!(*header, Header::default(), "this guest takes no offloads");
        let frame = pieces.concat();
        assert!(frame.len() <= self.mtu + 14);
        self.count += 1;
        if self.lose == 0 || !self.count.is_multiple_of(self.lose) {
            self.to_guest.push_back(frame);
        }
        true
    }
}

pub struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

pub struct Sent<'a>(&'a mut VecDeque<Vec<u8>>);

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

    fn receive(&mut self, _: SmolInstant) -> Option<(Received, Sent<'_>)> {
        let frame = self.to_guest.pop_front()?;
        Some((Received(frame), Sent(&mut self.from_guest)))
    }

    fn transmit(&mut self, _: SmolInstant) -> Option<Sent<'_>> {
        (self.from_guest.len() < 64).then_some(Sent(&mut self.from_guest))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + 14;
        capabilities
    }
}

pub struct Guest {
    pub net: UserNet,
    pub wire: Wire,
    pub sockets: SocketSet<'static>,
    pub interface: Interface,
    started: Instant,
}

impl Guest {
    pub fn new(change: impl FnOnce(&mut UserConfig)) -> Self {
        let mut config = UserConfig::new(MAC);
        change(&mut config);
        let mut wire = Wire { mtu: config.mtu.into(), ..Wire::default() };
        let net = UserNet::new(config).unwrap();
        let card = HardwareAddress::Ethernet(EthernetAddress(MAC));
        let mut interface = Interface::new(Config::new(card), &mut wire, SmolInstant::ZERO);
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new("10.0.2.15".parse().unwrap(), 24)).unwrap();
            addresses.push(IpCidr::new(GUEST6.parse().unwrap(), 64)).unwrap();
        });
        interface.routes_mut().add_default_ipv4_route("10.0.2.2".parse().unwrap()).unwrap();
        Guest { net, wire, sockets: SocketSet::new(Vec::new()), interface, started: Instant::now() }
    }

    pub fn tcp_socket(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 256 << 10]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    pub fn connect(&mut self, to: SocketAddr) -> SocketHandle {
        let handle = self.tcp_socket();
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        socket.connect(self.interface.context(), to, 40_000).unwrap();
        handle
    }

    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Moves frames once in each direction.
    pub fn step(&mut self) {
        let now = SmolInstant::from_micros(self.started.elapsed().as_micros() as i64);
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
        for frame in std::mem::take(&mut self.wire.from_guest) {
            self.net.send(&Header::default(), &frame);
        }
        self.net.receive(&mut self.wire);
    }

    /// Goes on until `done` says so.
    pub fn run(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let patience = Instant::now() + Duration::from_secs(30);
        while !done(self) {
            assert!(Instant::now() < patience, "it takes too long");
            self.step();
            if self.wire.to_guest.is_empty() {
                std::thread::yield_now();
            }
        }
    }

    /// Sends a frame that smoltcp would not, and returns what comes back.
    pub fn raw(&mut self, frame: &[u8]) -> Vec<Vec<u8>> {
        self.net.send(&Header::default(), frame);
        self.net.receive(&mut self.wire);
        self.wire.to_guest.drain(..).collect()
    }
}
