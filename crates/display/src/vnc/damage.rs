//! Which parts of the screen a viewer has not seen yet: a bit for each tile, however long the viewer is away.

use super::protocol::Rect;
use crate::Frame;

pub const TILE_WIDTH: usize = 64;
pub const TILE_HEIGHT: usize = 16;

/// A set of tiles of a screen of a certain size.
#[derive(Clone, Debug, Default)]
pub struct Damage {
    columns: usize,
    rows: usize,
    size: (usize, usize),
    tiles: Vec<bool>,
}

impl Damage {
    /// No tile of a screen of that size.
    pub fn none(size: (usize, usize)) -> Self {
        let (columns, rows) = (size.0.div_ceil(TILE_WIDTH), size.1.div_ceil(TILE_HEIGHT));
        Damage { columns, rows, size, tiles: vec![false; columns * rows] }
    }

    pub fn all(size: (usize, usize)) -> Self {
        let mut damage = Self::none(size);
        damage.tiles.fill(true);
        damage
    }

    /// Where two frames of the same size differ.
    pub fn between(old: &Frame, new: &Frame) -> Self {
        if old.size() != new.size() {
            return Self::all(new.size());
        }
        let mut damage = Self::none(new.size());
        for y in 0..new.size().1 {
            let (old, new) = (old.row(y), new.row(y));
            if old == new {
                continue;
            }
            let first = y / TILE_HEIGHT * damage.columns;
            let tiles = damage.tiles.get_mut(first..first + damage.columns).unwrap_or_default();
            let pieces = old.chunks(TILE_WIDTH).zip(new.chunks(TILE_WIDTH));
            tiles.iter_mut().zip(pieces).for_each(|(tile, (old, new))| *tile |= old != new);
        }
        damage
    }

    pub fn is_empty(&self) -> bool {
        !self.tiles.contains(&true)
    }

    /// Adds what another screen of the same size has; of one of another size, everything.
    pub fn add(&mut self, other: &Damage) {
        if self.size != other.size {
            *self = Self::all(other.size);
        } else {
            self.tiles.iter_mut().zip(&other.tiles).for_each(|(tile, other)| *tile |= other);
        }
    }

    /// The columns and rows of tiles that a rectangle touches.
    fn touched(&self, rect: &Rect) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
        let range = |start: usize, length: usize, tile: usize, limit: usize| {
            let end = if length == 0 { start } else { (start + length).div_ceil(tile) * tile };
            (start / tile).min(limit)..(end / tile).min(limit)
        };
        (range(rect.x, rect.width, TILE_WIDTH, self.columns), range(rect.y, rect.height, TILE_HEIGHT, self.rows))
    }

    pub fn add_rect(&mut self, rect: &Rect) {
        let (columns, rows) = self.touched(rect);
        for row in rows {
            let start = row * self.columns;
            self.tiles.get_mut(start + columns.start..start + columns.end).unwrap_or_default().fill(true);
        }
    }

    /// Takes out the tiles that touch `rect`, as rectangles that don't overlap.
    pub fn take(&mut self, rect: &Rect) -> Vec<Rect> {
        let (columns, rows) = self.touched(rect);
        let mut rects: Vec<Rect> = Vec::new();
        // Runs of tiles in a row become one rectangle with equal runs in the rows above.
        let mut open: Vec<usize> = Vec::new();
        for row in rows {
            let tiles = self.tiles.get_mut(row * self.columns..(row + 1) * self.columns).unwrap_or_default();
            let mut now = Vec::new();
            for (start, end) in runs(tiles.get_mut(columns.clone()).unwrap_or_default()) {
                let (start, end) = (start + columns.start, end + columns.start);
                let (x, y) = (start * TILE_WIDTH, row * TILE_HEIGHT);
                let width = (end * TILE_WIDTH).min(self.size.0) - x;
                let height = (y + TILE_HEIGHT).min(self.size.1) - y;
                let above =
                    open.iter().copied().find(|index| rects.get(*index).is_some_and(|r| (r.x, r.width) == (x, width)));
                match above.and_then(|index| Some((index, rects.get_mut(index)?))) {
                    Some((index, above)) => {
                        above.height += height;
                        now.push(index);
                    }
                    None => {
                        rects.push(Rect { x, y, width, height });
                        now.push(rects.len() - 1);
                    }
                }
            }
            open = now;
        }
        rects
    }
}

/// Takes out the runs of set tiles: first, and the one after the last.
fn runs(tiles: &mut [bool]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (index, tile) in tiles.iter_mut().enumerate() {
        if !std::mem::take(tile) {
            continue;
        }
        match runs.last_mut() {
            Some((_, end)) if *end == index => *end += 1,
            _ => runs.push((index, index + 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERYTHING: Rect = Rect { x: 0, y: 0, width: 65535, height: 65535 };

    fn frame(width: usize, height: usize) -> Frame {
        let mut frame = Frame::default();
        frame.resize(width, height);
        frame
    }

    #[test]
    fn tiles_that_differ_become_rectangles() {
        let old = frame(200, 40);
        let mut new = old.clone();
        for (x, y) in [(3, 0), (70, 1), (66, 17), (1, 20), (199, 39)] {
            new.row_mut(y)[x] = 1;
        }
        let mut damage = Damage::between(&old, &new);
        let expected = [Rect { x: 0, y: 0, width: 128, height: 32 }, Rect { x: 192, y: 32, width: 8, height: 8 }];
        assert_eq!(damage.take(&EVERYTHING), expected);
        assert!(damage.is_empty());
    }

    #[test]
    fn only_what_is_asked_for_is_taken() {
        let mut damage = Damage::all((128, 32));
        let left = Rect { x: 0, y: 0, width: 10, height: 10 };
        assert_eq!(damage.take(&left), [Rect { x: 0, y: 0, width: 64, height: 16 }]);
        assert!(damage.take(&Rect { width: 0, ..left }).is_empty());
        assert_eq!(damage.take(&EVERYTHING).iter().map(|r| r.width * r.height).sum::<usize>(), 3 * 64 * 16);
    }

    #[test]
    fn rectangles_outside_of_the_screen_touch_nothing() {
        let mut damage = Damage::none((100, 100));
        damage.add_rect(&Rect { x: 65535, y: 65535, width: 65535, height: 65535 });
        assert!(damage.is_empty());
        damage.add_rect(&Rect { x: 99, y: 99, width: 65535, height: 65535 });
        assert_eq!(damage.take(&EVERYTHING), [Rect { x: 64, y: 96, width: 36, height: 4 }]);
    }
}
