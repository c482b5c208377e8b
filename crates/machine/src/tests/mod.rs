//! Run control against an engine whose processors execute closures.

mod random_kernels;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use arch::CpuState;
use engine::{Bus, Engine, Exit, Interrupts, Vcpu, VcpuControl};
use memory::Ram;

use crate::*;

/// What a processor does in one call of `run`: gets its id, the machine's bus and how often it was reset.
type Program = Arc<dyn Fn(u32, &dyn Bus, u32) -> Option<Exit> + Send + Sync>;

struct FakeEngine(Program);

struct FakeVcpu {
    id: u32,
    bus: Arc<dyn Bus>,
    program: Program,
    control: Arc<FakeControl>,
    resets: u32,
    state: CpuState,
}

#[derive(Default)]
struct FakeControl {
    stop: Mutex<bool>,
    changed: Condvar,
}

struct NoInterrupts;

impl Interrupts for NoInterrupts {
    fn send_msi(&self, _: u64, _: u32) {}
    fn set_pic_output(&self, _: bool) {}
    fn send_nmi(&self, _: u32) {}
}

impl VcpuControl for FakeControl {
    fn stop(&self) {
        *self.stop.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

impl Vcpu for FakeVcpu {
    /// Runs the program; where that gives no exit, halts until stopped.
    fn run(&mut self) -> Exit {
        assert_eq!(std::thread::current().name(), Some(format!("vcpu{}", self.id).as_str()));
        if let Some(exit) = (self.program)(self.id, &*self.bus, self.resets) {
            return exit;
        }
        let mut stop = self.control.stop.lock().unwrap();
        while !*stop {
            stop = self.control.changed.wait(stop).unwrap();
        }
        *stop = false;
        Exit::Stopped
    }

    fn state(&self) -> CpuState {
        self.state.clone()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), engine::Error> {
        self.state = state.clone();
        self.resets += 1;
        Ok(())
    }

    fn control(&self) -> Arc<dyn VcpuControl> {
        self.control.clone()
    }
}

impl Engine for FakeEngine {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn create_vcpu(&self, id: u32, bus: Arc<dyn Bus>) -> Result<Box<dyn Vcpu>, engine::Error> {
        let (program, control, state) = (self.0.clone(), Arc::default(), CpuState::reset());
        Ok(Box::new(FakeVcpu { id, bus, program, control, resets: 0, state }))
    }

    fn interrupts(&self) -> Arc<dyn Interrupts> {
        Arc::new(NoInterrupts)
    }

    fn clocks(&self) -> Result<engine::Clocks, engine::Error> {
        Ok(engine::Clocks { tsc: 0, paravirtual: 0 })
    }

    fn set_clocks(&self, _: &engine::Clocks) -> Result<(), engine::Error> {
        Ok(())
    }
}

/// A machine whose processors execute `program`.
fn machine(
    cpus: u32,
    no_reboot: bool,
    program: impl Fn(u32, &dyn Bus, u32) -> Option<Exit> + Send + Sync + 'static,
) -> Machine {
    let loader = Box::new(|_: &Ram| Ok(CpuState::reset()));
    let (ram, engine) = (Ram::new(16 << 20).unwrap(), FakeEngine(Arc::new(program)));
    Machine::assemble(parts(&ram, cpus, Default::default()), no_reboot, ram, &engine, loader).unwrap()
}

fn parts(ram: &Ram, cpus: u32, serial: [SerialOutput; 4]) -> ChipsetConfig {
    ChipsetConfig {
        ram: ram.clone(),
        cpus,
        clock: Arc::new(HostClock::default()),
        serial,
        firmware: None,
        debug_console: None,
        debug_exit: Some(0x501),
        smm: false,
        test_device: false,
    }
}

#[test]
fn the_guest_ends_the_machine_by_its_debug_exit() {
    let mut machine = machine(2, false, |id, bus, _| {
        if id == 1 {
            bus.pio_write(0x501, &[7, 0, 0, 0]);
        }
        None
    });
    assert_eq!(machine.run().unwrap(), Outcome::DebugExit(7));
}

#[test]
fn a_triple_fault_starts_the_machine_again() {
    let mut machine = machine(2, false, |id, _, resets| match (id, resets) {
        (0, 1 | 2) => Some(Exit::TripleFault),
        (0, 3) => Some(Exit::Failed("third start".into())),
        _ => None,
    });
    assert!(matches!(machine.run(), Err(Error::Vcpu(why)) if why == "vCPU 0: third start"));
}

#[test]
fn a_reset_by_port_cf9_ends_a_machine_that_may_not_reboot() {
    let mut machine = machine(2, true, |id, bus, _| {
        if id == 1 {
            bus.pio_write(0xcf9, &[0x02]);
            bus.pio_write(0xcf9, &[0x06]);
        }
        None
    });
    assert_eq!(machine.run().unwrap(), Outcome::Reset);
}

#[test]
fn a_panic_in_an_engine_is_an_error_of_the_machine() {
    let mut machine = machine(2, false, |id, _, _| if id == 1 { panic!("a bug") } else { None });
    assert!(matches!(machine.run(), Err(Error::Vcpu(why)) if why.contains("panicked")));
}

#[test]
fn the_user_ends_a_halted_machine() {
    let mut machine = machine(3, false, |_, _, _| None);
    let handle = machine.handle();
    let user = std::thread::spawn(move || handle.end());
    assert_eq!(machine.run().unwrap(), Outcome::Ended);
    user.join().unwrap();
}

#[test]
fn no_vcpu_executes_while_the_machine_is_paused() {
    let (counter, executing) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
    let (count, busy) = (counter.clone(), executing.clone());
    let mut machine = machine(1, false, move |_, _, _| {
        busy.store(true, Ordering::SeqCst);
        count.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(1));
        busy.store(false, Ordering::SeqCst);
        Some(Exit::Stopped)
    });
    let handle = machine.handle();
    let user = std::thread::spawn(move || {
        while counter.load(Ordering::SeqCst) < 3 {
            std::thread::yield_now();
        }
        handle.pause();
        let before = counter.load(Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(20));
        assert!(!executing.load(Ordering::SeqCst));
        assert_eq!(counter.load(Ordering::SeqCst), before);
        handle.resume();
        while counter.load(Ordering::SeqCst) == before {
            std::thread::yield_now();
        }
        handle.end();
    });
    assert_eq!(machine.run().unwrap(), Outcome::Ended);
    user.join().unwrap();
}
