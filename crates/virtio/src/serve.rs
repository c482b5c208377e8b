//! The loop of a device's thread that answers one request after the other.
//!
//! An interrupt costs a guest more than a request does, so where there are many requests under way, one is to stand for
//! several answers. A driver that has one request at a time must not wait for that, though. Which of them it is, the
//! loop finds out ([`Depth`]): it holds an answer back for a moment; if another request comes meanwhile, there are
//! more, and it goes on like this, without being notified of requests either.
//!
//! Before it sleeps, the loop looks for another request for a moment, if requests have lately come so soon ([`Linger`]). The
//! driver need not notify then, and nobody has to be woken.

use std::thread;
use std::time::{Duration, Instant};

use wake::Linger;

use crate::helpers::{Helpers, Task};
use crate::{Chain, Event, Queue, wait_any};

/// The driver hears of answers though there are more requests when they are so many, or the first of them so old: no
/// driver is to wait for small ones behind a large one.
const BATCH: u32 = 32;
const PATIENCE: Duration = Duration::from_micros(200);
/// How long answers are held back for others to come.
const HOLD: Duration = Duration::from_micros(50);
/// For how long the loop looks for a request at most: as long as a driver takes for the next one if its processor has slept,
/// or both would sleep for ever.
const LINGER: Duration = Duration::from_micros(250);
/// Requests between two tries to find more than one under way, at first and at most.
const FIRST_TRY: u32 = 16;
const LAST_TRY: u32 = 1024;
/// How often nothing may come until it is believed: the driver's processor may have had other things to do.
const MISSES: u32 = 4;

/// Whether the driver has more than one request under way.
struct Depth {
    several: bool,
    /// How often nothing has come since something did.
    misses: u32,
    /// Requests until the next try, and between tries.
    left: u32,
    interval: u32,
}

impl Depth {
    fn new() -> Self {
        Depth { several: false, misses: 0, left: FIRST_TRY, interval: FIRST_TRY }
    }

    /// After `answered` requests: whether to hold the answers back.
    fn hold(&mut self, answered: u32) -> bool {
        self.left = self.left.saturating_sub(answered);
        answered > 0 && (self.several || self.left == 0)
    }

    /// Whether requests have come while answers were held back.
    fn learn(&mut self, came: bool) {
        self.misses = if came { 0 } else { self.misses.saturating_add(1) };
        self.interval = if came || self.several { FIRST_TRY } else { (self.interval * 2).min(LAST_TRY) };
        self.several = came || self.several && self.misses < MISSES;
        self.left = self.interval;
    }
}

/// What becomes of a request.
pub(crate) enum Answer {
    /// It is done, and so many device-writable bytes were written.
    Now(u32),
    /// It has to wait for something: a helper does the rest and says the same.
    Later(Task),
    /// It is no request at all: the queue is dead until the driver resets the device.
    Malformed,
}

/// Answers the requests of `queue` until `stop` is set. `answer` returns how many device-writable bytes it wrote, or
/// `None` for what is no request at all.
pub(crate) fn serve(queue: Queue, stop: &Event, mut answer: impl FnMut(&Chain) -> Option<u32>) {
    serve_with(queue, stop, None, |chain, _| answer(chain).map_or(Answer::Malformed, Answer::Now));
}

/// The same, with helpers for what must wait. `answer` also hears whether another request is there already.
pub(crate) fn serve_with(
    mut queue: Queue,
    stop: &Event,
    mut helpers: Option<Helpers>,
    mut answer: impl FnMut(&Chain, bool) -> Answer,
) {
    let kick = queue.kick().clone();
    let finished = helpers.as_ref().map(|helpers| helpers.finished().clone());
    let mut depth = Depth::new();
    let linger = Linger::up_to(LINGER);
    let mut idle = Instant::now();
    loop {
        match &finished {
            Some(finished) => wait_any(&[stop, &kick, finished]),
            None => wait_any(&[stop, &kick]),
        }
        linger.learn(idle.elapsed());
        kick.clear();
        let (mut unannounced, mut begin) = (0, Instant::now());
        let mut woken = true;
        loop {
            queue.disable_kicks();
            let mut answered = 0;
            let done = helpers.as_ref().map(|helpers| helpers.take_finished(std::mem::take(&mut woken)));
            for (chain, written) in done.unwrap_or_default() {
                queue.push(chain, written);
                answered += 1;
                unannounced += 1;
            }
            while let Some(chain) = queue.pop() {
                match answer(&chain, queue.has_available()) {
                    Answer::Now(written) => queue.push(chain, written),
                    Answer::Later(task) => {
                        if let Some(helpers) = &mut helpers {
                            helpers.give(chain, task);
                        }
                        continue;
                    }
                    Answer::Malformed => {
                        queue.fail("a request is malformed");
                        break;
                    }
                }
                answered += 1;
                unannounced += 1;
                if unannounced >= BATCH || begin.elapsed() > PATIENCE {
                    queue.notify();
                    (unannounced, begin) = (0, Instant::now());
                }
                if stop.is_set() {
                    break;
                }
            }
            if stop.is_set() {
                queue.notify();
                return;
            }
            // Nothing is held back after large requests: they were all announced.
            if unannounced > 0 && depth.hold(answered) {
                thread::sleep(HOLD);
                let came = queue.has_available();
                depth.learn(came);
                if came {
                    continue;
                }
            }
            queue.notify();
            idle = Instant::now();
            (unannounced, begin) = (0, idle);
            let came =
                || stop.is_set() || queue.has_available() || finished.as_ref().is_some_and(|event| event.is_set());
            if !linger.look(None, came) && !queue.enable_kicks() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_with_one_request_at_a_time_is_tried_ever_less_often() {
        let mut depth = Depth::new();
        let held = (0..10_000).filter(|_| {
            let hold = depth.hold(1);
            if hold {
                depth.learn(false);
            }
            hold
        });
        assert!((6..20).contains(&held.count()));
    }

    #[test]
    fn a_driver_with_several_is_held_back_until_it_has_one() {
        let mut depth = Depth::new();
        while !depth.hold(1) {}
        depth.learn(true);
        for _ in 0..10 {
            assert!(depth.hold(3));
            depth.learn(true);
        }
        assert!(!depth.hold(0), "nothing is held back that isn't there");
        for _ in 0..MISSES {
            assert!(depth.hold(1));
            depth.learn(false);
        }
        assert!(!depth.hold(1));
    }
}
