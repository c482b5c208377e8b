//! The local descriptor table of segmented cases: the same on the native side, by `modify_ldt`, and in the guest.
//!
//! All data segments begin where the data does, and code segments where the code does, so that what an offset reaches
//! depends only on their limits and types.

use std::io;

use arch::Segment;

use crate::layout::{CODE, DATA};

/// One descriptor, in the terms of the host's `user_desc`.
#[derive(Clone, Copy)]
struct Entry {
    base: u64,
    limit: u32,
    wide: bool,
    /// 0: data, 1: expand-down data, 2: code.
    contents: u32,
    /// Data that can't be written, code that can't be read.
    restricted: bool,
    pages: bool,
    absent: bool,
}

const PLAIN: Entry =
    Entry { base: DATA, limit: 0xffff, wide: false, contents: 0, restricted: false, pages: false, absent: false };

const ENTRIES: [Entry; 9] = [
    Entry { base: CODE, contents: 2, ..PLAIN },
    PLAIN,
    Entry { limit: 0xf_ffff, wide: true, pages: true, ..PLAIN },
    Entry { limit: 0x17ff, ..PLAIN },
    Entry { restricted: true, ..PLAIN },
    Entry { limit: 0xfff, contents: 1, ..PLAIN },
    Entry { base: CODE, contents: 2, wide: true, ..PLAIN },
    Entry { base: CODE, contents: 2, restricted: true, ..PLAIN },
    Entry { absent: true, ..PLAIN },
];

pub const LIMIT: u32 = ENTRIES.len() as u32 * 8 - 1;

const fn selector(index: u16) -> u16 {
    index << 3 | 7
}

pub const CODE16: u16 = selector(0);
pub const CODE32: u16 = selector(6);
pub const DATA16: u16 = selector(1);
pub const BIG: u16 = selector(2);
pub const LIMITED: u16 = selector(3);
pub const READ_ONLY: u16 = selector(4);
pub const EXPAND_DOWN: u16 = selector(5);
/// All of them, and one beyond.
pub const SELECTORS: [u16; 10] =
    [CODE16, DATA16, BIG, LIMITED, READ_ONLY, EXPAND_DOWN, CODE32, selector(7), selector(8), selector(9)];

fn entry(selector: u16) -> Option<&'static Entry> {
    (selector & 4 != 0).then(|| ENTRIES.get(usize::from(selector >> 3)))?
}

/// The base of a segment of this table; zero for those of the global one, which are flat.
pub fn base(selector: u16) -> u64 {
    entry(selector).map_or(0, |e| e.base)
}

impl Entry {
    fn descriptor(&self) -> u64 {
        let flag = |on: bool, bit: u32| u64::from(on) << bit;
        let kind = u64::from(self.contents) << 2 | flag(!self.restricted, 1) | 1;
        let limit = u64::from(self.limit);
        limit & 0xffff
            | (self.base & 0xff_ffff) << 16
            | kind << 40
            | 7 << 44 // code or data, DPL 3
            | flag(!self.absent, 47)
            | (limit >> 16 & 0xf) << 48
            | flag(self.wide, 54)
            | flag(self.pages, 55)
            | (self.base >> 24 & 0xff) << 56
    }
}

/// The table's bytes.
pub fn table() -> Vec<u8> {
    ENTRIES.iter().flat_map(|e| e.descriptor().to_le_bytes()).collect()
}

/// What a segment register holds after a selector of this table was loaded.
pub fn segment(selector: u16) -> Option<Segment> {
    let e = entry(selector)?;
    let attributes = (e.descriptor() >> 40) as u16 & 0xf0ff;
    let limit = if e.pages { e.limit << 12 | 0xfff } else { e.limit };
    Some(Segment { base: e.base, limit, attributes, selector })
}

/// Linux's `struct user_desc`.
#[repr(C)]
struct UserDesc {
    entry_number: u32,
    base: u32,
    limit: u32,
    flags: u32,
}

/// Gives this process the table. Fails where the host's kernel has no `modify_ldt` (CONFIG_MODIFY_LDT_SYSCALL).
pub fn install() -> io::Result<()> {
    for (i, e) in ENTRIES.iter().enumerate() {
        let flag = |on: bool, bit: u32| u32::from(on) << bit;
        let flags = flag(e.wide, 0) | e.contents << 1 | flag(e.restricted, 3) | flag(e.pages, 4) | flag(e.absent, 5);
        let mut d = UserDesc { entry_number: i as u32, base: e.base as u32, limit: e.limit, flags };
        // SAFETY: the kernel reads the structure and changes this process's own table only.
        let failed =
            unsafe { libc::syscall(libc::SYS_modify_ldt, 0x11, &raw mut d, size_of::<UserDesc>()) } as i32 != 0;
        if failed {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
