//! The thread of a channel or port.

use std::thread::JoinHandle;

use crate::Error;

/// A thread that ends when this is dropped: `stop` tells it to, and the drop waits for it.
pub struct Worker {
    stop: Box<dyn Fn() + Send + Sync>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    pub fn start(
        what: &'static str,
        work: impl FnOnce() + Send + 'static,
        stop: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        let thread = wake::thread(what).spawn(work);
        let thread = thread.map_err(|source| Error::Thread { what, source })?;
        Ok(Worker { stop: Box::new(stop), thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        (self.stop)();
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}
