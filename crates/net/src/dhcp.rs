//! DHCP (RFC 2131): tells the guest the one address it has, and where gateway and name servers are.

use std::net::Ipv4Addr;

use smoltcp::wire::DhcpPacket;

use crate::packet::{BROADCAST, Mac, Route};
use crate::{plan, udp};

pub const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;

/// RFC 2131, 2: the fixed part, and what its options begin with.
const FIXED_LENGTH: usize = 236;
const FILE: std::ops::Range<usize> = 108..236;
const MAGIC: [u8; 4] = [99, 130, 83, 99];
/// A reply is at least as long as BOOTP's (RFC 1542, 2.1).
const LEAST_LENGTH: usize = 300;
const LEASE_SECONDS: u32 = 86400;

/// Message types (RFC 2132, 9.6).
const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

/// Options (RFC 2132; 61 is echoed by RFC 6842).
mod option {
    pub const SUBNET_MASK: u8 = 1;
    pub const ROUTER: u8 = 3;
    pub const NAME_SERVER: u8 = 6;
    pub const MTU: u8 = 26;
    pub const REQUESTED_ADDRESS: u8 = 50;
    pub const LEASE_TIME: u8 = 51;
    pub const MESSAGE_TYPE: u8 = 53;
    pub const SERVER: u8 = 54;
    pub const CLIENT_ID: u8 = 61;
    pub const BOOT_FILE: u8 = 67;
    pub const END: u8 = 255;
}

/// What the server tells beside addresses that are always the same.
pub struct Facts<'a> {
    pub mtu: u16,
    pub resolvers: usize,
    /// What firmware is to boot.
    pub boot_file: Option<&'a str>,
}

/// The frame that answers a request, the payload of a datagram to port 67.
pub fn answer(request: &[u8], facts: &Facts<'_>) -> Option<Vec<u8>> {
    let packet = DhcpPacket::new_checked(request).ok()?;
    // Only clients on this link, which is Ethernet (hardware type 1, RFC 2131, 2).
    if *request.first_chunk::<3>()? != [1, 1, 6] || request.get(FIXED_LENGTH..)?.first_chunk()? != &MAGIC {
        return None;
    }
    let find = |kind| packet.options().find(|option| option.kind == kind).map(|option| option.data);
    let address = |kind| find(kind).and_then(|data| <[u8; 4]>::try_from(data).ok()).map(Ipv4Addr::from);
    let client = Client {
        mac: packet.client_hardware_address().0,
        address: packet.client_ip(),
        id: find(option::CLIENT_ID),
        header: request.first_chunk()?,
    };
    match find(option::MESSAGE_TYPE)? {
        [DISCOVER] => client.reply(OFFER, facts),
        [INFORM] => client.reply(ACK, facts),
        [REQUEST] => {
            // Another server was chosen (RFC 2131, 4.3.2); there is none, but it isn't for us to say.
            if address(option::SERVER).is_some_and(|server| server != plan::GATEWAY4) {
                return None;
            }
            let wanted = address(option::REQUESTED_ADDRESS).unwrap_or(client.address);
            client.reply(if wanted == plan::GUEST4 { ACK } else { NAK }, facts)
        }
        // Decline, release: nothing to remember.
        _ => None,
    }
}

struct Client<'a> {
    mac: Mac,
    address: Ipv4Addr,
    id: Option<&'a [u8]>,
    /// op to giaddr.
    header: &'a [u8; 28],
}

impl Client<'_> {
    fn reply(&self, kind: u8, facts: &Facts<'_>) -> Option<Vec<u8>> {
        let mut message = vec![0; FIXED_LENGTH];
        // op, htype, hlen, hops; xid; flags of the request.
        message[..4].copy_from_slice(&[2, 1, 6, 0]);
        message[4..8].copy_from_slice(&self.header[4..8]);
        message[10..12].copy_from_slice(&self.header[10..12]);
        message[12..16].copy_from_slice(&self.address.octets());
        message[28..34].copy_from_slice(&self.mac);
        message.extend_from_slice(&MAGIC);
        put(&mut message, option::MESSAGE_TYPE, &[kind]);
        put(&mut message, option::SERVER, &plan::GATEWAY4.octets());
        if let Some(id) = self.id {
            put(&mut message, option::CLIENT_ID, id);
        }
        if kind != NAK {
            message[20..24].copy_from_slice(&plan::GATEWAY4.octets());
            put(&mut message, option::SUBNET_MASK, &plan::NETMASK.octets());
            put(&mut message, option::ROUTER, &plan::GATEWAY4.octets());
            let servers: Vec<u8> = (0..facts.resolvers).flat_map(|index| plan::resolver4(index).octets()).collect();
            put(&mut message, option::NAME_SERVER, &servers);
            put(&mut message, option::MTU, &facts.mtu.to_be_bytes());
            if let Some(name) = facts.boot_file {
                // The field ends with a zero; what is longer only the option holds (RFC 2132, 9.5).
                if name.len() < FILE.len() {
                    message[FILE.start..FILE.start + name.len()].copy_from_slice(name.as_bytes());
                }
                put(&mut message, option::BOOT_FILE, name.as_bytes());
            }
            // Who only asks for facts has an address of its own (RFC 2131, 4.3.5).
            if kind == OFFER || self.address.is_unspecified() || self.address == plan::GUEST4 {
                message[16..20].copy_from_slice(&plan::GUEST4.octets());
                put(&mut message, option::LEASE_TIME, &LEASE_SECONDS.to_be_bytes());
            }
        }
        message.push(option::END);
        if message.len() < LEAST_LENGTH {
            message.resize(LEAST_LENGTH, 0);
        }
        // To an address the client can't have yet a reply goes only as its hardware address allows (RFC 2131, 4.1).
        let unicast = !self.address.is_unspecified() && kind != NAK;
        let destination = if unicast { self.address } else { Ipv4Addr::BROADCAST };
        let guest = if unicast { self.mac } else { BROADCAST };
        let route = Route { guest, source: plan::GATEWAY4.into(), destination: destination.into() };
        Some(udp::frame(route, SERVER_PORT, CLIENT_PORT, &message))
    }
}

fn put(message: &mut Vec<u8>, kind: u8, data: &[u8]) {
    if let Ok(length) = u8::try_from(data.len()) {
        message.extend_from_slice(&[kind, length]);
        message.extend_from_slice(data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Ethernet, Ip};

    const FACTS: Facts = Facts { mtu: 1500, resolvers: 2, boot_file: None };

    fn request(kind: u8, options: &[(u8, &[u8])]) -> Vec<u8> {
        let mut message = vec![0; FIXED_LENGTH];
        message[..4].copy_from_slice(&[1, 1, 6, 0]);
        message[4..8].copy_from_slice(&[1, 2, 3, 4]);
        message[28..34].copy_from_slice(&[0x52, 0x54, 0, 1, 2, 3]);
        message.extend_from_slice(&MAGIC);
        put(&mut message, option::MESSAGE_TYPE, &[kind]);
        for (kind, data) in options {
            put(&mut message, *kind, data);
        }
        message.push(option::END);
        message
    }

    fn options(frame: &[u8]) -> (Vec<u8>, Vec<(u8, Vec<u8>)>) {
        let ip = Ip::parse4(Ethernet::parse(frame).unwrap().payload).unwrap();
        assert!(ip.checksum_holds());
        let message = ip.payload[8..].to_vec();
        let packet = DhcpPacket::new_checked(&message[..]).unwrap();
        let options = packet.options().map(|option| (option.kind, option.data.to_vec())).collect();
        (message, options)
    }

    #[test]
    fn a_guest_gets_its_address_and_all_it_needs() {
        let id: &[u8] = &[255, 1, 2, 3, 4, 5, 6, 7, 8];
        let offer = answer(&request(DISCOVER, &[(option::CLIENT_ID, id)]), &FACTS).unwrap();
        let (message, found) = options(&offer);
        assert_eq!(message[4..8], [1, 2, 3, 4]);
        assert_eq!(message[16..20], [10, 0, 2, 15]);
        for expected in [
            (option::MESSAGE_TYPE, vec![OFFER]),
            (option::CLIENT_ID, id.to_vec()),
            (option::SUBNET_MASK, vec![255, 255, 255, 0]),
            (option::ROUTER, vec![10, 0, 2, 2]),
            (option::NAME_SERVER, vec![10, 0, 2, 3, 10, 0, 2, 4]),
            (option::MTU, vec![5, 220]),
        ] {
            assert!(found.contains(&expected), "{expected:?}");
        }
        let ack = answer(&request(REQUEST, &[(option::REQUESTED_ADDRESS, &[10, 0, 2, 15])]), &FACTS).unwrap();
        assert!(options(&ack).1.contains(&(option::MESSAGE_TYPE, vec![ACK])));
    }

    #[test]
    fn firmware_learns_what_to_boot_and_from_where() {
        for (name, in_field) in [("pxelinux.0".to_owned(), true), ("x".repeat(127), true), ("x".repeat(255), false)] {
            let facts = Facts { boot_file: Some(&name), ..FACTS };
            let (message, found) = options(&answer(&request(DISCOVER, &[]), &facts).unwrap());
            assert_eq!(message[20..24], [10, 0, 2, 2]);
            assert_eq!(message[FILE].starts_with(name.as_bytes()), in_field);
            assert_eq!(message[FILE.end - 1], 0);
            assert!(found.contains(&(option::BOOT_FILE, name.into_bytes())));
        }
    }

    #[test]
    fn another_address_is_refused_and_another_server_left_alone() {
        let nak = answer(&request(REQUEST, &[(option::REQUESTED_ADDRESS, &[10, 0, 2, 16])]), &FACTS).unwrap();
        let (message, found) = options(&nak);
        assert!(found.contains(&(option::MESSAGE_TYPE, vec![NAK])));
        assert_eq!(message[16..20], [0; 4]);
        assert!(answer(&request(REQUEST, &[(option::SERVER, &[10, 0, 2, 9])]), &FACTS).is_none());
    }

    #[test]
    fn malformed_requests_get_no_answer() {
        let good = request(DISCOVER, &[]);
        for length in 0..good.len() - 1 {
            assert!(answer(&good[..length], &FACTS).is_none(), "{length}");
        }
        for offset in [0, 1, 2, FIXED_LENGTH] {
            let mut bad = good.clone();
            bad[offset] ^= 0x40;
            assert!(answer(&bad, &FACTS).is_none(), "{offset}");
        }
    }
}
