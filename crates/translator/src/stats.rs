//! Counts of what the engine did, for `--stats`.

use std::fmt::Write;

use crate::Vcpu;

/// Events outside the translation cache and the TLB, which count for themselves.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Returns from emitted code to the dispatcher, by [`crate::entry::Left`].
    pub left: [u64; 6],
    pub sensitive: u64,
    /// Accesses that were not a plain page of RAM.
    pub bounced: u64,
}

/// One line a number, each with what it counts.
pub fn report(cpu: &Vcpu) -> String {
    let (counts, cache) = (&cpu.engine.counts, &cpu.engine.cache.stats);
    let rows = [
        ("blocks translated", cache.blocks),
        ("guest instructions translated", cache.guest_instructions),
        ("blocks invalidated", cache.invalidated),
        ("translation cache resets", cache.full_flushes),
        ("direct branches linked", cache.links),
        ("host code bytes in use", cpu.engine.cache.next_offset() as u64),
        ("TLB fills", cpu.tlb.fills),
        ("TLB flushes", cpu.tlb.flushes),
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
    text
}
