//! A picture of the screen.

/// The most pixels a picture has in one direction.
pub const MAX_WIDTH: usize = 4608;
pub const MAX_HEIGHT: usize = 4096;

/// Pixels in rows from the top, each 0x00RRGGBB.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    width: usize,
    height: usize,
    pixels: Vec<u32>,
}

impl Frame {
    /// Makes it this large, at most [`MAX_WIDTH`] and [`MAX_HEIGHT`]; what it shows is black if that is a change.
    pub fn resize(&mut self, width: usize, height: usize) {
        let (width, height) = (width.clamp(1, MAX_WIDTH), height.clamp(1, MAX_HEIGHT));
        if (width, height) != self.size() {
            (self.width, self.height) = (width, height);
            self.pixels.clear();
            self.pixels.resize(width * height, 0);
            self.pixels.shrink_to_fit();
        }
    }

    pub fn size(&self) -> (usize, usize) {
        (self.width, self.height)
    }

    /// The pixels of row `y`; none below the last row.
    pub fn row(&self, y: usize) -> &[u32] {
        let start = y.saturating_mul(self.width);
        self.pixels.get(start..start.saturating_add(self.width)).unwrap_or_default()
    }

    pub fn row_mut(&mut self, y: usize) -> &mut [u32] {
        let start = y.saturating_mul(self.width);
        self.pixels.get_mut(start..start.saturating_add(self.width)).unwrap_or_default()
    }

    pub fn fill(&mut self, pixel: u32) {
        self.pixels.fill(pixel);
    }

    /// Copies row `from` to row `to`.
    pub fn copy_row(&mut self, from: usize, to: usize) {
        if from < self.height && to < self.height {
            self.pixels.copy_within(from * self.width..(from + 1) * self.width, to * self.width);
        }
    }
}
