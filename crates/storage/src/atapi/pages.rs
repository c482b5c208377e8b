//! Mode pages, features and disc structures of the drive (MMC-5, 5 and 7; 6.5; 6.22).

use block::Disk;

use super::CD_SECTOR;
use crate::media::Media;

/// Discs of more sectors than a CD has are DVDs.
const MOST_CD_SECTORS: u64 = 360_000;
const CD_ROM: u16 = 0x0008;
const DVD_ROM: u16 = 0x0010;

fn profile(disc: &Disk) -> u16 {
    if disc.size() / CD_SECTOR > MOST_CD_SECTORS { DVD_ROM } else { CD_ROM }
}

/// Features: code, version and flags (bit 0: current, bit 1: persistent), data.
fn features(profile: Option<u16>) -> [(u16, u8, Vec<u8>); 8] {
    let current = u8::from(profile.is_some());
    let is = |wanted: u16| u8::from(profile == Some(wanted));
    let mut profiles = Vec::new();
    for wanted in [DVD_ROM, CD_ROM] {
        let [high, low] = wanted.to_be_bytes();
        profiles.extend([high, low, is(wanted), 0]);
    }
    [
        (0x0000, 3, profiles),
        // Core: ATAPI, and which events are told.
        (0x0001, 3 | 2 << 2, vec![0, 0, 0, 2, 1, 0, 0, 0]),
        // Morphing: the drive tells its changes when it is asked.
        (0x0002, 3 | 1 << 2, vec![2, 0, 0, 0]),
        // Removable medium: a tray that can be locked and opened.
        (0x0003, 3, vec![0x29, 0, 0, 0]),
        // Random readable: blocks of 2048 bytes, one at a time; an error page.
        (0x0010, current, vec![0, 0, 8, 0, 0, 1, 1, 0]),
        (0x001e, is(CD_ROM) | 2 << 2, vec![0, 0, 0, 0]),
        (0x001f, is(DVD_ROM), Vec::new()),
        (0x0105, 3, vec![0, 0, 0, 0]),
    ]
}

/// GET CONFIGURATION: all features from `first` on, the current ones of them, or the one (MMC-5, 6.5).
pub fn configuration(which: u8, first: u16, disc: Option<&Disk>) -> Vec<u8> {
    let profile = disc.map(profile);
    let mut reply = vec![0; 6];
    reply.extend(profile.unwrap_or_default().to_be_bytes());
    for (code, flags, data) in features(profile) {
        let wanted = match which {
            0 => code >= first,
            1 => code >= first && flags & 1 != 0,
            2 => code == first,
            _ => false,
        };
        if wanted {
            reply.extend(code.to_be_bytes());
            reply.extend([flags, data.len() as u8]);
            reply.extend(data);
        }
    }
    let length = (reply.len() as u32 - 4).to_be_bytes();
    reply.iter_mut().zip(length).for_each(|(to, from)| *to = from);
    reply
}

const ERROR_RECOVERY: u8 = 0x01;
const CAPABILITIES: u8 = 0x2a;
const AUDIO_CONTROL: u8 = 0x0e;
const ALL_PAGES: u8 = 0x3f;
/// Page control: which values can be changed, and which are kept.
const CHANGEABLE: u8 = 1;
const SAVED: u8 = 3;

/// MODE SENSE(10). `None`: there is no such page, or it can't be had so.
pub fn mode_sense(page: u8, control: u8, media: &Media) -> Option<Vec<u8>> {
    if control == SAVED {
        return None;
    }
    let medium: u8 = match (media.is_open(), media.is_loaded()) {
        (true, _) => 0x71,
        (false, true) => 0x01,
        (false, false) => 0x70,
    };
    let mut reply = vec![0, 0, medium, 0, 0, 0, 0, 0];
    let before = reply.len();
    let mut add = |code: u8, body: Vec<u8>| {
        if page == code || page == ALL_PAGES {
            reply.extend([code, body.len() as u8]);
            let nothing = control == CHANGEABLE;
            reply.extend(body.into_iter().map(|byte| if nothing { 0 } else { byte }));
        }
    };
    add(ERROR_RECOVERY, vec![0, 5, 0, 0, 0, 0, 0, 0, 0, 0]);
    add(AUDIO_CONTROL, vec![4, 0, 0, 0, 0, 0, 1, 0xff, 2, 0xff, 0, 0, 0, 0]);
    let locked = u8::from(media.is_locked()) << 1;
    // Reads CD-R, CD-RW, DVD-ROM; mode 2 and multi-session; a tray that locks and ejects; 706 KiB/s (4x).
    let speed = 706u16.to_be_bytes();
    let mut capabilities = vec![0x0b, 0, 0x70, 0x60, 0x29 | locked, 0];
    capabilities.extend(speed);
    capabilities.extend([0, 2, 2, 0]);
    capabilities.extend(speed);
    capabilities.extend([0; 6]);
    add(CAPABILITIES, capabilities);
    if reply.len() == before {
        return None;
    }
    let length = (reply.len() as u16 - 2).to_be_bytes();
    reply.iter_mut().zip(length).for_each(|(to, from)| *to = from);
    Some(reply)
}

/// MODE SELECT(10): what may be set are the pages that there are; nothing in them changes what the drive does.
pub fn may_select(parameters: &[u8]) -> bool {
    const HEADER: usize = 8;
    let Some(mut pages) = parameters.get(HEADER..) else { return parameters.is_empty() };
    while let [code, length, rest @ ..] = pages {
        let known = [ERROR_RECOVERY, AUDIO_CONTROL, CAPABILITIES].contains(&(code & 0x3f));
        match rest.get(usize::from(*length)..) {
            Some(next) if known => pages = next,
            _ => return false,
        }
    }
    pages.is_empty()
}

/// READ DISC STRUCTURE of a DVD: its layers and sizes, that it is not protected.
pub fn disc_structure(media_type: u8, format: u8, sectors: u64) -> Option<Vec<u8>> {
    if media_type != 0 || sectors <= MOST_CD_SECTORS {
        return None;
    }
    let mut reply = vec![0, 0, 0, 0];
    match format {
        0 => {
            const FIRST: u32 = 0x3_0000;
            let last = FIRST.saturating_add(sectors.min(u32::MAX.into()) as u32 - 1);
            // DVD-ROM 1, 120 mm, one layer.
            let mut body = vec![0x01, 0x0f, 0x01, 0x00];
            body.extend(FIRST.to_be_bytes());
            body.extend(last.to_be_bytes());
            body.resize(2048, 0);
            reply.extend(body);
        }
        1 => reply.extend([0; 4]),
        _ => return None,
    }
    let length = (reply.len() as u16 - 2).to_be_bytes();
    reply.iter_mut().zip(length).for_each(|(to, from)| *to = from);
    Some(reply)
}
