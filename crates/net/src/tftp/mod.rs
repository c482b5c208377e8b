//! TFTP (RFC 1350): firmware reads what it boots from a directory of the host, by the gateway's port 69.
//!
//! Each transfer has a port of the gateway's own (its TID). The server has no timers: it sends the next blocks when they are
//! asked for by an acknowledgement, and the same ones again when that comes again, since only the client waits for
//! something.
//!
//! Threat model: the guest names files. Names are resolved beneath the directory, by the host's kernel (openat2): neither
//! "..", nor a symbolic link, nor a mount below /proc leads out of it. Only regular files are opened, and only to be read.

mod request;

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};
use rustix::io::Errno;

use crate::Error;
use crate::outbox::Outbox;
use crate::packet::{Mac, Route};
use crate::udp::{self, Datagram, Side};
use request::{Message, Options};

const PORT: u16 = 69;
/// The first of the transfers' ports: the dynamic ones (RFC 6335, 6).
const FIRST_TID: u16 = 49152;
/// Transfers at a time; the one that has been silent longest goes for a new one.
const MOST: usize = 32;
const IDLE: Duration = Duration::from_secs(60);
/// An acknowledgement that comes again before this was under way when what it asks for was sent. To answer it too would
/// double all that follows (RFC 1123, 4.2.3.1).
const AGAIN: Duration = Duration::from_millis(100);

/// Opcodes of what a server sends.
const DATA: u16 = 3;
const ERROR: u16 = 5;
const OPTIONS: u16 = 6;
/// Error codes (RFC 1350, 5).
const NOT_DEFINED: u16 = 0;
const NOT_FOUND: u16 = 1;
const ACCESS: u16 = 2;
const ILLEGAL: u16 = 4;
const UNKNOWN_TID: u16 = 5;

/// Without options: the size of a block, and blocks for an acknowledgement.
const USUAL_BLOCK: u16 = 512;
const MOST_WINDOW: u16 = 64;
/// Opcode and number of a block.
const DATA_HEADER: usize = 4;

/// The server.
pub struct Tftp {
    directory: OwnedFd,
    transfers: Vec<Transfer>,
    next_tid: u16,
}

struct Transfer {
    client: SocketAddr,
    mac: Mac,
    /// Address and port by which the guest knows us.
    server: SocketAddr,
    file: File,
    /// When the file was opened.
    length: u64,
    block_size: usize,
    window: u64,
    /// The answer to the request's options, which is sent as block 0.
    options: Option<Vec<u8>>,
    /// The last block that the client has, and the last one sent. Blocks count from 1.
    acknowledged: u64,
    sent: u64,
    used: Instant,
}

impl Tftp {
    /// Serves a directory.
    pub fn new(path: PathBuf) -> Result<Self, Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = open(&path, flags, Mode::empty());
        let directory = directory.map_err(|errno| Error::Tftp { path, source: errno.into() })?;
        Ok(Tftp { directory, transfers: Vec::new(), next_tid: FIRST_TID })
    }

    /// Takes a datagram to the gateway. False: it is none for this server.
    pub fn input(&mut self, datagram: &Datagram<'_>, mac: Mac, side: Side, outbox: &mut Outbox) -> bool {
        let known = self
            .transfers
            .iter()
            .position(|transfer| transfer.client == datagram.source && transfer.server == datagram.destination);
        if known.is_none() && datagram.destination.port() != PORT {
            return false;
        }
        let answer = |code, text: &str| {
            let route = Route { guest: mac, source: datagram.destination.ip(), destination: datagram.source.ip() };
            let message = [&ERROR.to_be_bytes()[..], &u16::to_be_bytes(code), text.as_bytes(), &[0]].concat();
            udp::frame(route, datagram.destination.port(), datagram.source.port(), &message)
        };
        let illegal = (ILLEGAL, "this server is read from");
        let refused = match (Message::parse(datagram.payload), known) {
            (None, _) | (Some(Message::Error), None) => return true,
            (Some(Message::Read { name, octet, options }), None) => {
                self.start(name, octet, options, datagram, mac, side, outbox)
            }
            (Some(Message::Acknowledge(block)), Some(index)) => self.acknowledge(index, block, side.now, outbox),
            (Some(Message::Acknowledge(_)), None) => Err((UNKNOWN_TID, "no such transfer")),
            (Some(Message::Error), Some(index)) => {
                self.transfers.swap_remove(index);
                Ok(())
            }
            (Some(Message::Write), None) => Err((ACCESS, "this server is read from")),
            (Some(_), _) => Err(illegal),
        };
        if let Err((code, text)) = refused {
            outbox.push(answer(code, text));
        }
        true
    }

    #[expect(clippy::too_many_arguments, reason = "a request, and where its answer goes")]
    fn start(
        &mut self,
        name: &[u8],
        octet: bool,
        wanted: Options,
        datagram: &Datagram<'_>,
        mac: Mac,
        side: Side,
        outbox: &mut Outbox,
    ) -> Result<(), (u16, &'static str)> {
        let client = datagram.source;
        // A request that comes again, or the client's next one: it has one transfer at a time.
        self.transfers.retain(|transfer| transfer.client != client);
        if !octet {
            return Err((NOT_DEFINED, "the only mode is octet"));
        }
        let (file, length) = self.open(name).map_err(|errno| {
            tracing::info!("TFTP: {:?} is not sent: {errno}", OsStr::from_bytes(name));
            if errno == Errno::NOENT { (NOT_FOUND, "no such file") } else { (ACCESS, "not to be read") }
        })?;
        tracing::info!("TFTP: {:?} is sent", OsStr::from_bytes(name));
        // What fits into a packet of the link: not every firmware puts fragments together.
        let headers = if client.is_ipv4() { 20 } else { 40 } + udp::HEADER + DATA_HEADER;
        let largest = u16::try_from(side.mtu.saturating_sub(headers)).unwrap_or(u16::MAX);
        let options = Options {
            block_size: wanted.block_size.map(|size| size.min(largest)),
            window: wanted.window.map(|window| window.min(MOST_WINDOW)),
            ..wanted
        };
        let server = SocketAddr::new(datagram.destination.ip(), self.free_tid());
        if self.transfers.len() >= MOST
            && let Some(oldest) = (0..self.transfers.len()).min_by_key(|index| self.transfers[*index].used)
        {
            self.transfers.swap_remove(oldest);
        }
        let transfer = Transfer {
            client,
            mac,
            server,
            file,
            length,
            block_size: options.block_size.unwrap_or(USUAL_BLOCK).into(),
            window: options.window.unwrap_or(1).into(),
            options: option_acknowledgement(&options, length),
            acknowledged: 0,
            sent: 0,
            used: side.now,
        };
        let begun = transfer.begin(outbox);
        self.transfers.push(transfer);
        let index = self.transfers.len() - 1;
        if begun { Ok(()) } else { self.send(index, side.now, outbox) }
    }

    /// A port that no transfer has.
    fn free_tid(&mut self) -> u16 {
        loop {
            let tid = self.next_tid;
            self.next_tid = tid.checked_add(1).unwrap_or(FIRST_TID);
            if self.transfers.iter().all(|transfer| transfer.server.port() != tid) {
                return tid;
            }
        }
    }

    /// Opens a file of the directory. A name may begin with "/", which is the directory, and have "\" for "/", as systems
    /// write it whose files lie so.
    fn open(&self, name: &[u8]) -> Result<(File, u64), Errno> {
        let name: Vec<u8> = name.iter().map(|byte| if *byte == b'\\' { b'/' } else { *byte }).collect();
        let start = name.iter().position(|byte| *byte != b'/').ok_or(Errno::NOENT)?;
        let name = OsStr::from_bytes(name.get(start..).unwrap_or_default());
        // A pipe must not hold the network up: NONBLOCK.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let file = File::from(openat2(&self.directory, name, flags, Mode::empty(), resolve)?);
        let metadata = file.metadata().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        if metadata.is_file() { Ok((file, metadata.len())) } else { Err(Errno::ACCESS) }
    }

    fn acknowledge(
        &mut self,
        index: usize,
        block: u16,
        now: Instant,
        outbox: &mut Outbox,
    ) -> Result<(), (u16, &'static str)> {
        let Some(transfer) = self.transfers.get_mut(index) else { return Ok(()) };
        // Block numbers have 16 bits and go round; what is meant lies between what the client has and what was sent.
        let ahead = u64::from(block.wrapping_sub(transfer.acknowledged as u16));
        let acknowledged = transfer.acknowledged + ahead;
        let again = acknowledged == transfer.acknowledged && transfer.sent > acknowledged;
        if acknowledged > transfer.sent || again && now.duration_since(transfer.used) < AGAIN {
            return Ok(());
        }
        transfer.acknowledged = acknowledged;
        if acknowledged == transfer.last_block() {
            self.transfers.swap_remove(index);
            return Ok(());
        }
        self.send(index, now, outbox)
    }

    /// Sends the blocks behind the last one that the client has.
    fn send(&mut self, index: usize, now: Instant, outbox: &mut Outbox) -> Result<(), (u16, &'static str)> {
        let Some(transfer) = self.transfers.get_mut(index) else { return Ok(()) };
        transfer.used = now;
        let last = (transfer.acknowledged + transfer.window).min(transfer.last_block());
        for block in transfer.acknowledged + 1..=last {
            let Ok(message) = transfer.block(block) else {
                self.transfers.swap_remove(index);
                return Err((NOT_DEFINED, "the file can't be read"));
            };
            outbox.push(transfer.frame(&message));
        }
        transfer.sent = last;
        Ok(())
    }

    /// Forgets transfers that have been silent.
    pub fn expire(&mut self, now: Instant) {
        self.transfers.retain(|transfer| now.duration_since(transfer.used) < IDLE);
    }

    pub fn clear(&mut self) {
        self.transfers.clear();
    }
}

impl Transfer {
    /// The block that is shorter than the others, and may be empty.
    fn last_block(&self) -> u64 {
        self.length / self.block_size as u64 + 1
    }

    /// Sends the answer to options. False: there is none, block 1 is the answer.
    fn begin(&self, outbox: &mut Outbox) -> bool {
        self.options.iter().for_each(|options| outbox.push(self.frame(options)));
        self.options.is_some()
    }

    fn block(&self, number: u64) -> io::Result<Vec<u8>> {
        let offset = number.saturating_sub(1) * self.block_size as u64;
        let length = self.length.saturating_sub(offset).min(self.block_size as u64) as usize;
        let mut message = [DATA.to_be_bytes(), (number as u16).to_be_bytes()].concat();
        message.resize(DATA_HEADER + length, 0);
        if let Some(data) = message.get_mut(DATA_HEADER..) {
            self.file.read_exact_at(data, offset)?;
        }
        Ok(message)
    }

    fn frame(&self, message: &[u8]) -> Vec<u8> {
        let route = Route { guest: self.mac, source: self.server.ip(), destination: self.client.ip() };
        udp::frame(route, self.server.port(), self.client.port(), message)
    }
}

/// The options that hold from now on; `None`: none were asked for (RFC 2347).
fn option_acknowledgement(options: &Options, length: u64) -> Option<Vec<u8>> {
    let values = [
        ("blksize", options.block_size.map(u64::from)),
        ("timeout", options.timeout.map(u64::from)),
        ("tsize", options.size.then_some(length)),
        ("windowsize", options.window.map(u64::from)),
    ];
    let mut message = OPTIONS.to_be_bytes().to_vec();
    for (name, value) in values {
        if let Some(value) = value {
            message.extend_from_slice(format!("{name}\0{value}\0").as_bytes());
        }
    }
    (message.len() > 2).then_some(message)
}
