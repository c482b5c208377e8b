//! How other threads make a space stop.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The signal that stops guest code. It never arrives: its stop is all that is wanted. It does not queue, so kicks that
/// nobody has taken yet are one.
pub(crate) const SIGNAL: i32 = libc::SIGUSR1;

/// Stops a space's guest code, from any thread.
///
/// [`Space::run`](crate::Space::run) returns [`Stop::Kicked`](crate::Stop::Kicked), at once if it is called later. If the
/// space is gone, nothing happens.
#[derive(Clone, Debug)]
pub struct Kicker {
    process: Arc<OwnedFd>,
}

impl Kicker {
    /// For the process behind this pidfd, which names it even when its number belongs to another one.
    pub(crate) fn new(process: Arc<OwnedFd>) -> Self {
        Self { process }
    }

    /// Stops the guest code.
    pub fn kick(&self) {
        send(&self.process, SIGNAL);
    }
}

/// The place of a kicker: one thread puts it in and takes it out, all others kick whatever is in it.
///
/// [`KickSlot::kick`] is async-signal-safe. A kicker that has been taken out is not kicked any more.
#[derive(Debug, Default)]
pub struct KickSlot {
    /// The address of the kicker's descriptor (`Arc::into_raw`), shifted by [`COUNT`] bits, and how many threads are
    /// about to use it.
    state: AtomicU64,
}

/// How many bits of a slot's state are the count. User addresses have 47 bits, so 16 are left.
const COUNT: u32 = 16;

impl KickSlot {
    /// Puts a kicker in, in place of the one that is there.
    pub fn put(&self, kicker: Kicker) {
        self.take();
        let address = Arc::into_raw(kicker.process) as u64;
        self.state.fetch_add(address << COUNT, Ordering::SeqCst);
    }

    /// Takes the kicker out, if there is one, and waits for threads that are just using it.
    pub fn take(&self) {
        let state = self.state.fetch_and((1 << COUNT) - 1, Ordering::SeqCst);
        let address = (state >> COUNT) as *const OwnedFd;
        if address.is_null() {
            return;
        }
        while self.state.load(Ordering::SeqCst) != 0 {
            std::thread::yield_now();
        }
        // SAFETY: `put` made the address, and this call alone has taken it out. Who had seen it has left, as the count has
        // been zero since.
        drop(unsafe { Arc::from_raw(address) });
    }

    /// Kicks the space whose kicker is in the slot, if there is one.
    pub fn kick(&self) {
        let state = self.state.fetch_add(1, Ordering::SeqCst);
        // SAFETY: whoever takes the kicker out waits for the count before it drops it.
        if let Some(process) = unsafe { ((state >> COUNT) as *const OwnedFd).as_ref() } {
            send(process, SIGNAL);
        }
        self.state.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for KickSlot {
    fn drop(&mut self) {
        self.take();
    }
}

/// Sends a signal to the process of a pidfd, if there still is one.
pub(crate) fn send(process: &OwnedFd, signal: i32) {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: no memory is passed: the information of the signal is left to the kernel. errno is this thread's own; it
    // stays what it was, as a handler of a signal may be what calls.
    unsafe {
        let errno = *libc::__errno_location();
        libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), signal, none, 0);
        *libc::__errno_location() = errno;
    }
}
