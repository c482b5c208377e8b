//! What is to be done inside the process before guest code runs again: a list of system calls, and the memory in which
//! the stub finds it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::ptr::NonNull;

use crate::process::RAM;
use crate::{PAGE_SIZE, cpuid, stub};

/// Where the process has the list, read-only.
pub const ADDRESS: u64 = stub::CODE + PAGE_SIZE;
/// How long that memory is, in bytes.
pub const SIZE: usize = 4 * PAGE_SIZE as usize;
/// How long an operation is: a power of two, so that none straddles two pages.
pub const OPERATION: usize = 64;
/// How many operations one batch has at most.
pub const CAPACITY: usize = SIZE / OPERATION;

/// Mappings up to this length, a guest's large page, are filled when they are made (0.2 µs a page, where a fault at each
/// page's first store is 1 µs). Longer ones are not: it would take long, and each page that nobody has ever touched would
/// get memory of the host.
const POPULATE: u64 = 512 * PAGE_SIZE;

/// What guest code may do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    Read,
    ReadWrite,
    ReadExecute,
}

impl Protection {
    /// As `mmap` takes it.
    fn bits(self) -> i32 {
        match self {
            Protection::Read => libc::PROT_READ,
            Protection::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
            Protection::ReadExecute => libc::PROT_READ | libc::PROT_EXEC,
        }
    }
}

/// A change of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Map {
        address: u64,
        length: u64,
        offset: u64,
        protection: Protection,
    },
    Unmap {
        address: u64,
        length: u64,
    },
    /// CPUID faults from now on, or works.
    Cpuid {
        faults: bool,
    },
    /// The same for RDTSC and RDTSCP.
    Tsc {
        faults: bool,
    },
}

impl Operation {
    /// What to call it, where it failed.
    pub fn name(&self) -> &'static str {
        match self {
            Operation::Map { .. } => "map",
            Operation::Unmap { .. } => "unmap",
            Operation::Cpuid { .. } => "switch CPUID for",
            Operation::Tsc { .. } => "switch the time-stamp counter for",
        }
    }

    /// The address and the length it is about.
    pub fn range(&self) -> (u64, u64) {
        match *self {
            Operation::Map { address, length, .. } | Operation::Unmap { address, length } => (address, length),
            Operation::Cpuid { .. } | Operation::Tsc { .. } => (0, 0),
        }
    }

    /// The system call.
    fn call(&self) -> Call {
        match *self {
            Operation::Map { address, length, offset, protection } => {
                let populate = if length <= POPULATE { libc::MAP_POPULATE } else { 0 };
                let flags = libc::MAP_SHARED | libc::MAP_FIXED | populate;
                let words = [address, length, protection.bits() as u64, flags as u64, RAM as u64, offset];
                Call { number: libc::SYS_mmap, words }
            }
            Operation::Unmap { address, length } => {
                Call { number: libc::SYS_munmap, words: [address, length, 0, 0, 0, 0] }
            }
            Operation::Cpuid { faults } => {
                let words = [cpuid::ARCH_SET_CPUID as u64, u64::from(!faults), 0, 0, 0, 0];
                Call { number: libc::SYS_arch_prctl, words }
            }
            Operation::Tsc { faults } => {
                let how = if faults { libc::PR_TSC_SIGSEGV } else { libc::PR_TSC_ENABLE };
                Call { number: libc::SYS_prctl, words: [libc::PR_SET_TSC as u64, how as u64, 0, 0, 0, 0] }
            }
        }
    }

    /// Takes `next`, if both can be one operation.
    fn extend(&mut self, next: &Operation) -> bool {
        match (self, next) {
            (
                Operation::Map { address, length, offset, protection },
                Operation::Map { address: at, length: more, offset: from, protection: same },
            ) if *at == *address + *length && *from == *offset + *length && protection == same => *length += more,
            (Operation::Unmap { address, length }, Operation::Unmap { address: at, length: more })
                if *at == *address + *length =>
            {
                *length += more
            }
            _ => return false,
        }
        true
    }
}

/// What has been asked for, in order.
#[derive(Debug, Default)]
pub struct Pending {
    operations: Vec<Operation>,
}

impl Pending {
    /// Adds one at the end, as a part of the last one if that fits. The ranges have been checked: no sum overflows.
    pub fn push(&mut self, operation: Operation) {
        if self.operations.last_mut().is_some_and(|last| last.extend(&operation)) {
            return;
        }
        self.operations.push(operation);
    }

    pub fn is_empty(&self) -> bool {
        self.operations.is_empty()
    }

    pub fn clear(&mut self) {
        self.operations.clear();
    }

    /// The operations, as many at a time as one batch takes.
    pub fn batches(&self) -> impl Iterator<Item = &[Operation]> {
        self.operations.chunks(CAPACITY)
    }
}

// SAFETY: the memory belongs to this list alone, and can be unmapped by any thread.
unsafe impl Send for List {}

/// A system call as the stub finds it in the list.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub number: libc::c_long,
    pub words: [u64; 6],
}

/// The memory of the list: the monitor writes it, the process reads it.
pub struct List {
    file: File,
    memory: NonNull<u8>,
}

impl List {
    pub fn new() -> io::Result<Self> {
        // SAFETY: the name is a C string; the descriptor that comes back is new, and of nobody else.
        let file = unsafe {
            match libc::memfd_create(c"ringer-direct-operations".as_ptr(), libc::MFD_CLOEXEC) {
                -1 => return Err(io::Error::last_os_error()),
                descriptor => File::from_raw_fd(descriptor),
            }
        };
        file.set_len(SIZE as u64)?;
        // SAFETY: a new mapping at an address of the kernel's choice takes no other memory's place.
        let memory = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), SIZE, access, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self { file, memory })
    }

    /// Writes calls from the list's beginning on, and says how many it took.
    pub fn write(&mut self, calls: impl Iterator<Item = Call>) -> u64 {
        let mut count = 0;
        for (index, call) in calls.take(CAPACITY).enumerate() {
            let words = [[call.number as u64, call.words[0]], [call.words[1], call.words[2]]];
            let rest = [[call.words[3], call.words[4]], [call.words[5], 0]];
            self.put(index * OPERATION, [words, rest].as_flattened().as_flattened());
            count += 1;
        }
        count
    }

    /// Writes operations.
    pub fn write_operations(&mut self, operations: &[Operation]) -> u64 {
        self.write(operations.iter().map(Operation::call))
    }

    /// Writes words at a byte offset, and says where the process sees them.
    pub fn put(&mut self, offset: usize, words: &[u64]) -> u64 {
        assert!(offset.is_multiple_of(8) && offset + size_of_val(words) <= SIZE, "the list has no such place");
        for (index, word) in words.iter().enumerate() {
            // SAFETY: within the mapping (asserted above) and aligned. The process reads it only while the stub runs,
            // which this thread starts after it has written; other threads have no reference to it.
            unsafe { self.memory.cast::<u64>().add(offset / 8 + index).write_volatile(*word) };
        }
        ADDRESS + offset as u64
    }
}

impl AsFd for List {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made, of which no reference is left.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), SIZE) };
    }
}
