//! Complete frames that wait for room in the guest's receive queue: all but TCP's segments, which wait as bytes.

use std::collections::VecDeque;

use crate::{Header, Sink};

/// What waits at most. Beyond it frames are lost, as in any switch.
const MOST_FRAMES: usize = 1024;
const MOST_BYTES: usize = 4 << 20;

#[derive(Default)]
pub struct Outbox {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Outbox {
    pub fn push(&mut self, frame: Vec<u8>) {
        if self.frames.len() < MOST_FRAMES && self.bytes < MOST_BYTES {
            self.bytes += frame.len();
            self.frames.push_back(frame);
        }
    }

    pub fn pop(&mut self) -> Option<Vec<u8>> {
        let frame = self.frames.pop_front()?;
        self.bytes -= frame.len();
        Some(frame)
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Hands over what waits. False: the sink is full.
    pub fn flush(&mut self, sink: &mut dyn Sink) -> bool {
        while let Some(frame) = self.frames.front() {
            if !sink.deliver(&Header::default(), &[frame]) {
                return false;
            }
            self.pop();
        }
        true
    }
}
