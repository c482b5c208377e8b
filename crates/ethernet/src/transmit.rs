//! From a transmit ring to the back-end: descriptors, and what the driver leaves to the card (82574 datasheet, 7.2).

use memory::vm_memory::{Bytes, GuestAddress};
use net::{Backend, GSO_TCP4, GSO_TCP6, Header, LONGEST_FRAME, NEEDS_CHECKSUM};

use crate::card::{Card, Ring};
use crate::registers::*;
use crate::{Model, receive::checksum};

const DESCRIPTOR: usize = 16;
/// Descriptors that are taken before the other direction has its turn.
const BATCH: u32 = 256;

/// Command bits of a descriptor.
const END: u8 = 1 << 0;
const INSERT_CHECKSUM: u8 = 1 << 2;
const SEGMENT: u8 = 1 << 2;
const REPORT: u8 = 1 << 3;
const EXTENDED: u8 = 1 << 5;
const VLAN: u8 = 1 << 6;
/// Of a context: the packet is TCP, over IPv4.
const CONTEXT_TCP: u8 = 1 << 0;
const CONTEXT_IP4: u8 = 1 << 1;
/// Options of a data descriptor.
const OPTION_IP: u8 = 1 << 0;
const OPTION_TRANSPORT: u8 = 1 << 1;
const DONE: u8 = 1 << 0;

/// Where checksums are, and how to segment: from a context descriptor.
#[derive(Clone, Copy, Default)]
struct Context {
    ip_start: u8,
    ip_offset: u8,
    ip_end: u16,
    start: u8,
    offset: u8,
    end: u16,
    command: u8,
    header_length: u8,
    segment: u16,
}

/// The frame in the making, of one ring.
#[derive(Default)]
struct Frame {
    bytes: Vec<u8>,
    /// It is longer than any frame.
    too_long: bool,
    options: u8,
    segment: bool,
    /// A legacy descriptor's checksum: start and place.
    legacy: Option<(u8, u8)>,
    tag: Option<u16>,
}

#[derive(Default)]
pub struct Transmitter {
    contexts: [Context; 2],
    frames: [Frame; 2],
}

fn word(bytes: &[u8; DESCRIPTOR], at: usize) -> u16 {
    u16::from_le_bytes([bytes.get(at).copied().unwrap_or(0), bytes.get(at + 1).copied().unwrap_or(0)])
}

impl Transmitter {
    /// Takes what is in the rings. True: there may be more.
    pub fn run(&mut self, card: &Card, backend: &mut dyn Backend) -> bool {
        let rings = if card.model == Model::E1000e { 2 } else { 1 };
        let mut more = false;
        for (queue, at) in TX_RINGS.into_iter().enumerate().take(rings) {
            more |= self.ring(card, backend, queue, at);
        }
        more
    }

    fn ring(&mut self, card: &Card, backend: &mut dyn Backend, queue: usize, at: u64) -> bool {
        let state = card.lock();
        let epoch = state.epoch;
        let enabled = state.get(TCTL) & TCTL_ENABLE != 0 && card.endpoint.bus_master();
        let (vlan_type, vlans) = (state.get(VET) as u16, state.get(CTRL) & CTRL_VLAN != 0);
        let Some(ring) = state.ring(at).filter(|ring| enabled && ring.available() > 0) else { return false };
        drop(state);
        let (mut head, mut written, mut sent) = (ring.head, false, Sent::default());
        for _ in 0..BATCH.min(ring.available()) {
            let place = GuestAddress(ring.base.saturating_add(u64::from(head) * DESCRIPTOR as u64));
            let mut descriptor = [0; DESCRIPTOR];
            if card.memory.read_slice(&mut descriptor, place).is_err() {
                // The ring stands still until the driver does something about it.
                break;
            }
            self.descriptor(card, queue, &descriptor);
            let command = descriptor[11];
            let is_context = command & EXTENDED != 0 && descriptor[10] >> 4 == 0;
            if !is_context
                && command & END != 0
                && let (Some(frame), Some(context)) = (self.frames.get_mut(queue), self.contexts.get(queue))
            {
                let frame = std::mem::take(frame);
                frame.send(context, vlans.then_some(vlan_type), backend, &mut sent);
            }
            if command & REPORT != 0 {
                let status = [descriptor[12] | DONE];
                written |= card.memory.write_slice(&status, GuestAddress(place.0.saturating_add(12))).is_ok();
            }
            head = ring.next(head);
        }
        self.finish(card, queue, at, epoch, &ring, head, written, &sent)
    }

    #[allow(clippy::too_many_arguments)]
    fn finish(
        &mut self,
        card: &Card,
        queue: usize,
        at: u64,
        epoch: u64,
        ring: &Ring,
        head: u32,
        written: bool,
        sent: &Sent,
    ) -> bool {
        let mut state = card.lock();
        if state.epoch != epoch {
            *self = Self::default();
            return true;
        }
        state.set_head(at, head);
        let now = state.ring(at);
        let empty = now.is_none_or(|ring| ring.available() == 0);
        let mut causes = if empty { TX_EMPTY } else { 0 };
        if written {
            causes |= TX_WRITTEN;
            if card.model == Model::E1000e {
                causes |= TX_QUEUE_0 << queue;
            }
        }
        sent.count(&mut state);
        state.causes.add(causes);
        card.interrupt(&mut state);
        !empty && head != ring.head
    }

    /// Takes in a descriptor: a context, or a piece of a frame.
    fn descriptor(&mut self, card: &Card, queue: usize, descriptor: &[u8; DESCRIPTOR]) {
        let (Some(frame), Some(context)) = (self.frames.get_mut(queue), self.contexts.get_mut(queue)) else { return };
        let command = descriptor[11];
        let length = match (command & EXTENDED != 0, descriptor[10] >> 4) {
            (true, 0) => {
                *context = Context {
                    ip_start: descriptor[0],
                    ip_offset: descriptor[1],
                    ip_end: word(descriptor, 2),
                    start: descriptor[4],
                    offset: descriptor[5],
                    end: word(descriptor, 6),
                    command,
                    header_length: descriptor[13],
                    segment: word(descriptor, 14),
                };
                return;
            }
            (true, _) => {
                if frame.bytes.is_empty() {
                    (frame.options, frame.segment) = (descriptor[13], command & SEGMENT != 0);
                }
                usize::from(word(descriptor, 8)) | usize::from(descriptor[10] & 15) << 16
            }
            (false, _) => {
                if command & INSERT_CHECKSUM != 0 {
                    frame.legacy = Some((descriptor[13], descriptor[10]));
                }
                word(descriptor, 8).into()
            }
        };
        if command & VLAN != 0 {
            frame.tag = Some(word(descriptor, 14));
        }
        let start = frame.bytes.len();
        if start + length > LONGEST_FRAME {
            frame.too_long = true;
            return;
        }
        frame.bytes.resize(start + length, 0);
        let address = descriptor.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        if let Some(piece) = frame.bytes.get_mut(start..)
            && card.memory.read_slice(piece, GuestAddress(address)).is_err()
        {
            // A frame from nowhere is no frame.
            frame.too_long = true;
        }
    }
}

/// What was sent, for the statistics.
#[derive(Default)]
struct Sent {
    frames: u32,
    bytes: u64,
    broadcasts: u32,
    multicasts: u32,
    segmented: u32,
}

impl Sent {
    fn count(&self, state: &mut crate::card::State) {
        for counter in [GOOD_TX, TOTAL_TX] {
            state.count(counter, self.frames);
        }
        for counter in [GOOD_TX_BYTES, TOTAL_TX_BYTES] {
            state.count_bytes(counter, self.bytes);
        }
        state.count(BROADCAST_TX, self.broadcasts);
        state.count(MULTICAST_TX, self.multicasts);
        state.count(SEGMENTED_TX, self.segmented);
    }
}

/// Puts `value` at `at`, if there is room.
fn put(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(place) = bytes.get_mut(at..at.saturating_add(2)) {
        place.copy_from_slice(&value.to_be_bytes());
    }
}

fn get(bytes: &[u8], at: usize) -> u16 {
    match bytes.get(at..at.saturating_add(2)) {
        Some([high, low]) => u16::from_be_bytes([*high, *low]),
        _ => 0,
    }
}

impl Frame {
    fn send(mut self, context: &Context, vlan_type: Option<u16>, backend: &mut dyn Backend, sent: &mut Sent) {
        if self.too_long || self.bytes.len() < 14 {
            return;
        }
        let mut header = Header::default();
        if self.segment && context.command & CONTEXT_TCP != 0 && context.segment > 0 {
            self.prepare_segmentation(context);
            let version4 = context.command & CONTEXT_IP4 != 0;
            header.gso_type = if version4 { GSO_TCP4 } else { GSO_TCP6 };
            (header.gso_size, header.header_length) = (context.segment, context.header_length.into());
            sent.segmented += 1;
        }
        if self.options & OPTION_IP != 0 && context.command & CONTEXT_IP4 != 0 {
            self.sum(context.ip_start, context.ip_offset, context.ip_end);
        }
        if self.options & OPTION_TRANSPORT != 0 {
            match context.offset.checked_sub(context.start) {
                // What the back-end can do as well; it leaves out what it needn't do.
                Some(offset) if context.end == 0 && usize::from(context.start) < self.bytes.len() => {
                    header.flags |= NEEDS_CHECKSUM;
                    (header.checksum_start, header.checksum_offset) = (context.start.into(), offset.into());
                }
                _ => self.sum(context.start, context.offset, context.end),
            }
        }
        if let Some((start, place)) = self.legacy {
            self.sum(start, place, 0);
        }
        if let (Some(kind), Some(tag)) = (vlan_type, self.tag) {
            let [k0, k1] = kind.to_be_bytes();
            let [t0, t1] = tag.to_be_bytes();
            self.bytes.splice(12..12, [k0, k1, t0, t1]);
            header.checksum_start = header.checksum_start.saturating_add(4);
            header.header_length = header.header_length.saturating_add(4);
        }
        sent.frames += 1;
        sent.bytes += self.bytes.len() as u64 + 4;
        match self.bytes.first_chunk() {
            Some([0xff, 0xff, 0xff, 0xff, 0xff, 0xff]) => sent.broadcasts += 1,
            Some([first, ..]) if first & 1 != 0 => sent.multicasts += 1,
            _ => {}
        }
        backend.send(&header, &self.bytes);
    }

    /// Sums up from `start` to `end` (0: the end of the frame) and puts the sum at `place`.
    fn sum(&mut self, start: u8, place: u8, end: u16) {
        let end = if end == 0 { self.bytes.len() } else { usize::from(end).saturating_add(1).min(self.bytes.len()) };
        let sum = self.bytes.get(start.into()..end).map(|bytes| !checksum(bytes));
        if let Some(sum) = sum {
            put(&mut self.bytes, place.into(), sum);
        }
    }

    /// A driver that leaves segmentation to the card leaves out all lengths: the packet's, and that in the sum of the
    /// pseudo header.
    fn prepare_segmentation(&mut self, context: &Context) {
        let length = self.bytes.len();
        let ip = usize::from(context.ip_start);
        let whole = length.saturating_sub(ip);
        if context.command & CONTEXT_IP4 != 0 {
            put(&mut self.bytes, ip + 2, whole.min(0xffff) as u16);
            put(&mut self.bytes, context.ip_offset.into(), 0);
        } else {
            put(&mut self.bytes, ip + 4, whole.saturating_sub(40).min(0xffff) as u16);
        }
        let place = usize::from(context.offset);
        let segment = length.saturating_sub(context.start.into());
        let sum = u32::from(get(&self.bytes, place)) + (segment & 0xffff) as u32 + (segment >> 16) as u32;
        let sum = (sum & 0xffff) + (sum >> 16);
        put(&mut self.bytes, place, ((sum & 0xffff) + (sum >> 16)) as u16);
    }
}
