//! Paravirtual devices (virtio 1.2) and the one transport that carries them.
//!
//! A device is a [`VirtioDevice`]: a type, features, a configuration space, and what it does with its [`Queue`]s. It
//! knows nothing of PCI. The transport ([`pci::VirtioPci`]) is what the guest's driver talks to: it negotiates features,
//! takes the queues' addresses and, when the driver says DRIVER_OK, hands the device an [`Activation`].
//!
//! The data flow to follow: the driver makes a buffer available and writes to the queue's notify register; that one
//! fast exit sets the queue's [`Event`]; the device's own thread ([`Worker`]) wakes, takes the [`Chain`], does the work
//! on guest memory, gives the buffer back with [`Queue::push`], and tells the driver by [`Queue::notify`], which becomes
//! an MSI-X message or the INTx line if the driver wants to hear of it. No device work is done on a vCPU's thread.
//!
//! Threat model: the driver is hostile. All it writes (registers, rings, descriptors, request headers, also while a
//! request is served) is checked where it is read; what can't be right marks the device as needing a reset (virtio 1.2,
//! 2.1.2) or fails the request.
#![forbid(unsafe_code)]

pub mod balloon;
pub mod block;
mod chain;
pub mod console;
mod device;
pub mod entropy;
pub mod fs;
mod helpers;
pub mod net;
pub mod pci;
mod queue;
mod serve;
pub mod vsock;

pub use chain::{Chain, Reader, Writer};
pub use device::{Activation, DeviceType, Signals, VirtioDevice};
pub use queue::Queue;
pub use wake::{Event, Worker, wait_any, wait_any_for};

/// Feature bits that belong to the transport and the rings (virtio 1.2, 6); a device leaves them alone.
pub mod feature {
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
}

/// Why a device could not be made or started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("virtio {device}: {what}: {source}")]
    Host { device: &'static str, what: &'static str, source: std::io::Error },
    #[error("virtio {device}: {what}")]
    Driver { device: &'static str, what: &'static str },
    #[error("virtio {device}: {queues} queues are too many: {max} is the most")]
    TooManyQueues { device: &'static str, queues: usize, max: usize },
    #[error(transparent)]
    Chipset(#[from] chipset::Error),
}
