//! Systems for PCs, unmodified, from their own boot loaders: used by keys, and seen on the screen.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::screen::{Fonts, Screen, viewers};
use support::{Process, one_machine_at_a_time, ringer};

/// A machine that starts from a CD, for a person at a viewer.
struct Machine {
    process: Process,
    screen: Screen,
    fonts: Fonts,
    /// The first line of the picture that has text.
    top: usize,
    _directory: tempfile::TempDir,
}

impl Machine {
    fn start(disc: &Path, options: &[&str]) -> Self {
        viewers();
        let directory = tempfile::tempdir().unwrap();
        let screen = Screen { socket: directory.path().join("screen") };
        let mut command = ringer();
        command.args(["run", "--accel", "translate", "--net", "none", "--serial", "none", "--no-reboot", "--cdrom"]);
        command.arg(disc).arg("--display").arg(format!("vnc=unix:{}", screen.socket.display())).args(options);
        let process = Process::start(command.stdin(Stdio::null()));
        screen.wait_for_server();
        Machine { process, screen, fonts: Fonts::new(), top: 0, _directory: directory }
    }

    fn wait_for(&self, words: &[&str]) -> String {
        self.screen.wait_for_text(&self.fonts, self.top, words)
    }

    /// Presses keys, one after the other, and waits for what the system then shows.
    fn press(&self, keys: &[&str], words: &[&str]) -> String {
        keys.iter().for_each(|key| self.screen.view(&[&format!("key={key}")]));
        self.wait_for(words)
    }

    fn ends(self) {
        let ended = self.process.end();
        assert!(ended.status.success(), "{ended:?}");
    }
}

/// One pass of Memtest86+ on two processors, without its last test, which does nothing but wait for minutes for memory
/// chips to lose their content.
fn memtest(options: &[&str], top: usize) {
    let _turn = one_machine_at_a_time();
    let disc = Path::new("/usr/lib/memtest86+/memtest86+x64.iso");
    assert!(disc.exists(), "package memtest86+ is installed");
    let machine = Machine { top, ..Machine::start(disc, &[options, &["--cpus", "2"]].concat()) };
    machine.wait_for(&["Memtest86", "<F1> Configuration"]);
    machine.press(&["F1"], &["<F1>  Test selection"]);
    machine.press(&["F1"], &["<F5>  Add all tests"]);
    machine.press(&["F5"], &["***********"]);
    machine.press(&["F2", "1", "0", "Return"], &["**********."]);
    machine.press(&["F10", "F10", "Return"], &["CPU: 2 Cores 2 Threads", "SMP: 2T", "Status: Testing"]);
    let text = machine.wait_for(&["Status: Pass", "Press any key to remove this banner"]);
    assert!(text.contains("Errors: 0"), "{text}");
    machine.screen.view(&["key=space"]);
    machine.screen.view(&["key=Escape"]);
    machine.ends();
}

#[test]
fn memtest86_finds_no_errors_on_a_bios() {
    memtest(&["--firmware", "seabios", "--memory", "16M"], 0);
}

/// On EFI it draws its text of 25 lines into the middle of 480.
#[test]
fn memtest86_finds_no_errors_on_efi() {
    memtest(&["--firmware", "ovmf", "--memory", "64M"], 40);
}

/// A CD of Debian's installer in text mode, made of what Debian packages of it.
fn installer(directory: &Path) -> PathBuf {
    let images =
        fs::read_dir("/usr/lib/debian-installer/images").expect("debian-installer-12-netboot-amd64 is installed");
    let image =
        images.map(|entry| entry.unwrap().path().join("amd64/text/debian-installer")).find(|path| path.exists());
    let image = image.expect("there is an installer in text mode");
    let root = directory.join("root");
    let loader = root.join("isolinux");
    fs::create_dir_all(&loader).unwrap();
    let done = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    done(Command::new("cp").arg("-rL").arg(&image).arg(&loader));
    let screens = loader.join("debian-installer/amd64/boot-screens");
    let copies = [("ldlinux.c32", "ldlinux.c32"), ("syslinux.cfg", "isolinux.cfg")];
    copies.iter().for_each(|(from, to)| _ = fs::copy(screens.join(from), loader.join(to)).unwrap());
    fs::copy("/usr/lib/ISOLINUX/isolinux.bin", loader.join("isolinux.bin")).expect("package isolinux is installed");
    let disc = directory.join("installer.iso");
    let boot = ["-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat", "-no-emul-boot", "-boot-load-size", "4"];
    let mut xorriso = Command::new("xorriso");
    done(xorriso.args(["-as", "mkisofs", "-quiet", "-boot-info-table"]).args(boot).arg("-o").arg(&disc).arg(&root));
    disc
}

#[test]
fn the_debian_installer_asks_its_questions_on_the_screen() {
    let directory = tempfile::tempdir().unwrap();
    let disc = installer(directory.path());
    let _turn = one_machine_at_a_time();
    let machine = Machine::start(&disc, &["--firmware", "seabios", "--memory", "1G"]);
    // The boot menu is a picture of 640 by 480 in a VESA mode; behind it is the boot loader's prompt.
    machine.screen.wait_for("the boot menu", |picture| picture.size() == (640, 480) && picture.at(320, 300) != [0; 3]);
    machine.press(&["Escape"], &["boot:"]);
    machine.screen.view(&["type=install fb=false"]);
    machine.press(&[], &["boot: install fb=false"]);
    machine.press(&["Return"], &["Select a language", "English", "<Go Back>"]);
    machine.press(&["Return"], &["Select your location", "Country, territory or area:", "United States"]);
    machine.press(&["Return"], &["Configure the keyboard", "Keymap to use:", "American English"]);
    // A second console, to switch the machine off.
    machine.press(&["Alt+F2"], &["Please press Enter to activate this console."]);
    machine.press(&["Return"], &["BusyBox", "~ #"]);
    // By one viewer: the keys of two overtake each other while the keyboard's buffer is full.
    machine.screen.view(&["type=poweroff", "key=Return"]);
    machine.ends();
}
