//! Runs cases in a vCPU of the translator: CPL 3 code in a guest whose memory is laid out as the native child's.

use std::sync::Arc;
use std::time::Duration;

use arch::Segment;
use arch::registers::pte;
use engine::Engine;
use memory::Ram;
use translator::Translator;
use translator::native::Mode;

use crate::bare::{Bare, DIRECT, End, Gate, Machine, SCRATCH, STUBS};
use crate::case::{Input, Outcome, Status, TRACE, XSAVE_SIZE};
use crate::layout::*;
use crate::local;

/// The engine under test: the translator, or what `RINGER_ENGINE` names.
pub fn engine(ram: &Ram, cpus: u32) -> Arc<dyn Engine> {
    let name = std::env::var("RINGER_ENGINE");
    crate::engines::named(name.as_deref().unwrap_or("translate"), ram, cpus)
}

/// The guest side: reusable for any number of batches.
pub struct Guest {
    machine: Machine,
    /// The engine, where it is a translator of a certain kind.
    translator: Option<Arc<Translator>>,
    template: Vec<u8>,
    code: u64,
    /// The slot of the case that was loaded alone.
    alone: Option<usize>,
    writable: [u64; 3],
    outcome: Box<Outcome>,
    /// What the engine said when a case ended in no exception.
    pub note: String,
}

/// The single-step handler's variables, in the guest's scratch page: steps taken, most to be taken, what is recorded.
const STEPS: u64 = SCRATCH;
const LIMIT: u64 = SCRATCH + 8;
const RECORDS: u64 = SCRATCH + 0x100;
/// The local descriptor table of segmented cases, and a selector for it, which nothing looks up.
const LDT: u64 = SCRATCH + 0x800;
const LDT_SELECTOR: u16 = 0x50;
/// Where its code is: after the stubs.
const STEP_HANDLER: u64 = STUBS + 0x1800;

/// What cases run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// The engine under test.
    Named,
    /// The translator, and directly wherever that is possible.
    Directly,
    /// The translator, where all code looks at its bytes itself.
    Checked,
}

impl Guest {
    pub fn new(template: Vec<u8>, how: How) -> Self {
        let mut bare = Bare::new(16 << 20);
        let code = bare.pages((CODE_SIZE / PAGE) as u64);
        bare.write(code, &vec![0xcc; CODE_SIZE]);
        for i in 0..(CODE_SIZE / PAGE) as u64 {
            bare.map(CODE + i * PAGE as u64, code + i * PAGE as u64, pte::P | pte::W | pte::U);
        }
        let data = pte::P | pte::U | pte::NX;
        let writable = WRITABLE.map(|va| {
            let gpa = bare.page();
            bare.map(va, gpa, data | pte::W);
            gpa
        });
        let read_only = bare.page();
        bare.write(read_only, &template[..PAGE]);
        bare.map(READ_ONLY, read_only, data);
        bare.write(LDT, &local::table());
        step_handler(&mut bare);
        // SAFETY: plain data; all-zero bytes are valid values.
        let outcome = unsafe { Box::<Outcome>::new_zeroed().assume_init() };
        let translator = match how {
            How::Named => None,
            How::Directly => Some(crate::engines::translator(&bare.ram, 1, Mode::Always)),
            How::Checked => Some(crate::engines::checked(&bare.ram, 1)),
        };
        let machine = match &translator {
            Some(translator) => Machine::on(translator.clone(), bare, 1),
            None => Machine::new(bare, 1),
        };
        Guest { machine, translator, template, code, alone: None, writable, outcome, note: String::new() }
    }

    /// Puts the code of a batch into its slots.
    pub fn load(&mut self, inputs: &[Input]) {
        let mut bytes = vec![0xcc; CODE_SIZE];
        for input in inputs {
            let slot = input.slot as usize;
            let at = (slot_address(slot) - CODE) as usize;
            bytes[at..at + slot_size(slot)].copy_from_slice(&input.code[..slot_size(slot)]);
        }
        self.machine.bare.write(self.code, &bytes);
    }

    /// The same for one case: all other slots hold INT3.
    pub fn load_alone(&mut self, input: &Input) {
        let slots = [self.alone.replace(input.slot as usize), Some(input.slot as usize)];
        for slot in slots.into_iter().flatten() {
            let at = self.code + slot_address(slot) - CODE;
            if slot == input.slot as usize {
                self.machine.bare.write(at, &input.code[..slot_size(slot)]);
            } else {
                self.machine.bare.write(at, &vec![0xcc; slot_size(slot)]);
            }
        }
    }

    /// Runs a case of the batch that was loaded.
    pub fn run(&mut self, input: &Input) -> &Outcome {
        let out = &mut *self.outcome;
        let bare = &self.machine.bare;
        input.fill_memory(&self.template, &mut out.memory);
        for (i, gpa) in self.writable.iter().enumerate() {
            bare.write(*gpa, &out.memory[i * PAGE..][..PAGE]);
        }
        bare.write_u64(STEPS, 0);
        bare.write_u64(LIMIT, input.steps.into());
        let bits = if input.selectors[0] == USER_CODE64 { 64 } else { 32 };
        let mut state = bare.user_state(input.rip, 0, bits);
        if let Some(code) = local::segment(input.selectors[0]) {
            state.segments[1] = code;
            state.segments[2] = segment(input.selectors[1]);
            state.ldtr =
                Segment { base: DIRECT + LDT, limit: local::LIMIT, attributes: Segment::P | 2, selector: LDT_SELECTOR };
        }
        state.gpr = input.gpr;
        state.rflags = input.rflags;
        state.xsave = input.xsave.to_vec();
        for (index, selector) in
            [(3, input.selectors[2]), (0, input.selectors[3]), (4, input.selectors[4]), (5, input.selectors[5])]
        {
            state.segments[index] = segment(selector);
        }
        state.segments[4].base = input.fs_base;
        state.segments[5].base = input.gs_base;
        self.machine.vcpus[0].set_state(&state).expect("a valid state");
        let end = self.machine.run_for(Duration::from_secs(3));
        self.take(input, end)
    }

    /// How often the cases' code was entered directly.
    pub fn entered_directly(&self) -> u64 {
        self.translator.as_ref().map_or(0, |engine| engine.entered_directly())
    }

    /// The outcome of the case that ran last.
    pub fn last(&self) -> &Outcome {
        &self.outcome
    }

    fn take(&mut self, input: &Input, end: End) -> &Outcome {
        let out = &mut *self.outcome;
        out.status = match end {
            End::Exit => Status::Exception,
            End::Timeout => Status::Hung,
            _ => Status::Died,
        };
        self.note = if end == End::Exit { String::new() } else { format!("{end:?}") };
        let state = self.machine.state();
        if out.status != Status::Exception {
            return out;
        }
        let frame = self.machine.frame_of(&state);
        out.gpr = state.gpr;
        out.gpr[4] = frame.rsp;
        out.rip = frame.rip;
        out.rflags = frame.rflags;
        out.vector = frame.vector as u8;
        out.error = frame.error as u32;
        out.cr2 = state.cr2;
        out.fs_base = state.segments[4].base;
        out.gs_base = state.segments[5].base;
        out.selectors = [frame.cs as u16, frame.ss as u16, 0, 0, 0, 0];
        for (to, from) in [(2, 3), (3, 0), (4, 4), (5, 5)] {
            out.selectors[to] = state.segments[from].selector;
        }
        let len = XSAVE_SIZE.min(state.xsave.len());
        out.xsave[..len].copy_from_slice(&state.xsave[..len]);
        let bare = &self.machine.bare;
        out.steps = bare.read_u64(STEPS) as u32;
        for i in 0..TRACE.min(out.steps as usize) {
            out.trace[i] = bare.read_u64(RECORDS + 8 * i as u64);
        }
        for (i, gpa) in self.writable.iter().enumerate() {
            bare.read(*gpa, &mut out.memory[i * PAGE..][..PAGE]);
        }
        let slot = input.slot as usize;
        out.code.fill(0xcc);
        bare.read(self.code + slot_address(slot) - CODE, &mut out.code[..slot_size(slot)]);
        out
    }
}

fn segment(selector: u16) -> Segment {
    match selector {
        0 => Segment::default(),
        _ => local::segment(selector).unwrap_or_else(|| Segment::flat_data(selector, 3)),
    }
}

/// The #DB handler: records a step and resumes while there are steps to take, else goes to the stub.
fn step_handler(bare: &mut Bare) {
    use iced_x86::code_asm::*;
    let va = bare.kernel_code(STEP_HANDLER, |a| {
        let mut stop = a.create_label();
        a.push(rax)?;
        a.push(rcx)?;
        a.push(rdx)?;
        a.mov(rdx, DIRECT + STEPS)?;
        a.mov(rcx, qword_ptr(rdx))?;
        a.cmp(rcx, qword_ptr(rdx + (LIMIT - STEPS) as i32))?;
        a.jae(stop)?;
        a.inc(qword_ptr(rdx))?;
        a.lea(rdx, qword_ptr(rdx + rcx * 8 + (RECORDS - STEPS) as i32))?;
        // The frame: rdx, rcx, rax, rip, cs, rflags, rsp. See native::trace_word.
        a.mov(eax, dword_ptr(rsp + 24))?;
        a.mov(ecx, dword_ptr(rsp + 40))?;
        a.and(ecx, 0xcd5)?;
        a.shl(rcx, 32)?;
        a.or(rax, rcx)?;
        a.movzx(ecx, word_ptr(rsp + 48))?;
        a.shl(rcx, 48)?;
        a.or(rax, rcx)?;
        a.mov(qword_ptr(rdx), rax)?;
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()?;
        a.set_label(&mut stop)?;
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.jmp(DIRECT + STUBS + 16)
    });
    bare.gate(1, va, Gate::default());
}
