//! Forgetting translations of addresses: the one place that the instructions which do so go through.

use arch::registers::cr4;

use crate::Vcpu;

impl Vcpu {
    /// Forgets every translation, or, where the software TLB can tell them apart, all but global pages. Forgetting too
    /// much is always allowed (Intel SDM 3A 4.10.3.1).
    pub fn mmu_flush_all(&mut self, keep_global: bool) {
        if keep_global {
            self.tlb.flush_local();
            self.engine.drop_local_addresses();
        } else {
            self.tlb.flush_all();
            self.engine.drop_address_caches();
        }
    }

    /// Forgets the translation of the page at `va`.
    pub fn mmu_flush_page(&mut self, va: u64) {
        self.tlb.flush_page(va);
        self.engine.drop_address(va);
    }

    /// Sets CR3, already checked, and forgets what that invalidates (Intel SDM 3A 4.10.4.1): with bit 63 under
    /// CR4.PCIDE nothing needs to be, but the software TLB knows only one address space.
    pub fn mmu_load_cr3(&mut self, value: u64) {
        self.cr3 = value & !(1 << 63);
        self.mmu_flush_all(self.cr4 & cr4::PGE != 0);
    }
}
