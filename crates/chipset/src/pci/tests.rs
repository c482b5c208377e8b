//! What system software may expect of the bus.

use std::sync::{Arc, Mutex};

use super::*;
use crate::clock::fake::FakeClock;
use crate::constants::{ECAM_BASE, PCI_CONFIG_PORT, SCI_IRQ};
use crate::power::PowerManagement;
use crate::reset::ResetControl;
use crate::testing::{Controllers, Power, Random};
use crate::timer::Timers;
use crate::{Device, DeviceBus};

/// Answers with its own number.
struct Registers(u8);

impl Device for Registers {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.0);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}

    fn reset(&self) {}
}

struct Card {
    config: Mutex<ConfigSpace>,
    number: u8,
}

impl Card {
    fn new(number: u8) -> Arc<Self> {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1000 + u16::from(number),
            revision: 0,
            class: [2, 0, 0],
            subsystem_vendor: 0,
            subsystem: 0,
        });
        config.add_bar(0, BarKind::Io, 16).unwrap();
        config.add_bar(1, BarKind::Memory32, 0x1000).unwrap();
        config.set_interrupt_pin(1);
        Arc::new(Card { config: Mutex::new(config), number })
    }
}

impl PciFunction for Card {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().unwrap().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.config.lock().unwrap().write(offset, data);
    }

    fn windows(&self) -> Vec<BarWindow> {
        self.config.lock().unwrap().windows()
    }

    fn bar(&self, _index: usize) -> Option<Arc<dyn Device>> {
        Some(Arc::new(Registers(self.number)))
    }

    fn reset(&self) {
        self.config.lock().unwrap().reset();
    }
}

struct Bench {
    memory: Arc<DeviceBus>,
    ports: Arc<DeviceBus>,
    pci: Arc<PciBus>,
    power: Arc<Power>,
    _timers: Timers,
}

impl Bench {
    fn new() -> Self {
        let (memory, ports) = (Arc::new(DeviceBus::memory()), Arc::new(DeviceBus::ports()));
        let power = Arc::new(Power::default());
        let pci = Arc::new(PciBus::new(&memory, &ports));
        let mechanism = Arc::new(ConfigPorts::new(pci.clone(), ResetControl::new(power.clone())));
        ports.insert(PCI_CONFIG_PORT.into(), 8, 0, mechanism).unwrap();
        let (all, clock) = (Controllers::default(), FakeClock::new());
        let timers = Timers::manual(clock.clone());
        let smi = crate::smi::Smi::new(None);
        let line = all.lines.connect(SCI_IRQ);
        let management = PowerManagement::new(clock, &timers, line, power.clone(), smi.clone());
        let ram = memory::Ram::new(5 << 30).unwrap();
        pci.insert(0, 0, HostBridge::new(&ram, Arc::downgrade(&pci), false, None)).unwrap();
        pci.insert(31, 0, LpcBridge::new(management, all.lines, smi, false)).unwrap();
        pci.insert(1, 0, Card::new(1)).unwrap();
        pci.insert(2, 0, Card::new(2)).unwrap();
        Bench { memory, ports, pci, power, _timers: timers }
    }

    fn port<const N: usize>(&self, port: u16) -> [u8; N] {
        let mut data = [0; N];
        self.ports.read(port.into(), &mut data);
        data
    }

    fn select(&self, device: u32, register: u32) {
        self.ports.write(0xcf8, &(0x8000_0000 | device << 11 | register).to_le_bytes());
    }

    fn get(&self, device: u64, register: u64) -> u32 {
        let mut data = [0; 4];
        self.memory.read(ECAM_BASE + (device << 15) + register, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, device: u64, register: u64, value: u32) {
        self.memory.write(ECAM_BASE + (device << 15) + register, &value.to_le_bytes());
    }

    fn at(&self, address: u64) -> u8 {
        let mut data = [0];
        self.memory.read(address, &mut data);
        data[0]
    }
}

#[test]
fn mechanism_1_reads_dwords_words_and_bytes() {
    let bench = Bench::new();
    assert_eq!(bench.port(0xcfc), [0xff; 4], "not enabled");
    bench.select(31, 0);
    assert_eq!(u32::from_le_bytes(bench.port(0xcf8)), 0x8000_f800);
    assert_eq!(u32::from_le_bytes(bench.port(0xcfc)), 0x2918_8086);
    assert_eq!(u16::from_le_bytes(bench.port(0xcfe)), 0x2918);
    assert_eq!(bench.port(0xcfd), [0x80]);
    bench.select(31, 8);
    assert_eq!(bench.port(0xcff), [0x06]);
    bench.select(7, 0);
    assert_eq!(bench.port(0xcfc), [0xff; 4]);
    bench.ports.write(0xcf8, &0x8001_0000u32.to_le_bytes());
    assert_eq!(bench.port(0xcfc), [0xff; 4], "there is only bus 0");
}

#[test]
fn the_address_register_takes_dwords_only() {
    let bench = Bench::new();
    bench.select(31, 0);
    bench.ports.write(0xcfb, &[0x01]);
    bench.ports.write(0xcf8, &[0x00]);
    assert_eq!(u32::from_le_bytes(bench.port(0xcf8)), 0x8000_f800);
    assert_eq!((bench.port(0xcf8), bench.port(0xcfa)), ([0xff], [0xff]));
}

#[test]
fn port_cf9_resets() {
    let bench = Bench::new();
    bench.ports.write(0xcf8, &0x8000_0600u32.to_le_bytes());
    assert!(bench.power.take().is_empty(), "a dword is for the address register");
    bench.ports.write(0xcf9, &[0x02]);
    assert_eq!(bench.port(0xcf9), [0x02]);
    bench.ports.write(0xcf9, &[0x06]);
    assert_eq!(bench.power.take(), ["reset"]);
}

#[test]
fn ecam_shows_the_same_functions() {
    let bench = Bench::new();
    assert_eq!(bench.get(0, 0), 0x29c0_8086);
    assert_eq!(bench.get(31, 0), 0x2918_8086);
    assert_eq!(bench.get(3, 0), u32::MAX);
    assert_eq!(bench.get(0, 0x60), 0xb000_0001);
    assert_eq!(bench.get(31, 0x40), 0x601);
    let mut wide = [0; 8];
    bench.memory.read(ECAM_BASE + (1 << 15), &mut wide);
    assert_eq!(u64::from_le_bytes(wide), 0x1001_1af4);
    assert_eq!(bench.get(0, 0x10_0000), u32::MAX, "bus 1");
    assert_eq!(bench.get(0, 0x100), 0, "no extended capabilities");
}

#[test]
fn a_moved_bar_answers_at_its_new_address_only() {
    let bench = Bench::new();
    bench.set(1, 0x14, 0xc000_0000);
    assert_eq!(bench.at(0xc000_0000), 0xff);
    bench.set(1, 0x04, 3);
    assert_eq!(bench.at(0xc000_0fff), 1);
    bench.set(1, 0x14, 0xd000_0000);
    assert_eq!((bench.at(0xc000_0000), bench.at(0xd000_0000)), (0xff, 1));
    bench.set(1, 0x10, 0xc001);
    assert_eq!((bench.port(0xc00f), bench.port(0xc010)), ([1], [0xff]));
    bench.set(1, 0x04, 2);
    assert_eq!((bench.port(0xc000), bench.at(0xd000_0000)), ([0xff], 1));
    bench.pci.reset();
    assert_eq!(bench.at(0xd000_0000), 0xff);
}

#[test]
fn a_bar_over_another_device_waits_until_that_one_moves() {
    let bench = Bench::new();
    for device in [1, 2] {
        bench.set(device, 0x14, 0xc000_0000);
        bench.set(device, 0x04, 2);
    }
    assert_eq!(bench.at(0xc000_0000), 1);
    bench.set(1, 0x14, 0xc001_0000);
    assert_eq!((bench.at(0xc000_0000), bench.at(0xc001_0000)), (2, 1));
    bench.set(2, 0x14, ECAM_BASE as u32);
    assert_eq!(bench.get(0, 0), 0x29c0_8086);
}

#[test]
fn a_slot_takes_one_function() {
    let bench = Bench::new();
    assert!(bench.pci.insert(1, 0, Card::new(3)).is_err());
    assert!(bench.pci.insert(32, 0, Card::new(3)).is_err());
    assert!(bench.pci.insert(1, 8, Card::new(3)).is_err());
    bench.pci.insert(1, 7, Card::new(3)).unwrap();
}

#[test]
fn random_accesses_do_no_harm() {
    let bench = Bench::new();
    let mut random = Random(11);
    for _ in 0..100_000 {
        let data = random.draw().to_le_bytes();
        let length = 1 << random.below(4);
        let slot = [0, 1, 2, 31][random.below(4) as usize] << 15;
        let address = ECAM_BASE + slot + random.below(0x48);
        match random.below(4) {
            0 => bench.ports.write(0xcf8 + random.below(8), &data[..length]),
            1 => bench.memory.write(address, &data[..length]),
            2 => bench.memory.read(address, &mut [0; 8][..length]),
            _ => bench.memory.read(random.draw(), &mut [0; 64]),
        }
    }
}
