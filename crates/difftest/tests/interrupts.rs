//! Interrupts of the local APIC, NMIs, priorities, shadows, HLT and the timer.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use arch::msr;
use arch::registers::rflags;
use difftest::bare::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use memory::vm_memory::{Bytes, GuestAddress};

const HANDLER: u64 = CODE + 0x1000;
const COUNT: u64 = DIRECT + SCRATCH;
const K: u64 = DIRECT + CODE;

/// MSRs of the x2APIC.
const EOI: u32 = 0x80b;
const SPURIOUS: u32 = 0x80f;
const COMMAND: u32 = 0x830;
const TIMER: u32 = 0x832;
const SELF_IPI: u32 = 0x83f;

fn wrmsr(a: &mut CodeAssembler, register: u32, value: u64) -> Result<(), IcedError> {
    a.mov(ecx, register)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

/// A counter in guest memory that the guest writes meanwhile.
fn word(ram: &memory::Ram, at: u64) -> u64 {
    ram.view().load(GuestAddress(at), Ordering::SeqCst).expect("an address in RAM")
}

/// Turns the x2APIC on.
fn enable(a: &mut CodeAssembler) -> Result<(), IcedError> {
    wrmsr(a, msr::APIC_BASE, 0xfee0_0d00)?;
    wrmsr(a, SPURIOUS, 0x1ff)
}

/// A guest whose vector 0x40 counts at [`COUNT`], notes its RIP behind it, acknowledges and returns.
fn guest(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Machine {
    let mut bare = Bare::new(4 << 20);
    let handler = bare.kernel_code(HANDLER, |a| {
        a.push(rax)?;
        a.push(rcx)?;
        a.push(rdx)?;
        a.mov(rdx, COUNT)?;
        a.inc(qword_ptr(rdx))?;
        a.mov(rax, qword_ptr(rsp + 24))?;
        a.mov(qword_ptr(rdx + 8), rax)?;
        wrmsr(a, EOI, 0)?;
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()
    });
    bare.gate(0x40, handler, Gate::default());
    let rip = bare.kernel_code(CODE, write);
    let state = bare.kernel_state(rip);
    Machine::with_state(bare, &state)
}

/// How often the handler ran, and where it interrupted last.
fn taken(m: &mut Machine) -> (u64, u64) {
    assert_eq!(m.run(), End::Exit);
    assert_eq!(m.frame().vector, 3, "{:x?}", m.frame());
    (m.bare.read_u64(SCRATCH), m.bare.read_u64(SCRATCH + 8))
}

#[test]
fn a_self_ipi_waits_for_sti_and_for_the_instruction_after_it() {
    let mut nop = 0;
    let mut m = guest(|a| {
        enable(a)?;
        wrmsr(a, SELF_IPI, 0x40)?;
        a.mov(rbx, COUNT)?;
        a.mov(rsi, qword_ptr(rbx))?;
        a.sti()?;
        a.mov(rdi, qword_ptr(rbx))?; // in the shadow of STI
        a.mov(rbp, qword_ptr(rbx))?;
        nop = a.instructions().len();
        a.int3()
    });
    let (count, _) = taken(&mut m);
    let state = m.state();
    assert_eq!(count, 1);
    assert_eq!((state.gpr[6], state.gpr[7], state.gpr[5]), (0, 0, 1));
    assert!(nop > 0);
}

#[test]
fn a_deadline_in_the_past_interrupts_before_the_next_instruction() {
    let mut m = guest(|a| {
        enable(a)?;
        wrmsr(a, TIMER, 0x4_0040)?; // TSC deadline, vector 0x40
        a.mov(rbx, COUNT)?;
        a.sti()?;
        a.nop()?;
        wrmsr(a, msr::TSC_DEADLINE, 1)?;
        a.mov(rsi, qword_ptr(rbx))?;
        wrmsr(a, msr::TSC_DEADLINE, 1)?;
        a.mov(rdi, qword_ptr(rbx))?;
        a.int3()
    });
    assert_eq!(taken(&mut m).0, 2);
    assert_eq!((m.state().gpr[6], m.state().gpr[7]), (1, 2));
}

#[test]
fn interrupts_that_are_masked_by_the_task_priority_wait() {
    let mut m = guest(|a| {
        enable(a)?;
        a.sti()?;
        a.mov(eax, 5)?;
        a.mov(cr8, rax)?;
        wrmsr(a, SELF_IPI, 0x40)?;
        a.nop()?;
        a.nop()?;
        a.mov(rbx, COUNT)?;
        a.mov(rsi, qword_ptr(rbx))?;
        a.xor(eax, eax)?;
        a.mov(cr8, rax)?;
        a.nop()?;
        a.mov(rdi, qword_ptr(rbx))?;
        a.int3()
    });
    assert_eq!(taken(&mut m).0, 1);
    assert_eq!((m.state().gpr[6], m.state().gpr[7]), (0, 1));
}

#[test]
fn hlt_sleeps_until_the_tsc_deadline() {
    let mut m = guest(|a| {
        enable(a)?;
        wrmsr(a, TIMER, 0x4_0040)?; // TSC deadline, vector 0x40
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.mov(rbx, rax)?;
        a.add(rax, 20_000_000)?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 32)?;
        a.mov(ecx, msr::TSC_DEADLINE)?;
        a.wrmsr()?;
        a.sti()?;
        a.hlt()?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.sub(rax, rbx)?;
        a.int3()
    });
    assert_eq!(taken(&mut m).0, 1);
    let cycles = m.state().gpr[0];
    assert!((20_000_000..2_000_000_000).contains(&cycles), "{cycles}");
}

#[test]
fn a_loop_without_calls_or_exits_is_interrupted() {
    let mut m = guest(|a| {
        enable(a)?;
        wrmsr(a, TIMER, 0x4_0040)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.add(rax, 5_000_000)?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 32)?;
        a.mov(ecx, msr::TSC_DEADLINE)?;
        a.wrmsr()?;
        a.mov(rbx, COUNT)?;
        a.sti()?;
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.cmp(qword_ptr(rbx), 0)?;
        a.je(top)?;
        a.int3()
    });
    assert_eq!(taken(&mut m).0, 1);
}

#[test]
fn nmis_wait_for_iret_while_one_is_handled() {
    let mut bare = Bare::new(4 << 20);
    let handler = bare.kernel_code(HANDLER, |a| {
        let mut done = a.create_label();
        a.mov(rdx, COUNT)?;
        a.inc(qword_ptr(rdx))?;
        a.cmp(qword_ptr(rdx), 1)?;
        a.jne(done)?;
        // A second NMI while the first is handled.
        wrmsr(a, COMMAND, 0x400)?;
        a.nop()?;
        a.mov(rdx, COUNT)?;
        a.mov(rsi, qword_ptr(rdx))?;
        a.set_label(&mut done)?;
        a.iretq()
    });
    bare.gate(2, handler, Gate { ist: 1, ..Gate::default() });
    let rip = bare.kernel_code(CODE, |a| {
        enable(a)?;
        wrmsr(a, COMMAND, 0x400)?; // NMI to processor 0
        a.nop()?;
        a.nop()?;
        a.int3()
    });
    let state = bare.kernel_state(rip);
    let mut m = Machine::with_state(bare, &state);
    assert_eq!(m.run(), End::Exit);
    assert_eq!((m.bare.read_u64(SCRATCH), m.state().gpr[6]), (2, 1));
}

#[test]
fn an_nmi_from_outside_wakes_a_halted_processor() {
    let bare = Bare::new(4 << 20);
    let rip = bare.kernel_code(CODE, |a| {
        a.hlt()?;
        a.int3()
    });
    let state = bare.kernel_state(rip);
    let mut m = Machine::with_state(bare, &state);
    let interrupts = m.engine.interrupts();
    let sender = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        interrupts.send_nmi(0);
    });
    assert_eq!(m.run(), End::Exit);
    sender.join().expect("the sender");
    assert_eq!((m.frame().vector, m.frame().rip), (2, K + 1));
}

#[test]
fn an_msi_arrives_at_the_vector_and_processor_it_names() {
    let mut m = guest(|a| {
        enable(a)?;
        a.sti()?;
        a.hlt()?;
        a.int3()
    });
    let interrupts = m.engine.interrupts();
    let sender = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        interrupts.send_msi(0xfee0_0000, 0x40);
    });
    assert_eq!(taken(&mut m).0, 1);
    sender.join().expect("the sender");
}

#[test]
fn each_message_of_a_source_arrives_also_after_it_has_changed() {
    const TIMES: u64 = 12;
    const LAST: u64 = COUNT + 64;
    // Vectors 0x40, 0x41 and 0x40 again; the handlers count for all of them.
    let mut m = guest(|a| {
        enable(a)?;
        a.mov(rbx, COUNT)?;
        a.mov(qword_ptr(rbx + 128), 1)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        a.cmp(qword_ptr(rbx), (2 * TIMES) as i32)?;
        a.jb(again)?;
        a.cmp(qword_ptr(rbx + 64), TIMES as i32)?;
        a.jb(again)?;
        a.int3()
    });
    let other = m.bare.kernel_code(HANDLER + 0x100, |a| {
        a.push(rax)?;
        a.push(rcx)?;
        a.push(rdx)?;
        a.mov(rdx, LAST)?;
        a.inc(qword_ptr(rdx))?;
        wrmsr(a, EOI, 0)?;
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()
    });
    m.bare.gate(0x41, other, Gate::default());
    let (interrupts, ram) = (m.engine.interrupts(), m.bare.ram.clone());
    let sender = std::thread::spawn(move || {
        let source = interrupts.message_source();
        let counts = || [SCRATCH, SCRATCH + 64].map(|at| word(&ram, at));
        let wait = |until: &dyn Fn() -> bool| {
            let begin = Instant::now();
            while !until() && begin.elapsed() < Duration::from_secs(20) {
                std::thread::sleep(Duration::from_micros(200));
            }
        };
        wait(&|| word(&ram, SCRATCH + 128) != 0);
        for (vector, expected) in [(0x40u32, [TIMES, 0]), (0x41, [TIMES, TIMES]), (0x40, [2 * TIMES, TIMES])] {
            for left in (0..TIMES).rev() {
                match &source {
                    Some(source) => source.send(0xfee0_0000, vector),
                    None => interrupts.send_msi(0xfee0_0000, vector),
                }
                wait(&|| counts().iter().sum::<u64>() + left >= expected.iter().sum());
            }
        }
        counts()
    });
    let end = m.run();
    assert_eq!(sender.join().expect("the sender"), [2 * TIMES, TIMES]);
    assert_eq!((end, m.frame().vector), (End::Exit, 3));
}

#[test]
fn the_8259s_output_is_what_lint0_says() {
    const READY: i32 = 128;
    // A fixed interrupt first, then an NMI; both count.
    let mut m = guest(|a| {
        enable(a)?;
        a.mov(rbx, COUNT)?;
        a.sti()?;
        for (step, entry) in [(1, 0x40), (2, 0x400)] {
            wrmsr(a, 0x835, entry)?;
            a.mov(qword_ptr(rbx + READY), step)?;
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(qword_ptr(rbx), step)?;
            a.jb(wait)?;
        }
        wrmsr(a, 0x835, 0x1_0000)?;
        a.int3()
    });
    let nmi = m.bare.kernel_code(HANDLER + 0x100, |a| {
        a.push(rdx)?;
        a.mov(rdx, COUNT)?;
        a.inc(qword_ptr(rdx))?;
        a.pop(rdx)?;
        a.iretq()
    });
    m.bare.gate(2, nmi, Gate::default());
    let (interrupts, ram) = (m.engine.interrupts(), m.bare.ram.clone());
    let output = std::thread::spawn(move || {
        let begin = Instant::now();
        for step in [1, 2] {
            while word(&ram, SCRATCH + READY as u64) < step && begin.elapsed() < Duration::from_secs(60) {
                std::thread::sleep(Duration::from_micros(200));
            }
            interrupts.set_pic_output(true);
            while word(&ram, SCRATCH) < step && begin.elapsed() < Duration::from_secs(60) {
                std::thread::sleep(Duration::from_micros(200));
            }
            interrupts.set_pic_output(false);
        }
    });
    assert_eq!(taken(&mut m).0, 2);
    output.join().expect("the 8259");
}

#[test]
fn higher_vectors_go_first_and_interrupt_lower_ones() {
    // Vector 0x31 is in service when 0x41 comes; 0x32 of the same class has to wait for its end.
    let mut bare = Bare::new(4 << 20);
    for (i, vector) in [0x31u8, 0x32, 0x41].into_iter().enumerate() {
        let handler = bare.kernel_code(HANDLER + 0x100 * i as u64, |a| {
            a.mov(al, u32::from(vector))?;
            a.out(u32::from(CONSOLE), al)?;
            if vector == 0x31 {
                wrmsr(a, SELF_IPI, 0x32)?;
                wrmsr(a, SELF_IPI, 0x41)?;
                a.sti()?;
                a.nop()?;
                a.nop()?;
                a.cli()?;
                a.mov(al, 0x2e)?;
                a.out(u32::from(CONSOLE), al)?;
            }
            wrmsr(a, EOI, 0)?;
            a.iretq()
        });
        bare.gate(vector, handler, Gate::default());
    }
    let rip = bare.kernel_code(CODE, |a| {
        enable(a)?;
        wrmsr(a, SELF_IPI, 0x31)?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        a.int3()
    });
    let state = bare.kernel_state(rip);
    let mut m = Machine::with_state(bare, &state);
    assert_eq!(m.run(), End::Exit);
    assert_eq!(m.port.text(), "1A.2");
}

#[test]
fn the_saved_flags_of_an_interrupt_are_those_of_the_interrupted_code() {
    let bare = Bare::new(4 << 20);
    let rip = bare.kernel_code(CODE, |a| {
        enable(a)?;
        wrmsr(a, SELF_IPI, 0x55)?; // to the stub
        a.xor(eax, eax)?;
        a.stc()?;
        a.sti()?;
        a.nop()?;
        a.nop()
    });
    let state = bare.kernel_state(rip);
    let mut m = Machine::with_state(bare, &state);
    assert_eq!(m.run(), End::Exit);
    let frame = m.frame();
    assert_eq!(frame.vector, 0x55);
    assert_eq!(frame.rflags, rflags::FIXED | rflags::IF | rflags::CF | rflags::ZF | rflags::PF);
    assert_eq!(m.state().rflags & rflags::IF, 0);
}

#[test]
fn a_popf_that_enables_interrupts_takes_a_pending_one_before_the_next_instruction() {
    let mut m = guest(|a| {
        enable(a)?;
        wrmsr(a, SELF_IPI, 0x40)?;
        a.mov(rbx, COUNT)?;
        a.push((rflags::FIXED | rflags::IF) as i32)?;
        a.popfq()?;
        a.mov(rdi, qword_ptr(rbx))?;
        a.int3()
    });
    let (count, _) = taken(&mut m);
    assert_eq!((count, m.state().gpr[arch::registers::gpr::RDI]), (1, 1));
}

#[test]
fn flags_that_are_pushed_and_popped_come_back_and_leave_the_others() {
    let system = rflags::DF | rflags::NT | rflags::IOPL | rflags::ID | rflags::IF;
    let all = rflags::FIXED | rflags::ARITHMETIC | system;
    let mut m = guest(|a| {
        a.mov(rbx, COUNT + 64)?;
        for (i, image) in [all, rflags::FIXED, all & !rflags::CF, rflags::FIXED | rflags::OF].into_iter().enumerate() {
            a.push(image as i32)?;
            a.popfq()?;
            a.mov(rcx, qword_ptr(rbx))?; // a check of the software TLB
            a.pushfq()?;
            a.cli()?;
            a.pop(qword_ptr(rbx + 8 * i as i32))?;
        }
        a.push(rflags::FIXED as i32)?;
        a.popfq()?;
        a.int3()
    });
    taken(&mut m);
    let seen: Vec<u64> = (0..4).map(|i| m.bare.read_u64(SCRATCH + 64 + 8 * i)).collect();
    assert_eq!(seen, [all, rflags::FIXED, all & !rflags::CF, rflags::FIXED | rflags::OF]);
}

#[test]
fn a_halt_in_the_shadow_of_sti_is_ended_by_the_interrupt_that_was_pending() {
    let mut m = guest(|a| {
        enable(a)?;
        wrmsr(a, SELF_IPI, 0x40)?;
        a.sti()?;
        a.hlt()?;
        a.int3()
    });
    let (count, rip) = taken(&mut m);
    assert_eq!((count, m.bare.read_u64(CODE + rip - K) & 0xff), (1, 0xcc), "the handler returned behind the HLT");
}

#[test]
fn the_trap_flag_that_popf_sets_traps_after_the_next_instruction() {
    let mut m = guest(|a| {
        a.xor(eax, eax)?;
        a.push((rflags::FIXED | rflags::TF) as i32)?;
        a.popfq()?;
        a.inc(eax)?;
        a.inc(eax)?;
        a.int3()
    });
    assert_eq!(m.run(), End::Exit);
    assert_eq!((m.frame().vector, m.state().gpr[arch::registers::gpr::RAX]), (1, 1));
}
