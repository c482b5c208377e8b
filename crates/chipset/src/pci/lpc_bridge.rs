//! The LPC interface of an ICH9, function 1f.0 (Intel ICH9 datasheet, chapter 13): where power management and the chipset
//! configuration registers are, and which PCI interrupts go to the 8259 pair.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::bus::PciFunction;
use super::config::{BarWindow, ConfigSpace, Identity};
use crate::Device;
use crate::constants::{PM_BASE, PM_SIZE};
use crate::irq::{Lines, PIRQS};
use crate::power::PowerManagement;
use crate::smi::Smi;

/// Registers.
const HEADER_TYPE: usize = 0x0e;
const PMBASE: usize = 0x40;
const ACPI_CNTL: usize = 0x44;
const GPIOBASE: usize = 0x48;
const GPIO_CNTL: usize = 0x4c;
const PIRQ_ROUTES: [usize; 2] = [0x60, 0x68];
const SIRQ_CNTL: usize = 0x64;
const LPC_IO_DEC: usize = 0x80;
const LPC_EN: usize = 0x82;
const GEN_DECODE: usize = 0x84;
const GEN_PMCON: usize = 0xa0;
/// GEN_PMCON_1: whether SMIs are enabled can't be changed any more, nor this.
const SMI_LOCK: u8 = 1 << 4;
const BIOS_CNTL: usize = 0xdc;
const RCBA: usize = 0xf0;

const MULTIPLE_FUNCTIONS: u8 = 0x80;
/// ACPI_CNTL: the power management registers are decoded.
const ACPI_ENABLE: u8 = 0x80;
/// PIRQ[n]_ROUT: goes nowhere; else the lower four bits name an ISA interrupt.
const NOT_ROUTED: u8 = 0x80;
/// The ISA interrupts that a PIRQ can go to (ICH9 13.1.17).
const ROUTABLE: u16 = 0b1101_1110_1111_1000;
const RCBA_ON: u32 = 1;
const RCBA_ADDRESS: u32 = 0xffff_c000;
const RCRB_SIZE: usize = 0x4000;

/// Numbers of this function's windows, for [`PciFunction::bar`].
const PM_WINDOW: usize = 6;
const RCRB_WINDOW: usize = 7;

pub struct LpcBridge {
    config: Mutex<ConfigSpace>,
    power: Arc<PowerManagement>,
    registers: Arc<ChipsetConfiguration>,
    lines: Arc<Lines>,
    smi: Arc<Smi>,
}

impl LpcBridge {
    /// `firmware`: in the state after power-on, else in the one that firmware leaves.
    pub fn new(power: Arc<PowerManagement>, lines: Arc<Lines>, smi: Arc<Smi>, firmware: bool) -> Arc<Self> {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x2918,
            revision: 2,
            class: [0x06, 0x01, 0],
            subsystem_vendor: 0,
            subsystem: 0,
        });
        config.set(HEADER_TYPE, &[MULTIPLE_FUNCTIONS]);
        config.set(PMBASE, &(u32::from(if firmware { 0 } else { PM_BASE }) | 1).to_le_bytes());
        config.allow(PMBASE, &[0x80, 0xff]);
        // The interrupt is IRQ 9, whatever is written to the lower bits.
        config.set(ACPI_CNTL, &[if firmware { 0 } else { ACPI_ENABLE }]);
        config.allow(ACPI_CNTL, &[ACPI_ENABLE]);
        // In I/O space; nothing is behind it.
        config.set(GPIOBASE, &1u32.to_le_bytes());
        config.allow(GPIOBASE, &[0x80, 0xff]);
        config.allow(GPIO_CNTL, &[0x10]);
        // No PCI interrupt goes to the 8259 pair, they all go to the I/O APIC.
        for routes in PIRQ_ROUTES {
            config.set(routes, &[NOT_ROUTED; 4]);
            config.allow(routes, &[0x8f; 4]);
        }
        config.set(SIRQ_CNTL, &[0x10]);
        config.allow(SIRQ_CNTL, &[0xff]);
        config.allow(LPC_IO_DEC, &[0x77, 0x13]);
        // Keyboard controller, COM A and COM B.
        config.set(LPC_EN, &0x0403u16.to_le_bytes());
        config.allow(LPC_EN, &0x3f0fu16.to_le_bytes());
        config.allow(GEN_DECODE, &[0xff; 16]);
        config.allow(GEN_PMCON, &[0xff, 0x07, 0xff, 0x00, 0x1f]);
        config.allow(BIOS_CNTL, &[0x1f]);
        config.allow(RCBA, &(RCBA_ADDRESS | RCBA_ON).to_le_bytes());
        Arc::new(LpcBridge { config: Mutex::new(config), power, registers: Arc::default(), lines, smi })
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn route(&self, config: &ConfigSpace) {
        let places = PIRQ_ROUTES.iter().flat_map(|base| (0..4).map(move |i| base + i));
        for (pirq, place) in (0..PIRQS).zip(places) {
            let mut value = [0];
            config.read(place as u16, &mut value);
            let irq = value[0] & 0xf;
            let routed = value[0] & NOT_ROUTED == 0 && ROUTABLE >> irq & 1 != 0;
            self.lines.route(pirq, routed.then_some(irq));
        }
    }
}

impl PciFunction for LpcBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let mut config = self.lock();
        config.write(offset, data);
        let mut management = [0];
        config.read(GEN_PMCON as u16, &mut management);
        if management[0] & SMI_LOCK != 0 {
            config.forbid_bits(GEN_PMCON, &[SMI_LOCK]);
            self.smi.lock_enable();
        }
        self.route(&config);
    }

    fn windows(&self) -> Vec<BarWindow> {
        let config = self.lock();
        let (mut base, mut control, mut rcba) = ([0; 2], [0; 1], [0; 4]);
        config.read(PMBASE as u16, &mut base);
        config.read(ACPI_CNTL as u16, &mut control);
        config.read(RCBA as u16, &mut rcba);
        let (base, rcba) = (u64::from(u16::from_le_bytes(base) & 0xff80), u32::from_le_bytes(rcba));
        let mut windows = Vec::new();
        if control[0] & ACPI_ENABLE != 0 && base != 0 {
            windows.push(BarWindow { bar: PM_WINDOW, io: true, address: base, size: PM_SIZE.into() });
        }
        if rcba & RCBA_ON != 0 {
            let address = u64::from(rcba & RCBA_ADDRESS);
            windows.push(BarWindow { bar: RCRB_WINDOW, io: false, address, size: RCRB_SIZE as u64 });
        }
        windows
    }

    fn bar(&self, index: usize) -> Option<Arc<dyn Device>> {
        match index {
            PM_WINDOW => Some(self.power.clone()),
            RCRB_WINDOW => Some(self.registers.clone()),
            _ => None,
        }
    }

    fn reset(&self) {
        let mut config = self.lock();
        config.reset();
        config.allow(GEN_PMCON, &[SMI_LOCK]);
        self.registers.reset();
        self.route(&config);
    }
}

/// The chipset configuration registers (ICH9 datasheet, chapter 10): what is written stays, and has no effect. The wiring
/// of PCI interrupts to PIRQ lines is what ACPI says.
pub struct ChipsetConfiguration {
    registers: Mutex<Box<[u8; RCRB_SIZE]>>,
}

impl Default for ChipsetConfiguration {
    fn default() -> Self {
        ChipsetConfiguration { registers: Mutex::new(Box::new([0; RCRB_SIZE])) }
    }
}

impl Device for ChipsetConfiguration {
    fn width(&self) -> usize {
        8
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        data.fill(0);
        data.iter_mut().zip(registers.iter().skip(offset as usize)).for_each(|(to, from)| *to = *from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        registers.iter_mut().skip(offset as usize).zip(data).for_each(|(to, from)| *to = *from);
    }

    fn reset(&self) {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner).fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::fake::FakeClock;
    use crate::constants::{PCI_GSI_BASE, SCI_IRQ};
    use crate::testing::{Controllers, Power};
    use crate::timer::Timers;

    struct Bench {
        all: Controllers,
        bridge: Arc<LpcBridge>,
        smi: Arc<Smi>,
        _timers: Timers,
    }

    impl Bench {
        fn new(firmware: bool) -> Self {
            let (all, clock) = (Controllers::default(), FakeClock::new());
            let timers = Timers::manual(clock.clone());
            let line = all.lines.connect(SCI_IRQ);
            let smi = Smi::new(Some(all.recorder.clone()));
            let power = PowerManagement::new(clock, &timers, line, Arc::new(Power::default()), smi.clone());
            let bridge = LpcBridge::new(power, all.lines.clone(), smi.clone(), firmware);
            Bench { all, bridge, smi, _timers: timers }
        }
    }

    #[test]
    fn power_management_is_where_software_puts_it() {
        let bench = Bench::new(true);
        assert_eq!(bench.bridge.windows(), []);
        bench.bridge.write_config(0x40, &0xb001u32.to_le_bytes());
        bench.bridge.write_config(0x44, &[0x80]);
        let window = BarWindow { bar: PM_WINDOW, io: true, address: 0xb000, size: 0x80 };
        assert_eq!(bench.bridge.windows(), [window]);
        bench.bridge.write_config(0xf0, &0xfed1_c001u32.to_le_bytes());
        let rcrb = BarWindow { bar: RCRB_WINDOW, io: false, address: 0xfed1_c000, size: 0x4000 };
        assert_eq!(bench.bridge.windows(), [window, rcrb]);
        assert_eq!(Bench::new(false).bridge.windows()[0].address, u64::from(PM_BASE));
    }

    #[test]
    fn the_smi_lock_stays_and_holds_the_enable_bit() {
        let bench = Bench::new(true);
        bench.smi.write_register(0, 1);
        bench.bridge.write_config(0xa0, &[SMI_LOCK | 1, 0]);
        bench.bridge.write_config(0xa0, &[0, 0]);
        let mut value = [0];
        bench.bridge.read_config(0xa0, &mut value);
        assert_eq!(value, [SMI_LOCK]);
        bench.smi.write_register(0, 0);
        assert_eq!(bench.smi.registers()[0], 1);
        bench.bridge.reset();
        bench.bridge.write_config(0xa0, &[SMI_LOCK]);
        bench.bridge.write_config(0xa0, &[SMI_LOCK]);
        bench.bridge.read_config(0xa0, &mut value);
        assert_eq!(value, [SMI_LOCK]);
    }

    #[test]
    fn pci_interrupts_reach_the_8259_pair_where_they_are_routed() {
        let bench = Bench::new(true);
        let (a, b) = (bench.all.lines.connect(PCI_GSI_BASE + 1), bench.all.lines.connect(PCI_GSI_BASE + 5));
        a.raise();
        assert_eq!(bench.all.requests(), 0);
        bench.bridge.write_config(0x61, &[10]);
        assert_eq!(bench.all.requests(), 1 << 10);
        bench.bridge.write_config(0x69, &[10]);
        b.raise();
        a.lower();
        assert_eq!(bench.all.requests(), 1 << 10, "b asserts it");
        bench.bridge.write_config(0x69, &[11]);
        assert_eq!(bench.all.requests(), 1 << 11);
        // IRQ 8 is the clock's.
        bench.bridge.write_config(0x69, &[8]);
        assert_eq!(bench.all.requests(), 0);
        bench.bridge.write_config(0x69, &[11]);
        bench.bridge.reset();
        assert_eq!(bench.all.requests(), 0);
    }
}
