//! An ATA disk (ATA8-ACS; for cylinders, heads and sectors ATA-5): what each command does with an image.

pub(crate) mod commands;
mod geometry;
pub(crate) mod identify;
mod logs;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Disk, SECTOR};

use crate::link::{Collected, DEVICE_LBA, How, Link, Outcome, Range, Small, Stop, TaskFile, error};
use commands::{Access, Direction, Transfer};
use geometry::Geometry;

/// Sectors that one interrupt of READ or WRITE MULTIPLE may stand for.
const MOST_MULTIPLE: u8 = 16;
/// Commands that can be queued.
pub const QUEUE_DEPTH: u8 = 32;
/// What 28 bits can address.
const SECTORS_28: u64 = (1 << 28) - 1;

/// What a drive hangs on: it tells, and hosts go by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cable {
    Parallel,
    Serial,
}

/// A disk.
pub struct AtaDisk {
    disk: Arc<Disk>,
    cable: Cable,
    serial: String,
    settings: Mutex<Settings>,
    /// A failed request has been reported; the guest may make any number of them fail.
    reported: AtomicBool,
}

/// What the host has set.
struct Settings {
    geometry: Geometry,
    /// Sectors of a block of READ and WRITE MULTIPLE; 0: not set, the commands fail.
    multiple: u8,
    write_cache: bool,
    look_ahead: bool,
    /// The transfer mode as SET FEATURES has it: PIO, multiword DMA, Ultra DMA.
    mode: u8,
    /// What the host lets be seen of the disk, in sectors (the host protected area hides the rest).
    visible: u64,
    smart: bool,
    /// The command before was READ NATIVE MAX ADDRESS, without which SET MAX ADDRESS fails.
    native_max_read: bool,
    /// SET MAX ADDRESS with a lasting value has been used since power-on.
    max_set: bool,
    /// SET FEATURES 0xcc: settings go back to what they were at power-on by a reset.
    revert: bool,
    standby: bool,
    /// Of the queued command that failed last, for the log: its tag and its answer.
    queue_error: Option<(u8, Outcome)>,
}

impl Settings {
    fn new(sectors: u64) -> Self {
        Settings {
            geometry: Geometry::default_for(sectors),
            multiple: MOST_MULTIPLE,
            write_cache: true,
            look_ahead: true,
            mode: DEFAULT_MODE,
            visible: sectors,
            smart: true,
            native_max_read: false,
            max_set: false,
            revert: false,
            standby: false,
            queue_error: None,
        }
    }
}

/// Ultra DMA mode 5, as firmware would have set it.
const DEFAULT_MODE: u8 = 0x45;

/// Why a command ends without what it was to do.
pub(crate) enum Fail {
    /// With these bits in the error register.
    Error(u8),
    /// The same, and the address where it happened.
    At(u8, u64),
    Stop(Stop),
}

impl From<Stop> for Fail {
    fn from(stop: Stop) -> Self {
        Fail::Stop(stop)
    }
}

const ABORT: Fail = Fail::Error(error::ABORTED);

impl AtaDisk {
    /// A disk for `disk`. Of `serial`, 20 characters count.
    pub fn new(disk: Arc<Disk>, serial: &str, cable: Cable) -> Self {
        let sectors = disk.size() / SECTOR;
        AtaDisk {
            cable,
            serial: serial.into(),
            settings: Mutex::new(Settings::new(sectors)),
            reported: AtomicBool::new(false),
            disk,
        }
    }

    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sectors(&self) -> u64 {
        self.disk.size() / SECTOR
    }

    /// A reset by the host.
    pub(crate) fn reset(&self) {
        let mut settings = self.settings();
        if settings.revert {
            let visible = settings.visible;
            *settings = Settings { visible, revert: true, ..Settings::new(self.sectors()) };
        }
        settings.native_max_read = false;
        settings.standby = false;
        settings.queue_error = None;
    }

    /// Also writes what the guest has not asked to be written: the image is whole while nobody uses it.
    pub(crate) fn power_on(&self) {
        *self.settings() = Settings::new(self.sectors());
        if let Err(error) = self.disk.flush() {
            self.report(&error);
        }
    }

    /// Tells the user of the first failure.
    fn report(&self, error: &io::Error) {
        if !self.reported.swap(true, Ordering::Relaxed) {
            tracing::warn!("a disk request failed, the guest sees an I/O error: {error}");
        }
    }

    pub(crate) fn execute(&self, command: &TaskFile, link: &mut impl Link) -> Result<Outcome, Stop> {
        let native_max_read = std::mem::take(&mut self.settings().native_max_read);
        let result = self.dispatch(command, link, native_max_read);
        let outcome = match result {
            Ok(outcome) => outcome,
            Err(Fail::Error(bits)) => Outcome::failed(command, bits),
            Err(Fail::At(bits, lba)) => Outcome { lba, ..Outcome::failed(command, bits) },
            Err(Fail::Stop(Stop::Image(error))) => {
                self.report(&error);
                Outcome::failed(command, error::ABORTED)
            }
            Err(Fail::Stop(stop)) => return Err(stop),
        };
        if let (true, Some(Access { transfer: Transfer::Queued, .. })) = (outcome.is_error(), Access::of(command)) {
            self.settings().queue_error = Some(((command.count >> 3) as u8 & 31, outcome));
        }
        Ok(outcome)
    }

    fn dispatch(&self, command: &TaskFile, link: &mut impl Link, native_max_read: bool) -> Result<Outcome, Fail> {
        if let Some(access) = Access::of(command) {
            return self.access(command, &access, link);
        }
        let done = Outcome::done(command);
        match command.command {
            commands::DATA_SET_MANAGEMENT => self.data_set_management(command, link).map(|()| done),
            commands::RECALIBRATE..=commands::RECALIBRATE_LAST => Ok(done),
            commands::READ_VERIFY | commands::READ_VERIFY_NO_RETRY => self.verify(command, false).map(|()| done),
            commands::READ_VERIFY_EXT => self.verify(command, true).map(|()| done),
            commands::SEEK..=commands::SEEK_LAST => self.start(command, false).map(|_| done),
            commands::INITIALIZE_DEVICE_PARAMETERS => self.set_geometry(command).map(|()| done),
            commands::SET_MULTIPLE_MODE => self.set_multiple(command).map(|()| done),
            commands::IDENTIFY_DEVICE => {
                let words = identify::identify(self);
                link.data_in(How::Pio { block: SECTOR as usize }, words.len(), &Small(&words))?;
                Ok(done)
            }
            commands::SET_FEATURES => self.set_features(command).map(|()| done),
            commands::FLUSH_CACHE | commands::FLUSH_CACHE_EXT => {
                self.disk.flush().map_err(Stop::Image)?;
                Ok(done)
            }
            commands::READ_NATIVE_MAX | commands::READ_NATIVE_MAX_EXT => Ok(self.read_native_max(command)),
            commands::SET_MAX | commands::SET_MAX_EXT => self.set_max(command, native_max_read).map(|()| done),
            commands::READ_LOG_EXT | commands::READ_LOG_DMA_EXT => {
                self.read_log(command, link)?;
                Ok(done)
            }
            commands::SMART => self.smart(command, link),
            commands::STANDBY_IMMEDIATE | commands::STANDBY | commands::SLEEP => {
                self.disk.flush().map_err(Stop::Image)?;
                self.settings().standby = true;
                Ok(done)
            }
            commands::IDLE_IMMEDIATE | commands::IDLE => {
                self.settings().standby = false;
                Ok(done)
            }
            commands::CHECK_POWER_MODE => {
                let count = if self.settings().standby { 0x00 } else { 0xff };
                Ok(Outcome { count, ..done })
            }
            _ => Err(ABORT),
        }
    }

    /// The first sector that a command names.
    fn start(&self, command: &TaskFile, extended: bool) -> Result<u64, Fail> {
        let settings = self.settings();
        let sector = if extended {
            if command.device & DEVICE_LBA == 0 { None } else { Some(command.lba) }
        } else if command.device & DEVICE_LBA != 0 {
            Some(command.lba & 0xff_ffff | u64::from(command.device & 15) << 24)
        } else {
            settings.geometry.sector(command)
        };
        sector.filter(|sector| *sector < settings.visible).ok_or(Fail::Error(error::ID_NOT_FOUND))
    }

    /// The sectors that a command names: the first, and how many.
    fn range(&self, command: &TaskFile, extended: bool, count: u16) -> Result<(u64, u64), Fail> {
        let start = self.start(command, extended)?;
        let most = if extended { 1 << 16 } else { 1 << 8 };
        let count = match u64::from(count) % most {
            0 => most,
            count => count,
        };
        let visible = self.settings().visible;
        if start + count > visible {
            return Err(Fail::At(error::ID_NOT_FOUND, visible));
        }
        Ok((start, count))
    }

    fn access(&self, command: &TaskFile, access: &Access, link: &mut impl Link) -> Result<Outcome, Fail> {
        let queued = matches!(access.transfer, Transfer::Queued);
        let count = if queued { command.features } else { command.count };
        let block = match access.transfer {
            Transfer::Multiple => match self.settings().multiple {
                0 => return Err(ABORT),
                multiple => usize::from(multiple),
            },
            _ => 1,
        };
        let (start, count) = self.range(command, access.extended, count)?;
        let how = match access.transfer {
            Transfer::Single | Transfer::Multiple => How::Pio { block: block * SECTOR as usize },
            Transfer::Dma | Transfer::Queued => How::Dma,
        };
        let range = Range { disk: &self.disk, offset: start * SECTOR };
        let length = (count * SECTOR) as usize;
        let result = match access.direction {
            Direction::In => link.data_in(how, length, &range),
            Direction::Out => link.data_out(how, length, &range),
        };
        match result {
            Err(Stop::Image(error)) => {
                self.report(&error);
                let read = matches!(access.direction, Direction::In);
                let bits = if read { error::UNCORRECTABLE } else { error::ABORTED };
                return Err(Fail::At(bits, start));
            }
            other => other?,
        }
        let must_be_written = access.forced || !self.settings().write_cache || queued && command.device & FUA != 0;
        if matches!(access.direction, Direction::Out) && must_be_written {
            self.disk.flush().map_err(Stop::Image)?;
        }
        Ok(Outcome::done(command))
    }

    /// Reads sectors for nobody. The image is only asked where there are data: what is not there can be read.
    fn verify(&self, command: &TaskFile, extended: bool) -> Result<(), Fail> {
        let (start, count) = self.range(command, extended, command.count)?;
        let mut buffer = vec![0; (count.min(128) * SECTOR) as usize];
        let (mut offset, end) = (start * SECTOR, (start + count) * SECTOR);
        let failed = |error: io::Error, at: u64| {
            self.report(&error);
            Fail::At(error::UNCORRECTABLE, at / SECTOR)
        };
        while offset < end {
            let next = self.disk.next_data(offset).map_err(|error| failed(error, offset))?;
            let Some(next) = next.map(|next| next.max(offset) / SECTOR * SECTOR).filter(|next| *next < end) else {
                break;
            };
            let length = buffer.len().min((end - next) as usize);
            let Some(part) = buffer.get_mut(..length) else { break };
            self.disk.read(&[part.into()], next).map_err(|error| failed(error, next))?;
            offset = next + length as u64;
        }
        Ok(())
    }

    fn set_geometry(&self, command: &TaskFile) -> Result<(), Fail> {
        let sectors = self.sectors();
        let geometry = Geometry::chosen(sectors, (command.device & 15) + 1, command.count as u8).ok_or(ABORT)?;
        self.settings().geometry = geometry;
        Ok(())
    }

    fn set_multiple(&self, command: &TaskFile) -> Result<(), Fail> {
        let sectors = command.count as u8;
        if sectors > MOST_MULTIPLE || sectors != 0 && !sectors.is_power_of_two() {
            return Err(ABORT);
        }
        self.settings().multiple = sectors;
        Ok(())
    }

    /// SET FEATURES (ATA8-ACS, 7.45).
    fn set_features(&self, command: &TaskFile) -> Result<(), Fail> {
        let mut settings = self.settings();
        match command.features as u8 {
            0x02 => settings.write_cache = true,
            0x82 => {
                settings.write_cache = false;
                drop(settings);
                self.disk.flush().map_err(Stop::Image)?;
            }
            0xaa => settings.look_ahead = true,
            0x55 => settings.look_ahead = false,
            0xcc => settings.revert = true,
            0x66 => settings.revert = false,
            0x03 => match command.count as u8 {
                // PIO: the default modes, and modes 0 to 4 with flow control. They are no DMA modes.
                0x00 | 0x01 | 0x08..=0x0c => {}
                mode @ (0x20..=0x22 | 0x40..=0x45) => settings.mode = mode,
                _ => return Err(ABORT),
            },
            _ => return Err(ABORT),
        }
        Ok(())
    }

    fn read_native_max(&self, command: &TaskFile) -> Outcome {
        self.settings().native_max_read = true;
        let last = self.sectors() - 1;
        let done = Outcome::done(command);
        if command.command == commands::READ_NATIVE_MAX_EXT {
            return Outcome { lba: last, ..done };
        }
        let last = last.min(SECTORS_28 - 1);
        let device = command.device & !15 | (last >> 24) as u8;
        Outcome { lba: last & 0xff_ffff, device, ..done }
    }

    /// SET MAX ADDRESS hides the end of the disk. What is to last over power-on is kept as long as the machine runs.
    fn set_max(&self, command: &TaskFile, native_max_read: bool) -> Result<(), Fail> {
        if !native_max_read {
            return Err(ABORT);
        }
        // With another feature than 0 the command sets passwords, which this disk has not.
        let extended = command.command == commands::SET_MAX_EXT;
        if !extended && command.features as u8 != 0 {
            return Err(ABORT);
        }
        let last = if extended { command.lba } else { command.lba & 0xff_ffff | u64::from(command.device & 15) << 24 };
        if last >= self.sectors() {
            return Err(Fail::Error(error::ID_NOT_FOUND));
        }
        let mut settings = self.settings();
        let lasting = command.count & 1 != 0;
        if lasting && settings.max_set {
            return Err(Fail::Error(error::ID_NOT_FOUND));
        }
        settings.max_set |= lasting;
        settings.visible = last + 1;
        Ok(())
    }

    /// TRIM: entries of 8 bytes, 48 bits of address and 16 of length (ATA8-ACS, 7.10).
    fn data_set_management(&self, command: &TaskFile, link: &mut impl Link) -> Result<(), Fail> {
        const TRIM: u16 = 1;
        const MOST_BLOCKS: u16 = 8;
        if command.features != TRIM || command.count == 0 || command.count > MOST_BLOCKS || self.disk.read_only() {
            return Err(ABORT);
        }
        let ranges = Collected::default();
        link.data_out(How::Dma, usize::from(command.count) * SECTOR as usize, &ranges)?;
        let visible = self.settings().visible;
        for entry in ranges.into_bytes().chunks_exact(8) {
            let entry = entry.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
            let (start, count) = (entry & 0xffff_ffff_ffff, entry >> 48);
            if count == 0 {
                continue;
            }
            if start + count > visible {
                return Err(Fail::Error(error::ABORTED | error::ID_NOT_FOUND));
            }
            // What was trimmed reads as zeros: IDENTIFY DEVICE promises it.
            self.disk.write_zeroes(start * SECTOR, count * SECTOR, true).map_err(Stop::Image)?;
        }
        Ok(())
    }
}

/// Device register of a queued command: the data are to be on disk when it ends.
const FUA: u8 = 1 << 7;
