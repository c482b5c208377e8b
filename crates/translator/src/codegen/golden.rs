//! How many host instructions chosen fragments of guest code become, so that translation can't get worse unseen.
//!
//! `golden.txt` has the fragments with their counts: a name and a [mode](MODES), the guest's instructions, and a line of
//! counts. A fragment is translated block after block, up to its end, as if its page held nothing else. The body is what
//! runs when all goes well; the rest are slow paths and exits.
//!
//! Neither the host's features nor addresses decide about counts: where the jump table is indexed with or without PEXT
//! ([`has_bmi2`](crate::code_memory::has_bmi2)), that takes one instruction. After a change that is meant to
//! alter them, `RINGER_UPDATE_GOLDEN=1 cargo test -p translator golden` writes the file anew, to be reviewed and committed.

use std::fmt::Write;

use arch::registers::{cr0, cr4, rflags, xcr0};
use arch::state::{Segment, SegmentRegister};
use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter};

use super::block::{Setting, Translated, Workspace, translate};
use super::checked::Checked;
use super::decode::GuestCode;
use super::groups::Sharing;
use crate::mode::{CodeSegment, Mode};
use crate::testing::{KERNEL_CS, KERNEL_SS, USER_CS32, USER_SS, kernel_vcpu, test_vcpu, user_vcpu};
use crate::vcpu::VcpuBox;

const TABLE: &str = include_str!("golden.txt");
const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/codegen/golden.txt");

/// Where fragments begin in the linear address space: at a page's start.
const LINEAR: u64 = 0x6000;

/// Where the host has it.
const IN_HOST: u64 = 0x7000_0000_0000;

/// Makes a vCPU in some mode.
type Make = fn() -> VcpuBox;

/// The modes that the table names.
const MODES: [(&str, Make); 9] = [
    ("user64", user_vcpu),
    ("user64-careful", user_vcpu),
    ("user64-checked", user_vcpu),
    ("user64-aligned", aligned_vcpu),
    ("kernel64", kernel_vcpu),
    ("kernel64-smap", smap_vcpu),
    ("user32", user32_vcpu),
    ("kernel32-segmented", segmented_vcpu),
    ("real16", real_vcpu),
];

fn aligned_vcpu() -> VcpuBox {
    let mut cpu = user_vcpu();
    cpu.cr0 |= cr0::AM;
    cpu.rflags |= rflags::AC;
    cpu
}

fn smap_vcpu() -> VcpuBox {
    let mut cpu = kernel_vcpu();
    cpu.cr4 |= cr4::SMAP;
    cpu
}

fn user32_vcpu() -> VcpuBox {
    let mut cpu = user_vcpu();
    let data = Segment::flat_data(USER_SS, 3);
    cpu.segments = [data; 6];
    cpu.segments[SegmentRegister::Cs as usize] = Segment::flat_code(USER_CS32, false, 3);
    cpu
}

/// Segments with a base and a limit.
fn segmented_vcpu() -> VcpuBox {
    let mut cpu = kernel_vcpu();
    let of = |segment: Segment| Segment { base: LINEAR, limit: 0xf_ffff, ..segment };
    cpu.segments = [of(Segment::flat_data(KERNEL_SS, 0)); 6];
    cpu.segments[SegmentRegister::Cs as usize] = of(Segment::flat_code(KERNEL_CS, false, 0));
    cpu
}

fn real_vcpu() -> VcpuBox {
    let mut cpu = test_vcpu(8 << 20);
    cpu.segments = [Segment::real_mode((LINEAR >> 4) as u16, false); 6];
    cpu.segments[SegmentRegister::Cs as usize] = Segment::real_mode((LINEAR >> 4) as u16, true);
    cpu
}

struct Fragment {
    name: String,
    mode: String,
    bytes: Vec<u8>,
    counts: String,
}

impl Fragment {
    fn parse(text: &str) -> Fragment {
        let mut lines = text.lines();
        let (name, mode) = lines.next().and_then(|l| l.split_once(' ')).unwrap();
        let (counts, code): (Vec<_>, Vec<_>) = lines.map(str::trim).partition(|l| l.starts_with('='));
        let hex = code.iter().flat_map(|l| l.split('|').next().unwrap_or_default().split_whitespace());
        Fragment {
            name: name.into(),
            mode: mode.into(),
            bytes: hex.map(|h| u8::from_str_radix(h, 16).unwrap()).collect(),
            counts: counts.join("\n"),
        }
    }

    fn translation(&self) -> Translation<'_> {
        let vcpu = MODES.iter().find(|m| m.0 == self.mode).unwrap_or_else(|| panic!("no mode {}", self.mode)).1;
        let mut cpu = vcpu();
        cpu.cr4 |= cr4::OSFXSR | cr4::OSXSAVE;
        cpu.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX | xcr0::AVX512;
        let segment = CodeSegment::of(&cpu);
        let plain = Mode::of(&cpu);
        let mode = if self.mode.ends_with("-careful") { plain.careful() } else { plain };
        let sharing = if mode.is_careful() { Sharing::Near } else { Sharing::All };
        let checked = self.mode.ends_with("-checked").then_some(Checked { page: IN_HOST, next: IN_HOST + 0x1000 });
        // As programs are translated.
        let relative = mode.long() && mode.cpl() == 3 && checked.is_none();
        let setting = Setting {
            mode,
            inline_tsc: true,
            sharing,
            jump_slot: Some(0),
            access_slot: Some(1),
            level_slot: Some(2),
            template: false,
            checked,
            far_links: false,
            relative,
        };
        let start = if relative { 0 } else { LINEAR - u64::from(segment.base) };
        let mut blocks = Vec::new();
        let mut offset = 0;
        while offset < self.bytes.len() {
            let code = GuestCode { page: &self.bytes, offset, segment };
            let block = translate(code, start + offset as u64, &setting, &mut Workspace::default()).unwrap();
            let next = offset + block.guest_length;
            blocks.push((offset, block));
            offset = next;
        }
        Translation { bytes: &self.bytes, bits: mode.bits(), start, blocks }
    }
}

/// What a fragment became, block by block with their offsets.
struct Translation<'a> {
    bytes: &'a [u8],
    bits: u32,
    start: u64,
    blocks: Vec<(usize, Translated)>,
}

fn decoded(bits: u32, code: &[u8], ip: u64) -> Vec<Instruction> {
    let instructions: Vec<_> = Decoder::with_ip(bits, code, ip, DecoderOptions::NONE).iter().collect();
    assert!(instructions.iter().all(|i| !i.is_invalid()), "{code:02x?} is not code of {bits} bits");
    instructions
}

fn formatted(instruction: &Instruction) -> String {
    let mut text = String::new();
    IntelFormatter::new().format(instruction, &mut text);
    text
}

impl Translation<'_> {
    fn guest(&self) -> Vec<Instruction> {
        decoded(self.bits, self.bytes, self.start)
    }

    fn counts(&self) -> String {
        let (mut body, mut all) = (0, 0);
        for (_, block) in &self.blocks {
            let host = decoded(64, &block.code, 0);
            body += host.iter().filter(|i| i.ip() < block.body_length as u64).count();
            all += host.len();
        }
        let (guest, blocks) = (self.guest().len(), self.blocks.len());
        format!("= guest {guest}, blocks {blocks}, bodies {body}, all {all}")
    }

    /// The host's instructions under the guest's.
    fn listing(&self) -> String {
        let mut text = String::new();
        for (offset, block) in &self.blocks {
            let mut points = block.points.iter().peekable();
            for host in decoded(64, &block.code, 0) {
                while let Some(point) = points.next_if(|p| u64::from(p.host_offset) <= host.ip()) {
                    let at = offset + usize::from(point.guest_offset);
                    let guest = decoded(self.bits, &self.bytes[at..], self.start + at as u64)[0];
                    writeln!(text, "  {}", formatted(&guest)).unwrap();
                }
                if host.ip() == block.body_length as u64 {
                    writeln!(text, "  (slow paths and exits)").unwrap();
                }
                writeln!(text, "      {:4x}  {}", host.ip(), formatted(&host)).unwrap();
            }
        }
        text
    }
}

/// A fragment as the table should have it.
fn rendered(fragment: &Fragment, translation: &Translation) -> String {
    let mut text = format!("{} {}\n", fragment.name, fragment.mode);
    for insn in translation.guest() {
        let at = (insn.ip() - translation.start) as usize;
        let hex: Vec<_> = fragment.bytes[at..at + insn.len()].iter().map(|b| format!("{b:02x}")).collect();
        writeln!(text, "  {:<30} | {}", hex.join(" "), formatted(&insn)).unwrap();
    }
    writeln!(text, "  {}", translation.counts()).unwrap();
    text
}

#[test]
fn fragments_of_guest_code_become_as_many_host_instructions_as_the_table_says() {
    let (mut table, mut changes, mut listings) = (Vec::new(), String::new(), String::new());
    for text in TABLE.split("\n\n") {
        let fragment = Fragment::parse(text);
        let translation = fragment.translation();
        let counts = translation.counts();
        if counts != fragment.counts {
            let (name, mode) = (&fragment.name, &fragment.mode);
            writeln!(changes, "{name} ({mode})\n    was {}\n    is  {counts}", fragment.counts).unwrap();
            writeln!(listings, "{name} ({mode}):\n{}", translation.listing()).unwrap();
        }
        table.push(rendered(&fragment, &translation));
    }
    let table = table.join("\n");
    if std::env::var_os("RINGER_UPDATE_GOLDEN").is_some() {
        std::fs::write(PATH, table).unwrap();
        print!("{changes}");
        return;
    }
    assert!(
        table == TABLE,
        "translation has changed (if that is meant: RINGER_UPDATE_GOLDEN=1 cargo test -p translator golden)\n\
         {listings}\n{changes}"
    );
}

#[test]
fn fragments_have_different_names_in_each_mode() {
    let mut heads: Vec<_> = TABLE.split("\n\n").filter_map(|t| t.lines().next()).collect();
    let count = heads.len();
    heads.sort_unstable();
    heads.dedup();
    assert_eq!(heads.len(), count);
    assert!(count >= 40);
}
