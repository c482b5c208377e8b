//! A Debian server: its disk made by `ringer image debian`, booted to its login prompt, and used.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use block::{Format, Options, image};
use support::{LONG, Process, debian_disk, one_machine_at_a_time, ringer};

/// A machine with an overlay of the disk, with which the test may do what it likes.
fn boot(directory: &Path, options: &[&str]) -> Process {
    let overlay = directory.join("overlay.qcow2");
    image::create(&overlay, Format::Qcow2, None, Some((debian_disk().into(), Some(Format::Qcow2)))).unwrap();
    let mut command = ringer();
    command.args(["run", "--memory", "1G", "--no-reboot", "--disk"]).arg(format!("{},backing=any", overlay.display()));
    Process::start(command.args(options).stdin(Stdio::piped()))
}

fn log_in(machine: &mut Process) {
    machine.wait_for(" login: ");
    machine.forget_output();
    machine.type_text("root\n");
    machine.wait_for("~# ");
}

/// Runs a command in the guest, and waits for it to end with this status.
fn run(machine: &mut Process, command: &str, status: &str) {
    machine.forget_output();
    // The terminal shows what is typed, so that must not look like the answer.
    machine.type_text(&format!("{command}; echo @@'ended' $?@@\n"));
    machine.wait_for(&format!("@@ended {status}@@"));
}

#[test]
fn debian_boots_without_failed_units_installs_a_package_and_leaves_a_clean_disk() {
    let directory = tempfile::tempdir().unwrap();
    let _turn = one_machine_at_a_time();
    let mut machine = boot(directory.path(), &[]);
    log_in(&mut machine);
    run(&mut machine, "systemctl is-system-running --wait", "0");
    run(&mut machine, "systemctl is-active systemd-networkd", "0");
    run(&mut machine, "apt-get update -qq", "0");
    run(&mut machine, "apt-get install -y -qq hello </dev/null >/dev/null 2>&1; hello", "0");
    machine.type_text("poweroff\n");
    let ended = machine.end();
    assert!(ended.status.success(), "{ended:?}");
    let overlay = directory.path().join("overlay.qcow2");
    let report = image::check(&overlay, false).unwrap();
    assert_eq!((report.errors, report.leaks), (0, 0), "{:?}", report.details);
    let raw = directory.path().join("raw");
    let from = Options { any_backing: true, ..Options::new(&overlay) };
    image::convert(&from, &raw, Format::Raw, &mut |_, _| ()).unwrap();
    let program = if Path::new("/usr/sbin/e2fsck").exists() { "/usr/sbin/e2fsck" } else { "e2fsck" };
    let checked =
        Command::new(program).arg("-fn").arg(format!("{}?offset={}", raw.display(), 34 << 20)).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
}

const USER_DATA: &str = "#cloud-config
hostname: seeded
write_files:
  - path: /root/written
    content: by cloud-init
runcmd:
  - touch /root/ran
";

/// Sends the host what it is told by the guest's port 5555, then asks port 1234 of the host for a word.
const PROGRAM: &str = "
import socket
guest = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
guest.bind((socket.VMADDR_CID_ANY, 5555))
guest.listen()
connection, _ = guest.accept()
data = b''
while piece := connection.recv(65536): data += piece
connection.sendall(data[::-1])
connection.close()
host = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
host.connect((socket.VMADDR_CID_HOST, 1234))
assert host.makefile().read() == 'word'
";

#[test]
fn cloud_init_finds_its_seed_and_sockets_lead_both_ways() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    fs::write(at("user-data"), USER_DATA).unwrap();
    fs::create_dir(at("shared")).unwrap();
    fs::write(at("shared/program.py"), PROGRAM).unwrap();
    let _turn = one_machine_at_a_time();
    let (seed, share, socket) = (at("user-data"), at("shared"), at("socket"));
    let mut machine =
        boot(directory.path(), &["--cloud-init", &seed, "--share", &share, "--vsock", &socket, "--net", "none"]);
    log_in(&mut machine);
    run(&mut machine, "cloud-init status --wait && test -e /root/ran && grep cloud-init /root/written", "0");
    run(&mut machine, "test $(hostname) = seeded && mount -t virtiofs share /mnt", "0");

    let host = UnixListener::bind(at("socket_1234")).unwrap();
    machine.forget_output();
    machine.type_text("python3 /mnt/program.py; echo @@'ended' $?@@\n");
    let data: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let mut stream = connect(Path::new(&socket), 5555);
    let mut writer = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            writer.write_all(&data).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        answer.reverse();
        assert!(answer == data);
    });
    host.accept().unwrap().0.write_all(b"word").unwrap();
    machine.wait_for("@@ended 0@@");
    machine.type_text("poweroff\n");
    assert!(machine.end().status.success());
    assert!(!Path::new(&socket).exists());
}

/// Connects to a port of the guest as soon as somebody listens there.
fn connect(path: &Path, port: u32) -> UnixStream {
    let deadline = Instant::now() + LONG;
    loop {
        assert!(Instant::now() < deadline, "nobody listens in the guest");
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        let mut line = Vec::new();
        let mut byte = [0];
        while stream.read(&mut byte).unwrap() == 1 && byte != [b'\n'] {
            line.push(byte[0]);
        }
        if line.starts_with(b"OK ") {
            return stream;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}
