//! From the back-end to the receive ring: which frames are for this card, and how they are put into the driver's buffers
//! (82574 datasheet, 7.1).

use std::sync::atomic::Ordering;

use memory::vm_memory::{Bytes, GuestAddress};
use net::{Header, Sink};

use crate::Model;
use crate::card::{Card, Ring, State};
use crate::registers::*;

/// Without the checksum at the end a frame has at least so many bytes, and without LPE at most (a tag included).
const SHORTEST: usize = 60;
const LONGEST: usize = 1518;

/// Status of a descriptor, alike in both forms.
const DONE: u32 = 1 << 0;
const END: u32 = 1 << 1;
const VLAN: u32 = 1 << 3;
const UDP_CHECKED: u32 = 1 << 4;
const TCP_CHECKED: u32 = 1 << 5;
const IP_CHECKED: u32 = 1 << 6;
/// Errors: of TCP or UDP, of IP.
const TCP_ERROR: u8 = 1 << 5;
const IP_ERROR: u8 = 1 << 6;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Frames that are handed over before the other direction has its turn.
const BATCH: usize = 128;

/// The sum of 16-bit words, folded (RFC 1071); not complemented.
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u64;
    let (chunks, rest) = bytes.as_chunks::<4>();
    for chunk in chunks {
        sum += u64::from(u32::from_be_bytes(*chunk));
    }
    let mut tail = [0; 4];
    tail.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    sum += u64::from(u32::from_be_bytes(tail));
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The receiving side of the card, for one call of the back-end.
pub struct Receiver<'a> {
    card: &'a Card,
    /// The driver gives no buffers.
    pub full: bool,
    left: usize,
    received: bool,
    frame: Vec<u8>,
}

impl<'a> Receiver<'a> {
    pub fn new(card: &'a Card) -> Self {
        Receiver { card, full: false, left: BATCH, received: false, frame: Vec::new() }
    }

    /// Tells the driver what has come. True: there may be more.
    pub fn finish(self) -> bool {
        if self.received {
            let mut state = self.card.lock();
            let mut causes = RX_TIMER;
            if self.card.model == Model::E1000e {
                causes |= RX_QUEUE_0;
            }
            if is_low(&state) {
                causes |= RX_LOW;
            }
            state.causes.add(causes);
            self.card.interrupt(&mut state);
        }
        self.left == 0
    }
}

/// Whether fewer buffers are left than the driver wants to be warned of.
fn is_low(state: &State) -> bool {
    let threshold = 1 + (state.get(RCTL) >> 8 & 3);
    state.ring(RX_RING).is_none_or(|ring| ring.available() <= ring.size >> threshold)
}

impl Sink for Receiver<'_> {
    fn deliver(&mut self, _: &Header, pieces: &[&[u8]]) -> bool {
        if self.left == 0 {
            return false;
        }
        self.frame.clear();
        pieces.iter().for_each(|piece| self.frame.extend_from_slice(piece));
        let mut state = self.card.lock();
        let control = state.get(RCTL);
        if control & RCTL_ENABLE == 0 || !self.card.endpoint.bus_master() {
            // Nobody listens: what comes now is lost, as on any wire.
            return true;
        }
        let Some(kind) = accepts(&state, &self.frame) else { return true };
        if self.frame.len() < SHORTEST {
            self.frame.resize(SHORTEST, 0);
        }
        let tag = strip_tag(&state, &mut self.frame);
        let (status, errors) = verify(&state, &self.frame);
        if control & RCTL_STRIP_CRC == 0 {
            let sum = crc32fast::hash(&self.frame).to_le_bytes();
            self.frame.extend_from_slice(&sum);
        }
        let size = buffer_size(control);
        let buffers = self.frame.len().div_ceil(size) as u32;
        let Some(ring) = state.ring(RX_RING).filter(|ring| ring.available() >= buffers) else {
            self.full = true;
            return false;
        };
        let what = What { status: status | if tag.is_some() { VLAN } else { 0 }, errors, tag: tag.unwrap_or(0) };
        let head = self.put(&state, &ring, size, &what);
        state.set_head(RX_RING, head);
        let bytes = self.frame.len() as u64;
        [GOOD_RX, TOTAL_RX].into_iter().for_each(|counter| state.count(counter, 1));
        [GOOD_RX_BYTES, TOTAL_RX_BYTES].into_iter().for_each(|counter| state.count_bytes(counter, bytes));
        match kind {
            Kind::Broadcast => state.count(BROADCAST_RX, 1),
            Kind::Multicast => state.count(MULTICAST_RX, 1),
            Kind::Unicast => {}
        }
        self.received = true;
        self.left -= 1;
        true
    }
}

/// What a frame's descriptors say of it.
struct What {
    status: u32,
    errors: u8,
    tag: u16,
}

impl Receiver<'_> {
    /// Puts the frame into buffers from the ring's head on; returns the new head. What is not memory swallows its part.
    fn put(&self, state: &State, ring: &Ring, size: usize, what: &What) -> u32 {
        let memory = &self.card.memory;
        let extended = self.card.model == Model::E1000e && state.get(RFCTL) & RFCTL_EXTENDED != 0;
        let mut head = ring.head;
        let mut chunks = self.frame.chunks(size).peekable();
        while let Some(chunk) = chunks.next() {
            let place = ring.base.saturating_add(16 * u64::from(head));
            let mut address = [0; 8];
            let last = chunks.peek().is_none();
            if memory.read_slice(&mut address, GuestAddress(place)).is_ok() {
                let _ = memory.write_slice(chunk, GuestAddress(u64::from_le_bytes(address)));
            }
            let status = DONE | if last { END | what.status } else { 0 };
            let errors = if last { what.errors } else { 0 };
            let (length, [t0, t1]) = (chunk.len() as u16, what.tag.to_le_bytes());
            let [l0, l1] = length.to_le_bytes();
            let back = place.saturating_add(8);
            if extended {
                let _ = memory.write_slice(&[0; 8], GuestAddress(place));
                let value = u64::from(status) | u64::from(errors) << 24 | u64::from(length) << 32;
                let value = value | u64::from(what.tag) << 48;
                let _ = memory.store(value, GuestAddress(back), Ordering::Release);
            } else {
                let sum = self.packet_sum(state).to_le_bytes();
                let bytes = [l0, l1, sum[0], sum[1], status as u8, errors, t0, t1];
                let _ = memory.store(u64::from_le_bytes(bytes), GuestAddress(back), Ordering::Release);
            }
            head = ring.next(head);
        }
        head
    }

    /// The packet checksum, from where RXCSUM says.
    fn packet_sum(&self, state: &State) -> u16 {
        let control = state.get(RXCSUM);
        if control & RXCSUM_NO_PACKET != 0 || control & (RXCSUM_IP | RXCSUM_TCP_UDP) == 0 {
            return 0;
        }
        let start = (control & 0xff) as usize;
        self.frame.get(start..).map_or(0, |bytes| checksum(bytes).swap_bytes())
    }
}

/// Bytes of each buffer.
fn buffer_size(control: u32) -> usize {
    let code = control >> 16 & 3;
    match (control & RCTL_SIZE_EXTENDED != 0, code) {
        (false, code) => 2048 >> code,
        (true, 0) => 2048,
        (true, code) => 32768 >> code,
    }
}

enum Kind {
    Unicast,
    Multicast,
    Broadcast,
}

/// Whether the card takes a frame, by its length and its address.
fn accepts(state: &State, frame: &[u8]) -> Option<Kind> {
    let control = state.get(RCTL);
    let address: &[u8; 6] = frame.first_chunk()?;
    let tagged = is_tagged(state, frame);
    if frame.len() > LONGEST && control & RCTL_LONG == 0 {
        return None;
    }
    if tagged && control & RCTL_VLAN_FILTER != 0 {
        let [high, low] = *frame.get(14..16)?.first_chunk()?;
        let vlan = u64::from(u16::from_be_bytes([high, low]) & 0xfff);
        if state.get(VLANS + (vlan >> 5) * 4) >> (vlan & 31) & 1 == 0 {
            return None;
        }
    }
    if *address == [0xff; 6] {
        let taken = control & (RCTL_BROADCAST | RCTL_MULTICAST_ALL) != 0;
        return taken.then_some(Kind::Broadcast);
    }
    let kind = if address[0] & 1 != 0 { Kind::Multicast } else { Kind::Unicast };
    let all = if address[0] & 1 != 0 { RCTL_MULTICAST_ALL } else { RCTL_UNICAST_ALL };
    let exact = || {
        (ADDRESSES..ADDRESSES_END).step_by(8).any(|place| {
            let [a, b, c, d] = state.get(place).to_le_bytes();
            let [e, f, _, flags] = state.get(place + 4).to_le_bytes();
            flags & 0x80 != 0 && *address == [a, b, c, d, e, f]
        })
    };
    let hashed = || {
        let shift = [4, 3, 2, 0].get((control >> 12 & 3) as usize).copied().unwrap_or(0);
        let hash = u64::from(u16::from_le_bytes([address[4], address[5]]) >> shift & 0xfff);
        address[0] & 1 != 0 && state.get(MULTICAST + (hash >> 5) * 4) >> (hash & 31) & 1 != 0
    };
    (control & all != 0 || exact() || hashed()).then_some(kind)
}

fn is_tagged(state: &State, frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&(state.get(VET) as u16).to_be_bytes())
}

/// Takes a VLAN tag out of the frame, if the driver wants it in the descriptor.
fn strip_tag(state: &State, frame: &mut Vec<u8>) -> Option<u16> {
    if state.get(CTRL) & CTRL_VLAN == 0 || !is_tagged(state, frame) {
        return None;
    }
    let tag = match frame.get(14..16) {
        Some([high, low]) => u16::from_be_bytes([*high, *low]),
        _ => return None,
    };
    frame.drain(12..16);
    Some(tag)
}

/// Checks the sums that the driver leaves to the card: status and errors for the descriptor.
fn verify(state: &State, frame: &[u8]) -> (u32, u8) {
    let control = state.get(RXCSUM);
    let (mut status, mut errors) = (0, 0);
    let Some((ip, protocol, pseudo, payload)) = parse(frame) else { return (0, 0) };
    if let Some(header) = ip.filter(|_| control & RXCSUM_IP != 0) {
        status |= IP_CHECKED;
        errors |= if checksum(header) == 0xffff { 0 } else { IP_ERROR };
    }
    let Some(payload) = payload.filter(|_| control & RXCSUM_TCP_UDP != 0) else { return (status, errors) };
    let checked = match (protocol, payload.get(6..8)) {
        (TCP, _) => TCP_CHECKED,
        // No sum was made.
        (UDP, Some([0, 0]) | None) => return (status, errors),
        (UDP, _) => TCP_CHECKED | UDP_CHECKED,
        _ => return (status, errors),
    };
    status |= checked;
    let sum = u32::from(checksum(payload)) + pseudo + u32::from(protocol) + payload.len() as u32;
    let sum = (sum & 0xffff) + (sum >> 16);
    errors |= if (sum & 0xffff) + (sum >> 16) == 0xffff { 0 } else { TCP_ERROR };
    (status, errors)
}

/// An IP packet's header if it has a sum, its protocol, the sum of its addresses, and its payload if it is whole.
type Parsed<'a> = (Option<&'a [u8]>, u8, u32, Option<&'a [u8]>);

fn parse(frame: &[u8]) -> Option<Parsed<'_>> {
    let (kind, packet) = (frame.get(12..14)?, frame.get(14..)?);
    match kind {
        [0x08, 0x00] => {
            let first = *packet.first()?;
            let length = usize::from(first & 15) * 4;
            let header = packet.get(..length).filter(|_| first >> 4 == 4 && length >= 20)?;
            let total = usize::from(u16::from_be_bytes([*header.get(2)?, *header.get(3)?]));
            let fragment = u16::from_be_bytes([*header.get(6)?, *header.get(7)?]) & 0x3fff != 0;
            let pseudo = u32::from(checksum(header.get(12..20)?));
            let payload = packet.get(length..total).filter(|_| !fragment);
            Some((Some(header), *header.get(9)?, pseudo, payload))
        }
        [0x86, 0xdd] => {
            let header = packet.get(..40).filter(|header| header.first().is_some_and(|first| first >> 4 == 6))?;
            let length = usize::from(u16::from_be_bytes([*header.get(4)?, *header.get(5)?]));
            let pseudo = u32::from(checksum(header.get(8..40)?));
            Some((None, *header.get(6)?, pseudo, packet.get(40..40 + length)))
        }
        _ => None,
    }
}
