//! The paravirtual devices besides disks and network, driven by a real kernel.

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Stdio;
use std::time::{Duration, Instant};

use support::{LONG, Process, Script, one_machine_at_a_time, tell};

#[test]
fn a_shared_directory_is_read_and_written() {
    let directory = tempfile::tempdir().unwrap();
    let shared = directory.path().join("a,b");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("file"), "from the host\n").unwrap();
    fs::write(directory.path().join("secret"), "secret").unwrap();
    symlink("../secret", shared.join("link")).unwrap();
    let path = shared.to_str().unwrap().replace(',', ",,");
    let steps = Script::new()
        .step("mount", "mkdir /mnt /ro && mount -t virtiofs docs /mnt && mount -t virtiofs share /ro")
        .step("read", "cat /mnt/file /ro/file")
        .step("link", "cat /mnt/link")
        .step("write", "cp /bin/busybox /mnt/copy && cmp /mnt/copy /bin/busybox && chmod 4750 /mnt/copy")
        .step("append", "echo one >/mnt/log; echo two >>/mnt/log; cat /mnt/log; truncate -s 4 /mnt/log; cat /mnt/log")
        .step("tree", "mkdir -p /mnt/d/e && mv /mnt/log /mnt/d/e/log && ln /mnt/d/e/log /mnt/d/hard && rmdir /mnt/d")
        .step("many", "for n in $(seq 300); do echo $n >/mnt/d/$n; done; ls /mnt/d | wc -l; cat /mnt/d/277")
        .step("device", "mknod /mnt/null c 1 3")
        .step("read-only", "echo x >/ro/new")
        .run(&["--share", &format!("{path},tag=docs"), "--share", &format!("{path},ro"), "--net", "none"]);
    assert_eq!(
        (steps["mount"].status, steps["read"].output.as_str()),
        (0, "from the host\nfrom the host\n"),
        "{steps:?}"
    );
    // The guest looks for it in its own root.
    assert!(steps["link"].status != 0 && !steps["link"].output.contains("secret"), "{steps:?}");
    assert_eq!((steps["write"].status, steps["append"].output.as_str()), (0, "one\ntwo\none\n"), "{steps:?}");
    assert_eq!(fs::metadata(shared.join("copy")).unwrap().permissions().mode() & 0o7777, 0o750);
    assert!(steps["tree"].status != 0 && steps["tree"].output.contains("not empty"), "{steps:?}");
    assert_eq!(steps["many"].output, "302\n277\n");
    assert_eq!(fs::read(shared.join("d/hard")).unwrap(), b"one\n");
    assert!(steps["device"].status != 0 && !shared.join("null").exists());
    assert!(steps["read-only"].status != 0 && !shared.join("new").exists());
}

#[test]
fn random_numbers_and_a_console_come_from_the_host() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("console");
    let steps = Script::new()
        .step("source", "cat /sys/class/misc/hw_random/rng_current; head -c 1000 /dev/hwrng | wc -c")
        .step("console", "echo hello by hvc0 >/dev/hvc0")
        .run(&["--console", &format!("file:{}", log.display()), "--net", "none"]);
    assert_eq!(steps["source"].output, "virtio_rng.0\n1000\n");
    assert!(fs::read_to_string(log).unwrap().contains("hello by hvc0"), "{steps:?}");
}

/// Waits in the guest until so much of its memory is free, in KiB.
fn until_free(condition: &str) -> String {
    format!("until [ $(awk '/MemFree/ {{ print $2 }}' /proc/meminfo) {condition} ]; do sleep 0.1; done")
}

#[test]
fn a_balloon_takes_what_it_is_asked_to() {
    let options = ["--memory", "512M", "--balloon", "256M", "--net", "none"];
    let steps = Script::new().step("free", &until_free("-lt 262144")).run(&options);
    assert_eq!(steps["free"].status, 0, "{steps:?}");
}

#[test]
fn a_balloon_grows_and_shrinks_while_the_machine_runs() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("control");
    let (mut command, _initrd) = Script::new()
        .step("small", &format!("echo @@go 1; {}; echo @@go 2", until_free("-lt 262144")))
        .step("large", &format!("{}; echo @@go 3; sleep 1000", until_free("-gt 262144")))
        .command("");
    command.args(["--memory", "512M", "--net", "none", "--control"]);
    command.arg(format!("unix:{}", socket.display())).stdin(Stdio::null());
    let _turn = one_machine_at_a_time();
    let mut machine = Process::start(&mut command);
    machine.wait_for("@@go 1");
    assert_eq!(tell(&socket, "balloon"), "ok 0G\n");
    assert!(tell(&socket, "balloon much").contains("is not a size"));
    assert_eq!(tell(&socket, "balloon 256M"), "ok\n");
    machine.wait_for("@@go 2");
    assert_eq!(tell(&socket, "balloon 0"), "ok\n");
    machine.wait_for("@@go 3");
    assert_eq!(tell(&socket, "quit"), "ok\n");
    assert!(machine.end().status.success());
}

/// How much of a machine's RAM the host has given it, in MiB.
fn resident(machine: &Process) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", machine.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).unwrap();
    line.split_whitespace().next().and_then(|text| text.parse::<u64>().ok()).unwrap() >> 10
}

#[test]
fn memory_that_the_guest_does_not_use_goes_back_to_the_host() {
    let (mut command, _initrd) = Script::new()
        .step("use", "dd if=/dev/zero of=/x bs=1M count=200; echo @@full; sleep 1; rm /x; sleep 600")
        .command("");
    command.args(["--memory", "512M", "--net", "none"]).stdin(Stdio::null());
    let _turn = one_machine_at_a_time();
    let mut machine = Process::start(&mut command);
    machine.wait_for("@@full");
    assert!(resident(&machine) > 200);
    // Linux reports free pages a few seconds after they have become free.
    let deadline = Instant::now() + LONG;
    while resident(&machine) > 140 {
        assert!(Instant::now() < deadline, "{} MiB are still resident", resident(&machine));
        std::thread::sleep(Duration::from_millis(100));
    }
}
