//! Socket device (virtio 1.2, 5.10): streams between programs in the guest (`AF_VSOCK`) and Unix sockets of the host.
//!
//! One thread does it all: it takes packets from the guest and hands their data to the host's sockets, and reads those
//! as far as the guest has room ([`mux`], [`connection`]). Neither side can make it hold more than a
//! bounded number of bytes for a bounded number of streams.

mod connection;
mod mux;
mod packet;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::SocketAddrUnix;

use crate::{Activation, Chain, DeviceType, Error, Event, Queue, VirtioDevice, Worker};
use connection::BUFFER;
use mux::Mux;
use packet::{HEADER, Header};

/// Context identifiers that a guest may have (5.10.4): the others have a meaning of their own.
pub const GUEST_CIDS: std::ops::Range<u64> = 3..0xffff_ffff;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// How many packets go each way before the other has its turn.
const BATCH: usize = 64;

/// A socket device on the PCI bus.
pub struct Vsock {
    cid: u64,
    path: PathBuf,
    listener: Arc<UnixListener>,
    worker: Mutex<Option<Worker>>,
}

impl Vsock {
    /// A device of a guest with this context identifier, reached at the Unix socket `path`, which is made here and
    /// removed with the device.
    pub fn new(path: &Path, cid: u64) -> io::Result<Self> {
        // So that a path with a port is never too long for a socket.
        let mut longest = OsString::from(path);
        longest.push(format!("_{}", u32::MAX));
        SocketAddrUnix::new(PathBuf::from(longest))?;
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && is_left_over(path) => {
                fs::remove_file(path)?;
                UnixListener::bind(path)?
            }
            other => other?,
        };
        listener.set_nonblocking(true)?;
        Ok(Vsock { cid, path: path.into(), listener: Arc::new(listener), worker: Mutex::default() })
    }
}

/// Whether there is a socket on which nobody listens any more.
fn is_left_over(path: &Path) -> bool {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket());
    is_socket && UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

impl Drop for Vsock {
    fn drop(&mut self) {
        // It may have gone by itself.
        let _ = fs::remove_file(&self.path);
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    /// Received by the guest, transmitted by it, and events, of which there are none.
    fn queue_sizes(&self) -> &[u16] {
        &[256, 256, 16]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        data.iter_mut().zip(self.cid.to_le_bytes().iter().skip(offset)).for_each(|(to, from)| *to = *from);
    }

    fn activate(&self, mut activation: Activation) -> Result<(), Error> {
        let device = DeviceType::Vsock;
        let (receive, transmit) = (activation.queue(device, RECEIVE)?, activation.queue(device, TRANSMIT)?);
        let mux = Mux::new(self.cid, self.path.clone(), self.listener.clone());
        let link = Link { mux, receive, transmit, room: true };
        let worker = Worker::start("vsock", move |stop| link.work(stop)).map_err(|source| Error::Host {
            device: device.name(),
            what: "can't start a thread",
            source,
        })?;
        *self.worker.lock().unwrap_or_else(PoisonError::into_inner) = Some(worker);
        Ok(())
    }

    fn reset(&self) {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// The streams and the queues that carry them.
struct Link {
    mux: Mux,
    receive: Queue,
    transmit: Queue,
    /// The guest has buffers for packets, as far as we know.
    room: bool,
}

impl Link {
    fn work(mut self, stop: &Event) {
        let kicks = [self.receive.kick().clone(), self.transmit.kick().clone()];
        let mut again = false;
        loop {
            self.wait(stop, &kicks, again);
            if stop.is_set() {
                return;
            }
            self.room |= kicks.first().is_some_and(|kick| kick.clear());
            kicks.get(1).map(|kick| kick.clear());
            again = self.take_packets();
            again |= self.give_packets();
            self.receive.notify();
            self.transmit.notify();
        }
    }

    /// Waits for the guest or the host; with `again`, only looks.
    fn wait(&mut self, stop: &Event, kicks: &[Arc<Event>; 2], again: bool) {
        let interests = self.mux.interests(self.room);
        let events = [stop, &kicks[0], &kicks[1]];
        let mut fds: Vec<_> =
            events.iter().map(|event| PollFd::from_borrowed_fd(event.as_fd(), PollFlags::IN)).collect();
        fds.extend(interests.iter().map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)));
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut fds, again.then_some(&now)).is_err() {
            return;
        }
        let ready = fds.iter().skip(events.len()).zip(&interests).filter(|(fd, _)| !fd.revents().is_empty());
        let tokens: Vec<_> = ready.map(|(_, (token, ..))| *token).collect();
        drop(fds);
        drop(interests);
        self.mux.ready(&tokens);
    }

    /// Takes packets from the guest. True: there are more.
    fn take_packets(&mut self) -> bool {
        for _ in 0..BATCH {
            if !self.mux.takes_packets() {
                return self.room;
            }
            let Some(chain) = self.transmit.pop() else {
                return self.transmit.enable_kicks();
            };
            match read_packet(&chain) {
                Some((header, data)) => self.mux.packet(&header, &data),
                None => {
                    self.transmit.fail("a vsock packet is malformed");
                    return false;
                }
            }
            self.transmit.push(chain, 0);
        }
        true
    }

    /// Gives packets to the guest. True: there are more, and there may be room.
    fn give_packets(&mut self) -> bool {
        for _ in 0..BATCH {
            if !self.room || !self.mux.has_packets() {
                return false;
            }
            let Some(chain) = self.receive.pop() else {
                self.room = self.receive.enable_kicks();
                continue;
            };
            let room = chain.writable_len().saturating_sub(HEADER);
            if room == 0 {
                self.receive.fail("a vsock buffer has no room for data");
                self.room = false;
                return false;
            }
            let Some((header, data)) = self.mux.next(room.min(BUFFER as usize)) else {
                self.receive.undo_pop();
                return false;
            };
            chain.write_at(0, &header.to_bytes());
            chain.write_at(HEADER, &data);
            self.receive.push(chain, (HEADER + data.len()) as u32);
        }
        true
    }
}

/// `None`: it has no header, or less data than it says or more than we ever allow.
fn read_packet(chain: &Chain) -> Option<(Header, Vec<u8>)> {
    let mut bytes = [0; HEADER];
    if chain.read_at(0, &mut bytes) < HEADER {
        return None;
    }
    let header = Header::parse(&bytes);
    let length = header.length.min(BUFFER.checked_add(1)?) as usize;
    let mut data = vec![0; length];
    (chain.read_at(HEADER, &mut data) == length).then_some((header, data))
}
