//! Bytes on their way: a ring that grows up to a limit.

use std::io::IoSliceMut;

const FIRST_SIZE: usize = 64 << 10;

#[derive(Default)]
pub struct Ring {
    data: Vec<u8>,
    start: usize,
    length: usize,
}

impl Ring {
    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// `length` bytes from `offset` on, in two pieces; less if there is less.
    pub fn slices(&self, offset: usize, length: usize) -> (&[u8], &[u8]) {
        let offset = offset.min(self.length);
        let length = length.min(self.length - offset);
        let capacity = self.data.len();
        if length == 0 {
            return (&[], &[]);
        }
        let begin = (self.start + offset) % capacity;
        let first = length.min(capacity - begin);
        (&self.data[begin..begin + first], &self.data[..length - first])
    }

    /// Removes bytes from the front.
    pub fn consume(&mut self, count: usize) {
        let count = count.min(self.length);
        self.length -= count;
        // An empty ring starts over, so that what comes next is in one piece.
        self.start = if self.length == 0 { 0 } else { (self.start + count) % self.data.len() };
    }

    /// Room for more at the end, in two pieces. A full ring is enlarged if `limit` allows.
    pub fn room(&mut self, limit: usize) -> [IoSliceMut<'_>; 2] {
        if self.length == self.data.len() {
            self.enlarge(self.length + 1, limit);
        }
        let capacity = self.data.len();
        let end = self.start + self.length;
        if end >= capacity {
            let end = end - capacity;
            return [IoSliceMut::new(&mut self.data[end..self.start]), IoSliceMut::new(&mut [])];
        }
        let (low, high) = self.data.split_at_mut(end);
        [IoSliceMut::new(high), IoSliceMut::new(&mut low[..self.start])]
    }

    /// Bytes were written into the room.
    pub fn filled(&mut self, count: usize) {
        self.length = (self.length + count).min(self.data.len());
    }

    /// Adds bytes, for which the caller knows that they are not too many.
    pub fn extend(&mut self, bytes: &[u8]) {
        let needed = self.length + bytes.len();
        if needed > self.data.len() {
            self.enlarge(needed, usize::MAX);
        }
        let [mut first, mut second] = self.room(0);
        let split = bytes.len().min(first.len());
        let (head, tail) = bytes.split_at(split);
        first[..split].copy_from_slice(head);
        second[..tail.len()].copy_from_slice(tail);
        self.filled(bytes.len());
    }

    /// Gives the memory back when it is empty.
    pub fn shrink(&mut self) {
        if self.length == 0 {
            *self = Ring::default();
        }
    }

    fn enlarge(&mut self, needed: usize, limit: usize) {
        let capacity = needed.next_power_of_two().max(FIRST_SIZE).min(limit);
        if capacity <= self.data.len() {
            return;
        }
        let (first, second) = self.slices(0, self.length);
        let mut data = Vec::with_capacity(capacity);
        data.extend_from_slice(first);
        data.extend_from_slice(second);
        data.resize(capacity, 0);
        self.data = data;
        self.start = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(ring: &mut Ring, bytes: &[u8], limit: usize) -> usize {
        let mut taken = 0;
        for mut piece in ring.room(limit) {
            let count = piece.len().min(bytes.len() - taken);
            piece[..count].copy_from_slice(&bytes[taken..taken + count]);
            taken += count;
        }
        ring.filled(taken);
        taken
    }

    fn contents(ring: &Ring) -> Vec<u8> {
        let (first, second) = ring.slices(0, ring.len());
        [first, second].concat()
    }

    #[test]
    fn bytes_come_out_as_they_went_in_whatever_the_steps() {
        let mut ring = Ring::default();
        let (mut sent, mut expected) = (0u32, 0u32);
        for step in 0..2000usize {
            let bytes: Vec<u8> =
                (0..(step * 7919) % 30_000).map(|i| (sent.wrapping_add(i as u32) % 251) as u8).collect();
            let taken = if step % 3 == 0 && ring.len() < 100_000 {
                ring.extend(&bytes);
                bytes.len()
            } else {
                fill(&mut ring, &bytes, 128 << 10)
            };
            sent += taken as u32;
            let count = (step * 104_729) % 33_000;
            let (first, second) = ring.slices(0, count);
            for byte in first.iter().chain(second) {
                assert_eq!(u32::from(*byte), expected % 251);
                expected += 1;
            }
            ring.consume(count);
        }
        assert_eq!(sent - expected, ring.len() as u32);
    }

    #[test]
    fn growth_ends_at_the_limit() {
        let mut ring = Ring::default();
        let mut total = 0;
        loop {
            let taken = fill(&mut ring, &[7; 100_000], 256 << 10);
            total += taken;
            if taken == 0 {
                break;
            }
        }
        assert_eq!((total, ring.len()), (256 << 10, 256 << 10));
        assert_eq!(contents(&ring).len(), total);
        ring.consume(total);
        ring.shrink();
        assert!(ring.is_empty() && ring.slices(0, 10).0.is_empty());
    }
}
