//! One stream between a socket of the guest and a Unix socket of the host.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use super::packet::{Header, NO_RECEIVE, NO_SEND};

/// How many bytes the guest may send before we have handed them on.
pub const BUFFER: u32 = 256 << 10;
/// After how many bytes handed on the guest is told, at the latest.
const UPDATE: u32 = BUFFER / 4;

/// A stream. The host's socket does not block.
pub struct Connection {
    stream: UnixStream,
    /// The guest has accepted, or it was the guest that asked.
    pub open: bool,
    /// From the guest, for the host's socket.
    waiting: VecDeque<u8>,
    /// Bytes handed on to the host's socket, and what of that the guest knows.
    forwarded: u32,
    told: u32,
    /// Bytes sent to the guest; what it can hold and has handed on.
    sent: u32,
    guest_buffer: u32,
    guest_forwarded: u32,
    /// The host sends no more, and the guest was told.
    host_ended: bool,
    /// [`NO_SEND`] and [`NO_RECEIVE`] of the guest.
    guest_ended: u32,
    /// The host's socket has been told that no more comes.
    write_closed: bool,
}

/// Something that can't go on: the guest gets a reset.
#[derive(Debug, PartialEq, Eq)]
pub struct Broken;

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Connection {
    pub fn new(stream: UnixStream, open: bool) -> Self {
        Connection {
            stream,
            open,
            waiting: VecDeque::new(),
            forwarded: 0,
            told: 0,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            host_ended: false,
            guest_ended: 0,
            write_closed: false,
        }
    }

    /// Every packet of the guest says what it has room for.
    pub fn take_credit(&mut self, header: &Header) {
        (self.guest_buffer, self.guest_forwarded) = (header.buffer, header.forwarded);
    }

    /// How many bytes the guest has room for.
    fn credit(&self) -> usize {
        let under_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(under_way) as usize
    }

    /// Whether bytes of the host could be sent to the guest now.
    pub fn wants_to_read(&self) -> bool {
        self.open && !self.host_ended && self.guest_ended & NO_RECEIVE == 0 && self.credit() > 0
    }

    pub fn wants_to_write(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Reads what the guest has room for, at most `room` bytes. `None`: nothing is there now. Empty: the host has ended.
    pub fn read(&mut self, room: usize) -> Result<Option<Vec<u8>>, Broken> {
        let mut data = vec![0; self.credit().min(room)];
        match self.stream.read(&mut data) {
            Ok(count) => {
                data.truncate(count);
                self.sent = self.sent.wrapping_add(count as u32);
                self.host_ended = count == 0;
                Ok(Some(data))
            }
            Err(error) if is_temporary(&error) => Ok(None),
            Err(_) => Err(Broken),
        }
    }

    /// Takes bytes of the guest for the host.
    pub fn take(&mut self, data: &[u8]) -> Result<(), Broken> {
        let fits = self.waiting.len() + data.len() <= BUFFER as usize;
        if !self.open || !fits || self.guest_ended & NO_SEND != 0 {
            return Err(Broken);
        }
        self.waiting.extend(data);
        self.flush()
    }

    /// Hands on to the host's socket what it takes.
    pub fn flush(&mut self) -> Result<(), Broken> {
        while !self.waiting.is_empty() {
            match self.stream.write(self.waiting.as_slices().0) {
                Ok(count) => {
                    self.waiting.drain(..count);
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(error) if is_temporary(&error) => return Ok(()),
                Err(_) => return Err(Broken),
            }
        }
        if self.guest_ended & NO_SEND != 0 && !std::mem::replace(&mut self.write_closed, true) {
            // The other end may have gone already.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// Writes a line to the host before anything else: it fits into the socket's empty buffer.
    pub fn greet(&mut self, line: &str) -> Result<(), Broken> {
        self.stream.write_all(line.as_bytes()).map_err(|_| Broken)
    }

    /// The guest will not send or not receive any more. True: neither, and all it has sent was handed on.
    pub fn end(&mut self, flags: u32) -> Result<bool, Broken> {
        self.guest_ended |= flags & (NO_SEND | NO_RECEIVE);
        self.flush()?;
        Ok(self.is_finished())
    }

    pub fn is_finished(&self) -> bool {
        self.guest_ended == NO_SEND | NO_RECEIVE && self.waiting.is_empty()
    }

    /// What the host's end of the stream means for the guest.
    pub fn end_flags(&self) -> u32 {
        if self.guest_ended & NO_SEND != 0 { NO_SEND | NO_RECEIVE } else { NO_SEND }
    }

    /// Whether the guest waits for a word that there is room again.
    pub fn owes_credit(&self) -> bool {
        self.open && self.forwarded.wrapping_sub(self.told) >= UPDATE
    }

    /// What to tell the guest in a packet that is being sent.
    pub fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.forwarded
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
