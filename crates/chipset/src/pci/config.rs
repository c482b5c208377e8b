//! The configuration space of a PCI function: what it says about itself, and its base address registers.

use crate::Error;

/// The size of the space with PCI Express; the first 256 bytes are what mechanism #1 reaches.
pub const CONFIG_SIZE: usize = 4096;

/// Registers of a type 0 header (PCI local bus 3.0, 6.1).
const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const FIRST_BAR: usize = 0x10;
const ROM: usize = 0x30;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const FIRST_CAPABILITY: usize = 0x40;
const BASE_SIZE: usize = 0x100;

/// Command register: I/O and memory decoding, bus mastering, parity, SERR, INTx disable.
const IO_DECODE: u16 = 1 << 0;
const MEMORY_DECODE: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;
const INTX_DISABLE: u16 = 1 << 10;
const COMMAND_WRITABLE: u16 = IO_DECODE | MEMORY_DECODE | BUS_MASTER | 1 << 6 | 1 << 8 | INTX_DISABLE;
/// Status register: there is a list of capabilities.
const HAS_CAPABILITIES: u16 = 1 << 4;

/// What a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Base class, subclass, programming interface.
    pub class: [u8; 3],
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// What a base address register decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    Io,
    Memory32,
    Memory32Prefetchable,
    /// Takes two registers.
    Memory64 {
        prefetchable: bool,
    },
}

impl BarKind {
    fn flags(self) -> u8 {
        match self {
            BarKind::Io => 0b0001,
            BarKind::Memory32 => 0b0000,
            BarKind::Memory32Prefetchable => 0b1000,
            BarKind::Memory64 { prefetchable: false } => 0b0100,
            BarKind::Memory64 { prefetchable: true } => 0b1100,
        }
    }

    fn registers(self) -> usize {
        if matches!(self, BarKind::Memory64 { .. }) { 2 } else { 1 }
    }

    /// The least size that the address bits of a register allow for, and the most.
    fn sizes(self) -> std::ops::RangeInclusive<u64> {
        match self {
            // Software may rely on no more than 256 ports (PCI local bus 3.0, 6.2.5.1).
            BarKind::Io => 4..=256,
            BarKind::Memory32 | BarKind::Memory32Prefetchable => 16..=1 << 31,
            BarKind::Memory64 { .. } => 16..=1 << 48,
        }
    }
}

/// The number that the expansion ROM's window has among those of the base address registers.
pub const ROM_BAR: usize = 6;
/// Of the expansion ROM's register: the window is open.
const ROM_ENABLE: u32 = 1 << 0;

/// The addresses that a base address register decodes right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarWindow {
    pub bar: usize,
    pub io: bool,
    pub address: u64,
    pub size: u64,
}

#[derive(Clone, Copy)]
struct Bar {
    kind: BarKind,
    size: u64,
}

/// The bytes of a configuration space, and which of their bits software may change.
pub struct ConfigSpace {
    bytes: Box<[u8; CONFIG_SIZE]>,
    writable: Box<[u8; CONFIG_SIZE]>,
    /// What a reset goes back to.
    initial: Box<[u8; CONFIG_SIZE]>,
    bars: [Option<Bar>; 6],
    /// The size of the expansion ROM.
    rom: Option<u64>,
    /// Where the next capability goes, and where the link to it is.
    next_capability: usize,
    last_link: usize,
}

impl ConfigSpace {
    /// A function without base address registers, capabilities and interrupt pin.
    pub fn new(identity: Identity) -> Self {
        let mut config = ConfigSpace {
            bytes: Box::new([0; CONFIG_SIZE]),
            writable: Box::new([0; CONFIG_SIZE]),
            initial: Box::new([0; CONFIG_SIZE]),
            bars: [None; 6],
            rom: None,
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES,
        };
        let [base, sub, interface] = identity.class;
        config.set(VENDOR, &identity.vendor.to_le_bytes());
        config.set(DEVICE, &identity.device.to_le_bytes());
        config.set(REVISION, &[identity.revision]);
        config.set(CLASS, &[interface, sub, base]);
        config.set(SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        config.set(SUBSYSTEM, &identity.subsystem.to_le_bytes());
        config.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        config
    }

    /// Sets read-only bytes, and what a reset goes back to. What doesn't fit is left out.
    pub fn set(&mut self, offset: usize, value: &[u8]) {
        for (index, &byte) in (offset..CONFIG_SIZE).zip(value) {
            self.bytes[index] = byte;
            self.initial[index] = byte;
        }
    }

    /// Lets software change the bits that are set in `mask`.
    pub fn allow(&mut self, offset: usize, mask: &[u8]) {
        for (index, &byte) in (offset..CONFIG_SIZE).zip(mask) {
            self.writable[index] |= byte;
        }
    }

    /// Takes bits back that software could change.
    pub fn forbid_bits(&mut self, offset: usize, mask: &[u8]) {
        self.writable.iter_mut().skip(offset).zip(mask).for_each(|(writable, mask)| *writable &= !mask);
    }

    /// Makes bytes read-only that software could change.
    pub fn forbid(&mut self, offset: usize, count: usize) {
        self.writable.iter_mut().skip(offset).take(count).for_each(|mask| *mask = 0);
    }

    /// Says that the function interrupts by pin `pin`: 1 is INTA.
    pub fn set_interrupt_pin(&mut self, pin: u8) {
        self.set(INTERRUPT_PIN, &[pin]);
        self.allow(INTERRUPT_LINE, &[0xff]);
    }

    /// Adds the expansion ROM base address register, for a ROM of `size` bytes: a power of two of at least 2 KiB (PCI local
    /// bus 3.0, 6.2.5.2).
    pub fn add_rom(&mut self, size: u64) -> Result<(), Error> {
        let mask = u32::try_from(size).ok().filter(|size| size.is_power_of_two() && (1 << 11..=1 << 24).contains(size));
        let mask = mask.ok_or(Error::BadBar { index: ROM_BAR, size })?.wrapping_neg() | ROM_ENABLE;
        self.allow(ROM, &mask.to_le_bytes());
        self.rom = Some(size);
        Ok(())
    }

    /// Adds base address register `index`, which decodes `size` addresses: a power of two.
    pub fn add_bar(&mut self, index: usize, kind: BarKind, size: u64) -> Result<(), Error> {
        let bad = Error::BadBar { index, size };
        let taken = |index: usize| {
            let below = index.checked_sub(1).and_then(|below| self.bars[below]);
            self.bars[index].is_some() || below.is_some_and(|bar| bar.kind.registers() == 2)
        };
        let last = index.saturating_add(kind.registers() - 1);
        if last >= self.bars.len() || taken(index) || taken(last) {
            return Err(bad);
        }
        if !size.is_power_of_two() || !kind.sizes().contains(&size) {
            return Err(bad);
        }
        let register = FIRST_BAR + 4 * index;
        self.set(register, &[kind.flags()]);
        // Only address bits above the size can be written: so software finds the size out.
        let mask = !(size - 1);
        self.allow(register, &mask.to_le_bytes()[..4 * kind.registers()]);
        self.bars[index] = Some(Bar { kind, size });
        Ok(())
    }

    /// Adds a capability: `body` is what follows its two-byte header, `writable` the bits of it that software may change.
    /// Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u8, Error> {
        let offset = self.next_capability;
        let end = offset + 2 + body.len();
        let link = u8::try_from(offset).map_err(|_| Error::CapabilitiesFull { id })?;
        if end > BASE_SIZE {
            return Err(Error::CapabilitiesFull { id });
        }
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        self.allow(offset + 2, writable);
        self.set(self.last_link, &[link]);
        self.set(STATUS, &HAS_CAPABILITIES.to_le_bytes());
        self.last_link = offset + 1;
        self.next_capability = end.next_multiple_of(4);
        Ok(link)
    }

    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        let bytes = self.bytes.iter().skip(offset.into());
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    }

    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (index, &byte) in (usize::from(offset)..CONFIG_SIZE).zip(data) {
            let mask = self.writable[index];
            self.bytes[index] = self.bytes[index] & !mask | byte & mask;
        }
    }

    /// Goes back to the state after power-on.
    pub fn reset(&mut self) {
        self.bytes.copy_from_slice(&*self.initial);
    }

    fn command(&self) -> u16 {
        u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]])
    }

    /// Whether software has turned the interrupt pin off.
    pub fn intx_disabled(&self) -> bool {
        self.command() & INTX_DISABLE != 0
    }

    /// Whether the function may read and write guest memory.
    pub fn bus_master(&self) -> bool {
        self.command() & BUS_MASTER != 0
    }

    /// What the base address registers decode now, as the command register allows. A register that still holds 0
    /// decodes nothing: no system puts a device at address 0.
    pub fn windows(&self) -> Vec<BarWindow> {
        let command = self.command();
        let bars = self.bars.iter().enumerate().filter_map(|(index, bar)| Some((index, (*bar)?)));
        bars.filter_map(|(index, bar)| {
            let io = bar.kind == BarKind::Io;
            let decode = if io { IO_DECODE } else { MEMORY_DECODE };
            let address = self.bar_address(index, bar);
            (command & decode != 0 && address != 0).then_some(BarWindow { bar: index, io, address, size: bar.size })
        })
        .chain(self.rom_window())
        .collect()
    }

    fn rom_window(&self) -> Option<BarWindow> {
        let size = self.rom?;
        let mut register = [0; 4];
        self.read(ROM as u16, &mut register);
        let register = u32::from_le_bytes(register);
        let address = u64::from(register) & !(size - 1);
        let open = self.command() & MEMORY_DECODE != 0 && register & ROM_ENABLE != 0 && address != 0;
        open.then_some(BarWindow { bar: ROM_BAR, io: false, address, size })
    }

    fn bar_address(&self, index: usize, bar: Bar) -> u64 {
        let register = FIRST_BAR + 4 * index;
        let length = 4 * bar.kind.registers();
        let mut value = [0; 8];
        value[..length].copy_from_slice(&self.bytes[register..register + length]);
        u64::from_le_bytes(value) & !(bar.size - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    const IDENTITY: Identity = Identity {
        vendor: 0x1234,
        device: 0x5678,
        revision: 3,
        class: [1, 6, 1],
        subsystem_vendor: 0x9abc,
        subsystem: 0xdef0,
    };

    fn dword(config: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0; 4];
        config.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_header_says_what_the_function_is_and_cannot_be_changed() {
        let mut config = ConfigSpace::new(IDENTITY);
        for _ in 0..2 {
            assert_eq!(dword(&config, 0x00), 0x5678_1234);
            assert_eq!(dword(&config, 0x08), 0x0106_0103);
            assert_eq!(dword(&config, 0x2c), 0xdef0_9abc);
            (0..64).filter(|n| *n != 1).for_each(|n| config.write(4 * n, &[0xff; 4]));
        }
    }

    #[test]
    fn writing_ones_to_a_bar_tells_its_size() {
        let mut config = ConfigSpace::new(IDENTITY);
        config.add_bar(0, BarKind::Io, 32).unwrap();
        config.add_bar(1, BarKind::Memory32, 4096).unwrap();
        config.add_bar(2, BarKind::Memory64 { prefetchable: true }, 1 << 33).unwrap();
        (0..6).for_each(|n| config.write(0x10 + 4 * n, &[0xff; 4]));
        let read: Vec<_> = (0..6).map(|n| dword(&config, 0x10 + 4 * n)).collect();
        assert_eq!(read, [0xffff_ffe1, 0xffff_f000, 0x0000_000c, 0xffff_fffe, 0, 0]);
    }

    #[test]
    fn bars_decode_as_the_command_register_allows() {
        let mut config = ConfigSpace::new(IDENTITY);
        config.add_bar(0, BarKind::Io, 32).unwrap();
        config.add_bar(4, BarKind::Memory64 { prefetchable: false }, 4096).unwrap();
        config.write(0x10, &0xc020u32.to_le_bytes());
        config.write(0x20, &0x4_c000_1000u64.to_le_bytes());
        assert_eq!(config.windows(), []);
        config.write(4, &[3, 0]);
        let io = BarWindow { bar: 0, io: true, address: 0xc020, size: 32 };
        let memory = BarWindow { bar: 4, io: false, address: 0x4_c000_1000, size: 4096 };
        assert_eq!(config.windows(), [io, memory]);
        config.write(4, &[2, 0]);
        assert_eq!(config.windows(), [memory]);
        config.reset();
        assert_eq!((config.windows(), dword(&config, 0x20)), (vec![], 4));
    }

    #[test]
    fn an_expansion_rom_answers_while_its_register_and_memory_decoding_are_on() {
        let mut config = ConfigSpace::new(IDENTITY);
        config.add_rom(0x1_0000).unwrap();
        config.write(0x30, &[0xff; 4]);
        assert_eq!(dword(&config, 0x30), 0xffff_0001);
        config.write(0x30, &0xfebf_0001u32.to_le_bytes());
        assert_eq!(config.windows(), []);
        config.write(4, &[2, 0]);
        assert_eq!(config.windows(), [BarWindow { bar: ROM_BAR, io: false, address: 0xfebf_0000, size: 0x1_0000 }]);
        config.write(0x30, &[0]);
        assert_eq!(config.windows(), []);
        assert!(
            config.add_rom(0x400).is_err() && config.add_rom(0x1_0001).is_err() && config.add_rom(1 << 40).is_err()
        );
    }

    #[test]
    fn impossible_bars_are_refused() {
        let mut config = ConfigSpace::new(IDENTITY);
        let wide = BarKind::Memory64 { prefetchable: false };
        config.add_bar(2, wide, 4096).unwrap();
        config.add_bar(5, BarKind::Memory32, 4096).unwrap();
        let refused = [(1, wide, 4096), (2, wide, 4096), (3, BarKind::Memory32, 4096), (5, wide, 4096), (4, wide, 16)];
        for (index, kind, size) in refused {
            assert!(config.add_bar(index, kind, size).is_err(), "{index}");
        }
        for (kind, size) in [(BarKind::Io, 512), (BarKind::Memory32, 8), (BarKind::Memory32, 4097), (wide, 0)] {
            assert!(config.add_bar(0, kind, size).is_err(), "{size}");
        }
        assert!(config.add_bar(6, BarKind::Io, 16).is_err());
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut config = ConfigSpace::new(IDENTITY);
        assert_eq!(dword(&config, 4) >> 16, 0);
        assert_eq!(config.add_capability(0x09, &[1, 2, 3], &[0, 0xff]).unwrap(), 0x40);
        assert_eq!(config.add_capability(0x11, &[0; 10], &[]).unwrap(), 0x48);
        assert_eq!(dword(&config, 4) >> 16, 0x10);
        assert_eq!(dword(&config, 0x34), 0x40);
        assert_eq!(dword(&config, 0x40), 0x0201_4809);
        assert_eq!(dword(&config, 0x48), 0x0011);
        config.write(0x42, &[0xff, 0xff]);
        assert_eq!(dword(&config, 0x40), 0xff01_4809);
        while config.add_capability(0x09, &[0; 14], &[]).is_ok() {}
        assert!(config.next_capability <= BASE_SIZE);
    }

    #[test]
    fn random_accesses_do_no_harm() {
        let mut config = ConfigSpace::new(IDENTITY);
        config.add_bar(0, BarKind::Memory64 { prefetchable: false }, 1 << 20).unwrap();
        let mut random = Random(7);
        for _ in 0..100_000 {
            config.write(random.draw() as u16, &random.draw().to_le_bytes());
            dword(&config, random.draw() as u16);
            assert!(config.windows().len() <= 1);
        }
    }
}
