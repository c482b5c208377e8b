//! Data of a command straight between an image and guest memory.

use memory::vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};
use memory::{RegionTracker, View};

use crate::link::{Source, Stop, Target};

/// What is moved by one call of the image: enough to be fast, little enough to see a reset soon.
const PIECE: usize = 1 << 20;

/// Pieces of guest memory, in the order in which data fill them. What they say was only copied: that all of it is RAM
/// is found out when it is used.
#[derive(Default)]
pub struct Scatter {
    entries: Vec<(u64, usize)>,
    length: usize,
}

impl Scatter {
    pub fn push(&mut self, address: u64, length: usize) {
        self.entries.push((address, length));
        self.length = self.length.saturating_add(length);
    }

    /// Bytes in all pieces.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Guest memory itself for `length` bytes from byte `at` on, which the list must have.
    fn slices<'a>(&self, memory: &'a View, mut at: usize, mut length: usize) -> Option<Slices<'a>> {
        let mut slices = Vec::new();
        for &(address, size) in &self.entries {
            if length == 0 {
                break;
            }
            let skipped = at.min(size);
            at -= skipped;
            let taken = length.min(size - skipped);
            if taken > 0 {
                let start = address.checked_add(skipped as u64)?;
                slices.push(memory.get_slice(GuestAddress(start), taken).ok()?);
                length -= taken;
            }
        }
        (length == 0).then_some(slices)
    }

    /// Calls `each` for pieces of bytes `start` to `start + length`, until `stopped`.
    fn walk(
        &self,
        memory: &View,
        start: usize,
        length: usize,
        stopped: &dyn Fn() -> bool,
        mut each: impl FnMut(&Slices<'_>, usize) -> std::io::Result<()>,
    ) -> Result<(), Stop> {
        let mut done = 0;
        while done < length {
            if stopped() {
                return Err(Stop::Abandoned);
            }
            let piece = (length - done).min(PIECE);
            let slices = self.slices(memory, start.saturating_add(done), piece).ok_or(Stop::Memory)?;
            each(&slices, done)?;
            done += piece;
        }
        Ok(())
    }

    /// Moves `length` bytes of `source` to guest memory, from byte `start` of the list on.
    pub fn fill(
        &self,
        memory: &View,
        start: usize,
        length: usize,
        stopped: &dyn Fn() -> bool,
        source: &impl Source,
    ) -> Result<(), Stop> {
        self.walk(memory, start, length, stopped, |slices, at| source.read(slices, at))
    }

    /// Moves `length` bytes from guest memory to `target`.
    pub fn drain(
        &self,
        memory: &View,
        start: usize,
        length: usize,
        stopped: &dyn Fn() -> bool,
        target: &impl Target,
    ) -> Result<(), Stop> {
        self.walk(memory, start, length, stopped, |slices, at| target.write(slices, at))
    }
}

type Slices<'a> = Vec<VolatileSlice<'a, RegionTracker>>;
