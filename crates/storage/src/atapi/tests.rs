use super::*;
use crate::Drive;
use crate::testing::{Image, Wire, numbered};

const SECTORS: u32 = 500;

struct Bench {
    drive: Drive,
    media: Arc<Media>,
}

fn disc(sectors: u32) -> Image {
    Image::of(&numbered(sectors, CD_SECTOR as usize), |options| options.read_only = true)
}

impl Bench {
    fn new(disc: Option<&Image>) -> Self {
        let media = Media::new(disc.map(|disc| disc.disk.clone()));
        let drive = Drive::CdRom(CdRom::new(media.clone(), "SERIAL"));
        Bench { drive, media }
    }

    /// A drive that has told of its reset.
    fn awake(disc: Option<&Image>) -> Self {
        let bench = Self::new(disc);
        bench.packet(&[op::REQUEST_SENSE, 0, 0, 0, 18]).unwrap();
        bench
    }

    /// Does a packet: what it gives, or its sense key and code.
    fn packet(&self, packet: &[u8]) -> Result<Vec<u8>, (u8, u8)> {
        self.packet_with(packet, &[])
    }

    fn packet_with(&self, packet: &[u8], to_drive: &[u8]) -> Result<Vec<u8>, (u8, u8)> {
        let mut wire = Wire { to_drive: to_drive.into(), ..Wire::default() };
        wire.packet[..packet.len()].copy_from_slice(packet);
        let command = TaskFile { command: ata::PACKET, features: 1, ..TaskFile::default() };
        let outcome = self.drive.execute(&command, &mut wire).unwrap();
        if !outcome.is_error() {
            return Ok(wire.from_drive);
        }
        let sense = self.packet(&[op::REQUEST_SENSE, 0, 0, 0, 18]).unwrap();
        assert_eq!(outcome.error >> 4, sense[2]);
        Err((sense[2], sense[12]))
    }
}

#[test]
fn sectors_are_read_by_every_kind_of_read() {
    let disc = disc(SECTORS);
    let bench = Bench::awake(Some(&disc));
    let expected = disc.read(7 * CD_SECTOR, 2 * CD_SECTOR as usize);
    assert_eq!(bench.packet(&[op::READ_10, 0, 0, 0, 0, 7, 0, 0, 2]).unwrap(), expected);
    assert_eq!(bench.packet(&[op::READ_12, 0, 0, 0, 0, 7, 0, 0, 0, 2]).unwrap(), expected);
    assert_eq!(bench.packet(&[op::READ_CD, 0, 0, 0, 0, 7, 0, 0, 2, 0x10]).unwrap(), expected);
    assert_eq!(bench.packet(&[op::READ_CD_MSF, 0, 0, 0, 2, 7, 0, 2, 9, 0x10]).unwrap(), expected);
    assert_eq!(bench.packet(&[op::READ_10, 0, 0, 0, 1, 0xf4, 0, 0, 1]), Err((5, 0x21)), "beyond the end");
    assert_eq!(bench.packet(&[op::READ_10, 0, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff]), Err((5, 0x21)));
    assert_eq!(bench.packet(&[op::READ_CAPACITY]).unwrap(), [0, 0, 1, 0xf3, 0, 0, 8, 0]);
}

#[test]
fn a_reset_is_told_before_anything_is_done() {
    let disc = disc(SECTORS);
    let bench = Bench::new(Some(&disc));
    assert!(bench.packet(&[op::INQUIRY, 0, 0, 0, 36]).unwrap().starts_with(&[5, 0x80]));
    assert_eq!(bench.packet(&[op::TEST_UNIT_READY]), Err((6, 0x29)));
    assert_eq!(bench.packet(&[op::TEST_UNIT_READY]), Ok(vec![]));
}

#[test]
fn a_new_medium_is_an_attention_and_an_event() {
    let (first, second) = (disc(SECTORS), disc(100));
    let bench = Bench::awake(Some(&first));
    let events = [op::GET_EVENT_STATUS, 1, 0, 0, 0x10, 0, 0, 0, 8];
    bench.packet(&[op::TEST_UNIT_READY]).unwrap();
    assert_eq!(bench.packet(&events).unwrap()[4..6], [0, 2]);
    bench.media.eject(false).unwrap();
    assert_eq!(bench.packet(&events).unwrap()[4..6], [3, 1]);
    assert_eq!(bench.packet(&[op::TEST_UNIT_READY]), Err((2, 0x3a)));
    bench.media.insert(second.disk.clone(), false).unwrap();
    assert_eq!(bench.packet(&events).unwrap()[4..6], [2, 2]);
    assert_eq!(bench.packet(&[op::TEST_UNIT_READY]), Err((6, 0x28)));
    assert_eq!(bench.packet(&[op::READ_CAPACITY]).unwrap()[..4], [0, 0, 0, 99]);
}

#[test]
fn a_locked_drive_keeps_its_medium_unless_forced() {
    let disc = disc(SECTORS);
    let bench = Bench::awake(Some(&disc));
    bench.packet(&[op::PREVENT_ALLOW, 0, 0, 0, 1]).unwrap();
    assert_eq!(bench.packet(&[op::START_STOP_UNIT, 0, 0, 0, 2]), Err((5, 0x53)));
    assert_eq!(bench.media.eject(false), Err(crate::MediaError::Locked));
    let events = [op::GET_EVENT_STATUS, 1, 0, 0, 0x10, 0, 0, 0, 8];
    assert_eq!(bench.packet(&events).unwrap()[4], 1, "the guest is asked for it");
    bench.media.eject(true).unwrap();
    assert!(!bench.media.is_loaded());
}

#[test]
fn the_tray_opens_and_closes_over_its_medium() {
    let disc = disc(SECTORS);
    let bench = Bench::awake(Some(&disc));
    bench.packet(&[op::START_STOP_UNIT, 0, 0, 0, 2]).unwrap();
    assert_eq!(bench.packet(&[op::TEST_UNIT_READY]), Err((2, 0x3a)));
    assert_eq!(bench.packet(&[op::MECHANISM_STATUS, 0, 0, 0, 0, 0, 0, 0, 0, 8]).unwrap()[1], 0x10);
    bench.packet(&[op::START_STOP_UNIT, 0, 0, 0, 3]).unwrap();
    assert_eq!(bench.packet(&[op::TEST_UNIT_READY]), Err((6, 0x28)));
    bench.packet(&[op::TEST_UNIT_READY]).unwrap();
}

#[test]
fn the_table_of_contents_has_one_data_track_and_the_end() {
    let disc = disc(SECTORS);
    let bench = Bench::awake(Some(&disc));
    let toc = bench.packet(&[op::READ_TOC, 0, 0, 0, 0, 0, 0, 1, 0]).unwrap();
    assert_eq!(toc, [0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x14, 0xaa, 0, 0, 0, 1, 0xf4]);
    let msf = bench.packet(&[op::READ_TOC, 2, 0, 0, 0, 0, 0, 1, 0]).unwrap();
    assert_eq!(msf[8..12], [0, 0, 2, 0]);
    assert_eq!(bench.packet(&[op::READ_TOC, 0, 0, 0, 0, 0, 5, 1, 0]), Err((5, 0x24)));
    assert_eq!(bench.packet(&[op::READ_TOC, 0, 2, 0, 0, 0, 0, 1, 0]).unwrap().len(), 4 + 4 * 11);
}

#[test]
fn an_answer_is_cut_to_what_the_host_has_room_for() {
    let bench = Bench::awake(None);
    assert_eq!(bench.packet(&[op::INQUIRY, 0, 0, 0, 5]).unwrap().len(), 5);
    assert_eq!(bench.packet(&[op::INQUIRY, 0, 0, 0, 0]).unwrap().len(), 0);
    assert_eq!(bench.packet(&[op::GET_CONFIGURATION, 0, 0, 0, 0, 0, 0, 0, 8]).unwrap().len(), 8);
    assert_eq!(bench.packet(&[op::MODE_SENSE_10, 0, 0x2a, 0, 0, 0, 0, 0, 30]).unwrap()[8], 0x2a);
    assert_eq!(bench.packet(&[op::MODE_SENSE_10, 0, 0x77, 0, 0, 0, 0, 0, 30]), Err((5, 0x24)));
    assert_eq!(bench.packet(&[0xff]), Err((5, 0x20)));
}

#[test]
fn a_host_that_looks_for_disks_finds_the_signature() {
    let bench = Bench::new(None);
    let command = TaskFile { command: ata::IDENTIFY_DEVICE, ..TaskFile::default() };
    let outcome = bench.drive.execute(&command, &mut Wire::default()).unwrap();
    assert_eq!((outcome.error, outcome.lba), (error::ABORTED, 0xeb_1401));
    let command = TaskFile { command: ata::IDENTIFY_PACKET_DEVICE, ..command };
    let mut wire = Wire::default();
    bench.drive.execute(&command, &mut wire).unwrap();
    assert_eq!(wire.from_drive[..2], [0xc0, 0x85]);
}

#[test]
fn every_packet_ends_whatever_it_says() {
    let disc = disc(64);
    let bench = Bench::new(Some(&disc));
    let mut random = chipset::testing::Random(9);
    for _ in 0..20_000 {
        let mut packet = [0; 12];
        let (a, b) = (random.draw().to_le_bytes(), random.draw().to_le_bytes());
        packet[..6].copy_from_slice(&a[..6]);
        packet[6..].copy_from_slice(&b[..6]);
        // Answers are bounded by the disc, but need not be long here.
        packet[6] &= if packet[0] == op::READ_12 { 0 } else { 0xff };
        let mut wire = Wire { packet, ..Wire::default() };
        let command = TaskFile { command: ata::PACKET, features: 1, ..TaskFile::default() };
        bench.drive.execute(&command, &mut wire).unwrap();
    }
}
