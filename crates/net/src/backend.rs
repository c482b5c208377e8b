//! The border between a virtual network card and what it is attached to.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use crate::{Header, Offloads};

/// The longest frame that passes in either direction: Ethernet's header and the longest IPv6 packet without options.
pub const LONGEST_FRAME: usize = 14 + 40 + 65535;

/// What one pair of queues of a virtual network card is attached to. One thread owns it: that thread calls
/// [`Backend::receive`] whenever [`Backend::descriptor`] is readable, [`Backend::deadline`] has come, it has sent
/// frames, or the guest has made room for more.
pub trait Backend: Send {
    /// What the back-end does to the frames that the guest sends.
    fn offloads(&self) -> Offloads;
    /// What the guest does itself to the frames that it receives.
    fn set_guest_offloads(&mut self, offloads: Offloads);
    /// Whether the guest uses this pair of queues. A back-end is enabled at first if it is the first of its card.
    fn set_enabled(&mut self, enabled: bool);
    /// Takes a frame from the guest. What can't be sent is dropped, as on any network.
    fn send(&mut self, header: &Header, frame: &[u8]);
    /// Hands over frames for the guest until there are no more or the sink is full.
    fn receive(&mut self, sink: &mut dyn Sink);
    /// Readable when [`Backend::receive`] has something to do.
    fn descriptor(&self) -> BorrowedFd<'_>;
    /// When to call [`Backend::receive`] at the latest.
    fn deadline(&self) -> Option<Instant>;
    /// The guest has started over: what belongs to its connections is dropped.
    fn reset(&mut self);
}

/// Where frames for the guest go.
pub trait Sink {
    /// Takes one frame, given in pieces. False: there is no room, and the frame was not taken.
    fn deliver(&mut self, header: &Header, pieces: &[&[u8]]) -> bool;
}
