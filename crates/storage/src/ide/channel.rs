//! One cable: what software does with its registers, and the thread that does what the commands say.
//!
//! A write of the command register leaves a request and sets BSY; the channel's thread takes it and runs the drive's
//! command with a [`Cable`] for its data. For PIO the cable fills or empties a buffer in pieces; software takes it word by
//! word on its own thread, block by block, and only the end of a piece wakes the channel's thread again.
//!
//! A reset counts [`State::epoch`] up. What the thread still does for an earlier epoch ends in `Stop::Abandoned` at its
//! next step; until then the drives stay busy, so that no DMA of old comes after a reset.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chipset::InterruptLine;
use memory::View;
use memory::vm_memory::{Bytes, GuestAddress};

use super::registers::{DATA, DEVICE, NO_INTERRUPT, PREVIOUS, RESET, Registers, STATUS_COMMAND};
use crate::ata::commands::{DEVICE_RESET, EXECUTE_DEVICE_DIAGNOSTIC};
use crate::dma::Scatter;
use crate::link::{How, Link, Outcome, Source, Stop, Target, TaskFile, error, status};
use crate::{Drive, Error, worker::Worker};

/// What is read ahead of software in PIO, and written behind it.
const PIECE: usize = 128 << 10;

/// The longest that a drive stretches a cycle of its data register (IORDY) until it has found what a command wants.
const STRETCH: Duration = Duration::from_millis(100);

/// Bus master command and status registers (Bus Master IDE 1.0, 2).
pub const START: u8 = 1;
pub const TO_MEMORY: u8 = 8;
const ACTIVE: u8 = 1;
const DMA_ERROR: u8 = 2;
const INTERRUPT: u8 = 4;
/// Status bits that only software uses: each drive can do DMA.
const CAPABLE: u8 = 0x60;
/// Physical region descriptors: eight bytes each, in a table that does not cross 64 KiB.
const MOST_DESCRIPTORS: u32 = 8192;
const LAST_DESCRIPTOR: u32 = 1 << 31;

/// Interrupt reason of packet commands: a command is wanted, data for the host, data from the host.
const REASON_COMMAND: u8 = 1;
const REASON_IN: u8 = 2;
const REASON_OUT: u8 = 0;

#[derive(Default)]
struct Pio {
    data: Vec<u8>,
    at: usize,
    /// Where the block that software may move now ends, and how long blocks are.
    block_end: usize,
    block: usize,
    /// Software writes.
    out: bool,
    packet: bool,
    /// It is the packet itself, not its command's data.
    command: bool,
    /// When all is taken the command has ended: nothing more is told.
    ends_command: bool,
}

#[derive(Clone, Copy, Default)]
struct BusMaster {
    command: u8,
    status: u8,
    table: u32,
}

struct State {
    registers: [Registers; 2],
    control: u8,
    /// INTRQ, before the device control register's nIEN.
    interrupt: bool,
    request: Option<(usize, TaskFile)>,
    /// The thread does a command.
    working: bool,
    /// A reset waits for the thread.
    reset_pending: bool,
    epoch: u64,
    pio: Pio,
    master: BusMaster,
    /// The PCI function may use guest memory.
    may_master: bool,
    stopped: bool,
}

/// A channel with its drives.
pub struct Channel {
    drives: [Option<Drive>; 2],
    state: Mutex<State>,
    changed: Condvar,
    line: InterruptLine,
    memory: View,
}

impl Channel {
    pub fn new(drives: [Option<Drive>; 2], memory: View, line: InterruptLine) -> Arc<Self> {
        let state = State {
            registers: Default::default(),
            control: 0,
            interrupt: false,
            request: None,
            working: false,
            reset_pending: false,
            epoch: 0,
            pio: Pio::default(),
            master: BusMaster::default(),
            may_master: false,
            stopped: false,
        };
        let channel = Channel { drives, state: Mutex::new(state), changed: Condvar::new(), line, memory };
        channel.sign(&mut channel.lock());
        Arc::new(channel)
    }

    /// Starts the thread that does the commands.
    pub fn start(self: &Arc<Self>) -> Result<Worker, Error> {
        let (work, stop) = (self.clone(), self.clone());
        Worker::start(
            "ide",
            move || work.work(),
            move || {
                stop.lock().stopped = true;
                stop.changed.notify_all();
            },
        )
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn has(&self, drive: usize) -> bool {
        matches!(self.drives.get(drive), Some(Some(_)))
    }

    fn is_packet(&self, drive: usize) -> bool {
        self.drives.get(drive).and_then(Option::as_ref).is_some_and(Drive::is_packet)
    }

    /// Puts every drive's signature into its registers.
    fn sign(&self, state: &mut State) {
        for (registers, drive) in state.registers.iter_mut().zip(&self.drives) {
            if let Some(drive) = drive {
                registers.sign(drive);
            }
        }
    }

    fn drive_line(&self, state: &State) {
        self.line.set(state.interrupt && state.control & NO_INTERRUPT == 0);
    }

    fn interrupt(&self, state: &mut State) {
        state.interrupt = true;
        if state.control & NO_INTERRUPT == 0 {
            state.master.status |= INTERRUPT;
        }
        self.drive_line(state);
    }

    fn acknowledge(&self, state: &mut State) {
        state.interrupt = false;
        self.drive_line(state);
    }

    /// A register of the command block, but the data register.
    pub fn read(&self, offset: u64) -> u8 {
        let mut state = self.lock();
        let value = self.peek(&state, offset);
        if offset == STATUS_COMMAND {
            self.acknowledge(&mut state);
        }
        value
    }

    fn peek(&self, state: &State, offset: u64) -> u8 {
        let selected = selected(state);
        let previous = state.control & PREVIOUS != 0;
        match (self.has(0), self.has(1)) {
            // No drive drives the cable: it reads as a drive that is not there.
            (false, false) => 0,
            // The first drive answers for a second that isn't there, with nothing to say (ATA/ATAPI-6, 9.16.1). That of a packet
            // drive would be taken for one: it hides its signature.
            (true, false) if selected == 1 => match offset {
                STATUS_COMMAND => 0,
                _ if self.is_packet(0) => 0,
                _ => state.registers.first().map_or(0, |registers| registers.read(offset, previous)),
            },
            (false, true) if selected == 0 => 0,
            _ => state.registers.get(selected).map_or(0, |registers| registers.read(offset, previous)),
        }
    }

    /// The status register without its side effect, at the control block's address.
    pub fn alternate_status(&self) -> u8 {
        self.peek(&self.lock(), STATUS_COMMAND)
    }

    pub fn write(&self, offset: u64, value: u8) {
        let mut state = self.lock();
        if offset == STATUS_COMMAND {
            return self.command(&mut state, value);
        }
        if offset == DATA || state.registers.iter().any(|registers| registers.status & status::BUSY != 0) {
            return;
        }
        state.control &= !PREVIOUS;
        state.registers.iter_mut().for_each(|registers| registers.write(offset, value));
    }

    fn command(&self, state: &mut State, command: u8) {
        let drive = selected(state);
        if !self.has(drive) || state.control & RESET != 0 {
            return;
        }
        if command == DEVICE_RESET && self.is_packet(drive) {
            // It works while the drive is busy: that is what it is for (ATA8-ACS, 7.9).
            return self.begin_reset(state, state.registers.first().map_or(0, Registers::device));
        }
        let Some(registers) = state.registers.get_mut(drive) else { return };
        if registers.is_busy() || state.request.is_some() {
            return;
        }
        let task_file = registers.task_file(command);
        registers.status = status::BUSY;
        registers.error = 0;
        state.control &= !PREVIOUS;
        if command == EXECUTE_DEVICE_DIAGNOSTIC {
            // Both do, and the first one tells.
            self.sign(state);
            state.registers.iter_mut().for_each(|registers| registers.write(DEVICE, 0));
            if let Some(first) = state.registers.first_mut() {
                first.status = status::BUSY;
            }
            state.request = Some((if self.has(0) { 0 } else { 1 }, task_file));
        } else {
            state.request = Some((drive, task_file));
        }
        self.acknowledge(state);
        self.changed.notify_all();
    }

    pub fn write_control(&self, value: u8) {
        let mut state = self.lock();
        let before = std::mem::replace(&mut state.control, value);
        if value & RESET != 0 && before & RESET == 0 {
            self.begin_reset(&mut state, 0);
        } else if value & RESET == 0 && before & RESET != 0 && !state.reset_pending {
            self.sign(&mut state);
        }
        self.drive_line(&state);
    }

    /// All that is under way is abandoned; the signatures come when the thread has let go. `device`: what the device
    /// register holds then.
    fn begin_reset(&self, state: &mut State, device: u8) {
        state.epoch += 1;
        state.request = None;
        state.interrupt = false;
        state.pio = Pio::default();
        state.master.status &= !ACTIVE;
        for (index, registers) in state.registers.iter_mut().enumerate() {
            *registers = Registers::default();
            registers.status = if self.has(index) { status::BUSY } else { 0 };
            registers.write(DEVICE, device);
        }
        self.drives.iter().flatten().for_each(Drive::reset);
        state.reset_pending = true;
        if !state.working {
            self.end_reset(state);
        }
        self.drive_line(state);
        self.changed.notify_all();
    }

    fn end_reset(&self, state: &mut State) {
        state.reset_pending = false;
        // With SRST held they stay busy; the write that lets go of it signs.
        if state.control & RESET == 0 {
            self.sign(state);
        }
    }

    /// Power-on.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.control = 0;
        state.master = BusMaster::default();
        state.may_master = false;
        self.begin_reset(&mut state, 0);
        while state.working && !state.stopped {
            state = self.wait(state);
        }
        self.drives.iter().flatten().for_each(Drive::power_on);
        self.sign(&mut state);
    }

    /// The state, once the drive is not about to ask for data any more: there is software that moves data behind a command
    /// without a look at DRQ, and it should not lose any.
    fn lock_for_data(&self) -> MutexGuard<'_, State> {
        let about_to_ask = |state: &mut State| {
            let status = state.registers.get(selected(state)).map_or(0, |registers| registers.status);
            let at_work = (state.request.is_some() || state.working) && !state.reset_pending && !state.stopped;
            at_work && status & (status::BUSY | status::DATA_REQUEST) == status::BUSY
        };
        let waited = self.changed.wait_timeout_while(self.lock(), STRETCH, about_to_ask);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    pub fn read_data(&self, data: &mut [u8]) {
        data.fill(0);
        let mut state = self.lock_for_data();
        if state.pio.out {
            return;
        }
        for word in data.chunks_mut(2) {
            let (at, end) = (state.pio.at, state.pio.block_end.min(state.pio.data.len()));
            if at >= end {
                return;
            }
            let bytes = state.pio.data.get(at..end).unwrap_or_default();
            word.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            state.pio.at += word.len();
            if state.pio.at >= end {
                self.block_moved(&mut state);
            }
        }
    }

    pub fn write_data(&self, data: &[u8]) {
        let mut state = self.lock_for_data();
        if !state.pio.out {
            return;
        }
        for word in data.chunks(2) {
            let (at, end) = (state.pio.at, state.pio.block_end.min(state.pio.data.len()));
            if at >= end {
                return;
            }
            if let Some(bytes) = state.pio.data.get_mut(at..end) {
                bytes.iter_mut().zip(word).for_each(|(to, from)| *to = *from);
            }
            state.pio.at += word.len();
            if state.pio.at >= end {
                self.block_moved(&mut state);
            }
        }
    }

    /// Software has moved a block: the next one is ready at once, or the thread goes on.
    fn block_moved(&self, state: &mut State) {
        let drive = selected(state);
        let more = state.pio.block_end < state.pio.data.len();
        if more {
            return self.offer_block(state, drive, true);
        }
        let end = state.pio.ends_command;
        if let Some(registers) = state.registers.get_mut(drive) {
            registers.status = if end { status::READY | status::SEEK_COMPLETE } else { status::BUSY };
        }
        self.changed.notify_all();
    }

    /// Lets software move the block that begins where the last one ended.
    fn offer_block(&self, state: &mut State, drive: usize, tell: bool) {
        let pio = &mut state.pio;
        pio.at = pio.block_end;
        pio.block_end = (pio.at + pio.block).min(pio.data.len());
        let (length, out, packet, command) = (pio.block_end - pio.at, pio.out, pio.packet, pio.command);
        if let Some(registers) = state.registers.get_mut(drive) {
            registers.status = status::READY | status::SEEK_COMPLETE | status::DATA_REQUEST;
            if packet {
                let reason = if out { REASON_OUT } else { REASON_IN };
                registers.show_packet_phase(reason, length.min(0xffff) as u16);
            } else if command {
                registers.show_reason(REASON_COMMAND);
            }
        }
        if tell {
            self.interrupt(state);
        }
    }

    /// What the thread does.
    fn work(&self) {
        let mut state = self.lock();
        while !state.stopped {
            if state.reset_pending {
                self.end_reset(&mut state);
            }
            let Some((drive, task_file)) = state.request.take() else {
                state = self.wait(state);
                continue;
            };
            state.working = true;
            let epoch = state.epoch;
            drop(state);
            let mut cable = Cable { channel: self, drive, epoch, told: false };
            let result = match self.drives.get(drive) {
                Some(Some(drive)) => drive.execute(&task_file, &mut cable),
                _ => Err(Stop::Abandoned),
            };
            let told = cable.told;
            state = self.lock();
            state.working = false;
            self.changed.notify_all();
            if state.epoch != epoch || told {
                continue;
            }
            let outcome = match result {
                Ok(outcome) => outcome,
                Err(Stop::Abandoned) => continue,
                Err(Stop::Image(_) | Stop::Memory) => Outcome::failed(&task_file, error::ABORTED),
            };
            if let Some(registers) = state.registers.get_mut(drive) {
                registers.show(&outcome);
            }
            self.interrupt(&mut state);
        }
    }

    /// Bus master registers: command, -, status, -, table address.
    pub fn read_master(&self, offset: u64) -> u8 {
        let master = self.lock().master;
        let [a, b, c, d] = master.table.to_le_bytes();
        [master.command, 0, master.status, 0, a, b, c, d].get(offset as usize).copied().unwrap_or(0)
    }

    pub fn write_master(&self, offset: u64, value: u8) {
        let mut state = self.lock();
        let master = &mut state.master;
        match offset {
            0 => {
                let before = std::mem::replace(&mut master.command, value & (START | TO_MEMORY));
                if value & START == 0 {
                    master.status &= !ACTIVE;
                } else if before & START == 0 {
                    master.status |= ACTIVE;
                }
                self.changed.notify_all();
            }
            2 => master.status = master.status & !(CAPABLE | value & (DMA_ERROR | INTERRUPT)) | value & CAPABLE,
            4..8 => {
                let mut bytes = master.table.to_le_bytes();
                if let Some(byte) = bytes.get_mut(offset as usize - 4) {
                    *byte = value;
                }
                // In doublewords.
                master.table = u32::from_le_bytes(bytes) & !3;
            }
            _ => {}
        }
    }

    pub fn set_may_master(&self, may: bool) {
        self.lock().may_master = may;
        self.changed.notify_all();
    }

    /// Reads the table of descriptors. `None`: it is not in RAM.
    fn scatter(&self, table: u32) -> Option<Scatter> {
        let mut scatter = Scatter::default();
        for index in 0..MOST_DESCRIPTORS {
            let mut entry = [0; 8];
            let address = u64::from(table) + 8 * u64::from(index);
            self.memory.read_slice(&mut entry, GuestAddress(address)).ok()?;
            let [a0, a1, a2, a3, rest @ ..] = entry;
            let (address, rest) = (u32::from_le_bytes([a0, a1, a2, a3]) & !1, u32::from_le_bytes(rest));
            let length = match rest & 0xfffe {
                0 => 0x1_0000,
                length => length as usize,
            };
            scatter.push(address.into(), length);
            if rest & LAST_DESCRIPTOR != 0 {
                break;
            }
        }
        Some(scatter)
    }
}

fn selected(state: &State) -> usize {
    state.registers.first().map_or(0, Registers::selected)
}

/// A drive's end of the channel, for one command.
struct Cable<'a> {
    channel: &'a Channel,
    drive: usize,
    epoch: u64,
    /// Software knows already that the command has ended.
    told: bool,
}

impl<'a> Cable<'a> {
    /// The state, if the command is still wanted.
    fn lock(&self) -> Result<MutexGuard<'a, State>, Stop> {
        self.wanted(self.channel.lock())
    }

    fn wanted<'b>(&self, state: MutexGuard<'b, State>) -> Result<MutexGuard<'b, State>, Stop> {
        if state.epoch != self.epoch || state.stopped { Err(Stop::Abandoned) } else { Ok(state) }
    }

    fn is_abandoned(&self) -> bool {
        self.lock().is_err()
    }

    /// Hands a buffer to software, block by block, and takes it back when all of it has been moved.
    fn exchange(&self, pio: Pio, tell: bool) -> Result<Vec<u8>, Stop> {
        let mut state = self.lock()?;
        let length = pio.data.len();
        state.pio = pio;
        self.channel.offer_block(&mut state, self.drive, tell);
        self.channel.changed.notify_all();
        while state.pio.at < length {
            state = self.wanted(self.channel.wait(state))?;
        }
        Ok(std::mem::take(&mut state.pio).data)
    }

    /// Pieces of a PIO transfer: where they begin, how long they are, and the length of their blocks.
    fn pieces(how: How, length: usize) -> impl Iterator<Item = (usize, usize, usize)> {
        let block = match how {
            How::Pio { block } => block,
            How::PacketPio { limit } => limit,
            How::Dma => length,
        };
        let block = block.max(2);
        let piece = (PIECE / block).max(1) * block;
        (0..length).step_by(piece).map(move |at| (at, piece.min(length - at), block))
    }

    /// Waits until software has started the bus master, and gives what its table says.
    fn start_dma(&self, length: usize) -> Result<Scatter, Stop> {
        let mut state = self.lock()?;
        if let Some(registers) = state.registers.get_mut(self.drive) {
            registers.status = status::READY | status::SEEK_COMPLETE | status::DATA_REQUEST | status::BUSY;
        }
        while state.master.status & ACTIVE == 0 || !state.may_master {
            state = self.wanted(self.channel.wait(state))?;
        }
        let table = state.master.table;
        drop(state);
        match self.channel.scatter(table) {
            Some(scatter) if scatter.len() >= length => Ok(scatter),
            // There is no room for all: the controller is done, the drive is not, and waits for a reset (Bus Master
            // IDE 1.0, 3.1).
            Some(_) => self.hang(0),
            None => self.hang(DMA_ERROR),
        }
    }

    fn end_dma(&self, scatter: &Scatter, length: usize, result: Result<(), Stop>) -> Result<(), Stop> {
        if let Err(Stop::Memory) = result {
            return self.hang(DMA_ERROR);
        }
        let mut state = self.lock()?;
        if scatter.len() == length {
            state.master.status &= !ACTIVE;
        }
        result
    }

    /// The controller is done and the drive is not: until a reset.
    fn hang<T>(&self, bits: u8) -> Result<T, Stop> {
        let mut state = self.lock()?;
        state.master.status = state.master.status & !ACTIVE | bits;
        loop {
            state = self.wanted(self.channel.wait(state))?;
        }
    }
}

impl Link for Cable<'_> {
    fn data_in(&mut self, how: How, length: usize, source: &impl Source) -> Result<(), Stop> {
        if how == How::Dma {
            let scatter = self.start_dma(length)?;
            let result = scatter.fill(&self.channel.memory, 0, length, &|| self.is_abandoned(), source);
            return self.end_dma(&scatter, length, result);
        }
        let packet = matches!(how, How::PacketPio { .. });
        for (at, size, block) in Self::pieces(how, length) {
            let mut data = vec![0; size];
            source.read(&[data.as_mut_slice().into()], at)?;
            let ends_command = !packet && at + size == length;
            self.told |= ends_command;
            self.exchange(Pio { data, block, packet, ends_command, ..Pio::default() }, true)?;
        }
        Ok(())
    }

    fn data_out(&mut self, how: How, length: usize, target: &impl Target) -> Result<(), Stop> {
        if how == How::Dma {
            let scatter = self.start_dma(length)?;
            let result = scatter.drain(&self.channel.memory, 0, length, &|| self.is_abandoned(), target);
            return self.end_dma(&scatter, length, result);
        }
        let packet = matches!(how, How::PacketPio { .. });
        for (at, size, block) in Self::pieces(how, length) {
            let pio = Pio { data: vec![0; size], block, packet, out: true, ..Pio::default() };
            // The first block of a disk is asked for without an interrupt (ATA-5, 9.6).
            let mut data = self.exchange(pio, packet || at > 0)?;
            target.write(&[data.as_mut_slice().into()], at)?;
        }
        Ok(())
    }

    fn packet(&mut self) -> Result<[u8; 12], Stop> {
        let pio = Pio { data: vec![0; 12], block: 12, out: true, command: true, ..Pio::default() };
        Ok(self.exchange(pio, false)?.try_into().unwrap_or_default())
    }
}
