//! What the unit tests of drives and controllers share.

use std::sync::Arc;

use block::{Disk, Options};

use crate::Drive;
use crate::link::{How, Link, Outcome, Source, Stop, Target, TaskFile};

/// A disk whose sector `n` begins with `n` and repeats it. The image goes with the value.
pub struct Image {
    pub disk: Arc<Disk>,
    _file: tempfile::NamedTempFile,
}

pub fn numbered(sectors: u32, sector_size: usize) -> Vec<u8> {
    (0..sectors).flat_map(|n| n.to_le_bytes().repeat(sector_size / 4)).collect()
}

impl Image {
    pub fn numbered(sectors: u32) -> Self {
        Self::of(&numbered(sectors, 512), |_| {})
    }

    pub fn of(data: &[u8], change: impl FnOnce(&mut Options)) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), data).unwrap();
        let mut options = Options::new(file.path());
        options.format = Some(block::Format::Raw);
        change(&mut options);
        Image { disk: Arc::new(Disk::open(&options).unwrap()), _file: file }
    }

    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.disk.read(&[data.as_mut_slice().into()], offset).unwrap();
        data
    }
}

/// A cable that holds all data of a command: what the drive sends, and what it is to receive.
#[derive(Default)]
pub struct Wire {
    pub packet: [u8; 12],
    pub to_drive: Vec<u8>,
    pub from_drive: Vec<u8>,
    pub how: Option<How>,
}

impl Link for Wire {
    fn data_in(&mut self, how: How, length: usize, source: &impl Source) -> Result<(), Stop> {
        let mut data = vec![0; length];
        source.read(&[data.as_mut_slice().into()], 0)?;
        self.from_drive.extend(data);
        self.how = Some(how);
        Ok(())
    }

    fn data_out(&mut self, how: How, length: usize, target: &impl Target) -> Result<(), Stop> {
        self.to_drive.resize(length, 0);
        target.write(&[self.to_drive.as_mut_slice().into()], 0)?;
        self.how = Some(how);
        Ok(())
    }

    fn packet(&mut self) -> Result<[u8; 12], Stop> {
        Ok(self.packet)
    }
}

/// Does a command; gives its end and what the drive sent.
pub fn execute(drive: &Drive, command: TaskFile, to_drive: &[u8]) -> (Outcome, Vec<u8>) {
    let mut wire = Wire { to_drive: to_drive.into(), ..Wire::default() };
    let outcome = drive.execute(&command, &mut wire).unwrap();
    (outcome, wire.from_drive)
}

/// An image that is gone under the drive's feet: every read fails.
pub fn truncated(sectors: u32) -> Image {
    let image = Image::numbered(sectors);
    image._file.as_file().set_len(0).unwrap();
    image
}
