//! Input for a serial port, as fast as the guest takes it.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use chipset::Serial;

/// Feeds one serial port.
pub struct SerialInput {
    port: Arc<Serial>,
    /// Whether there may be room again, and its signal.
    room: Arc<(Mutex<bool>, Condvar)>,
}

impl SerialInput {
    /// There is one for each port: a later one takes the room signal from an earlier one.
    pub(crate) fn new(port: Arc<Serial>) -> Self {
        let room = Arc::new((Mutex::new(false), Condvar::new()));
        let signal = room.clone();
        port.on_room(move || {
            *signal.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
            signal.1.notify_one();
        });
        SerialInput { port, room }
    }

    /// Sends bytes to the guest. Waits while it is slow to take them, forever if it never does.
    pub fn send(&self, mut data: &[u8]) {
        loop {
            let taken = self.port.push_input(data);
            data = data.get(taken..).unwrap_or_default();
            if data.is_empty() {
                return;
            }
            let (room, signal) = &*self.room;
            let mut room = room.lock().unwrap_or_else(PoisonError::into_inner);
            while !std::mem::take(&mut *room) {
                room = signal.wait(room).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}
