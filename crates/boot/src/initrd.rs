//! Where the initial RAM disk goes: as high as possible, out of the way of the kernel that unpacks itself below.

use memory::PAGE_SIZE;

use crate::Error;
use crate::file::Image;

/// Where a RAM disk is in guest memory; size 0: there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    pub start: u64,
    pub size: u64,
}

/// The highest page-aligned place for the RAM disk between `floor`, where the kernel ends, and `ceiling`.
pub fn place(initrd: Option<&Image>, floor: u64, ceiling: u64) -> Result<Placement, Error> {
    let Some(initrd) = initrd else {
        return Ok(Placement::default());
    };
    let size = initrd.size();
    let start = ceiling.checked_sub(size).map(|s| s / PAGE_SIZE * PAGE_SIZE);
    match start.filter(|s| *s >= floor) {
        Some(start) => Ok(Placement { start, size }),
        None => Err(Error::InitrdTooLarge {
            path: initrd.path().to_owned(),
            size,
            room: ceiling.saturating_sub(floor) / PAGE_SIZE * PAGE_SIZE,
        }),
    }
}
