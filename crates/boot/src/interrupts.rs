//! What answers BIOS interrupts where no firmware has run: that there is nothing.
//!
//! Kernels that are handed over in protected mode may still ask a BIOS on their way (Xen goes back to real mode to ask
//! for memory, disks and screens), and take "unsupported" for an answer. Vectors of zeros would have them run through
//! low memory instead.

use memory::View;

use crate::Error;

const SEGMENT: u16 = 0xf000;
/// IRET, at the place where PCs have it since 1981.
const DUMMY: (u16, &[u8]) = (0xff53, &[0xcf]);
/// Sets the caller's CF and AH = 86h, unsupported.
const UNSUPPORTED: (u16, &[u8]) = (
    0xff60,
    &[
        0x55, // push bp
        0x89, 0xe5, // mov bp, sp
        0x80, 0x4e, 0x06, 0x01, // or byte [bp + 6], 1: FLAGS are above BP, IP and CS
        0x5d, // pop bp
        0xb4, 0x86, // mov ah, 86h
        0xcf, // iret
    ],
);
/// AX = the equipment word of the BIOS data area.
const EQUIPMENT: (u16, &[u8]) = (0xff70, &[0x1e, 0x6a, 0x40, 0x1f, 0xa1, 0x10, 0x00, 0x1f, 0xcf]);
/// AX = KiB of low memory, from the BIOS data area.
const LOW_MEMORY: (u16, &[u8]) = (0xff80, &[0x1e, 0x6a, 0x40, 0x1f, 0xa1, 0x13, 0x00, 0x1f, 0xcf]);

/// Fills the interrupt vector table of real mode.
pub fn write(view: &View) -> Result<(), Error> {
    let handlers = [DUMMY, UNSUPPORTED, EQUIPMENT, LOW_MEMORY];
    for (offset, code) in handlers {
        crate::write(view, "answers to BIOS interrupts", (u64::from(SEGMENT) << 4) + u64::from(offset), code)?;
    }
    let table: Vec<u8> =
        (0..=u8::MAX).flat_map(|vector| [handler(vector), SEGMENT]).flat_map(u16::to_le_bytes).collect();
    crate::write(view, "interrupt vectors", 0, &table)
}

fn handler(vector: u8) -> u16 {
    let (offset, _) = match vector {
        0x11 => EQUIPMENT,
        0x12 => LOW_MEMORY,
        // Disks, serial ports, the system, printers, the clock.
        0x13 | 0x14 | 0x15 | 0x17 | 0x1a => UNSUPPORTED,
        _ => DUMMY,
    };
    offset
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::Ram;
    use memory::vm_memory::{Bytes, GuestAddress};

    fn code(ram: &Ram, vector: u64, size: usize) -> Vec<u8> {
        let mut entry = [0; 4];
        ram.view().read_slice(&mut entry, GuestAddress(4 * vector)).unwrap();
        let [low, high, segment @ ..] = entry;
        let base = u64::from(u16::from_le_bytes(segment)) << 4;
        let mut bytes = vec![0; size];
        let address = GuestAddress(base + u64::from(u16::from_le_bytes([low, high])));
        ram.view().read_slice(&mut bytes, address).unwrap();
        bytes
    }

    #[test]
    fn every_bios_interrupt_returns() {
        let ram = Ram::new(16 << 20).unwrap();
        write(ram.view()).unwrap();
        for vector in 0..256 {
            let expected: &[u8] = match vector {
                0x11 => EQUIPMENT.1,
                0x12 => LOW_MEMORY.1,
                0x13 | 0x14 | 0x15 | 0x17 | 0x1a => UNSUPPORTED.1,
                _ => DUMMY.1,
            };
            assert_eq!(code(&ram, vector, expected.len()), expected, "vector {vector:#x}");
            assert_eq!(expected.last(), Some(&0xcf), "IRET");
        }
    }
}
