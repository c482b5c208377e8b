//! SMART (ATA8-ACS, 7.53) and the general purpose logs (7.24): a drive that is well, in the form in which it says so.

use block::SECTOR;

use super::{ABORT, AtaDisk, Fail, commands};
use crate::link::{Collected, How, Link, Outcome, Small, TaskFile};

/// LBA mid and high of every SMART command, and of the answer of a drive that is well.
const SMART_KEY: u64 = 0xc2_4f00;
const READ_DATA: u8 = 0xd0;
const READ_THRESHOLDS: u8 = 0xd1;
const AUTOSAVE: u8 = 0xd2;
const SAVE_ATTRIBUTES: u8 = 0xd3;
const OFFLINE_IMMEDIATE: u8 = 0xd4;
const READ_LOG: u8 = 0xd5;
const WRITE_LOG: u8 = 0xd6;
const ENABLE: u8 = 0xd8;
const DISABLE: u8 = 0xd9;
const RETURN_STATUS: u8 = 0xda;

/// Log addresses.
const DIRECTORY: u8 = 0x00;
const SUMMARY_ERRORS: u8 = 0x01;
const SELF_TESTS: u8 = 0x06;
const QUEUED_ERROR: u8 = 0x10;
const HOST_FIRST: u8 = 0x80;
const HOST_LAST: u8 = 0x9f;

const SECTOR_BYTES: usize = SECTOR as usize;

/// Attributes: number, flags, normalized value, threshold, raw value.
const ATTRIBUTES: [(u8, u16, u8, u8, u8); 6] = [
    (1, 0x0003, 100, 6, 0),    // read errors
    (3, 0x0003, 100, 0, 0),    // spin-up time
    (5, 0x0003, 100, 36, 0),   // reallocated sectors
    (9, 0x0003, 100, 0, 1),    // power-on hours
    (12, 0x0003, 100, 0, 1),   // power cycles
    (190, 0x0003, 69, 50, 31), // temperature
];

/// A sector whose last byte makes the sum of all 0.
fn with_checksum(mut sector: [u8; SECTOR_BYTES]) -> [u8; SECTOR_BYTES] {
    sector[SECTOR_BYTES - 1] = 0;
    let sum = sector.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    sector[SECTOR_BYTES - 1] = sum.wrapping_neg();
    sector
}

/// Puts `bytes` at `at` of a sector.
fn put(sector: &mut [u8; SECTOR_BYTES], at: usize, bytes: &[u8]) {
    sector.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
}

fn attributes(thresholds: bool) -> [u8; SECTOR_BYTES] {
    let mut sector = [0; SECTOR_BYTES];
    put(&mut sector, 0, &1u16.to_le_bytes());
    for (index, (id, flags, value, threshold, raw)) in ATTRIBUTES.into_iter().enumerate() {
        let [low, high] = flags.to_le_bytes();
        let entry = if thresholds { [id, threshold, 0, 0, 0, 0] } else { [id, low, high, value, value, raw] };
        put(&mut sector, 2 + 12 * index, &entry);
    }
    if !thresholds {
        // Off-line collection was done without error, in a second; SMART data are kept, errors logged.
        put(&mut sector, 362, &[0x82, 0x00, 1, 0, 0, 0x19]);
        put(&mut sector, 368, &[0x03, 0x00, 0x01, 0x00, 2, 2]);
    }
    with_checksum(sector)
}

impl AtaDisk {
    pub(super) fn smart(&self, command: &TaskFile, link: &mut impl Link) -> Result<Outcome, Fail> {
        if command.lba & 0xff_ff00 != SMART_KEY {
            return Err(ABORT);
        }
        let feature = command.features as u8;
        let enabled = self.settings().smart;
        if !enabled && feature != ENABLE {
            return Err(ABORT);
        }
        let done = Outcome::done(command);
        let mut send = |sector: &[u8]| link.data_in(How::Pio { block: SECTOR_BYTES }, sector.len(), &Small(sector));
        match feature {
            READ_DATA => send(&attributes(false))?,
            READ_THRESHOLDS => send(&attributes(true))?,
            AUTOSAVE | SAVE_ATTRIBUTES | OFFLINE_IMMEDIATE => {}
            READ_LOG => send(&smart_log(command.lba as u8, command.count as u8).ok_or(ABORT)?)?,
            WRITE_LOG => {
                let (log, count) = (command.lba as u8, usize::from(command.count as u8));
                if !(HOST_FIRST..=HOST_LAST).contains(&log) || count == 0 {
                    return Err(ABORT);
                }
                // The host's own logs are taken, and forgotten at once.
                link.data_out(How::Pio { block: SECTOR_BYTES }, count * SECTOR_BYTES, &Collected::default())?;
            }
            ENABLE => self.settings().smart = true,
            DISABLE => self.settings().smart = false,
            RETURN_STATUS => return Ok(Outcome { lba: SMART_KEY | command.lba & 0xff, ..done }),
            _ => return Err(ABORT),
        }
        Ok(done)
    }

    pub(super) fn read_log(&self, command: &TaskFile, link: &mut impl Link) -> Result<(), Fail> {
        let (log, count) = (command.lba as u8, command.count);
        let page = (command.lba >> 8 & 0xff) | (command.lba >> 32 & 0xff) << 8;
        if count != 1 || page != 0 {
            return Err(ABORT);
        }
        let sector = match log {
            DIRECTORY => directory(&[QUEUED_ERROR]),
            QUEUED_ERROR => self.queued_error(),
            _ => return Err(ABORT),
        };
        let dma = command.command == commands::READ_LOG_DMA_EXT;
        let how = if dma { How::Dma } else { How::Pio { block: SECTOR_BYTES } };
        link.data_in(how, sector.len(), &Small(&sector))?;
        Ok(())
    }

    /// The queued command that failed last (ATA8-ACS, A.8); reading it forgets it.
    fn queued_error(&self) -> [u8; SECTOR_BYTES] {
        let mut sector = [0; SECTOR_BYTES];
        const NOT_QUEUED: u8 = 0x80;
        match self.settings().queue_error.take() {
            None => put(&mut sector, 0, &[NOT_QUEUED]),
            Some((tag, outcome)) => {
                let [l0, l1, l2, l3, l4, l5, ..] = outcome.lba.to_le_bytes();
                let [c0, c1] = outcome.count.to_le_bytes();
                put(&mut sector, 0, &[tag, 0, outcome.status, outcome.error, l0, l1, l2, outcome.device]);
                put(&mut sector, 8, &[l3, l4, l5, 0, c0, c1]);
            }
        }
        with_checksum(sector)
    }
}

/// The directory: version 1, and one sector for each log that is there.
fn directory(logs: &[u8]) -> [u8; SECTOR_BYTES] {
    let mut sector = [0; SECTOR_BYTES];
    put(&mut sector, 0, &1u16.to_le_bytes());
    logs.iter().for_each(|log| put(&mut sector, 2 * usize::from(*log), &1u16.to_le_bytes()));
    sector
}

/// The sectors of a SMART log: no errors, no self-tests.
fn smart_log(log: u8, count: u8) -> Option<Vec<u8>> {
    let count = usize::from(count);
    let sector = match log {
        _ if count == 0 => return None,
        DIRECTORY => directory(&[SUMMARY_ERRORS, SELF_TESTS]),
        SUMMARY_ERRORS | SELF_TESTS => {
            let mut sector = [0; SECTOR_BYTES];
            put(&mut sector, 0, &1u16.to_le_bytes());
            with_checksum(sector)
        }
        HOST_FIRST..=HOST_LAST => [0; SECTOR_BYTES],
        _ => return None,
    };
    let mut sectors = sector.to_vec();
    sectors.resize(count * SECTOR_BYTES, 0);
    Some(sectors)
}
