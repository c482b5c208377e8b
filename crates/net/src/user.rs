//! The user network: a gateway between the guest's frames and the host's sockets.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use smoltcp::wire::EthernetProtocol;

use crate::backend::LONGEST_FRAME;
use crate::fragments::Reassembly;
use crate::header::{GSO_ECN, GSO_NONE, GSO_TCP4, GSO_TCP6, NEEDS_CHECKSUM};
use crate::icmp::{self, Pings, Unreachable};
use crate::link::{self, Neighbours};
use crate::outbox::Outbox;
use crate::packet::{self, Ethernet, Ip, Mac};
use crate::plan::{self, Place};
use crate::poller::{self, Poller, Source};
use crate::resolver::Resolvers;
use crate::tcp::Tcp;
use crate::tftp::Tftp;
use crate::udp::{Datagram, Side, Udp};
use crate::{Backend, Error, Forward, Header, Offloads, Protocol, Sink, dhcp};

/// How often silent flows are looked for.
const HOUSEKEEPING: Duration = Duration::from_secs(5);
/// How often the router makes itself known, well within its lifetime (RFC 4861, 6.2.1).
const ADVERTISEMENT: Duration = Duration::from_secs(600);

/// The most file descriptors that are of use.
const DESCRIPTORS: u64 = 4096;

/// How a user network is to be.
#[derive(Clone, Debug)]
pub struct UserConfig {
    pub forwards: Vec<Forward>,
    /// The guest reaches nothing but the gateway itself; forwarded ports lead into it all the same.
    pub restrict: bool,
    /// The longest IP packet on the link, 1280 (IPv6's least) to 65535.
    pub mtu: u16,
    /// The card's hardware address.
    pub mac: Mac,
    /// The directory whose files the gateway serves by TFTP.
    pub tftp: Option<PathBuf>,
    /// What DHCP tells firmware to boot: a file of the gateway's TFTP server, or what else a boot loader understands. At
    /// most 255 bytes.
    pub boot_file: Option<String>,
    /// Where the host's name servers are listed.
    pub resolv_conf: PathBuf,
}

impl UserConfig {
    /// The usual one for a card.
    pub fn new(mac: Mac) -> Self {
        UserConfig {
            forwards: Vec::new(),
            restrict: false,
            mtu: 1500,
            mac,
            tftp: None,
            boot_file: None,
            resolv_conf: "/etc/resolv.conf".into(),
        }
    }
}

/// See the module.
pub struct UserNet {
    restrict: bool,
    mtu: u16,
    offloads: Offloads,
    poller: Poller,
    outbox: Outbox,
    neighbours: Neighbours,
    resolvers: Resolvers,
    reassembly: Reassembly,
    tcp: Tcp,
    udp: Udp,
    tftp: Option<Tftp>,
    boot_file: Option<String>,
    pings: Pings,
    housekeeping: Instant,
    /// There was more for the guest than one call of `receive` is to hand over.
    unfinished: bool,
    advertisement: Option<Instant>,
}

impl UserNet {
    /// Makes the network; forwarded ports listen from now on.
    pub fn new(config: UserConfig) -> Result<Self, Error> {
        let now = Instant::now();
        let descriptors = descriptors();
        let poller = Poller::new().map_err(|errno| Error::Poller(errno.into()))?;
        let (mut tcp, mut udp) = (Tcp::new(descriptors / 2, now), Udp::new(descriptors / 8));
        for forward in config.forwards {
            match forward.protocol {
                Protocol::Tcp => tcp.listen(forward, &poller)?,
                Protocol::Udp => udp.listen(forward, &poller)?,
            }
        }
        let tftp = config.tftp.map(Tftp::new).transpose()?;
        Ok(UserNet {
            restrict: config.restrict,
            mtu: config.mtu.max(1280),
            offloads: Offloads::default(),
            poller,
            outbox: Outbox::default(),
            neighbours: Neighbours::new(config.mac),
            resolvers: Resolvers::new(config.resolv_conf),
            reassembly: Reassembly::default(),
            tcp,
            udp,
            tftp,
            boot_file: config.boot_file,
            pings: Pings::default(),
            housekeeping: now,
            unfinished: false,
            advertisement: None,
        })
    }

    /// Where forwarded ports listen, first TCP's, then UDP's: of use where the port was left to the host (0).
    pub fn listening(&self) -> Vec<SocketAddr> {
        let sockets = self.tcp.listening().chain(self.udp.listening());
        sockets.filter_map(|socket| SocketAddr::try_from(rustix::net::getsockname(socket).ok()?).ok()).collect()
    }

    fn ip(&mut self, ip: Ip<'_>, from: Mac, complete: bool) {
        // Nobody sends by these, least of all in our name.
        let unspecified = ip.source.is_unspecified();
        if ip.source.is_multicast() || ip.source.is_loopback() || plan::is_ours(ip.source) {
            return;
        }
        if !unspecified {
            self.neighbours.learn(ip.source, from);
        }
        let now = Instant::now();
        let Some(fragment) = ip.fragment else { return self.whole(ip, from, complete, now) };
        if let Some(payload) = self.reassembly.add(&ip, fragment, now) {
            self.whole(Ip { payload: &payload, fragment: None, ..ip }, from, complete, now);
        }
    }

    /// Takes a packet that is no fragment.
    fn whole(&mut self, ip: Ip<'_>, from: Mac, complete: bool, now: Instant) {
        match (ip.protocol, ip.source) {
            (packet::UDP, IpAddr::V4(_)) if self.dhcp(&ip, complete) => return,
            (packet::ICMP6, IpAddr::V6(_)) => {
                let facts = link::Facts { mtu: self.mtu, resolvers: self.resolvers.servers().len() };
                if !icmp::checksum_holds(&ip) || link::ndp(&ip, from, &facts, &mut self.outbox) {
                    return;
                }
            }
            _ => {}
        }
        let broadcast = ip.destination == IpAddr::V4(Ipv4Addr::BROADCAST);
        if ip.source.is_unspecified() || ip.destination.is_multicast() || broadcast {
            return;
        }
        let place = plan::place(ip.destination);
        let gateway = plan::gateway(ip.source);
        if place == Place::Outside && ip.hop_limit <= 1 {
            return icmp::time_exceeded(&mut self.outbox, from, gateway, ip.packet, ip.source);
        }
        if let Err(why) = self.transport(&ip, from, complete, place, now) {
            // A port is refused by who has it, the rest by who does not know the way.
            let by = if why == Unreachable::Port { ip.destination } else { gateway };
            icmp::unreachable(&mut self.outbox, from, by, ip.packet, ip.source, why);
        }
    }

    fn transport(
        &mut self,
        ip: &Ip<'_>,
        from: Mac,
        complete: bool,
        place: Place,
        now: Instant,
    ) -> Result<(), Unreachable> {
        let UserNet { restrict, resolvers, .. } = self;
        let mut real = |seen| real_address(seen, *restrict, resolvers);
        match (ip.protocol, ip.source) {
            (packet::TCP, _) => self.tcp.input(ip, complete, from, real, &self.poller, &mut self.outbox),
            (packet::UDP, _) => {
                let Some(datagram) = Datagram::parse(ip, complete) else { return Ok(()) };
                let side = Side { offloads: self.offloads, mtu: self.mtu.into(), now };
                if let (Place::Gateway, Some(tftp)) = (place, &mut self.tftp)
                    && tftp.input(&datagram, from, side, &mut self.outbox)
                {
                    return Ok(());
                }
                self.udp.send(&datagram, from, || real(datagram.destination), &self.poller, now)
            }
            (packet::ICMP4, IpAddr::V4(_)) | (packet::ICMP6, IpAddr::V6(_)) => {
                if !icmp::checksum_holds(ip) {
                    return Ok(());
                }
                match place {
                    Place::Gateway | Place::Resolver(_) => {
                        Pings::answer(ip, from, self.mtu.into(), &mut self.outbox);
                        Ok(())
                    }
                    Place::Outside if self.restrict => Err(Unreachable::Prohibited),
                    Place::Outside => self.pings.send(ip, from, &self.poller, now),
                    // No error is told of an error, and this may be one (RFC 1122, 3.2.2).
                    Place::Nowhere => Ok(()),
                }
            }
            _ => Err(Unreachable::Protocol),
        }
    }

    /// Answers if it is a request to a DHCP server.
    fn dhcp(&mut self, ip: &Ip<'_>, complete: bool) -> bool {
        let to_us = [IpAddr::V4(Ipv4Addr::BROADCAST), plan::GATEWAY4.into()].contains(&ip.destination);
        let Some(datagram) = Datagram::parse(ip, complete).filter(|_| to_us) else { return false };
        if datagram.destination.port() != dhcp::SERVER_PORT {
            return false;
        }
        let boot_file = self.boot_file.as_deref();
        let facts = dhcp::Facts { mtu: self.mtu, resolvers: self.resolvers.servers().len(), boot_file };
        if let Some(answer) = dhcp::answer(datagram.payload, &facts) {
            self.outbox.push(answer);
        }
        true
    }

    fn events(&mut self) {
        loop {
            let events = self.poller.take();
            let last = events.len() < poller::BATCH;
            for ready in events {
                match ready.source {
                    Source::Tcp(_) | Source::TcpListener(_) => {
                        let neighbours = &self.neighbours;
                        self.tcp.event(ready, &self.poller, &mut self.outbox, |address| neighbours.find(address));
                    }
                    Source::Udp(_) | Source::UdpListener(_) => self.udp.readable(ready.source),
                    Source::Ping(id) => self.pings.receive(id, self.mtu.into(), &mut self.outbox),
                }
            }
            if last {
                return;
            }
        }
    }

    fn housekeeping(&mut self, now: Instant) {
        if now < self.housekeeping {
            return;
        }
        self.housekeeping = now + HOUSEKEEPING;
        self.udp.expire(now);
        self.pings.expire(now);
        self.tftp.iter_mut().for_each(|tftp| tftp.expire(now));
        let neighbours = &self.neighbours;
        self.tcp.accept_all(&self.poller, |address| neighbours.find(address));
        if self.advertisement.is_none_or(|due| due <= now) {
            self.advertisement = Some(now + ADVERTISEMENT);
            let facts = link::Facts { mtu: self.mtu, resolvers: self.resolvers.servers().len() };
            self.outbox.push(link::router_advertisement(&facts));
        }
    }
}

/// How many file descriptors this process may have, after it has asked for more. Each connection of the guest is one,
/// and the guest must not be able to take them all.
fn descriptors() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(DESCRIPTORS, |most| most.min(DESCRIPTORS));
    if limit.current.is_none_or(|now| now >= wanted) {
        return DESCRIPTORS as usize;
    }
    match setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), ..limit }) {
        Ok(()) => wanted as usize,
        Err(_) => limit.current.map_or(0, |now| now as usize),
    }
}

/// Where on the host's side `seen` is.
fn real_address(seen: SocketAddr, restrict: bool, resolvers: &mut Resolvers) -> Result<SocketAddr, Unreachable> {
    if restrict {
        return Err(Unreachable::Prohibited);
    }
    match plan::place(seen.ip()) {
        Place::Gateway => Ok(SocketAddr::new(plan::loopback(seen.ip()), seen.port())),
        // Name service only (RFC 1035, 4.2), whatever else that machine offers.
        Place::Resolver(index) if seen.port() == 53 => Ok(SocketAddr::new(resolvers.server(index), 53)),
        Place::Resolver(_) => Err(Unreachable::Port),
        Place::Outside => Ok(seen),
        Place::Nowhere => Err(Unreachable::Host),
    }
}

impl Backend for UserNet {
    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tso4: true, tso6: true }
    }

    fn set_guest_offloads(&mut self, offloads: Offloads) {
        self.offloads = offloads;
    }

    fn set_enabled(&mut self, _: bool) {
        // It is attached to a card's only pair.
    }

    fn send(&mut self, header: &Header, frame: &[u8]) {
        let known = matches!(header.gso_type & !GSO_ECN, GSO_NONE | GSO_TCP4 | GSO_TCP6);
        if !known || frame.len() > LONGEST_FRAME {
            return;
        }
        let Some(ethernet) = Ethernet::parse(frame).filter(Ethernet::is_for_us) else { return };
        let complete = header.flags & NEEDS_CHECKSUM == 0;
        match ethernet.protocol {
            EthernetProtocol::Arp => link::arp(ethernet.payload, &mut self.neighbours, &mut self.outbox),
            EthernetProtocol::Ipv4 => {
                if let Some(ip) = Ip::parse4(ethernet.payload) {
                    self.ip(ip, ethernet.source, complete);
                }
            }
            EthernetProtocol::Ipv6 => {
                if let Some(ip) = Ip::parse6(ethernet.payload) {
                    self.ip(ip, ethernet.source, complete);
                }
            }
            EthernetProtocol::Unknown(_) => {}
        }
    }

    fn receive(&mut self, sink: &mut dyn Sink) {
        let now = Instant::now();
        self.events();
        self.housekeeping(now);
        let side = Side { offloads: self.offloads, mtu: self.mtu.into(), now };
        let neighbours = &self.neighbours;
        let room = self.outbox.flush(sink)
            && self.udp.receive(side, sink, &mut self.outbox, |address| neighbours.find(address))
            && self.tcp.receive(&side, sink, &mut self.outbox);
        self.unfinished = room && self.outbox.flush(sink) && self.udp.has_more();
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }

    fn deadline(&self) -> Option<Instant> {
        if self.unfinished {
            return Some(Instant::now());
        }
        Some(self.tcp.deadline().map_or(self.housekeeping, |timer| timer.min(self.housekeeping)))
    }

    fn reset(&mut self) {
        self.outbox.clear();
        self.neighbours.clear();
        self.reassembly = Reassembly::default();
        self.tcp.clear();
        self.udp.clear();
        self.pings.clear();
        self.tftp.iter_mut().for_each(Tftp::clear);
        self.advertisement = None;
    }
}
