//! Frames that a port leaves in the driver's memory (Serial ATA 3.0, 10.5; AHCI 4.2.1).

use crate::link::{Outcome, TaskFile};

/// Types.
const REGISTER_HOST: u8 = 0x27;
const REGISTER_DEVICE: u8 = 0x34;
const SET_DEVICE_BITS: u8 = 0xa1;
const PIO_SETUP: u8 = 0x5f;

/// Where each kind is received, from PxFB on.
pub const PIO_SETUP_PLACE: u64 = 0x20;
pub const REGISTER_PLACE: u64 = 0x40;
pub const DEVICE_BITS_PLACE: u64 = 0x58;

/// Second byte: interrupt; data go to the host; the command register has been written.
const INTERRUPT: u8 = 1 << 6;
const TO_HOST: u8 = 1 << 5;
const COMMAND: u8 = 1 << 7;

/// What the driver sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromHost {
    Command(TaskFile),
    /// The device control register.
    Control(u8),
}

/// Reads a register frame from the host; `None`: it is something else.
pub fn from_host(bytes: &[u8; 20]) -> Option<FromHost> {
    let [kind, flags, command, features, l0, l1, l2, device, l3, l4, l5, high_features, c0, c1, _, control, ..] =
        *bytes;
    if kind != REGISTER_HOST {
        return None;
    }
    if flags & COMMAND == 0 {
        return Some(FromHost::Control(control));
    }
    Some(FromHost::Command(TaskFile {
        features: u16::from_le_bytes([features, high_features]),
        count: u16::from_le_bytes([c0, c1]),
        lba: u64::from_le_bytes([l0, l1, l2, l3, l4, l5, 0, 0]),
        device,
        command,
    }))
}

fn registers(kind: u8, flags: u8, outcome: &Outcome) -> [u8; 20] {
    let [l0, l1, l2, l3, l4, l5, ..] = outcome.lba.to_le_bytes();
    let [c0, c1] = outcome.count.to_le_bytes();
    let Outcome { status, error, device, .. } = *outcome;
    [kind, flags, status, error, l0, l1, l2, device, l3, l4, l5, 0, c0, c1, 0, 0, 0, 0, 0, 0]
}

/// The end of a command.
pub fn register(outcome: &Outcome, interrupt: bool) -> [u8; 20] {
    registers(REGISTER_DEVICE, if interrupt { INTERRUPT } else { 0 }, outcome)
}

/// Before a block of PIO data. `outcome` has the status while it moves, `end` is the status after it.
pub fn pio_setup(outcome: &Outcome, end: u8, count: u16, to_host: bool) -> [u8; 20] {
    let mut frame = registers(PIO_SETUP, INTERRUPT | if to_host { TO_HOST } else { 0 }, outcome);
    let [low, high] = count.to_le_bytes();
    (frame[15], frame[16], frame[17]) = (end, low, high);
    frame
}

/// The end of queued commands: a bit for each.
pub fn set_device_bits(outcome: &Outcome, ended: u32) -> [u8; 8] {
    // The bits of BSY and DRQ are not part of it.
    let [e0, e1, e2, e3] = ended.to_le_bytes();
    [SET_DEVICE_BITS, INTERRUPT, outcome.status & 0x77, outcome.error, e0, e1, e2, e3]
}
