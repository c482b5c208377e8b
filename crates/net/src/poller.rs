//! Which of the host's sockets have news: one epoll for all of a user network, edge-triggered, so that a socket whose
//! data nobody has room for yet costs nothing.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;

/// Whose socket it is. Ids are not used again soon: an event that comes late finds nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Tcp(u32),
    TcpListener(u32),
    Udp(u32),
    UdpListener(u32),
    Ping(u32),
}

impl Source {
    fn pack(self) -> u64 {
        let (kind, id) = match self {
            Source::Tcp(id) => (0, id),
            Source::TcpListener(id) => (1, id),
            Source::Udp(id) => (2, id),
            Source::UdpListener(id) => (3, id),
            Source::Ping(id) => (4, id),
        };
        kind << 32 | u64::from(id)
    }

    fn unpack(packed: u64) -> Self {
        let id = packed as u32;
        match packed >> 32 {
            0 => Source::Tcp(id),
            1 => Source::TcpListener(id),
            2 => Source::Udp(id),
            3 => Source::UdpListener(id),
            _ => Source::Ping(id),
        }
    }
}

/// What a socket has become.
#[derive(Clone, Copy, Debug)]
pub struct Ready {
    pub source: Source,
    pub readable: bool,
    pub writable: bool,
    /// No more data will come than what is there.
    pub ended: bool,
}

pub struct Poller {
    epoll: OwnedFd,
}

/// Events taken at once.
pub const BATCH: usize = 64;

impl Poller {
    pub fn new() -> Result<Self, Errno> {
        Ok(Poller { epoll: epoll::create(CreateFlags::CLOEXEC)? })
    }

    /// Reports when `socket` becomes readable and, if wished, writable. Closing it ends that.
    pub fn add(&self, socket: &OwnedFd, source: Source, writable: bool) -> Result<(), Errno> {
        let mut flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        flags.set(EventFlags::OUT, writable);
        epoll::add(&self.epoll, socket, EventData::new_u64(source.pack()), flags)
    }

    /// What has happened since the last call; empty when nothing has.
    pub fn take(&self) -> Vec<Ready> {
        let mut events: Vec<Event> = Vec::with_capacity(BATCH);
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        if epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&none)).is_err() {
            return Vec::new();
        }
        events
            .iter()
            .map(|event| {
                // Copied out: the structure is packed.
                let (flags, data) = (event.flags, event.data);
                let failed = flags.intersects(EventFlags::ERR | EventFlags::HUP);
                Ready {
                    source: Source::unpack(data.u64()),
                    readable: failed || flags.contains(EventFlags::IN),
                    writable: failed || flags.contains(EventFlags::OUT),
                    ended: failed || flags.contains(EventFlags::RDHUP),
                }
            })
            .collect()
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
