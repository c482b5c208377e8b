//! How sectors lie on a disk, and which drives take which disks.

/// Bytes of a sector. Others were never used on PCs.
pub const SECTOR: u64 = 512;

/// What CMOS tells of a drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriveType {
    /// 5.25", 1.2 MB.
    High5 = 2,
    /// 3.5", 1.44 MB.
    High3 = 4,
    /// 3.5", 2.88 MB.
    Extra3 = 5,
}

/// Data rates as DSR and CCR have them.
const RATE_500K: u8 = 0;
const RATE_300K: u8 = 1;
const RATE_250K: u8 = 2;
const RATE_1M: u8 = 3;

/// The layout of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub cylinders: u8,
    pub heads: u8,
    /// Of a track.
    pub sectors: u8,
    /// At which data rate it can be read.
    pub rate: u8,
    /// The smallest drive that takes it.
    pub drive: DriveType,
}

const fn layout(cylinders: u8, heads: u8, sectors: u8, rate: u8, drive: DriveType) -> Geometry {
    Geometry { cylinders, heads, sectors, rate, drive }
}

/// All layouts; of those with the same size the first is meant.
const LAYOUTS: [Geometry; 14] = [
    layout(80, 2, 18, RATE_500K, DriveType::High3),
    layout(80, 2, 36, RATE_1M, DriveType::Extra3),
    layout(80, 2, 15, RATE_500K, DriveType::High5),
    layout(80, 2, 9, RATE_250K, DriveType::High3),
    layout(40, 2, 9, RATE_300K, DriveType::High5),
    layout(40, 2, 8, RATE_300K, DriveType::High5),
    layout(40, 1, 9, RATE_300K, DriveType::High5),
    layout(40, 1, 8, RATE_300K, DriveType::High5),
    layout(80, 2, 20, RATE_500K, DriveType::High3),
    layout(80, 2, 21, RATE_500K, DriveType::High3),
    layout(82, 2, 21, RATE_500K, DriveType::High3),
    layout(83, 2, 21, RATE_500K, DriveType::High3),
    layout(80, 2, 10, RATE_250K, DriveType::High3),
    layout(80, 2, 39, RATE_1M, DriveType::Extra3),
];

impl Geometry {
    /// The layout of an image of so many bytes. What fits none is a part of a 1.44 or 2.88 MB disk.
    pub fn of(size: u64) -> Option<Self> {
        let exact = LAYOUTS.iter().find(|layout| layout.size() == size);
        exact.or_else(|| LAYOUTS.iter().take(2).find(|layout| size > 0 && size <= layout.size())).copied()
    }

    fn size(&self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors) * SECTOR
    }

    /// Where a sector (numbered from 1) is in the image.
    pub fn offset(&self, cylinder: u8, head: u8, sector: u8) -> Option<u64> {
        if cylinder >= self.cylinders || head >= self.heads || sector == 0 || sector > self.sectors {
            return None;
        }
        let track = u64::from(cylinder) * u64::from(self.heads) + u64::from(head);
        Some((track * u64::from(self.sectors) + u64::from(sector) - 1) * SECTOR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_known_by_its_size() {
        let layout = |size| Geometry::of(size).map(|layout| (layout.cylinders, layout.heads, layout.sectors));
        assert_eq!(layout(1_474_560), Some((80, 2, 18)));
        assert_eq!(layout(2_949_120), Some((80, 2, 36)));
        assert_eq!(layout(368_640), Some((40, 2, 9)));
        assert_eq!(layout(1_000_000 / 512 * 512), Some((80, 2, 18)));
        assert_eq!((layout(0), layout(4 << 20)), (None, None));
    }
}
