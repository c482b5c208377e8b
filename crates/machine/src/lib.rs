//! A machine: RAM, an engine's vCPUs, a chipset and what is booted on them, put together and run.
//!
//! The data flow to follow: [`Machine::new`] takes RAM and an engine (made by [`select_engine`]), wires the chipset to
//! the engine's interrupts and the vCPUs to the chipset's bus, loads the kernel and puts the first vCPU at its entry, or
//! gives the chipset firmware and lets the first vCPU begin where a processor does.
//! [`Machine::run`] gives each vCPU a host thread and waits for all of them to leave; [`run_control`] says when they
//! do. After a reset it resets and loads the same parts again, after all else it returns.
#![forbid(unsafe_code)]

mod engines;
mod peripherals;
mod run_control;
#[cfg(test)]
mod tests;

use std::io::Write;
use std::sync::Arc;
use std::thread;

use arch::CpuState;
use boot::BootConfig;
use chipset::flash::Image;
use chipset::i8042::KeyboardController;
use chipset::{Chipset, ChipsetConfig, Clock, Firmware, HostClock};
use display::vga::{self, Vga};
use engine::{Engine, Vcpu};
use memory::Ram;
use peripherals::Plugged;
use run_control::{Request, RunControl};
use virtio::VirtioDevice;
use virtio::pci::VirtioPci;

pub use engines::{Accel, Selection, select_engine};
pub use ethernet::Model as CardModel;
pub use peripherals::{Card, Peripherals};
pub use translator::Config as TranslatorConfig;
pub use translator::native::Mode as DirectExecution;

/// The most vCPUs of a machine. Local APIC ids are 8 bits wide where x2APIC is off, and 255 of them means all.
pub const MAX_CPUS: u32 = 128;

/// PCI devices that a machine has room for, besides the bridges and the graphics adapter: numbers 1 to 29.
pub const MAX_DEVICES: usize = 29;

/// The PCI device number of the graphics adapter.
const VGA_SLOT: u8 = 30;

/// Why a machine could not be made, started or kept running.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error(transparent)]
    Engine(#[from] engine::Error),
    #[error("{}", kvm_message(.0))]
    Kvm(#[from] kvm::Error),
    #[error("--accel kvm: the firmware needs system-management mode, which there is only with --accel translate")]
    NoSmm,
    #[error(transparent)]
    Chipset(#[from] chipset::Error),
    #[error(transparent)]
    Boot(#[from] boot::Error),
    #[error(transparent)]
    Source(Box<dyn std::error::Error + Send + Sync>),
    #[error(transparent)]
    Virtio(#[from] virtio::Error),
    #[error(transparent)]
    Storage(#[from] storage::Error),
    #[error(transparent)]
    Display(#[from] display::Error),
    #[error(transparent)]
    Ethernet(#[from] ethernet::Error),
    #[error("{devices} devices are too many: PCI bus 0 has room for {MAX_DEVICES}")]
    TooManyDevices { devices: usize },
    #[error("can't start the thread of vCPU {id}: {source}")]
    Thread { id: u32, source: std::io::Error },
    #[error("{0}")]
    Vcpu(String),
}

/// For a user who has asked for this engine: what else there is.
fn kvm_message(error: &kvm::Error) -> String {
    match error {
        kvm::Error::Model(error) => error.to_string(),
        error => format!("--accel kvm: {error}; --accel translate needs none of it"),
    }
}

/// How a machine is to be.
pub struct Config {
    /// From 1 to [`MAX_CPUS`].
    pub cpus: u32,
    pub start: Start,
    /// Where the serial ports COM1 to COM4 send what the guest writes.
    pub serial: [SerialOutput; 4],
    /// Paravirtual devices, in the order of their PCI device numbers, from 1 on.
    pub devices: Vec<Arc<dyn VirtioDevice>>,
    /// What else a PC has.
    pub peripherals: Peripherals,
    /// The graphics adapter, if there is one.
    pub vga: Option<VgaConfig>,
    /// A guest reset ends [`Machine::run`] instead of starting the machine again.
    pub no_reboot: bool,
    /// Where the debug console leads; `None`: there is none.
    pub debug_console: SerialOutput,
    /// The first port by which the guest can end the machine.
    pub debug_exit: Option<u16>,
    /// Whether there is the device of test programs ([`chipset::test_device`]).
    pub test_device: bool,
}

/// What the first vCPU executes first.
pub enum Start {
    /// A kernel, asked for at every start: after a reset it may be another one.
    Kernel(BootSource),
    Firmware(Firmware),
}

/// Says what to boot. The files that it names last until it is called again, or dropped.
pub type BootSource = Box<dyn FnMut() -> Result<BootConfig, Box<dyn std::error::Error + Send + Sync>> + Send>;

/// What a machine can choose about its graphics adapter.
#[derive(Clone, Debug, Default)]
pub struct VgaConfig {
    /// The option ROM by which firmware uses it; empty: none.
    pub rom: Vec<u8>,
}

/// Puts what is booted into RAM and gives the first vCPU's state at its entry.
type Loader = Box<dyn FnMut(&Ram) -> Result<CpuState, Error> + Send>;

/// Where a serial port's output goes; `None`: no such port.
pub type SerialOutput = Option<Box<dyn Write + Send>>;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered the machine off.
    PowerOff,
    /// The guest reset the machine, and [`Config::no_reboot`] is set.
    Reset,
    /// [`Handle::end`] was called.
    Ended,
    /// The guest wrote this to its debug exit.
    DebugExit(u8),
}

/// A machine, until it is powered off.
pub struct Machine {
    ram: Ram,
    vcpus: Vec<Box<dyn Vcpu>>,
    chipset: Arc<Chipset>,
    control: Arc<RunControl>,
    loader: Loader,
    /// Those of the processors that wait to be started.
    msrs: Vec<(u32, u64)>,
    no_reboot: bool,
    devices: Vec<Arc<dyn VirtioDevice>>,
    plugged: Plugged,
    clock: Arc<dyn Clock>,
    vga: Option<Arc<Vga>>,
    has_firmware: bool,
}

impl Machine {
    /// Wires a machine together and loads what it boots; nothing runs yet. `engine` must run on `ram`.
    pub fn new(config: Config, ram: Ram, engine: &dyn Engine) -> Result<Self, Error> {
        let (loader, firmware): (Loader, _) = match config.start {
            Start::Kernel(mut source) => {
                let load = move |ram: &Ram| Ok(boot::load(ram, &source().map_err(Error::Source)?)?);
                (Box::new(load), None)
            }
            Start::Firmware(firmware) => (Box::new(|_: &Ram| Ok(CpuState::reset())), Some(firmware)),
        };
        let parts = ChipsetConfig {
            ram: ram.clone(),
            cpus: config.cpus,
            clock: Arc::new(HostClock::default()),
            serial: config.serial,
            firmware,
            debug_console: config.debug_console,
            debug_exit: config.debug_exit,
            smm: engine.has_smm(),
            test_device: config.test_device,
        };
        let mut machine = Self::assemble(parts, config.no_reboot, ram, engine, loader)?;
        machine.plug_in(config.devices, engine)?;
        let first_free = machine.devices.len() as u8 + 1;
        machine.plugged = config.peripherals.plug_in(first_free, &machine.chipset, machine.ram.view(), engine)?;
        if let Some(VgaConfig { rom }) = config.vga {
            let (chipset, clock) = (&machine.chipset, machine.clock.clone());
            machine.vga = Some(Vga::plug_in(chipset, &machine.ram, clock, VGA_SLOT, &rom)?);
            machine.start_screen();
        }
        Ok(machine)
    }

    fn plug_in(&mut self, devices: Vec<Arc<dyn VirtioDevice>>, engine: &dyn Engine) -> Result<(), Error> {
        if devices.len() > MAX_DEVICES {
            return Err(Error::TooManyDevices { devices: devices.len() });
        }
        for (number, device) in (1..).zip(&devices) {
            let line = self.chipset.connect_pci(number, 0);
            let function = VirtioPci::new(device.clone(), self.ram.view(), engine.interrupts(), line)?;
            if let Some(doorbells) = engine.doorbells() {
                function.use_doorbells(doorbells);
            }
            self.chipset.insert_pci(number, 0, function)?;
        }
        self.devices = devices;
        Ok(())
    }

    fn assemble(
        parts: ChipsetConfig,
        no_reboot: bool,
        ram: Ram,
        engine: &dyn Engine,
        loader: Loader,
    ) -> Result<Self, Error> {
        let clock = parts.clock.clone();
        let (cpus, firmware) = (parts.cpus, parts.firmware.is_some());
        // A BIOS goes on at its reset vector where software for the 80286 has left off; others would start over with devices
        // in whatever state.
        let resumes = matches!(&parts.firmware, Some(Firmware { image: Image::Rom(_), .. }));
        let control = Arc::new(RunControl::new(resumes.then(|| engine.interrupts())));
        let chipset = Chipset::new(parts, engine.interrupts(), control.clone())?;
        let vcpus = (0..cpus).map(|id| engine.create_vcpu(id, chipset.clone())).collect::<Result<Vec<_>, _>>()?;
        control.attach(vcpus.iter().map(|vcpu| vcpu.control()).collect());
        let msrs = if firmware { Vec::new() } else { boot::firmware_msrs() };
        let mut machine = Machine {
            ram,
            vcpus,
            chipset,
            control,
            loader,
            msrs,
            no_reboot,
            devices: Vec::new(),
            plugged: Plugged::default(),
            clock,
            vga: None,
            has_firmware: firmware,
        };
        // At once, so that what can't be booted is known before anything is said or done.
        machine.load()?;
        Ok(machine)
    }

    /// What other threads need to influence the machine while it runs.
    pub fn handle(&self) -> Handle {
        Handle { control: self.control.clone(), chipset: self.chipset.clone() }
    }

    /// What is to be seen of the machine, if anything is.
    pub fn vga(&self) -> Option<&Arc<Vga>> {
        self.vga.as_ref()
    }

    /// What people type and point with.
    pub fn keyboard(&self) -> &Arc<KeyboardController> {
        self.chipset.keyboard()
    }

    /// Runs until the guest or the user ends it, over as many resets as the guest asks for. To be called once.
    pub fn run(&mut self) -> Result<Outcome, Error> {
        let result = self.run_until_end();
        // Whoever still has a handle keeps the devices: what they hold back is to be on disk all the same.
        self.devices.iter().for_each(|device| device.reset());
        self.plugged.reset();
        result
    }

    fn run_until_end(&mut self) -> Result<Outcome, Error> {
        loop {
            self.execute()?;
            // What the guest wrote last is to be seen before the machine is gone.
            self.chipset.flush();
            match self.control.take_request() {
                Some(Request::PowerOff) => return Ok(Outcome::PowerOff),
                Some(Request::Reset) if self.no_reboot => return Ok(Outcome::Reset),
                Some(Request::End) => return Ok(Outcome::Ended),
                Some(Request::DebugExit(value)) => return Ok(Outcome::DebugExit(value)),
                Some(Request::Failed(why)) => return Err(Error::Vcpu(why)),
                Some(Request::Reset) | None => {
                    self.chipset.reset();
                    self.plugged.reset_legacy();
                    self.load()?;
                    self.start_screen();
                }
            }
        }
    }

    /// Without firmware, the adapter is put into its first mode by the machine.
    fn start_screen(&self) {
        if self.vga.is_some() && !self.has_firmware {
            vga::boot::start(&*self.chipset, VGA_SLOT);
        }
    }

    /// Loads the kernel and gives every vCPU its first state. RAM keeps what it held, as over a real warm reset.
    fn load(&mut self) -> Result<(), Error> {
        let entry = (self.loader)(&self.ram)?;
        for (id, vcpu) in self.vcpus.iter_mut().enumerate() {
            let waiting =
                CpuState { activity: arch::state::Activity::WaitForSipi, msrs: self.msrs.clone(), ..CpuState::reset() };
            vcpu.set_state(if id == 0 { &entry } else { &waiting })?;
        }
        Ok(())
    }

    /// Runs one thread for each vCPU until all have left.
    fn execute(&mut self) -> Result<(), Error> {
        let control = &self.control;
        thread::scope(|scope| {
            for (id, vcpu) in (0..).zip(&mut self.vcpus) {
                let thread = wake::thread(format!("vcpu{id}"));
                let started = thread.spawn_scoped(scope, move || control.run_vcpu(id, vcpu.as_mut()));
                if let Err(source) = started {
                    control.request(Request::End);
                    return Err(Error::Thread { id, source });
                }
            }
            Ok(())
        })
    }
}

/// Reaches a machine from other threads.
#[derive(Clone)]
pub struct Handle {
    control: Arc<RunControl>,
    chipset: Arc<Chipset>,
}

impl Handle {
    /// Stops vCPUs and timers; returns when they have.
    pub fn pause(&self) {
        self.control.pause();
        self.chipset.pause();
    }

    pub fn resume(&self) {
        self.chipset.resume();
        self.control.resume();
    }

    /// Ends the machine as if its power was cut.
    pub fn end(&self) {
        self.control.request(Request::End);
    }

    /// Asks the guest to shut down, as the button does.
    pub fn press_power_button(&self) {
        self.chipset.press_power_button();
    }

    /// Sends bytes to the guest by a serial port (0: COM1), if it is there. Waits while the guest is far behind.
    pub fn serial_input(&self, port: usize, data: &[u8]) {
        self.chipset.serial_input(port, data);
    }
}
