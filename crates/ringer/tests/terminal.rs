//! Ringer on a terminal: keys, and the terminal's mode, which is as it was however Ringer ends.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};
use support::{LONG, default_guest, one_machine_at_a_time, ringer};

/// A terminal with Ringer at it.
struct Session {
    user: File,
    /// Kept open so that the terminal and its mode outlive Ringer.
    terminal: OwnedFd,
    before: Termios,
    child: Child,
    screen: mpsc::Receiver<Vec<u8>>,
    seen: String,
}

impl Session {
    fn start(command: &mut Command) -> Self {
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&user).unwrap();
        unlockpt(&user).unwrap();
        let name = ptsname(&user, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let terminal = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty()).unwrap();
        let before = tcgetattr(&terminal).unwrap();
        let end = || Stdio::from(terminal.try_clone().unwrap());
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        let user = File::from(user);
        let mut reader = user.try_clone().unwrap();
        let (sender, screen) = mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Session { user, terminal, before, child, screen, seen: String::new() }
    }

    fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + LONG;
        while !self.seen.contains(text) {
            match self.screen.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(data) => self.seen += &String::from_utf8_lossy(&data),
                Err(error) => panic!("no {text:?} ({error}) on:\n{}", self.seen),
            }
        }
    }

    fn type_text(&mut self, text: &str) {
        self.user.write_all(text.as_bytes()).unwrap();
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(self.terminal.as_fd()).unwrap().local_modes.contains(LocalModes::ICANON)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for the end, and checks that the terminal is as it was.
    fn end(mut self) -> ExitStatus {
        let deadline = Instant::now() + LONG;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "still running:\n{}", self.seen);
            std::thread::sleep(Duration::from_millis(5));
        };
        let after = tcgetattr(self.terminal.as_fd()).unwrap();
        assert_eq!(format!("{after:?}"), format!("{:?}", self.before));
        status
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// The default guest at its prompt.
fn at_the_prompt() -> Session {
    default_guest();
    let mut session = Session::start(ringer().arg("run"));
    session.wait_for("ringer:/root# ");
    assert!(session.is_raw());
    session
}

#[test]
fn ctrl_a_h_helps_and_ctrl_a_x_ends() {
    let _turn = one_machine_at_a_time();
    let mut session = at_the_prompt();
    session.type_text("\x01h");
    session.wait_for("ends the machine");
    session.type_text("\x01x");
    assert_eq!(session.end().code(), Some(0));
}

#[test]
fn the_terminal_is_restored_after_power_off() {
    let _turn = one_machine_at_a_time();
    let mut session = at_the_prompt();
    session.type_text("poweroff -f\r");
    assert_eq!(session.end().code(), Some(0));
}

#[test]
fn the_terminal_is_restored_after_signals() {
    let _turn = one_machine_at_a_time();
    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        let session = at_the_prompt();
        session.signal(signal);
        assert_eq!(session.end().signal(), Some(signal.as_raw()));
    }
}

#[test]
fn a_stopped_machine_gives_the_terminal_back_until_it_continues() {
    let _turn = one_machine_at_a_time();
    let mut session = at_the_prompt();
    session.signal(Signal::TSTP);
    let waits = Instant::now() + Duration::from_secs(10);
    while session.is_raw() && Instant::now() < waits {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!session.is_raw());
    session.signal(Signal::CONT);
    while !session.is_raw() && Instant::now() < waits {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(session.is_raw());
    session.type_text("echo $((6 * 7)) again\r");
    session.wait_for("42 again");
    session.type_text("\x01x");
    assert_eq!(session.end().code(), Some(0));
}

#[test]
fn a_terminal_is_not_touched_when_the_machine_can_not_start() {
    let session = Session::start(ringer().args(["run", "--kernel", "/nowhere/kernel"]));
    assert_eq!(session.end().code(), Some(1));
}
