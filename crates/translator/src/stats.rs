//! Counts of what the engine did, for `--stats`.

use std::fmt::Write;

use iced_x86::Mnemonic;
use rustc_hash::FxHashMap;

use crate::Vcpu;

/// Events outside the translation cache and the TLB, which count for themselves.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Returns from emitted code to the dispatcher, by [`crate::entry::Left`].
    pub left: [u64; 6],
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
        ("branches that missed the jump table", cache.lookups),
        ("exits: direct branch not linked", counts.left[0]),
        ("exits: indirect branch missed", counts.left[1]),
        ("exits: event or end of a sensitive instruction", counts.left[2]),
        ("exits: exception", counts.left[3]),
        ("exits: host signal", counts.left[4]),
        ("exits: group to be run carefully", counts.left[5]),
        ("sensitive instructions", counts.sensitive),
        ("bounced accesses", counts.bounced),
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
