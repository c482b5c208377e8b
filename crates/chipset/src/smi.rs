//! System-management interrupts (Intel ICH9 datasheet 13.7.2, 13.8.3.12, 13.8.3.13): which are enabled, the APM ports by
//! which software asks for one, and what firmware can negotiate about them (QEMU `docs/specs/smi_ich9` items of fw_cfg).
//!
//! A write to the APM control port interrupts, where SMI_EN says so: all processors if firmware has asked for that by
//! fw_cfg, else the one that wrote, which is what firmware for virtual machines expects. Other causes never occur.
//!
//! Where processors have no system-management mode, SMI_EN says that the SMI of the APM port is set up already, which
//! firmware takes for "leave it alone".

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine::Interrupts;

use crate::Device;
use crate::fw_cfg::{Content, Item, Name, Register};

/// SMI_EN: SMIs in general, that of the APM port.
pub const GLOBAL_ENABLE: u32 = 1 << 0;
pub const APM_ENABLE: u32 = 1 << 5;
/// The release of a global lock: write-only, and there is nobody to release it to.
const BIOS_RELEASE: u32 = 1 << 7;
/// What can be changed where there is no system-management mode.
const WITHOUT_MODE: u32 = !(APM_ENABLE | BIOS_RELEASE | 1 << 6);
/// SMI_STS: the APM port was written.
const APM_STATUS: u32 = 1 << 5;

/// What can be negotiated: an SMI goes to all processors.
const BROADCAST: u64 = 1 << 0;
const SUPPORTED: u64 = BROADCAST;

#[derive(Default)]
struct State {
    enable: u32,
    status: u32,
    /// GLOBAL_ENABLE stays as it is until a reset.
    locked: bool,
    /// APM control and status.
    apm: [u8; 2],
    /// What firmware wants, and what was agreed on.
    requested: [u8; 8],
    agreed: Option<u64>,
}

/// The registers. As a [`Device`]: the APM ports.
pub struct Smi {
    /// How SMIs reach processors that have the mode.
    interrupts: Option<Arc<dyn Interrupts>>,
    state: Mutex<State>,
}

impl Smi {
    /// `interrupts`: how SMIs reach the processors, if they have system-management mode.
    pub fn new(interrupts: Option<Arc<dyn Interrupts>>) -> Arc<Self> {
        let smi = Smi { interrupts, state: Mutex::default() };
        smi.reset();
        Arc::new(smi)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether processors have the mode.
    pub fn exists(&self) -> bool {
        self.interrupts.is_some()
    }

    /// SMI_EN and SMI_STS.
    pub fn registers(&self) -> [u8; 8] {
        let state = self.lock();
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&state.enable.to_le_bytes());
        bytes[4..].copy_from_slice(&state.status.to_le_bytes());
        bytes
    }

    /// Writes byte `index` of the two registers.
    pub fn write_register(&self, index: usize, byte: u8) {
        let mut state = self.lock();
        let shift = 8 * (index % 4) as u32;
        let (value, byte_mask) = (u32::from(byte) << shift, 0xff << shift);
        if index >= 4 {
            state.status &= !value;
            return;
        }
        let allowed = if self.exists() { !BIOS_RELEASE } else { WITHOUT_MODE };
        let mask = byte_mask & allowed & if state.locked { !GLOBAL_ENABLE } else { u32::MAX };
        state.enable = state.enable & !mask | value & mask;
    }

    /// SMI_LOCK of GEN_PMCON_1: whether SMIs are enabled can't be changed any more.
    pub fn lock_enable(&self) {
        self.lock().locked = true;
    }

    /// The items of fw_cfg by which firmware negotiates.
    pub fn items(self: &Arc<Self>) -> Vec<Item> {
        if !self.exists() {
            return Vec::new();
        }
        let register = |name: &str, register: Arc<dyn Register>| {
            let name = Name::File(name.into());
            Item { name, content: Content::Register(register) }
        };
        vec![
            Item::file("etc/smi/supported-features", SUPPORTED.to_le_bytes()),
            register("etc/smi/requested-features", Arc::new(Requested(self.clone()))),
            register("etc/smi/features-ok", Arc::new(Agreed(self.clone()))),
        ]
    }

    /// The APM control port was written.
    fn trigger(&self) {
        let mut state = self.lock();
        if state.enable & APM_ENABLE == 0 {
            return;
        }
        state.status |= APM_STATUS;
        let all = state.agreed.is_some_and(|features| features & BROADCAST != 0);
        drop(state);
        if let Some(interrupts) = &self.interrupts {
            interrupts.send_smi(all);
        }
    }
}

impl Device for Smi {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(self.lock().apm.get(offset as usize).copied().unwrap_or(0xff));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Some(register), Some(&value)) = (self.lock().apm.get_mut(offset as usize), data.first()) {
            *register = value;
        }
        if offset == 0 {
            self.trigger();
        }
    }

    fn reset(&self) {
        *self.lock() = State { enable: if self.exists() { 0 } else { APM_ENABLE }, ..State::default() };
    }
}

/// What firmware wants: eight bytes, until there is an agreement.
struct Requested(Arc<Smi>);

impl Register for Requested {
    fn size(&self) -> u64 {
        8
    }

    fn read(&self, offset: u64) -> u8 {
        self.0.lock().requested.get(offset as usize).copied().unwrap_or(0)
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        let mut state = self.0.lock();
        state.requested.iter_mut().skip(offset as usize).zip(bytes).for_each(|(to, from)| *to = *from);
    }
}

/// Whether there is an agreement: selecting it makes one, if everything that is wanted is supported.
struct Agreed(Arc<Smi>);

impl Register for Agreed {
    fn size(&self) -> u64 {
        1
    }

    fn select(&self) {
        let mut state = self.0.lock();
        let wanted = u64::from_le_bytes(state.requested);
        if state.agreed.is_none() && wanted & !SUPPORTED == 0 {
            state.agreed = Some(wanted);
        }
    }

    fn read(&self, _offset: u64) -> u8 {
        u8::from(self.0.lock().agreed.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Recorder, poke, read, write8};

    fn smi() -> (Arc<Recorder>, Arc<Smi>) {
        let recorder = Arc::new(Recorder::default());
        (recorder.clone(), Smi::new(Some(recorder)))
    }

    fn enable(smi: &Smi) -> u32 {
        let [a, b, c, d, ..] = smi.registers();
        u32::from_le_bytes([a, b, c, d])
    }

    #[test]
    fn a_write_to_the_apm_port_interrupts_where_that_is_enabled() {
        let (recorder, smi) = smi();
        write8(&*smi, 0, 0x12);
        assert_eq!(recorder.take_smis(), []);
        smi.write_register(0, (APM_ENABLE | GLOBAL_ENABLE) as u8);
        write8(&*smi, 1, 0x34);
        assert_eq!(recorder.take_smis(), []);
        write8(&*smi, 0, 0x56);
        assert_eq!(recorder.take_smis(), [false]);
        assert_eq!((read::<1>(&*smi, 0), read::<1>(&*smi, 1)), ([0x56], [0x34]));
        assert_eq!(smi.registers()[4], APM_STATUS as u8);
        smi.write_register(4, 0xff);
        assert_eq!(smi.registers()[4..], [0; 4]);
        smi.reset();
        assert_eq!(enable(&smi), 0);
    }

    #[test]
    fn the_lock_holds_the_global_enable_until_a_reset() {
        let (_recorder, smi) = smi();
        smi.write_register(0, 0x21);
        smi.lock_enable();
        smi.write_register(0, 0);
        assert_eq!(enable(&smi), GLOBAL_ENABLE);
        smi.reset();
        smi.write_register(0, 0x20);
        assert_eq!(enable(&smi), APM_ENABLE);
    }

    #[test]
    fn firmware_that_asks_for_it_gets_smis_for_all_processors() {
        let (recorder, smi) = smi();
        smi.write_register(0, 0x21);
        let (requested, agreed) = (Requested(smi.clone()), Agreed(smi.clone()));
        requested.write(0, &6u64.to_le_bytes());
        agreed.select();
        assert_eq!(agreed.read(0), 0, "more than is supported");
        requested.write(0, &1u64.to_le_bytes());
        agreed.select();
        assert_eq!((agreed.read(0), requested.read(0)), (1, 1));
        write8(&*smi, 0, 0);
        requested.write(0, &[0; 8]);
        agreed.select();
        write8(&*smi, 0, 0);
        assert_eq!(recorder.take_smis(), [true, true], "an agreement holds");
        smi.reset();
        smi.write_register(0, 0x21);
        write8(&*smi, 0, 0);
        assert_eq!(recorder.take_smis(), [false]);
    }

    #[test]
    fn without_the_mode_the_apm_port_is_said_to_be_set_up() {
        let smi = Smi::new(None);
        assert_eq!(enable(&smi), APM_ENABLE);
        smi.write_register(0, 0);
        assert_eq!(enable(&smi), APM_ENABLE);
        assert!(smi.items().is_empty());
        write8(&*smi, 0, 1);
    }

    #[test]
    fn random_accesses_do_no_harm() {
        let (_recorder, smi) = smi();
        poke(&*smi, 2, 10_000, |random| {
            smi.write_register(random.below(8) as usize, random.draw() as u8);
        });
    }
}
