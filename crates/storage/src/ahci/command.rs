//! A command in the driver's list: its header, its table, and its data (AHCI 4.2.2 and 4.2.3).

use memory::View;
use memory::vm_memory::{Bytes, GuestAddress};

use super::fis::{self, FromHost};
use super::port::Port;
use crate::dma::Scatter;
use crate::link::{How, Link, Outcome, Source, Stop, Target, TaskFile, status};

/// Bytes of a header in the list.
const HEADER: u64 = 32;
/// In the command table: the packet, and the physical region descriptors.
const PACKET: u64 = 0x40;
const DESCRIPTORS: u64 = 0x80;
const DESCRIPTOR: usize = 16;
/// Descriptors that are read at once.
const BATCH: usize = 256;
/// Of a descriptor's last doubleword: bytes less 1.
const BYTE_COUNT: u32 = 0x3f_ffff;

/// A header: where the command is, and how long its list of descriptors.
pub struct Header {
    address: u64,
    table: u64,
    descriptors: u16,
    /// After the frame is sent BSY is cleared: for resets.
    pub clears_busy: bool,
}

impl Header {
    /// Reads header `slot`. `None`: the list is not in RAM.
    pub fn read(memory: &View, list: u64, slot: u8) -> Option<Self> {
        let address = list.checked_add(HEADER * u64::from(slot))?;
        let mut bytes = [0; 16];
        memory.read_slice(&mut bytes, GuestAddress(address)).ok()?;
        let [_, flags, d0, d1, _, _, _, _, table @ ..] = bytes;
        let table = u64::from_le_bytes(table) & !0x7f;
        let clears_busy = flags & 4 != 0;
        Some(Header { address, table, descriptors: u16::from_le_bytes([d0, d1]), clears_busy })
    }

    /// The frame that the driver sends; `None`: the table is not in RAM or holds something else.
    pub fn frame(&self, memory: &View) -> Option<FromHost> {
        let mut frame = [0; 20];
        memory.read_slice(&mut frame, GuestAddress(self.table)).ok()?;
        fis::from_host(&frame)
    }

    fn scatter(&self, memory: &View) -> Option<Scatter> {
        let mut scatter = Scatter::default();
        let mut left = usize::from(self.descriptors);
        let mut address = self.table.checked_add(DESCRIPTORS)?;
        let mut batch = [0; BATCH * DESCRIPTOR];
        while left > 0 {
            let count = left.min(BATCH);
            let bytes = batch.get_mut(..count * DESCRIPTOR)?;
            memory.read_slice(bytes, GuestAddress(address)).ok()?;
            for entry in bytes.chunks_exact(DESCRIPTOR) {
                let Ok(entry) = <[u8; DESCRIPTOR]>::try_from(entry) else { continue };
                let (low, high) = (u128::from_le_bytes(entry) as u64, (u128::from_le_bytes(entry) >> 64) as u64);
                let length = ((high >> 32) as u32 & BYTE_COUNT) as usize + 1;
                // Addresses and lengths are even.
                scatter.push(low & !1, length.next_multiple_of(2));
            }
            address = address.checked_add((count * DESCRIPTOR) as u64)?;
            left -= count;
        }
        Some(scatter)
    }

    /// How many bytes were moved (PRDBC).
    fn tell_moved(&self, memory: &View, bytes: usize) {
        // A list that was RAM when the header was read is RAM.
        let _ = memory.write_slice(&(bytes as u32).to_le_bytes(), GuestAddress(self.address + 4));
    }
}

/// A drive's end of a port, for one command.
pub struct Transfer<'a> {
    port: &'a Port,
    header: &'a Header,
    command: TaskFile,
    epoch: u64,
    scatter: Option<Scatter>,
    moved: usize,
    /// The last frame of PIO data has told the end of the command already.
    pub told: bool,
}

impl<'a> Transfer<'a> {
    pub fn new(port: &'a Port, header: &'a Header, command: TaskFile, epoch: u64) -> Self {
        Transfer { port, header, command, epoch, scatter: None, moved: 0, told: false }
    }

    /// What the driver said of its memory; there must be room for `length` more bytes.
    fn prepare(&mut self, length: usize) -> Result<(&Scatter, usize), Stop> {
        if self.port.is_abandoned(self.epoch) {
            return Err(Stop::Abandoned);
        }
        if self.scatter.is_none() {
            self.scatter = Some(self.header.scatter(self.port.memory()).ok_or(Stop::Memory)?);
        }
        match &self.scatter {
            Some(scatter) if scatter.len().saturating_sub(self.moved) >= length => Ok((scatter, self.moved)),
            // More data than the driver has room for: an overflow of the list (AHCI 6.1.5) ends the command.
            _ => Err(Stop::Memory),
        }
    }

    fn moved(&mut self, length: usize) {
        self.moved = self.moved.saturating_add(length);
        // Queued commands leave it alone: the driver does not look (AHCI 5.6.4.2).
        self.header.tell_moved(self.port.memory(), self.moved);
    }

    /// A block of PIO data begins: the frame before it, with what the status is to be after all of it.
    fn announce(&mut self, how: How, length: usize, to_host: bool) {
        let (packet, block) = match how {
            How::Pio { block } => (false, block),
            How::PacketPio { limit } => (true, limit),
            How::Dma => return,
        };
        let ready = status::READY | status::SEEK_COMPLETE;
        let now = Outcome { status: ready | status::DATA_REQUEST, ..Outcome::done(&self.command) };
        // A disk that has sent its last block is done; all else ends by a register frame.
        self.told = to_host && !packet;
        let end = if self.told { ready } else { status::BUSY };
        let frame = fis::pio_setup(&now, end, block.min(length).min(0xfffe) as u16, to_host);
        self.port.announce_pio(self.epoch, &frame);
    }
}

impl Link for Transfer<'_> {
    fn data_in(&mut self, how: How, length: usize, source: &impl Source) -> Result<(), Stop> {
        // What a packet command answers is cut to the memory that is there for it.
        let room = self.prepare(0)?.0.len().saturating_sub(self.moved);
        let length = if matches!(how, How::PacketPio { .. }) || self.port.has_packet_drive() {
            length.min(room)
        } else {
            length
        };
        let (port, epoch) = (self.port, self.epoch);
        let (scatter, start) = self.prepare(length)?;
        scatter.fill(port.memory(), start, length, &|| port.is_abandoned(epoch), source)?;
        self.moved(length);
        self.announce(how, length, true);
        Ok(())
    }

    fn data_out(&mut self, how: How, length: usize, target: &impl Target) -> Result<(), Stop> {
        self.announce(how, length, false);
        let (port, epoch) = (self.port, self.epoch);
        let (scatter, start) = self.prepare(length)?;
        scatter.drain(port.memory(), start, length, &|| port.is_abandoned(epoch), target)?;
        self.moved(length);
        Ok(())
    }

    fn packet(&mut self) -> Result<[u8; 12], Stop> {
        let mut packet = [0; 12];
        let place = self.header.table.checked_add(PACKET).ok_or(Stop::Memory)?;
        self.port.memory().read_slice(&mut packet, GuestAddress(place)).map_err(|_| Stop::Memory)?;
        Ok(packet)
    }
}
