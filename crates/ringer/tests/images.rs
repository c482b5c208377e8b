//! `ringer image` as users have it: what it says, also where nobody can hear it, and what it leaves behind.

mod support;

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;

use block::{Format, image};
use rustix::process::{Pid, Signal, kill_process};
use std::os::unix::process::ExitStatusExt;
use support::{MIB, Process, ringer};

fn image_of(directory: &Path) -> String {
    let path = directory.join("image");
    image::create(&path, Format::Qcow2, Some(16 * MIB), None).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn an_answer_that_can_not_be_written_is_an_error_unless_nobody_wants_it() {
    let directory = tempfile::tempdir().unwrap();
    let image = image_of(directory.path());
    for arguments in [vec!["image", "info", &image], vec!["image", "check", "--json", &image]] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = ringer().args(&arguments).stdout(full).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {error}");
        assert!(error.lines().count() == 1 && error.contains("stdout: No space left on device"), "{error}");
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = ringer().args(&arguments).stdout(writer).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{arguments:?}: {output:?}");
    }
}

#[test]
fn what_is_done_does_not_depend_on_whether_it_can_be_told() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("new");
    let full = File::options().write(true).open("/dev/full").unwrap();
    let status = ringer().args(["image", "create"]).arg(&path).arg("16M").stderr(full).status().unwrap();
    assert!(status.success() && path.exists(), "{status}");
}

#[test]
fn a_copy_says_what_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("copy.raw");
    let ended = Process::start(ringer().args(["image", "convert", &image_of(directory.path())]).arg(&copy)).end();
    assert!(ended.status.success() && ended.stderr.contains("copy.raw: a qcow2 image of a disk of 16M"), "{ended:?}");
}

#[test]
fn a_signal_leaves_no_half_copy() {
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("from"), directory.path().join("to"));
    fs::write(&from, vec![1; 512 << 20]).unwrap();
    let mut command = ringer();
    command.args(["image", "convert"]).arg(&from).arg(&to).stdin(Stdio::null());
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // It has begun to copy.
    while fs::metadata(&to).map_or(0, |metadata| metadata.len()) < MIB {
        assert!(child.try_wait().unwrap().is_none(), "it has ended already");
        sleep(Duration::from_millis(1));
    }
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(Signal::INT.as_raw()));
    assert!(!to.exists() && from.exists());
}
