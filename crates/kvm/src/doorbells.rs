//! Registers whose writes the kernel turns into events (ioeventfd): the driver of a paravirtual device notifies it without a
//! way out of the guest.

use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd};
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use crate::vm::Vm;

/// The doorbells of one machine.
pub struct IoEvents(pub Arc<Vm>);

/// A descriptor of our own for the same event.
fn event(fd: BorrowedFd<'_>) -> Option<EventFd> {
    let own = fd.try_clone_to_owned().ok()?.into_raw_fd();
    // SAFETY: the descriptor was just made, and nobody else has it.
    Some(unsafe { EventFd::from_raw_fd(own) })
}

impl engine::Doorbells for IoEvents {
    fn attach(&self, address: u64, fd: BorrowedFd<'_>) -> bool {
        let Some(event) = event(fd) else { return false };
        let result = self.0.fd.register_ioevent(&event, &IoEventAddress::Mmio(address), NoDatamatch);
        if let Err(error) = &result {
            tracing::debug!(%error, address, "a notification comes out of the guest");
        }
        result.is_ok()
    }

    fn detach(&self, address: u64, fd: BorrowedFd<'_>) {
        let Some(event) = event(fd) else { return };
        if let Err(error) = self.0.fd.unregister_ioevent(&event, &IoEventAddress::Mmio(address), NoDatamatch) {
            tracing::warn!(%error, address, "a notification can't be taken back");
        }
    }
}
