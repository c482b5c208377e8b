//! Why a space can't be made or used.

use std::io;
use std::process::ExitStatus;

/// The errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host forbids or lacks what direct execution needs. It will not be otherwise with the next space.
    #[error("this host doesn't let guest code run directly: {step}: {source}")]
    Host { step: &'static str, source: io::Error },
    /// The process has been killed from outside (by a person, or for want of memory). A new space may work.
    #[error("the process that ran guest code is gone ({0})")]
    Gone(ExitStatus),
    /// The process has as many mappings as the host allows (`vm.max_map_count`). What was asked for and not yet done is
    /// forgotten; `unmap_all` makes the space usable again.
    #[error("a process that runs guest code has as many mappings as the host allows (vm.max_map_count)")]
    Full,
    /// The host refused to change a mapping. What was asked for and not yet done is forgotten.
    #[error("the host refused to {what} {length:#x} bytes at {address:#x} for guest code: {source}")]
    Mapping { what: &'static str, address: u64, length: u64, source: io::Error },
    /// Pages that no space can have: not whole ones, above the user addresses, or `RESERVED`.
    #[error("{length:#x} bytes at {address:#x} can't be mapped for guest code")]
    Range { address: u64, length: u64 },
    /// Registers that a process of the host can't have, as a segment base in the kernel's half.
    #[error("guest code can't run directly with these registers: {0}")]
    Registers(&'static str),
    /// The calls of ptrace work only on the thread that made the space.
    #[error("a process that runs guest code was used by a thread that has not made it")]
    Thread,
    /// A call of ptrace that ought to work did not.
    #[error("can't {what} of the process that runs guest code: {source}")]
    Trace { what: &'static str, source: io::Error },
}

impl Error {
    /// For `map_err` on one of the steps that make a space.
    pub(crate) fn host(step: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Host { step, source }
    }
}
