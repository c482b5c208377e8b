//! The memory controller hub of a Q35, function 00.0 (Intel 3 Series Express Chipset datasheet, chapter 5): where RAM
//! ends, which of the areas below 1 MiB are RAM, which RAM is set apart for system-management mode, and where the
//! memory-mapped configuration space is.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use memory::map::Smram;
use memory::{MemoryMap, Ram};

use super::bus::{Ecam, PciBus, PciFunction};
use super::config::{BarWindow, ConfigSpace, Identity};
use crate::Device;
use crate::constants::ECAM_BASE;
use crate::flash::WriteLock;

/// Registers.
const PCIEXBAR: usize = 0x60;
const PAM0: usize = 0x90;
const PAM_COUNT: usize = 7;
const SMRAM: usize = 0x9d;
const ESMRAMC: usize = 0x9e;
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
// Firmware can also have RAM around the first SMBASE set apart (QEMU, `mch.smbase-smram`), for processors that are plugged in
// later. There are none, so there is no such register: firmware that finds it demands the hot-plug registers, too.

/// ESMRAMC: the window is at [`HIGH`] instead, there are no caches of its own to turn off, the size of TSEG, TSEG is on.
const ESMRAMC_HIGH: u8 = 1 << 7;
const ESMRAMC_CACHES: u8 = 0b111 << 3;
const ESMRAMC_TSEG_SIZE: u8 = 0b11 << 1;
const ESMRAMC_TSEG_ON: u8 = 1 << 0;
const HIGH: u64 = 0xfeda_0000;
/// A larger TSEG, which this family doesn't have (QEMU `docs/specs`, `mch.extended-tseg-mbytes`): firmware writes all ones and
/// reads how many MiB the reserved size stands for.
const EXTENDED_TSEG: usize = 0x50;
const EXTENDED_TSEG_QUERY: u16 = 0xffff;
const EXTENDED_TSEG_MIB: u16 = 16;
/// Where graphics memory and TSEG begin: for firmware to note, in MiB from bit 20 on. TSEG is always the end of low RAM.
const NOTES: [usize; 3] = [0xa4, 0xa8, 0xac];
const MIB: u64 = 1 << 20;

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
    /// Where RAM below 4 GiB ends.
    low_end: u64,
    /// Closed with SMRAM; none: processors have no system-management mode.
    flash: Option<Arc<WriteLock>>,
}

impl HostBridge {
    /// For the machine's RAM. `firmware`: in the state after power-on, else in the one that firmware leaves. `flash`: what is
    /// to be closed when software locks SMRAM, where processors have system-management mode.
    pub fn new(ram: &Ram, bus: Weak<PciBus>, firmware: bool, flash: Option<Arc<WriteLock>>) -> Arc<Self> {
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
        if flash.is_some() {
            config.set(ESMRAMC, &[ESMRAMC_CACHES]);
        }
        let low_end = set_memory_size(&mut config, ram.size());
        let (map, ecam) = (ram.map().clone(), Arc::new(Ecam::new(bus)));
        let bridge = HostBridge { config: Mutex::new(config), map, ecam, low_end, flash };
        bridge.allow_smram(&mut bridge.lock());
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
        set(VIDEO, VIDEO_SIZE, 0);
        self.map.set_smram(&self.smram(config));
    }

    /// What the registers set apart. That data in the window is the display's even in system-management mode (D_CLS) is
    /// not done: it would need a map for data and one for code.
    fn smram(&self, config: &ConfigSpace) -> Vec<Smram> {
        let [smram, extended] = smram_registers(config);
        let mut ranges = Vec::new();
        if smram & SMRAM_ON != 0 {
            let start = if extended & ESMRAMC_HIGH != 0 { HIGH } else { VIDEO };
            let open = smram & (SMRAM_OPEN | SMRAM_CLOSED) == SMRAM_OPEN;
            ranges.push(Smram { start, size: VIDEO_SIZE, ram: VIDEO, open });
        }
        if smram & SMRAM_ON != 0 && extended & ESMRAMC_TSEG_ON != 0 {
            let size = match (extended & ESMRAMC_TSEG_SIZE) >> 1 {
                0 => MIB,
                1 => 2 * MIB,
                2 => 8 * MIB,
                _ => u64::from(EXTENDED_TSEG_MIB) * MIB,
            };
            let start = self.low_end.saturating_sub(size);
            ranges.push(Smram { start, size, ram: start, open: false });
        }
        ranges
    }

    /// Lets software change the registers of SMRAM.
    fn allow_smram(&self, config: &mut ConfigSpace) {
        config.allow(SMRAM, &[SMRAM_OPEN | SMRAM_CLOSED | SMRAM_LOCKED | SMRAM_ON]);
        if let Some(flash) = &self.flash {
            config.allow(ESMRAMC, &[ESMRAMC_HIGH | ESMRAMC_TSEG_SIZE | ESMRAMC_TSEG_ON]);
            NOTES.into_iter().for_each(|note| config.allow(note, &0xfff0_0000u32.to_le_bytes()));
            config.allow(EXTENDED_TSEG, &[0xff; 2]);
            flash.set(false);
        }
    }

    /// Answers the question that is asked by writing.
    fn answer(&self, config: &mut ConfigSpace) {
        let mut tseg = [0; 2];
        config.read(EXTENDED_TSEG as u16, &mut tseg);
        if u16::from_le_bytes(tseg) == EXTENDED_TSEG_QUERY {
            config.write(EXTENDED_TSEG as u16, &EXTENDED_TSEG_MIB.to_le_bytes());
        }
    }

    /// Closes and locks SMRAM if software has set the lock.
    fn lock_smram(&self, config: &mut ConfigSpace) {
        let [smram, _] = smram_registers(config);
        if smram & SMRAM_LOCKED != 0 {
            config.write(SMRAM as u16, &[smram & !SMRAM_OPEN]);
            config.forbid(SMRAM, 1);
            config.forbid(ESMRAMC, 1);
            self.flash.iter().for_each(|flash| flash.set(true));
        }
    }
}

/// [`SMRAM`] and [`ESMRAMC`].
fn smram_registers(config: &ConfigSpace) -> [u8; 2] {
    let mut registers = [0; 2];
    config.read(SMRAM as u16, &mut registers);
    registers
}

/// TOM in units of 64 MiB, TOUUD in MiB, TOLUD in MiB from bit 4 on. Returns where RAM below 4 GiB ends.
fn set_memory_size(config: &mut ConfigSpace, size: u64) -> u64 {
    let low = size.min(ECAM_BASE);
    let top = if size > low { (1 << 32) + size - low } else { 1 << 32 };
    config.set(TOM, &((size.div_ceil(64 * MIB)).min(0x3ff) as u16).to_le_bytes());
    config.set(TOUUD, &((top / MIB).min(0xffff) as u16).to_le_bytes());
    config.set(TOLUD, &(((low / MIB) << 4) as u16).to_le_bytes());
    low
}

impl PciFunction for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        if self.flash.is_none() && usize::from(offset) == EXTENDED_TSEG && data == EXTENDED_TSEG_QUERY.to_le_bytes() {
            tracing::error!(
                "the firmware looks for system-management mode, which this engine lacks: use --accel translate"
            );
        }
        let mut config = self.lock();
        config.write(offset, data);
        self.answer(&mut config);
        self.lock_smram(&mut config);
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
        self.allow_smram(&mut config);
        self.set_areas(&mut config);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bridge(firmware: bool) -> (Ram, Arc<HostBridge>) {
        let ram = Ram::new(64 << 20).unwrap();
        let bridge = HostBridge::new(&ram, Weak::new(), firmware, Some(Arc::default()));
        (ram, bridge)
    }

    /// Whether RAM is at an address outside of system-management mode, and in it.
    fn smm_at(ram: &Ram, address: u64) -> (bool, bool) {
        let there = |sections: Arc<memory::Sections>| sections.find(address).is_some_and(|s| s.read.is_some());
        (there(ram.map().sections()), there(ram.map().smm_sections()))
    }

    fn config<const N: usize>(bridge: &HostBridge, offset: usize) -> [u8; N] {
        let mut value = [0; N];
        bridge.read_config(offset as u16, &mut value);
        value
    }

    #[test]
    fn tseg_is_the_top_of_low_ram_and_seen_in_system_management_mode_only() {
        let (ram, bridge) = bridge(true);
        assert_eq!(config(&bridge, ESMRAMC), [0x38]);
        bridge.write_config(EXTENDED_TSEG as u16, &[0xff, 0xff]);
        assert_eq!(config(&bridge, EXTENDED_TSEG), [16, 0]);
        for (size, mib) in [(0, 1), (1, 2), (2, 8), (3, 16)] {
            bridge.write_config(ESMRAMC as u16, &[size << 1 | ESMRAMC_TSEG_ON]);
            assert_eq!(smm_at(&ram, 64 * MIB - 1), (true, true), "G_SMRAME is off");
            bridge.write_config(SMRAM as u16, &[SMRAM_ON]);
            let start = (64 - mib) * MIB;
            let seen = [start - 1, start, 64 * MIB - 1].map(|address| smm_at(&ram, address));
            assert_eq!(seen, [(true, true), (false, true), (false, true)]);
            bridge.write_config(SMRAM as u16, &[0]);
        }
        bridge.write_config(SMRAM as u16, &[SMRAM_ON | SMRAM_LOCKED]);
        bridge.write_config(ESMRAMC as u16, &[0]);
        assert_eq!(config(&bridge, ESMRAMC), [0x3f]);
        assert_eq!(smm_at(&ram, 64 * MIB - 1), (false, true));
        bridge.reset();
        assert_eq!(smm_at(&ram, 64 * MIB - 1), (true, true));
        bridge.write_config(ESMRAMC as u16, &[ESMRAMC_TSEG_ON]);
        assert_eq!(config(&bridge, ESMRAMC), [0x39]);
    }

    #[test]
    fn the_compatible_window_can_be_moved_up() {
        let (ram, bridge) = bridge(true);
        bridge.write_config(SMRAM as u16, &[SMRAM_ON]);
        assert_eq!([smm_at(&ram, 0xa_0000), smm_at(&ram, HIGH)], [(false, true), (false, false)]);
        bridge.write_config(ESMRAMC as u16, &[ESMRAMC_HIGH]);
        assert_eq!([smm_at(&ram, 0xa_0000), smm_at(&ram, HIGH)], [(false, false), (false, true)]);
    }

    #[test]
    fn where_processors_have_no_such_mode_there_is_no_tseg() {
        let ram = Ram::new(64 << 20).unwrap();
        let bridge = HostBridge::new(&ram, Weak::new(), true, None);
        bridge.write_config(ESMRAMC as u16, &[ESMRAMC_TSEG_ON]);
        bridge.write_config(EXTENDED_TSEG as u16, &[0xff, 0xff]);
        bridge.write_config(SMRAM as u16, &[SMRAM_ON | SMRAM_LOCKED]);
        assert_eq!((config(&bridge, ESMRAMC), config(&bridge, EXTENDED_TSEG)), ([0], [0, 0]));
        assert_eq!(smm_at(&ram, 64 * MIB - 1), (true, true));
    }

    #[test]
    fn the_lock_of_smram_is_that_of_the_flash_too() {
        let (ram, lock) = (Ram::new(64 << 20).unwrap(), Arc::new(WriteLock::default()));
        let bridge = HostBridge::new(&ram, Weak::new(), true, Some(lock.clone()));
        bridge.write_config(SMRAM as u16, &[SMRAM_ON]);
        assert!(!lock.is_set());
        bridge.write_config(SMRAM as u16, &[SMRAM_ON | SMRAM_LOCKED]);
        assert!(lock.is_set());
        bridge.reset();
        assert!(!lock.is_set());
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
