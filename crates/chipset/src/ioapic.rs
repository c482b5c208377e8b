//! The I/O APIC: an 82093AA with 24 inputs and the EOI register of its successors (version 0x20).
//!
//! Data flow: [`IoApic::set_line`] changes an input; if its redirection entry lets it, a message goes to the local APICs
//! ([`engine::Interrupts::send_msi`]). A level-triggered entry then waits, with its remote IRR set, until a
//! local APIC's end of interrupt comes back ([`IoApic::end_of_interrupt`]), and sends again if the input is still
//! asserted.
//!
//! Inputs are what devices mean by *asserted*: the polarity bit of an entry is stored but changes nothing, because
//! nobody could tell an inverted wire from one that is not.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Device;
use crate::constants::{IOAPIC_ID, IOAPIC_PINS};

/// Registers in memory (82093AA datasheet 3.1; the EOI register is Intel ICH9 13.5.1.5).
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

/// Registers behind the window (82093AA datasheet 3.2).
const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const FIRST_ENTRY: u8 = 0x10;

const VERSION_VALUE: u32 = 0x20 | (IOAPIC_PINS as u32 - 1) << 16;

/// Bits of a redirection entry (82093AA datasheet 3.2.4).
const DELIVERY_MODE: u64 = 7 << 8;
const LOWEST_PRIORITY: u64 = 1 << 8;
const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const DESTINATION_SHIFT: u32 = 56;
const WRITABLE: u64 = 0xff00_0000_0001_afff;

struct State {
    select: u8,
    id: u8,
    lines: u32,
    entries: [u64; IOAPIC_PINS],
}

impl State {
    fn new() -> Self {
        State { select: 0, id: IOAPIC_ID, lines: 0, entries: [MASKED; IOAPIC_PINS] }
    }

    fn read_window(&self) -> u32 {
        match self.select {
            ID | ARBITRATION => u32::from(self.id) << 24,
            VERSION => VERSION_VALUE,
            _ => match self.selected_entry() {
                Some((pin, high)) => (self.entries[pin] >> if high { 32 } else { 0 }) as u32,
                None => 0,
            },
        }
    }

    /// The entry that the select register names, and whether it is the high half.
    fn selected_entry(&self) -> Option<(usize, bool)> {
        let index = self.select.checked_sub(FIRST_ENTRY)?;
        let pin = usize::from(index / 2);
        (pin < IOAPIC_PINS).then_some((pin, index % 2 == 1))
    }

    fn asserted(&self, pin: usize) -> bool {
        self.lines & (1 << pin) != 0
    }
}

/// As a [`Device`]: its page in memory.
pub struct IoApic {
    state: Mutex<State>,
    interrupts: Arc<dyn engine::Interrupts>,
}

impl IoApic {
    pub fn new(interrupts: Arc<dyn engine::Interrupts>) -> Self {
        IoApic { state: Mutex::new(State::new()), interrupts }
    }

    /// Asserts an input or lets go of it.
    pub fn set_line(&self, pin: u8, asserted: bool) {
        let pin = usize::from(pin);
        if pin >= IOAPIC_PINS {
            return;
        }
        let mut state = self.lock();
        let before = state.asserted(pin);
        state.lines = state.lines & !(1 << pin) | u32::from(asserted) << pin;
        if asserted && !before {
            // An edge at a masked input is lost (82093AA datasheet 3.2.4, bit 16).
            self.deliver(&mut state, pin);
        }
    }

    /// A local APIC has ended a level-triggered interrupt.
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut state = self.lock();
        for pin in 0..IOAPIC_PINS {
            let entry = state.entries[pin];
            if entry & REMOTE_IRR != 0 && entry as u8 == vector {
                state.entries[pin] &= !REMOTE_IRR;
                self.deliver_level(&mut state, pin);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deliver_level(&self, state: &mut State, pin: usize) {
        if state.entries[pin] & LEVEL != 0 && state.asserted(pin) {
            self.deliver(state, pin);
        }
    }

    fn deliver(&self, state: &mut State, pin: usize) {
        let entry = state.entries[pin];
        if entry & (MASKED | REMOTE_IRR) != 0 {
            return;
        }
        if entry & LEVEL != 0 {
            state.entries[pin] |= REMOTE_IRR;
        }
        let (address, data) = message(entry);
        self.interrupts.send_msi(address, data);
    }

    fn write_window(&self, state: &mut State, value: u32) {
        if state.select == ID {
            state.id = (value >> 24) as u8 & 0x0f;
        }
        let Some((pin, high)) = state.selected_entry() else { return };
        let old = state.entries[pin];
        let half: u64 = if high { 0xffff_ffff << 32 } else { 0xffff_ffff };
        let value = if high { u64::from(value) << 32 } else { u64::from(value) };
        let change = half & WRITABLE;
        let mut entry = old & !change | value & change;
        if entry & LEVEL == 0 {
            // Remote IRR means nothing for edges; software clears it by way of this.
            entry &= !REMOTE_IRR;
        }
        state.entries[pin] = entry;
        self.deliver_level(state, pin);
    }
}

/// The message for a redirection entry (Intel SDM 3A 10.11.1, 10.11.2).
fn message(entry: u64) -> (u64, u32) {
    let redirection_hint = if entry & DELIVERY_MODE == LOWEST_PRIORITY { 1 << 3 } else { 0 };
    let destination_mode = if entry & LOGICAL != 0 { 1 << 2 } else { 0 };
    let address = 0xfee0_0000 | (entry >> DESTINATION_SHIFT) << 12 | redirection_hint | destination_mode;
    const ASSERT: u64 = 1 << 14;
    let data = entry & (0xff | DELIVERY_MODE | LEVEL) | ASSERT;
    (address, data as u32)
}

impl Device for IoApic {
    fn width(&self) -> usize {
        4
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let value = match offset & !3 {
            SELECT => u32::from(state.select),
            WINDOW => state.read_window(),
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        data.iter_mut().zip(bytes.iter().skip(offset as usize & 3)).for_each(|(to, from)| *to = *from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        match (offset, data) {
            (SELECT, &[select, ..]) => state.select = select,
            // The window takes whole registers only (82093AA datasheet 3.1.2).
            (WINDOW, &[a, b, c, d]) => self.write_window(&mut state, u32::from_le_bytes([a, b, c, d])),
            (EOI, &[vector, ..]) => {
                drop(state);
                self.end_of_interrupt(vector);
            }
            _ => {}
        }
    }

    fn reset(&self) {
        let mut state = self.lock();
        // Inputs are what the devices make them, not state of the chip.
        *state = State { lines: state.lines, ..State::new() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Recorder, poke, read};

    fn io_apic() -> (IoApic, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        (IoApic::new(recorder.clone()), recorder)
    }

    fn write_register(apic: &IoApic, register: u8, value: u32) {
        apic.write(SELECT, &[register]);
        apic.write(WINDOW, &value.to_le_bytes());
    }

    fn read_register(apic: &IoApic, register: u8) -> u32 {
        apic.write(SELECT, &[register]);
        u32::from_le_bytes(read(apic, WINDOW))
    }

    fn set_entry(apic: &IoApic, pin: u8, entry: u64) {
        write_register(apic, 0x11 + 2 * pin, (entry >> 32) as u32);
        write_register(apic, 0x10 + 2 * pin, entry as u32);
    }

    #[test]
    fn it_says_what_it_is() {
        let (apic, _) = io_apic();
        assert_eq!(read_register(&apic, VERSION), 0x0017_0020);
        for pin in 0..24 {
            assert_eq!(read_register(&apic, 0x10 + 2 * pin), 0x1_0000);
        }
        write_register(&apic, ID, 0xffff_ffff);
        assert_eq!(read_register(&apic, ID), 0x0f00_0000);
        assert_eq!(read_register(&apic, 0x40), 0);
    }

    #[test]
    fn an_edge_sends_one_message() {
        let (apic, recorder) = io_apic();
        set_entry(&apic, 4, 0x0300_0000_0000_0034);
        apic.set_line(4, true);
        apic.set_line(4, true);
        assert_eq!(recorder.take(), [(0xfee0_3000, 0x4034)]);
        apic.set_line(4, false);
        apic.set_line(4, true);
        assert_eq!(recorder.take().len(), 1);
    }

    #[test]
    fn an_edge_at_a_masked_input_is_lost() {
        let (apic, recorder) = io_apic();
        set_entry(&apic, 4, MASKED | 0x34);
        apic.set_line(4, true);
        set_entry(&apic, 4, 0x34);
        assert_eq!(recorder.take(), []);
    }

    #[test]
    fn a_level_is_sent_again_only_after_its_end_of_interrupt() {
        let (apic, recorder) = io_apic();
        set_entry(&apic, 17, LEVEL | 0x51);
        apic.set_line(17, true);
        assert_eq!(recorder.take(), [(0xfee0_0000, 0xc051)]);
        assert_ne!(read_register(&apic, 0x10 + 34) & REMOTE_IRR as u32, 0);
        apic.set_line(17, false);
        apic.set_line(17, true);
        apic.end_of_interrupt(0x50);
        assert_eq!(recorder.take(), []);
        apic.end_of_interrupt(0x51);
        assert_eq!(recorder.take().len(), 1);
        apic.set_line(17, false);
        apic.write(EOI, &0x51u32.to_le_bytes());
        assert_eq!(recorder.take(), []);
        assert_eq!(read_register(&apic, 0x10 + 34) & REMOTE_IRR as u32, 0);
    }

    #[test]
    fn a_level_behind_the_mask_is_sent_when_unmasked() {
        let (apic, recorder) = io_apic();
        set_entry(&apic, 9, MASKED | LEVEL | 0x49);
        apic.set_line(9, true);
        assert_eq!(recorder.take(), []);
        set_entry(&apic, 9, LEVEL | 0x49);
        assert_eq!(recorder.take().len(), 1);
    }

    #[test]
    fn going_through_edge_mode_clears_remote_irr() {
        let (apic, recorder) = io_apic();
        set_entry(&apic, 9, LEVEL | 0x49);
        apic.set_line(9, true);
        set_entry(&apic, 9, MASKED | 0x49);
        set_entry(&apic, 9, LEVEL | 0x49);
        assert_eq!(recorder.take().len(), 2);
    }

    #[test]
    fn the_message_carries_destination_and_delivery_mode() {
        let (apic, recorder) = io_apic();
        set_entry(&apic, 1, 0xff00_0000_0000_0000 | LOGICAL | LOWEST_PRIORITY | 0x61);
        apic.set_line(1, true);
        assert_eq!(recorder.take(), [(0xfeef_f00c, 0x4161)]);
    }

    #[test]
    fn read_only_bits_stay() {
        let (apic, _) = io_apic();
        set_entry(&apic, 3, u64::MAX);
        assert_eq!(read_register(&apic, 0x16), 0x0001_afff);
        assert_eq!(read_register(&apic, 0x17), 0xff00_0000);
    }

    #[test]
    fn random_accesses_do_no_harm() {
        let (apic, recorder) = io_apic();
        poke(&apic, 0x50, 200_000, |random| {
            apic.set_line(random.below(30) as u8, random.below(2) == 1);
            apic.end_of_interrupt(random.draw() as u8);
            recorder.take();
        });
        apic.reset();
        assert_eq!(read_register(&apic, 0x10), 0x1_0000);
    }
}
