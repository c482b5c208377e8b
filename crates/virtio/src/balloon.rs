//! Memory balloon (virtio 1.2, 5.5): the guest's way to give memory back to the host.
//!
//! Two ways lead there. With free page reporting, which is always on, the guest tells of memory that nobody in it uses,
//! and takes it again without asking. And by the target ([`Balloon::set_target`]) the guest is asked to do without some
//! of its memory; when it runs out, it takes from the balloon by itself (DEFLATE_ON_OOM). Either way the host's pages
//! are freed at once ([`memory::discard`]); where the guest uses the memory again, it finds zeros.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memory::View;

use crate::serve::serve;
use crate::{Activation, Chain, DeviceType, Error, Signals, VirtioDevice, Worker};

/// Feature bits (5.5.3).
const DEFLATE_ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;
/// The balloon counts in pages of this size, whatever the guest's are (5.5.6).
const PAGE: u64 = 4096;
/// Bytes of a page number in the inflate and deflate queues.
const PAGE_NUMBER: usize = 4;
/// How many bytes of page numbers and how many ranges are taken of one request, so that none lasts; Linux has at most
/// 1024 bytes and 32 ranges.
const MOST_NUMBERS: usize = 1 << 16;
const MOST_RANGES: usize = 1 << 10;
/// The configuration space (5.5.4): `num_pages` is ours to say, `actual` the driver's.
const ACTUAL: std::ops::Range<usize> = 4..8;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// As Linux and other monitors count: queues of features that aren't there have no number (unlike 5.5.2, where
/// this is queue 4).
const REPORT: usize = 2;

/// A balloon on the PCI bus.
#[derive(Default)]
pub struct Balloon {
    /// In pages.
    target: AtomicU32,
    actual: AtomicU32,
    active: Mutex<Option<Active>>,
}

struct Active {
    signals: Arc<dyn Signals>,
    _workers: Vec<Worker>,
}

impl Balloon {
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the guest to do without so many bytes of its memory. It may take its time, or never do it.
    pub fn set_target(&self, bytes: u64) {
        self.target.store(u32::try_from(bytes / PAGE).unwrap_or(u32::MAX), Ordering::SeqCst);
        if let Some(active) = self.active().as_ref() {
            active.signals.config_changed();
        }
    }

    /// How many bytes the guest says that it does without.
    pub fn actual(&self) -> u64 {
        u64::from(self.actual.load(Ordering::SeqCst)) * PAGE
    }

    fn active(&self) -> MutexGuard<'_, Option<Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config(&self) -> [u8; 8] {
        let [target, actual] = [&self.target, &self.actual].map(|pages| pages.load(Ordering::SeqCst).to_le_bytes());
        let mut config = [0; 8];
        config.iter_mut().zip(target.into_iter().chain(actual)).for_each(|(to, from)| *to = from);
        config
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn queue_sizes(&self) -> &[u16] {
        &[128, 128, 128]
    }

    fn features(&self) -> u64 {
        DEFLATE_ON_OOM | REPORTING
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        data.iter_mut().zip(self.config().iter().skip(offset)).for_each(|(to, from)| *to = *from);
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        // Linux writes the field as a whole.
        if let (true, Ok(value)) = (offset == ACTUAL.start, data.try_into()) {
            self.actual.store(u32::from_le_bytes(value), Ordering::SeqCst);
        }
    }

    fn activate(&self, mut activation: Activation) -> Result<(), Error> {
        let device = DeviceType::Balloon;
        let mut workers = Vec::new();
        for (index, name) in [(INFLATE, "balloon-inflate"), (DEFLATE, "balloon-deflate"), (REPORT, "balloon-report")] {
            if index == REPORT && !activation.has(REPORTING) {
                continue;
            }
            let queue = activation.queue(device, index)?;
            let memory = activation.memory.clone();
            let worker = Worker::start(name, move |stop| {
                serve(queue, stop, |chain| {
                    match index {
                        INFLATE => inflate(&memory, chain),
                        REPORT => report(&memory, chain),
                        // The guest just uses its pages again.
                        _ => {}
                    }
                    Some(0)
                });
            });
            let failed = |source| Error::Host { device: device.name(), what: "can't start a thread", source };
            workers.push(worker.map_err(failed)?);
        }
        *self.active() = Some(Active { signals: activation.signals, _workers: workers });
        Ok(())
    }

    fn reset(&self) {
        self.active().take();
        self.actual.store(0, Ordering::SeqCst);
    }
}

/// The guest does without the pages whose numbers it lists.
fn inflate(memory: &View, chain: &Chain) {
    let mut piece = [0; 4096];
    let mut offset = 0;
    // Pages that follow each other are given back at once.
    let mut run: Option<(u64, u64)> = None;
    loop {
        let count = chain.read_at(offset, &mut piece) / PAGE_NUMBER;
        for bytes in piece.chunks_exact(PAGE_NUMBER).take(count) {
            let number = bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
            run = match run {
                Some((first, pages)) if first + pages == number => Some((first, pages + 1)),
                other => {
                    give_back(memory, other);
                    Some((number, 1))
                }
            };
        }
        if count == 0 || offset >= MOST_NUMBERS {
            return give_back(memory, run);
        }
        offset += count * PAGE_NUMBER;
    }
}

fn give_back(memory: &View, run: Option<(u64, u64)>) {
    if let Some((first, pages)) = run {
        discard(memory, first * PAGE, pages * PAGE);
    }
}

/// The guest does not use the memory of these buffers.
fn report(memory: &View, chain: &Chain) {
    for (address, length) in chain.writable_ranges().take(MOST_RANGES) {
        discard(memory, address, length as u64);
    }
}

fn discard(memory: &View, address: u64, length: u64) {
    if let Err(error) = memory::discard(memory, address, length) {
        tracing::debug!(
            "the balloon gave back {length} bytes at {address:#x}, but the host did not take them: {error}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_space_has_target_and_actual_size() {
        let balloon = Balloon::new();
        balloon.set_target(64 << 20);
        balloon.write_config(4, &100u32.to_le_bytes());
        balloon.write_config(0, &7u32.to_le_bytes());
        balloon.write_config(5, &[1, 2]);
        let mut config = [0xff; 12];
        balloon.read_config(0, &mut config[..8]);
        assert_eq!(config[..8], [0, 0x40, 0, 0, 100, 0, 0, 0]);
        assert_eq!(balloon.actual(), 100 * 4096);
        let mut byte = [9];
        balloon.read_config(1, &mut byte);
        assert_eq!(byte, [0x40]);
    }
}
