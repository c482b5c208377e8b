//! The buses: which device answers at which port or address.
//!
//! A vCPU's access arrives as an address and up to 64 bytes. It is cut at the borders of devices and at the widest
//! access that each device takes in one piece, as a chipset does it for the ISA bus; where nothing answers, reads give
//! all ones and writes are dropped. Devices come and go while vCPUs run, when a guest moves a BAR.

use std::sync::{Arc, PoisonError, RwLock};

use crate::Error;

/// A device as a bus sees it: a few registers, at offsets that the registration decides.
///
/// Called concurrently from vCPU threads; each device locks for itself. `data` is never empty, never longer than
/// [`width`](Device::width), and doesn't cross a multiple of it.
pub trait Device: Send + Sync {
    /// The widest access, in bytes, that reaches the device in one piece: a power of two.
    fn width(&self) -> usize {
        1
    }
    fn read(&self, offset: u64, data: &mut [u8]);
    fn write(&self, offset: u64, data: &[u8]);
    /// [`read`](Device::read) by a processor in system-management mode, which some devices allow more than others.
    fn read_from_smm(&self, offset: u64, data: &mut [u8]) {
        self.read(offset, data);
    }
    /// The same for [`write`](Device::write).
    fn write_from_smm(&self, offset: u64, data: &[u8]) {
        self.write(offset, data);
    }
    /// Puts the device into its power-on state and lowers its interrupt lines.
    fn reset(&self);
    /// What is behind a base address register is now at this address of the memory bus, or nowhere.
    fn mapped(&self, _address: Option<u64>) {}
}

struct Range {
    first: u64,
    last: u64,
    /// The device's offset of the first address.
    offset: u64,
    device: Arc<dyn Device>,
}

/// One address space with devices in it.
pub struct DeviceBus {
    name: &'static str,
    /// The last address there is.
    limit: u64,
    /// Ascending and disjoint.
    ranges: RwLock<Vec<Range>>,
}

/// What answers at an address, and for how many bytes.
enum Target {
    Device { device: Arc<dyn Device>, offset: u64, length: usize },
    Nothing { length: usize },
}

impl DeviceBus {
    /// The 64 Ki ports.
    pub fn ports() -> Self {
        DeviceBus { name: "port", limit: 0xffff, ranges: RwLock::default() }
    }

    /// The guest-physical addresses that are not RAM.
    pub fn memory() -> Self {
        DeviceBus { name: "memory", limit: u64::MAX, ranges: RwLock::default() }
    }

    /// Lets `device` answer at `length` addresses from `first`, the first of which it sees as `offset`.
    pub fn insert(&self, first: u64, length: u64, offset: u64, device: Arc<dyn Device>) -> Result<(), Error> {
        let bad = || Error::BadRange { bus: self.name, first, length };
        let last = length.checked_sub(1).and_then(|more| first.checked_add(more)).ok_or_else(bad)?;
        if last > self.limit || offset.checked_add(length).is_none() {
            return Err(bad());
        }
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let index = ranges.partition_point(|range| range.last < first);
        if ranges.get(index).is_some_and(|next| next.first <= last) {
            return Err(Error::Occupied { bus: self.name, first, last });
        }
        ranges.insert(index, Range { first, last, offset, device });
        Ok(())
    }

    /// Takes out the device whose range begins at `first`.
    pub fn remove(&self, first: u64) {
        self.ranges.write().unwrap_or_else(PoisonError::into_inner).retain(|range| range.first != first);
    }

    pub fn read(&self, address: u64, data: &mut [u8]) {
        self.read_by(address, data, |device, offset, data| device.read(offset, data));
    }

    pub fn read_from_smm(&self, address: u64, data: &mut [u8]) {
        self.read_by(address, data, |device, offset, data| device.read_from_smm(offset, data));
    }

    fn read_by(&self, address: u64, data: &mut [u8], read: impl Fn(&dyn Device, u64, &mut [u8])) {
        let mut done = 0;
        while done < data.len() {
            let (target, rest) = (self.target(address, done, data.len()), &mut data[done..]);
            done += match target {
                Target::Device { device, offset, length } => {
                    read(&*device, offset, &mut rest[..length]);
                    length
                }
                Target::Nothing { length } => {
                    rest[..length].fill(0xff);
                    length
                }
            };
        }
    }

    pub fn write(&self, address: u64, data: &[u8]) {
        self.write_by(address, data, |device, offset, data| device.write(offset, data));
    }

    pub fn write_from_smm(&self, address: u64, data: &[u8]) {
        self.write_by(address, data, |device, offset, data| device.write_from_smm(offset, data));
    }

    fn write_by(&self, address: u64, data: &[u8], write: impl Fn(&dyn Device, u64, &[u8])) {
        let mut done = 0;
        while done < data.len() {
            done += match self.target(address, done, data.len()) {
                Target::Device { device, offset, length } => {
                    write(&*device, offset, &data[done..done + length]);
                    length
                }
                Target::Nothing { length } => length,
            };
        }
    }

    /// Who answers the next piece of an access of `total` bytes at `address`, of which `done` are done.
    fn target(&self, address: u64, done: usize, total: usize) -> Target {
        let wanted = total - done;
        let Some(address) = address.checked_add(done as u64).filter(|&a| a <= self.limit) else {
            return Target::Nothing { length: wanted };
        };
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let index = ranges.partition_point(|range| range.last < address);
        let Some(range) = ranges.get(index) else { return Target::Nothing { length: wanted } };
        if address < range.first {
            return Target::Nothing { length: shorter(wanted, range.first - address) };
        }
        let offset = range.offset + (address - range.first);
        let width = range.device.width().max(1) as u64;
        let length = shorter(shorter(wanted, range.last - address + 1), width - offset % width);
        Target::Device { device: range.device.clone(), offset, length }
    }
}

fn shorter(length: usize, bound: u64) -> usize {
    usize::try_from(bound).map_or(length, |bound| length.min(bound))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Answers with its offsets, and notes what it is asked.
    struct Echo {
        width: usize,
        log: Mutex<Vec<(u64, usize)>>,
    }

    impl Echo {
        fn new(width: usize) -> Arc<Self> {
            Arc::new(Echo { width, log: Mutex::default() })
        }
    }

    impl Device for Echo {
        fn width(&self) -> usize {
            self.width
        }

        fn read(&self, offset: u64, data: &mut [u8]) {
            self.log.lock().unwrap().push((offset, data.len()));
            data.iter_mut().zip(offset..).for_each(|(byte, offset)| *byte = offset as u8);
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.log.lock().unwrap().push((offset, data.len()));
        }

        fn reset(&self) {}
    }

    #[test]
    fn nothing_answers_with_all_ones() {
        let bus = DeviceBus::memory();
        let mut data = [0; 8];
        bus.read(u64::MAX - 2, &mut data);
        assert_eq!(data, [0xff; 8]);
        bus.write(u64::MAX, &[0; 64]);
    }

    #[test]
    fn a_wide_access_is_cut_at_devices_and_their_width() {
        let bus = DeviceBus::ports();
        let bytes = Echo::new(1);
        let dwords = Echo::new(4);
        bus.insert(0x10, 2, 0x40, bytes.clone()).unwrap();
        bus.insert(0x13, 8, 3, dwords.clone()).unwrap();
        let mut data = [0; 8];
        bus.read(0x0f, &mut data);
        assert_eq!(data, [0xff, 0x40, 0x41, 0xff, 3, 4, 5, 6]);
        assert_eq!(*bytes.log.lock().unwrap(), [(0x40, 1), (0x41, 1)]);
        assert_eq!(*dwords.log.lock().unwrap(), [(3, 1), (4, 3)]);
    }

    #[test]
    fn an_access_at_the_last_port_does_not_wrap() {
        let bus = DeviceBus::ports();
        bus.insert(0, 4, 0, Echo::new(4)).unwrap();
        let mut data = [0; 4];
        bus.read(0xffff, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn two_devices_cannot_have_one_address() {
        let bus = DeviceBus::ports();
        bus.insert(0x100, 8, 0, Echo::new(1)).unwrap();
        for (first, length) in [(0xff, 2), (0x107, 1), (0x100, 8), (0xf0, 0x100)] {
            assert!(matches!(bus.insert(first, length, 0, Echo::new(1)), Err(Error::Occupied { .. })));
        }
        assert!(matches!(bus.insert(0xffff, 2, 0, Echo::new(1)), Err(Error::BadRange { .. })));
        assert!(matches!(bus.insert(0, 0, 0, Echo::new(1)), Err(Error::BadRange { .. })));
        bus.insert(0x108, 8, 0, Echo::new(1)).unwrap();
        bus.remove(0x100);
        bus.insert(0x100, 8, 0, Echo::new(1)).unwrap();
    }
}
