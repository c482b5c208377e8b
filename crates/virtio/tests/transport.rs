//! What a driver may expect of virtio over PCI, seen with a device that echoes.

mod support;

use std::io::{Read, Write};
use std::sync::{Arc, Mutex};

use chipset::pci::PciFunction;
use support::*;
use virtio::{Activation, DeviceType, Error, Signals, VirtioDevice, Worker, wait_any};

/// Copies what is readable to what is writable.
#[derive(Default)]
struct Echo {
    worker: Mutex<Vec<Worker>>,
    signals: Mutex<Option<Arc<dyn Signals>>>,
    refuse: bool,
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 64]
    }

    fn features(&self) -> u64 {
        1 | 1 << 50
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        data.iter_mut().zip(offset..8).for_each(|(byte, offset)| *byte = offset as u8 + 1);
    }

    fn activate(&self, mut activation: Activation) -> Result<(), Error> {
        if self.refuse {
            return Err(Error::Driver { device: "echo", what: "it may not" });
        }
        let mut queue = activation.queue(DeviceType::Entropy, 0)?;
        *self.signals.lock().unwrap() = Some(activation.signals.clone());
        let worker = Worker::start("echo", move |stop| {
            while !stop.is_set() {
                wait_any(&[stop, &queue.kick().clone()]);
                queue.kick().clear();
                while let Some(chain) = queue.pop() {
                    let mut data = Vec::new();
                    chain.reader().read_to_end(&mut data).unwrap();
                    let mut writer = chain.writer();
                    let _ = writer.write_all(&data);
                    let written = writer.written();
                    queue.push(chain, written);
                }
                queue.notify();
            }
        });
        self.worker.lock().unwrap().push(worker.unwrap());
        Ok(())
    }

    fn reset(&self) {
        self.worker.lock().unwrap().clear();
    }
}

fn bench() -> Bench {
    Bench::new(Arc::new(Echo::default()))
}

#[test]
fn the_function_says_that_it_is_modern_virtio() {
    let bench = bench();
    assert_eq!(bench.config(0), [0xf4, 0x1a, 0x44, 0x10]);
    assert_eq!(bench.config::<1>(8), [1], "revision");
    for (kind, page) in [(1, COMMON), (2, NOTIFY), (3, ISR), (4, DEVICE)] {
        let at = bench.capability(9, Some(kind));
        assert_eq!(bench.config::<1>(at + 4), [0], "window");
        assert_eq!(u32::from_le_bytes(bench.config(at + 8)), page as u32);
    }
    assert_eq!(u32::from_le_bytes(bench.config(bench.capability(9, Some(2)) + 16)), 4, "notify multiplier");
    let msix = bench.capability(0x11, None);
    assert_eq!(u16::from_le_bytes(bench.config(msix + 2)), 2, "three vectors");
}

#[test]
fn features_are_what_both_want() {
    let bench = bench();
    assert_eq!(bench.offered(), 1 | 1 << 50 | VERSION_1 | EVENT_IDX | INDIRECT);
    assert!(bench.negotiate(VERSION_1 | 1));
    assert!(!bench.negotiate(VERSION_1 | 2), "not offered");
    assert!(!bench.negotiate(1), "a driver of old");
    assert!(bench.negotiate(VERSION_1 | 1 << 50));
    bench.write32(COMMON + 8, 0);
    bench.write32(COMMON + 12, 1);
    assert_eq!(bench.read32(COMMON + 12), 0, "settled by FEATURES_OK");
}

#[test]
fn queues_are_as_large_as_the_driver_wants_up_to_the_most() {
    let bench = bench();
    assert_eq!(bench.read16(COMMON + 18), 2);
    for (queue, most) in [(0, 16), (1, 64), (2, 0), (0xffff, 0)] {
        bench.write16(COMMON + 22, queue);
        assert_eq!(bench.read16(COMMON + 24), most, "queue {queue}");
    }
    bench.write16(COMMON + 22, 1);
    for (wanted, got) in [(32, 32), (128, 32), (0, 32), (3, 32), (1, 1)] {
        bench.write16(COMMON + 24, wanted);
        assert_eq!(bench.read16(COMMON + 24), got);
    }
    bench.set_status(0);
    bench.write16(COMMON + 22, 1);
    assert_eq!(bench.read16(COMMON + 24), 64, "reset brings the most back");
}

#[test]
fn buffers_go_through_with_msix() {
    let bench = bench();
    let mut ring = bench.start(VERSION_1);
    bench.store(0x8000, b"hello, ");
    bench.store(0x9000, b"world");
    let buffers = [(0x8000, 7, false), (0x9000, 5, false), (0xa000, 3, true), (0xb000, 100, true)];
    assert_eq!(bench.request(&mut ring, &buffers), Some(12));
    assert_eq!((bench.load(0xa000, 3), bench.load(0xb000, 10)), (b"hel".to_vec(), b"lo, world\0".to_vec()));
    assert_eq!(bench.interrupts.wait(), (0xfee0_0000, 0x41));
    assert_eq!(bench.read::<1>(ISR), [0], "MSI-X leaves the ISR status alone");
    // A zero-length buffer is nothing to stumble over.
    assert_eq!(bench.request(&mut ring, &[(0x8000, 0, false), (0xa000, 0, true)]), Some(0));
}

#[test]
fn without_msix_the_line_is_raised_until_the_isr_is_read() {
    let bench = bench();
    bench.enable_line();
    assert!(bench.negotiate(VERSION_1));
    let mut ring = bench.enable_queue(0, 16, 0x1000, 0xffff);
    bench.set_status(15);
    bench.request(&mut ring, &[(0x8000, 1, false)]);
    let (address, data) = bench.interrupts.wait();
    assert_eq!((address, data & 0xff), (0xfee0_0000, 0x60));
    assert_eq!(bench.config::<2>(6)[0] & 8, 8, "the status register shows the line");
    bench.ioapic.end_of_interrupt(0x60);
    assert_eq!(bench.interrupts.take().len(), 1, "still asserted");
    assert_eq!((bench.read::<1>(ISR), bench.read::<1>(ISR)), ([1], [0]));
    bench.ioapic.end_of_interrupt(0x60);
    assert!(bench.interrupts.take().is_empty());
    assert_eq!(bench.config::<2>(6)[0] & 8, 0);
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
        let bench = bench();
        let mut ring = bench.start(features);
        // VIRTQ_AVAIL_F_NO_INTERRUPT, or an event index that is far away.
        bench.store(ring.available(), &1u16.to_le_bytes());
        bench.store(ring.available() + 4 + 32, &100u16.to_le_bytes());
        for _ in 0..3 {
            bench.request(&mut ring, &[(0x8000, 1, false)]);
        }
        bench.set_status(0);
        assert!(bench.interrupts.take().is_empty());
    }
}

#[test]
fn changes_of_the_configuration_are_told() {
    let echo = Arc::new(Echo::default());
    let bench = Bench::new(echo.clone());
    assert!(bench.negotiate(VERSION_1));
    bench.enable_msix(3);
    bench.write16(COMMON + 16, 2);
    bench.enable_queue(0, 16, 0x1000, 1);
    bench.set_status(15);
    let before = bench.read::<1>(COMMON + 21);
    echo.signals.lock().unwrap().as_ref().unwrap().config_changed();
    assert_eq!(bench.interrupts.wait(), (0xfee0_0000, 0x42));
    assert_ne!(bench.read::<1>(COMMON + 21), before);
    assert_eq!(u64::from_le_bytes(bench.read(DEVICE)), 0x0807_0605_0403_0201);
    bench.write16(COMMON + 16, 3);
    assert_eq!(bench.read16(COMMON + 16), 0xffff, "no such vector");
}

#[test]
fn what_the_driver_must_not_do_makes_the_device_need_a_reset() {
    let bench = bench();
    bench.set_status(15);
    assert_eq!(bench.status() & 0x40, 0x40, "features were not agreed on");
    assert!(bench.negotiate(VERSION_1));
    bench.set_status(15);
    assert_eq!(bench.status() & 0x40, 0x40, "no queue");
    for (base, what) in [(RAM, "outside RAM"), (RAM - 64, "partly in RAM"), (0x1008, "misaligned"), (u64::MAX - 15, "")]
    {
        assert!(bench.negotiate(VERSION_1));
        bench.write16(COMMON + 22, 0);
        bench.write64(COMMON + 32, base);
        bench.write64(COMMON + 40, 0x2000);
        bench.write64(COMMON + 48, 0x3000);
        bench.write16(COMMON + 28, 1);
        bench.set_status(15);
        assert_eq!(bench.status() & 0x40, 0x40, "{what}");
    }
    bench.start(VERSION_1);
    assert_eq!(bench.status(), 15);
    let refusing = Bench::new(Arc::new(Echo { refuse: true, ..Echo::default() }));
    refusing.negotiate(VERSION_1);
    refusing.enable_queue(0, 16, 0x1000, 1);
    refusing.set_status(15);
    assert_eq!(refusing.status(), 0x4f);
}

#[test]
fn the_window_is_reached_through_configuration_space_too() {
    let bench = bench();
    let at = bench.capability(9, Some(5));
    let access = |offset: u32, length: u32| {
        bench.function.write_config(at + 4, &[0]);
        bench.function.write_config(at + 8, &offset.to_le_bytes());
        bench.function.write_config(at + 12, &length.to_le_bytes());
    };
    access(DEVICE as u32 + 4, 4);
    assert_eq!(bench.config(at + 16), [5, 6, 7, 8]);
    access(COMMON as u32 + 20, 1);
    bench.function.write_config(at + 16, &[1, 0, 0, 0]);
    assert_eq!(bench.status(), 1);
    for (offset, length) in [(1, 4), (0, 3), (0x8000, 4), (u32::MAX, 1), (0, 0)] {
        access(offset, length);
        bench.function.write_config(at + 16, &[0xff; 4]);
        assert_eq!(bench.config(at + 16), [0; 4]);
    }
}

#[test]
fn a_reset_forgets_everything_and_touches_nothing_after() {
    let bench = bench();
    let mut ring = bench.start(VERSION_1);
    bench.request(&mut ring, &[(0x8000, 1, false)]);
    bench.function.reset();
    bench.interrupts.take();
    assert_eq!(bench.status(), 0);
    let used = bench.load16(ring.used() + 2);
    ring.add(&bench, &[(0x8000, 1, false)]);
    bench.kick(&ring);
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert_eq!(bench.load16(ring.used() + 2), used);
    bench.write16(COMMON + 22, 0);
    assert_eq!((bench.read16(COMMON + 28), bench.read32(COMMON + 32), bench.read16(COMMON + 26)), (0, 0, 0xffff));
}

#[test]
fn random_accesses_do_no_harm() {
    let bench = bench();
    let mut random = Random(0xacce55);
    for _ in 0..300 {
        let data = random.bytes(1400);
        support::hostile::registers(&bench, &data);
    }
    let mut ring = bench.start(VERSION_1);
    assert_eq!(bench.request(&mut ring, &[(0x8000, 1, false)]), Some(0));
}

#[test]
fn hostile_queues_do_no_harm() {
    let bench = bench();
    let mut random = Random(0xf00d);
    for _ in 0..150 {
        let data = random.bytes(1500);
        support::hostile::queues(&bench, random.next(), 2, &data);
    }
}
