//! Drives of a PC in whole machines: what Debian's own drivers make of them.

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use block::{Format, image};
use support::{MIB, Process, Script, assert_written, one_machine_at_a_time, pc_guest, tell};

/// Writes to each disk, reads it again, and asks what the drive says of itself.
fn disks_on(bus: &str) {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    for (name, format) in [("a", Format::Qcow2), ("b", Format::Raw)] {
        image::create(Path::new(&at(name)), format, Some(16 * MIB), None).unwrap();
    }
    let steps = Script::on(pc_guest())
        .step("names", "cat /sys/block/sd?/size /sys/block/sd?/device/model")
        .copies_to("/dev/sda /dev/sdb")
        .step("errors", "dmesg | grep -E 'exception|failed command|timeout|lost interrupt'")
        .run(&[
            "--disk",
            &format!("{},serial=disk-a,bus={bus}", at("a")),
            "--disk",
            &format!("{},bus={bus}", at("b")),
            "--net",
            "none",
        ]);
    assert!(steps["names"].output.starts_with("32768\n32768\nRinger disk"), "{steps:?}");
    assert_written(&steps, &[&at("a"), &at("b")]);
    assert_eq!(steps["errors"].output, "", "{steps:?}");
}

#[test]
fn disks_on_serial_ata_are_read_and_written() {
    disks_on("ahci");
}

#[test]
fn disks_on_parallel_ata_are_read_and_written() {
    disks_on("ide");
}

/// What the guest's md5sum says of a device with what is in this file.
fn md5(path: &Path) -> String {
    let sum = Command::new("md5sum").stdin(fs::File::open(path).unwrap()).output().unwrap();
    String::from_utf8(sum.stdout).unwrap()
}

/// Makes a disc image without a file system; returns its sum.
fn disc(path: &Path) -> String {
    let data: Vec<u8> = (0..512 * 1024u32).flat_map(|n| n.to_le_bytes()).collect();
    fs::write(path, &data).unwrap();
    let sum = Command::new("md5sum").stdin(fs::File::open(path).unwrap()).output().unwrap();
    String::from_utf8(sum.stdout).unwrap()
}

#[test]
fn cd_roms_are_read_on_either_bus() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disc.iso");
    let sum = disc(&path);
    for bus in ["ahci", "ide"] {
        let steps = Script::on(pc_guest())
            .step("drive", "cat /sys/block/sr0/size /sys/block/sr0/device/model")
            .step("read", "md5sum </dev/sr0")
            .step("write", "echo x >/dev/sr0")
            .step("errors", "dmesg | grep -E 'exception|failed command|timeout|lost interrupt'")
            .run(&["--cdrom", &format!("{},bus={bus}", path.display()), "--net", "none"]);
        assert_eq!(steps["drive"].output, "4096\nCD-ROM          \n", "{bus}");
        assert_eq!(steps["read"].output, sum, "{bus}");
        assert_ne!(steps["write"].status, 0, "{bus}");
        assert_eq!(steps["errors"].output, "", "{bus}");
    }
}

#[test]
fn a_disc_can_be_changed_while_the_machine_runs() {
    let directory = tempfile::tempdir().unwrap();
    let (first, second, socket) =
        (directory.path().join("first"), directory.path().join("second"), directory.path().join("control"));
    fs::write(&first, [b'1'; 4096]).unwrap();
    fs::write(&second, [b'2'; 8192]).unwrap();
    let read = "dd if=/dev/sr0 bs=1 count=4 2>/dev/null";
    let script = Script::on(pc_guest())
        .step("first", &format!("{read}; echo; echo @@go 1"))
        .step("gone", &format!("while {read} | grep -q 1; do sleep 0.1; done; echo @@go 2"))
        .step("second", &format!("until {read} | grep -q 2; do sleep 0.1; done; {read}; echo; cat /sys/block/sr0/size"))
        .step("wait", "echo @@go 3; sleep 1000");
    let (mut command, _initrd) = script.command("");
    command.args(["--net", "none", "--cdrom", first.to_str().unwrap(), "--control"]);
    command.arg(format!("unix:{}", socket.display())).stdin(Stdio::null());
    let _turn = one_machine_at_a_time();
    let mut machine = Process::start(&mut command);
    machine.wait_for("@@go 1");
    assert_eq!(tell(&socket, "drives"), "ok cdrom=loaded\n");
    assert!(tell(&socket, "change cdrom /nowhere").starts_with("error /nowhere"));
    assert!(tell(&socket, "eject dvd").contains("there are cdrom"));
    // While the guest reads it, the drive is locked.
    let mut answers = (0..200).map(|_| {
        thread::sleep(Duration::from_millis(20));
        tell(&socket, "eject cdrom")
    });
    assert_eq!(answers.find(|answer| !answer.contains("locked")).as_deref(), Some("ok\n"));
    machine.wait_for("@@go 2");
    assert_eq!(tell(&socket, &format!("change cdrom {}", second.display())), "ok\n");
    machine.wait_for("@@go 3");
    assert_eq!(tell(&socket, "quit"), "ok\n");
    let ended = machine.end();
    assert!(ended.status.success() && ended.stdout.replace('\r', "").contains("2222\n16\n"), "{ended:?}");
    assert!(!socket.exists());
}

#[test]
fn floppy_disks_are_read_and_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("floppy.img");
    let data: Vec<u8> = (0..1_474_560u32 / 4).flat_map(|n| n.to_le_bytes()).collect();
    fs::write(&path, &data).unwrap();
    let sum = md5(&path);
    let steps = Script::on(pc_guest())
        .step("read", "md5sum </dev/fd0")
        .step("drive", "cat /sys/block/fd0/size")
        .step("write", "head -c 40960 /bin/busybox | dd of=/dev/fd0 bs=4096 seek=100 conv=fsync")
        .step("errors", "dmesg | grep -iE 'floppy.*(error|timeout)|I/O error'")
        .run(&["--floppy", path.to_str().unwrap(), "--net", "none"]);
    assert_eq!(steps["drive"].output, "2880\n", "{steps:?}");
    assert_eq!(steps["read"].output, sum, "{steps:?}");
    assert_eq!((steps["write"].status, steps["errors"].output.as_str()), (0, ""), "{steps:?}");
    let written = fs::read(&path).unwrap();
    assert!(written[409_600..].starts_with(b"\x7fELF"));
    assert!(written[..409_600] == data[..409_600] && written[450_560..] == data[450_560..]);
}
