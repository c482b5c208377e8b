//! Counts of what the engine did, for `--stats`.

use std::fmt::Write;

use iced_x86::Mnemonic;
use rustc_hash::FxHashMap;

use crate::Vcpu;

/// Events outside the translation cache and the TLB, which count for themselves.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Returns from emitted code to the dispatcher, by [`crate::entry::Left`].
    pub left: [u64; 7],
    pub sensitive: u64,
    /// The same by mnemonic, where `--stats` asks for it.
    pub mnemonics: FxHashMap<Mnemonic, u64>,
    /// Accesses that were not a plain page of RAM.
    pub bounced: u64,
}

/// How many kinds of sensitive instruction a report names.
const MOST_FREQUENT: usize = 16;

/// One line a number, each with what it counts.
pub fn report(cpu: &Vcpu) -> String {
    let (counts, cache) = (&cpu.engine.counts, &cpu.engine.cache.stats);
    let native = &cpu.engine.native.counts;
    // What has run for hours is too much to be multiplied first.
    let microseconds = |ticks: u64| ticks / (cpu.machine.time.tsc_hz() / 1_000_000).max(1);
    let rows = [
        ("blocks translated", cache.blocks),
        ("guest instructions translated", cache.guest_instructions),
        ("blocks invalidated", cache.invalidated),
        ("blocks taken up again as they were, or with other immediates", cache.woken),
        ("blocks copied to another address", cache.copied),
        ("of these in place of an older copy", cache.moved),
        ("translation cache regions dropped", cache.evicted_regions),
        ("direct branches linked", cache.links),
        ("host code bytes in use", cpu.engine.cache.bytes_in_use() as u64),
        ("TLB fills", cpu.tlb.fills),
        ("TLB flushes", cpu.tlb.flushes),
        ("flushes of global pages' code", cache.global_flushes),
        ("branches that missed the jump table", cache.lookups),
        ("exits: direct branch not linked", counts.left[0]),
        ("exits: indirect branch missed", counts.left[1]),
        ("exits: event or end of a sensitive instruction", counts.left[2]),
        ("exits: exception", counts.left[3]),
        ("exits: host signal", counts.left[4]),
        ("exits: group to be run carefully", counts.left[5]),
        ("exits: code found rewritten", counts.left[6]),
        ("pages whose blocks look for that themselves, so far", cpu.engine.rewritten.checked_pages),
        ("sensitive instructions", counts.sensitive),
        ("bounced accesses", counts.bounced),
        ("programs entered directly", native.entries),
        ("microseconds that they ran, with the ways there and back", microseconds(native.ran)),
        ("microseconds that their mappings took", microseconds(native.mapping)),
        ("stops for pages", native.page_stops),
        ("processes made for that", native.processes),
        ("their pages mapped", native.pages_mapped),
        ("their pages compared with the guest's tables after a flush", native.comparisons),
        ("programs left: system call", native.system_calls),
        ("programs left: page fault or page with sensitive code", native.page_faults),
        ("programs left: exception", native.others),
    ];
    let mut text = format!("vCPU {}:\n", cpu.id);
    for (what, n) in rows {
        let _ = writeln!(text, "  {n:>14}  {what}");
    }
    let mut mnemonics: Vec<_> = counts.mnemonics.iter().collect();
    mnemonics.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
    for (mnemonic, n) in mnemonics.into_iter().take(MOST_FREQUENT) {
        let _ = writeln!(text, "  {n:>14}  {mnemonic:?}");
    }
    text
}
