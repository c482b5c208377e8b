//! A chipset with one device of a PC, to be driven by a driver of ill will: steps of eight bytes, each an access to one of
//! the device's ports or addresses, to the memory that it reads its rings and tables from, or something that happens around it.
//!
//! Devices have threads, and to start some for each input would take most of the time: each device is made once, and reset
//! before the next input.
#![allow(dead_code, reason = "each target takes what its devices need")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{Disk, Format, Options};
use chipset::{Chipset, ChipsetConfig, Clock, Firmware, PowerEvents};
use engine::{Bus, Interrupts};
use memory::Ram;
use memory::vm_memory::{Bytes, GuestAddress};

pub struct Nobody;

impl Interrupts for Nobody {
    fn send_msi(&self, _address: u64, _data: u32) {}
    fn set_pic_output(&self, _asserted: bool) {}
    fn send_nmi(&self, _vcpu: u32) {}
}

impl PowerEvents for Nobody {
    fn power_off(&self) {}
    fn reset(&self) {}
    fn init(&self) {}
    fn exit(&self, _value: u8) {}
}

/// Time passes when an input says so.
#[derive(Default)]
pub struct Steps(pub AtomicU64);

impl Clock for Steps {
    fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    fn utc(&self) -> u64 {
        self.now()
    }
}

pub const RAM_SIZE: u64 = 4 << 20;
/// Where inputs write: rings, tables and buffers, at the first pages from here.
const DATA: u64 = 0x1_0000;
/// The ports of PCI configuration: every device may be moved, or switched off.
pub const PCI_PORTS: (u16, u16) = (0xcf8, 8);

/// What a device answers to.
pub struct Places {
    /// First port and number.
    pub ports: Vec<(u16, u16)>,
    /// First address and size.
    pub windows: Vec<(u64, u64)>,
}

/// A device on its board.
pub struct Target {
    pub board: Board,
    pub places: Places,
    /// Puts the device into its power-on state, and then into the one in which inputs find it.
    pub reset: Box<dyn Fn(&Board)>,
    /// What happens at the device's other end.
    pub host: Box<dyn Fn(&Board, [u8; 4])>,
}

/// Gives one of several devices the fuzzer's bytes; the first of them says which.
pub fn run(makers: &[fn() -> Target], data: &[u8]) {
    thread_local! {
        static TARGETS: RefCell<BTreeMap<usize, Target>> = const { RefCell::new(BTreeMap::new()) };
    }
    let Some((&which, data)) = data.split_first() else { return };
    let which = usize::from(which) % makers.len();
    TARGETS.with_borrow_mut(|targets| {
        let target = targets.entry(which).or_insert_with(makers[which]);
        target.board.chipset.reset();
        (target.reset)(&target.board);
        target.drive(data);
    });
}

pub struct Board {
    pub chipset: Arc<Chipset>,
    pub ram: Ram,
    pub clock: Arc<Steps>,
}

impl Board {
    pub fn new(firmware: Option<Firmware>) -> Self {
        let ram = Ram::new(RAM_SIZE).expect("there is memory");
        let clock = Arc::new(Steps::default());
        let config = ChipsetConfig {
            ram: ram.clone(),
            cpus: 1,
            clock: clock.clone(),
            serial: [Some(Box::new(std::io::sink())), None, None, None],
            firmware,
            debug_console: None,
            debug_exit: None,
            smm: true,
            test_device: true,
        };
        let nobody = Arc::new(Nobody);
        let chipset = Chipset::new(config, nobody.clone(), nobody).expect("there are threads");
        Board { chipset, ram, clock }
    }

    pub fn config(&self, device: u8, function: u8, register: u8, value: u32) {
        let address = 1 << 31 | u32::from(device) << 11 | u32::from(function) << 8 | u32::from(register);
        self.chipset.pio_write(0xcf8, &address.to_le_bytes());
        self.chipset.pio_write(0xcfc, &value.to_le_bytes());
    }

    /// Gives a function's BARs addresses, and lets it decode them and access memory.
    pub fn enable(&self, device: u8, function: u8, bars: &[(u8, u64)]) {
        for &(bar, address) in bars {
            self.config(device, function, 0x10 + 4 * bar, address as u32);
        }
        self.config(device, function, 0x04, 7);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.ram.view().write_slice(data, GuestAddress(DATA + offset)).expect("it is RAM");
    }
}

impl Target {
    /// Does what an input says.
    fn drive(&self, data: &[u8]) {
        let Target { board, places, host, .. } = self;
        let chipset = &board.chipset;
        let mut waits = 0;
        for step in data.chunks(8) {
            let mut bytes = [0; 8];
            bytes[..step.len()].copy_from_slice(step);
            let [what, place, a, b, c, d, e, f] = bytes;
            let value = [a, b, c, d];
            // Some registers hold addresses: one of those that inputs write to.
            let pointer = (DATA as u32 | u32::from(a & 0xf) << 12 | u32::from(b) << 4).to_le_bytes();
            let length = [4, 1, 2, 4][usize::from(what >> 4 & 3)];
            // Where there are both, three of four accesses are to memory.
            let windowed = places.ports.is_empty() || what & 0xc0 != 0 && !places.windows.is_empty();
            let register = Register::of(places, windowed, place, [e, f]);
            match what & 0xf {
                0..5 => register.write(chipset, &value[..length]),
                5 | 6 => register.read(chipset, length),
                7 => register.write(chipset, &pointer),
                8..10 => board.write(u64::from(place & 0xf) << 12 | u64::from(e) << 2, &value[..length]),
                10 => board.write(u64::from(place & 0xf) << 12 | u64::from(e) << 2, &pointer),
                // A block of one register's data port, as by REP OUTS and REP INS.
                11 => {
                    for n in 0..=e {
                        match f & 1 {
                            0 => register.write(chipset, &[value[usize::from(n & 3)]; 4][..length]),
                            _ => register.read(chipset, length),
                        }
                    }
                }
                12 => _ = board.clock.0.fetch_add(u64::from(u32::from_le_bytes(value)), Ordering::SeqCst),
                13 => host(board, value),
                14 if waits < 8 => {
                    waits += 1;
                    std::thread::sleep(std::time::Duration::from_micros(u64::from(a)));
                }
                15 if a == 0 => chipset.reset(),
                _ => _ = chipset.acknowledge_pic(),
            }
        }
    }
}

enum Register {
    Port(u16),
    Memory(u64),
}

impl Register {
    fn of(places: &Places, windowed: bool, place: u8, [low, high]: [u8; 2]) -> Self {
        if windowed {
            let (first, size) = places.windows[usize::from(high >> 4) % places.windows.len()];
            // Most registers are double words near the beginning.
            let offset = u64::from(place) << 2 | u64::from(high & 7) << 10 | u64::from(low >> 7) << 13;
            Register::Memory(first + (offset + u64::from(low & if high & 8 != 0 { 3 } else { 0 })) % size)
        } else {
            let (first, count) = places.ports[usize::from(place >> 4) % places.ports.len()];
            Register::Port(first + (u16::from(place & 0xf) | u16::from(high & 7) << 4) % count)
        }
    }

    fn write(&self, chipset: &Chipset, data: &[u8]) {
        match *self {
            Register::Port(port) => chipset.pio_write(port, data),
            Register::Memory(address) => chipset.mmio_write(address, data),
        }
    }

    fn read(&self, chipset: &Chipset, length: usize) {
        let mut data = [0; 4];
        match *self {
            Register::Port(port) => chipset.pio_read(port, &mut data[..length]),
            Register::Memory(address) => chipset.mmio_read(address, &mut data[..length]),
        }
    }
}

/// An image of zeros, whose file is gone with the process.
pub fn image(size: u64) -> Arc<Disk> {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.as_file().set_len(size).expect("it can be made larger");
    let mut options = Options::new(file.path());
    options.format = Some(Format::Raw);
    Arc::new(Disk::open(&options).expect("a disk"))
}
