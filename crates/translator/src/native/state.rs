//! A program's registers, on their way into its process and back.

use arch::registers::{gpr, rflags};
use arch::state::{Segment, SegmentRegister};
use direct::Registers;

use super::{CS, SS, Stop, failed};
use crate::cpu::Vcpu;
use crate::xstate::{HEADER, MXCSR_INIT, component, layout};

/// Bytes of the legacy region that are the kernel's and the program's to use as they like (Intel SDM 1 10.5.1): the host's kernel
/// does.
const UNUSED: std::ops::Range<usize> = 464..512;

impl Vcpu {
    pub(super) fn program_registers(&self) -> Registers {
        let g = |index: usize| self.gpr[index];
        Registers {
            r15: g(15),
            r14: g(14),
            r13: g(13),
            r12: g(12),
            rbp: g(gpr::RBP),
            rbx: g(gpr::RBX),
            r11: g(11),
            r10: g(10),
            r9: g(9),
            r8: g(8),
            rax: g(gpr::RAX),
            rcx: g(gpr::RCX),
            rdx: g(gpr::RDX),
            rsi: g(gpr::RSI),
            rdi: g(gpr::RDI),
            orig_rax: u64::MAX,
            rip: self.rip,
            cs: u64::from(CS.selector),
            eflags: self.rflags & !rflags::RF,
            rsp: g(gpr::RSP),
            ss: u64::from(SS.selector),
            fs_base: self.seg(SegmentRegister::Fs).base,
            gs_base: self.seg(SegmentRegister::Gs).base,
            ds: 0,
            es: 0,
            fs: 0,
            gs: 0,
        }
    }

    pub(super) fn take_program_registers(&mut self, r: &Registers) {
        self.gpr = [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
            r.r15,
        ];
        self.rip = r.rip;
        // The host's kernel says RF for a fault that the guest has yet to see.
        self.rflags = r.eflags & !rflags::RF | rflags::FIXED;
        self.segments[SegmentRegister::Fs as usize].base = r.fs_base;
        self.segments[SegmentRegister::Gs as usize].base = r.gs_base;
        // Far transfers and loads of segment registers, with selectors that host and guest both have.
        if r.cs as u16 != CS.selector {
            self.segments[SegmentRegister::Cs as usize] = Segment::flat_code(r.cs as u16, false, 3);
        }
        let loaded = [
            (SegmentRegister::Ss, r.ss, SS.selector),
            (SegmentRegister::Ds, r.ds, 0),
            (SegmentRegister::Es, r.es, 0),
            (SegmentRegister::Fs, r.fs, 0),
            (SegmentRegister::Gs, r.gs, 0),
        ];
        for (register, selector, before) in loaded {
            if selector as u16 != before && self.load_data_segment(register, selector as u16).is_err() {
                // The guest has no such segment: it is the null one that it could have loaded.
                self.segments[register as usize] = Segment { selector: selector as u16 & 3, ..Segment::default() };
            }
        }
    }

    pub(super) fn load_vector_state(&mut self, index: usize) -> Result<(), Stop> {
        self.settle_x87_pointers();
        if self.xsave.mxcsr() != MXCSR_INIT {
            // The host's kernel takes MXCSR only with SSE or AVX state that is not the initial one.
            self.xsave.materialize(component::SSE);
        }
        let shadow = &mut self.engine.native.shadows[index];
        if shadow.vector != self.xsave.0 {
            shadow.space.set_vector_state(&self.xsave.0).map_err(|e| failed(&e))?;
        }
        Ok(())
    }

    pub(super) fn take_vector_state(&mut self, index: usize) -> Result<(), Stop> {
        let area = &mut self.xsave.0;
        let shadow = &mut self.engine.native.shadows[index];
        shadow.space.vector_state(area).map_err(|e| failed(&e))?;
        area[UNUSED].fill(0);
        self.xsave.put(HEADER + 8, &[0; 56]);
        let used = self.xsave.in_use() & layout().native;
        self.xsave.put(HEADER, &used.to_le_bytes());
        shadow.vector.clear();
        shadow.vector.extend_from_slice(&self.xsave.0);
        Ok(())
    }
}
