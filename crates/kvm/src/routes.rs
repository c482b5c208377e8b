//! The kernel's table of routes: messages by number (GSI).
//!
//! The first [`LEVEL`] numbers are the level-triggered messages that were sent last: KVM reports the end only of those
//! vectors that stand there (`Documentation/virt/kvm/api.rst`, KVM_CAP_SPLIT_IRQCHIP), so that no more than the messages
//! themselves has to be known. Behind them are the messages that events send ([`crate::source`]).

use kvm_bindings::*;
use kvm_ioctls::VmFd;

use crate::Error;
use crate::interrupts::{high, low};

/// More than an I/O APIC has inputs, so that those of which an end is awaited always have a place.
pub const LEVEL: u32 = 64;
/// The most messages that events send: each takes a file descriptor, and there is a way without.
const MOST_EVENTS: usize = 256;

/// Address and data.
pub type Message = (u64, u32);

/// A level-triggered message that is in the kernel's table.
#[derive(Clone, Copy)]
struct Level {
    message: Message,
    /// The larger, the later it was sent.
    used: u64,
    /// It was sent, and its end has not come yet.
    open: bool,
}

/// What the kernel's table is to be.
#[derive(Default)]
pub struct Routes {
    level: Vec<Level>,
    clock: u64,
    /// By number less [`LEVEL`]; `None`: free.
    events: Vec<Option<Message>>,
}

impl Routes {
    /// A level-triggered message is about to be sent. True: the kernel doesn't know it yet.
    pub fn level_sent(&mut self, address: u64, data: u32) -> bool {
        self.clock += 1;
        let level = Level { message: (address, data), used: self.clock, open: true };
        if let Some(known) = self.level.iter_mut().find(|known| known.message == level.message) {
            *known = level;
            return false;
        }
        if self.level.len() < LEVEL as usize {
            self.level.push(level);
        } else if let Some(oldest) = self.level.iter_mut().min_by_key(|known| (known.open, known.used)) {
            *oldest = level;
        }
        true
    }

    /// The kernel reported the end of `vector`.
    pub fn level_ended(&mut self, vector: u8) {
        self.level.iter_mut().filter(|known| known.message.1 as u8 == vector).for_each(|known| known.open = false);
    }

    /// A number for a message that an event is to send; `None`: there is none left.
    pub fn add_event(&mut self, message: Message) -> Option<u32> {
        let free = self.events.iter().position(Option::is_none).unwrap_or(self.events.len());
        if free == self.events.len() {
            if free == MOST_EVENTS {
                return None;
            }
            self.events.push(None);
        }
        let gsi = LEVEL + free as u32;
        self.set_event(gsi, Some(message));
        Some(gsi)
    }

    /// Changes what an event sends, or gives its number back.
    pub fn set_event(&mut self, gsi: u32, message: Option<Message>) {
        let index = gsi.checked_sub(LEVEL).map_or(usize::MAX, |index| index as usize);
        if let Some(event) = self.events.get_mut(index) {
            *event = message;
        }
    }

    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let level = (0..).zip(&self.level).map(|(gsi, known)| entry(gsi, known.message));
        let events = (LEVEL..).zip(&self.events).filter_map(|(gsi, event)| event.map(|message| entry(gsi, message)));
        level.chain(events).collect()
    }

    /// Makes the kernel's table this one.
    pub fn tell(&self, vm: &VmFd) -> Result<(), Error> {
        // As many as fit: the limit is far above ours.
        let table = KvmIrqRouting::from_entries(&self.entries());
        let table = table.map_err(|error| Error::State(format!("the routes of interrupts: {error:?}")))?;
        vm.set_gsi_routing(&table).map_err(Error::call("set the routes of interrupts"))
    }
}

fn entry(gsi: u32, (address, data): Message) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi { address_lo: low(address), address_hi: high(address), data, ..Default::default() };
    let u = kvm_irq_routing_entry__bindgen_ty_1 { msi };
    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, u, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(routes: &Routes) -> Vec<u32> {
        routes.entries().iter().map(|entry| entry.gsi).collect()
    }

    #[test]
    fn a_message_that_is_known_changes_no_route() {
        let mut routes = Routes::default();
        assert!(routes.level_sent(0xfee0_0000, 0xc030));
        assert!(!routes.level_sent(0xfee0_0000, 0xc030));
        assert!(routes.level_sent(0xfee0_1000, 0xc030));
        assert_eq!(numbers(&routes), [0, 1]);
    }

    #[test]
    fn a_message_whose_end_is_awaited_keeps_its_route() {
        let mut routes = Routes::default();
        routes.level_sent(0xfee0_0000, 0xc030);
        for vector in 0..200 {
            routes.level_sent(0xfee0_1000, 0xc000 | vector);
            if vector as u8 != 0x30 {
                routes.level_ended(vector as u8);
            }
        }
        assert!(!routes.level_sent(0xfee0_0000, 0xc030));
        assert!(routes.level_sent(0xfee0_1000, 0xc000), "this one had to go");
        assert_eq!(routes.level.len(), LEVEL as usize);
    }

    #[test]
    fn numbers_of_events_are_used_again_and_have_an_end() {
        let mut routes = Routes::default();
        let all: Vec<_> = (0..MOST_EVENTS as u32).map(|data| routes.add_event((0xfee0_0000, data))).collect();
        assert_eq!((all[0], all[1], routes.add_event((0xfee0_0000, 1))), (Some(LEVEL), Some(LEVEL + 1), None));
        routes.set_event(LEVEL + 1, None);
        assert_eq!(numbers(&routes).len(), MOST_EVENTS - 1);
        assert_eq!(routes.add_event((0xfee0_0000, 7)), Some(LEVEL + 1));
        routes.set_event(0, None);
        routes.set_event(u32::MAX, None);
        assert_eq!(numbers(&routes).len(), MOST_EVENTS);
    }
}
