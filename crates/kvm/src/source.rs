//! A device's vector on its way to the vCPUs: an event whose raising makes the kernel send the vector's message (irqfd).
//!
//! Which message that is stands in the kernel's table of routes, which is slow to change: all vCPUs are waited for. So a
//! message is sent by itself (KVM_SIGNAL_MSI) until it has been the same for a while; drivers choose one when they start,
//! and another when an interrupt moves to another processor. A masked vector sends nothing, which is its device's affair.

use std::sync::{Arc, Mutex, PoisonError};

use engine::{Interrupts, MessageSource};
use kvm_ioctls::Error as Errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::Error;
use crate::interrupts::{Messages, is_edge};
use crate::routes::Message;
use crate::vm::Vm;

/// How often the same message is sent before it is put into the kernel's table.
const OFTEN: u32 = 4;

/// One source of messages.
pub struct Source {
    vm: Arc<Vm>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What was sent last, and how often in a row.
    last: Option<Message>,
    times: u32,
    line: Line,
}

#[derive(Default)]
enum Line {
    #[default]
    NotYet,
    /// An event and its number in the kernel's table, in which this message stands.
    Open { event: EventFd, gsi: u32, message: Message },
    /// No descriptors or numbers are left.
    Impossible,
}

impl Source {
    pub fn new(vm: Arc<Vm>) -> Self {
        Source { vm, state: Mutex::default() }
    }

    /// Makes the event send `message`.
    fn prepare(&self, line: &mut Line, message: Message) -> Result<(), Error> {
        match line {
            Line::Open { message: present, .. } if *present == message => Ok(()),
            Line::Open { gsi, message: present, .. } => {
                let mut routes = self.vm.routes();
                routes.set_event(*gsi, Some(message));
                routes.tell(&self.vm.fd)?;
                *present = message;
                Ok(())
            }
            Line::NotYet => {
                let refused = "make an event for an interrupt";
                let event =
                    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| Error::call(refused)(Errno::from(e)))?;
                let mut routes = self.vm.routes();
                let gsi = routes.add_event(message).ok_or_else(|| Error::State("no route is left".into()))?;
                let result = routes.tell(&self.vm.fd).and_then(|()| {
                    self.vm.fd.register_irqfd(&event, gsi).map_err(Error::call("let an event send an interrupt"))
                });
                match result {
                    Ok(()) => *line = Line::Open { event, gsi, message },
                    Err(_) => routes.set_event(gsi, None),
                }
                result
            }
            Line::Impossible => Err(Error::State("no event is left".into())),
        }
    }

    /// Sends `message` by the event, if it is one that is sent often. False: it is still to be sent.
    fn raise(&self, message: Message) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { last, times, line } = &mut *state;
        if *last != Some(message) {
            (*last, *times) = (Some(message), 0);
        }
        *times = times.saturating_add(1);
        if *times <= OFTEN || matches!(line, Line::Impossible) {
            return false;
        }
        if let Err(error) = self.prepare(line, message) {
            tracing::debug!("interrupts are sent one by one: {error}");
            self.close(std::mem::replace(line, Line::Impossible));
        }
        matches!(line, Line::Open { event, .. } if event.write(1).is_ok())
    }

    fn close(&self, line: Line) {
        let Line::Open { event, gsi, .. } = line else { return };
        if let Err(error) = self.vm.fd.unregister_irqfd(&event, gsi) {
            tracing::debug!(%error, "an event of an interrupt can't be taken back");
        }
        self.vm.routes().set_event(gsi, None);
    }
}

impl MessageSource for Source {
    fn send(&self, address: u64, data: u32) {
        if !is_edge(address, data) || !self.raise((address, data)) {
            Messages(self.vm.clone()).send_msi(address, data);
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let line = std::mem::take(&mut state.line);
        self.close(line);
    }
}
