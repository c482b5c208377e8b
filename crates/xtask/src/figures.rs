//! What the monitor costs: from exec to the guest's first instruction, and memory beyond the guest's.
//!
//! Meant to run in the nested machine, where QEMU's `microvm` machine is beside it on the same KVM: there only a ratio says
//! something. Both boot the same kernel, which is one that writes a byte to the first serial port and no more.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{Error, kernels};

/// How often a start is timed; the least counts, which other work has disturbed least.
const STARTS: usize = 7;
/// How often memory is measured; the most counts: it depends on where the kernel happens to put things.
const MACHINES: usize = 3;
/// What SPECIFICATION.md promises at most, in KiB. Times are only shown: they say as much of the host as of the monitor.
const MOST_MEMORY: u64 = 8 << 10;

/// A process that does not outlive what looks at it.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

/// Starts a program and reads its output until `wanted` is in it.
fn until(command: &mut Command, wanted: &str) -> Result<(Started, Duration), Error> {
    let begin = Instant::now();
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut child = Started(child.map_err(Error::io(format!("can't start {command:?}")))?);
    let mut output = child.0.stdout.take().ok_or_else(|| Error::Failed("no output".into()))?;
    let (mut seen, mut piece) = (Vec::new(), [0; 512]);
    loop {
        let count = output.read(&mut piece).map_err(Error::io("can't read what a monitor writes"))?;
        seen.extend(piece.iter().take(count));
        if String::from_utf8_lossy(&seen).contains(wanted) {
            // Kept open: what is written to nobody ends the monitor.
            child.0.stdout = Some(output);
            return Ok((child, begin.elapsed()));
        }
        if count == 0 {
            return Err(Error::Failed(format!("{command:?} has ended without {wanted:?}")));
        }
    }
}

/// The least time of each program, which take turns, so that what else the host does hits all of them.
fn least(programs: &[&dyn Fn() -> Command]) -> Result<Vec<Duration>, Error> {
    let mut least = vec![Duration::MAX; programs.len()];
    for _ in 0..STARTS {
        for (least, program) in least.iter_mut().zip(programs) {
            *least = until(&mut program(), "!")?.1.min(*least);
        }
    }
    Ok(least)
}

/// Resident memory of a process besides the guest's pages, in KiB: all of it, pages of its program and of libraries
/// included, though other processes may have the same ones; and the part that is in no file.
fn own_memory(process: u32) -> Result<(u64, u64), Error> {
    let path = format!("/proc/{process}/smaps");
    let text = fs::read_to_string(&path).map_err(Error::io(path))?;
    let mut guest = false;
    let (mut all, mut anonymous) = (0, 0);
    for line in text.lines() {
        let kib = |size: &str| size.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
        match line.split_once(':') {
            Some(("Rss", size)) if !guest => all += kib(size),
            Some(("Anonymous", size)) if !guest => anonymous += kib(size),
            _ if line.contains('-') && !line.contains("kB") => guest = line.contains("guest-ram"),
            _ => {}
        }
    }
    Ok((all, anonymous))
}

/// Prints the figures. `ringer` and, for the ratio, `qemu-system-x86_64` are programs in the path.
pub fn run() -> Result<(), Error> {
    let kernel = std::env::temp_dir().join("first-instruction.elf");
    fs::write(&kernel, kernels::first_instruction()).map_err(Error::io("can't write a kernel"))?;
    let ringer = || {
        let mut command = Command::new("ringer");
        command.args(["run", "--accel", "kvm", "--net", "none", "--kernel"]).arg(&kernel);
        command
    };
    let qemu = || {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-M", "microvm", "-accel", "kvm", "-cpu", "host", "-m", "512M", "-nodefaults"]);
        command.args(["-no-user-config", "-display", "none", "-serial", "stdio", "-kernel"]).arg(&kernel);
        command
    };
    let mut programs: Vec<&dyn Fn() -> Command> = vec![&ringer];
    if Path::new("/usr/bin/qemu-system-x86_64").exists() {
        programs.push(&qemu);
    }
    let times = least(&programs)?;
    let milliseconds = |time: &Duration| time.as_secs_f64() * 1e3;
    if let Some(own) = times.first() {
        println!("exec to first guest instruction: {:.1} ms", milliseconds(own));
        if let Some(other) = times.get(1) {
            println!(
                "QEMU microvm: {:.1} ms; ratio {:.2}",
                milliseconds(other),
                milliseconds(own) / milliseconds(other)
            );
        }
    }
    let shell = || -> Result<(u64, u64), Error> {
        let (machine, _) = until(Command::new("ringer").args(["run", "--accel", "kvm"]), "ringer:")?;
        own_memory(machine.0.id())
    };
    let machines: Vec<_> = (0..MACHINES).map(|_| shell()).collect::<Result<_, _>>()?;
    let (all, anonymous) = machines.into_iter().max().unwrap_or_default();
    println!("memory beyond the guest's: {all} KiB, {anonymous} KiB without pages of its program and libraries");
    if all > MOST_MEMORY {
        return Err(Error::Failed(format!("more than the {MOST_MEMORY} KiB of SPECIFICATION.md")));
    }
    Ok(())
}
