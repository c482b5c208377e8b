//! How to store operands that cross a page's end, learned by the slow path so that the next time is quick.

use rustc_hash::FxHashMap;

/// A copy of an instruction that stores to the bounce buffer, then to the guest's pages.
#[derive(Clone, Copy, Debug)]
pub struct Store {
    /// Its host address, and that of the code behind the instruction.
    pub snippet: u64,
    pub resume: u64,
}

/// By the return address of the place's slow-path call.
#[derive(Default)]
pub struct Stores(FxHashMap<u64, Store>);

impl Stores {
    /// Forgets everything: code memory begins anew.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    pub fn learn(&mut self, place: u64, store: Store) {
        self.0.insert(place, store);
    }

    pub fn get(&self, place: u64) -> Option<Store> {
        self.0.get(&place).copied()
    }

    /// The place whose store's snippet begins last before a host address, and that beginning.
    pub fn before(&self, address: u64) -> Option<(u64, u64)> {
        let before = self.0.iter().filter(|(_, s)| s.snippet <= address);
        before.map(|(&place, s)| (place, s.snippet)).max_by_key(|&(_, snippet)| snippet)
    }
}
