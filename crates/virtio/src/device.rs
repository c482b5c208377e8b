//! What a device is to a transport, and what it gets when the driver is ready.

use std::sync::Arc;

use memory::View;

use crate::{Error, Queue};

/// Device types (virtio 1.2, 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum DeviceType {
    Net = 1,
    Block = 2,
    Console = 3,
    Entropy = 4,
    Balloon = 5,
    Share9p = 9,
    Vsock = 19,
    FileSystem = 26,
}

impl DeviceType {
    /// The name in messages.
    pub fn name(self) -> &'static str {
        match self {
            DeviceType::Net => "network",
            DeviceType::Block => "block",
            DeviceType::Console => "console",
            DeviceType::Entropy => "entropy",
            DeviceType::Balloon => "balloon",
            DeviceType::Share9p => "9p",
            DeviceType::Vsock => "vsock",
            DeviceType::FileSystem => "file system",
        }
    }
}

/// A paravirtual device. Called concurrently from vCPU threads, one at a time for `activate` and `reset`; it locks for
/// itself. None of these may wait for the guest.
pub trait VirtioDevice: Send + Sync {
    fn device_type(&self) -> DeviceType;
    /// The most entries of each queue: powers of two up to 32768. Its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// The device's own features: bits 0 to 23 and 50 up. The transport adds what belongs to rings and transport.
    fn features(&self) -> u64;
    /// The option ROM by which firmware uses the device; empty: none.
    fn option_rom(&self) -> &[u8] {
        &[]
    }
    /// Reads the configuration space. What lies beyond its end reads as zeros.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// Writes the configuration space; most devices have nothing to be written there.
    fn write_config(&self, _offset: usize, _data: &[u8]) {}
    /// The driver is ready (DRIVER_OK): the device starts its threads and works until `reset`.
    fn activate(&self, activation: Activation) -> Result<(), Error>;
    /// Ends what `activate` began: when it returns, no guest memory is touched and no interrupt sent any more. Also
    /// called when the device was never active, and at the end of the machine.
    fn reset(&self);
}

/// What a device works with from DRIVER_OK to reset.
pub struct Activation {
    /// Guest memory; queues have their own way to it.
    pub memory: Arc<View>,
    /// What was negotiated: a subset of what was offered.
    pub features: u64,
    /// By index; `None` where the driver did not enable the queue.
    pub queues: Vec<Option<Queue>>,
    pub signals: Arc<dyn Signals>,
}

impl Activation {
    /// Takes queue `index`, or says that the driver should have enabled it.
    pub fn queue(&mut self, device: DeviceType, index: usize) -> Result<Queue, Error> {
        let missing =
            Error::Driver { device: device.name(), what: "the driver has not enabled a queue that is needed" };
        self.queues.get_mut(index).and_then(Option::take).ok_or(missing)
    }

    pub fn has(&self, feature: u64) -> bool {
        self.features & feature == feature
    }
}

/// What a device tells its driver. Called from any thread.
pub trait Signals: Send + Sync {
    /// Buffers of queue `index` have been used: interrupts. [`Queue::notify`] calls it if the driver wants it.
    fn queue_used(&self, index: u16);
    /// The configuration space has changed.
    fn config_changed(&self);
    /// The device has met something that it can't go on from (DEVICE_NEEDS_RESET).
    fn needs_reset(&self);
}
