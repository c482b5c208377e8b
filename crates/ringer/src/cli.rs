//! The command line's grammar: what may be typed, in which ranges, and what is said when it is wrong.

use std::ffi::OsString;
use std::path::PathBuf;

use arch::cpuid::{Model, Topology};
use block::Format;
use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use machine::{Accel, DirectExecution};

use crate::boot_order::{self, BootOrder};
use crate::control;
use crate::devices::{self, ShareArg, VsockArg};
use crate::disk::{self, CdRomArg, DiskArg, FloppyArg};
use crate::firmware::{self, FirmwareArg};
use crate::image::ImageCommand;
use crate::net::{self, NetArg};
use crate::screen::{self, DisplayArg, VgaArg};
use crate::seed::{self, SeedArg};
use crate::units::{parse_size, show_size};

const EXAMPLES: &str = "\
Examples:
  ringer run                                     Debian's kernel and a busybox shell
  ringer run --cpus 2 --memory 2G                the same on a larger machine
  ringer image debian debian.qcow2               a bootable Debian server, which then runs by
  ringer run --disk debian.qcow2 --memory 1G
  ringer run --kernel vmlinuz --initrd initrd.img --append console=ttyS0
  ringer run --disk debian.qcow2 --firmware ovmf --firmware-vars vars.fd
  ringer run --cdrom system.iso
  printf 'uname -a\\npoweroff -f\\n' | ringer run >log

Exit status: 0 the guest powered off, was reset under --no-reboot, or was ended by Ctrl-a x;
1 the monitor failed; 2 the command line is wrong; the guest's own by --debug-exit.";

/// A virtual machine monitor that needs no hardware virtualization.
#[derive(Debug, Parser)]
#[command(name = "ringer", version, after_help = EXAMPLES, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// Tell on stderr what happens; twice for more
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a machine, with this terminal as its first serial port (Ctrl-a h lists keys)
    #[command(after_help = EXAMPLES)]
    Run(Box<RunArgs>),
    /// Make and handle disk images
    #[command(subcommand)]
    Image(ImageCommand),
}

#[derive(Clone, Debug, Args)]
#[command(group = clap::ArgGroup::new("what").multiple(true))]
pub struct RunArgs {
    /// How to run the processor: auto, kvm, translate; auto takes KVM where it runs kernels in hardware
    #[arg(long, value_name = "ENGINE", default_value = "auto", value_parser = accel)]
    pub accel: Accel,
    /// The processor that the guest sees: host, x86-64-v2, x86-64-v3, x86-64-v4
    #[arg(long, value_name = "MODEL", default_value = "host")]
    pub cpu: Model,
    /// Processors: N[,sockets=S][,cores=C][,threads=T]; cores of one socket, unless said otherwise
    #[arg(long, value_name = "N", default_value = "1", allow_hyphen_values = true, value_parser = cpus)]
    pub cpus: Topology,
    /// RAM, with unit: 512M, 2G
    #[arg(long, short = 'm', value_name = "SIZE", default_value = "512M", allow_hyphen_values = true, value_parser = memory)]
    pub memory: u64,
    /// A Linux kernel (bzImage), an ELF with a PVH entry or a Multiboot kernel; default: that of the first disk, or else Debian's, fetched once
    #[arg(long, value_name = "FILE", group = "what")]
    pub kernel: Option<PathBuf>,
    /// Start as a PC does, from firmware: seabios, ovmf, or the path of an image (Secure Boot: OVMF_CODE_4M.ms.fd); needed by what is no Linux
    #[arg(long, value_name = "FIRMWARE", value_parser = firmware::parse, group = "what")]
    pub firmware: Option<FirmwareArg>,
    /// Where EFI firmware keeps its variables; made if it is not there. Without it they are lost at the end
    #[arg(long, value_name = "FILE", requires = "firmware")]
    pub firmware_vars: Option<PathBuf>,
    /// Initial RAM disk for --kernel; for a Multiboot kernel a module, repeatable: 'FILE' or 'FILE ARGUMENTS'
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Vec<PathBuf>,
    /// Kernel command line for --kernel; added to Ringer's own for a kernel that comes from --disk
    #[arg(long, value_name = "STRING", requires = "what", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// A disk image: PATH[,bus=virtio|ide|ahci][,format=raw|qcow2][,ro][,snapshot][,serial=S][,cache=none|writeback|writethrough]; repeatable
    #[arg(long, value_name = "DISK", value_parser = disk::parse, group = "what")]
    pub disk: Vec<DiskArg>,
    /// A CD-ROM drive with a disc image in it: ISO[,bus=ahci|ide], or none for an empty drive; repeatable
    #[arg(long, value_name = "ISO", value_parser = disk::parse_cdrom)]
    pub cdrom: Vec<CdRomArg>,
    /// Configuration for a guest with cloud-init: USER-DATA[,meta-data=FILE][,network-config=FILE]
    #[arg(long, value_name = "FILE", value_parser = seed::parse)]
    pub cloud_init: Option<SeedArg>,
    /// A directory of the host: DIR[,tag=NAME][,ro]; repeatable. In the guest: mount -t virtiofs NAME /mnt [tag: share]
    #[arg(long, value_name = "DIR", value_parser = devices::parse_share)]
    pub share: Vec<ShareArg>,
    /// A Unix socket that leads to the guest's vsock ports, as Firecracker has it: PATH[,cid=N]
    #[arg(long, value_name = "PATH", value_parser = devices::parse_vsock)]
    pub vsock: Option<VsockArg>,
    /// Where the first serial port leads: stdio, file:PATH, none [default: stdio, if the console is not there]
    #[arg(long, value_name = "TO", value_parser = serial)]
    pub serial: Option<Serial>,
    /// Where the guest's paravirtual console hvc0 leads: stdio, file:PATH, none
    #[arg(long, value_name = "TO", default_value = "none", value_parser = serial)]
    pub console: Serial,
    /// Where the debug console (ports 0x402 and 0xe9) leads: stdio, file:PATH, none
    #[arg(long, value_name = "TO", default_value = "none", value_parser = serial)]
    pub debugcon: Serial,
    /// Let the guest end the machine by a write to this port; the exit status is twice what it writes, plus one
    #[arg(long, value_name = "PORT", value_parser = port)]
    pub debug_exit: Option<u16>,
    /// The ports by which test programs such as kvm-unit-tests drive interrupt lines
    #[arg(long)]
    pub test_device: bool,
    /// A graphics adapter: std (VGA with VESA modes), none [default: std, if there is a display]
    #[arg(long, value_name = "VGA", value_parser = screen::parse_vga)]
    pub vga: Option<VgaArg>,
    /// Where the screen can be seen: none, vnc[=[ADDR:]PORT], vnc=unix:PATH; both with ,password=FILE
    #[arg(long, value_name = "DISPLAY", default_value = "none", value_parser = screen::parse_display)]
    pub display: DisplayArg,
    /// Memory that the guest is asked to do without, if it can; what it does not use, the host gets back anyway
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = parse_size)]
    pub balloon: u64,
    /// A network card: user[,hostfwd=tcp:127.0.0.1:2222-:22][,restrict=on][,tftp=DIR][,bootfile=NAME], tap[,name=T], both with [,model=virtio|e1000|e1000e][,mac=M][,rom=FILE|none], or none; repeatable [default: user]
    #[arg(long, value_name = "NET", value_parser = net::parse)]
    pub net: Vec<NetArg>,
    /// A floppy drive with a disk image in it: IMG[,ro], or none for an empty drive; twice for two
    #[arg(long, value_name = "IMG", value_parser = disk::parse_floppy)]
    pub floppy: Vec<FloppyArg>,
    /// Where a running machine can be changed: unix:PATH, a socket that takes lines such as "eject cdrom" and "help"
    #[arg(long, value_name = "TO", value_parser = control::parse)]
    pub control: Option<PathBuf>,
    /// What firmware boots from: order=LETTERS, of a (floppy), c (disk), d (CD-ROM), n (network) [default: order=cadn]
    #[arg(long, value_name = "ORDER", value_parser = boot_order::parse)]
    pub boot: Option<BootOrder>,
    /// End when the guest resets the machine, instead of starting it again
    #[arg(long)]
    pub no_reboot: bool,
    /// Host memory for translated code, for each processor
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = translation_cache)]
    pub translation_cache: u64,
    /// When the translate engine runs programs of 64-bit guests as they are, in processes of the host: where it pays
    #[arg(long, value_name = "auto|always|never", default_value = "auto", value_parser = direct)]
    pub direct: DirectExecution,
    /// Print what the engine did on stderr when the machine stops
    #[arg(long)]
    pub stats: bool,
    /// Name translated code for Linux perf, in /tmp/perf-PID.map
    #[arg(long)]
    pub perf_map: bool,
}

/// Where a serial port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serial {
    Stdio,
    File(PathBuf),
    None,
}

/// Parses the arguments. On a usage error, and for `--help` and `--version`, says so and gives the exit status.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Cli, u8> {
    let arguments: Vec<_> = arguments.into_iter().collect();
    let cli = Cli::try_parse_from(&arguments).map_err(|error| {
        if !error.use_stderr() {
            return if error.print().is_ok() { 0 } else { 1 };
        }
        match error.kind() {
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => eprint!("{error}"),
            _ => say!("ringer: {}", one_line(&error.to_string(), &help(&arguments))),
        }
        2
    })?;
    if let Command::Image(ImageCommand::Convert(args)) = &cli.command
        && let (Some(_), Format::Raw) = (args.compress, args.output_format)
    {
        say!("ringer: --compress and --output-format raw: only a qcow2 image is compressed (see {})", help(&arguments));
        return Err(2);
    }
    Ok(cli)
}

/// What tells more about the command that was meant.
fn help(arguments: &[OsString]) -> String {
    let word = |index: usize| arguments.get(index).and_then(|word| word.to_str()).filter(|word| !word.starts_with('-'));
    match (word(1), word(2)) {
        (Some("image"), Some(command)) => format!("ringer image {command} --help"),
        (Some("image"), None) => "ringer image --help".into(),
        _ => "ringer run --help".into(),
    }
}

/// The message of a clap error without its "error: ", its usage and its hints.
fn one_line(text: &str, help: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let message = text.split("\n\nUsage").next().unwrap_or(text).split("\n\nFor more").next().unwrap_or(text);
    let words: Vec<_> = message.split_whitespace().collect();
    let mut line = words.join(" ");
    if !line.contains("--help") {
        line += &format!(" (see {help})");
    }
    line
}

fn memory(text: &str) -> Result<u64, String> {
    let size = parse_size(text)?;
    let allowed = memory::MIN_SIZE..=memory::MAX_SIZE;
    if !allowed.contains(&size) || !size.is_multiple_of(memory::PAGE_SIZE) {
        let (least, most) = (show_size(*allowed.start()), show_size(*allowed.end()));
        return Err(format!("allowed are {least} to {most}, in steps of 4K"));
    }
    Ok(size)
}

fn translation_cache(text: &str) -> Result<u64, String> {
    let size = parse_size(text)?;
    if !(1 << 20..=1 << 30).contains(&size) || !size.is_multiple_of(memory::PAGE_SIZE) {
        return Err("allowed are 1M to 1G, in steps of 4K".into());
    }
    Ok(size)
}

fn cpus(text: &str) -> Result<Topology, String> {
    let most = machine::MAX_CPUS;
    let number = |text: &str| text.parse().ok().filter(|n| (1..=most).contains(n));
    let (count, settings) = text.split_once(',').unwrap_or((text, ""));
    let count = number(count).ok_or_else(|| format!("allowed are 1 to {most}"))?;
    let (mut sockets, mut cores, mut threads) = (None, None, None);
    for setting in settings.split(',').filter(|setting| !setting.is_empty()) {
        let (name, value) = setting.split_once('=').unwrap_or((setting, ""));
        let place = match name {
            "sockets" => &mut sockets,
            "cores" => &mut cores,
            "threads" => &mut threads,
            _ => {
                return Err(format!(
                    "\"{setting}\" is not known: allowed after the number are sockets=S, cores=C, threads=T"
                ));
            }
        };
        *place = Some(number(value).ok_or_else(|| format!("\"{setting}\": allowed are 1 to {most}"))?);
    }
    let threads = threads.unwrap_or(1);
    // What is not said is what the number leaves: cores of one socket.
    let (sockets, cores) = match (sockets, cores) {
        (Some(sockets), Some(cores)) => (sockets, cores),
        (Some(sockets), None) => (sockets, count / sockets / threads),
        (None, Some(cores)) => (count / cores / threads, cores),
        (None, None) => (1, count / threads),
    };
    let topology = Topology::new(sockets, cores, threads).filter(|topology| topology.count() == count);
    topology.ok_or_else(|| {
        format!(
            "{sockets} sockets of {cores} cores with {threads} threads are not {count} processors, or no powers of two: \
             where there are several sockets, each has 1, 2, 4... processors, where several cores, each has 1, 2, 4... threads"
        )
    })
}

fn port(text: &str) -> Result<u16, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u16::from_str_radix(digits, 16),
        None => text.parse(),
    };
    let last = u16::MAX - (chipset::debug::DEBUG_EXIT_SIZE - 1);
    number.ok().filter(|port| *port <= last).ok_or_else(|| format!("allowed are 0 to {last:#x}"))
}

fn direct(text: &str) -> Result<DirectExecution, String> {
    match text {
        "auto" => Ok(DirectExecution::Auto),
        "always" => Ok(DirectExecution::Always),
        "never" => Ok(DirectExecution::Never),
        _ => Err("allowed are auto, always and never".into()),
    }
}

fn accel(text: &str) -> Result<Accel, String> {
    match text {
        "auto" => Ok(Accel::Auto),
        "kvm" => Ok(Accel::Kvm),
        "translate" => Ok(Accel::Translate),
        _ => Err("allowed are auto, kvm and translate".into()),
    }
}

fn serial(text: &str) -> Result<Serial, String> {
    match text.split_once(':') {
        None if text == "stdio" => Ok(Serial::Stdio),
        None if text == "none" => Ok(Serial::None),
        Some(("file", path)) if !path.is_empty() => Ok(Serial::File(path.into())),
        _ => Err("allowed are stdio, file:PATH and none".into()),
    }
}
