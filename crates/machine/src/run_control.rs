//! Starts, pauses and ends what a machine's vCPU threads do.
//!
//! Anyone may ask for an end (a device in the middle of an instruction, a vCPU that met a triple fault, the user): the
//! first request counts. It is noted first, then every vCPU is told to stop; a thread that finds the note at its
//! [`RunControl::run_vcpu`] checkpoint leaves. Since `stop` also holds for the next `run`, no request can be missed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use engine::{Exit, Interrupts, Vcpu, VcpuControl};

/// Why the vCPUs are to leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    PowerOff,
    Reset,
    /// The user ends the machine.
    End,
    /// The guest ends the machine by its debug exit.
    DebugExit(u8),
    /// A vCPU can't go on.
    Failed(String),
}

#[derive(Default)]
struct State {
    request: Option<Request>,
    paused: bool,
    /// vCPU threads that are inside their engine.
    executing: u32,
    vcpus: Vec<Arc<dyn VcpuControl>>,
}

/// Shared by the machine, its vCPU threads, its devices and its user.
#[derive(Default)]
pub struct RunControl {
    state: Mutex<State>,
    changed: Condvar,
    /// How INIT reaches the boot processor, where there is a BIOS that knows what to do then.
    interrupts: Option<Arc<dyn Interrupts>>,
}

/// INIT to the processor with APIC id 0 (Intel SDM 3A 10.11).
const INIT_ADDRESS: u64 = 0xfee0_0000;
const INIT_DATA: u32 = 0x4500;

impl RunControl {
    /// `interrupts`: INIT can be sent by it; without, the whole machine is reset in its place.
    pub fn new(interrupts: Option<Arc<dyn Interrupts>>) -> Self {
        RunControl { interrupts, ..RunControl::default() }
    }

    /// From now on `vcpus` are those to be stopped.
    pub fn attach(&self, vcpus: Vec<Arc<dyn VcpuControl>>) {
        self.state().vcpus = vcpus;
    }

    /// Asks all vCPU threads to leave. Later requests than the first have no effect until [`RunControl::take_request`].
    pub fn request(&self, request: Request) {
        let mut state = self.state();
        tracing::debug!(?request, "the vCPUs are asked to leave");
        state.request.get_or_insert(request);
        self.stop_all(state);
    }

    /// Keeps all vCPUs out of their engine until [`RunControl::resume`]; returns when they are.
    pub fn pause(&self) {
        let mut state = self.state();
        state.paused = true;
        self.stop_all(state);
        state = self.state();
        while state.executing > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub fn resume(&self) {
        self.state().paused = false;
        self.changed.notify_all();
    }

    /// Once all vCPU threads have left: why they did, and a clean slate for the next start.
    pub fn take_request(&self) -> Option<Request> {
        self.state().request.take()
    }

    /// What a vCPU's thread does until a request comes.
    pub fn run_vcpu(&self, id: u32, vcpu: &mut dyn Vcpu) {
        while self.enter() {
            // An engine's own bug must end this machine with a message, and the threads of its other vCPUs with it.
            let exit = catch_unwind(AssertUnwindSafe(|| vcpu.run()));
            self.leave();
            match exit {
                Ok(Exit::Stopped) => {}
                Ok(Exit::TripleFault) => {
                    tracing::info!("vCPU {id}: triple fault");
                    self.request(Request::Reset);
                }
                Ok(Exit::Failed(why)) => self.request(Request::Failed(format!("vCPU {id}: {why}"))),
                Err(_) => self.request(Request::Failed(format!("vCPU {id}: the engine panicked"))),
            }
        }
    }

    /// Waits out a pause. False: leave.
    fn enter(&self) -> bool {
        let mut state = self.state();
        while state.paused && state.request.is_none() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.request.is_some() {
            return false;
        }
        state.executing += 1;
        true
    }

    fn leave(&self) {
        self.state().executing -= 1;
        self.changed.notify_all();
    }

    fn stop_all(&self, state: MutexGuard<'_, State>) {
        let vcpus = state.vcpus.clone();
        // An engine may take locks of its own in `stop`: none of ours is held meanwhile.
        drop(state);
        vcpus.iter().for_each(|vcpu| vcpu.stop());
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl chipset::PowerEvents for RunControl {
    fn power_off(&self) {
        self.request(Request::PowerOff);
    }

    fn reset(&self) {
        self.request(Request::Reset);
    }

    fn init(&self) {
        match &self.interrupts {
            Some(interrupts) => interrupts.send_msi(INIT_ADDRESS, INIT_DATA),
            None => self.request(Request::Reset),
        }
    }

    fn exit(&self, value: u8) {
        self.request(Request::DebugExit(value));
    }
}
