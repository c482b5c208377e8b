//! Reading files straight into guest memory, and writing them from there.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// The most pieces that the kernel takes at once (IOV_MAX).
const MOST_PIECES: usize = 1024;

/// Reads from `offset` of `file` into `slices`, one after the other, until they are full or the file has ended. Returns
/// how many bytes it were. What was written is reported to the slices' bitmaps.
pub fn read_at<B: BitmapSlice>(file: &File, slices: &[VolatileSlice<'_, B>], offset: u64) -> io::Result<usize> {
    read_with(file, slices, offset, 0)
}

/// The same, but only of what can be had without waiting for a disk: less than all of it may be there, or nothing (an error
/// of the kind `WouldBlock`). Where the file system doesn't know, it is read all the same.
pub fn read_cached_at<B: BitmapSlice>(file: &File, slices: &[VolatileSlice<'_, B>], offset: u64) -> io::Result<usize> {
    match read_with(file, slices, offset, libc::RWF_NOWAIT) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => read_with(file, slices, offset, 0),
        other => other,
    }
}

fn read_with<B: BitmapSlice>(
    file: &File,
    slices: &[VolatileSlice<'_, B>],
    offset: u64,
    flags: libc::c_int,
) -> io::Result<usize> {
    let mut total = 0;
    let result = transfer(slices, offset, |pieces, offset| {
        let done = retry(|| {
            // SAFETY: each piece lies in memory that its slice keeps mapped, and nothing in this process takes that
            // memory for ordinary Rust data: it is the guest's, volatile to us.
            unsafe { libc::preadv2(file.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int, offset, flags) }
        })?;
        total += done;
        Ok(done)
    });
    // Also what was read before an error.
    for slice in slices {
        let written = total.min(slice.len());
        slice.bitmap().mark_dirty(0, written);
        total -= written;
    }
    result
}

/// Writes `slices`, one after the other, to `file` from `offset` on. Returns how many bytes it were: all of them.
pub fn write_at<B: BitmapSlice>(file: &File, slices: &[VolatileSlice<'_, B>], offset: u64) -> io::Result<usize> {
    transfer(slices, offset, |pieces, offset| {
        let done = retry(|| {
            // SAFETY: as in `read_at`; the kernel only reads here.
            unsafe { libc::pwritev(file.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int, offset) }
        })?;
        if done == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(done) }
    })
}

/// Calls `step` until everything is transferred or it transfers nothing.
fn transfer<B: BitmapSlice>(
    slices: &[VolatileSlice<'_, B>],
    offset: u64,
    mut step: impl FnMut(&[libc::iovec], libc::off_t) -> io::Result<usize>,
) -> io::Result<usize> {
    let guards: Vec<_> = slices.iter().map(|slice| slice.ptr_guard_mut()).collect();
    let mut pieces: Vec<libc::iovec> = guards
        .iter()
        .filter(|guard| guard.len() > 0)
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
        .collect();
    let (mut first, mut total) = (0, 0usize);
    while first < pieces.len() {
        let at = offset.checked_add(total as u64).and_then(|at| libc::off_t::try_from(at).ok());
        let at = at.ok_or(io::ErrorKind::InvalidInput)?;
        let mut done = step(&pieces[first..pieces.len().min(first + MOST_PIECES)], at)?;
        if done == 0 {
            break;
        }
        total += done;
        while let Some(piece) = pieces.get_mut(first).filter(|_| done > 0) {
            let taken = done.min(piece.iov_len);
            // In bounds: `taken` is at most what is left of the piece.
            piece.iov_base = piece.iov_base.wrapping_byte_add(taken);
            piece.iov_len -= taken;
            done -= taken;
            first += usize::from(piece.iov_len == 0);
        }
    }
    Ok(total)
}

fn retry(call: impl Fn() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(done) => return Ok(done),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ram;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    #[test]
    fn files_go_into_ram_and_back_with_every_page_marked() {
        let ram = Ram::new(4 << 20).unwrap();
        let file = super::super::memfd(10_000).unwrap();
        let slice = |address, length| ram.view().get_slice(GuestAddress(address), length).unwrap();
        ram.view().write_slice(&[7; 3000], GuestAddress(0x1000)).unwrap();
        assert_eq!(write_at(&file, &[slice(0x1000, 1000), slice(0x1000, 2000)], 7500).unwrap(), 3000);
        assert_eq!(file.metadata().unwrap().len(), 10_500);
        let into: Vec<_> = (0..2000).map(|n| slice(0x10_0ff0 + 3 * n, 3)).collect();
        assert_eq!(read_at(&file, &into, 6500).unwrap(), 4000);
        let mut data = [1; 6000];
        ram.view().read_slice(&mut data, GuestAddress(0x10_0ff0)).unwrap();
        assert!(data[..1000].iter().all(|b| *b == 0) && data[1000..4000].iter().all(|b| *b == 7));
        assert_eq!(read_cached_at(&file, &[slice(0x20_0000, 4000)], 7500).unwrap(), 3000);
        assert!(ram.tracker().is_dirty(0x200) && !ram.tracker().is_dirty(0x201));
        assert!(ram.tracker().is_dirty(0x100) && ram.tracker().is_dirty(0x101) && !ram.tracker().is_dirty(0x102));
    }

    #[test]
    fn offsets_that_no_file_has_are_refused() {
        let ram = Ram::new(4 << 20).unwrap();
        let file = super::super::memfd(1).unwrap();
        let slice = ram.view().get_slice(GuestAddress(0), 1).unwrap();
        assert!(read_at(&file, &[slice], u64::MAX).is_err());
    }
}
