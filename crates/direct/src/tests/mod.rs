//! What a space does, shown by small programs that run in one.

mod code;
mod mapping;
mod process;
mod registers;
mod stops;

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd};
use std::os::unix::fs::FileExt;

use crate::{PAGE_SIZE, Protection, Registers, Space, Stop};

/// Where test programs run, and where they have data.
const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x7000_0000_0000;

/// Guest RAM.
struct Ram(File);

impl Ram {
    fn new(pages: u64) -> Ram {
        // SAFETY: the name is a C string; the descriptor that comes back is new, and of nobody else.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"ram".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(pages * PAGE_SIZE).unwrap();
        Ram(file)
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        self.0.write_all_at(bytes, offset).unwrap();
    }

    fn word(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, offset).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn space(&self) -> Space {
        Space::new(self.0.as_fd()).unwrap()
    }

    /// A space with a program at [`CODE`], in the RAM's first page, and its other pages at [`DATA`].
    fn program(&self, code: &[u8]) -> Space {
        self.write(0, code);
        let mut space = self.space();
        space.map(CODE, PAGE_SIZE, 0, Protection::ReadExecute);
        let data = self.0.metadata().unwrap().len() - PAGE_SIZE;
        space.map(DATA, data, PAGE_SIZE, Protection::ReadWrite);
        space
    }
}

/// The registers of user code on Linux, at [`CODE`].
fn registers() -> Registers {
    // SAFETY: it is integers only.
    let zero: Registers = unsafe { std::mem::zeroed() };
    Registers { rip: CODE, rsp: DATA + 0x800, cs: 0x33, ss: 0x2b, eflags: 0x202, ..zero }
}

/// Runs a program of its own space until it stops.
fn stop_of(code: &[u8]) -> (Stop, Registers) {
    let mut registers = registers();
    let stop = Ram::new(2).program(code).run(&mut registers).unwrap();
    (stop, registers)
}
