//! Shared directory: a file system device (virtio 1.2, 5.11), which Linux mounts by
//! `mount -t virtiofs TAG DIRECTORY`.
//!
//! Requests are FUSE messages ([`wire`]), answered by [`server`] on the device's thread; file contents go between guest
//! memory and the host's files without a copy in between. Debian's kernels have virtio-fs, while 9p is missing from
//! its cloud kernel: so this is the one way to share.
//!
//! What the guest may do is what Ringer's own process may do below the directory, and less: it can't leave the directory
//! ([`nodes`]), make devices or set-user-ID programs, or use other extended attributes than `user.` ones ([`xattr`]). If Ringer runs as root, files get the owner that the guest gives them;
//! else all belong to the user who runs it.

mod nodes;
mod server;
mod wire;
mod xattr;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::serve::serve;
use crate::{Activation, DeviceType, Error, VirtioDevice, Worker};
use nodes::Nodes;
use server::Server;

/// The longest tag in bytes.
pub const MAX_TAG: usize = 36;
/// A request of the largest size has a descriptor for each page.
const QUEUE_SIZE: u16 = 1024;

/// A shared directory on the PCI bus.
pub struct FileSystem {
    tag: [u8; MAX_TAG],
    server: Arc<Server>,
    workers: Mutex<Vec<Worker>>,
}

/// Why a directory can't be shared.
#[derive(Debug, thiserror::Error)]
#[error("can't share {}: {source}", path.display())]
pub struct ShareError {
    pub path: PathBuf,
    pub source: std::io::Error,
}

impl FileSystem {
    /// Shares the directory at `path` by the name `tag`, of which 36 bytes count.
    pub fn new(path: &Path, tag: &str, read_only: bool) -> Result<Self, ShareError> {
        let nodes =
            Nodes::new(path, most_files()).map_err(|source| ShareError { path: path.into(), source: source.into() })?;
        let mut bytes = [0; MAX_TAG];
        bytes.iter_mut().zip(tag.bytes()).for_each(|(to, from)| *to = from);
        Ok(FileSystem { tag: bytes, server: Arc::new(Server::new(nodes, read_only)), workers: Mutex::default() })
    }
}

/// How many files the driver may know: each is a descriptor. Half of what the process may have is left for all else.
fn most_files() -> usize {
    let limit = getrlimit(Resource::Nofile);
    // Where the limit can't be raised, it stays what it is.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let current = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
    (current.min(1 << 20) / 2) as usize
}

impl VirtioDevice for FileSystem {
    fn device_type(&self) -> DeviceType {
        DeviceType::FileSystem
    }

    /// One for requests that must not wait, one for all others.
    fn queue_sizes(&self) -> &[u16] {
        &[128, QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        // 5.11.4: the tag, and the number of request queues.
        let config = self.tag.iter().chain(&[1, 0, 0, 0]);
        data.iter_mut().zip(config.skip(offset)).for_each(|(to, from)| *to = *from);
    }

    fn activate(&self, activation: Activation) -> Result<(), Error> {
        self.server.start_over();
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        for queue in activation.queues.into_iter().flatten() {
            let server = self.server.clone();
            let name = format!("share-queue{}", queue.index());
            let worker = Worker::start(&name, move |stop| serve(queue, stop, |chain| server.answer(chain)));
            let device = DeviceType::FileSystem.name();
            workers.push(worker.map_err(|source| Error::Host { device, what: "can't start a thread", source })?);
        }
        Ok(())
    }

    fn reset(&self) {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.server.start_over();
    }
}
