//! One case: what a processor starts from ([`Input`]), what it ended in ([`Outcome`]), and how two outcomes differ.

use std::fmt::Write;
use std::sync::OnceLock;

use arch::registers::rflags;

use crate::layout::{DATA, MEMORY, PAGE, SLOT_SIZE, USER_CODE64, WRITABLE};
use crate::rng::Rng;

/// Bytes of an XSAVE area in the standard format up to and including AVX-512's last component and PKRU.
pub const XSAVE_SIZE: usize = 2816;
/// The state components compared: x87, SSE, AVX and AVX-512 (Intel SDM 1, 13.1).
pub const XSAVE_COMPONENTS: u64 = 0xe7;
/// Bytes that a case lays over its memory.
pub const OVERLAY_BYTES: usize = 3072;
/// Most single steps recorded.
pub const TRACE: usize = 128;

pub const GPR_NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// Bytes at an offset of the case's writable memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Overlay {
    pub offset: u32,
    pub len: u32,
}

/// What a processor starts from. Lives in memory shared between processes: plain data only.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct Input {
    pub xsave: [u8; XSAVE_SIZE],
    /// In the order of instruction encodings.
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    /// cs, ss, ds, es, fs, gs
    pub selectors: [u16; 6],
    /// Not zero: keep running after single-step traps, and record this many of them.
    pub steps: u32,
    /// The slot this case runs in, and its bytes.
    pub slot: u32,
    pub code: [u8; SLOT_SIZE],
    /// Memory starts as the template from this offset on, with the overlays above.
    pub template: u32,
    pub overlays: [Overlay; 4],
    pub overlay_bytes: [u8; OVERLAY_BYTES],
}

impl Input {
    /// The case's memory before it runs.
    pub fn fill_memory(&self, template: &[u8], memory: &mut [u8; MEMORY]) {
        memory.copy_from_slice(&template[self.template as usize..][..MEMORY]);
        let mut from = 0;
        for o in &self.overlays {
            let (at, len) = (o.offset as usize, o.len as usize);
            memory[at..at + len].copy_from_slice(&self.overlay_bytes[from..from + len]);
            from += len;
        }
    }

    /// Lays `bytes` over the memory at `offset`, while there is room.
    pub fn overlay(&mut self, offset: usize, bytes: &[u8]) {
        let used: usize = self.overlays.iter().map(|o| o.len as usize).sum();
        let Some(free) = self.overlays.iter_mut().find(|o| o.len == 0) else { return };
        if used + bytes.len() <= OVERLAY_BYTES && offset + bytes.len() <= MEMORY {
            *free = Overlay { offset: offset as u32, len: bytes.len() as u32 };
            self.overlay_bytes[used..used + bytes.len()].copy_from_slice(bytes);
        }
    }
}

/// Where a case ended: every case ends in an exception, INT3 if in no other.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct Outcome {
    pub xsave: [u8; XSAVE_SIZE],
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    /// cs, ss, ds, es, fs, gs
    pub selectors: [u16; 6],
    pub status: Status,
    pub vector: u8,
    pub error: u32,
    pub cr2: u64,
    /// Single-step traps that were resumed, and the RIP of each with the flags in the upper half.
    pub steps: u32,
    pub trace: [u64; TRACE],
    pub memory: [u8; MEMORY],
    pub code: [u8; SLOT_SIZE],
}

#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Not run.
    None = 0,
    /// Ended in the exception `vector`.
    Exception = 1,
    /// The native process died, the guest shut down or the engine failed.
    Died = 2,
    /// It had to be stopped.
    Hung = 3,
}

/// The memory that cases start from: edge-case numbers of all types, mixed.
pub fn template(seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed ^ 0x7e3a);
    let mut bytes = Vec::with_capacity(TEMPLATE);
    while bytes.len() < TEMPLATE {
        let mut line = [0; 64];
        crate::generate::values::fill_vector(&mut rng, &mut line);
        bytes.extend_from_slice(&line);
    }
    bytes
}

/// Bytes of the template: a case's memory and as much choice of where it begins.
pub const TEMPLATE: usize = 4 * MEMORY;

/// Where Linux's user addresses end (TASK_SIZE_MAX).
const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// What to leave out of a comparison.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ignore {
    /// RFLAGS bits that the instruction leaves undefined.
    pub flags: u64,
    /// RFLAGS bits that the instruction overwrites: the translator does not keep them across the address translation of an
    /// instruction that will set them, so the handler of a memory operand's fault may see others. They are set again when it
    /// returns.
    pub flags_at_fault: u64,
    /// Of an area of several hundred bytes (XSAVE and the like) and of MASKMOV, it is the implementation's choice which byte
    /// a page fault names, and how much has been written before it.
    pub large_area: bool,
    /// Segments have limits: of a large area, what lies before the limit may be looked at first.
    pub segmented: bool,
    /// Of a masked operand that crosses pages, it is the implementation's choice which byte of the page a fault names.
    pub masked: bool,
    /// MASKMOV with nothing to store may fault or not (Intel SDM 2B, MASKMOVDQU), and so may its alignment be checked.
    pub may_fault_in_vain: bool,
    /// An x87 operand of ten bytes, which is accessed in two parts: the first may fault before the second is not canonical.
    pub extended: bool,
    /// Not an instruction: #UD, or #GP if it would be longer than 15 bytes, or #PF if more of it would have to be fetched, which only
    /// a processor knows.
    pub undecodable: bool,
    /// Where the XSAVE area of a guest ends. The host's is longer by AMX's components, and all of it is probed; so is what 32-bit
    /// code doesn't write. Zero: no such area.
    pub guest_area_end: u64,
    /// An x87 store that raises an unmasked exception does not store; the translator has the operand's page checked before.
    pub x87_store: bool,
    /// The same of a store that converts.
    pub converting_store: bool,
    /// String instructions with 32-bit addresses clear the upper halves of their registers even before the first element, on
    /// some processors in some cases.
    pub narrow_pointers: bool,
    /// The upper half of RSP says nothing: an IRET to a 16-bit stack leaves it to AMD's processors as the host's kernel had it,
    /// and code that is not 64-bit can't see it (AMD APM 1, 3.1.2).
    pub narrow_stack: bool,
    /// AMD's processors refuse the target of a near CALL before they write the return address; translated code writes it first.
    pub call: bool,
    /// RF was set, which AMD's processors keep between repetitions of a string instruction that is stepped through.
    pub resume_flag: bool,
    /// Which of its two operands CMPS looks at first is the implementation's choice, and so is which element's fault a gather or
    /// scatter raises; AMD's processors vary.
    pub any_operand: bool,
    /// Of an operand of vector instructions, what AMD's processors take for misaligned where that is checked (RFLAGS.AC), and
    /// before or after which other fault, is not what Intel's do, and no system checks it.
    pub vector_alignment: bool,
    /// Sticky bits of MXCSR or the x87 status (MMX state) may be set although the store that follows faults.
    pub sticky_at_fault: bool,
}

impl Ignore {
    /// Whether the native side may take a fault that the guest doesn't, or the other way round.
    fn other_fault(&self, native: &Outcome, guest: &Outcome) -> bool {
        let memory_fault = |o: &Outcome| matches!(o.vector, 12 | 13 | 14 | 17);
        let both_fault = memory_fault(native) && memory_fault(guest);
        self.undecodable && matches!((native.vector, guest.vector), (6, 13 | 14) | (13, 6))
            // AMD's processors may access the operand before they refuse a LOCK prefix.
            || self.undecodable && translator::host_is_amd() && memory_fault(native) && guest.vector == 6
            || self.large_area && (native.vector, guest.vector) == (17, 13)
            || self.large_area && self.segmented && native.vector == 14 && matches!(guest.vector, 12 | 13)
            || self.may_fault_in_vain
                && (matches!(native.vector, 13 | 14) && !memory_fault(guest)
                    || memory_fault(native) && memory_fault(guest)
                    || native.vector == 17
                    || guest.vector == 17)
            || self.vector_alignment && (native.vector == 17 || guest.vector == 17 || both_fault)
            || translator::host_is_amd() && both_fault && self.other_fault_on_amd(native, guest)
            // The elements of a masked operand wrap around one by one where the address size does.
            || translator::host_is_amd() && self.masked && self.segmented && native.vector == 3 && memory_fault(guest)
            || native.vector == 14 && native.cr2.wrapping_sub(self.guest_area_end) < 0x2b00 && self.guest_area_end != 0
            || (self.large_area || self.extended)
                && native.vector == 14
                && guest.vector == 13
                && native.cr2 >> 12 == TASK_SIZE >> 12
            || self.x87_store && memory_fault(guest) && !memory_fault(native) && native.xsave[2] & 0x80 != 0
            || self.converting_store && memory_fault(guest) && native.vector == 19
    }

    /// The same of AMD's processors, of which the guest's is one then, where both sides have a fault of memory.
    fn other_fault_on_amd(&self, native: &Outcome, guest: &Outcome) -> bool {
        // An operand that goes over the end of 4 GiB is outside its segment, and does not wrap around.
        let near = |base: u64| (guest.cr2.wrapping_sub(base) as u32).wrapping_add(64) < 128;
        let wraps = near(0) || self.segmented && near(DATA);
        // Of a masked operand of which a part is outside, the elements that count are found first, or last.
        let near_the_end = |cr2: u64| cr2 >> 12 == TASK_SIZE >> 12 || cr2 >> 12 == !0x7fff_ffff_ffff >> 12;
        self.any_operand
            || matches!(native.vector, 12 | 13) && guest.vector == 14 && native.selectors[0] != USER_CODE64 && wraps
            || self.masked && native.vector == 14 && (near_the_end(native.cr2) || self.segmented)
            || self.masked && guest.vector == 14 && near_the_end(guest.cr2)
            // FXRSTOR looks at all of its area before it looks at what it loads, XSAVE at alignment before limits.
            || self.large_area && (native.vector == 14 && matches!(guest.vector, 12 | 13) || self.segmented)
            // Limits come before alignment.
            || matches!(native.vector, 12 | 13) && guest.vector == 17
    }
}

/// All that differs, one line each; empty if nothing does.
pub fn differences(native: &Outcome, guest: &Outcome, ignore: Ignore) -> String {
    let mut out = String::new();
    if native.status != guest.status {
        let _ = writeln!(out, "  ended: native {:?}, guest {:?}", native.status, guest.status);
        return out;
    }
    if native.status != Status::Exception {
        return out;
    }
    if ignore.other_fault(native, guest) {
        return out;
    }
    let mut word = |name: &str, a: u64, b: u64| {
        if a != b {
            let _ = writeln!(out, "  {name}: native {a:#x}, guest {b:#x} (xor {:#x})", a ^ b);
        }
    };
    word("vector", native.vector.into(), guest.vector.into());
    if native.vector == guest.vector
        && matches!(native.vector, 8 | 10..=14 | 17)
        && !(native.vector == 14 && ignore.large_area)
    {
        // Linux hides from user code whether an address beyond its own is mapped (X86_PF_PROT in set_signal_archinfo).
        let mask = if native.vector == 14 && native.cr2 >= TASK_SIZE { !1 } else { !0 };
        word("error code", u64::from(native.error & mask), u64::from(guest.error & mask));
    }
    if native.vector == 14 && guest.vector == 14 && !ignore.large_area {
        let bits = if ignore.masked { !0xfff } else { !0 };
        word("cr2", native.cr2 & bits, guest.cr2 & bits);
    }
    word("rip", native.rip, guest.rip);
    let fault = matches!(native.vector, 12 | 13 | 14 | 16 | 17 | 19);
    let resumed = if ignore.resume_flag && native.vector == 1 { rflags::RF } else { 0 };
    let flags = ignore.flags | resumed | if fault { ignore.flags_at_fault } else { 0 };
    word("rflags", native.rflags & !flags, guest.rflags & !flags);
    for (i, name) in GPR_NAMES.iter().enumerate() {
        let narrow = ignore.narrow_pointers && fault || ignore.narrow_stack && i == 4;
        let registers = if narrow { 0xffff_ffff } else { u64::MAX };
        word(name, native.gpr[i] & registers, guest.gpr[i] & registers);
    }
    word("fs base", native.fs_base, guest.fs_base);
    word("gs base", native.gs_base, guest.gs_base);
    for (i, name) in ["cs", "ss", "ds", "es", "fs", "gs"].iter().enumerate() {
        // IRET to an outer level, on which the native process came back, makes every null selector zero.
        let (a, b) = (native.selectors[i], guest.selectors[i]);
        if a > 3 || b > 3 {
            word(name, a.into(), b.into());
        }
    }
    word("steps", native.steps.into(), guest.steps.into());
    for i in 0..TRACE.min(native.steps.min(guest.steps) as usize) {
        if native.trace[i] != guest.trace[i] {
            word(&format!("step {i}"), native.trace[i], guest.trace[i]);
            break;
        }
    }
    let sticky = ignore.sticky_at_fault && fault;
    xsave_differences(&native.xsave, &guest.xsave, sticky, &mut out);
    if ignore.large_area && fault || ignore.call && native.vector == 13 {
        return out;
    }
    for (page, base) in WRITABLE.iter().enumerate() {
        byte_differences(
            "memory",
            *base,
            &native.memory[page * PAGE..][..PAGE],
            &guest.memory[page * PAGE..][..PAGE],
            &mut out,
        );
    }
    byte_differences("code", 0, &native.code, &guest.code, &mut out);
    out
}

fn byte_differences(what: &str, base: u64, a: &[u8], b: &[u8], out: &mut String) {
    if a == b {
        return;
    }
    let mut shown = 0;
    let mut i = 0;
    while i < a.len() {
        if a[i] == b[i] {
            i += 1;
            continue;
        }
        let end = (i + 16).min(a.len());
        let _ =
            writeln!(out, "  {what} at {:#x}: native {:02x?}, guest {:02x?}", base + i as u64, &a[i..end], &b[i..end]);
        shown += 1;
        if shown == 4 {
            let _ = writeln!(out, "  ...");
            return;
        }
        i = end;
    }
}

/// One register's or field's place in the XSAVE area.
pub struct Field {
    pub name: String,
    pub component: u32,
    pub offset: usize,
    pub len: usize,
    /// What it is in the component's initial state, repeated over the field.
    pub initial: &'static [u8],
}

/// Every field that is compared. Offsets of the components beyond SSE are the same on all Intel processors and on AMD's
/// with AVX-512 except where CPUID leaf 0xd says otherwise; it is asked.
pub fn fields() -> &'static [Field] {
    static FIELDS: OnceLock<Vec<Field>> = OnceLock::new();
    FIELDS.get_or_init(find_fields)
}

fn find_fields() -> Vec<Field> {
    let mut fields = Vec::new();
    let mut field = |name: String, component, offset, len, initial| {
        fields.push(Field { name, component, offset, len, initial });
    };
    field("fcw".into(), 0, 0, 2, &[0x7f, 0x03]);
    field("fsw".into(), 0, 2, 2, &[0]);
    field("ftw".into(), 0, 4, 1, &[0]);
    field("fop".into(), 0, 6, 2, &[0]);
    field("fip".into(), 0, 8, 8, &[0]);
    field("fdp".into(), 0, 16, 8, &[0]);
    field("mxcsr".into(), 1, 24, 4, &[0x80, 0x1f, 0, 0]);
    for i in 0..8 {
        field(format!("st{i}"), 0, 32 + 16 * i, 10, &[0]);
    }
    for i in 0..16 {
        field(format!("xmm{i}"), 1, 160 + 16 * i, 16, &[0]);
    }
    let component = |n: u32| std::arch::x86_64::__cpuid_count(0xd, n).ebx as usize;
    let xcr0 = host_xcr0();
    if xcr0 & 1 << 2 != 0 {
        for i in 0..16 {
            field(format!("ymm{i} high"), 2, component(2) + 16 * i, 16, &[0]);
        }
    }
    if xcr0 & 0xe0 == 0xe0 {
        for i in 0..8 {
            field(format!("k{i}"), 5, component(5) + 8 * i, 8, &[0]);
        }
        for i in 0..16 {
            field(format!("zmm{i} high"), 6, component(6) + 32 * i, 32, &[0]);
        }
        for i in 0..16 {
            field(format!("zmm{}", i + 16), 7, component(7) + 64 * i, 64, &[0]);
        }
    }
    fields
}

/// The byte ranges of the vector and mask registers.
pub fn vector_fields() -> impl Iterator<Item = std::ops::Range<usize>> {
    fields().iter().filter(|f| f.component != 0 && f.offset >= 160).map(|f| f.offset..f.offset + f.len)
}

/// Sets a vector register to its whole width, as far as the host has it.
pub fn set_zmm(xsave: &mut [u8], number: usize, value: &[u8; 64]) {
    let low =
        [(format!("xmm{number}"), 0..16), (format!("ymm{number} high"), 16..32), (format!("zmm{number} high"), 32..64)];
    let whole = [(format!("zmm{number}"), 0..64)];
    for (name, range) in if number < 16 { &low[..] } else { &whole } {
        if let Some(f) = fields().iter().find(|f| f.name == *name) {
            xsave[f.offset..][..f.len].copy_from_slice(&value[range.clone()]);
        }
    }
}

/// The state components that the host's kernel has enabled.
pub fn host_xcr0() -> u64 {
    static XCR0: OnceLock<u64> = OnceLock::new();
    *XCR0.get_or_init(find_xcr0)
}

fn find_xcr0() -> u64 {
    let leaf = std::arch::x86_64::__cpuid(1);
    if leaf.ecx & 1 << 27 == 0 {
        return 3;
    }
    let leaf = std::arch::x86_64::__cpuid_count(0xd, 0);
    u64::from(leaf.eax) | u64::from(leaf.edx) << 32
}

/// A field's value, its initial one where XSTATE_BV says that the component is in its initial state.
fn value<'a>(area: &'a [u8], field: &Field, initial: &'a mut [u8; 64]) -> &'a [u8] {
    let bv = u64::from_le_bytes(area[512..520].try_into().expect("8 bytes"));
    // MXCSR is saved and restored whether or not SSE's bit is set (Intel SDM 1, 13.5.2).
    if bv >> field.component & 1 != 0 || field.name == "mxcsr" {
        &area[field.offset..][..field.len]
    } else {
        for (to, from) in initial.iter_mut().zip(field.initial.iter().cycle()) {
            *to = *from;
        }
        &initial[..field.len]
    }
}

fn xsave_differences(native: &[u8], guest: &[u8], sticky: bool, out: &mut String) {
    // AMD's processors hand x87's opcode and pointers to the host's kernel only with a pending exception (AMD APM 2, 11.4.4).
    let no_pointers = translator::host_is_amd() && native[2] & 0x80 == 0;
    // So what an instruction before the one with the exception had noted is lost with any switch of threads, on either side.
    let data_pointer_lost = translator::host_is_amd() && [native, guest].iter().any(|x| x[16..24] == [0; 8]);
    for field in fields() {
        if sticky && field.offset < 160
            || no_pointers && matches!(field.offset, 6..24)
            || data_pointer_lost && field.offset == 16
        {
            continue;
        }
        let (mut a, mut b) = ([0; 64], [0; 64]);
        let (a, b) = (value(native, field, &mut a), value(guest, field, &mut b));
        if a != b {
            let _ = writeln!(out, "  {}: native {}, guest {}", field.name, hex(a), hex(b));
        }
    }
}

/// A little-endian number, most significant byte first.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().map(|b| format!("{b:02x}")).collect()
}

/// The input's registers, for a report.
pub fn describe(input: &Input) -> String {
    let mut out = String::new();
    for (i, name) in GPR_NAMES.iter().enumerate() {
        let _ = write!(out, "  {name:>3}={:016x}", input.gpr[i]);
        if i % 4 == 3 {
            out.push('\n');
        }
    }
    let _ = writeln!(
        out,
        "  rip={:x} rflags={:x} fs={:x} gs={:x} selectors={:x?}",
        input.rip, input.rflags, input.fs_base, input.gs_base, input.selectors
    );
    let x = &input.xsave;
    let _ =
        writeln!(out, "  fcw={} fsw={} ftw={} mxcsr={}", hex(&x[0..2]), hex(&x[2..4]), hex(&x[4..5]), hex(&x[24..28]));
    out
}

/// The register fields of the XSAVE area that are not zero, for a report.
pub fn describe_vectors(input: &Input) -> String {
    let mut out = String::new();
    for f in fields().iter().filter(|f| f.offset >= 32) {
        let v = &input.xsave[f.offset..][..f.len];
        if v.iter().any(|b| *b != 0) {
            let _ = writeln!(out, "  {}={}", f.name, hex(v));
        }
    }
    out
}
