//! [`CpuState`] in and out of the kernel.
//!
//! [`export`] is to be called when the vCPU has come out of the guest with nothing half done; [`import`] replaces
//! everything. The order of the calls in [`import`] matters: paging mode before XCR0, the local APIC's mode before its
//! registers, its registers before its deadline, and events last, because setting registers forgets them.
//!
//! An interrupt that was taken from the local APIC and didn't get into the guest any more (`interrupt.injected`) goes back
//! to being requested: then no other engine has to know of such a thing.

mod apic;
mod events;
mod msrs;
mod segments;
mod xsave;

use arch::CpuState;
use arch::registers::{efer, rflags};
use arch::state::Activity;
use arch::{DescriptorTable, msr};
use kvm_bindings::*;
use kvm_ioctls::VcpuFd;

pub use apic::{Lint0, lint0};
pub use msrs::MsrSet;

use crate::Error;
use crate::vm::Vm;
use segments::{from_segment, to_segment};

/// What a vCPU's state needs to be read and written besides its descriptor.
pub struct Context<'a> {
    pub fd: &'a VcpuFd,
    pub vm: &'a Vm,
    pub id: u32,
    pub msrs: &'a MsrSet,
    /// Bytes of a standard-format area with all that the processor model has.
    pub xsave_size: usize,
    /// IA32_TSC_ADJUST that the guest's counter is to be moved by, at 0: the counter's offset from the host's.
    pub tsc_offset: Option<u64>,
}

fn descriptor_table(table: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: table.base, limit: table.limit }
}

fn kvm_table(table: &DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: table.base, limit: table.limit, padding: [0; 3] }
}

/// General-purpose registers in the order of instruction encodings.
fn general(regs: &kvm_regs) -> [u64; 16] {
    [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9, regs.r10,
        regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ]
}

fn kvm_registers(state: &CpuState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gpr;
    let (rip, rflags) = (state.rip, state.rflags | rflags::FIXED);
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

/// Reads the whole state.
pub fn export(context: &Context<'_>) -> Result<CpuState, Error> {
    let fd = context.fd;
    // First: a pending INIT or start-up IPI is taken by this call.
    let mp = fd.get_mp_state().map_err(Error::call("give the vCPU's activity"))?;
    let regs = fd.get_regs().map_err(Error::call("give registers"))?;
    let sregs = fd.get_sregs().map_err(Error::call("give system registers"))?;
    let debug = fd.get_debug_regs().map_err(Error::call("give debug registers"))?;
    let xcrs = fd.get_xcrs().map_err(Error::call("give XCR0"))?;
    let events = fd.get_vcpu_events().map_err(Error::call("give pending events"))?;
    let mut apic = apic::read(fd)?;
    let mut state = CpuState {
        gpr: general(&regs),
        rip: regs.rip,
        rflags: regs.rflags,
        segments: [&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs].map(from_segment),
        ldtr: from_segment(&sregs.ldt),
        tr: from_segment(&sregs.tr),
        gdtr: descriptor_table(&sregs.gdt),
        idtr: descriptor_table(&sregs.idt),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        dr: [debug.db[0], debug.db[1], debug.db[2], debug.db[3], debug.dr6, debug.dr7],
        xcr0: xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0).map_or(1, |x| x.value),
        msrs: msrs::read(context, &sregs)?,
        activity: match mp.mp_state {
            KVM_MP_STATE_HALTED => Activity::Halted,
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Activity::WaitForSipi,
            _ => Activity::Running,
        },
        ..CpuState::reset()
    };
    (state.xsave, state.pkru) = xsave::read(context)?;
    events::export(&events, &mut state, &mut apic);
    state.apic = apic;
    Ok(state)
}

/// Replaces the whole state.
pub fn import(context: &Context<'_>, state: &CpuState) -> Result<(), Error> {
    let fd = context.fd;
    let invalid = |what: &str| {
        let what = what.to_owned();
        move |error: kvm_ioctls::Error| Error::State(format!("KVM does not take its {what} ({error})"))
    };
    let value = |number: u32| msrs::given(&state.msrs, number);
    let [es, cs, ss, ds, fs, gs] = state.segments.each_ref().map(to_segment);
    let sregs = kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: to_segment(&state.tr),
        ldt: to_segment(&state.ldtr),
        gdt: kvm_table(&state.gdtr),
        idt: kvm_table(&state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: state.cr8 & 0xf,
        efer: value(msr::EFER).unwrap_or(0) & (efer::SCE | efer::LME | efer::LMA | efer::NXE),
        apic_base: value(msr::APIC_BASE).unwrap_or(apic::reset_base(context.id)),
        interrupt_bitmap: [0; 4],
    };
    fd.set_sregs(&sregs).map_err(invalid("system registers"))?;
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = state.xcr0;
    fd.set_xcrs(&xcrs).map_err(invalid("XCR0"))?;
    xsave::write(context, state)?;
    msrs::write(context, &state.msrs)?;
    apic::write(fd, context.id, state, sregs.apic_base)?;
    msrs::write_deadline(context, value(msr::TSC_DEADLINE).unwrap_or(0))?;
    let debug = kvm_debugregs {
        db: [state.dr[0], state.dr[1], state.dr[2], state.dr[3]],
        dr6: state.dr[4],
        dr7: state.dr[5],
        ..Default::default()
    };
    fd.set_debug_regs(&debug).map_err(invalid("debug registers"))?;
    fd.set_regs(&kvm_registers(state)).map_err(invalid("registers"))?;
    fd.set_vcpu_events(&events::import(state)).map_err(invalid("pending events"))?;
    let mp_state = match state.activity {
        Activity::Running => KVM_MP_STATE_RUNNABLE,
        Activity::Halted => KVM_MP_STATE_HALTED,
        // As after INIT: a start-up IPI is enough.
        Activity::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    };
    fd.set_mp_state(kvm_mp_state { mp_state }).map_err(invalid("activity"))
}
