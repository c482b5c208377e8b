//! What lies in a drive whose medium can be changed while the machine runs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::Disk;

/// Why a medium can't be taken or put.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MediaError {
    #[error("the guest has locked the drive; it was told that you want the medium (to take it anyway, force it)")]
    Locked,
}

/// A drive's tray or slot: shared by the drive and the user.
pub struct Media {
    state: Mutex<State>,
}

struct State {
    disk: Option<Arc<Disk>>,
    open: bool,
    /// The guest wants it to stay.
    locked: bool,
    /// Counts what was put in and taken out.
    changes: u64,
    /// The user has pressed the button of a locked drive.
    eject_requested: bool,
}

impl Media {
    pub fn new(disk: Option<Arc<Disk>>) -> Arc<Self> {
        let state = State { disk, open: false, locked: false, changes: 0, eject_requested: false };
        Arc::new(Media { state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the medium out, as by the drive's button. `force`: also if the guest has locked the drive.
    pub fn eject(&self, force: bool) -> Result<(), MediaError> {
        self.replace(None, force)
    }

    /// Puts another medium in.
    pub fn insert(&self, disk: Arc<Disk>, force: bool) -> Result<(), MediaError> {
        self.replace(Some(disk), force)
    }

    fn replace(&self, disk: Option<Arc<Disk>>, force: bool) -> Result<(), MediaError> {
        let mut state = self.lock();
        if state.locked && !force && state.disk.is_some() {
            state.eject_requested = true;
            return Err(MediaError::Locked);
        }
        state.open = disk.is_none();
        let old = std::mem::replace(&mut state.disk, disk);
        state.changes += 1;
        state.eject_requested = false;
        drop(state);
        // An image is closed without the lock: that may take time.
        drop(old);
        Ok(())
    }

    /// The medium, if one is there and the tray is closed.
    pub(crate) fn disk(&self) -> Option<Arc<Disk>> {
        let state = self.lock();
        state.disk.clone().filter(|_| !state.open)
    }

    /// Whether there is a medium, whatever the tray does.
    pub fn is_loaded(&self) -> bool {
        self.lock().disk.is_some()
    }

    pub(crate) fn is_open(&self) -> bool {
        self.lock().open
    }

    pub(crate) fn is_locked(&self) -> bool {
        self.lock().locked
    }

    pub(crate) fn set_locked(&self, locked: bool) {
        let mut state = self.lock();
        state.locked = locked;
        state.eject_requested &= locked;
    }

    /// The guest moves the tray. What it opens it can close again: the medium lies in it.
    pub(crate) fn set_open(&self, open: bool) {
        let mut state = self.lock();
        if state.open != open {
            state.open = open;
            state.changes += u64::from(state.disk.is_some());
        }
    }

    pub(crate) fn changes(&self) -> u64 {
        self.lock().changes
    }

    pub(crate) fn take_eject_request(&self) -> bool {
        std::mem::take(&mut self.lock().eject_requested)
    }
}
