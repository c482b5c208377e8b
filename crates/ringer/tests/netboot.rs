//! Machines that boot from their network card, by Debian's iPXE in its option ROM: from the user network's TFTP server, or
//! from a server of the host.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Stdio;

use support::{Process, Script, one_machine_at_a_time, pc_guest, ringer, steps};

/// A directory with a kernel, a RAM disk that says what the machine is, and a script of iPXE's that boots them.
fn served() -> tempfile::TempDir {
    let guest = pc_guest();
    let script = Script::on(guest)
        .step("memory", "grep MemTotal /proc/meminfo")
        .step("how", "cat /proc/cmdline; [ -d /sys/firmware/efi ] && echo by EFI");
    let (_, directory) = script.command("");
    fs::copy(&guest.kernel, directory.path().join("vmlinuz")).unwrap();
    let text = "#!ipxe\nkernel vmlinuz console=ttyS0 quiet panic=-1 from=network initrd=initrd.cpio\ninitrd initrd.cpio\nboot\n";
    fs::write(directory.path().join("boot.ipxe"), text).unwrap();
    directory
}

/// Boots what the network has; Linux and its RAM disk are there when this returns what was written to the serial port.
fn boots(firmware: &str, net: &str) -> String {
    let _turn = one_machine_at_a_time();
    let mut command = ringer();
    command.args(["run", "--memory", "1G", "--firmware", firmware, "--boot", "order=n", "--no-reboot", "--net", net]);
    let ended = Process::start(command.stdin(Stdio::null())).end();
    assert!(ended.status.success(), "{ended:?}");
    let steps = steps(&ended.stdout);
    assert!(steps["memory"].output.contains("kB"), "{steps:?}");
    assert!(steps["how"].output.contains("from=network"), "{steps:?}");
    ended.stdout
}

fn tftp(directory: &Path, model: &str) -> String {
    format!("user,model={model},tftp={},bootfile=boot.ipxe", directory.display())
}

#[test]
fn a_bios_boots_linux_from_an_e1000_by_tftp() {
    let directory = served();
    let output = boots("seabios", &tftp(directory.path(), "e1000"));
    assert!(output.contains("tftp://10.0.2.2/boot.ipxe"), "{output}");
}

#[test]
fn a_bios_boots_linux_from_an_e1000e_by_tftp() {
    boots("seabios", &tftp(served().path(), "e1000e"));
}

#[test]
fn a_bios_boots_linux_from_a_paravirtual_card_by_tftp() {
    boots("seabios", &tftp(served().path(), "virtio"));
}

#[test]
fn efi_boots_linux_from_an_e1000_by_tftp() {
    let output = boots("ovmf", &tftp(served().path(), "e1000"));
    assert!(output.contains("by EFI"), "{output}");
}

/// Serves files to whoever asks, as a web server does (RFC 9112), until the test ends.
fn web_server(directory: &Path) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let directory = directory.to_owned();
    std::thread::spawn(move || {
        for mut connection in listener.incoming().flatten() {
            let mut lines = BufReader::new(connection.try_clone().unwrap()).lines().map_while(Result::ok);
            let request = lines.next().unwrap_or_default();
            let _header = lines.take_while(|line| !line.is_empty()).count();
            let name = request.split(' ').nth(1).unwrap_or_default().trim_start_matches('/').to_owned();
            let answer = match fs::read(directory.join(&name)) {
                Ok(data) if !name.contains("..") => {
                    let head =
                        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", data.len());
                    [head.into_bytes(), data].concat()
                }
                _ => b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec(),
            };
            // Who goes away early has no use for the rest.
            let _ = connection.write_all(&answer);
        }
    });
    port
}

#[test]
fn a_bios_boots_linux_from_a_web_server_of_the_host() {
    let directory = served();
    let port = web_server(directory.path());
    let net = format!("user,model=e1000,bootfile=http://10.0.2.2:{port}/boot.ipxe");
    let output = boots("seabios", &net);
    assert!(output.contains(&format!("http://10.0.2.2:{port}/boot.ipxe... ok")), "{output}");
}

#[test]
fn without_a_rom_or_a_file_the_firmware_says_so() {
    let _turn = one_machine_at_a_time();
    let start = |net: &str| {
        let mut command = ringer();
        command.args(["run", "--firmware", "seabios", "--boot", "order=n", "--net", net]);
        Process::start(command.stdin(Stdio::null()))
    };
    start("user,model=e1000,rom=none").wait_for("No bootable device");
    let directory = tempfile::tempdir().unwrap();
    start(&tftp(directory.path(), "e1000")).wait_for("No such file");
}
