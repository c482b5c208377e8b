//! The registers of a 16550A (PC16550D datasheet, section 8), without a clock, a line or a sink.

use std::collections::VecDeque;

use crate::clock::SECOND;
use crate::constants::SERIAL_CLOCK_HZ;

/// Register offsets.
const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const INTERRUPT_ID: u64 = 2;
const LINE_CONTROL: u64 = 3;
const MODEM_CONTROL: u64 = 4;
const LINE_STATUS: u64 = 5;
const MODEM_STATUS: u64 = 6;

/// Interrupt enable.
const RECEIVED: u8 = 1 << 0;
const TRANSMITTER_EMPTY: u8 = 1 << 1;
const LINE: u8 = 1 << 2;
const MODEM: u8 = 1 << 3;

/// Interrupt identification, from the highest priority to the lowest, and none.
const ID_LINE: u8 = 0x06;
const ID_RECEIVED: u8 = 0x04;
const ID_TIME_OUT: u8 = 0x0c;
const ID_TRANSMITTER_EMPTY: u8 = 0x02;
const ID_MODEM: u8 = 0x00;
const ID_NONE: u8 = 0x01;
const ID_FIFOS: u8 = 0xc0;

/// FIFO control.
const FIFO_ENABLE: u8 = 1 << 0;
const CLEAR_RECEIVER: u8 = 1 << 1;
const CLEAR_TRANSMITTER: u8 = 1 << 2;

/// Line control.
const DIVISOR_ACCESS: u8 = 1 << 7;

/// Modem control.
const DTR: u8 = 1 << 0;
const RTS: u8 = 1 << 1;
const OUT1: u8 = 1 << 2;
const OUT2: u8 = 1 << 3;
const LOOP: u8 = 1 << 4;

/// Line status.
const DATA_READY: u8 = 1 << 0;
const OVERRUN: u8 = 1 << 1;
const HOLDING_EMPTY: u8 = 1 << 5;
const ALL_EMPTY: u8 = 1 << 6;

/// Modem status: the inputs. A change of each sets the bit four below; of RI, only its end does.
const CTS: u8 = 1 << 4;
const DSR: u8 = 1 << 5;
const RI: u8 = 1 << 6;
const DCD: u8 = 1 << 7;
/// The other end is there and ready.
const CONNECTED: u8 = CTS | DSR | DCD;

const FIFO_SIZE: usize = 16;
/// So many reads of the line status in a row, with nothing written, are a driver that waits for input without interrupts.
/// Drivers that wait for the transmitter read it once or twice.
const POLLS: u32 = 16;
/// A longer time-out would help nobody: no real line is at the other end.
const LONGEST_TIME_OUT: u64 = 10_000_000;

/// What a write wants from outside.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    None,
    /// Send this byte, then [`Uart::sent`]; if it can't be sent now, [`Uart::hold`].
    Transmit(u8),
}

/// A byte in the receiver.
#[derive(Clone, Copy)]
struct Received {
    byte: u8,
    /// It came by the loop, not by the line.
    looped: bool,
}

pub struct Uart {
    interrupt_enable: u8,
    fifos: bool,
    trigger: usize,
    line_control: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    divisor: u16,
    overrun: bool,
    received: VecDeque<Received>,
    /// Bytes from the line that were thrown away unread.
    discarded: Vec<u8>,
    /// Reads of the line status since the last write.
    polls: u32,
    /// Bytes that couldn't be sent yet.
    held: VecDeque<u8>,
    /// The transmitter has become empty, and nobody has taken note.
    empty_interrupt: bool,
    /// Received bytes below the trigger level have waited too long.
    time_out: bool,
}

impl Uart {
    pub fn new() -> Self {
        Uart {
            interrupt_enable: 0,
            fifos: false,
            trigger: 1,
            line_control: 0,
            modem_control: 0,
            modem_status: CONNECTED,
            scratch: 0,
            divisor: 12,
            overrun: false,
            received: VecDeque::with_capacity(FIFO_SIZE),
            discarded: Vec::new(),
            polls: 0,
            held: VecDeque::new(),
            empty_interrupt: false,
            time_out: false,
        }
    }

    fn capacity(&self) -> usize {
        if self.fifos { FIFO_SIZE } else { 1 }
    }

    fn looped(&self) -> bool {
        self.modem_control & LOOP != 0
    }

    fn divisor_access(&self) -> bool {
        self.line_control & DIVISOR_ACCESS != 0
    }

    pub fn read(&mut self, offset: u64) -> u8 {
        match offset {
            DATA if self.divisor_access() => self.divisor as u8,
            INTERRUPT_ENABLE if self.divisor_access() => (self.divisor >> 8) as u8,
            DATA => {
                self.time_out = false;
                self.received.pop_front().map_or(0, |received| received.byte)
            }
            INTERRUPT_ENABLE => self.interrupt_enable,
            INTERRUPT_ID => {
                let id = self.interrupt_id();
                if id == ID_TRANSMITTER_EMPTY {
                    self.empty_interrupt = false;
                }
                id | if self.fifos { ID_FIFOS } else { 0 }
            }
            LINE_CONTROL => self.line_control,
            MODEM_CONTROL => self.modem_control,
            LINE_STATUS => {
                let status = self.line_status();
                self.overrun = false;
                self.polls = self.polls.saturating_add(1);
                status
            }
            MODEM_STATUS => {
                let status = self.modem_status;
                self.modem_status &= 0xf0;
                status
            }
            _ => self.scratch,
        }
    }

    pub fn write(&mut self, offset: u64, value: u8) -> Effect {
        self.polls = 0;
        match offset {
            DATA if self.divisor_access() => self.divisor = self.divisor & 0xff00 | u16::from(value),
            INTERRUPT_ENABLE if self.divisor_access() => self.divisor = self.divisor & 0x00ff | u16::from(value) << 8,
            DATA => return self.write_data(value),
            INTERRUPT_ENABLE => {
                let enabled = value & !self.interrupt_enable;
                self.interrupt_enable = value & 0x0f;
                if enabled & TRANSMITTER_EMPTY != 0 {
                    self.empty_interrupt = self.held.is_empty();
                }
            }
            INTERRUPT_ID => self.write_fifo_control(value),
            LINE_CONTROL => self.line_control = value,
            MODEM_CONTROL => {
                self.modem_control = value & 0x1f;
                self.update_modem_status();
            }
            // Line and modem status are for reading (the factory tests aside).
            LINE_STATUS | MODEM_STATUS => {}
            _ => self.scratch = value,
        }
        Effect::None
    }

    fn write_data(&mut self, value: u8) -> Effect {
        self.empty_interrupt = false;
        if !self.looped() {
            return Effect::Transmit(value);
        }
        self.sent();
        let received = Received { byte: value, looped: true };
        if self.received.len() < self.capacity() {
            self.received.push_back(received);
        } else {
            // Without FIFOs the new byte takes the place of the old one, with them it is lost.
            if !self.fifos {
                self.received.clear();
                self.received.push_back(received);
            }
            self.overrun = true;
        }
        Effect::None
    }

    fn write_fifo_control(&mut self, value: u8) {
        let fifos = value & FIFO_ENABLE != 0;
        let switched = fifos != self.fifos;
        self.fifos = fifos;
        // The other bits count only while bit 0 is set.
        let value = if fifos { value } else { 0 };
        self.trigger = [1, 4, 8, 14][usize::from(value >> 6)];
        if switched || value & CLEAR_RECEIVER != 0 {
            self.clear_receiver();
        }
        if (switched || value & CLEAR_TRANSMITTER != 0) && !self.held.is_empty() {
            self.held.clear();
            self.sent();
        }
    }

    fn clear_receiver(&mut self) {
        let from_line = self.received.drain(..).filter(|received| !received.looped);
        self.discarded.extend(from_line.map(|received| received.byte));
        self.time_out = false;
    }

    /// Takes the bytes from the line that were thrown away unread.
    pub fn take_discarded(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.discarded)
    }

    /// The state after power-on, but for [`take_discarded`](Self::take_discarded).
    pub fn reset(&mut self) {
        self.clear_receiver();
        *self = Uart { discarded: self.take_discarded(), ..Uart::new() };
    }

    /// Follows the modem inputs, which are the outputs while looped.
    fn update_modem_status(&mut self) {
        let wires = [(RTS, CTS), (DTR, DSR), (OUT1, RI), (OUT2, DCD)];
        let looped = wires.iter().filter(|(out, _)| self.modem_control & out != 0).map(|(_, input)| input).sum();
        let inputs: u8 = if self.looped() { looped } else { CONNECTED };
        let before = self.modem_status & 0xf0;
        let changed = inputs ^ before;
        let noted = changed & !(RI & inputs);
        self.modem_status = inputs | self.modem_status & 0x0f | noted >> 4;
    }

    fn line_status(&self) -> u8 {
        let mut status = 0;
        if !self.received.is_empty() {
            status |= DATA_READY;
        }
        if self.overrun {
            status |= OVERRUN;
        }
        if self.held.is_empty() {
            status |= HOLDING_EMPTY | ALL_EMPTY;
        }
        status
    }

    fn interrupt_id(&self) -> u8 {
        let enabled = |bit| self.interrupt_enable & bit != 0;
        if enabled(LINE) && self.overrun {
            ID_LINE
        } else if enabled(RECEIVED) && self.received.len() >= self.trigger {
            ID_RECEIVED
        } else if enabled(RECEIVED) && self.time_out {
            ID_TIME_OUT
        } else if enabled(TRANSMITTER_EMPTY) && self.empty_interrupt {
            ID_TRANSMITTER_EMPTY
        } else if enabled(MODEM) && self.modem_status & 0x0f != 0 {
            ID_MODEM
        } else {
            ID_NONE
        }
    }

    /// The level of the interrupt line, which loop mode cuts off. The first PCs' OUT2 did so, too; systems that never set it
    /// (xv6) have come to rely on ports without that gate.
    pub fn interrupt(&self) -> bool {
        self.interrupt_id() != ID_NONE && self.modem_control & LOOP == 0
    }

    /// The byte has left: the transmitter is empty.
    pub fn sent(&mut self) {
        self.empty_interrupt = true;
    }

    /// The byte can't leave yet. Beyond what the transmitter holds, bytes are lost.
    pub fn hold(&mut self, byte: u8) {
        if self.held.len() < self.capacity() {
            self.held.push_back(byte);
        }
    }

    pub fn holds_back(&self) -> bool {
        !self.held.is_empty()
    }

    /// Lets go of held bytes, as many as `send` takes.
    pub fn release(&mut self, send: impl Fn(u8) -> bool) {
        while let Some(&byte) = self.held.front() {
            if !send(byte) {
                return;
            }
            self.held.pop_front();
            if self.held.is_empty() {
                self.sent();
            }
        }
    }

    /// Whether a driver is there that wants input: it has enabled the interrupt for it, or polls.
    fn listened_to(&self) -> bool {
        self.interrupt_enable & RECEIVED != 0 || self.polls >= POLLS
    }

    /// How many bytes the receiver can take without losing one. In loop mode it is off the line.
    pub fn room(&self) -> usize {
        if self.looped() || !self.listened_to() { 0 } else { self.capacity().saturating_sub(self.received.len()) }
    }

    /// A byte comes in from the line, for which there is [`room`](Self::room).
    pub fn receive(&mut self, byte: u8) {
        self.received.push_back(Received { byte, looped: false });
        self.time_out = false;
    }

    /// Whether bytes wait below the trigger level, to be told of after [`time_out_after`](Self::time_out_after).
    pub fn awaits_time_out(&self) -> bool {
        self.fifos && !self.time_out && (1..self.trigger).contains(&self.received.len())
    }

    /// Four character times, in nanoseconds.
    pub fn time_out_after(&self) -> u64 {
        // Start bit, 5 to 8 data bits, parity if enabled, one or two stop bits.
        let bits = 7
            + u64::from(self.line_control & 3)
            + u64::from(self.line_control >> 3 & 1)
            + u64::from(self.line_control >> 2 & 1);
        let ticks = 4 * bits * 16 * u64::from(self.divisor.max(1));
        (ticks * SECOND / u64::from(SERIAL_CLOCK_HZ)).min(LONGEST_TIME_OUT)
    }

    /// The time is out.
    pub fn set_time_out(&mut self) {
        if self.awaits_time_out() {
            self.time_out = true;
        }
    }
}
