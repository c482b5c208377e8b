//! What the tests of several devices share, here and (by the feature `testing`) in the crates of devices above.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use memory::Ram;
use memory::vm_memory::{Bytes, GuestAddress};

use crate::ioapic::IoApic;
use crate::irq::Lines;
use crate::pic::Pic;
use crate::{Chipset, ChipsetConfig, Device, HostClock, PowerEvents};

/// Notes what reaches the vCPUs.
#[derive(Default)]
pub struct Recorder {
    pub messages: Mutex<Vec<(u64, u32)>>,
    pub pic_output: Mutex<bool>,
    smis: Mutex<Vec<bool>>,
}

impl Recorder {
    /// Takes the messages that were sent since the last call.
    pub fn take(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.messages.lock().unwrap())
    }

    /// Takes the system-management interrupts since the last call: whether each was for all processors.
    pub fn take_smis(&self) -> Vec<bool> {
        std::mem::take(&mut self.smis.lock().unwrap())
    }

    pub fn output(&self) -> bool {
        *self.pic_output.lock().unwrap()
    }
}

impl engine::Interrupts for Recorder {
    fn send_msi(&self, address: u64, data: u32) {
        self.messages.lock().unwrap().push((address, data));
    }

    fn set_pic_output(&self, asserted: bool) {
        *self.pic_output.lock().unwrap() = asserted;
    }

    fn send_nmi(&self, _vcpu: u32) {}

    fn send_smi(&self, all: bool) {
        self.smis.lock().unwrap().push(all);
    }
}

/// Notes what the guest asks of the machine.
#[derive(Default)]
pub struct Power {
    pub events: Mutex<Vec<&'static str>>,
}

impl PowerEvents for Power {
    fn power_off(&self) {
        self.events.lock().unwrap().push("off");
    }

    fn reset(&self) {
        self.events.lock().unwrap().push("reset");
    }

    fn init(&self) {
        self.events.lock().unwrap().push("init");
    }

    fn exit(&self, _value: u8) {
        self.events.lock().unwrap().push("exit");
    }
}

impl Power {
    pub fn take(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.events.lock().unwrap())
    }
}

/// A chipset with memory, for controllers to be plugged into.
pub struct Board {
    pub chipset: Arc<Chipset>,
    pub ram: Ram,
    pub recorder: Arc<Recorder>,
}

impl Default for Board {
    fn default() -> Self {
        let recorder = Arc::new(Recorder::default());
        let ram = Ram::new(16 << 20).unwrap();
        let config = ChipsetConfig {
            ram: ram.clone(),
            cpus: 1,
            clock: Arc::new(HostClock::new()),
            serial: [const { None }; 4],
            firmware: None,
            debug_console: None,
            debug_exit: None,
            smm: false,
            test_device: false,
        };
        let chipset = Chipset::new(config, recorder.clone(), Arc::new(Power::default())).unwrap();
        Board { chipset, ram, recorder }
    }
}

impl Board {
    pub fn write(&self, address: u64, data: &[u8]) {
        self.ram.view().write_slice(data, GuestAddress(address)).unwrap();
    }

    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.ram.view().read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }
}

/// Waits for what another thread is to do.
pub fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Interrupt controllers with all their lines.
pub struct Controllers {
    pub recorder: Arc<Recorder>,
    pub pic: Arc<Pic>,
    pub ioapic: Arc<IoApic>,
    pub lines: Arc<Lines>,
}

impl Default for Controllers {
    fn default() -> Self {
        let recorder = Arc::new(Recorder::default());
        let pic = Arc::new(Pic::new(recorder.clone()));
        let ioapic = Arc::new(IoApic::new(recorder.clone()));
        let lines = Arc::new(Lines::new(pic.clone(), ioapic.clone()));
        Controllers { recorder, pic, ioapic, lines }
    }
}

impl Controllers {
    /// The 8259 pair's requests: what its IRRs say.
    pub fn requests(&self) -> u16 {
        u16::from(read8(&*self.pic, 0)) | u16::from(read8(&*self.pic, 2)) << 8
    }

    /// Whether the line reaches the 8259 pair right now, as its IRR says.
    pub fn asserted(&self, irq: u8) -> bool {
        self.lines.asserted(irq)
    }
}

/// Reads `N` bytes.
pub fn read<const N: usize>(device: &dyn Device, offset: u64) -> [u8; N] {
    let mut data = [0; N];
    device.read(offset, &mut data);
    data
}

pub fn read8(device: &dyn Device, offset: u64) -> u8 {
    read::<1>(device, offset)[0]
}

pub fn write8(device: &dyn Device, offset: u64, value: u8) {
    device.write(offset, &[value]);
}

/// A small generator of pseudo-random numbers (xorshift), so that a failing run can be repeated.
pub struct Random(pub u64);

impl Random {
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        (self.draw() >> 16) % bound
    }
}

/// Reads and writes a device at random, in all sizes that a bus would pass on; `between` runs after each access.
pub fn poke(device: &dyn Device, size: u64, times: u32, mut between: impl FnMut(&mut Random)) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let width = device.width() as u64;
    for _ in 0..times {
        let offset = random.below(size);
        let length = (1 << random.below(4)).min(width - offset % width) as usize;
        let mut data = random.draw().to_le_bytes();
        match random.below(2) {
            0 => device.read(offset, &mut data[..length]),
            _ => device.write(offset, &data[..length]),
        }
        between(&mut random);
    }
}
