//! `cargo xtask nested`: the kvm engine on hardware virtualization, in a machine whose processor QEMU emulates.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use ringer::guest::{self, Guest};

use crate::Error;
use crate::build;
use crate::conformance::{self, Kind, Results};
use crate::grub;
use crate::host::{Ended, Host};
use crate::kernels;

/// All of it, on a host that has other things to do as well.
const LIMIT: Duration = Duration::from_secs(1800);

/// How often the host is started until it comes to its end with nothing failed. In some hours never, in others every second time
/// its kernel panics or stands still: QEMU then delivers to it what was meant for a guest, or while it has interrupts off, which no program of the
/// host's, as Ringer is one, can bring about. Or a guest of two processors is what it hits, and starts again by itself
/// (behind GRUB, before the kernel's first word) or stands still. What Ringer does wrong fails each time.
const STARTS: u32 = 6;

/// What runs in the machine that is the host. Each line of interest begins with "@@".
const SCRIPT: &str = include_str!("nested.sh");
/// What runs in the virtual machine that reboots, with a disk and a network.
const SERVER: &str = include_str!("server.sh");

/// The monitor to compare with, and what its `microvm` machine needs.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const FIRMWARE: [&str; 3] = ["bios-microvm.bin", "linuxboot_dma.bin", "pvh.bin"];
const FIRMWARE_DIRECTORIES: [&str; 2] = ["/usr/share/qemu", "/usr/share/seabios"];

/// SeaBIOS, its part for the screen, and its way to a kernel that is named.
const BIOS: [&str; 3] =
    ["/usr/share/seabios/bios-256k.bin", "/usr/share/seabios/vgabios-stdvga.bin", "/usr/share/qemu/linuxboot_dma.bin"];

/// Boots the host and runs the proof in it, or only a script of the caller's own.
pub fn run(own_script: Option<&Path>) -> Result<(), Error> {
    let read = |path: &Path| fs::read_to_string(path).map_err(Error::io(format!("can't read {}", path.display())));
    let own_script = own_script.map(read).transpose()?;
    let ringer = build::ringer()?;
    let tests = if own_script.is_none() { build::bare_metal_tests()? } else { Vec::new() };
    let mut host = Host::new()?;
    host.program(&ringer.path, "/usr/bin/ringer")?;
    for test in &tests {
        host.program(&test.path, &format!("/tests/{}", test.name))?;
    }
    let own = std::env::current_exe().map_err(Error::io("can't find this program"))?;
    host.program(&own, "/usr/bin/xtask")?;
    host.program(Path::new(QEMU), QEMU)?;
    for firmware in FIRMWARE {
        let path =
            FIRMWARE_DIRECTORIES.iter().map(|directory| Path::new(directory).join(firmware)).find(|p| p.exists());
        let path = path.ok_or_else(|| Error::Failed(format!("QEMU has no {firmware} on this host")))?;
        host.copy(&path, &format!("/usr/share/qemu/{firmware}"))?;
    }
    let cache = guest::cache_directory()?;
    let default = Guest::get(&cache)?;
    let directory = default.kernel.parent().ok_or_else(|| Error::Failed("the cache has no directory".into()))?;
    let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
    for file in ["vmlinuz", "busybox", "modules.cpio"] {
        host.copy(&directory.join(file), &format!("/root/.cache/ringer/{name}/{file}"))?;
    }
    host.file("/server.cpio", default.initramfs()?.file(guest::RUN_SCRIPT, 0o644, SERVER).build());
    host.copy(&default.kernel, "/vmlinuz")?;
    for firmware in BIOS {
        host.copy(Path::new(firmware), firmware)?;
    }
    host.file("/boot.raw", kernels::boot_disk("by INT 13h\n"));
    host.file(
        "/firmware.cpio",
        default.initramfs()?.file(guest::RUN_SCRIPT, 0o644, "echo kernel-$((6 * 7))\n").build(),
    );
    let directory = tempfile::tempdir().map_err(Error::io("can't make a temporary directory"))?;
    let installed = default.initramfs()?.file(guest::RUN_SCRIPT, 0o644, "echo installed-$((6 * 7)) $(nproc)\n").build();
    let disk = grub::disk(directory.path(), &default.kernel, &installed, "console=ttyS0 quiet panic=-1")?;
    host.copy(&disk, "/grub.raw")?;
    host.file("/astray.elf", kernels::astray());
    host.file("/reader.elf", kernels::reader());

    let deadline = Instant::now() + LIMIT;
    if let Some(script) = own_script {
        let ended = host.ready(&script)?.run(deadline, |line| println!("{line}"))?;
        return if ended == Ended::Off { Ok(()) } else { Err(Error::Failed(format!("the script's end: {ended:?}"))) };
    }
    let machine = host.ready(SCRIPT)?;
    let mut start = 1;
    let (results, failed) = loop {
        let (mut program, mut results, mut failed, mut finished) = (String::new(), Results::new(), Vec::new(), false);
        let ended = machine.run(deadline, |line| {
            println!("{line}");
            let Some((kind, rest)) = line.strip_prefix("@@ ").and_then(|line| line.split_once(' ')) else {
                results.extend(conformance::results(&program, line));
                return;
            };
            match kind {
                "suite" => program = rest.to_owned(),
                "FAILED" => failed.push(rest.to_owned()),
                "end" => finished = true,
                _ => {}
            }
        })?;
        let last = ended == Ended::Late || start == STARTS;
        if finished && (failed.is_empty() || last) {
            break (results, failed);
        }
        if last {
            return Err(Error::Failed(format!("the script did not come to its end in {start} starts: {ended:?}")));
        }
        let why =
            if finished { failed.join("; ") } else { format!("the emulated host has not come to its end: {ended:?}") };
        println!("start {start} of {STARTS} at most: {why}; once more");
        start += 1;
    };
    let translated = conformance::on_this_host("translate", &tests)?;
    conformance::judge(&[("translate", Kind::Translated, translated), ("kvm", Kind::EmulatedAmd, results)])?;
    if failed.is_empty() { Ok(()) } else { Err(Error::Failed(failed.join("; "))) }
}
