//! Ports by which software speaks to whoever runs the machine: a console without any protocol, and an exit.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use crate::serial::Output;
use crate::{Device, PowerEvents};

/// Where firmware and Bochs's programs write.
pub const DEBUG_CONSOLE_PORTS: [u16; 2] = [0x402, 0xe9];
/// What a read gives: so software sees that the port is there.
const PRESENT: u8 = 0xe9;
/// How long a stuck sink may hold up the machine's end.
const PATIENCE: Duration = Duration::from_secs(1);

/// Each byte that is written goes to a sink. If that is too slow, bytes are lost.
pub struct DebugConsole {
    output: Output,
}

impl DebugConsole {
    pub fn new(sink: Box<dyn Write + Send>) -> std::io::Result<Self> {
        Ok(DebugConsole { output: Output::start(sink, || ())? })
    }

    /// Waits until everything has been written.
    pub fn flush(&self) {
        self.output.flush(PATIENCE);
    }
}

impl Device for DebugConsole {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PRESENT);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        self.output.push_slice(data);
    }

    fn reset(&self) {}
}

/// Ports that the exit takes.
pub const DEBUG_EXIT_SIZE: u16 = 4;

/// A write ends the machine, and decides its exit status.
pub struct DebugExit {
    power: Arc<dyn PowerEvents>,
}

impl DebugExit {
    pub fn new(power: Arc<dyn PowerEvents>) -> Self {
        DebugExit { power }
    }
}

impl Device for DebugExit {
    fn width(&self) -> usize {
        4
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        self.power.exit(data.first().copied().unwrap_or(0));
    }

    fn reset(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Power, read8, write8};
    use std::sync::Mutex;

    #[test]
    fn bytes_go_to_the_sink_and_the_port_shows_itself() {
        #[derive(Clone, Default)]
        struct Sink(Arc<Mutex<Vec<u8>>>);
        impl Write for Sink {
            fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().extend(data);
                Ok(data.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let sink = Sink::default();
        let console = DebugConsole::new(Box::new(sink.clone())).unwrap();
        assert_eq!(read8(&console, 0), 0xe9);
        b"hello".iter().for_each(|byte| write8(&console, 0, *byte));
        console.flush();
        assert_eq!(*sink.0.lock().unwrap(), b"hello");
    }

    #[test]
    fn a_write_exits() {
        let power = Arc::new(Power::default());
        DebugExit::new(power.clone()).write(0, &[3, 0, 0, 0]);
        assert_eq!(power.take(), ["exit"]);
    }
}
