//! Registers and phases of the controller, on the vCPUs' threads. What takes time is left to the controller's thread.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use chipset::dma::Dma;
use chipset::{Chipset, Device, InterruptLine};

use super::transfer::{self, Outcome, Request};
use super::{DRIVES, DriveType, Geometry, IRQ, PORTS};
use crate::worker::Worker;
use crate::{Error, Media};

/// Offsets of registers.
const STATUS_A: u64 = 0;
const STATUS_B: u64 = 1;
const OUTPUT: u64 = 2;
const TAPE: u64 = 3;
const MAIN_STATUS: u64 = 4;
const DATA: u64 = 5;
const INPUT: u64 = 7;

/// Digital output register: drive, not reset, interrupts and DMA enabled; the rest are motors.
const NOT_RESET: u8 = 1 << 2;
const GATE: u8 = 1 << 3;
/// Main status register: a command is under way, not by DMA, data go to the host, ready for a byte.
const BUSY: u8 = 1 << 4;
const BY_REGISTER: u8 = 1 << 5;
const TO_HOST: u8 = 1 << 6;
const READY: u8 = 1 << 7;
/// Data rate select register.
const RATE: u8 = 3;
const SOFT_RESET: u8 = 1 << 7;
/// Digital input register: the disk has been changed.
const CHANGED: u8 = 1 << 7;

/// Status register 0: how a command ended, seek end, equipment check.
pub const ABNORMAL: u8 = 0x40;
const INVALID: u8 = 0x80;
const POLLED: u8 = 0xc0;
const SEEK_END: u8 = 0x20;
const EQUIPMENT: u8 = 0x10;

/// Commands by their low bits (82077AA datasheet, table 5-1).
pub mod op {
    pub const READ_TRACK: u8 = 0x02;
    pub const SPECIFY: u8 = 0x03;
    pub const SENSE_DRIVE: u8 = 0x04;
    pub const WRITE: u8 = 0x05;
    pub const READ: u8 = 0x06;
    pub const RECALIBRATE: u8 = 0x07;
    pub const SENSE_INTERRUPT: u8 = 0x08;
    pub const WRITE_DELETED: u8 = 0x09;
    pub const READ_ID: u8 = 0x0a;
    pub const READ_DELETED: u8 = 0x0c;
    pub const FORMAT: u8 = 0x0d;
    pub const DUMP: u8 = 0x0e;
    pub const SEEK: u8 = 0x0f;
    pub const VERSION: u8 = 0x10;
    pub const PERPENDICULAR: u8 = 0x12;
    pub const CONFIGURE: u8 = 0x13;
    pub const LOCK: u8 = 0x14;
    pub const VERIFY: u8 = 0x16;
    pub const PART: u8 = 0x18;
}

/// Of a command's first byte: what it is without its options.
fn operation(first: u8) -> u8 {
    match first {
        0x8f | 0xcf => op::SEEK,
        0x94 => op::LOCK,
        _ => first & 0x1f,
    }
}

/// Bytes of a command, the first included. What is not a command has one.
fn length(first: u8) -> usize {
    match operation(first) {
        op::READ | op::WRITE | op::READ_DELETED | op::WRITE_DELETED | op::READ_TRACK | op::VERIFY => 9,
        op::FORMAT => 6,
        op::CONFIGURE => 4,
        op::SPECIFY | op::SEEK => 3,
        op::SENSE_DRIVE | op::RECALIBRATE | op::READ_ID | op::PERPENDICULAR => 2,
        _ => 1,
    }
}

#[derive(Clone, Copy, Default)]
struct Drive {
    /// Where the heads are.
    cylinder: u8,
    /// Changes of the medium that a seek has acknowledged.
    changes_seen: Option<u64>,
}

/// What moves through the data register in a command without DMA.
#[derive(Default)]
pub struct Fifo {
    pub data: Vec<u8>,
    pub at: usize,
    pub to_host: bool,
    pub active: bool,
}

pub struct State {
    output: u8,
    rate: u8,
    command: Vec<u8>,
    result: Vec<u8>,
    result_at: usize,
    pub request: Option<Request>,
    pub working: bool,
    drives: [Drive; DRIVES],
    /// A seek of each drive has ended: status register 0, to be told by SENSE INTERRUPT STATUS.
    seek_ended: [Option<u8>; 4],
    interrupt: bool,
    /// SPECIFY, CONFIGURE, PERPENDICULAR MODE, LOCK.
    specified: [u8; 2],
    configured: [u8; 2],
    perpendicular: u8,
    locked: bool,
    pub fifo: Fifo,
    pub epoch: u64,
    pub stopped: bool,
}

impl State {
    fn new() -> Self {
        State {
            output: NOT_RESET | GATE,
            rate: 2,
            command: Vec::new(),
            result: Vec::new(),
            result_at: 0,
            request: None,
            working: false,
            drives: [Drive::default(); DRIVES],
            seek_ended: [None; 4],
            interrupt: false,
            specified: [0; 2],
            configured: [0; 2],
            perpendicular: 0,
            locked: false,
            fifo: Fifo::default(),
            epoch: 0,
            stopped: false,
        }
    }

    fn selected(&self) -> usize {
        usize::from(self.output & 3)
    }

    fn by_dma(&self) -> bool {
        self.specified[1] & 1 == 0
    }
}

/// A drive for the controller: its type, and what is in it.
pub type FloppyDrive = (DriveType, Arc<Media>);

/// The controller.
pub struct FloppyController {
    shared: Arc<Shared>,
    _worker: Worker,
}

/// What the vCPUs and the controller's thread share.
pub struct Shared {
    drives: [Option<FloppyDrive>; DRIVES],
    state: Mutex<State>,
    pub changed: Condvar,
    pub dma: Arc<Dma>,
    line: InterruptLine,
}

impl FloppyController {
    /// Puts the controller onto the chipset's bus.
    pub fn new(drives: [Option<FloppyDrive>; DRIVES], chipset: &Chipset) -> Result<Arc<Self>, Error> {
        let shared = Arc::new(Shared {
            drives,
            state: Mutex::new(State::new()),
            changed: Condvar::new(),
            dma: chipset.dma().clone(),
            line: chipset.connect(IRQ),
        });
        for (first, length, offset) in PORTS {
            chipset.insert_ports(first, length, offset, shared.clone())?;
        }
        let (work, stop) = (shared.clone(), shared.clone());
        let worker = Worker::start(
            "floppy",
            move || transfer::work(&work),
            move || {
                stop.lock().stopped = true;
                stop.changed.notify_all();
            },
        )?;
        Ok(Arc::new(FloppyController { shared, _worker: worker }))
    }

    /// Power-on. What the guest has written is in the images then.
    pub fn reset(&self) {
        let mut state = self.shared.lock();
        let (epoch, working, stopped) = (state.epoch + 1, state.working, state.stopped);
        *state = State { epoch, working, stopped, ..State::new() };
        self.shared.drive_line(&state);
        drop(state);
        self.shared.changed.notify_all();
        for (_, media) in self.shared.drives.iter().flatten() {
            if let Some(Err(error)) = media.disk().map(|disk| disk.flush()) {
                tracing::warn!("a floppy disk's image could not be written: {error}");
            }
        }
    }
}

impl Shared {
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn drive_line(&self, state: &State) {
        self.line.set(state.interrupt && state.output & GATE != 0);
    }

    pub fn interrupt(&self, state: &mut State) {
        state.interrupt = true;
        self.drive_line(state);
    }

    fn media(&self, drive: usize) -> Option<&Arc<Media>> {
        self.drives.get(drive)?.as_ref().map(|(_, media)| media)
    }

    /// Whether the disk in a drive is another one than when the heads last moved.
    fn is_changed(&self, state: &State, drive: usize) -> bool {
        let Some(media) = self.media(drive) else { return false };
        let seen = state.drives.get(drive).and_then(|drive| drive.changes_seen);
        media.disk().is_none() || seen != Some(media.changes())
    }

    fn reset_by_software(&self, state: &mut State) {
        state.epoch += 1;
        (state.request, state.fifo) = (None, Fifo::default());
        state.command.clear();
        state.result.clear();
        if !state.locked {
            state.configured = [0; 2];
        }
        self.changed.notify_all();
    }

    /// After a reset the controller finds all drives changed, and tells so of each (5.2.2).
    fn end_reset(&self, state: &mut State) {
        for (drive, ended) in (0u8..).zip(&mut state.seek_ended) {
            *ended = Some(POLLED | drive);
        }
        self.interrupt(state);
    }

    fn write_output(&self, state: &mut State, value: u8) {
        let before = std::mem::replace(&mut state.output, value);
        if value & NOT_RESET == 0 {
            state.interrupt = false;
            self.reset_by_software(state);
        } else if before & NOT_RESET == 0 {
            self.end_reset(state);
        }
        self.drive_line(state);
    }

    fn main_status(&self, state: &State) -> u8 {
        if state.output & NOT_RESET == 0 {
            return 0;
        }
        let in_result = state.result_at < state.result.len();
        if in_result {
            return READY | TO_HOST | BUSY;
        }
        if state.fifo.active {
            let ready = if state.fifo.at < state.fifo.data.len() { READY } else { 0 };
            return BUSY | BY_REGISTER | ready | if state.fifo.to_host { TO_HOST } else { 0 };
        }
        if state.request.is_some() || state.working {
            return BUSY;
        }
        READY | if state.command.is_empty() { 0 } else { BUSY }
    }

    fn read_data(&self, state: &mut State) -> u8 {
        if let Some(byte) = state.result.get(state.result_at).copied() {
            state.result_at += 1;
            state.interrupt = false;
            if state.result_at == state.result.len() {
                state.result.clear();
                state.result_at = 0;
            }
            self.drive_line(state);
            return byte;
        }
        let fifo = &mut state.fifo;
        match fifo.data.get(fifo.at).copied() {
            Some(byte) if fifo.active && fifo.to_host => {
                fifo.at += 1;
                self.fifo_moved(state);
                byte
            }
            _ => 0,
        }
    }

    fn fifo_moved(&self, state: &mut State) {
        if state.fifo.at >= state.fifo.data.len() {
            state.interrupt = false;
            self.drive_line(state);
            self.changed.notify_all();
        }
    }

    fn write_data(&self, state: &mut State, value: u8) {
        if state.output & NOT_RESET == 0 || !state.result.is_empty() {
            return;
        }
        if state.fifo.active {
            let at = state.fifo.at;
            if let Some(byte) = state.fifo.data.get_mut(at).filter(|_| !state.fifo.to_host) {
                *byte = value;
                state.fifo.at += 1;
                self.fifo_moved(state);
            }
            return;
        }
        if state.request.is_some() || state.working {
            return;
        }
        state.command.push(value);
        let first = state.command.first().copied().unwrap_or(0);
        if state.command.len() >= length(first) {
            let command = std::mem::take(&mut state.command);
            self.execute(state, &command);
        }
    }

    fn answer(&self, state: &mut State, bytes: &[u8]) {
        state.result = bytes.to_vec();
        state.result_at = 0;
    }

    fn execute(&self, state: &mut State, command: &[u8]) {
        let byte = |index: usize| command.get(index).copied().unwrap_or(0);
        let drive = usize::from(byte(1) & 3);
        match operation(byte(0)) {
            op::SPECIFY => state.specified = [byte(1), byte(2)],
            op::CONFIGURE => state.configured = [byte(2), byte(3)],
            op::PERPENDICULAR => state.perpendicular = byte(1),
            op::SENSE_DRIVE => {
                let status = self.status_3(state, drive, byte(1) & 7);
                self.answer(state, &[status]);
            }
            op::SENSE_INTERRUPT => self.sense_interrupt(state),
            op::RECALIBRATE => self.seek(state, drive, 0),
            op::SEEK => {
                let now = state.drives.get(drive).map_or(0, |drive| drive.cylinder);
                let target = match byte(0) {
                    0x8f => now.saturating_sub(byte(2)),
                    0xcf => now.saturating_add(byte(2)),
                    _ => byte(2),
                };
                self.seek(state, drive, target);
            }
            op::VERSION => self.answer(state, &[0x90]),
            op::PART => self.answer(state, &[0x41]),
            op::LOCK => {
                state.locked = byte(0) & 0x80 != 0;
                let locked = u8::from(state.locked) << 4;
                self.answer(state, &[locked]);
            }
            op::DUMP => {
                let cylinder = |drive: usize| state.drives.get(drive).map_or(0, |drive| drive.cylinder);
                let locked = u8::from(state.locked) << 7 | state.perpendicular & 0x7f;
                let [s0, s1] = state.specified;
                let [c0, c1] = state.configured;
                let bytes = [cylinder(0), cylinder(1), 0, 0, s0, s1, 0, locked, c0, c1];
                self.answer(state, &bytes);
            }
            op::READ
            | op::WRITE
            | op::READ_DELETED
            | op::WRITE_DELETED
            | op::READ_TRACK
            | op::VERIFY
            | op::FORMAT
            | op::READ_ID => {
                let disk = self.media(drive).and_then(|media| media.disk());
                let geometry = disk.as_ref().and_then(|disk| Geometry::of(disk.size()));
                state.request = Some(Request {
                    operation: operation(byte(0)),
                    command: command.to_vec(),
                    disk: disk.zip(geometry),
                    cylinder: state.drives.get(drive).map_or(0, |drive| drive.cylinder),
                    rate: state.rate & RATE,
                    by_dma: state.by_dma(),
                });
                self.changed.notify_all();
            }
            _ => self.answer(state, &[INVALID]),
        }
    }

    /// Status register 3: of a drive, as its wires say.
    fn status_3(&self, state: &State, drive: usize, selection: u8) -> u8 {
        const TWO_SIDES: u8 = 0x08;
        const TRACK_0: u8 = 0x10;
        const PROTECTED: u8 = 0x40;
        let Some(media) = self.media(drive) else { return selection | 0x20 };
        let at_0 = state.drives.get(drive).is_some_and(|drive| drive.cylinder == 0);
        let protected = media.disk().is_some_and(|disk| disk.read_only());
        let bits = if at_0 { TRACK_0 } else { 0 } | if protected { PROTECTED } else { 0 };
        selection | TWO_SIDES | 0x20 | bits
    }

    fn sense_interrupt(&self, state: &mut State) {
        let ended = state.seek_ended.iter_mut().zip(0usize..).find_map(|(ended, drive)| Some((ended.take()?, drive)));
        let Some((status, drive)) = ended else { return self.answer(state, &[INVALID]) };
        state.interrupt = state.seek_ended.iter().any(Option::is_some) && status & POLLED != POLLED;
        self.drive_line(state);
        let cylinder = state.drives.get(drive).map_or(0, |drive| drive.cylinder);
        self.answer(state, &[status, cylinder]);
    }

    fn seek(&self, state: &mut State, drive: usize, cylinder: u8) {
        let selection = drive as u8;
        let Some(media) = self.media(drive) else {
            // Nothing says that track 0 was found.
            if let Some(ended) = state.seek_ended.get_mut(drive) {
                *ended = Some(ABNORMAL | SEEK_END | EQUIPMENT | selection);
            }
            return self.interrupt(state);
        };
        let seen = media.disk().map(|_| media.changes());
        if let Some(drive) = state.drives.get_mut(drive) {
            drive.cylinder = cylinder;
            drive.changes_seen = seen;
        }
        if let Some(ended) = state.seek_ended.get_mut(drive) {
            *ended = Some(SEEK_END | selection);
        }
        self.interrupt(state);
    }

    /// The end of a command that the thread has done.
    pub fn end(&self, state: &mut State, outcome: &Outcome) {
        let Outcome { status, cylinder, head, sector, size } = *outcome;
        let [s0, s1, s2] = status;
        self.answer(state, &[s0, s1, s2, cylinder, head, sector, size]);
        state.fifo = Fifo::default();
        self.interrupt(state);
    }
}

impl Device for Shared {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        let value = match offset {
            // Index, direction, track 0 and the like: nobody has used them since the PS/2. An interrupt shows.
            STATUS_A => u8::from(state.interrupt) << 7,
            STATUS_B => 0xc0 | (state.output >> 4) & 3,
            OUTPUT => state.output,
            TAPE => 0x20,
            MAIN_STATUS => self.main_status(&state),
            DATA => self.read_data(&mut state),
            INPUT => {
                let changed = self.is_changed(&state, state.selected());
                (if changed { CHANGED } else { 0 }) | 0x78
            }
            _ => 0xff,
        };
        data.fill(value);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let mut state = self.lock();
        match offset {
            OUTPUT => self.write_output(&mut state, value),
            MAIN_STATUS => {
                state.rate = value & RATE;
                if value & SOFT_RESET != 0 {
                    self.reset_by_software(&mut state);
                    self.end_reset(&mut state);
                }
            }
            DATA => self.write_data(&mut state, value),
            INPUT => state.rate = value & RATE,
            _ => {}
        }
    }

    fn reset(&self) {
        // The owner does it.
    }
}
