//! From a device's threads to its driver: MSI-X messages, or the interrupt line and the ISR status.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chipset::InterruptLine;
use chipset::pci::msix::{Message, Msix};
use engine::MessageSource;

use crate::Signals;

/// `VIRTIO_MSI_NO_VECTOR` (virtio 1.2, 4.1.4.3).
pub const NO_VECTOR: u16 = 0xffff;
/// ISR status (virtio 1.2, 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
/// Device status (virtio 1.2, 2.1).
pub const STATUS_DRIVER_OK: u8 = 4;
pub const STATUS_FEATURES_OK: u8 = 8;
pub const STATUS_NEEDS_RESET: u8 = 0x40;

/// What the device's threads and the registers share.
pub struct Interrupter {
    interrupts: Arc<dyn engine::Interrupts>,
    line: InterruptLine,
    /// The driver has turned the line off in the command register.
    line_disabled: AtomicBool,
    isr: AtomicU8,
    pub status: AtomicU8,
    pub generation: AtomicU8,
    msix: Mutex<Msix>,
    /// By vector, where the engine has such things.
    sources: Vec<Option<Box<dyn MessageSource>>>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
}

impl Interrupter {
    pub fn new(interrupts: Arc<dyn engine::Interrupts>, line: InterruptLine, queues: usize) -> Self {
        // One for each queue, one for the configuration space.
        let vectors = queues + 1;
        Interrupter {
            sources: (0..vectors).map(|_| interrupts.message_source()).collect(),
            interrupts,
            line,
            line_disabled: AtomicBool::new(false),
            isr: AtomicU8::new(0),
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            msix: Mutex::new(Msix::new(vectors)),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    pub fn msix(&self) -> MutexGuard<'_, Msix> {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn send(&self, message: Message) {
        self.interrupts.send_msi(message.0, message.1);
    }

    /// The driver's choices of a device reset (virtio 1.2, 4.1.4.3.1). The MSI-X table belongs to the function and stays.
    pub fn reset_device(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        self.queue_vectors.iter().for_each(|vector| vector.store(NO_VECTOR, Ordering::SeqCst));
        self.isr.store(0, Ordering::SeqCst);
        self.line.lower();
    }

    /// The vector of a queue, or of the configuration space.
    pub fn vector(&self, queue: Option<u16>) -> u16 {
        self.vector_register(queue).map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    /// A vector that isn't there is refused: it reads back as [`NO_VECTOR`].
    pub fn set_vector(&self, queue: Option<u16>, vector: u16) {
        let vector = if usize::from(vector) < self.msix().vectors() { vector } else { NO_VECTOR };
        if let Some(register) = self.vector_register(queue) {
            register.store(vector, Ordering::SeqCst);
        }
    }

    fn vector_register(&self, queue: Option<u16>) -> Option<&AtomicU16> {
        match queue {
            None => Some(&self.config_vector),
            Some(queue) => self.queue_vectors.get(usize::from(queue)),
        }
    }

    /// Reading the ISR status acknowledges the interrupt.
    pub fn take_isr(&self) -> u8 {
        let isr = self.isr.swap(0, Ordering::SeqCst);
        self.drive_line();
        isr
    }

    pub fn set_line_disabled(&self, disabled: bool) {
        self.line_disabled.store(disabled, Ordering::SeqCst);
        self.drive_line();
    }

    /// Whether there is an interrupt for the line, be it disabled or not.
    pub fn wants_line(&self) -> bool {
        self.isr.load(Ordering::SeqCst) != 0
    }

    fn drive_line(&self) {
        // Again if it changed meanwhile, so that the last change wins.
        loop {
            let isr = self.isr.load(Ordering::SeqCst);
            self.line.set(isr != 0 && !self.line_disabled.load(Ordering::SeqCst));
            if self.isr.load(Ordering::SeqCst) == isr {
                return;
            }
        }
    }

    fn interrupt(&self, queue: Option<u16>) {
        let mut msix = self.msix();
        if msix.enabled() {
            let vector = self.vector(queue);
            let message = msix.raise(vector);
            drop(msix);
            match (message, self.sources.get(usize::from(vector))) {
                (Some((address, data)), Some(Some(source))) => source.send(address, data),
                (Some(message), _) => self.send(message),
                (None, _) => {}
            }
            return;
        }
        drop(msix);
        self.isr.fetch_or(if queue.is_some() { ISR_QUEUE } else { ISR_CONFIG }, Ordering::SeqCst);
        self.drive_line();
    }
}

impl Signals for Interrupter {
    fn queue_used(&self, index: u16) {
        self.interrupt(Some(index));
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        if self.status.load(Ordering::SeqCst) & STATUS_DRIVER_OK != 0 {
            self.interrupt(None);
        }
    }

    fn needs_reset(&self) {
        let before = self.status.fetch_or(STATUS_NEEDS_RESET, Ordering::SeqCst);
        // Virtio 1.2, 2.1.2.
        if before & STATUS_DRIVER_OK != 0 && before & STATUS_NEEDS_RESET == 0 {
            self.interrupt(None);
        }
    }
}
