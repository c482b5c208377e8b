//! One machine's VM: its memory slots, interrupt routes and vCPUs.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use arch::cpuid::CpuModel;
use kvm_bindings::*;
use kvm_ioctls::VmFd;
use memory::{MapObserver, Ram, Sections};

use crate::clocks::Clocks;
use crate::control::Control;
use crate::routes::{self, Routes};
use crate::slots::Slots;
use crate::state::MsrSet;
use crate::system::System;
use crate::{Config, Error, cpuid};

/// Where KVM keeps what some Intel processors need for real mode: three pages for a task state, and a page of identity
/// mapping. Below the flash, above the local APICs, where the machine has nothing.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS: usize = 0xfeff_d000;

/// What vCPUs share.
pub struct Vm {
    pub fd: VmFd,
    slots: Mutex<Slots>,
    pub ram: Ram,
    pub config: Config,
    pub host: cpuid::Host,
    /// The area that KVM reads and writes for XSAVE, in bytes.
    pub xsave_size: usize,
    pub has_xsave2: bool,
    /// Writes of any size at an address can raise an event.
    pub has_io_events: bool,
    /// An event can send an interrupt message.
    pub has_irqfd: bool,
    /// Where PKRU is in it.
    pub pkru_offset: Option<usize>,
    /// The level of the 8259's output.
    pub pic_asserted: AtomicBool,
    /// It has risen since the bootstrap processor looked.
    pub pic_rose: AtomicBool,
    routes: Mutex<Routes>,
    pub clocks: Clocks,
    pub vcpus: RwLock<Vec<Arc<Control>>>,
    model: OnceLock<CpuModel>,
    pub msrs: OnceLock<MsrSet>,
}

impl Vm {
    pub fn new(system: &System, ram: Ram, config: Config) -> Result<Self, Error> {
        let most = system.kvm.get_max_vcpus();
        if config.cpus.count() as usize > most {
            return Err(Error::Vcpus { asked: config.cpus.count(), most });
        }
        let fd = system.kvm.create_vm().map_err(Error::call("make a virtual machine"))?;
        fd.set_identity_map_address(IDENTITY_MAP).map_err(Error::call("place the identity map"))?;
        fd.set_tss_address(TSS).map_err(Error::call("place the task state"))?;
        let enable = |cap: u32, arguments: [u64; 4], what: &str| {
            let cap = kvm_enable_cap { cap, args: arguments, ..Default::default() };
            fd.enable_cap(&cap).map_err(Error::call(what))
        };
        let routes = u64::from(routes::LEVEL);
        enable(KVM_CAP_SPLIT_IRQCHIP, [routes, 0, 0, 0], "keep local APICs without an I/O APIC")?;
        let x2apic = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        enable(KVM_CAP_X2APIC_API, [x2apic.into(), 0, 0, 0], "use x2APIC ids of 32 bits")?;
        if system.capability(KVM_CAP_EXIT_ON_EMULATION_FAILURE) != 0 {
            enable(KVM_CAP_EXIT_ON_EMULATION_FAILURE, [1, 0, 0, 0], "report failed emulation")?;
        }
        let xsave2 = system.capability(KVM_CAP_XSAVE2) as usize;
        let host = cpuid::Host::new(system)?;
        let read_only = system.capability(KVM_CAP_READONLY_MEM) != 0;
        let slots = Slots::new(ram.map().sections(), system.kvm.get_nr_memslots(), read_only);
        let vm = Vm {
            fd,
            slots: Mutex::new(slots),
            ram,
            config,
            xsave_size: xsave2.max(size_of::<kvm_xsave>()),
            has_xsave2: xsave2 != 0,
            has_io_events: system.capability(KVM_CAP_IOEVENTFD) != 0
                && system.capability(KVM_CAP_IOEVENTFD_ANY_LENGTH) != 0,
            has_irqfd: system.capability(KVM_CAP_IRQFD) != 0,
            pkru_offset: host.pkru_offset(),
            host,
            pic_asserted: AtomicBool::new(false),
            pic_rose: AtomicBool::new(false),
            routes: Mutex::default(),
            clocks: Clocks::new(system.capability(KVM_CAP_ADJUST_CLOCK) != 0),
            vcpus: RwLock::default(),
            model: OnceLock::new(),
            msrs: OnceLock::new(),
        };
        let sections = vm.ram.map().sections();
        vm.slots().update(&vm.fd, vm.ram.tracker(), &sections)?;
        Ok(vm)
    }

    /// The processor that the vCPUs are. `tsc_khz` is asked for when it is first needed.
    pub fn model(&self, tsc_khz: impl FnOnce() -> Result<u32, Error>) -> Result<&CpuModel, Error> {
        if let Some(model) = self.model.get() {
            return Ok(model);
        }
        let model = self.host.model(&self.config, tsc_khz()?)?;
        Ok(self.model.get_or_init(|| model))
    }

    /// The state components that the vCPUs have; 0 before [`Vm::model`].
    pub fn xcr0_mask(&self) -> u64 {
        // Without XSAVE there are x87 and SSE all the same.
        self.model.get().map_or(0, |model| model.xcr0_mask() | 3)
    }

    pub fn add_vcpu(&self, control: Arc<Control>) {
        self.vcpus.write().unwrap_or_else(PoisonError::into_inner).push(control);
    }

    pub fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A vCPU has ended a level-triggered interrupt.
    pub fn end_of_interrupt(&self, vector: u8) {
        self.routes().level_ended(vector);
    }

    /// The 8259's output goes to the bootstrap processor, which must come out of the guest to take its interrupt.
    pub fn set_pic_output(&self, asserted: bool) {
        if self.pic_asserted.swap(asserted, Ordering::SeqCst) == asserted || !asserted {
            return;
        }
        self.pic_rose.store(true, Ordering::SeqCst);
        let bootstrap = self.vcpus.read().unwrap_or_else(PoisonError::into_inner).first().cloned();
        if let Some(bootstrap) = bootstrap {
            bootstrap.kick();
        }
    }
}

impl MapObserver for Vm {
    fn map_changed(&self, sections: &Arc<Sections>) {
        // The vCPUs come out of the guest for as long as that takes.
        if let Err(error) = self.slots().update(&self.fd, self.ram.tracker(), sections) {
            tracing::error!("the guest's memory map is not what it should be: {error}");
        }
    }

    fn collect_dirty(&self, pages: Range<usize>) {
        let tracker = self.ram.tracker();
        if let Err(error) = self.slots().collect_dirty(&self.fd, tracker, pages.clone()) {
            tracing::warn!("{error}: all pages count as written");
            pages.for_each(|page| tracker.mark_dirty(page));
        }
    }
}
