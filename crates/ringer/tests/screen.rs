//! The screen as people have it: a BIOS, its keyboard and its graphics modes, through real VNC viewers from PyPI, compared
//! pixel by pixel with what the test itself has drawn.

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use iced_x86::code_asm::*;
use support::screen::{Fonts, Picture, Screen, font, viewers};
use support::{LONG, Process, Script, one_machine_at_a_time, pc_guest, ringer, tell};

/// A machine that boots a sector from its disk, with a screen.
struct Machine {
    directory: tempfile::TempDir,
    process: Process,
    screen: Screen,
}

const EXIT_PORT: &str = "0x501";

impl Machine {
    fn boot(code: &mut CodeAssembler, display: impl Fn(&Path) -> String) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut sector = code.assemble(0x7c00).unwrap();
        assert!(sector.len() <= 510);
        sector.resize(510, 0);
        sector.extend([0x55, 0xaa]);
        sector.resize(1 << 20, 0);
        let disk = directory.path().join("disk");
        fs::write(&disk, sector).unwrap();
        let arguments = ["run", "--accel", "translate", "--firmware", "seabios", "--net", "none", "--serial", "none"];
        let mut process = Process::start(
            ringer()
                .args(arguments)
                .args(["--debugcon", "stdio", "--debug-exit", EXIT_PORT, "--display", &display(directory.path())])
                .args(["--disk", &format!("{},bus=ide", disk.display())])
                .args(["--control", &format!("unix:{}", directory.path().join("control").display())])
                .stdin(Stdio::null()),
        );
        process.wait_for("Booting from 0000:7c00");
        let socket = directory.path().join("screen");
        Machine { screen: Screen { socket }, directory, process }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().into()
    }
}

/// Shows what is typed; `1` to `3` set a mode and draw, `0` ends the machine.
fn program() -> CodeAssembler {
    let mut a = CodeAssembler::new(16).unwrap();
    let (mut next, mut text, mut mode13, mut mode12, mut vesa, mut end) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label(), a.create_label(), a.create_label());
    let mut code = || -> Result<(), IcedError> {
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.mov(es, ax)?;
        a.mov(ax, 0x0003)?;
        a.int(0x10)?;
        a.set_label(&mut next)?;
        a.mov(ah, 0)?;
        a.int(0x16)?;
        for (key, label) in [(b'0', end), (b'1', mode13), (b'2', mode12), (b'3', vesa)] {
            a.cmp(al, i32::from(key))?;
            a.je(label)?;
        }
        a.set_label(&mut text)?;
        a.mov(bx, 0x0007)?;
        a.mov(ah, 0x0e)?;
        a.int(0x10)?;
        a.jmp(next)?;
        // 320 x 200: each byte of video memory holds the low byte of its address.
        a.set_label(&mut mode13)?;
        a.mov(ax, 0x0013)?;
        a.int(0x10)?;
        a.mov(ax, 0xa000)?;
        a.mov(es, ax)?;
        a.xor(di, di)?;
        let mut fill = a.create_label();
        a.set_label(&mut fill)?;
        a.mov(ax, di)?;
        a.stosb()?;
        a.cmp(di, 64000u32 as i32 - 0x1_0000)?;
        a.jne(fill)?;
        a.jmp(next)?;
        // 640 x 480 in planes: colour 12 in the left half of the first line, by set and reset.
        a.set_label(&mut mode12)?;
        a.mov(ax, 0x0012)?;
        a.int(0x10)?;
        a.mov(ax, 0xa000)?;
        a.mov(es, ax)?;
        a.mov(dx, 0x3ce)?;
        for value in [0x0c00, 0x0f01] {
            a.mov(ax, value)?;
            a.out(dx, ax)?;
        }
        a.xor(di, di)?;
        a.mov(cx, 40)?;
        a.rep().stosb()?;
        a.jmp(next)?;
        // 800 x 600 of 16 bits, by VESA BIOS: the second bank of 64 KiB gets green.
        a.set_label(&mut vesa)?;
        a.mov(ax, 0x4f02)?;
        a.mov(bx, 0x0114)?;
        a.int(0x10)?;
        a.mov(ax, 0x4f05)?;
        a.mov(bx, 0)?;
        a.mov(dx, 1)?;
        a.int(0x10)?;
        a.mov(ax, 0xa000)?;
        a.mov(es, ax)?;
        a.xor(di, di)?;
        a.mov(ax, 0x07e0)?;
        a.mov(cx, 0x8000u32 as i32 - 0x1_0000)?;
        a.rep().stosw()?;
        a.jmp(next)?;
        a.set_label(&mut end)?;
        a.mov(dx, 0x501)?;
        a.mov(al, 0)?;
        a.out(dx, al)?;
        a.hlt()?;
        Ok(())
    };
    code().unwrap();
    a
}

/// Whether the screen shows these lines of text in grey on black, and nothing else but a cursor behind the last.
fn shows_text(picture: &Picture, font: &[u8], lines: &[&str]) -> bool {
    if picture.size() != (720, 400) {
        return false;
    }
    let cursor = (lines.last().map_or(0, |line| line.len()), lines.len().saturating_sub(1));
    (0..25).all(|row| {
        (0..80).all(|column| {
            let line = lines.get(row).map_or(&b""[..], |line| line.as_bytes());
            let glyph = &font[16 * usize::from(line.get(column).copied().unwrap_or(b' '))..][..16];
            (column, row) == cursor
                || (0..16 * 9).all(|dot| {
                    let (x, y) = (dot % 9, dot / 9);
                    let set = x < 8 && glyph[y] << x & 0x80 != 0;
                    picture.at(9 * column + x, 16 * row + y) == if set { [0xaa; 3] } else { [0; 3] }
                })
        })
    })
}

#[test]
fn a_viewer_types_into_the_bios_and_sees_every_kind_of_mode() {
    let _turn = one_machine_at_a_time();
    viewers();
    let machine = Machine::boot(&mut program(), |directory| format!("vnc=unix:{}/screen", directory.display()));
    let font = font();
    machine.screen.wait_for("the empty screen", |picture| shows_text(picture, &font, &[""]));
    // A BIOS keeps no more than 15 keys.
    machine.screen.view(&["type=Hello, World: "]);
    machine.screen.wait_for("what was typed", |picture| shows_text(picture, &font, &["Hello, World: "]));
    machine.screen.view(&["type={~} [9-4]"]);
    machine.screen.wait_for("what was typed then", |picture| shows_text(picture, &font, &["Hello, World: {~} [9-4]"]));

    machine.screen.view(&["type=1"]);
    let low_bytes = |x: usize, y: usize| (x / 2 + y / 2 * 320) & 0xff;
    // The first 16 colours of the palette are those of text.
    let text_colors = [(0, [0; 3]), (1, [0, 0, 0xaa]), (4, [0xaa, 0, 0]), (6, [0xaa, 0x55, 0]), (15, [0xff; 3])];
    machine.screen.wait_for("mode 13h", |picture| {
        let first = |value: usize| picture.at(2 * value, 0);
        let right = |n: usize| picture.at(n % 640, n / 640) == first(low_bytes(n % 640, n / 640));
        picture.size() == (640, 400)
            && text_colors.iter().all(|(color, expected)| first(*color) == *expected)
            && (0..640 * 400).all(right)
    });

    machine.screen.view(&["type=2"]);
    let red = [0xff, 0x55, 0x55];
    machine.screen.wait_for("mode 12h", |picture| {
        let right = |n: usize| picture.at(n % 640, n / 640) == if n < 320 { red } else { [0; 3] };
        picture.size() == (640, 480) && (0..640 * 480).all(right)
    });

    machine.screen.view(&["type=3"]);
    machine.screen.wait_for("a VESA mode", |picture| {
        let green = 0x8000..0x1_0000;
        let right = |n: usize| picture.at(n % 800, n / 800) == if green.contains(&n) { [0, 0xff, 0] } else { [0; 3] };
        picture.size() == (800, 600) && (0..800 * 600).all(right)
    });

    machine.screen.view(&["type=0"]);
    assert_eq!(machine.process.end().status.code(), Some(1));
}

#[test]
fn another_viewer_comes_in_with_a_password() {
    let _turn = one_machine_at_a_time();
    viewers();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let machine = Machine::boot(&mut program(), |directory| {
        let file = directory.join("password");
        fs::write(&file, "sesame\n").unwrap();
        format!("vnc={port},password={}", file.display())
    });
    let picture = machine.path("picture.ppm");
    let dotool = |password: &str, commands: &[&str]| {
        let server = format!("127.0.0.1::{port}");
        let mut viewer = Command::new(viewers().join("bin/vncdo"));
        viewer.args(["-t", "100", "-s", &server, "-p", password]).args(commands).output().unwrap()
    };
    // It writes no PPM itself.
    let convert = |from: &str| {
        let script = "import sys; from PIL import Image; Image.open(sys.argv[1]).convert('RGB').save(sys.argv[2])";
        let mut python = Command::new(viewers().join("bin/python"));
        assert!(python.args(["-c", script, from, &picture]).status().unwrap().success());
    };
    let shot = machine.path("picture.png");
    let output = dotool("open", &["capture", &shot]);
    assert!(!output.status.success(), "{output:?}");
    let output = dotool("sesame", &["type", "mellon"]);
    assert!(output.status.success(), "{output:?}");
    let start = Instant::now();
    loop {
        let output = dotool("sesame", &["capture", &shot]);
        assert!(output.status.success(), "{output:?}");
        convert(&shot);
        if shows_text(&Picture::read(Path::new(&picture)), &font(), &["mellon"]) {
            break;
        }
        assert!(start.elapsed() < LONG);
    }
    // The same as a file, by the control socket.
    let file = machine.path("dump.png");
    let control = machine.directory.path().join("control");
    assert_eq!(tell(&control, &format!("screendump {file}")), "ok 720x400\n");
    convert(&file);
    assert!(shows_text(&Picture::read(Path::new(&picture)), &font(), &["mellon"]));
    assert!(tell(&control, "screendump /nowhere/x.png").starts_with("error /nowhere/x.png: "));
    let output = dotool("sesame", &["key", "0"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(machine.process.end().status.code(), Some(1));
}

#[test]
fn a_kernel_that_no_firmware_starts_has_a_console_on_the_screen() {
    viewers();
    let script = Script::on(pc_guest()).step("say", "echo what is said here is seen >/dev/tty0; sleep 1000");
    let (mut command, directory) = script.command("");
    let screen = Screen { socket: directory.path().join("screen") };
    command.args(["--net", "none", "--display", &format!("vnc=unix:{}", screen.socket.display())]);
    let _turn = one_machine_at_a_time();
    let mut machine = Process::start(command.stdin(Stdio::null()));
    machine.wait_for("@@begin say");
    screen.wait_for_text(&Fonts::new(), 0, &["what is said here is seen"]);
    assert_eq!(screen.picture().size(), (1024, 768));
}
