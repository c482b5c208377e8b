//! IP packets: taken apart where the guest sent them, put together for it.
//!
//! Everything here trusts no field: a packet that is not whole, or contradicts itself, is no packet (`None`).

use std::net::IpAddr;

use smoltcp::wire::{EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6Packet, checksum};

use crate::plan::GATEWAY_MAC;

pub type Mac = [u8; 6];

pub const ETHERNET_HEADER: usize = 14;
pub const BROADCAST: Mac = [0xff; 6];

/// IP protocol numbers (IANA).
pub const ICMP4: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP6: u8 = 58;

/// Hops that a packet of ours may take; it takes none.
const HOP_LIMIT: u8 = 64;
/// NDP takes only packets that no router has touched (RFC 4861, 6.1).
pub const NDP_HOP_LIMIT: u8 = 255;

/// The Ethernet part of a frame.
pub struct Ethernet<'a> {
    pub source: Mac,
    pub destination: Mac,
    pub protocol: EthernetProtocol,
    pub payload: &'a [u8],
}

impl<'a> Ethernet<'a> {
    pub fn parse(frame: &'a [u8]) -> Option<Self> {
        let frame = EthernetFrame::new_checked(frame).ok()?;
        let source = frame.src_addr();
        // A group can't send (IEEE 802.3, 3.2.3).
        source.is_unicast().then(|| Ethernet {
            source: source.0,
            destination: frame.dst_addr().0,
            protocol: frame.ethertype(),
            payload: frame.payload(),
        })
    }

    /// Whether the frame is for the gateway, or for all.
    pub fn is_for_us(&self) -> bool {
        self.destination == GATEWAY_MAC || self.destination[0] & 1 == 1
    }
}

/// Where a fragment belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    pub identification: u32,
    /// In bytes.
    pub offset: usize,
    pub more: bool,
}

/// An IP packet of either version.
#[derive(Clone, Copy, Debug)]
pub struct Ip<'a> {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub hop_limit: u8,
    /// Of the payload: behind the extension headers of IPv6.
    pub protocol: u8,
    pub payload: &'a [u8],
    pub fragment: Option<Fragment>,
    /// All of it, for ICMP errors.
    pub packet: &'a [u8],
}

impl<'a> Ip<'a> {
    pub fn parse4(bytes: &'a [u8]) -> Option<Self> {
        let packet = Ipv4Packet::new_checked(bytes).ok()?;
        if packet.version() != 4 || packet.header_len() < 20 || !packet.verify_checksum() {
            return None;
        }
        let fragment = (packet.more_frags() || packet.frag_offset() != 0).then(|| Fragment {
            identification: packet.ident().into(),
            offset: packet.frag_offset().into(),
            more: packet.more_frags(),
        });
        Some(Ip {
            source: packet.src_addr().into(),
            destination: packet.dst_addr().into(),
            hop_limit: packet.hop_limit(),
            protocol: packet.next_header().into(),
            payload: packet.payload(),
            fragment,
            packet: bytes.get(..packet.total_len().into())?,
        })
    }

    pub fn parse6(bytes: &'a [u8]) -> Option<Self> {
        let packet = Ipv6Packet::new_checked(bytes).ok()?;
        if packet.version() != 6 {
            return None;
        }
        let mut protocol = u8::from(packet.next_header());
        let mut payload = bytes.get(40..packet.total_len())?;
        let mut fragment = None;
        loop {
            match IpProtocol::from(protocol) {
                IpProtocol::HopByHop | IpProtocol::Ipv6Opts => {}
                // A route with stops left is not ours to follow (RFC 5095).
                IpProtocol::Ipv6Route if payload.get(3) == Some(&0) => {}
                IpProtocol::Ipv6Route => return None,
                IpProtocol::Ipv6Frag => {
                    let header = payload.first_chunk::<8>()?;
                    let offset = u16::from_be_bytes([header[2], header[3]]);
                    fragment = Some(Fragment {
                        identification: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
                        offset: (offset & !7).into(),
                        more: offset & 1 == 1,
                    });
                    protocol = header[0];
                    payload = &payload[8..];
                    // What follows is only whole once reassembled, but a fragment that is none is (RFC 6946).
                    if fragment.is_some_and(|fragment| fragment.offset != 0 || fragment.more) {
                        break;
                    }
                    fragment = None;
                    continue;
                }
                _ => break,
            }
            let (&next, &length) = (payload.first()?, payload.get(1)?);
            payload = payload.get(8 + usize::from(length) * 8..)?;
            protocol = next;
        }
        Some(Ip {
            source: packet.src_addr().into(),
            destination: packet.dst_addr().into(),
            hop_limit: packet.hop_limit(),
            protocol,
            payload,
            fragment,
            packet: bytes.get(..packet.total_len())?,
        })
    }

    /// Whether the checksum in the payload, whose protocol has it over a pseudo header too (RFC 9293, 3.1), is right.
    pub fn checksum_holds(&self) -> bool {
        checksum::combine(&[self.pseudo_header_sum(), checksum::data(self.payload)]) == 0xffff
    }

    fn pseudo_header_sum(&self) -> u16 {
        pseudo_header_sum(self.source, self.destination, self.protocol, self.payload.len())
    }
}

/// The sum over the pseudo header, not inverted: what a partial checksum holds.
pub fn pseudo_header_sum(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> u16 {
    checksum::pseudo_header(
        &source.into(),
        &destination.into(),
        protocol.into(),
        u32::try_from(length).unwrap_or(u32::MAX),
    )
}

/// From whom to whom a packet for the guest goes.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    pub guest: Mac,
    pub source: IpAddr,
    pub destination: IpAddr,
}

impl Route {
    pub fn header_length(&self) -> usize {
        ETHERNET_HEADER + self.ip_header_length()
    }

    pub fn ip_header_length(&self) -> usize {
        if self.destination.is_ipv4() { 20 } else { 40 }
    }

    /// Replaces what is in `frame` by the headers for a packet with `length` bytes of payload, which must fit.
    pub fn write(&self, frame: &mut Vec<u8>, protocol: u8, length: usize) {
        self.write_with(frame, protocol, length, HOP_LIMIT, None);
    }

    /// The same with all that may vary.
    pub fn write_with(
        &self,
        frame: &mut Vec<u8>,
        protocol: u8,
        length: usize,
        hop_limit: u8,
        fragment: Option<Fragment>,
    ) {
        frame.clear();
        frame.extend_from_slice(&self.guest);
        frame.extend_from_slice(&GATEWAY_MAC);
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.extend_from_slice(&[0x08, 0x00]);
                frame.resize(ETHERNET_HEADER + 20, 0);
                let mut packet = Ipv4Packet::new_unchecked(&mut frame[ETHERNET_HEADER..]);
                packet.set_version(4);
                packet.set_header_len(20);
                packet.set_total_len(u16::try_from(length + 20).unwrap_or(u16::MAX));
                match fragment {
                    // A packet that is no fragment and will be none needs no identification (RFC 6864, 4.1).
                    None => packet.set_dont_frag(true),
                    Some(fragment) => {
                        packet.set_ident(fragment.identification as u16);
                        packet.set_frag_offset(fragment.offset as u16);
                        packet.set_more_frags(fragment.more);
                    }
                }
                packet.set_hop_limit(hop_limit);
                packet.set_next_header(protocol.into());
                packet.set_src_addr(source);
                packet.set_dst_addr(destination);
                packet.fill_checksum();
            }
            (source, destination) => {
                frame.extend_from_slice(&[0x86, 0xdd]);
                frame.resize(ETHERNET_HEADER + 40, 0);
                let extension = if fragment.is_some() { 8 } else { 0 };
                let mut packet = Ipv6Packet::new_unchecked(&mut frame[ETHERNET_HEADER..]);
                packet.set_version(6);
                packet.set_payload_len(u16::try_from(length + extension).unwrap_or(u16::MAX));
                packet.set_hop_limit(hop_limit);
                packet.set_next_header(if fragment.is_some() { IpProtocol::Ipv6Frag } else { protocol.into() });
                packet.set_src_addr(v6(source));
                packet.set_dst_addr(v6(destination));
                if let Some(Fragment { identification, offset, more }) = fragment {
                    let position = (offset as u16 & !7) | u16::from(more);
                    frame.extend_from_slice(&[protocol, 0]);
                    frame.extend_from_slice(&position.to_be_bytes());
                    frame.extend_from_slice(&identification.to_be_bytes());
                }
            }
        }
    }
}

/// IPv4 in the form in which IPv6 sockets write it, where the families of a pair differ (which callers rule out).
fn v6(address: IpAddr) -> std::net::Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{GATEWAY4, GATEWAY6, GUEST4};

    fn route4() -> Route {
        Route { guest: [2; 6], source: GATEWAY4.into(), destination: GUEST4.into() }
    }

    fn route6() -> Route {
        Route { guest: [2; 6], source: GATEWAY6.into(), destination: "fd52:696e:6765:72::15".parse().unwrap() }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let fragment = Some(Fragment { identification: 0x1234, offset: 1480, more: true });
        for (route, fragment) in [(route4(), None), (route4(), fragment), (route6(), None), (route6(), fragment)] {
            let mut frame = Vec::new();
            route.write_with(&mut frame, UDP, 5, 64, fragment);
            frame.extend_from_slice(b"hello");
            let ethernet = Ethernet::parse(&frame).unwrap();
            let parse = if route.source.is_ipv4() { Ip::parse4 } else { Ip::parse6 };
            let ip = parse(ethernet.payload).unwrap();
            assert_eq!((ip.source, ip.destination, ip.protocol), (route.source, route.destination, UDP));
            assert_eq!((ip.payload, ip.fragment), (&b"hello"[..], fragment));
        }
    }

    #[test]
    fn truncated_packets_are_none() {
        for route in [route4(), route6()] {
            let whole = |packet: &[u8]| match route.source {
                IpAddr::V4(_) => Ip::parse4(packet).is_some(),
                IpAddr::V6(_) => Ip::parse6(packet).is_some(),
            };
            let mut frame = Vec::new();
            route.write(&mut frame, UDP, 8);
            frame.extend_from_slice(&[0; 8]);
            let packet = &frame[ETHERNET_HEADER..];
            assert!(whole(packet));
            for length in 0..packet.len() {
                assert!(!whole(&packet[..length]), "{length}");
            }
        }
    }

    #[test]
    fn ipv4_headers_that_contradict_themselves_are_none() {
        let mut frame = Vec::new();
        route4().write(&mut frame, UDP, 0);
        for (offset, value) in [(0, 0x44), (0, 0x4f), (0, 0x65), (3, 19), (3, 21), (10, 0)] {
            let mut packet = frame[ETHERNET_HEADER..].to_vec();
            packet[offset] = value;
            assert!(Ip::parse4(&packet).is_none(), "{offset} {value}");
        }
    }

    #[test]
    fn extension_headers_are_skipped_and_may_not_leave_the_packet() {
        let mut frame = Vec::new();
        route6().write(&mut frame, 0, 18);
        frame.extend_from_slice(&[60, 0, 1, 4, 0, 0, 0, 0]);
        frame.extend_from_slice(&[UDP, 0, 1, 4, 0, 0, 0, 0, 7, 7]);
        let packet = &mut frame[ETHERNET_HEADER..];
        let ip = Ip::parse6(packet).unwrap();
        assert_eq!((ip.protocol, ip.payload), (UDP, &[7, 7][..]));
        packet[49] = 200;
        assert!(Ip::parse6(packet).is_none());
        packet[49] = 0;
        packet[48] = 43;
        packet[40] = 43;
        packet[43] = 1;
        assert!(Ip::parse6(packet).is_none());
    }
}
