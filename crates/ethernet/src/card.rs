//! The card's registers, and what the card's thread and its driver share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use chipset::pci::Endpoint;
use chipset::pci::msix::{Message, Msix};
use memory::View;
use net::Mac;
use wake::Event;

use crate::Model;
use crate::causes::{AutoMask, Causes};
use crate::eeprom::Eeprom;
use crate::phy::Phy;
use crate::registers::*;

pub struct State {
    /// Registers that are nothing but storage, and counters.
    plain: Vec<u32>,
    pub causes: Causes,
    phy: Phy,
    eeprom: Eeprom,
    /// The thread starts over with each.
    pub epoch: u64,
}

pub struct Card {
    pub model: Model,
    mac: Mac,
    state: Mutex<State>,
    pub kick: Event,
    pub endpoint: Endpoint,
    pub msix: Mutex<Msix>,
    pub interrupts: Arc<dyn engine::Interrupts>,
    pub memory: View,
}

/// A descriptor ring as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    pub base: u64,
    /// In descriptors.
    pub size: u32,
    pub head: u32,
    pub tail: u32,
}

impl Ring {
    /// Descriptors between head and tail: those that are the card's.
    pub fn available(&self) -> u32 {
        if self.tail >= self.head { self.tail - self.head } else { self.size - self.head + self.tail }
    }

    pub fn next(&self, index: u32) -> u32 {
        if index + 1 >= self.size { 0 } else { index + 1 }
    }
}

impl State {
    fn new(model: Model, mac: Mac) -> Self {
        let mut state = State {
            plain: vec![0; (SIZE / 4) as usize],
            causes: Causes::new(model),
            phy: Phy::new(model),
            eeprom: Eeprom::new(model, mac),
            epoch: 0,
        };
        state.reset(model, mac);
        state
    }

    /// What a reset by software leaves: the PHY goes on.
    fn reset(&mut self, model: Model, mac: Mac) {
        self.plain.fill(0);
        self.causes = Causes::new(model);
        self.epoch += 1;
        let [a, b, c, d, e, f] = mac;
        self.set(ADDRESSES, u32::from_le_bytes([a, b, c, d]));
        // The address is valid.
        self.set(ADDRESSES + 4, u32::from_le_bytes([e, f, 0, 0x80]));
        // Full duplex, 1000 Mbit/s.
        self.set(CTRL, 1 << 0 | 1 << 3 | 1 << 9);
        self.set(PBA, 0x0010_0030);
        self.set(LEDCTL, 0x0706_8302);
        self.set(VET, 0x8100);
        if model == Model::E1000e {
            self.set(PBA, 0x0014_0014);
            // The firmware for management has done its part.
            self.set(EEMNGCTL, 1 << 18);
            self.set(FACTPS, 0x2000_0000);
        }
    }

    pub fn get(&self, offset: u64) -> u32 {
        self.plain.get((offset / 4) as usize).copied().unwrap_or_default()
    }

    fn set(&mut self, offset: u64, value: u32) {
        if let Some(register) = self.plain.get_mut((offset / 4) as usize) {
            *register = value;
        }
    }

    /// Counts; counters stop at their end.
    pub fn count(&mut self, counter: u64, by: u32) {
        self.set(counter, self.get(counter).saturating_add(by));
    }

    /// Counts bytes: two registers.
    pub fn count_bytes(&mut self, counter: u64, by: u64) {
        let value = u64::from(self.get(counter)) | u64::from(self.get(counter + 4)) << 32;
        let value = value.saturating_add(by);
        self.set(counter, value as u32);
        self.set(counter + 4, (value >> 32) as u32);
    }

    /// The ring whose registers begin at `at`; `None`: it has no descriptors, or its pointers lie outside.
    pub fn ring(&self, at: u64) -> Option<Ring> {
        const DESCRIPTOR: u32 = 16;
        let base = u64::from(self.get(at) & !15) | u64::from(self.get(at + RING_HIGH)) << 32;
        let size = (self.get(at + RING_LENGTH) & 0xf_ff80) / DESCRIPTOR;
        let (head, tail) = (self.get(at + RING_HEAD) & 0xffff, self.get(at + RING_TAIL) & 0xffff);
        (size > 0 && head < size && tail < size).then_some(Ring { base, size, head, tail })
    }

    pub fn set_head(&mut self, at: u64, head: u32) {
        self.set(at + RING_HEAD, head);
    }
}

impl Card {
    pub fn new(
        model: Model,
        mac: Mac,
        kick: Event,
        endpoint: Endpoint,
        vectors: usize,
        interrupts: Arc<dyn engine::Interrupts>,
        memory: View,
    ) -> Self {
        let state = Mutex::new(State::new(model, mac));
        Card { model, mac, state, kick, endpoint, msix: Mutex::new(Msix::new(vectors)), interrupts, memory }
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn msix(&self) -> MutexGuard<'_, Msix> {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn send(&self, message: Message) {
        self.interrupts.send_msi(message.0, message.1);
    }

    /// Power-on.
    pub fn reset(&self) {
        let mut state = self.lock();
        let epoch = state.epoch;
        *state = State::new(self.model, self.mac);
        state.epoch = epoch + 1;
        self.endpoint.reset();
        self.msix().reset();
        drop(state);
        self.kick.set();
    }

    /// Tells the driver what is to be told now. Returns when there will be more.
    pub fn interrupt(&self, state: &mut State) -> Option<Instant> {
        let mut msix = self.msix();
        let messages = msix.enabled();
        let control = state.get(CTRL_EXT);
        let mask = AutoMask { by_read: control & CTRL_EXT_IAME != 0, by_vector: control & CTRL_EXT_EIAME != 0 };
        let action = state.causes.settle(messages, mask, Instant::now());
        let sent = (0..u32::BITS as u16).filter(|vector| action.vectors & 1 << vector != 0);
        let sent: Vec<Message> = sent.filter_map(|vector| msix.raise(vector)).collect();
        drop(msix);
        self.endpoint.set_interrupt(action.level, false);
        sent.into_iter().for_each(|message| self.send(message));
        action.again
    }

    /// The same, on a vCPU's thread: what has to wait is the thread's matter.
    fn interrupt_soon(&self, state: &mut State) {
        if self.interrupt(state).is_some() {
            self.kick.set();
        }
    }

    fn automatic_mask(&self, state: &State) -> bool {
        state.get(CTRL_EXT) & CTRL_EXT_IAME != 0
    }

    pub fn read(&self, offset: u64) -> u32 {
        let mut state = self.lock();
        match offset {
            CTRL_COPY => state.get(CTRL),
            STATUS => {
                let up = state.get(CTRL) & (CTRL_RESET | CTRL_PHY_RESET) == 0;
                let enabled = self.model == Model::E1000e && state.get(CTRL) & CTRL_MASTER_DISABLE == 0;
                (if up { STATUS_LINK } else { 0 }) | if enabled { STATUS_MASTER_ENABLED } else { 0 }
            }
            EECD => state.eeprom.control(),
            ICR => {
                let messages = self.msix().enabled();
                let mask = self.automatic_mask(&state);
                let value = state.causes.read(messages, mask);
                self.interrupt_soon(&mut state);
                value
            }
            ICS => state.causes.icr,
            IMS => state.causes.ims,
            IMC => 0,
            ITR => state.causes.interval(0),
            EIAC if self.model == Model::E1000e => state.causes.eiac,
            IAM if self.model == Model::E1000e => state.causes.iam,
            IVAR if self.model == Model::E1000e => state.causes.ivar,
            EITR..0xfc if self.model == Model::E1000e => state.causes.interval(((offset - EITR) / 4) as usize),
            STATISTICS..STATISTICS_END => {
                let value = state.get(offset);
                state.set(offset, 0);
                value
            }
            // The semaphore is free when it is asked for.
            SWSM => {
                let value = state.get(offset);
                state.set(offset, value | 1);
                value
            }
            _ => state.get(offset),
        }
    }

    pub fn write(&self, offset: u64, value: u32) {
        let mut state = self.lock();
        match offset {
            CTRL | CTRL_COPY => self.control(&mut state, value),
            CTRL_EXT => {
                if value & CTRL_EXT_EE_RESET != 0 {
                    state.set(CTRL_EXT, 0);
                } else {
                    state.set(CTRL_EXT, value);
                }
            }
            STATUS | STATISTICS..STATISTICS_END => {}
            EECD => state.eeprom.set_control(value),
            EERD => {
                let value = state.eeprom.read_register(value);
                state.set(EERD, value);
            }
            MDIC => {
                let (value, negotiated) = state.phy.access(value);
                state.set(MDIC, value);
                if negotiated {
                    state.causes.add(LINK_CHANGED);
                    self.interrupt_soon(&mut state);
                }
            }
            ICR | ICS | IMS | IMC => {
                match offset {
                    ICR => state.causes.clear(value),
                    ICS => state.causes.add(value),
                    IMS => state.causes.enable(value),
                    _ => state.causes.ims &= !value,
                }
                self.interrupt_soon(&mut state);
            }
            ITR => (0..1).for_each(|vector| state.causes.set_interval(vector, value)),
            EIAC if self.model == Model::E1000e => state.causes.eiac = value & 0x01f0_0000,
            IAM if self.model == Model::E1000e => state.causes.iam = value,
            IVAR if self.model == Model::E1000e => state.causes.ivar = value,
            EITR..0xfc if self.model == Model::E1000e => {
                state.causes.set_interval(((offset - EITR) / 4) as usize, value);
            }
            _ => {
                state.set(offset, value);
                let ring = |base: u64| offset == base + RING_TAIL;
                if ring(RX_RING) || TX_RINGS.into_iter().any(ring) || matches!(offset, RCTL | TCTL) {
                    self.kick.set();
                }
            }
        }
    }

    fn control(&self, state: &mut State, value: u32) {
        if value & CTRL_RESET != 0 {
            state.reset(self.model, self.mac);
            self.interrupt_soon(state);
            return self.kick.set();
        }
        let before = state.get(CTRL);
        state.set(CTRL, value & !CTRL_RESET);
        let comes_up = before & CTRL_LINK_UP == 0 && value & CTRL_LINK_UP != 0;
        let phy_returns = before & CTRL_PHY_RESET != 0 && value & CTRL_PHY_RESET == 0;
        if phy_returns {
            state.phy = Phy::new(self.model);
        }
        if comes_up || phy_returns {
            state.causes.add(LINK_CHANGED);
            self.interrupt_soon(state);
        }
    }
}
