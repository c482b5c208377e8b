//! The controller's thread: sectors between an image and memory.

use std::sync::Arc;

use block::Disk;

use super::controller::{ABNORMAL, Fifo, Shared, op};
use super::geometry::SECTOR;
use super::{DMA_CHANNEL, Geometry};

/// A command that moves data.
pub struct Request {
    pub operation: u8,
    /// All its bytes.
    pub command: Vec<u8>,
    /// The disk in the drive, if one is there that can be read.
    pub disk: Option<(Arc<Disk>, Geometry)>,
    /// Where the drive's heads are.
    pub cylinder: u8,
    pub rate: u8,
    pub by_dma: bool,
}

/// How a command ended: status registers 0 to 2, and where.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    pub status: [u8; 3],
    pub cylinder: u8,
    pub head: u8,
    pub sector: u8,
    pub size: u8,
}

/// Options of a command's first byte: both sides of the disk, skip deleted sectors.
const MULTI_TRACK: u8 = 1 << 7;
/// Status register 1: no address mark, write-protected, no data, data error, end of cylinder.
const NO_MARK: u8 = 0x01;
const PROTECTED: u8 = 0x02;
const NO_DATA: u8 = 0x04;
const DATA_ERROR: u8 = 0x20;
const END_OF_CYLINDER: u8 = 0x80;
/// Status register 2: wrong cylinder; a sector with a deleted mark.
const WRONG_CYLINDER: u8 = 0x10;
const DELETED: u8 = 0x40;
/// The code of sectors of 512 bytes.
const SIZE_CODE: u8 = 2;

/// The command was abandoned: nobody waits for its end.
struct Abandoned;

/// Why a command ends early: bits of status registers 1 and 2.
enum End {
    Error(u8, u8),
    Abandoned,
}

impl From<Abandoned> for End {
    fn from(_: Abandoned) -> Self {
        End::Abandoned
    }
}

/// What the thread does.
pub fn work(shared: &Shared) {
    let mut state = shared.lock();
    while !state.stopped {
        let Some(request) = state.request.take() else {
            state = shared.wait(state);
            continue;
        };
        state.working = true;
        let epoch = state.epoch;
        drop(state);
        let outcome = Run::new(shared, &request, epoch).perform();
        state = shared.lock();
        state.working = false;
        if let (Some(outcome), true) = (outcome, state.epoch == epoch && !state.stopped) {
            shared.end(&mut state, &outcome);
        }
        shared.changed.notify_all();
    }
}

/// A command under way.
struct Run<'a> {
    shared: &'a Shared,
    request: &'a Request,
    epoch: u64,
    cylinder: u8,
    head: u8,
    sector: u8,
    last: u8,
}

impl<'a> Run<'a> {
    fn new(shared: &'a Shared, request: &'a Request, epoch: u64) -> Self {
        let byte = |index: usize| request.command.get(index).copied().unwrap_or(0);
        let (cylinder, head, sector, last) = (byte(2), byte(3), byte(4), byte(6));
        Run { shared, request, epoch, cylinder, head, sector, last }
    }

    fn perform(mut self) -> Option<Outcome> {
        let size = self.request.command.get(5).copied().unwrap_or(SIZE_CODE);
        let result = match self.request.operation {
            op::READ_ID => self.read_id(),
            op::FORMAT => self.format(),
            _ => self.sectors(size),
        };
        let selection = self.request.command.get(1).copied().unwrap_or(0) & 3;
        let (code, s1, s2) = match result {
            Ok(()) => (0, 0, 0),
            Err(End::Error(s1, s2)) => (ABNORMAL, s1, s2),
            Err(End::Abandoned) => return None,
        };
        let s0 = code | (self.head & 1) << 2 | selection;
        let size = if self.request.operation == op::READ_ID { SIZE_CODE } else { size };
        Some(Outcome { status: [s0, s1, s2], cylinder: self.cylinder, head: self.head, sector: self.sector, size })
    }

    /// The disk, if its marks can be read at the data rate that is set.
    fn disk(&self) -> Result<(&'a Disk, Geometry), End> {
        match &self.request.disk {
            Some((disk, geometry)) if geometry.rate == self.request.rate => Ok((disk, *geometry)),
            _ => Err(End::Error(NO_MARK, 0)),
        }
    }

    /// The next sector that comes by on the track.
    fn read_id(&mut self) -> Result<(), End> {
        self.head = self.request.command.get(1).copied().unwrap_or(0) >> 2 & 1;
        (self.cylinder, self.sector) = (self.request.cylinder, 1);
        let (_, geometry) = self.disk()?;
        geometry.offset(self.cylinder, self.head, 1).map(drop).ok_or(End::Error(NO_MARK, 0))
    }

    /// Sectors from the one that is named on, until the count of the DMA channel ends or the cylinder does.
    fn sectors(&mut self, size: u8) -> Result<(), End> {
        let (disk, geometry) = self.disk()?;
        let operation = self.request.operation;
        let writes = matches!(operation, op::WRITE | op::WRITE_DELETED);
        if writes && disk.read_only() {
            return Err(End::Error(PROTECTED, 0));
        }
        if operation == op::READ_TRACK {
            self.sector = 1;
        }
        let verify_count = if operation == op::VERIFY { self.request.command.get(8).copied() } else { None };
        let mut verified = 0u8;
        loop {
            if self.cylinder != self.request.cylinder {
                return Err(End::Error(NO_DATA, WRONG_CYLINDER));
            }
            let place = geometry.offset(self.cylinder, self.head, self.sector).filter(|_| size == SIZE_CODE);
            let place = place.ok_or(End::Error(NO_DATA, 0))?;
            let mut data = [0; SECTOR as usize];
            let failed = |error: std::io::Error| {
                tracing::debug!("a sector of a floppy disk failed: {error}");
                End::Error(DATA_ERROR, DATA_ERROR)
            };
            let mut ended = false;
            match operation {
                op::WRITE | op::WRITE_DELETED => {
                    ended = self.take_bytes(&mut data)?;
                    disk.write(&[data.as_mut_slice().into()], place).map_err(failed)?;
                }
                op::VERIFY => disk.read(&[data.as_mut_slice().into()], place).map_err(failed)?,
                _ => {
                    disk.read(&[data.as_mut_slice().into()], place).map_err(failed)?;
                    ended = self.give_bytes(&mut data)?;
                }
            }
            verified = verified.wrapping_add(1);
            ended |= verify_count.is_some_and(|count| count != 0 && verified == count);
            let at_end = self.advance();
            if ended {
                // A sector with the other kind of mark ends a read of the one kind (5.1.2).
                let other = operation == op::READ_DELETED;
                return if other { Err(End::Error(0, DELETED)) } else { Ok(()) };
            }
            if at_end {
                return if operation == op::VERIFY { Ok(()) } else { Err(End::Error(END_OF_CYLINDER, 0)) };
            }
        }
    }

    /// To the sector after this one. True: it is not on this cylinder any more (table 5-6 of the datasheet).
    fn advance(&mut self) -> bool {
        if self.sector != self.last {
            self.sector = self.sector.wrapping_add(1);
            return false;
        }
        self.sector = 1;
        let both = self.request.command.first().is_some_and(|first| first & MULTI_TRACK != 0);
        if both {
            self.head ^= 1;
            if self.head & 1 != 0 {
                return false;
            }
        }
        self.cylinder = self.cylinder.wrapping_add(1);
        true
    }

    /// A track: of each sector come cylinder, head, number and size; all are filled with one byte.
    fn format(&mut self) -> Result<(), End> {
        let byte = |index: usize| self.request.command.get(index).copied().unwrap_or(0);
        let (count, filler) = (byte(3), byte(5));
        self.head = byte(1) >> 2 & 1;
        (self.cylinder, self.sector) = (self.request.cylinder, 1);
        let (disk, geometry) = self.disk()?;
        if disk.read_only() {
            return Err(End::Error(PROTECTED, 0));
        }
        for _ in 0..count {
            let mut id = [0; 4];
            let ended = self.take_bytes(&mut id)?;
            let [_, _, number, size] = id;
            // What has another layout than the image can hold is lost.
            let place = geometry.offset(self.request.cylinder, self.head, number).filter(|_| size == SIZE_CODE);
            let place = place.ok_or(End::Error(NO_DATA, 0))?;
            let mut data = [filler; SECTOR as usize];
            if let Err(error) = disk.write(&[data.as_mut_slice().into()], place) {
                tracing::debug!("a sector of a floppy disk failed: {error}");
                return Err(End::Error(DATA_ERROR, DATA_ERROR));
            }
            if ended {
                break;
            }
        }
        Ok(())
    }

    /// Bytes to the host. True: the host wants no more.
    fn give_bytes(&self, data: &mut [u8]) -> Result<bool, Abandoned> {
        if !self.request.by_dma {
            return self.by_register(data, true);
        }
        let mut done = 0;
        while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
            match self.shared.dma.write_memory(DMA_CHANNEL, rest) {
                Some(moved) if moved.ended => return Ok(true),
                Some(moved) if moved.length > 0 => done += moved.length,
                _ => self.wait_for_dma()?,
            }
        }
        Ok(false)
    }

    /// Bytes from the host. True: these were the last.
    fn take_bytes(&self, data: &mut [u8]) -> Result<bool, Abandoned> {
        if !self.request.by_dma {
            return self.by_register(data, false);
        }
        let mut done = 0;
        while let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.shared.dma.read_memory(DMA_CHANNEL, rest) {
                Some(moved) if moved.ended => return Ok(true),
                Some(moved) if moved.length > 0 => done += moved.length,
                _ => self.wait_for_dma()?,
            }
        }
        Ok(false)
    }

    /// The channel is masked: a driver that sets it up after the command is waited for.
    fn wait_for_dma(&self) -> Result<(), Abandoned> {
        std::thread::sleep(std::time::Duration::from_millis(1));
        let state = self.shared.lock();
        if state.epoch == self.epoch && !state.stopped { Ok(()) } else { Err(Abandoned) }
    }

    /// Without DMA software moves all bytes itself; there is no terminal count, so the command ends at the end of the
    /// cylinder, or by a reset.
    fn by_register(&self, data: &mut [u8], to_host: bool) -> Result<bool, Abandoned> {
        let mut state = self.shared.lock();
        if state.epoch != self.epoch {
            return Err(Abandoned);
        }
        state.fifo = Fifo { data: data.to_vec(), at: 0, to_host, active: true };
        self.shared.interrupt(&mut state);
        while state.fifo.at < state.fifo.data.len() {
            state = self.shared.wait(state);
            if state.epoch != self.epoch || state.stopped {
                return Err(Abandoned);
            }
        }
        data.copy_from_slice(&state.fifo.data);
        state.fifo.data.clear();
        Ok(false)
    }
}
