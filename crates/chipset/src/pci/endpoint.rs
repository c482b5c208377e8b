//! What functions with an interrupt have in common: a configuration space, and the way from "there is something to
//! tell" to a message (MSI) or the interrupt pin.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config::{BarWindow, ConfigSpace};
use crate::{Error, InterruptLine};

/// MSI (PCI local bus 3.0, 6.8.1): its capability, and what lies in it behind the header.
const CAP_MSI: u8 = 0x05;
const MSI_CONTROL: u16 = 2;
const MSI_ADDRESS: u16 = 4;
const MSI_DATA: u16 = 12;
const MSI_ENABLE: u8 = 1;
/// 64-bit addresses.
const MSI_WIDE: u8 = 1 << 7;
/// Status register: the function wants to interrupt by its pin (6.2.3).
const STATUS: u16 = 6;
const INTERRUPT_STATUS: u8 = 1 << 3;

struct State {
    config: ConfigSpace,
    /// Something is to be told.
    wanted: bool,
}

/// The PCI side of a function whose interrupt is a level.
pub struct Endpoint {
    state: Mutex<State>,
    msi: Option<u16>,
    line: InterruptLine,
    interrupts: Arc<dyn engine::Interrupts>,
}

impl Endpoint {
    /// Adds interrupt pin `pin` (0 is INTA) to `config`, and the capability for MSI if `msi`.
    pub fn new(
        mut config: ConfigSpace,
        pin: u8,
        msi: bool,
        line: InterruptLine,
        interrupts: Arc<dyn engine::Interrupts>,
    ) -> Result<Self, Error> {
        config.set_interrupt_pin(pin + 1);
        let mut place = None;
        if msi {
            let body = [MSI_WIDE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            let writable = [MSI_ENABLE, 0, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
            place = Some(config.add_capability(CAP_MSI, &body, &writable)?.into());
        }
        let state = State { config, wanted: false };
        Ok(Endpoint { state: Mutex::new(state), msi: place, line, interrupts })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn read_config(&self, offset: u16, data: &mut [u8]) {
        let state = self.lock();
        state.config.read(offset, data);
        let status = STATUS.checked_sub(offset).and_then(|index| data.get_mut(usize::from(index)));
        if let (Some(status), true) = (status, state.wanted) {
            *status |= INTERRUPT_STATUS;
        }
    }

    pub fn write_config(&self, offset: u16, data: &[u8]) {
        let mut state = self.lock();
        let before = self.message(&state.config);
        state.config.write(offset, data);
        // What was to be told by the pin is told by the message now.
        let message = self.message(&state.config).filter(|_| state.wanted && before.is_none());
        self.drive_line(&state);
        drop(state);
        self.send(message);
    }

    pub fn windows(&self) -> Vec<BarWindow> {
        self.lock().config.windows()
    }

    /// Whether the function may read and write guest memory.
    pub fn bus_master(&self) -> bool {
        self.lock().config.bus_master()
    }

    pub fn reset(&self) {
        let mut state = self.lock();
        state.config.reset();
        state.wanted = false;
        self.line.lower();
    }

    /// Says whether there is something to tell. A message is sent when there begins to be, and `again` also if there
    /// was already.
    pub fn set_interrupt(&self, wanted: bool, again: bool) {
        let mut state = self.lock();
        let begins = wanted && (again || !state.wanted);
        state.wanted = wanted;
        let message = self.message(&state.config).filter(|_| begins);
        self.drive_line(&state);
        drop(state);
        self.send(message);
    }

    /// The MSI message, if software has turned messages on.
    fn message(&self, config: &ConfigSpace) -> Option<(u64, u32)> {
        let place = self.msi?;
        let (mut control, mut address, mut data) = ([0; 1], [0; 8], [0; 2]);
        config.read(place + MSI_CONTROL, &mut control);
        config.read(place + MSI_ADDRESS, &mut address);
        config.read(place + MSI_DATA, &mut data);
        (control[0] & MSI_ENABLE != 0).then(|| (u64::from_le_bytes(address), u16::from_le_bytes(data).into()))
    }

    /// With the lock held, so that the line follows changes in their order.
    fn drive_line(&self, state: &State) {
        let by_pin = self.message(&state.config).is_none() && !state.config.intx_disabled();
        self.line.set(state.wanted && by_pin);
    }

    fn send(&self, message: Option<(u64, u32)>) {
        if let Some((address, data)) = message {
            self.interrupts.send_msi(address, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Identity;
    use crate::testing::Controllers;

    const LINE: u8 = 5;

    fn endpoint(all: &Controllers) -> Endpoint {
        let identity =
            Identity { vendor: 1, device: 2, revision: 0, class: [1, 6, 1], subsystem_vendor: 0, subsystem: 0 };
        Endpoint::new(ConfigSpace::new(identity), 0, true, all.lines.connect(LINE), all.recorder.clone()).unwrap()
    }

    fn enable(endpoint: &Endpoint) {
        let place = endpoint.msi.unwrap();
        endpoint.write_config(place + 4, &0xfee0_1000u32.to_le_bytes());
        endpoint.write_config(place + 12, &0x41u32.to_le_bytes());
        endpoint.write_config(place + 2, &[1, 0]);
    }

    #[test]
    fn without_messages_the_pin_follows_the_level() {
        let all = Controllers::default();
        let endpoint = endpoint(&all);
        endpoint.set_interrupt(true, false);
        assert!(all.asserted(LINE));
        endpoint.write_config(4, &[0, 4]);
        assert!(!all.asserted(LINE), "the command register turns the pin off");
        endpoint.write_config(4, &[0, 0]);
        assert!(all.asserted(LINE));
        endpoint.set_interrupt(false, false);
        assert!(!all.asserted(LINE));
    }

    #[test]
    fn a_message_is_sent_once_for_each_beginning() {
        let all = Controllers::default();
        let endpoint = endpoint(&all);
        enable(&endpoint);
        endpoint.set_interrupt(true, false);
        endpoint.set_interrupt(true, false);
        assert_eq!(all.recorder.take(), [(0xfee0_1000, 0x41)]);
        assert!(!all.asserted(LINE));
        endpoint.set_interrupt(true, true);
        endpoint.set_interrupt(false, false);
        endpoint.set_interrupt(true, false);
        assert_eq!(all.recorder.take().len(), 2);
    }

    #[test]
    fn what_waits_is_told_when_messages_are_turned_on() {
        let all = Controllers::default();
        let endpoint = endpoint(&all);
        endpoint.set_interrupt(true, false);
        enable(&endpoint);
        assert_eq!(all.recorder.take(), [(0xfee0_1000, 0x41)]);
        assert!(!all.asserted(LINE));
        endpoint.reset();
        endpoint.set_interrupt(true, false);
        assert!(all.asserted(LINE) && all.recorder.take().is_empty());
    }
}
