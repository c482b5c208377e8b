//! A device by which test programs move interrupt lines, as no device of a real PC lets them: what kvm-unit-tests expect
//! of QEMU's `pc-testdev`.
//!
//! A byte written to port 2000H + n asserts interrupt line n, or, if it is 0, lets go of it. Four ports from E0H on give
//! back what was written to them, in accesses of any width, as do 64 KiB of device memory at FF000000H.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::Device;
use crate::constants::IOAPIC_PINS;
use crate::irq::{InterruptLine, Lines};

const LATCH_PORT: u16 = 0xe0;
const LATCH_SIZE: u16 = 4;
const LINES_PORT: u16 = 0x2000;
/// Offset of the first line's port.
const LINES: u64 = 0x10;
pub const MEMORY_BASE: u64 = 0xff00_0000;
pub const MEMORY_SIZE: u64 = 0x1_0000;

/// The ports.
pub struct TestDevice {
    lines: Vec<InterruptLine>,
    latch: AtomicU32,
}

impl TestDevice {
    /// First port, number of ports, the device's offset of the first.
    pub const PORTS: [(u16, u16, u64); 2] = [(LATCH_PORT, LATCH_SIZE, 0), (LINES_PORT, IOAPIC_PINS as u16, LINES)];

    pub fn new(lines: &Arc<Lines>) -> Self {
        TestDevice { lines: (0..IOAPIC_PINS as u8).map(|n| lines.connect(n)).collect(), latch: AtomicU32::new(0) }
    }

    fn line(&self, offset: u64) -> Option<&InterruptLine> {
        self.lines.get(usize::try_from(offset.checked_sub(LINES)?).ok()?)
    }
}

impl Device for TestDevice {
    fn width(&self) -> usize {
        4
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let latch = self.latch.load(Ordering::Relaxed).to_le_bytes();
        let bytes = latch.iter().skip(offset as usize).chain(std::iter::repeat(&0));
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(line) = self.line(offset) {
            return line.set(data.first().is_some_and(|byte| *byte != 0));
        }
        let mut latch = self.latch.load(Ordering::Relaxed).to_le_bytes();
        latch.iter_mut().skip(offset as usize).zip(data).for_each(|(to, from)| *to = *from);
        self.latch.store(u32::from_le_bytes(latch), Ordering::Relaxed);
    }

    fn reset(&self) {
        self.lines.iter().for_each(InterruptLine::lower);
        self.latch.store(0, Ordering::Relaxed);
    }
}

/// The device memory.
pub struct TestMemory(Mutex<Box<[u8]>>);

impl Default for TestMemory {
    fn default() -> Self {
        TestMemory(Mutex::new(vec![0; MEMORY_SIZE as usize].into()))
    }
}

impl Device for TestMemory {
    fn width(&self) -> usize {
        8
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        data.iter_mut().zip(memory.iter().skip(offset as usize)).for_each(|(to, from)| *to = *from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        memory.iter_mut().skip(offset as usize).zip(data).for_each(|(to, from)| *to = *from);
    }

    fn reset(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Controllers, read, write8};

    #[test]
    fn a_write_asserts_the_line_of_its_port() {
        let all = Controllers::default();
        let device = TestDevice::new(&all.lines);
        write8(&device, LINES + 11, 1);
        assert_eq!(all.requests(), 1 << 11);
        write8(&device, LINES + 11, 0);
        assert_eq!(all.requests(), 0);
        write8(&device, LINES + 23, 1);
        device.reset();
        assert!(!all.lines.asserted(23));
    }

    #[test]
    fn the_device_memory_keeps_what_is_written() {
        let memory = TestMemory::default();
        memory.write(0xfffc, &[1, 2, 3, 4, 5]);
        assert_eq!(read::<2>(&memory, 0xfffe), [3, 4]);
        memory.reset();
        assert_eq!(read::<4>(&memory, 0xfffc), [0; 4]);
    }

    #[test]
    fn what_is_written_to_the_latch_is_read_in_parts() {
        let device = TestDevice::new(&Controllers::default().lines);
        device.write(0, &0x1234_5678u32.to_le_bytes());
        device.write(1, &[0xaa]);
        assert_eq!(u32::from_le_bytes(read(&device, 0)), 0x1234_aa78);
        assert_eq!(read::<1>(&device, 3), [0x12]);
    }
}
