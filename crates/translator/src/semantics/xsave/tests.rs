//! Against the real processor: the same area, saved and restored natively and by the functions here.

use std::arch::asm;

use super::super::testing::{BASE, read, step, vcpu, write};
use super::*;

/// An area that is aligned as the instructions want it.
#[repr(C, align(64))]
#[derive(Clone)]
struct Area([u8; XSAVE_SIZE]);

/// What the tests save and restore: bits of XCR0.
fn all() -> u64 {
    layout().native
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A standard-format area that XRSTOR accepts.
    fn area(&mut self) -> Area {
        let mut area = Area([0; XSAVE_SIZE]);
        area.0.iter_mut().for_each(|b| *b = self.next() as u8);
        area.0[HEADER..EXTENDED].fill(0);
        let present = self.next() & all();
        area.0[HEADER..HEADER + 8].copy_from_slice(&present.to_le_bytes());
        let mxcsr = if self.next() & 1 == 0 { MXCSR_INIT } else { self.next() as u32 & layout().mxcsr_mask };
        area.0[legacy::MXCSR..legacy::MXCSR + 4].copy_from_slice(&(mxcsr | MXCSR_INIT).to_le_bytes());
        // All exceptions masked, so that nothing traps here.
        area.0[0] |= 0x3f;
        area
    }
}

/// One function for each native instruction, between loading `before` and saving everything to `after`.
macro_rules! native {
    ($name:ident, $insn:literal) => {
        fn $name(before: &Area, mask: u64, area: &mut Area, after: &mut Area) {
            // SAFETY: three areas of 4 KiB, and the host's own state comes back at the end.
            unsafe {
                let mut own = Area([0; XSAVE_SIZE]);
                asm!(
                    "xor edx, edx",
                    "mov eax, {all:e}",
                    "xsave64 [{own}]",
                    "mov eax, {all:e}",
                    "xrstor64 [{before}]",
                    "mov eax, {mask:e}",
                    $insn,
                    "mov eax, {all:e}",
                    "xsave64 [{after}]",
                    "xrstor64 [{own}]",
                    own = in(reg) own.0.as_mut_ptr(),
                    before = in(reg) before.0.as_ptr(),
                    all = in(reg) all(),
                    mask = in(reg) mask,
                    area = in(reg) area.0.as_mut_ptr(),
                    after = in(reg) after.0.as_mut_ptr(),
                    out("eax") _, out("edx") _,
                );
            }
        }
    };
}

native!(native_xsave64, "xsave64 [{area}]");
native!(native_xsave, "xsave [{area}]");
native!(native_xsaveopt64, "xsaveopt64 [{area}]");
native!(native_xsavec64, "xsavec64 [{area}]");
native!(native_fxsave64, "fxsave64 [{area}]");
native!(native_fxsave, "fxsave [{area}]");
native!(native_xrstor64, "xrstor64 [{area}]");
native!(native_xrstor, "xrstor [{area}]");
native!(native_fxrstor64, "fxrstor64 [{area}]");
native!(native_fxrstor, "fxrstor [{area}]");
native!(native_fnstenv, "fnstenv [{area}]");
native!(native_fnstenv16, ".byte 0x66; fnstenv [{area}]");
native!(native_fnsave, "fnsave [{area}]");
native!(native_frstor, "frstor [{area}]");
native!(native_fldenv, "fldenv [{area}]");
native!(native_fldenv16, ".byte 0x66; fldenv [{area}]");

type Native = fn(&Area, u64, &mut Area, &mut Area);

/// Whether the state of every component in `after`, a standard-format area, is `state`.
fn same_state(state: &mut XsaveArea, after: &Area) -> Result<(), String> {
    let present = after.0[HEADER..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
    let mut native = XsaveArea(after.0);
    if crate::host_is_amd() && !state.x87_pending() {
        // Nor does the native side show them.
        state.put(legacy::FOP, &[0; legacy::MXCSR - legacy::FOP]);
    }
    for i in (0..8).filter(|i| all() >> i & 1 != 0) {
        // In use or not, a component must have the same contents.
        native.materialize(i);
        state.materialize(i);
        let range = match i {
            0 => 0..legacy::MXCSR,
            1 => legacy::MXCSR..legacy::MXCSR_MASK,
            _ => layout().component(i).offset..layout().component(i).offset + layout().component(i).size,
        };
        let more = match i {
            0 => legacy::ST..legacy::XMM,
            1 => legacy::XMM..legacy::END,
            _ => 0..0,
        };
        for range in [range, more] {
            if native.0[range.clone()] != state.0[range.clone()] {
                let at = range.clone().find(|&b| native.0[b] != state.0[b]).unwrap_or(0);
                return Err(format!("component {i} (XSTATE_BV {present:#x}) differs at {at}"));
            }
        }
    }
    Ok(())
}

fn run(cases: &[(Native, &[u8], bool)]) {
    if !is_x86_feature_detected!("xsavec") {
        return;
    }
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut cpu = vcpu();
    // At level 0 for the compacted forms' sake: nothing else depends on it.
    cpu.gpr[gpr::RBX] = BASE;
    for round in 0..400 {
        for (i, &(native, bytes, loads)) in cases.iter().enumerate() {
            let before = random.area();
            let mask = if round % 5 == 0 { all() } else { random.next() & all() };
            let mut area = random.area();
            if loads && round % 2 == 1 {
                // Compacted, with the components where XSAVEC puts them.
                let source = random.area();
                let mut unused = Area([0; XSAVE_SIZE]);
                let listed = random.next() & all();
                area = Area([0x5a; XSAVE_SIZE]);
                area.0[HEADER..EXTENDED].fill(0);
                area.0[legacy::MXCSR..legacy::MXCSR + 4].copy_from_slice(&MXCSR_INIT.to_le_bytes());
                area.0[0] |= 0x3f;
                native_xsavec64(&source, listed, &mut area, &mut unused);
            }
            cpu.xsave = XsaveArea(before.0);
            // What XRSTOR does to reserved bits and padding on the way in.
            let image = Image { bytes: before.0, ranges: [(0, 0); 12], count: 0 };
            let x87 = before.0[HEADER] & 1 != 0;
            if x87 {
                load_x87(&mut cpu, &image, true);
            }
            write(&mut cpu, BASE, &area.0);
            cpu.gpr[gpr::RAX] = mask & 0xffff_ffff;
            cpu.gpr[gpr::RDX] = 0;
            step(&mut cpu, bytes).expect("mapped memory and a good area");
            let got = read(&cpu, BASE, XSAVE_SIZE);
            // Where the host's kernel switched threads in between, the processor may take a component for used that is in its
            // initial state; so once is chance, but never is a difference.
            let outcome = (0..5).try_fold(String::new(), |_, _| {
                let mut after = Area([0; XSAVE_SIZE]);
                let mut expected = area.clone();
                native(&before, mask, &mut expected, &mut after);
                let compared = match (0..XSAVE_SIZE).find(|&b| got[b] != expected.0[b]) {
                    Some(at) => Err(format!("memory differs at {at}")),
                    None => same_state(&mut cpu.xsave, &after),
                };
                // An agreement ends the attempts.
                compared.map_or_else(Ok, Err)
            });
            if let Ok(difference) = outcome {
                panic!("case {i} round {round} mask {mask:#x}: {difference}");
            }
        }
    }
}

#[test]
fn saves_write_what_the_processor_writes() {
    run(&[
        (native_xsave64, &[0x48, 0x0f, 0xae, 0x23], false),
        (native_xsave, &[0x0f, 0xae, 0x23], false),
        (native_xsaveopt64, &[0x48, 0x0f, 0xae, 0x33], false),
        (native_xsavec64, &[0x48, 0x0f, 0xc7, 0x23], false),
        (native_fxsave64, &[0x48, 0x0f, 0xae, 0x03], false),
        (native_fxsave, &[0x0f, 0xae, 0x03], false),
    ]);
}

#[test]
fn restores_load_what_the_processor_loads() {
    run(&[(native_xrstor64, &[0x48, 0x0f, 0xae, 0x2b], true), (native_xrstor, &[0x0f, 0xae, 0x2b], true)]);
    run(&[(native_fxrstor64, &[0x48, 0x0f, 0xae, 0x0b], false), (native_fxrstor, &[0x0f, 0xae, 0x0b], false)]);
}

#[test]
fn the_x87_environment_is_stored_and_loaded_as_the_processor_does() {
    run(&[
        (native_fnstenv, &[0xd9, 0x33], false),
        (native_fnstenv16, &[0x66, 0xd9, 0x33], false),
        (native_fnsave, &[0xdd, 0x33], false),
        (native_fldenv, &[0xd9, 0x23], false),
        (native_fldenv16, &[0x66, 0xd9, 0x23], false),
        (native_frstor, &[0xdd, 0x23], false),
    ]);
}

/// Executes XRSTOR [rbx] with a header.
fn restore_with(header: [u64; 4], mask: u64) -> Result<(), Stop> {
    let mut cpu = vcpu();
    cpu.gpr[gpr::RBX] = BASE;
    cpu.gpr[gpr::RAX] = mask;
    let mut area = [0; 1024];
    for (i, word) in header.iter().enumerate() {
        area[HEADER + i * 8..HEADER + i * 8 + 8].copy_from_slice(&word.to_le_bytes());
    }
    write(&mut cpu, BASE, &area);
    step(&mut cpu, &[0x0f, 0xae, 0x2b])
}

#[test]
fn xrstor_checks_its_header() {
    let refused = Err(Stop::Fault(Exception::general_protection(0)));
    assert_eq!(restore_with([7, 0, 0, 0], 7), Ok(()));
    assert_eq!(restore_with([1 << 20, 0, 0, 0], 7), refused);
    assert_eq!(restore_with([0, 1, 0, 0], 7), refused);
    assert_eq!(restore_with([0, 0, 1, 0], 7), refused);
    assert_eq!(restore_with([0, 0, 0, 1], 7), Ok(()));
    assert_eq!(restore_with([3, COMPACTED | 3, 0, 0], 7), Ok(()));
    assert_eq!(restore_with([3, COMPACTED | 1, 0, 0], 7), refused);
    assert_eq!(restore_with([0, COMPACTED | 1 << 20, 0, 0], 7), refused);
    assert_eq!(restore_with([3, COMPACTED | 3, 0, 1], 7), refused);
}

#[test]
fn areas_must_be_aligned_and_state_enabled() {
    let mut cpu = vcpu();
    let refused = Err(Stop::Fault(Exception::general_protection(0)));
    let undefined = Err(Stop::Fault(Exception::invalid_opcode()));
    let absent = Err(Stop::Fault(Exception::device_not_available()));
    let (xsave, fxsave, xsaves): (&[u8], &[u8], &[u8]) =
        (&[0x0f, 0xae, 0x23], &[0x0f, 0xae, 0x03], &[0x0f, 0xc7, 0x2b]);
    cpu.gpr[gpr::RBX] = BASE + 8;
    assert_eq!(step(&mut cpu, xsave), refused);
    assert_eq!(step(&mut cpu, fxsave), refused);
    cpu.gpr[gpr::RBX] = BASE + 16;
    assert_eq!(step(&mut cpu, xsave), refused);
    assert_eq!(step(&mut cpu, fxsave), Ok(()));
    assert_eq!(step(&mut cpu, xsaves), refused, "CPL 3");
    cpu.cr0 |= cr0::TS;
    assert_eq!(step(&mut cpu, xsave), absent);
    assert_eq!(step(&mut cpu, fxsave), absent);
    cpu.cr4 &= !cr4::OSXSAVE;
    assert_eq!(step(&mut cpu, xsave), undefined);
}

#[test]
fn a_reserved_bit_of_mxcsr_changes_nothing() {
    let mut cpu = vcpu();
    cpu.gpr[gpr::RBX] = BASE;
    cpu.gpr[gpr::RAX] = 7;
    let mut area = [0xff; 1024];
    area[HEADER..EXTENDED].fill(0);
    area[HEADER] = 3;
    write(&mut cpu, BASE, &area);
    let refused = Err(Stop::Fault(Exception::general_protection(0)));
    assert_eq!(step(&mut cpu, &[0x0f, 0xae, 0x2b]), refused);
    assert_eq!(step(&mut cpu, &[0x0f, 0xae, 0x0b]), refused);
    assert_eq!((cpu.xsave.in_use(), cpu.xsave.mxcsr()), (0, MXCSR_INIT));
}
