//! `cargo xtask`: proofs that need machines of their own.
//!
//! `cargo xtask nested` shows the kvm engine on hardware virtualization where there is none: QEMU's TCG emulates AMD-V, in
//! which Debian's kernel with KVM is the host and `ringer run --accel kvm` the monitor; a script that is
//! named runs there instead. `cargo xtask conformance` runs the bare-metal guests of `difftest` on every engine of this host
//! and compares; `cargo xtask figures` measures start and memory on this host's KVM.
#![forbid(unsafe_code)]

mod build;
mod conformance;
mod exceptions;
mod figures;
mod grub;
mod host;
mod kernels;
mod nested;

use std::path::Path;
use std::process::ExitCode;

/// Why a proof was not given.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
    #[error(transparent)]
    Guest(#[from] ringer::guest::Error),
    #[error("{0}")]
    Failed(String),
}

impl Error {
    /// For `map_err` on what was tried.
    fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
        let what = what.into();
        move |source| Error::Io { what, source }
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments[..] {
        ["nested"] => nested::run(None),
        ["nested", script] => nested::run(Some(Path::new(script))),
        ["conformance"] => conformance::run(),
        ["figures"] => figures::run(),
        _ => {
            eprintln!("usage: cargo xtask nested [SCRIPT]|conformance|figures");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}
