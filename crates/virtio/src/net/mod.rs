//! The network card (virtio 1.2, 5.1): one or more pairs of queues, each attached to a [`net::Backend`].
//!
//! Each pair has a thread. It takes the guest's frames and hands them to the back-end, segments of 64 KiB whole if the
//! guest leaves the cutting to us, and writes the back-end's frames into the guest's buffers, over as many buffers as a
//! frame needs ("mergeable" ones). The control queue has a thread of its own: it says how many pairs are in use and
//! what the guest takes unfinished.

mod control;
mod pair;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use net::{Backend, Mac, Offloads};

use crate::{Activation, DeviceType, Error, VirtioDevice, Worker};
use control::Control;
use pair::Pair;

/// Feature bits (5.1.3).
mod feature {
    pub const CHECKSUM: u64 = 1 << 0;
    pub const GUEST_CHECKSUM: u64 = 1 << 1;
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MERGEABLE: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_QUEUE: u64 = 1 << 17;
    pub const CTRL_RX: u64 = 1 << 18;
    pub const MULTI_QUEUE: u64 = 1 << 22;
    pub const CTRL_MAC: u64 = 1 << 23;
}

/// A received frame of 64 KiB takes up to 44 of the buffers that Linux provides.
const RECEIVE_QUEUE_SIZE: u16 = 1024;
const TRANSMIT_QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// The most pairs of queues that are worth it.
pub const MAX_PAIRS: usize = 16;
/// `VIRTIO_NET_S_LINK_UP` (5.1.4).
const LINK_UP: u16 = 1;

type SharedBackend = Arc<Mutex<Box<dyn Backend>>>;

/// A network card on the PCI bus.
pub struct Net {
    shared: Arc<Shared>,
    /// One for each pair of queues.
    backends: Vec<SharedBackend>,
    /// What all back-ends do for the guest.
    offloads: Offloads,
    mtu: Option<u16>,
    queue_sizes: Vec<u16>,
    option_rom: Vec<u8>,
    workers: Mutex<Vec<Worker>>,
}

/// What the threads of a card share.
struct Shared {
    mac: Mutex<Mac>,
    pairs: u16,
    /// Which feature bits of receiving the guest has switched on; the pairs look from time to time.
    guest_offloads: AtomicU64,
    /// How many pairs the guest uses.
    active_pairs: AtomicU64,
}

impl Net {
    /// A card attached to one back-end for each pair of queues (1 to [`MAX_PAIRS`]). `mtu`: what the guest is to use;
    /// if it is not known here, the guest decides.
    pub fn new(mac: Mac, mtu: Option<u16>, backends: Vec<Box<dyn Backend>>) -> Self {
        let offloads = backends.iter().map(|backend| backend.offloads()).reduce(|a, b| Offloads {
            checksum: a.checksum && b.checksum,
            tso4: a.tso4 && b.tso4,
            tso6: a.tso6 && b.tso6,
        });
        let backends: Vec<SharedBackend> =
            backends.into_iter().take(MAX_PAIRS).map(|backend| Arc::new(Mutex::new(backend))).collect();
        let mut queue_sizes: Vec<u16> =
            backends.iter().flat_map(|_| [RECEIVE_QUEUE_SIZE, TRANSMIT_QUEUE_SIZE]).collect();
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let shared = Shared {
            mac: Mutex::new(mac),
            pairs: backends.len() as u16,
            guest_offloads: AtomicU64::new(0),
            active_pairs: AtomicU64::new(1),
        };
        Net {
            shared: Arc::new(shared),
            backends,
            offloads: offloads.unwrap_or_default(),
            mtu,
            queue_sizes,
            option_rom: Vec::new(),
            workers: Mutex::default(),
        }
    }

    /// The same with a ROM by which firmware boots from it.
    pub fn with_option_rom(self, option_rom: Vec<u8>) -> Self {
        Net { option_rom, ..self }
    }

    /// The configuration space (5.1.4) up to `mtu`.
    fn config(&self) -> [u8; 12] {
        let [m0, m1, m2, m3, m4, m5] = *lock(&self.shared.mac);
        let [s0, s1] = LINK_UP.to_le_bytes();
        let [p0, p1] = self.shared.pairs.to_le_bytes();
        let [t0, t1] = self.mtu.unwrap_or(0).to_le_bytes();
        [m0, m1, m2, m3, m4, m5, s0, s1, p0, p1, t0, t1]
    }

    fn start(&self, mut activation: Activation, workers: &mut Vec<Worker>) -> Result<(), Error> {
        const NET: DeviceType = DeviceType::Net;
        let host = |source| Error::Host { device: NET.name(), what: "can't start a thread", source };
        let multi = activation.has(feature::MULTI_QUEUE);
        let mergeable = activation.has(feature::MERGEABLE);
        self.shared.guest_offloads.store(activation.features, Ordering::SeqCst);
        self.shared.active_pairs.store(1, Ordering::SeqCst);
        let mut kicks = Vec::new();
        for (number, backend) in self.backends.iter().enumerate().take(if multi { self.backends.len() } else { 1 }) {
            // Pairs that the driver does not use need not be set up, but for the first.
            let queues = (activation.queue(NET, 2 * number), activation.queue(NET, 2 * number + 1));
            let (receive, transmit) = match queues {
                (Ok(receive), Ok(transmit)) => (receive, transmit),
                (Err(error), _) | (_, Err(error)) if number == 0 => return Err(error),
                _ => continue,
            };
            kicks.push(receive.kick().clone());
            let backend = backend.clone();
            let pair = Pair::new(self.shared.clone(), number as u64, receive, transmit, mergeable);
            let work = move |stop: &crate::Event| pair.work(&backend, stop);
            workers.push(Worker::start(&format!("net-queue{number}"), work).map_err(host)?);
        }
        if activation.has(feature::CTRL_QUEUE) {
            // Without several queues it comes behind the first pair (5.1.2).
            let index = if multi { 2 * self.backends.len() } else { 2 };
            let queue = activation.queue(NET, index)?;
            let control = Control::new(self.shared.clone(), activation.features, kicks);
            workers.push(Worker::start("net-control", move |stop| control.work(queue, stop)).map_err(host)?);
        }
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn option_rom(&self) -> &[u8] {
        &self.option_rom
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        use feature::*;
        let mut features = MAC | STATUS | MERGEABLE | CTRL_QUEUE | CTRL_RX | CTRL_MAC;
        features |= GUEST_CHECKSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | CTRL_GUEST_OFFLOADS;
        for (offered, bits) in [
            (self.mtu.is_some(), MTU),
            (self.backends.len() > 1, MULTI_QUEUE),
            (self.offloads.checksum, CHECKSUM),
            (self.offloads.checksum && self.offloads.tso4, HOST_TSO4 | HOST_ECN),
            (self.offloads.checksum && self.offloads.tso6, HOST_TSO6 | HOST_ECN),
        ] {
            features |= if offered { bits } else { 0 };
        }
        features
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        data.iter_mut().zip(self.config().iter().skip(offset)).for_each(|(to, from)| *to = *from);
    }

    fn activate(&self, activation: Activation) -> Result<(), Error> {
        let mut workers = lock(&self.workers);
        self.start(activation, &mut workers).inspect_err(|_| workers.clear())
    }

    fn reset(&self) {
        lock(&self.workers).clear();
        self.backends.iter().for_each(|backend| lock(backend).reset());
    }
}

/// What the guest takes unfinished, by the feature bits that it has switched on.
fn guest_offloads(features: u64) -> Offloads {
    let has = |bit| features & bit != 0;
    Offloads {
        checksum: has(feature::GUEST_CHECKSUM),
        // Large frames have no checksum (5.1.3.1).
        tso4: has(feature::GUEST_TSO4) && has(feature::GUEST_CHECKSUM),
        tso6: has(feature::GUEST_TSO6) && has(feature::GUEST_CHECKSUM),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
