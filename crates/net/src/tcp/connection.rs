//! One TCP connection: towards the guest a state machine of our own (RFC 9293), towards the host a socket.
//!
//! The link to the guest never loses or reorders what it has taken, so there is no congestion control and no
//! reassembly here: segments that do not continue the stream are dropped and asked for again. The other direction keeps
//! what the guest has not acknowledged, for a guest can lose segments in itself.
//!
//! Flow control goes end to end: the guest's window is what its data may still wait for the socket in `pending`, and
//! the socket is read only as the guest takes data.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown};

use super::ring::Ring;
use super::segment::{self, Fields, Segment};
use super::{Key, Out, after, before};
use crate::packet::{Mac, Route};
use crate::poller::{Poller, Source};
use crate::udp::Side;

/// The window scale that is offered (RFC 7323): windows of up to 2 MiB.
const SHIFT: u8 = 5;
/// The data of one frame at most: with the longest headers it is a packet of 64 KiB.
const LONGEST_DATA: usize = 65535 - 60;
/// RFC 9293, 3.7.1: if the guest doesn't say.
const DEFAULT_MSS4: u16 = 536;
const DEFAULT_MSS6: u16 = 1220;
/// Smaller ones are an attack on our time (as Linux's `tcp_min_snd_mss`).
const LEAST_MSS: u16 = 48;
/// When a segment is taken for lost. There is no distance to measure; a guest that shares its processor may be slow.
const TIMEOUT: Duration = Duration::from_millis(500);
const LONGEST_TIMEOUT: Duration = Duration::from_secs(60);
/// How often the same is sent before the guest is given up (Linux's `tcp_retries2`, `tcp_syn_retries`).
const TRIES: u32 = 15;
const SYN_TRIES: u32 = 6;
/// Acknowledgments that ask for the same (RFC 5681, 3.2).
const DUPLICATES: u8 = 3;
/// No more than so many answers to segments that came out of order in one go.
const MOST_DUPLICATES: u8 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest wants the connection; the socket is not connected yet.
    Connecting,
    /// SYN-ACK is sent, or to be sent.
    SynReceived,
    /// The host's peer wants the connection: SYN is sent, or to be sent.
    SynSent,
    Open,
}

/// How a connection ends at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest is told by RST.
    Reset,
    /// The guest knows, or can't be told.
    Silent,
    /// The host could not connect.
    Refused(Errno),
}

/// What a turn of [`Connection::pump`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pumped {
    /// Nothing to do until something happens.
    Idle,
    /// There is more.
    More,
    /// The sink is full.
    Full,
    /// Both directions are closed.
    Closed,
}

pub struct Connection {
    pub key: Key,
    pub mac: Mac,
    /// Whether it is in the list of those to be pumped.
    pub queued: bool,
    /// When something must be sent again.
    pub timer: Option<Instant>,
    /// The guest's SYN, for an error that quotes it.
    pub quote: Vec<u8>,
    socket: OwnedFd,
    phase: Phase,

    // From the guest to the host.
    receive_next: u32,
    /// The end of the window that the guest knows of.
    advertised: u32,
    our_shift: u8,
    pending: Ring,
    guest_fin: bool,
    host_shut: bool,
    writable: bool,
    /// Acknowledgments to be sent; more than one if they are to tell of a gap.
    acks_due: u8,

    // From the host to the guest. `sending` begins at `unacknowledged`.
    unacknowledged: u32,
    next: u32,
    highest: u32,
    sending: Ring,
    window: u32,
    /// The largest one that the guest has offered.
    largest_window: u32,
    guest_shift: u8,
    mss: u16,
    readable: bool,
    /// The host's peer has closed: what there is to read ends.
    ended: bool,
    host_fin: bool,
    fin_acknowledged: bool,
    duplicates: u8,
    /// A segment is lost; up to here must be acknowledged before another can be.
    recover: Option<u32>,
    resend: bool,
    probe: bool,
    tries: u32,
}

impl Connection {
    fn new(key: Key, mac: Mac, socket: OwnedFd, phase: Phase, sequence: u32) -> Self {
        Connection {
            key,
            mac,
            queued: false,
            timer: None,
            quote: Vec::new(),
            socket,
            phase,
            receive_next: 0,
            advertised: 0,
            our_shift: 0,
            pending: Ring::default(),
            guest_fin: false,
            host_shut: false,
            writable: false,
            acks_due: 0,
            unacknowledged: sequence,
            next: sequence,
            highest: sequence,
            sending: Ring::default(),
            window: 0,
            largest_window: 0,
            guest_shift: 0,
            mss: if key.guest.is_ipv4() { DEFAULT_MSS4 } else { DEFAULT_MSS6 },
            readable: false,
            ended: false,
            host_fin: false,
            fin_acknowledged: false,
            duplicates: 0,
            recover: None,
            resend: false,
            probe: false,
            tries: 0,
        }
    }

    /// The guest has sent SYN; `socket` is connecting.
    pub fn from_guest(key: Key, mac: Mac, socket: OwnedFd, sequence: u32, syn: &Segment<'_>) -> Self {
        let mut connection = Self::new(key, mac, socket, Phase::Connecting, sequence);
        connection.take_options(syn);
        connection
    }

    /// A peer of the host has connected by `socket`.
    pub fn from_host(key: Key, mac: Mac, socket: OwnedFd, sequence: u32) -> Self {
        let mut connection = Self::new(key, mac, socket, Phase::SynSent, sequence);
        connection.our_shift = SHIFT;
        connection.writable = true;
        connection
    }

    fn take_options(&mut self, syn: &Segment<'_>) {
        self.receive_next = syn.sequence.wrapping_add(1);
        self.advertised = self.receive_next;
        if let Some(mss) = syn.mss {
            self.mss = mss.max(LEAST_MSS);
        }
        // Scaling holds only if both sides ask for it (RFC 7323, 2.2).
        (self.guest_shift, self.our_shift) = syn.shift.map_or((0, 0), |shift| (shift, SHIFT));
        // The window of a SYN is never scaled.
        self.window = syn.window.into();
    }

    /// Makes the socket report its news as `source`. The guest has its own Nagle; the host's would only add to it.
    pub fn set_up(&self, poller: &Poller, source: Source) -> Result<(), Errno> {
        rustix::net::sockopt::set_tcp_nodelay(&self.socket, true)?;
        poller.add(&self.socket, source, true)
    }

    /// The socket has news.
    pub fn event(&mut self, readable: bool, writable: bool, ended: bool) -> Result<(), End> {
        self.readable |= readable;
        self.ended |= ended;
        if writable {
            self.writable = true;
            if self.phase == Phase::Connecting {
                rustix::net::sockopt::socket_error(&self.socket).map_err(End::Refused)?.map_err(End::Refused)?;
                self.quote = Vec::new();
                self.phase = Phase::SynReceived;
            }
            self.flush_pending()?;
        }
        Ok(())
    }

    /// Takes a segment from the guest.
    pub fn segment(&mut self, segment: &Segment<'_>, limit: usize) -> Result<(), End> {
        match self.phase {
            Phase::Connecting => return if segment.rst { Err(End::Silent) } else { Ok(()) },
            Phase::SynSent => return self.answer_to_syn(segment),
            Phase::SynReceived | Phase::Open => {}
        }
        if segment.rst {
            return self.guest_reset(segment);
        }
        if segment.syn {
            if self.phase == Phase::SynReceived && segment.sequence == self.receive_next.wrapping_sub(1) {
                // The guest has not heard SYN-ACK.
                self.next = self.unacknowledged;
            } else {
                // RFC 5961, 4: the guest may have forgotten this connection; it will say so.
                self.acks_due = self.acks_due.max(1);
            }
            return Ok(());
        }
        let Some(acknowledgment) = segment.acknowledgment else { return Ok(()) };
        if after(acknowledgment, self.highest) {
            if self.phase == Phase::SynReceived {
                return Err(End::Reset);
            }
            self.acks_due = self.acks_due.max(1);
            return Ok(());
        }
        self.acknowledge(acknowledgment, segment);
        if self.phase == Phase::SynReceived {
            return Ok(());
        }
        self.take_data(segment, limit)
    }

    /// The guest answers our SYN (RFC 9293, 3.10.7.3).
    fn answer_to_syn(&mut self, segment: &Segment<'_>) -> Result<(), End> {
        let ours = segment.acknowledgment.is_some_and(|ack| ack == self.highest && ack != self.unacknowledged);
        match (ours, segment.rst, segment.syn) {
            (true, true, _) => {
                self.reset_socket();
                Err(End::Silent)
            }
            (true, false, true) => {
                self.take_options(segment);
                self.unacknowledged = self.highest;
                self.next = self.highest;
                self.phase = Phase::Open;
                self.timer = None;
                self.tries = 0;
                self.acks_due = 1;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// When the socket is closed, its peer is to see a reset, not an orderly end (socket(7), `SO_LINGER`).
    fn reset_socket(&self) {
        let _ = rustix::net::sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO));
    }

    /// RFC 5961, 3: only a reset at the very place where data is expected counts.
    fn guest_reset(&mut self, segment: &Segment<'_>) -> Result<(), End> {
        if segment.sequence == self.receive_next {
            self.reset_socket();
            return Err(End::Silent);
        }
        if !before(segment.sequence, self.receive_next) && before(segment.sequence, self.advertised) {
            self.acks_due = self.acks_due.max(1);
        }
        Ok(())
    }

    /// The guest has received up to `acknowledgment`, which we have sent.
    fn acknowledge(&mut self, acknowledgment: u32, segment: &Segment<'_>) {
        if before(acknowledgment, self.unacknowledged) {
            return;
        }
        let window = u32::from(segment.window) << self.guest_shift;
        self.largest_window = self.largest_window.max(window);
        if acknowledgment == self.unacknowledged {
            if segment.length() == 0 && window == self.window && self.next != self.unacknowledged {
                self.duplicates = self.duplicates.saturating_add(1);
                if self.duplicates == DUPLICATES && self.recover.is_none() {
                    self.recover = Some(self.highest);
                    self.resend = true;
                }
            }
            // Who says that there is no room is there (RFC 9293, 3.8.6.1).
            if window == 0 {
                self.tries = self.tries.min(TRIES / 2);
            }
            self.window = window;
            return;
        }
        let mut count = acknowledgment.wrapping_sub(self.unacknowledged) as usize;
        if self.phase == Phase::SynReceived {
            self.phase = Phase::Open;
            count -= 1;
        }
        self.fin_acknowledged |= count > self.sending.len();
        self.sending.consume(count);
        self.unacknowledged = acknowledgment;
        if before(self.next, acknowledgment) {
            self.next = acknowledgment;
        }
        self.window = window;
        self.duplicates = 0;
        self.tries = 0;
        // More than one segment was lost (RFC 6582, 3.2).
        match self.recover {
            Some(recover) if before(acknowledgment, recover) => self.resend = true,
            _ => self.recover = None,
        }
        self.timer = None;
        if self.sending.is_empty() {
            self.sending.shrink();
        }
    }

    fn take_data(&mut self, segment: &Segment<'_>, limit: usize) -> Result<(), End> {
        if segment.length() == 0 {
            // A probe for whether we are still there (RFC 9293, 3.8.4).
            if before(segment.sequence, self.receive_next) {
                self.acks_due = self.acks_due.max(1);
            }
            return Ok(());
        }
        if after(segment.sequence, self.receive_next) {
            // Something before it is missing: the guest hears of each such segment (RFC 5681, 3.2).
            self.acks_due = (self.acks_due + 1).min(MOST_DUPLICATES);
            return Ok(());
        }
        self.acks_due = self.acks_due.max(1);
        let known = self.receive_next.wrapping_sub(segment.sequence) as usize;
        let Some(payload) = segment.payload.get(known..) else { return Ok(()) };
        if self.guest_fin {
            return Ok(());
        }
        let window = self.advertised.wrapping_sub(self.receive_next) as usize;
        // The first window is not announced before the handshake ends.
        let accepted = payload.len().min(window.max(self.free(limit)));
        self.pass_on(&payload[..accepted])?;
        self.receive_next = self.receive_next.wrapping_add(accepted as u32);
        if segment.fin && accepted == payload.len() {
            self.guest_fin = true;
            self.receive_next = self.receive_next.wrapping_add(1);
            self.flush_pending()?;
        }
        Ok(())
    }

    fn pass_on(&mut self, data: &[u8]) -> Result<(), End> {
        let mut rest = data;
        if self.pending.is_empty() && self.writable {
            rest = &rest[write(&self.socket, rest, &mut self.writable)?..];
        }
        if !rest.is_empty() {
            self.pending.extend(rest);
        }
        Ok(())
    }

    /// Hands what waits to the socket, and then the guest's end of data.
    fn flush_pending(&mut self) -> Result<(), End> {
        while self.writable && !self.pending.is_empty() {
            let (first, _) = self.pending.slices(0, self.pending.len());
            let count = write(&self.socket, first, &mut self.writable)?;
            self.pending.consume(count);
        }
        if self.pending.is_empty() {
            self.pending.shrink();
            if self.guest_fin && !self.host_shut {
                self.host_shut = true;
                // It fails only if the peer has gone, which reading will tell.
                let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
            }
        }
        Ok(())
    }

    /// Space for data of the guest.
    fn free(&self, limit: usize) -> usize {
        limit.saturating_sub(self.pending.len())
    }

    /// Data of the host that the guest has not been sent.
    fn unsent(&self) -> usize {
        self.sending.len().saturating_sub(self.in_flight())
    }

    fn in_flight(&self) -> usize {
        self.next.wrapping_sub(self.unacknowledged) as usize
    }

    /// Reads from the socket what the guest can soon be sent.
    fn fill(&mut self, limit: usize) -> Result<(), End> {
        while self.readable && !self.host_fin && self.unsent() < LONGEST_DATA {
            let mut room = self.sending.room(limit);
            let size: usize = room.iter().map(|piece| piece.len()).sum();
            if size == 0 {
                break;
            }
            match rustix::io::readv(&self.socket, &mut room) {
                Ok(0) => self.host_fin = true,
                Ok(count) => {
                    self.sending.filled(count);
                    // Less than asked for: there is no more, and the next will be an event, except for an end that
                    // was an event already.
                    self.readable = count == size || self.ended;
                }
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                Err(_) => return Err(End::Reset),
            }
        }
        Ok(())
    }

    /// Sends the guest one segment, if there is reason for one.
    pub fn pump(&mut self, out: &mut Out<'_>) -> Result<Pumped, End> {
        match self.phase {
            Phase::Connecting => return Ok(Pumped::Idle),
            Phase::SynReceived | Phase::SynSent => return Ok(self.send_syn(out)),
            Phase::Open => {}
        }
        self.fill(out.limit)?;
        self.note_window(out.limit);
        let most = self.most_data(&out.side);
        let (offset, length) = if self.resend {
            (0, self.sending.len().min(most))
        } else {
            let window = (self.window as usize).saturating_sub(self.in_flight()).max(usize::from(self.probe));
            let length = self.unsent().min(window).min(most);
            // Silly windows (RFC 9293, 3.8.6.2.1): if an answer is due anyhow, wait until a segment fits, or half of the
            // largest window.
            let worth = usize::from(self.mss).min(self.largest_window as usize / 2);
            let silly = length < worth && length < self.unsent() && self.in_flight() > 0;
            (self.in_flight().min(self.sending.len()), if silly { 0 } else { length })
        };
        let last = offset + length == self.sending.len();
        let fin =
            last && self.host_fin && !self.fin_acknowledged && (self.resend || self.in_flight() <= self.sending.len());
        if length == 0 && !fin && self.acks_due == 0 {
            self.resend = false;
            if self.timer.is_none() && (self.in_flight() > 0 || self.unsent() > 0) {
                self.start_timer(out.side.now);
            }
            return Ok(if self.is_closed() { Pumped::Closed } else { Pumped::Idle });
        }
        let sequence = if length > 0 || fin { self.unacknowledged.wrapping_add(offset as u32) } else { self.next };
        let mut flags = segment::ACK;
        if last && length > 0 {
            flags |= segment::PSH;
        }
        if fin {
            flags |= segment::FIN;
        }
        if !self.send(sequence, flags, (offset, length), out) {
            return Ok(Pumped::Full);
        }
        self.acks_due = if length > 0 || fin { 0 } else { self.acks_due.saturating_sub(1) };
        self.resend = false;
        self.probe = false;
        let end = sequence.wrapping_add(length as u32 + u32::from(fin));
        if after(end, self.next) {
            self.next = end;
        }
        if after(self.next, self.highest) {
            self.highest = self.next;
        }
        if (length > 0 || fin) && self.timer.is_none() {
            self.start_timer(out.side.now);
        }
        Ok(Pumped::More)
    }

    fn send_syn(&mut self, out: &mut Out<'_>) -> Pumped {
        if self.next != self.unacknowledged {
            return Pumped::Idle;
        }
        let flags = if self.phase == Phase::SynSent { segment::SYN } else { segment::SYN | segment::ACK };
        if !self.send(self.next, flags, (0, 0), out) {
            return Pumped::Full;
        }
        self.next = self.unacknowledged.wrapping_add(1);
        self.highest = self.next;
        self.start_timer(out.side.now);
        Pumped::Idle
    }

    fn send(&mut self, sequence: u32, flags: u8, (offset, length): (usize, usize), out: &mut Out<'_>) -> bool {
        let route = self.route();
        let syn = flags & segment::SYN != 0;
        let edge = self.window_edge(out.limit);
        let window = edge.wrapping_sub(self.receive_next) >> if syn { 0 } else { self.our_shift };
        let fields = Fields {
            sequence,
            acknowledgment: if flags & segment::ACK != 0 { self.receive_next } else { 0 },
            flags,
            window: u16::try_from(window).unwrap_or(u16::MAX),
            options: syn.then(|| {
                let mss = out.side.mtu.saturating_sub(route.ip_header_length() + segment::HEADER);
                (mss as u16, (self.our_shift != 0).then_some(self.our_shift))
            }),
        };
        let sent = fields.send(out, route, &self.key, self.sending.slices(offset, length), self.mss.into());
        if sent {
            let shift = if syn { 0 } else { self.our_shift };
            self.advertised = self.receive_next.wrapping_add(u32::from(fields.window) << shift);
        }
        sent
    }

    /// A header that ends the connection for the guest.
    pub fn reset_frame(&self) -> Vec<u8> {
        let fields = Fields {
            sequence: self.next,
            acknowledgment: self.receive_next,
            flags: segment::RST | segment::ACK,
            ..Fields::default()
        };
        fields.frame(self.route(), &self.key)
    }

    fn route(&self) -> Route {
        Route { guest: self.mac, source: self.key.remote.ip(), destination: self.key.guest.ip() }
    }

    /// The most data of one frame.
    fn most_data(&self, side: &Side) -> usize {
        let mss = usize::from(self.mss).min(LONGEST_DATA);
        let tso = if self.key.guest.is_ipv4() { side.offloads.tso4 } else { side.offloads.tso6 };
        if tso && side.offloads.checksum { LONGEST_DATA / mss * mss } else { mss }
    }

    /// Where the window ends: it never shrinks (RFC 9293, 3.8.6).
    fn window_edge(&self, limit: usize) -> u32 {
        let edge = self.receive_next.wrapping_add(self.free(limit) as u32);
        if before(edge, self.advertised) { self.advertised } else { edge }
    }

    /// The guest is told when its window has opened by a good deal (RFC 9293, 3.8.6.2.2).
    fn note_window(&mut self, limit: usize) {
        let known = self.advertised.wrapping_sub(self.receive_next) as usize;
        let now = self.window_edge(limit).wrapping_sub(self.receive_next) as usize;
        let most = (usize::from(u16::MAX) << self.our_shift).min(limit);
        if known < most / 4 && now >= most / 2 {
            self.acks_due = self.acks_due.max(1);
        }
    }

    fn is_closed(&self) -> bool {
        self.guest_fin && self.host_shut && self.fin_acknowledged
    }

    fn start_timer(&mut self, now: Instant) {
        let timeout = TIMEOUT.saturating_mul(1 << self.tries.min(16)).min(LONGEST_TIMEOUT);
        self.timer = now.checked_add(timeout);
    }

    /// What was sent last has not been answered.
    pub fn timed_out(&mut self, now: Instant) -> Result<(), End> {
        self.tries += 1;
        let most = if self.phase == Phase::Open { TRIES } else { SYN_TRIES };
        if self.tries > most {
            self.reset_socket();
            return Err(End::Reset);
        }
        self.next = self.unacknowledged;
        self.probe = self.window == 0;
        self.recover = None;
        self.start_timer(now);
        Ok(())
    }
}

/// Writes to a socket what it takes. `writable` becomes false when it is full.
fn write(socket: &OwnedFd, data: &[u8], writable: &mut bool) -> Result<usize, End> {
    if data.is_empty() {
        return Ok(0);
    }
    loop {
        match rustix::net::send(socket, data, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) => {
                *writable = count == data.len();
                return Ok(count.min(data.len()));
            }
            Err(Errno::AGAIN) => {
                *writable = false;
                return Ok(0);
            }
            Err(Errno::INTR) => {}
            Err(_) => return Err(End::Reset),
        }
    }
}
