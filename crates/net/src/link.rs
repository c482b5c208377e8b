//! The link layer: who is where. Answers ARP (RFC 826) and neighbour discovery (RFC 4861) for the gateway and the name
//! servers, advertises the IPv6 prefix, and remembers by which hardware address the guest uses its IP addresses.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};

use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr, EthernetAddress};

use crate::outbox::Outbox;
use crate::packet::{ICMP6, Ip, Mac, NDP_HOP_LIMIT, Route};
use crate::plan::{self, GATEWAY_MAC};
use crate::{icmp, packet};

/// Message types of neighbour discovery (RFC 4861, 4).
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];

/// How long the router is one, in seconds: the most that is allowed (RFC 8319, 4).
const ROUTER_LIFETIME: u16 = 65535;
const FOREVER: u32 = u32::MAX;

/// A guest has few addresses; one that pretends to have many loses the oldest knowledge.
const MOST_NEIGHBOURS: usize = 256;

/// The guest's side of the link.
pub struct Neighbours {
    /// The card's own address, which holds where nothing else is known.
    card: Mac,
    known: HashMap<IpAddr, Mac>,
}

impl Neighbours {
    pub fn new(card: Mac) -> Self {
        Neighbours { card, known: HashMap::new() }
    }

    pub fn learn(&mut self, address: IpAddr, mac: Mac) {
        if address.is_unspecified() || self.known.get(&address) == Some(&mac) {
            return;
        }
        if self.known.len() >= MOST_NEIGHBOURS {
            self.known.clear();
        }
        self.known.insert(address, mac);
    }

    pub fn find(&self, address: IpAddr) -> Mac {
        self.known.get(&address).copied().unwrap_or(self.card)
    }

    pub fn clear(&mut self) {
        self.known.clear();
    }
}

/// Takes an ARP packet.
pub fn arp(payload: &[u8], neighbours: &mut Neighbours, outbox: &mut Outbox) {
    let Ok(packet) = ArpPacket::new_checked(payload) else { return };
    let Ok(ArpRepr::EthernetIpv4 {
        operation, source_hardware_addr, source_protocol_addr, target_protocol_addr, ..
    }) = ArpRepr::parse(&packet)
    else {
        return;
    };
    if !source_hardware_addr.is_unicast() {
        return;
    }
    neighbours.learn(source_protocol_addr.into(), source_hardware_addr.0);
    // A probe (RFC 5227) asks from 0.0.0.0, and asks about the guest's own address too: that one stays unanswered.
    if operation != ArpOperation::Request || !plan::is_ours(target_protocol_addr.into()) {
        return;
    }
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: EthernetAddress(GATEWAY_MAC),
        source_protocol_addr: target_protocol_addr,
        target_hardware_addr: source_hardware_addr,
        target_protocol_addr: source_protocol_addr,
    };
    let mut frame = Vec::with_capacity(packet::ETHERNET_HEADER + reply.buffer_len());
    frame.extend_from_slice(&source_hardware_addr.0);
    frame.extend_from_slice(&GATEWAY_MAC);
    frame.extend_from_slice(&[0x08, 0x06]);
    frame.resize(packet::ETHERNET_HEADER + reply.buffer_len(), 0);
    reply.emit(&mut ArpPacket::new_unchecked(&mut frame[packet::ETHERNET_HEADER..]));
    outbox.push(frame);
}

/// Takes an ICMPv6 message if it belongs to neighbour discovery. The checksum has been verified.
pub fn ndp(ip: &Ip<'_>, from: Mac, facts: &Facts, outbox: &mut Outbox) -> bool {
    let [kind, code, ..] = *ip.payload else { return false };
    if !(ROUTER_SOLICITATION..=NEIGHBOUR_ADVERTISEMENT).contains(&kind) {
        return false;
    }
    if ip.hop_limit != NDP_HOP_LIMIT || code != 0 {
        return true;
    }
    match kind {
        ROUTER_SOLICITATION => outbox.push(router_advertisement(facts)),
        NEIGHBOUR_SOLICITATION => {
            let Some(target) = ip.payload.get(8..24).and_then(|bytes| <[u8; 16]>::try_from(bytes).ok()) else {
                return true;
            };
            let target = Ipv6Addr::from(target);
            if ip.source.is_unspecified() {
                // A guest that makes sure of its address has just come up: it need not wait until it asks for routers.
                outbox.push(router_advertisement(facts));
            }
            if plan::is_ours(target.into()) {
                // Duplicate detection asks from the unspecified address and is answered to all (7.2.4).
                let probe = ip.source.is_unspecified();
                outbox.push(neighbour_advertisement(target, if probe { None } else { Some((ip.source, from)) }));
            }
        }
        _ => {}
    }
    true
}

/// What router advertisements tell.
pub struct Facts {
    pub mtu: u16,
    pub resolvers: usize,
}

pub fn router_advertisement(facts: &Facts) -> Vec<u8> {
    let mut message = vec![ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0];
    message.extend_from_slice(&ROUTER_LIFETIME.to_be_bytes());
    // Reachable time and retransmission timer: unspecified.
    message.extend_from_slice(&[0; 8]);
    // Source link-layer address (RFC 4861, 4.6.1).
    message.extend_from_slice(&[1, 1]);
    message.extend_from_slice(&GATEWAY_MAC);
    // MTU (4.6.4).
    message.extend_from_slice(&[5, 1, 0, 0]);
    message.extend_from_slice(&u32::from(facts.mtu).to_be_bytes());
    // Prefix, on link and for address configuration (4.6.2).
    message.extend_from_slice(&[3, 4, 64, 0xc0]);
    message.extend_from_slice(&FOREVER.to_be_bytes());
    message.extend_from_slice(&FOREVER.to_be_bytes());
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(&plan::PREFIX6.octets());
    // Name servers (RFC 8106, 5.1).
    let resolvers = facts.resolvers.min(plan::RESOLVERS);
    message.extend_from_slice(&[25, 1 + 2 * resolvers as u8, 0, 0]);
    message.extend_from_slice(&FOREVER.to_be_bytes());
    for index in 0..resolvers {
        message.extend_from_slice(&plan::resolver6(index).octets());
    }
    ndp_frame(plan::ROUTER6, ALL_NODES.into(), ALL_NODES_MAC, message)
}

fn neighbour_advertisement(target: Ipv6Addr, to: Option<(IpAddr, Mac)>) -> Vec<u8> {
    // Flags: router, solicited, override (RFC 4861, 4.4).
    let flags = 0x80 | if to.is_some() { 0x40 } else { 0 } | 0x20;
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend_from_slice(&target.octets());
    // Target link-layer address (4.6.1).
    message.extend_from_slice(&[2, 1]);
    message.extend_from_slice(&GATEWAY_MAC);
    let (destination, mac) = to.unwrap_or((ALL_NODES.into(), ALL_NODES_MAC));
    ndp_frame(target, destination, mac, message)
}

fn ndp_frame(source: Ipv6Addr, destination: IpAddr, guest: Mac, mut message: Vec<u8>) -> Vec<u8> {
    let route = Route { guest, source: source.into(), destination };
    icmp::fill_checksum(&mut message, route);
    let mut frame = Vec::new();
    route.write_with(&mut frame, ICMP6, message.len(), NDP_HOP_LIMIT, None);
    frame.extend_from_slice(&message);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Ethernet;
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{Icmpv6Packet, Icmpv6Repr, NdiscRepr};

    const GUEST: Mac = [0x52, 0x54, 0, 1, 2, 3];
    const FACTS: Facts = Facts { mtu: 1500, resolvers: 2 };

    fn ask(target: [u8; 4]) -> (Neighbours, Outbox) {
        let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
        packet.extend_from_slice(&GUEST);
        packet.extend_from_slice(&[10, 0, 2, 15]);
        packet.extend_from_slice(&[0; 6]);
        packet.extend_from_slice(&target);
        let (mut neighbours, mut outbox) = (Neighbours::new([9; 6]), Outbox::default());
        arp(&packet, &mut neighbours, &mut outbox);
        for length in 0..packet.len() {
            arp(&packet[..length], &mut neighbours, &mut Outbox::default());
        }
        (neighbours, outbox)
    }

    #[test]
    fn arp_answers_for_gateway_and_resolvers_only_and_learns() {
        let (neighbours, mut outbox) = ask([10, 0, 2, 2]);
        assert_eq!(neighbours.find(plan::GUEST4.into()), GUEST);
        assert_eq!(neighbours.find([10, 0, 2, 77].into()), [9; 6]);
        let frame = outbox.pop().unwrap();
        assert_eq!(frame[..6], GUEST);
        assert_eq!(frame[22..28], GATEWAY_MAC);
        assert_eq!(frame[28..32], [10, 0, 2, 2]);
        assert!(!ask([10, 0, 2, 3]).1.is_empty());
        // The guest's own address, and the outside, which is the gateway's to reach.
        assert!(ask([10, 0, 2, 15]).1.is_empty());
        assert!(ask([192, 0, 2, 1]).1.is_empty());
    }

    fn solicit(payload: &[u8], hop_limit: u8) -> Outbox {
        let ip = Ip {
            source: "fe80::5054:ff:fe01:203".parse().unwrap(),
            destination: plan::GATEWAY6.into(),
            hop_limit,
            protocol: ICMP6,
            payload,
            fragment: None,
            packet: payload,
        };
        let mut outbox = Outbox::default();
        assert!(ndp(&ip, GUEST, &FACTS, &mut outbox));
        outbox
    }

    fn parse(frame: &[u8], check: impl FnOnce(NdiscRepr<'_>)) {
        let ip = Ip::parse6(Ethernet::parse(frame).unwrap().payload).unwrap();
        let (IpAddr::V6(source), IpAddr::V6(destination)) = (ip.source, ip.destination) else { panic!() };
        assert_eq!(ip.hop_limit, 255);
        let packet = Icmpv6Packet::new_checked(ip.payload).unwrap();
        match Icmpv6Repr::parse(&source, &destination, &packet, &ChecksumCapabilities::default()).unwrap() {
            Icmpv6Repr::Ndisc(message) => check(message),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn neighbours_are_told_where_the_gateway_is() {
        let mut message = vec![NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
        message.extend_from_slice(&plan::GATEWAY6.octets());
        let frame = solicit(&message, 255).pop().unwrap();
        parse(&frame, |message| {
            let NdiscRepr::NeighborAdvert { target_addr, lladdr, .. } = message else { panic!("{message:?}") };
            assert_eq!((target_addr, lladdr.unwrap().as_bytes()), (plan::GATEWAY6, &GATEWAY_MAC[..]));
        });
        // From beyond a router, cut short, and about somebody else.
        assert!(solicit(&message, 64).is_empty());
        assert!(solicit(&message[..23], 255).is_empty());
        message[23] = 0x15;
        assert!(solicit(&message, 255).is_empty());
    }

    #[test]
    fn routers_are_advertised_with_prefix_and_mtu() {
        let frame = solicit(&[ROUTER_SOLICITATION, 0, 0, 0, 0, 0, 0, 0], 255).pop().unwrap();
        parse(&frame, |message| {
            let NdiscRepr::RouterAdvert { mtu, prefix_info, .. } = message else { panic!("{message:?}") };
            assert_eq!((mtu, prefix_info.unwrap().prefix), (Some(1500), plan::PREFIX6));
        });
    }
}
