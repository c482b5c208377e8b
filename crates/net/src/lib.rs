//! Packets: what a virtual network card can be attached to.
//!
//! A card (crate `virtio`) knows a [`Backend`]: frames go in by [`Backend::send`] and come out by [`Backend::receive`].
//! There are two:
//! - [`UserNet`] is a whole small network inside this process that needs no privilege: a gateway that answers ARP,
//!   neighbour discovery, DHCP, TFTP and pings, and turns the guest's connections into connections of ordinary sockets.
//! - [`Tap`] is a network interface of the host.
//!
//! The data flow to follow is [`UserNet::send`] → `packet` → `tcp` | `udp` | `icmp` → a socket, and from a socket by
//! way of `poller` back to [`UserNet::receive`]. Nothing here knows guest memory or virtqueues, so all of it is tested
//! with packets in and packets out. One thread does everything, woken by one epoll descriptor.
//!
//! # Why TCP is done here, with `smoltcp` for packet formats only
//!
//! `cargo bench -p net` lets the same guest send and receive 4 GiB by either, in packets of 64 KiB, on two cores that
//! were busy with other work too:
//!
//! | | own segment handling | smoltcp's sockets |
//! |---|---|---|
//! | guest to host | 14.5 Gbit/s | 11.9 Gbit/s |
//! | host to guest | 8.9 Gbit/s | 5.8 Gbit/s |
//!
//! Ours is faster because data goes to the socket straight from the guest's segment and from the receive buffer
//! straight into the guest's memory, and because one segment for the guest may be 64 KiB whatever its MSS, where
//! smoltcp would send 45 of 1460 bytes (the table spares it that by an MSS of 64 KiB). It is also simpler to use for a
//! gateway: a connection is made when a SYN to any address comes, which smoltcp's sockets, who listen at one, are not
//! for. What makes TCP hard (congestion, reassembly) isn't there on a link that never loses what it has taken.
//!
//! # Threat model
//!
//! The guest can send any frame at any time, and its peers any data. Frames are checked where they are taken apart
//! (`packet`, `tcp::segment`, `udp`); what they make us keep is bounded in number and bytes (`outbox`, `fragments`,
//! `tcp`, `udp`, `icmp`); where they may lead is decided in one place (`plan`). The host's own services on its loopback
//! are reachable at the gateway's address, by design and unless `restrict` is on.
#![forbid(unsafe_code)]

mod backend;
mod dhcp;
mod forward;
mod fragments;
mod header;
mod icmp;
mod link;
mod outbox;
mod packet;
mod plan;
mod poller;
mod resolver;
mod tap;
mod tcp;
mod tftp;
mod udp;
mod user;

#[cfg(test)]
mod tests;

pub use backend::{Backend, LONGEST_FRAME, Sink};
pub use forward::{Forward, Protocol};
pub use header::{DATA_VALID, GSO_ECN, GSO_NONE, GSO_TCP4, GSO_TCP6, HEADER_LENGTH, Header, NEEDS_CHECKSUM, Offloads};
pub use packet::Mac;
pub use tap::Tap;
pub use user::{UserConfig, UserNet};

/// Why a back-end could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("can't forward {forward}: {source}{}", hint(source))]
    Forward { forward: Forward, source: std::io::Error },
    #[error("can't {}: {source}{}", tap_attempt(name), tap_hint(source))]
    Tap { name: String, source: std::io::Error },
    #[error("can't serve the directory {} by TFTP: {source}", path.display())]
    Tftp { path: std::path::PathBuf, source: std::io::Error },
    #[error("can't watch sockets: {0}")]
    Poller(std::io::Error),
}

/// What the user can do about it.
fn hint(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => " (something else listens there; choose another port of the host)",
        std::io::ErrorKind::PermissionDenied => " (ports below 1024 need privilege; choose a higher port of the host)",
        std::io::ErrorKind::AddrNotAvailable => " (this host does not have that address)",
        _ => "",
    }
}

/// What was tried: an interface without a name is a new one.
fn tap_attempt(name: &str) -> String {
    if name.is_empty() { "make a tap interface".into() } else { format!("attach to the tap interface {name}") }
}

/// What the user can do about a tap interface.
fn tap_hint(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => {
            " (name one that is yours, tap,name=NAME: as root, ip tuntap add dev NAME mode tap user YOU makes it)"
        }
        std::io::ErrorKind::NotFound => " (this host has no /dev/net/tun)",
        std::io::ErrorKind::ResourceBusy => " (something else is attached to it)",
        _ => "",
    }
}
