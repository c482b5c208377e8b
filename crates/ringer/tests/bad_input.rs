//! What is said, and which status is given, when a machine can't be: one line that names the flag or the file, and
//! nothing left behind.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use support::{Ended, Process, default_guest, ringer};

/// Runs Ringer in an empty directory, and checks that the directory is empty afterwards.
fn run(arguments: &[&str]) -> Ended {
    let home = tempfile::tempdir().unwrap();
    let mut command = ringer();
    command.args(arguments).stdin(Stdio::null()).current_dir(home.path());
    for variable in ["HOME", "XDG_CACHE_HOME", "TMPDIR"] {
        command.env(variable, home.path());
    }
    let ended = Process::start(&mut command).end();
    let left: Vec<_> = fs::read_dir(home.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{arguments:?} left {left:?}");
    ended
}

/// Expects a failure with this status, and one line on stderr with all of `words`.
fn refuses(arguments: &[&str], status: i32, words: &[&str]) {
    let ended = run(arguments);
    assert_eq!(ended.status.code(), Some(status), "{arguments:?}: {ended:?}");
    assert_eq!(ended.stdout, "", "{arguments:?}");
    let lines: Vec<_> = ended.stderr.lines().collect();
    assert!(lines.len() == 1 && lines[0].starts_with("ringer: "), "{arguments:?}: {lines:#?}");
    for word in words {
        assert!(lines[0].contains(word), "{arguments:?}: no {word:?} in {:?}", lines[0]);
    }
}

/// Files to be taken for kernels.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Files(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, data: &[u8]) -> String {
        fs::write(self.path(name), data).unwrap();
        self.path(name).to_str().unwrap().to_owned()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn memory_out_of_range_is_a_usage_error() {
    for size in ["0", "1M", "1MiB", "1T", "600G"] {
        refuses(&["run", "--memory", size], 2, &["--memory", size, "4M to 512G"]);
    }
    for size in ["12Q", "", "-1M", "1.5G", "lots", "99999999999999999999G"] {
        refuses(&["run", "--memory", size], 2, &["--memory", "512M"]);
    }
    refuses(&["run", "--memory", "8193K"], 2, &["--memory", "steps of 4K"]);
}

#[test]
fn an_impossible_number_of_processors_is_a_usage_error() {
    for cpus in ["0", "5000", "-1", "two", "99999999999"] {
        refuses(&["run", "--cpus", cpus], 2, &["--cpus", "1 to 128"]);
    }
    for (cpus, why) in [
        ("4,sockets=3", "not 4 processors"),
        ("6,sockets=2", "powers of two"),
        ("2,sockets=0", "1 to 128"),
        ("2,cores=9", "not 2 processors"),
        ("2,dies=1", "sockets=S, cores=C, threads=T"),
    ] {
        refuses(&["run", "--cpus", cpus], 2, &["--cpus", why]);
    }
}

#[test]
fn unknown_choices_are_usage_errors_that_name_the_known_ones() {
    refuses(&["run", "--cpu", "z80"], 2, &["--cpu", "z80", "host", "x86-64-v2", "x86-64-v3", "x86-64-v4"]);
    refuses(&["run", "--accel", "xen"], 2, &["--accel", "xen", "auto", "kvm", "translate"]);
    refuses(&["run", "--direct", "sometimes"], 2, &["--direct", "sometimes", "auto", "always", "never"]);
    refuses(&["run", "--serial", "tcp:1"], 2, &["--serial", "tcp:1", "stdio", "file:PATH", "none"]);
    refuses(&["run", "--serial", "file:"], 2, &["--serial", "file:PATH"]);
    refuses(&["run", "--turbo"], 2, &["--turbo"]);
    refuses(&["run", "kernel"], 2, &["kernel"]);
    refuses(&["fly"], 2, &["fly"]);
}

#[test]
fn networks_that_are_not_known_are_usage_errors_that_name_the_known_ones() {
    for (net, named) in [
        ("slirp", "hostfwd"),
        ("user,dns=1.1.1.1", "dns=1.1.1.1"),
        ("user,hostfwd=tcp:2222-22", "tcp:127.0.0.1:2222-:22"),
        ("user,hostfwd=tcp::70000-:22", "70000"),
        ("user,mac=ff:ff:ff:ff:ff:ff", "hardware address"),
        ("tap,name=a-name-that-is-too-long", "1 to 15 bytes"),
        ("user,model=ne2000", "e1000e"),
        ("user,mac=52:54:00:12:34:+6", "hardware address"),
    ] {
        refuses(&["run", "--net", net], 2, &["--net", named]);
    }
}

#[test]
fn directories_of_one_tag_are_refused_by_it() {
    refuses(&["run", "--share", "/a", "--share", "/b"], 1, &["--share", "\"share\"", "tag=NAME"]);
    refuses(&["run", "--share", "/a,tag=x", "--share", "/b,tag=x"], 1, &["--share", "\"x\""]);
}

#[test]
fn a_balloon_as_large_as_memory_is_refused() {
    refuses(&["run", "--memory", "256M", "--balloon", "256M"], 1, &["--balloon", "--memory"]);
}

#[test]
fn flags_that_need_a_kernel_say_so() {
    refuses(&["run", "--initrd", "x"], 2, &["--kernel"]);
    refuses(&["run", "--append", "quiet"], 2, &["--kernel"]);
}

#[test]
fn help_and_version_are_no_errors() {
    for arguments in [&["--help"][..], &["run", "--help"], &["--version"]] {
        let ended = run(arguments);
        assert!(ended.status.success() && ended.stdout.contains("ringer") && ended.stderr.is_empty(), "{ended:?}");
    }
    let ended = run(&[]);
    assert!(ended.status.code() == Some(2) && ended.stderr.contains("Examples"), "{ended:?}");
}

#[test]
fn a_file_that_is_no_kernel_is_refused_by_name() {
    let files = Files::new();
    let bzimage = fs::read(&default_guest().kernel).unwrap();
    let missing = files.path("missing");
    let cases = [
        (text(&missing).to_owned(), "No such file"),
        (text(files.0.path()).to_owned(), "not a regular file"),
        (files.file("empty", b""), "empty"),
        (files.file("short", b"MZ"), "bzImage"),
        (files.file("text", &b"This is not a kernel.\n".repeat(1000)), "bzImage"),
        (files.file("truncated", &bzimage[..bzimage.len() / 2]), "cut off"),
        (files.file("header", &bzimage[..1024]), "cut off"),
        (files.file("elf32", &elf32_without_pvh()), "PVH"),
    ];
    for (path, word) in &cases {
        refuses(&["run", "--kernel", path], 1, &[path, word]);
    }
}

#[test]
fn an_initrd_that_can_not_be_loaded_is_refused_by_name() {
    let files = Files::new();
    let kernel = text(&default_guest().kernel);
    let huge = files.path("huge");
    File::create(&huge).unwrap().set_len(1 << 30).unwrap();
    let missing = files.path("missing");
    for (path, word) in [(&huge, "memory"), (&missing, "No such file")] {
        refuses(&["run", "--kernel", kernel, "--initrd", text(path), "--memory", "256M"], 1, &[text(path), word]);
    }
}

#[test]
fn a_kernel_larger_than_memory_is_refused() {
    let kernel = text(&default_guest().kernel);
    refuses(&["run", "--kernel", kernel, "--memory", "16M"], 1, &[kernel, "memory"]);
}

#[test]
fn a_file_without_permission_is_refused_by_name() {
    let files = Files::new();
    let path = files.file("secret", b"data");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    // Whoever may read everything has no unreadable files.
    if File::open(&path).is_err() {
        refuses(&["run", "--kernel", &path], 1, &[&path, "Permission denied"]);
    }
}

#[test]
fn a_command_line_longer_than_kernels_take_is_refused() {
    let kernel = text(&default_guest().kernel);
    let long = "x".repeat(2049);
    refuses(&["run", "--kernel", kernel, "--append", &long], 1, &["command line", "2049", "2047"]);
}

#[test]
fn a_serial_file_that_can_not_be_written_is_refused_by_name() {
    let kernel = text(&default_guest().kernel);
    refuses(&["run", "--kernel", kernel, "--serial", "file:/nowhere/log"], 1, &["--serial", "/nowhere/log"]);
}

#[test]
fn without_apt_or_network_the_default_guest_says_how_to_pass_a_kernel() {
    let home = tempfile::tempdir().unwrap();
    let mut command = ringer();
    command.arg("run").stdin(Stdio::null()).env("XDG_CACHE_HOME", home.path()).env("PATH", "/nowhere");
    let ended = Process::start(&mut command).end();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    let last = ended.stderr.lines().last().unwrap();
    assert!(last.contains("apt-get") && last.contains("--kernel"), "{last}");
    let left: Vec<_> =
        fs::read_dir(home.path().join("ringer")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name.to_string_lossy().ends_with(".lock")), "{left:?}");
}

/// An ELF header for i386, with one empty segment and no notes.
fn elf32_without_pvh() -> Vec<u8> {
    let mut image = b"\x7fELF\x01\x01\x01".to_vec();
    image.resize(16, 0);
    for half in [2u16, 3] {
        image.extend_from_slice(&half.to_le_bytes()); // executable, Intel 80386
    }
    for word in [1u32, 0x10_0000, 52, 0, 0] {
        image.extend_from_slice(&word.to_le_bytes()); // version, entry, program headers at 52, no sections, no flags
    }
    for half in [52u16, 32, 1, 40, 0, 0] {
        image.extend_from_slice(&half.to_le_bytes()); // sizes and numbers of headers
    }
    for word in [1u32, 84, 0x10_0000, 0x10_0000, 16, 16, 5, 0x1000] {
        image.extend_from_slice(&word.to_le_bytes()); // PT_LOAD of 16 bytes, readable and executable
    }
    image.resize(100, 0x90);
    image
}
