//! `--control unix:PATH`: a socket by which the user, or a program of his, changes a running machine.
//!
//! Each line is a command: words, of which one may be quoted with `"`. Each is answered by one line: `ok`, `ok` and what
//! was asked for, or `error` and why.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{Disk, Options};
use display::vga::Vga;
use display::{Frame, png};
use machine::Handle;
use storage::Media;
use virtio::balloon::Balloon;

use crate::cleanup::{self, Guard};
use crate::units::{parse_size, show_size};

/// The longest line that is taken, in bytes.
const LONGEST_LINE: u64 = 8192;

const COMMANDS: &str = "drives; eject DRIVE [force]; change DRIVE FILE [force]; balloon [SIZE]; screendump FILE; pause; \
                        resume; powerdown; quit; help";

/// A drive whose medium can be changed.
pub struct RemovableDrive {
    /// Such as `cdrom` or `floppy`, with a number from the second on.
    pub name: String,
    pub media: Arc<Media>,
    /// How an image for it is opened.
    pub options: fn(PathBuf) -> Options,
}

/// What the commands reach.
pub struct Control {
    pub machine: Handle,
    pub drives: Vec<RemovableDrive>,
    /// The graphics adapter, if there is one.
    pub vga: Option<Arc<Vga>>,
    pub balloon: Arc<Balloon>,
}

/// Parses `unix:PATH`.
pub fn parse(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(path.into()),
        _ => Err("allowed is unix:PATH".into()),
    }
}

/// Listens at `path`, which only this user may use. The socket is removed when the process ends, and when the guard
/// goes. It must not exist: what is there may be another machine's.
pub fn listen(path: PathBuf) -> io::Result<(UnixListener, Guard)> {
    let listener = UnixListener::bind(&path)?;
    let guard = cleanup::register({
        let path = path.clone();
        move || _ = fs::remove_file(path)
    });
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok((listener, guard))
}

/// Answers whoever connects, one after the other, until the process ends.
pub fn serve(listener: UnixListener, control: Control) -> io::Result<()> {
    let work = move || {
        for stream in listener.incoming().flatten() {
            if let Err(error) = converse(&stream, &control) {
                tracing::debug!("a control connection has ended: {error}");
            }
        }
    };
    wake::thread("control").spawn(work).map(drop)
}

fn converse(stream: &UnixStream, control: &Control) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        let length = (&mut reader).take(LONGEST_LINE).read_until(b'\n', &mut line)?;
        if length == 0 {
            return Ok(());
        }
        if line.pop() != Some(b'\n') {
            return Err(io::Error::other("a line is too long or not ended"));
        }
        let answer = match words(&String::from_utf8_lossy(&line)).and_then(|words| control.execute(&words)) {
            Ok(text) if text.is_empty() => "ok\n".into(),
            Ok(text) => format!("ok {text}\n"),
            Err(why) => format!("error {}\n", why.replace('\n', " ")),
        };
        (&mut &*stream).write_all(answer.as_bytes())?;
    }
}

/// The words of a line; within quotes, spaces belong to a word.
fn words(line: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut current: Option<String> = None;
    let mut quoted = false;
    for character in line.trim_end_matches('\r').chars() {
        match character {
            '"' => {
                quoted = !quoted;
                current.get_or_insert_default();
            }
            ' ' | '\t' if !quoted => words.extend(current.take()),
            _ => current.get_or_insert_default().push(character),
        }
    }
    words.extend(current);
    if quoted { Err("a quotation mark is missing".into()) } else { Ok(words) }
}

impl Control {
    fn execute(&self, words: &[String]) -> Result<String, String> {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        match *words.as_slice() {
            ["eject", drive] => self.eject(drive, false),
            ["eject", drive, "force"] => self.eject(drive, true),
            ["change", drive, file] => self.change(drive, file, false),
            ["change", drive, file, "force"] => self.change(drive, file, true),
            ["drives"] => {
                let state = |drive: &RemovableDrive| {
                    format!("{}={}", drive.name, if drive.media.is_loaded() { "loaded" } else { "empty" })
                };
                Ok(self.drives.iter().map(state).collect::<Vec<_>>().join(" "))
            }
            ["screendump", file] => self.screendump(Path::new(file)),
            // What the guest does without by now, which may be less than it was asked for.
            ["balloon"] => Ok(show_size(self.balloon.actual())),
            ["balloon", size] => {
                self.balloon.set_target(parse_size(size)?);
                Ok(String::new())
            }
            ["pause"] => {
                self.machine.pause();
                Ok(String::new())
            }
            ["resume"] => {
                self.machine.resume();
                Ok(String::new())
            }
            ["powerdown"] => {
                self.machine.press_power_button();
                Ok(String::new())
            }
            ["quit"] => {
                self.machine.end();
                Ok(String::new())
            }
            ["help"] => Ok(COMMANDS.into()),
            [] => Err(format!("there are these commands: {COMMANDS}")),
            [name, ..] => Err(format!("\"{name}\" is not known with these words: there are {COMMANDS}")),
        }
    }

    fn drive(&self, name: &str) -> Result<&RemovableDrive, String> {
        let names = || self.drives.iter().map(|drive| drive.name.as_str()).collect::<Vec<_>>().join(", ");
        let missing = || match names() {
            names if names.is_empty() => "the machine has no drive for removable media".into(),
            names => format!("there is no drive {name:?}: there are {names}"),
        };
        self.drives.iter().find(|drive| drive.name == name).ok_or_else(missing)
    }

    /// Writes what the screen shows as a PNG file, and says how large it is.
    fn screendump(&self, file: &Path) -> Result<String, String> {
        let vga = self.vga.as_ref().ok_or("the machine has no graphics adapter (--vga std)")?;
        let mut frame = Frame::default();
        vga.draw(&mut frame);
        let mut data = Vec::new();
        png::write(&frame, &mut data)
            .and_then(|()| fs::write(file, data))
            .map_err(|error| format!("{}: {error}", file.display()))?;
        let (width, height) = frame.size();
        Ok(format!("{width}x{height}"))
    }

    fn eject(&self, name: &str, force: bool) -> Result<String, String> {
        self.drive(name)?.media.eject(force).map_err(|error| error.to_string())?;
        Ok(String::new())
    }

    fn change(&self, name: &str, file: &str, force: bool) -> Result<String, String> {
        let drive = self.drive(name)?;
        let disk = Disk::open(&(drive.options)(file.into())).map_err(|error| error.to_string())?;
        drive.media.insert(Arc::new(disk), force).map_err(|error| error.to_string())?;
        Ok(String::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_words_of_which_some_are_quoted() {
        assert_eq!(words("change  cdrom \"/a b/c.iso\" force\r").unwrap(), ["change", "cdrom", "/a b/c.iso", "force"]);
        assert_eq!(words("").unwrap(), [""; 0]);
        assert_eq!(words("a \"\"").unwrap(), ["a", ""]);
        assert!(words("change cdrom \"a").is_err());
    }

    #[test]
    fn only_unix_sockets_can_be_named() {
        assert_eq!(parse("unix:/run/x").unwrap(), PathBuf::from("/run/x"));
        assert!(parse("unix:").is_err() && parse("/run/x").is_err());
    }
}
