//! Guests that are a program and a small kernel: what both see of each other, on an engine that runs programs directly.
//!
//! The program begins at [`USER`] with [`DATA`] and a stack, in the state that a Linux kernel gives to its programs, so that all
//! of it can run directly. SYSCALL calls the kernel's function whose number is in EDI; functions may change RAX, RCX, RDX, RSI
//! and R8 to R11. Exceptions stop the machine ([`crate::bare`]), INT3 as well, by which programs end.

use std::sync::Arc;
use std::time::Duration;

use arch::registers::{pte, rflags};
use arch::{CpuState, msr};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use translator::Translator;
use translator::native::Mode;

use crate::bare::*;

pub const USER: u64 = 0x40_0000;
pub const USER_STACK: u64 = 0x50_1000;
/// The program's data: [`DATA_PAGES`] pages that can be written and not executed.
pub const DATA: u64 = 0x60_0000;
pub const DATA_PAGES: u64 = 16;
/// The kernel's functions.
const KERNEL: u64 = CODE + 0x1000;
const STAR: u64 = (KERNEL_CODE as u64) << 32 | (USER_CODE32 as u64) << 48;
const MASK: u64 = rflags::IF | rflags::AC | rflags::TF | rflags::DF | rflags::NT;

pub type Code<'a> = &'a dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// A program's memory under construction.
pub struct Program {
    pub bare: Bare,
    /// Where its code is.
    pub code: u64,
    /// Where [`DATA`] is.
    pub data: u64,
    pub state: CpuState,
}

impl Program {
    pub fn new(user: Code) -> Self {
        let mut bare = Bare::new(8 << 20);
        let (code, stack, data) = (bare.page(), bare.page(), bare.pages(DATA_PAGES));
        bare.map(USER, code, pte::P | pte::U);
        bare.assemble(code, USER, 64, user);
        let rights = pte::P | pte::U | pte::W | pte::NX;
        bare.map(USER_STACK - 4096, stack, rights);
        for page in 0..DATA_PAGES {
            bare.map(DATA + page * 4096, data + page * 4096, rights);
        }
        let mut state = bare.user_state(USER, USER_STACK, 64);
        state.msrs.extend([(msr::STAR, STAR), (msr::LSTAR, DIRECT + KERNEL), (msr::SFMASK, MASK)]);
        Program { bare, code, data, state }
    }

    /// Gives the kernel its functions.
    pub fn kernel(self, functions: &[Code]) -> Self {
        self.bare.kernel_code(KERNEL, |a| {
            a.mov(r8, rcx)?;
            a.mov(r9, r11)?;
            let mut end = a.create_label();
            for (number, function) in (0..).zip(functions) {
                let mut next = a.create_label();
                a.cmp(edi, number)?;
                a.jne(next)?;
                function(a)?;
                a.jmp(end)?;
                a.set_label(&mut next)?;
                a.nop()?;
            }
            a.ud2()?;
            a.set_label(&mut end)?;
            a.mov(rcx, r8)?;
            a.mov(r11, r9)?;
            a.sysretq()
        });
        self
    }

    /// The address at which the kernel has the entry of a page's lowest level.
    pub fn entry(&mut self, va: u64) -> u64 {
        DIRECT + self.bare.entry(va, 0)
    }

    /// The engine under test: the translator with direct execution, or what `RINGER_ENGINE` names.
    pub fn machine(self, cpus: u32) -> (Machine, Option<Arc<Translator>>) {
        let direct = match std::env::var("RINGER_ENGINE") {
            Ok(name) if name != "direct" => None,
            _ => Some(crate::engines::translator(&self.bare.ram, cpus, Mode::Always)),
        };
        let mut machine = match &direct {
            Some(engine) => Machine::on(engine.clone(), self.bare, cpus),
            None => Machine::new(self.bare, cpus),
        };
        machine.vcpus[0].set_state(&self.state).expect("a valid state");
        (machine, direct)
    }

    /// Runs it until an exception stops it. It must have been entered directly `least` times.
    pub fn run(self, least: u64) -> Machine {
        let (mut machine, direct) = self.machine(1);
        assert_eq!(machine.run_for(Duration::from_secs(20)), End::Exit);
        assert_direct(direct.as_deref(), least);
        machine
    }

    /// The same for a program that ends with INT3.
    pub fn run_to_end(self, least: u64) -> Machine {
        let machine = self.run(least);
        let frame = machine.frame();
        assert_eq!(frame.vector, 3, "{frame:x?}, CR2 {:x}", machine.state().cr2);
        machine
    }
}

/// A test of direct execution proves nothing without any.
pub fn assert_direct(engine: Option<&Translator>, least: u64) {
    if let Some(engine) = engine {
        let entered = engine.entered_directly();
        assert!(entered >= least, "entered directly {entered} times instead of {least}: can this host do it at all?");
    }
}

/// A call of the kernel's function.
pub fn call(a: &mut CodeAssembler, number: u32) -> Result<(), IcedError> {
    a.mov(edi, number)?;
    a.syscall()
}
