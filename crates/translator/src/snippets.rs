//! Copies of instructions whose access is not a plain one: see [`crate::access`].

use std::ops::Range;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::code_memory::CodeMemory;

/// Code memory that snippets have for themselves.
pub const SNIPPET_BYTES: usize = 64 << 10;

/// A copy of an instruction that stores to the bounce buffer, then to the two pages that its operand lies in.
#[derive(Clone, Copy, Debug)]
pub struct Store {
    /// Its host address, and that of the code behind the instruction.
    pub snippet: u64,
    pub resume: u64,
    /// The processor [notes](crate::codegen::relative::is_noted) where it is.
    pub x87: bool,
}

/// One vCPU's snippets, by the return addresses of their slow-path calls. When their memory is full they are all
/// forgotten: none runs while another one is made.
pub struct Snippets {
    memory: Arc<CodeMemory>,
    area: Range<usize>,
    next: usize,
    /// Host addresses of copies that run on the bounce buffer.
    bounced: FxHashMap<u64, u64>,
    stores: FxHashMap<u64, Store>,
}

impl Snippets {
    /// Snippets that stand from `start` in code memory.
    pub fn new(memory: Arc<CodeMemory>, start: usize) -> Self {
        let area = start..start + SNIPPET_BYTES;
        Snippets { memory, area, next: start, bounced: FxHashMap::default(), stores: FxHashMap::default() }
    }

    pub fn bounced(&self, site: u64) -> Option<u64> {
        self.bounced.get(&site).copied()
    }

    pub fn store(&self, site: u64) -> Option<Store> {
        self.stores.get(&site).copied()
    }

    /// Adds the code for a site; its host address.
    pub fn add_bounced(&mut self, site: u64, code: &[u8]) -> Option<u64> {
        let address = self.add(code)?;
        self.bounced.insert(site, address);
        Some(address)
    }

    /// The same for a store. Emitted code goes on at `resume`.
    pub fn add_store(&mut self, site: u64, code: &[u8], resume: u64, x87: bool) {
        if let Some(snippet) = self.add(code) {
            self.stores.insert(site, Store { snippet, resume, x87 });
        }
    }

    fn add(&mut self, code: &[u8]) -> Option<u64> {
        if self.next + code.len() > self.area.end {
            self.bounced.clear();
            self.stores.clear();
            self.next = self.area.start;
        }
        if self.next + code.len() > self.area.end {
            return None;
        }
        self.memory.write(self.next, code);
        let address = self.memory.host_address(self.next);
        self.next = (self.next + code.len() + 1).next_multiple_of(16);
        Some(address)
    }

    /// Forgets the snippets of sites in code that is dropped.
    pub fn forget(&mut self, sites: Range<u64>) {
        self.bounced.retain(|site, _| !sites.contains(site));
        self.stores.retain(|site, _| !sites.contains(site));
    }

    /// The site whose snippet holds a host address.
    pub fn site(&self, address: u64) -> Option<u64> {
        let (start, end) = (self.memory.host_address(self.area.start), self.memory.host_address(self.next));
        let inside = (start..end).contains(&address);
        let stores = self.stores.iter().map(|(&site, s)| (site, s.snippet));
        let all = self.bounced.iter().map(|(&site, &at)| (site, at)).chain(stores);
        all.filter(|&(_, at)| inside && at <= address).max_by_key(|&(_, at)| at).map(|(site, _)| site)
    }
}
