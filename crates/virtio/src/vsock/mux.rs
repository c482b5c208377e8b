//! All streams of a socket device: which packet belongs to which, and what is to be told to the guest.
//!
//! The host's side follows the convention of Firecracker. Who connects to the Unix socket at PATH and writes
//! `CONNECT port\n` reaches that port of the guest, and reads `OK host-port\n` once the guest has accepted; if it
//! does not, the socket is closed. When the guest connects to a port of the host, whoever listens at PATH_port is reached.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ffi::OsString;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::event::PollFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::connection::{BUFFER, Broken, Connection};
use super::packet::{HOST, Header, Operation, STREAM};

/// The most streams, and the most that have not said what they want.
const MAX_CONNECTIONS: usize = 512;
const MAX_GREETINGS: usize = 32;
/// The longest line that asks for a port.
const MAX_LINE: usize = 32;
/// How many packets without data may wait for the guest; then nothing more is taken from it.
const MAX_CONTROL: usize = 1024;
/// Ports that we give to connections of the host start here, away from those that people choose.
const FIRST_PORT: u32 = 1 << 30;

/// A stream is known by the guest's and the host's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ports {
    pub guest: u32,
    pub host: u32,
}

/// What a descriptor belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    Listener,
    Greeting(usize),
    Stream(Ports),
}

pub struct Mux {
    guest: u64,
    path: PathBuf,
    listener: Arc<UnixListener>,
    /// Connected, but the line is not complete.
    greetings: Vec<(UnixStream, Vec<u8>)>,
    connections: HashMap<Ports, Connection>,
    /// Streams that may have bytes for the guest.
    readable: BTreeSet<Ports>,
    /// The last one that was served.
    served: Option<Ports>,
    /// Packets without data for the guest.
    control: VecDeque<Header>,
    next_port: u32,
    /// The listener has failed: it is left alone until a stream ends.
    resting: bool,
}

impl Mux {
    /// `guest`: its context identifier. The listener must not block.
    pub fn new(guest: u64, path: PathBuf, listener: Arc<UnixListener>) -> Self {
        Mux {
            guest,
            path,
            listener,
            greetings: Vec::new(),
            connections: HashMap::new(),
            readable: BTreeSet::new(),
            served: None,
            control: VecDeque::new(),
            next_port: FIRST_PORT,
            resting: false,
        }
    }

    /// Whether a packet of the guest can be taken now.
    pub fn takes_packets(&self) -> bool {
        self.control.len() < MAX_CONTROL
    }

    /// Takes a packet of the guest.
    pub fn packet(&mut self, header: &Header, data: &[u8]) {
        // 5.10.6.2: who lies about where a packet comes from has it dropped.
        if header.source != self.guest {
            return;
        }
        if header.destination != HOST || header.kind != STREAM {
            return self.refuse(header);
        }
        let ports = Ports { guest: header.source_port, host: header.destination_port };
        if header.operation == Some(Operation::Request) {
            return self.connect(ports, header);
        }
        let Some(connection) = self.connections.get_mut(&ports) else {
            // A reset is not answered by another one.
            return if header.operation != Some(Operation::Reset) {
                self.refuse(header)
            };
        };
        connection.take_credit(header);
        let result = match header.operation {
            Some(Operation::Response) if !connection.open => {
                connection.open = true;
                connection.greet(&format!("OK {}\n", ports.host))
            }
            Some(Operation::Reset) => {
                self.remove(ports);
                return;
            }
            Some(Operation::Shutdown) => match connection.end(header.flags) {
                // 5.10.6.6.1: the one who is told last answers with a reset.
                Ok(true) => Err(Broken),
                result => result.map(|_| ()),
            },
            Some(Operation::ReadWrite) => connection.take(data),
            Some(Operation::CreditUpdate) => Ok(()),
            Some(Operation::CreditRequest) => {
                self.say(ports, Operation::CreditUpdate, 0);
                Ok(())
            }
            Some(Operation::Request | Operation::Response) | None => Err(Broken),
        };
        self.settle(ports, result);
    }

    /// Ends a stream that can't go on; tells the guest of room if it waits for it.
    fn settle(&mut self, ports: Ports, result: Result<(), Broken>) {
        if result.is_err() {
            self.say(ports, Operation::Reset, 0);
            self.remove(ports);
        } else if self.connections.get(&ports).is_some_and(Connection::owes_credit) {
            self.say(ports, Operation::CreditUpdate, 0);
        }
    }

    fn remove(&mut self, ports: Ports) {
        self.connections.remove(&ports);
        self.readable.remove(&ports);
        self.resting = false;
    }

    /// Answers what belongs to no stream.
    fn refuse(&mut self, header: &Header) {
        self.control.push_back(Header {
            source: header.destination,
            destination: header.source,
            source_port: header.destination_port,
            destination_port: header.source_port,
            length: 0,
            kind: header.kind,
            operation: Some(Operation::Reset),
            flags: 0,
            buffer: 0,
            forwarded: 0,
        });
    }

    fn header(&mut self, ports: Ports, operation: Operation, flags: u32, length: u32) -> Header {
        let forwarded = self.connections.get_mut(&ports).map_or(0, Connection::tell);
        Header {
            source: HOST,
            destination: self.guest,
            source_port: ports.host,
            destination_port: ports.guest,
            length,
            kind: STREAM,
            operation: Some(operation),
            flags,
            buffer: BUFFER,
            forwarded,
        }
    }

    fn say(&mut self, ports: Ports, operation: Operation, flags: u32) {
        let header = self.header(ports, operation, flags, 0);
        self.control.push_back(header);
    }

    /// The guest asks for a port of the host.
    fn connect(&mut self, ports: Ports, header: &Header) {
        let known = self.connections.contains_key(&ports);
        if known || self.connections.len() >= MAX_CONNECTIONS {
            if known {
                self.remove(ports);
            }
            return self.refuse(header);
        }
        match self.connect_to(ports.host) {
            Ok(stream) => {
                let mut connection = Connection::new(stream, true);
                connection.take_credit(header);
                self.connections.insert(ports, connection);
                self.say(ports, Operation::Response, 0);
            }
            Err(error) => {
                tracing::debug!("the guest asked for vsock port {}: {error}", ports.host);
                self.refuse(header);
            }
        }
    }

    fn connect_to(&self, port: u32) -> rustix::io::Result<UnixStream> {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(PathBuf::from(path))?)?;
        Ok(socket.into())
    }

    /// Which descriptors to wait for. `to_guest`: the guest has room for packets.
    pub fn interests(&self, to_guest: bool) -> Vec<(Token, BorrowedFd<'_>, PollFlags)> {
        let mut interests = Vec::new();
        let room = self.connections.len() + self.greetings.len() < MAX_CONNECTIONS;
        if room && self.greetings.len() < MAX_GREETINGS && !self.resting {
            interests.push((Token::Listener, self.listener.as_fd(), PollFlags::IN));
        }
        for (index, (stream, _)) in self.greetings.iter().enumerate() {
            interests.push((Token::Greeting(index), stream.as_fd(), PollFlags::IN));
        }
        for (ports, connection) in &self.connections {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, to_guest && connection.wants_to_read());
            flags.set(PollFlags::OUT, connection.wants_to_write());
            // One that nothing is wanted of would still wake us when it is closed.
            if !flags.is_empty() {
                interests.push((Token::Stream(*ports), connection.as_fd(), flags));
            }
        }
        interests
    }

    /// Descriptors that have become ready, in the order of [`Mux::interests`].
    pub fn ready(&mut self, tokens: &[Token]) {
        let mut done = Vec::new();
        for &token in tokens {
            match token {
                Token::Listener => {}
                Token::Greeting(index) => done.extend(self.greet(index).then_some(index)),
                Token::Stream(ports) => {
                    let Some(connection) = self.connections.get_mut(&ports) else { continue };
                    if connection.wants_to_read() {
                        self.readable.insert(ports);
                    }
                    let result = connection.flush();
                    let finished = connection.is_finished();
                    self.settle(ports, if finished { Err(Broken) } else { result });
                }
            }
        }
        for index in done.into_iter().rev() {
            let (stream, line) = self.greetings.remove(index);
            self.open_to_guest(stream, &line);
        }
        if tokens.contains(&Token::Listener) {
            self.accept();
        }
    }

    fn accept(&mut self) {
        match self.listener.accept() {
            Ok((stream, _)) if stream.set_nonblocking(true).is_ok() => self.greetings.push((stream, Vec::new())),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => {
                tracing::warn!("vsock: nobody can connect until another one leaves: {error}");
                self.resting = true;
            }
        }
    }

    /// Reads the line that a new connection begins with. True: nothing more is expected.
    fn greet(&mut self, index: usize) -> bool {
        let Some((stream, line)) = self.greetings.get_mut(index) else { return false };
        // By the byte: what comes after the line is the guest's.
        let mut byte = [0];
        while line.len() < MAX_LINE {
            match stream.read(&mut byte) {
                Ok(1) => line.extend(byte),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Ok(_) | Err(_) => return true,
            }
            if byte == [b'\n'] {
                return true;
            }
        }
        true
    }

    /// Asks the guest for the port in the line. If the line is none, the connection is closed.
    fn open_to_guest(&mut self, stream: UnixStream, line: &[u8]) {
        let text = std::str::from_utf8(line).unwrap_or_default();
        let port =
            text.strip_suffix('\n').and_then(|text| text.strip_prefix("CONNECT ")).map(|text| text.trim().parse());
        let Some(Ok(guest)) = port else {
            return tracing::debug!("vsock: {text:?} is not \"CONNECT port\"");
        };
        let mut ports = Ports { guest, host: self.next_port };
        while self.connections.contains_key(&ports) {
            ports.host = if ports.host == u32::MAX { FIRST_PORT } else { ports.host + 1 };
        }
        self.next_port = if ports.host == u32::MAX { FIRST_PORT } else { ports.host + 1 };
        self.connections.insert(ports, Connection::new(stream, false));
        self.say(ports, Operation::Request, 0);
    }

    /// Whether [`Mux::next`] may have something.
    pub fn has_packets(&self) -> bool {
        !self.control.is_empty() || !self.readable.is_empty()
    }

    /// The next packet for the guest, with at most `room` bytes of data.
    pub fn next(&mut self, room: usize) -> Option<(Header, Vec<u8>)> {
        loop {
            if let Some(header) = self.control.pop_front() {
                return Some((header, Vec::new()));
            }
            // One after the other.
            let after = |served| self.readable.iter().find(|ports| Some(**ports) > served);
            let ports = *after(self.served).or_else(|| self.readable.first())?;
            self.served = Some(ports);
            let Some(connection) = self.connections.get_mut(&ports).filter(|c| c.wants_to_read()) else {
                self.readable.remove(&ports);
                continue;
            };
            match connection.read(room) {
                Ok(Some(data)) if data.is_empty() => {
                    let flags = connection.end_flags();
                    self.readable.remove(&ports);
                    self.say(ports, Operation::Shutdown, flags);
                }
                Ok(Some(data)) => return Some((self.header(ports, Operation::ReadWrite, 0, data.len() as u32), data)),
                Ok(None) => _ = self.readable.remove(&ports),
                Err(broken) => self.settle(ports, Err(broken)),
            }
        }
    }
}
