//! TCP: every connection of the guest ends here and goes on as a connection of a socket of the host.
//!
//! The data flow to follow: [`Tcp::input`] takes a segment, finds its [`Connection`] and hands the data to the socket
//! in one system call, however large the segment; [`Tcp::event`] notes what sockets have become; [`Tcp::receive`] gives
//! each connection with something to say a turn, in which it reads its socket and sends the guest one segment of up to
//! 64 KiB.

mod connection;
mod ring;
mod segment;

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{SocketFlags, SocketType, ipproto};

use crate::icmp::{self, Unreachable};
use crate::outbox::Outbox;
use crate::packet::{Ip, Mac, Route};
use crate::plan;
use crate::poller::{Poller, Ready, Source};
use crate::udp::{Side, family};
use crate::{Error, Forward, Sink};
use connection::{Connection, End, Pumped};
use segment::{Fields, Segment};

/// What all connections together may keep for each direction, and how much of it one gets at least and at most.
const BUDGET: usize = 128 << 20;
const LEAST_BUFFER: usize = 64 << 10;
const MOST_BUFFER: usize = 1 << 20;
const BACKLOG: i32 = 128;
/// How much of a SYN an error quotes.
const QUOTE: usize = 80;

/// Who talks to whom, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub guest: SocketAddr,
    pub remote: SocketAddr,
}

/// Whether sequence number `a` is before `b` (RFC 9293, 3.4).
fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

fn after(a: u32, b: u32) -> bool {
    before(b, a)
}

/// The way to the guest.
struct Out<'a> {
    side: Side,
    sink: &'a mut dyn Sink,
    /// Where headers are put together.
    frame: &'a mut Vec<u8>,
    /// How many bytes a connection may keep for each direction.
    limit: usize,
}

struct Listener {
    forward: Forward,
    socket: OwnedFd,
}

/// All TCP traffic of a guest.
pub struct Tcp {
    connections: HashMap<u32, Connection>,
    ids: HashMap<Key, u32>,
    next: u32,
    /// Connections at a time.
    most: usize,
    listeners: Vec<Listener>,
    /// Connections that may have something to send to the guest.
    active: VecDeque<u32>,
    /// Not later than the first timer of a connection.
    timer: Option<Instant>,
    frame: Vec<u8>,
    secret: RandomState,
    started: Instant,
}

impl Tcp {
    pub fn new(most: usize, now: Instant) -> Self {
        Tcp {
            connections: HashMap::new(),
            ids: HashMap::new(),
            next: 0,
            most,
            listeners: Vec::new(),
            active: VecDeque::new(),
            timer: None,
            frame: Vec::new(),
            secret: RandomState::new(),
            started: now,
        }
    }

    /// Listens at a forwarded port.
    pub fn listen(&mut self, forward: Forward, poller: &Poller) -> Result<(), Error> {
        let open = || {
            let socket = icmp::socket(family(forward.host.is_ipv4()), SocketType::STREAM, ipproto::TCP)?;
            rustix::net::sockopt::set_socket_reuseaddr(&socket, true)?;
            if forward.host.is_ipv6() {
                rustix::net::sockopt::set_ipv6_v6only(&socket, true)?;
            }
            rustix::net::bind(&socket, &forward.host)?;
            rustix::net::listen(&socket, BACKLOG)?;
            poller.add(&socket, Source::TcpListener(self.listeners.len() as u32), false)?;
            Ok(socket)
        };
        let socket = open().map_err(|errno: Errno| Error::Forward { forward, source: errno.into() })?;
        self.listeners.push(Listener { forward, socket });
        Ok(())
    }

    /// Where forwarded ports listen.
    pub fn listening(&self) -> impl Iterator<Item = &OwnedFd> {
        self.listeners.iter().map(|listener| &listener.socket)
    }

    /// Takes a segment. `real`: where a new connection leads; it is asked only then.
    pub fn input(
        &mut self,
        ip: &Ip<'_>,
        complete: bool,
        mac: Mac,
        real: impl FnOnce(SocketAddr) -> Result<SocketAddr, Unreachable>,
        poller: &Poller,
        outbox: &mut Outbox,
    ) -> Result<(), Unreachable> {
        let Some((key, segment)) = Segment::parse(ip, complete) else { return Ok(()) };
        let limit = self.limit();
        if let Some(&id) = self.ids.get(&key) {
            if let Some(connection) = self.connections.get_mut(&id) {
                match connection.segment(&segment, limit) {
                    Ok(()) => self.activate(id),
                    Err(end) => self.end(id, end, outbox),
                }
            }
            return Ok(());
        }
        if segment.rst {
            return Ok(());
        }
        let route = Route { guest: mac, source: key.remote.ip(), destination: key.guest.ip() };
        if !segment.syn || segment.acknowledgment.is_some() {
            outbox.push(Fields::reset_for(&segment).frame(route, &key));
            return Ok(());
        }
        let opened = real(key.remote).and_then(|real| {
            let quote = ip.packet.get(..QUOTE).unwrap_or(ip.packet).to_vec();
            self.open(key, mac, real, &segment, quote, poller).map_err(Unreachable::from_errno)
        });
        match opened {
            // A closed port answers by RST, as all the others do.
            Err(Unreachable::Port) => {
                outbox.push(Fields::reset_for(&segment).frame(route, &key));
                Ok(())
            }
            other => other,
        }
    }

    fn open(
        &mut self,
        key: Key,
        mac: Mac,
        real: SocketAddr,
        syn: &Segment<'_>,
        quote: Vec<u8>,
        poller: &Poller,
    ) -> Result<(), Errno> {
        if self.connections.len() >= self.most {
            return Err(Errno::CONNREFUSED);
        }
        let socket = icmp::socket(family(real.is_ipv4()), SocketType::STREAM, ipproto::TCP)?;
        match rustix::net::connect(&socket, &real) {
            Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let sequence = self.initial_sequence(&key);
        let mut connection = Connection::from_guest(key, mac, socket, sequence, syn);
        connection.quote = quote;
        self.insert(connection, poller)
    }

    fn insert(&mut self, connection: Connection, poller: &Poller) -> Result<(), Errno> {
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        connection.set_up(poller, Source::Tcp(id))?;
        self.ids.insert(connection.key, id);
        self.connections.insert(id, connection);
        self.activate(id);
        Ok(())
    }

    /// RFC 6528: unpredictable for others, ascending for the same pair.
    fn initial_sequence(&self, key: &Key) -> u32 {
        let microseconds = self.started.elapsed().as_micros() as u32;
        (self.secret.hash_one(key) as u32).wrapping_add(microseconds / 4)
    }

    /// A socket has news.
    pub fn event(&mut self, ready: Ready, poller: &Poller, outbox: &mut Outbox, find: impl Fn(IpAddr) -> Mac) {
        match ready.source {
            Source::Tcp(id) => {
                let Some(connection) = self.connections.get_mut(&id) else { return };
                match connection.event(ready.readable, ready.writable, ready.ended) {
                    Ok(()) => self.activate(id),
                    Err(end) => self.end(id, end, outbox),
                }
            }
            Source::TcpListener(index) => self.accept(index as usize, poller, find),
            _ => {}
        }
    }

    /// Takes what has connected to all forwarded ports: also what could not be taken when it came.
    pub fn accept_all(&mut self, poller: &Poller, find: impl Fn(IpAddr) -> Mac) {
        for index in 0..self.listeners.len() {
            self.accept(index, poller, &find);
        }
    }

    fn accept(&mut self, index: usize, poller: &Poller, find: impl Fn(IpAddr) -> Mac) {
        while let Some(listener) = self.listeners.get(index) {
            if self.connections.len() >= self.most {
                return;
            }
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let (socket, peer) = match rustix::net::acceptfrom_with(&listener.socket, flags) {
                Ok(accepted) => accepted,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(_) => return,
            };
            let guest = listener.forward.guest;
            let Some(peer) = peer.and_then(|peer| SocketAddr::try_from(peer).ok()) else { continue };
            let Some(key) = self.key_for(guest, peer) else { continue };
            let sequence = self.initial_sequence(&key);
            // Where it fails the peer sees its connection closed.
            let _ = self.insert(Connection::from_host(key, find(guest.ip()), socket, sequence), poller);
        }
    }

    /// What a peer of the host is called in the guest: by its own port, or the next one that is free.
    fn key_for(&self, guest: SocketAddr, peer: SocketAddr) -> Option<Key> {
        let address = plan::seen_by_guest(peer.ip(), guest.ip());
        (0..1024)
            .map(|step| Key { guest, remote: SocketAddr::new(address, peer.port().wrapping_add(step)) })
            .find(|key| key.remote.port() != 0 && !self.ids.contains_key(key))
    }

    /// Hands over what there is for the guest. False: the sink is full.
    pub fn receive(&mut self, side: &Side, sink: &mut dyn Sink, outbox: &mut Outbox) -> bool {
        self.run_timers(side.now, outbox);
        let mut out = Out { side: *side, sink, limit: self.limit(), frame: &mut std::mem::take(&mut self.frame) };
        let room = self.pump(&mut out, outbox);
        self.frame = std::mem::take(out.frame);
        room
    }

    /// Gives connections their turn. False: the sink is full.
    fn pump(&mut self, out: &mut Out<'_>, outbox: &mut Outbox) -> bool {
        while let Some(id) = self.active.pop_front() {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            connection.queued = false;
            let pumped = connection.pump(out);
            if let Some(timer) = connection.timer
                && self.timer.is_none_or(|first| timer < first)
            {
                self.timer = Some(timer);
            }
            match pumped {
                Ok(Pumped::Idle) => {}
                Ok(Pumped::More) => self.activate(id),
                Ok(Pumped::Full) => {
                    connection.queued = true;
                    self.active.push_front(id);
                    return false;
                }
                Ok(Pumped::Closed) => self.end(id, End::Silent, outbox),
                Err(end) => self.end(id, end, outbox),
            }
        }
        true
    }

    /// When [`Tcp::receive`] has to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.timer
    }

    fn run_timers(&mut self, now: Instant, outbox: &mut Outbox) {
        if self.timer.is_none_or(|timer| now < timer) {
            return;
        }
        let due: Vec<u32> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.timer.is_some_and(|timer| timer <= now))
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            match connection.timed_out(now) {
                Ok(()) => self.activate(id),
                Err(end) => self.end(id, end, outbox),
            }
        }
        self.timer = self.connections.values().filter_map(|connection| connection.timer).min();
    }

    /// The guest has started over: its connections are no more.
    pub fn clear(&mut self) {
        self.connections.clear();
        self.ids.clear();
        self.active.clear();
        self.timer = None;
    }

    fn end(&mut self, id: u32, end: End, outbox: &mut Outbox) {
        let Some(connection) = self.connections.remove(&id) else { return };
        let key = connection.key;
        self.ids.remove(&key);
        match end {
            End::Silent => {}
            End::Reset | End::Refused(Errno::CONNREFUSED | Errno::CONNRESET) => outbox.push(connection.reset_frame()),
            // The guest's own timeout is as good as the host's.
            End::Refused(Errno::TIMEDOUT) => {}
            End::Refused(errno) => {
                let why = Unreachable::from_errno(errno);
                icmp::unreachable(outbox, connection.mac, key.remote.ip(), &connection.quote, key.guest.ip(), why);
            }
        }
    }

    fn activate(&mut self, id: u32) {
        if let Some(connection) = self.connections.get_mut(&id)
            && !std::mem::replace(&mut connection.queued, true)
        {
            self.active.push_back(id);
        }
    }

    /// How much one connection may keep for each direction.
    fn limit(&self) -> usize {
        (BUDGET / self.connections.len().max(1)).clamp(LEAST_BUFFER, MOST_BUFFER)
    }
}
