//! The state an instruction starts from: registers with edge-case values, but such that memory operands reach an address
//! chosen for what is to happen there (aligned, misaligned, page-crossing, read-only, unmapped, non-canonical).

use arch::registers::rflags;
use iced_x86::{ConstantOffsets, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use super::values;
use crate::case::Input;
use crate::layout::*;
use crate::local;
use crate::rng::Rng;

/// Selectors to load: the user's own, null, beyond the table, of the kernel, in the (absent) local table.
pub const SELECTORS: [u16; 14] = [0x2b, 0x33, 0x23, 0, 3, 0x28, 0x2a, 0x10, 0x18, 0x1b, 0x50, 0xfff8, 0x2f, 0x8b];

/// A selector to load, of the local table only where there is one.
fn any_selector(rng: &mut Rng, input: &Input) -> u16 {
    if input.selectors[0] & 4 != 0 && rng.one_in(2) { rng.pick(&local::SELECTORS) } else { rng.pick(&SELECTORS) }
}

/// An input with nothing random in it yet.
pub fn blank() -> Box<Input> {
    let mut input = Box::new(Input {
        xsave: [0; crate::case::XSAVE_SIZE],
        gpr: [0; 16],
        rip: 0,
        rflags: rflags::FIXED | rflags::IF,
        fs_base: 0,
        gs_base: 0,
        selectors: [USER_CODE64, USER_DATA, 0, 0, 0, 0],
        steps: 0,
        slot: 0,
        code: [0xcc; SLOT_SIZE],
        template: 0,
        overlays: Default::default(),
        overlay_bytes: [0; crate::case::OVERLAY_BYTES],
    });
    input.xsave[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
    input.xsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    input.xsave[512..520].copy_from_slice(&crate::case::XSAVE_COMPONENTS.to_le_bytes());
    input
}

/// Random registers, flags, vectors and memory.
pub fn randomize(rng: &mut Rng, input: &mut Input, bits: u32) {
    for r in &mut input.gpr {
        *r = values::integer(rng);
    }
    input.gpr[4] = data_address(rng) & !7;
    input.rflags |= rng.next_u64() & rflags::ARITHMETIC;
    if rng.one_in(8) {
        input.rflags |= rflags::DF;
    }
    if rng.one_in(24) {
        input.rflags |= rflags::AC;
    }
    if rng.one_in(24) {
        input.rflags |= rflags::TF;
    }
    if rng.one_in(64) {
        input.rflags |= rflags::RF;
    }
    if bits == 64 {
        // Both below CODE and DATA, so that a positive displacement leads to them.
        input.fs_base = rng.pick(&[0, 0x1000, 0x0fff_f123, 0xffff_8000]) & 0x0fff_ffff;
        input.gs_base = rng.next_u64() & 0x0fff_ffff;
    } else {
        input.selectors =
            [USER_CODE32, USER_DATA, USER_DATA, USER_DATA, rng.pick(&[0, USER_DATA]), rng.pick(&[0, USER_DATA])];
        for r in &mut input.gpr[8..] {
            *r = 0;
        }
        for r in &mut input.gpr {
            *r &= 0xffff_ffff;
        }
    }
    let room = (crate::case::TEMPLATE - MEMORY) as u64;
    input.template = rng.below(room) as u32 & !15;
    vectors(rng, &mut input.xsave);
}

/// Code and data in segments of the local descriptor table.
pub fn use_segments(rng: &mut Rng, input: &mut Input, bits: u32) {
    use local::{BIG, CODE16, CODE32, DATA16, EXPAND_DOWN, LIMITED, READ_ONLY};
    let mut data = || rng.pick(&[DATA16, DATA16, DATA16, BIG, LIMITED, READ_ONLY, EXPAND_DOWN, USER_DATA, 0]);
    let (ds, es, fs, gs) = (data(), data(), data(), data());
    let ss = rng.pick(&[DATA16, DATA16, BIG, LIMITED, EXPAND_DOWN, USER_DATA]);
    input.selectors = [if bits == 16 { CODE16 } else { CODE32 }, ss, ds, es, fs, gs];
    (input.fs_base, input.gs_base) = (local::base(fs), local::base(gs));
    for r in &mut input.gpr[8..] {
        *r = 0;
    }
    for r in &mut input.gpr {
        *r &= 0xffff_ffff;
    }
}

fn vectors(rng: &mut Rng, xsave: &mut [u8]) {
    let control = if rng.one_in(4) { 0x40 | rng.next_u64() as u16 & 0x0f3f } else { 0x37f };
    xsave[0..2].copy_from_slice(&control.to_le_bytes());
    // Status: top of stack and condition codes; pending exceptions seldom, as they keep all x87 instructions from running.
    let mut status = rng.next_u64() as u16 & 0x7f00;
    if rng.one_in(6) {
        status |= rng.next_u64() as u16 & 0x7f;
        if status & !control & 0x3f != 0 {
            status |= 0x8080;
        }
    }
    xsave[2..4].copy_from_slice(&status.to_le_bytes());
    xsave[4] = rng.pick(&[0xff, 0xff, 0, rng.clone().next_u64() as u8]);
    let mut mxcsr = 0x1f80;
    if rng.one_in(4) {
        mxcsr = rng.next_u64() as u32 & 0xffc0 | 0x1f80;
    }
    if rng.one_in(6) {
        mxcsr &= !(rng.next_u64() as u32 & 0x1f80);
    }
    if rng.one_in(6) {
        mxcsr |= rng.next_u64() as u32 & 0x3f;
    }
    xsave[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    for i in 0..8 {
        let value = if rng.one_in(4) {
            let mut v = [0xff; 10]; // an MMX register: exponent all ones
            v[..8].copy_from_slice(&values::integer(rng).to_le_bytes());
            v
        } else {
            values::extended(rng)
        };
        xsave[32 + 16 * i..][..10].copy_from_slice(&value);
    }
    for field in crate::case::vector_fields() {
        values::fill_vector(rng, &mut xsave[field.clone()]);
    }
}

/// An address for a memory operand.
pub fn data_address(rng: &mut Rng) -> u64 {
    let page = PAGE as u64;
    match rng.below(32) {
        0..15 => (DATA + rng.below(2 * page - 128)) & !63,
        15..22 => DATA + rng.below(2 * page - 128),
        22..25 => DATA + page - 1 - rng.below(70), // crosses into a writable page
        25 => DATA + 2 * page - 1 - rng.below(70), // crosses into the read-only one
        26 => DATA + 2 * page + rng.below(page),   // read-only, perhaps crossing into nothing
        27 => DATA + 3 * page - 1 - rng.below(70), // read-only to nothing
        28 => DATA + 4 * page - 1 - rng.below(70), // from nothing into a writable page
        29 => DATA + 5 * page - 1 - rng.below(70), // from a writable page into nothing
        30 => DATA + 4 * page + rng.below(page - 128), // writable
        _ => rng.pick(&[
            0,
            8,
            DATA + 3 * page + 64,
            0x7fff_ffff_efff,
            0x7fff_ffff_fff8,
            0x8000_0000_0000,
            0xffff_7fff_ffff_fff0,
            0x8000_0000_0000_0000,
            0x0123_4567_89ab_cdef,
            // Just below the kernel's half of the address space, and the last bytes of it.
            0x7fff_ffff_fffc,
            0xffff_ffff_ffff_fff0,
        ]),
    }
}

/// Where a general-purpose register lies in [`Input::gpr`].
fn gpr_index(r: Register) -> Option<usize> {
    let full = r.full_register();
    (r.is_gpr() && full != Register::None).then(|| full as usize - Register::RAX as usize)
}

/// XSAVE and its kin, addressed by RAX or RDX, which name the components: those must be ones that the guest has too.
pub fn uses_its_mask_as_address(insn: &Instruction) -> bool {
    use Mnemonic as M;
    let masked = matches!(insn.mnemonic(), M::Xsave | M::Xsave64 | M::Xsavec | M::Xsavec64 | M::Xrstor | M::Xrstor64);
    let registers = [insn.memory_base().full_register(), insn.memory_index().full_register()];
    masked && registers.iter().any(|r| matches!(r, Register::RAX | Register::RDX))
}

/// The value of a register that addresses are made of.
pub fn register_value(input: &Input, register: Register) -> Option<u64> {
    match register {
        Register::FS => Some(input.fs_base),
        Register::GS => Some(input.gs_base),
        r if r.is_segment_register() => Some(segment_base(input, r)),
        r => {
            let value = input.gpr[gpr_index(r)?];
            Some(match r.size() {
                2 => value & 0xffff,
                4 => value & 0xffff_ffff,
                _ => value,
            })
        }
    }
}

/// Chooses register values (and displacements in `code`, where no register is involved) for the instruction's operands.
pub fn solve(
    rng: &mut Rng,
    input: &mut Input,
    insn: &Instruction,
    constants: ConstantOffsets,
    code: &mut [u8],
    bits: u32,
) {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(insn);
    special_operands(rng, input, insn, bits);
    let explicit = (0..insn.op_count()).find(|i| insn.op_kind(*i) == OpKind::Memory);
    // Implicit memory operands: string instructions, the stack, XLAT, MASKMOVDQU.
    for memory in info.used_memory() {
        let same = explicit.is_some() && memory.base() == insn.memory_base() && memory.index() == insn.memory_index();
        if same || memory.access() == OpAccess::NoMemAccess {
            continue;
        }
        let Some(base) = gpr_index(memory.base()) else { continue };
        let segment = segment_base(input, memory.segment());
        let mut target = data_address(rng);
        if base == 4 && !rng.one_in(8) {
            target &= !7;
        }
        input.gpr[base] = target.wrapping_sub(segment).wrapping_sub(if base == 4 { 0 } else { memory.displacement() });
    }
    if explicit.is_some() && !matches!(insn.mnemonic(), Mnemonic::Lea) {
        memory_operand(rng, input, insn, constants, code);
    }
    for i in 0..insn.op_count() {
        if insn.op_kind(i) == OpKind::Register
            && insn.mnemonic() == Mnemonic::Movdir64b
            && i == 0
            && let Some(r) = gpr_index(insn.op_register(0))
        {
            input.gpr[r] = data_address(rng) & !if rng.one_in(8) { 0 } else { 63 };
        }
    }
    if bits != 64 {
        // An address size of 16 bits ignores what is above.
        for r in [insn.memory_base(), insn.memory_index()] {
            if let (Some(i), true) = (gpr_index(r), r.is_gpr16()) {
                input.gpr[i] = input.gpr[i] & 0xffff | rng.next_u64() << 16;
            }
        }
        input.gpr.iter_mut().for_each(|r| *r &= 0xffff_ffff);
        if input.gpr[4] < 64 {
            // A push there reaches beyond 4 GiB on some processors, and Linux takes that page fault for an erratum of others
            // (is_errata100): it returns from it for ever.
            input.gpr[4] = DATA + 64;
        }
    } else if insn.memory_base().is_gpr32() || insn.memory_index().is_gpr32() {
        // An address size of 32 bits ignores what is above.
        for r in [insn.memory_base(), insn.memory_index()] {
            if let Some(r) = gpr_index(r) {
                input.gpr[r] |= rng.next_u64() << 32;
            }
        }
    }
}

fn segment_base(input: &Input, segment: Register) -> u64 {
    let selector = |i: usize| local::base(input.selectors[i]);
    match segment {
        Register::FS => input.fs_base,
        Register::GS => input.gs_base,
        Register::CS => selector(0),
        Register::SS => selector(1),
        Register::ES => selector(3),
        _ => selector(2),
    }
}

fn memory_operand(rng: &mut Rng, input: &mut Input, insn: &Instruction, constants: ConstantOffsets, code: &mut [u8]) {
    let mut target = data_address(rng);
    let size = insn.memory_size().size().clamp(1, 64);
    if rng.one_in(2) {
        target &= !(size as u64 - 1);
    }
    if insn.memory_segment() == Register::CS && local::base(input.selectors[0]) != 0 {
        // Within the case's own slot: the native side has no code in others.
        target = slot_address(input.slot as usize) + rng.below(slot_size(input.slot as usize) as u64 - 64);
    }
    let segment = segment_base(input, insn.memory_segment());
    let wanted = target.wrapping_sub(segment);
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let scale = u64::from(insn.memory_index_scale());
    let displacement = insn.memory_displacement64();
    let mut patch = |value: u64| {
        let (at, len) = (constants.displacement_offset(), constants.displacement_size());
        if len >= 2 && at + len <= code.len() {
            code[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        }
    };
    let base_index = gpr_index(base);
    if index.is_vector_register() {
        vector_index(rng, input, insn);
        match base_index {
            Some(base) => input.gpr[base] = wanted.wrapping_sub(displacement),
            None => patch(wanted),
        }
    } else if insn.is_ip_rel_memory_operand() {
        patch(wanted.wrapping_sub(insn.next_ip()));
    } else {
        let index = gpr_index(index);
        match (base_index, index) {
            (None, None) => patch(wanted),
            (Some(base), None) => input.gpr[base] = wanted.wrapping_sub(displacement),
            (base, Some(index)) => {
                if insn.mnemonic() == Mnemonic::Xlatb {
                    input.gpr[3] = wanted.wrapping_sub(input.gpr[0] & 0xff);
                } else if base == Some(index) {
                    input.gpr[index] = wanted.wrapping_sub(displacement) / (1 + scale);
                } else {
                    // A stack pointer or string pointer that is the index keeps its value.
                    let small = rng.range(-128, 4096) as u64;
                    input.gpr[index] = if rng.one_in(16) { values::integer(rng) } else { small };
                    let offset = input.gpr[index].wrapping_mul(scale);
                    match base {
                        Some(base) => input.gpr[base] = wanted.wrapping_sub(displacement).wrapping_sub(offset),
                        None => patch(wanted.wrapping_sub(offset)),
                    }
                }
            }
        }
    }
    bit_offset(rng, input, insn);
    contents(rng, input, insn, target, size);
}

/// BT and its kin reach as far as their bit offset says: keep it near, mostly.
fn bit_offset(rng: &mut Rng, input: &mut Input, insn: &Instruction) {
    if !matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc) {
        return;
    }
    let register = insn.op_register(1);
    let in_address = register.full_register() == insn.memory_base().full_register()
        || register.full_register() == insn.memory_index().full_register();
    if let (Some(r), false) = (gpr_index(register), in_address) {
        let near = rng.range(-2000, 2000) as u64;
        let keep = if register.is_gpr16() {
            0xffff
        } else if register.is_gpr32() {
            0xffff_ffff
        } else {
            u64::MAX
        };
        input.gpr[r] = input.gpr[r] & !keep | near & keep;
    }
}

/// Small elements in the index register of a gather or scatter.
fn vector_index(rng: &mut Rng, input: &mut Input, insn: &Instruction) {
    let index = insn.memory_index();
    let number = index.number();
    // Elements of 32 bits may be read as 64-bit ones too: what is far away then faults, which is to be tested as well.
    let size = if insn.memory_size().size() == 8 || format!("{:?}", insn.code()).contains("vm64") { 8 } else { 4 };
    let wide = vsib_is_64(insn);
    let size = if wide { 8 } else { size.min(4) };
    let mut bytes = [0; 64];
    values::fill_indices(rng, &mut bytes, size, 400);
    crate::case::set_zmm(&mut input.xsave, number, &bytes);
}

fn vsib_is_64(insn: &Instruction) -> bool {
    use iced_x86::OpCodeOperandKind as K;
    insn.op_code().op_kinds().iter().any(|k| matches!(k, K::mem_vsib64x | K::mem_vsib64y | K::mem_vsib64z))
}

/// Values at the operand's address, where it is writable memory.
fn contents(rng: &mut Rng, input: &mut Input, insn: &Instruction, target: u64, size: usize) {
    match insn.mnemonic() {
        // Images that are valid in part, or these would only ever fault.
        Mnemonic::Xrstor | Mnemonic::Xrstor64 | Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => {
            if let (false, Some(offset)) = (rng.one_in(4), memory_offset(target, 2688)) {
                let mut image = [0; crate::case::XSAVE_SIZE];
                image[..576].copy_from_slice(&blank().xsave[..576]);
                vectors(rng, &mut image);
                image[464..512].fill(0);
                let bv = rng.next_u64() & crate::case::XSAVE_COMPONENTS;
                image[512..520].copy_from_slice(&bv.to_le_bytes());
                if rng.one_in(8) {
                    let at = rng.range(512, 576) as usize;
                    image[at] ^= 1 << rng.below(8);
                }
                input.overlay(offset, &image[..2688]);
            }
        }
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr if !rng.one_in(4) => {
            if let Some(offset) = memory_offset(target, 4) {
                input.overlay(offset, &(rng.next_u64() as u32 & 0xffff).to_le_bytes());
            }
        }
        Mnemonic::Cmpxchg | Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b if rng.one_in(2) => {
            let Some(offset) = memory_offset(target, size) else { return };
            let low = input.gpr[0].to_le_bytes();
            let high = input.gpr[2].to_le_bytes();
            let mut bytes = [0; 16];
            let half = size / 2;
            if insn.mnemonic() == Mnemonic::Cmpxchg {
                bytes[..8].copy_from_slice(&low);
            } else {
                bytes[..half].copy_from_slice(&low[..half]);
                bytes[half..2 * half].copy_from_slice(&high[..half]);
            }
            input.overlay(offset, &bytes[..size]);
        }
        // Far pointers: to selectors that exist.
        Mnemonic::Jmp
        | Mnemonic::Call
        | Mnemonic::Lss
        | Mnemonic::Lds
        | Mnemonic::Les
        | Mnemonic::Lfs
        | Mnemonic::Lgs => {
            let target_rip = if input.selectors[0] & 4 != 0 { 0 } else { CODE } + 0x200 + rng.below(256);
            let mut bytes = [0; 10];
            bytes[..8].copy_from_slice(&target_rip.to_le_bytes());
            let far = size.saturating_sub(2);
            if matches!(size, 4 | 6 | 10) {
                bytes[far..size].copy_from_slice(&any_selector(rng, input).to_le_bytes());
            }
            if let Some(offset) = memory_offset(target, size) {
                input.overlay(offset, &bytes[..size.min(10)]);
            }
        }
        _ if rng.one_in(2) => {
            if let Some(offset) = memory_offset(target, size) {
                let mut bytes = [0; 64];
                values::fill_vector(rng, &mut bytes);
                input.overlay(offset, &bytes[..size]);
            }
        }
        _ => {}
    }
}

/// Instructions that would do nothing of interest with random operands.
fn special_operands(rng: &mut Rng, input: &mut Input, insn: &Instruction, bits: u32) {
    use Mnemonic as M;
    if insn.is_string_instruction() {
        let count = if rng.one_in(8) { rng.below(1500) } else { rng.below(40) };
        input.gpr[1] = count;
        if rng.one_in(2) {
            // So that REPE and REPNE go on for a while.
            let at = rng.below(64) as usize;
            for page in 0..2 {
                let fill = [rng.pick(&[0, 0xff, 0x55]); 1024];
                input.overlay(page * PAGE + at * 16, &fill);
            }
            input.gpr[0] = rng.pick(&[0, u64::MAX, 0x5555_5555_5555_5555, 1]);
        }
    }
    match insn.mnemonic() {
        M::Div if rng.one_in(2) => {
            input.gpr[2] = rng.below(4);
        }
        M::Idiv if rng.one_in(2) => {
            input.gpr[2] = if rng.one_in(2) { 0 } else { u64::MAX };
        }
        M::Xsave | M::Xsave64 | M::Xsavec | M::Xsavec64 | M::Xrstor | M::Xrstor64 => {
            // Only components that the guest has too.
            input.gpr[0] = rng.next_u64() & 0xffff_ffff_0000_00e7;
            input.gpr[2] &= 0xffff_ffff_0000_0000;
        }
        // The stack has something sensible to return to.
        M::Ret | M::Retf | M::Iret | M::Iretd | M::Iretq => {
            let stack = DATA + (16 + rng.below(64)) * 8 - if rng.one_in(8) { rng.below(64) } else { 0 };
            input.gpr[4] = stack - segment_base(input, Register::SS);
            let wide = match insn.mnemonic() {
                M::Ret if bits == 64 => 8,
                M::Iretq => 8,
                M::Iret => 2,
                M::Iretd => 4,
                M::Ret => insn.op_code().operand_size().max(16) as usize / 8,
                _ => match insn.op_code().operand_size() {
                    0 => bits as usize / 16,
                    n => n as usize / 8,
                },
            };
            let sane = !rng.one_in(4);
            let segmented = input.selectors[0] & 4 != 0;
            let cs = match sane {
                true if segmented => rng.pick(&[local::CODE16, local::CODE32, USER_CODE32]),
                true => rng.pick(&[USER_CODE64, USER_CODE32]),
                false => any_selector(rng, input),
            };
            let ss = if sane { USER_DATA } else { any_selector(rng, input) };
            let frame = [
                if segmented { 0 } else { CODE } + 0x200 + rng.below(200),
                cs.into(),
                rng.next_u64() & 0xdd5 | 0x202,
                data_address(rng) & !7,
                ss.into(),
            ];
            let mut bytes = Vec::new();
            for (i, word) in frame.iter().enumerate() {
                if i > 0 && insn.mnemonic() == M::Retf && i == 2 {
                    continue;
                }
                bytes.extend_from_slice(&word.to_le_bytes()[..wide]);
            }
            if let Some(offset) = memory_offset(stack, bytes.len()) {
                input.overlay(offset, &bytes);
            }
        }
        M::Popf | M::Popfd | M::Popfq => {
            input.gpr[4] = DATA + rng.below(64) * 8 - segment_base(input, Register::SS);
        }
        M::Lar | M::Lsl | M::Verr | M::Verw => {
            if let Some(r) = gpr_index(insn.op_register(insn.op_count() - 1)) {
                input.gpr[r] = any_selector(rng, input).into();
            }
        }
        M::Mov if insn.op_count() == 2 && insn.op_register(0).is_segment_register() => {
            if let Some(r) = gpr_index(insn.op_register(1)) {
                input.gpr[r] = any_selector(rng, input).into();
            }
        }
        M::Wrfsbase | M::Wrgsbase => {
            if let (Some(r), true) = (gpr_index(insn.op_register(0)), rng.one_in(2)) {
                input.gpr[r] = rng.next_u64() >> 17;
            }
        }
        M::Jmp | M::Call if insn.op0_kind() == OpKind::Register => {
            if let (Some(r), true) = (gpr_index(insn.op_register(0)), rng.one_in(2)) {
                input.gpr[r] = if input.selectors[0] & 4 != 0 { 0 } else { CODE } + 0x200 + rng.below(200);
            }
        }
        M::Loop | M::Loope | M::Loopne | M::Jrcxz | M::Jecxz | M::Jcxz => {
            input.gpr[1] = rng.pick(&[0, 1, 2, 0x1_0000, 0x1_0001, 0x1_0000_0000, 0xffff_ffff]);
        }
        _ => {}
    }
}
