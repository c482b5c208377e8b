//! One descriptor chain: a request's buffers in guest memory, checked once when it is taken from the queue.

use std::io::{self, Read, Write};
use std::sync::Arc;

use memory::vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};
use memory::{RegionTracker, View};
use virtio_queue::DescriptorChain;

/// The most descriptors of a chain. Drivers may make it as long as the queue (virtio 1.2, 2.7.5.3.1), and some make it longer
/// by an indirect table; it holds back those that would keep a device busy for hours.
const MAX_DESCRIPTORS: usize = 1024;

/// A piece of guest memory, known to lie within one region of RAM.
#[derive(Clone, Copy, Debug)]
struct Segment {
    address: u64,
    length: usize,
}

/// The device-readable or the device-writable part of a chain.
#[derive(Debug, Default)]
struct Buffers {
    segments: Vec<Segment>,
    length: usize,
}

impl Buffers {
    fn add(&mut self, segment: Segment) {
        self.length += segment.length;
        self.segments.push(segment);
    }

    /// The pieces that hold bytes `offset` to `offset + length`, as far as there are any.
    fn range(&self, mut offset: usize, mut length: usize) -> impl Iterator<Item = Segment> {
        self.segments.iter().filter_map(move |segment| {
            let skipped = offset.min(segment.length);
            offset -= skipped;
            let taken = length.min(segment.length - skipped);
            length -= taken;
            (taken > 0).then_some(Segment { address: segment.address + skipped as u64, length: taken })
        })
    }
}

/// A request of the driver. Every byte of it is RAM, and device-readable buffers come before device-writable ones.
/// What the bytes say may change at any time: the driver still has the memory.
#[derive(Debug)]
pub struct Chain {
    memory: Arc<View>,
    head: u16,
    readable: Buffers,
    writable: Buffers,
}

impl Chain {
    /// Follows the descriptors. `None`: they loop, end in nothing, lie outside RAM, are in the wrong order or too many.
    pub(crate) fn collect(memory: Arc<View>, descriptors: DescriptorChain<Arc<View>>) -> Option<Self> {
        let head = descriptors.head_index();
        let mut chain = Chain { memory, head, readable: Buffers::default(), writable: Buffers::default() };
        // The iterator just ends when it can't go on; then the last descriptor has promised another one.
        let mut complete = false;
        for descriptor in descriptors {
            complete = !descriptor.has_next();
            let segment = Segment { address: descriptor.addr().0, length: descriptor.len() as usize };
            chain.memory.get_slice(descriptor.addr(), segment.length).ok()?;
            match descriptor.is_write_only() {
                true => chain.writable.add(segment),
                // Virtio 1.2, 2.7.4.2.
                false if !chain.writable.segments.is_empty() => return None,
                false => chain.readable.add(segment),
            }
            let count = chain.readable.segments.len() + chain.writable.segments.len();
            let length = chain.readable.length.saturating_add(chain.writable.length);
            // Less than 4 GiB (2.7.5.2), so that what was written can be told by 32 bits.
            if count > MAX_DESCRIPTORS || u32::try_from(length).is_err() {
                return None;
            }
        }
        complete.then_some(chain)
    }

    /// The index of the first descriptor, by which the driver knows the chain.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the device may read.
    pub fn readable_len(&self) -> usize {
        self.readable.length
    }

    /// Bytes that the device may write.
    pub fn writable_len(&self) -> usize {
        self.writable.length
    }

    /// Copies device-readable bytes from `offset` on; returns how many there were.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> usize {
        let mut done = 0;
        for segment in self.readable.range(offset, data.len()) {
            let Some(part) = data.get_mut(done..done + segment.length) else { break };
            if self.memory.read_slice(part, GuestAddress(segment.address)).is_err() {
                break;
            }
            done += segment.length;
        }
        done
    }

    /// Copies to the device-writable bytes from `offset` on; returns how many there was room for.
    pub fn write_at(&self, offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for segment in self.writable.range(offset, data.len()) {
            let Some(part) = data.get(done..done + segment.length) else { break };
            if self.memory.write_slice(part, GuestAddress(segment.address)).is_err() {
                break;
            }
            done += segment.length;
        }
        done
    }

    /// Guest-physical addresses and lengths of the device-writable buffers.
    pub fn writable_ranges(&self) -> impl Iterator<Item = (u64, usize)> {
        self.writable.segments.iter().map(|segment| (segment.address, segment.length))
    }

    /// Device-readable memory itself, for a range of bytes (cut where the buffers end).
    pub fn readable_slices(&self, offset: usize, length: usize) -> Vec<VolatileSlice<'_, RegionTracker>> {
        self.slices(&self.readable, offset, length)
    }

    /// Device-writable memory itself. Whoever writes it other than by `vm-memory` reports that to the slices' bitmaps.
    pub fn writable_slices(&self, offset: usize, length: usize) -> Vec<VolatileSlice<'_, RegionTracker>> {
        self.slices(&self.writable, offset, length)
    }

    fn slices(&self, buffers: &Buffers, offset: usize, length: usize) -> Vec<VolatileSlice<'_, RegionTracker>> {
        let slice = |segment: Segment| self.memory.get_slice(GuestAddress(segment.address), segment.length).ok();
        buffers.range(offset, length).map_while(slice).collect()
    }

    /// Reads the device-readable part from its start.
    pub fn reader(&self) -> Reader<'_> {
        Reader { chain: self, offset: 0 }
    }

    /// Writes the device-writable part from its start.
    pub fn writer(&self) -> Writer<'_> {
        Writer { chain: self, offset: 0 }
    }
}

/// A place in a chain's device-readable bytes.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    chain: &'a Chain,
    offset: usize,
}

impl Reader<'_> {
    pub fn offset(&self) -> usize {
        self.offset
    }

    pub fn remaining(&self) -> usize {
        self.chain.readable_len() - self.offset
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let done = self.chain.read_at(self.offset, data);
        self.offset += done;
        Ok(done)
    }
}

/// A place in a chain's device-writable bytes.
#[derive(Debug)]
pub struct Writer<'a> {
    chain: &'a Chain,
    offset: usize,
}

impl Writer<'_> {
    /// Bytes written so far: what [`Queue::push`](crate::Queue::push) wants to know.
    pub fn written(&self) -> u32 {
        // A chain has less than 4 GiB (virtio 1.2, 2.7.5.2).
        self.offset as u32
    }

    pub fn remaining(&self) -> usize {
        self.chain.writable_len() - self.offset
    }
}

impl Write for Writer<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let done = self.chain.write_at(self.offset, data);
        self.offset += done;
        Ok(done)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
