//! One descriptor chain: a request's buffers in guest memory, checked once when it is taken from the queue.

use std::io::{self, Read, Write};
use std::sync::Arc;

use memory::vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileSlice};
use memory::{RamRegion, RegionTracker, View};
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;

/// The most descriptors of a chain. Drivers may make it as long as the queue (virtio 1.2, 2.7.5.3.1), and some make it longer
/// by an indirect table; it holds back those that would keep a device busy for hours.
const MAX_DESCRIPTORS: usize = 1024;

/// Bytes of a descriptor (virtio 1.2, 2.7.5).
pub(crate) const DESCRIPTOR: usize = 16;

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

/// RAM in pieces that mostly lie in one region, which is looked for once.
struct Regions<'a> {
    view: &'a View,
    last: Option<&'a RamRegion>,
}

impl<'a> Regions<'a> {
    fn of(view: &'a View) -> Self {
        Regions { view, last: None }
    }

    /// A piece's memory, if all of it is in one region.
    fn slice(&mut self, segment: Segment) -> Option<VolatileSlice<'a, RegionTracker>> {
        let address = GuestAddress(segment.address);
        if self.last.is_none_or(|region| region.to_region_addr(address).is_none()) {
            self.last = self.view.find_region(address);
        }
        let region = self.last?;
        region.get_slice(region.to_region_addr(address)?, segment.length).ok()
    }
}

/// The descriptors of a request that are in an indirect table. Read at once, and followed like those of the queue itself: a
/// large request has hundreds. `None`: there is no such table, or it is one that `virtio-queue` may judge.
fn indirect(memory: &View, first: GuestAddress) -> Option<impl Iterator<Item = Descriptor>> {
    let head: Descriptor = memory.read_obj(first).ok()?;
    let count = head.len() as usize / DESCRIPTOR;
    if !head.refers_to_indirect_table() || count * DESCRIPTOR != head.len() as usize || count > MAX_DESCRIPTORS {
        return None;
    }
    let mut table = vec![0; count * DESCRIPTOR];
    memory.read_slice(&mut table, head.addr()).ok()?;
    let at = move |index: usize| {
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = *table.as_chunks().0.get(index)?;
        Some(Descriptor::new(
            u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            u32::from_le_bytes([l0, l1, l2, l3]),
            u16::from_le_bytes([f0, f1]),
            u16::from_le_bytes([n0, n1]),
        ))
    };
    let mut next = Some(0);
    let follow = move || {
        let descriptor = at(next?)?;
        next = descriptor.has_next().then(|| usize::from(descriptor.next()));
        // Virtio 1.2, 2.7.5.3.1.
        (!descriptor.refers_to_indirect_table()).then_some(descriptor)
    };
    // One that is longer than its table loops.
    Some(std::iter::from_fn(follow).take(count))
}

impl Chain {
    /// Follows the descriptors, the first of which is at `first`, if the queue has that. `None`: they loop, end in nothing, lie
    /// outside RAM, are in the wrong order or too many.
    pub(crate) fn collect(
        memory: Arc<View>,
        descriptors: DescriptorChain<Arc<View>>,
        first: Option<GuestAddress>,
    ) -> Option<Self> {
        let head = descriptors.head_index();
        let mut buffers = [Buffers::default(), Buffers::default()];
        let complete = match first.and_then(|first| indirect(&memory, first)) {
            Some(table) => gather(&memory, table, &mut buffers)?,
            None => gather(&memory, descriptors, &mut buffers)?,
        };
        let [readable, writable] = buffers;
        complete.then_some(Chain { memory, head, readable, writable })
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
        let mut regions = Regions::of(&self.memory);
        buffers.range(offset, length).map_while(|segment| regions.slice(segment)).collect()
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

/// Takes the device-readable and the device-writable buffers from descriptors. Whether that was all: iterators just end
/// when they can't go on, and then the last descriptor has promised another one.
fn gather(
    memory: &View,
    descriptors: impl Iterator<Item = Descriptor>,
    [readable, writable]: &mut [Buffers; 2],
) -> Option<bool> {
    let mut complete = false;
    let mut regions = Regions::of(memory);
    for descriptor in descriptors {
        complete = !descriptor.has_next();
        let segment = Segment { address: descriptor.addr().0, length: descriptor.len() as usize };
        regions.slice(segment)?;
        match descriptor.is_write_only() {
            true => writable.add(segment),
            // Virtio 1.2, 2.7.4.2.
            false if !writable.segments.is_empty() => return None,
            false => readable.add(segment),
        }
        let count = readable.segments.len() + writable.segments.len();
        let length = readable.length.saturating_add(writable.length);
        // Less than 4 GiB (2.7.5.2), so that what was written can be told by 32 bits.
        if count > MAX_DESCRIPTORS || u32::try_from(length).is_err() {
            return None;
        }
    }
    Some(complete)
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
