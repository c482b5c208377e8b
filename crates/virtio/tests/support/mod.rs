//! A driver for tests: finds a device on its PCI function and talks to it as the specification says, or not.
#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod hostile;

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use chipset::Device;
use chipset::ioapic::IoApic;
use chipset::irq::Lines;
use chipset::pci::PciFunction;
use chipset::pic::Pic;
use memory::Ram;
use memory::vm_memory::{Bytes, GuestAddress};
use virtio::VirtioDevice;
use virtio::pci::VirtioPci;

pub const RAM: u64 = 4 << 20;
/// The window's address, and the pages in it: tests of the transport find them by the capabilities.
pub const WINDOW: u64 = 0xc000_0000;
pub const COMMON: u64 = 0x0000;
pub const ISR: u64 = 0x1000;
pub const DEVICE: u64 = 0x2000;
pub const NOTIFY: u64 = 0x3000;
pub const TABLE: u64 = 0x4000;

pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;
pub const VERSION_1: u64 = 1 << 32;

/// Descriptor flags.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const TABLE_FLAG: u16 = 4;

/// What reaches the vCPUs.
#[derive(Default)]
pub struct Interrupts {
    messages: Mutex<Vec<(u64, u32)>>,
    sent: Condvar,
}

impl Interrupts {
    pub fn wait(&self) -> (u64, u32) {
        let messages = self.messages.lock().unwrap();
        let (mut messages, _) =
            self.sent.wait_timeout_while(messages, Duration::from_secs(10), |messages| messages.is_empty()).unwrap();
        messages.remove(0)
    }

    pub fn take(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.messages.lock().unwrap())
    }
}

impl engine::Interrupts for Interrupts {
    fn send_msi(&self, address: u64, data: u32) {
        self.messages.lock().unwrap().push((address, data));
        self.sent.notify_all();
    }

    fn set_pic_output(&self, _: bool) {}

    fn send_nmi(&self, _: u32) {}
}

/// A device on its bus, with RAM.
pub struct Bench {
    pub ram: Ram,
    pub function: Arc<VirtioPci>,
    pub window: Arc<dyn Device>,
    pub interrupts: Arc<Interrupts>,
    pub ioapic: Arc<IoApic>,
}

/// The interrupt line of the device.
const LINE: u8 = 17;

impl Bench {
    pub fn new(device: Arc<dyn VirtioDevice>) -> Self {
        let ram = Ram::new(RAM).unwrap();
        let interrupts = Arc::new(Interrupts::default());
        let ioapic = Arc::new(IoApic::new(interrupts.clone()));
        let lines = Arc::new(Lines::new(Arc::new(Pic::new(interrupts.clone())), ioapic.clone()));
        let function = VirtioPci::new(device, ram.view(), interrupts.clone(), lines.connect(LINE)).unwrap();
        let window = function.bar(0).unwrap();
        Bench { ram, function, window, interrupts, ioapic }
    }

    pub fn config<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        self.function.read_config(offset, &mut data);
        data
    }

    pub fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0xee; N];
        self.window.read(offset, &mut data);
        data
    }

    pub fn read32(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(offset))
    }

    pub fn read16(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(offset))
    }

    pub fn write8(&self, offset: u64, value: u8) {
        self.window.write(offset, &[value]);
    }

    pub fn write16(&self, offset: u64, value: u16) {
        self.window.write(offset, &value.to_le_bytes());
    }

    pub fn write32(&self, offset: u64, value: u32) {
        self.window.write(offset, &value.to_le_bytes());
    }

    pub fn write64(&self, offset: u64, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }

    pub fn status(&self) -> u8 {
        self.read::<1>(COMMON + 20)[0]
    }

    pub fn set_status(&self, status: u8) {
        self.write8(COMMON + 20, status);
    }

    pub fn offered(&self) -> u64 {
        let half = |select| {
            self.write32(COMMON, select);
            u64::from(self.read32(COMMON + 4))
        };
        half(0) | half(1) << 32
    }

    /// Reset, ACKNOWLEDGE, DRIVER, features, FEATURES_OK. False: the device refuses.
    pub fn negotiate(&self, features: u64) -> bool {
        self.set_status(0);
        self.set_status(1);
        self.set_status(3);
        for half in [0, 1] {
            self.write32(COMMON + 8, half);
            self.write32(COMMON + 12, (features >> (32 * half)) as u32);
        }
        self.set_status(11);
        self.status() & 8 != 0
    }

    /// Enables a queue with its rings at `base`, interrupting by MSI-X vector `vector`.
    pub fn enable_queue(&self, index: u16, size: u16, base: u64, vector: u16) -> Ring {
        let ring = Ring { index, size, base, next: 0, added: 0, seen: 0 };
        let end = ring.used() + 6 + 8 * u64::from(size);
        self.store(base, &vec![0; (end - base) as usize]);
        self.write16(COMMON + 22, index);
        self.write16(COMMON + 24, size);
        self.write16(COMMON + 26, vector);
        self.write64(COMMON + 32, base);
        self.write64(COMMON + 40, ring.available());
        self.write64(COMMON + 48, ring.used());
        self.write16(COMMON + 28, 1);
        ring
    }

    /// Turns MSI-X on; vector n sends the data 0x40 + n.
    pub fn enable_msix(&self, vectors: u32) {
        for vector in 0..vectors {
            self.write32(TABLE + u64::from(vector) * 16, 0xfee0_0000);
            self.write32(TABLE + u64::from(vector) * 16 + 8, 0x40 + vector);
            self.write32(TABLE + u64::from(vector) * 16 + 12, 0);
        }
        let msix = self.capability(0x11, None);
        self.function.write_config(msix + 2, &0x8000u16.to_le_bytes());
    }

    /// Sends the line's level to the I/O APIC's vector 0x60.
    pub fn enable_line(&self) {
        let line = u32::from(LINE);
        for (register, value) in [(0x10 + 2 * line, 0x8060u32), (0x11 + 2 * line, 0)] {
            self.ioapic.write(0, &register.to_le_bytes());
            self.ioapic.write(0x10, &value.to_le_bytes());
        }
    }

    /// Finds a capability, and for vendor-specific ones that of a configuration type.
    pub fn capability(&self, id: u8, kind: Option<u8>) -> u16 {
        let mut at = self.config::<1>(0x34)[0];
        while at != 0 {
            let [found, next, _, found_kind] = self.config(at.into());
            if found == id && kind.is_none_or(|kind| kind == found_kind) {
                return at.into();
            }
            at = next;
        }
        panic!("no capability {id:#x} {kind:?}");
    }

    /// A driver's usual way to DRIVER_OK with one queue of 16 entries at 0x1000 and MSI-X.
    pub fn start(&self, features: u64) -> Ring {
        assert!(self.negotiate(features));
        self.enable_msix(2);
        let ring = self.enable_queue(0, 16, 0x1000, 1);
        self.set_status(15);
        ring
    }

    pub fn kick(&self, ring: &Ring) {
        self.write16(NOTIFY + 4 * u64::from(ring.index), ring.index);
    }

    pub fn store(&self, address: u64, data: &[u8]) {
        self.ram.view().write_slice(data, GuestAddress(address)).unwrap();
    }

    pub fn load(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.ram.view().read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    pub fn load16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.load(address, 2).try_into().unwrap())
    }

    /// Adds a request, notifies, and waits for its end. Returns the used length; `None`: the device gave up instead.
    pub fn request(&self, ring: &mut Ring, buffers: &[(u64, u32, bool)]) -> Option<u32> {
        ring.add(self, buffers);
        self.kick(ring);
        ring.wait(self).map(|(_, length)| length)
    }
}

/// A split virtqueue from the driver's side.
pub struct Ring {
    pub index: u16,
    pub size: u16,
    pub base: u64,
    /// The next descriptor; they are used in turn.
    pub next: u16,
    pub added: u16,
    pub seen: u16,
}

impl Ring {
    pub fn available(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    pub fn used(&self) -> u64 {
        (self.available() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    pub fn descriptor(&self, bench: &Bench, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        write_descriptor(bench, self.base + 16 * u64::from(index), address, length, flags, next);
    }

    /// Makes a chain of buffers: address, length, device-writable. Returns its head.
    pub fn chain(&mut self, bench: &Bench, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.next;
        for (n, &(address, length, writable)) in buffers.iter().enumerate() {
            let following = (self.next + 1) % self.size;
            let flags = if writable { WRITE } else { 0 } | if n + 1 < buffers.len() { NEXT } else { 0 };
            self.descriptor(bench, self.next, address, length, flags, following);
            self.next = following;
        }
        head
    }

    /// Makes a head available to the device.
    pub fn offer(&mut self, bench: &Bench, head: u16) {
        let place = self.available() + 4 + 2 * u64::from(self.added % self.size);
        bench.store(place, &head.to_le_bytes());
        self.added = self.added.wrapping_add(1);
        bench.store(self.available() + 2, &self.added.to_le_bytes());
    }

    pub fn add(&mut self, bench: &Bench, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.chain(bench, buffers);
        self.offer(bench, head);
        head
    }

    /// Waits for the next used buffer: its head and length. `None`: the device needs a reset.
    pub fn wait(&mut self, bench: &Bench) -> Option<(u32, u32)> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while bench.load16(self.used() + 2) == self.seen {
            if bench.status() & 0x40 != 0 {
                return None;
            }
            assert!(Instant::now() < deadline, "the device does not answer");
            std::thread::sleep(Duration::from_micros(50));
        }
        let element = bench.load(self.used() + 4 + 8 * u64::from(self.seen % self.size), 8);
        self.seen = self.seen.wrapping_add(1);
        let number = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
        Some((number(0), number(4)))
    }
}

pub fn write_descriptor(bench: &Bench, place: u64, address: u64, length: u32, flags: u16, next: u16) {
    let mut bytes = address.to_le_bytes().to_vec();
    bytes.extend(length.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    bench.store(place, &bytes);
}

/// A generator of pseudo-random numbers (xorshift), so that a failing run can be repeated.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| (self.next() >> 32) as u8).collect()
    }
}
