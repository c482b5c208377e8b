//! Names for emitted code, in the file where Linux `perf` looks for them: `/tmp/perf-PID.map`.
//!
//! A block is called `guest:` and its guest address. After the translation cache was reset an address may appear twice;
//! `perf` takes one of them.

use std::fs::File;
use std::io::{self, LineWriter, Write};

/// The open file of one vCPU.
pub struct PerfMap(LineWriter<File>);

impl PerfMap {
    pub fn open() -> io::Result<Self> {
        let path = format!("/tmp/perf-{}.map", std::process::id());
        let file = File::options().append(true).create(true).open(path)?;
        Ok(PerfMap(LineWriter::new(file)))
    }

    /// Names `length` bytes at a host address after the guest address they were translated from.
    pub fn add(&mut self, host: u64, length: usize, guest: u64) {
        // A full disk costs the names, not the machine.
        let _ = writeln!(self.0, "{host:x} {length:x} guest:{guest:x}");
    }
}
