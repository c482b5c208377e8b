//! Two channels as a PCI function with ports at fixed addresses: the IDE function of a PIIX4, which every system since
//! 1997 has a driver for, and which systems before that take for an IDE controller on the ISA bus.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chipset::pci::{BarKind, BarWindow, ConfigSpace, Identity, PciFunction};
use chipset::{Chipset, Device};
use memory::View;

use super::CHANNELS;
use super::channel::Channel;
use super::registers::DATA;
use crate::worker::Worker;
use crate::{Drive, Error};

/// The bus master registers: 8 ports for each channel.
const MASTER_BAR: usize = 4;
const MASTER_SIZE: u64 = 16;
/// IDETIM: timing of each channel; its bit 15 lets the ports be decoded.
const TIMING: u16 = 0x40;
const DECODE: u16 = 1 << 15;
/// What firmware would have set: decoded, with the fastest timing for both drives.
const TIMING_AT_START: u16 = 0xa307;

/// Drives that a controller has room for: by channel, then first and second.
pub type Drives = [[Option<Drive>; 2]; 2];

/// The controller. Its ports answer from the beginning, as if firmware had set it up.
pub struct IdeController {
    config: Mutex<ConfigSpace>,
    cables: [Arc<Cable>; 2],
    master: Arc<Master>,
    _workers: Vec<Worker>,
}

impl IdeController {
    /// Puts the controller's ports on the chipset's bus. The function is still to be plugged into PCI.
    pub fn new(drives: Drives, chipset: &Chipset, memory: &View) -> Result<Arc<Self>, Error> {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x7111,
            revision: 1,
            // Both channels at their old addresses for ever; bus master.
            class: [0x01, 0x01, 0x80],
            subsystem_vendor: 0,
            subsystem: 0,
        });
        config.add_bar(MASTER_BAR, BarKind::Io, MASTER_SIZE)?;
        for channel in 0..2 {
            let place = usize::from(TIMING) + 2 * channel;
            config.set(place, &TIMING_AT_START.to_le_bytes());
            config.allow(place, &[0xff, 0xff]);
        }
        // SIDETIM, UDMACTL, UDMATIM: timings that change nothing here. All drives in Ultra DMA.
        config.allow(0x44, &[0xff]);
        config.set(0x48, &[0x0f]);
        config.allow(0x48, &[0x0f, 0x00, 0x33, 0x33]);
        let mut workers = Vec::new();
        let mut cable = |drives, (command, control, irq)| {
            let channel = Channel::new(drives, memory.clone(), chipset.connect(irq));
            workers.push(channel.start()?);
            let cable = Arc::new(Cable { channel, decoded: AtomicBool::new(true) });
            chipset.insert_ports(command, 8, 0, cable.clone())?;
            chipset.insert_ports(control, 1, CONTROL, cable.clone())?;
            Ok::<_, Error>(cable)
        };
        let ([first, second], [first_ports, second_ports]) = (drives, CHANNELS);
        let cables = [cable(first, first_ports)?, cable(second, second_ports)?];
        let master = Arc::new(Master { channels: cables.each_ref().map(|cable| cable.channel.clone()) });
        Ok(Arc::new(IdeController { config: Mutex::new(config), cables, master, _workers: workers }))
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn follow_config(&self) {
        let config = self.config();
        let may_master = config.bus_master();
        let mut timing = [0; 4];
        config.read(TIMING, &mut timing);
        drop(config);
        for (cable, timing) in self.cables.iter().zip(timing.chunks_exact(2)) {
            let decoded = timing.last().is_some_and(|high| u16::from(*high) << 8 & DECODE != 0);
            cable.decoded.store(decoded, Ordering::SeqCst);
            cable.channel.set_may_master(may_master);
        }
    }
}

impl PciFunction for IdeController {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.config().write(offset, data);
        self.follow_config();
    }

    fn windows(&self) -> Vec<BarWindow> {
        self.config().windows()
    }

    fn bar(&self, index: usize) -> Option<Arc<dyn Device>> {
        (index == MASTER_BAR).then(|| self.master.clone() as Arc<dyn Device>)
    }

    fn reset(&self) {
        self.config().reset();
        self.follow_config();
        self.cables.iter().for_each(|cable| cable.channel.reset());
    }
}

/// The offset of the control block.
const CONTROL: u64 = 8;

/// The ports of a channel.
struct Cable {
    channel: Arc<Channel>,
    decoded: AtomicBool,
}

impl Device for Cable {
    fn width(&self) -> usize {
        4
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if !self.decoded.load(Ordering::SeqCst) {
            return;
        }
        match offset {
            DATA => self.channel.read_data(data),
            CONTROL => data.fill(self.channel.alternate_status()),
            _ => (offset..).zip(data).for_each(|(offset, byte)| *byte = self.channel.read(offset)),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if !self.decoded.load(Ordering::SeqCst) {
            return;
        }
        match (offset, data) {
            (DATA, _) => self.channel.write_data(data),
            (CONTROL, [value, ..]) => self.channel.write_control(*value),
            _ => (offset..).zip(data).for_each(|(offset, byte)| self.channel.write(offset, *byte)),
        }
    }

    fn reset(&self) {
        // The PCI function does it.
    }
}

/// The bus master registers.
struct Master {
    channels: [Arc<Channel>; 2],
}

impl Master {
    fn channel(&self, offset: u64) -> Option<(&Channel, u64)> {
        Some((self.channels.get(offset as usize / 8)?, offset % 8))
    }
}

impl Device for Master {
    fn width(&self) -> usize {
        4
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        for (offset, byte) in (offset..).zip(data) {
            *byte = self.channel(offset).map_or(0xff, |(channel, offset)| channel.read_master(offset));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (offset, byte) in (offset..).zip(data) {
            if let Some((channel, offset)) = self.channel(offset) {
                channel.write_master(offset, *byte);
            }
        }
    }

    fn reset(&self) {}
}
