//! Boot loaders as people have them on discs and floppy disks: Debian's GRUB rescue images, used by hand.

mod support;

use std::fs;
use std::process::Stdio;

use support::{Process, one_machine_at_a_time, ringer};

const RESCUE: &str = "/usr/lib/grub-rescue/grub-rescue-";

/// Starts GRUB, which shows its menu on screen and serial port; its command line lists `drives`, and ends the machine.
fn rescue(drive: &str, image: &str, drives: &str) {
    let _turn = one_machine_at_a_time();
    let mut machine = Process::start(ringer().args(["run", "--net", "none", drive, image]).stdin(Stdio::piped()));
    machine.wait_for_drawn("GNU GRUB  version");
    machine.wait_for_drawn("executed automatically in");
    machine.type_text("c");
    machine.wait_for_drawn("grub> ");
    machine.type_text("ls\r");
    machine.wait_for_drawn(drives);
    // No more than 16 bytes at a time: the BIOS has no room for more.
    machine.type_text("halt\r");
    let ended = machine.end();
    assert!(ended.status.success(), "{ended:?}");
}

#[test]
fn grub_starts_from_a_disc_and_takes_commands() {
    rescue("--cdrom", &format!("{RESCUE}cdrom.iso"), "(cd) (cd,msdos1)");
}

#[test]
fn grub_starts_from_a_floppy_disk_and_takes_commands() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("floppy.img");
    fs::copy(format!("{RESCUE}floppy.img"), &image).unwrap();
    rescue("--floppy", image.to_str().unwrap(), "(fd0)");
}
