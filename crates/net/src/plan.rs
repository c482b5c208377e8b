//! Who has which address on the user network, and what the host calls them.
//!
//! The IPv4 side is laid out as users of QEMU and its kin know it. The IPv6 side uses a unique local prefix (RFC 4193):
//! a guest with such an address prefers IPv4 where both lead to the goal (RFC 6724, 2.1), which is right, since the
//! host need not have IPv6.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
pub const GATEWAY4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The first of [`RESOLVERS`] addresses.
const RESOLVER4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// What DHCP gives the guest.
pub const GUEST4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

/// `fd52:696e:6765:72::/64`.
pub const PREFIX6: Ipv6Addr = Ipv6Addr::new(0xfd52, 0x696e, 0x6765, 0x72, 0, 0, 0, 0);
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd52, 0x696e, 0x6765, 0x72, 0, 0, 0, 2);
/// The gateway's link-local address: routers advertise themselves by it (RFC 4861, 4.2).
pub const ROUTER6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
const RESOLVER6: Ipv6Addr = Ipv6Addr::new(0xfd52, 0x696e, 0x6765, 0x72, 0, 0, 0, 3);

/// As many of the host's name servers have an address on the user network: as many as a resolver uses (resolv.conf(5)).
pub const RESOLVERS: usize = 3;

/// The hardware address of everything that is not the guest. Locally administered.
pub const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 0x0a, 0x00, 0x02, 0x02];

/// What is at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The gateway, which is the host's loopback.
    Gateway,
    /// The host's name server of that number.
    Resolver(usize),
    /// Somewhere on the host's network.
    Outside,
    /// Nothing that the guest may or can talk to.
    Nowhere,
}

pub fn resolver4(index: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(RESOLVER4.to_bits() + index.min(RESOLVERS - 1) as u32)
}

pub fn resolver6(index: usize) -> Ipv6Addr {
    Ipv6Addr::from_bits(RESOLVER6.to_bits() + index.min(RESOLVERS - 1) as u128)
}

/// What the guest means by an address. Addresses by which a socket of the host would reach the host itself are not
/// passed on: only the gateway's leads there.
pub fn place(address: IpAddr) -> Place {
    match address {
        IpAddr::V4(v4) if v4 == GATEWAY4 => Place::Gateway,
        IpAddr::V6(v6) if v6 == GATEWAY6 || v6 == ROUTER6 => Place::Gateway,
        IpAddr::V4(v4) => match (0..RESOLVERS).find(|&index| resolver4(index) == v4) {
            Some(index) => Place::Resolver(index),
            None if on_link4(v4) || !routable4(v4) => Place::Nowhere,
            None => Place::Outside,
        },
        IpAddr::V6(v6) => match (0..RESOLVERS).find(|&index| resolver6(index) == v6) {
            Some(index) => Place::Resolver(index),
            None if on_link6(v6) || !routable6(v6) => Place::Nowhere,
            None => Place::Outside,
        },
    }
}

/// Whether the gateway's link layer answers for an address.
pub fn is_ours(address: IpAddr) -> bool {
    matches!(place(address), Place::Gateway | Place::Resolver(_))
}

/// The gateway in the family of `like`.
pub fn gateway(like: IpAddr) -> IpAddr {
    if like.is_ipv4() { GATEWAY4.into() } else { GATEWAY6.into() }
}

/// The host's loopback in the family of `like`.
pub fn loopback(like: IpAddr) -> IpAddr {
    if like.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
}

/// By which address a guest at `guest` is to see a peer of the host: its own, unless that means something else in the
/// guest or is of the other family.
pub fn seen_by_guest(peer: IpAddr, guest: IpAddr) -> IpAddr {
    let peer = peer.to_canonical();
    if peer.is_ipv4() == guest.is_ipv4() && place(peer) == Place::Outside { peer } else { gateway(guest) }
}

fn on_link4(address: Ipv4Addr) -> bool {
    let mask = NETMASK.to_bits();
    address.to_bits() & mask == GATEWAY4.to_bits() & mask
}

fn on_link6(address: Ipv6Addr) -> bool {
    address.to_bits() >> 64 == PREFIX6.to_bits() >> 64
}

/// Not 0/8 (which a socket takes for the host itself), 127/8, 224/4, 240/4.
fn routable4(address: Ipv4Addr) -> bool {
    let first = address.octets()[0];
    first != 0 && first != 127 && first < 224
}

/// Not unspecified, loopback, IPv4 in disguise (which would lead around the rules for IPv4), link-local or multicast.
fn routable6(address: Ipv6Addr) -> bool {
    address.to_bits() >> 32 != 0
        && address.to_ipv4_mapped().is_none()
        && !address.is_unicast_link_local()
        && !address.is_multicast()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place_of(text: &str) -> Place {
        place(text.parse().unwrap())
    }

    #[test]
    fn the_host_itself_is_only_at_the_gateway() {
        for text in [
            "127.0.0.1",
            "0.0.0.0",
            "0.1.2.3",
            "::1",
            "::",
            "::7f00:1",
            "::ffff:127.0.0.1",
            "fe80::1",
            "255.255.255.255",
        ] {
            assert_eq!(place_of(text), Place::Nowhere, "{text}");
        }
        for text in ["10.0.2.2", "fd52:696e:6765:72::2", "fe80::2"] {
            assert_eq!(place_of(text), Place::Gateway, "{text}");
        }
    }

    #[test]
    fn resolvers_are_beside_the_gateway_and_the_rest_of_the_link_is_empty() {
        assert_eq!(place_of("10.0.2.3"), Place::Resolver(0));
        assert_eq!(place_of("10.0.2.5"), Place::Resolver(2));
        assert_eq!(place_of("fd52:696e:6765:72::4"), Place::Resolver(1));
        for text in ["10.0.2.6", "10.0.2.15", "10.0.2.255", "fd52:696e:6765:72::99", "224.0.0.1", "ff02::1"] {
            assert_eq!(place_of(text), Place::Nowhere, "{text}");
        }
        assert_eq!(place_of("10.0.3.2"), Place::Outside);
        assert_eq!(place_of("2001:db8::1"), Place::Outside);
    }

    #[test]
    fn peers_of_the_host_keep_their_address_unless_it_means_something_else() {
        let guest: IpAddr = GUEST4.into();
        assert_eq!(seen_by_guest("127.0.0.1".parse().unwrap(), guest), IpAddr::from(GATEWAY4));
        assert_eq!(seen_by_guest("::1".parse().unwrap(), guest), IpAddr::from(GATEWAY4));
        assert_eq!(seen_by_guest("10.0.2.15".parse().unwrap(), guest), IpAddr::from(GATEWAY4));
        let other: IpAddr = "192.0.2.7".parse().unwrap();
        assert_eq!(seen_by_guest(other, guest), other);
        assert_eq!(seen_by_guest("::ffff:192.0.2.7".parse().unwrap(), guest), other);
    }
}
