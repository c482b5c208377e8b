//! ICMP for both versions of IP: pings of the gateway are answered here, pings of others leave by sockets that need no
//! privilege (icmp(7), "ICMP datagram sockets"; the host's `net.ipv4.ping_group_range` says who may), and what can't be
//! reached is told to the guest.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto};
use smoltcp::wire::checksum;

use crate::fragments;
use crate::outbox::Outbox;
use crate::packet::{ICMP4, ICMP6, Ip, Mac, Route, pseudo_header_sum};
use crate::poller::{Poller, Source};

/// Echo request and reply (RFC 792; RFC 4443, 4).
const ECHO4: (u8, u8) = (8, 0);
const ECHO6: (u8, u8) = (128, 129);
const ECHO_HEADER: usize = 8;

/// Pings of one guest process to one address.
const MOST_FLOWS: usize = 64;
const IDLE: Duration = Duration::from_secs(30);

/// How much of the packet that can't be sent an error carries: an error for the guest never exceeds the least MTU
/// (RFC 1812, 4.3.2.3; RFC 4443, 2.4).
const QUOTE4: usize = 576 - 20 - 8;
const QUOTE6: usize = 1280 - 40 - 8;

/// Why a packet went nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    Network,
    Host,
    Port,
    Protocol,
    Prohibited,
}

impl Unreachable {
    /// What a failed system call means for the guest.
    pub fn from_errno(errno: Errno) -> Self {
        match errno {
            Errno::CONNREFUSED => Unreachable::Port,
            Errno::HOSTUNREACH | Errno::HOSTDOWN => Unreachable::Host,
            Errno::ACCESS | Errno::PERM => Unreachable::Prohibited,
            _ => Unreachable::Network,
        }
    }

    /// Type and code (RFC 792, RFC 1812, RFC 4443).
    fn code(self, v4: bool) -> [u8; 2] {
        match (self, v4) {
            (Unreachable::Network, true) => [3, 0],
            (Unreachable::Host, true) => [3, 1],
            (Unreachable::Protocol, true) => [3, 2],
            (Unreachable::Port, true) => [3, 3],
            (Unreachable::Prohibited, true) => [3, 13],
            (Unreachable::Network, false) => [1, 0],
            (Unreachable::Prohibited, false) => [1, 1],
            (Unreachable::Host, false) => [1, 3],
            (Unreachable::Port, false) => [1, 4],
            // The next header is not known (parameter problem).
            (Unreachable::Protocol, false) => [4, 1],
        }
    }
}

/// Tells the guest that its packet can't be delivered, in the name of `from`.
pub fn unreachable(outbox: &mut Outbox, guest: Mac, from: IpAddr, packet: &[u8], to: IpAddr, why: Unreachable) {
    error(outbox, Route { guest, source: from, destination: to }, why.code(to.is_ipv4()), packet);
}

/// Tells the guest that its packet had no hops left (for traceroute).
pub fn time_exceeded(outbox: &mut Outbox, guest: Mac, from: IpAddr, packet: &[u8], to: IpAddr) {
    let code = if to.is_ipv4() { [11, 0] } else { [3, 0] };
    error(outbox, Route { guest, source: from, destination: to }, code, packet);
}

fn error(outbox: &mut Outbox, route: Route, code: [u8; 2], packet: &[u8]) {
    let (protocol, quote) = if route.destination.is_ipv4() { (ICMP4, QUOTE4) } else { (ICMP6, QUOTE6) };
    // Nobody is told of what was sent to or from a group or nobody (RFC 1122, 3.2.2).
    if route.destination.is_unspecified() || route.destination.is_multicast() {
        return;
    }
    let mut message = vec![code[0], code[1], 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(packet.get(..quote).unwrap_or(packet));
    fill_checksum(&mut message, route);
    let mut frame = Vec::with_capacity(route.header_length() + message.len());
    route.write(&mut frame, protocol, message.len());
    frame.extend_from_slice(&message);
    outbox.push(frame);
}

/// Sums up an ICMP message: ICMPv6's checksum is over a pseudo header too (RFC 4443, 2.3).
pub fn fill_checksum(message: &mut [u8], route: Route) {
    let Some(field) = message.get_mut(2..4) else { return };
    field.fill(0);
    let pseudo = match route.destination {
        IpAddr::V4(_) => 0,
        IpAddr::V6(_) => pseudo_header_sum(route.source, route.destination, ICMP6, message.len()),
    };
    let sum = !checksum::combine(&[pseudo, checksum::data(message)]);
    if let Some(field) = message.get_mut(2..4) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
}

/// Whether the message's own checksum is right.
pub fn checksum_holds(ip: &Ip<'_>) -> bool {
    match ip.source {
        IpAddr::V4(_) => checksum::data(ip.payload) == 0xffff,
        IpAddr::V6(_) => ip.checksum_holds(),
    }
}

/// The data of an echo request.
fn echo_request<'a>(ip: &Ip<'a>) -> Option<&'a [u8]> {
    let (request, _) = echo_types(ip.source);
    (ip.payload.len() >= ECHO_HEADER && ip.payload.starts_with(&[request, 0])).then_some(ip.payload)
}

fn echo_types(like: IpAddr) -> (u8, u8) {
    if like.is_ipv4() { ECHO4 } else { ECHO6 }
}

fn protocol_of(like: IpAddr) -> u8 {
    if like.is_ipv4() { ICMP4 } else { ICMP6 }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    guest: IpAddr,
    /// As the guest calls it.
    remote: IpAddr,
    identifier: [u8; 2],
}

struct Flow {
    socket: OwnedFd,
    mac: Mac,
    used: Instant,
}

/// The pings under way.
#[derive(Default)]
pub struct Pings {
    flows: HashMap<u32, (Key, Flow)>,
    ids: HashMap<Key, u32>,
    next: u32,
    told: bool,
}

impl Pings {
    /// Answers a ping in the name of who it was for.
    pub fn answer(ip: &Ip<'_>, guest: Mac, mtu: usize, outbox: &mut Outbox) {
        if let Some(request) = echo_request(ip) {
            reply(request, Route { guest, source: ip.destination, destination: ip.source }, mtu, outbox);
        }
    }

    /// Sends a ping to the host's network.
    pub fn send(&mut self, ip: &Ip<'_>, mac: Mac, poller: &Poller, now: Instant) -> Result<(), Unreachable> {
        let Some(request) = echo_request(ip) else { return Ok(()) };
        let Some(&identifier) = request.get(4..6).and_then(|bytes| bytes.first_chunk()) else { return Ok(()) };
        let key = Key { guest: ip.source, remote: ip.destination, identifier };
        let id = match self.ids.get(&key) {
            Some(&id) => id,
            None => self.open(key, mac, poller, now).map_err(|errno| self.refused(errno))?,
        };
        let Some((_, flow)) = self.flows.get_mut(&id) else { return Ok(()) };
        flow.used = now;
        match rustix::net::send(&flow.socket, request, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS) => Ok(()),
            Err(errno) => Err(Unreachable::from_errno(errno)),
        }
    }

    fn open(&mut self, key: Key, mac: Mac, poller: &Poller, now: Instant) -> Result<u32, Errno> {
        if self.flows.len() >= MOST_FLOWS
            && let Some(oldest) = self.flows.iter().min_by_key(|(_, (_, flow))| flow.used).map(|(id, _)| *id)
        {
            self.close(oldest);
        }
        let (family, protocol) = if key.remote.is_ipv4() {
            (AddressFamily::INET, ipproto::ICMP)
        } else {
            (AddressFamily::INET6, ipproto::ICMPV6)
        };
        let socket = socket(family, SocketType::DGRAM, protocol)?;
        rustix::net::connect(&socket, &SocketAddr::new(key.remote, 0))?;
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        poller.add(&socket, Source::Ping(id), false)?;
        self.flows.insert(id, (key, Flow { socket, mac, used: now }));
        self.ids.insert(key, id);
        Ok(id)
    }

    fn refused(&mut self, errno: Errno) -> Unreachable {
        if matches!(errno, Errno::ACCESS | Errno::PERM) && !std::mem::replace(&mut self.told, true) {
            tracing::warn!(
                "pings can't leave the host: this user's group is not in its net.ipv4.ping_group_range (sysctl)"
            );
        }
        Unreachable::from_errno(errno)
    }

    /// Takes what has come for a flow.
    pub fn receive(&mut self, id: u32, mtu: usize, outbox: &mut Outbox) {
        let Some((key, flow)) = self.flows.get(&id) else { return };
        let mut buffer = vec![0; usize::from(u16::MAX)];
        let (_, echo_reply) = echo_types(key.remote);
        while let Ok((length, _)) = rustix::net::recv(&flow.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
            let Some(message) = buffer.get_mut(..length) else { return };
            // The socket's own identifier stands for the guest's.
            if message.len() >= ECHO_HEADER && message.starts_with(&[echo_reply, 0]) {
                message[4..6].copy_from_slice(&key.identifier);
                let route = Route { guest: flow.mac, source: key.remote, destination: key.guest };
                reply(message, route, mtu, outbox);
            }
        }
    }

    /// Forgets pings that nobody waits for any more.
    pub fn expire(&mut self, now: Instant) {
        self.flows.retain(|_, (_, flow)| now.duration_since(flow.used) < IDLE);
        let flows = &self.flows;
        self.ids.retain(|_, id| flows.contains_key(id));
    }

    pub fn clear(&mut self) {
        self.flows.clear();
        self.ids.clear();
    }

    fn close(&mut self, id: u32) {
        if let Some((key, _)) = self.flows.remove(&id) {
            self.ids.remove(&key);
        }
    }
}

/// Sends an echo message to the guest as a reply.
fn reply(message: &[u8], route: Route, mtu: usize, outbox: &mut Outbox) {
    let mut message = message.to_vec();
    if let Some(kind) = message.first_mut() {
        *kind = echo_types(route.destination).1;
    }
    fill_checksum(&mut message, route);
    let identification = message.get(4..8).and_then(|bytes| bytes.first_chunk()).map_or(0, |b| u32::from_be_bytes(*b));
    fragments::send(outbox, route, protocol_of(route.destination), &message, mtu, identification);
}

/// A socket that never blocks and no child process inherits.
pub fn socket(family: AddressFamily, kind: SocketType, protocol: Protocol) -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(family, kind, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, Some(protocol))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Ethernet;
    use crate::plan::{GATEWAY4, GATEWAY6, GUEST4};

    #[test]
    fn the_gateway_answers_pings_of_any_size() {
        let guest6: IpAddr = "fd52:696e:6765:72::15".parse().unwrap();
        for (source, destination) in [(GUEST4.into(), GATEWAY4.into()), (guest6, GATEWAY6.into())] {
            for size in [0, 56, 1452] {
                let to = Route { guest: [2; 6], source, destination };
                let mut message = vec![echo_types(source).0, 0, 0, 0, 1, 2, 0, 1];
                message.resize(8 + size, 0x55);
                fill_checksum(&mut message, to);
                let ip = Ip {
                    source,
                    destination,
                    hop_limit: 64,
                    protocol: protocol_of(source),
                    payload: &message,
                    fragment: None,
                    packet: &message,
                };
                assert!(checksum_holds(&ip));
                let mut outbox = Outbox::default();
                Pings::answer(&ip, [2; 6], 1500, &mut outbox);
                let frame = outbox.pop().unwrap();
                let parse = if source.is_ipv4() { Ip::parse4 } else { Ip::parse6 };
                let reply = parse(Ethernet::parse(&frame).unwrap().payload).unwrap();
                assert!(checksum_holds(&reply) && (reply.source, reply.destination) == (destination, source));
                assert_eq!(reply.payload[0], echo_types(source).1);
                assert_eq!(reply.payload[4..], message[4..]);
            }
        }
    }

    #[test]
    fn errors_quote_the_packet_within_the_least_mtu() {
        for (gateway, guest, most) in [
            (IpAddr::from(GATEWAY4), IpAddr::from(GUEST4), 576),
            (GATEWAY6.into(), "fd52:696e:6765:72::15".parse().unwrap(), 1280),
        ] {
            let mut outbox = Outbox::default();
            unreachable(&mut outbox, [2; 6], gateway, &[0x45; 3000], guest, Unreachable::Port);
            assert_eq!(outbox.pop().unwrap().len(), 14 + most);
            unreachable(&mut outbox, [2; 6], gateway, &[0x45; 28], guest, Unreachable::Host);
            assert!(outbox.pop().unwrap().len() < 14 + 80);
        }
    }
}
