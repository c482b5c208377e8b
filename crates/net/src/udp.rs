//! UDP: one socket of the host for each socket of the guest.
//!
//! All that a guest socket sends leaves by one port of the host, whatever the destination (RFC 4787, 4.1), and only who
//! was sent something may answer (4.3: address-dependent filtering). As long as there is one destination, the socket is
//! connected to it: that is faster, and the guest learns of closed ports. Forwarded ports have sockets of their own,
//! which remember their peers.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto};
use smoltcp::wire::checksum;

use crate::fragments;
use crate::header::{GSO_NONE, NEEDS_CHECKSUM};
use crate::icmp::{self, Unreachable};
use crate::outbox::Outbox;
use crate::packet::{ETHERNET_HEADER, Ip, Mac, Route, UDP, pseudo_header_sum};
use crate::plan;
use crate::poller::{Poller, Source};
use crate::{Error, Forward, Header, Offloads, Sink};

pub const HEADER: usize = 8;
const CHECKSUM_OFFSET: usize = 6;

/// Destinations of one of them.
const MOST_REMOTES: usize = 256;
/// Peers of a forwarded port.
const MOST_PEERS: usize = 1024;
/// RFC 4787, 4.3, REQ-5 says at least two minutes, and REQ-5 b that ports below 1024 may have their own; a name server
/// has answered long before.
const IDLE: Duration = Duration::from_secs(150);
const IDLE_DNS: Duration = Duration::from_secs(20);
const DNS: u16 = 53;
/// Datagrams taken from one socket before the others have their turn.
const TURN: usize = 32;

/// A datagram from the guest, checked.
pub struct Datagram<'a> {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub payload: &'a [u8],
}

impl<'a> Datagram<'a> {
    /// `complete`: the checksum is there, and is to be right.
    pub fn parse(ip: &Ip<'a>, complete: bool) -> Option<Self> {
        let [s0, s1, d0, d1, l0, l1, c0, c1] = *ip.payload.first_chunk()?;
        let length = usize::from(u16::from_be_bytes([l0, l1]));
        let payload = ip.payload.get(HEADER..length)?;
        // With IPv4 a sender may go without one (RFC 768).
        let unchecked = [c0, c1] == [0, 0] && ip.source.is_ipv4();
        if complete && !unchecked {
            let datagram = Ip { payload: ip.payload.get(..length)?, ..*ip };
            if !datagram.checksum_holds() {
                return None;
            }
        }
        let (source, destination) = (u16::from_be_bytes([s0, s1]), u16::from_be_bytes([d0, d1]));
        (destination != 0).then(|| Datagram {
            source: SocketAddr::new(ip.source, source),
            destination: SocketAddr::new(ip.destination, destination),
            payload,
        })
    }
}

/// A whole datagram with its checksum.
pub fn datagram(route: Route, source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    let mut datagram = Vec::with_capacity(HEADER + payload.len());
    write_header(&mut datagram, source, destination, payload.len());
    datagram.extend_from_slice(payload);
    let pseudo = pseudo_header_sum(route.source, route.destination, UDP, datagram.len());
    let sum = match !checksum::combine(&[pseudo, checksum::data(&datagram)]) {
        // Zero means that there is none (RFC 768).
        0 => 0xffff,
        sum => sum,
    };
    datagram[CHECKSUM_OFFSET..HEADER].copy_from_slice(&sum.to_be_bytes());
    datagram
}

/// A frame with a whole datagram, which is no longer than the link takes.
pub fn frame(route: Route, source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    let datagram = datagram(route, source, destination, payload);
    let mut frame = Vec::new();
    route.write(&mut frame, UDP, datagram.len());
    frame.extend_from_slice(&datagram);
    frame
}

fn write_header(buffer: &mut Vec<u8>, source: u16, destination: u16, payload: usize) {
    buffer.extend_from_slice(&source.to_be_bytes());
    buffer.extend_from_slice(&destination.to_be_bytes());
    buffer.extend_from_slice(&u16::try_from(HEADER + payload).unwrap_or(u16::MAX).to_be_bytes());
    buffer.extend_from_slice(&[0, 0]);
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    guest: SocketAddr,
    /// The family of the host's socket: the host's name server may be of another than the guest's view of it.
    v4: bool,
}

struct Remote {
    real: SocketAddr,
    /// As the guest calls it.
    seen: SocketAddr,
}

struct Flow {
    key: Key,
    mac: Mac,
    socket: OwnedFd,
    /// One: the socket is connected to it.
    remotes: Vec<Remote>,
    used: Instant,
    readable: bool,
}

struct Listener {
    forward: Forward,
    socket: OwnedFd,
    /// By the port that they have in the guest's eyes, and with when they were heard of last.
    peers: HashMap<SocketAddr, (SocketAddr, Instant)>,
    readable: bool,
}

/// All UDP traffic of a guest.
#[derive(Default)]
pub struct Udp {
    flows: HashMap<u32, Flow>,
    ids: HashMap<Key, u32>,
    next: u32,
    /// Sockets of the guest that may have one of the host at a time.
    most: usize,
    listeners: Vec<Listener>,
    /// Sockets that may have something to read.
    active: VecDeque<Source>,
    buffer: Vec<u8>,
    frame: Vec<u8>,
    identification: u32,
}

/// What the guest's side of the network is like.
#[derive(Clone, Copy)]
pub struct Side {
    pub offloads: Offloads,
    pub mtu: usize,
    pub now: Instant,
}

impl Udp {
    pub fn new(most: usize) -> Self {
        Udp { most, ..Udp::default() }
    }

    /// Listens at a forwarded port.
    pub fn listen(&mut self, forward: Forward, poller: &Poller) -> Result<(), Error> {
        let open = || {
            let socket = icmp::socket(family(forward.host.is_ipv4()), SocketType::DGRAM, ipproto::UDP)?;
            rustix::net::bind(&socket, &forward.host)?;
            Ok(socket)
        };
        let socket = open().map_err(|errno: Errno| Error::Forward { forward, source: errno.into() })?;
        let source = Source::UdpListener(self.listeners.len() as u32);
        poller.add(&socket, source, false).map_err(|errno| Error::Forward { forward, source: errno.into() })?;
        self.listeners.push(Listener { forward, socket, peers: HashMap::new(), readable: false });
        Ok(())
    }

    /// Where forwarded ports listen.
    pub fn listening(&self) -> impl Iterator<Item = &OwnedFd> {
        self.listeners.iter().map(|listener| &listener.socket)
    }

    /// Sends a datagram to `real`, which the guest calls by its `destination`, or to the peer of a forwarded port.
    pub fn send(
        &mut self,
        datagram: &Datagram<'_>,
        mac: Mac,
        real: impl FnOnce() -> Result<SocketAddr, Unreachable>,
        poller: &Poller,
        now: Instant,
    ) -> Result<(), Unreachable> {
        if self.answer_peer(datagram, now) {
            return Ok(());
        }
        let real = real()?;
        let key = Key { guest: datagram.source, v4: real.is_ipv4() };
        let id = match self.ids.get(&key) {
            Some(&id) => id,
            None => self.open(key, mac, poller, now).map_err(Unreachable::from_errno)?,
        };
        let Some(flow) = self.flows.get_mut(&id) else { return Ok(()) };
        flow.used = now;
        flow.mac = mac;
        let first = flow.send(datagram, real);
        // The first answer may be of an earlier datagram (udp(7)); this one has not been sent yet then.
        let second = if first == Err(Errno::CONNREFUSED) { flow.send(datagram, real) } else { first };
        match first.and(second) {
            // Nobody waits for UDP: what finds no room is lost.
            Ok(()) | Err(Errno::AGAIN | Errno::NOBUFS | Errno::INTR) => Ok(()),
            Err(errno) => Err(Unreachable::from_errno(errno)),
        }
    }

    /// Sends what is an answer to a peer of a forwarded port.
    fn answer_peer(&mut self, datagram: &Datagram<'_>, now: Instant) -> bool {
        for listener in &mut self.listeners {
            if listener.forward.guest == datagram.source
                && let Some((peer, used)) = listener.peers.get_mut(&datagram.destination)
            {
                *used = now;
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                // As with any datagram, what fails is lost.
                let _ = rustix::net::sendto(&listener.socket, datagram.payload, flags, peer);
                return true;
            }
        }
        false
    }

    fn open(&mut self, key: Key, mac: Mac, poller: &Poller, now: Instant) -> Result<u32, Errno> {
        if self.flows.len() >= self.most
            && let Some(oldest) = self.flows.iter().min_by_key(|(_, flow)| flow.used).map(|(id, _)| *id)
        {
            self.close(oldest);
        }
        let socket = icmp::socket(family(key.v4), SocketType::DGRAM, ipproto::UDP)?;
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        poller.add(&socket, Source::Udp(id), false)?;
        self.flows.insert(id, Flow { key, mac, socket, remotes: Vec::new(), used: now, readable: false });
        self.ids.insert(key, id);
        Ok(id)
    }

    fn close(&mut self, id: u32) {
        if let Some(flow) = self.flows.remove(&id) {
            self.ids.remove(&flow.key);
        }
    }

    /// A socket has become readable.
    pub fn readable(&mut self, source: Source) {
        let flag = match source {
            Source::Udp(id) => self.flows.get_mut(&id).map(|flow| &mut flow.readable),
            Source::UdpListener(id) => self.listeners.get_mut(id as usize).map(|listener| &mut listener.readable),
            _ => None,
        };
        if let Some(readable) = flag
            && !std::mem::replace(readable, true)
        {
            self.active.push_back(source);
        }
    }

    /// Whether there may be more for the guest than the last [`Udp::receive`] handed over.
    pub fn has_more(&self) -> bool {
        !self.active.is_empty()
    }

    /// Hands over what has come. False: the sink is full.
    pub fn receive(
        &mut self,
        side: Side,
        sink: &mut dyn Sink,
        outbox: &mut Outbox,
        find: impl Fn(IpAddr) -> Mac,
    ) -> bool {
        // Those that get a second turn get it next time: senders that never rest must not keep the thread here.
        for _ in 0..self.active.len() {
            let Some(source) = self.active.pop_front() else { break };
            self.buffer.resize(usize::from(u16::MAX), 0);
            for turn in 0.. {
                if turn == TURN {
                    self.active.push_back(source);
                    break;
                }
                let received = match source {
                    Source::Udp(id) => self.receive_flow(id, side, outbox),
                    Source::UdpListener(id) => self.receive_forwarded(id, side, &find),
                    _ => None,
                };
                let Some(received) = received else { break };
                if let Some(incoming) = received
                    && !self.deliver(incoming, side, sink, outbox)
                {
                    self.active.push_front(source);
                    return false;
                }
            }
        }
        true
    }

    /// Reads a datagram into `buffer`. `None`: there is none. `Some(None)`: one that is not for the guest.
    fn receive_flow(&mut self, id: u32, side: Side, outbox: &mut Outbox) -> Option<Option<Incoming>> {
        let flow = self.flows.get_mut(&id)?;
        let (length, from) = match rustix::net::recvfrom(&flow.socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
            Ok((_, length, from)) => (length, from.and_then(|from| SocketAddr::try_from(from).ok())),
            Err(Errno::INTR) => return Some(None),
            Err(Errno::CONNREFUSED | Errno::HOSTUNREACH | Errno::NETUNREACH) => {
                flow.tell_unreachable(outbox);
                return Some(None);
            }
            Err(_) => {
                flow.readable = false;
                return None;
            }
        };
        let seen = from.and_then(|from| flow.seen(from));
        Some(seen.map(|source| {
            flow.used = side.now;
            Incoming { source, destination: flow.key.guest, mac: flow.mac, length }
        }))
    }

    fn receive_forwarded(&mut self, id: u32, side: Side, find: &impl Fn(IpAddr) -> Mac) -> Option<Option<Incoming>> {
        let listener = self.listeners.get_mut(id as usize)?;
        let (length, from) = match rustix::net::recvfrom(&listener.socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
            Ok((_, length, from)) => (length, from.and_then(|from| SocketAddr::try_from(from).ok())),
            Err(Errno::AGAIN) => {
                listener.readable = false;
                return None;
            }
            Err(_) => return Some(None),
        };
        let destination = listener.forward.guest;
        let source = from.and_then(|from| listener.seen(from, side.now));
        let mac = find(destination.ip());
        Some(source.map(|source| Incoming { source, destination, mac, length }))
    }

    /// Sends the datagram in `buffer` to the guest. False: the sink is full (the datagram waits in the outbox).
    fn deliver(&mut self, incoming: Incoming, side: Side, sink: &mut dyn Sink, outbox: &mut Outbox) -> bool {
        let Incoming { source, destination, mac, length } = incoming;
        let Some(payload) = self.buffer.get(..length) else { return true };
        let route = Route { guest: mac, source: source.ip(), destination: destination.ip() };
        if side.offloads.checksum && route.ip_header_length() + HEADER + length <= side.mtu {
            route.write(&mut self.frame, UDP, HEADER + length);
            let start = self.frame.len();
            write_header(&mut self.frame, source.port(), destination.port(), length);
            let pseudo = pseudo_header_sum(route.source, route.destination, UDP, HEADER + length);
            self.frame[start + CHECKSUM_OFFSET..start + HEADER].copy_from_slice(&pseudo.to_be_bytes());
            let header = Header {
                flags: NEEDS_CHECKSUM,
                gso_type: GSO_NONE,
                checksum_start: start as u16,
                checksum_offset: CHECKSUM_OFFSET as u16,
                ..Header::default()
            };
            if sink.deliver(&header, &[&self.frame, payload]) {
                return true;
            }
        }
        self.identification = self.identification.wrapping_add(1);
        let datagram = datagram(route, source.port(), destination.port(), payload);
        fragments::send(outbox, route, UDP, &datagram, side.mtu, self.identification);
        outbox.flush(sink)
    }

    /// Forgets sockets and peers that have been silent.
    pub fn expire(&mut self, now: Instant) {
        self.flows.retain(|_, flow| {
            let dns = flow.remotes.iter().all(|remote| remote.seen.port() == DNS);
            now.duration_since(flow.used) < if dns { IDLE_DNS } else { IDLE }
        });
        let flows = &self.flows;
        self.ids.retain(|_, id| flows.contains_key(id));
        for listener in &mut self.listeners {
            listener.peers.retain(|_, (_, used)| now.duration_since(*used) < IDLE);
        }
    }

    pub fn clear(&mut self) {
        self.flows.clear();
        self.ids.clear();
        for listener in &mut self.listeners {
            listener.peers.clear();
        }
    }
}

/// A datagram in the buffer.
struct Incoming {
    source: SocketAddr,
    destination: SocketAddr,
    mac: Mac,
    length: usize,
}

impl Flow {
    fn send(&mut self, datagram: &Datagram<'_>, real: SocketAddr) -> Result<(), Errno> {
        if !self.remotes.iter().any(|remote| remote.real == real && remote.seen == datagram.destination) {
            self.add_remote(Remote { real, seen: datagram.destination })?;
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match self.remotes.as_slice() {
            [_] => rustix::net::send(&self.socket, datagram.payload, flags)?,
            _ => rustix::net::sendto(&self.socket, datagram.payload, flags, &real)?,
        };
        Ok(())
    }

    fn add_remote(&mut self, remote: Remote) -> Result<(), Errno> {
        match self.remotes.as_slice() {
            [] => rustix::net::connect(&self.socket, &remote.real)?,
            [_] => {
                // Not connected any more, but at the same port.
                let port = local_port(&self.socket)?;
                rustix::net::connect_unspec(&self.socket)?;
                let any: IpAddr = if self.key.v4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
                rustix::net::bind(&self.socket, &SocketAddr::new(any, port))?;
            }
            _ if self.remotes.len() >= MOST_REMOTES => {
                self.remotes.remove(1);
            }
            _ => {}
        }
        self.remotes.push(remote);
        Ok(())
    }

    /// What the guest calls who sent something; `None`: a stranger.
    fn seen(&self, from: SocketAddr) -> Option<SocketAddr> {
        let exact = self.remotes.iter().find(|remote| remote.real == from).map(|remote| remote.seen);
        let address =
            || self.remotes.iter().find(|remote| remote.real.ip() == from.ip()).map(|remote| remote.seen.ip());
        exact.or_else(|| address().map(|address| SocketAddr::new(address, from.port())))
    }

    /// The host has learned that nobody is there: so does the guest, by a quote of what it must have sent.
    fn tell_unreachable(&self, outbox: &mut Outbox) {
        let [remote] = self.remotes.as_slice() else { return };
        let (guest, seen) = (self.key.guest, remote.seen);
        let sent = Route { guest: self.mac, source: guest.ip(), destination: seen.ip() };
        let mut frame = Vec::new();
        sent.write(&mut frame, UDP, HEADER);
        write_header(&mut frame, guest.port(), seen.port(), 0);
        let Some(packet) = frame.get(ETHERNET_HEADER..) else { return };
        icmp::unreachable(outbox, self.mac, seen.ip(), packet, guest.ip(), Unreachable::Port);
    }
}

impl Listener {
    /// What the guest calls a peer, which is remembered. `None`: there are too many of them.
    fn seen(&mut self, from: SocketAddr, now: Instant) -> Option<SocketAddr> {
        let address = plan::seen_by_guest(from.ip(), self.forward.guest.ip());
        // Its own port, or, where another peer has that, the next one that nobody has.
        let candidates =
            (0..64).map(|step| SocketAddr::new(address, from.port().wrapping_add(step))).filter(|c| c.port() != 0);
        let full = self.peers.len() >= MOST_PEERS;
        for candidate in candidates {
            match self.peers.get_mut(&candidate) {
                Some((peer, used)) if *peer == from => {
                    *used = now;
                    return Some(candidate);
                }
                Some(_) => {}
                None if full => return None,
                None => {
                    self.peers.insert(candidate, (from, now));
                    return Some(candidate);
                }
            }
        }
        None
    }
}

fn local_port(socket: &OwnedFd) -> Result<u16, Errno> {
    let address = rustix::net::getsockname(socket)?;
    Ok(SocketAddr::try_from(address).map_or(0, |address| address.port()))
}

pub fn family(v4: bool) -> AddressFamily {
    if v4 { AddressFamily::INET } else { AddressFamily::INET6 }
}
