//! A receive queue, a transmit queue, and the thread between them and the back-end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use net::{Backend, HEADER_LENGTH, Header, LONGEST_FRAME, Sink};
use wake::wait_any_or;

use super::{Shared, SharedBackend, guest_offloads, lock};
use crate::{Chain, Event, Queue};

/// Frames taken from the guest, and given to it, before the other direction has its turn.
const TRANSMIT_BATCH: usize = 64;
const RECEIVE_BATCH: usize = 256;

pub struct Pair {
    shared: Arc<Shared>,
    number: u64,
    transmit: Queue,
    receive: Buffers,
    frame: Vec<u8>,
}

impl Pair {
    pub fn new(shared: Arc<Shared>, number: u64, receive: Queue, transmit: Queue, mergeable: bool) -> Self {
        let receive = Buffers { queue: receive, mergeable, full: false, left: 0, taken: Vec::new() };
        Pair { shared, number, transmit, receive, frame: vec![0; HEADER_LENGTH + LONGEST_FRAME] }
    }

    pub fn work(mut self, backend: &SharedBackend, stop: &Event) {
        // Nobody else has business with it while the card is active.
        let mut backend = lock(backend);
        let (receive_kick, transmit_kick) = (self.receive.queue.kick().clone(), self.transmit.kick().clone());
        let mut features = None;
        self.receive.queue.disable_kicks();
        while !stop.is_set() {
            receive_kick.clear();
            transmit_kick.clear();
            let wanted = self.shared.guest_offloads.load(Ordering::SeqCst);
            if features.replace(wanted) != Some(wanted) {
                backend.set_guest_offloads(guest_offloads(wanted));
            }
            backend.set_enabled(self.number < self.shared.active_pairs.load(Ordering::SeqCst));
            self.transmit.disable_kicks();
            let more = self.take_frames(&mut **backend);
            (self.receive.full, self.receive.left) = (false, RECEIVE_BATCH);
            backend.receive(&mut self.receive);
            self.receive.queue.notify();
            if more || self.receive.left == 0 || self.transmit.enable_kicks() {
                continue;
            }
            // Buffers are of interest only to a frame that waits for one.
            if self.receive.full && self.receive.queue.enable_kicks() {
                self.receive.queue.disable_kicks();
                continue;
            }
            wait(&[stop, &receive_kick, &transmit_kick], &**backend, self.receive.full);
            if self.receive.full {
                self.receive.queue.disable_kicks();
            }
        }
    }

    /// Takes frames from the guest. True: there may be more.
    fn take_frames(&mut self, backend: &mut dyn Backend) -> bool {
        for _ in 0..TRANSMIT_BATCH {
            let Some(chain) = self.transmit.pop() else {
                self.transmit.notify();
                return false;
            };
            let length = chain.readable_len();
            if let Some(frame) = self.frame.get_mut(..length) {
                let length = chain.read_at(0, frame);
                if let Some((header, frame)) = frame.get(..length).and_then(<[u8]>::split_first_chunk) {
                    backend.send(&Header::from_bytes(header), frame);
                }
            }
            self.transmit.push(chain, 0);
        }
        self.transmit.notify();
        true
    }
}

/// Waits until one of the events is set or the back-end has something. With a `full` receive queue the back-end can't
/// go on anyhow, and only its time counts.
fn wait(events: &[&Event], backend: &dyn Backend, full: bool) {
    let timeout = backend.deadline().map(|deadline| deadline.saturating_duration_since(Instant::now()));
    wait_any_or(events, (!full).then(|| backend.descriptor()), timeout);
}

/// The guest's empty buffers.
struct Buffers {
    queue: Queue,
    /// Frames may extend over several buffers (`VIRTIO_NET_F_MRG_RXBUF`).
    mergeable: bool,
    /// A frame found no room.
    full: bool,
    /// How many more frames are taken before the other direction has its turn.
    left: usize,
    /// Buffers of the frame under way.
    taken: Vec<Chain>,
}

impl Buffers {
    /// Takes as many buffers as `length` bytes need. Returns how many bytes they hold; fewer: there are no more.
    fn take(&mut self, length: usize) -> usize {
        let mut room = 0;
        while room < length {
            let Some(chain) = self.queue.pop() else { break };
            if chain.writable_len() == 0 {
                self.queue.fail("a buffer for received frames is not writable");
                break;
            }
            room += chain.writable_len();
            self.taken.push(chain);
            if !self.mergeable {
                break;
            }
        }
        room
    }
}

impl Sink for Buffers {
    fn deliver(&mut self, header: &Header, pieces: &[&[u8]]) -> bool {
        if self.left == 0 {
            return false;
        }
        let length = HEADER_LENGTH + pieces.iter().map(|piece| piece.len()).sum::<usize>();
        let room = self.take(length);
        if room < length && (self.mergeable || self.taken.is_empty()) {
            for _ in self.taken.drain(..) {
                self.queue.undo_pop();
            }
            self.full = true;
            return false;
        }
        self.left -= 1;
        let header = Header { buffers: self.taken.len() as u16, ..*header }.to_bytes();
        let all = std::iter::once(&header[..]).chain(pieces.iter().copied());
        let mut used = Vec::with_capacity(self.taken.len());
        let mut buffers = self.taken.drain(..);
        let (mut current, mut written) = (buffers.next(), 0);
        for mut piece in all {
            while let Some(chain) = &current
                && !piece.is_empty()
            {
                let count = chain.write_at(written, piece);
                written += count;
                piece = piece.get(count..).unwrap_or_default();
                if !piece.is_empty() {
                    // This buffer is full. Without mergeable ones it is the only one: a frame that is too long is cut.
                    used.push((chain.head(), written as u32));
                    (current, written) = (buffers.next(), 0);
                }
            }
        }
        if let Some(chain) = current {
            used.push((chain.head(), written as u32));
        }
        drop(buffers);
        self.queue.push_together(&used);
        true
    }
}
