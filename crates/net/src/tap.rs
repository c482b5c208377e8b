//! A network interface of the host as what a card is attached to. The host does whatever it does with its interfaces:
//! bridge, route, filter. Frames pass as they are, with their headers, so that neither side cuts or sums up for the
//! other what it could take whole.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use crate::{Backend, Error, HEADER_LENGTH, Header, LONGEST_FRAME, Offloads, Sink};

/// One queue of a tap interface.
pub struct Tap {
    queue: File,
    /// The interface has several queues, of which some may be off.
    multi_queue: bool,
    enabled: bool,
    buffer: Vec<u8>,
    /// What is in the buffer and found no room; 0: nothing.
    held: usize,
}

impl Tap {
    /// Up to `queues` queues of the interface `name` (of a new one, if empty), and its name. An interface that was made
    /// for one queue has one.
    pub fn open(name: &str, queues: usize) -> Result<(Vec<Self>, String), Error> {
        let error = |source| Error::Tap { name: name.into(), source };
        let header = HEADER_LENGTH as i32;
        let mut files = Vec::new();
        let mut real_name = name.to_owned();
        if queues > 1
            && let Ok((first, given)) = sys::tap::open(name, true, header)
        {
            files.push(first);
            real_name = given;
            while files.len() < queues {
                files.push(sys::tap::open(&real_name, true, header).map_err(error)?.0);
            }
        }
        let multi_queue = !files.is_empty();
        if files.is_empty() {
            let (file, given) = sys::tap::open(name, false, header).map_err(error)?;
            files.push(file);
            real_name = given;
        }
        let tap = |queue| Tap { queue, multi_queue, enabled: true, buffer: Vec::new(), held: 0 };
        let mut taps: Vec<_> = files.into_iter().map(tap).collect();
        // Until the guest wants them, frames must not go where nobody looks.
        taps.iter_mut().skip(1).for_each(|tap| tap.set_enabled(false));
        Ok((taps, real_name))
    }
}

impl Backend for Tap {
    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tso4: true, tso6: true }
    }

    fn set_guest_offloads(&mut self, offloads: Offloads) {
        if let Err(error) = sys::tap::set_offloads(&self.queue, offloads.checksum, offloads.tso4, offloads.tso6) {
            tracing::warn!("a tap interface refuses to change its offloads: {error}");
        }
    }

    fn set_enabled(&mut self, enabled: bool) {
        if self.multi_queue
            && std::mem::replace(&mut self.enabled, enabled) != enabled
            && let Err(error) = sys::tap::set_enabled(&self.queue, enabled)
        {
            tracing::warn!("a queue of a tap interface can't be switched: {error}");
        }
    }

    fn send(&mut self, header: &Header, frame: &[u8]) {
        // The kernel checks the header against the frame, and drops what it does not like or has no room for.
        let _ = self.queue.write_vectored(&[IoSlice::new(&header.to_bytes()), IoSlice::new(frame)]);
    }

    fn receive(&mut self, sink: &mut dyn Sink) {
        self.buffer.resize(HEADER_LENGTH + LONGEST_FRAME, 0);
        loop {
            if self.held == 0 {
                // Whatever the error is, there is no frame.
                self.held = self.queue.read(&mut self.buffer).unwrap_or(0);
            }
            let Some((header, frame)) = self.buffer.get(..self.held).and_then(<[u8]>::split_first_chunk) else {
                self.held = 0;
                return;
            };
            if !sink.deliver(&Header::from_bytes(header), &[frame]) {
                return;
            }
            self.held = 0;
        }
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn reset(&mut self) {
        self.held = 0;
        self.set_guest_offloads(Offloads::default());
    }
}
