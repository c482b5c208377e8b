//! The PHY behind MDIC: a gigabit link that is always up (IEEE 802.3, 22.2.4; Marvell 88E1011).

use crate::Model;

/// MDIC: data, register, address, operation, ready, error.
const WRITE: u32 = 1;
const READ: u32 = 2;
const READY: u32 = 1 << 28;
const ERROR: u32 = 1 << 30;
/// The only PHY on the wire.
const ADDRESS: u32 = 1;

/// Control register: reset and restart of the negotiation clear themselves.
const CONTROL: usize = 0;
const RESET: u16 = 1 << 15;
const RESTART: u16 = 1 << 9;
const CONTROL_AT_START: u16 = 0x1140;
/// The 82574's further pages are chosen here.
const PAGE: usize = 22;

pub struct Phy {
    registers: [u16; 32],
    model: Model,
}

impl Phy {
    pub fn new(model: Model) -> Self {
        let mut registers = [0; 32];
        let identity = match model {
            Model::E1000 => [0x0141, 0x0c20],
            Model::E1000e => [0x0141, 0x0cb1],
        };
        let values = [
            (CONTROL, CONTROL_AT_START),
            // All modes of 10 and 100 Mbit/s, negotiated, link up.
            (1, 0x796d),
            (2, identity[0]),
            (3, identity[1]),
            (4, 0x0de1),
            // The partner can do everything, and has acknowledged.
            (5, 0xcde1),
            (6, 0x000f),
            (9, 0x0e00),
            // 1000 Mbit/s at both ends, both receivers work.
            (10, 0x7c00),
            (15, 0x3000),
            (16, 0x0360),
            // 1000 Mbit/s, full duplex, resolved, link up.
            (17, 0xac00),
            (20, 0x0d60),
        ];
        for (index, value) in values {
            if let Some(register) = registers.get_mut(index) {
                *register = value;
            }
        }
        Phy { registers, model }
    }

    /// An access by MDIC: what the register holds when it is done. True: the link was negotiated anew.
    pub fn access(&mut self, value: u32) -> (u32, bool) {
        let (data, index, address, operation) =
            (value as u16, (value >> 16 & 31) as usize, value >> 21 & 31, value >> 26 & 3);
        if address != ADDRESS {
            return (value | READY | ERROR, false);
        }
        let paged =
            self.model == Model::E1000e && self.registers.get(PAGE).is_some_and(|page| *page != 0) && index != PAGE;
        let Some(register) = self.registers.get_mut(index) else { return (value | READY | ERROR, false) };
        match operation {
            READ => {
                let read = if paged { 0 } else { *register };
                (value & !0xffff | u32::from(read) | READY, false)
            }
            WRITE if paged => (value | READY, false),
            WRITE => {
                let negotiates = index == CONTROL && data & (RESET | RESTART) != 0;
                match index {
                    CONTROL if data & RESET != 0 => *self = Phy::new(self.model),
                    CONTROL => *register = data & !RESTART,
                    // Advertised modes, master or slave, and the maker's controls.
                    4 | 7 | 9 | 16 | 18 | 20..=31 => *register = data,
                    _ => {}
                }
                (value | READY, negotiates)
            }
            _ => (value | READY | ERROR, false),
        }
    }
}
