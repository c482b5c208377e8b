//! Forgetting translations of addresses: the one place that the instructions which do so go through.

use arch::registers::cr4;

use crate::Vcpu;

/// In a value for CR3 under CR4.PCIDE: what is cached for its PCID stays.
const NO_FLUSH: u64 = 1 << 63;

impl Vcpu {
    /// Forgets every translation. To be called as well after anything changed that decides how addresses are translated
    /// other than by CR3: CR0.PG/WP, CR4, EFER, PKRU.
    pub fn mmu_flush_all(&mut self) {
        self.tlb.flush_all();
        self.engine.drop_address_caches();
        self.engine.spaces.clear();
        self.engine.native.flushed(None);
    }

    /// Forgets every translation but those of global pages, whatever their PCID.
    pub fn mmu_flush_local(&mut self) {
        self.flush_current();
        self.engine.spaces.clear();
        self.engine.native.flushed(None);
    }

    /// Forgets a PCID's translations, but for those of global pages.
    pub fn mmu_flush_pcid(&mut self, pcid: u64) {
        if pcid == self.pcid() {
            self.flush_current();
        }
        self.engine.spaces.forget(pcid);
        self.engine.native.flushed(Some(pcid));
    }

    /// Forgets the translation of the page at `va`: the current PCID's, and a global one.
    pub fn mmu_flush_page(&mut self, va: u64) {
        self.tlb.flush_page(va);
        self.engine.drop_address(va);
        self.engine.native.page_flushed(self.cr3, va);
    }

    /// Sets CR3, already checked, and forgets what that invalidates (Intel SDM 3A 4.10.4.1).
    pub fn mmu_load_cr3(&mut self, value: u64) {
        let left = std::mem::replace(&mut self.cr3, value & !NO_FLUSH);
        let pcids = self.cr4 & cr4::PCIDE != 0;
        let keep = pcids && value & NO_FLUSH != 0;
        if keep && self.cr3 == left {
            return;
        }
        if !keep {
            self.engine.native.flushed(pcids.then_some(self.pcid()));
        }
        self.native_switched();
        if !pcids || left & 0xfff == self.pcid() {
            return self.flush_current();
        }
        self.leave_space(left, self.cr3);
        if !keep {
            self.engine.spaces.forget(self.pcid());
        }
        self.enter_space(self.cr3);
    }

    /// Goes on by another memory map than before without paging. Addresses mean what they meant when that map was last left, unless
    /// something was flushed since: firmware enters system-management mode each time that it changes from 16-bit to 32-bit code.
    /// Paging and PCIDs being off, no address space waits in either map: both can do so under a value of CR3 that is not in use.
    pub fn mmu_change_unpaged_map(&mut self, smm: bool) {
        let key = u64::from;
        self.leave_space(key(!smm), key(smm));
        self.enter_space(key(smm));
    }

    /// Lets what is not global wait under a value of CR3.
    fn leave_space(&mut self, left: u64, next: u64) {
        let space = self.engine.spaces.leave(left, next);
        self.tlb.take_local(&mut space.mappings);
        self.engine.cache.jumps.leave(&mut space.jumps);
        space.fetches.clear();
        std::mem::swap(&mut self.engine.fetches, &mut space.fetches);
    }

    /// Goes on with what waits under a value of CR3.
    fn enter_space(&mut self, cr3: u64) {
        let Some(space) = self.engine.spaces.enter(cr3) else { return self.engine.cache.jumps.start_space() };
        self.tlb.put_back(&space.mappings);
        self.engine.cache.jumps.come_back(&space.jumps);
        std::mem::swap(&mut self.engine.fetches, &mut space.fetches);
    }

    fn flush_current(&mut self) {
        self.tlb.flush_local();
        self.engine.drop_local_addresses();
    }

    /// The current process-context identifier.
    fn pcid(&self) -> u64 {
        if self.cr4 & cr4::PCIDE != 0 { self.cr3 & 0xfff } else { 0 }
    }
}
