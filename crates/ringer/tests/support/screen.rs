//! A machine's screen, as people have it by real VNC viewers from PyPI: pictures of it, keys, and the text that it shows.

use std::collections::HashMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::{LONG, cache};

/// The viewers, installed on first use into a virtual environment of their own.
pub fn viewers() -> &'static Path {
    static VIEWERS: OnceLock<PathBuf> = OnceLock::new();
    VIEWERS.get_or_init(|| {
        let directory = cache().join("viewers-v1");
        let done = directory.join("done");
        if !done.exists() {
            let run = |command: &mut Command| {
                let output = command.output().expect("python3 is installed");
                assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
            };
            run(Command::new("python3").args(["-m", "venv"]).arg(&directory));
            run(Command::new(directory.join("bin/pip")).args(["install", "-q", "asyncvnc", "vncdotool", "pillow"]));
            fs::write(done, "").unwrap();
        }
        directory
    })
}

/// A picture, as binary PPM has it.
pub struct Picture {
    width: usize,
    height: usize,
    pixels: Vec<[u8; 3]>,
}

impl Picture {
    pub fn read(path: &Path) -> Self {
        let data = fs::read(path).unwrap();
        // "P6", width, height and 255, each with one blank behind it.
        let mut fields = data.splitn(5, |byte| byte.is_ascii_whitespace());
        let mut number = || std::str::from_utf8(fields.next().unwrap()).unwrap().parse().ok();
        let (_, width, height, _): (Option<usize>, Option<usize>, Option<usize>, Option<usize>) =
            (number(), number(), number(), number());
        let pixels = fields.next().unwrap().as_chunks().0.to_vec();
        Picture { width: width.unwrap(), height: height.unwrap(), pixels }
    }

    pub fn size(&self) -> (usize, usize) {
        (self.width, self.height)
    }

    pub fn at(&self, x: usize, y: usize) -> [u8; 3] {
        self.pixels[y * self.width + x]
    }

    /// The text on it, in cells of 8 (in the BIOS's text mode 9) by 16 dots from line `top` on. A cell shows a character if
    /// all its pixels are that character's, in any two colours; what is none becomes U+FFFD.
    pub fn text(&self, fonts: &Fonts, top: usize) -> String {
        let (width, font) = if self.size() == (720, 400) { (9, &fonts.bios) } else { (8, &fonts.console) };
        let characters: HashMap<&[u8], char> = (b'!'..=b'~')
            .filter_map(|code| Some((font.get(16 * usize::from(code)..)?.get(..16)?, char::from(code))))
            .collect();
        let cell = |column: usize, row: usize| {
            let (left, top) = (column * width, top + row * 16);
            let background = self.at(left, top);
            let mut glyph = [0; 16];
            for (y, line) in glyph.iter_mut().enumerate() {
                for x in 0..8 {
                    *line |= u8::from(self.at(left + x, top + y) != background) << (7 - x);
                }
            }
            if glyph == [0; 16] { ' ' } else { characters.get(&glyph[..]).copied().unwrap_or('\u{fffd}') }
        };
        let rows = 0..(self.height - top) / 16;
        let line = |row| (0..self.width / width).map(|column| cell(column, row)).collect::<String>();
        rows.map(|row| line(row).trim_end().to_owned() + "\n").collect()
    }
}

/// What systems write on the screen with.
pub struct Fonts {
    /// In text mode: the adapter's own.
    pub bios: Vec<u8>,
    /// In graphics modes: that of Linux's console, which Memtest86+ has as well.
    pub console: Vec<u8>,
}

impl Fonts {
    pub fn new() -> Self {
        Fonts { bios: font(), console: find_font("/boot/memtest86+x64.efi", "memtest86+") }
    }
}

/// The BIOS's font.
pub fn font() -> Vec<u8> {
    find_font("/usr/share/seabios/vgabios-stdvga.bin", "seabios")
}

/// A font of 8 by 16 dots: its place in a program is known by the shape of the letter A.
fn find_font(program: &str, package: &str) -> Vec<u8> {
    const A: [u8; 16] = [0, 0, 0x10, 0x38, 0x6c, 0xc6, 0xc6, 0xfe, 0xc6, 0xc6, 0xc6, 0xc6, 0, 0, 0, 0];
    let data = fs::read(program).unwrap_or_else(|error| panic!("package {package}: {program}: {error}"));
    let place = data.windows(16).position(|bytes| bytes == A).expect("the font has an A");
    data[place - 16 * usize::from(b'A')..][..4096].to_vec()
}

/// Where viewers come to a machine.
pub struct Screen {
    /// The server's Unix socket.
    pub socket: PathBuf,
}

impl Screen {
    /// Waits until there is somebody to connect to.
    pub fn wait_for_server(&self) {
        let start = Instant::now();
        while UnixStream::connect(&self.socket).is_err() {
            assert!(start.elapsed() < LONG, "nobody listens at {}", self.socket.display());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Does something as a person at a viewer.
    pub fn view(&self, commands: &[&str]) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/viewer.py");
        let mut viewer = Command::new(viewers().join("bin/python"));
        let output = viewer.arg(script).arg(&self.socket).args(commands).output().unwrap();
        assert!(output.status.success(), "{commands:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn file(&self) -> PathBuf {
        self.socket.with_extension("ppm")
    }

    pub fn picture(&self) -> Picture {
        self.view(&[&format!("save={}", self.file().display())]);
        Picture::read(&self.file())
    }

    /// Looks until the screen is as it should be.
    pub fn wait_for(&self, what: &str, right: impl Fn(&Picture) -> bool) -> Picture {
        let start = Instant::now();
        loop {
            let picture = self.picture();
            if right(&picture) {
                return picture;
            }
            if start.elapsed() > LONG {
                let kept = std::env::temp_dir().join("ringer-screen.ppm");
                fs::copy(self.file(), &kept).unwrap();
                panic!("{what} is not on the screen: see {}", kept.display());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Looks until all of `words` are on the screen; gives its text, in cells from line `top` on.
    pub fn wait_for_text(&self, fonts: &Fonts, top: usize, words: &[&str]) -> String {
        let start = Instant::now();
        loop {
            let text = self.picture().text(fonts, top);
            if words.iter().all(|word| text.contains(word)) {
                return text;
            }
            assert!(start.elapsed() < LONG, "no {words:?} on the screen:\n{}", text.trim());
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}
