//! The user network as a guest sees it, over the host's loopback.

mod guest;
mod hostile;
mod tcp;
mod tftp;
mod udp;
