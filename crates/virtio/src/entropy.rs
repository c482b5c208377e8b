//! Entropy device (virtio 1.2, 5.4): random bytes of the host for the guest's `/dev/hwrng`.

use std::sync::{Mutex, PoisonError};

use rustix::rand::{GetRandomFlags, getrandom};

use crate::serve::serve;
use crate::{Activation, Chain, DeviceType, Error, VirtioDevice, Worker};

/// The most bytes for one request: Linux asks for at most 64 at a time.
const PIECE: usize = 4096;

/// An entropy device on the PCI bus.
#[derive(Default)]
pub struct Entropy {
    worker: Mutex<Option<Worker>>,
}

impl Entropy {
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Entropy {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _: usize, _: &mut [u8]) {}

    fn activate(&self, mut activation: Activation) -> Result<(), Error> {
        let device = DeviceType::Entropy;
        let queue = activation.queue(device, 0)?;
        let worker = Worker::start("entropy", move |stop| serve(queue, stop, |chain| Some(fill(chain))))
            .map_err(|source| Error::Host { device: device.name(), what: "can't start a thread", source })?;
        *self.worker.lock().unwrap_or_else(PoisonError::into_inner) = Some(worker);
        Ok(())
    }

    fn reset(&self) {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

fn fill(chain: &Chain) -> u32 {
    let mut random = [0; PIECE];
    let wanted = random.get_mut(..chain.writable_len().min(PIECE)).unwrap_or_default();
    // A host without entropy gives fewer bytes, or none: 5.4.6.1 has the driver look at how many were written.
    let count = getrandom(&mut *wanted, GetRandomFlags::empty()).unwrap_or(0);
    chain.write_at(0, wanted.get(..count).unwrap_or_default()) as u32
}
