//! The EEPROM: 64 words that hold the card's address and settings, and the wires by which an 82540EM's driver reads them
//! bit by bit (Microwire, as of the AT93C46).

use net::Mac;

use crate::Model;

pub const WORDS: usize = 64;
/// What all words up to the last one sum up to.
const SUM: u16 = 0xbaba;

/// EECD: clock, chip select, data in, data out, request and grant, present; after a reset the card has read it.
const CLOCK: u32 = 1 << 0;
const SELECT: u32 = 1 << 1;
const DATA_IN: u32 = 1 << 2;
const DATA_OUT: u32 = 1 << 3;
const REQUEST: u32 = 1 << 6;
const GRANT: u32 = 1 << 7;
const PRESENT: u32 = 1 << 8;
const AUTO_READ_DONE: u32 = 1 << 9;

/// The instruction READ: a start bit and its code. An instruction has those three bits and an address of six.
const READ: u16 = 0b110;
const INSTRUCTION_BITS: u32 = 9;

pub struct Eeprom {
    words: [u16; WORDS],
    model: Model,
    control: u32,
    /// Bits of the instruction so far.
    instruction: u16,
    bits: u32,
    /// The bit that is put out, counted from the first of the word that is read.
    output: Option<u32>,
}

impl Eeprom {
    pub fn new(model: Model, mac: Mac) -> Self {
        let mut words = [0xffff; WORDS];
        for (word, bytes) in words.iter_mut().zip(mac.chunks_exact(2)) {
            *word = bytes.iter().rev().fold(0, |value, byte| value << 8 | u16::from(*byte));
        }
        let mut set = |index: usize, value| {
            if let Some(word) = words.get_mut(index) {
                *word = value;
            }
        };
        // Compatibility; image version; initialization control 1; subsystem, device and vendor; control 2.
        let (subsystem, device) = match model {
            Model::E1000 => (0x001e, 0x100e),
            Model::E1000e => (0x0000, 0x10d3),
        };
        let settings = [(0x03, 0), (0x04, 0), (0x05, 0x0100), (0x0a, 0x0408), (0x0b, subsystem), (0x0c, 0x8086)];
        settings.into_iter().for_each(|(index, value)| set(index, value));
        [(0x0d, device), (0x0e, 0x8086), (0x0f, 0x0601), (0x24, 0)]
            .into_iter()
            .for_each(|(index, value)| set(index, value));
        set(WORDS - 1, 0);
        let sum = words.iter().fold(0u16, |sum, word| sum.wrapping_add(*word));
        if let Some(last) = words.last_mut() {
            *last = SUM.wrapping_sub(sum);
        }
        Eeprom { words, model, control: 0, instruction: 0, bits: 0, output: None }
    }

    pub fn word(&self, address: u32) -> u16 {
        self.words.get(address as usize).copied().unwrap_or(0xffff)
    }

    /// EERD: what software writes to start a read is answered at once. The models have their fields in other places.
    pub fn read_register(&self, value: u32) -> u32 {
        const START: u32 = 1;
        let (shift, done) = match self.model {
            Model::E1000 => (8, 1 << 4),
            Model::E1000e => (2, 1 << 1),
        };
        if value & START == 0 {
            return value;
        }
        let address = value >> shift & if shift == 8 { 0xff } else { 0x3fff };
        u32::from(self.word(address)) << 16 | address << shift | done
    }

    pub fn control(&self) -> u32 {
        let high = match self.output {
            None => true,
            Some(bit) => self.word(u32::from(self.instruction) + bit / 16) << (bit % 16) & 0x8000 != 0,
        };
        let grant = if self.control & REQUEST != 0 { GRANT } else { 0 };
        let loaded = if self.model == Model::E1000e { AUTO_READ_DONE } else { 0 };
        self.control | grant | PRESENT | loaded | if high { DATA_OUT } else { 0 }
    }

    /// Software moves the wires.
    pub fn set_control(&mut self, value: u32) {
        let before = std::mem::replace(&mut self.control, value & (CLOCK | SELECT | DATA_IN | REQUEST | 0x30));
        if self.control & SELECT == 0 {
            (self.instruction, self.bits, self.output) = (0, 0, None);
            return;
        }
        let rises = before & CLOCK == 0 && value & CLOCK != 0;
        let falls = before & CLOCK != 0 && value & CLOCK == 0;
        if rises && self.bits < INSTRUCTION_BITS {
            let bit = u16::from(value & DATA_IN != 0);
            // Zeros before the start bit are no instruction.
            if self.bits > 0 || bit == 1 {
                self.instruction = self.instruction << 1 | bit;
                self.bits += 1;
            }
        } else if falls && self.bits == INSTRUCTION_BITS {
            match self.output {
                Some(bit) => self.output = Some(bit.saturating_add(1)),
                None if self.instruction >> 6 == READ => {
                    self.instruction &= 0x3f;
                    self.output = Some(0);
                }
                // Writes are locked.
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

    #[test]
    fn words_are_read_bit_by_bit() {
        let mut eeprom = Eeprom::new(Model::E1000, MAC);
        let mut clock = |level: u32| {
            eeprom.set_control(SELECT | level);
            eeprom.set_control(SELECT | level | CLOCK);
            let out = eeprom.control() & DATA_OUT != 0;
            eeprom.set_control(SELECT | level);
            u16::from(out)
        };
        // READ, address 1.
        for bit in [1, 1, 0, 0, 0, 0, 0, 0, 1] {
            clock(bit * DATA_IN);
        }
        let word = (0..16).fold(0u16, |word, _| word << 1 | clock(0));
        assert_eq!(word, 0x1200);
    }

    #[test]
    fn all_words_sum_up() {
        for model in [Model::E1000, Model::E1000e] {
            let eeprom = Eeprom::new(model, MAC);
            assert_eq!((0..64).fold(0u16, |sum, index| sum.wrapping_add(eeprom.word(index))), SUM);
        }
        assert_eq!(Eeprom::new(Model::E1000, MAC).read_register(2 << 8 | 1), 0x5634_0210);
        assert_eq!(Eeprom::new(Model::E1000e, MAC).read_register(2 << 2 | 1), 0x5634_000a);
    }
}
