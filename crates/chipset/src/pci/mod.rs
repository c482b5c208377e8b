//! PCI: bus 0 with its host bridge and LPC bridge, as in a Q35, and what a further function needs to be on it.

mod bus;
mod config;
mod endpoint;
mod host_bridge;
mod lpc_bridge;
pub mod msix;
mod rom;

pub use bus::{ConfigPorts, Ecam, PciBus, PciFunction};
pub use config::{BarKind, BarWindow, CONFIG_SIZE, ConfigSpace, Identity, ROM_BAR};
pub use endpoint::Endpoint;
pub use host_bridge::HostBridge;
pub use lpc_bridge::LpcBridge;
pub use rom::OptionRom;

#[cfg(test)]
mod tests;
