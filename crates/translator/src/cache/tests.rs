use std::sync::OnceLock;

use super::*;
use crate::codegen::block::{Setting, Workspace, translate};
use crate::codegen::decode::GuestCode;
use crate::mode::Mode;
use crate::testing::{kernel_vcpu, setting, user_vcpu};

use super::copies::MAX_COPIES;

const RIP: u64 = 0x7f00_0000_0000;

fn small_cache() -> Cache {
    Cache::new(Arc::new(CodeMemory::new(512 << 10).unwrap()), None)
}

fn origin(page: u64, offset: usize) -> Origin {
    static MODE: OnceLock<Mode> = OnceLock::new();
    let mode = *MODE.get_or_init(|| Mode::of(&kernel_vcpu()));
    Origin { address: page << 12 | offset as u64, mode, segment: CodeSegment::FLAT }
}

/// Adds the block that begins at an offset of a page, if it is not there.
fn add(cache: &mut Cache, origin: Origin, page: &[u8], rip: u64) -> BlockId {
    if let Some(id) = cache.find(origin, rip) {
        return id;
    }
    add_with(cache, origin, page, rip, false)
}

/// The same; with what is needed to take it up again.
fn add_with(cache: &mut Cache, origin: Origin, page: &[u8], rip: u64, template: bool) -> BlockId {
    let setting = Setting { jump_slot: Some(0), template, ..setting(origin.mode) };
    let offset = (origin.address & 0xfff) as usize;
    let code = GuestCode { page, offset, segment: CodeSegment::FLAT };
    let mut t = translate(code, rip, &setting, &mut Workspace::default()).unwrap();
    assert!(cache.make_room(t.code.len()));
    let bytes = &page[offset..(offset + t.guest_length).min(page.len())];
    let ahead = template.then(|| &page[t.lookahead.clone()]);
    cache.insert(origin, rip, None, bytes, ahead, &mut t).unwrap()
}

/// N times `add rax, imm8`, and a jump to `target`, an offset in the page.
fn block_code(page: &mut [u8], at: usize, n: usize, target: usize) -> usize {
    let mut end = at;
    for i in 0..n {
        page[end..end + 4].copy_from_slice(&[0x48, 0x83, 0xc0, i as u8]);
        end += 4;
    }
    page[end] = 0xe9;
    let rel = target as i32 - (end as i32 + 5);
    page[end + 1..end + 5].copy_from_slice(&rel.to_le_bytes());
    end + 5
}

/// Where the first link of a block leads, in code memory: read from its code.
fn leads_to(cache: &Cache, id: BlockId) -> usize {
    let (block, body) = cache.block(id).unwrap();
    let at = block.start() + body.record.links().next().unwrap().patch_offset as usize;
    let mut rel = [0; 4];
    cache.memory.read(at, &mut rel);
    (at as i64 + 4 + i64::from(i32::from_le_bytes(rel))) as usize
}

#[test]
fn however_often_code_memory_was_full_every_block_is_found_by_its_addresses() {
    let mut cache = small_cache();
    let mut page = vec![0x90; 4096];
    for i in 0..20_000usize {
        let n = 1 + i * 7 % 31;
        block_code(&mut page, 0, n, 0);
        let id = add(&mut cache, origin(i as u64, 0), &page, RIP);
        let (block, body) = cache.block(id).unwrap();
        let (start, length) = (block.start(), body.length);
        assert!(start + (length as usize) < cache.memory.size());
        // The stub of its link is the last it has: the return address is its very end.
        assert_eq!(body.record.links().next().unwrap().return_offset, length);
        let end = cache.host_address(start, length);
        assert_eq!(cache.find_by_host(end), Some((id, length)));
        assert_eq!(cache.find_by_host(cache.host_address(start, 0)), Some((id, 0)));
        let (link, target, _) = cache.find_link(end, 0).unwrap();
        assert_eq!(target, RIP);
        cache.link(link, id, false);
        assert_eq!(leads_to(&cache, id), start);
    }
    assert!(cache.stats.evicted_regions > 20);
    let live = cache.blocks.iter().filter(|b| b.live).count();
    assert_eq!(cache.by_origin.len(), live);
    assert_eq!(cache.by_page.values().map(|code| code.blocks.len()).sum::<usize>(), live);
    assert!(cache.blocks.len() < 5000, "blocks that were dropped leave their number to others");
}

#[test]
fn copies_are_linked_like_their_original_and_the_oldest_moves() {
    let mut cache = small_cache();
    let mut page = vec![0x90; 4096];
    block_code(&mut page, 0, 3, 0x400);
    block_code(&mut page, 0x400, 5, 0);
    let (a, b) = (add(&mut cache, origin(1, 0), &page, RIP), add(&mut cache, origin(1, 0x400), &page, RIP + 0x400));
    for (from, to) in [(a, b), (b, a)] {
        cache.link(LinkId { block: from, index: 0 }, to, false);
    }
    for n in 1..10 {
        let rip = RIP + n * 0x5000;
        let copy = cache.copy(a, rip).unwrap();
        let other = cache.find(origin(1, 0x400), rip + 0x400).expect("what it leads to comes along");
        assert_eq!(cache.find(origin(1, 0), rip), Some(copy));
        let (copied, copied_other) = (cache.at(copy), cache.at(other));
        assert_eq!((copied.rip, copied_other.rip), (rip, rip + 0x400));
        assert_eq!(leads_to(&cache, copy), copied_other.start());
        let count = cache.at_origin(origin(1, 0)).count();
        assert_eq!(count, MAX_COPIES.min(n as usize + 1));
    }
    assert!(!cache.at_origin(origin(1, 0)).any(|id| cache.at(id).rip == RIP), "the oldest was moved");
}

#[test]
fn dropping_a_block_leads_what_was_linked_to_it_to_the_dispatcher() {
    let mut cache = small_cache();
    let mut page = vec![0x90; 4096];
    for at in [0, 0x100, 0x200] {
        block_code(&mut page, at, 2, 0x600);
    }
    block_code(&mut page, 0x600, 2, 0);
    let ids: Vec<BlockId> =
        [0, 0x100, 0x200, 0x600].map(|at| add(&mut cache, origin(1, at), &page, RIP + at as u64)).to_vec();
    for &id in &ids[..3] {
        cache.link(LinkId { block: id, index: 0 }, ids[3], false);
    }
    cache.invalidate(1 << 12, 0x100..0x101);
    assert!(!cache.is_live(ids[1]));
    cache.invalidate(1 << 12, 0x605..0x606);
    for &id in [&ids[0], &ids[2]] {
        let (block, body) = cache.block(id).unwrap();
        assert_eq!(leads_to(&cache, id), block.start() + body.record.links().next().unwrap().stub_offset as usize);
    }
    cache.reap();
    cache.invalidate(1 << 12, 0..4096);
    assert!(!cache.has_page(1 << 12));
    assert!(cache.by_origin.is_empty() && cache.by_page.is_empty());
}

#[test]
fn code_that_is_patched_and_translated_again_and_again_takes_no_more_room() {
    let mut cache = small_cache();
    let mut page = vec![0x90; 4096];
    block_code(&mut page, 0, 30, 0);
    let first = add(&mut cache, origin(1, 0), &page, RIP);
    let start = cache.at(first).start();
    for _ in 0..5000 {
        cache.invalidate(1 << 12, 0..1);
        cache.reap();
        let id = add(&mut cache, origin(1, 0), &page, RIP);
        assert_eq!(cache.at(id).start(), start);
    }
    assert_eq!((cache.stats.evicted_regions, cache.blocks.len()), (0, 1));
}

/// `mov ecx, imm32`, `add ecx, imm8`, `ret`.
const PATCHED: [u8; 9] = [0xb9, 1, 2, 3, 4, 0x83, 0xc1, 5, 0xc3];

fn host_code(cache: &Cache, id: BlockId) -> Vec<u8> {
    let block = cache.at(id);
    let mut code = vec![0; block.length as usize];
    cache.memory.read(block.start(), &mut code);
    code
}

#[test]
fn a_block_whose_immediates_were_written_is_taken_up_again_with_the_new_ones() {
    let mut cache = small_cache();
    let mut page = vec![0x90; 4096];
    page[0x40..0x49].copy_from_slice(&PATCHED);
    let rip = RIP + 0x40;
    let origin = origin(1, 0x40);
    let id = add_with(&mut cache, origin, &page, rip, true);
    let before = host_code(&cache, id);
    cache.invalidate(1 << 12, 0x41..0x42);
    assert!(!cache.is_live(id) && cache.find(origin, rip).is_none() && !cache.has_page(1 << 12));
    assert_eq!(cache.sleeper(origin, rip), Some(0x40..0x49));
    assert_eq!(cache.wake(origin, rip, &page), Woken::Unchanged(id));
    assert_eq!((cache.find(origin, rip), host_code(&cache, id)), (Some(id), before));

    cache.invalidate(1 << 12, 0x49..0x4a);
    assert!(cache.is_live(id), "that was beside it");
    cache.invalidate(1 << 12, 0..4096);
    page[0x41..0x45].copy_from_slice(&[6, 7, 8, 9]);
    page[0x47] = 10;
    assert_eq!(cache.wake(origin, rip, &page), Woken::Changed(id));
    assert!(host_code(&cache, id).starts_with(&[0xb9, 6, 7, 8, 9, 0x83, 0xc1, 10]));
    assert_eq!(cache.body(id).record.bytes, &page[0x40..0x49]);
    assert_eq!(cache.at(id).print, print(cache.body(id).record.packed), "copies are told by it");
}

#[test]
fn a_block_of_which_more_than_immediates_was_written_is_dropped_when_it_is_looked_for() {
    for changed in [0, 6, 8] {
        let mut cache = small_cache();
        let mut page = vec![0x90; 4096];
        page[..9].copy_from_slice(&PATCHED);
        let id = add_with(&mut cache, origin(1, 0), &page, RIP, true);
        cache.invalidate(1 << 12, 0..1);
        page[changed] ^= 1;
        assert_eq!(cache.wake(origin(1, 0), RIP, &page), Woken::No);
        assert!(!cache.is_live(id) && cache.asleep.is_empty());
    }
}

#[test]
fn code_that_was_looked_at_ahead_must_be_the_same_when_a_block_is_taken_up_again() {
    let mut cache = small_cache();
    let mut page = vec![0x90; 4096];
    // The flags of CMP aren't needed because of the XOR that the jump leads to.
    page[..5].copy_from_slice(&[0x39, 0xc8, 0xeb, 0x10, 0x90]);
    page[0x14..0x16].copy_from_slice(&[0x31, 0xc0]);
    let id = add_with(&mut cache, origin(1, 0), &page, RIP, true);
    assert!(cache.body(id).extent().contains(&0x14));
    cache.invalidate(1 << 12, 0x14..0x15);
    assert!(!cache.is_live(id));
    page[0x14..0x16].copy_from_slice(&[0x0f, 0x94]);
    assert_eq!(cache.wake(origin(1, 0), RIP, &page), Woken::No);
}

#[test]
fn blocks_that_sleep_make_room_like_others() {
    let mut cache = small_cache();
    let mut page = vec![0x90; 4096];
    for i in 0..20_000usize {
        block_code(&mut page, 0, 1 + i * 7 % 31, 0);
        add_with(&mut cache, origin(i as u64, 0), &page, RIP, true);
        cache.invalidate((i as u64) << 12, 0..1);
        cache.reap();
    }
    assert!(cache.stats.evicted_regions > 10);
    assert!(cache.asleep.len() < 5000 && cache.blocks.len() < 5000);
    assert!(cache.by_origin.is_empty() && cache.by_page.is_empty());
}

#[test]
fn a_store_drops_exactly_the_blocks_that_were_made_of_its_bytes() {
    let mut cache = small_cache();
    let mut page = vec![0x90; 4096];
    block_code(&mut page, 0x100, 3, 0);
    block_code(&mut page, 0x110, 3, 0);
    let ids = [0x100, 0x110].map(|at| add(&mut cache, origin(1, at), &page, RIP + at as u64));
    // Within a line of theirs, and of none.
    for bytes in [0x0fc..0x100, 0x121..0x122, 0x800..0x808] {
        assert!(!cache.overlaps(1 << 12, &bytes));
        assert_eq!(cache.invalidate(1 << 12, bytes), 0);
    }
    assert!(cache.overlaps(1 << 12, &(0x0fd..0x101)));
    assert_eq!(cache.invalidate(1 << 12, 0x120..0x121), 1);
    assert_eq!(ids.map(|id| cache.is_live(id)), [true, false]);
    assert!(!cache.overlaps(1 << 12, &(0x120..0x121)));
    assert_eq!(cache.invalidate(1 << 12, 0x0fd..0x101), 1);
    assert!(!cache.has_page(1 << 12));
}

#[test]
fn a_block_across_two_mappings_of_one_frame_goes_with_the_bytes_of_either() {
    let page = [vec![0x90; 4090], vec![0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8, 0xc3], vec![0x90; 4085]].concat();
    for (bytes, hit) in [(0..1, 1), (3..5, 1), (5..6, 0), (0xff9..0xffa, 0), (0xfff..0x1000, 1)] {
        let mut cache = small_cache();
        let origin = origin(1, 4090);
        let code = GuestCode { page: &page[..4100], offset: 4090, segment: CodeSegment::FLAT };
        let mut t = translate(code, RIP, &setting(origin.mode), &mut Workspace::default()).unwrap();
        assert!(cache.make_room(t.code.len()));
        cache.insert(origin, RIP, Some(1 << 12), &page[4090..4101], None, &mut t).unwrap();
        assert_eq!(cache.invalidate(1 << 12, bytes.clone()), hit, "{bytes:?}");
    }
}

/// A block that jumps to another page, with what is there, both in pages of their own.
fn far_pair(cache: &mut Cache) -> (BlockId, BlockId) {
    let mut page = vec![0x90; 4096];
    block_code(&mut page, 0, 3, 0x5400);
    let setting = Setting { jump_slot: Some(0), far_links: true, ..setting(origin(1, 0).mode) };
    let code = GuestCode { page: &page, offset: 0, segment: CodeSegment::FLAT };
    let mut t = translate(code, RIP, &setting, &mut Workspace::default()).unwrap();
    let from = cache.insert(origin(1, 0), RIP, None, &page[..t.guest_length], None, &mut t).unwrap();
    let mut page = vec![0x90; 4096];
    block_code(&mut page, 0x400, 5, 0);
    (from, add(cache, origin(9, 0x400), &page, RIP + 0x5400))
}

#[test]
fn a_branch_to_another_page_is_linked_until_global_pages_are_flushed() {
    let mut cache = small_cache();
    let (from, to) = far_pair(&mut cache);
    let link = LinkId { block: from, index: 0 };
    for _ in 0..3 {
        let stub = cache.at(from).start() + usize::from(cache.link_of(link).unwrap().stub_offset);
        assert_eq!(leads_to(&cache, from), stub);
        cache.link(link, to, true);
        assert_eq!(leads_to(&cache, from), cache.at(to).start());
        cache.unlink_far();
        assert!(cache.far_links.is_empty() && cache.at(to).incoming.is_none());
    }
    cache.link(link, to, true);
    cache.remove(to);
    let block = cache.at(from);
    let stub = block.start() + usize::from(cache.link_of(link).unwrap().stub_offset);
    assert_eq!(leads_to(&cache, from), stub, "a target that is gone is linked to no more");
    cache.unlink_far();
    assert_eq!(leads_to(&cache, from), stub);
}

#[test]
fn a_branch_to_a_page_that_is_not_global_is_not_linked() {
    let mut cache = small_cache();
    let (from, to) = far_pair(&mut cache);
    let link = LinkId { block: from, index: 0 };
    cache.link(link, to, false);
    let stub = cache.at(from).start() + usize::from(cache.link_of(link).unwrap().stub_offset);
    assert_eq!(leads_to(&cache, from), stub);
    assert!(cache.far_links.is_empty() && cache.at(to).incoming.is_none());
    cache.link(link, to, true);
    let copy = cache.copy(from, RIP + 0x10_0000).unwrap();
    let stub = cache.at(copy).start() + usize::from(cache.link_of(link).unwrap().stub_offset);
    assert_eq!(leads_to(&cache, copy), stub, "a copy finds out for itself");
}

fn user_mode() -> Mode {
    static MODE: OnceLock<Mode> = OnceLock::new();
    *MODE.get_or_init(|| Mode::of(&user_vcpu()))
}

/// A relative block of a program's page.
fn add_relative(cache: &mut Cache, page_number: u64, offset: usize, page: &[u8]) -> BlockId {
    let origin = Origin { mode: user_mode(), ..origin(page_number, offset) };
    let setting = Setting { jump_slot: Some(0), relative: true, ..setting(origin.mode) };
    let code = GuestCode { page, offset, segment: CodeSegment::FLAT };
    let mut t = translate(code, offset as u64, &setting, &mut Workspace::default()).unwrap();
    assert!(cache.make_room(t.code.len()));
    let bytes = &page[offset..offset + t.guest_length];
    cache.insert(origin, offset as u64, None, bytes, None, &mut t).unwrap()
}

#[test]
fn a_relative_block_is_found_at_every_address_until_it_is_dropped() {
    let mut cache = small_cache();
    let mut page = vec![0x90; 4096];
    block_code(&mut page, 0, 3, 0x400);
    block_code(&mut page, 0x400, 5, 0);
    let ids = [0, 0x400].map(|offset| add_relative(&mut cache, 1, offset, &page));
    let origin = cache.at(ids[0]).origin;
    assert!(cache.is_relative_page(1 << 12));
    cache.link(LinkId { block: ids[0], index: 0 }, ids[1], false);
    assert_eq!(leads_to(&cache, ids[0]), cache.at(ids[1]).start() + WAY_IN, "linked blocks are in the same page");
    let addresses: [u64; 3] = std::array::from_fn(|n| RIP + n as u64 * 0x5000);
    for rip in addresses {
        assert_eq!(cache.find(origin, rip), Some(ids[0]));
        cache.enter_jump(ids[0], rip, false);
    }
    let found = |cache: &Cache| addresses.map(|rip| cache.jump(origin.mode, rip));
    assert_eq!(found(&cache), [Some(cache.entry(ids[0])); 3]);
    cache.invalidate(1 << 12, 0..1);
    assert_eq!(found(&cache), [None; 3]);
    assert_eq!(cache.find(origin, RIP), None);
    // Its memory isn't another block's as long as the jump table leads there.
    let start = cache.at(ids[0]).start();
    cache.reap();
    let other = add_relative(&mut cache, 2, 0, &page);
    assert_ne!(cache.at(other).start(), start);
    assert_eq!(found(&cache), [None; 3]);
    cache.invalidate(1 << 12, 0..4096);
    assert!(!cache.is_relative_page(1 << 12));
}

#[test]
fn what_led_to_relative_blocks_is_forgotten_when_their_memory_serves_for_others() {
    let mut cache = small_cache();
    let mut page = vec![0x90; 4096];
    let mode = user_mode();
    for i in 0..12_000usize {
        block_code(&mut page, 0, 1 + i * 7 % 31, 0);
        let id = add_relative(&mut cache, i as u64, 0, &page);
        for copy in 0..2 {
            cache.enter_jump(id, RIP + i as u64 * 4 + (copy << 40), false);
        }
    }
    assert!(cache.stats.evicted_regions > 5);
    let live: Vec<u64> = (0..cache.blocks.len())
        .filter_map(BlockId::nth)
        .filter(|id| cache.is_live(*id))
        .map(|id| cache.entry(id))
        .collect();
    let mut found = 0;
    for i in 0..12_000 {
        for copy in 0..2 {
            let key = RIP + i * 4 + (copy << 40);
            for entry in [cache.jump(mode, key), cache.jumps.recall(mode, key)].into_iter().flatten() {
                assert!(live.contains(&entry) || cache.leads_out(entry), "an entry within other code");
                found += 1;
            }
        }
    }
    assert!(found > 100);
}

#[test]
fn code_that_neither_can_be_copied_nor_is_relative_is_kept_at_few_addresses() {
    let mut cache = small_cache();
    let page = vec![0x90; 4096 + 15];
    let origin = origin(1, 4090);
    for n in 0..100 {
        let rip = RIP + n * 0x5000 + 4090;
        let code = GuestCode { page: &page, offset: 4090, segment: CodeSegment::FLAT };
        let mut t = translate(code, rip, &setting(origin.mode), &mut Workspace::default()).unwrap();
        let id = cache.insert(origin, rip, Some(2 << 12), &page[4090..4090 + t.guest_length], None, &mut t);
        assert_eq!(cache.find(origin, rip), id);
        assert_eq!(cache.at_origin(origin).count(), MAX_COPIES.min(n as usize + 1));
    }
}
