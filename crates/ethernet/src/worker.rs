//! The card's thread: frames out, frames in, and interrupts that had to wait.

use std::sync::Arc;
use std::time::Instant;

use net::{Backend, Offloads};
use wake::{Event, wait_any_or};

use crate::card::Card;
use crate::receive::Receiver;
use crate::transmit::Transmitter;

/// Runs until `stop` is set.
pub fn work(card: &Arc<Card>, mut backend: Box<dyn Backend>, stop: &Event) {
    // These cards take frames as they are on a wire.
    backend.set_guest_offloads(Offloads::default());
    backend.set_enabled(true);
    let mut transmitter = Transmitter::default();
    let mut epoch = card.lock().epoch;
    while !stop.is_set() {
        card.kick.clear();
        let now = card.lock().epoch;
        if std::mem::replace(&mut epoch, now) != now {
            transmitter = Transmitter::default();
        }
        let mut more = transmitter.run(card, &mut *backend);
        let mut receiver = Receiver::new(card);
        backend.receive(&mut receiver);
        let full = receiver.full;
        more |= receiver.finish();
        let again = card.interrupt(&mut card.lock());
        if more {
            continue;
        }
        let until = [backend.deadline(), again].into_iter().flatten().min();
        let limit = until.map(|until| until.saturating_duration_since(Instant::now()));
        // A back-end whose frames find no room would only say again that it has some.
        let descriptor = (!full).then(|| backend.descriptor());
        wait_any_or(&[stop, &card.kick], descriptor, limit);
    }
}
