//! A screen and who looks at it: the VGA adapter ([`vga`]) and the VNC server ([`vnc`]).
//!
//! The two meet in a [`Frame`]: the adapter draws one when asked, the server sends those of its tiles that have changed
//! to its viewers. What viewers type and click goes the other way, by [`vnc::Desktop`], and ends at the machine's
//! keyboard and mouse. The server knows nothing of the adapter, nor the adapter of the server. A frame can be a file, too
//! ([`png`]).
#![forbid(unsafe_code)]

mod frame;
pub mod png;
pub mod vga;
pub mod vnc;

pub use frame::{Frame, MAX_HEIGHT, MAX_WIDTH};

/// Why there is no screen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error(transparent)]
    Chipset(#[from] chipset::Error),
}
