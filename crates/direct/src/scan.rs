//! The scan for instructions that may not run directly unguarded.

use std::arch::x86_64::__cpuid;
use std::sync::OnceLock;

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};

/// How many bytes of the code before a page the scan makes use of.
pub const BEFORE: usize = 64;
/// How many bytes behind a page can belong to an instruction that begins in it.
pub const BEHIND: usize = 14;

/// Decoding that begins this many bytes before an instruction, anywhere, has nearly always come to where instructions
/// begin by then.
const SETTLED: usize = 16;
/// With fewer bytes than this before it, an instruction is taken for one.
const ENOUGH: usize = SETTLED + 8;

/// What a page has of such instructions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sensitive {
    /// Where CPUID begins, in bytes from the page's beginning. `None` if one begins before the page, or where can't be told.
    pub cpuids: Option<Vec<u64>>,
    /// The same for all others.
    pub others: Option<Vec<u64>>,
    /// Of all these, those that the one before leads to: there is no return between them, so that a function that comes to
    /// this one is taken to have come to that one first.
    pub led: Vec<u64>,
}

impl Sensitive {
    pub fn is_none(&self) -> bool {
        !self.has_cpuid() && self.others.as_ref().is_some_and(Vec::is_empty)
    }

    pub fn has_cpuid(&self) -> bool {
        self.cpuids.as_ref().is_none_or(|places| !places.is_empty())
    }
}

/// Finds the instructions that would tell code about the host where it asks about its own machine, and that the processor
/// would do without a stop:
///
/// | instruction | what it would tell or do |
/// |---|---|
/// | CPUID | the host's processor |
/// | SYSENTER | enters by the host's MSRs; the stop that it is does not say where it was |
/// | XGETBV, XSAVE, XSAVEC, XSAVEOPT, XRSTOR | which components of state the host has |
/// | RDPKRU, WRPKRU | protection keys of the host's page tables, which have none of the guest's |
/// | RDPID, RDTSCP, LSL | the host's CPU number (LSL: of the selector by which Linux's vDSO asks for it) |
/// | RDPRU | the host's performance counters |
/// | LAR, SGDT, SIDT, SMSW | the host's descriptor tables and CR0 |
/// | VMCALL, VMMCALL, VMFUNC | ask the hypervisor that the host runs on |
/// | INT 4, INT 80H | go through the host's gates for programs; what comes of that doesn't say where it was, or has lost half of RAX |
///
/// Not in it: RDTSC, which a space stops at or not ([`Space::fault_tsc`](crate::Space::fault_tsc)). Nor, as it always stops at
/// them, RDPMC (CR4.PCE is clear), SYSCALL, INT n but for these two, and whatever is privileged. Nor are SLDT, STR, VERR and VERW, which ask about selectors: the
/// caller runs only guests whose selectors are the host's.
///
/// The bytes of these instructions are part of other ones far more often than they are themselves (`0F 01 00 00` is the
/// number 10Fh): they stand in one page of eight. So where they stand, instructions are decoded from each of the up to
/// 48 bytes before it that are far enough away: such streams meet soon, and most of them tell where instructions begin.
/// Of 8236 pages of Debian's programs and libraries, 9 have such an instruction; 10 are found, among them all 9.
/// A program that jumps into the midst of its instructions on purpose can see the host's CPUID; nothing else comes of it.
///
/// `bytes` are a page with what stands before it from `page` bytes on: up to [`BEFORE`] bytes before, and [`BEHIND`]
/// bytes behind, if they are code as well.
pub fn sensitive(bytes: &[u8], page: usize) -> Sensitive {
    let mut found = Sensitive { cpuids: Some(Vec::new()), others: Some(Vec::new()), led: Vec::new() };
    let mut stream = None;
    let suspicious = memchr::memchr2_iter(0x0f, 0xcd, bytes)
        .filter(|&at| at + 2 >= page && is_suspicious(bytes.get(at..).unwrap_or_default()));
    for at in suspicious {
        let places: Option<Vec<u64>> = match stream.get_or_insert_with(|| Stream::new(bytes)).beginnings(at) {
            Beginnings::None => continue,
            Beginnings::Unknown => None,
            Beginnings::At(places) => {
                places.into_iter().map(|place| place.checked_sub(page).map(|place| place as u64)).collect()
            }
        };
        let list = if bytes.get(at + 1) == Some(&CPUID) { &mut found.cpuids } else { &mut found.others };
        *list = list.take().zip(places).map(|(known, more)| [known, more].concat());
    }
    let mut all: Vec<u64> = [&found.cpuids, &found.others].into_iter().flatten().flatten().copied().collect();
    all.sort_unstable();
    let led = all.windows(2).filter(|pair| leads(bytes, page + pair[0] as usize, page + pair[1] as usize));
    found.led = led.map(|pair| pair[1]).collect();
    found
}

/// Whether code that goes on from one place comes to another, jumps left out, and to no return before.
fn leads(bytes: &[u8], from: usize, to: usize) -> bool {
    let Some(code) = bytes.get(from..to) else { return false };
    let mut decoder = Decoder::new(64, code, decoder_options());
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        // One that reaches over the other place is cut off there, and no instruction.
        if instruction.is_invalid() || instruction.flow_control() == FlowControl::Return {
            return false;
        }
    }
    true
}

/// The second byte of its opcode.
const CPUID: u8 = 0xa2;

/// Whether an opcode, with its ModRM or immediate byte, can be one of these.
fn is_suspicious(bytes: &[u8]) -> bool {
    match *bytes {
        [0xcd, vector, ..] => matches!(vector, 4 | 0x80),
        [_, CPUID | 0x34, ..] => true,
        [_, 0x02 | 0x03, _, ..] => true,
        [_, opcode, modrm, ..] => match (opcode, modrm >> 6 == 3, modrm >> 3 & 7) {
            (0x01, true, register) => {
                register == 4 || matches!(modrm, 0xc1 | 0xd0 | 0xd4 | 0xd9 | 0xee | 0xef | 0xf9 | 0xfd)
            }
            (0x01, false, 0 | 1 | 4) | (0xae, false, 4..=6) | (0xc7, false, 4) | (0xc7, true, 7) => true,
            _ => false,
        },
        _ => false,
    }
}

/// Whether it is one of these.
pub fn is_listed(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    if instruction.code() == Code::Int_imm8 {
        return matches!(instruction.immediate8(), 4 | 0x80);
    }
    let mnemonic = instruction.mnemonic();
    matches!(
        mnemonic,
        Cpuid
            | Sysenter
            | Lar
            | Lsl
            | Sgdt
            | Sidt
            | Smsw
            | Xgetbv
            | Rdpkru
            | Wrpkru
            | Rdpid
            | Rdtscp
            | Rdpru
            | Vmcall
            | Vmmcall
            | Vmfunc
    ) || matches!(mnemonic, Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xrstor | Xrstor64)
}

/// Whether the host's processor is AMD's (or Hygon's), which differs from Intel's where the manuals do.
pub fn host_is_amd() -> bool {
    static AMD: OnceLock<bool> = OnceLock::new();
    // The first letters of the vendor.
    *AMD.get_or_init(|| matches!(&__cpuid(0).ebx.to_le_bytes(), b"Auth" | b"Hygo"))
}

/// To AMD's processors, near branches with an operand-size prefix are shorter.
fn decoder_options() -> u32 {
    if host_is_amd() { DecoderOptions::AMD } else { DecoderOptions::NONE }
}

/// Instructions of a page, wherever they may begin: each place is decoded when it is first asked for.
struct Stream<'a> {
    bytes: &'a [u8],
    decoder: Decoder<'a>,
    /// By place: the length of the instruction that begins there, and whether it is one of the list; 0 if not yet known.
    known: Vec<u8>,
}

/// Of what is known of a place: the instruction is one of the list.
const LISTED: u8 = 0x80;

impl<'a> Stream<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Stream { bytes, decoder: Decoder::new(64, bytes, decoder_options()), known: vec![0; bytes.len()] }
    }

    /// What is known of a place. What is no instruction is a byte to be left out.
    fn known(&mut self, at: usize) -> u8 {
        let Some(known) = self.known.get_mut(at) else { return 1 };
        if *known == 0 {
            let mut instruction = Instruction::default();
            *known = 1;
            if self.decoder.set_position(at).is_ok() {
                self.decoder.decode_out(&mut instruction);
                if !instruction.is_invalid() {
                    *known = instruction.len() as u8 | if is_listed(&instruction) { LISTED } else { 0 };
                }
            }
        }
        *known
    }

    /// Where the instruction begins that the suspicious opcode at `at` is of, if it is of one of the list: if most of the streams
    /// of instructions that begin far enough before it come to one with its opcode there, which only prefixes stand before.
    fn beginnings(&mut self, at: usize) -> Beginnings {
        if at < ENOUGH {
            return Beginnings::Unknown;
        }
        let (first, last) = (at.saturating_sub(BEFORE), at - SETTLED);
        // By how far before `at` it begins, for each stream: where it comes to one.
        let mut hits = [None; BEFORE + 1];
        for place in (first..=at).rev() {
            let known = self.known(place);
            let next = place + usize::from(known & !LISTED);
            let hit = if next <= at {
                hits.get(at - next).copied().flatten()
            } else {
                let prefixes = self.bytes.get(place..at).unwrap_or_default();
                (known & LISTED != 0 && prefixes.iter().all(|&byte| is_prefix(byte))).then_some(place)
            };
            if let Some(entry) = hits.get_mut(at - place) {
                *entry = hit;
            }
        }
        let streams = (first..last).filter_map(|start| hits.get(at - start).copied().flatten());
        let mut places: Vec<usize> = streams.collect();
        if 2 * places.len() < last - first {
            return Beginnings::None;
        }
        places.sort_unstable();
        places.dedup();
        Beginnings::At(places)
    }
}

/// Where an instruction of the list begins, by the streams that come to it: nearly always they agree.
enum Beginnings {
    /// There is none.
    None,
    /// There is too little before it to tell.
    Unknown,
    At(Vec<usize>),
}

/// Legacy prefixes and REX (Intel SDM 2, 2.1.1 and 2.2.1).
fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
}
