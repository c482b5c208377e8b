//! All devices of a machine, each at its address and on its line.

use std::sync::Arc;

use memory::Ram;

use crate::a20::A20Gate;
use crate::bus::{Device, DeviceBus};
use crate::constants::*;
use crate::coprocessor::{CoprocessorError, ERROR_IRQ, ERROR_PORT};
use crate::debug::{DEBUG_CONSOLE_PORTS, DEBUG_EXIT_SIZE, DebugConsole, DebugExit};
use crate::dma::{self, Dma};
use crate::flash::{self, Flash, Image, Rom, WriteLock};
use crate::fw_cfg::{self, FW_CFG_PORT, FW_CFG_SIZE, FwCfg};
use crate::hpet::Hpet;
use crate::i8042::{AUXILIARY_IRQ, KEYBOARD_IRQ, KeyboardController};
use crate::ioapic::IoApic;
use crate::irq::{InterruptLine, Lines};
use crate::pci::{ConfigPorts, HostBridge, LpcBridge, PciBus, PciFunction};
use crate::pic::Pic;
use crate::pit::{PORT_B_OFFSET, Pit};
use crate::power::PowerManagement;
use crate::reset::{ResetControl, SystemControlA};
use crate::rtc::Rtc;
use crate::serial::Serial;
use crate::smi::Smi;
use crate::test_device::{self, TestDevice, TestMemory};
use crate::timer::Timers;
use crate::{ChipsetConfig, Error, Firmware, PowerEvents};

/// The devices of one machine.
pub struct Chipset {
    ports: Arc<DeviceBus>,
    memory: Arc<DeviceBus>,
    pic: Arc<Pic>,
    ioapic: Arc<IoApic>,
    lines: Arc<Lines>,
    pci: Arc<PciBus>,
    power: Arc<PowerManagement>,
    keyboard: Arc<KeyboardController>,
    serial: [Option<Arc<Serial>>; 4],
    timers: Timers,
    rtc: Arc<Rtc>,
    dma: Arc<Dma>,
    coprocessor: Arc<CoprocessorError>,
    debug_console: Option<Arc<DebugConsole>>,
    /// What keeps firmware in the memory map.
    _rom: Option<Rom>,
    /// All of the above and more, in the order in which they are reset: interrupt controllers last.
    devices: Vec<Arc<dyn Device>>,
}

impl Chipset {
    /// Puts a chipset together, in power-on state. It raises interrupts through `interrupts` and reports what the guest
    /// asks of the machine to `power`.
    pub fn new(
        config: ChipsetConfig,
        interrupts: Arc<dyn engine::Interrupts>,
        power: Arc<dyn PowerEvents>,
    ) -> Result<Arc<Self>, Error> {
        let ChipsetConfig { ram, cpus, clock, serial: sinks, firmware, debug_console, debug_exit, smm, test_device } =
            config;
        let starts_with_firmware = firmware.is_some();
        let timers = Timers::start(clock.clone()).map_err(|source| Error::Thread { what: "timers", source })?;
        let (ports, memory) = (Arc::new(DeviceBus::ports()), Arc::new(DeviceBus::memory()));
        let pic = Arc::new(Pic::new(interrupts.clone()));
        let ioapic = Arc::new(IoApic::new(interrupts.clone()));
        let lines = Arc::new(Lines::new(pic.clone(), ioapic.clone()));
        let pci = Arc::new(PciBus::new(&memory, &ports));
        let mut builder = Builder { ports: &ports, memory: &memory, devices: Vec::new() };
        let gate = A20Gate::new(ram.map().clone());

        let (pit_line, rtc_line) = (Arc::new(lines.connect(PIT_IRQ)), Arc::new(lines.connect(RTC_IRQ)));
        let pit = Pit::new(clock.clone(), &timers, pit_line.clone());
        builder.ports(&[(PIT_PORT, 4, 0), (PORT_B, 1, PORT_B_OFFSET)], pit)?;
        let rtc = Rtc::new(clock.clone(), &timers, rtc_line.clone(), ram.size(), cpus);
        builder.ports(&[(RTC_PORT, 2, 0)], rtc.clone())?;
        let dma = Dma::new(ram.view().clone());
        builder.ports(&[(0x00, 16, dma::FIRST), (0xc0, 32, dma::SECOND), (0x80, 16, dma::PAGES)], dma.clone())?;
        let coprocessor = Arc::new(CoprocessorError::new(lines.connect(ERROR_IRQ)));
        builder.ports(&[(ERROR_PORT, 1, 0)], coprocessor.clone())?;
        let hpet = Hpet::new(clock.clone(), &timers, &lines, vec![pit_line, rtc_line], interrupts.clone());
        builder.memory(HPET_BASE, HPET_SIZE, hpet)?;
        let smm = smm && starts_with_firmware;
        let smi = Smi::new(smm.then(|| interrupts.clone()));
        let sci = lines.connect(SCI_IRQ);
        let management = PowerManagement::new(clock.clone(), &timers, sci, power.clone(), smi.clone());
        builder.devices.push(management.clone());
        builder.ports(&[(APM_PORT, 2, 0)], smi.clone())?;
        let (keyboard_line, auxiliary_line) = (lines.connect(KEYBOARD_IRQ), lines.connect(AUXILIARY_IRQ));
        let keyboard =
            KeyboardController::new(clock.clone(), &timers, keyboard_line, auxiliary_line, gate.clone(), power.clone());
        builder.ports(&[(I8042_DATA_PORT, 1, 0), (I8042_COMMAND_PORT, 1, 1)], keyboard.clone())?;
        builder.ports(&[(PORT_A, 1, 0)], Arc::new(SystemControlA::new(gate, power.clone())))?;

        let mut serial = [const { None }; 4];
        for ((place, sink), (port, irq)) in serial.iter_mut().zip(sinks).zip(SERIAL_PORTS) {
            let Some(sink) = sink else { continue };
            let device = Serial::new(clock.clone(), &timers, lines.connect(irq), sink)
                .map_err(|source| Error::Thread { what: "a serial port", source })?;
            builder.ports(&[(port, SERIAL_SIZE, 0)], device.clone())?;
            *place = Some(device);
        }

        let debug_console = debug_console
            .map(DebugConsole::new)
            .transpose()
            .map_err(|source| Error::Thread { what: "the debug console", source })?
            .map(Arc::new);
        if let Some(console) = &debug_console {
            builder.ports(&DEBUG_CONSOLE_PORTS.map(|port| (port, 1, 0)), console.clone())?;
        }
        if let Some(port) = debug_exit {
            builder.ports(&[(port, DEBUG_EXIT_SIZE, 0)], Arc::new(DebugExit::new(power.clone())))?;
        }
        if test_device {
            builder.ports(&TestDevice::PORTS, Arc::new(TestDevice::new(&lines)))?;
            builder.memory(test_device::MEMORY_BASE, test_device::MEMORY_SIZE, Arc::new(TestMemory::default()))?;
        }
        let flash_lock = Arc::new(WriteLock::default());
        let rom = match firmware {
            Some(mut firmware) => {
                firmware.items.extend(smi.items());
                builder.firmware(firmware, &ram, &flash_lock)?
            }
            None => builder.fw_cfg(&ram, fw_cfg::facts(ram.size(), cpus)).map(|()| None)?,
        };

        let mechanism = ConfigPorts::new(pci.clone(), ResetControl::new(power));
        builder.ports(&[(PCI_CONFIG_PORT, 8, 0)], Arc::new(mechanism))?;
        pci.insert(
            0x00,
            0,
            HostBridge::new(&ram, Arc::downgrade(&pci), starts_with_firmware, smm.then_some(flash_lock)),
        )?;
        pci.insert(0x1f, 0, LpcBridge::new(management.clone(), lines.clone(), smi, starts_with_firmware))?;

        builder.memory(IOAPIC_BASE, IOAPIC_SIZE, ioapic.clone())?;
        builder.ports(&[(0x20, 2, 0), (0xa0, 2, 2), (0x4d0, 2, 4)], pic.clone())?;
        let devices = builder.devices;
        let power = management;
        Ok(Arc::new(Chipset {
            ports,
            memory,
            pic,
            ioapic,
            lines,
            pci,
            power,
            keyboard,
            serial,
            timers,
            rtc,
            dma,
            coprocessor,
            debug_console,
            _rom: rom,
            devices,
        }))
    }

    /// Puts all devices into their power-on state. No vCPU may be running.
    pub fn reset(&self) {
        self.devices.iter().for_each(|device| device.reset());
    }

    /// Stops the timers: while the vCPUs are paused, no device ticks.
    pub fn pause(&self) {
        self.timers.pause();
    }

    pub fn resume(&self) {
        self.timers.resume();
    }

    /// Sends bytes to the guest by a serial port (COM1 is 0), if it is there. Waits while the guest is far behind.
    pub fn serial_input(&self, port: usize, data: &[u8]) {
        if let Some(Some(port)) = self.serial.get(port) {
            port.send_input(data);
        }
    }

    /// Waits until what the guest sent to its serial ports and its debug console has been written.
    pub fn flush(&self) {
        self.serial.iter().flatten().for_each(|port| port.flush());
        self.debug_console.iter().for_each(|console| console.flush());
    }

    /// What people type and point with.
    pub fn keyboard(&self) -> &Arc<KeyboardController> {
        &self.keyboard
    }

    /// Asks the guest to shut down, as the button does.
    pub fn press_power_button(&self) {
        self.power.press_power_button();
    }

    /// The DMA controllers, for devices that have a channel.
    pub fn dma(&self) -> &Arc<Dma> {
        &self.dma
    }

    /// Notes the types of the floppy drives in CMOS, by their codes there (0: there is none).
    pub fn set_floppy_drives(&self, types: [u8; 2]) {
        self.rtc.set_floppy_drives(types);
    }

    /// A connection to interrupt line `number`: an ISA IRQ below 16, an input of the I/O APIC above.
    pub fn connect(&self, number: u8) -> InterruptLine {
        self.lines.connect(number)
    }

    /// A connection to the interrupt line of a PCI function: of device `device`, interrupt pin `pin` (0 is INTA).
    pub fn connect_pci(&self, device: u8, pin: u8) -> InterruptLine {
        self.lines.connect(pci_gsi(device, pin))
    }

    /// Lets a device that comes on top answer at `length` ports from `first`, the first of which it sees as `offset`. Its
    /// reset is its own matter.
    pub fn insert_ports(&self, first: u16, length: u16, offset: u64, device: Arc<dyn Device>) -> Result<(), Error> {
        self.ports.insert(first.into(), length.into(), offset, device)
    }

    /// As [`insert_ports`](Self::insert_ports), with addresses that are not RAM.
    pub fn insert_memory(&self, first: u64, length: u64, offset: u64, device: Arc<dyn Device>) -> Result<(), Error> {
        self.memory.insert(first, length, offset, device)
    }

    /// Plugs a function into PCI bus 0.
    pub fn insert_pci(&self, device: u8, function: u8, what: Arc<dyn PciFunction>) -> Result<(), Error> {
        self.pci.insert(device, function, what)
    }
}

/// Puts devices on the buses and remembers them.
struct Builder<'a> {
    ports: &'a DeviceBus,
    memory: &'a DeviceBus,
    devices: Vec<Arc<dyn Device>>,
}

impl Builder<'_> {
    /// A device at ranges of ports: first port, number of ports, and the device's offset of the first.
    fn ports(&mut self, ranges: &[(u16, u16, u64)], device: Arc<dyn Device>) -> Result<(), Error> {
        for &(first, length, offset) in ranges {
            self.ports.insert(first.into(), length.into(), offset, device.clone())?;
        }
        self.devices.push(device);
        Ok(())
    }

    fn memory(&mut self, first: u64, length: u64, device: Arc<dyn Device>) -> Result<(), Error> {
        self.memory.insert(first, length, 0, device.clone())?;
        self.devices.push(device);
        Ok(())
    }

    /// What software is told about the machine.
    fn fw_cfg(&mut self, ram: &Ram, items: Vec<fw_cfg::Item>) -> Result<(), Error> {
        self.ports(&[(FW_CFG_PORT, FW_CFG_SIZE, 0)], Arc::new(FwCfg::new(ram.view().clone(), items)))
    }

    /// The firmware in memory, and what it is told.
    fn firmware(&mut self, firmware: Firmware, ram: &Ram, lock: &Arc<WriteLock>) -> Result<Option<Rom>, Error> {
        self.fw_cfg(ram, firmware.items)?;
        let chips = match firmware.image {
            Image::Rom(content) => return flash::rom(ram, &content).map(Some),
            Image::Flash(chips) => chips,
        };
        let mut end = flash::TOP;
        for chip in chips {
            let chip = Flash::new(ram, chip, end, lock.clone())?;
            let (base, size) = chip.place();
            self.memory(base, size, chip)?;
            end = base;
        }
        Ok(None)
    }
}

impl engine::Bus for Chipset {
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.memory.read(address, data);
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.memory.write(address, data);
    }

    fn mmio_read_from_smm(&self, address: u64, data: &mut [u8]) {
        self.memory.read_from_smm(address, data);
    }

    fn mmio_write_from_smm(&self, address: u64, data: &[u8]) {
        self.memory.write_from_smm(address, data);
    }

    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.ports.read(port.into(), data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        self.ports.write(port.into(), data);
    }

    fn acknowledge_pic(&self) -> u8 {
        self.pic.acknowledge()
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.ioapic.end_of_interrupt(vector);
    }

    fn set_ferr(&self, asserted: bool) -> bool {
        self.coprocessor.set_ferr(asserted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::HostClock;
    use crate::testing::{Power, Random, Recorder};
    use engine::Bus;
    use std::time::{Duration, Instant};

    struct Bench {
        chipset: Arc<Chipset>,
        recorder: Arc<Recorder>,
        power: Arc<Power>,
    }

    impl Bench {
        fn new() -> Self {
            let (recorder, power) = (Arc::new(Recorder::default()), Arc::new(Power::default()));
            let sink = || Some(Box::new(std::io::sink()) as Box<dyn std::io::Write + Send>);
            let config = ChipsetConfig {
                ram: Ram::new(1 << 30).unwrap(),
                cpus: 2,
                clock: Arc::new(HostClock::new()),
                serial: [sink(), sink(), None, None],
                firmware: None,
                debug_console: None,
                debug_exit: None,
                smm: false,
                test_device: true,
            };
            let chipset = Chipset::new(config, recorder.clone(), power.clone()).unwrap();
            Bench { chipset, recorder, power }
        }

        fn outb(&self, port: u16, value: u8) {
            self.chipset.pio_write(port, &[value]);
        }

        fn inb(&self, port: u16) -> u8 {
            let mut data = [0];
            self.chipset.pio_read(port, &mut data);
            data[0]
        }

        fn set_redirection(&self, pin: u32, entry: u32) {
            self.chipset.mmio_write(IOAPIC_BASE, &(0x10 + 2 * pin).to_le_bytes());
            self.chipset.mmio_write(IOAPIC_BASE + 0x10, &entry.to_le_bytes());
        }

        fn wait_for(&self, what: impl Fn() -> bool) {
            let deadline = Instant::now() + Duration::from_secs(20);
            while !what() {
                assert!(Instant::now() < deadline);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    #[test]
    fn the_timer_interrupts_through_both_controllers() {
        let bench = Bench::new();
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0xfe)] {
            bench.outb(port, value);
        }
        bench.set_redirection(2, 0x41);
        for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
            bench.outb(port, value);
        }
        bench.wait_for(|| bench.recorder.messages.lock().unwrap().len() >= 3);
        assert!(bench.recorder.output());
        assert_eq!(bench.chipset.acknowledge_pic(), 0x30);
        assert!(bench.recorder.take().iter().all(|message| *message == (0xfee0_0000, 0x4041)));
        bench.chipset.pause();
        std::thread::sleep(Duration::from_millis(20));
        bench.recorder.take();
        std::thread::sleep(Duration::from_millis(20));
        assert!(bench.recorder.take().is_empty());
        bench.chipset.resume();
        bench.wait_for(|| !bench.recorder.take().is_empty());
    }

    #[test]
    fn a_level_interrupt_goes_the_whole_way() {
        let bench = Bench::new();
        let line = bench.chipset.connect_pci(3, 0);
        bench.set_redirection(u32::from(line.number()), 0x8055);
        line.raise();
        assert_eq!(bench.recorder.take(), [(0xfee0_0000, 0xc055)]);
        bench.chipset.end_of_interrupt(0x55);
        assert_eq!(bench.recorder.take().len(), 1);
        line.lower();
        bench.chipset.end_of_interrupt(0x55);
        assert!(bench.recorder.take().is_empty());
    }

    #[test]
    fn software_finds_the_devices_where_the_constants_say() {
        let bench = Bench::new();
        assert_eq!(bench.inb(0x3f8 + 5), 0x60);
        assert_eq!(bench.inb(0x2f8 + 5), 0x60);
        assert_eq!(bench.inb(0x3e8 + 5), 0xff, "no such port");
        bench.chipset.pio_write(FW_CFG_PORT, &fw_cfg::key::CPUS.to_le_bytes());
        assert_eq!(bench.inb(FW_CFG_PORT + 1), 2);
        assert_eq!(bench.inb(PM1A_CONTROL_PORT) & 1, 1);
        assert_eq!(bench.inb(I8042_COMMAND_PORT) & 1, 0);
        bench.outb(RTC_PORT, 0x0d);
        assert_eq!(bench.inb(RTC_PORT + 1), 0x80);
        let mut id = [0; 4];
        bench.chipset.mmio_read(ECAM_BASE, &mut id);
        assert_eq!(u32::from_le_bytes(id), 0x29c0_8086);
        bench.outb(RESET_PORT, RESET_VALUE);
        bench.chipset.pio_write(PM1A_CONTROL_PORT, &(u16::from(S5_SLEEP_TYPE) << 10 | 1 << 13).to_le_bytes());
        assert_eq!(bench.power.take(), ["reset", "off"]);
    }

    #[test]
    fn every_device_goes_when_the_chipset_goes() {
        let bench = Bench::new();
        let (pci, serial) =
            (Arc::downgrade(&bench.chipset.pci), Arc::downgrade(bench.chipset.serial[0].as_ref().unwrap()));
        drop(bench);
        assert!(pci.upgrade().is_none() && serial.upgrade().is_none());
    }

    #[test]
    fn random_accesses_everywhere_do_no_harm() {
        let bench = Bench::new();
        let mut random = Random(0x1234_5678_9abc_def1);
        let ports =
            [0, 0x20, 0x40, 0x60, 0x70, 0x90, 0xa0, 0xe0, 0x2f8, 0x3f8, 0x4d0, 0x510, 0x600, 0xcf8, 0x2000, 0xfffc];
        let places = [IOAPIC_BASE, IOAPIC_BASE + 0x10, ECAM_BASE, ECAM_BASE + 0xf_8000, u64::MAX - 64, 0];
        for round in 0..100_000 {
            let mut data = [0; 64];
            data.iter_mut().for_each(|byte| *byte = random.draw() as u8);
            let port: u16 = ports[random.below(ports.len() as u64) as usize];
            let port = port.wrapping_add(random.below(16) as u16);
            let place = places[random.below(places.len() as u64) as usize].wrapping_add(random.below(128));
            let short = 1 << random.below(3);
            let long = 1 + random.below(64) as usize;
            match random.below(6) {
                0 | 1 => bench.chipset.pio_write(port, &data[..short]),
                2 => bench.chipset.pio_read(port, &mut data[..short]),
                3 => bench.chipset.mmio_write(place, &data[..long]),
                4 => bench.chipset.mmio_read(place, &mut data[..long]),
                _ => {
                    bench.chipset.acknowledge_pic();
                    bench.chipset.end_of_interrupt(data[0]);
                }
            }
            if round % 1000 == 0 {
                bench.chipset.reset();
            }
            bench.recorder.take();
            bench.power.take();
        }
        bench.chipset.reset();
        assert!(!bench.recorder.output());
    }
}
