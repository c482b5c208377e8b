//! Virtio over PCI (virtio 1.2, 4.1), modern only: a function whose one memory window holds all that the driver needs.
//!
//! [`VirtioPci`] is the function on the bus: configuration space, capabilities and the window's dispatch.
//! [`common::Common`] is the conversation before DRIVER_OK and the way back by reset, [`interrupts::Interrupter`] the
//! way from the device's threads to the driver, [`chipset::pci::msix::Msix`] its table of messages.
//!
//! Locks are taken in this order: the conversation, then the device's own, then the MSI-X table. A device's threads
//! take only the last, so that a reset, which waits for those threads, can't wait for itself.

mod common;
mod function;
mod interrupts;

pub use function::VirtioPci;
