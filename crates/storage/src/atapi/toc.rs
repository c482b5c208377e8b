//! What a disc with one data track says about itself: table of contents and its relatives (MMC-5, 6.26 and others).

/// The lead-in's length, by which times are later than sector numbers: two seconds.
const LEAD_IN: u64 = 150;
const FRAMES: u64 = 75;
/// ADR 1 (position), control 4 (a data track).
const DATA_TRACK: u8 = 0x14;
const LEAD_OUT: u8 = 0xaa;

/// Minute, second, frame of a sector.
fn to_msf(sector: u64) -> [u8; 3] {
    let frames = sector + LEAD_IN;
    [(frames / FRAMES / 60).min(255) as u8, (frames / FRAMES % 60) as u8, (frames % FRAMES) as u8]
}

/// The sector at a time, if it is not in the lead-in.
pub fn from_msf([minute, second, frame]: [u8; 3]) -> Option<usize> {
    let frames = (u64::from(minute) * 60 + u64::from(second)) * FRAMES + u64::from(frame);
    frames.checked_sub(LEAD_IN).map(|sector| sector as usize)
}

fn address(sector: u64, msf: bool) -> [u8; 4] {
    let [minute, second, frame] = to_msf(sector);
    if msf { [0, minute, second, frame] } else { (sector.min(u32::MAX.into()) as u32).to_be_bytes() }
}

/// Puts the length of all that follows into the first two bytes.
fn with_length(mut reply: Vec<u8>) -> Vec<u8> {
    let length = (reply.len().saturating_sub(2) as u16).to_be_bytes();
    reply.iter_mut().zip(length).for_each(|(to, from)| *to = from);
    reply
}

/// READ TOC/PMA/ATIP: formats 0 (tracks), 1 (sessions) and 2 (raw). `None`: there is no such format or track.
pub fn toc(format: u8, msf: bool, first: u8, sectors: u64) -> Option<Vec<u8>> {
    let mut reply = vec![0, 0, 1, 1];
    let descriptor = |track: u8, sector: u64| {
        let [a, b, c, d] = address(sector, msf);
        [0, DATA_TRACK, track, 0, a, b, c, d]
    };
    match format {
        0 => {
            if first > 1 && first != LEAD_OUT {
                return None;
            }
            if first <= 1 {
                reply.extend(descriptor(1, 0));
            }
            reply.extend(descriptor(LEAD_OUT, sectors));
        }
        1 => reply.extend(descriptor(1, 0)),
        2 => {
            let [minute, second, frame] = to_msf(sectors);
            let [m, s, f] = to_msf(0);
            for (point, [pm, ps, pf]) in
                [(0xa0, [1, 0, 0]), (0xa1, [1, 0, 0]), (0xa2, [minute, second, frame]), (1, [m, s, f])]
            {
                reply.extend([1, DATA_TRACK, 0, point, 0, 0, 0, 0, pm, ps, pf]);
            }
        }
        _ => return None,
    }
    Some(with_length(reply))
}

/// READ SUB-CHANNEL: no audio is playing.
pub fn subchannel(wanted: bool, format: u8) -> Option<Vec<u8>> {
    const NO_STATUS: u8 = 0x15;
    let mut reply = vec![0, NO_STATUS, 0, 0];
    if wanted {
        match format {
            1 => reply.extend([1, DATA_TRACK, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
            2 | 3 => {
                reply.extend([format, 0, 0, 0]);
                reply.extend([0; 16]);
            }
            _ => return None,
        }
    }
    let length = (reply.len() - 4) as u8;
    if let Some(place) = reply.get_mut(3) {
        *place = length;
    }
    Some(reply)
}

/// READ DISC INFORMATION: finalized, one session, one track.
pub fn disc_information() -> Vec<u8> {
    let mut reply = vec![0, 0, 0x0e, 1, 1, 1, 1, 0x20, 0];
    reply.resize(34, 0);
    with_length(reply)
}

/// READ TRACK INFORMATION, of the track that `kind` and `number` name: by a sector in it, by its number, by its session.
pub fn track_information(kind: u8, number: usize, sectors: u64) -> Option<Vec<u8>> {
    let found = match kind {
        0 => (number as u64) < sectors,
        1 | 2 => number == 1,
        _ => false,
    };
    if !found {
        return None;
    }
    let mut reply = vec![0, 0, 1, 1, 0, 0x04, 0x01, 0];
    reply.extend([0; 16]);
    reply.extend((sectors.min(u32::MAX.into()) as u32).to_be_bytes());
    reply.resize(36, 0);
    Some(with_length(reply))
}
