//! The memory that the monitor takes for itself, beyond the guest's.

mod support;

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use support::{Process, default_guest, one_machine_at_a_time, ringer};

/// The most that the monitor may take with a shell running, in KiB.
const MOST: usize = 48 << 10;

/// What a process has in memory, in KiB: each page once, however often it is mapped, and shared ones in parts; without the
/// guest's own memory.
fn own_memory(pid: u32) -> usize {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the process runs");
    let (mut all, mut guests) = (0, false);
    for line in maps.lines() {
        match line.split_once(':') {
            Some(("Pss", size)) if !guests => {
                all += size.trim().trim_end_matches(" kB").parse::<usize>().expect("a number of KiB");
            }
            // A mapping's first line begins with its addresses.
            _ if line.split_once(' ').is_some_and(|(range, _)| range.contains('-')) => {
                guests = line.contains("/memfd:guest-ram");
            }
            _ => {}
        }
    }
    all
}

#[test]
fn with_a_shell_running_the_monitor_takes_at_most_48_mib_beyond_the_guests_memory() {
    default_guest();
    let _turn = one_machine_at_a_time();
    let mut machine = Process::start(ringer().args(["run", "--accel", "translate"]).stdin(Stdio::piped()));
    machine.wait_for("ringer:/root# ");
    std::thread::sleep(Duration::from_secs(1));
    let own = own_memory(machine.child.id());
    println!("the monitor's own memory: {:.1} MiB", own as f64 / 1024.0);
    // It has been read: a program alone takes more than this.
    assert!((1 << 10..=MOST).contains(&own), "{own} KiB");
}
