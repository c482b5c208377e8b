//! The PCI function: configuration space with its capabilities, and the window that they point into.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chipset::pci::msix::ENTRY_SIZE;
use chipset::pci::{BarKind, BarWindow, ConfigSpace, Identity, OptionRom, PciFunction, ROM_BAR};
use chipset::{Device, InterruptLine};
use engine::Doorbells;
use memory::View;

use super::common::{self, Common};
use super::interrupts::Interrupter;
use crate::{DeviceType, Error, Event, VirtioDevice};

/// Virtio 1.2, 4.1.2: vendor, and device 0x1040 plus the type; revision 1 or more is modern.
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
const REVISION: u8 = 1;
/// The status register's bit for "the interrupt line would be asserted" (PCI local bus 3.0, 6.2.3).
const STATUS: u16 = 6;
const INTERRUPT_STATUS: u8 = 1 << 3;
/// Subsystem device ids from here on are for modern devices.
const SUBSYSTEM: u16 = 0x40;

/// The window: one page for each structure, all behind one base address register.
const BAR: u8 = 0;
const BAR_SIZE: u64 = 0x8000;
const COMMON: usize = 0x0000;
const ISR: usize = 0x1000;
const DEVICE: usize = 0x2000;
const NOTIFY: usize = 0x3000;
const TABLE: usize = 0x4000;
const PENDING: usize = 0x5000;
const PAGE: usize = 0x1000;
/// Distance of the queues' notify registers.
const NOTIFY_MULTIPLIER: u32 = 4;
/// What the table's page has room for, less one vector for the configuration.
const MAX_QUEUES: usize = PAGE / ENTRY_SIZE - 1;

/// Capabilities: vendor-specific and MSI-X, and the configuration types of the former (virtio 1.2, 4.1.4).
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;
/// `struct virtio_pci_cap` without what follows it.
const CAP_LENGTH: u8 = 16;
/// In it: the window, the offset in it, the length, and for CAP_PCI the data.
const CAP_BAR: u16 = 4;
const CAP_OFFSET: u16 = 8;
const CAP_SIZE: u16 = 12;
const CAP_DATA: u16 = 16;
/// MSI-X message control, within its capability.
const MSIX_CONTROL: u16 = 2;

struct Places {
    msix: u16,
    /// The capability by which the window can be reached through configuration space (virtio 1.2, 4.1.4.9).
    access: u16,
}

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    config: Mutex<ConfigSpace>,
    places: Places,
    window: Arc<Window>,
    rom: Option<Arc<OptionRom>>,
}

impl VirtioPci {
    /// Gives `device` a place on a bus. It interrupts by MSI-X through `interrupts`, or by `line`.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        memory: &View,
        interrupts: Arc<dyn engine::Interrupts>,
        line: InterruptLine,
    ) -> Result<Arc<Self>, Error> {
        let kind = device.device_type();
        let queues = device.queue_sizes().len();
        if queues > MAX_QUEUES {
            return Err(Error::TooManyQueues { device: kind.name(), queues, max: MAX_QUEUES });
        }
        let host = |source| Error::Host { device: kind.name(), what: "can't make an event", source };
        let kicks: Result<Vec<_>, _> = (0..queues).map(|_| Event::new().map(Arc::new)).collect();
        let kicks = kicks.map_err(host)?;
        let (mut config, places) = config_space(kind, queues)?;
        let rom = OptionRom::add(device.option_rom(), &mut config)?;
        let interrupter = Arc::new(Interrupter::new(interrupts, line, queues));
        let memory = Arc::new(memory.clone());
        let common = Mutex::new(Common::new(device.clone(), memory, interrupter.clone(), kicks.clone()));
        let window = Arc::new(Window { common, device, interrupter, kicks, bells: Mutex::default() });
        Ok(Arc::new(VirtioPci { config: Mutex::new(config), places, window, rom }))
    }

    /// From now on notifications by the driver go through `doorbells`. To be called before the function is on a bus.
    pub fn use_doorbells(&self, doorbells: Arc<dyn Doorbells>) {
        self.window.bells().doorbells = Some(doorbells);
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the driver has put into the access capability: offset and length, if it makes a proper access.
    fn access(&self) -> Option<(usize, usize)> {
        let place = self.places.access;
        let mut bytes = [0; CAP_DATA as usize];
        self.config().read(place, &mut bytes);
        let dword = |at: u16| {
            let mut value = [0; 4];
            bytes.iter().skip(at.into()).zip(&mut value).for_each(|(from, to)| *to = *from);
            u32::from_le_bytes(value) as usize
        };
        let (offset, length) = (dword(CAP_OFFSET), dword(CAP_SIZE));
        let proper = bytes.get(usize::from(CAP_BAR)) == Some(&BAR)
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(length)
            && (offset as u64) < BAR_SIZE;
        proper.then_some((offset, length))
    }

    /// Whether an access to configuration space touches the data of the access capability.
    fn touches_data(&self, offset: u16) -> bool {
        (offset & !3) == self.places.access + CAP_DATA
    }
}

fn config_space(kind: DeviceType, queues: usize) -> Result<(ConfigSpace, Places), Error> {
    let class = match kind {
        DeviceType::Net => [0x02, 0x00, 0x00],
        DeviceType::Block => [0x01, 0x00, 0x00],
        DeviceType::Console => [0x07, 0x80, 0x00],
        _ => [0xff, 0x00, 0x00],
    };
    let mut config = ConfigSpace::new(Identity {
        vendor: VENDOR,
        device: FIRST_DEVICE + kind as u16,
        revision: REVISION,
        class,
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    });
    config.add_bar(BAR.into(), BarKind::Memory64 { prefetchable: false }, BAR_SIZE)?;
    config.set_interrupt_pin(1);
    let structure = |what: u8, more: u8, offset: usize, length: usize| {
        let mut body = vec![CAP_LENGTH + more, what, BAR, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((length as u32).to_le_bytes());
        body
    };
    config.add_capability(CAP_VENDOR, &structure(CAP_COMMON, 0, COMMON, common::SIZE), &[])?;
    let mut notify = structure(CAP_NOTIFY, 4, NOTIFY, (queues.max(1)) * NOTIFY_MULTIPLIER as usize);
    notify.extend(NOTIFY_MULTIPLIER.to_le_bytes());
    config.add_capability(CAP_VENDOR, &notify, &[])?;
    config.add_capability(CAP_VENDOR, &structure(CAP_ISR, 0, ISR, 1), &[])?;
    config.add_capability(CAP_VENDOR, &structure(CAP_DEVICE, 0, DEVICE, PAGE), &[])?;
    let mut access = structure(CAP_PCI, 4, 0, 0);
    access.extend([0; 4]);
    let mut writable = vec![0; access.len()];
    // The window's number, the offset, the length; the data is not memory but an access.
    for (index, mask) in writable.iter_mut().enumerate() {
        let at = index as u16 + 2;
        *mask = if at == CAP_BAR || (CAP_OFFSET..CAP_DATA).contains(&at) { 0xff } else { 0 };
    }
    let access = config.add_capability(CAP_VENDOR, &access, &writable)?;
    let mut msix = Vec::new();
    msix.extend((queues as u16).to_le_bytes());
    msix.extend((TABLE as u32 | u32::from(BAR)).to_le_bytes());
    msix.extend((PENDING as u32 | u32::from(BAR)).to_le_bytes());
    let msix = config.add_capability(CAP_MSIX, &msix, &[0x00, 0xc0])?;
    Ok((config, Places { msix: msix.into(), access: access.into() }))
}

impl PciFunction for VirtioPci {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        if self.touches_data(offset) {
            data.fill(0);
            if let Some((target, length)) = self.access() {
                let mut value = [0; 4];
                if let Some(value) = value.get_mut(..length) {
                    self.window.read(target as u64, value);
                }
                data.iter_mut().zip(value.iter().skip(usize::from(offset & 3))).for_each(|(to, from)| *to = *from);
            }
            return;
        }
        self.config().read(offset, data);
        let status = STATUS.checked_sub(offset).and_then(|index| data.get_mut(usize::from(index)));
        if let (Some(status), true) = (status, self.window.interrupter.wants_line()) {
            *status |= INTERRUPT_STATUS;
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        if self.touches_data(offset) {
            if let Some((target, length)) = self.access()
                && let Some(data) = data.get(..length).filter(|_| offset & 3 == 0)
            {
                self.window.write(target as u64, data);
            }
            return;
        }
        let mut config = self.config();
        config.write(offset, data);
        let mut control = [0; 2];
        config.read(self.places.msix + MSIX_CONTROL, &mut control);
        let line_disabled = config.intx_disabled();
        drop(config);
        let interrupter = &self.window.interrupter;
        interrupter.set_line_disabled(line_disabled);
        let released = interrupter.msix().set_control(u16::from_le_bytes(control));
        released.into_iter().for_each(|message| interrupter.send(message));
    }

    fn windows(&self) -> Vec<BarWindow> {
        self.config().windows()
    }

    fn bar(&self, index: usize) -> Option<Arc<dyn Device>> {
        match index {
            ROM_BAR => self.rom.clone().map(|rom| rom as Arc<dyn Device>),
            index => (index == usize::from(BAR)).then(|| self.window.clone() as Arc<dyn Device>),
        }
    }

    fn reset(&self) {
        self.window.reset();
        self.config().reset();
        self.window.interrupter.msix().reset();
        self.window.interrupter.set_line_disabled(false);
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.window.mapped(None);
        self.window.device.reset();
    }
}

/// What answers behind the base address register.
struct Window {
    common: Mutex<Common>,
    device: Arc<dyn VirtioDevice>,
    interrupter: Arc<Interrupter>,
    kicks: Vec<Arc<Event>>,
    bells: Mutex<Bells>,
}

/// The queues' notify registers, as far as the engine answers for them.
#[derive(Default)]
struct Bells {
    doorbells: Option<Arc<dyn Doorbells>>,
    /// Address and queue of each that is attached.
    attached: Vec<(u64, usize)>,
}

impl Window {
    fn bells(&self) -> MutexGuard<'_, Bells> {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn common(&self) -> MutexGuard<'_, Common> {
        self.common.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Window {
    fn width(&self) -> usize {
        4
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let (page, offset) = (offset as usize & !(PAGE - 1), offset as usize & (PAGE - 1));
        data.fill(0);
        match page {
            COMMON => self.common().read(offset, data),
            ISR => {
                if let (0, Some(first)) = (offset, data.first_mut()) {
                    *first = self.interrupter.take_isr();
                }
            }
            DEVICE => self.device.read_config(offset, data),
            TABLE => self.interrupter.msix().read_table(offset, data),
            PENDING => self.interrupter.msix().read_pending(offset, data),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (page, offset) = (offset as usize & !(PAGE - 1), offset as usize & (PAGE - 1));
        match page {
            NOTIFY => {
                if let Some(kick) = self.kicks.get(offset / NOTIFY_MULTIPLIER as usize) {
                    kick.set();
                }
            }
            COMMON => self.common().write(offset, data),
            DEVICE => self.device.write_config(offset, data),
            TABLE => {
                let released = self.interrupter.msix().write_table(offset, data);
                if let Some(message) = released {
                    self.interrupter.send(message);
                }
            }
            _ => {}
        }
    }

    fn reset(&self) {
        self.common().reset();
    }

    fn mapped(&self, address: Option<u64>) {
        let Bells { doorbells: Some(doorbells), attached } = &mut *self.bells() else { return };
        for (address, queue) in attached.drain(..) {
            if let Some(kick) = self.kicks.get(queue) {
                doorbells.detach(address, kick.as_fd());
            }
        }
        for (queue, kick) in self.kicks.iter().enumerate() {
            let offset = (NOTIFY + queue * NOTIFY_MULTIPLIER as usize) as u64;
            let at = address.and_then(|address| address.checked_add(offset));
            attached.extend(at.filter(|at| doorbells.attach(*at, kick.as_fd())).map(|at| (at, queue)));
        }
    }
}
