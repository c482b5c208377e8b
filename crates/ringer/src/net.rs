//! `--net`: what may be typed, and the card that comes of it.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use ::net::{Backend, Forward, Mac, Tap, UserConfig, UserNet};
use machine::{Card, CardModel};
use virtio::VirtioDevice;
use virtio::net::{MAX_PAIRS, Net};

/// One network card as the user wants it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetArg {
    /// `None`: paravirtual.
    model: Option<CardModel>,
    mac: Option<Mac>,
    rom: Rom,
    to: Attachment,
}

/// The option ROM by which firmware boots from a card.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Rom {
    /// The one that is installed for the model, if there is one.
    #[default]
    Installed,
    File(PathBuf),
    Nothing,
}

/// What a card is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Attachment {
    User {
        forwards: Vec<Forward>,
        restrict: bool,
        tftp: Option<PathBuf>,
        boot_file: Option<String>,
    },
    Tap {
        name: String,
    },
    /// There is no card.
    Nothing,
}

impl Default for Attachment {
    fn default() -> Self {
        Attachment::User { forwards: Vec::new(), restrict: false, tftp: None, boot_file: None }
    }
}

const ALLOWED: &str = "allowed are user[,hostfwd=tcp:127.0.0.1:2222-:22][,restrict=on][,tftp=DIR][,bootfile=NAME], \
                       tap[,name=INTERFACE] and none, each but the last with \
                       [,model=virtio|e1000|e1000e][,mac=M][,rom=FILE|none]";

/// Addresses of cards that none was given for: locally administered ones that people know from QEMU.
const FIRST_MAC: Mac = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

/// What an option of DHCP holds (RFC 2132, 2).
const LONGEST_BOOT_FILE: usize = 255;

/// Parses `user[,hostfwd=...][,restrict=on][,tftp=...][,bootfile=...]` or `tap[,name=...]`, both with `[,model=...][,mac=...][,rom=...]`, or
/// `none`.
pub fn parse(text: &str) -> Result<NetArg, String> {
    let mut settings = text.split(',');
    let kind = settings.next().unwrap_or_default();
    let to = match kind {
        "user" => Attachment::default(),
        "tap" => Attachment::Tap { name: String::new() },
        "none" => Attachment::Nothing,
        _ => return Err(format!("\"{kind}\" is not known: {ALLOWED}")),
    };
    let mut arg = NetArg { to, ..NetArg::default() };
    let is_card = arg.to != Attachment::Nothing;
    for setting in settings {
        let (name, value) = setting.split_once('=').unwrap_or((setting, ""));
        match (&mut arg.to, name, value) {
            (_, "mac", value) if is_card => arg.mac = Some(parse_mac(value)?),
            (_, "model", "virtio") if is_card => arg.model = None,
            (_, "model", "e1000") if is_card => arg.model = Some(CardModel::E1000),
            (_, "model", "e1000e") if is_card => arg.model = Some(CardModel::E1000e),
            (_, "rom", "none") if is_card => arg.rom = Rom::Nothing,
            (_, "rom", file) if is_card && !file.is_empty() => arg.rom = Rom::File(file.into()),
            (Attachment::User { tftp, .. }, "tftp", directory) if !directory.is_empty() => {
                *tftp = Some(directory.into());
            }
            (Attachment::User { boot_file, .. }, "bootfile", name) if (1..=LONGEST_BOOT_FILE).contains(&name.len()) => {
                *boot_file = Some(name.into());
            }
            (Attachment::User { forwards, .. }, "hostfwd", value) => forwards.push(value.parse()?),
            (Attachment::User { restrict, .. }, "restrict", "on") => *restrict = true,
            (Attachment::User { restrict, .. }, "restrict", "off") => *restrict = false,
            (Attachment::Tap { name, .. }, "name", value) if (1..16).contains(&value.len()) => *name = value.into(),
            (Attachment::Tap { .. }, "name", value) => {
                return Err(format!("\"{value}\" can't be an interface: their names have 1 to 15 bytes"));
            }
            (_, "model", value) if is_card => {
                return Err(format!("\"{value}\" is not a model of card: there are virtio, e1000 and e1000e"));
            }
            _ => return Err(format!("\"{setting}\" is not known for {kind}: {ALLOWED}")),
        }
    }
    Ok(arg)
}

fn parse_mac(text: &str) -> Result<Mac, String> {
    let is_byte = |part: &&str| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| Some(part).filter(is_byte).and_then(|part| u8::from_str_radix(part, 16).ok()))
        .collect();
    let mac = bytes.and_then(|bytes| Mac::try_from(bytes).ok());
    mac.filter(|mac| mac[0] & 1 == 0 && *mac != [0; 6])
        .ok_or_else(|| format!("\"{text}\" is not the hardware address of a card, such as 52:54:00:12:34:56"))
}

/// Why there are no cards.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--net: {0}")]
    Backend(#[from] ::net::Error),
    #[error("--net rom={}: {source}", path.display())]
    Rom { path: PathBuf, source: io::Error },
    #[error("--net rom={}: it is no option ROM, which begins with 55 AA and has at most 16 MiB", path.display())]
    NotRom { path: PathBuf },
}

/// Where distributions put iPXE's option ROMs, by their name for the card: for a BIOS and EFI, else for a BIOS alone.
const ROMS: [(&str, &str); 4] = [
    ("/usr/lib/ipxe/qemu/efi-", ".rom"),
    ("/usr/share/qemu/efi-", ".rom"),
    ("/usr/lib/ipxe/qemu/pxe-", ".rom"),
    ("/usr/share/qemu/pxe-", ".rom"),
];
const LARGEST_ROM: u64 = 16 << 20;

impl NetArg {
    /// What firmware finds on the card.
    fn option_rom(&self) -> Result<Vec<u8>, Error> {
        let path = match &self.rom {
            Rom::Nothing => return Ok(Vec::new()),
            Rom::File(path) => path.clone(),
            Rom::Installed => {
                let model = match self.model {
                    None => "virtio",
                    Some(CardModel::E1000) => "e1000",
                    Some(CardModel::E1000e) => "e1000e",
                };
                let paths = ROMS.iter().map(|(before, after)| PathBuf::from(format!("{before}{model}{after}")));
                match paths.into_iter().find(|path| path.exists()) {
                    Some(path) => path,
                    None => return Ok(Vec::new()),
                }
            }
        };
        let read = || {
            let mut rom = Vec::new();
            File::open(&path)?.take(LARGEST_ROM + 1).read_to_end(&mut rom)?;
            Ok(rom)
        };
        let rom = read().map_err(|source| Error::Rom { path: path.clone(), source })?;
        let right = rom.starts_with(&[0x55, 0xaa]) && rom.len() as u64 <= LARGEST_ROM;
        if right { Ok(rom) } else { Err(Error::NotRom { path }) }
    }
}

/// Paravirtual cards, and those of real makes.
pub type Cards = (Vec<Arc<dyn VirtioDevice>>, Vec<Card>);

/// Makes the cards; a paravirtual one on a tap interface with a pair of queues for each processor. Nothing asked for is
/// one paravirtual card on the user network. `firmware`: there is some that may boot from them.
pub fn devices(args: &[NetArg], cpus: u32, firmware: bool) -> Result<Cards, Error> {
    let usual = [NetArg::default()];
    let args = if args.is_empty() { &usual } else { args };
    let mut devices: Vec<Arc<dyn VirtioDevice>> = Vec::new();
    let mut cards = Vec::new();
    for (arg, number) in args.iter().zip(0u8..) {
        let [head @ .., last] = FIRST_MAC;
        let [a, b, c, d, e] = head;
        let own = [a, b, c, d, e, last.wrapping_add(number)];
        let mac = arg.mac.unwrap_or(own);
        let (mut backends, mtu): (Vec<Box<dyn Backend>>, _) = match &arg.to {
            Attachment::Nothing => continue,
            Attachment::Tap { name } => {
                let pairs = if arg.model.is_some() { 1 } else { (cpus as usize).min(MAX_PAIRS) };
                let (taps, name) = Tap::open(name, pairs)?;
                tracing::info!("a network card is attached to the tap interface {name}");
                (taps.into_iter().map(|tap| Box::new(tap) as Box<dyn Backend>).collect(), None)
            }
            Attachment::User { forwards, restrict, tftp, boot_file } => {
                let config = UserConfig {
                    forwards: forwards.clone(),
                    restrict: *restrict,
                    tftp: tftp.clone(),
                    boot_file: boot_file.clone(),
                    ..UserConfig::new(mac)
                };
                let mtu = config.mtu;
                (vec![Box::new(UserNet::new(config)?)], Some(mtu))
            }
        };
        let rom = if firmware { arg.option_rom()? } else { Vec::new() };
        match arg.model {
            None => devices.push(Arc::new(Net::new(mac, mtu, backends).with_option_rom(rom))),
            Some(model) => cards.extend(backends.pop().map(|backend| Card { model, mac, rom, backend })),
        }
    }
    Ok((devices, cards))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_networks_have_settings() {
        let arg = parse("user,hostfwd=tcp::2222-:22,hostfwd=udp::53-:53,restrict=on,mac=52:54:00:aa:bb:cc").unwrap();
        let Attachment::User { forwards, restrict, .. } = arg.to else { panic!() };
        assert_eq!((arg.mac, forwards.len(), restrict), (Some([0x52, 0x54, 0, 0xaa, 0xbb, 0xcc]), 2, true));
        assert_eq!(parse("none").unwrap().to, Attachment::Nothing);
        assert_eq!(parse("tap,model=e1000e").unwrap().model, Some(CardModel::E1000e));
    }

    #[test]
    fn cards_boot_by_the_rom_that_is_named_or_none() {
        let arg = parse("user,tftp=/srv/tftp,bootfile=http://10.0.2.2:8000/boot.ipxe,rom=none").unwrap();
        assert!(arg.option_rom().unwrap().is_empty());
        let Attachment::User { tftp, boot_file, .. } = arg.to else { panic!() };
        assert_eq!((tftp, boot_file), (Some("/srv/tftp".into()), Some("http://10.0.2.2:8000/boot.ipxe".into())));
        assert!(parse(&format!("user,bootfile={}", "x".repeat(256))).is_err());
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("card.rom");
        let rom = || parse(&format!("tap,rom={}", file.display())).unwrap().option_rom();
        assert!(rom().unwrap_err().to_string().contains("card.rom"));
        std::fs::write(&file, [0xaa, 0x55]).unwrap();
        assert!(rom().unwrap_err().to_string().contains("no option ROM"));
        std::fs::write(&file, [0x55, 0xaa, 4]).unwrap();
        assert_eq!(rom().unwrap(), [0x55, 0xaa, 4]);
    }

    #[test]
    fn what_is_not_known_is_refused_with_what_is() {
        for text in [
            "",
            "slirp",
            "user,x",
            "user,hostfwd=",
            "user,restrict=maybe",
            "none,mac=1",
            "none,model=e1000",
            "none,rom=none",
            "user,rom=",
            "user,tftp=",
            "user,bootfile=",
            "tap,tftp=/srv",
            "user,model=ne2000",
            "user,mac=1:2:3:4:5:6",
            "user,mac=ff:ff:ff:ff:ff:ff",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse("slirp").unwrap_err().contains("hostfwd"));
    }
}
