//! The memory map changes while a processor runs by it: what it reads, writes and executes follows at once.

use std::sync::{Arc, Mutex, OnceLock};

use arch::CpuState;
use engine::{Bus, Engine, Exit, Vcpu, VcpuControl};
use memory::vm_memory::{Bytes, GuestAddress};
use memory::{Access, DeviceMemory, Ram, Window};
use translator::{Config, Translator};

/// Ports of the test's chipset.
const RAM_OFF: u8 = 0x10;
const RAM_ON: u8 = 0x11;
const A20_OFF: u8 = 0x12;
const A20_ON: u8 = 0x13;
const MOVE: u8 = 0x14;
const STOP: u8 = 0x15;

/// A chipset with ports that change the map, and a note of what is written to where nothing is.
struct Chipset {
    ram: Ram,
    window: Window,
    control: OnceLock<Arc<dyn VcpuControl>>,
    written: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Bus for Chipset {
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.written.lock().unwrap().push((address, data.to_vec()));
    }

    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn pio_write(&self, port: u16, _: &[u8]) {
        match port as u8 {
            RAM_OFF => self.ram.map().set_area(0xf_0000, 0x1_0000, false, true),
            RAM_ON => self.ram.map().set_area(0xf_0000, 0x1_0000, true, true),
            A20_OFF => self.ram.map().set_a20(false),
            A20_ON => self.ram.map().set_a20(true),
            MOVE => self.window.map(0xe_0000),
            _ => self.control.get().unwrap().stop(),
        }
    }

    fn acknowledge_pic(&self) -> u8 {
        0xff
    }

    fn end_of_interrupt(&self, _: u8) {}
}

/// 16-bit machine code.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn out(self, port: u8) -> Self {
        self.bytes(&[0xe6, port])
    }

    fn call_far(self, segment: u16) -> Self {
        self.bytes(&[0x9a, 0, 0]).bytes(&segment.to_le_bytes())
    }

    /// Keeps AL at an offset of data segment 0.
    fn keep(self, at: u16) -> Self {
        self.bytes(&[0xa2]).bytes(&at.to_le_bytes())
    }

    fn set_es(self, segment: u16) -> Self {
        self.bytes(&[0xb8]).bytes(&segment.to_le_bytes()).bytes(&[0x8e, 0xc0])
    }

    /// MOV ES:[offset], value.
    fn store(self, offset: u16, value: u8) -> Self {
        self.bytes(&[0x26, 0xc6, 0x06]).bytes(&offset.to_le_bytes()).bytes(&[value])
    }

    /// MOV AL, ES:[offset].
    fn load(self, offset: u16) -> Self {
        self.bytes(&[0x26, 0xa0]).bytes(&offset.to_le_bytes())
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}

struct Machine {
    ram: Ram,
    rom: DeviceMemory,
    chipset: Arc<Chipset>,
    vcpu: Box<dyn Vcpu>,
    _engine: Translator,
}

impl Machine {
    /// Device memory behind the RAM at F0000H; a function in both, which returns 1 from RAM and 2 from there.
    fn new(access: Access) -> Self {
        let ram = Ram::new(16 << 20).unwrap();
        let rom = ram.device_memory(0x1_0000).unwrap();
        let window = rom.window(0, 0x1_0000, access).unwrap();
        window.map(0xf_0000);
        ram.view().write_slice(&[0xb0, 1, 0xcb], GuestAddress(0xf_0000)).unwrap();
        rom.slice().write_slice(&[0xb0, 2, 0xcb], 0).unwrap();
        let chipset =
            Arc::new(Chipset { ram: ram.clone(), window, control: OnceLock::new(), written: Mutex::default() });
        let engine = Translator::new(ram.clone(), Config::default()).unwrap();
        let vcpu = engine.create_vcpu(0, chipset.clone()).unwrap();
        chipset.control.get_or_init(|| vcpu.control());
        Machine { ram, rom, chipset, vcpu, _engine: engine }
    }

    /// Runs code in real mode until it writes to the port [`STOP`], and gives what it kept from 500H on.
    fn run(&mut self, code: Code) -> [u8; 8] {
        let code = code.out(STOP).bytes(&[0xeb, 0xfe]);
        self.ram.view().write_slice(&code.0, GuestAddress(0x1000)).unwrap();
        let mut state = CpuState::reset();
        let cs = &mut state.segments[arch::SegmentRegister::Cs as usize];
        (cs.base, cs.selector) = (0, 0);
        state.rip = 0x1000;
        state.gpr[arch::registers::gpr::RSP] = 0x800;
        self.vcpu.set_state(&state).unwrap();
        assert_eq!(self.vcpu.run(), Exit::Stopped);
        self.ram.view().read_obj(GuestAddress(0x500)).unwrap()
    }
}

#[test]
fn code_and_data_follow_when_ram_is_turned_off_and_on() {
    let mut machine = Machine::new(Access::ReadOnly);
    let code = Code::default().set_es(0xf000).call_far(0xf000).keep(0x500);
    let code = code.out(RAM_OFF).call_far(0xf000).keep(0x501);
    // RAM behind the ROM takes what is written.
    let code = code.store(0x10, 0x77).load(0x10).keep(0x502);
    let code = code.out(RAM_ON).load(0x10).keep(0x503).call_far(0xf000).keep(0x504);
    assert_eq!(machine.run(code)[..5], [1, 2, 0, 0x77, 1]);
    assert!(machine.chipset.written.lock().unwrap().is_empty());
}

#[test]
fn writes_to_rom_go_to_the_bus() {
    let mut machine = Machine::new(Access::ReadOnly);
    let code = Code::default().out(MOVE).bytes(&[0x90]);
    machine.ram.map().set_area(0xe_0000, 0x1_0000, false, false);
    let code = code.set_es(0xe000).load(1).keep(0x500).store(1, 5).load(1).keep(0x501).call_far(0xe000).keep(0x502);
    assert_eq!(machine.run(code)[..3], [2, 2, 2]);
    assert_eq!(*machine.chipset.written.lock().unwrap(), [(0xe_0001, vec![5])]);
}

#[test]
fn addresses_wrap_at_1_mib_while_a20_is_low() {
    let mut machine = Machine::new(Access::ReadOnly);
    machine.ram.view().write_slice(&[9], GuestAddress(0x10_0505)).unwrap();
    let code = Code::default().set_es(0xffff).load(0x515).keep(0x500).out(A20_OFF).store(0x515, 5).load(0x515);
    let code = code.keep(0x501).out(A20_ON).load(0x515).keep(0x502);
    assert_eq!(machine.run(code)[..6], [9, 5, 9, 0, 0, 5]);
}

#[test]
fn every_write_to_a_frame_buffer_is_seen_though_its_page_is_in_the_tlb() {
    let mut machine = Machine::new(Access::ReadWrite);
    machine.ram.map().set_area(0xf_0000, 0x1_0000, false, false);
    machine.rom.take_dirty();
    for offset in [0x5000, 0x5008, 0x5010] {
        let code = Code::default().set_es(0xf000).store(offset, 1).store(offset + 1, 2);
        machine.run(code);
        assert!(machine.rom.take_dirty().contains(&(0x5000..0x6000)), "{offset:#x}");
    }
    // What could have been written since is told once more, then no longer.
    machine.run(Code::default());
    machine.rom.take_dirty();
    machine.run(Code::default());
    assert!(machine.rom.take_dirty().is_empty());
    assert!(machine.chipset.written.lock().unwrap().is_empty());
}

#[test]
fn what_a_device_writes_into_code_of_its_memory_is_executed() {
    let mut machine = Machine::new(Access::ReadWrite);
    machine.ram.map().set_area(0xf_0000, 0x1_0000, false, false);
    let code = || Code::default().call_far(0xf000).keep(0x500);
    assert_eq!(machine.run(code())[0], 2);
    machine.rom.slice().write_slice(&[3], 1).unwrap();
    assert_eq!(machine.run(code())[0], 3);
    let code = Code::default().set_es(0xf000).store(1, 4).call_far(0xf000).keep(0x500);
    assert_eq!(machine.run(code)[0], 4);
}
