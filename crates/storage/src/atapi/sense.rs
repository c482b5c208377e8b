//! Sense data: why a packet command failed (SPC-3, 4.5.3).

/// Sense key, additional sense code and its qualifier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sense {
    pub key: u8,
    code: u8,
    qualifier: u8,
}

const fn sense(key: u8, code: u8, qualifier: u8) -> Sense {
    Sense { key, code, qualifier }
}

impl Sense {
    pub const NONE: Sense = sense(0, 0, 0);
    pub const NO_MEDIUM: Sense = sense(2, 0x3a, 1);
    pub const TRAY_OPEN: Sense = sense(2, 0x3a, 2);
    pub const NOT_READY_PREVENTED: Sense = sense(2, 0x53, 2);
    pub const UNREADABLE: Sense = sense(3, 0x11, 0);
    pub const REMOVAL_PREVENTED: Sense = sense(5, 0x53, 2);
    pub const BAD_COMMAND: Sense = sense(5, 0x20, 0);
    pub const BAD_ADDRESS: Sense = sense(5, 0x21, 0);
    pub const BAD_FIELD: Sense = sense(5, 0x24, 0);
    pub const BAD_PARAMETER: Sense = sense(5, 0x26, 0);
    pub const CHANGED: Sense = sense(6, 0x28, 0);
    pub const RESET: Sense = sense(6, 0x29, 0);

    /// Fixed format, for the current error.
    pub fn to_bytes(self) -> [u8; 18] {
        let mut bytes = [0; 18];
        (bytes[0], bytes[2], bytes[7], bytes[12], bytes[13]) = (0x70, self.key, 10, self.code, self.qualifier);
        bytes
    }
}
