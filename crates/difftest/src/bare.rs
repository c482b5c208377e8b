//! Builds bare-metal guests: memory, page tables, descriptor tables, code from iced's assembler, and a bus to hear of them by.
//!
//! A guest built here is in long mode from its first instruction. All RAM is mapped at [`DIRECT`] for the supervisor; what else
//! is mapped is the test's choice. The descriptor table is laid out as Linux's, and every exception leads to a stub that
//! pushes its vector (and a zero where the processor pushes no error code) and stops the machine, until a test installs
//! a gate of its own. What a guest writes to [`CONSOLE`] is collected; a write to [`EXIT`] stops it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use arch::registers::{cr0, cr4, efer, pte, rflags};
use arch::{CpuState, DescriptorTable, Segment, msr};
use engine::{Bus, Engine, Exit, Vcpu, VcpuControl};
use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use memory::Ram;
use memory::vm_memory::{Bytes, GuestAddress};

/// Where all of RAM is mapped, writable and executable, for the supervisor.
pub const DIRECT: u64 = 0xffff_8000_0000_0000;
/// A register in memory that decides whether RAM at [`AREA`] answers reads (bit 0) and writes (bit 1).
pub const AREA_REGISTER: u64 = 0xd000_0ff0;
/// An area below 1 MiB that no test uses.
pub const AREA: u64 = 0xd_0000;
const AREA_SIZE: u64 = memory::map::AREA_SIZE;
/// Console port: OUT of a byte appends it to [`Port::text`].
pub const CONSOLE: u16 = 0xe9;
/// OUT of any size stops the machine.
pub const EXIT: u16 = 0xf4;

/// Physical addresses of what every guest has.
pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
pub const STUBS: u64 = 0x4000;
/// Free for tests: counters and the like.
pub const SCRATCH: u64 = 0x7000;
/// The kernel stack (RSP0) grows down from here, page by page from 0x8000 up.
pub const STACK_TOP: u64 = 0xc000;
/// The stack that IST 1 names.
pub const IST1_TOP: u64 = 0xe000;
/// Where the code of tests goes, and where pages are allocated from.
pub const CODE: u64 = 0x10_0000;
const HEAP: u64 = 0x18_0000;

/// Selectors, as Linux has them.
pub const KERNEL_CODE32: u16 = 0x08;
pub const KERNEL_CODE: u16 = 0x10;
pub const KERNEL_DATA: u16 = 0x18;
pub const USER_CODE32: u16 = 0x23;
pub const USER_DATA: u16 = 0x2b;
pub const USER_CODE: u16 = 0x33;
pub const TSS_SELECTOR: u16 = 0x40;

/// A guest's memory under construction.
pub struct Bare {
    pub ram: Ram,
    /// What CR3 holds.
    pub root: u64,
    next: u64,
}

impl Bare {
    /// `size` bytes of RAM, a multiple of 2 MiB, with tables as described above.
    pub fn new(size: u64) -> Self {
        let ram = Ram::new(size).expect("guest memory");
        let mut bare = Bare { ram, root: 0, next: HEAP };
        bare.root = bare.page();
        for at in (0..size).step_by(2 << 20) {
            bare.map_large(DIRECT + at, at, pte::P | pte::W);
        }
        for (i, descriptor) in DESCRIPTORS.iter().enumerate() {
            bare.write_u64(GDT + 8 * i as u64, *descriptor);
        }
        // Linux names the processor and its node in this one's limit: for processor 0, zero.
        bare.write_u64(GDT + 0x78, 0x0040_f500_0000_0000);
        let (low, high) = tss_descriptor(DIRECT + TSS, 0x67);
        bare.write_u64(GDT + u64::from(TSS_SELECTOR), low);
        bare.write_u64(GDT + u64::from(TSS_SELECTOR) + 8, high);
        bare.write_u64(TSS + 4, DIRECT + STACK_TOP);
        bare.write_u64(TSS + 36, DIRECT + IST1_TOP);
        bare.write(TSS + 102, &0x68u16.to_le_bytes()); // no I/O permission bitmap
        bare.stubs();
        bare
    }

    /// One stub a vector: push 0 (where there is no error code), push vector, jmp common; common stops the machine.
    fn stubs(&mut self) {
        let common = STUBS + 256 * 16;
        for vector in 0..256u64 {
            let at = STUBS + 16 * vector;
            let mut code = if matches!(vector, 8 | 10..=14 | 17 | 21) { vec![] } else { vec![0x6a, 0] };
            code.push(0x68);
            code.extend((vector as u32).to_le_bytes());
            code.push(0xe9);
            let next = at + code.len() as u64 + 4;
            code.extend((common.wrapping_sub(next) as u32).to_le_bytes());
            self.write(at, &code);
            let dpl = if vector == 3 || vector == 4 { 3 } else { 0 };
            self.gate(vector as u8, DIRECT + at, Gate { dpl, ..Gate::default() });
        }
        self.write(common, &[0xe6, EXIT as u8, 0xf4, 0xeb, 0xfd]); // out; hlt; jmp to the hlt
    }

    /// Sets an IDT entry (Intel SDM 3A 6.14.1).
    pub fn gate(&mut self, vector: u8, handler: u64, gate: Gate) {
        let low = handler & 0xffff
            | u64::from(gate.selector) << 16
            | u64::from(gate.ist) << 32
            | gate.kind << 40
            | gate.dpl << 45
            | u64::from(gate.present) << 47
            | (handler >> 16 & 0xffff) << 48;
        let at = IDT + 16 * u64::from(vector);
        self.write_u64(at, low);
        self.write_u64(at + 8, handler >> 32);
    }

    /// A zeroed page of RAM.
    pub fn page(&mut self) -> u64 {
        self.pages(1)
    }

    /// Contiguous zeroed pages.
    pub fn pages(&mut self, n: u64) -> u64 {
        let at = self.next;
        self.next += n * 4096;
        assert!(self.next <= self.ram.size(), "the guest's RAM is too small for this test");
        at
    }

    /// Maps a page with the given bits of its lowest entry; upper levels allow everything.
    pub fn map(&mut self, va: u64, gpa: u64, bits: u64) {
        let at = self.entry(va, 0);
        self.write_u64(at, gpa | bits);
    }

    /// Maps 2 MiB.
    pub fn map_large(&mut self, va: u64, gpa: u64, bits: u64) {
        let at = self.entry(va, 1);
        self.write_u64(at, gpa | bits | pte::PS);
    }

    /// The physical address of `va`'s page-table entry at `level` (0: 4 KiB, 1: 2 MiB, 2: 1 GiB), making the levels above.
    pub fn entry(&mut self, va: u64, level: u32) -> u64 {
        let mut table = self.root;
        for l in (level + 1..4).rev() {
            let at = table + (va >> (12 + 9 * l) & 0x1ff) * 8;
            let mut entry = self.read_u64(at);
            if entry & pte::P == 0 {
                entry = self.page() | pte::P | pte::W | pte::U;
                self.write_u64(at, entry);
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        table + (va >> (12 + 9 * level) & 0x1ff) * 8
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.ram.view().write_slice(bytes, GuestAddress(gpa)).expect("an address in the guest's RAM");
    }

    pub fn read(&self, gpa: u64, bytes: &mut [u8]) {
        self.ram.view().read_slice(bytes, GuestAddress(gpa)).expect("an address in the guest's RAM");
    }

    pub fn write_u64(&self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    pub fn read_u64(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read(gpa, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Assembles code to run at `va` and puts it at `gpa`; returns its length.
    pub fn assemble(
        &self,
        gpa: u64,
        va: u64,
        bits: u32,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> u64 {
        let mut assembler = CodeAssembler::new(bits).expect("16, 32 or 64");
        write(&mut assembler).expect("operands that can be encoded");
        let code = assembler.assemble(va).expect("code that can be assembled");
        self.write(gpa, &code);
        code.len() as u64
    }

    /// 64-bit kernel code at a physical address, to run in the direct map; returns its virtual address.
    pub fn kernel_code(&self, gpa: u64, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> u64 {
        self.assemble(gpa, DIRECT + gpa, 64, write);
        DIRECT + gpa
    }

    /// Long mode at CPL 0 with everything on that Linux turns on, at `rip`.
    pub fn kernel_state(&self, rip: u64) -> CpuState {
        let mut state = CpuState::reset();
        state.gpr = [0; 16];
        state.gpr[4] = DIRECT + STACK_TOP;
        state.rip = rip;
        state.rflags = rflags::FIXED;
        let data = Segment::flat_data(KERNEL_DATA, 0);
        let none = Segment::default();
        state.segments = [none, Segment::flat_code(KERNEL_CODE, true, 0), data, none, none, none];
        state.tr = Segment { base: DIRECT + TSS, limit: 0x67, attributes: Segment::P | 0xb, selector: TSS_SELECTOR };
        state.ldtr = Segment::default();
        state.gdtr = DescriptorTable { base: DIRECT + GDT, limit: 0x7f };
        state.idtr = DescriptorTable { base: DIRECT + IDT, limit: 0xfff };
        state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
        state.cr3 = self.root;
        state.cr4 = cr4::PAE
            | cr4::PGE
            | cr4::MCE
            | cr4::DE
            | cr4::OSFXSR
            | cr4::OSXMMEXCPT
            | cr4::UMIP
            | cr4::FSGSBASE
            | cr4::OSXSAVE
            | cr4::SMEP
            | cr4::SMAP;
        state.xcr0 = crate::case::host_xcr0() & crate::case::XSAVE_COMPONENTS;
        state.msrs = vec![(msr::EFER, efer::SCE | efer::LME | efer::LMA | efer::NXE)];
        state
    }

    /// The same at CPL 3, in 64- or 32-bit code.
    pub fn user_state(&self, rip: u64, rsp: u64, bits: u32) -> CpuState {
        let mut state = self.kernel_state(rip);
        state.gpr[4] = rsp;
        state.rflags |= rflags::IF;
        let long = bits == 64;
        let selector = if long { USER_CODE } else { USER_CODE32 };
        let data = Segment::flat_data(USER_DATA, 3);
        let other = if long { Segment::default() } else { data };
        state.segments =
            [other, Segment::flat_code(selector, long, 3), data, other, Segment::default(), Segment::default()];
        state
    }
}

/// What a gate is besides its handler.
pub struct Gate {
    pub selector: u16,
    pub ist: u8,
    /// 0xe: interrupt gate, 0xf: trap gate.
    pub kind: u64,
    pub dpl: u64,
    pub present: bool,
}

impl Default for Gate {
    fn default() -> Self {
        Gate { selector: KERNEL_CODE, ist: 0, kind: 0xe, dpl: 0, present: true }
    }
}

/// The descriptors of Linux's table: null, kernel 32-bit code, kernel code, kernel data, user 32-bit code, user data, user code.
const DESCRIPTORS: [u64; 7] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
];

/// A busy 64-bit TSS (Intel SDM 3A 7.2.3).
pub fn tss_descriptor(base: u64, limit: u64) -> (u64, u64) {
    let low =
        limit & 0xffff | (base & 0xff_ffff) << 16 | 0x8b << 40 | (limit >> 16 & 0xf) << 48 | (base >> 24 & 0xff) << 56;
    (low, base >> 32)
}

/// The bus of a bare-metal guest.
#[derive(Default)]
pub struct Port {
    text: Mutex<Vec<u8>>,
    /// All writes to other ports: port, value.
    writes: Mutex<Vec<(u16, u32)>>,
    /// Writes to memory-mapped addresses: address, bytes.
    mmio: Mutex<Vec<(u64, Vec<u8>)>>,
    /// What [`AREA_REGISTER`] governs.
    ram: Option<Ram>,
    vcpus: Mutex<Vec<Arc<dyn VcpuControl>>>,
    exited: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Port {
    /// What the guest wrote to [`CONSOLE`].
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&lock(&self.text)).into_owned()
    }

    pub fn writes(&self) -> Vec<(u16, u32)> {
        lock(&self.writes).clone()
    }

    pub fn mmio_writes(&self) -> Vec<(u64, Vec<u8>)> {
        lock(&self.mmio).clone()
    }

    /// Whether the guest wrote to [`EXIT`] since this was last asked.
    pub fn take_exit(&self) -> bool {
        self.exited.swap(false, Ordering::SeqCst)
    }

    /// Stops every vCPU.
    pub fn stop(&self) {
        for vcpu in lock(&self.vcpus).iter() {
            vcpu.stop();
        }
    }
}

impl Bus for Port {
    /// Reads give the low bytes of the address, over and over, so that a test sees what was read.
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = (address as u8).wrapping_add(i as u8);
        }
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        lock(&self.mmio).push((address, data.to_vec()));
        if let (AREA_REGISTER, Some(ram), [value, ..]) = (address, &self.ram, data) {
            ram.map().set_area(AREA, AREA_SIZE, value & 1 != 0, value & 2 != 0);
        }
    }
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = (port as u8).wrapping_add(i as u8);
        }
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        match port {
            CONSOLE => lock(&self.text).extend_from_slice(data),
            EXIT => {
                self.exited.store(true, Ordering::SeqCst);
                self.stop();
            }
            _ => {
                let mut bytes = [0; 4];
                bytes[..data.len().min(4)].copy_from_slice(&data[..data.len().min(4)]);
                lock(&self.writes).push((port, u32::from_le_bytes(bytes)));
            }
        }
    }
    fn acknowledge_pic(&self) -> u8 {
        0xff
    }
    fn end_of_interrupt(&self, _: u8) {}
}

/// A machine around a guest's memory.
pub struct Machine {
    pub bare: Bare,
    pub engine: Arc<dyn Engine>,
    pub vcpus: Vec<Box<dyn Vcpu>>,
    pub port: Arc<Port>,
    watchdog: Arc<Watchdog>,
}

/// How a run of a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest wrote to [`EXIT`].
    Exit,
    TripleFault,
    Failed(String),
    /// The guest did neither in time.
    Timeout,
}

impl Machine {
    pub fn new(bare: Bare, cpus: u32) -> Self {
        let engine = crate::guest::engine(&bare.ram, cpus);
        Machine::on(engine, bare, cpus)
    }

    /// The same on an engine for this memory.
    pub fn on(engine: Arc<dyn Engine>, bare: Bare, cpus: u32) -> Self {
        let port = Arc::new(Port { ram: Some(bare.ram.clone()), ..Port::default() });
        let vcpus: Vec<_> = (0..cpus).map(|id| engine.create_vcpu(id, port.clone()).expect("a vCPU")).collect();
        *lock(&port.vcpus) = vcpus.iter().map(|v| v.control()).collect();
        Machine { bare, engine, vcpus, watchdog: Watchdog::start(port.clone()), port }
    }

    /// A machine of one vCPU in the given state.
    pub fn with_state(bare: Bare, state: &CpuState) -> Self {
        let mut machine = Machine::new(bare, 1);
        machine.vcpus[0].set_state(state).expect("a valid state");
        machine
    }

    /// Runs processor 0 until the guest exits, for `time` at most.
    pub fn run_for(&mut self, time: Duration) -> End {
        self.port.take_exit();
        self.watchdog.arm(time);
        let exit = self.vcpus[0].run();
        self.watchdog.disarm();
        self.end(exit)
    }

    /// Runs processor 0 for ten seconds at most.
    pub fn run(&mut self) -> End {
        self.run_for(Duration::from_secs(10))
    }

    /// Runs every processor on a thread of its own until one ends the machine.
    pub fn run_all(&mut self, time: Duration) -> Vec<End> {
        self.port.take_exit();
        self.watchdog.arm(time);
        let port = &self.port;
        let exits: Vec<Exit> = std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .vcpus
                .iter_mut()
                .map(|vcpu| {
                    scope.spawn(move || {
                        let exit = vcpu.run();
                        port.stop();
                        exit
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().expect("a vCPU thread that doesn't panic")).collect()
        });
        self.watchdog.disarm();
        let exited = self.port.take_exit();
        exits
            .into_iter()
            .map(|exit| {
                self.port.exited.store(exited, Ordering::SeqCst);
                self.end(exit)
            })
            .collect()
    }

    fn end(&self, exit: Exit) -> End {
        match exit {
            Exit::Stopped if self.port.take_exit() => End::Exit,
            Exit::Stopped => End::Timeout,
            Exit::TripleFault => End::TripleFault,
            Exit::Failed(why) => End::Failed(why),
        }
    }

    pub fn state(&self) -> CpuState {
        self.vcpus[0].state()
    }

    /// The exception that a stub stopped at.
    pub fn frame(&self) -> Frame {
        self.frame_of(&self.state())
    }

    /// The same, given the vCPU's state: the stack pointer is still where the stub left it.
    pub fn frame_of(&self, state: &CpuState) -> Frame {
        let at = state.gpr[4].wrapping_sub(DIRECT);
        assert!(at < self.bare.ram.size() - 56, "no stub was reached: rsp {:#x}, rip {:#x}", state.gpr[4], state.rip);
        let word = |n: u64| self.bare.read_u64(at + 8 * n);
        Frame {
            vector: word(0),
            error: word(1),
            rip: word(2),
            cs: word(3),
            rflags: word(4),
            rsp: word(5),
            ss: word(6),
            at: state.gpr[4] + 56,
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.watchdog.quit.store(true, Ordering::SeqCst);
    }
}

/// What an exception's delivery and its stub left on the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    /// Where the stack pointer was before all that: the top of the frame.
    pub at: u64,
}

/// Stops a machine that takes too long.
struct Watchdog {
    start: Instant,
    /// Milliseconds after `start`; zero: not armed.
    deadline: AtomicU64,
    quit: AtomicBool,
}

impl Watchdog {
    fn start(port: Arc<Port>) -> Arc<Self> {
        let dog =
            Arc::new(Watchdog { start: Instant::now(), deadline: AtomicU64::new(0), quit: AtomicBool::new(false) });
        let own = dog.clone();
        std::thread::spawn(move || {
            while !own.quit.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(20));
                let deadline = own.deadline.load(Ordering::SeqCst);
                if deadline != 0 && own.start.elapsed().as_millis() as u64 > deadline {
                    port.stop();
                }
            }
        });
        dog
    }

    fn arm(&self, time: Duration) {
        // A processor that is itself emulated needs more.
        let times = std::env::var("RINGER_PATIENCE").ok().and_then(|times| times.parse().ok()).unwrap_or(1);
        let time = time * times;
        let deadline = (self.start.elapsed() + time).as_millis() as u64;
        self.deadline.store(deadline.max(1), Ordering::SeqCst);
    }

    fn disarm(&self) {
        self.deadline.store(0, Ordering::SeqCst);
    }
}
