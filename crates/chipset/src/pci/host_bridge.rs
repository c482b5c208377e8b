//! The memory controller hub of a Q35, function 00.0 (Intel 3 Series Express Chipset datasheet, chapter 5): where RAM
//! ends, which of the areas below 1 MiB are RAM, and where the memory-mapped configuration space is.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use memory::{MemoryMap, Ram};

use super::bus::{Ecam, PciBus, PciFunction};
use super::config::{BarWindow, ConfigSpace, Identity};
use crate::Device;
use crate::constants::ECAM_BASE;

/// Registers.
const PCIEXBAR: usize = 0x60;
const PAM0: usize = 0x90;
const PAM_COUNT: usize = 7;
const SMRAM: usize = 0x9d;
const TOM: usize = 0xa0;
const TOUUD: usize = 0xa2;
const TOLUD: usize = 0xb0;

/// What firmware leaves in PAM0 to PAM6: all is RAM.
const ALL_RAM: [u8; PAM_COUNT] = [0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33];
/// Four bits of a PAM register: reads go to RAM, writes go to RAM.
const READ: u8 = 1 << 0;
const WRITE: u8 = 1 << 1;
const PAM_AREAS: u64 = 0xc_0000;
const PAM_AREA_SIZE: u64 = 0x4000;
const TOP_AREA: u64 = 0xf_0000;
const TOP_AREA_SIZE: u64 = 0x1_0000;

/// SMRAM: the window is RAM for all (D_OPEN), can't be opened any more (D_LCK), is on (G_SMRAME), its place.
const SMRAM_OPEN: u8 = 1 << 6;
const SMRAM_CLOSED: u8 = 1 << 5;
const SMRAM_LOCKED: u8 = 1 << 4;
const SMRAM_ON: u8 = 1 << 3;
const SMRAM_AT_A0000: u8 = 0b010;
const VIDEO: u64 = 0xa_0000;
const VIDEO_SIZE: u64 = 0x2_0000;

/// PCIEXBAR: on; 256, 128 or 64 buses.
const ECAM_ON: u64 = 1 << 0;
const ECAM_LENGTH: u64 = 3 << 1;
const ECAM_ADDRESS: u64 = 0xf_fc00_0000;
const BUS_SIZE: u64 = 1 << 20;
/// The window's number among this function's, for [`PciFunction::bar`].
const ECAM_WINDOW: usize = 6;

pub struct HostBridge {
    config: Mutex<ConfigSpace>,
    map: Arc<MemoryMap>,
    ecam: Arc<Ecam>,
}

impl HostBridge {
    /// For the machine's RAM. `firmware`: in the state after power-on, else in the one that firmware leaves.
    pub fn new(ram: &Ram, bus: Weak<PciBus>, firmware: bool) -> Arc<Self> {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x29c0,
            revision: 2,
            class: [0x06, 0x00, 0],
            subsystem_vendor: 0,
            subsystem: 0,
        });
        config.set(PCIEXBAR, &(if firmware { 0xe000_0000 } else { ECAM_BASE | ECAM_ON }).to_le_bytes());
        config.allow(PCIEXBAR, &(ECAM_ON | ECAM_LENGTH | ECAM_ADDRESS).to_le_bytes());
        config.set(PAM0, if firmware { &[0; PAM_COUNT] } else { &ALL_RAM });
        config.allow(PAM0, &ALL_RAM);
        config.set(SMRAM, &[SMRAM_AT_A0000]);
        config.allow(SMRAM, &[SMRAM_OPEN | SMRAM_CLOSED | SMRAM_LOCKED | SMRAM_ON]);
        set_memory_size(&mut config, ram.size());
        let bridge = HostBridge { config: Mutex::new(config), map: ram.map().clone(), ecam: Arc::new(Ecam::new(bus)) };
        bridge.set_areas(&mut bridge.lock());
        Arc::new(bridge)
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the memory map to what the registers say. The configuration stays locked meanwhile, so that the last write
    /// is the one that counts.
    fn set_areas(&self, config: &mut ConfigSpace) {
        let mut pam = [0; PAM_COUNT];
        config.read(PAM0 as u16, &mut pam);
        let set = |start, size, bits: u8| self.map.set_area(start, size, bits & READ != 0, bits & WRITE != 0);
        let [top, rest @ ..] = pam;
        let halves = rest.iter().flat_map(|byte| [byte & 0xf, byte >> 4]);
        for (start, bits) in (PAM_AREAS..).step_by(PAM_AREA_SIZE as usize).zip(halves) {
            set(start, PAM_AREA_SIZE, bits);
        }
        set(TOP_AREA, TOP_AREA_SIZE, top >> 4);
        let mut smram = [0];
        config.read(SMRAM as u16, &mut smram);
        let open = smram[0] & (SMRAM_OPEN | SMRAM_CLOSED | SMRAM_ON) == SMRAM_OPEN | SMRAM_ON;
        set(VIDEO, VIDEO_SIZE, if open { READ | WRITE } else { 0 });
    }

    /// Closes and locks SMRAM if software has set the lock.
    fn lock_smram(config: &mut ConfigSpace) {
        let mut smram = [0];
        config.read(SMRAM as u16, &mut smram);
        if smram[0] & SMRAM_LOCKED != 0 {
            config.write(SMRAM as u16, &[smram[0] & !SMRAM_OPEN]);
            config.forbid(SMRAM, 1);
        }
    }
}

/// TOM in units of 64 MiB, TOUUD in MiB, TOLUD in MiB from bit 4 on.
fn set_memory_size(config: &mut ConfigSpace, size: u64) {
    const MIB: u64 = 1 << 20;
    let low = size.min(ECAM_BASE);
    let top = if size > low { (1 << 32) + size - low } else { 1 << 32 };
    config.set(TOM, &((size.div_ceil(64 * MIB)).min(0x3ff) as u16).to_le_bytes());
    config.set(TOUUD, &((top / MIB).min(0xffff) as u16).to_le_bytes());
    config.set(TOLUD, &(((low / MIB) << 4) as u16).to_le_bytes());
}

impl PciFunction for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let mut config = self.lock();
        config.write(offset, data);
        Self::lock_smram(&mut config);
        self.set_areas(&mut config);
    }

    fn windows(&self) -> Vec<BarWindow> {
        let mut register = [0; 8];
        self.lock().read(PCIEXBAR as u16, &mut register);
        let value = u64::from_le_bytes(register);
        let size = match (value & ECAM_LENGTH) >> 1 {
            0 => 256 * BUS_SIZE,
            1 => 128 * BUS_SIZE,
            2 => 64 * BUS_SIZE,
            _ => return Vec::new(),
        };
        let window = BarWindow { bar: ECAM_WINDOW, io: false, address: value & ECAM_ADDRESS & !(size - 1), size };
        if value & ECAM_ON != 0 { vec![window] } else { Vec::new() }
    }

    fn bar(&self, index: usize) -> Option<Arc<dyn Device>> {
        (index == ECAM_WINDOW).then(|| self.ecam.clone() as Arc<dyn Device>)
    }

    fn reset(&self) {
        let mut config = self.lock();
        config.reset();
        config.allow(SMRAM, &[SMRAM_OPEN | SMRAM_CLOSED | SMRAM_LOCKED | SMRAM_ON]);
        self.set_areas(&mut config);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bridge(firmware: bool) -> (Ram, Arc<HostBridge>) {
        let ram = Ram::new(16 << 20).unwrap();
        let bridge = HostBridge::new(&ram, Weak::new(), firmware);
        (ram, bridge)
    }

    /// Whether reads and writes at an address go to RAM.
    fn at(ram: &Ram, address: u64) -> (bool, bool) {
        let sections = ram.map().sections();
        sections.find(address).map_or((false, false), |section| (section.read.is_some(), section.write.is_some()))
    }

    #[test]
    fn without_firmware_all_but_the_video_window_is_ram() {
        let (ram, _bridge) = bridge(false);
        let seen = [0x9_f000, 0xa_0000, 0xb_f000, 0xc_0000, 0xe_4000, 0xf_f000].map(|address| at(&ram, address).0);
        assert_eq!(seen, [true, false, false, true, true, true]);
    }

    #[test]
    fn pam_registers_turn_ram_on_for_reads_and_writes() {
        let (ram, bridge) = bridge(true);
        assert_eq!([at(&ram, 0xc_0000), at(&ram, 0xf_0000)], [(false, false); 2]);
        bridge.write_config(PAM0 as u16, &[0x20, 0x31, 0, 0]);
        assert_eq!(at(&ram, 0xf_0000), (false, true));
        assert_eq!([at(&ram, 0xc_0000), at(&ram, 0xc_4000)], [(true, false), (true, true)]);
        assert_eq!(at(&ram, 0xc_8000), (false, false));
        bridge.write_config(PAM0 as u16 + 6, &[0xff]);
        assert_eq!(
            [at(&ram, 0xe_8000), at(&ram, 0xe_c000), at(&ram, 0xe_4000)],
            [(true, true), (true, true), (false, false)]
        );
        let mut value = [0];
        bridge.read_config(PAM0 as u16 + 6, &mut value);
        assert_eq!(value, [0x33]);
        bridge.reset();
        assert_eq!(at(&ram, 0xe_8000), (false, false));
    }

    #[test]
    fn smram_opens_until_it_is_locked() {
        let (ram, bridge) = bridge(true);
        bridge.write_config(SMRAM as u16, &[SMRAM_OPEN | SMRAM_ON]);
        assert_eq!(at(&ram, 0xa_0000), (true, true));
        bridge.write_config(SMRAM as u16, &[SMRAM_OPEN | SMRAM_LOCKED | SMRAM_ON]);
        assert_eq!(at(&ram, 0xa_0000), (false, false));
        bridge.write_config(SMRAM as u16, &[SMRAM_OPEN | SMRAM_ON]);
        assert_eq!(at(&ram, 0xa_0000), (false, false));
        bridge.reset();
        bridge.write_config(SMRAM as u16, &[SMRAM_OPEN | SMRAM_ON]);
        assert_eq!(at(&ram, 0xa_0000), (true, true));
    }

    #[test]
    fn the_configuration_space_moves() {
        let (_ram, bridge) = bridge(true);
        assert_eq!(bridge.windows(), []);
        bridge.write_config(PCIEXBAR as u16, &0xd000_0005u32.to_le_bytes());
        let window = |address, size| [BarWindow { bar: ECAM_WINDOW, io: false, address, size }];
        assert_eq!(bridge.windows(), window(0xd000_0000, 64 << 20));
        bridge.write_config(PCIEXBAR as u16 + 4, &0xffff_ffffu32.to_le_bytes());
        bridge.write_config(PCIEXBAR as u16, &0xdc00_0001u32.to_le_bytes());
        assert_eq!(bridge.windows(), window(0xf_d000_0000, 256 << 20));
        bridge.write_config(PCIEXBAR as u16, &0xd000_0007u32.to_le_bytes());
        assert_eq!(bridge.windows(), []);
    }
}
