//! The few colours of a rectangle.

use std::collections::HashMap;

/// Colours in the order in which they were met.
#[derive(Default)]
pub struct Palette {
    pub colors: Vec<u32>,
    indices: HashMap<u32, u8>,
}

impl Palette {
    /// The colours of the pixels, if there are at most `most` (at most 256).
    pub fn of<'a>(pixels: impl Iterator<Item = &'a u32>, most: usize) -> Option<Self> {
        let mut palette = Palette::default();
        let mut last = None;
        for &pixel in pixels {
            if last == Some(pixel) {
                continue;
            }
            last = Some(pixel);
            if !palette.indices.contains_key(&pixel) {
                if palette.colors.len() >= most {
                    return None;
                }
                palette.indices.insert(pixel, palette.colors.len() as u8);
                palette.colors.push(pixel);
            }
        }
        Some(palette)
    }

    pub fn index(&self, pixel: u32) -> u8 {
        self.indices.get(&pixel).copied().unwrap_or(0)
    }
}
