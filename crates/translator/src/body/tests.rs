use super::*;
use crate::codegen::block::{Translated, Workspace, translate};
use crate::codegen::decode::GuestCode;
use crate::record::Writer;
use crate::testing::{kernel_vcpu, setting, test_vcpu};

/// The code of this very test program: real code, of which every byte may begin a block.
fn corpus() -> Vec<u8> {
    let program = std::fs::read("/proc/self/exe").unwrap();
    let start = (program.len() / 8) & !0xfff;
    program[start..start + (64 << 12)].to_vec()
}

/// What relocation to another position makes of a translation's code.
fn relocate(t: &mut Translated, origin: Origin, from: Position, to: Position) -> bool {
    let mut writer = Writer::default();
    let record = Record::read(writer.pack(&[], t));
    let body = Body {
        origin,
        second_page: None,
        length: 0,
        parked_entry: 0,
        parked_way_in: 0,
        movable: t.movable,
        checked: false,
        record,
    };
    // A translation numbers sensitive instructions with zeros.
    t.movable && body.relocate(&mut t.code, from, to, || Some(0))
}

/// Translates what every few bytes of the corpus may be as code in this mode, at several addresses, and compares what
/// relocation makes of each with what translation does; how often it could be relocated.
fn compare(mode: Mode, addresses: &[u64]) -> usize {
    let setting = setting(mode);
    let origin = Origin { address: 0, mode, segment: CodeSegment::FLAT };
    let mut relocated = 0;
    for (i, page) in corpus().chunks(4096).enumerate() {
        for offset in (i % 7..4000).step_by(53) {
            let code = GuestCode { page, offset, segment: CodeSegment::FLAT };
            let all = addresses
                .iter()
                .map(|a| (*a, translate(code, a + offset as u64, &setting, &mut Workspace::default()).unwrap()));
            let all: Vec<(u64, Translated)> = all.collect();
            for (a, t) in &all {
                for (b, expected) in &all {
                    let mut moved = translate(code, a + offset as u64, &setting, &mut Workspace::default()).unwrap();
                    let from = Position { rip: a + offset as u64, host: 0 };
                    let to = Position { rip: b + offset as u64, host: 0 };
                    if !relocate(&mut moved, origin, from, to) {
                        continue;
                    }
                    relocated += 1;
                    assert_eq!(t.links.len(), expected.links.len());
                    assert!(t.links.iter().zip(&expected.links).all(|(l, m)| l.target == m.target));
                    assert!(moved.code == expected.code, "page {i}, offset {offset:#x}, {a:#x} to {b:#x}, {mode:?}");
                }
            }
        }
    }
    relocated
}

#[test]
fn relocated_code_is_what_translation_at_the_other_address_makes() {
    let mode = Mode::of(&kernel_vcpu());
    let high = [0x7f12_3456_7000, 0x5555_5555_4000, 0x7fff_f7ff_f000, 0x1_0000_0000];
    let low = [0x40_0000, 0x8000_0000, 0xffff_f000];
    let kernel = [0xffff_ffff_8100_0000, 0xffff_ffff_c012_3000];
    assert!(compare(mode, &high) > 30_000);
    assert!(compare(mode, &low) > 15_000);
    assert!(compare(mode, &kernel) > 8_000);
}

#[test]
fn code_whose_addresses_are_shorter_or_longer_elsewhere_is_not_relocated() {
    let mode = Mode::of(&kernel_vcpu());
    // call +0
    let page = [0xe8, 0, 0, 0, 0, 0xc3].repeat(10);
    let setting = setting(mode);
    let addresses = [0x40_0000, 0xffff_ffff_8100_0000, 0x7fff_0000_0000];
    let code = GuestCode { page: &page, offset: 0, segment: CodeSegment::FLAT };
    let origin = Origin { address: 0, mode, segment: CodeSegment::FLAT };
    for a in addresses {
        for b in addresses {
            let mut t = translate(code, a, &setting, &mut Workspace::default()).unwrap();
            let (from, to) = (Position { rip: a, host: 0 }, Position { rip: b, host: 0 });
            let moved = relocate(&mut t, origin, from, to);
            assert_eq!(moved, a == b, "{a:#x} to {b:#x}");
        }
    }
}

#[test]
fn sixteen_bit_code_stays_where_it_is() {
    let mode = Mode::of(&test_vcpu(8 << 20));
    assert_eq!(compare(mode, &[0x1000, 0x8000]), 0);
}
