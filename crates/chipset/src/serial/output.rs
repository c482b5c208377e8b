//! The way out of a serial port: a bounded queue, and a thread that writes it to whatever the user connected.
//!
//! A vCPU never waits for the sink. When the queue is full, the port keeps its bytes and shows a busy transmitter. Nor does it wake
//! the thread for each byte of a line: that takes longer than all else about it.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How many bytes may wait for the sink.
const CAPACITY: usize = 64 << 10;
/// How many are written at once: small enough to see that a slow sink is not a stuck one.
const PIECE: usize = 4 << 10;
/// After a write more is expected for so long, which then needs no wake-up.
const PAUSE: Duration = Duration::from_micros(200);

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    /// The thread is writing what it took, or comes back for more by itself.
    writing: bool,
    /// Bytes were refused since the thread last took some.
    refused: bool,
    /// No more bytes will come.
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// Bytes came, or the port went.
    more: Condvar,
    /// The thread has written what it took.
    written: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for bytes and takes some; whether others were refused before. None when there will be no more.
    fn take(&self) -> Option<(Vec<u8>, bool)> {
        let mut queue = self.lock();
        if queue.writing && queue.bytes.is_empty() && !queue.closed {
            drop(queue);
            std::thread::sleep(PAUSE);
            queue = self.lock();
        }
        if queue.bytes.is_empty() {
            queue.writing = false;
            self.written.notify_all();
        }
        while queue.bytes.is_empty() {
            if queue.closed {
                return None;
            }
            queue = self.more.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        queue.writing = true;
        let count = queue.bytes.len().min(PIECE);
        Some((queue.bytes.drain(..count).collect(), std::mem::take(&mut queue.refused)))
    }
}

/// The sending end. Dropping it lets the thread write what is left, and end.
pub struct Output {
    shared: Arc<Shared>,
}

impl Output {
    /// Starts a thread that writes to `sink` and calls `space` when the queue has room again for what it refused.
    pub fn start(mut sink: Box<dyn Write + Send>, space: impl Fn() + Send + 'static) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let thread = shared.clone();
        wake::thread("serial output").spawn(move || {
            let mut broken = false;
            while let Some((bytes, refused)) = thread.take() {
                if refused {
                    space();
                }
                if broken {
                    continue;
                }
                if let Err(error) = sink.write_all(&bytes).and_then(|()| sink.flush()) {
                    tracing::warn!("serial port output is lost from here on: {error}");
                    broken = true;
                }
            }
        })?;
        Ok(Output { shared })
    }

    /// Takes one byte, unless the queue is full.
    pub fn push(&self, byte: u8) -> bool {
        self.push_slice(&[byte]) == 1
    }

    /// Takes as many bytes as the queue has room for; returns how many.
    pub fn push_slice(&self, bytes: &[u8]) -> usize {
        let mut queue = self.shared.lock();
        let taken = bytes.len().min(CAPACITY.saturating_sub(queue.bytes.len()));
        queue.bytes.extend(bytes.iter().take(taken));
        queue.refused |= taken < bytes.len();
        if taken > 0 && !queue.writing {
            self.shared.more.notify_one();
        }
        taken
    }

    /// Waits until the sink has taken everything, or until it has taken nothing for as long as `patience`. Says whether
    /// it has all.
    pub fn flush(&self, patience: Duration) -> bool {
        let mut queue = self.shared.lock();
        while queue.writing || !queue.bytes.is_empty() {
            let wait = self.shared.written.wait_timeout(queue, patience).unwrap_or_else(PoisonError::into_inner);
            if wait.1.timed_out() {
                return false;
            }
            queue = wait.0;
        }
        true
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.more.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A sink that takes a write only when it is let.
    struct Slow {
        permits: mpsc::Receiver<()>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Slow {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            self.permits.recv().map_err(std::io::Error::other)?;
            self.written.lock().unwrap().extend(data);
            Ok(data.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stuck_sink_fills_the_queue_and_no_more() {
        let (permit, permits) = mpsc::channel();
        let written = Arc::new(Mutex::new(Vec::new()));
        let (space, spaces) = mpsc::channel();
        let sink = Slow { permits, written: written.clone() };
        let output = Output::start(Box::new(sink), move || space.send(()).unwrap_or_default()).unwrap();
        let sent = (0..2 * CAPACITY).take_while(|_| output.push(b'a')).count();
        assert!((CAPACITY..=CAPACITY + PIECE).contains(&sent), "{sent}");
        assert!(!output.flush(Duration::from_millis(1)));
        (0..=CAPACITY / PIECE + 1).for_each(|_| permit.send(()).unwrap());
        spaces.recv_timeout(PATIENCE).unwrap();
        assert!(output.flush(PATIENCE));
        assert_eq!(written.lock().unwrap().len(), sent);
    }

    #[test]
    fn a_line_is_written_in_few_pieces_though_its_bytes_come_one_by_one() {
        struct Count(mpsc::Sender<usize>);
        impl Write for Count {
            fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
                self.0.send(data.len()).map_err(std::io::Error::other)?;
                Ok(data.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let (count, pieces) = mpsc::channel();
        let output = Output::start(Box::new(Count(count)), || ()).unwrap();
        (0..1000).for_each(|_| assert!(output.push(b'x')));
        assert!(output.flush(PATIENCE));
        let pieces: Vec<usize> = pieces.try_iter().collect();
        assert_eq!(pieces.iter().sum::<usize>(), 1000);
        assert!(pieces.len() < 500, "{} pieces", pieces.len());
    }

    #[test]
    fn a_broken_sink_swallows_everything() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let output = Output::start(Box::new(Broken), || ()).unwrap();
        for _ in 0..10 {
            assert!(output.push(b'x'));
            assert!(output.flush(PATIENCE));
        }
    }
}
