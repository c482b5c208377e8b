//! A disk from which a PC starts as from one that Debian has installed: GRUB's code in the first sector, the rest of GRUB,
//! its configuration, a kernel and a RAM disk in a file system.
//!
//! Debian's rescue image is such a disk already, with an ISO 9660 file system; it lacks only something to start.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Error;

const RESCUE: &str = "/usr/lib/grub-rescue/grub-rescue-usb.img";

/// Makes the disk in `directory`. GRUB starts the kernel without a menu.
pub fn disk(directory: &Path, kernel: &Path, initrd: &[u8], command_line: &str) -> Result<PathBuf, Error> {
    let (menu, ram_disk, out) = (directory.join("grub.cfg"), directory.join("grub-initrd"), directory.join("grub.raw"));
    let failed = || Error::io(format!("can't make a disk in {}", directory.display()));
    fs::write(&menu, format!("linux /vmlinuz {command_line}\ninitrd /initrd\nboot\n")).map_err(failed())?;
    fs::write(&ram_disk, initrd).map_err(failed())?;
    let made = Command::new("xorriso")
        .args(["-indev", RESCUE, "-outdev"])
        .arg(&out)
        // The first sector has the place of GRUB's core, which is elsewhere now.
        .args(["-boot_image", "any", "replay", "-rm", "/boot/grub/grub.cfg", "--"])
        .arg("-map")
        .arg(&menu)
        .args(["/boot/grub/grub.cfg", "-map"])
        .arg(kernel)
        .args(["/vmlinuz", "-map"])
        .arg(&ram_disk)
        .arg("/initrd")
        .stdout(Stdio::null())
        .output()
        .map_err(Error::io("can't start xorriso (Debian: xorriso)"))?;
    if !made.status.success() {
        let words = String::from_utf8_lossy(&made.stderr).trim_end().to_owned();
        return Err(Error::Failed(format!("xorriso makes no disk of {RESCUE} (Debian: grub-rescue-pc): {words}")));
    }
    Ok(out)
}
