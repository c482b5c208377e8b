//! `--disk` and `--cdrom`: what may be typed, and the devices that come of it.

use std::path::PathBuf;
use std::sync::Arc;

use block::{Cache, Disk, Format, Options};
use machine::Peripherals;
use storage::ata::{AtaDisk, Cable};
use storage::atapi::CdRom;
use storage::floppy::{DriveType, Geometry};
use storage::{Drive, Media};
use virtio::VirtioDevice;
use virtio::block::Block;

use crate::firmware::boot_path;

/// Bytes of a serial number that a guest can see.
const SERIAL_LENGTH: usize = 20;

/// One disk as the user wants it.
#[derive(Clone, Debug)]
pub struct DiskArg {
    pub image: Options,
    pub serial: Option<String>,
    pub bus: Bus,
}

/// How a drive is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    Virtio,
    /// A parallel cable, at the ports of the first PCs.
    Ide,
    /// Serial ATA.
    Ahci,
}

/// Why there is no place for a drive.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub enum Full {
    #[error("more than four drives on bus=ide: there are two cables with two drives each")]
    Ide,
    #[error("more than two floppy drives: that is what the controller takes")]
    Floppy,
    #[error("no floppy disk has the size of this image: the largest has 2.88 MB (2949120 bytes)")]
    FloppySize,
    #[error("more than six drives on bus=ahci: it has that many ports")]
    Ahci,
}

const ALLOWED: &str = "allowed after the path are bus=virtio|ide|ahci, format=raw|qcow2, ro, snapshot, serial=TEXT, \
                       cache=none|writeback|writethrough and backing=any, each after a comma (a comma in the path is written twice)";

/// Parses `PATH[,bus=virtio|ide|ahci][,format=raw|qcow2][,ro][,snapshot][,serial=S][,cache=none|writeback|writethrough][,backing=any]`.
pub fn parse(text: &str) -> Result<DiskArg, String> {
    let (path, settings) = split_path(text);
    if path.is_empty() {
        return Err("the path of a disk image is missing".into());
    }
    let mut disk = DiskArg { image: Options::new(path), serial: None, bus: Bus::Virtio };
    for setting in settings.split(',').filter(|setting| !setting.is_empty()) {
        match setting.split_once('=').unwrap_or((setting, "")) {
            ("bus", "virtio") => disk.bus = Bus::Virtio,
            ("bus", "ide") => disk.bus = Bus::Ide,
            ("bus", "ahci") => disk.bus = Bus::Ahci,
            ("ro", "") => disk.image.read_only = true,
            ("snapshot", "") => disk.image.snapshot = true,
            ("format", "raw") => disk.image.format = Some(Format::Raw),
            ("format", "qcow2") => disk.image.format = Some(Format::Qcow2),
            ("cache", "none") => disk.image.cache = Cache::None,
            ("cache", "writeback") => disk.image.cache = Cache::WriteBack,
            ("cache", "writethrough") => disk.image.cache = Cache::WriteThrough,
            ("backing", "any") => disk.image.any_backing = true,
            ("serial", serial) if (1..=SERIAL_LENGTH).contains(&serial.len()) && serial.is_ascii() => {
                disk.serial = Some(serial.into());
            }
            ("serial", _) => return Err(format!("a serial number has 1 to {SERIAL_LENGTH} ASCII characters")),
            _ => return Err(format!("\"{setting}\" is not known: {ALLOWED}")),
        }
    }
    Ok(disk)
}

/// Takes a path from what follows it after a comma. A doubled comma belongs to the path.
pub fn split_path(text: &str) -> (String, &str) {
    let mut path = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(',') {
        path += before;
        match after.strip_prefix(',') {
            Some(more) => {
                path.push(',');
                rest = more;
            }
            None => return (path, after),
        }
    }
    (path + rest, "")
}

/// Opens the images.
pub fn open(disks: &[DiskArg]) -> Result<Vec<Arc<Disk>>, block::Error> {
    disks.iter().map(|disk| Disk::open(&disk.image).map(Arc::new)).collect()
}

/// A CD-ROM drive, and what lies in it.
#[derive(Clone, Debug)]
pub struct CdRomArg {
    pub image: Option<Options>,
    pub bus: Bus,
}

/// Parses `PATH|none[,bus=ahci|ide]`.
pub fn parse_cdrom(text: &str) -> Result<CdRomArg, String> {
    let (path, settings) = split_path(text);
    let image = match path.as_str() {
        "" => return Err("the path of a disc image is missing; \"none\" is a drive without a disc".into()),
        "none" => None,
        _ => Some(disc_options(path.into())),
    };
    let mut drive = CdRomArg { image, bus: Bus::Ahci };
    for setting in settings.split(',').filter(|setting| !setting.is_empty()) {
        drive.bus = match setting {
            "bus=ahci" => Bus::Ahci,
            "bus=ide" => Bus::Ide,
            _ => return Err(format!("\"{setting}\" is not known: allowed after the path are bus=ahci and bus=ide")),
        };
    }
    Ok(drive)
}

/// How the image of a disc is opened: discs are only read, and their files are as they are.
pub fn disc_options(path: PathBuf) -> Options {
    Options { format: Some(Format::Raw), read_only: true, ..Options::new(path) }
}

/// A floppy drive, and what lies in it.
#[derive(Clone, Debug)]
pub struct FloppyArg {
    pub image: Option<Options>,
}

/// Parses `PATH|none[,ro]`.
pub fn parse_floppy(text: &str) -> Result<FloppyArg, String> {
    let (path, settings) = split_path(text);
    if path.is_empty() {
        return Err("the path of a floppy disk's image is missing; \"none\" is a drive without a disk".into());
    }
    let mut image = (path != "none").then(|| floppy_options(path.into()));
    for setting in settings.split(',').filter(|setting| !setting.is_empty()) {
        match (setting, &mut image) {
            ("ro", Some(image)) => image.read_only = true,
            _ => return Err(format!("\"{setting}\" is not known: allowed after the path of an image is ro")),
        }
    }
    Ok(FloppyArg { image })
}

/// How the image of a floppy disk is opened; what may not be written is write-protected.
pub fn floppy_options(path: PathBuf) -> Options {
    let read_only = std::fs::metadata(&path).is_ok_and(|metadata| metadata.permissions().readonly());
    Options { format: Some(Format::Raw), read_only, ..Options::new(path) }
}

/// Puts a floppy drive onto the controller, of a type that takes `disk`. Returns its path for the boot order.
pub fn attach_floppy(disk: Option<&Disk>, media: Arc<Media>, peripherals: &mut Peripherals) -> Result<String, Full> {
    let kind = match disk {
        None => DriveType::High3,
        Some(disk) => Geometry::of(disk.size()).ok_or(Full::FloppySize)?.drive,
    };
    let mut places = peripherals.floppies.iter_mut().enumerate();
    let (number, place) = places.find(|(_, place)| place.is_none()).ok_or(Full::Floppy)?;
    *place = Some((kind, media));
    Ok(boot_path::floppy(number))
}

/// The name of the `number`th drive of a kind, for the control socket.
pub fn drive_name(kind: &str, number: usize) -> String {
    if number == 0 { kind.into() } else { format!("{kind}{}", number + 1) }
}

/// Puts a drive onto the first free place of its bus. Returns its path for the boot order.
pub fn attach(drive: Drive, bus: Bus, peripherals: &mut Peripherals) -> Result<String, Full> {
    let (place, full) = match bus {
        Bus::Ide => (peripherals.ide.iter_mut().flatten().enumerate().find(|(_, place)| place.is_none()), Full::Ide),
        Bus::Ahci | Bus::Virtio => {
            (peripherals.ahci.iter_mut().enumerate().find(|(_, place)| place.is_none()), Full::Ahci)
        }
    };
    let (number, place) = place.ok_or(full)?;
    *place = Some(drive);
    Ok(if bus == Bus::Ide { boot_path::ide(number / 2, number % 2) } else { boot_path::ahci(number) })
}

/// The drive of an open disk that is on another bus than virtio's, the `number`th disk of the machine.
pub fn drive(disk: &Arc<Disk>, arg: &DiskArg, number: usize) -> Drive {
    let cable = if arg.bus == Bus::Ide { Cable::Parallel } else { Cable::Serial };
    let serial = arg.serial.clone().unwrap_or_else(|| format!("RINGER{number:05}"));
    Drive::Disk(AtaDisk::new(disk.clone(), &serial, cable))
}

/// A CD-ROM drive for what is in `media`, the `number`th of the machine.
pub fn cdrom(media: Arc<Media>, number: usize) -> Drive {
    Drive::CdRom(CdRom::new(media, &format!("RINGERCD{number:03}")))
}

/// The device of an open disk, with a queue for each processor.
pub fn device(disk: &Arc<Disk>, arg: &DiskArg, cpus: u32) -> Arc<dyn VirtioDevice> {
    Arc::new(Block::new(disk.clone(), arg.serial.as_deref().unwrap_or_default(), cpus as usize))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_disk_is_a_path_with_settings() {
        let disk = parse("a,,b.qcow2,format=qcow2,snapshot,serial=S1,cache=none,backing=any").unwrap();
        assert_eq!(disk.image.path, Path::new("a,b.qcow2"));
        assert_eq!((disk.image.format, disk.image.cache), (Some(Format::Qcow2), Cache::None));
        assert!(disk.image.snapshot && disk.image.any_backing && !disk.image.read_only);
        assert_eq!(disk.serial.as_deref(), Some("S1"));
        assert!(parse("x,ro").unwrap().image.read_only);
    }

    #[test]
    fn removable_media_are_paths_or_none() {
        assert!(parse_floppy("none").unwrap().image.is_none());
        assert!(parse_floppy("a.img,ro").unwrap().image.unwrap().read_only);
        assert!(parse_cdrom("none,bus=ide").unwrap().image.is_none());
        assert!(parse_cdrom("a,,b.iso").unwrap().image.unwrap().read_only);
        assert!(parse_floppy("none,ro").is_err() && parse_floppy("a,rw").is_err() && parse_cdrom("a,ro").is_err());
    }

    #[test]
    fn what_is_not_known_is_refused_with_what_is() {
        for text in ["", ",ro", "x,rw", "x,format=vmdk", "x,cache=", "x,serial=", "x,serial=123456789012345678901"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse("x,rw").unwrap_err().contains("writethrough"));
    }
}
