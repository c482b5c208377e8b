//! Machines that start as a PC does: from the firmware that Debian ships, unmodified.

mod support;

use std::fs;
use std::path::Path;
use std::process::Stdio;

use block::{Format, image};
use support::{Process, Script, debian_disk, one_machine_at_a_time, ringer, steps};

/// Boots Debian's disk by firmware and GRUB; `then` uses it.
fn debian(options: &[&str], then: impl FnOnce(&mut Process)) {
    let directory = tempfile::tempdir().unwrap();
    let overlay = directory.path().join("overlay.qcow2");
    image::create(&overlay, Format::Qcow2, None, Some((debian_disk().into(), Some(Format::Qcow2)))).unwrap();
    let _turn = one_machine_at_a_time();
    let mut command = ringer();
    command.args(["run", "--memory", "1G", "--no-reboot", "--disk"]).arg(format!("{},backing=any", overlay.display()));
    let mut machine = Process::start(command.args(options).stdin(Stdio::piped()));
    machine.wait_for("GRUB");
    machine.wait_for(" login: ");
    machine.forget_output();
    machine.type_text("root\n");
    machine.wait_for("~# ");
    then(&mut machine);
    machine.type_text("poweroff\n");
    let ended = machine.end();
    assert!(ended.status.success(), "{ended:?}");
}

/// Runs a command in the guest, and waits for it to say yes.
fn holds(machine: &mut Process, condition: &str) {
    machine.forget_output();
    // The terminal shows what is typed, so that must not look like the answer.
    machine.type_text(&format!("{condition}; echo @@'ended' $?@@\n"));
    machine.wait_for("@@ended 0@@");
}

#[test]
fn seabios_starts_grub_and_grub_starts_debian() {
    debian(&["--firmware", "seabios", "--cpus", "2"], |machine| {
        holds(machine, "! [ -e /sys/firmware/efi ] && [ $(nproc) = 2 ]");
        holds(machine, "! dmesg | grep -E 'ACPI (BIOS )?(Error|Warning)|unchecked MSR'");
        holds(machine, "grep -q Ringer /sys/class/dmi/id/sys_vendor");
    });
}

#[test]
fn ovmf_starts_grub_and_keeps_its_variables() {
    let directory = tempfile::tempdir().unwrap();
    let variables = directory.path().join("variables.fd");
    let at = variables.to_str().unwrap();
    debian(&["--firmware", "ovmf", "--firmware-vars", at, "--cpus", "2"], |machine| {
        holds(machine, "[ -d /sys/firmware/efi/efivars ] && [ $(nproc) = 2 ]");
        holds(machine, "! dmesg | grep -E 'ACPI (BIOS )?(Error|Warning)|unchecked MSR'");
    });
    let kept = fs::read(&variables).unwrap();
    let name: Vec<u8> = "BootOrder".encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert!(kept.windows(name.len()).any(|window| window == name), "OVMF has written its boot order");
}

/// A kernel that firmware finds in fw_cfg.
fn kernel_by(firmware: &str) {
    let script = Script::new().step("memory", "grep MemTotal /proc/meminfo").step("end", "true");
    let (mut command, _directory) = script.command("");
    command.args(["--firmware", firmware, "--net", "none", "--no-reboot"]).stdin(Stdio::null());
    let _turn = one_machine_at_a_time();
    let ended = Process::start(&mut command).end();
    assert!(ended.status.success(), "{ended:?}");
    let steps = steps(&ended.stdout);
    assert!(steps["memory"].output.contains("kB") && steps["end"].status == 0, "{steps:?}");
}

#[test]
fn seabios_boots_a_kernel_that_is_named() {
    kernel_by("seabios");
}

#[test]
fn ovmf_boots_a_kernel_that_is_named() {
    kernel_by("ovmf");
}

const SHIM: &str = "/usr/lib/shim/shimx64.efi.signed";
const GRUB: &str = "/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed";
/// Firmware that guards its variables by system-management mode, and those with Microsoft's keys.
const SECURE_FIRMWARE: &str = "/usr/share/OVMF/OVMF_CODE_4M.ms.fd";
const SECURE_VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.ms.fd";

/// Reads a file of a package.
fn packaged(path: &str) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|error| panic!("{path}: {error}; .ci/run says which package has it"))
}

/// Makes a disk from which EFI firmware starts `loader`, that Debian's GRUB, and that the guest's kernel with a script.
fn efi_disk(path: &Path, loader: Vec<u8>, script: Script) {
    let (kernel, initrd) = script.kernel_and_initrd();
    let menu = "set timeout=0\nmenuentry guest {\nlinux /vmlinuz console=ttyS0 panic=-1\ninitrd /initrd\n}\n";
    let content = [
        ("EFI/BOOT/BOOTX64.EFI", loader),
        ("EFI/BOOT/grubx64.efi", packaged(GRUB)),
        ("EFI/debian/grub.cfg", menu.into()),
        ("vmlinuz", fs::read(kernel).unwrap()),
        ("initrd", initrd),
    ];
    let disk = fs::File::options().read(true).write(true).create_new(true).open(path).unwrap();
    disk.set_len(128 << 20).unwrap();
    fatfs::format_volume(&disk, fatfs::FormatVolumeOptions::new()).unwrap();
    let volume = fatfs::FileSystem::new(&disk, fatfs::FsOptions::new()).unwrap();
    for directory in ["EFI", "EFI/BOOT", "EFI/debian"] {
        volume.root_dir().create_dir(directory).unwrap();
    }
    for (name, bytes) in content {
        std::io::Write::write_all(&mut volume.root_dir().create_file(name).unwrap(), &bytes).unwrap();
    }
}

/// Starts a disk with this boot loader by firmware that has Microsoft's keys; `then` looks at it. Returns its variables.
fn with_microsofts_keys(loader: Vec<u8>, then: impl FnOnce(Process)) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let (disk, variables) = (directory.path().join("disk"), directory.path().join("variables.fd"));
    let says = "dmesg | grep -o 'Secure boot enabled' && [ $(nproc) = 2 ]";
    efi_disk(&disk, loader, Script::new().step("secure", says));
    let mut command = ringer();
    command.args(["run", "--no-reboot", "--cpus", "2", "--net", "none", "--firmware"]).arg(SECURE_FIRMWARE);
    command.arg("--disk").arg(format!("{},format=raw", disk.display())).arg("--firmware-vars").arg(&variables);
    let _turn = one_machine_at_a_time();
    then(Process::start(command.stdin(Stdio::null())));
    fs::read(variables).unwrap()
}

#[test]
fn secure_boot_starts_what_is_signed_and_keeps_its_variables_by_system_management_mode() {
    let kept = with_microsofts_keys(packaged(SHIM), |machine| {
        let ended = machine.end();
        assert!(ended.status.success(), "{ended:?}");
        assert_eq!(steps(&ended.stdout)["secure"].status, 0, "{ended:?}");
    });
    assert_ne!(kept, packaged(SECURE_VARIABLES), "the firmware has written its boot order");
}

#[test]
fn secure_boot_refuses_what_was_changed_after_it_was_signed() {
    let mut changed = packaged(SHIM);
    let middle = changed.len() / 2;
    changed[middle] ^= 1;
    with_microsofts_keys(changed, |mut machine| machine.wait_for_drawn("Access Denied"));
}

#[test]
fn firmware_of_32_bits_with_system_management_mode_starts_its_shell() {
    let code = "/usr/share/OVMF/OVMF32_CODE_4M.secboot.fd";
    let _turn = one_machine_at_a_time();
    let mut command = ringer();
    command.args(["run", "--cpus", "2", "--net", "none", "--firmware", code]);
    Process::start(command.stdin(Stdio::null())).wait_for_drawn("Shell>");
}

/// A Multiboot kernel that sends its first module to the debug console, and exits with what EAX was right for.
fn multiboot_kernel() -> Vec<u8> {
    const LOAD: u32 = 0x10_0000;
    const HEADER: usize = 16;
    const CODE: u32 = 64;
    let mut kernel = vec![0x90; 256];
    let flags = 1u32 << 16;
    let words = [
        0x1bad_b002,
        flags,
        0u32.wrapping_sub(0x1bad_b002 + flags),
        LOAD + HEADER as u32,
        LOAD,
        LOAD + 256,
        LOAD + 4096,
        LOAD + CODE,
    ];
    for (place, word) in kernel[HEADER..].chunks_mut(4).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    let code = [
        &[0x3d, 0x02, 0xb0, 0xad, 0x2b][..], // cmp eax, 2BADB002H
        &[0x75, 0xfe],                       // jne $
        &[0x8b, 0x43, 24],                   // mov eax, [ebx + 24]: the list of modules
        &[0x8b, 0x30],                       // mov esi, [eax]
        &[0x8b, 0x48, 4],                    // mov ecx, [eax + 4]
        &[0x29, 0xf1],                       // sub ecx, esi
        &[0x66, 0xba, 0x02, 0x04],           // mov dx, 402H
        &[0xfc, 0xf3, 0x6e],                 // cld; rep outsb
        &[0xb0, 21, 0xe6, 0xf4],             // mov al, 21; out F4H, al
        &[0xf4, 0xeb, 0xfd],                 // hlt, again and again
    ]
    .concat();
    kernel[CODE as usize..CODE as usize + code.len()].copy_from_slice(&code);
    kernel
}

/// Starts it with a module; how it ended.
fn run_multiboot_kernel(options: &[&str]) -> (Option<i32>, String) {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, data: &[u8]| {
        let path = directory.path().join(name);
        fs::write(&path, data).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (kernel, module) = (file("kernel", &multiboot_kernel()), file("module", b"a module speaks\n"));
    let mut command = ringer();
    command.args(["run", "--kernel", &kernel, "--initrd", &module, "--debugcon", "stdio", "--debug-exit", "0xf4"]);
    let ended = Process::start(command.args(["--net", "none"]).args(options).stdin(Stdio::null())).end();
    (ended.status.code(), ended.stdout)
}

#[test]
fn a_multiboot_kernel_gets_its_module_and_decides_the_exit_status() {
    assert_eq!(run_multiboot_kernel(&[]), (Some(43), "a module speaks\n".into()));
}

#[test]
fn seabios_starts_a_multiboot_kernel_by_the_option_rom_for_it() {
    let (status, said) = run_multiboot_kernel(&["--firmware", "seabios"]);
    // The debug console is the firmware's, too.
    assert_eq!(status, Some(43), "{said}");
    assert!(said.contains("SeaBIOS (version") && said.ends_with("a module speaks\n"), "{said}");
}

/// Starts firmware on something without a system, until it has said so.
fn finds_nothing(options: &[&str], says: &str) {
    let _turn = one_machine_at_a_time();
    let mut machine = Process::start(ringer().arg("run").args(options).args(["--net", "none"]).stdin(Stdio::null()));
    machine.wait_for(says);
}

#[test]
fn an_empty_disk_and_a_disc_without_a_system_are_told_by_the_firmware() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("empty");
    fs::write(&path, vec![0; 4 << 20]).unwrap();
    let path = path.to_str().unwrap();
    finds_nothing(&["--firmware", "seabios", "--disk", &format!("{path},format=raw")], "not a bootable disk");
    finds_nothing(&["--cdrom", path], "No bootable device");
}

fn refuses(arguments: &[&str], words: &[&str]) {
    let ended = Process::start(ringer().arg("run").args(arguments).stdin(Stdio::null())).end();
    assert_ne!(ended.status.code(), Some(0), "{arguments:?}: {ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
    words.iter().for_each(|word| assert!(ended.stderr.contains(word), "no {word:?} in {ended:?}"));
}

#[test]
fn firmware_that_is_none_is_refused_with_a_reason() {
    let directory = tempfile::tempdir().unwrap();
    let bad = directory.path().join("bad.bin");
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    for (content, words) in [(vec![1; 1000], "64 KiB to 16 MiB"), (vec![0; 128 << 10], "it is empty")] {
        fs::write(&bad, content).unwrap();
        refuses(&["--firmware", &text(&bad)], &["bad.bin", words]);
    }
    refuses(&["--firmware", "no-such-file"], &["no-such-file"]);
    refuses(&["--firmware", "seabios", "--append", "quiet"], &["--append goes with --kernel"]);
    refuses(&["--firmware", "seabios", "--firmware-vars", &text(&bad)], &["keeps no variables"]);
    fs::write(&bad, [1; 4096]).unwrap();
    refuses(&["--firmware", "ovmf", "--firmware-vars", &text(&bad)], &["bad.bin", "holds no EFI variables"]);
    refuses(&["--accel", "kvm", "--firmware", SECURE_FIRMWARE], &["system-management mode", "--accel translate"]);
    refuses(&["--debug-exit", "0x10000"], &["--debug-exit", "allowed are"]);
}
