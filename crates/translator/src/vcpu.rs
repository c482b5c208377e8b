//! A vCPU as the machine sees it: creation, the [`engine::Vcpu`] trait, and the neutral state.

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use arch::CpuState;
use arch::state::Activity;
use engine::{Error, Exit, VcpuControl};

use crate::code_memory::CodeMemory;
use crate::cpu::{Msrs, STACK_WORDS, Vcpu, XSAVE_SIZE, XsaveArea};
use crate::entry::{Hot, Near};
use crate::perf_map::PerfMap;
use crate::run::EngineState;
use crate::shared::{Machine, VcpuShared, request};
use crate::signals::Attached;
use crate::tlb::Tlb;
use crate::xstate;

/// Writes every field of a [`Vcpu`] where it will stay: the whole is too large for a thread's stack. The compiler checks that none is
/// missing.
macro_rules! emplace {
    ($place:expr, $tlb:ident, { $($field:ident : $value:expr),* $(,)? }) => {{
        let _all = |vcpu: &Vcpu| {
            let Vcpu { $tlb: _, $($field: _),* } = vcpu;
        };
        // SAFETY: the place is memory for one vCPU, all zeros, and writing does not read or drop what was there.
        unsafe {
            Tlb::initialize(&raw mut (*$place).$tlb);
            $((&raw mut (*$place).$field).write($value);)*
        }
    }};
}

/// A vCPU where emitted code expects it: right behind the jump table.
pub struct VcpuBox {
    vcpu: NonNull<Vcpu>,
    _memory: Arc<CodeMemory>,
}

impl Deref for VcpuBox {
    type Target = Vcpu;

    fn deref(&self) -> &Vcpu {
        // SAFETY: `Vcpu::new` has written it all, in memory that lives as long as `self`, which nobody else uses.
        unsafe { self.vcpu.as_ref() }
    }
}

impl DerefMut for VcpuBox {
    fn deref_mut(&mut self) -> &mut Vcpu {
        // SAFETY: as above.
        unsafe { self.vcpu.as_mut() }
    }
}

impl Drop for VcpuBox {
    fn drop(&mut self) {
        // SAFETY: dropped once, here; its memory is still mapped.
        unsafe { self.vcpu.drop_in_place() };
    }
}

impl VcpuBox {
    /// Adds processor `id`, the machine's next, as power-on leaves it: the bootstrap processor (0) running, others waiting
    /// for their start-up IPI.
    pub fn new(id: u32, machine: Arc<Machine>) -> io::Result<VcpuBox> {
        let memory = Arc::new(CodeMemory::new(machine.config.translation_cache)?);
        let perf_map = if machine.config.perf_map { Some(PerfMap::open()?) } else { None };
        let shared = Arc::new(VcpuShared::new(id));
        machine.add_vcpu(shared.clone());
        shared.poll.attach(memory.clone());
        let reset = CpuState::reset();
        let place = memory.vcpu_place();
        let p = place.as_ptr();
        // `shared` and `machine` are used by other fields, which come first.
        emplace!(p, tlb, {
            near: Near::default(),
            stack: [0; STACK_WORDS],
            gpr: reset.gpr,
            rip: reset.rip,
            rflags: reset.rflags,
            segments: reset.segments,
            fp_loaded: 0,
            hot: Hot::new(xstate::layout().native, &shared.requests),
            xsave: XsaveArea::default(),
            ldtr: reset.ldtr,
            tr: reset.tr,
            gdtr: reset.gdtr,
            idtr: reset.idtr,
            cr0: reset.cr0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            dr: [0; 4],
            dr6: reset.dr[4],
            dr7: reset.dr[5],
            xcr0: reset.xcr0,
            pkru: 0,
            msrs: Msrs::default(),
            activity: if shared.apic.bootstrap() { Activity::Running } else { Activity::WaitForSipi },
            nmi_blocked: false,
            interrupt_shadow: false,
            debug_shadow: false,
            pending_debug: 0,
            pending_event: None,
            smm: Default::default(),
            insn_rip: 0,
            id: id,
            engine: EngineState::new(memory.clone(), perf_map),
            shared: shared,
            map: machine.ram.map().sections(),
            machine: machine,
            timer: Default::default(),
        });
        let mut vcpu = VcpuBox { vcpu: place, _memory: memory };
        vcpu.mmu_flush_all();
        vcpu.hot.direct = u64::from(vcpu.machine.config.direct == crate::native::Mode::Always);
        Ok(vcpu)
    }
}

/// Makes a vCPU of the engine usable as [`engine::Vcpu`]. It stays where it is: emitted code knows its address.
pub struct Handle(pub VcpuBox);

// SAFETY: a vCPU holds raw pointers only into its own mappings; it is used by one thread at a time, which `&mut self` enforces.
unsafe impl Send for Handle {}

struct Control(Arc<VcpuShared>);

impl VcpuControl for Control {
    fn stop(&self) {
        self.0.request(request::STOP);
    }
}

impl engine::Vcpu for Handle {
    fn run(&mut self) -> Exit {
        let vcpu: &mut Vcpu = &mut self.0;
        let attached = match Attached::new(vcpu) {
            Ok(attached) => attached,
            Err(e) => return Exit::Failed(format!("can't set up signals for vCPU {}: {e}", vcpu.id)),
        };
        if let Err(e) = vcpu.enter_thread() {
            return Exit::Failed(format!("can't make a timer for vCPU {}: {e}", vcpu.id));
        }
        let exit = vcpu.run_loop();
        vcpu.end_native();
        vcpu.settle_x87_pointers();
        if vcpu.machine.config.stats {
            eprintln!("{}", crate::stats::report(vcpu));
        }
        vcpu.leave_thread();
        drop(attached);
        exit
    }

    fn state(&self) -> CpuState {
        self.0.export()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), Error> {
        self.0.follow_map();
        self.0.import(state)
    }

    fn control(&self) -> Arc<dyn VcpuControl> {
        Arc::new(Control(self.0.shared.clone()))
    }
}

impl Vcpu {
    fn export(&self) -> CpuState {
        CpuState {
            gpr: self.gpr,
            rip: self.rip,
            rflags: self.rflags,
            segments: self.segments,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            cr8: u64::from(self.shared.apic.tpr() >> 4),
            dr: [self.dr[0], self.dr[1], self.dr[2], self.dr[3], self.dr6, self.dr7],
            xcr0: self.xcr0,
            pkru: self.pkru,
            msrs: self.saved_msrs(),
            xsave: self.xsave.0.to_vec(),
            apic: self.saved_apic(),
            activity: self.activity,
            pending_exception: self.pending_event,
            nmi_pending: self.shared.requests.load(std::sync::atomic::Ordering::SeqCst) & request::NMI != 0,
            nmi_blocked: self.nmi_blocked,
            interrupt_shadow: self.interrupt_shadow,
            smm: self.saved_smm(),
        }
    }

    fn import(&mut self, s: &CpuState) -> Result<(), Error> {
        let invalid = |what: String| Err(Error::State(what));
        if !s.xsave.is_empty() && (s.xsave.len() < 576 || s.xsave.len() > XSAVE_SIZE) {
            return invalid(format!("the XSAVE area has {} bytes instead of 576 to {XSAVE_SIZE}", s.xsave.len()));
        }
        // What was asked of the vCPU in its former life is over.
        let own = request::STOP | request::INVALIDATE;
        self.shared.requests.fetch_and(own, std::sync::atomic::Ordering::SeqCst);
        if !self.shared.apic.load(&s.apic) {
            return invalid(format!("the local APIC state has {} bytes, which is not its size", s.apic.len()));
        }
        if let Err((number, value)) = self.restore_msrs(&s.msrs) {
            return invalid(format!("MSR {number:#x} can't be {value:#x}"));
        }
        self.gpr = s.gpr;
        self.rip = s.rip;
        self.rflags = s.rflags | arch::registers::rflags::FIXED;
        self.segments = s.segments;
        self.ldtr = s.ldtr;
        self.tr = s.tr;
        self.gdtr = s.gdtr;
        self.idtr = s.idtr;
        (self.cr0, self.cr2, self.cr3, self.cr4) = (s.cr0, s.cr2, s.cr3, s.cr4);
        self.dr.copy_from_slice(&s.dr[..4]);
        (self.dr6, self.dr7) = (s.dr[4], s.dr[5]);
        self.xcr0 = s.xcr0;
        self.pkru = s.pkru;
        self.xsave.reset();
        if !s.xsave.is_empty() {
            self.xsave.0[..s.xsave.len()].copy_from_slice(&s.xsave);
            // What XRSTOR would refuse: unknown components, compaction, reserved bits.
            let used = self.xsave.in_use() & xstate::layout().native;
            self.xsave.put(512, &[0; 64]);
            self.xsave.put(512, &used.to_le_bytes());
            let mxcsr = self.xsave.mxcsr() & xstate::layout().mxcsr_mask;
            self.xsave.put(xstate::legacy::MXCSR, &mxcsr.to_le_bytes());
        }
        self.set_task_priority((s.cr8 as u8) << 4);
        self.activity = s.activity;
        self.nmi_blocked = s.nmi_blocked;
        self.interrupt_shadow = s.interrupt_shadow;
        self.debug_shadow = false;
        self.pending_debug = 0;
        self.pending_event = s.pending_exception;
        self.restore_smm(&s.smm);
        self.resume_apic_timer();
        if s.nmi_pending {
            self.shared.flag(request::NMI);
        }
        self.shared.flag(request::TIMER | request::INTERRUPT);
        self.take_map();
        Ok(())
    }
}
