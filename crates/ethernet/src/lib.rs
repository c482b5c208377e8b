//! Network cards of real makes, for systems and firmware without virtio drivers: Intel's 82540EM (e1000) and 82574L
//! (e1000e), which differ in how they interrupt and in a few registers, and share the rest.
//!
//! The data flow to follow: a write of a tail register wakes the card's thread ([`worker`]). It takes frames out of the
//! transmit rings ([`transmit`]), completes what the driver has left to the card (checksums, segmentation) or leaves it to
//! the [`net::Backend`], and puts frames that come from there into the receive ring ([`receive`]). What is to be told to
//! the driver are bits of ICR, which become a level, a message or an MSI-X vector, as often as ITR allows ([`causes`]).
//! All other registers are plain storage or small machines: [`eeprom`], [`phy`].
//!
//! Threat model: the driver is hostile. Ring addresses, lengths and descriptors are checked where they are used; a ring
//! that can't be read stands still.
#![forbid(unsafe_code)]

mod card;
mod causes;
mod eeprom;
mod function;
mod phy;
mod receive;
mod registers;
#[cfg(test)]
mod tests;
mod transmit;
mod worker;

pub use function::NetworkCard;

/// Which card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    /// Intel 82540EM, PCI.
    E1000,
    /// Intel 82574L, PCI Express with MSI-X.
    E1000e,
}

/// Why a card could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("a network card can't have its {what}: {source}")]
    Host { what: &'static str, source: std::io::Error },
    #[error(transparent)]
    Chipset(#[from] chipset::Error),
}
