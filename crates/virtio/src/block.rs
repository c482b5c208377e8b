//! The block device (virtio 1.2, 5.2): a disk image as a disk, with several queues.
//!
//! Each queue has a thread, which takes requests as they come and does them one by one on the image. What has to wait for the
//! host's disk while there is more to do, and every flush, is left to helpers; and so are large reads, which are all copying,
//! where the host has processors to copy several at a time. (Large writes are not: file systems take one at a time for each
//! file, and the others would wait for it.)

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::available_parallelism;

use block::{Disk, SECTOR};

use crate::helpers::Helpers;
use crate::serve::{Answer, serve_with};
use crate::{Activation, Chain, DeviceType, Error, VirtioDevice, Worker};

/// Feature bits (5.2.3).
const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const TOPOLOGY: u64 = 1 << 10;
const MULTI_QUEUE: u64 = 1 << 12;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

/// Request types (5.2.6).
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH_CACHE: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD_RANGES: u32 = 11;
const ZERO_RANGES: u32 = 13;
/// `struct virtio_blk_req` before the data: type, reserved, sector.
const HEADER: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
const RANGE: usize = 16;
const RANGE_UNMAP: u32 = 1;
const ID_LENGTH: usize = 20;

/// Request status.
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const QUEUE_SIZE: u16 = 256;
/// The most queues that are worth it.
pub const MAX_QUEUES: usize = 16;
/// What fits into a queue besides header and status.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// The most sectors that one range may have, and the most ranges of a request.
const MAX_RANGE: u32 = 1 << 22;
const MAX_RANGES: u32 = 16;
/// The image's blocks are best used 2^3 sectors at a time: a page of the host.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;

/// From how many bytes on a read takes much longer than leaving it to a helper does.
const LARGE_READ: usize = 256 << 10;

/// A disk on the PCI bus.
pub struct Block {
    shared: Arc<Shared>,
    queue_sizes: Vec<u16>,
    workers: Mutex<Vec<Worker>>,
}

/// What the queues' threads share.
struct Shared {
    disk: Arc<Disk>,
    serial: [u8; ID_LENGTH],
    /// A failed request has been reported; the guest may make any number of them fail.
    reported: AtomicBool,
    /// Large reads that helpers are at, and how many that may be: the queue's thread copies, too.
    large_reads: AtomicUsize,
    most_large_reads: usize,
}

/// A large read that a helper has to do.
struct LargeRead(Arc<Shared>);

impl LargeRead {
    fn begin(shared: &Arc<Shared>) -> Option<Self> {
        let one_more = |reads| (reads < shared.most_large_reads).then_some(reads + 1);
        shared.large_reads.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        Some(LargeRead(shared.clone()))
    }
}

impl Drop for LargeRead {
    fn drop(&mut self) {
        self.0.large_reads.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Block {
    /// A device for `disk` with `queues` queues (1 to [`MAX_QUEUES`]). Of `serial`, 20 bytes count.
    pub fn new(disk: impl Into<Arc<Disk>>, serial: &str, queues: usize) -> Self {
        let mut id = [0; ID_LENGTH];
        id.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        let shared = Shared {
            disk: disk.into(),
            serial: id,
            reported: AtomicBool::new(false),
            large_reads: AtomicUsize::new(0),
            most_large_reads: available_parallelism().map_or(0, |processors| processors.get() - 1),
        };
        let queue_sizes = vec![QUEUE_SIZE; queues.clamp(1, MAX_QUEUES)];
        Block { shared: Arc::new(shared), queue_sizes, workers: Mutex::default() }
    }

    /// The configuration space (5.2.4), up to `write_zeroes_may_unmap`.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |offset: usize, value: &[u8]| {
            config.iter_mut().skip(offset).zip(value).for_each(|(to, from)| *to = *from);
        };
        put(0, &(self.shared.disk.size() / SECTOR).to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(24, &[PHYSICAL_BLOCK_EXPONENT]);
        put(26, &(1u16 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
        put(34, &(self.queue_sizes.len() as u16).to_le_bytes());
        put(36, &MAX_RANGE.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &(1u32 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
        put(48, &MAX_RANGE.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]);
        config
    }

    fn workers(&self) -> std::sync::MutexGuard<'_, Vec<Worker>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let disk = &self.shared.disk;
        let mut features = SEG_MAX | BLK_SIZE | TOPOLOGY | MULTI_QUEUE;
        features |= if disk.read_only() { READ_ONLY } else { DISCARD | WRITE_ZEROES };
        // Without it the driver knows that there is no cache to be flushed (5.2.6.2).
        features | if disk.write_through() { 0 } else { FLUSH }
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        data.iter_mut().zip(self.config().iter().skip(offset)).for_each(|(to, from)| *to = *from);
    }

    fn activate(&self, activation: Activation) -> Result<(), Error> {
        let flush_writes = !activation.has(FLUSH);
        let mut workers = self.workers();
        for queue in activation.queues.into_iter().flatten() {
            let shared = self.shared.clone();
            let name = format!("disk-queue{}", queue.index());
            let failed =
                |source| Error::Host { device: DeviceType::Block.name(), what: "can't start a thread", source };
            let helpers = Some(Helpers::new("disk-helper").map_err(failed)?);
            let worker = Worker::start(&name, move |stop| {
                serve_with(queue, stop, helpers, |chain, more| shared.begin(chain, more, flush_writes));
            });
            workers.push(worker.map_err(failed)?);
        }
        Ok(())
    }

    fn reset(&self) {
        self.workers().clear();
        // Also what the driver has not asked for: the image is whole while nobody uses it.
        if let Err(error) = self.shared.disk.flush() {
            self.shared.report(&error);
        }
    }
}

impl Shared {
    /// Does a request, unless it has to wait. `more`: there are others.
    fn begin(self: &Arc<Self>, chain: &Chain, more: bool, flush_writes: bool) -> Answer {
        let Some((kind, sector, data_length)) = parse(chain) else { return Answer::Malformed };
        let waits = match (kind, sector.checked_mul(SECTOR)) {
            (FLUSH_CACHE, _) => true,
            (READ, Some(offset)) if more && whole_sectors(data_length).is_ok() => {
                if data_length >= LARGE_READ
                    && let Some(read) = LargeRead::begin(self)
                {
                    let task = move |chain: &Chain| read.0.answer(chain, flush_writes).unwrap_or_default();
                    return Answer::Later(Box::new(task));
                }
                if self.disk.read_cached(&chain.writable_slices(0, data_length), offset) {
                    chain.write_at(data_length, &[OK]);
                    return Answer::Now(data_length as u32 + 1);
                }
                true
            }
            _ => false,
        };
        if !waits {
            return self.answer(chain, flush_writes).map_or(Answer::Malformed, Answer::Now);
        }
        let shared = self.clone();
        // What the header says then may be something else, and is checked again.
        Answer::Later(Box::new(move |chain| shared.answer(chain, flush_writes).unwrap_or_default()))
    }

    /// Does a request and writes its status. Returns how many device-writable bytes were written; `None`: it is not
    /// a block request at all.
    fn answer(&self, chain: &Chain, flush_writes: bool) -> Option<u32> {
        let (kind, sector, data_length) = parse(chain)?;
        let result = self.execute(kind, sector, chain, data_length).and_then(|status| {
            if flush_writes && matches!(kind, WRITE | ZERO_RANGES) && !self.disk.write_through() {
                self.disk.flush()?;
            }
            Ok(status)
        });
        let status = result.unwrap_or_else(|error| {
            self.report(&error);
            IO_ERROR
        });
        chain.write_at(data_length, &[status]);
        // All before the status counts as written, too.
        Some(data_length as u32 + 1)
    }

    /// Tells the user of the first failure.
    fn report(&self, error: &io::Error) {
        if !self.reported.swap(true, Ordering::Relaxed) {
            tracing::warn!("a disk request failed, the guest sees an I/O error: {error}");
        }
    }

    fn execute(&self, kind: u32, sector: u64, chain: &Chain, data_length: usize) -> io::Result<u8> {
        let offset = || sector.checked_mul(SECTOR).ok_or(io::Error::from(io::ErrorKind::InvalidInput));
        match kind {
            READ => {
                whole_sectors(data_length)?;
                self.disk.read(&chain.writable_slices(0, data_length), offset()?)?;
                Ok(OK)
            }
            WRITE => {
                let length = chain.readable_len() - HEADER;
                whole_sectors(length)?;
                self.disk.write(&chain.readable_slices(HEADER, length), offset()?)?;
                Ok(OK)
            }
            FLUSH_CACHE => self.disk.flush().map(|()| OK),
            GET_ID => {
                chain.write_at(0, self.serial.get(..data_length).unwrap_or(&self.serial));
                Ok(OK)
            }
            DISCARD_RANGES | ZERO_RANGES => self.ranges(kind, chain),
            _ => Ok(UNSUPPORTED),
        }
    }

    fn ranges(&self, kind: u32, chain: &Chain) -> io::Result<u8> {
        let length = chain.readable_len() - HEADER;
        if length == 0 || !length.is_multiple_of(RANGE) || length > RANGE * MAX_RANGES as usize {
            return Ok(UNSUPPORTED);
        }
        for index in 0..length / RANGE {
            let mut bytes = [0; RANGE];
            chain.read_at(HEADER + index * RANGE, &mut bytes);
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes(flags);
            // 5.2.6.2: unmap is for write-zeroes only, all other flags are reserved.
            if flags & !RANGE_UNMAP != 0 || kind == DISCARD_RANGES && flags != 0 || sectors > MAX_RANGE {
                return Ok(UNSUPPORTED);
            }
            let offset = sector.checked_mul(SECTOR).ok_or(io::ErrorKind::InvalidInput)?;
            let length = u64::from(sectors) * SECTOR;
            match kind {
                DISCARD_RANGES => self.disk.discard(offset, length)?,
                _ => self.disk.write_zeroes(offset, length, flags & RANGE_UNMAP != 0)?,
            }
        }
        Ok(OK)
    }
}

/// A request's type, sector, and device-writable bytes before its status.
fn parse(chain: &Chain) -> Option<(u32, u64, usize)> {
    let mut header = [0; HEADER];
    chain.reader().read_exact(&mut header).ok()?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let data_length = chain.writable_len().checked_sub(1)?;
    Some((u32::from_le_bytes([t0, t1, t2, t3]), u64::from_le_bytes(sector), data_length))
}

fn whole_sectors(length: usize) -> io::Result<()> {
    let whole = (length as u64).is_multiple_of(SECTOR);
    if whole { Ok(()) } else { Err(io::Error::new(io::ErrorKind::InvalidInput, "not in whole sectors")) }
}
