//! Firmware's memory at the top of the first 4 GiB: a ROM, or flash chips with the Intel command set (JEDEC CFI 0001).
//!
//! Both are device memory that processors read and execute directly. A write to a flash chip is a command; while it shows
//! something else than its array (status, identification), its window is taken off the memory map, and reads come here as
//! well. What is programmed goes to the chip's file when the guest returns to reading, or powers down.
//!
//! Firmware that guards its variables by system-management mode locks the memory of that mode before it starts what it does
//! not trust. From then on a chip takes commands of processors in that mode only, and shows its array to all others
//! ([`WriteLock`]).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memory::vm_memory::Bytes;
use memory::{Access, DeviceMemory, Ram, Window};

use crate::{Device, Error};

/// What is erased at once.
pub const BLOCK_SIZE: u64 = 4096;
/// Chips and ROMs end at 4 GiB, where the first instruction is.
pub const TOP: u64 = 1 << 32;
/// The most that firmware may take: below are I/O APIC and local APICs.
pub const MAX_SIZE: u64 = 16 << 20;
/// So much of its end can be seen below 1 MiB, too, while RAM is off there.
const LOW_SIZE: u64 = 0x2_0000;
const LOW_END: u64 = 0x10_0000;

/// Status register: ready; an erase failed, a program failed (both: a wrong sequence of commands).
const READY: u8 = 1 << 7;
const ERASE_ERROR: u8 = 1 << 5;
const PROGRAM_ERROR: u8 = 1 << 4;
/// The buffer for writes, in bytes: two to this power. A count of 8 bits reaches no further.
const BUFFER_BITS: u8 = 8;

const MANUFACTURER: u8 = 0x89;
const DEVICE: u8 = 0x18;

/// Where what is programmed goes.
pub enum Backing {
    /// The chip is write-protected.
    ReadOnly,
    /// It is gone with the machine.
    Volatile,
    File(File),
}

/// A flash chip's content, from its lowest address.
pub struct Chip {
    pub content: Vec<u8>,
    pub backing: Backing,
}

/// What the guest starts from.
pub enum Image {
    Rom(Vec<u8>),
    /// From the top down.
    Flash(Vec<Chip>),
}

/// A ROM: its windows.
pub struct Rom {
    _windows: Vec<Window>,
}

/// Puts a ROM into the memory map. Its size is a multiple of 4 KiB.
pub fn rom(ram: &Ram, content: &[u8]) -> Result<Rom, Error> {
    let (memory, mut windows) = device_memory(ram, content, TOP)?;
    windows.extend(low_window(&memory)?);
    Ok(Rom { _windows: windows })
}

fn device_memory(ram: &Ram, content: &[u8], end: u64) -> Result<(DeviceMemory, Vec<Window>), Error> {
    let memory = ram.device_memory(content.len() as u64)?;
    memory.slice().write_slice(content, 0).map_err(|e| Error::Firmware { why: e.to_string() })?;
    let window = memory.window(0, memory.size(), Access::ReadOnly)?;
    window.map(end.saturating_sub(memory.size()));
    Ok((memory, vec![window]))
}

/// The end of the topmost memory, as it is seen below 1 MiB.
fn low_window(memory: &DeviceMemory) -> Result<Option<Window>, Error> {
    let size = memory.size().min(LOW_SIZE);
    let window = memory.window(memory.size() - size, size, Access::ReadOnly)?;
    window.map(LOW_END - size);
    Ok(Some(window))
}

/// What reads show.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Show {
    Array,
    Status,
    Identification,
    Query,
}

/// What the next write is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expect {
    Command,
    /// The byte to program.
    Program,
    /// D0H, which confirms the erasure of a block.
    EraseConfirm,
    /// The second cycle of lock commands.
    Lock,
    /// How many bytes will be written to the buffer, less one.
    BufferCount,
    BufferData {
        left: usize,
    },
    /// D0H, which programs the buffer.
    BufferConfirm,
}

struct State {
    show: Show,
    expect: Expect,
    status: u8,
    /// The bytes to be programmed, each with its offset.
    buffer: Vec<(u64, u8)>,
    /// What has changed since the file was written.
    changed: Option<(u64, u64)>,
}

/// Whether chips take commands from system-management mode alone.
#[derive(Default)]
pub struct WriteLock(AtomicBool);

impl WriteLock {
    pub fn set(&self, locked: bool) {
        self.0.store(locked, Ordering::SeqCst);
    }

    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// A flash chip.
pub struct Flash {
    memory: DeviceMemory,
    windows: Vec<Window>,
    /// Its first address.
    base: u64,
    backing: Backing,
    lock: Arc<WriteLock>,
    state: Mutex<State>,
}

impl Flash {
    /// Puts a chip into the memory map, with its last byte below `end`.
    pub fn new(ram: &Ram, chip: Chip, end: u64, lock: Arc<WriteLock>) -> Result<Arc<Self>, Error> {
        let (memory, mut windows) = device_memory(ram, &chip.content, end)?;
        if end == TOP {
            windows.extend(low_window(&memory)?);
        }
        let base = end.saturating_sub(memory.size());
        let state =
            State { show: Show::Array, expect: Expect::Command, status: READY, buffer: Vec::new(), changed: None };
        Ok(Arc::new(Flash { memory, windows, base, backing: chip.backing, lock, state: Mutex::new(state) }))
    }

    /// The first address, and the size.
    pub fn place(&self) -> (u64, u64) {
        (self.base, self.memory.size())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn command(&self, state: &mut State, offset: u64, value: u8) {
        match state.expect {
            Expect::Command => self.first_cycle(state, value),
            Expect::Program => {
                self.program(state, offset, value);
                self.done(state);
            }
            Expect::EraseConfirm if value == 0xd0 => {
                self.erase(state, offset);
                self.done(state);
            }
            // 01H locks, D0H unlocks: blocks are never locked.
            Expect::Lock if matches!(value, 0x01 | 0xd0) => self.done(state),
            Expect::EraseConfirm | Expect::Lock => self.wrong_sequence(state),
            Expect::BufferCount => {
                let left = usize::from(value) + 1;
                state.buffer.clear();
                state.expect = Expect::BufferData { left };
            }
            Expect::BufferData { left } => {
                state.buffer.push((offset, value));
                state.expect = if left > 1 { Expect::BufferData { left: left - 1 } } else { Expect::BufferConfirm };
            }
            Expect::BufferConfirm if value == 0xd0 => {
                for (offset, value) in std::mem::take(&mut state.buffer) {
                    self.program(state, offset, value);
                }
                self.done(state);
            }
            Expect::BufferConfirm => self.wrong_sequence(state),
        }
    }

    fn first_cycle(&self, state: &mut State, value: u8) {
        let expect = match value {
            0x10 | 0x40 => Expect::Program,
            0x20 => Expect::EraseConfirm,
            0x60 => Expect::Lock,
            0xe8 => Expect::BufferCount,
            _ => Expect::Command,
        };
        if expect != Expect::Command {
            state.expect = expect;
            return self.show(state, Show::Status);
        }
        match value {
            0x50 => {
                state.status = 0;
                self.show(state, Show::Array);
            }
            0x70 => self.show(state, Show::Status),
            0x90 => self.show(state, Show::Identification),
            0x98 => self.show(state, Show::Query),
            // FFH and F0H, and all that is no command.
            _ => self.show(state, Show::Array),
        }
    }

    fn done(&self, state: &mut State) {
        state.status |= READY;
        state.expect = Expect::Command;
        self.show(state, Show::Status);
    }

    fn wrong_sequence(&self, state: &mut State) {
        state.status |= ERASE_ERROR | PROGRAM_ERROR;
        self.done(state);
    }

    /// Programming clears bits.
    fn program(&self, state: &mut State, offset: u64, value: u8) {
        if matches!(self.backing, Backing::ReadOnly) {
            state.status |= PROGRAM_ERROR;
            return;
        }
        let slice = self.memory.slice();
        let old: u8 = slice.read_obj(offset as usize).unwrap_or(0xff);
        if slice.write_obj(old & value, offset as usize).is_ok() {
            Self::note(state, offset, offset + 1);
        }
    }

    fn erase(&self, state: &mut State, offset: u64) {
        if matches!(self.backing, Backing::ReadOnly) {
            state.status |= ERASE_ERROR;
            return;
        }
        let start = offset / BLOCK_SIZE * BLOCK_SIZE;
        if self.memory.slice().write_slice(&[0xff; BLOCK_SIZE as usize], start as usize).is_ok() {
            Self::note(state, start, start + BLOCK_SIZE);
        }
    }

    fn note(state: &mut State, start: u64, end: u64) {
        let (first, last) = state.changed.unwrap_or((start, end));
        state.changed = Some((first.min(start), last.max(end)));
    }

    /// Lets reads show something; while it is the array, processors read it directly.
    fn show(&self, state: &mut State, show: Show) {
        if show == Show::Array {
            self.save(state);
        }
        if (show == Show::Array) != (state.show == Show::Array) {
            let mut ends = [self.base, LOW_END - self.memory.size().min(LOW_SIZE)].into_iter();
            for (window, address) in self.windows.iter().zip(&mut ends) {
                if show == Show::Array { window.map(address) } else { window.unmap() }
            }
        }
        state.show = show;
    }

    /// Writes what has changed to the chip's file.
    fn save(&self, state: &mut State) {
        let (Some((start, end)), Backing::File(file)) = (state.changed.take(), &self.backing) else { return };
        let mut bytes = vec![0; (end - start) as usize];
        let read = self.memory.slice().read_slice(&mut bytes, start as usize).map_err(std::io::Error::other);
        if let Err(error) = read.and_then(|()| file.write_all_at(&bytes, start)) {
            tracing::error!("the firmware's variables can't be saved: {error}");
            state.status |= PROGRAM_ERROR;
        }
    }

    fn array(&self, offset: u64) -> u8 {
        self.memory.slice().read_obj(offset as usize).unwrap_or(0xff)
    }

    fn shown(&self, state: &State, offset: u64) -> u8 {
        match state.show {
            Show::Array => self.array(offset),
            Show::Status => state.status,
            Show::Identification => match offset & 0xff {
                0 => MANUFACTURER,
                1 => DEVICE,
                // The block is not locked.
                _ => 0,
            },
            Show::Query => self.query(offset & 0xff),
        }
    }

    /// The CFI query structure (JEDEC JESD68, with the Intel extended table at 31H).
    fn query(&self, offset: u64) -> u8 {
        let blocks = (self.memory.size() / BLOCK_SIZE).saturating_sub(1) as u16;
        let [blocks_low, blocks_high] = blocks.to_le_bytes();
        let [unit_low, unit_high] = ((BLOCK_SIZE / 256) as u16).to_le_bytes();
        match offset {
            0x10..=0x12 => b"QRY"[offset as usize - 0x10],
            // Command set 0001, and where its table is.
            0x13 => 1,
            0x15 => 0x31,
            // Supply voltage in BCD, time-outs as powers of two (us, ms), and the factors to their maxima.
            0x1b => 0x45,
            0x1c => 0x55,
            0x1f | 0x20 => 7,
            0x21 => 10,
            0x23 | 0x24 => 4,
            0x25 => 4,
            // The size as a power of two, an 8-bit interface, the buffer.
            0x27 => self.memory.size().next_power_of_two().trailing_zeros() as u8,
            0x2a => BUFFER_BITS,
            // One region of blocks: how many less one, and their size in units of 256 bytes.
            0x2c => 1,
            0x2d => blocks_low,
            0x2e => blocks_high,
            0x2f => unit_low,
            0x30 => unit_high,
            0x31..=0x33 => b"PRI"[offset as usize - 0x31],
            0x34 => b'1',
            0x35 => b'0',
            _ => 0,
        }
    }
}

impl Device for Flash {
    fn width(&self) -> usize {
        8
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        if !self.lock.is_set() {
            return self.read_from_smm(offset, data);
        }
        data.iter_mut().zip(offset..).for_each(|(byte, offset)| *byte = self.array(offset));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if !self.lock.is_set() {
            self.write_from_smm(offset, data);
        }
    }

    fn read_from_smm(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (byte, offset) in data.iter_mut().zip(offset..) {
            *byte = self.shown(&state, offset);
        }
    }

    fn write_from_smm(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        // The chip is 8 bits wide: a wider write is several.
        for (byte, offset) in data.iter().zip(offset..) {
            self.command(&mut state, offset, *byte);
        }
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.expect = Expect::Command;
        state.buffer.clear();
        self.show(&mut state, Show::Array);
        state.status = READY;
    }
}

impl Drop for Flash {
    fn drop(&mut self) {
        self.save(&mut self.lock());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{poke, read, read8, write8};

    fn flash(backing: Backing) -> (Ram, Arc<Flash>) {
        lockable(backing, Arc::default())
    }

    fn lockable(backing: Backing, lock: Arc<WriteLock>) -> (Ram, Arc<Flash>) {
        let ram = Ram::new(4 << 20).unwrap();
        let mut content = vec![0xff; 0x4_0000];
        content[..4].copy_from_slice(b"abcd");
        let flash = Flash::new(&ram, Chip { content, backing }, TOP - 0x10_0000, lock).unwrap();
        (ram, flash)
    }

    fn direct(ram: &Ram, flash: &Flash) -> bool {
        ram.map().sections().find(flash.place().0).is_some()
    }

    #[test]
    fn processors_read_the_array_directly_and_nothing_else() {
        let (ram, flash) = flash(Backing::Volatile);
        assert!(direct(&ram, &flash));
        write8(&*flash, 0, 0x90);
        assert!(!direct(&ram, &flash));
        assert_eq!(read::<2>(&*flash, 0), [0x89, 0x18]);
        write8(&*flash, 0, 0x98);
        assert_eq!(read::<3>(&*flash, 0x10), *b"QRY");
        write8(&*flash, 0, 0xff);
        assert!(direct(&ram, &flash));
        assert_eq!(read::<4>(&*flash, 0), *b"abcd");
    }

    #[test]
    fn bytes_are_programmed_and_blocks_erased() {
        let (_ram, flash) = flash(Backing::Volatile);
        for (offset, value) in [(5, 0x10), (5, 0x5a), (0, 0x40), (0, 0x0f)] {
            write8(&*flash, offset, value);
        }
        assert_eq!(read8(&*flash, 0), READY);
        write8(&*flash, 0, 0xff);
        // Programming only clears bits.
        assert_eq!(read::<6>(&*flash, 0), [b'a' & 0xf, b'b', b'c', b'd', 0xff, 0x5a]);
        write8(&*flash, 7, 0x20);
        write8(&*flash, 7, 0xd0);
        write8(&*flash, 0, 0xff);
        assert_eq!(read::<6>(&*flash, 0), [0xff; 6]);
        for value in [0xe8, 3, 1, 2, 3, 4] {
            write8(&*flash, 0x1000, value);
        }
        write8(&*flash, 0x1000, 0xd0);
        write8(&*flash, 0x1000, 0xff);
        assert_eq!(read8(&*flash, 0x1000), 0);
    }

    #[test]
    fn the_status_tells_of_errors_until_it_is_cleared() {
        let (_ram, flash) = flash(Backing::ReadOnly);
        write8(&*flash, 0, 0x20);
        write8(&*flash, 0, 0x33);
        assert_eq!(read8(&*flash, 0), READY | ERASE_ERROR | PROGRAM_ERROR);
        write8(&*flash, 0, 0x50);
        write8(&*flash, 0, 0x70);
        assert_eq!(read8(&*flash, 0), 0);
        write8(&*flash, 0, 0x10);
        write8(&*flash, 0, 0);
        assert_eq!(read8(&*flash, 0), READY | PROGRAM_ERROR);
        flash.reset();
        assert_eq!(read::<4>(&*flash, 0), *b"abcd");
    }

    #[test]
    fn what_is_programmed_is_in_the_file() {
        let path = std::env::temp_dir().join(format!("flash-{:?}", std::thread::current().id()));
        std::fs::write(&path, vec![0xff; 0x4_0000]).unwrap();
        let (_ram, flash) = flash(Backing::File(File::options().write(true).open(&path).unwrap()));
        for (offset, value) in [(0x2000, 0x10), (0x2000, 0x12), (0, 0xff)] {
            write8(&*flash, offset, value);
        }
        assert_eq!(std::fs::read(&path).unwrap()[0x2000..0x2002], [0x12, 0xff]);
        write8(&*flash, 0x3000, 0x10);
        write8(&*flash, 0x3000, 0x34);
        drop(flash);
        assert_eq!(std::fs::read(&path).unwrap()[0x3000], 0x34);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_locked_chip_takes_commands_of_system_management_mode_only() {
        let lock = Arc::new(WriteLock::default());
        let (ram, flash) = lockable(Backing::Volatile, lock.clone());
        let command = |smm: bool, value: u8| match smm {
            true => flash.write_from_smm(0, &[value]),
            false => flash.write(0, &[value]),
        };
        lock.set(true);
        for value in [0x10, 0, 0x20, 0xd0, 0x90] {
            command(false, value);
        }
        assert!(direct(&ram, &flash));
        assert_eq!(read::<4>(&*flash, 0), *b"abcd");
        for value in [0x10, 0x21] {
            command(true, value);
        }
        let mut status = [0];
        flash.read_from_smm(0, &mut status);
        assert_eq!((status, read8(&*flash, 0)), ([READY], b'a' & 0x21));
        command(false, 0xff);
        assert!(!direct(&ram, &flash), "that was no command");
        command(true, 0xff);
        lock.set(false);
        command(false, 0x90);
        assert_eq!(read8(&*flash, 0), 0x89);
    }

    #[test]
    fn the_end_of_a_rom_shows_below_1_mib_while_ram_is_off() {
        let ram = Ram::new(4 << 20).unwrap();
        let mut content = vec![0; 0x4_0000];
        content[0x3_0000] = 7;
        let rom = rom(&ram, &content).unwrap();
        ram.map().set_area(0xe_0000, 0x2_0000, false, false);
        let sections = ram.map().sections();
        let page = |address: u64| sections.find(address).unwrap().at(address).0.unwrap().page;
        assert_eq!(page(0xf_0000), page(TOP - 0x1_0000));
        assert_eq!(sections.find(0xf_0000).unwrap().write, None);
        drop(rom);
        assert!(ram.map().sections().find(0xf_0000).is_none());
    }

    #[test]
    fn random_accesses_do_no_harm() {
        let (_ram, flash) = flash(Backing::Volatile);
        poke(&*flash, 0x4_0000, 50_000, |_| ());
    }
}
