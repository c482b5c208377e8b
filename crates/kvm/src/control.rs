//! Getting a vCPU out of the guest from another thread.
//!
//! Two things do it together: `immediate_exit` in the page that the kernel shares with us, which makes the next
//! `KVM_RUN` return at once, and a signal, which ends the present one. Set in this order, no request falls in between.

use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

/// What other threads reach of a vCPU.
pub struct Control {
    stop: AtomicBool,
    place: Mutex<Place>,
}

struct Place {
    /// The address of `immediate_exit`; 0 once the vCPU is gone.
    immediate_exit: usize,
    /// The thread that is in `Vcpu::run`.
    thread: Option<libc::pid_t>,
}

/// The signal that ends `KVM_RUN`. The translator's timers have the first of the real-time ones.
fn signal() -> i32 {
    libc::SIGRTMIN() + 1
}

extern "C" fn on_signal(_: i32) {}

impl Control {
    /// `immediate_exit` is in the vCPU's shared page, which stays until [`Control::vcpu_gone`].
    pub fn new(immediate_exit: *mut u8) -> Self {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            // SAFETY: a zeroed sigaction is valid; the handler does nothing. SA_RESTART, so that system calls of
            // devices go on; KVM_RUN returns EINTR all the same.
            unsafe {
                let mut action: libc::sigaction = mem::zeroed();
                action.sa_sigaction = on_signal as extern "C" fn(i32) as usize;
                action.sa_flags = libc::SA_RESTART;
                libc::sigaction(signal(), &raw const action, ptr::null_mut());
            }
        });
        let place = Place { immediate_exit: immediate_exit as usize, thread: None };
        Control { stop: AtomicBool::new(false), place: Mutex::new(place) }
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_immediate_exit(place: &Place, value: u8) {
        if place.immediate_exit != 0 {
            // SAFETY: the byte lies in the vCPU's shared page, mapped until `vcpu_gone` clears the address, which takes
            // the same lock. Kernel and threads access it as an atomic byte.
            unsafe { AtomicU8::from_ptr(place.immediate_exit as *mut u8) }.store(value, Ordering::SeqCst);
        }
    }

    /// Makes the present or next `KVM_RUN` return.
    pub fn kick(&self) {
        let place = self.place();
        Self::set_immediate_exit(&place, 1);
        if let Some(thread) = place.thread {
            // SAFETY: plain system calls; the thread is in `run`, for it takes the lock to leave.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }

    /// After `KVM_RUN` has returned for a kick: whether it was to stop. Another kick from now on counts for the next.
    pub fn take_kick(&self) -> bool {
        Self::set_immediate_exit(&self.place(), 0);
        self.stop.swap(false, Ordering::SeqCst)
    }

    /// Makes the calling thread's next `KVM_RUN` return at once, for what has to be completed.
    pub fn kick_self(&self) {
        Self::set_immediate_exit(&self.place(), 1);
    }

    /// After [`Control::kick_self`]: other kicks that came before and meanwhile still count.
    pub fn unkick(&self) {
        let place = self.place();
        if !self.is_stopping() {
            Self::set_immediate_exit(&place, 0);
        }
    }

    pub fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// The calling thread begins to run the vCPU.
    pub fn enter(&self) {
        // SAFETY: takes nothing, can't fail.
        let thread = unsafe { libc::syscall(libc::SYS_gettid) } as libc::pid_t;
        self.place().thread = Some(thread);
    }

    pub fn leave(&self) {
        self.place().thread = None;
    }

    /// The shared page is about to be unmapped.
    pub fn vcpu_gone(&self) {
        *self.place() = Place { immediate_exit: 0, thread: None };
    }
}

impl engine::VcpuControl for Control {
    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.kick();
    }
}
