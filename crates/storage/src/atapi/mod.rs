//! An ATAPI CD-ROM drive: ATA's few commands for packet drives (ATA8-ACS), and the packet commands (MMC-5, SPC-3).

mod identify;
mod pages;
mod sense;
#[cfg(test)]
mod tests;
mod toc;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Disk, SECTOR};

use crate::ata::commands as ata;
use crate::drive::PACKET_SIGNATURE;
use crate::link::{Collected, How, Link, Outcome, Range, Small, Stop, TaskFile, error, status};
use crate::media::Media;
use sense::Sense;

/// Bytes of a CD-ROM's sector.
pub const CD_SECTOR: u64 = 2048;

/// Operation codes of packets.
mod op {
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const REQUEST_SENSE: u8 = 0x03;
    pub const INQUIRY: u8 = 0x12;
    pub const START_STOP_UNIT: u8 = 0x1b;
    pub const PREVENT_ALLOW: u8 = 0x1e;
    pub const READ_CAPACITY: u8 = 0x25;
    pub const READ_10: u8 = 0x28;
    pub const SEEK_10: u8 = 0x2b;
    pub const VERIFY_10: u8 = 0x2f;
    pub const SYNCHRONIZE_CACHE: u8 = 0x35;
    pub const READ_SUBCHANNEL: u8 = 0x42;
    pub const READ_TOC: u8 = 0x43;
    pub const GET_CONFIGURATION: u8 = 0x46;
    pub const GET_EVENT_STATUS: u8 = 0x4a;
    pub const STOP_PLAY: u8 = 0x4e;
    pub const READ_DISC_INFORMATION: u8 = 0x51;
    pub const READ_TRACK_INFORMATION: u8 = 0x52;
    pub const MODE_SELECT_10: u8 = 0x55;
    pub const MODE_SENSE_10: u8 = 0x5a;
    pub const READ_12: u8 = 0xa8;
    pub const READ_DISC_STRUCTURE: u8 = 0xad;
    pub const SET_CD_SPEED: u8 = 0xbb;
    pub const MECHANISM_STATUS: u8 = 0xbd;
    pub const READ_CD: u8 = 0xbe;
    pub const READ_CD_MSF: u8 = 0xb9;
}

/// A CD-ROM drive.
pub struct CdRom {
    media: Arc<Media>,
    serial: String,
    state: Mutex<State>,
    reported: AtomicBool,
}

#[derive(Default)]
struct State {
    /// Of the last command that failed, until it is asked for or another command is done.
    sense: Sense,
    /// To be told before anything else is done: a reset, a change of the medium.
    attention: Option<Sense>,
    /// What of the medium's changes the attention has told, and what the events have.
    changes_seen: u64,
    events_seen: u64,
    /// The transfer mode as SET FEATURES has it.
    mode: u8,
}

/// Why a packet command fails.
enum Fail {
    Check(Sense),
    Stop(Stop),
}

impl From<Stop> for Fail {
    fn from(stop: Stop) -> Self {
        Fail::Stop(stop)
    }
}

impl From<Sense> for Fail {
    fn from(sense: Sense) -> Self {
        Fail::Check(sense)
    }
}

/// Ultra DMA mode 5, as firmware would have set it.
const DEFAULT_MODE: u8 = 0x45;

impl CdRom {
    /// A drive for what `media` holds. Of `serial`, 20 characters count.
    pub fn new(media: Arc<Media>, serial: &str) -> Self {
        let drive = CdRom { serial: serial.into(), state: Mutex::default(), reported: AtomicBool::new(false), media };
        drive.power_on();
        drive
    }

    pub fn media(&self) -> &Arc<Media> {
        &self.media
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn reset(&self) {
        let mut state = self.state();
        state.sense = Sense::NONE;
        state.attention = Some(Sense::RESET);
    }

    /// The medium stays, the tray closes over it, nobody holds it back.
    pub(crate) fn power_on(&self) {
        self.media.set_locked(false);
        self.media.set_open(self.media.is_open() && !self.media.is_loaded());
        let changes = self.media.changes();
        *self.state() = State {
            attention: Some(Sense::RESET),
            changes_seen: changes,
            events_seen: changes,
            mode: DEFAULT_MODE,
            ..State::default()
        };
    }

    pub(crate) fn execute(&self, command: &TaskFile, link: &mut impl Link) -> Result<Outcome, Stop> {
        let aborted = Outcome::failed(command, error::ABORTED);
        Ok(match command.command {
            ata::PACKET => return self.packet(command, link),
            ata::IDENTIFY_PACKET_DEVICE => {
                let words = identify::identify(&self.serial, self.state().mode);
                link.data_in(How::Pio { block: SECTOR as usize }, words.len(), &Small(&words))?;
                Outcome::done(command)
            }
            // A host that looks for disks finds by the signature that this is none (ATA8-ACS, 7.16.4).
            ata::IDENTIFY_DEVICE | 0x20 => {
                let (count, lba) = PACKET_SIGNATURE;
                Outcome { count, lba, ..aborted }
            }
            ata::SET_FEATURES => match (command.features as u8, command.count as u8) {
                (0x03, 0x00 | 0x01 | 0x08..=0x0c) | (0x66 | 0xcc, _) => Outcome::done(command),
                (0x03, mode @ (0x20..=0x22 | 0x40..=0x45)) => {
                    self.state().mode = mode;
                    Outcome::done(command)
                }
                _ => aborted,
            },
            ata::FLUSH_CACHE | ata::IDLE | ata::IDLE_IMMEDIATE | ata::STANDBY | ata::STANDBY_IMMEDIATE | ata::SLEEP => {
                Outcome::done(command)
            }
            ata::CHECK_POWER_MODE => Outcome { count: 0xff, ..Outcome::done(command) },
            _ => aborted,
        })
    }

    fn packet(&self, command: &TaskFile, link: &mut impl Link) -> Result<Outcome, Stop> {
        let packet = link.packet()?;
        let how = if command.features & 1 != 0 {
            How::Dma
        } else {
            // LBA mid and high: how long a block may be. 0 would be none, and an odd number can't go through the
            // 16-bit register but at the end (ATA8-APT, 9.8).
            let limit = (command.lba >> 8 & 0xffff) as usize;
            How::PacketPio { limit: if limit < 2 { 0xfffe } else { limit & !1 } }
        };
        let result = self.perform(&packet, how, link);
        let sense = match result {
            Ok(()) => Sense::NONE,
            Err(Fail::Check(sense)) => sense,
            Err(Fail::Stop(Stop::Image(error))) => {
                if !self.reported.swap(true, Ordering::Relaxed) {
                    tracing::warn!("reading a CD-ROM failed, the guest sees a medium error: {error}");
                }
                Sense::UNREADABLE
            }
            Err(Fail::Stop(stop)) => return Err(stop),
        };
        self.state().sense = sense;
        // Interrupt reason: the command has ended.
        const ENDED: u16 = 3;
        let ready = status::READY | status::SEEK_COMPLETE;
        let (status, error) = match sense {
            Sense::NONE => (ready, 0),
            Sense { key, .. } => (ready | status::ERROR, (key << 4) | error::ABORTED),
        };
        Ok(Outcome { status, error, count: ENDED, lba: command.lba, device: command.device })
    }

    /// What is to be told before the command is done (SPC-3, 5.8.5): of some commands it is kept.
    fn attention(&self) -> Option<Sense> {
        let changes = self.media.changes();
        let mut state = self.state();
        if let Some(attention) = state.attention.take() {
            return Some(attention);
        }
        if state.changes_seen != changes {
            state.changes_seen = changes;
            // A medium that is gone is told by "not ready".
            return self.media.disk().is_some().then_some(Sense::CHANGED);
        }
        None
    }

    fn perform<L: Link>(&self, packet: &[u8; 12], how: How, link: &mut L) -> Result<(), Fail> {
        let send = |link: &mut L, data: &[u8], most: usize| -> Result<(), Fail> {
            let length = data.len().min(most);
            if length > 0 {
                link.data_in(how, length, &Small(data))?;
            }
            Ok(())
        };
        let short = |at: usize| usize::from(u16::from_be_bytes([byte(packet, at), byte(packet, at + 1)]));
        let long = |at: usize| short(at) << 16 | short(at + 2);
        let operation = packet[0];
        // These are done whatever there is to be told.
        match operation {
            op::REQUEST_SENSE => {
                let waiting = self.attention();
                let sense = std::mem::take(&mut self.state().sense);
                let sense = if sense == Sense::NONE { waiting.unwrap_or_else(|| self.current()) } else { sense };
                return send(link, &sense.to_bytes(), packet[4].into());
            }
            op::INQUIRY => return send(link, &self.inquiry(packet)?, short(3)),
            op::GET_CONFIGURATION => {
                let reply = pages::configuration(packet[1] & 3, short(2) as u16, self.media.disk().as_deref());
                return send(link, &reply, short(7));
            }
            op::GET_EVENT_STATUS => return send(link, &self.events(packet)?, short(7)),
            _ => {}
        }
        if let Some(sense) = self.attention() {
            return Err(sense.into());
        }
        match operation {
            op::TEST_UNIT_READY | op::SYNCHRONIZE_CACHE | op::STOP_PLAY => Ok(self.medium().map(drop)?),
            op::START_STOP_UNIT => self.start_stop(packet[4]),
            op::PREVENT_ALLOW => {
                self.media.set_locked(packet[4] & 1 != 0);
                Ok(())
            }
            op::READ_CAPACITY => {
                let sectors = sectors(&*self.medium()?);
                let mut reply = [0; 8];
                reply[..4].copy_from_slice(&(sectors.saturating_sub(1).min(u32::MAX.into()) as u32).to_be_bytes());
                reply[4..].copy_from_slice(&(CD_SECTOR as u32).to_be_bytes());
                send(link, &reply, reply.len())
            }
            op::READ_10 => self.read(how, link, long(2), short(7)),
            op::READ_12 => self.read(how, link, long(2), long(6)),
            op::READ_CD => {
                let count = long(5) & 0xff_ffff;
                self.read_cd(packet, how, link, long(2), count)
            }
            op::READ_CD_MSF => {
                let start = toc::from_msf([packet[3], packet[4], packet[5]]).ok_or(Sense::BAD_FIELD)?;
                let end = toc::from_msf([packet[6], packet[7], packet[8]]).ok_or(Sense::BAD_FIELD)?;
                let count = end.checked_sub(start).ok_or(Sense::BAD_FIELD)?;
                self.read_cd(packet, how, link, start, count)
            }
            op::SEEK_10 => self.check(&*self.medium()?, long(2), 0),
            op::VERIFY_10 => self.check(&*self.medium()?, long(2), short(7)),
            op::READ_TOC => {
                let format = match packet[2] & 15 {
                    0 => packet[9] >> 6,
                    format => format,
                };
                let reply = toc::toc(format, packet[1] & 2 != 0, packet[6], sectors(&*self.medium()?));
                send(link, &reply.ok_or(Sense::BAD_FIELD)?, short(7))
            }
            op::READ_SUBCHANNEL => {
                self.medium()?;
                send(link, &toc::subchannel(packet[2] & 0x40 != 0, packet[3]).ok_or(Sense::BAD_FIELD)?, short(7))
            }
            op::READ_DISC_INFORMATION => {
                self.medium()?;
                send(link, &toc::disc_information(), short(7))
            }
            op::READ_TRACK_INFORMATION => {
                let disc = self.medium()?;
                let reply = toc::track_information(packet[1] & 3, long(2), sectors(&disc)).ok_or(Sense::BAD_FIELD)?;
                send(link, &reply, short(7))
            }
            op::MODE_SENSE_10 => {
                let (page, control) = (packet[2] & 0x3f, packet[2] >> 6);
                let reply = pages::mode_sense(page, control, &self.media).ok_or(Sense::BAD_FIELD)?;
                send(link, &reply, short(7))
            }
            op::MODE_SELECT_10 => {
                let length = short(7);
                let parameters = Collected::default();
                if length > 0 {
                    link.data_out(how, length, &parameters)?;
                }
                if pages::may_select(&parameters.into_bytes()) { Ok(()) } else { Err(Sense::BAD_PARAMETER.into()) }
            }
            op::READ_DISC_STRUCTURE => {
                let disc = self.medium()?;
                let reply = pages::disc_structure(packet[1] & 15, packet[7], sectors(&disc)).ok_or(Sense::BAD_FIELD)?;
                send(link, &reply, short(8))
            }
            // Every speed is as fast as the host can.
            op::SET_CD_SPEED => Ok(()),
            op::MECHANISM_STATUS => send(link, &self.mechanism(), short(8)),
            _ => Err(Sense::BAD_COMMAND.into()),
        }
    }

    /// What REQUEST SENSE says when nothing has failed.
    fn current(&self) -> Sense {
        match self.medium() {
            Ok(_) => Sense::NONE,
            Err(sense) => sense,
        }
    }

    /// The medium, or why it can't be used.
    fn medium(&self) -> Result<Arc<Disk>, Sense> {
        let missing = if self.media.is_open() { Sense::TRAY_OPEN } else { Sense::NO_MEDIUM };
        self.media.disk().ok_or(missing)
    }

    fn check(&self, disk: &Disk, start: usize, count: usize) -> Result<(), Fail> {
        let end = (start as u64).saturating_add(count as u64);
        if start as u64 >= sectors(disk) && count > 0 || end > sectors(disk) {
            return Err(Sense::BAD_ADDRESS.into());
        }
        Ok(())
    }

    fn read(&self, how: How, link: &mut impl Link, start: usize, count: usize) -> Result<(), Fail> {
        let disk = self.medium()?;
        self.check(&disk, start, count)?;
        if count > 0 {
            let source = Range { disk: &disk, offset: start as u64 * CD_SECTOR };
            link.data_in(how, count * CD_SECTOR as usize, &source)?;
        }
        Ok(())
    }

    /// READ CD: of the fields of a sector only the user data are here, which is what is asked for of data discs.
    fn read_cd(
        &self,
        packet: &[u8; 12],
        how: How,
        link: &mut impl Link,
        start: usize,
        count: usize,
    ) -> Result<(), Fail> {
        const USER_DATA: u8 = 0x10;
        let (kind, fields) = (packet[1] >> 2 & 7, packet[9]);
        // Any type, mode 1, or mode 2 form 1.
        if !matches!(kind, 0 | 2 | 4) {
            return Err(Sense::BAD_FIELD.into());
        }
        match fields & 0xf8 {
            0 => self.check(&*self.medium()?, start, count),
            USER_DATA => self.read(how, link, start, count),
            _ => Err(Sense::BAD_FIELD.into()),
        }
    }

    /// START STOP UNIT: the tray, mostly.
    fn start_stop(&self, what: u8) -> Result<(), Fail> {
        const LOAD_EJECT: u8 = 2;
        const START: u8 = 1;
        // Power conditions: a drive that is always awake takes all of them.
        if what >> 4 != 0 || what & LOAD_EJECT == 0 {
            return Ok(());
        }
        let open = what & START == 0;
        if open && self.media.is_locked() {
            let loaded = self.media.is_loaded();
            return Err(if loaded { Sense::REMOVAL_PREVENTED } else { Sense::NOT_READY_PREVENTED }.into());
        }
        self.media.set_open(open);
        Ok(())
    }

    fn inquiry(&self, packet: &[u8; 12]) -> Result<Vec<u8>, Fail> {
        const VITAL_PRODUCT_DATA: u8 = 1;
        let mut reply = vec![0x05, 0x80, 0x00, 0x21];
        if packet[1] & VITAL_PRODUCT_DATA == 0 {
            if packet[2] != 0 {
                return Err(Sense::BAD_FIELD.into());
            }
            reply.extend([31, 0, 0, 0]);
            reply.extend(b"Ringer  ");
            reply.extend(b"CD-ROM          ");
            reply.extend(b"1.0 ");
            return Ok(reply);
        }
        reply = vec![0x05, packet[2], 0, 0];
        match packet[2] {
            // Which pages there are; the serial number.
            0x00 => reply.extend([0x00, 0x80]),
            0x80 => reply.extend(self.serial.bytes().take(20)),
            _ => return Err(Sense::BAD_FIELD.into()),
        }
        let length = (reply.len() - 4) as u8;
        if let Some(place) = reply.get_mut(3) {
            *place = length;
        }
        Ok(reply)
    }

    /// GET EVENT STATUS NOTIFICATION (MMC-5, 6.7): what has become of the medium since it was last asked.
    fn events(&self, packet: &[u8; 12]) -> Result<Vec<u8>, Fail> {
        const POLLED: u8 = 1;
        const MEDIA: u8 = 4;
        const SUPPORTED: u8 = 1 << MEDIA;
        const NONE_AVAILABLE: u8 = 0x80;
        if packet[1] & POLLED == 0 {
            return Err(Sense::BAD_FIELD.into());
        }
        if packet[4] & SUPPORTED == 0 {
            return Ok(vec![0, 2, NONE_AVAILABLE, SUPPORTED]);
        }
        let changes = self.media.changes();
        let seen = std::mem::replace(&mut self.state().events_seen, changes);
        let present = self.media.disk().is_some();
        let event = match (seen != changes, present) {
            _ if self.media.take_eject_request() => 1,
            (false, _) => 0,
            (true, true) => 2,
            (true, false) => 3,
        };
        let status = u8::from(present) << 1 | u8::from(self.media.is_open());
        Ok(vec![0, 6, MEDIA, SUPPORTED, event, status, 0, 0])
    }

    fn mechanism(&self) -> [u8; 8] {
        let open = u8::from(self.media.is_open()) << 4;
        [0, open, 0, 0, 0, 1, 0, 0]
    }
}

fn sectors(disk: &Disk) -> u64 {
    disk.size() / CD_SECTOR
}

fn byte(packet: &[u8; 12], at: usize) -> u8 {
    packet.get(at).copied().unwrap_or_default()
}
