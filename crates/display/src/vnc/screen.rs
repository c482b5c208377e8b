//! The picture that all viewers share, and the thread that renews it.
//!
//! While any viewer waits for something new, the desktop is drawn 30 times a second and compared with what was drawn
//! before; what differs becomes damage of every viewer. A viewer that does not ask costs nothing but its bits of damage.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::Desktop;
use super::damage::Damage;
use super::viewer::Viewer;
use crate::Frame;

const INTERVAL: Duration = Duration::from_millis(33);

#[derive(Default)]
struct Demand {
    /// A viewer waits.
    wanted: bool,
    stopped: bool,
}

struct Drawing {
    current: Arc<Frame>,
    /// What is drawn into.
    next: Frame,
    /// When that was done last.
    drawn: Option<Instant>,
    viewers: Vec<Weak<Viewer>>,
}

pub struct Screen {
    pub desktop: Arc<dyn Desktop>,
    demand: Mutex<Demand>,
    changed: Condvar,
    drawing: Mutex<Drawing>,
}

impl Screen {
    pub fn new(desktop: Arc<dyn Desktop>) -> Self {
        let drawing = Drawing { current: Arc::default(), next: Frame::default(), drawn: None, viewers: Vec::new() };
        Screen { desktop, demand: Mutex::default(), changed: Condvar::new(), drawing: Mutex::new(drawing) }
    }

    fn demand(&self) -> MutexGuard<'_, Demand> {
        self.demand.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drawing(&self) -> MutexGuard<'_, Drawing> {
        self.drawing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The picture as it is right now.
    pub fn current(&self) -> Arc<Frame> {
        let mut drawing = self.drawing();
        self.draw(&mut drawing);
        drawing.current.clone()
    }

    /// From now on `viewer` is told of damage.
    pub fn add(&self, viewer: &Arc<Viewer>) {
        self.drawing().viewers.push(Arc::downgrade(viewer));
    }

    /// Makes sure that what a viewer gets at once, because it has not seen it, is no older than a moment, even if nobody
    /// has looked for long.
    pub fn refresh(&self) {
        let mut drawing = self.drawing();
        if drawing.drawn.is_none_or(|drawn| drawn.elapsed() >= INTERVAL) {
            self.draw(&mut drawing);
        }
    }

    /// A viewer waits for something new.
    pub fn want(&self) {
        self.demand().wanted = true;
        self.changed.notify_all();
    }

    pub fn stop(&self) {
        self.demand().stopped = true;
        self.changed.notify_all();
    }

    /// The thread: until [`stop`](Self::stop).
    pub fn run(&self) {
        let mut last: Option<Instant> = None;
        loop {
            let mut demand = self.demand();
            while !demand.wanted && !demand.stopped {
                demand = self.changed.wait(demand).unwrap_or_else(PoisonError::into_inner);
            }
            let early = last.map_or(Duration::ZERO, |last| INTERVAL.saturating_sub(last.elapsed()));
            if !early.is_zero() && !demand.stopped {
                demand = self.changed.wait_timeout(demand, early).unwrap_or_else(PoisonError::into_inner).0;
            }
            if demand.stopped {
                return;
            }
            if last.is_some_and(|last| last.elapsed() < INTERVAL) {
                continue;
            }
            demand.wanted = false;
            drop(demand);
            last = Some(Instant::now());
            let mut drawing = self.drawing();
            self.draw(&mut drawing);
            drawing.viewers.retain(|viewer| viewer.strong_count() > 0);
            let leds = self.desktop.leds();
            let viewers: Vec<_> = drawing.viewers.iter().filter_map(Weak::upgrade).collect();
            viewers.iter().for_each(|viewer| viewer.set_leds(leds));
            let waiting = viewers.iter().any(|viewer| viewer.waits());
            drop(drawing);
            if waiting {
                self.demand().wanted = true;
            }
        }
    }

    fn draw(&self, drawing: &mut Drawing) {
        drawing.drawn = Some(Instant::now());
        if !self.desktop.draw(&mut drawing.next) {
            return;
        }
        let damage = Damage::between(&drawing.current, &drawing.next);
        if damage.is_empty() {
            return;
        }
        let new = Arc::new(std::mem::take(&mut drawing.next));
        let old = std::mem::replace(&mut drawing.current, new);
        // Nobody sends the old one any more, mostly: its memory is drawn into the next time.
        drawing.next = Arc::try_unwrap(old).unwrap_or_default();
        for viewer in drawing.viewers.iter().filter_map(Weak::upgrade) {
            viewer.update(&drawing.current, &damage);
        }
    }
}
