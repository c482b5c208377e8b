//! Disks in whole machines: what the guest writes is in the image, also when Ringer is killed.

mod support;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use block::{Disk, Format, Options, image};
use rustix::process::{Pid, Signal, kill_process};
use support::{MIB, Process, Script, assert_written, one_machine_at_a_time, read, ringer};

fn assert_consistent(path: &Path) {
    let report = image::check(path, false).unwrap();
    // Clusters may be counted before they are used: those leak when Ringer is killed in between.
    assert_eq!(report.errors, 0, "{:?}", report.details);
}

#[test]
fn every_kind_of_disk_is_read_and_written() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    for (name, format) in [("a", Format::Qcow2), ("b", Format::Raw), ("c", Format::Qcow2), ("d", Format::Raw)] {
        image::create(Path::new(&at(name)), format, Some(16 * MIB), None).unwrap();
    }
    fs::write(at("d"), vec![b'd'; MIB as usize]).unwrap();
    let steps = Script::new()
        .step("names", "cat /sys/block/vda/serial /sys/block/vd?/size /sys/block/vd?/ro")
        .copies_to("/dev/vda /dev/vdb /dev/vdc")
        .step("read-only", "cat /dev/vdd | tr -d d | wc -c; echo x >/dev/vdd")
        .run(&[
            "--disk",
            &format!("{},serial=disk-a", at("a")),
            "--disk",
            &format!("{},cache=none", at("b")),
            "--disk",
            &format!("{},snapshot", at("c")),
            "--disk",
            &format!("{},ro,cache=writethrough", at("d")),
            "--net",
            "none",
        ]);
    assert_eq!(steps["names"].output, "disk-a32768\n32768\n32768\n2048\n0\n0\n0\n1\n");
    assert_written(&steps, &[&at("a"), &at("b")]);
    assert!(steps["read-only"].output.starts_with("0\n") && steps["read-only"].status != 0, "{steps:?}");
    assert!(read(Path::new(&at("c")), 2 * MIB, 4096) == [0; 4096]);
    assert_consistent(Path::new(&at("a")));
}

/// The guest writes numbered blocks, each flushed before its number is told.
const WRITER: &str = "n=0; while [ $n -lt 4000 ]; do printf 'block %08d' $n >/tmp/b; \
    dd if=/tmp/b of=/dev/vda bs=4096 count=1 seek=$n conv=sync,fsync 2>/dev/null || break; echo \"@@done $n\"; n=$((n+1)); done";

#[test]
fn what_was_flushed_survives_the_death_of_ringer() {
    let directory = tempfile::tempdir().unwrap();
    for (round, format) in [Format::Qcow2, Format::Raw, Format::Qcow2].into_iter().enumerate() {
        let path = directory.path().join(round.to_string());
        image::create(&path, format, Some(16 * MIB), None).unwrap();
        let (mut command, _initrd) = Script::new().step("write", WRITER).command("");
        command.arg("--disk").arg(&path).args(["--net", "none"]).stdin(Stdio::null());
        let turn = one_machine_at_a_time();
        let mut machine = Process::start(&mut command);
        machine.wait_for(&format!("@@done {}\r", 10 + 7 * round));
        std::thread::sleep(Duration::from_millis(37 * round as u64));
        machine.child.kill().unwrap();
        machine.child.wait().unwrap();
        let log = machine.end().stdout;
        drop(turn);
        // A line that is not complete says nothing.
        let done: Vec<u64> =
            log.split("@@done ").skip(1).filter_map(|rest| rest.split_once('\r')?.0.parse().ok()).collect();
        let last = *done.last().unwrap();
        for block in 0..=last {
            let data = read(&path, block * 4096, 4096);
            assert!(data.starts_with(format!("block {block:08}").as_bytes()), "{block} of {last} is lost");
        }
        if format == Format::Qcow2 {
            assert_consistent(&path);
        }
    }
}

#[test]
fn a_signal_leaves_a_whole_image() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    image::create(&path, Format::Qcow2, Some(64 * MIB), None).unwrap();
    // Nothing of this is flushed: oflag=direct gets it past the guest's cache.
    let write = "dd if=/bin/busybox of=/dev/vda bs=64k count=16 oflag=direct && echo @@written; sleep 1000";
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let (mut command, _initrd) = Script::new().step("write", write).command("");
        command.arg("--disk").arg(&path).args(["--net", "none"]).stdin(Stdio::null());
        let turn = one_machine_at_a_time();
        let mut machine = Process::start(&mut command);
        machine.wait_for("@@written");
        kill_process(Pid::from_child(&machine.child), signal).unwrap();
        let ended = machine.end();
        drop(turn);
        assert_eq!(ended.status.signal(), Some(signal.as_raw()), "{ended:?}");
        let report = image::check(&path, false).unwrap();
        assert_eq!((report.errors, report.leaks), (0, 0), "{:?}", report.details);
        assert!(read(&path, 0, 4096).starts_with(b"\x7fELF"));
    }
}

/// A disk with an ext4 file system that holds the default guest's kernel and a RAM disk that runs `script`.
fn bootable(path: &Path, script: Script) {
    let (_, files) = script.command("");
    let boot = files.path().join("tree/boot");
    fs::create_dir_all(&boot).unwrap();
    fs::copy(&support::default_guest().kernel, boot.join("vmlinuz-1")).unwrap();
    fs::rename(files.path().join("initrd.cpio"), boot.join("initrd.img-1")).unwrap();
    image::create(path, Format::Raw, Some(64 * MIB), None).unwrap();
    let program = if Path::new("/usr/sbin/mke2fs").exists() { "/usr/sbin/mke2fs" } else { "mke2fs" };
    let tree = files.path().join("tree");
    let made = Command::new(program).args(["-q", "-F", "-t", "ext4", "-d"]).arg(tree).arg(path).status();
    assert!(made.expect("mke2fs of e2fsprogs is installed").success());
}

#[test]
fn a_guest_that_starts_again_boots_what_is_on_its_disk_then() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let replace = "echo the first system; cat /dev/vdb >/dev/vda; sync; reboot -f";
    bootable(&at("first"), Script::new().step("replace", replace));
    bootable(&at("second"), Script::new().step("tell", "echo the second system; poweroff -f"));
    let mut command = ringer();
    command.arg("run").arg("--disk").arg(at("first")).arg("--disk").arg(at("second")).args(["--append", "quiet"]);
    let _turn = one_machine_at_a_time();
    let ended = Process::start(command.stdin(Stdio::null())).end();
    assert!(ended.status.success(), "{ended:?}");
    let place = |text: &str| ended.stdout.find(text).unwrap_or_else(|| panic!("no {text:?} in {ended:?}"));
    assert!(place("the first system") < place("the second system"));
    assert_eq!(ended.stdout.matches("the first system").count(), 1);
}

/// The name of a test that runs itself again where the host's disk is small.
const INSIDE: &str = "RINGER_TEST_ON_A_SMALL_DISK";

#[test]
fn on_a_full_disk_of_the_host_writes_fail_and_images_stay_whole() {
    let Some(place) = std::env::var_os(INSIDE) else {
        let directory = tempfile::tempdir().unwrap();
        support::default_guest();
        // A file system of 12 MiB that only this sees.
        let status = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c"])
            .arg("mount -t tmpfs -o size=12m tmpfs \"$0\" && exec \"$@\"")
            .arg(directory.path())
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "on_a_full_disk_of_the_host_writes_fail_and_images_stay_whole", "--nocapture"])
            .env(INSIDE, directory.path())
            .status();
        return assert!(status.expect("unshare is there").success(), "see above");
    };
    for format in [Format::Qcow2, Format::Raw] {
        let path = Path::new(&place).join("disk");
        image::create(&path, format, Some(64 * MIB), None).unwrap();
        let disk = format!("{},format={}", path.display(), if format == Format::Raw { "raw" } else { "qcow2" });
        let (mut command, _initrd) = Script::new()
            .step("some", "dd if=/bin/busybox of=/dev/vda bs=64k count=8 oflag=direct && sync /dev/vda")
            .step("many", "for n in $(seq 40); do dd if=/dev/urandom of=/dev/vda bs=1M count=1 seek=$n oflag=direct || break; done 2>&1 | grep error")
            .step("flush", "sync /dev/vda")
            .step("read", "dd if=/dev/vda bs=64k count=8 iflag=direct | cmp -n 524288 - /bin/busybox")
            .command("");
        // Their own initramfs lies elsewhere.
        command.args(["--disk", &disk, "--net", "none", "--no-reboot"]).stdin(Stdio::null());
        let ended = Process::start(&mut command).end();
        assert!(ended.status.success(), "{ended:?}");
        let steps = support::steps(&ended.stdout);
        assert!(steps["some"].status == 0 && steps["read"].status == 0, "{steps:?}");
        assert!(steps["many"].output.contains("I/O error"), "{steps:?}");
        assert!(ended.stderr.contains("No space left on device"), "{}", ended.stderr);
        if format == Format::Qcow2 {
            assert_consistent(&path);
        }
        assert!(read(&path, 0, 4096).starts_with(b"\x7fELF"));
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_disk_that_cannot_be_had_is_refused_before_anything_starts() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    fs::write(at("bad.qcow2"), b"QFI\xfb and nothing else").unwrap();
    fs::write(at("empty"), b"").unwrap();
    fs::write(at("used"), vec![0; 4096]).unwrap();
    fs::write(at("once"), vec![0; 4096]).unwrap();
    let _writer = Disk::open(&Options::new(at("used"))).unwrap();
    for (disk, status, words) in [
        (at("missing"), 1, "No such file"),
        (at("bad.qcow2"), 1, "not a usable qcow2 image"),
        (at("empty"), 1, "empty"),
        (at("used"), 1, "in use by another process"),
        (format!("{}@{}", at("once"), at("once")), 1, "given twice"),
        (format!("{}@{},ro", at("once"), at("once")), 1, "given twice"),
        (at(""), 1, "a directory"),
        ("/dev/null".into(), 1, "a character device"),
        ("x,rw".into(), 2, "\"rw\" is not known"),
        ("x,format=vmdk".into(), 2, "format=raw|qcow2"),
        ("".into(), 2, "the path of a disk image is missing"),
    ] {
        let kernel = support::default_guest().kernel.to_str().unwrap().to_owned();
        let mut command = ringer();
        command.args(["run", "--kernel", &kernel]).stdin(Stdio::null());
        command.args(disk.split('@').flat_map(|disk| ["--disk", disk]));
        let ended = Process::start(&mut command).end();
        assert_eq!(ended.status.code(), Some(status), "{disk}: {ended:?}");
        assert!(ended.stderr.lines().count() == 1 && ended.stderr.contains(words), "{disk}: {}", ended.stderr);
    }
}
