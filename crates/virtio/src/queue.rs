//! A split virtqueue as a device uses it. The `virtio-queue` crate has no packed ones, so they are not offered.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use memory::View;
use memory::vm_memory::{Bytes, GuestAddress};
use virtio_queue::{QueueOwnedT, QueueT};

use crate::chain::DESCRIPTOR;
use crate::{Chain, Event, Signals, feature};

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (virtio 1.2, 2.7.6).
const NO_INTERRUPT: u16 = 1;

/// What a driver says about a queue before it enables it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Layout {
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

/// A queue that the driver has enabled. It belongs to one thread of the device.
pub struct Queue {
    index: u16,
    ring: virtio_queue::Queue,
    memory: Arc<View>,
    signals: Arc<dyn Signals>,
    kick: Arc<Event>,
    /// The used index when the driver was last asked whether it wants an interrupt.
    announced: u16,
    /// The driver has broken the ring: nothing more comes from it until reset.
    broken: bool,
}

impl Queue {
    /// `None`: the layout is not possible, or not in RAM.
    pub(crate) fn new(
        index: u16,
        layout: Layout,
        features: u64,
        memory: Arc<View>,
        signals: Arc<dyn Signals>,
        kick: Arc<Event>,
    ) -> Option<Self> {
        let mut ring = virtio_queue::Queue::new(layout.size).ok()?;
        ring.try_set_desc_table_address(GuestAddress(layout.descriptors)).ok()?;
        ring.try_set_avail_ring_address(GuestAddress(layout.available)).ok()?;
        ring.try_set_used_ring_address(GuestAddress(layout.used)).ok()?;
        ring.set_event_idx(features & feature::EVENT_IDX != 0);
        ring.set_ready(true);
        // A ring at address 0 is a driver that has not set it.
        let set = layout.available != 0 && layout.used != 0;
        (set && ring.is_valid(&*memory)).then_some(Queue {
            index,
            ring,
            memory,
            signals,
            kick,
            announced: 0,
            broken: false,
        })
    }

    pub fn index(&self) -> u16 {
        self.index
    }

    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Set when the driver has made buffers available. [`Event::clear`] it before looking for them.
    pub fn kick(&self) -> &Arc<Event> {
        &self.kick
    }

    /// Takes the next request, if there is one.
    pub fn pop(&mut self) -> Option<Chain> {
        if self.broken {
            return None;
        }
        let next = match self.ring.iter(self.memory.clone()) {
            Ok(mut available) => available.next(),
            Err(error) => {
                self.fail(&error.to_string());
                return None;
            }
        };
        let next = next?;
        let head = next.head_index();
        let table = self.ring.desc_table();
        let first = (head < self.size()).then(|| GuestAddress(table + u64::from(head) * DESCRIPTOR as u64));
        let chain = Chain::collect(self.memory.clone(), next, first);
        if chain.is_none() {
            self.fail("a descriptor chain is malformed");
        }
        chain
    }

    /// Lets the last popped request be the next one again.
    pub fn undo_pop(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Gives a request back, after `written` bytes from the start of its device-writable part were written.
    pub fn push(&mut self, chain: Chain, written: u32) {
        self.push_head(chain.head(), written);
    }

    /// The same by [`Chain::head`], for requests whose chain is gone.
    pub fn push_head(&mut self, head: u16, written: u32) {
        if let Err(error) = self.ring.add_used(&*self.memory, head, written) {
            self.fail(&error.to_string());
        }
    }

    /// Gives several requests back such that the driver sees all of them or none: heads, and the bytes written to each.
    pub fn push_together(&mut self, requests: &[(u16, u32)]) {
        let Some(((last, last_written), others)) = requests.split_last() else { return };
        for (head, written) in others {
            // `struct virtq_used_elem` (virtio 1.2, 2.7.8), behind the ring's flags and index.
            let next = self.ring.next_used();
            let element = GuestAddress(self.ring.used_ring() + 4 + 8 * u64::from(next % self.ring.size()));
            let bytes = (u64::from(*head) | u64::from(*written) << 32).to_le_bytes();
            if let Err(error) = self.memory.write_slice(&bytes, element) {
                return self.fail(&error.to_string());
            }
            self.ring.set_next_used(next.wrapping_add(1));
        }
        self.push_head(*last, *last_written);
    }

    /// Interrupts if buffers were given back since the last call and the driver wants to know.
    pub fn notify(&mut self) {
        let used = self.ring.next_used();
        let before = std::mem::replace(&mut self.announced, used);
        if used == before {
            return;
        }
        // The driver may set what it wants while it sees the new used index (virtio 1.2, 2.7.7.2).
        fence(Ordering::SeqCst);
        let wanted = match self.ring.event_idx_enabled() {
            // 2.7.10: was the index that the driver waits for passed?
            true => self
                .used_event()
                .is_none_or(|event| used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(before)),
            false => !self.interrupts_suppressed(),
        };
        if wanted {
            self.signals.queue_used(self.index);
        }
    }

    /// `used_event`, at the end of the available ring.
    fn used_event(&self) -> Option<u16> {
        let address = self.ring.avail_ring() + 4 + 2 * u64::from(self.ring.size());
        self.memory.load::<u16>(GuestAddress(address), Ordering::Relaxed).ok().map(u16::from_le)
    }

    fn interrupts_suppressed(&self) -> bool {
        let flags = self.memory.load::<u16>(GuestAddress(self.ring.avail_ring()), Ordering::Relaxed);
        flags.is_ok_and(|flags| u16::from_le(flags) & NO_INTERRUPT != 0)
    }

    /// Tells the driver that it need not notify: the device looks for buffers by itself.
    pub fn disable_kicks(&mut self) {
        if self.ring.disable_notification(&*self.memory).is_err() {
            self.fail("the used ring can't be written");
        }
    }

    /// Asks the driver to notify from now on. True: buffers have come meanwhile, look again before waiting.
    pub fn enable_kicks(&mut self) -> bool {
        match self.ring.enable_notification(&*self.memory) {
            Ok(more) => more && !self.broken,
            Err(_) => {
                self.fail("the used ring can't be written");
                false
            }
        }
    }

    /// Whether buffers are available.
    pub fn has_available(&self) -> bool {
        let index = self.ring.avail_idx(&*self.memory, Ordering::Acquire);
        !self.broken && index.is_ok_and(|index| index.0 != self.ring.next_avail())
    }

    /// The driver has done what the specification forbids: the queue is dead, and the driver is told.
    pub fn fail(&mut self, why: &str) {
        // Not a warning: the guest can do this as often as it likes.
        tracing::info!("virtio queue {}: {why}: the device needs a reset", self.index);
        self.broken = true;
        self.signals.needs_reset();
    }
}
