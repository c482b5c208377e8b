//! The keyboard (IBM PS/2 keyboard technical reference, "Commands from the system", and its scan code sets).

use std::collections::VecDeque;

use super::codes::{self, ALTS, CONTROLS, PAUSE, PRINT_SCREEN, SHIFTS};
use super::{ACKNOWLEDGE, PASSED, RESEND};

/// What a keyboard of its kind keeps of the keys that nobody has asked for.
const BUFFER: usize = 16;
/// In the place of what there was no room for, in set 1 and in the others.
const OVERRUN: [u8; 2] = [0xff, 0x00];
const BREAK: u8 = 0xf0;
const EXTENDED: u8 = 0xe0;

/// Commands that take a byte more.
const SET_LIGHTS: u8 = 0xed;
const SET_CODES: u8 = 0xf0;
const SET_RATE: u8 = 0xf3;
const KEY_COMMANDS: std::ops::RangeInclusive<u8> = 0xfb..=0xfd;

/// 10.9 characters a second after half a second (IBM PS/2 keyboard technical reference, command 0xf3).
const DEFAULT_RATE: u8 = 0x2b;
const MILLISECOND: u64 = 1_000_000;

/// What a key of set 3 does besides a code when it goes down.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Manner {
    repeats: bool,
    breaks: bool,
}

const TYPEMATIC_AND_BREAK: Manner = Manner { repeats: true, breaks: true };
const TYPEMATIC: Manner = Manner { repeats: true, breaks: false };
const MAKE_AND_BREAK: Manner = Manner { repeats: false, breaks: true };
const MAKE: Manner = Manner { repeats: false, breaks: false };

/// In set 3, what keys do that are not told otherwise.
fn default_manner(key: u8) -> Manner {
    let holds = SHIFTS.contains(&key) || [0x1d, 0x38, 0x3a].contains(&key);
    let acts = matches!(key, 0x01 | 0x3b..=0x46 | 0x57 | 0x58 | 0x9c..=0x9d | 0xb8 | 0xc6..=0xc7 | 0xc9 | 0xcf..=0xd2);
    match (holds, acts) {
        (true, _) => MAKE_AND_BREAK,
        (_, true) => MAKE,
        _ => TYPEMATIC,
    }
}

pub struct Keyboard {
    set: u8,
    enabled: bool,
    lights: u8,
    rate: u8,
    /// The command that waits for its byte.
    pending: Option<u8>,
    /// Go before keys.
    answers: VecDeque<u8>,
    keys: VecDeque<u8>,
    last_sent: u8,
    /// A bit for each key that is down.
    down: [bool; 256],
    /// The key that repeats: it went down last.
    repeating: Option<u8>,
    /// For set 3.
    manners: [Manner; 256],
}

impl Keyboard {
    pub fn new() -> Self {
        let mut keyboard = Keyboard {
            set: 2,
            enabled: true,
            lights: 0,
            rate: DEFAULT_RATE,
            pending: None,
            answers: VecDeque::new(),
            keys: VecDeque::new(),
            last_sent: 0,
            down: [false; 256],
            repeating: None,
            manners: [MAKE; 256],
        };
        keyboard.set_defaults();
        keyboard
    }

    fn set_defaults(&mut self) {
        self.set = 2;
        self.rate = DEFAULT_RATE;
        self.lights = 0;
        self.repeating = None;
        self.keys.clear();
        self.manners = std::array::from_fn(|key| default_manner(key as u8));
    }

    /// From bit 0 on: scroll lock, num lock, caps lock.
    pub fn lights(&self) -> u8 {
        self.lights
    }

    /// A byte from the system.
    pub fn write(&mut self, byte: u8) {
        self.answers.clear();
        match self.pending.take() {
            Some(command @ (SET_LIGHTS | SET_CODES | SET_RATE)) if byte < 0x80 => self.argument(command, byte),
            Some(command) if KEY_COMMANDS.contains(&command) && byte < 0x90 => self.key_manner(command, byte),
            _ => self.command(byte),
        }
    }

    fn command(&mut self, command: u8) {
        const ECHO: u8 = 0xee;
        match command {
            SET_LIGHTS | SET_CODES | SET_RATE | 0xfb..=0xfd => {
                self.pending = Some(command);
                self.answers.push_back(ACKNOWLEDGE);
            }
            ECHO => self.answers.push_back(ECHO),
            0xf2 => self.answers.extend([ACKNOWLEDGE, 0xab, 0x83]),
            0xf4 => {
                self.enabled = true;
                self.keys.clear();
                self.answers.push_back(ACKNOWLEDGE);
            }
            0xf5 | 0xf6 => {
                let lights = self.lights;
                self.set_defaults();
                self.lights = lights;
                self.enabled = command == 0xf6;
                self.answers.push_back(ACKNOWLEDGE);
            }
            0xf7 => self.set_manners(TYPEMATIC),
            0xf8 => self.set_manners(MAKE_AND_BREAK),
            0xf9 => self.set_manners(MAKE),
            0xfa => self.set_manners(TYPEMATIC_AND_BREAK),
            0xfe => self.answers.push_back(self.last_sent),
            0xff => {
                self.set_defaults();
                self.enabled = true;
                self.answers.extend([ACKNOWLEDGE, PASSED]);
            }
            _ => self.answers.push_back(RESEND),
        }
    }

    fn set_manners(&mut self, manner: Manner) {
        self.manners = [manner; 256];
        self.answers.push_back(ACKNOWLEDGE);
    }

    fn argument(&mut self, command: u8, byte: u8) {
        let answer: &[u8] = match (command, byte) {
            (SET_LIGHTS, _) => {
                self.lights = byte & 7;
                &[ACKNOWLEDGE]
            }
            (SET_RATE, _) => {
                self.rate = byte;
                &[ACKNOWLEDGE]
            }
            (SET_CODES, 0) => {
                self.answers.extend([ACKNOWLEDGE, self.set]);
                return;
            }
            (SET_CODES, 1..=3) => {
                self.set = byte;
                self.keys.clear();
                &[ACKNOWLEDGE]
            }
            _ => &[RESEND],
        };
        self.answers.extend(answer);
    }

    /// Commands 0xfb to 0xfd: a key, named by its code of set 3, repeats only, breaks, or does neither.
    fn key_manner(&mut self, command: u8, code: u8) {
        let manner = [TYPEMATIC, MAKE_AND_BREAK, MAKE][usize::from(command - KEY_COMMANDS.start()).min(2)];
        if let Some(key) = (0..=0xff).find(|key| codes::set_3(*key) == Some(code)) {
            self.manners[usize::from(key)] = manner;
        }
        // More keys may follow.
        self.pending = Some(command);
        self.answers.push_back(ACKNOWLEDGE);
    }

    /// A key goes down or comes up. Saying the same twice changes nothing.
    pub fn key(&mut self, key: u8, down: bool) {
        let was_down = std::mem::replace(&mut self.down[usize::from(key)], down);
        if was_down == down {
            return;
        }
        if down {
            self.repeating = Some(key).filter(|_| self.enabled && key != PAUSE && self.manner(key).repeats);
        } else if self.repeating == Some(key) {
            self.repeating = None;
        }
        self.send(key, down);
    }

    /// The key that is held down repeats.
    pub fn repeat(&mut self) {
        // A system that doesn't read would find nothing but repetitions.
        if let Some(key) = self.repeating.filter(|_| self.keys.is_empty()) {
            self.send(key, true);
        }
    }

    fn manner(&self, key: u8) -> Manner {
        if self.set == 3 { self.manners[usize::from(key)] } else { TYPEMATIC_AND_BREAK }
    }

    fn holds(&self, keys: [u8; 2]) -> bool {
        keys.iter().any(|key| self.down[usize::from(*key)])
    }

    fn send(&mut self, key: u8, down: bool) {
        if !self.enabled {
            return;
        }
        let codes = match self.set {
            3 => self.codes_of_set_3(key, down),
            set => self.codes(set, key, down),
        };
        if self.keys.len() + codes.len() < BUFFER {
            self.keys.extend(codes);
        } else if self.keys.len() < BUFFER {
            // The last place is for saying that something is lost.
            self.keys.push_back(OVERRUN[usize::from(self.set != 1)]);
        }
    }

    /// Sets 1 and 2.
    fn codes(&self, set: u8, key: u8, down: bool) -> Vec<u8> {
        let extended = |code, down| [vec![EXTENDED], Self::plain(set, code, down)].concat();
        let control = self.holds(CONTROLS);
        match (key, down) {
            // Pause has no break code; what it sends is both.
            (PAUSE, false) => Vec::new(),
            (PAUSE, true) if control => [extended(0x46, true), extended(0x46, false)].concat(),
            (PAUSE, true) => {
                let both = |down| [vec![0xe1], Self::plain(set, 0x1d, down), Self::plain(set, 0x45, down)].concat();
                [both(true), both(false)].concat()
            }
            (PRINT_SCREEN, _) if self.holds(ALTS) => Self::plain(set, key, down),
            (PRINT_SCREEN, _) if control || self.holds(SHIFTS) => extended(0x37, down),
            // It presses a shift by itself, and lets go of it last.
            (PRINT_SCREEN, true) => [extended(0x2a, true), extended(0x37, true)].concat(),
            (PRINT_SCREEN, false) => [extended(0x37, false), extended(0x2a, false)].concat(),
            (0x80.., _) => extended(key & 0x7f, down),
            _ => Self::plain(set, key, down),
        }
    }

    /// Of a key without 0xe0.
    fn plain(set: u8, code: u8, down: bool) -> Vec<u8> {
        match (set, down) {
            (1, true) => vec![code],
            (1, false) => vec![code | 0x80],
            (_, true) => vec![codes::set_2(code)],
            (_, false) => vec![BREAK, codes::set_2(code)],
        }
    }

    fn codes_of_set_3(&self, key: u8, down: bool) -> Vec<u8> {
        match (codes::set_3(key), down) {
            (Some(code), true) => vec![code],
            (Some(code), false) if self.manner(key).breaks => vec![BREAK, code],
            _ => Vec::new(),
        }
    }

    /// The next byte for the system.
    pub fn next(&mut self) -> Option<u8> {
        let byte = self.answers.pop_front().or_else(|| self.keys.pop_front())?;
        if byte != RESEND {
            self.last_sent = byte;
        }
        Some(byte)
    }

    /// Whether the system has taken all that was typed.
    pub fn is_idle(&self) -> bool {
        self.keys.is_empty()
    }

    /// Nanoseconds until a key that is held down repeats, for the first time and after that; `None`: none does.
    pub fn repetition(&self) -> Option<[u64; 2]> {
        self.repeating?;
        let delay = (u64::from(self.rate >> 5 & 3) + 1) * 250 * MILLISECOND;
        // (8 + A) * 2^B * 4.17 ms.
        let period = (8 + u64::from(self.rate & 7)) * (1 << (self.rate >> 3 & 3)) * 4_170_000;
        Some([delay, period])
    }
}
