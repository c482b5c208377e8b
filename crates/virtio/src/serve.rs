//! The loop of a device's thread that answers one request after the other.

use std::time::{Duration, Instant};

use crate::{Chain, Event, Queue, wait_any};

/// The driver hears of answers though there are more requests when they are so many, or the first of them so old: one
/// interrupt is to stand for many small answers, but no driver is to wait for the small ones behind a large one.
const BATCH: u32 = 32;
const PATIENCE: Duration = Duration::from_micros(100);

/// Answers the requests of `queue` until `stop` is set. `answer` returns how many device-writable bytes it wrote, or
/// `None` for what is no request at all: the queue is then dead until the driver resets the device.
pub(crate) fn serve(mut queue: Queue, stop: &Event, mut answer: impl FnMut(&Chain) -> Option<u32>) {
    let kick = queue.kick().clone();
    loop {
        wait_any(&[stop, &kick]);
        kick.clear();
        loop {
            queue.disable_kicks();
            let mut unannounced = 0;
            let mut begin = Instant::now();
            while let Some(chain) = queue.pop() {
                match answer(&chain) {
                    Some(written) => queue.push(chain, written),
                    None => {
                        queue.fail("a request is malformed");
                        break;
                    }
                }
                unannounced += 1;
                if unannounced == BATCH || begin.elapsed() > PATIENCE {
                    queue.notify();
                    (unannounced, begin) = (0, Instant::now());
                }
                if stop.is_set() {
                    break;
                }
            }
            queue.notify();
            if stop.is_set() {
                return;
            }
            if !queue.enable_kicks() {
                break;
            }
        }
    }
}
