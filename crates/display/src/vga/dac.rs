//! The palette DAC: 256 colours of 6 (or, as DISPI can ask for, 8) bits a component, through four ports.

/// Red, green and blue, one after the other, at an index that moves on after the third.
#[derive(Clone)]
pub struct Dac {
    /// As software has written them: how many of the bits count depends on the width at the time of drawing.
    colors: [[u8; 3]; 256],
    /// ANDed to every index that is drawn.
    pub mask: u8,
    pub wide: bool,
    read_index: u8,
    write_index: u8,
    read_component: usize,
    write_component: usize,
    written: [u8; 3],
    /// The last index was for reading.
    reading: bool,
}

impl Dac {
    pub fn new() -> Self {
        Dac {
            colors: [[0; 3]; 256],
            mask: 0xff,
            wide: false,
            read_index: 0,
            write_index: 0,
            read_component: 0,
            write_component: 0,
            written: [0; 3],
            reading: false,
        }
    }

    pub fn start_reading(&mut self, index: u8) {
        (self.read_index, self.read_component, self.reading) = (index, 0, true);
    }

    pub fn start_writing(&mut self, index: u8) {
        (self.write_index, self.write_component, self.reading) = (index, 0, false);
    }

    pub fn write_index(&self) -> u8 {
        self.write_index
    }

    /// The state register: 3 while software reads, 0 while it writes.
    pub fn state(&self) -> u8 {
        if self.reading { 3 } else { 0 }
    }

    pub fn read(&mut self) -> u8 {
        let value = self.colors[usize::from(self.read_index)].get(self.read_component).copied().unwrap_or(0);
        self.read_component += 1;
        if self.read_component == 3 {
            self.read_component = 0;
            self.read_index = self.read_index.wrapping_add(1);
        }
        value
    }

    /// Says whether a colour is complete.
    pub fn write(&mut self, value: u8) -> bool {
        let value = if self.wide { value } else { value & 0x3f };
        if let Some(component) = self.written.get_mut(self.write_component) {
            *component = value;
        }
        self.write_component += 1;
        if self.write_component < 3 {
            return false;
        }
        self.write_component = 0;
        self.colors[usize::from(self.write_index)] = self.written;
        self.write_index = self.write_index.wrapping_add(1);
        true
    }

    /// The pixels that the 256 values stand for.
    pub fn pixels(&self) -> [u32; 256] {
        std::array::from_fn(|index| {
            let [red, green, blue] = self.colors[index & usize::from(self.mask)];
            u32::from_be_bytes([0, self.level(red), self.level(green), self.level(blue)])
        })
    }

    /// The highest level is white in both widths.
    fn level(&self, value: u8) -> u8 {
        if self.wide { value } else { (value & 0x3f) << 2 | (value & 0x3f) >> 4 }
    }
}
