//! Ringer's command line: parses, prints, exits.
//!
//! The data flow to follow: [`main`] parses ([`cli`]) and calls [`run`], which takes the kernel that was named or the
//! default [`guest`], makes a machine of it, and joins the machine's first serial port with stdin and stdout
//! ([`console`], [`terminal`]). However the process ends, [`cleanup`] and [`signals`] leave nothing behind.
//!
//! It is a library besides a program so that its tests can make guests.
#![forbid(unsafe_code)]

/// Tells the user something on stderr, if anybody reads that.
macro_rules! say {
    ($($arguments:tt)*) => {{
        use std::io::Write as _;
        _ = writeln!(std::io::stderr(), $($arguments)*);
    }};
}

mod boot_order;
pub mod cleanup;
mod cli;
mod console;
mod control;
mod debian;
mod devices;
mod disk;
mod disk_boot;
mod firmware;
pub mod guest;
mod image;
mod net;
mod run;
mod screen;
mod seed;
mod signals;
mod terminal;
mod units;

use std::process::ExitCode;

use cli::Command;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// The whole program.
pub fn main() -> ExitCode {
    let cli = match cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(status) => return status.into(),
    };
    start_logging(cli.verbose);
    // The panic hook has reported a panic by the time it arrives here.
    let result = std::panic::catch_unwind(|| {
        signals::install().map_err(run::Error::Signals)?;
        match cli.command {
            Command::Run(args) => Ok(run::run(*args)?),
            Command::Image(command) => {
                image::run(&command)?;
                Ok::<u8, Box<dyn std::error::Error>>(0)
            }
        }
    });
    cleanup::wait_if_ending();
    match result {
        Ok(Ok(status)) => status.into(),
        Ok(Err(error)) => {
            say!("ringer: {error}");
            ExitCode::FAILURE
        }
        Err(_) => ExitCode::FAILURE,
    }
}

fn start_logging(verbosity: u8) {
    let level = match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    // The library for qcow2 says errors twice: what it returns is reported where it matters.
    let library = if verbosity == 0 { LevelFilter::OFF } else { level };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(|| terminal::Stderr)
        .finish()
        .with(Targets::new().with_default(level).with_target("imago", library))
        .init();
}
