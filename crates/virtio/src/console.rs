//! Console device (virtio 1.2, 5.3) with one port: the guest's `/dev/hvc0`.
//!
//! Output: transmit queue -> [`Output`], a bounded queue with a thread that writes to the sink. While that is full, the
//! guest's buffers stay in their queue: a slow sink holds up the guest, but no thread of the device. Input:
//! [`Console::input`] -> a bounded queue -> the guest's receive buffers.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chipset::serial::Output;

use crate::{
    Activation, Chain, DeviceType, Error, Event, Queue, Signals, VirtioDevice, Worker, wait_any, wait_any_for,
};

/// Feature bit (5.3.3): columns and rows are in the configuration space.
const SIZE: u64 = 1;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// How many bytes of input may wait for the guest.
const INPUT_CAPACITY: usize = 64 << 10;
/// What is copied at once.
const PIECE: usize = 4096;
/// How long the guest must have written nothing after it first wrote something, until it is told of the terminal's size.
/// Linux registers the console, writes its log to it, and only then can take a change of size; if one comes
/// earlier, it is a bug to it (`set_console_size` in `virtio_console.c`).
const SETTLING: Duration = Duration::from_secs(2);
/// How long a sink may take nothing at the end of the machine.
const PATIENCE: Duration = Duration::from_secs(2);

/// A console on the PCI bus.
pub struct Console {
    shared: Arc<Shared>,
    active: Mutex<Option<Active>>,
}

struct Active {
    signals: Arc<dyn Signals>,
    _workers: [Worker; 2],
}

/// What the host's side and the device's threads share.
struct Shared {
    output: Output,
    /// The output has room again.
    room: Arc<Event>,
    input: Mutex<VecDeque<u8>>,
    /// Input has come.
    came: Event,
    /// The guest has taken some.
    taken: Condvar,
    /// Columns and rows.
    size: Mutex<(u16, u16)>,
    /// The guest can take changes of the size.
    settled: AtomicBool,
}

impl Console {
    /// A console whose output goes to `sink`.
    pub fn new(sink: Box<dyn Write + Send>) -> io::Result<Self> {
        let room = Arc::new(Event::new()?);
        let more = room.clone();
        let shared = Shared {
            output: Output::start(sink, move || more.set())?,
            room,
            input: Mutex::default(),
            came: Event::new()?,
            taken: Condvar::new(),
            size: Mutex::default(),
            settled: AtomicBool::new(false),
        };
        Ok(Console { shared: Arc::new(shared), active: Mutex::default() })
    }

    /// Sends bytes to the guest. Waits while the guest is far behind.
    pub fn input(&self, mut data: &[u8]) {
        let mut queue = lock(&self.shared.input);
        while !data.is_empty() {
            let room = INPUT_CAPACITY.saturating_sub(queue.len());
            if room == 0 {
                queue = self.shared.taken.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let (now, later) = data.split_at(data.len().min(room));
            queue.extend(now);
            data = later;
            self.shared.came.set();
        }
    }

    /// Tells the guest how large the terminal is.
    pub fn resize(&self, columns: u16, rows: u16) {
        let old = std::mem::replace(&mut *lock(&self.shared.size), (columns, rows));
        let changed = old != (columns, rows) && self.shared.settled.load(Ordering::SeqCst);
        if let (true, Some(active)) = (changed, lock(&self.active).as_ref()) {
            active.signals.config_changed();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn queue_sizes(&self) -> &[u16] {
        &[128, 128]
    }

    fn features(&self) -> u64 {
        SIZE
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let (columns, rows) = *lock(&self.shared.size);
        let [c0, c1] = columns.to_le_bytes();
        let [r0, r1] = rows.to_le_bytes();
        // 5.3.4: and one port.
        let config = [c0, c1, r0, r1, 1, 0, 0, 0];
        data.iter_mut().zip(config.iter().skip(offset)).for_each(|(to, from)| *to = *from);
    }

    fn activate(&self, mut activation: Activation) -> Result<(), Error> {
        let device = DeviceType::Console;
        let (receive, transmit) = (activation.queue(device, RECEIVE)?, activation.queue(device, TRANSMIT)?);
        let failed = |source| Error::Host { device: device.name(), what: "can't start a thread", source };
        let shared = self.shared.clone();
        let receiver = Worker::start("console-input", move |stop| shared.receive(receive, stop)).map_err(failed)?;
        let shared = self.shared.clone();
        let signals = activation.signals.clone();
        let sender = Worker::start("console-output", move |stop| shared.transmit(transmit, &*signals, stop));
        let sender = sender.map_err(failed)?;
        *lock(&self.active) = Some(Active { signals: activation.signals, _workers: [receiver, sender] });
        Ok(())
    }

    fn reset(&self) {
        let was_active = lock(&self.active).take().is_some();
        self.shared.settled.store(false, Ordering::SeqCst);
        if was_active && !self.shared.output.flush(PATIENCE) {
            tracing::warn!("the guest's last console output has not been taken");
        }
    }
}

impl Shared {
    /// Fills the guest's buffers with input.
    fn receive(&self, mut queue: Queue, stop: &Event) {
        let kick = queue.kick().clone();
        while !stop.is_set() {
            wait_any(&[stop, &kick, &self.came]);
            kick.clear();
            self.came.clear();
            while !stop.is_set() {
                let mut input = lock(&self.input);
                if input.is_empty() {
                    break;
                }
                let Some(chain) = queue.pop() else {
                    drop(input);
                    if queue.enable_kicks() {
                        continue;
                    }
                    break;
                };
                let count = input.len().min(chain.writable_len()).min(PIECE);
                let data: Vec<u8> = input.drain(..count).collect();
                drop(input);
                self.taken.notify_all();
                chain.write_at(0, &data);
                queue.push(chain, count as u32);
            }
            queue.notify();
        }
    }

    /// Hands the guest's buffers to the output as it has room.
    fn transmit(&self, mut queue: Queue, signals: &dyn Signals, stop: &Event) {
        let kick = queue.kick().clone();
        // The buffer that is being sent, and how much of it has gone.
        let mut sending: Option<(Chain, usize)> = None;
        let mut wrote = false;
        while !stop.is_set() {
            let settling = (wrote && !self.settled.load(Ordering::SeqCst)).then_some(SETTLING);
            if !wait_any_for(&[stop, if sending.is_some() { &self.room } else { &kick }], settling) {
                self.settled.store(true, Ordering::SeqCst);
                if *lock(&self.size) != (0, 0) {
                    signals.config_changed();
                }
                continue;
            }
            kick.clear();
            self.room.clear();
            while !stop.is_set() {
                let Some((chain, sent)) = sending.take().or_else(|| Some((queue.pop()?, 0))) else {
                    if queue.enable_kicks() {
                        continue;
                    }
                    break;
                };
                let mut piece = [0; PIECE];
                let length = chain.read_at(sent, &mut piece);
                if length == 0 {
                    queue.push(chain, 0);
                    continue;
                }
                let taken = self.output.push_slice(piece.get(..length).unwrap_or_default());
                sending = Some((chain, sent + taken));
                wrote = true;
                if taken < length {
                    break;
                }
            }
            queue.notify();
        }
    }
}
