//! [`Record`]: the packed form in which a cache keeps what a translation knows of its code.
//!
//! There are tens of thousands of blocks, each is looked at rarely, and most of what it knows are small distances between
//! neighbours: so all of it is a string of LEB128 numbers, differences to the entry before. A record begins with the sizes of
//! its sections; each is read from its beginning.

use std::ops::Range;

use crate::body::{Field, Link, Point, Relocation, Site};
use crate::codegen::block::Translated;

/// A translation's record, section by section.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// All of it.
    pub packed: &'a [u8],
    /// The guest's instructions.
    pub bytes: &'a [u8],
    lookahead: (u16, u16),
    links: &'a [u8],
    points: &'a [u8],
    sites: &'a [u8],
    relocations: &'a [u8],
}

/// The sections' sizes, and the two ends of the lookahead.
const HEADER: usize = 7;

impl<'a> Record<'a> {
    /// The record that begins here.
    pub fn read(from: &'a [u8]) -> Self {
        let mut reader = Reader(from);
        let [lookahead, lookahead_end, bytes, links, points, sites, relocations]: [u32; HEADER] =
            std::array::from_fn(|_| reader.number());
        let mut section = |length: u32| {
            let (section, rest) = reader.0.split_at_checked(length as usize).unwrap_or_default();
            reader = Reader(rest);
            section
        };
        Record {
            lookahead: (lookahead as u16, lookahead_end as u16),
            bytes: section(bytes),
            links: section(links),
            points: section(points),
            sites: section(sites),
            relocations: section(relocations),
            packed: &from[..from.len() - reader.0.len()],
        }
    }

    /// Bytes of the page that were only looked at, to see which flags are needed where a branch leads.
    pub fn lookahead(&self) -> Range<usize> {
        self.lookahead.0.into()..self.lookahead.1.into()
    }

    pub fn links(&self) -> impl Iterator<Item = Link> + use<'a> {
        let mut stub_offset = 0;
        Reader(self.links).entries(move |r| {
            let first = r.number();
            stub_offset += (first >> 2) as u16;
            let parked = first & 1 != 0;
            if first & 2 != 0 {
                return Link::detour(stub_offset, r.signed(), parked);
            }
            let return_offset = stub_offset + r.number() as u16;
            let patch_offset = (i32::from(stub_offset) - r.signed()) as u16;
            let target = r.signed();
            Link { stub_offset, return_offset, patch_offset, target, parked, detour: false }
        })
    }

    /// Where each instruction begins; one more for the end of the last.
    fn bounds(&self) -> impl Iterator<Item = Point> + use<'a> {
        let (mut host_offset, mut guest_offset) = (0, 0);
        Reader(self.points).entries(move |r| {
            let first = r.number();
            host_offset += (first >> 1) as u16;
            guest_offset = (i32::from(guest_offset) + r.signed()) as u16;
            Point { host_offset, guest_offset, parked: first & 1 != 0 }
        })
    }

    /// The instruction whose code has a host offset.
    pub fn point_at(&self, host_offset: u16) -> Option<Point> {
        self.bounds().take_while(|p| p.host_offset <= host_offset).last()
    }

    /// How many guest instructions there are.
    pub fn instructions(&self) -> usize {
        self.bounds().count().saturating_sub(1)
    }

    /// The slow-path call that returns to an offset: its instruction, where that one's host code ends, whether flags are
    /// parked.
    pub fn site(&self, return_offset: u16) -> Option<(Point, u16, bool)> {
        let (mut offset, mut point) = (0, 0);
        let mut sites = Reader(self.sites).entries(move |r| {
            let first = r.number();
            offset += (first >> 1) as u16;
            point += r.signed();
            (offset, point as usize, first & 1 != 0)
        });
        let (_, index, parked) = sites.find(|&(offset, ..)| offset == return_offset)?;
        let mut bounds = self.bounds().skip(index);
        let (point, next) = (bounds.next()?, bounds.next()?);
        Some((point, next.host_offset, parked))
    }

    pub fn relocations(&self) -> impl Iterator<Item = Relocation> + use<'a> {
        let (mut offset, mut about) = (0, 0i32);
        Reader(self.relocations).entries(move |r| {
            let first = r.number();
            offset = u16::wrapping_add(offset, (first >> 3) as u16);
            let field = Field::ALL[(first & 7) as usize % Field::ALL.len()];
            let mut delta = 0;
            if field.is_guest_address() {
                about = about.wrapping_add(r.signed());
                delta = about;
            }
            Relocation { offset, field, delta }
        })
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// The next number; zero behind the end.
    fn number(&mut self) -> u32 {
        let mut value = 0;
        for shift in (0..32).step_by(7) {
            let Some((&byte, rest)) = self.0.split_first() else { return 0 };
            self.0 = rest;
            value |= u32::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    }

    fn signed(&mut self) -> i32 {
        let n = self.number();
        (n >> 1) as i32 ^ -((n & 1) as i32)
    }

    fn entries<T>(mut self, mut next: impl FnMut(&mut Self) -> T) -> impl Iterator<Item = T> {
        std::iter::from_fn(move || (!self.0.is_empty()).then(|| next(&mut self)))
    }
}

/// Builds records; keeps its memory from one to the next.
#[derive(Default)]
pub struct Writer {
    record: Vec<u8>,
    body: Vec<u8>,
}

impl Writer {
    /// The record of a translation of `bytes`.
    pub fn pack(&mut self, bytes: &[u8], t: &Translated) -> &[u8] {
        self.body.clear();
        self.body.extend_from_slice(bytes);
        let ends =
            [self.links(&t.links), self.points(&t.points, t.end), self.sites(&t.sites), self.relocate(&t.relocations)];
        self.record.clear();
        number(&mut self.record, t.lookahead.start as u32);
        number(&mut self.record, t.lookahead.end as u32);
        let mut start = 0;
        for end in [bytes.len()].into_iter().chain(ends) {
            number(&mut self.record, (end - start) as u32);
            start = end;
        }
        self.record.extend_from_slice(&self.body);
        &self.record
    }

    fn links(&mut self, links: &[Link]) -> usize {
        let mut before = 0;
        for l in links {
            number(
                &mut self.body,
                u32::from(l.stub_offset - before) << 2 | u32::from(l.detour) << 1 | u32::from(l.parked),
            );
            // Of a detour all lies where it has to.
            if !l.detour {
                number(&mut self.body, u32::from(l.return_offset - l.stub_offset));
                signed(&mut self.body, i32::from(l.stub_offset) - i32::from(l.patch_offset));
            }
            signed(&mut self.body, l.target);
            before = l.stub_offset;
        }
        self.body.len()
    }

    fn points(&mut self, points: &[Point], end: u16) -> usize {
        let last = Point { host_offset: end, guest_offset: points.last().map_or(0, |p| p.guest_offset), parked: false };
        let mut before = Point { host_offset: 0, guest_offset: 0, parked: false };
        for &p in points.iter().chain([&last]) {
            number(&mut self.body, u32::from(p.host_offset - before.host_offset) << 1 | u32::from(p.parked));
            signed(&mut self.body, i32::from(p.guest_offset) - i32::from(before.guest_offset));
            before = p;
        }
        self.body.len()
    }

    fn sites(&mut self, sites: &[Site]) -> usize {
        let (mut offset, mut point) = (0, 0);
        for s in sites {
            number(&mut self.body, u32::from(s.return_offset - offset) << 1 | u32::from(s.parked));
            signed(&mut self.body, i32::from(s.point) - i32::from(point));
            (offset, point) = (s.return_offset, s.point);
        }
        self.body.len()
    }

    fn relocate(&mut self, relocations: &[Relocation]) -> usize {
        let (mut offset, mut about) = (0, 0);
        for r in relocations {
            number(&mut self.body, u32::from(r.offset.wrapping_sub(offset)) << 3 | r.field as u32);
            if r.field.is_guest_address() {
                signed(&mut self.body, r.delta.wrapping_sub(about));
                about = r.delta;
            }
            offset = r.offset;
        }
        self.body.len()
    }
}

fn number(to: &mut Vec<u8>, mut n: u32) {
    while n >= 0x80 {
        to.push(n as u8 | 0x80);
        n >>= 7;
    }
    to.push(n as u8);
}

fn signed(to: &mut Vec<u8>, n: i32) {
    number(to, (n << 1 ^ n >> 31) as u32);
}

#[cfg(test)]
mod tests;
