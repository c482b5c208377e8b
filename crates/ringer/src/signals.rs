//! What signals to the process do: end it with everything undone, or stop and continue it with a usable terminal.
//!
//! Only signals that come from outside are handled, on a thread of their own. Those that faults raise belong to the
//! engines.

use std::io;

use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use crate::{cleanup, terminal};

/// Starts the thread that handles signals, and restores the terminal before a panic is reported.
pub fn install() -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGTSTP, SIGCONT])?;
    wake::thread("signals").spawn(move || {
        for signal in signals.forever() {
            match signal {
                SIGTSTP => {
                    terminal::suspend();
                    // Stops the whole process here until SIGCONT. Fails only for signals that don't exist.
                    _ = emulate_default_handler(SIGTSTP);
                }
                SIGCONT => terminal::resume(),
                ending => {
                    cleanup::run_all();
                    _ = emulate_default_handler(ending);
                }
            }
        }
    })?;
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        terminal::restore();
        report(panic);
    }));
    Ok(())
}
