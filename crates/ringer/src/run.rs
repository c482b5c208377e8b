//! `ringer run`: from arguments to a machine, and from how it ended to an exit status.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock, mpsc};

use block::Disk;
use boot::{BootConfig, Framebuffer};
use machine::{
    BootSource, Config, Handle, Machine, Outcome, Peripherals, SerialOutput, Start, TranslatorConfig, select_engine,
};
use memory::Ram;
use rustix::stdio::stdin;
use rustix::termios::isatty;
use storage::Media;
use virtio::VirtioDevice;

use crate::boot_order::Kind;
use crate::cli::{RunArgs, Serial};
use crate::control::{Control, RemovableDrive};
use crate::disk::Bus;
use crate::disk_boot::Taken;
use crate::firmware::{self, FirmwareArg, boot_path};
use crate::guest::{self, Guest};
use crate::{cleanup, console, control, devices, disk, net, screen, seed, terminal};

/// What the default guest's kernel is told: its console is our serial port, and it speaks up only when needed.
const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 quiet";

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Machine(#[from] machine::Error),
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error(transparent)]
    Disk(#[from] block::Error),
    #[error("{0}")]
    NoPlace(#[from] disk::Full),
    #[error(transparent)]
    Net(#[from] net::Error),
    #[error(transparent)]
    Guest(#[from] guest::Error),
    #[error("{flag} file:{}: {source}", path.display())]
    OutputFile { flag: &'static str, path: PathBuf, source: io::Error },
    #[error(transparent)]
    Seed(#[from] seed::Error),
    #[error(transparent)]
    Share(#[from] virtio::fs::ShareError),
    #[error(transparent)]
    Firmware(#[from] firmware::Error),
    #[error("--vsock {}: {source}", path.display())]
    Vsock { path: PathBuf, source: io::Error },
    #[error("--control unix:{}: {source}", path.display())]
    Control { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Screen(#[from] screen::Error),
    #[error("only one of --serial, --console and --debugcon can lead to stdio")]
    TwoOnStdio,
    #[error(
        "--share: two directories have the tag \"{0}\", by which the guest mounts them; give one another by tag=NAME"
    )]
    TwoOfOneTag(String),
    #[error("--balloon: it can't hold all of the guest's memory; the size must be less than that of --memory")]
    BalloonTooLarge,
    #[error("can't make the console: {0}")]
    Console(io::Error),
    #[error("can't make the terminal raw: {0}")]
    Terminal(io::Error),
    #[error("can't read stdin: {0}")]
    Input(io::Error),
    #[error("can't handle signals: {0}")]
    Signals(io::Error),
    #[error("nobody reads the guest's serial port any more: stdout is closed")]
    OutputGone,
}

/// Boots a machine and waits for its end. Returns the exit status.
pub fn run(args: RunArgs) -> Result<u8, Error> {
    if args.balloon >= args.memory {
        return Err(Error::BalloonTooLarge);
    }
    if let Some(tag) = devices::tag_of_two(&args.share) {
        return Err(Error::TwoOfOneTag(tag.into()));
    }
    let disks = disk::open(&args.disk)?;
    let firmware = firmware::wanted(&args);
    let vga = screen::vga(args.vga, &args.display, firmware.is_some())?;
    // The engine before the kernel: what this host can't run needs no guest fetched. Both before anything is made of the rest.
    let ram = Ram::new(args.memory)?;
    let translator = TranslatorConfig {
        cpus: args.cpus,
        model: args.cpu,
        translation_cache: args.translation_cache as usize,
        perf_map: args.perf_map,
        direct: args.direct,
        stats: args.stats,
        ..Default::default()
    };
    let smm = firmware.as_ref().is_some_and(firmware::needs_smm);
    let selection = select_engine(args.accel, &ram, translator, smm)?;
    let has_firmware = firmware.is_some();
    let plan = match firmware {
        Some(firmware) => Plan::Firmware(firmware),
        None => Plan::Kernel(boot_source(&args, disks.first(), vga.as_ref().map(|_| screen::boot_framebuffer()))?),
    };
    let link = Arc::new(Link::default());
    let serial = args.serial.clone().unwrap_or(match args.console {
        Serial::Stdio => Serial::None,
        _ if args.debugcon == Serial::Stdio => Serial::None,
        Serial::File(_) | Serial::None => Serial::Stdio,
    });
    if [&serial, &args.console, &args.debugcon].iter().filter(|to| ***to == Serial::Stdio).count() > 1 {
        return Err(Error::TwoOnStdio);
    }
    let hvc = match output("--console", &args.console, &link)? {
        Some(sink) => Some(Arc::new(virtio::console::Console::new(sink).map_err(Error::Console)?)),
        None => None,
    };
    let (mut devices, mut boot_order) = (Vec::new(), Vec::new());
    let mut peripherals = Peripherals::default();
    for (number, (disk, arg)) in disks.iter().zip(&args.disk).enumerate() {
        match arg.bus {
            Bus::Virtio => {
                devices.push(disk::device(disk, arg, args.cpus.count()));
                boot_order.push((Kind::Disk, boot_path::virtio_disk(devices.len())));
            }
            bus => {
                let path = disk::attach(disk::drive(disk, arg, number), bus, &mut peripherals)?;
                boot_order.push((Kind::Disk, path));
            }
        }
    }
    let mut drives = Vec::new();
    for (number, arg) in args.cdrom.iter().enumerate() {
        let disc = arg.image.as_ref().map(|image| Disk::open(image).map(Arc::new)).transpose()?;
        let media = Media::new(disc);
        let path = disk::attach(disk::cdrom(media.clone(), number), arg.bus, &mut peripherals)?;
        boot_order.push((Kind::CdRom, path));
        drives.push(RemovableDrive { name: disk::drive_name("cdrom", number), media, options: disk::disc_options });
    }
    for (number, arg) in args.floppy.iter().enumerate() {
        let disk = arg.image.as_ref().map(|image| Disk::open(image).map(Arc::new)).transpose()?;
        let media = Media::new(disk.clone());
        let path = disk::attach_floppy(disk.as_deref(), media.clone(), &mut peripherals)?;
        boot_order.push((Kind::Floppy, path));
        drives.push(RemovableDrive { name: disk::drive_name("floppy", number), media, options: disk::floppy_options });
    }
    let control = match &args.control {
        Some(path) => {
            let failed = |source| Error::Control { path: path.clone(), source };
            Some(control::listen(path.clone()).map_err(failed)?)
        }
        None => None,
    };
    if let Some(seed) = &args.cloud_init {
        devices.push(seed::device(seed)?);
    }
    let (paravirtual, cards) = net::devices(&args.net, args.cpus.count(), has_firmware)?;
    for device in paravirtual {
        devices.push(device);
        boot_order.push((Kind::Network, boot_path::network(devices.len())));
    }
    peripherals.cards = cards;
    devices.extend(devices::shares(&args.share)?);
    let vsock = match &args.vsock {
        Some(vsock) => Some(devices::vsock(vsock).map_err(|source| Error::Vsock { path: vsock.path.clone(), source })?),
        None => None,
    };
    devices.extend(vsock.iter().map(|(device, _)| device.clone()));
    let (common, balloon) = devices::common(args.balloon);
    devices.extend(common);
    devices.extend(hvc.clone().map(|hvc| hvc as Arc<dyn VirtioDevice>));
    // Cards of real makes come behind the paravirtual devices.
    let numbers = devices.len() + 1..;
    let paths = numbers.take(peripherals.cards.len()).map(|number| (Kind::Network, boot_path::network(number)));
    boot_order.extend(paths);
    let boot_order = args.boot.clone().unwrap_or_default().sort(boot_order);
    let start = match plan {
        Plan::Kernel(source) => Start::Kernel(source),
        Plan::Firmware(what) => {
            Start::Firmware(firmware::prepare(&what, &args, &serial, vga.is_some(), boot_order, &ram)?)
        }
    };
    let config = Config {
        cpus: args.cpus.count(),
        start,
        serial: [output("--serial", &serial, &link)?, None, None, None],
        devices: devices.clone(),
        peripherals,
        vga,
        no_reboot: args.no_reboot,
        debug_console: output("--debugcon", &args.debugcon, &link)?,
        debug_exit: args.debug_exit,
        test_device: args.test_device,
    };
    let mut machine = Machine::new(config, ram, &*selection.engine)?;
    say!("ringer: engine {} ({})", selection.engine.name(), selection.reason);
    // A signal ends the process in the middle of everything: what disks hold back is to be in their images then.
    let closing = cleanup::register(move || {
        devices.iter().for_each(|device| device.reset());
        disks.iter().for_each(|disk| _ = disk.flush());
    });
    let _ = link.machine.set(machine.handle());
    let display = screen::serve(&args.display, &machine)?;
    let handle = machine.handle();
    let _control = match control {
        Some((listener, guard)) => {
            let control = Control { machine: machine.handle(), drives, balloon, vga: machine.vga().cloned() };
            control::serve(listener, control).map_err(Error::Input)?;
            Some(guard)
        }
        None => None,
    };
    let raw = match (hvc, serial, &args.console) {
        (Some(hvc), _, Serial::Stdio) => {
            devices::follow_terminal_size(&hvc).map_err(Error::Signals)?;
            attach_stdin(handle, move |data| hvc.input(data))?
        }
        (_, Serial::Stdio, _) => attach_stdin(handle.clone(), move |data| handle.serial_input(0, data))?,
        _ => None,
    };
    let result = machine.run();
    drop((raw, display));
    closing.cancel();
    let outcome = result?;
    if link.gone.get().is_some() {
        return Err(Error::OutputGone);
    }
    tracing::info!(?outcome, "the machine has ended");
    if outcome == Outcome::Ended {
        // The guest's last line may be unfinished.
        say!("\nringer: ended by Ctrl-a x");
    }
    Ok(match outcome {
        // Never 0, which says that all is well: as the port has it elsewhere.
        Outcome::DebugExit(value) => value << 1 | 1,
        _ => 0,
    })
}

/// What the machine is to start with.
enum Plan {
    Kernel(BootSource),
    Firmware(FirmwareArg),
}

/// From serial output, which is made before the machine, back to the machine.
#[derive(Default)]
struct Link {
    machine: OnceLock<Handle>,
    /// Set when stdout can't be written any more.
    gone: OnceLock<()>,
}

/// What the machine boots: the kernel named, or that of the first disk, or the default guest's.
fn boot_source(args: &RunArgs, disk: Option<&Arc<Disk>>, screen: Option<Framebuffer>) -> Result<BootSource, Error> {
    let cpus = args.cpus;
    if let Some(kernel) = args.kernel.clone() {
        let command_line = args.append.clone().unwrap_or_default();
        let config = BootConfig { kernel, initrd: args.initrd.clone(), command_line, cpus, screen };
        return Ok(Box::new(move || Ok(config.clone())));
    }
    if let (Some(disk), Some(arg)) = (disk, args.disk.first()) {
        let (disk, path, append) = (disk.clone(), arg.image.path.clone(), args.append.clone());
        // The last console named is the system's own.
        let consoles = match args.console {
            Serial::None => "console=ttyS0",
            Serial::Stdio => "console=ttyS0 console=hvc0",
            Serial::File(_) => "console=hvc0 console=ttyS0",
        };
        let mut files = None;
        // Each start looks anew: the guest may have installed another kernel.
        return Ok(Box::new(move || {
            let taken = files.insert(Taken::from(&disk, &path)?);
            let mut command_line = format!("{} ro {consoles}", taken.root);
            if let Some(append) = &append {
                command_line += &format!(" {append}");
            }
            let initrd = taken.initrd().into_iter().collect();
            Ok(BootConfig { kernel: taken.kernel(), initrd, command_line, cpus, screen })
        }));
    }
    let guest = Guest::get(&guest::cache_directory()?)?;
    let initrd = vec![guest.initrd()?];
    let config = BootConfig { kernel: guest.kernel, initrd, command_line: default_command_line(), cpus, screen };
    Ok(Box::new(move || Ok(config.clone())))
}

/// With the user's kind of terminal, which the kernel hands to its first process as an environment variable.
fn default_command_line() -> String {
    let plain = |term: &String| term.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_+".contains(&byte));
    match std::env::var("TERM").ok().filter(plain).filter(|term| (1..=32).contains(&term.len())) {
        Some(term) => format!("{DEFAULT_COMMAND_LINE} TERM={term}"),
        None => DEFAULT_COMMAND_LINE.into(),
    }
}

/// The sink of what the guest writes to a port that `flag` leads to `to`.
fn output(flag: &'static str, to: &Serial, link: &Arc<Link>) -> Result<SerialOutput, Error> {
    Ok(match to {
        Serial::None => None,
        Serial::File(path) => {
            let file = File::create(path).map_err(|source| Error::OutputFile { flag, path: path.clone(), source })?;
            Some(Box::new(file) as Box<dyn Write + Send>)
        }
        Serial::Stdio => {
            let link = link.clone();
            Some(Box::new(console::Output::new(move || {
                let _ = link.gone.set(());
                if let Some(machine) = link.machine.get() {
                    machine.end();
                }
            })))
        }
    })
}

/// Makes stdin the input of a port. Its threads are left behind in blocking calls when the machine ends.
fn attach_stdin(machine: Handle, input: impl Fn(&[u8]) + Send + 'static) -> Result<Option<cleanup::Guard>, Error> {
    let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| wake::thread(name).spawn(work).map_err(Error::Input);
    if !isatty(stdin()) {
        spawn("stdin", Box::new(move || console::read_input(None, input)))?;
        return Ok(None);
    }
    let raw = terminal::make_raw().map_err(Error::Terminal)?;
    // A queue between them, because the escape key must work while the guest takes no input.
    let (sender, typed) = mpsc::channel::<Vec<u8>>();
    spawn("port-input", Box::new(move || typed.iter().for_each(|data| input(&data))))?;
    let end: Box<dyn FnOnce() + Send> = Box::new(move || machine.end());
    spawn("stdin", Box::new(move || console::read_input(Some(end), |data| _ = sender.send(data.to_vec()))))?;
    Ok(raw)
}
