//! Stdin and stdout as a serial port: bytes pass as they are, but for the escape key Ctrl-a.
//!
//! Input: stdin -> [`EscapeFilter`] -> the machine. Without a terminal, no byte is special: pipes may carry anything.

use std::io::{self, ErrorKind, Write};
use std::os::fd::BorrowedFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::stdio::{stdin, stdout};

/// Ctrl-a
const ESCAPE: u8 = 1;

const HELP: &[u8] = b"
ringer: Ctrl-a x       ends the machine, as if its power was cut
        Ctrl-a h       this help
        Ctrl-a Ctrl-a  sends Ctrl-a to the guest
";

/// What a key sequence asks of the monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    End,
    Help,
}

/// Takes escape sequences out of what is typed.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    escaped: bool,
}

impl EscapeFilter {
    /// Appends to `passed` what goes to the guest, and returns the commands met.
    pub fn filter(&mut self, typed: &[u8], passed: &mut Vec<u8>) -> Vec<Command> {
        let mut commands = Vec::new();
        for &byte in typed {
            match (std::mem::replace(&mut self.escaped, false), byte) {
                (false, ESCAPE) => self.escaped = true,
                (false, byte) | (true, byte @ ESCAPE) => passed.push(byte),
                (true, b'x' | b'X') => commands.push(Command::End),
                (true, b'h' | b'H' | b'?') => commands.push(Command::Help),
                // Any other key takes the escape back.
                (true, _) => {}
            }
        }
        commands
    }
}

/// Reads stdin to its end. `send` gets what the guest is to receive. With `end`, escape sequences are in force; it is
/// called when the user ends the machine.
pub fn read_input(mut end: Option<Box<dyn FnOnce() + Send>>, mut send: impl FnMut(&[u8])) {
    let mut filter = EscapeFilter::default();
    let mut buffer = [0; 4096];
    loop {
        let read = match rustix::io::read(stdin(), &mut buffer) {
            Ok(0) => return,
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => {
                wait_until_ready(stdin(), PollFlags::IN);
                continue;
            }
            Err(error) => return tracing::debug!("stdin is closed: {error}"),
        };
        if end.is_none() {
            send(read);
            continue;
        }
        let mut passed = Vec::new();
        for command in filter.filter(read, &mut passed) {
            match command {
                Command::Help => _ = crate::terminal::Stderr.write_all(HELP),
                Command::End => return end.take().into_iter().for_each(|end| end()),
            }
        }
        send(&passed);
    }
}

/// Stdout for a serial port. When its reader has gone, `gone` is called once, and all further output is dropped.
pub struct Output<F: FnOnce()> {
    gone: Option<F>,
}

impl<F: FnOnce()> Output<F> {
    pub fn new(gone: F) -> Self {
        Output { gone: Some(gone) }
    }
}

impl<F: FnOnce()> Write for Output<F> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.gone.is_none() {
            return Ok(data.len());
        }
        match rustix::io::write(stdout(), data) {
            Ok(count) => Ok(count),
            Err(Errno::INTR) => Err(ErrorKind::Interrupted.into()),
            Err(Errno::AGAIN) => {
                wait_until_ready(stdout(), PollFlags::OUT);
                Err(ErrorKind::Interrupted.into())
            }
            Err(error) => {
                tracing::debug!("stdout: {error}");
                self.gone.take().into_iter().for_each(|gone| gone());
                Ok(data.len())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// For descriptors that whoever started us has made non-blocking.
fn wait_until_ready(descriptor: BorrowedFd<'_>, event: PollFlags) {
    // Whatever goes wrong here shows again in the read or write that follows.
    _ = poll(&mut [PollFd::from_borrowed_fd(descriptor, event)], None);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(typed: &[&[u8]]) -> (Vec<u8>, Vec<Command>) {
        let (mut filter, mut passed, mut commands) = (EscapeFilter::default(), Vec::new(), Vec::new());
        for part in typed {
            commands.extend(filter.filter(part, &mut passed));
        }
        (passed, commands)
    }

    #[test]
    fn plain_bytes_pass() {
        assert_eq!(filter(&[b"ls\r", &[0, 3, 255]]), (b"ls\r\x00\x03\xff".to_vec(), vec![]));
    }

    #[test]
    fn escape_sequences_are_commands_even_when_split() {
        assert_eq!(filter(&[b"a\x01xb"]), (b"ab".to_vec(), vec![Command::End]));
        assert_eq!(filter(&[b"a\x01", b"hb"]), (b"ab".to_vec(), vec![Command::Help]));
    }

    #[test]
    fn escape_twice_sends_it() {
        assert_eq!(filter(&[b"\x01\x01x"]), (b"\x01x".to_vec(), vec![]));
    }

    #[test]
    fn an_unknown_sequence_is_dropped() {
        assert_eq!(filter(&[b"a\x01qb"]), (b"ab".to_vec(), vec![]));
    }
}
