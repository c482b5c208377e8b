//! The machine's screen, as the command line asks for it: the graphics adapter, and where people can see and use it.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use boot::Framebuffer;
use chipset::i8042::KeyboardController;
use display::Frame;
use display::vga::{self, Vga};
use display::vnc::{Address, Desktop, MAX_PASSWORD, Password, Server};
use machine::{Machine, VgaConfig};

use crate::cleanup::{self, Guard};
use crate::disk::split_path;

/// Where Debian's package seabios has the option ROM.
const OPTION_ROM: &str = "/usr/share/seabios/vgabios-stdvga.bin";

/// The first port of VNC.
const DEFAULT_PORT: u16 = 5900;

/// Why nobody can see the screen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--display {address}: {source}")]
    Listen { address: Address, source: io::Error },
    #[error("--display needs a graphics adapter: leave out --vga none")]
    NoVga,
    #[error("the password in {}: {source}", path.display())]
    PasswordFile { path: PathBuf, source: io::Error },
    #[error("{} has no password in its first line", path.display())]
    NoPassword { path: PathBuf },
    #[error("the option ROM {OPTION_ROM}: {0}")]
    OptionRom(io::Error),
}

/// `--vga`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VgaArg {
    Std,
    None,
}

pub fn parse_vga(text: &str) -> Result<VgaArg, String> {
    match text {
        "std" => Ok(VgaArg::Std),
        "none" => Ok(VgaArg::None),
        _ => Err("allowed are std and none".into()),
    }
}

/// `--display`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DisplayArg {
    None,
    Vnc { address: Address, password: Option<PathBuf> },
}

/// Parses `none`, `vnc[=[ADDR:]PORT][,password=FILE]` and `vnc=unix:PATH[,password=FILE]`.
pub fn parse_display(text: &str) -> Result<DisplayArg, String> {
    if text == "none" {
        return Ok(DisplayArg::None);
    }
    let (place, settings) = split_path(text);
    let place = place.strip_prefix("vnc").ok_or("allowed are none, vnc[=[ADDR:]PORT] and vnc=unix:PATH")?;
    let address = match place.strip_prefix('=') {
        None if place.is_empty() => loopback(DEFAULT_PORT),
        None => return Err("allowed are none, vnc[=[ADDR:]PORT] and vnc=unix:PATH".into()),
        Some(place) => parse_address(place)?,
    };
    let mut password = None;
    for setting in settings.split(',').filter(|setting| !setting.is_empty()) {
        match setting.split_once('=') {
            Some(("password", file)) if !file.is_empty() => password = Some(file.into()),
            _ => return Err(format!("\"{setting}\" is not known: there is password=FILE")),
        }
    }
    Ok(DisplayArg::Vnc { address, password })
}

fn loopback(port: u16) -> Address {
    Address::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
}

fn parse_address(text: &str) -> Result<Address, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return if path.is_empty() {
            Err("the path of a Unix socket is missing".into())
        } else {
            Ok(Address::Unix(path.into()))
        };
    }
    if let Ok(port) = text.trim_start_matches(':').parse() {
        return Ok(loopback(port));
    }
    let resolved = text.to_socket_addrs().ok().and_then(|mut all| all.next());
    resolved.map(Address::Tcp).ok_or_else(|| format!("\"{text}\" is no address with a port, as 127.0.0.1:5900 is one"))
}

/// The adapter that the machine gets: one that was asked for, or that firmware or a display need.
pub fn vga(vga: Option<VgaArg>, display: &DisplayArg, firmware: bool) -> Result<Option<VgaConfig>, Error> {
    match (vga, display) {
        (Some(VgaArg::None), DisplayArg::Vnc { .. }) => Err(Error::NoVga),
        (Some(VgaArg::None), DisplayArg::None) => Ok(None),
        (None, DisplayArg::None) if !firmware => Ok(None),
        _ => Ok(Some(VgaConfig { rom: if firmware { option_rom()? } else { Vec::new() } })),
    }
}

/// What a kernel that no firmware starts is told of the adapter.
pub fn boot_framebuffer() -> Framebuffer {
    // Below 4 GiB, as all of PCI's window is.
    Framebuffer { address: vga::boot::FRAMEBUFFER as u32, width: vga::boot::WIDTH, height: vga::boot::HEIGHT }
}

/// What a BIOS uses the adapter by.
fn option_rom() -> Result<Vec<u8>, Error> {
    match fs::read(OPTION_ROM) {
        Ok(rom) => Ok(rom),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            say!("ringer: {OPTION_ROM} is missing (package seabios): a BIOS shows nothing on the screen without it");
            Ok(Vec::new())
        }
        Err(error) => Err(Error::OptionRom(error)),
    }
}

/// A server, and what removes its socket if a signal ends the process.
pub struct Display {
    _server: Server,
    _socket: Option<Guard>,
}

/// Lets people see and use the machine.
pub fn serve(display: &DisplayArg, machine: &Machine) -> Result<Option<Display>, Error> {
    let DisplayArg::Vnc { address, password } = display else { return Ok(None) };
    let vga = machine.vga().ok_or(Error::NoVga)?.clone();
    let password = password.as_deref().map(read_password).transpose()?;
    let open = matches!(address, Address::Tcp(address) if !address.ip().is_loopback());
    if open && password.is_none() {
        say!("ringer: whoever reaches {address} can use the machine: there is no password (,password=FILE)");
    }
    let desktop = Arc::new(Screen { vga, keyboard: machine.keyboard().clone(), pointer: Mutex::default() });
    let server = Server::start(address, password, desktop)
        .map_err(|source| Error::Listen { address: address.clone(), source })?;
    let socket = match address {
        Address::Unix(path) => {
            let path = path.clone();
            Some(cleanup::register(move || _ = fs::remove_file(path)))
        }
        Address::Tcp(_) => None,
    };
    say!("ringer: the screen is at vnc {}", server.address());
    Ok(Some(Display { _server: server, _socket: socket }))
}

fn read_password(path: &Path) -> Result<Password, Error> {
    let text = fs::read(path).map_err(|source| Error::PasswordFile { path: path.into(), source })?;
    let line = text.split(|byte| matches!(byte, b'\n' | b'\r')).next().unwrap_or_default();
    if line.is_empty() {
        return Err(Error::NoPassword { path: path.into() });
    }
    if line.len() > MAX_PASSWORD {
        say!("ringer: of the password in {}, VNC uses the first {MAX_PASSWORD} bytes", path.display());
    }
    Ok(Password::new(line))
}

/// The adapter's picture, and the keyboard controller's devices.
struct Screen {
    vga: Arc<Vga>,
    keyboard: Arc<KeyboardController>,
    pointer: Mutex<Option<Pointer>>,
}

/// The pointer as viewers had it last.
#[derive(Clone, Copy)]
struct Pointer {
    x: usize,
    y: usize,
    buttons: u8,
}

/// Viewers' buttons: left, middle, right, wheel up and down; and the first of those at the side, which the eighth is.
const WHEEL_UP: u8 = 1 << 3;
const WHEEL_DOWN: u8 = 1 << 4;

/// Between keys that viewers type, or paste: a BIOS keeps no more than 15 of them for a program that is slow to ask.
const KEY_PACE: Duration = Duration::from_millis(20);

impl Desktop for Screen {
    fn draw(&self, frame: &mut Frame) -> bool {
        self.vga.draw_changes(frame)
    }

    fn key(&self, code: u8, down: bool) {
        self.keyboard.key(code, down);
        if down {
            std::thread::sleep(KEY_PACE);
        }
    }

    /// A mouse knows no places, only movements: the difference from where the pointer was before.
    fn pointer(&self, x: usize, y: usize, buttons: u8) {
        let mut last = self.pointer.lock().unwrap_or_else(PoisonError::into_inner);
        let before = last.replace(Pointer { x, y, buttons }).unwrap_or(Pointer { x, y, buttons: 0 });
        let distance = |from: usize, to: usize| to as i32 - from as i32;
        let pressed = buttons & !before.buttons;
        let wheel = i32::from(pressed & WHEEL_DOWN != 0) - i32::from(pressed & WHEEL_UP != 0);
        let down = |from: u8, to: u8| (buttons >> from & 1) << to;
        let buttons = down(0, 0) | down(2, 1) | down(1, 2) | down(7, 3);
        self.keyboard.mouse(distance(before.x, x), distance(y, before.y), wheel, buttons);
    }

    fn leds(&self) -> u8 {
        self.keyboard.lights()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn displays_are_on_loopback_unless_asked_otherwise() {
        let vnc = |address: &str, password: Option<&str>| {
            let address = Address::Tcp(address.parse().unwrap());
            Ok(DisplayArg::Vnc { address, password: password.map(PathBuf::from) })
        };
        assert_eq!(parse_display("none"), Ok(DisplayArg::None));
        assert_eq!(parse_display("vnc"), vnc("127.0.0.1:5900", None));
        assert_eq!(parse_display("vnc=5907"), vnc("127.0.0.1:5907", None));
        assert_eq!(parse_display("vnc=:0"), vnc("127.0.0.1:0", None));
        assert_eq!(parse_display("vnc=0.0.0.0:1,password=p"), vnc("0.0.0.0:1", Some("p")));
        assert_eq!(parse_display("vnc=[::1]:5900"), vnc("[::1]:5900", None));
        let unix = DisplayArg::Vnc { address: Address::Unix("/a,b".into()), password: Some("/p".into()) };
        assert_eq!(parse_display("vnc=unix:/a,,b,password=/p"), Ok(unix));
        for text in ["", "sdl", "vnc=", "vncx", "vnc=unix:", "vnc=99999", "vnc=1,x", "vnc=1,password="] {
            assert!(parse_display(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_display_brings_an_adapter() {
        let vnc = parse_display("vnc").unwrap();
        assert!(vga(None, &DisplayArg::None, false).unwrap().is_none());
        assert!(vga(None, &DisplayArg::None, true).unwrap().is_some());
        assert!(vga(None, &vnc, false).unwrap().is_some());
        assert!(vga(Some(VgaArg::Std), &DisplayArg::None, false).unwrap().is_some());
        assert!(vga(Some(VgaArg::None), &DisplayArg::None, true).unwrap().is_none());
        assert!(vga(Some(VgaArg::None), &vnc, false).is_err());
    }

    #[test]
    fn passwords_are_first_lines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        assert!(read_password(&path).is_err());
        fs::write(&path, "\nx").unwrap();
        assert!(read_password(&path).is_err());
        fs::write(&path, "secret\nx").unwrap();
        assert!(read_password(&path).is_ok());
    }
}
