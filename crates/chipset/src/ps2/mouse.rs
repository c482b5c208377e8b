//! The mouse: IBM's with two buttons until the driver's knocking turns it into one with a wheel, or with five buttons
//! besides (IBM PS/2 mouse technical reference; Microsoft, "Plug and Play PS/2 mouse", for the knocks).

use std::collections::VecDeque;

use super::{ACKNOWLEDGE, PASSED, RESEND};

/// Buttons, a bit each.
pub const LEFT: u8 = 1 << 0;
pub const RIGHT: u8 = 1 << 1;
pub const MIDDLE: u8 = 1 << 2;
const SIDES: u8 = 3 << 3;

/// Sample rates, set one after the other, that change what the mouse is.
const KNOCK_WHEEL: [u8; 3] = [200, 100, 80];
const KNOCK_FIVE: [u8; 3] = [200, 200, 80];
const PLAIN: u8 = 0;
const WHEEL: u8 = 3;
const FIVE: u8 = 4;

const DEFAULT_RATE: u8 = 100;
const DEFAULT_RESOLUTION: u8 = 2;
const SET_RESOLUTION: u8 = 0xe8;
const SET_RATE: u8 = 0xf3;

/// What a packet can say of a movement.
const MOST: i32 = 255;
const MOST_WHEEL: i32 = 7;
/// Changes that wait for the system to read the packets before.
const WAITING: usize = 16;

/// A movement to the right and up, of the wheel towards the user, with what buttons are down at its end.
#[derive(Clone, Copy, Default)]
struct Change {
    dx: i32,
    dy: i32,
    dz: i32,
    buttons: u8,
}

pub struct Mouse {
    kind: u8,
    rates: [u8; 3],
    resolution: u8,
    /// Movements count double.
    scaled: bool,
    remote: bool,
    wrap: bool,
    enabled: bool,
    pending: Option<u8>,
    answers: VecDeque<u8>,
    packet: VecDeque<u8>,
    changes: VecDeque<Change>,
    /// As the last packet has told.
    told: u8,
    last_sent: u8,
}

impl Mouse {
    pub fn new() -> Self {
        Mouse {
            kind: PLAIN,
            rates: [0, 0, DEFAULT_RATE],
            resolution: DEFAULT_RESOLUTION,
            scaled: false,
            remote: false,
            wrap: false,
            enabled: false,
            pending: None,
            answers: VecDeque::new(),
            packet: VecDeque::new(),
            changes: VecDeque::new(),
            told: 0,
            last_sent: 0,
        }
    }

    /// A byte from the system.
    pub fn write(&mut self, byte: u8) {
        self.answers.clear();
        if self.wrap && !matches!(byte, 0xec | 0xff) {
            return self.answers.push_back(byte);
        }
        match self.pending.take() {
            Some(SET_RATE) => {
                self.rates = [self.rates[1], self.rates[2], byte];
                match self.rates {
                    KNOCK_WHEEL => self.kind = WHEEL,
                    KNOCK_FIVE => self.kind = FIVE,
                    _ => {}
                }
                self.answers.push_back(ACKNOWLEDGE);
            }
            Some(SET_RESOLUTION) if byte > 3 => self.answers.push_back(RESEND),
            Some(_) => {
                self.resolution = byte;
                self.answers.push_back(ACKNOWLEDGE);
            }
            None => self.command(byte),
        }
    }

    fn command(&mut self, command: u8) {
        let known = matches!(command, 0xe6..=0xec | 0xee | 0xf0 | 0xf2..=0xf6 | 0xfe | 0xff);
        if !known {
            return self.answers.push_back(RESEND);
        }
        if command == 0xfe {
            return self.answers.push_back(self.last_sent);
        }
        self.packet.clear();
        self.answers.push_back(ACKNOWLEDGE);
        match command {
            0xe6 | 0xe7 => self.scaled = command == 0xe7,
            SET_RESOLUTION | SET_RATE => self.pending = Some(command),
            0xe9 => self.answers.extend(self.status()),
            0xea => {
                self.remote = false;
                self.changes.clear();
            }
            0xeb => {
                let change = self.changes.pop_front().unwrap_or(Change { buttons: self.told, ..Change::default() });
                let packet = self.pack(change);
                self.answers.extend(packet);
            }
            0xec | 0xee => self.wrap = command == 0xee,
            0xf0 => {
                self.remote = true;
                self.changes.clear();
            }
            0xf2 => self.answers.push_back(self.kind),
            0xf4 | 0xf5 => {
                self.enabled = command == 0xf4;
                self.changes.clear();
            }
            0xf6 => *self = Mouse { answers: std::mem::take(&mut self.answers), kind: self.kind, ..Mouse::new() },
            _ => {
                *self = Mouse::new();
                self.answers.extend([ACKNOWLEDGE, PASSED, PLAIN]);
            }
        }
    }

    fn status(&self) -> [u8; 3] {
        let flag = |set, bit: u8| if set { 1 << bit } else { 0 };
        let buttons =
            flag(self.told & LEFT != 0, 2) | flag(self.told & MIDDLE != 0, 1) | flag(self.told & RIGHT != 0, 0);
        let flags = flag(self.remote, 6) | flag(self.enabled, 5) | flag(self.scaled, 4);
        [flags | buttons, self.resolution, self.rates[2]]
    }

    /// The mouse moves by `dx` to the right and `dy` up, its wheel by `dz` towards the user, and `buttons` are down now.
    pub fn event(&mut self, dx: i32, dy: i32, dz: i32, buttons: u8) {
        if !self.enabled {
            return;
        }
        let full = self.changes.len() >= WAITING;
        let change = match self.changes.back_mut() {
            Some(last) if last.buttons == buttons || full => last,
            _ => {
                self.changes.push_back(Change::default());
                let Some(last) = self.changes.back_mut() else { return };
                last
            }
        };
        let add = |a: i32, b: i32| a.saturating_add(b).clamp(-0x7fff, 0x7fff);
        *change = Change { dx: add(change.dx, dx), dy: add(change.dy, dy), dz: add(change.dz, dz), buttons };
    }

    /// What a movement counts while it is sent without being asked for (IBM PS/2 mouse technical reference, "Set Scaling
    /// 2:1").
    fn scale(&self, value: i32) -> i32 {
        let doubled = match value.abs() {
            0..=1 => value.abs(),
            2 => 1,
            3 => 3,
            4 => 6,
            5 => 9,
            more => 2 * more,
        };
        if self.scaled { (doubled * value.signum()).clamp(-MOST, MOST) } else { value }
    }

    /// A packet with as much of the change as it can tell; the rest stays the next change.
    fn pack(&mut self, change: Change) -> Vec<u8> {
        let part = |value: i32, most: i32| value.clamp(-most, most);
        let (dx, dy) = (part(change.dx, MOST), part(change.dy, MOST));
        let dz = if self.kind == PLAIN { change.dz } else { part(change.dz, MOST_WHEEL) };
        let rest = Change { dx: change.dx - dx, dy: change.dy - dy, dz: change.dz - dz, buttons: change.buttons };
        if (rest.dx, rest.dy, rest.dz) != (0, 0, 0) {
            self.changes.push_front(rest);
        }
        self.told = change.buttons;
        const ALWAYS: u8 = 1 << 3;
        let sign = |value: i32, bit: u8| if value < 0 { 1 << bit } else { 0 };
        let first = change.buttons & (LEFT | RIGHT | MIDDLE) | ALWAYS | sign(dx, 4) | sign(dy, 5);
        let mut packet = vec![first, dx as u8, dy as u8];
        match self.kind {
            WHEEL => packet.push(dz as u8),
            FIVE => packet.push(dz as u8 & 0xf | (change.buttons & SIDES) << 1),
            _ => {}
        }
        packet
    }

    /// The next byte for the system.
    pub fn next(&mut self) -> Option<u8> {
        let byte = match self.answers.pop_front() {
            Some(byte) => byte,
            None => self.next_of_packet()?,
        };
        if byte != RESEND {
            self.last_sent = byte;
        }
        Some(byte)
    }

    fn next_of_packet(&mut self) -> Option<u8> {
        if self.packet.is_empty() && self.enabled && !self.remote {
            while let Some(change) = self.changes.pop_front() {
                // Of a wheel or button that this mouse doesn't have, there is nothing to tell.
                let visible = if self.kind == FIVE { 0x1f } else { LEFT | RIGHT | MIDDLE };
                let moved = (change.dx, change.dy) != (0, 0) || change.dz != 0 && self.kind != PLAIN;
                if moved || (change.buttons ^ self.told) & visible != 0 {
                    let change = Change { dx: self.scale(change.dx), dy: self.scale(change.dy), ..change };
                    self.packet = self.pack(change).into();
                    break;
                }
            }
        }
        self.packet.pop_front()
    }
}
