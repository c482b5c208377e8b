//! What drivers may expect of a port.

use super::*;
use crate::clock::fake::FakeClock;
use crate::testing::{Controllers, poke, read8, write8};
use std::sync::mpsc;

const PATIENCE: Duration = Duration::from_secs(20);
const IRQ: u8 = 4;

struct Sink(mpsc::Sender<u8>);

impl Write for Sink {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        data.iter().try_for_each(|&byte| self.0.send(byte)).map_err(std::io::Error::other)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Bench {
    clock: Arc<FakeClock>,
    timers: Timers,
    all: Controllers,
    sent: mpsc::Receiver<u8>,
    port: Arc<Serial>,
}

impl Bench {
    fn new() -> Self {
        let (sender, sent) = mpsc::channel();
        Self::with_sink(Box::new(Sink(sender)), sent)
    }

    fn with_sink(sink: Box<dyn Write + Send>, sent: mpsc::Receiver<u8>) -> Self {
        let clock = FakeClock::new();
        let timers = Timers::manual(clock.clone());
        let all = Controllers::default();
        let port = Serial::new(clock.clone(), &timers, all.lines.connect(IRQ), sink).unwrap();
        Bench { clock, timers, all, sent, port }
    }

    /// 115200 8N1, FIFOs with a trigger level of 8, interrupts connected.
    fn set_up(&self, interrupts: u8) {
        for (offset, value) in [(3, 0x83), (0, 1), (1, 0), (3, 0x03), (2, 0x87), (4, 0x0b), (1, interrupts)] {
            self.write(offset, value);
        }
    }

    fn read(&self, offset: u64) -> u8 {
        read8(&*self.port, offset)
    }

    fn write(&self, offset: u64, value: u8) {
        write8(&*self.port, offset, value);
    }

    fn interrupting(&self) -> bool {
        self.all.asserted(IRQ)
    }

    fn pass(&self, ns: u64) {
        self.clock.advance(ns);
        self.timers.run_due();
    }
}

#[test]
fn what_the_guest_sends_reaches_the_sink() {
    let bench = Bench::new();
    bench.set_up(0);
    b"hello".iter().for_each(|&byte| bench.write(0, byte));
    bench.port.flush();
    assert_eq!(bench.sent.try_iter().collect::<Vec<_>>(), b"hello");
}

#[test]
fn an_empty_transmitter_interrupts_until_it_is_identified() {
    let bench = Bench::new();
    bench.set_up(0);
    assert_eq!(bench.read(5), 0x60);
    bench.write(1, 0x02);
    assert!(bench.interrupting());
    assert_eq!(bench.read(2), 0xc2);
    assert!(!bench.interrupting());
    assert_eq!(bench.read(2), 0xc1);
    bench.write(0, b'x');
    assert!(bench.interrupting());
    bench.write(1, 0x00);
    assert!(!bench.interrupting());
    bench.write(1, 0x02);
    assert_eq!(bench.read(2), 0xc2, "enabling it again tells of the empty transmitter again");
}

#[test]
fn each_byte_sent_is_a_new_edge() {
    let bench = Bench::new();
    bench.set_up(0x02);
    write8(&*bench.all.ioapic, 0, 0x18);
    bench.all.ioapic.write(0x10, &0x34u32.to_le_bytes());
    bench.write(0, b'x');
    bench.write(0, b'y');
    assert_eq!(bench.all.recorder.take().len(), 2);
}

#[test]
fn interrupts_reach_the_line_without_out2_but_not_in_loop_mode() {
    let bench = Bench::new();
    bench.set_up(0x02);
    assert!(bench.interrupting());
    bench.write(4, 0x03);
    assert!(bench.interrupting());
    bench.write(4, 0x1b);
    assert!(!bench.interrupting());
}

#[test]
fn received_bytes_interrupt_at_the_trigger_level() {
    let bench = Bench::new();
    bench.set_up(0x01);
    assert_eq!(bench.port.push_input(b"1234567"), 7);
    assert!(!bench.interrupting());
    assert_eq!(bench.read(5), 0x61);
    bench.port.push_input(b"8");
    assert!(bench.interrupting());
    assert_eq!(bench.read(2), 0xc4);
    assert_eq!(bench.read(0), b'1');
    assert!(!bench.interrupting());
}

#[test]
fn bytes_below_the_trigger_level_time_out() {
    let bench = Bench::new();
    bench.set_up(0x01);
    bench.port.push_input(b"ab");
    // Four characters of ten bits at 115200 baud.
    bench.pass(346_000);
    assert!(!bench.interrupting());
    bench.port.push_input(b"c");
    bench.pass(346_000);
    assert!(!bench.interrupting(), "each byte starts the time-out anew");
    bench.pass(2_000);
    assert!(bench.interrupting());
    assert_eq!(bench.read(2), 0xcc);
    assert_eq!(bench.read(0), b'a');
    assert_eq!(bench.read(2), 0xc1);
    bench.pass(348_000);
    assert_eq!(bench.read(2), 0xcc);
    assert_eq!((bench.read(0), bench.read(0)), (b'b', b'c'));
    assert_eq!(bench.read(2), 0xc1);
    assert_eq!(bench.timers.next_deadline(), None);
}

#[test]
fn input_waits_for_a_driver_and_for_room() {
    let bench = Bench::new();
    let typed: Vec<u8> = (0..100).collect();
    assert_eq!(bench.port.push_input(&typed), 100);
    bench.set_up(0);
    assert_eq!(bench.read(5), 0x60, "nobody listens yet");
    bench.write(1, 0x01);
    let mut read = Vec::new();
    while bench.read(5) & 0x01 != 0 {
        read.push(bench.read(0));
    }
    assert_eq!(read, typed);
}

#[test]
fn a_driver_that_polls_gets_input_too() {
    let bench = Bench::new();
    bench.port.push_input(b"a");
    for _ in 0..100 {
        // Waiting for the transmitter is not listening.
        assert_eq!(bench.read(5), 0x60);
        bench.write(0, b'x');
    }
    assert!((0..20).any(|_| bench.read(5) & 0x01 != 0));
    assert_eq!(bench.read(0), b'a');
}

#[test]
fn input_that_a_driver_throws_away_unread_comes_again() {
    let bench = Bench::new();
    bench.set_up(0x01);
    bench.port.push_input(b"abcdefghijklmnopqrstuvwxyz");
    assert_eq!(bench.read(0), b'a');
    bench.write(1, 0x00);
    for value in [0x83, 0x07, 0x00] {
        bench.write(2, value);
        assert_eq!(bench.read(5) & 0x01, 0);
    }
    bench.port.reset();
    bench.set_up(0x01);
    let read: Vec<u8> = (0..25).map(|_| bench.read(0)).collect();
    assert_eq!(read, b"bcdefghijklmnopqrstuvwxyz");
}

#[test]
fn too_much_input_waits_outside() {
    let bench = Bench::new();
    let much = vec![7; INPUT_CAPACITY + 1];
    assert_eq!(bench.port.push_input(&much), INPUT_CAPACITY);
    assert_eq!(bench.port.push_input(&much), 0);
    let port = bench.port.clone();
    let sender = std::thread::spawn(move || port.send_input(&[8; 20]));
    bench.set_up(0x01);
    let read: Vec<u8> = (0..INPUT_CAPACITY).map(|_| bench.read(0)).collect();
    assert_eq!(read, much[1..]);
    sender.join().unwrap();
    assert_eq!((0..20).map(|_| bench.read(0)).collect::<Vec<_>>(), [8; 20]);
}

#[test]
fn the_fifo_control_register_clears_the_receiver() {
    let bench = Bench::new();
    bench.set_up(0x01);
    bench.port.push_input(b"12345678");
    assert!(bench.interrupting());
    bench.write(1, 0x00);
    bench.write(2, 0x83);
    assert_eq!(bench.read(5), 0x60);
    assert_eq!(bench.read(2), 0xc1);
    bench.write(2, 0x00);
    assert_eq!(bench.read(2), 0x01);
}

#[test]
fn loop_mode_brings_back_bytes_and_modem_lines() {
    let bench = Bench::new();
    bench.set_up(0);
    assert_eq!(bench.read(6), 0xb0);
    bench.write(4, 0x10);
    assert_eq!(bench.read(6), 0x0b, "CTS, DSR and DCD fell");
    bench.write(4, 0x1f);
    assert_eq!(bench.read(6), 0xfb, "RI only tells of its end");
    bench.write(4, 0x1b);
    assert_eq!(bench.read(6), 0xb4);
    bench.port.push_input(b"z");
    bench.write(0, b'q');
    assert_eq!(bench.read(5), 0x61);
    assert_eq!(bench.read(0), b'q');
    for byte in 0..17 {
        bench.write(0, byte);
    }
    assert_eq!(bench.read(5), 0x63);
    assert_eq!(bench.read(5), 0x61);
    bench.write(4, 0x0b);
    assert!(bench.sent.try_recv().is_err());
}

#[test]
fn an_overrun_is_a_line_status_interrupt() {
    let bench = Bench::new();
    bench.set_up(0x04);
    bench.write(4, 0x18);
    (0..17).for_each(|byte| bench.write(0, byte));
    assert_eq!(bench.read(2), 0xc6);
    bench.read(5);
    assert_eq!(bench.read(2), 0xc1);
}

#[test]
fn modem_status_changes_interrupt() {
    let bench = Bench::new();
    bench.set_up(0x08);
    bench.write(4, 0x18);
    bench.write(4, 0x0b);
    assert!(bench.interrupting());
    assert_eq!(bench.read(2), 0xc0);
    bench.read(6);
    assert!(!bench.interrupting());
}

#[test]
fn the_divisor_hides_behind_its_latch() {
    let bench = Bench::new();
    bench.set_up(0x05);
    bench.write(3, 0x83);
    assert_eq!((bench.read(0), bench.read(1)), (1, 0));
    bench.write(1, 0x12);
    bench.write(3, 0x03);
    assert_eq!(bench.read(1), 0x05);
    bench.write(7, 0xa5);
    assert_eq!(bench.read(7), 0xa5);
    bench.write(1, 0xff);
    assert_eq!(bench.read(1), 0x0f, "only four interrupts can be enabled");
}

#[test]
fn a_sink_that_is_stuck_leaves_the_transmitter_full_but_blocks_nobody() {
    struct Stuck(mpsc::Receiver<()>, mpsc::Sender<u8>);
    impl Write for Stuck {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            self.0.recv().map_err(std::io::Error::other)?;
            data.iter().try_for_each(|&byte| self.1.send(byte)).map_err(std::io::Error::other)?;
            Ok(data.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (permit, permits) = mpsc::channel();
    let (sender, sent) = mpsc::channel();
    let bench = Bench::with_sink(Box::new(Stuck(permits, sender)), sent);
    bench.set_up(0x02);
    let mut written: u32 = 0;
    while bench.read(5) & 0x20 != 0 {
        bench.write(0, written as u8);
        written += 1;
        assert!(written < 1 << 20);
    }
    bench.read(2);
    assert!(!bench.interrupting());
    (0..100).for_each(|_| permit.send(()).unwrap());
    for expected in 0..written {
        assert_eq!(bench.sent.recv_timeout(PATIENCE), Ok(expected as u8));
    }
    bench.port.flush();
    assert_eq!(bench.read(5) & 0x20, 0x20);
    assert!(bench.interrupting());
}

#[test]
fn random_accesses_do_no_harm() {
    let bench = Bench::new();
    poke(&*bench.port, 8, 200_000, |random| {
        bench.port.push_input(&random.draw().to_le_bytes()[..random.below(8) as usize]);
        bench.pass(random.below(1 << 20));
    });
    bench.port.reset();
    assert!(!bench.interrupting());
}
