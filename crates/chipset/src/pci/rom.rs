//! Expansion ROMs (PCI local bus 3.0, 6.3): code by which firmware uses a card before its system has a driver.

use std::sync::Arc;

use super::config::ConfigSpace;
use crate::{Device, Error};

/// The least that an expansion ROM base address register can decode.
const LEAST: usize = 0x800;

/// What a card's expansion ROM holds, with zeros up to a power of two.
pub struct OptionRom(Vec<u8>);

impl OptionRom {
    /// Gives a function a ROM; none if the image is empty. Answers behind [`ROM_BAR`](super::ROM_BAR).
    pub fn add(image: &[u8], config: &mut ConfigSpace) -> Result<Option<Arc<Self>>, Error> {
        if image.is_empty() {
            return Ok(None);
        }
        let size = image.len().checked_next_power_of_two().unwrap_or(usize::MAX).max(LEAST);
        // Before there is a copy: what is too large is refused here.
        config.add_rom(size as u64)?;
        let mut image = image.to_vec();
        image.resize(size, 0);
        Ok(Some(Arc::new(OptionRom(image))))
    }
}

impl Device for OptionRom {
    fn width(&self) -> usize {
        64
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        data.iter_mut().zip(self.0.iter().skip(offset as usize)).for_each(|(to, from)| *to = *from);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}

    fn reset(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{Identity, ROM_BAR};

    #[test]
    fn a_rom_reads_as_its_image_and_zeros_up_to_a_power_of_two() {
        let identity =
            Identity { vendor: 1, device: 2, revision: 0, class: [2, 0, 0], subsystem_vendor: 0, subsystem: 0 };
        let mut config = ConfigSpace::new(identity);
        assert!(OptionRom::add(&[], &mut config).unwrap().is_none());
        assert!(OptionRom::add(&vec![0; (16 << 20) + 1], &mut config).is_err());
        let rom = OptionRom::add(&[0x55; 0x900], &mut config).unwrap().unwrap();
        config.write(0x30, &0xfeb0_0001u32.to_le_bytes());
        config.write(4, &[2, 0]);
        assert_eq!(
            config.windows().iter().map(|window| (window.bar, window.size)).collect::<Vec<_>>(),
            [(ROM_BAR, 0x1000)]
        );
        let mut data = [1; 4];
        rom.read(0x8fe, &mut data);
        assert_eq!(data, [0x55, 0x55, 0, 0]);
        rom.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
