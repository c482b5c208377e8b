//! Locks of image files, in the way of QEMU, so that it and its tools and Ringer keep one another out.
//!
//! Whoever uses an image holds shared locks on single bytes that mean "I do this" and "nobody else may do this", and then
//! looks whether somebody else's locks contradict (QEMU, block/file-posix.c). The locks belong to the open file (OFD
//! locks, fcntl(2)): they go when it is closed, also by the death of the process.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK, flock};

/// How long an image's last user may take to go.
const PATIENCE: Duration = Duration::from_millis(200);

/// What is done with an image: bytes 100 up say that it is, bytes 200 up that others may not.
const DONE: i64 = 100;
const FORBIDDEN: i64 = 200;
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Locks against writers, and as a writer if `write`, until the file is closed. False: somebody else is using it.
pub fn lock(file: &File, write: bool) -> io::Result<bool> {
    let done: &[i64] = if write { &[READ, WRITE, RESIZE] } else { &[READ] };
    let forbidden = &[WRITE, RESIZE];
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut free = true;
        for byte in done.iter().map(|what| DONE + what).chain(forbidden.iter().map(|what| FORBIDDEN + what)) {
            match fcntl(file, FcntlArg::F_OFD_SETLK(&range(F_RDLCK, byte))) {
                Ok(_) => {}
                Err(Errno::EAGAIN | Errno::EACCES) => free = false,
                // A file system without locks.
                Err(Errno::EINVAL | Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS) => return Ok(true),
                Err(error) => return Err(error.into()),
            }
        }
        for byte in done.iter().map(|what| FORBIDDEN + what).chain(forbidden.iter().map(|what| DONE + what)) {
            let mut other = range(F_WRLCK, byte);
            fcntl(file, FcntlArg::F_OFD_GETLK(&mut other))?;
            free &= i32::from(other.l_type) == F_UNLCK;
        }
        if free || Instant::now() > deadline {
            return Ok(free);
        }
        fcntl(file, FcntlArg::F_OFD_SETLK(&flock { l_len: 0, ..range(F_UNLCK, 0) }))?;
        thread::sleep(PATIENCE / 20);
    }
}

/// Whether this process has the same file open elsewhere: then it keeps itself out.
pub fn used_here(file: &File) -> bool {
    let Ok(metadata) = file.metadata() else { return false };
    let (own, identity) = (file.as_raw_fd().to_string(), (metadata.dev(), metadata.ino()));
    let same = |entry: fs::DirEntry| {
        // Where the link leads, for what a descriptor is of.
        let other = fs::metadata(entry.path()).map(|other| (other.dev(), other.ino()));
        entry.file_name() != *own && other.is_ok_and(|other| other == identity)
    };
    fs::read_dir("/proc/self/fd").is_ok_and(|entries| entries.flatten().any(same))
}

/// One byte.
fn range(kind: i32, byte: i64) -> flock {
    flock { l_type: kind as i16, l_whence: nix::libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}
