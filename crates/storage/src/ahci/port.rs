//! One port: its registers (AHCI 3.3), and the thread that does what is in its command list.
//!
//! Software sets bits in PxCI; the thread takes them one after the other, in the order of the list, and has the drive do
//! the commands. Clearing PxCMD.ST, COMRESET and a controller reset count [`State::epoch`] up: what the thread does for
//! an earlier one is abandoned, and PxCMD.CR stays set until it has let go.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use memory::View;
use memory::vm_memory::{Bytes, GuestAddress};

use super::command::{Header, Transfer};
use super::fis::{self, FromHost};
use super::function::Shared;
use crate::ata::commands::{READ_FPDMA_QUEUED, WRITE_FPDMA_QUEUED};
use crate::link::{Outcome, Stop, TaskFile, error, status};
use crate::{Drive, Error, worker::Worker};

/// Offsets of registers.
const CLB: u64 = 0x00;
const CLBU: u64 = 0x04;
const FB: u64 = 0x08;
const FBU: u64 = 0x0c;
const IS: u64 = 0x10;
const IE: u64 = 0x14;
const CMD: u64 = 0x18;
const TFD: u64 = 0x20;
const SIG: u64 = 0x24;
const SSTS: u64 = 0x28;
const SCTL: u64 = 0x2c;
const SERR: u64 = 0x30;
const SACT: u64 = 0x34;
const CI: u64 = 0x38;

/// PxCMD.
const ST: u32 = 1 << 0;
const SPIN_UP: u32 = 1 << 1;
const POWER_ON: u32 = 1 << 2;
const OVERRIDE: u32 = 1 << 3;
const RECEIVE: u32 = 1 << 4;
const RECEIVING: u32 = 1 << 14;
const RUNNING: u32 = 1 << 15;
const HOT_PLUG: u32 = 1 << 18;
const IS_PACKET: u32 = 1 << 24;
const LED: u32 = 1 << 25;
const SLOT_SHIFT: u32 = 8;
const COMMAND_WRITABLE: u32 = ST | SPIN_UP | POWER_ON | RECEIVE | IS_PACKET | LED;

/// PxIS.
const IS_REGISTER: u32 = 1 << 0;
const IS_PIO: u32 = 1 << 1;
const IS_DEVICE_BITS: u32 = 1 << 3;
const IS_CONNECT: u32 = 1 << 6;
const IS_PHY_READY: u32 = 1 << 22;
const IS_OVERFLOW: u32 = 1 << 24;
const IS_BUS_DATA: u32 = 1 << 28;
const IS_BUS_FATAL: u32 = 1 << 29;
const IS_TASK_FILE: u32 = 1 << 30;
/// Those that PxSERR.DIAG holds up: they are cleared there.
const IS_READ_ONLY: u32 = IS_CONNECT | IS_PHY_READY;
const IE_WRITABLE: u32 = 0xfdc0_00ff;

/// PxSSTS of a drive that is there: Gen 3, active.
const PRESENT: u32 = 0x133;
/// PxSERR.DIAG: exchanged, PhyRdy changed.
const EXCHANGED: u32 = 1 << 26;
const PHY_CHANGED: u32 = 1 << 16;
/// PxTFD and PxSIG without a drive, or before it has sent its signature.
const NO_STATUS: u8 = 0x7f;
const NO_SIGNATURE: u32 = u32::MAX;
/// Device control register: soft reset.
const SOFT_RESET: u8 = 1 << 2;

struct State {
    list: u64,
    received: u64,
    interrupts: u32,
    enabled: u32,
    command: u32,
    task_file: (u8, u8),
    signature: u32,
    status: u32,
    control: u32,
    error: u32,
    active: u32,
    issued: u32,
    /// The slot that was taken last.
    slot: u8,
    /// A command has failed: nothing is taken until ST has been cleared.
    halted: bool,
    /// Soft reset is held by a control frame.
    soft_reset: bool,
    working: bool,
    epoch: u64,
    /// The signature waits for PxCMD.FRE.
    unsigned: bool,
    stopped: bool,
}

impl State {
    fn new() -> Self {
        State {
            list: 0,
            received: 0,
            interrupts: 0,
            enabled: 0,
            command: SPIN_UP | POWER_ON,
            task_file: (NO_STATUS, 0),
            signature: NO_SIGNATURE,
            status: 0,
            control: 0,
            error: 0,
            active: 0,
            issued: 0,
            slot: 31,
            halted: false,
            soft_reset: false,
            working: false,
            epoch: 0,
            unsigned: false,
            stopped: false,
        }
    }

    /// The next slot with a command, after the one that was taken last.
    fn next(&self) -> Option<u8> {
        if self.command & ST == 0 || self.halted {
            return None;
        }
        (1..=32).map(|step| (self.slot + step) % 32).find(|slot| self.issued & 1 << slot != 0)
    }

    fn halt(&mut self, why: u32) {
        self.interrupts |= why;
        self.halted = true;
    }
}

/// A port.
pub struct Port {
    number: u8,
    drive: Option<Drive>,
    state: Mutex<State>,
    changed: Condvar,
    memory: View,
    shared: Weak<Shared>,
}

impl Port {
    pub fn new(number: u8, drive: Option<Drive>, memory: View, shared: Weak<Shared>) -> Arc<Self> {
        let port = Port { number, drive, state: Mutex::new(State::new()), changed: Condvar::new(), memory, shared };
        port.connect(&mut port.lock());
        Arc::new(port)
    }

    /// Starts the thread that does the commands, if there is a drive to do them.
    pub fn start(self: &Arc<Self>) -> Result<Option<Worker>, Error> {
        if self.drive.is_none() {
            return Ok(None);
        }
        let (work, stop) = (self.clone(), self.clone());
        let stop = move || {
            stop.lock().stopped = true;
            stop.changed.notify_all();
        };
        Worker::start("ahci", move || work.work(), stop).map(Some)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn memory(&self) -> &View {
        &self.memory
    }

    pub fn has_packet_drive(&self) -> bool {
        self.drive.as_ref().is_some_and(Drive::is_packet)
    }

    pub fn is_abandoned(&self, epoch: u64) -> bool {
        let state = self.lock();
        state.epoch != epoch || state.stopped
    }

    /// Something that the thread waits for may have come.
    pub fn wake(&self) {
        // With the lock, so that it can't come between the thread's look and its wait.
        let _state = self.lock();
        self.changed.notify_all();
    }

    fn may_master(&self) -> bool {
        self.shared.upgrade().is_some_and(|shared| shared.may_master())
    }

    /// The link comes up, as after power-on and COMRESET: the drive tells its signature.
    fn connect(&self, state: &mut State) {
        let Some(_) = &self.drive else {
            state.status = 0;
            return;
        };
        state.status = PRESENT;
        state.task_file = (status::BUSY, 0);
        state.error |= EXCHANGED | PHY_CHANGED;
        state.unsigned = true;
        self.sign(state);
    }

    /// The first register frame, if there is where to receive it.
    fn sign(&self, state: &mut State) {
        let Some(drive) = self.drive.as_ref().filter(|_| state.unsigned) else { return };
        let signature = drive.signature();
        let [l0, l1, l2, ..] = signature.lba.to_le_bytes();
        state.signature = u32::from_le_bytes([signature.count as u8, l0, l1, l2]);
        state.task_file = (signature.status, signature.error);
        if state.command & RECEIVE != 0 {
            state.unsigned = false;
            self.receive(state, fis::REGISTER_PLACE, &fis::register(&signature, false));
        }
    }

    /// Writes a frame into the driver's memory.
    fn receive(&self, state: &mut State, place: u64, frame: &[u8]) {
        if state.command & RECEIVE == 0 {
            return;
        }
        let address = state.received.checked_add(place);
        let written = address.is_some_and(|address| self.memory.write_slice(frame, GuestAddress(address)).is_ok());
        if !written {
            state.halt(IS_BUS_FATAL);
        }
    }

    /// Tells the shared registers whether this port has an interrupt. `again`: there is something new.
    fn tell(&self, state: &State, again: bool) {
        if let Some(shared) = self.shared.upgrade() {
            shared.port_interrupt(self.number, interrupts(state) & state.enabled != 0, again);
        }
    }

    pub fn read(&self, offset: u64) -> u32 {
        let state = self.lock();
        match offset {
            CLB => state.list as u32,
            CLBU => (state.list >> 32) as u32,
            FB => state.received as u32,
            FBU => (state.received >> 32) as u32,
            IS => interrupts(&state),
            IE => state.enabled,
            CMD => {
                let running = state.command & ST != 0 || state.working;
                let mut command = state.command | HOT_PLUG;
                command |= if running { RUNNING } else { 0 };
                command |= if state.command & RECEIVE != 0 { RECEIVING } else { 0 };
                command | if state.command & ST != 0 { u32::from(state.slot) << SLOT_SHIFT } else { 0 }
            }
            TFD => u32::from(state.task_file.0) | u32::from(state.task_file.1) << 8,
            SIG => state.signature,
            SSTS => state.status,
            SCTL => state.control,
            SERR => state.error,
            SACT => state.active,
            CI => state.issued,
            _ => 0,
        }
    }

    pub fn write(&self, offset: u64, value: u32) {
        let mut state = self.lock();
        match offset {
            CLB => state.list = state.list & !0xffff_ffff | u64::from(value & !0x3ff),
            CLBU => state.list = state.list & 0xffff_ffff | u64::from(value) << 32,
            FB => state.received = state.received & !0xffff_ffff | u64::from(value & !0xff),
            FBU => state.received = state.received & 0xffff_ffff | u64::from(value) << 32,
            IS => state.interrupts &= !(value & !IS_READ_ONLY),
            IE => state.enabled = value & IE_WRITABLE,
            CMD => self.write_command(&mut state, value),
            SCTL => self.write_control(&mut state, value),
            SERR => state.error &= !value,
            SACT if state.command & ST != 0 => state.active |= value,
            CI if state.command & ST != 0 => {
                state.issued |= value;
                // A drive that has a command is busy, as software can see at once.
                if value & !state.active != 0 && !state.halted {
                    state.task_file.0 |= status::BUSY;
                }
                self.changed.notify_all();
            }
            _ => {}
        }
        self.tell(&state, false);
    }

    fn write_command(&self, state: &mut State, value: u32) {
        let before = state.command;
        state.command = value & COMMAND_WRITABLE;
        if before & ST != 0 && value & ST == 0 {
            self.abandon(state);
        }
        if value & OVERRIDE != 0 && value & ST == 0 {
            state.task_file.0 &= !(status::BUSY | status::DATA_REQUEST);
        }
        if before & RECEIVE == 0 && value & RECEIVE != 0 {
            self.sign(state);
        }
        self.changed.notify_all();
    }

    /// Commands that were not done yet are forgotten (AHCI 3.3.14).
    fn abandon(&self, state: &mut State) {
        state.epoch += 1;
        (state.issued, state.active, state.halted) = (0, 0, false);
        state.slot = 31;
        self.changed.notify_all();
    }

    /// PxSCTL: COMRESET while DET is 1, no link while it is 4.
    fn write_control(&self, state: &mut State, value: u32) {
        let before = std::mem::replace(&mut state.control, value & 0xfff) & 15;
        match (before, value & 15) {
            (1, 0) | (4, 0) => self.connect(state),
            (_, det @ (1 | 4)) if before != det => {
                self.abandon(state);
                if let Some(drive) = &self.drive {
                    drive.reset();
                }
                state.status = if det == 4 { 4 } else { u32::from(self.drive.is_some()) };
                state.task_file = (NO_STATUS, 0);
                state.signature = NO_SIGNATURE;
                state.soft_reset = false;
            }
            _ => {}
        }
    }

    /// A reset of the whole controller. Waits until the thread has let go.
    pub fn reset(&self, power_on: bool) {
        let mut state = self.lock();
        self.abandon(&mut state);
        while power_on && state.working && !state.stopped {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(drive) = &self.drive {
            if power_on { drive.power_on() } else { drive.reset() }
        }
        let State { epoch, working, stopped, .. } = *state;
        *state = State { epoch, working, stopped, ..State::new() };
        self.connect(&mut state);
    }

    /// What the thread does.
    fn work(&self) {
        let mut state = self.lock();
        while !state.stopped {
            let next = state.next().filter(|_| self.may_master());
            let Some(slot) = next else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.slot = slot;
            state.working = true;
            let (epoch, list) = (state.epoch, state.list);
            drop(state);
            self.process(slot, epoch, list);
            state = self.lock();
            state.working = false;
            self.changed.notify_all();
        }
    }

    /// Does the command in `slot`.
    fn process(&self, slot: u8, epoch: u64, list: u64) {
        let Some(header) = Header::read(&self.memory, list, slot) else {
            return self.end(epoch, |state| state.halt(IS_BUS_FATAL));
        };
        match header.frame(&self.memory) {
            Some(FromHost::Command(command)) => self.command(slot, epoch, &header, &command),
            Some(FromHost::Control(value)) => self.end(epoch, |state| {
                state.issued &= !(1 << slot);
                self.control(state, value, header.clears_busy);
            }),
            None => self.end(epoch, |state| state.halt(IS_BUS_FATAL)),
        }
    }

    /// A control frame: soft reset begins or ends.
    fn control(&self, state: &mut State, value: u8, clears_busy: bool) {
        let reset = value & SOFT_RESET != 0;
        let before = std::mem::replace(&mut state.soft_reset, reset);
        if reset && !before {
            if let Some(drive) = &self.drive {
                drive.reset();
            }
            state.task_file.0 = if clears_busy { 0 } else { status::BUSY };
        } else if before && !reset {
            state.unsigned = true;
            self.sign(state);
        }
    }

    fn command(&self, slot: u8, epoch: u64, header: &Header, command: &TaskFile) {
        let Some(drive) = &self.drive else { return };
        let mut transfer = Transfer::new(self, header, *command, epoch);
        let result = drive.execute(command, &mut transfer);
        let told = transfer.told;
        let queued = !drive.is_packet() && matches!(command.command, READ_FPDMA_QUEUED | WRITE_FPDMA_QUEUED);
        let bit = 1 << slot;
        self.end(epoch, |state| match result {
            Err(Stop::Abandoned) => {}
            Err(Stop::Memory) => {
                state.task_file = (status::READY | status::ERROR, error::ABORTED);
                state.halt(IS_BUS_DATA | IS_OVERFLOW);
            }
            Err(Stop::Image(_)) => self.end_command(state, bit, &Outcome::failed(command, error::ABORTED)),
            Ok(outcome) if queued => self.end_queued(state, bit, &outcome),
            Ok(outcome) if told && !outcome.is_error() => {
                state.task_file = (outcome.status, outcome.error);
                state.issued &= !bit;
                state.interrupts |= IS_PIO;
            }
            Ok(outcome) => self.end_command(state, bit, &outcome),
        });
    }

    fn end_command(&self, state: &mut State, bit: u32, outcome: &Outcome) {
        self.receive(state, fis::REGISTER_PLACE, &fis::register(outcome, true));
        state.task_file = (outcome.status, outcome.error);
        state.interrupts |= IS_REGISTER;
        if outcome.is_error() {
            // The slot stays as it is, for software to see which one it was (AHCI 6.2.2.1).
            state.halt(IS_TASK_FILE);
        } else {
            state.issued &= !bit;
        }
    }

    /// The end of a queued command. The drive has said before that it has taken it, by which PxCI was cleared.
    fn end_queued(&self, state: &mut State, bit: u32, outcome: &Outcome) {
        state.issued &= !bit;
        let failed = outcome.is_error();
        let ended = if failed { 0 } else { bit };
        self.receive(state, fis::DEVICE_BITS_PLACE, &fis::set_device_bits(outcome, ended));
        state.task_file = (outcome.status, outcome.error);
        state.active &= !ended;
        state.interrupts |= IS_DEVICE_BITS;
        if failed {
            state.halt(IS_TASK_FILE);
        }
    }

    /// Changes the state if it is still that of `epoch`, and tells what is new.
    fn end(&self, epoch: u64, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        if state.epoch == epoch && !state.stopped {
            change(&mut state);
            self.tell(&state, true);
        }
    }

    /// A PIO setup frame comes before PIO data.
    pub fn announce_pio(&self, epoch: u64, frame: &[u8; 20]) {
        let mut state = self.lock();
        if state.epoch == epoch {
            self.receive(&mut state, fis::PIO_SETUP_PLACE, frame);
        }
    }
}

/// PxIS, with the bits that PxSERR holds up.
fn interrupts(state: &State) -> u32 {
    let connect = if state.error & EXCHANGED != 0 { IS_CONNECT } else { 0 };
    let ready = if state.error & PHY_CHANGED != 0 { IS_PHY_READY } else { 0 };
    state.interrupts | connect | ready
}
