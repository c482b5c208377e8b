//! Boots of the default guest, with programs that run in it.

mod support;

use std::process::Stdio;
use std::time::Instant;

use support::{Process, Script, Step, default_guest, one_machine_at_a_time, ringer};

/// What a healthy kernel never logs, whatever the level of the message.
const ALARMS: [&str; 14] = [
    "WARNING:",
    "BUG:",
    "Oops",
    "Call Trace",
    "ACPI Error",
    "ACPI BIOS Error",
    "ACPI Warning",
    "unchecked MSR",
    "Marking clocksource",
    "unstable",
    "lockup",
    "detected stalls",
    "Firmware Bug",
    "spurious",
];

/// The kernel's messages of level "warning" and worse that are not about the machine.
const HARMLESS: [&str; 0] = [];

fn run_programs(cpus: usize) {
    let busybox_i386 = ringer::guest::busybox_i386(&support::cache()).expect("busybox for i386 can be fetched");
    let steps = Script::new()
        .program("i386/busybox", &busybox_i386)
        .step("uname", "uname -a")
        .step("cpuinfo", "cat /proc/cpuinfo")
        .step("interrupts", "cat /proc/interrupts")
        .step("clocksource", "cat /sys/devices/system/clocksource/clocksource0/current_clocksource")
        .step("exit", "sh -c 'exit 42'")
        .step("killed", "sh -c 'kill -9 $$'")
        .step("segv", "sh -c 'kill -SEGV $$'")
        .step("pipe", "seq 1 20000 | awk '{ sum += $1 } END { print sum }'")
        .step("float", "awk 'BEGIN { while (++k <= 10000) sum += 1 / k; printf \"%.12f\\n\", sum }'")
        .step("hash", "head -c 1000000 /dev/zero | sha256sum")
        .step("zip", "cp /bin/busybox /tmp/a; gzip -c /tmp/a | gunzip -c | cmp - /tmp/a && echo same")
        .step("fork", "i=0; while [ $i -lt 200 ]; do /bin/true || exit 1; i=$((i + 1)); done; echo $i")
        .step("parallel", "for i in 1 2 3 4; do (seq 1 30000 | md5sum) & done; wait")
        .step("time", "a=$(date +%s); sleep 2; b=$(date +%s); echo $((b - a))")
        .step("i386_uname", "/i386/busybox head -c 5 /i386/busybox | od -An -tx1; /i386/busybox uname -m")
        .step("i386_pipe", "/i386/busybox seq 1 20000 | /i386/busybox awk '{ sum += $1 } END { print sum }'")
        .step("i386_float", "/i386/busybox awk 'BEGIN { while (++k <= 10000) sum += 1 / k; printf \"%.12f\\n\", sum }'")
        .step("i386_hash", "head -c 1000000 /dev/zero | /i386/busybox sha256sum")
        .step("i386_fork", "/i386/busybox sh -c '(exit 7); echo $?; /i386/busybox false; echo $?'")
        .step("dmesg", "dmesg")
        .step("warnings", "dmesg -r | grep '^<[0-4]>'")
        .run(&["--cpus", &cpus.to_string()]);

    let step = |name: &str| steps.get(name).unwrap_or_else(|| panic!("{name} did not run"));
    let prints = |name: &str, output: &str| {
        assert_eq!(step(name), &Step { output: format!("{output}\n"), status: 0 }, "{name}");
    };
    let uname = &step("uname").output;
    assert!(uname.starts_with("Linux ringer ") && uname.contains("x86_64"), "{uname}");
    let count = |name: &str, text: &str| step(name).output.lines().filter(|line| line.starts_with(text)).count();
    assert_eq!(count("cpuinfo", "processor"), cpus, "{}", step("cpuinfo").output);
    for cpu in 0..cpus {
        assert!(step("interrupts").output.contains(&format!("CPU{cpu}")));
    }
    assert!(!step("interrupts").output.contains(&format!("CPU{cpus}")));
    let serial = step("interrupts").output.lines().find(|line| line.contains("ttyS0")).expect("ttyS0 has an interrupt");
    let taken: u64 = serial.split_whitespace().skip(1).take(cpus).map(|n| n.parse::<u64>().unwrap_or(0)).sum();
    assert!(taken > 0, "{serial}");
    // Neither of the slow ones (hpet, acpi_pm) that the kernel falls back to when it distrusts the fast ones.
    assert!(matches!(step("clocksource").output.trim(), "tsc" | "kvm-clock"), "{:?}", step("clocksource"));

    let status = |name: &str| step(name).status;
    assert_eq!((status("exit"), status("killed"), status("segv")), (42, 137, 139));
    prints("pipe", "200010000");
    prints("float", "9.787606036044");
    prints("hash", "d29751f2649b32ff572b5e0a9f541ea660a50f94ff0beedfb0b692b924cc8025  -");
    prints("zip", "same");
    prints("fork", "200");
    let sums: Vec<_> = step("parallel").output.lines().collect();
    assert!(sums.len() == 4 && sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
    assert!(matches!(step("time").output.trim(), "2" | "3"), "{:?}", step("time"));

    prints("i386_uname", " 7f 45 4c 46 01\nx86_64");
    prints("i386_pipe", "200010000");
    prints("i386_float", "9.787606036044");
    prints("i386_hash", "d29751f2649b32ff572b5e0a9f541ea660a50f94ff0beedfb0b692b924cc8025  -");
    prints("i386_fork", "7\n1");

    let dmesg = &step("dmesg").output;
    for alarm in ALARMS {
        let lines: Vec<_> = dmesg.lines().filter(|line| line.contains(alarm)).collect();
        assert!(lines.is_empty(), "{lines:#?}");
    }
    let warnings = step("warnings").output.lines();
    let warnings: Vec<_> = warnings.filter(|line| !HARMLESS.iter().any(|text| line.contains(text))).collect();
    assert!(warnings.is_empty(), "{warnings:#?}");
}

#[test]
fn programs_run_on_one_processor() {
    run_programs(1);
}

#[test]
fn programs_run_on_two_processors() {
    run_programs(2);
}

#[test]
fn every_cpu_model_boots() {
    for (model, has, lacks) in [
        ("x86-64-v2", "sse4_2", " avx "),
        ("x86-64-v3", " avx2 ", " avx512f "),
        ("x86-64-v4", " avx512f ", " amx_tile "),
    ] {
        if model.ends_with("v4") && !std::arch::is_x86_feature_detected!("avx512f") {
            continue;
        }
        let steps = Script::new().step("flags", "grep -m1 flags /proc/cpuinfo").run(&["--cpu", model]);
        let flags = &steps["flags"].output;
        assert!(flags.contains(has) && !flags.contains(lacks), "{model}: {flags}");
    }
}

#[test]
fn the_default_guest_gives_a_shell_with_job_control() {
    default_guest();
    let _turn = one_machine_at_a_time();
    let mut machine = Process::start(ringer().arg("run").stdin(Stdio::piped()));
    machine.wait_for("ringer:/root# ");
    machine.type_text("echo $((6 * 7)) answers\r");
    machine.wait_for("42 answers");
    // Ctrl-c reaches the foreground process only.
    machine.type_text("sleep 1000\r");
    std::thread::sleep(std::time::Duration::from_secs(1));
    machine.type_text("\x03");
    machine.type_text("echo code $?\r");
    machine.wait_for("code 130");
    machine.type_text("exit\r");
    let ended = machine.end();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert_eq!(ended.stderr.lines().filter(|line| line.starts_with("ringer: engine ")).count(), 1, "{}", ended.stderr);
}

#[test]
fn a_reset_starts_the_guest_again_unless_told_not_to() {
    let reset = || Script::new().step("up", "echo the guest is up; reboot -f");
    let _turn = one_machine_at_a_time();
    let (mut command, _files) = reset().command("");
    let ended = Process::start(command.arg("--no-reboot").stdin(Stdio::null())).end();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert_eq!(ended.stdout.matches("the guest is up").count(), 1, "{ended:?}");

    let (mut command, _files) = reset().command("");
    let mut machine = Process::start(command.stdin(Stdio::null()));
    machine.wait_for("the guest is up");
    machine.forget_output();
    machine.wait_for("the guest is up");
}

/// The guest's clock beside the host's, with a minute in between. A reading reaches the host some time after it was taken:
/// of many readings the one that was on its way the shortest counts.
#[test]
fn a_minute_of_the_guest_is_a_minute_of_the_host_to_a_thousandth() {
    const READINGS: usize = 20;
    let text = format!(
        "readings() {{ while [ $i -lt $1 ]; do read now _ </proc/uptime; echo reading $i $now; i=$((i + 1)); sleep 0.1; done }}
        i=0; readings {READINGS}; sleep 58; readings {}",
        2 * READINGS
    );
    let (mut command, _files) = Script::new().step("clock", &text).command("");
    let mut machine = Process::start(command.arg("--no-reboot").stdin(Stdio::null()));
    let start = Instant::now();
    let mut arrivals = Vec::new();
    for reading in 0..2 * READINGS {
        machine.wait_for(&format!("reading {reading} "));
        arrivals.push(start.elapsed().as_secs_f64());
    }
    let ended = machine.end();
    let readings = ended.stdout.lines().filter_map(|line| line.strip_prefix("reading "));
    let guest: Vec<f64> = readings.map(|line| line.split_whitespace().last().unwrap().parse().unwrap()).collect();
    assert_eq!(guest.len(), 2 * READINGS, "{}", ended.stdout);
    let delays: Vec<_> = arrivals.iter().zip(&guest).map(|(host, guest)| host - guest).collect();
    let least = |delays: &[f64]| delays.iter().copied().fold(f64::INFINITY, f64::min);
    let drift = least(&delays[READINGS..]) - least(&delays[..READINGS]);
    let minute = guest[READINGS] - guest[0];
    assert!(drift.abs() <= minute / 1000.0, "{drift} s in {minute} s");
}

#[test]
fn a_panic_of_the_kernel_is_a_reset() {
    let (mut command, _files) = Script::new().step("panic", "echo c > /proc/sysrq-trigger").command("");
    let _turn = one_machine_at_a_time();
    let ended = Process::start(command.arg("--no-reboot").stdin(Stdio::null())).end();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert!(ended.stdout.contains("sysrq triggered crash"), "{ended:?}");
}

#[test]
fn serial_output_goes_to_a_file() {
    let (mut command, files) = Script::new().step("hello", "echo hello file").command("");
    let log = files.path().join("log");
    let _turn = one_machine_at_a_time();
    let ended =
        Process::start(command.arg("--serial").arg(format!("file:{}", log.display())).stdin(Stdio::null())).end();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert_eq!(ended.stdout, "");
    assert!(std::fs::read_to_string(log).unwrap().contains("hello file"));
}
