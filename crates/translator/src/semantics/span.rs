//! Guest bytes within one page, as host memory: how string and bit instructions reach RAM without a copy.
//!
//! A [`Span`] is only a pointer. It stays valid as long as the machine's RAM, but permissions may change whenever the
//! vCPU takes requests from others, so it is used at once and never kept.

use arch::Exception;

use crate::cpu::{Context, Vcpu};
use crate::mmu::Access;

/// Where guest bytes are in host memory.
#[derive(Clone, Copy)]
pub struct Span {
    pub host: *mut u8,
    /// Set where a store must be reported with [`Span::stored`]: the page has no write tag in the TLB.
    gpa: Option<u64>,
}

impl Span {
    /// `len` bytes at `va`, which must not cross a page. `None` if they are not plain RAM (MMIO, data breakpoints): the
    /// access must then go through `read_linear`/`write_linear`.
    pub fn find(cpu: &mut Vcpu, va: u64, access: Access, context: Context) -> Result<Option<Span>, Exception> {
        if let Some(span) = Self::cached(cpu, va, access, context) {
            return Ok(Some(span));
        }
        let mapping = cpu.fill_tlb(va, access, context)?;
        if let Some(span) = Self::cached(cpu, va, access, context) {
            return Ok(Some(span));
        }
        if cpu.dr7 & 0xff != 0 {
            return Ok(None);
        }
        // Memory without a tag holds translated code, or is not both read and written in the same place.
        let gpa = (access == Access::Write).then_some(mapping.gpa);
        let host = if access == Access::Write { cpu.writable(mapping.gpa) } else { cpu.readable(mapping.gpa) };
        Ok(host.map(|host| Span { host, gpa }))
    }

    fn cached(cpu: &Vcpu, va: u64, access: Access, context: Context) -> Option<Span> {
        let host = cpu.tlb.entry(context, va).host_address(va, 1, access == Access::Write)?;
        Some(Span { host: host as *mut u8, gpa: None })
    }

    /// Bookkeeping after `len` bytes were stored from `before` bytes below the span's address upwards.
    pub fn stored(self, cpu: &mut Vcpu, before: usize, len: usize) {
        if let Some(gpa) = self.gpa {
            cpu.ram_stored(gpa - before as u64, len);
        }
    }
}
