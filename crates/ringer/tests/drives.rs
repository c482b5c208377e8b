//! Drives of a PC in whole machines: what Debian's own drivers make of them.

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use block::{Disk, Format, Options, image};
use memory::vm_memory::VolatileSlice;
use support::{Script, pc_guest};

const MIB: u64 = 1 << 20;

fn read(path: &Path, offset: u64, length: usize) -> Vec<u8> {
    let mut options = Options::new(path);
    options.read_only = true;
    let mut data = vec![0; length];
    Disk::open(&options).unwrap().read(&[VolatileSlice::from(data.as_mut_slice())], offset).unwrap();
    data
}

/// Writes to each disk, reads it again past the guest's cache, trims, and asks what the drive says of itself.
fn disks_on(bus: &str) {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    for (name, format) in [("a", Format::Qcow2), ("b", Format::Raw)] {
        image::create(Path::new(&at(name)), format, Some(16 * MIB), None).unwrap();
    }
    let steps = Script::on(pc_guest())
        .step("names", "cat /sys/block/sd?/size /sys/block/sd?/device/model")
        .step("write", "for d in a b; do dd if=/bin/busybox of=/dev/sd$d bs=64k count=8 seek=32 conv=fsync; done")
        .step("drop", "echo 3 >/proc/sys/vm/drop_caches")
        .step("same", "for d in a b; do dd if=/dev/sd$d bs=64k skip=32 count=8 | cmp -n 524288 - /bin/busybox; done")
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
    assert_eq!((steps["write"].status, steps["same"].status), (0, 0), "{steps:?}");
    assert_eq!(steps["errors"].output, "", "{steps:?}");
    let written = read(Path::new(&at("a")), 2 * MIB, MIB as usize / 2);
    assert!(written.starts_with(b"\x7fELF"));
    assert!(read(Path::new(&at("b")), 2 * MIB, MIB as usize / 2) == written);
}

#[test]
fn disks_on_serial_ata_are_read_and_written() {
    disks_on("ahci");
}

#[test]
fn disks_on_parallel_ata_are_read_and_written() {
    disks_on("ide");
}

/// Makes a disc image without a file system; returns what the guest's cksum says of it.
fn disc(path: &Path) -> String {
    let data: Vec<u8> = (0..512 * 1024u32).flat_map(|n| n.to_le_bytes()).collect();
    fs::write(path, &data).unwrap();
    let sum = Command::new("cksum").stdin(fs::File::open(path).unwrap()).output().unwrap();
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
            .step("read", "cksum </dev/sr0")
            .step("write", "echo x >/dev/sr0")
            .step("errors", "dmesg | grep -E 'exception|failed command|timeout|lost interrupt'")
            .run(&["--cdrom", &format!("{},bus={bus}", path.display()), "--net", "none"]);
        assert_eq!(steps["drive"].output, "4096\nCD-ROM          \n", "{bus}");
        assert_eq!(steps["read"].output, sum, "{bus}");
        assert_ne!(steps["write"].status, 0, "{bus}");
        assert_eq!(steps["errors"].output, "", "{bus}");
    }
}
