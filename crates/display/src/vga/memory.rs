//! Video memory: what the guest writes on one side and the screen is made of on the other, at the same time.
//!
//! Planar memory is kept as the adapter's 32-bit data path has it: a dword for each address, plane 0 in its low byte.

use std::sync::atomic::Ordering;

use memory::vm_memory::Bytes;
use memory::{Access, DeviceMemory, Ram, Window};

use crate::Error;

/// 16 MiB: what 2560 x 1600 pixels of 32 bits need.
pub const SIZE: u64 = 16 << 20;
/// What the VGA's own modes reach: four planes of 64 KiB.
pub const LEGACY_SIZE: usize = 256 << 10;

pub struct VideoMemory {
    memory: DeviceMemory,
}

impl VideoMemory {
    pub fn new(ram: &Ram) -> Result<Self, Error> {
        Ok(VideoMemory { memory: ram.device_memory(SIZE)? })
    }

    /// All of it, for processors to reach directly.
    pub fn window(&self) -> Result<Window, Error> {
        Ok(self.memory.window(0, SIZE, Access::ReadWrite)?)
    }

    /// Whether anything has been written since the last call.
    pub fn take_dirty(&self) -> bool {
        !self.memory.take_dirty().is_empty()
    }

    /// The four planes' bytes at an address; beyond the end there is nothing.
    pub fn load(&self, dword: usize) -> u32 {
        let offset = dword.checked_mul(4);
        offset.and_then(|offset| self.memory.slice().load(offset, Ordering::Relaxed).ok()).map_or(0, u32::from_le)
    }

    pub fn store(&self, dword: usize, value: u32) {
        if let Some(offset) = dword.checked_mul(4) {
            _ = self.memory.slice().store(value.to_le(), offset, Ordering::Relaxed);
        }
    }

    /// Reads bytes as they lie; what is beyond the end reads as 0.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let there = (SIZE as usize).saturating_sub(offset).min(data.len());
        let (inside, outside) = data.split_at_mut(there);
        if !inside.is_empty() {
            _ = self.memory.slice().read_slice(inside, offset);
        }
        outside.fill(0);
    }

    pub fn write(&self, offset: usize, data: &[u8]) {
        let there = (SIZE as usize).saturating_sub(offset).min(data.len());
        if let Some(inside) = data.get(..there).filter(|inside| !inside.is_empty()) {
            _ = self.memory.slice().write_slice(inside, offset);
        }
    }

    /// Fills the first `length` bytes with zeros.
    pub fn clear(&self, length: usize) {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        let mut offset = 0;
        while offset < length.min(SIZE as usize) {
            let piece = ZEROS.get(..length - offset).unwrap_or(&ZEROS);
            self.write(offset, piece);
            offset += piece.len();
        }
    }
}
