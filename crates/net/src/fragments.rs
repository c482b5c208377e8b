//! Fragments: those of the guest put together (RFC 791, 3.2; RFC 8200, 4.5), and packets for it that exceed the MTU cut.
//!
//! Memory is bounded: a few packets at a time, each of at most 64 KiB, each given up after a while. Fragments that
//! overlap are an attack and cost the whole packet (RFC 5722).

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::outbox::Outbox;
use crate::packet::{Fragment, Ip, Route};

/// Packets that are incomplete at the same time.
const MOST: usize = 16;
/// Pieces of one packet: with the least MTU of IPv4 there would be more, but no guest uses it.
const MOST_PIECES: usize = 256;
const LONGEST: usize = 65535;
/// RFC 8200 says 60 s, RFC 1122 60 to 120 s; nothing on this link takes as long.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(PartialEq, Eq)]
struct Id {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    identification: u32,
}

struct Incomplete {
    id: Id,
    since: Instant,
    /// Offset and end of what is there, in order.
    pieces: Vec<(usize, usize)>,
    data: Vec<u8>,
    /// Known once the last piece is there.
    length: Option<usize>,
}

#[derive(Default)]
pub struct Reassembly {
    incomplete: VecDeque<Incomplete>,
}

impl Reassembly {
    /// Takes a fragment. Returns the payload of its packet when that is complete.
    pub fn add(&mut self, ip: &Ip<'_>, fragment: Fragment, now: Instant) -> Option<Vec<u8>> {
        self.incomplete.retain(|packet| now.duration_since(packet.since) < PATIENCE);
        let (start, end) = (fragment.offset, fragment.offset + ip.payload.len());
        // Only the last fragment may have a length that the next one's offset could not continue.
        if start == end || end > LONGEST || (fragment.more && end % 8 != 0) {
            return None;
        }
        let id = Id {
            source: ip.source,
            destination: ip.destination,
            protocol: ip.protocol,
            identification: fragment.identification,
        };
        let index = match self.incomplete.iter().position(|packet| packet.id == id) {
            Some(index) => index,
            None => {
                if self.incomplete.len() == MOST {
                    self.incomplete.pop_front();
                }
                self.incomplete.push_back(Incomplete {
                    id,
                    since: now,
                    pieces: Vec::new(),
                    data: Vec::new(),
                    length: None,
                });
                self.incomplete.len() - 1
            }
        };
        let packet = self.incomplete.get_mut(index)?;
        match packet.insert(start, end, !fragment.more, ip.payload) {
            Progress::More => None,
            Progress::Contradiction => {
                self.incomplete.remove(index);
                None
            }
            Progress::Complete => self.incomplete.remove(index).map(|packet| packet.data),
        }
    }
}

enum Progress {
    More,
    Complete,
    Contradiction,
}

impl Incomplete {
    fn insert(&mut self, start: usize, end: usize, last: bool, payload: &[u8]) -> Progress {
        let at = self.pieces.partition_point(|&(other, _)| other < start);
        if self.pieces.get(at) == Some(&(start, end)) {
            // The same again.
            return Progress::More;
        }
        let overlaps = at.checked_sub(1).and_then(|before| self.pieces.get(before)).is_some_and(|&(_, e)| e > start)
            || self.pieces.get(at).is_some_and(|&(s, _)| s < end);
        let beyond = self.length.is_some_and(|length| end > length || last)
            || (last && self.pieces.last().is_some_and(|&(_, e)| e > end));
        if overlaps || beyond || self.pieces.len() == MOST_PIECES {
            return Progress::Contradiction;
        }
        self.pieces.insert(at, (start, end));
        if self.data.len() < end {
            self.data.resize(end, 0);
        }
        if let Some(place) = self.data.get_mut(start..end) {
            place.copy_from_slice(payload);
        }
        if last {
            self.length = Some(end);
        }
        let present: usize = self.pieces.iter().map(|(start, end)| end - start).sum();
        if self.length == Some(present) { Progress::Complete } else { Progress::More }
    }
}

/// Sends a packet to the guest in as many fragments as the MTU asks for.
pub fn send(outbox: &mut Outbox, route: Route, protocol: u8, payload: &[u8], mtu: usize, identification: u32) {
    if payload.len() + route.ip_header_length() <= mtu {
        let mut frame = Vec::with_capacity(route.header_length() + payload.len());
        route.write(&mut frame, protocol, payload.len());
        frame.extend_from_slice(payload);
        outbox.push(frame);
        return;
    }
    let fragment_header = if route.destination.is_ipv4() { 0 } else { 8 };
    let step = (mtu.saturating_sub(route.ip_header_length() + fragment_header) & !7).max(8);
    for (index, piece) in payload.chunks(step).enumerate() {
        let offset = index * step;
        let more = offset + piece.len() < payload.len();
        let mut frame = Vec::with_capacity(route.header_length() + 8 + piece.len());
        route.write_with(&mut frame, protocol, piece.len(), 64, Some(Fragment { identification, offset, more }));
        frame.extend_from_slice(piece);
        outbox.push(frame);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{ETHERNET_HEADER, UDP};
    use crate::plan::{GATEWAY4, GATEWAY6, GUEST4};

    fn routes() -> [Route; 2] {
        let guest6: IpAddr = "fd52:696e:6765:72::15".parse().unwrap();
        [
            Route { guest: [2; 6], source: GATEWAY4.into(), destination: GUEST4.into() },
            Route { guest: [2; 6], source: GATEWAY6.into(), destination: guest6 },
        ]
    }

    fn cut(route: Route, payload: &[u8]) -> Vec<Vec<u8>> {
        let mut outbox = Outbox::default();
        send(&mut outbox, route, UDP, payload, 1500, 7);
        std::iter::from_fn(|| outbox.pop()).collect()
    }

    fn add(reassembly: &mut Reassembly, frame: &[u8]) -> Option<Vec<u8>> {
        let packet = &frame[ETHERNET_HEADER..];
        let ip = Ip::parse4(packet).or_else(|| Ip::parse6(packet)).unwrap();
        reassembly.add(&ip, ip.fragment.unwrap(), Instant::now())
    }

    #[test]
    fn packets_cut_are_put_together_in_any_order() {
        let payload: Vec<u8> = (0..10_000u32).map(|i| i as u8 ^ (i >> 8) as u8).collect();
        for route in routes() {
            let mut frames = cut(route, &payload);
            assert!(frames.len() > 6 && frames.iter().all(|frame| frame.len() <= 1514));
            for rotation in 0..frames.len() {
                frames.rotate_left(1);
                let mut reassembly = Reassembly::default();
                let results: Vec<_> = frames.iter().map(|frame| add(&mut reassembly, frame)).collect();
                assert_eq!(results.last().unwrap().as_deref(), Some(&payload[..]), "{rotation}");
                assert!(results[..results.len() - 1].iter().all(Option::is_none));
            }
        }
    }

    #[test]
    fn overlaps_cost_the_packet() {
        let route = routes()[0];
        let fragment = |offset, length: usize, more| {
            let mut frame = Vec::new();
            route.write_with(&mut frame, UDP, length, 64, Some(Fragment { identification: 1, offset, more }));
            frame.resize(frame.len() + length, 1);
            frame
        };
        let mut reassembly = Reassembly::default();
        assert!(add(&mut reassembly, &fragment(0, 16, true)).is_none());
        assert!(add(&mut reassembly, &fragment(8, 16, true)).is_none());
        assert!(reassembly.incomplete.is_empty());
        // A second end, and data behind the end.
        for second in [fragment(24, 8, false), fragment(32, 8, true)] {
            assert!(add(&mut reassembly, &fragment(16, 8, false)).is_none());
            assert!(add(&mut reassembly, &second).is_none());
            assert!(reassembly.incomplete.is_empty());
        }
    }

    #[test]
    fn incomplete_packets_are_few_and_small() {
        let route = routes()[0];
        let mut reassembly = Reassembly::default();
        for identification in 0..1000 {
            let mut frame = Vec::new();
            route.write_with(&mut frame, UDP, 8, 64, Some(Fragment { identification, offset: 65520, more: true }));
            frame.resize(frame.len() + 8, 1);
            assert!(add(&mut reassembly, &frame).is_none());
        }
        assert!(reassembly.incomplete.len() <= MOST);
        assert!(reassembly.incomplete.iter().all(|packet| packet.data.len() <= LONGEST));
    }
}
