//! Command codes (ATA8-ACS, 7), and which of them move sectors, how.

use crate::link::TaskFile;

pub const DATA_SET_MANAGEMENT: u8 = 0x06;
pub const RECALIBRATE: u8 = 0x10;
pub const RECALIBRATE_LAST: u8 = 0x1f;
pub const READ_NATIVE_MAX_EXT: u8 = 0x27;
pub const READ_LOG_EXT: u8 = 0x2f;
pub const SET_MAX_EXT: u8 = 0x37;
pub const READ_VERIFY: u8 = 0x40;
pub const READ_VERIFY_NO_RETRY: u8 = 0x41;
pub const READ_VERIFY_EXT: u8 = 0x42;
pub const READ_LOG_DMA_EXT: u8 = 0x47;
pub const SEEK: u8 = 0x70;
pub const SEEK_LAST: u8 = 0x7f;
pub const EXECUTE_DEVICE_DIAGNOSTIC: u8 = 0x90;
pub const INITIALIZE_DEVICE_PARAMETERS: u8 = 0x91;
pub const SMART: u8 = 0xb0;
pub const SET_MULTIPLE_MODE: u8 = 0xc6;
pub const STANDBY_IMMEDIATE: u8 = 0xe0;
pub const IDLE_IMMEDIATE: u8 = 0xe1;
pub const STANDBY: u8 = 0xe2;
pub const IDLE: u8 = 0xe3;
pub const CHECK_POWER_MODE: u8 = 0xe5;
pub const SLEEP: u8 = 0xe6;
pub const FLUSH_CACHE: u8 = 0xe7;
pub const FLUSH_CACHE_EXT: u8 = 0xea;
pub const IDENTIFY_DEVICE: u8 = 0xec;
pub const SET_FEATURES: u8 = 0xef;
pub const READ_NATIVE_MAX: u8 = 0xf8;
pub const SET_MAX: u8 = 0xf9;

/// Packet drives only.
pub const DEVICE_RESET: u8 = 0x08;
pub const PACKET: u8 = 0xa0;
pub const IDENTIFY_PACKET_DEVICE: u8 = 0xa1;

/// Queued commands, which are given by their own kind of FIS.
pub const READ_FPDMA_QUEUED: u8 = 0x60;
pub const WRITE_FPDMA_QUEUED: u8 = 0x61;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    In,
    Out,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// An interrupt for each sector.
    Single,
    /// An interrupt for each block of sectors.
    Multiple,
    Dma,
    /// DMA, and the number of sectors in the features register.
    Queued,
}

/// How a command moves sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub direction: Direction,
    pub transfer: Transfer,
    /// 48-bit address and 16-bit count.
    pub extended: bool,
    /// The data are to be on disk when the command ends.
    pub forced: bool,
}

impl Access {
    pub fn of(command: &TaskFile) -> Option<Self> {
        use Direction::{In, Out};
        use Transfer::{Dma, Multiple, Queued, Single};
        let (direction, transfer, extended, forced) = match command.command {
            0x20 | 0x21 => (In, Single, false, false),
            0x24 => (In, Single, true, false),
            0x25 => (In, Dma, true, false),
            0x29 => (In, Multiple, true, false),
            0x30 | 0x31 => (Out, Single, false, false),
            0x34 => (Out, Single, true, false),
            0x35 => (Out, Dma, true, false),
            0x39 => (Out, Multiple, true, false),
            0x3d => (Out, Dma, true, true),
            0xc4 => (In, Multiple, false, false),
            0xc5 => (Out, Multiple, false, false),
            0xc8 | 0xc9 => (In, Dma, false, false),
            0xca | 0xcb => (Out, Dma, false, false),
            0xce => (Out, Multiple, true, true),
            READ_FPDMA_QUEUED => (In, Queued, true, false),
            WRITE_FPDMA_QUEUED => (Out, Queued, true, false),
            _ => return None,
        };
        Some(Access { direction, transfer, extended, forced })
    }
}
