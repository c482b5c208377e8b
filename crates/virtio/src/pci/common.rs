//! The common configuration structure (virtio 1.2, 4.1.4.3): features, status and queues, up to DRIVER_OK and back.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use memory::View;

use super::interrupts::{Interrupter, STATUS_DRIVER_OK, STATUS_FEATURES_OK};
use crate::queue::Layout;
use crate::{Activation, Error, Event, Queue, VirtioDevice, feature};

/// What the transport and the rings offer besides the device's own features.
const RING_FEATURES: u64 = feature::VERSION_1 | feature::INDIRECT_DESC | feature::EVENT_IDX;

/// Offsets of the registers.
const DEVICE_FEATURE_SELECT: usize = 0;
const DEVICE_FEATURE: usize = 4;
const DRIVER_FEATURE_SELECT: usize = 8;
const DRIVER_FEATURE: usize = 12;
const CONFIG_VECTOR: usize = 16;
const NUM_QUEUES: usize = 18;
const STATUS: usize = 20;
const GENERATION: usize = 21;
const QUEUE_SELECT: usize = 22;
const QUEUE_SIZE: usize = 24;
const QUEUE_VECTOR: usize = 26;
const QUEUE_ENABLE: usize = 28;
const QUEUE_NOTIFY_OFFSET: usize = 30;
const QUEUE_DESCRIPTORS: usize = 32;
const QUEUE_DRIVER: usize = 40;
const QUEUE_DEVICE: usize = 48;
/// The size of the structure, with the two registers of features that are not offered.
pub const SIZE: usize = 60;

#[derive(Clone, Copy, Default)]
struct QueueRegisters {
    layout: Layout,
    enabled: bool,
}

/// The registers and what they lead to.
pub struct Common {
    device: Arc<dyn VirtioDevice>,
    memory: Arc<View>,
    interrupter: Arc<Interrupter>,
    kicks: Vec<Arc<Event>>,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    /// The device has been activated and not been reset since.
    active: bool,
}

impl Common {
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        memory: Arc<View>,
        interrupter: Arc<Interrupter>,
        kicks: Vec<Arc<Event>>,
    ) -> Self {
        let mut common = Common {
            device,
            memory,
            interrupter,
            kicks,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: Vec::new(),
            active: false,
        };
        common.forget();
        common
    }

    /// A device reset: all that the driver has set up is gone, and the device works on nothing any more.
    pub fn reset(&mut self) {
        self.device.reset();
        self.active = false;
        self.forget();
        self.interrupter.reset_device();
        self.kicks.iter().for_each(|kick| _ = kick.clear());
    }

    fn forget(&mut self) {
        (self.device_feature_select, self.driver_feature_select, self.queue_select) = (0, 0, 0);
        self.driver_features = 0;
        let fresh = |&size| QueueRegisters { layout: Layout { size, ..Layout::default() }, enabled: false };
        self.queues = self.device.queue_sizes().iter().map(fresh).collect();
    }

    fn offered(&self) -> u64 {
        self.device.features() | RING_FEATURES
    }

    fn status(&self) -> u8 {
        self.interrupter.status.load(Ordering::SeqCst)
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// All registers as bytes. A queue that isn't there has zeros, by which the driver sees that.
    fn image(&self) -> [u8; SIZE] {
        let mut image = [0; SIZE];
        let mut put = |offset: usize, value: &[u8]| {
            image.iter_mut().skip(offset).zip(value).for_each(|(to, from)| *to = *from);
        };
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        put(DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        put(DEVICE_FEATURE, &half(self.offered(), self.device_feature_select).to_le_bytes());
        put(DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        put(DRIVER_FEATURE, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(CONFIG_VECTOR, &self.interrupter.vector(None).to_le_bytes());
        put(NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(STATUS, &[self.status()]);
        put(GENERATION, &[self.interrupter.generation.load(Ordering::SeqCst)]);
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        put(QUEUE_VECTOR, &self.interrupter.vector(Some(self.queue_select)).to_le_bytes());
        if let Some(queue) = self.selected() {
            put(QUEUE_SIZE, &queue.layout.size.to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(QUEUE_NOTIFY_OFFSET, &self.queue_select.to_le_bytes());
            put(QUEUE_DESCRIPTORS, &queue.layout.descriptors.to_le_bytes());
            put(QUEUE_DRIVER, &queue.layout.available.to_le_bytes());
            put(QUEUE_DEVICE, &queue.layout.used.to_le_bytes());
        }
        image
    }

    pub fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        data.iter_mut().zip(self.image().iter().skip(offset)).for_each(|(to, from)| *to = *from);
    }

    /// Drivers access each register in its own width, and the 64-bit ones also by halves (virtio 1.2, 4.1.3.1). Any
    /// other access changes nothing.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        match (offset, data) {
            (STATUS, &[value]) => self.write_status(value),
            (_, &[a, b]) => self.write_word(offset, u16::from_le_bytes([a, b])),
            (_, &[a, b, c, d]) => self.write_dword(offset, u32::from_le_bytes([a, b, c, d])),
            _ => {}
        }
    }

    fn write_word(&mut self, offset: usize, value: u16) {
        match offset {
            CONFIG_VECTOR => self.interrupter.set_vector(None, value),
            QUEUE_SELECT => self.queue_select = value,
            QUEUE_VECTOR => self.interrupter.set_vector(Some(self.queue_select), value),
            QUEUE_SIZE => self.set_queue(|queue, max| {
                if value.is_power_of_two() && value <= max {
                    queue.layout.size = value;
                }
            }),
            // Writing 0 is not allowed to the driver.
            QUEUE_ENABLE if value == 1 => self.set_queue(|queue, _| queue.enabled = true),
            _ => {}
        }
    }

    fn write_dword(&mut self, offset: usize, value: u32) {
        match offset {
            DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            // After FEATURES_OK they are settled.
            DRIVER_FEATURE if self.status() & STATUS_FEATURES_OK == 0 => match self.driver_feature_select {
                0 => self.driver_features = self.driver_features >> 32 << 32 | u64::from(value),
                1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
                _ => {}
            },
            QUEUE_DESCRIPTORS..SIZE => self.set_queue(|queue, _| {
                let address = match offset & !7 {
                    QUEUE_DESCRIPTORS => &mut queue.layout.descriptors,
                    QUEUE_DRIVER => &mut queue.layout.available,
                    QUEUE_DEVICE => &mut queue.layout.used,
                    _ => return,
                };
                match offset & 7 {
                    0 => *address = *address >> 32 << 32 | u64::from(value),
                    4 => *address = *address & 0xffff_ffff | u64::from(value) << 32,
                    _ => {}
                }
            }),
            _ => {}
        }
    }

    /// Changes the selected queue, which is given with its most entries; an enabled queue is settled.
    fn set_queue(&mut self, change: impl FnOnce(&mut QueueRegisters, u16)) {
        let index = usize::from(self.queue_select);
        let (Some(queue), Some(&max)) = (self.queues.get_mut(index), self.device.queue_sizes().get(index)) else {
            return;
        };
        if !queue.enabled {
            change(queue, max);
        }
    }

    fn write_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        // The driver only ever adds bits (virtio 1.2, 2.1.1), and not the device's own.
        let before = self.status();
        let mut added = value & !before & !super::interrupts::STATUS_NEEDS_RESET;
        if added & STATUS_FEATURES_OK != 0 && !self.features_acceptable() {
            tracing::debug!("{}: features {:#x} are refused", self.name(), self.driver_features);
            added &= !STATUS_FEATURES_OK;
        }
        self.interrupter.status.fetch_or(added, Ordering::SeqCst);
        if added & STATUS_DRIVER_OK != 0 && !self.active {
            self.activate();
        }
    }

    fn name(&self) -> &'static str {
        self.device.device_type().name()
    }

    /// A driver that doesn't know VERSION_1 is one of before virtio 1.0.
    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered() == 0 && self.driver_features & feature::VERSION_1 != 0
    }

    fn activate(&mut self) {
        let result = self.activation().and_then(|activation| self.device.activate(activation));
        self.active = true;
        if let Err(error) = result {
            tracing::info!("{error}");
            crate::Signals::needs_reset(&*self.interrupter);
        }
    }

    fn activation(&self) -> Result<Activation, Error> {
        let refused = |what| Error::Driver { device: self.name(), what };
        if self.status() & STATUS_FEATURES_OK == 0 {
            return Err(refused("the driver is ready without having agreed on features"));
        }
        let mut queues = Vec::with_capacity(self.queues.len());
        for ((index, registers), kick) in (0..).zip(&self.queues).zip(&self.kicks) {
            let (memory, signals) = (self.memory.clone(), self.interrupter.clone());
            queues.push(if registers.enabled {
                let queue = Queue::new(index, registers.layout, self.driver_features, memory, signals, kick.clone());
                Some(queue.ok_or(refused("a queue lies outside RAM or is misaligned"))?)
            } else {
                None
            });
        }
        let (memory, signals) = (self.memory.clone(), self.interrupter.clone());
        Ok(Activation { memory, features: self.driver_features, queues, signals })
    }
}
