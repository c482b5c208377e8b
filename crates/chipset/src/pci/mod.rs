//! PCI: bus 0 with its host bridge and LPC bridge, and what a further function needs to be on it.

mod bridges;
mod bus;
mod config;
mod endpoint;

pub use bridges::{PlainFunction, host_bridge, lpc_bridge};
pub use bus::{ConfigPorts, Ecam, PciBus, PciFunction};
pub use config::{BarKind, BarWindow, CONFIG_SIZE, ConfigSpace, Identity};
pub use endpoint::Endpoint;

#[cfg(test)]
mod tests;
