//! An AHCI 1.3 controller as in the ICH9 (Serial ATA AHCI 1.3.1; Intel ICH9 datasheet, 14): six ports, each with at most
//! one drive, native command queuing, MSI.
//!
//! [`port::Port`] is one port: its registers, and the thread that takes commands out of the driver's list and has the
//! drive do them. [`fis`] is what the port writes into the driver's memory about them. [`function`] is the rest: the
//! registers that all ports share, and the function on the PCI bus.

mod command;
mod fis;
mod function;
mod port;
#[cfg(test)]
mod tests;

pub use function::{AhciController, PIN, PORTS};

/// Its function number in the south bridge.
pub const FUNCTION: u8 = 2;
