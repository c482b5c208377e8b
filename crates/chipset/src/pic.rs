//! The pair of 8259A interrupt controllers, the second cascaded into input 2 of the first, with the edge/level control
//! registers of EISA and PCI machines.
//!
//! Data flow: [`Pic::set_line`] changes an input; the priority resolver of its chip decides whether INT goes up; the
//! slave's INT is the master's input 2, the master's is what the vCPU sees ([`engine::Interrupts::set_pic_output`]).
//! The vCPU's acknowledge cycle ([`Pic::acknowledge`]) asks the resolver again, which gives the vector.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Device;

/// The master's input to which the slave is wired. ICW3 has to say so too; it has no other effect here.
pub const CASCADE: u8 = 2;
/// IRQs that are edge-triggered whatever the edge/level control registers say: 0, 1, 2, and 8, 13.
const ELCR_FIXED: [u8; 2] = [0x07, 0x21];

/// Which initialization command word a chip waits for (8259A datasheet, "Initialization command words").
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Expect {
    #[default]
    Operation,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Default)]
struct Chip {
    /// Input levels as they are.
    lines: u8,
    /// Edges that were seen and not yet acknowledged. They vanish when the input falls.
    edges: u8,
    /// Inputs that are level-triggered by the edge/level control register.
    elcr: u8,
    mask: u8,
    in_service: u8,
    /// Bits 7 to 3 of the vectors.
    vector_base: u8,
    /// The input that has the lowest priority now.
    lowest: u8,
    expect: Expect,
    /// ICW1: no cascade, so no ICW3.
    single: bool,
    /// ICW1: ICW4 will come.
    needs_icw4: bool,
    /// ICW1: all inputs are level-triggered.
    all_level: bool,
    /// ICW4.
    auto_eoi: bool,
    special_fully_nested: bool,
    /// OCW2.
    rotate_on_auto_eoi: bool,
    /// OCW3.
    special_mask: bool,
    poll: bool,
    read_in_service: bool,
    /// The input to which another chip is wired: its request follows that chip's output.
    cascade: Option<u8>,
}

impl Chip {
    fn new(cascade: Option<u8>) -> Self {
        // Before the first ICW1 a chip's state is undefined; masked is what does no harm.
        Chip { mask: 0xff, lowest: 7, cascade, ..Chip::default() }
    }

    fn level_triggered(&self) -> u8 {
        let cascade = self.cascade.map_or(0, |n| 1 << n);
        if self.all_level { 0xff } else { self.elcr | cascade }
    }

    /// The interrupt request register.
    fn requests(&self) -> u8 {
        let level = self.level_triggered();
        self.lines & level | self.edges & !level
    }

    fn set_line(&mut self, input: u8, high: bool) {
        let bit = 1 << (input & 7);
        if !high {
            self.lines &= !bit;
            // An edge request has to stay until the acknowledge cycle (8259A datasheet, "Edge and level triggered modes").
            self.edges &= !bit;
        } else if self.lines & bit == 0 {
            self.lines |= bit;
            self.edges |= bit;
        }
    }

    /// Inputs from the highest priority to the lowest.
    fn by_priority(&self) -> impl Iterator<Item = u8> + use<> {
        let lowest = self.lowest;
        (1..=8).map(move |n| (lowest + n) & 7)
    }

    /// In-service bits that hold back requests of their own and of lower priority.
    fn blocking(&self) -> u8 {
        if self.special_mask { self.in_service & !self.mask } else { self.in_service }
    }

    /// The request to serve next, if any may be served now. While it is there, the INT output is high.
    fn resolve(&self) -> Option<u8> {
        let requests = self.requests() & !self.mask;
        let blocking = self.blocking();
        for input in self.by_priority() {
            let bit = 1 << input;
            let blocks = blocking & bit != 0;
            // In special fully nested mode, further requests of a slave whose input is in service come through.
            let nested = self.special_fully_nested && self.cascade == Some(input);
            if requests & bit != 0 && (!blocks || nested) {
                return Some(input);
            }
            if blocks {
                return None;
            }
        }
        None
    }

    /// The acknowledge cycle: the request becomes an interrupt in service. Without a request, input 7 answers, and
    /// nothing is in service (8259A datasheet: "default IR7").
    fn acknowledge(&mut self) -> u8 {
        let Some(input) = self.resolve() else { return 7 };
        let bit = 1 << input;
        self.edges &= !bit;
        if !self.auto_eoi {
            self.in_service |= bit;
        } else if self.rotate_on_auto_eoi {
            self.lowest = input;
        }
        input
    }

    fn read_command_port(&mut self) -> u8 {
        if self.poll {
            return self.read_poll();
        }
        if self.read_in_service { self.in_service } else { self.requests() }
    }

    fn read_data_port(&mut self) -> u8 {
        if self.poll { self.read_poll() } else { self.mask }
    }

    /// The read after a poll command is an acknowledge cycle.
    fn read_poll(&mut self) -> u8 {
        self.poll = false;
        let pending = self.resolve().is_some();
        let input = self.acknowledge();
        if pending { 0x80 | input } else { 0 }
    }

    fn write_command_port(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.icw1(value);
        } else if value & 0x08 != 0 {
            self.ocw3(value);
        } else {
            self.ocw2(value);
        }
    }

    fn icw1(&mut self, value: u8) {
        *self = Chip {
            lines: self.lines,
            elcr: self.elcr,
            cascade: self.cascade,
            vector_base: self.vector_base,
            lowest: 7,
            expect: Expect::Icw2,
            needs_icw4: value & 0x01 != 0,
            single: value & 0x02 != 0,
            all_level: value & 0x08 != 0,
            ..Chip::default()
        };
    }

    fn ocw2(&mut self, value: u8) {
        let input = value & 7;
        let highest = self.highest_in_service();
        match value >> 5 {
            0b000 => self.rotate_on_auto_eoi = false,
            0b100 => self.rotate_on_auto_eoi = true,
            0b001 => self.end(highest),
            0b101 => {
                self.end(highest);
                self.lowest = highest.unwrap_or(self.lowest);
            }
            0b011 => self.end(Some(input)),
            0b111 => {
                self.end(Some(input));
                self.lowest = input;
            }
            0b110 => self.lowest = input,
            _ => {}
        }
    }

    /// What a non-specific EOI ends. In special mask mode it leaves alone what is masked.
    fn highest_in_service(&self) -> Option<u8> {
        let candidates = self.blocking();
        self.by_priority().find(|input| candidates & (1 << input) != 0)
    }

    fn end(&mut self, input: Option<u8>) {
        if let Some(input) = input {
            self.in_service &= !(1 << input);
        }
    }

    fn ocw3(&mut self, value: u8) {
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
        if value & 0x04 != 0 {
            self.poll = true;
        } else if value & 0x02 != 0 {
            self.read_in_service = value & 0x01 != 0;
        }
    }

    fn write_data_port(&mut self, value: u8) {
        let after_icw3 = if self.needs_icw4 { Expect::Icw4 } else { Expect::Operation };
        match self.expect {
            Expect::Operation => self.mask = value,
            Expect::Icw2 => {
                self.vector_base = value & 0xf8;
                self.expect = if self.single { after_icw3 } else { Expect::Icw3 };
            }
            Expect::Icw3 => self.expect = after_icw3,
            Expect::Icw4 => {
                self.auto_eoi = value & 0x02 != 0;
                self.special_fully_nested = value & 0x10 != 0;
                self.expect = Expect::Operation;
            }
        }
    }
}

struct Pair {
    master: Chip,
    slave: Chip,
    /// What the vCPU was told last.
    output: bool,
}

impl Pair {
    fn new() -> Self {
        Pair { master: Chip::new(Some(CASCADE)), slave: Chip::new(None), output: false }
    }
}

/// Both chips. As a [`Device`]: offsets 0 and 1 are the master's ports, 2 and 3 the slave's, 4 and 5 the edge/level
/// control registers.
pub struct Pic {
    pair: Mutex<Pair>,
    interrupts: Arc<dyn engine::Interrupts>,
}

impl Pic {
    pub fn new(interrupts: Arc<dyn engine::Interrupts>) -> Self {
        Pic { pair: Mutex::new(Pair::new()), interrupts }
    }

    /// Sets the level of ISA IRQ `irq`, 0 to 15.
    pub fn set_line(&self, irq: u8, high: bool) {
        let mut pair = self.lock();
        match irq {
            0..8 => pair.master.set_line(irq, high),
            _ => pair.slave.set_line(irq, high),
        }
        self.update(&mut pair);
    }

    /// The acknowledge cycle of a vCPU. Returns the vector.
    pub fn acknowledge(&self) -> u8 {
        let mut pair = self.lock();
        let cascaded = pair.master.resolve() == Some(CASCADE);
        let input = pair.master.acknowledge();
        let vector = if cascaded {
            let input = pair.slave.acknowledge();
            pair.slave.vector_base | input
        } else {
            pair.master.vector_base | input
        };
        self.update(&mut pair);
        vector
    }

    fn lock(&self) -> MutexGuard<'_, Pair> {
        self.pair.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries the slave's output to the master, and the master's to the vCPU. The lock is held meanwhile, so that the
    /// vCPU hears of changes in order.
    fn update(&self, pair: &mut Pair) {
        let slave = pair.slave.resolve().is_some();
        pair.master.set_line(CASCADE, slave);
        let output = pair.master.resolve().is_some();
        if output != pair.output {
            pair.output = output;
            self.interrupts.set_pic_output(output);
        }
    }
}

impl Device for Pic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut pair = self.lock();
        let value = match offset {
            0 => pair.master.read_command_port(),
            1 => pair.master.read_data_port(),
            2 => pair.slave.read_command_port(),
            3 => pair.slave.read_data_port(),
            4 => pair.master.elcr,
            _ => pair.slave.elcr,
        };
        self.update(&mut pair);
        data.fill(value);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let mut pair = self.lock();
        match offset {
            0 => pair.master.write_command_port(value),
            1 => pair.master.write_data_port(value),
            2 => pair.slave.write_command_port(value),
            3 => pair.slave.write_data_port(value),
            4 => pair.master.elcr = value & !ELCR_FIXED[0],
            _ => pair.slave.elcr = value & !ELCR_FIXED[1],
        }
        self.update(&mut pair);
    }

    fn reset(&self) {
        let mut pair = self.lock();
        let (master, slave) = (pair.master.lines, pair.slave.lines);
        *pair = Pair::new();
        // Inputs are what the devices make them, not state of the chips.
        pair.master.lines = master & !(1 << CASCADE);
        pair.slave.lines = slave;
        self.interrupts.set_pic_output(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Recorder, poke, read8, write8};

    const MASTER: u64 = 0;
    const SLAVE: u64 = 2;

    /// A pair as a PC's firmware sets it up: vectors 0x20 and 0x28, nothing masked.
    fn pair_with(icw4: u8) -> (Pic, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        let pic = Pic::new(recorder.clone());
        for (chip, vectors, icw3) in [(MASTER, 0x20, 4), (SLAVE, 0x28, 2)] {
            write8(&pic, chip, 0x11);
            write8(&pic, chip + 1, vectors);
            write8(&pic, chip + 1, icw3);
            write8(&pic, chip + 1, icw4);
            write8(&pic, chip + 1, 0);
        }
        (pic, recorder)
    }

    fn pair() -> (Pic, Arc<Recorder>) {
        pair_with(0x01)
    }

    fn in_service(pic: &Pic, chip: u64) -> u8 {
        write8(pic, chip, 0x0b);
        let value = read8(pic, chip);
        write8(pic, chip, 0x0a);
        value
    }

    #[test]
    fn an_edge_gives_one_interrupt() {
        let (pic, recorder) = pair();
        pic.set_line(4, true);
        assert!(recorder.output());
        assert_eq!(pic.acknowledge(), 0x24);
        assert!(!recorder.output());
        assert_eq!(in_service(&pic, MASTER), 0x10);
        write8(&pic, MASTER, 0x20);
        assert_eq!(in_service(&pic, MASTER), 0);
        assert!(!recorder.output());
        pic.set_line(4, false);
        pic.set_line(4, true);
        assert!(recorder.output());
    }

    #[test]
    fn a_request_that_goes_before_its_acknowledge_is_a_spurious_interrupt_7() {
        let (pic, recorder) = pair();
        pic.set_line(4, true);
        pic.set_line(4, false);
        assert!(!recorder.output());
        assert_eq!(pic.acknowledge(), 0x27);
        assert_eq!(in_service(&pic, MASTER), 0);
    }

    #[test]
    fn an_edge_behind_the_mask_waits() {
        let (pic, recorder) = pair();
        write8(&pic, MASTER + 1, 0x10);
        pic.set_line(4, true);
        assert!(!recorder.output());
        assert_eq!(read8(&pic, MASTER), 0x10);
        write8(&pic, MASTER + 1, 0);
        assert!(recorder.output());
    }

    #[test]
    fn a_level_line_interrupts_again_after_eoi() {
        let (pic, recorder) = pair();
        write8(&pic, 5, 0xff);
        assert_eq!(read8(&pic, 5), 0xde);
        pic.set_line(9, true);
        for _ in 0..3 {
            assert!(recorder.output());
            assert_eq!(pic.acknowledge(), 0x29);
            assert!(!recorder.output());
            write8(&pic, SLAVE, 0x20);
            write8(&pic, MASTER, 0x20);
        }
        pic.set_line(9, false);
        assert!(!recorder.output());
    }

    #[test]
    fn priority_falls_with_the_number_and_the_slave_comes_in_at_2() {
        let (pic, _) = pair();
        for irq in [7, 3, 14, 8, 1] {
            pic.set_line(irq, true);
        }
        for vector in [0x21, 0x28, 0x2e, 0x23, 0x27] {
            assert_eq!(pic.acknowledge(), vector);
            if vector >= 0x28 {
                write8(&pic, SLAVE, 0x20);
            }
            write8(&pic, MASTER, 0x20);
        }
    }

    #[test]
    fn an_interrupt_in_service_holds_back_lower_ones_only() {
        let (pic, recorder) = pair();
        pic.set_line(3, true);
        assert_eq!(pic.acknowledge(), 0x23);
        pic.set_line(5, true);
        assert!(!recorder.output());
        pic.set_line(1, true);
        assert!(recorder.output());
        assert_eq!(pic.acknowledge(), 0x21);
        // The non-specific EOI ends the highest: 1, then 3.
        write8(&pic, MASTER, 0x20);
        assert_eq!(in_service(&pic, MASTER), 0x08);
        write8(&pic, MASTER, 0x63);
        assert_eq!(pic.acknowledge(), 0x25);
    }

    #[test]
    fn special_mask_mode_lets_lower_requests_through() {
        let (pic, recorder) = pair();
        pic.set_line(3, true);
        pic.acknowledge();
        pic.set_line(5, true);
        write8(&pic, MASTER + 1, 0x08);
        assert!(!recorder.output());
        write8(&pic, MASTER, 0x68);
        assert!(recorder.output());
        assert_eq!(pic.acknowledge(), 0x25);
        // What is masked is not for the non-specific EOI.
        write8(&pic, MASTER, 0x20);
        write8(&pic, MASTER, 0x20);
        assert_eq!(in_service(&pic, MASTER), 0x08);
    }

    #[test]
    fn rotation_makes_the_served_input_the_lowest() {
        let (pic, _) = pair();
        pic.set_line(0, true);
        pic.set_line(1, true);
        assert_eq!(pic.acknowledge(), 0x20);
        write8(&pic, MASTER, 0xa0);
        pic.set_line(0, false);
        pic.set_line(0, true);
        assert_eq!(pic.acknowledge(), 0x21);
        write8(&pic, MASTER, 0x20);
        assert_eq!(pic.acknowledge(), 0x20);
        write8(&pic, MASTER, 0x20);
        // Set priority: 4 becomes the lowest, so 5 the highest.
        write8(&pic, MASTER, 0xc4);
        pic.set_line(0, false);
        pic.set_line(0, true);
        pic.set_line(5, true);
        assert_eq!(pic.acknowledge(), 0x25);
    }

    #[test]
    fn auto_eoi_leaves_nothing_in_service() {
        let (pic, _) = pair_with(0x03);
        pic.set_line(12, true);
        assert_eq!(pic.acknowledge(), 0x2c);
        assert_eq!((in_service(&pic, MASTER), in_service(&pic, SLAVE)), (0, 0));
    }

    #[test]
    fn special_fully_nested_mode_lets_higher_slave_requests_through() {
        for (icw4, through) in [(0x01, false), (0x11, true)] {
            let (pic, recorder) = pair_with(icw4);
            pic.set_line(12, true);
            assert_eq!(pic.acknowledge(), 0x2c);
            pic.set_line(8, true);
            assert_eq!(recorder.output(), through);
        }
    }

    #[test]
    fn a_poll_acknowledges() {
        let (pic, recorder) = pair();
        write8(&pic, MASTER, 0x0c);
        assert_eq!(read8(&pic, MASTER) & 0x80, 0);
        pic.set_line(6, true);
        write8(&pic, MASTER, 0x0c);
        assert_eq!(read8(&pic, MASTER), 0x86);
        assert!(!recorder.output());
        assert_eq!(in_service(&pic, MASTER), 0x40);
    }

    #[test]
    fn initialization_forgets_edges_masks_and_service() {
        let (pic, recorder) = pair();
        pic.set_line(3, true);
        pic.acknowledge();
        pic.set_line(1, true);
        write8(&pic, MASTER + 1, 0x80);
        write8(&pic, MASTER, 0x11);
        assert!(!recorder.output());
        assert_eq!(read8(&pic, MASTER), 0);
        for icw in [0x40, 4, 1] {
            write8(&pic, MASTER + 1, icw);
        }
        assert_eq!(read8(&pic, MASTER + 1), 0);
        pic.set_line(1, false);
        pic.set_line(1, true);
        assert_eq!(pic.acknowledge(), 0x41);
    }

    #[test]
    fn an_uninitialized_pair_is_silent() {
        let recorder = Arc::new(Recorder::default());
        let pic = Pic::new(recorder.clone());
        (0..16).for_each(|irq| pic.set_line(irq, true));
        assert!(!recorder.output());
    }

    #[test]
    fn the_output_is_high_exactly_while_there_is_something_to_acknowledge() {
        let (pic, recorder) = pair();
        let checked = |pic: &Pic| {
            if recorder.output() {
                let before = in_service(pic, MASTER);
                let auto = pic.lock().master.auto_eoi;
                pic.acknowledge();
                assert!(auto || pic.lock().master.special_fully_nested || in_service(pic, MASTER) != before);
            }
        };
        poke(&pic, 6, 200_000, |random| {
            pic.set_line(random.below(16) as u8, random.below(2) == 1);
            if random.below(4) == 0 {
                checked(&pic);
            }
        });
        pic.reset();
        assert!(!recorder.output());
    }
}
