//! The header before each frame between a virtual network card and what it is attached to (virtio 1.2, 5.1.6): what is
//! left to do to the frame. Tap devices use the same one.

/// The length of a header as virtio 1.x lays it out.
pub const HEADER_LENGTH: usize = 12;

/// Checksum `flags` (5.1.6).
pub const NEEDS_CHECKSUM: u8 = 1;
pub const DATA_VALID: u8 = 2;

/// Values of `gso_type` (5.1.6).
pub const GSO_NONE: u8 = 0;
pub const GSO_TCP4: u8 = 1;
pub const GSO_TCP6: u8 = 4;
/// A bit on top of the others: the segments may carry congestion marks.
pub const GSO_ECN: u8 = 0x80;

/// What precedes a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub flags: u8,
    pub gso_type: u8,
    /// Bytes of headers before the data of a frame that is to be segmented; a hint.
    pub header_length: u16,
    /// Bytes of data in each segment.
    pub gso_size: u16,
    /// From where to sum up, and how far from there the sum is to be put.
    pub checksum_start: u16,
    pub checksum_offset: u16,
    /// Over how many buffers a received frame extends; the card sets it.
    pub buffers: u16,
}

impl Header {
    pub fn from_bytes(bytes: &[u8; HEADER_LENGTH]) -> Self {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, b0, b1] = *bytes;
        Header {
            flags,
            gso_type,
            header_length: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            checksum_start: u16::from_le_bytes([s0, s1]),
            checksum_offset: u16::from_le_bytes([o0, o1]),
            buffers: u16::from_le_bytes([b0, b1]),
        }
    }

    pub fn to_bytes(self) -> [u8; HEADER_LENGTH] {
        let [h0, h1] = self.header_length.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.checksum_start.to_le_bytes();
        let [o0, o1] = self.checksum_offset.to_le_bytes();
        let [b0, b1] = self.buffers.to_le_bytes();
        [self.flags, self.gso_type, h0, h1, g0, g1, s0, s1, o0, o1, b0, b1]
    }
}

/// What a receiver of frames does itself, so that the sender needn't.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Takes frames whose TCP or UDP checksum is not complete.
    pub checksum: bool,
    /// Takes TCP frames larger than the MTU.
    pub tso4: bool,
    pub tso6: bool,
}
