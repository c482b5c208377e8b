//! The terminal on stdin: raw while a guest owns it, and as it was before whenever Ringer does not run.
//!
//! The mode to go back to is kept in one global, because a panic hook and the signal thread need it too.

use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

use crate::cleanup::{self, Guard};

/// The modes of a terminal that [`make_raw`] has changed.
struct Modes {
    original: Termios,
    raw: Termios,
    /// Which of the two is in force.
    is_raw: bool,
}

static MODES: Mutex<Option<Modes>> = Mutex::new(None);

fn modes() -> MutexGuard<'static, Option<Modes>> {
    MODES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the terminal on stdin raw until the guard goes. `None` where stdin is no terminal.
pub fn make_raw() -> io::Result<Option<Guard>> {
    if !isatty(stdin()) {
        return Ok(None);
    }
    let original = tcgetattr(stdin())?;
    let mut raw = original.clone();
    raw.make_raw();
    let guard = cleanup::register(restore);
    tcsetattr(stdin(), OptionalActions::Flush, &raw)?;
    *modes() = Some(Modes { original, raw, is_raw: true });
    Ok(Some(guard))
}

/// Gives the terminal its original mode, for good. Without effect when it is not raw.
pub fn restore() {
    suspend();
    modes().take();
}

/// Gives the terminal its original mode until [`resume`].
pub fn suspend() {
    if let Some(modes) = modes().as_mut().filter(|modes| modes.is_raw) {
        // If the terminal has gone, there is nothing left to restore.
        _ = tcsetattr(stdin(), OptionalActions::Drain, &modes.original);
        modes.is_raw = false;
    }
}

/// Makes the terminal raw again after [`suspend`].
pub fn resume() {
    if let Some(modes) = modes().as_mut().filter(|modes| !modes.is_raw) {
        modes.is_raw = tcsetattr(stdin(), OptionalActions::Drain, &modes.raw).is_ok();
    }
}

/// Stderr, for lines that may be written while the terminal is raw and does not return the carriage by itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let is_raw = modes().as_ref().is_some_and(|modes| modes.is_raw);
        let mut stderr = io::stderr().lock();
        for (index, line) in data.split(|&byte| byte == b'\n').enumerate() {
            if index > 0 {
                stderr.write_all(if is_raw { b"\r\n" } else { b"\n" })?;
            }
            stderr.write_all(line)?;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
