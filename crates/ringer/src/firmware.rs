//! `--firmware`: where firmware is on this host, and what it is told.

use std::path::{Path, PathBuf};

use boot::firmware::{FirmwareConfig, Kernel, OptionRoms};
use chipset::constants::SERIAL_PORTS;
use memory::Ram;

use crate::cli::{RunArgs, Serial};

/// What the user asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FirmwareArg {
    SeaBios,
    Ovmf,
    Path(PathBuf),
}

/// Why there is no firmware to start with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Boot(#[from] boot::Error),
    #[error("{what} is not installed: {} is what is looked for; install the package {package}", path.display())]
    NotInstalled { what: &'static str, path: &'static Path, package: &'static str },
    #[error("--append goes with --kernel: what is on a disk, firmware boots with a command line of the disk's own")]
    Append,
}

/// Where distributions put the images.
const SEABIOS: [&str; 3] =
    ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin", "/usr/share/seabios/bios.bin"];
/// The code, and the variables that belong to it.
const OVMF: [(&str, &str); 4] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
];
/// The option ROMs by which SeaBIOS loads a kernel.
const LINUX_ROM: [&str; 2] = ["/usr/share/qemu/linuxboot_dma.bin", "/usr/share/seabios/optionrom/linuxboot_dma.bin"];
const MULTIBOOT_ROM: [&str; 2] =
    ["/usr/share/qemu/multiboot_dma.bin", "/usr/share/seabios/optionrom/multiboot_dma.bin"];

/// Parses `seabios`, `ovmf` or a path.
pub fn parse(text: &str) -> Result<FirmwareArg, String> {
    match text {
        "" => Err("allowed are seabios, ovmf and the path of an image".into()),
        "seabios" => Ok(FirmwareArg::SeaBios),
        "ovmf" => Ok(FirmwareArg::Ovmf),
        path => Ok(FirmwareArg::Path(path.into())),
    }
}

/// What the machine starts with: firmware that was asked for, or that a CD-ROM or floppy disk alone needs.
pub fn wanted(args: &RunArgs) -> Option<FirmwareArg> {
    let loaded =
        args.cdrom.iter().any(|cd| cd.image.is_some()) || args.floppy.iter().any(|drive| drive.image.is_some());
    let only_disc = args.kernel.is_none() && args.disk.is_empty() && loaded;
    args.firmware.clone().or(only_disc.then_some(FirmwareArg::SeaBios))
}

/// Whether the firmware was built to need system-management mode, as its name says in all distributions: the target's,
/// where it is a link (`OVMF_CODE_4M.ms.fd`).
pub fn needs_smm(firmware: &FirmwareArg) -> bool {
    let FirmwareArg::Path(path) = firmware else { return false };
    let target = path.canonicalize().unwrap_or_else(|_| path.clone());
    let name = target.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    name.contains("secboot") || name.contains("smm")
}

/// Reads the firmware and what goes with it. `boot_order`: Open Firmware paths.
pub fn prepare(
    what: &FirmwareArg,
    args: &RunArgs,
    serial: &Serial,
    vga: bool,
    boot_order: Vec<String>,
    ram: &Ram,
) -> Result<chipset::Firmware, Error> {
    if args.append.is_some() && args.kernel.is_none() {
        return Err(Error::Append);
    }
    let (image, variables_template) = match what {
        FirmwareArg::SeaBios => (installed(&SEABIOS, "SeaBIOS", "seabios")?, None),
        FirmwareArg::Ovmf => {
            let codes = OVMF.map(|(code, _)| code);
            let code = installed(&codes, "OVMF", "ovmf")?;
            let template = OVMF.iter().find(|pair| Path::new(pair.0) == code).map(|pair| pair.1.into());
            (code, template)
        }
        FirmwareArg::Path(path) => (path.clone(), sibling(path)),
    };
    let kernel = args.kernel.as_ref().map(|kernel| Kernel {
        image: kernel.clone(),
        initrd: args.initrd.clone(),
        command_line: args.append.clone().unwrap_or_default(),
        option_roms: option_roms(what),
    });
    let config = FirmwareConfig {
        image,
        variables_template,
        variables: args.firmware_vars.clone(),
        cpus: args.cpus,
        vga,
        kernel,
        boot_order,
        serial_console: (*serial != Serial::None).then_some(SERIAL_PORTS[0].0),
    };
    boot::firmware::prepare(ram, &config).map_err(rom_not_installed)
}

/// The option ROMs; of those that SeaBIOS needs, but that are not there, where they should be. Which of them is needed, the
/// kernel tells.
fn option_roms(firmware: &FirmwareArg) -> OptionRoms {
    let find = |paths: &[&str]| {
        let found = paths.iter().map(PathBuf::from).find(|path| path.exists());
        match firmware {
            FirmwareArg::Ovmf => None,
            FirmwareArg::SeaBios => found.or_else(|| paths.first().map(PathBuf::from)),
            FirmwareArg::Path(_) => found,
        }
    };
    OptionRoms { linux: find(&LINUX_ROM), multiboot: find(&MULTIBOOT_ROM) }
}

/// Says of an option ROM that is not there how to get it.
fn rom_not_installed(error: boot::Error) -> Error {
    let missing = |rom: &&str| {
        matches!(&error, boot::Error::File { path, .. } if path == Path::new(*rom)) && !Path::new(*rom).exists()
    };
    match [LINUX_ROM[0], MULTIBOOT_ROM[0]].into_iter().find(missing) {
        Some(rom) => Error::NotInstalled {
            what: "the option ROM for --kernel",
            path: Path::new(rom),
            package: "qemu-system-data",
        },
        None => error.into(),
    }
}

fn installed(paths: &[&'static str], what: &'static str, package: &'static str) -> Result<PathBuf, Error> {
    let first = paths.first().copied().unwrap_or_default();
    let found = paths.iter().map(PathBuf::from).find(|path| path.exists());
    found.ok_or(Error::NotInstalled { what, path: Path::new(first), package })
}

/// The variables that lie beside a file with firmware's code, by the name that its makers give them.
fn sibling(code: &Path) -> Option<PathBuf> {
    let name = code.file_name()?.to_str().filter(|name| name.contains("CODE"))?;
    let path = code.with_file_name(name.replace("CODE", "VARS").replace(".secboot", ""));
    path.exists().then_some(path)
}

/// Open Firmware paths of devices that can be booted from, as SeaBIOS and OVMF read them.
pub mod boot_path {
    pub fn virtio_disk(slot: usize) -> String {
        format!("/pci@i0cf8/scsi@{slot:x}/disk@0,0")
    }

    pub fn network(slot: usize) -> String {
        format!("/pci@i0cf8/ethernet@{slot:x}/ethernet-phy@0")
    }

    pub fn floppy(number: usize) -> String {
        format!("/pci@i0cf8/isa@1f/fdc@03f0/floppy@{number:x}")
    }

    pub fn ahci(port: usize) -> String {
        format!("/pci@i0cf8/pci8086,2922@1f,2/drive@{port:x}/disk@0")
    }

    pub fn ide(cable: usize, unit: usize) -> String {
        format!("/pci@i0cf8/ide@1f,1/drive@{cable:x}/disk@{unit:x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firmware_has_a_name_or_a_path() {
        assert_eq!(parse("seabios"), Ok(FirmwareArg::SeaBios));
        assert_eq!(parse("./ovmf"), Ok(FirmwareArg::Path("./ovmf".into())));
        assert!(parse("").is_err());
    }

    #[test]
    fn the_name_of_firmware_says_whether_it_needs_system_management_mode() {
        let directory = tempfile::tempdir().unwrap();
        let (code, link) =
            (directory.path().join("OVMF_CODE_4M.secboot.fd"), directory.path().join("OVMF_CODE_4M.ms.fd"));
        std::fs::write(&code, [0]).unwrap();
        std::os::unix::fs::symlink(&code, &link).unwrap();
        for (path, needs) in
            [(code, true), (link, true), ("OVMF_CODE.fd".into(), false), ("ovmf-x86_64-smm-code.bin".into(), true)]
        {
            assert_eq!(needs_smm(&FirmwareArg::Path(path.clone())), needs, "{}", path.display());
        }
        assert!(!needs_smm(&FirmwareArg::Ovmf));
    }

    #[test]
    fn variables_lie_beside_the_code() {
        let directory = tempfile::tempdir().unwrap();
        let code = directory.path().join("OVMF_CODE_4M.secboot.fd");
        assert_eq!(sibling(&code), None);
        let variables = directory.path().join("OVMF_VARS_4M.fd");
        std::fs::write(&variables, [0]).unwrap();
        assert_eq!(sibling(&code), Some(variables));
        assert_eq!(sibling(&directory.path().join("firmware.fd")), None);
    }
}
