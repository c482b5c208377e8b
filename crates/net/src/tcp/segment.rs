//! TCP segments (RFC 9293, 3.1): read from the guest, written for it.

use smoltcp::wire::{TcpOption, TcpPacket, checksum};

use super::{Key, Out};
use crate::Header;
use crate::header::{GSO_NONE, GSO_TCP4, GSO_TCP6, NEEDS_CHECKSUM};
use crate::packet::{Ip, Route, TCP, pseudo_header_sum};

pub const HEADER: usize = 20;
const CHECKSUM_OFFSET: usize = 16;

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const PSH: u8 = 0x08;
pub const ACK: u8 = 0x10;

/// RFC 7323, 2.3.
const MOST_SHIFT: u8 = 14;

/// A segment from the guest.
pub struct Segment<'a> {
    pub sequence: u32,
    pub acknowledgment: Option<u32>,
    pub window: u16,
    pub syn: bool,
    pub fin: bool,
    pub rst: bool,
    pub mss: Option<u16>,
    pub shift: Option<u8>,
    pub payload: &'a [u8],
}

impl<'a> Segment<'a> {
    /// `complete`: the checksum is there, and is to be right.
    pub fn parse(ip: &Ip<'a>, complete: bool) -> Option<(Key, Self)> {
        let packet = TcpPacket::new_checked(ip.payload).ok()?;
        if complete && !ip.checksum_holds() {
            return None;
        }
        if packet.src_port() == 0 || packet.dst_port() == 0 {
            return None;
        }
        let key =
            Key { guest: (ip.source, packet.src_port()).into(), remote: (ip.destination, packet.dst_port()).into() };
        let (mut mss, mut shift) = (None, None);
        if packet.syn() {
            let mut options = packet.options();
            while !options.is_empty() {
                // What is behind a malformed option is not known, as is where it would be.
                let Ok((rest, option)) = TcpOption::parse(options) else { break };
                match option {
                    TcpOption::MaxSegmentSize(size) => mss = Some(size),
                    TcpOption::WindowScale(value) => shift = Some(value.min(MOST_SHIFT)),
                    TcpOption::EndOfList => break,
                    _ => {}
                }
                options = rest;
            }
        }
        Some((
            key,
            Segment {
                sequence: packet.seq_number().0 as u32,
                acknowledgment: packet.ack().then(|| packet.ack_number().0 as u32),
                window: packet.window_len(),
                syn: packet.syn(),
                fin: packet.fin(),
                rst: packet.rst(),
                mss,
                shift,
                payload: packet.payload(),
            },
        ))
    }

    /// What the segment takes of the sequence space.
    pub fn length(&self) -> u32 {
        self.payload.len() as u32 + u32::from(self.syn) + u32::from(self.fin)
    }
}

/// The header of a segment for the guest.
#[derive(Clone, Copy, Default)]
pub struct Fields {
    pub sequence: u32,
    pub acknowledgment: u32,
    pub flags: u8,
    pub window: u16,
    /// Of SYN segments: MSS and window scale.
    pub options: Option<(u16, Option<u8>)>,
}

impl Fields {
    /// The answer to a segment that belongs to no connection (RFC 9293, 3.10.7.1).
    pub fn reset_for(segment: &Segment<'_>) -> Self {
        match segment.acknowledgment {
            Some(acknowledgment) => Fields { sequence: acknowledgment, flags: RST, ..Fields::default() },
            None => Fields {
                acknowledgment: segment.sequence.wrapping_add(segment.length()),
                flags: RST | ACK,
                ..Fields::default()
            },
        }
    }

    /// Writes Ethernet, IP and TCP headers over `frame`. The checksum is that of the pseudo header only.
    fn write(&self, frame: &mut Vec<u8>, route: Route, key: &Key, payload: usize) {
        let options: &[u8] = match self.options {
            None => &[],
            Some((mss, shift)) => {
                let [m0, m1] = mss.to_be_bytes();
                match shift {
                    Some(shift) => &[2, 4, m0, m1, 1, 3, 3, shift],
                    None => &[2, 4, m0, m1],
                }
            }
        };
        let length = HEADER + options.len() + payload;
        route.write(frame, TCP, length);
        frame.extend_from_slice(&key.remote.port().to_be_bytes());
        frame.extend_from_slice(&key.guest.port().to_be_bytes());
        frame.extend_from_slice(&self.sequence.to_be_bytes());
        frame.extend_from_slice(&self.acknowledgment.to_be_bytes());
        frame.extend_from_slice(&[((HEADER + options.len()) << 2) as u8, self.flags]);
        frame.extend_from_slice(&self.window.to_be_bytes());
        frame.extend_from_slice(&pseudo_header_sum(route.source, route.destination, TCP, length).to_be_bytes());
        frame.extend_from_slice(&[0, 0]);
        frame.extend_from_slice(options);
    }

    /// A whole frame without data, checksum included.
    pub fn frame(&self, route: Route, key: &Key) -> Vec<u8> {
        let mut frame = Vec::new();
        self.write(&mut frame, route, key, 0);
        complete_checksum(&mut frame, route.header_length());
        frame
    }

    /// Sends a segment with data in two pieces. `mss`: data of more than that is for the guest to take as if it was cut
    /// in as many segments. False: the sink is full.
    pub fn send(&self, out: &mut Out<'_>, route: Route, key: &Key, data: (&[u8], &[u8]), mss: usize) -> bool {
        let Out { side, frame, sink, .. } = out;
        let (first, second) = data;
        let length = first.len() + second.len();
        self.write(frame, route, key, length);
        let start = route.header_length();
        if !side.offloads.checksum {
            frame.extend_from_slice(first);
            frame.extend_from_slice(second);
            complete_checksum(frame, start);
            return sink.deliver(&Header::default(), &[frame]);
        }
        let mut header = Header {
            flags: NEEDS_CHECKSUM,
            gso_type: GSO_NONE,
            checksum_start: start as u16,
            checksum_offset: CHECKSUM_OFFSET as u16,
            ..Header::default()
        };
        if length > mss {
            header.gso_type = if route.destination.is_ipv4() { GSO_TCP4 } else { GSO_TCP6 };
            header.gso_size = mss as u16;
            header.header_length = frame.len() as u16;
        }
        sink.deliver(&header, &[frame, first, second])
    }
}

/// Sums up from `start` to the end, the pseudo header's sum being where the checksum is to be.
fn complete_checksum(frame: &mut [u8], start: usize) {
    let sum = frame.get(start..).map_or(0, |segment| !checksum::data(segment));
    if let Some(field) = frame.get_mut(start + CHECKSUM_OFFSET..start + CHECKSUM_OFFSET + 2) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
}
